"""Smoothing of the image side of CLIP-like classifiers: `CLIPModel`, `SiglipModel` and their image classification models.

What is averaged is the very vector that the host classifies, so that its own answer is the one that has a certificate.
"""

import copy

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPForImageClassification,
    CLIPModel,
    CLIPPreTrainedModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Siglip2ForImageClassification,
    Siglip2Model,
    SiglipForImageClassification,
    SiglipModel,
    SiglipPreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .components import warn_of_another_base
from .modeling_fs_psm import SmoothedVisionTower
from .modeling_psm import PSMModel


_TEXT_HOSTS = (CLIPModel, SiglipModel)
_IMAGE_HOSTS = (CLIPForImageClassification, SiglipForImageClassification)
# Known so that their refusal can give the reason.
_PATCH_HOSTS = (Siglip2Model, Siglip2ForImageClassification)
_SAVING = ("save_pretrained", "push_to_hub")


# What is smoothed -----------------------------------------------------------------------------------------------------


class CLIPPatchMeanConfig(CLIPVisionConfig):
    """Configuration of a [`CLIPVisionModelWithPatchMean`]: that of its `CLIPVisionModel`."""

    model_type = "clip_patch_mean_vision_model"


class SiglipPatchMeanConfig(SiglipVisionConfig):
    """Configuration of a [`SiglipVisionModelWithPatchMean`]: that of its `SiglipVisionModel`."""

    model_type = "siglip_patch_mean_vision_model"


class _PatchMean:
    """The wrapped vision model, whose pooled output is the mean of the patch tokens, then a 1: `(batch_size, width + 1)`.

    These are homogeneous coordinates of what the head of an image classification model reads. A head `W·m + b` on the mean
    m is the head `[W, b]` without a bias on them, whose label minds no length, so it can be certified for what is served
    (theory, Fact 5); of m alone a renormalised average would leave `W·m + b` with another weight for the bias.
    """

    homogeneous = True
    _first_patch = 0

    def forward(self, pixel_values=None, **kwargs):
        """The output of the vision model, `pooler_output` of shape `(batch_size, width + 1)`."""
        output = self.vision_model(pixel_values, **kwargs)
        mean = output.last_hidden_state[:, self._first_patch :].mean(1)  # (B, D)
        output.pooler_output = torch.cat([mean, torch.ones_like(mean[:, :1])], -1)  # (B, D + 1)
        return output


class CLIPVisionModelWithPatchMean(_PatchMean, CLIPPreTrainedModel):
    """What `CLIPForImageClassification` reads, see [`_PatchMean`]: the mean over all tokens but the class token."""

    config_class = CLIPPatchMeanConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _first_patch = 1

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = CLIPVisionModel._from_config(config)
        self.post_init()


class SiglipVisionModelWithPatchMean(_PatchMean, SiglipPreTrainedModel):
    """What `SiglipForImageClassification` reads, see [`_PatchMean`]: the mean over all tokens."""

    config_class = SiglipPatchMeanConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = SiglipVisionModel._from_config(config)
        self.post_init()


# Saved towers of image classification models are found again by `AutoModel`.
for _model in (CLIPVisionModelWithPatchMean, SiglipVisionModelWithPatchMean):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModel.register(_model.config_class, _model)


def _classified_model(host):
    """A vision model whose pooled output is what `host` classifies; it shares the weights of `host`, which is not changed."""
    vision_model = host.vision_model
    if isinstance(host, SiglipModel):
        return vision_model
    with torch.device("meta"):  # a skeleton: its parts are the host's
        if isinstance(host, CLIPModel):
            config = copy.deepcopy(vision_model.config)
            # The width that the host has; the vision model's own field is a default that nobody reads.
            config.projection_dim = host.visual_projection.out_features
            model = CLIPVisionModelWithProjection(config)
        else:
            of_clip = isinstance(host, CLIPForImageClassification)
            model_class = CLIPVisionModelWithPatchMean if of_clip else SiglipVisionModelWithPatchMean
            fields = {name: value for name, value in vision_model.config.to_dict().items() if name != "model_type"}
            config = model_class.config_class(**fields)
            config._attn_implementation = vision_model.config._attn_implementation
            config.name_or_path = vision_model.config.name_or_path
            model = model_class(config)
    model.vision_model = vision_model
    if isinstance(host, CLIPModel):
        model.visual_projection = host.visual_projection
    return model.train(vision_model.training)


# What stands in the host ----------------------------------------------------------------------------------------------


