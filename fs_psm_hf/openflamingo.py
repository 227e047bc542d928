"""Smoothing of the image side of OpenFlamingo: https://github.com/mlfoundations/open_flamingo, version 2.0.1.

A `Flamingo` calls its vision encoder, an open_clip visual, in one place, as `vision_encoder(images)[1]`, and reads the
patch tokens after the last LayerNorm, without the class token and before any projection. Exactly these are smoothed,
refined by the mapper of a PSM trained with `--preset openflamingo`, and certified.
"""

import inspect
import logging
import re

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPPreTrainedModel, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from .conversion_open_clip import QUERY_KEY_VALUE, convert_open_clip
from .modeling_fs_psm import SmoothedVisionTower
from .modeling_psm import PSMModel
from .pixels import read_statistics


logger = logging.getLogger(__name__)

# transformers' names of the activations of open_clip's blocks, by what these print: GELU has an approximate form, too.
_ACTIVATIONS = {"QuickGELU()": "quick_gelu", "GELU(approximate='none')": "gelu"}
# Largest relative difference of a visual and its conversion, by the bytes of a weight; rounding stays below. TF32 too.
_TOLERANCE = {8: 1e-2, 4: 1e-2, 2: 0.2}
_FROM_OPENAI = re.compile(r"openai|fare|tecoa", re.IGNORECASE)
_TRAINED_ANEW = re.compile(r"laion|datacomp", re.IGNORECASE)


# What is smoothed -----------------------------------------------------------------------------------------------------


class CLIPPatchTokensConfig(CLIPVisionConfig):
    """Configuration of a [`CLIPVisionModelWithPatchTokens`]: that of its `CLIPVisionModel`."""

    model_type = "clip_patch_tokens_vision_model"


class CLIPVisionModelWithPatchTokens(CLIPPreTrainedModel):
    """A CLIP vision model that answers with its patch tokens after the last LayerNorm, and with nothing else.

    transformers' CLIP gives tokens before that LayerNorm, and puts its class token alone through it.
    """

    config_class = CLIPPatchTokensConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = CLIPVisionModel._from_config(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values=None, **kwargs):
        """`BaseModelOutput` with `last_hidden_state` of shape `(batch_size, patches, hidden_size)`.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
            kwargs: for the `CLIPVisionModel`.
        """
        tokens = self.vision_model(pixel_values, **kwargs)[0]
        return BaseModelOutput(last_hidden_state=self.vision_model.post_layernorm(tokens[:, 1:]))


# Saved towers of an OpenFlamingo are found again by `AutoModel`.
AutoConfig.register(CLIPPatchTokensConfig.model_type, CLIPPatchTokensConfig)
AutoModel.register(CLIPPatchTokensConfig, CLIPVisionModelWithPatchTokens)


def patch_tokens_model(visual):
    """The second output of an open_clip visual as a model of transformers; every weight is shared, none is copied.

    Args:
        visual (`torch.nn.Module`): an `open_clip` `VisionTransformer` with `output_tokens=True`.

    Returns:
        [`CLIPVisionModelWithPatchTokens`]: the same function up to rounding, tried on an image.

    Raises:
        ValueError: it is another network, or the conversion computes something else.
    """
    name = type(visual).__name__
    if not (_is_from("open_clip", "VisionTransformer", visual) and visual.output_tokens):
        raise ValueError(
            "`host.vision_encoder` must be a VisionTransformer of open_clip with `output_tokens=True`, got a "
            f"{name} of {type(visual).__module__.partition('.')[0]}"
        )
    block = visual.transformer.resblocks[0]
    activation = repr(getattr(block.mlp, "gelu", None))
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"`host.vision_encoder` must have one of the activations {', '.join(_ACTIVATIONS)}, got {activation}"
        )
    try:
        converted = convert_open_clip(
            visual.state_dict(),
            num_heads=block.attn.num_heads,
            hidden_act=_ACTIVATIONS[activation],
            projection=False,
        )
    except ValueError as error:
        raise ValueError(
            f"`host.vision_encoder` must be a plain CLIP of open_clip, got a {name} that has no conversion: {error}"
        ) from error
    _share_attention(converted, visual)
    fields = {name: value for name, value in converted.config.to_dict().items() if name != "model_type"}
    with torch.device("meta"):  # a skeleton, for the converted model
        model = CLIPVisionModelWithPatchTokens(CLIPPatchTokensConfig(**fields))
    model.vision_model = converted
    model.config.dtype = converted.dtype
    model.requires_grad_(any(weight.requires_grad for weight in visual.parameters()))
    _check_same_function(model.eval(), visual)
    return model


