"""`SmoothedVisionTower`: purifier, vision tower, mapper and Gaussian average as one model that a host runs."""

import contextlib

import torch
from transformers import PreTrainedModel

from .components import architecture_name, build_vision_model, check_psm, check_vision_model, is_own_purifier, placed
from .configuration_fs_psm import (
    OWN_PURIFIER,
    PSMConfig,
    SmoothedVisionTowerConfig,
    check_feature,
    check_smoothing,
)
from .feature_cache import RemembersFeatures
from .features import FeatureSelection, unit_vector
from .loading import StrictLoading
from .modeling_psm import NO_SPLIT_MODULES, PSMModel
from .noise import resolve_image_ids, resolve_seed
from .packed import PackedFeature, check_unpadded
from .passes import Passes
from .pixels import check_pixel_values, check_statistics, read_statistics
from .smoothing import RunningFeature


class SmoothedVisionTower(Passes, RemembersFeatures, StrictLoading, PreTrainedModel):
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

        The PSM is moved to the vision model's device and dtype, a purifier of yours to its device only; one that another
        tower uses elsewhere stays there, and this tower gets a copy. A PSM that remembers another base model than this one is taken with a warning.

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
            tower.psm = placed(psm, vision_tower.device, vision_tower.dtype)
        elif own_purifier:
            tower.psm.purifier = placed(psm, vision_tower.device)
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

    @property
    def sigma(self):
        """σ, in [0, 1] pixels: that of the configuration, checked when it is set."""
        return self.config.sigma

    @sigma.setter
    def sigma(self, value):
        check_smoothing(value, self.config.num_samples, self.config.max_batch_size)
        self.config.sigma = value

    @property
    def num_samples(self):
        """n₀: that of the configuration, checked when it is set."""
        return self.config.num_samples

    @num_samples.setter
    def num_samples(self, value):
        check_smoothing(self.config.sigma, value, self.config.max_batch_size)
        self.config.num_samples = value

    @property
    def patch_size(self):
        """The wrapped tower's, which hosts of a Pixtral ask for."""
        return self.config.patch_size

    def serves(self, feature):
        """Whether the host is given this very feature (`"tokens"`, `"pooled"` or `"cls"`), or only a part of it."""
        return self._selection.serves(feature)

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
                `image_sizes` tells a Pixtral where its padded images end; each is smoothed at its own size (`packed.py`).

        Returns:
            The wrapped tower's output class. Directions are those of the mean unit feature, lengths the mean length of
            the draws (theory.md "Direction and length"); the n₀-sample output itself is covered by theory Fact 4 only.

        Raises:
            TypeError: `pixel_values` is no floating point tensor.
            ValueError: another shape, NaN or Inf, or an output that is not smoothed was asked for.
        """
        check_pixel_values(pixel_values)
        settings = self._settings()
        states = self._requested_states(output_hidden_states, output_attentions)
        options = kwargs if states is None else kwargs | {"output_hidden_states": states}
        seed, ids = resolve_seed(generator), resolve_image_ids(image_ids, len(pixel_values))
        own_noise = generator is not None or image_ids is not None

        def smooth(images, options):
            return self._smooth(settings, seed, ids[: len(images)], images, options)

        output = self._remembered(smooth, settings, pixel_values, options, own_noise)
        return output.to_tuple() if return_dict is False else output

    def _settings(self):
        """What a call is computed with, read once: another thread may change a setting meanwhile."""
        config = self.config
        check_smoothing(config.sigma, config.num_samples, config.max_batch_size)
        statistics = tuple(config.image_mean), tuple(config.image_std)
        return config.sigma, config.num_samples, config.aggregation == "unit", self._selection, statistics

    def _smooth(self, settings, seed, image_ids, pixel_values, options):
        """The wrapped tower's output class, of the means over the draws of every image."""
        sigma, num_samples, unit, selection, statistics = settings
        model, limit = self._model(whole=not selection.restricted), self._limit(pixel_values)
        running, template = {}, None
        for images, output in self._passes(
            model, selection, pixel_values, options, seed, image_ids, sigma, range(num_samples), limit, statistics
        ):
            template = output
            for place, tensors in selection.collect(output).items():
                if place not in running:
                    first_token = selection.first_token_of(place)
                    kind = PackedFeature if self._is_packed else RunningFeature
                    running[place] = kind(len(pixel_values), num_samples, unit, first_token)
                running[place].add(images, tensors)
        return selection.rebuild(template, {place: mean.result(self.dtype) for place, mean in running.items()})

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
            # Hosts of these ask for the last state and read the last output: they are given the latter alone.
            asks_in_vain = self.config.vision_config.model_type.startswith(("internvl", "qianfan_ocr"))
            allowed = selection.layers or ((selection.num_layers,) if asks_in_vain else ())
            other = [i for i in asked if not -count <= i < count or i % count not in allowed]
            if other:
                own = f"`feature_layer={self.config.feature_layer}`" if selection.layers else "the mapped last output"
                raise ValueError(
                    f"`output_hidden_states` asks for layer {other[0]}, but this tower smooths only {own}"
                )
        return sorted(set(selection.layers)) or None

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
        check_unpadded(pixel_values, self.config.vision_config)
        check_smoothing(self.config.sigma, num_samples, self.config.max_batch_size)
        self._selection.check(feature, per_token)
        seed, ids = resolve_seed(generator), resolve_image_ids(image_ids, len(pixel_values))
        selection = self._selection
        options, whole = selection.options(feature)
        setting = {"model": self._model(whole), "selection": selection, "options": options, "seed": seed}
        setting |= {"sigma": self.config.sigma, "limit": self._limit(pixel_values)}
        setting |= {"statistics": (self.config.image_mean, self.config.image_std)}
        unit = {"center": center, "per_token": per_token}
        return self._stream(pixel_values, ids, range(start, start + num_samples), feature, unit, setting)

    @torch.no_grad()
    def _stream(self, pixel_values, image_ids, draws, feature, unit, setting):
        setting["fill"] = min(len(draws), setting["limit"])
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
        check_unpadded(pixel_values, self.config.vision_config)
        self._selection.check(feature, per_token)
        options, whole = self._selection.options(feature)
        images = pixel_values.float()
        selection, statistics = self._selection, self._statistics(images)
        canvas = tuple(images.shape[2:]) if self._is_packed else None
        (output,) = self._network(
            self._model(whole), [images], [None], 1, 0.0, statistics, selection, options, raw=True, canvas=canvas
        )
        vector = selection.vector(output, feature)
        return unit_vector(vector, center, per_token) if unit else vector.flatten(1)