class SmoothedHostVision(nn.Module):
    """A smoothed tower in the place of a host's `vision_model`, answering so that the host computes its own answer from it.

    Args:
        tower ([`SmoothedVisionTower`]): its pooled output is what the host classifies.
        num_prefix_tokens (`int` or `None`): tokens that the head of an image classification model leaves out of its mean;
            `None` for a host that reads the pooled output.
    """

    # The feature that the host reads, for the certificates.
    feature = "pooled"

    def __init__(self, tower, num_prefix_tokens=None):
        super().__init__()
        self.tower = tower
        self.num_prefix_tokens = num_prefix_tokens

    @property
    def config(self):
        """The configuration of the tower."""
        return self.tower.config

    def save_pretrained(self, *args, **kwargs):
        """Save the tower, as [`SmoothedVisionTower.save_pretrained`]."""
        return self.tower.save_pretrained(*args, **kwargs)

    def forward(self, pixel_values=None, **kwargs):
        """The smoothed embedding where the host looks for it.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
            kwargs: as [`SmoothedVisionTower.forward`], `generator` and `image_ids` among them.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is the smoothed embedding after any projection; for an image
            classification model, `last_hidden_state` is one patch token, of which the head takes the mean.
        """
        output = self.tower(pixel_values, **kwargs)
        if self.num_prefix_tokens is None:
            name = "image_embeds" if "image_embeds" in output else "pooler_output"
            tokens, pooled = getattr(output, "last_hidden_state", None), output[name]
        else:
            # Back from homogeneous coordinates. The last one is positive: it is a mean of positive numbers.
            pooled = output.pooler_output[:, :-1] / output.pooler_output[:, -1:]  # (B, D)
            tokens = pooled[:, None].expand(-1, 1 + self.num_prefix_tokens, -1)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=pooled, hidden_states=getattr(output, "hidden_states", None)
        )


class AlreadyProjected(nn.Module):
    """In the place of `visual_projection`: each draw was projected before the average was taken."""

    def forward(self, image_embeds):
        """`image_embeds` as they are."""
        return image_embeds


class _RefusedSave:
    """In the place of a host's `save_pretrained`, and of its `push_to_hub`, which makes a repository first."""

    def __init__(self, host_name):
        self.host_name = host_name

    def __call__(self, *args, **kwargs):
        raise ValueError(
            f"`{self.host_name}` with a smoothed vision model cannot be saved, since its class would load it as a plain one: "
            "save the tower that `attach` returned by itself, and the host after `detach(host)`"
        )


# Into the host and out of it ------------------------------------------------------------------------------------------


def is_clip_host(host) -> bool:
    """Whether `host` is for this module to attach, or to refuse with the reason: by its class."""
    return isinstance(host, (*_TEXT_HOSTS, *_IMAGE_HOSTS, *_PATCH_HOSTS))


