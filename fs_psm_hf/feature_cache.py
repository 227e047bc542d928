"""An optional memory of smoothed features, so that an image that comes again is not smoothed again."""

import hashlib
import threading
import weakref
from collections import OrderedDict

import torch

from .packed import is_packed


# What PEFT keeps on an adapted layer, beside its tensors, that decides what the layer computes.
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


class FeatureCache:
    """Smoothed features of the last images that a tower was given: `tower.feature_cache = FeatureCache(max_images=256)`.

    Off until it is set, switched off again by `tower.feature_cache = None`, and gone from a copy of the tower. An image
    is known by a hash of its float32 values and of everything else that its result depends on: shape, σ, n₀,
    aggregation, feature layer and first token, normalisation, device, attention kernel, autocast and the arguments of
    the call, those with one row per image row by row. In a batch only the unknown images are computed, and equal ones
    once. `max_batch_size` is not part of it: it moves features by rounding only.

    Not used, and nothing is remembered, where `generator` or `image_ids` asks for noise of one's own, where a module of
    the tower is in training mode, where a gradient is recorded, while `torch.compile` traces the tower, for a model
    that packs the images of a batch into one row (Pixtral), and with an argument that is neither plain nor a tensor of
    one value or one row per image.

    **Weights.** All is forgotten when a parameter or buffer of the tower was moved or written in place (`load_state_dict`,
    an optimiser, `to`), one of them or a module was exchanged, or a PEFT adapter was added, merged, scaled, switched on or
    off. What no version counter shows is *not* noticed: a write into `parameter.data`, a forward hook, a change of a
    purifier of yours that is not in its tensors, global kernel flags such as TF32. Call [`clear`](FeatureCache.clear) after one.
    Weights that accelerate offloads are new ones in every call, so that nothing is ever remembered.

    **What a remembered answer is.** One draw of the noise, used again. Theory Fact 4 holds for it as for any answer: for
    an image fixed before its noise was drawn, it fails with probability at most α + β. But the same image again is the
    same event, not a new one: a failure stays until the entry leaves, and asking again does not average it out.
    How fast an answer comes tells whether somebody sent this very image before: where users must not learn that of
    each other, give each a tower of its own, or none a cache.

    Memory: `max_images` times what the tower returns for an image (1.2 MB for 577 tokens of width 1,024 in bfloat16), on
    the device of the result. Safe to use from several threads; two that meet the same new image may both compute it.

    Args:
        max_images (`int`): most images to remember; the one unused for longest leaves first.

    Attributes:
        hits, misses (`int`): images answered from memory, or as a copy in their batch, and images computed.

    Raises:
        ValueError: `max_images` is no integer >= 1.
    """

    def __init__(self, max_images=256):
        if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
            raise ValueError(f"`max_images` must be an integer >= 1, got {max_images!r}")
        self.max_images = max_images
        self.hits = self.misses = 0
        self._rows = OrderedDict()  # key: (output class, fields) of one image, the last used one last
        self._lock = threading.RLock()
        self._owner = None
        self._weights = None
        # Results that were begun before a `clear` must not be stored after it.
        self._generation = 0

    def __len__(self):
        return len(self._rows)

    def __repr__(self):
        return (
            f"FeatureCache(max_images={self.max_images}): {len(self)} images, {self.hits} hits, {self.misses} misses"
        )

    def clear(self):
        """Forget every image, and what is being computed at this moment."""
        with self._lock:
            self._rows.clear()
            self._weights = None
            self._generation += 1

    # Called by the tower ----------------------------------------------------------------------------------------------

    def claim(self, tower):
        """Make `tower` the one this cache belongs to.

        Raises:
            ValueError: it belongs to another one, whose features would be mistaken for this one's.
        """
        with self._lock:
            owner = self._owner and self._owner()
            if owner is not None and owner is not tower:
                raise ValueError(
                    "`feature_cache` must be a FeatureCache of this tower alone, got one that another tower uses"
                )
            if owner is None:
                self.clear()
            self._owner = weakref.ref(tower)

    def belongs_to(self, tower):
        """Whether `tower` is the one, and not a replica that shares its attributes but not its weights."""
        return self._owner is not None and self._owner() is tower

    def release(self):
        """Give the cache up, empty, for whatever tower is next."""
        with self._lock:
            self.clear()
            self._owner = None

    def through(self, tower, keys, compute):
        """The output of a batch, computed for those images alone that are not known.

        Args:
            tower (`torch.nn.Module`): every weight the result depends on.
            keys (`list[bytes]`): from [`image_keys`].
            compute (`Callable`): takes the `list[int]` of positions to compute and returns their `ModelOutput`.

        Returns:
            `ModelOutput` of `len(keys)` rows, in memory of its own.
        """
        weights = _weights(tower)
        with self._lock:
            if self._weights is None or not _same(self._weights, weights):
                self.clear()
                self._weights = [weakref.ref(part) for part in weights[0]], weights[1]
            generation = self._generation
            found = {key: self._rows[key] for key in keys if key in self._rows}
            for key in found:
                self._rows.move_to_end(key)
        new = {key: position for position, key in reversed(list(enumerate(keys))) if key not in found}
        missing = sorted(new.values())
        if missing:
            output = compute(missing)
            rows = _split(output, len(missing))
            if rows is None:
                return output if len(missing) == len(keys) else compute(list(range(len(keys))))
            fresh = {keys[position]: row for position, row in zip(missing, rows, strict=True)}
            found |= fresh
        with self._lock:
            self.hits += len(keys) - len(missing)
            self.misses += len(missing)
            if missing and generation == self._generation:
                self._rows.update(fresh)
                while len(self._rows) > self.max_images:
                    self._rows.popitem(last=False)
        return _join([found[key] for key in keys])


