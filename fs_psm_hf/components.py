"""The parts a smoothed tower is made of: what may be one, and how the wrapped vision model is built from its configuration."""

import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel

from .modeling_psm import PSMModel


def build_vision_model(config):
    """The wrapped vision model of a [`SmoothedVisionTowerConfig`], with weights not yet loaded.

    Raises:
        ValueError: `vision_architecture` names no model class of transformers.
    """
    if config.vision_architecture is None:
        return AutoModel.from_config(config.vision_config)
    vision_class = getattr(transformers, config.vision_architecture, None)
    if not isinstance(vision_class, type) or not issubclass(vision_class, PreTrainedModel):
        raise ValueError(
            f"`vision_architecture` must be a model class of transformers, got {config.vision_architecture!r}"
        )
    return vision_class._from_config(config.vision_config)


def architecture_name(vision_tower):
    """The class of a vision model where `AutoModel` would build another one from its configuration, else `None`."""
    auto_class = AutoModel._model_mapping.get(type(vision_tower.config), None)
    return None if auto_class is type(vision_tower) else type(vision_tower).__name__


def is_own_purifier(psm):
    """Whether `psm` is a purifier of the user's, neither absent nor a [`PSMModel`].

    Raises:
        TypeError: it is nothing that can purify.
    """
    if psm is None or isinstance(psm, PSMModel):
        return False
    if not (isinstance(psm, nn.Module) and callable(getattr(psm, "denoise", None))):
        raise TypeError(
            "`psm` must be a PSMModel, None or a torch.nn.Module with `denoise(images_01, sigma)`, "
            f"got {type(psm).__name__}"
        )
    return True


def check_vision_model(vision_tower):
    """Raise `TypeError` unless it is a transformers model, `ValueError` unless its weights are in memory."""
    if not isinstance(vision_tower, PreTrainedModel):
        raise TypeError(f"`vision_tower` must be a transformers PreTrainedModel, got {type(vision_tower).__name__}")
    if vision_tower.device.type == "meta":
        raise ValueError("`vision_tower` must be in memory, got one that is offloaded: smooth it, save it and reload")
