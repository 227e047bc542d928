"""What a command line names: images of a folder, models of every kind, classes."""

import csv

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.utils import logging

from .certification import Classifier
from .configuration_fs_psm import SmoothedVisionTowerConfig
from .host_kinds import find_tower, is_host
from .hosts import attach
from .loading import load_strictly
from .modeling_fs_psm import SmoothedVisionTower
from .modeling_psm import PSMModel


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
DTYPES = ("float32", "bfloat16", "float16")


def list_images(folder, where, limit, option="--images"):
    """Relative paths of the images below `folder`; with `where` the rows of its metadata.csv that agree."""
    if not folder.is_dir():
        raise ValueError(f"`{option}` must be a folder, got {folder}")
    if where is None:
        found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        names = sorted(path.relative_to(folder).as_posix() for path in found)
    else:
        column, equals, value = where.partition("=")
        table = folder / "metadata.csv"
        if not equals or not table.is_file():
            raise ValueError(f"`--where` must be COLUMN=VALUE of {table}, got {where!r}")
        with open(table, newline="") as stream:
            rows = list(csv.DictReader(stream))
        if not rows or column not in rows[0] or "file_name" not in rows[0]:
            raise ValueError(f"`--where` must name a column of {table} beside file_name, got {column!r}")
        names = sorted({row["file_name"] for row in rows if row[column] == value})
    if not names:
        raise ValueError(f"`{option}` {folder} holds no image" + (f" with {where}" if where else ""))
    return names[:limit]


def load_tower(name, psm_name=None, processor_name=None, sigma=None, num_samples=None, dtype=None, revision=None):
    """A smoothed tower and its image processor from whatever `name` holds: tower, host, CLIP or vision model."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(DTYPES)}, got {dtype}")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        raise ValueError(f"`--tower` must be a model folder or a Hub id, got {name}: {error}") from error
    try:
        processor = AutoImageProcessor.from_pretrained(
            processor_name or name, revision=None if processor_name else revision
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"`--processor` is needed: {processor_name or name} holds no image processor") from error
    psm = None if psm_name is None else PSMModel.from_pretrained(psm_name)
    precision = {"revision": revision} | ({} if dtype is None else {"dtype": getattr(torch, dtype)})

    def load(model_class, leftover=(), **options):
        # What is left over is judged there, in a sentence; transformers' own report would be a page.
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            return load_strictly(
                model_class.from_pretrained, model_class, name, leftover=leftover, **options, **precision
            )[0]
        finally:
            logging.set_verbosity(verbosity)

    host = None
    if config.model_type == SmoothedVisionTowerConfig.model_type:
        tower = SmoothedVisionTower.from_pretrained(name, **precision)
    elif is_host(config):
        host = load(transformers.AutoModelForImageTextToText)
        tower = find_tower(host).tower
    elif any(name.endswith("ForImageClassification") for name in config.architectures or ()):
        raise ValueError(
            f"`--tower` must be a vision tower or a host that is read by a language model, got {config.architectures[0]} "
            f"in {name}: certify its labels in Python, with `attach` and `certify_labels`"
        )
    elif config.model_type == "siglip":
        tower = load(transformers.SiglipVisionModel, ("text_model.", "logit_"))
    elif config.model_type == "clip":
        # The width of the embedding is the whole model's; its vision part may say another, which nobody reads there.
        config.vision_config.projection_dim = config.projection_dim
        leftover = ("text_model.", "text_projection.", "logit_scale")
        tower = load(transformers.CLIPVisionModelWithProjection, leftover, config=config.vision_config)
    elif "CLIPVisionModelWithProjection" in (config.architectures or ()):
        tower = load(transformers.CLIPVisionModelWithProjection)
    else:
        tower = load(AutoModel)
    if isinstance(tower, SmoothedVisionTower):
        if psm is not None:
            raise ValueError(f"`--psm` must not be given for a tower that is smoothed already, got {psm_name}")
        tower.config.sigma = tower.config.sigma if sigma is None else sigma
        tower.config.num_samples = num_samples or tower.config.num_samples
        return tower, processor
    settings = {"sigma": 0.25 if sigma is None else sigma, "num_samples": num_samples or 4, "processor": processor}
    if host is not None:
        return attach(host, psm, **settings), processor
    return SmoothedVisionTower.from_components(tower, psm, **settings), processor


def load_classifier(path):
    """The classes of a safetensors file: `text_embeds`, or `weight` and, where there is one, `bias`.

    Raises:
        ValueError: the file is not like that.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`--labels` must be a safetensors file, got {path}: {error}") from error
    names = set(tensors)
    if names == {"text_embeds"}:
        return Classifier.of(tensors["text_embeds"])
    if names not in ({"weight"}, {"weight", "bias"}) or tensors["weight"].ndim != 2:
        raise ValueError(
            f"`--labels` {path} must hold `text_embeds`, or `weight` and `bias`, of (classes, features), "
            f"got {', '.join(sorted(names))}"
        )
    classes, width = tensors["weight"].shape
    head = torch.nn.Linear(width, classes, bias="bias" in tensors)
    if "bias" in tensors and tensors["bias"].shape != (classes,):
        raise ValueError(f"`--labels` {path} must have a bias for each of {classes} classes")
    head.load_state_dict(tensors)
    return Classifier.of(head=head)


def check_device(device):
    """The device to use, CUDA where there is one and none is named.

    Raises:
        ValueError: torch cannot use it here.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` must be one torch can use here, got {device}: {error}") from error
    return device
