"""The frozen tower as the losses see it: images in [0, 1] to the features that the mapper refines and the certificate reads."""

import torch
from PIL import Image
from transformers.modeling_layers import GradientCheckpointingLayer

from ..features import pooled_name
from ..inputs import load_tower
from ..packed import is_packed
from ..pixels import channel_tensor, from_unit


# What `load_tower` calls the options that are named otherwise here.
_NAMES = {"`--tower`": "`--pretrained_model_name_or_path`", "`--processor`": "`--processor_name_or_path`"}


def load_plain_tower(args, dtype):
    """The tower of some [`PSMTrainingArguments`], without purifier and mapper, and its image processor.

    Raises:
        ValueError, OSError: it cannot be loaded.
    """
    try:
        tower, processor = load_tower(
            args.pretrained_model_name_or_path, None, args.processor_name_or_path, dtype=dtype, revision=args.revision
        )
    except ValueError as error:
        message = str(error)
        for name, own in _NAMES.items():
            message = message.replace(name, own)
        raise ValueError(message) from error
    for name in ("feature_layer", "first_token"):
        if getattr(args, name) is not None:
            setattr(tower.config, name, getattr(args, name))
    return tower, processor


def patch_of(tower):
    """Height of a patch of a tower in pixels, the least that an image may have."""
    patch = getattr(tower.config, "patch_size", None) or 1
    return patch if isinstance(patch, int) else patch[0]


def served_size(processor):
    """Height of the images that an image processor makes, in pixels."""
    return processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[-2]


def _recompute_blocks(model):
    """Activation checkpointing of a frozen model, which transformers does in training mode only."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not (model.supports_gradient_checkpointing and blocks):
        raise ValueError(f"`--gradient_checkpointing` must be left out: {type(model).__name__} does not support it")
    model.activation_checkpointing_enable()
    for block in blocks:
        block.training = True  # of the block alone: what is in it, dropout too, stays in evaluation mode


class FrozenTower:
    """The wrapped vision model of a [`SmoothedVisionTower`], frozen, in evaluation mode, called without noise.

    Args:
        tower ([`SmoothedVisionTower`]): without purifier and mapper; its `feature_layer` and `first_token` count.
        feature (`str`): `"tokens"`, `"cls"` or `"pooled"`, the feature whose cosine is trained.
        checkpointing (`bool`): keep of each block only its input for the backward pass, and compute the rest again there.
        post_layernorm (`bool`): patch tokens alone, after the last LayerNorm of the wrapped model, as an OpenFlamingo
            reads them; transformers' CLIP gives tokens before it.

    Raises:
        ValueError: the tower cannot do that.
    """

    def __init__(self, tower, feature, checkpointing=False, post_layernorm=False):
        if is_packed(tower.config.vision_config):
            kind = tower.config.vision_config.model_type
            raise ValueError(
                f"`--pretrained_model_name_or_path` must be a tower with a row for each image, got a {kind}, which packs the "
                "tokens of all images into one row: training a mapper for it is not supported"
            )
        tower.requires_grad_(False).eval()
        tower._selection.check(feature)
        self.tower, self.feature, self.post_layernorm = tower, feature, post_layernorm
        self._norm = None
        if post_layernorm:
            model = getattr(tower.vision_tower, "vision_model", tower.vision_tower)  # of one with a projection
            self._norm = getattr(model, "post_layernorm", None)
            if self._norm is None or not tower._selection.has_class_token:
                raise ValueError(
                    "`--post_layernorm` must be left out: "
                    f"{type(tower.vision_tower).__name__} is no CLIP with a class token and a `post_layernorm`"
                )
        if checkpointing:
            _recompute_blocks(tower.vision_tower)
        self._options, whole = tower._selection.options(feature)
        self._model = tower._model(whole)

    @property
    def width(self):
        """`int`: width of what the mapper refines."""
        config = self.tower.config
        if self.feature != "pooled":
            return config.hidden_size * max(1, len(self.tower._selection.layers))
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        with torch.no_grad():
            return self.raw(torch.zeros(1, 3, size, size, device=self.tower.device)).shape[-1]

    @property
    def num_prefix_tokens(self):
        """`int`: leading tokens that are no patches."""
        if self._norm is not None:
            return 0
        registers = getattr(self.tower.config.vision_config, "num_register_tokens", 0)
        return int(self.tower._selection.has_class_token) + registers

    def compile(self):
        """`torch.compile` the tower."""
        self._model = torch.compile(self._model)

    def raw(self, images):
        """What the mapper refines, float32: all tokens of the feature layer, or the pooled embedding.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): in [0, 1].

        Returns:
            `torch.Tensor` of shape `(batch_size, tokens, width)` or `(batch_size, width)`.
        """
        config = self.tower.config
        mean, std = channel_tensor(config.image_mean, images), channel_tensor(config.image_std, images)
        pixels = from_unit(images, mean, std).to(self.tower.dtype)
        output = self._model(pixel_values=pixels, return_dict=True, **self._options)
        if self.feature == "pooled":
            return output[pooled_name(output)].float()
        tokens = self.tower._selection.tokens(output)
        return (tokens if self._norm is None else self._norm(tokens[:, 1:])).float()

    def vector(self, raw):
        """The feature of `feature`, out of what [`raw`] gave or the mapper made of it."""
        if self.feature == "pooled":
            return raw
        return raw[:, 0] if self.feature == "cls" else raw[:, self.tower.config.first_token :]
