"""The table of hosts: where each keeps its vision tower, and which feature it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import InternVLConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_fs_psm import SmoothedVisionTowerConfig


@dataclass(frozen=True)
class HostKind:
    """How a family of hosts holds and reads its tower.

    Args:
        layer (`str` or `Callable`, *optional*): configuration field with the feature layer or layers, or a function of the
            configuration; nothing where the host reads `last_hidden_state`.
        strategy (`str`, *optional*): configuration field that is `"default"` where the class token is dropped.
        drops_class_token (`bool`): whether it is dropped whatever the configuration says.
        tower (`str`): attribute that holds the tower.
        holder (`str`): attribute that leads from the host to the module that holds the tower.
        last_layer_is_output (`bool`): whether layer -1 stands for `last_hidden_state`, not for `hidden_states[-1]`.
        unsavable (`str`, *optional*): why the host cannot be saved with a smoothed tower in it. Nothing where it builds its tower
            with `AutoModel`, so that its configuration describes a smoothed one too.
        wraps_bare_module (`bool`): whether the tower is a plain `torch.nn.Module`, no model of transformers.
    """

    layer: str | Callable | None = None
    strategy: str | None = None
    drops_class_token: bool = False
    tower: str = "vision_tower"
    holder: str = "model"
    last_layer_is_output: bool = False
    unsavable: str | None = None
    wraps_bare_module: bool = False

    def feature_layer(self, config):
        """The hidden state or states that a host with this configuration reads; `None` for the last output."""
        if self.layer is None:
            return None
        layer = getattr(config, self.layer) if isinstance(self.layer, str) else self.layer(config)
        if layer == -1 and self.last_layer_is_output:
            return None
        return layer if isinstance(layer, int) else list(layer)

    def first_token(self, config):
        """The first token that a host with this configuration reads: 1 where the class token is dropped."""
        return int(self.drops_class_token or (self.strategy and getattr(config, self.strategy) == "default") or 0)


def _granite4_layers(config):
    # Each goes through a projector of its own: one that is read twice is no larger part of the feature.
    spatial = [config.spatial_vision_layer] if config.spatial_target_layers else []
    layers = [*(layer for layer, _ in config.deepstack_layer_map), *spatial]
    count, distinct = config.vision_config.num_hidden_layers + 1, {}
    for layer in layers:
        distinct.setdefault(layer % count, layer)
    return list(distinct.values())


_LAYER, _STRATEGY = "vision_feature_layer", "vision_feature_select_strategy"
_LLAVA = HostKind(_LAYER, _STRATEGY)
_PIXTRAL = HostKind(_LAYER)
_LAST_OUTPUT = HostKind()

# Hosts that build their tower with `AutoModel`: smoothed, they save and reload by their own class.
HOSTS = {
    "aria": HostKind(_LAYER),
    "aya_vision": _LLAVA,
    "cohere2_vision": _LAST_OUTPUT,
    "deepseek_vl": HostKind(tower="vision_model"),
    "gemma3": _LAST_OUTPUT,
    "granite4_vision": HostKind(_granite4_layers, _STRATEGY),
    "internvl": HostKind(_LAYER, _STRATEGY, last_layer_is_output=True),
    "lighton_ocr": HostKind(tower="vision_encoder"),
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_next_video": _LLAVA,
    "llava_onevision": _LLAVA,
    "mistral3": _PIXTRAL,
    "mistral_large4": _PIXTRAL,
    "paligemma": _LAST_OUTPUT,
    "vipllava": HostKind(_LAYER, drops_class_token=True),
}


class _PlainOrSmoothed(SubConfigSpec):
    """The specification of a vision configuration that, where it says it is one, is that of a smoothed tower."""

    def create_subconfig(self, key, subconfig=None, **kwargs):
        if isinstance(subconfig, dict) and subconfig.get("model_type") == SmoothedVisionTowerConfig.model_type:
            return SmoothedVisionTowerConfig(**subconfig), kwargs
        return super().create_subconfig(key, subconfig, **kwargs)


# InternVL builds its tower with `AutoModel`, but reads its configuration by one class whatever `model_type` it names. Like the
# registration of our classes with `AutoConfig`, this adds a case and changes none.
InternVLConfig.sub_configs_defaults["vision_config"] = _PlainOrSmoothed(
    InternVLConfig.sub_configs_defaults["vision_config"].config_class
)

# Hosts that construct a vision class of their own, or load it in a way of their own: swapped in memory, and not to be saved
# while they are.
_PLAIN = "its class would build a plain tower"
_OWN_CLASS = HostKind(tower="vision_model", unsavable=_PLAIN)
OWN_CLASS_HOSTS = {
    "blip-2": _OWN_CLASS,
    "idefics": HostKind(tower="vision_model", unsavable=_PLAIN, wraps_bare_module=True),
    "idefics2": _OWN_CLASS,
    "idefics3": _OWN_CLASS,
    "instructblip": _OWN_CLASS,
    "qianfan_ocr": HostKind(
        _LAYER,
        _STRATEGY,
        last_layer_is_output=True,
        unsavable="loading it renames weights, those of a purifier (`norm1`) among them",
    ),
    "smolvlm": _OWN_CLASS,
}

_PATCHES = "its processor cuts images into patches, so its tower never sees pixels to which noise could be added"
_TIMM = "its tower is a timm model, whose configuration names neither layers nor width"
_MAP = "its tower answers with a map of channels and not with tokens"
_TWO = "it has two vision towers"
REFUSED = {
    **dict.fromkeys(
        (
            "diffusion_gemma", "embedding_gemma2", "ernie4_5_vl_moe", "gemma4", "glm4v", "glm4v_moe", "kimi_k25",
            "lfm2_vl", "lfm3_vl", "muse_spark", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_vl",
            "qwen3_vl_moe", "video_llama_3",
        ),
        _PATCHES,
    ),
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), _TIMM),
    **dict.fromkeys(("florence2", "got_ocr2"), _MAP),
    **dict.fromkeys(("deepseek_vl_hybrid", "video_llava"), _TWO),
    "instructblipvideo": "the frames of a video share one row of queries in a class of its own that is not adapted yet",
    "chameleon": "its images become code words of a VQ-VAE, which have no direction to smooth",
    "fuyu": "it has no vision tower: patches go straight to its language model",
    "kosmos-2": "it reads weights inside its vision model, past the output that is smoothed",
    "mllama": "its tower takes tiles of a picture with their aspect ratio, not images",
}  # fmt: skip


class TowerPlace(NamedTuple):
    """Where the vision tower of a host is: `getattr(holder, attribute) is tower`."""

    kind: HostKind
    holder: nn.Module
    attribute: str
    tower: nn.Module


def is_host(config):
    """Whether a configuration is that of a host in the tables, whose tower [`find_tower`] finds."""
    return config.model_type in HOSTS or config.model_type in OWN_CLASS_HOSTS


def check_not_adapted(host):
    """Raise `ValueError` for a `PeftModel`: it reads through to the host inside it, but what is set on it stays outside."""
    if type(host).__module__.partition(".")[0] == "peft":
        raise ValueError(
            f"`host` must be the model itself, got the {type(host).__name__} around it: give `host.get_base_model()`"
        )


def find_tower(host):
    """The vision tower of a host, smoothed or not, and where it is.

    Args:
        host (`PreTrainedModel`): a host of the tables, with its language model head or without (`host.model`).

    Returns:
        [`TowerPlace`].

    Raises:
        ValueError: another kind of model, with the reason where it is a known one that cannot work.
    """
    check_not_adapted(host)
    model_type = getattr(getattr(host, "config", None), "model_type", None)
    if model_type in REFUSED:
        raise ValueError(
            f"`host` must be a model whose vision tower can be smoothed, got {type(host).__name__}: {REFUSED[model_type]}"
        )
    kind = HOSTS.get(model_type) or OWN_CLASS_HOSTS.get(model_type)
    if kind is None:
        given = type(host).__name__ if model_type is None else f"{type(host).__name__} (model_type {model_type!r})"
        known = ", ".join(sorted(HOSTS | OWN_CLASS_HOSTS))
        raise ValueError(
            f"`host` must be a model of type {known}, an OpenFlamingo or a CLIP-like classifier, got {given}"
        )
    holder = host if hasattr(host, kind.tower) else getattr(host, kind.holder, None)
    tower = getattr(holder, kind.tower, None)
    if not isinstance(tower, nn.Module):
        raise ValueError(f"`host` must have a vision tower, got {type(host).__name__} without one")
    return TowerPlace(kind, holder, kind.tower, tower)


def describing_configs(host, holder):
    """Every configuration that describes the tower of a host: its own, and the holder's where that is another object."""
    return [host.config] if holder.config is host.config else [host.config, holder.config]
