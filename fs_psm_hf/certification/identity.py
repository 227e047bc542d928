"""What makes a smoothed tower the function it is: the facts a certificate records, and a hash over them and the weights."""

import hashlib
import json
import re
from pathlib import Path

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


# Fields of a configuration that name, load or train a model and do not change what it computes. The kernel and the
# dtype are recorded apart.
_NOT_THE_FUNCTION = {
    "architectures", "transformers_version", "dtype", "torch_dtype", "name_or_path", "auto_map", "model_type",
    "attn_implementation", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "is_encoder_decoder", "initializer_range", "initializer_factor",
    "base_model_name_or_path", "base_model_revision", "use_mask_token", "_diffusers_version",
}  # fmt: skip


def describe(tower) -> dict:
    """The facts about a tower that a certificate records and `Certified.verify` compares."""
    config = tower.config
    layer = config.feature_layer
    return {
        "dtype": str(tower.dtype).removeprefix("torch."),
        "attention": getattr(config.vision_config, "_attn_implementation", None),
        "compiled": tower.compiled,
        "quantization": quantization(tower),
        "image_mean": tuple(config.image_mean),
        "image_std": tuple(config.image_std),
        "feature_layer": tuple(layer) if isinstance(layer, (list, tuple)) else layer,
        "first_token": config.first_token,
        "aggregation": config.aggregation,
        "model_hash": model_hash(tower),
    }


def model_hash(tower) -> str:
    """SHA-256 over every weight of the tower, its purifier and its mapper, and the settings that shape their function.

    It sees what a saved tower consists of. The code of a purifier of yours enters by the name of its class only, and a
    change that neither weights nor configuration show, such as a hook, not at all.
    """
    digest = hashlib.sha256()
    config = tower.config
    settings = {
        "vision_tower": type(tower.vision_tower).__name__,
        "vision_config": _settings(config.vision_config),
        "psm_config": _settings(config.psm_config),
        "purifier": type(tower.psm.purifier).__name__,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        for part, values in _plain_parts(name, tensor.detach()):
            values = values.contiguous().cpu()
            digest.update(f"{part} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(memoryview(values.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def quantization(tower):
    """Classes of weights that are no plain tensors, and where they are: `"Int8Tensor in psm.purifier"`; `None` without."""
    found = set()
    for name, weight in tower.named_parameters():
        if type(weight) is not torch.nn.Parameter:
            part = next(part for part in ("vision_tower", "psm.purifier", "psm.mapper", "") if name.startswith(part))
            found.add(f"{type(weight).__name__} in {part}")
    return ", ".join(sorted(found)) or None


def vector_hash(vector) -> str:
    """SHA-256 of a vector's float32 values."""
    values = vector.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(memoryview(values.flatten().view(torch.uint8).numpy())).hexdigest()


def short_name(name):
    """The last part of a folder's path, so that no result tells of a machine; a Hub id as it is."""
    return Path(name).name if Path(name).is_absolute() or str(name).startswith(".") else str(name)


def model_name(tower):
    """Where the wrapped tower came from, or its class where that is not known."""
    for config in (tower.config.vision_config, tower.config):
        if getattr(config, "name_or_path", ""):
            return short_name(config.name_or_path)
    return type(tower.vision_tower).__name__


def psm_name(tower):
    """Where the purifier and the mapper came from, or what they are."""
    config = tower.config.psm_config
    if getattr(config, "name_or_path", ""):
        return short_name(config.name_or_path)
    parts = [f"{config.purifier} purifier"] * (config.purifier != "none") + ["mapper"] * (
        config.mapper_config is not None
    )
    return " and ".join(parts) or "none"


def _plain_parts(name, tensor):
    """A tensor, or those that one of a quantised class is made of, with names that tell the class."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    inner_names, context = tensor.__tensor_flatten__()
    told = re.sub("0x[0-9a-f]+", "", repr(context))  # settings such as whether activations are quantised too
    for inner in inner_names:
        yield from _plain_parts(f"{name}.{type(tensor).__name__}({told}).{inner}", getattr(tensor, inner))


def _settings(config):
    # What differs from the defaults, so that a field that a later version of transformers adds does not change the hash.
    values = config.to_diff_dict()
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in _NOT_THE_FUNCTION}
