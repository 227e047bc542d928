"""What a PSM in training is worth: cosine, FCSB and PSNR on images it is not trained on, and pictures of them."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..certification import certify_scores
from .losses import draw_noise


# Radii of the paper's tables.
EPSILONS = (0.25, 0.5, 0.75)
# Draws of a validation are numbered from here, where no training step has drawn, and are the same in all of them.
FIRST_DRAW = 2**40
_SHOWN = 4


@torch.no_grad()
def validate(tower, images, sigma, num_samples, purify=None, mapper=None, batch_size=8):
    """Plug-in estimates (no confidence) with and without purifier and mapper, from the same noise.

    Args:
        tower ([`FrozenTower`]): gives the features.
        images (`torch.Tensor` of shape `(num_images, 3, height, width)`): in [0, 1].
        sigma (`float`): noise level in [0, 1] pixels.
        num_samples (`int`): draws per image.
        purify, mapper (`Callable`, *optional*): `(images, sigma)` and `(features, sigma)`.

    Returns:
        `dict[str, dict[str, float]]`: for FS, FS+M (where nothing purifies), FS+P and FS+P+M: `cosine`, mean over images
        of the mean cosine with the clean feature; `fcsb@ε`, mean lower bound on the inner product (paper Theorem 1) by
        the sample mean; `radius`, mean plug-in radius for a cosine of 0.5; `psnr` in dB of what the tower sees.

    Raises:
        FloatingPointError: a feature is NaN or infinite.
    """
    cosines, errors = {}, {}
    for first in range(0, len(images), batch_size):
        clean = images[first : first + batch_size]
        names = range(first, first + len(clean))
        anchors = tower.vector(tower.raw(clean)).flatten(1)
        for draw in range(num_samples):
            noisy = clean + sigma * draw_noise(clean, 0, names, FIRST_DRAW + draw)
            seen = {"FS": noisy}
            if purify is not None:
                seen["FS+P"] = purify(noisy, sigma).float()
            for row, pixels in seen.items():
                raw = tower.raw(pixels)
                features = {row: raw}
                if mapper is not None and row == list(seen)[-1]:
                    features[f"{row}+M"] = raw + mapper(raw, sigma).float()
                for name, feature in features.items():
                    cosine = F.cosine_similarity(tower.vector(feature).flatten(1), anchors)
                    cosines.setdefault(name, {}).setdefault(first, []).append(cosine.cpu().double())
                    error = (pixels - clean).square().flatten(1).mean(1)
                    errors.setdefault(name, {}).setdefault(first, []).append(error.cpu().double())
    found = {}
    for name, batches in cosines.items():
        scores = (1 + torch.cat([torch.stack(draws, 1) for draws in batches.values()])) / 2  # (B, n)
        if not scores.isfinite().all():
            raise FloatingPointError(f"the features of {name} are not finite")
        certificates = certify_scores(scores.numpy(), sigma=sigma, epsilons=EPSILONS, method="plugin")
        mean_errors = torch.cat([torch.stack(draws, 1) for draws in errors[name].values()])
        found[name] = {"cosine": 2 * scores.mean().item() - 1}
        bounds = np.mean([c.inner_product_bounds for c in certificates], 0)
        found[name] |= {f"fcsb@{e:g}": float(b) for e, b in zip(EPSILONS, bounds, strict=True)}
        found[name]["radius"] = float(np.mean([c.radius for c in certificates]))
        found[name]["psnr"] = -10 * mean_errors.log10().mean().item()
    return found


def format_rows(found, sigma):
    """One line per row of [`validate`]."""
    lines = []
    for name, values in found.items():
        bounds = "  ".join(f"{values[f'fcsb@{e:g}']:6.3f}" for e in EPSILONS)
        lines.append(
            f"  σ {sigma:g}  {name:6}  cosine {values['cosine']:.3f}  FCSB at {', '.join(f'{e:g}' for e in EPSILONS)}: "
            f"{bounds}  radius {values['radius']:.3f}  PSNR {values['psnr']:.2f} dB"
        )
    return "\n".join(lines)


@torch.no_grad()
def sample_picture(images, sigma, purify=None):
    """A picture: a row each of clean, noisy and (with a purifier) purified images, clipped to [0, 1] for the eye."""
    clean = images[:_SHOWN]
    noisy = clean + sigma * draw_noise(clean, 0, range(len(clean)), FIRST_DRAW)
    rows = [clean, noisy] + ([] if purify is None else [purify(noisy, sigma).float()])
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (3, rows*H, images*W)
    return Image.fromarray((grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_picture(picture, path):
    """Write a PNG file that is whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    picture.save(unfinished, format="PNG")
    os.replace(unfinished, path)
