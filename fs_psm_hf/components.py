"""The parts a smoothed tower is made of: what may be one, and how the wrapped vision model is built from its configuration."""

import copy
import logging
import os
from pathlib import Path

import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel

from .modeling_psm import PSMModel


logger = logging.getLogger(__name__)

# Hosts that were published with the weights of an encoder as they were, under names that do not say so.
_SAME_TOWER = {
    "llava-1.5-7b-hf": "clip-vit-large-patch14-336",
    "llava-1.5-13b-hf": "clip-vit-large-patch14-336",
}


def build_vision_model(config):
    """The wrapped vision model of a [`SmoothedVisionTowerConfig`], with weights not yet loaded.

    Raises:
        ValueError: `vision_architecture` names no model class of transformers.
    """
    if config.vision_architecture is None:
        return AutoModel.from_config(config.vision_config)
    # Imported here: few towers need it, and it brings two model files with it.
    from .idefics_vision import OWN_VISION_CLASSES

    name = config.vision_architecture
    vision_class = OWN_VISION_CLASSES.get(name) or getattr(transformers, name, None)
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
    if any(parameter.device.type == "meta" for parameter in vision_tower.parameters()):
        raise ValueError("`vision_tower` must be in memory, got one that is offloaded: smooth it, save it and reload")


def placed(psm, device, dtype=None):
    """A PSM, or a purifier of the user's, on a device and in a dtype: itself, or a copy where another tower has it elsewhere.

    Moving a module moves it for everybody, and a second tower must not change what the first one serves.
    """
    fits = all(p.device == device and (dtype is None or p.dtype == dtype) for p in psm.parameters())
    if not fits:
        psm = copy.deepcopy(psm) if getattr(psm, "_is_in_a_tower", False) else psm
        psm.to(device=device, dtype=dtype)
    psm._is_in_a_tower = True
    return psm


def check_psm(psm, vision_tower):
    """Whether a [`PSMModel`] belongs to a vision tower, as far as that can be seen; logs a warning where it may not.

    Raises:
        ValueError: its mapper refines pooled embeddings of another width than the tower's. (The width of tokens is
            checked with the feature layers, which it depends on.)
    """
    _check_pooled_width(psm, vision_tower)
    warn_of_another_base(psm, vision_tower.config.name_or_path)


def _check_pooled_width(psm, vision_tower):
    mapper = psm.config.mapper_config
    if mapper is None or psm.config.mapper_feature != "pooled":
        return
    projection, config = getattr(vision_tower, "visual_projection", None), vision_tower.config
    width = getattr(projection, "out_features", None) or getattr(config, "pooler_output_size", None)
    width = width or getattr(config, "hidden_size", None)
    if isinstance(width, int) and mapper.get("hidden_size") != width:
        raise ValueError(
            f"`mapper_config['hidden_size']` must be {width}, the width of the tower's pooled feature, got "
            f"{mapper.get('hidden_size')}"
        )


def warn_of_another_base(psm, name):
    """Log a warning if a [`PSMModel`] was trained for another model than the one of this name.

    Hub ids are compared as a whole, folders by their last name. Nothing is said where either is not known.

    Args:
        name (`str`): where the tower, or the host around it, was loaded from.
    """
    base = getattr(psm, "config", None) and psm.config.base_model_name_or_path
    if base and name and not _same_model(base, name):
        logger.warning(
            "`psm` was trained for %r, and this tower comes from %r: unless both hold the same vision weights, its purifier "
            "and mapper were made for other features",
            *(_repository(one) for one in (base, name)),
        )


def _repository(name):
    """A folder of the Hub's cache as the id of its repository, any other name as it is."""
    for part in Path(name).parts:
        if part.startswith("models--"):
            return "/".join(part.split("--")[1:])
    return str(name).rstrip("/")


def _same_model(*names):
    lasts = [Path(_repository(name)).name.lower() for name in names]
    towers = [_SAME_TOWER.get(last, last) for last in lasts]
    if towers[0] != towers[1]:
        return False
    # Two repositories of one name but of two owners are two models; of a folder nobody knows the owner.
    only_last = any(last in _SAME_TOWER for last in lasts) or any(_is_folder(name) for name in names)
    return only_last or _repository(names[0]).lower() == _repository(names[1]).lower()


def _is_folder(name):
    name = _repository(name)
    return name.startswith((".", "/", "~")) or len(Path(name).parts) > 2 or os.path.isdir(name)
