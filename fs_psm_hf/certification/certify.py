"""Certificates for images through a smoothed tower: draw, score as the draws come, bound."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..noise import resolve_image_ids, resolve_seed
from .certificate import Certificate, certify_scores


ANCHORS = ("clean", "smoothed")
# The draws that make a smoothed anchor are numbered from here, far from any that is scored, so that the anchor is
# independent of the scores and stays the same whatever their number.
_ANCHOR_START = 2**40
_ANCHOR_DRAWS = 128
_UNIT = 1e-3


def null_level(features) -> float:
    """Mean cosine of unrelated images: the cosine that means nothing, to be read beside every certified one.

    Args:
        features (`torch.Tensor` of shape `(num_images, num_features)`): unit clean features, at least two.

    Returns:
        `float`: mean over all ordered pairs of different images.

    Raises:
        ValueError: if there are fewer than two features, or one is not finite or not a unit vector.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"`features` must have shape (at least 2, num_features), got {tuple(features.shape)}")
    _check_unit(features, "features")
    return null_level_of_sum(features.double().sum(0), len(features))


def null_level_of_sum(total, count) -> float:
    """[`null_level`] of `count` unit features from their sum alone, `(num_features,)` float64, for sets too large to hold."""
    # The sum over all pairs is the squared length of the sum; the pairs of an image with itself, 1 each, come off.
    return ((total.square().sum() - count) / (count * (count - 1))).item()


def score_samples(
    tower, pixel_values, anchor, *, num_samples, feature="tokens", generator=None, image_id=0, start=0, progress=None
) -> np.ndarray:
    """Scores `(1 + <g(x + n), anchor>)/2` of one image, one per draw; no more than one chunk of draws is ever held.

    Args:
        tower ([`SmoothedVisionTower`]): gives the draws.
        pixel_values (`torch.Tensor` of shape `(1, 3, height, width)`): the image.
        anchor (`torch.Tensor` of shape `(num_features,)`): unit vector independent of these draws.
        num_samples (`int`): number of draws.
        feature (`str`): `"tokens"`, `"pooled"` or `"cls"`.
        generator (`torch.Generator`, `int` or `None`): source of the noise; `None` is the operating system.
        image_id (`int`): name of the image in the noise.
        start (`int`): number of the first draw.
        progress (`tqdm.tqdm`, *optional*): bar to advance by the draws.

    Returns:
        `np.ndarray` of shape `(num_samples,)`: float64, in [0, 1] up to rounding.

    Raises:
        ValueError: if there is not one image, or a feature is NaN or infinite.
    """
    if len(pixel_values) != 1:
        raise ValueError(f"`pixel_values` must hold one image, got {len(pixel_values)}")
    scores = []
    with torch.inference_mode():
        for draws in tower.sample_features(
            pixel_values, num_samples, feature=feature, generator=generator, image_ids=[image_id], start=start
        ):
            # A product and a sum, not a matrix product: those may run in TF32. The scores stay on the device, so that
            # no chunk waits for the transfer of the one before.
            scores.append((draws[0] * anchor).sum(-1))  # (m,)
            if progress is not None:
                progress.update(len(scores[-1]))
        scores = (1.0 + torch.cat(scores).cpu().double().numpy()) / 2.0
    if not np.all(np.isfinite(scores)):
        raise ValueError(
            f"`tower` gave a NaN or infinite feature in {np.count_nonzero(~np.isfinite(scores))} of {num_samples} "
            f"draws of image {image_id}, all must be finite (a half-precision overflow?)"
        )
    return scores


def score_images(
    tower,
    pixel_values,
    *,
    num_samples=10_000,
    anchor="clean",
    feature="tokens",
    generator=None,
    image_ids=None,
    progress=False,
):
    """Scores of each image and a record of what was scored: the part of `certify_features` that needs the model.

    One stream serves several methods: `dataclasses.replace(certify_scores(scores, method=...), **record)`. Arguments
    and errors are those of `certify_features`.

    Yields:
        `tuple[np.ndarray, dict]`: scores of shape `(num_samples,)`, and the fields of [`Certificate`] that say what was
        certified.
    """
    config = tower.config
    if not config.sigma > 0:
        raise ValueError(f"`tower.config.sigma` must be > 0 to certify, got {config.sigma}")
    if config.aggregation != "unit":
        raise ValueError(f"`tower.config.aggregation` must be 'unit' to certify, got {config.aggregation!r}")
    if any(module.training for module in tower.modules()):
        raise ValueError("`tower` must be in evaluation mode, got training mode: call `tower.eval()`")
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be >= 1, got {num_samples}")
    given = anchor if isinstance(anchor, torch.Tensor) else None
    kind = "given" if given is not None else anchor
    if given is None and kind not in ANCHORS:
        raise ValueError(f"`anchor` must be 'clean', 'smoothed' or a tensor of unit vectors, got {anchor!r}")
    if given is not None and (given.ndim != 2 or len(given) != len(pixel_values)):
        raise ValueError(
            f"`anchor` must have shape ({len(pixel_values)}, num_features), one unit vector per image, "
            f"got {tuple(given.shape)}"
        )
    # One seed for the call, and one image at a time: the noise of an image does not depend on its neighbours.
    seed = resolve_seed(generator)
    image_ids = resolve_image_ids(image_ids, len(pixel_values))
    if pixel_values.dtype not in (torch.float32, torch.float64):
        # In half precision two neighbouring images are rounded to grids as coarse as a certified radius.
        raise ValueError(
            f"`pixel_values` must be float32 to certify, also for a tower in {tower.dtype}, got {pixel_values.dtype}"
        )
    layer = config.feature_layer
    record = {
        "anchor": kind,
        "model": model_name(tower),
        "psm": psm_name(tower),
        "dtype": str(tower.dtype).removeprefix("torch."),
        "image_size": tuple(pixel_values.shape[-2:]),
        "feature": feature,
        "feature_layer": tuple(layer) if isinstance(layer, list) else layer,
        "first_token": config.first_token,
        "attention": getattr(config.vision_config, "_attn_implementation", None),
        "aggregation": config.aggregation,
        "seed": seed,
    }
    with tqdm(total=len(image_ids) * num_samples, unit="draw", disable=not progress) as bar:
        for index, image_id in enumerate(image_ids):
            image = pixel_values[index : index + 1]
            stream = {"feature": feature, "generator": seed, "image_id": image_id}
            if kind == "clean":
                with torch.inference_mode():
                    vector = tower.clean_features(image, feature)[0]
            elif kind == "smoothed":
                vector = _smoothed_anchor(tower, image, **stream)
            else:
                vector = given[index].to(tower.device, torch.float32)
            _check_unit(vector, "anchor")
            yield (
                score_samples(tower, image, vector, num_samples=num_samples, progress=bar, **stream),
                record | {"image_id": image_id},
            )


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


