"""What an evaluation would do, without a weight: its towers at true shapes on the meta device, and its passes counted."""

from pathlib import Path

import torch
from transformers import AutoConfig

from ..components import build_vision_model
from ..configuration_fs_psm import PSMConfig, SmoothedVisionTowerConfig
from ..features import FeatureSelection
from ..modeling_fs_psm import SmoothedVisionTower
from .cells import ATTACK_NAMES, format_strength
from .jobs import job_of
from .rows import CLIP_MEAN, CLIP_STD
from .run_config import HOST_TASKS
from .setup import build_task, read_examples


# A fresh crop of the target is encoded in every step.
_CROPPED = ("m_attack", "m_attack_global", "foa")


def dry_run(config):
    """A plan in words.

    Args:
        config ([`RunConfig`]): checked already.

    Returns:
        `str`: pictures to make, towers with the shape of their feature, and cells, with the images that pass the tower.

    Raises:
        ValueError: images that are there do not match, or an encoder, a layer and a PSM do not fit.
    """
    task, images = build_task(config.task), _count(config)
    asked = config.cells()
    lines = [f"{config.name}: task {config.task.kind}, {images} images of {config.image_size} px, seed {config.seed}"]
    for model in config.models:
        for encoder in model.encoders:
            lines.append(f"tower {model.name}, {encoder}: {_tower(model, encoder)}")
            rows = [row for row in model.rows if row.psm and (row.encoders is None or encoder in row.encoders)]
            lines += dict.fromkeys(f"  {row.row}: {_row(model, encoder, row)}" for row in rows)
    jobs = {}
    for cell, model, encoder, row, attack in asked:
        job = job_of(config, cell, model, encoder, row, attack)
        jobs.setdefault(job.key, (job, min(images, attack.limit or images)))
    total = 0
    for job, count in jobs.values():
        draws = job.attack.draws if job.row is not None else 1
        passes = count * job.attack.steps * draws
        total += passes * (2 if job.attack.method in _CROPPED else 1)
        extra = ", and as many of target crops forward" if job.attack.method in _CROPPED else ""
        lines.append(f"attack {job.key}: {count} pictures, {passes:,} images forward and backward{extra}")
    shown = 0
    for cell, _, _, row, attack in asked:
        count = min(images, attack.limit or images)
        shown += count * row.num_samples
        norm = format_strength(cell.epsilon, cell.norm)
        lines.append(
            f"cell {cell.model}, {cell.encoder}, {cell.row}, {ATTACK_NAMES[cell.attack]} {norm}, {cell.mode}: {count} images"
        )
    words = "; each is also asked once" if task.name in HOST_TASKS else ""
    lines.append(
        f"{len(jobs)} attacks with {total:,} images through the tower, {len(asked)} cells with {shown:,} more{words}; nothing was run"
    )
    return "\n".join(lines)


def _count(config):
    """Images of the run; those that are here are read and paired, else the file's own limit counts."""
    asked = config.task
    if Path(asked.images).exists():
        return len(read_examples(config, build_task(asked)))
    if asked.limit is None:
        raise ValueError(f"`task.images` must be a folder, or `task.limit` be given for a dry run, got {asked.images}")
    return asked.limit


def _configuration(model, encoder):
    """The configuration of an encoder: from this machine, else from the file."""
    path = model.encoders[encoder]
    try:
        found = AutoConfig.from_pretrained(path or model.host, local_files_only=True)
    except (OSError, ValueError) as error:
        if model.vision_config is None:
            raise ValueError(
                f"`vision_config` of {model.name} must be given for a dry run where {path or model.host} is not on this "
                "machine, got none"
            ) from error
        values = dict(model.vision_config.get(encoder, model.vision_config))
        return AutoConfig.for_model(values.pop("model_type"), **values)
    return getattr(found, "vision_config", None) or found


def _smoothed(model, encoder, psm_config, sigma):
    vision = _configuration(model, encoder)
    # Hosts leave the class token out.
    first = int(model.host is not None)
    # Where a CLIP has an embedding that it shares with texts, that is its pooled feature.
    projected = vision.model_type == "clip_vision_model" and model.feature == "pooled"
    config = SmoothedVisionTowerConfig(
        vision_config=vision, vision_architecture="CLIPVisionModelWithProjection" if projected else None, psm_config=psm_config, sigma=sigma, num_samples=1, image_mean=CLIP_MEAN, image_std=CLIP_STD,
        feature_layer=model.layer, **({"first_token": first} | (model.options if model.host is None else {})),
    )  # fmt: skip
    FeatureSelection.of(config).check(model.feature)
    return config


@torch.no_grad()
def _shape(config, model):
    """The shape of the feature of one image, from a pass on the meta device."""
    size = model.image_size or config.vision_config.image_size
    with torch.device("meta"):
        build_vision_model(config)
        tower = SmoothedVisionTower(config)
        pixels = torch.empty(1, 3, size, size)
        options, whole = tower._selection.options(model.feature)
        (output,) = tower._network(
            tower._model(whole), [pixels], [torch.empty(1, 3, size, size)], 1, config.sigma, tower._statistics(pixels),
            tower._selection, options,
        )  # fmt: skip
    shape = tuple(tower._selection.vector(output, model.feature).shape)
    return f"{size} px, {model.feature} of {' × '.join(map(str, shape[1:]))}"


def _tower(model, encoder):
    return _shape(_smoothed(model, encoder, PSMConfig(), 0.0), model)


def _row(model, encoder, row):
    try:
        psm = PSMConfig.from_pretrained(row.psm, local_files_only=True)
    except (OSError, ValueError):
        return f"the PSM {row.psm} is not on this machine, its shapes were not checked"
    if "P" not in row.row.split("+"):
        psm.purifier_config, psm.purifier = None, "none"
    if "M" not in row.row.split("+"):
        psm.mapper_config = None
    return _shape(_smoothed(model, encoder, psm, row.sigma), model)
