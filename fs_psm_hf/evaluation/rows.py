"""A model whose defence can be exchanged: the rows of a table on one encoder, in a host or alone."""

import torch
import transformers
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoProcessor
from transformers.utils import logging

from ..hosts import attach, detach
from ..inputs import load_tower
from ..loading import load_strictly
from ..modeling_fs_psm import SmoothedVisionTower
from ..modeling_psm import PSMModel
from ..pixels import channel_tensor, read_statistics


# The features that a robust encoder was published with are those of this normalisation.
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def psm_for_row(path, row):
    """The parts of a PSM that a row has: `FS+M` its mapper, `FS+P` its purifier, `FS+P+M` both.

    Raises:
        ValueError: the PSM lacks a part that the row is named after.
    """
    if path is None:
        return None
    psm = PSMModel.from_pretrained(path)
    parts = row.split("+")
    for letter, part in (("P", "purifier"), ("M", "mapper")):
        if letter in parts and getattr(psm, part) is None:
            raise ValueError(f"`psm` {path} must have a {part} for the row {row}, got a PSM without")
    if "P" not in parts:
        psm.purifier, psm.config.purifier_config, psm.config.purifier = None, None, "none"
    if "M" not in parts:
        psm.mapper = psm.config.mapper_config = None
    return psm


class Defended:
    """A model of an evaluation with one of its encoders.

    Args:
        model ([`ModelConfig`]): what to load.
        encoder (`str`): which of its encoders.
        device (`str`): where to.

    Raises:
        ValueError: something cannot be loaded, or does not fit.
    """

    def __init__(self, model, encoder, device="cpu"):
        self.config, self.encoder, self.device = model, encoder, device
        path = model.encoders[encoder]
        self.host = self.processor = self.tower = None
        logging.disable_progress_bar()
        if model.host is None:
            loaded, image_processor = load_tower(path, None, model.processor, 0.0, 1, model.dtype)
            self.plain = loaded.vision_tower.to(device).eval()
        elif model.host_kind == "open_flamingo":
            self.host, self.processor = _load_flamingo(model, path, device)
            image_processor = None
        else:
            self.host, self.processor, image_processor = _load_host(model, path, device)
        self.image_mean, self.image_std = (
            (CLIP_MEAN, CLIP_STD) if image_processor is None else read_statistics(image_processor)
        )
        if self.host is not None:
            self.plain = self.use("Org").vision_tower
        side = model.image_size
        self.size = seen_size(self.plain.config, image_processor) if side is None else (side, side)
        if self.size is None:
            raise ValueError(f"`image_size` of {model.name} must be given: neither tower nor processor has one")

    def use(self, row, psm=None, sigma=0.0, num_samples=1):
        """Put a row's defence in place of the one before.

        Args:
            row (`str`): `Org`, `FS`, …
            psm (`str`, *optional*): folder or Hub id.
            sigma (`float`): noise in [0, 1]-pixel units.
            num_samples (`int`): n₀.

        Returns:
            [`SmoothedVisionTower`]: the tower of the row; that of `Org` equals the plain one to the bit.
        """
        settings = {
            "sigma": sigma, "num_samples": num_samples, "image_mean": self.image_mean, "image_std": self.image_std
        }  # fmt: skip
        parts = psm_for_row(psm, row)
        if self.host is None:
            options = {"feature_layer": self.config.layer} | self.config.options
            self.tower = SmoothedVisionTower.from_components(self.plain, parts, **settings, **options)
        else:
            if self.tower is not None:
                detach(self.host)
            self.tower = attach(self.host, parts, **settings)
        return self.tower

    def pixel_values(self, images):
        """What the encoder is given.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): [0, 1] pixels.

        Returns:
            `torch.Tensor` of shape `(batch_size, 3, *self.size)`: resized (bicubic, antialiased) where the encoder sees
            another size, and normalised.
        """
        images = images.to(self.device)
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        return (images - channel_tensor(self.image_mean, images)) / channel_tensor(self.image_std, images)

    @torch.inference_mode()
    def features(self, images, seed, image_ids):
        """The feature that the row serves: the mean over its n₀ draws, under the noise that seed and names give.

        Returns:
            `torch.Tensor` of shape `(batch_size, F)`, float32, on the CPU.

        Raises:
            ValueError: the tower does not serve the feature that was asked for.
        """
        selection = self.tower._selection
        feature = self.config.feature
        selection.check(feature)
        if feature == "pooled" and not selection.serves(feature):
            raise ValueError("`feature` must not be 'pooled' for a tower that serves a hidden layer, got 'pooled'")
        options, _ = selection.options(feature)
        output = self.tower(self.pixel_values(images), generator=seed, image_ids=image_ids, **options)
        return selection.vector(output, feature).flatten(1).cpu()


def seen_size(vision_config, image_processor):
    """Height and width of the images that an encoder is given, by its image processor, else by its configuration.

    Returns:
        `tuple[int, int]` or `None`: `None` where neither says.
    """
    size = getattr(image_processor, "crop_size", None) or getattr(image_processor, "size", None) or {}
    height, width = (
        size.get(name) if hasattr(size, "get") else getattr(size, name, None) for name in ("height", "width")
    )
    if height and width:
        return int(height), int(width)
    side = getattr(vision_config, "image_size", None)
    return (side, side) if isinstance(side, int) else None


def _load_host(model, path, device):
    """A host of transformers, with the vision tower of `path` in place of its own where one is given."""
    options = {"dtype": getattr(torch, model.dtype)} | model.options
    kind = transformers.AutoModelForImageTextToText
    try:
        host, _ = load_strictly(kind.from_pretrained, kind, model.host, **options)
        processor = AutoProcessor.from_pretrained(model.processor or model.host)
    except OSError as error:
        raise ValueError(f"`host` must be a model folder or a Hub id, got {model.host}: {error}") from error
    host = host.to(device).eval()
    if path is not None:
        _replace_tower(host, processor, path, options)
    return host, processor, processor.image_processor


def _replace_tower(host, processor, path, options):
    """Another CLIP tower into a LLaVA: what must agree with it is its width, the image processor and the count of tokens."""
    holder = getattr(host, "model", host)
    kind = transformers.CLIPVisionModel
    tower, _ = load_strictly(kind.from_pretrained, kind, path, leftover=("visual_projection",), dtype=options["dtype"])
    width, needed = tower.config.hidden_size, holder.vision_tower.config.hidden_size
    if width != needed:
        raise ValueError(f"`encoders` must be of width {needed}, which the projector reads, got {path} of {width}")
    holder.vision_tower = tower.to(host.device).eval()
    for config in (host.config, holder.config):
        config.vision_config = tower.config
        config.image_seq_length = (tower.config.image_size // tower.config.patch_size) ** 2
    processor.image_processor = AutoImageProcessor.from_pretrained(path)
    processor.patch_size = tower.config.patch_size


def _load_flamingo(model, path, device):
    """An OpenFlamingo by its own package, with the visual of a robust open_clip state dict where one is given."""
    try:
        from open_flamingo import create_model_and_transforms
    except ImportError as error:
        raise ImportError("OpenFlamingo needs its package: pip install --no-deps open-flamingo==2.0.1") from error
    options = dict(model.options)
    checkpoint = options.pop("checkpoint", None)
    host, image_processor, tokenizer = create_model_and_transforms(**options)
    if checkpoint is not None:
        host.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True), strict=False)
    if path is not None:
        host.vision_encoder.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return host.to(device, getattr(torch, model.dtype)).eval(), (image_processor, tokenizer)