def certify_features(
    tower,
    pixel_values,
    *,
    epsilons=(0.125, 0.25, 0.375, 0.5, 0.75),
    num_samples: int = 10_000,
    alpha: float = 1e-3,
    method: str = "cdf",
    anchor="clean",
    feature: str = "tokens",
    level: float = 0.5,
    beta: float = 0.05,
    null_cosine: float | None = None,
    generator=None,
    image_ids=None,
    progress: bool = False,
) -> list[Certificate]:
    """Certify how far an l2 perturbation can turn the smoothed feature of each image.

    Each [`Certificate`] holds with probability at least `1 - alpha` over its own sampling noise, for an image that does
    not depend on that noise (so give a seed only to reproduce a result). It is about the expectation of the unit
    features at the tower's `sigma`; its `deployed` part is about the mean of the tower's `num_samples` draws.

    Args:
        tower ([`SmoothedVisionTower`]): in evaluation mode, with `sigma > 0` and `aggregation="unit"`, in the very dtype
            it is served in.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
        epsilons (`Sequence[float]`): l2 radii in [0, 1]-pixel units.
        num_samples (`int`): draws per image, the pilot's (a tenth, at least 100) included.
        alpha (`float`): error probability of each certificate.
        method (`str`): `"cdf"` or `"plugin"` (not a certificate); see `certify_scores`.
        anchor (`str` or `torch.Tensor` of shape `(batch_size, num_features)`): `"clean"`, the feature of the unwrapped
            tower on the image (the paper); `"smoothed"`, the mean of 128 draws that are not scored; or unit vectors
            that do not depend on the noise.
        feature (`str`): `"tokens"`, the flattened chosen layer, `"pooled"` or `"cls"`.
        level (`float`): cosine that the radius keeps, in [0, 1).
        beta (`float`): failure probability of one query of the served model.
        null_cosine (`float`, *optional*): mean cosine of unrelated images, from `null_level`, to be recorded.
        generator (`torch.Generator`, `int` or `None`): source of the noise; `None` is the operating system.
        image_ids (`list[int]`, *optional*): names of the images in the noise, default their positions.
        progress (`bool`): show a bar over the draws.

    Returns:
        `list[Certificate]`: one per image, whatever the batch the image came in.

    Raises:
        ValueError: if the tower cannot be certified (sigma 0, plain averaging, training mode), a feature or an anchor is
            not finite, or an argument is out of its range.
    """
    options = {"epsilons": epsilons, "alpha": alpha, "method": method, "level": level, "beta": beta}
    options |= {"sigma": tower.config.sigma}
    if method != "plugin" and tower.serves(feature):
        options["deployed_samples"] = tower.config.num_samples
    if tower.config.sigma > 0:
        certify_scores([0.5, 0.5], **options)  # a wrong option is refused before the draws, not after an hour of them
    stream = score_images(
        tower,
        pixel_values,
        num_samples=num_samples,
        anchor=anchor,
        feature=feature,
        generator=generator,
        image_ids=image_ids,
        progress=progress,
    )
    return [
        dataclasses.replace(certify_scores(scores, **options), null_cosine=null_cosine, **record)
        for scores, record in stream
    ]


def _smoothed_anchor(tower, image, *, feature, generator, image_id):
    """Direction of the mean of draws that are never scored."""
    total = 0.0
    with torch.inference_mode():
        for draws in tower.sample_features(
            image, _ANCHOR_DRAWS, feature=feature, generator=generator, image_ids=[image_id], start=_ANCHOR_START
        ):
            total = total + draws[0].sum(0)  # (F,)
        return total / total.norm()


def _check_unit(vectors, name):
    """Refuse vectors along the last axis that are not finite or not of length 1."""
    lengths = vectors.float().norm(dim=-1)
    # Not the other way round: a NaN must fail.
    if not torch.all((lengths - 1.0).abs() < _UNIT):
        worst = lengths.flatten()[(lengths - 1.0).abs().nan_to_num(torch.inf).argmax()].item()
        raise ValueError(f"`{name}` must be finite unit vectors, got one of length {worst:.6g}")
