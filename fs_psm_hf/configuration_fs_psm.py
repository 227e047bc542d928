"""Configurations of the PSM (what is trained and published) and of the smoothed vision tower (what a host runs)."""

import math

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


PURIFIERS = ("none", "diffusion", "unet")
# Marks a module of the user's, which no configuration can describe.
OWN_PURIFIER = "own"
AGGREGATIONS = ("unit", "mean")
MAPPER_FEATURES = ("tokens", "pooled")
# What a host reads from the configuration of its vision tower.
_VISION_FIELDS = (
    "hidden_size",
    "image_size",
    "patch_size",
    "num_channels",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "projection_dim",
    "layer_norm_eps",
    "tie_last_hidden_states",
)


def _refuse_other_model_type(cls, config_dict):
    given = config_dict.get("model_type")
    if given is not None and given != cls.model_type:
        raise ValueError(
            f"`model_type` must be {cls.model_type!r}, got {given!r}: to smooth a {given!r} checkpoint, load it with "
            "its own class and use `SmoothedVisionTower.from_components(vision_tower, psm, ...)` or `attach(host, psm, ...)`"
        )


def check_feature(feature_layer, first_token, aggregation):
    """Raise `ValueError` unless the feature is described by integers and the aggregation is known."""
    layers = feature_layer if isinstance(feature_layer, (list, tuple)) else [feature_layer]
    if feature_layer is not None and any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
        raise ValueError(f"`feature_layer` must be an integer, a list of integers or None, got {feature_layer!r}")
    if isinstance(first_token, bool) or not isinstance(first_token, int) or first_token < 0:
        raise ValueError(f"`first_token` must be an integer >= 0, got {first_token!r}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"`aggregation` must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")


def check_smoothing(sigma, num_samples, max_batch_size=None):
    """Raise `ValueError` unless σ (in [0, 1] pixels), n₀ and the batch limit are usable."""
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not math.isfinite(sigma) or sigma < 0:
        raise ValueError(f"`sigma` must be a finite number >= 0 in [0, 1] pixel units, got {sigma!r}")
    for name, value in (("num_samples", num_samples), ("max_batch_size", max_batch_size)):
        if name == "max_batch_size" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}")


@strict
class PSMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PSMModel`]: a purifier before the vision tower and a smoothness mapper after it.

    Args:
        purifier (`str`, defaults to `"none"`):
            `"none"`, `"diffusion"` (one step of a diffusers `UNet2DModel` that predicts ε), `"unet"` (light
            σ-conditioned denoiser), or `"own"`, the mark of a module of yours that only `from_components` can set.
        purifier_config (`dict`, *optional*):
            Arguments of the `UNet2DModel`, and two more that converted networks may need (`unet.py`); the published sizes
            where not given.
        mapper_config (`dict`, *optional*):
            Arguments of [`SmoothnessMapper`]; no mapper where not given.
        mapper_feature (`str`, defaults to `"tokens"`):
            What the mapper refines: `"tokens"` of the feature layer or the `"pooled"` embedding.
        base_model_name_or_path (`str`, *optional*), base_model_revision (`str`, *optional*):
            The vision tower it was trained for.
    """

    model_type = "fs_psm"

    purifier: str = "none"
    purifier_config: dict | None = None
    mapper_config: dict | None = None
    mapper_feature: str = "tokens"
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.purifier not in (*PURIFIERS, OWN_PURIFIER):
            raise ValueError(f"`purifier` must be one of {', '.join(PURIFIERS)}, got {self.purifier!r}")
        if self.mapper_feature not in MAPPER_FEATURES:
            raise ValueError(
                f"`mapper_feature` must be one of {', '.join(MAPPER_FEATURES)}, got {self.mapper_feature!r}"
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As the base class, refusing the configuration of another kind of model."""
        _refuse_other_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)


@strict
class SmoothedVisionTowerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SmoothedVisionTower`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`):
            Configuration of the wrapped vision tower.
        vision_architecture (`str`, *optional*):
            transformers class of the wrapped tower where `AutoModel` would build another one
            (`"CLIPVisionModelWithProjection"`).
        psm_config (`dict` or [`PSMConfig`]):
            Purifier and mapper; by default neither, which is plain feature-space smoothing.
        sigma (`float`, defaults to 0.25):
            Standard deviation of the Gaussian noise, in [0, 1] pixel units.
        num_samples (`int`, defaults to 4):
            Draws that are averaged, the paper's n₀.
        feature_layer (`int` or `list[int]`, *optional*):
            Hidden state (or states) the host reads, as in `hidden_states[feature_layer]`; the last output where not given.
        first_token (`int`, defaults to 0):
            First token of the feature that the host reads: 1 where it drops the class token, as LLaVA does.
        image_mean, image_std (`list[float]`):
            Normalisation of the `pixel_values` the tower receives; from its image processor.
        max_batch_size (`int`, *optional*):
            Most noisy images in one pass; chosen by image size and device where not given.
        aggregation (`str`, defaults to `"unit"`):
            `"unit"` averages unit features and restores the mean length; `"mean"` averages raw features, for comparison, and
            carries no certificate.
    """

    model_type = "smoothed_vision_tower"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "psm_config": PSMConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    vision_architecture: str | None = None
    psm_config: dict | PreTrainedConfig | None = None
    sigma: float | int = 0.25
    num_samples: int = 4
    feature_layer: int | list[int] | None = None
    first_token: int = 0
    image_mean: list | None = None
    image_std: list | None = None
    max_batch_size: int | None = None
    aggregation: str = "unit"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_smoothing(self.sigma, self.num_samples, self.max_batch_size)
        check_feature(self.feature_layer, self.first_token, self.aggregation)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As the base class, refusing the configuration of another kind of model."""
        _refuse_other_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)

    def __getattr__(self, name):
        # Shapes are the wrapped tower's; one source, so they cannot disagree.
        if name in _VISION_FIELDS and "vision_config" in self.__dict__:
            return getattr(self.vision_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