class RemembersFeatures:
    """The part of a tower that asks its [`FeatureCache`], if it was given one."""

    _feature_cache = None

    @property
    def feature_cache(self):
        """The [`FeatureCache`] of this tower, or `None`, which smooths every image anew and is the default."""
        return self._feature_cache

    @feature_cache.setter
    def feature_cache(self, cache):
        if cache is not None:
            if not isinstance(cache, FeatureCache):
                raise TypeError(f"`feature_cache` must be a FeatureCache or None, got {type(cache).__name__}")
            cache.claim(self)
        if self._feature_cache is not None and self._feature_cache is not cache:
            self._feature_cache.release()
        self._feature_cache = cache

    def __getstate__(self):
        # A copy has weights of its own, which the cache would not see change.
        return super().__getstate__() | {"_feature_cache": None}

    def _remembered(self, compute, settings, pixel_values, options, own_noise):
        """`compute(pixel_values, options)`, for unknown images alone where a cache may be used.

        Args:
            compute (`Callable`): gives the `ModelOutput` of some of the images.
            settings (`tuple`): what `compute` uses beside its arguments and the weights; its `repr` is its identity.
            own_noise (`bool`): the caller chose the noise.
        """
        cache, count = self._feature_cache, len(pixel_values)
        keys = None
        if cache is not None and cache.belongs_to(self) and not own_noise and self._answers_may_be_kept(pixel_values):
            keys = image_keys((settings, self.compiled, _defaults(self.vision_tower.config)), pixel_values, options)
        if keys is None:
            return compute(pixel_values, options)

        def compute_some(rows):
            if len(rows) == count:
                return compute(pixel_values, options)
            chosen = {
                name: value[rows] if isinstance(value, torch.Tensor) and value.ndim else value
                for name, value in options.items()
            }
            return compute(pixel_values[rows], chosen)

        return cache.through(self, keys, compute_some)

    def _answers_may_be_kept(self, pixel_values):
        if torch.compiler.is_compiling() or any(module.training for module in self.modules()):
            return False
        if is_packed(self.config.vision_config):  # no row of its output belongs to one image
            return False
        if not torch.is_grad_enabled():
            return True
        return not pixel_values.requires_grad and not any(weight.requires_grad for weight in self.parameters())


def image_keys(settings, pixel_values, options):
    """A hash for each image of everything its result depends on, but for the weights.

    Args:
        settings (`tuple`): plain values, those the computation uses.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
        options (`dict`): further arguments of the wrapped tower.

    Returns:
        `list[bytes]`, or `None` where an option is neither plain nor a tensor of one value or one row per image.
    """
    count, device = len(pixel_values), pixel_values.device
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    shared, rowwise = [settings, autocast, device, pixel_values.dtype], [("pixel_values", pixel_values.float())]
    for name, value in sorted(options.items()):
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            return None
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
            rowwise.append((name, value))
        elif isinstance(value, torch.Tensor) and not value.ndim:
            shared.append((name, value.dtype, value.item()))
        elif _is_plain(value):
            shared.append((name, value))
        else:
            return None
    tables = []
    for name, value in rowwise:
        shared.append((name, value.dtype, tuple(value.shape[1:])))
        table = value.detach().to("cpu").reshape(count, value[0].numel()).contiguous()
        tables.append(table.view(torch.uint8).numpy())
    start = hashlib.blake2b(repr(shared).encode(), digest_size=32)
    keys = []
    for i in range(count):
        digest = start.copy()
        for table in tables:
            digest.update(table[i])
        keys.append(digest.digest())
    return keys


def _defaults(config):
    """What a wrapped model takes from its configuration where a call does not say it."""
    return [getattr(config, name, None) for name in ("_attn_implementation", "output_hidden_states")]


def _is_plain(value):
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def _weights(tower):
    """The tensors and modules of a tower, and for each tensor and adapter what shows a change."""
    tensors, modules = [*tower.parameters(), *tower.buffers()], [*tower.modules()]
    marks = [(None if t.is_inference() else t._version, t.data_ptr(), t.dtype, t.device) for t in tensors]
    adapters = [[repr(vars(module)[name]) for name in _ADAPTER_STATE if name in vars(module)] for module in modules]
    return [*tensors, *modules], (marks, adapters)


def _same(before, now):
    (references, marks), (parts, new_marks) = before, now
    # By identity: the address of what is gone may be another's by now.
    return (
        len(references) == len(parts)
        and all(reference() is part for reference, part in zip(references, parts, strict=True))
        and marks == new_marks
    )


def _split(output, count):
    """One `(class, fields)` per image, in memory of its own; `None` where a tensor has not a row for each."""
    rows = [(type(output), {}) for _ in range(count)]
    for name, value in output.items():
        entries = value if isinstance(value, tuple) else (value,)
        if any(entry is not None and len(entry) != count for entry in entries):
            return None
        for i, (_, fields) in enumerate(rows):
            own = tuple(None if entry is None else entry[i].detach().clone() for entry in entries)
            fields[name] = own if isinstance(value, tuple) else own[0]
    return rows


def _join(rows):
    """The output of a batch whose images are `rows`."""
    (kind, first), fields = rows[0], {}
    for name, value in first.items():
        columns = [row[name] if isinstance(value, tuple) else (row[name],) for _, row in rows]
        stacked = tuple(None if entries[0] is None else torch.stack(entries) for entries in zip(*columns, strict=True))
        fields[name] = stacked if isinstance(value, tuple) else stacked[0]
    return kind(**fields)