def _is_from(package, class_name, module):
    """Whether a class of this name and package is among those of `module`, which is not imported for the question."""
    kinds = [kind for kind in type(module).__mro__ if kind.__name__ == class_name]
    return any(kind.__module__.partition(".")[0] == package for kind in kinds)


def _share_attention(converted, visual):
    """Let queries, keys and values be thirds of the visual's own weights; the converter copies them."""
    for layer, block in zip(converted.encoder.layers, visual.transformer.resblocks, strict=True):
        for leaf in ("weight", "bias"):
            thirds = getattr(block.attn, f"in_proj_{leaf}").detach().chunk(3)
            for part, third in zip(QUERY_KEY_VALUE, thirds, strict=True):
                setattr(getattr(layer.self_attn, part), leaf, nn.Parameter(third))


@torch.no_grad()
def _check_same_function(model, visual):
    """Raise `ValueError` unless both give the same patch tokens, up to rounding, for some image."""
    size, weight = model.config.image_size, visual.conv1.weight
    slope = torch.linspace(-2, 2, 3 * size * size, device=weight.device)
    image = (slope + (37 * slope).sin()).view(1, 3, size, size).to(weight.dtype)
    expected, found = visual(image)[1].float(), model(image).last_hidden_state.float()
    same = found.shape == expected.shape
    difference = ((found - expected).norm() / expected.norm()).item() if same else float("inf")
    if not difference <= _TOLERANCE[weight.element_size()]:
        raise ValueError(
            "`host.vision_encoder` must be a plain CLIP of open_clip, got one whose patch tokens differ by a share of "
            f"{difference:.2g} from those of its conversion"
        )


# What stands in the host ----------------------------------------------------------------------------------------------


class SmoothedFlamingoVision(nn.Module):
    """A smoothed tower in the place of a `Flamingo`'s vision encoder, called as that is.

    Args:
        tower ([`SmoothedVisionTower`]): around a [`CLIPVisionModelWithPatchTokens`].
        visual (`torch.nn.Module`): the open_clip visual it came from, kept for `detach` and no part of this module.
    """

    # The feature that the host reads, for the certificates.
    feature = "tokens"

    def __init__(self, tower, visual):
        super().__init__()
        self.tower = tower
        # In a tuple, so that its weights are not this module's a second time.
        self._before = visual, visual.training

    @property
    def config(self):
        """The configuration of the tower."""
        return self.tower.config

    def forward(self, pixel_values, generator=None, image_ids=None):
        """The smoothed patch tokens in their place.

        An image that comes more than once is smoothed once and gets the same answer everywhere: `Flamingo.generate`
        repeats its images for each beam. All rows are smoothed one by one where `image_ids` names them, or where the
        gradient of each row is recorded.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
            generator, image_ids: as in [`SmoothedVisionTower.forward`].

        Returns:
            `tuple[None, torch.Tensor]`: no pooled embedding, since none is smoothed; and the tokens, of shape
            `(batch_size, patches, hidden_size)`.

        Raises:
            TypeError, ValueError: as [`SmoothedVisionTower.forward`].
        """
        recorded = isinstance(pixel_values, torch.Tensor) and pixel_values.requires_grad and torch.is_grad_enabled()
        places = None
        if image_ids is None and not recorded:
            first, places = _distinct(pixel_values)
            pixel_values = pixel_values if places is None else pixel_values[first]
        output = self.tower(pixel_values, generator=generator, image_ids=image_ids)
        tokens = output.last_hidden_state
        return None, tokens if places is None else tokens[places]


