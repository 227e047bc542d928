"""`SmoothedVisionTower`: purifier, vision tower, mapper and Gaussian average as one model that a host runs."""

import contextlib

import torch
from transformers import PreTrainedModel

from .components import architecture_name, build_vision_model, check_psm, check_vision_model, is_own_purifier
from .configuration_fs_psm import (
    OWN_PURIFIER,
    PSMConfig,
    SmoothedVisionTowerConfig,
    check_feature,
    check_smoothing,
)
from .features import FeatureSelection, unit_vector
from .loading import StrictLoading
from .modeling_psm import NO_SPLIT_MODULES, PSMModel
from .noise import gaussian_noise, resolve_image_ids, resolve_seed
from .pixels import channel_tensor, check_pixel_values, check_statistics, from_unit, read_statistics, to_unit
from .smoothing import RunningFeature, default_batch_size, plan_passes
from .truncation import truncated


class SmoothedVisionTower(StrictLoading, PreTrainedModel):
    """A vision tower replaced by its Gaussian average (paper eq. 3), behind a purifier and before a mapper (eq. 14).

    Called like the tower it wraps and answering with the same output class. Every tensor of the answer is smoothed:
    what was not is `None`, and asking for it is an error. With `feature_layer` set, or with a mapper, only the feature
    the host reads is computed. See [`SmoothedVisionTowerConfig`] for the settings.
    """

    config_class = SmoothedVisionTowerConfig
    base_model_prefix = "smoothed_vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = NO_SPLIT_MODULES

    def __init__(self, config):
        super().__init__(config)
        check_statistics(config.image_mean, config.image_std)
        self.vision_tower = build_vision_model(config)
        self.psm = PSMModel._from_config(config.psm_config)
        self._last_selection = FeatureSelection.of(config)
        self._compiled_pass = None
        self._short = None
        self.post_init()

    # Built and loaded -------------------------------------------------------------------------------------------------

    @classmethod
    def from_components(
        cls,
        vision_tower,
        psm=None,
        *,
        sigma=0.25,
        num_samples=4,
        feature_layer=None,
        first_token=0,
        image_mean=None,
        image_std=None,
        processor=None,
        max_batch_size=None,
        aggregation="unit",
    ):
        """Assemble a tower from a vision model and a PSM; no weight is copied.

        The PSM is moved to the vision model's device and dtype, a purifier of yours to its device only. A PSM that
        remembers another base model than this one is taken with a warning.

        Args:
            vision_tower (`PreTrainedModel`): a CLIP-like vision model, called with `pixel_values`.
            psm ([`PSMModel`], `torch.nn.Module` or `None`): purifier and mapper; or a purifier of yours with
                `denoise(images_01, sigma) -> images_01`; or `None` for plain smoothing.
            processor (*optional*): an image processor, or a processor that has one, to take `image_mean` and
                `image_std` from where they are not given.

        The other arguments are those of [`SmoothedVisionTowerConfig`].

        Raises:
            TypeError: `vision_tower` or `psm` is of another kind.
            ValueError: a setting out of range, a layer that does not exist, a mapper of another width, or no
                normalisation given.
        """
        check_vision_model(vision_tower)
        own_purifier = is_own_purifier(psm)
        if isinstance(psm, PSMModel):
            check_psm(psm, vision_tower)
        if image_mean is None and image_std is None and processor is not None:
            image_mean, image_std = read_statistics(processor)
        check_statistics(image_mean, image_std)
        check_smoothing(sigma, num_samples, max_batch_size)
        check_feature(feature_layer, first_token, aggregation)
        kernel = vision_tower.config._attn_implementation
        config = SmoothedVisionTowerConfig(
            vision_config=vision_tower.config,
            vision_architecture=architecture_name(vision_tower),
            psm_config=PSMConfig() if psm is None or own_purifier else psm.config,
            sigma=sigma,
            num_samples=num_samples,
            feature_layer=feature_layer,
            first_token=first_token,
            image_mean=list(image_mean),
            image_std=list(image_std),
            max_batch_size=max_batch_size,
            aggregation=aggregation,
            attn_implementation=kernel,
        )
        # The skeleton is made on the meta device and given the ready parts, so that nothing is initialised twice.
        try:
            with torch.device("meta"):
                tower = cls(config)
        finally:
            # transformers settles the attention kernel of a new model in all configurations below it.
            vision_tower.config._attn_implementation = kernel
        tower.vision_tower = vision_tower
        if isinstance(psm, PSMModel):
            # One dtype, which is what a saved tower can remember.
            tower.psm = psm.to(device=vision_tower.device, dtype=vision_tower.dtype)
        elif own_purifier:
            tower.psm.purifier = psm.to(vision_tower.device)
            # A configuration that says so, so that no copy of this model, in a host or not, reloads without it.
            tower.config.psm_config = tower.psm.config = PSMConfig(purifier=OWN_PURIFIER)
        tower.config.dtype = vision_tower.dtype
        return tower.eval()

    def save_pretrained(self, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: the purifier is a module of yours, which no configuration can describe.
        """
        if self.config.psm_config.purifier == OWN_PURIFIER:
            raise ValueError(
                f"`{type(self.psm.purifier).__name__}` is a purifier of yours that config.json cannot describe: save it "
                "yourself and give it to `from_components` again"
            )
        return super().save_pretrained(*args, **kwargs)

    def _init_weights(self, module):
        # The parts initialise themselves; the tower has no weights of its own.
        return

    def __getstate__(self):
        # What was made from this object's parts would not be made from the copy's.
        return super().__getstate__() | {"_compiled_pass": None, "_short": None}

    # Settings ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def smoothing(self, *, sigma=None, num_samples=None, max_batch_size=None):
        """A temporary setting of σ (in [0, 1] pixels), n₀ or the batch limit, checked before and restored after.

        It is a setting of the tower, seen by every thread that uses it meanwhile. A stream of `sample_features` keeps the
        setting it was made under.
        """
        before = {name: getattr(self.config, name) for name in ("sigma", "num_samples", "max_batch_size")}
        given = {"sigma": sigma, "num_samples": num_samples, "max_batch_size": max_batch_size}
        after = before | {name: value for name, value in given.items() if value is not None}
        check_smoothing(**after)
        try:
            for name, value in after.items():
                setattr(self.config, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self.config, name, value)

    def compile(self, *args, **kwargs):
        """`torch.compile` of one pass (noise to features); the loop around it stays Python and its shapes stay fixed."""
        self._compiled_pass = torch.compile(self._network, *args, **kwargs)
        return self

    @property
    def _selection(self):
        # Follows the configuration, and is one object while that stays, which torch.compile needs.
        selection = FeatureSelection.of(self.config)
        if selection != self._last_selection:
            self._last_selection = selection
        return self._last_selection

    def serves(self, feature):
        """Whether the host is given this very feature (`"tokens"`, `"pooled"` or `"cls"`), or only a part of it."""
        return self._selection.serves(feature)

    # One pass ---------------------------------------------------------------------------------------------------------

    def _model(self, whole):
        """The wrapped tower: the `whole` of it, or cut after the last feature layer where nothing behind it is needed."""
        depth = self._selection.depth
        if whole or depth is None:
            return self.vision_tower
        # Kept, so that torch.compile sees one object; made again for another layer, or where a block was exchanged
        # (adapters, for one).
        parts = depth, *(id(module) for module in self.vision_tower.modules())
        if self._short is None or self._short[0] != parts:
            self._short = parts, truncated(self.vision_tower, depth)
        return self._short[1]

    def _network(self, model, images, noise, num_samples, sigma, statistics, selection, options, raw=False):
        """Purifier, wrapped tower and mapper on the noisy copies of some images.

        Args:
            model (`PreTrainedModel`): from `_model`.
            images (`torch.Tensor` of shape `(b, 3, height, width)`): in [0, 1] with a purifier, normalised without.
            noise (`torch.Tensor` of shape `(b * num_samples, 3, height, width)` or `None`): unit noise, overwritten.
            statistics (pair of `torch.Tensor` of shape `(3, 1, 1)`): mean and standard deviation of the normalisation.
            selection ([`FeatureSelection`]): what the mapper refines.
            options (`dict`): further arguments of the wrapped tower.
            raw (`bool`): the wrapped tower alone, neither purifier nor mapper, on normalised images.

        Returns:
            The wrapped tower's output class for `b * num_samples` images.
        """
        mean, std = statistics
        purified = self.psm.purifier is not None and not raw
        copies = images[:, None].expand(-1, num_samples, -1, -1, -1)  # (b, n, 3, H, W)
        if noise is None:
            pixels = copies.flatten(0, 1)  # (b*n, 3, H, W)
        else:
            # Noise of σ in [0, 1] pixels is σ / std in normalised ones, where the tower without a purifier lives.
            scale = sigma if purified else sigma / std
            pixels = noise.mul_(scale).view(copies.shape).add_(copies).flatten(0, 1)
        if purified:
            purified_pixels = self.psm(pixels, sigma)
            pixels = from_unit(purified_pixels, mean.to(purified_pixels), std.to(purified_pixels))
        output = model(pixel_values=pixels.to(self.vision_tower.dtype), return_dict=True, **options)
        if self.psm.mapper is not None and not raw:
            selection.refine(output, self.psm.mapper, sigma)
        return output

    def _limit(self, pixel_values):
        """Most noisy images in one pass."""
        return self.config.max_batch_size or default_batch_size(*pixel_values.shape[2:], pixel_values.device)

    def _statistics(self, images):
        return channel_tensor(self.config.image_mean, images), channel_tensor(self.config.image_std, images)

    def _passes(self, model, selection, pixel_values, options, seed, image_ids, sigma, samples, limit):
        """Run every pass of a call.

        Args:
            samples (`range`): numbers of the draws of each image.
            limit (`int`): most noisy images in one pass.

        Yields:
            `tuple[slice, ModelOutput]`: the images of the pass and the wrapped tower's answer for their draws.
        """
        batch_size, shape = len(pixel_values), tuple(pixel_values.shape[1:])
        images = pixel_values.float()
        statistics = self._statistics(images)
        if self.psm.purifier is not None:
            images = to_unit(images, *statistics)
        network = self._compiled_pass or self._network
        for chosen, numbers in plan_passes(batch_size, len(samples), limit, samples.start):
            count, noise = len(numbers), None
            if sigma > 0:
                noise = gaussian_noise(shape, seed, image_ids[chosen], numbers.start, count, pixel_values.device)
            repeated = {
                name: value[chosen].repeat_interleave(count, 0)
                if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch_size
                else value
                for name, value in options.items()
            }
            yield chosen, network(model, images[chosen], noise, count, sigma, statistics, selection, repeated)

    # Called by hosts --------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values,
        output_hidden_states=None,
        output_attentions=None,
        generator=None,
        image_ids=None,
        return_dict=None,
        **kwargs,
    ):
        """The smoothed features: the mean over `num_samples` noisy draws of every image.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Images normalised by the wrapped tower's image processor.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Hidden states to return, as the wrapped tower takes it.
            output_attentions (`bool`, *optional*):
                Attention maps are never smoothed: `True` is an error.
            generator (`torch.Generator` or `int`, *optional*):
                Source of the noise; the operating system where not given, so that nobody can predict it.
            image_ids (`list[int]`, *optional*):
                Names of the images, so that an image gets the same noise in whatever batch it comes; its position
                where not given.
            kwargs:
                For the wrapped tower. Tensors with `batch_size` rows are repeated with the images.

        Returns:
            The wrapped tower's output class. Directions are those of the mean unit feature, lengths the mean length of
            the draws (theory.md "Direction and length"); the n₀-sample output itself is covered by theory Fact 4 only.

        Raises:
            TypeError: `pixel_values` is no floating point tensor.
            ValueError: another shape, NaN or Inf, or an output that is not smoothed was asked for.
        """
        check_pixel_values(pixel_values)
        sigma, num_samples = self.config.sigma, self.config.num_samples
        check_smoothing(sigma, num_samples, self.config.max_batch_size)
        states = self._requested_states(output_hidden_states, output_attentions)
        options = kwargs if states is None else kwargs | {"output_hidden_states": states}
        seed, ids = resolve_seed(generator), resolve_image_ids(image_ids, len(pixel_values))
        selection, unit = self._selection, self.config.aggregation == "unit"
        model, limit = self._model(whole=not selection.restricted), self._limit(pixel_values)
        running, template = {}, None
        for images, output in self._passes(
            model, selection, pixel_values, options, seed, ids, sigma, range(num_samples), limit
        ):
            template = output
            for place, tensors in selection.collect(output).items():
                if place not in running:
                    first_token = selection.first_token_of(place)
                    running[place] = RunningFeature(len(pixel_values), num_samples, unit, first_token)
                running[place].add(images, tensors)
        output = selection.rebuild(template, {place: mean.result(self.dtype) for place, mean in running.items()})
        return output.to_tuple() if return_dict is False else output

    def _requested_states(self, output_hidden_states, output_attentions):
        """What to ask of the wrapped tower as `output_hidden_states`; `None` leaves it to its own configuration."""
        configured = self.config.output_attentions or self.config.vision_config.output_attentions
        if output_attentions or (output_attentions is None and configured):
            raise ValueError("`output_attentions` must be False, got True: attention maps are not smoothed")
        selection = self._selection
        if not selection.restricted:
            return output_hidden_states
        if output_hidden_states is not None and not isinstance(output_hidden_states, bool):
            asked = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
            count = selection.num_layers + 1
            other = [i for i in asked if not -count <= i < count or i % count not in selection.layers]
            if other:
                own = f"`feature_layer={self.config.feature_layer}`" if selection.layers else "the mapped last output"
                raise ValueError(
                    f"`output_hidden_states` asks for layer {other[0]}, but this tower smooths only {own}"
                )
        return list(selection.layers) or None

    # Called by certification ------------------------------------------------------------------------------------------

    def sample_features(
        self,
        pixel_values,
        num_samples,
        feature="tokens",
        generator=None,
        image_ids=None,
        start=0,
        center=None,
        per_token=False,
    ):
        """Stream unit features of noisy draws, one pass at a time; no pass is kept.

        Passes hold draws of one image only, so an image's features are the same to the bit in whatever batch it comes.
        The settings and the seed are those of the moment of the call, whenever the stream is read. No gradients.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
            num_samples (`int`): draws per image.
            feature (`str`): `"tokens"`, the flattened feature the host reads; `"cls"`, its class token; `"pooled"`, the
                final embedding, after any projection.
            generator, image_ids: as in `forward`.
            start (`int`): number of the first draw, to go on where another call stopped.
            center (`torch.Tensor` of shape `(F,)`, *optional*): fixed vector to subtract before normalising.
            per_token (`bool`): a unit vector for each token of `"tokens"`, not one for all of them.

        Returns:
            Iterator of `torch.Tensor` of shape `(batch_size, m, F)`, or `(batch_size, m, tokens, width)` with `per_token`,
            float32: draws `start`, `start + 1`, … m at a time.

        Raises:
            TypeError: `pixel_values` is no floating point tensor.
            ValueError: another shape, NaN or Inf, a setting out of range, or a feature this tower does not have.
        """
        check_pixel_values(pixel_values)
        check_smoothing(self.config.sigma, num_samples, self.config.max_batch_size)
        self._selection.check(feature, per_token)
        seed, ids = resolve_seed(generator), resolve_image_ids(image_ids, len(pixel_values))
        selection = self._selection
        options, whole = selection.options(feature)
        setting = {"model": self._model(whole), "selection": selection, "options": options, "seed": seed}
        setting |= {"sigma": self.config.sigma, "limit": self._limit(pixel_values)}
        unit = {"center": center, "per_token": per_token}
        return self._stream(pixel_values, ids, range(start, start + num_samples), feature, unit, setting)

    @torch.no_grad()
    def _stream(self, pixel_values, image_ids, draws, feature, unit, setting):
        for first in draws[:: setting["limit"]]:
            samples = range(first, min(first + setting["limit"], draws.stop))
            rows = []
            for i, image_id in enumerate(image_ids):
                image = pixel_values[i : i + 1]
                ((_, output),) = self._passes(pixel_values=image, image_ids=[image_id], samples=samples, **setting)
                rows.append(unit_vector(setting["selection"].vector(output, feature), **unit))
            yield torch.stack(rows)

    @torch.no_grad()
    def clean_features(self, pixel_values, feature="tokens", center=None, per_token=False, unit=True):
        """Unit features of the wrapped tower alone on the images as they are: the paper's anchor f(x)/‖f(x)‖.

        Args:
            feature, center, per_token: as in `sample_features`.
            unit (`bool`): divide by the length; without, the raw features, whose mean over images makes a `center`.

        Returns:
            `torch.Tensor` of shape `(batch_size, F)`, or `(batch_size, tokens, width)` with `per_token`, float32.
        """
        check_pixel_values(pixel_values)
        self._selection.check(feature, per_token)
        options, whole = self._selection.options(feature)
        images = pixel_values.float()
        selection, statistics = self._selection, self._statistics(images)
        output = self._network(self._model(whole), images, None, 1, 0.0, statistics, selection, options, raw=True)
        vector = selection.vector(output, feature)
        return unit_vector(vector, center, per_token) if unit else vector.flatten(1)