def attach_clip(
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
    """Replace what `host` classifies, in place, by its smoothed version: `attach` for classifiers.

    `CLIPModel`: the embedding after `visual_projection`; each draw is projected, then the unit embeddings are averaged
    (theory, Fact 5), and `get_image_features` and `logits_per_image` come from that. `SiglipModel`: the pooled output.
    `CLIPForImageClassification` and `SiglipForImageClassification`: the mean of the patch tokens in homogeneous coordinates,
    [m, 1]/‖[m, 1]‖ per draw, so that the label of the head, bias included, is that of a direction. `certify_labels(host,
    ...)` certifies the label of the host's own logits. Text model and heads are untouched, and no weight is copied.
    `generator` and `image_ids` may be given to `get_image_features`.

    Args:
        host (`CLIPModel`, `SiglipModel`, `CLIPForImageClassification` or `SiglipForImageClassification`): in memory.
        psm ([`PSMModel`], `torch.nn.Module` or `None`): as in [`SmoothedVisionTower.from_components`]; a mapper must be one
            of pooled embeddings, and there may be none in an image classification model.
        feature_layer: must be `None`; these hosts read the last one.

    The other arguments are those of [`SmoothedVisionTowerConfig`], and `processor` is that of
    [`SmoothedVisionTower.from_components`].

    Returns:
        [`SmoothedVisionTower`]: the tower, which also is `host.vision_model.tower`. It can be saved by itself and reloads
        after `import fs_psm_hf`; the host cannot be saved until `detach`, as its class builds the plain vision model.

    Raises:
        ValueError: an unsupported or already smoothed host, a mapper of another feature or width, or a setting that does not
            fit; the host is unchanged.
    """
    name = type(host).__name__
    _check_host(host)
    if isinstance(host.vision_model, SmoothedHostVision):
        raise ValueError(
            f"`host` must have a plain vision model, got a {name} that is smoothed already: `detach(host)` first"
        )
    if feature_layer is not None:
        raise ValueError(
            f"`feature_layer` must be None for a {name}, which reads its last layer, got {feature_layer!r}"
        )
    _check_mapper(host, psm)
    model = _classified_model(host)
    training, own_name = model.training, host.vision_model.config.name_or_path
    tower = SmoothedVisionTower.from_components(
        model,
        psm,
        sigma=sigma,
        num_samples=num_samples,
        image_mean=image_mean,
        image_std=image_std,
        processor=processor,
        max_batch_size=max_batch_size,
        aggregation=aggregation,
    )
    if not own_name:  # it came with the host
        tower.config.name_or_path = host.config.name_or_path
        warn_of_another_base(psm, host.config.name_or_path)
    tower.psm.requires_grad_(False)
    prefix = getattr(model, "_first_patch", None)
    # Not the tower itself: it answers with the output class of what it wraps, which is not what these hosts read.
    vision = SmoothedHostVision(tower, prefix)
    vision.training_before = training
    host.vision_model = vision
    if isinstance(host, CLIPModel):
        host.visual_projection = AlreadyProjected()
    for method in _SAVING:
        setattr(host, method, _RefusedSave(name))
    return tower


def detach_clip(host):
    """Put the vision model and the projection of `host` back, bit for bit; a head that was replaced meanwhile stays.

    Returns:
        `PreTrainedModel`: the plain vision model, which is also in its place in the host.

    Raises:
        ValueError: an unsupported host, one that is not smoothed, or one whose `visual_projection` was replaced since; the
            host is unchanged.
    """
    _check_host(host)
    vision, name = host.vision_model, type(host).__name__
    if not isinstance(vision, SmoothedHostVision):
        raise ValueError(f"`host` must have a smoothed vision model, got a {name} with a {type(vision).__name__}")
    projected = isinstance(host, CLIPModel)
    if projected and not isinstance(host.visual_projection, AlreadyProjected):
        raise ValueError(
            "`host.visual_projection` must be as `attach` left it, to be put back, got a "
            f"{type(host.visual_projection).__name__}: `host.vision_model.tower.vision_tower.visual_projection` is the one in use"
        )
    model = vision.tower.vision_tower
    host.vision_model = (model if isinstance(host, SiglipModel) else model.vision_model).train(vision.training_before)
    if projected:
        host.visual_projection = model.visual_projection
    for method in _SAVING:
        host.__dict__.pop(method, None)
    return host.vision_model


def _check_host(host):
    if isinstance(host, _PATCH_HOSTS):
        raise ValueError(
            f"`host` must take images, got a {type(host).__name__}, whose processor cuts them into patches before the noise "
            "could be added: checkpoints of a fixed resolution load as a SiglipModel"
        )
    if not is_clip_host(host):
        allowed = ", ".join(kind.__name__ for kind in (*_TEXT_HOSTS, *_IMAGE_HOSTS))
        raise ValueError(f"`host` must be one of {allowed}, got {type(host).__name__}")


def _check_mapper(host, psm):
    """Refuse a mapper that would not see what the host classifies."""
    if not isinstance(psm, PSMModel) or psm.config.mapper_config is None:
        return
    name, feature = type(host).__name__, psm.config.mapper_feature
    if isinstance(host, _IMAGE_HOSTS):
        raise ValueError(
            f"`psm` must have no mapper for a {name}, whose head reads the mean of the tokens, got a mapper of {feature!r}"
        )
    if feature != "pooled":
        raise ValueError(
            f"`psm` must have a mapper of 'pooled' for a {name}, which reads that, got one of {feature!r}"
        )


# Classes from texts ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def text_classifier(host, processor, class_names, template="a photo of a {}."):
    """Unit text embeddings of classes, to be given to `certify_labels` as `text_embeds`.

    With several templates, the mean of the unit embeddings, normalised again (Radford et al. 2021, section 3.1.4). The label
    is that of the host's `logits_per_image`: its scale is positive, and SigLIP's bias and sigmoid are the same for all
    classes.

    Args:
        host (`CLIPModel` or `SiglipModel`): in evaluation mode; smoothed or not, as the text side is the same.
        processor: its processor or tokenizer.
        class_names (`list[str]`): at least two.
        template (`str` or `list[str]`): sentences with `{}` for the name.

    Returns:
        `torch.Tensor` of shape `(len(class_names), num_features)`: float32, on the device of the text model.

    Raises:
        TypeError: `host` has no text side.
        ValueError: fewer than two or equal names, a template without `{}`, a sentence that is too long, or a host in
            training mode.
    """
    if not isinstance(host, _TEXT_HOSTS):
        raise TypeError(f"`host` must be a CLIPModel or SiglipModel, got {type(host).__name__}")
    if host.text_model.training:
        raise ValueError("`host` must be in evaluation mode, got training mode: call `host.eval()`")
    if isinstance(class_names, str) or len(class_names) < 2 or len(set(class_names)) < len(class_names):
        raise ValueError(f"`class_names` must be a list of at least 2 different names, got {class_names!r}")
    templates = [template] if isinstance(template, str) else list(template)
    if not templates or any("{}" not in one for one in templates):
        raise ValueError(f"`template` must be one or more sentences with {{}} for the name, got {template!r}")
    most = host.config.text_config.max_position_embeddings
    # SigLIP was trained on padded texts and reads its last token, padding or not.
    padding = {"padding": "max_length", "max_length": most} if isinstance(host, SiglipModel) else {"padding": True}
    total = 0.0
    for one in templates:
        texts = processor(text=[one.replace("{}", name) for name in class_names], return_tensors="pt", **padding)
        length = texts["input_ids"].shape[1]
        if length > most:
            raise ValueError(f"`template` and names must fit in {most} tokens, got {length}")
        embeds = host.get_text_features(**texts.to(host.text_model.device)).pooler_output
        total = total + nn.functional.normalize(embeds.float(), dim=-1)
    return nn.functional.normalize(total, dim=-1)