def _distinct(images):
    """Where each different row of a batch stands first, in order, and for every row which of them it is.

    Returns:
        `tuple[list[int], list[int]]`, or `(None, None)` where no row is repeated.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or len(images) < 2 or not images.numel():
        return None, None
    _, labels = torch.unique(images.flatten(1), dim=0, return_inverse=True)
    labels = labels.tolist()
    order = {label: position for position, label in enumerate(dict.fromkeys(labels))}
    if len(order) == len(labels):
        return None, None
    return [labels.index(label) for label in order], [order[label] for label in labels]


# Into the host and out of it ------------------------------------------------------------------------------------------


def is_flamingo(host) -> bool:
    """Whether `host` is a `Flamingo` of open_flamingo: by the name of its class, without importing the package."""
    return _is_from("open_flamingo", "Flamingo", host)


def attach_flamingo(
    host,
    psm=None,
    *,
    sigma=0.25,
    num_samples=4,
    feature_layer=None,
    image_mean=None,
    image_std=None,
    processor=None,
    max_batch_size=None,
    aggregation="unit",
):
    """Replace the vision encoder of an OpenFlamingo, in place, by its smoothed version.

    The tower is a [`SmoothedVisionTower`] around transformers' CLIP with the very weights of the visual: no weight is
    copied. Resampler and language model are untouched: a checkpoint of the trained parts (`load_state_dict(...,
    strict=False)`) loads before and after, and their keys stay. The visual's own keys are others while it is smoothed.
    `generate` smooths each image once, not once per beam. A `Flamingo` encodes images without gradients; gradients of
    pixels pass through the tower, called by itself.

    A warning is logged where the PSM was trained for OpenAI's or a robust CLIP and the visual has plain GELU: see
    [`warn_of_plain_gelu`].

    Args:
        host (`Flamingo`): with an open_clip Vision Transformer in memory.
        psm ([`PSMModel`], `torch.nn.Module` or `None`): as in [`SmoothedVisionTower.from_components`]; a mapper must be
            one trained with `--preset openflamingo` or `--post_layernorm true`.
        feature_layer: must be `None`; this host reads the tokens after the last LayerNorm.
        processor (*optional*): the image processor that `create_model_and_transforms` returned, or one of
            transformers, to take `image_mean` and `image_std` from. Without any of the three, those that open_clip wrote
            in the visual.

    The other arguments are those of [`SmoothedVisionTowerConfig`].

    Returns:
        [`SmoothedVisionTower`]: the tower, which also is `host.vision_encoder.tower`. It can be saved by itself.

    Raises:
        ValueError: an unsupported or already smoothed host, a mapper of another feature or width, or a setting that
            does not fit; the host is unchanged.
    """
    _check_host(host)
    visual = host.vision_encoder
    if isinstance(visual, SmoothedFlamingoVision):
        raise ValueError(
            "`host` must have a plain vision encoder, got a Flamingo that is smoothed already: `detach(host)` first"
        )
    if feature_layer is not None:
        raise ValueError(
            "`feature_layer` must be None for a Flamingo, which reads the tokens after the last LayerNorm, got "
            f"{feature_layer!r}"
        )
    _check_mapper(psm)
    image_mean, image_std = _statistics(visual, image_mean, image_std, processor)
    model = patch_tokens_model(visual)
    tower = SmoothedVisionTower.from_components(
        model,
        psm,
        sigma=sigma,
        num_samples=num_samples,
        image_mean=image_mean,
        image_std=image_std,
        max_batch_size=max_batch_size,
        aggregation=aggregation,
    )
    tower.psm.requires_grad_(False)
    host.vision_encoder = SmoothedFlamingoVision(tower, visual)
    warn_of_plain_gelu(host, psm.config.base_model_name_or_path if isinstance(psm, PSMModel) else None)
    return tower


def detach_flamingo(host):
    """Put the visual of `host` back, the very object, on the device and in the dtype that its tower has by now.

    Returns:
        `torch.nn.Module`: the open_clip visual, which is also in its place in the host.

    Raises:
        ValueError: an unsupported host, or one that is not smoothed.
    """
    _check_host(host)
    vision = host.vision_encoder
    if not isinstance(vision, SmoothedFlamingoVision):
        raise ValueError(f"`host` must have a smoothed vision encoder, got a Flamingo with a {type(vision).__name__}")
    visual, training = vision._before
    host.vision_encoder = visual.to(device=vision.tower.device, dtype=vision.tower.dtype).train(training)
    return visual


def _check_host(host):
    if not is_flamingo(host):
        raise ValueError(f"`host` must be a Flamingo of open_flamingo, got {type(host).__name__}")


def _check_mapper(psm):
    """Refuse a mapper that was not trained on patch tokens alone."""
    if not isinstance(psm, PSMModel) or psm.mapper is None:
        return
    feature, prefix = psm.config.mapper_feature, psm.config.mapper_config.get("num_prefix_tokens", 1)
    if feature != "tokens" or prefix != 0:
        raise ValueError(
            "`psm` must have a mapper of patch tokens alone for a Flamingo (trained with `--post_layernorm true`), got one "
            f"of {feature!r} with `num_prefix_tokens={prefix}`"
        )


def _statistics(visual, image_mean, image_std, processor):
    """The normalisation of the images: as given, that of the processor, or what open_clip wrote in the visual."""
    if image_mean is not None or image_std is not None:
        return image_mean, image_std
    if processor is None:
        return getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
    steps = getattr(processor, "transforms", None)  # of a torchvision `Compose`, which open_clip makes
    if steps is None:
        return read_statistics(processor)
    names = [getattr(step, "__name__", type(step).__name__) for step in steps]
    scaled = [i for i, name in enumerate(names) if name in ("ToTensor", "MaybeToTensor")]
    normalised = [i for i, name in enumerate(names) if name == "Normalize"]
    if not (len(scaled) == len(normalised) == 1 and scaled < normalised):
        raise ValueError(
            f"`processor` must make [0, 1] tensors (ToTensor) and then normalise them once (Normalize), got {names}"
        )
    step = steps[normalised[0]]
    return [float(value) for value in step.mean], [float(value) for value in step.std]


# Around the package ---------------------------------------------------------------------------------------------------


def warn_of_plain_gelu(host, *names) -> bool:
    """Log a warning if a visual has GELU although its weights go back to OpenAI's, which were trained with QuickGELU.

    open_clip builds `"ViT-L-14"` with GELU, also for OpenAI's weights and for a file of FARE or TeCoA, and says little or
    nothing; the features are wrong then. The name to ask for is `"ViT-L-14-quickgelu"`.

    Args:
        host (`Flamingo`): smoothed or not.
        names (`str` or `None`): of the weights: open_clip's tag, a file, a model id.

    Returns:
        `bool`: whether there was something to warn of.
    """
    _check_host(host)
    visual = host.vision_encoder
    visual = visual._before[0] if isinstance(visual, SmoothedFlamingoVision) else visual
    given = [str(name) for name in names if name]
    suspect = next((name for name in given if _FROM_OPENAI.search(name) and not _TRAINED_ANEW.search(name)), None)
    if suspect is None or type(visual.transformer.resblocks[0].mlp.gelu).__name__ != "GELU":
        return False
    logger.warning(
        "`host.vision_encoder` has GELU, but weights that go back to OpenAI's (%r) have QuickGELU: build it as open_clip's "
        "'ViT-L-14-quickgelu', not as 'ViT-L-14', or its features are wrong",
        suspect,
    )
    return True


def prepare_open_flamingo():
    """Import open_flamingo and make its `generate` work with transformers 5.

    transformers leaves an attention mask of ones out when it generates, and `FlamingoLMMixin.forward` of open_flamingo 2.0.1
    demands one: it gets the default `None`, which its language models understand. The rest of it works unchanged.

    Returns:
        The package `open_flamingo`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import open_flamingo
        from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    except ImportError as error:
        raise ImportError(
            "`open_flamingo` must be installed, without the old torch it asks for: `pip install 'fs-psm-hf[openflamingo]'` "
            f"and `pip install --no-deps open-flamingo==2.0.1` ({error})"
        ) from error
    forward = FlamingoLMMixin.forward
    if inspect.signature(forward).parameters["attention_mask"].default is inspect.Parameter.empty:

        def forward_with_default(self, input_ids, attention_mask=None, **kwargs):
            return forward(self, input_ids, attention_mask, **kwargs)

        FlamingoLMMixin.forward = forward_with_default
    return open_flamingo
