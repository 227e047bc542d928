"""Which adversarial pictures an evaluation needs: each is made once, whatever cells look at it."""

import dataclasses
import os
import re
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from .cells import format_strength
from .records import config_hash


_POINTS = 30
# Facts of a batch that stand beside the settings, image by image.
_PER_IMAGE = ("image_ids", "linf_norms", "l2_norms", "zero_gradients", "objective_first", "objective_last")


@dataclasses.dataclass(frozen=True)
class Job:
    """One attack on one tower.

    Args:
        key (`str`): names it, in the run file and as a folder.
        model ([`ModelConfig`]), encoder (`str`): the first that asks for it; every model on this encoder shares it.
        row ([`RowConfig`], *optional*): the defence that an adaptive attack knows; `None` for an attack on the plain tower.
        attack ([`AttackConfig`]): how.
        gradient (`str`, *optional*): of an adaptive attack.
    """

    key: str
    model: object
    encoder: str
    row: object
    attack: object
    gradient: str | None


def job_of(config, cell, model, encoder, row, attack):
    """The job of a cell. Pictures depend on the encoder alone, so hosts on the same one share them, and rows that differ in
    n₀ only share those of an adaptive attack, which draws as often as it is told to.
    """
    adaptive = cell.mode == "adaptive"
    path = model.encoders[encoder]
    identity = {
        "tower": path or model.host, "feature": model.feature, "layer": model.layer, "size": model.image_size,
        "dtype": model.dtype, "images": config.task.images, "targets": config.task.targets, "task": config.task.kind,
        "options": config.task.options, "seed": config.seed, "frame": config.image_size, "own": path is None,
        "attack": [attack.method, attack.epsilon, attack.norm, attack.steps, attack.step_size],
    }  # fmt: skip
    if path is None or config.task.kind in ("captioning", "classification", "vqa"):
        # A host says which layer it reads.
        identity["host"] = model.host_kind
    if adaptive:
        identity |= {
            "row": row.row,
            "psm": row.psm,
            "sigma": row.sigma,
            "draws": attack.draws,
            "gradient": cell.gradient,
        }
    words = [encoder, *([row.row, f"sigma{row.sigma:g}"] if adaptive else ["plain"]), attack.method]
    words += [format_strength(attack.epsilon, attack.norm).replace("/", "-"), *([cell.gradient] if adaptive else [])]
    key = re.sub(r"[^A-Za-z0-9.+-]+", "_", "_".join(words)) + "-" + config_hash(identity)[:8]
    return Job(key, model, encoder, row if adaptive else None, attack, cell.gradient)


def picture_path(folder, number, example_id):
    """Where the adversarial picture of an image is kept: its place in the order and its stem."""
    stem = re.sub(r"[^A-Za-z0-9.-]+", "_", str(PurePosixPath(example_id).with_suffix("")))
    return Path(folder) / f"{number:04d}-{stem}.png"


def save_picture(image, path):
    """Write an image as PNG, aside and then renamed.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): [0, 1] pixels, multiples of 1/255.
        path (`Path`): of a folder that is made.

    Raises:
        ValueError: a pixel is no multiple of 1/255, which eight bits cannot hold.
    """
    scaled = image.detach().float().cpu() * 255
    if not torch.allclose(scaled, scaled.round(), atol=1e-2) or scaled.min() < -1e-2 or scaled.max() > 255.01:
        raise ValueError("`image` must hold multiples of 1/255 in [0, 1], got others: attack with `eight_bit=True`")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = scaled.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()  # (H, W, 3)
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(pixels).save(temporary, format="PNG")
    os.replace(temporary, path)


def read_picture(path):
    """The image that [`save_picture`] wrote, `(3, height, width)`, float32 in [0, 1].

    Raises:
        OSError: it is not there or damaged.
    """
    with Image.open(path) as opened:
        pixels = np.array(opened.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def attack_record(result, place):
    """What is kept of the attack on one image of a batch, JSON-safe.

    Args:
        result ([`FeatureAttackResult`]): of the batch.
        place (`int`): of the image in it.

    Returns:
        `dict`: `linf` in 255ths and `l2` of the change in [0, 1] pixels, steps without a gradient, at most 31 values of the
        attack's own objective (larger is better for the attacker) evenly over its steps, and its settings.
    """
    history = result.objective[place]
    steps = sorted({round(i * (len(history) - 1) / _POINTS) for i in range(_POINTS + 1)})
    facts = result.facts()
    settings = {name: value for name, value in facts.items() if name not in _PER_IMAGE}
    return {
        "linf": round(255 * result.linf_norms[place], 3),
        "l2": result.l2_norms[place],
        "zero_gradients": result.zero_gradients[place],
        "steps": steps,
        "objective": [round(history[step].item(), 5) for step in steps],
        "settings": settings,
    }
