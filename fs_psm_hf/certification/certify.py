"""Certificates for images through a smoothed tower: draw, score as the draws come, bound."""

import dataclasses

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..noise import resolve_image_ids, resolve_seed
from ..pixels import check_pixel_values
from .adaptive import certify_stream, check_adaptive
from .certificate import BAND_METHODS, Certificate, check_options
from .identity import describe, model_name, psm_name, vector_hash


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
    check_unit(features, "features")
    return null_level_of_sum(features.double().sum(0), len(features))


def null_level_of_sum(total, count) -> float:
    """[`null_level`] of `count` unit features from their sum alone, `(num_features,)` float64, for sets too large to hold."""
    # The sum over all pairs is the squared length of the sum; the pairs of an image with itself, 1 each, come off.
    return ((total.square().sum() - count) / (count * (count - 1))).item()


class Draws:
    """The noisy draws of one image, made on demand in the order of their numbers and reduced as they come.

    No more than one chunk of features is ever held, unless `keep` is set.

    Args:
        tower ([`SmoothedVisionTower`]): gives the draws.
        image (`torch.Tensor` of shape `(1, 3, height, width)`): the image.
        reduce (`Callable`): turns unit features `(m, ...)` into what is wanted of them, `(m, ...)`.
        seed (`int`), image_id (`int`): name the noise.
        keep (`bool`): also keep the features, in `features`, float32.
        progress (`tqdm.tqdm`, *optional*): bar to advance by the draws.
        options: `feature`, `center`, `per_token` of `SmoothedVisionTower.sample_features`.
    """

    num_looks = 1  # nothing is decided by what was drawn

    def __init__(self, tower, image, reduce, *, seed, image_id, keep=False, progress=None, **options):
        if len(image) != 1:
            raise ValueError(f"`pixel_values` must hold one image, got {len(image)}")
        self.tower, self.image, self.reduce, self.progress = tower, image, reduce, progress
        self.stream = {"generator": seed, "image_ids": [image_id]} | options
        self.image_id, self.values = image_id, None
        self.compiled = None  # the mode of the draws, which are all of one
        self.features = [] if keep else None

    def take(self, num_samples) -> np.ndarray:
        """What `reduce` made of the first `num_samples` draws, `(num_samples, ...)` float64.

        Raises:
            ValueError: a feature is NaN or infinite.
        """
        done = 0 if self.values is None else len(self.values)
        if done < num_samples:
            mode = self.tower.compiled
            if done and mode != self.compiled:
                done = self._forget()
            found = self._draw(done, num_samples)
            if self.tower.compiled != mode:
                # A pass failed to compile among these draws: all again, in the mode that is left.
                mode, done = self.tower.compiled, self._forget()
                found = self._draw(0, num_samples)
            self.compiled = mode
            bad = np.count_nonzero(~np.isfinite(found).reshape(len(found), -1).all(1))
            if bad:
                raise ValueError(
                    f"`tower` gave a NaN or infinite feature in {bad} of {len(found)} draws of image {self.image_id}, "
                    "all must be finite (a half-precision overflow?)"
                )
            self.values = found if done == 0 else np.concatenate([self.values, found])
        return self.values[:num_samples]

    def _draw(self, start, stop):
        found = []
        with torch.inference_mode():
            for chunk in self.tower.sample_features(self.image, stop - start, start=start, **self.stream):
                # Values stay on the device until the end, so that no chunk waits for the transfer of the one before.
                found.append(self.reduce(chunk[0]))
                if self.features is not None:
                    self.features.append(chunk[0].cpu())
                if self.progress is not None:
                    self.progress.update(chunk.shape[1])
            return torch.cat(found).cpu().double().numpy()

    def _forget(self):
        self.values = None
        self.features = None if self.features is None else []
        return 0


class ScoreDraws(Draws):
    """[`Draws`] reduced to scores `(1 + <g(x + n), anchor>)/2`, in [0, 1] up to rounding.

    Args:
        anchor (`torch.Tensor` of shape `(F,)`, or `(tokens, width)` with `per_token`): unit vectors independent of the
            draws.
        record (`dict`): the fields of [`Certificate`] that say what is scored.
    """

    def __init__(self, tower, image, anchor, record, **options):
        self.anchor, self.record = anchor, record

        def products(features):
            # A product and a sum, not a matrix product: those may run in TF32.
            return (features * anchor).sum(-1)  # (m,) or (m, tokens)

        super().__init__(tower, image, products, **options)

    def take(self, num_samples) -> np.ndarray:
        """The first scores, of shape `(num_samples,)`, or `(tokens, num_samples)` with `per_token`."""
        products = super().take(num_samples)
        self.record["compiled"] = self.compiled
        return ((1.0 + products) / 2.0).T


def served_tower(model):
    """The smoothed tower in `model`, and the feature that is read from it.

    Args:
        model ([`SmoothedVisionTower`] or `torch.nn.Module`): the tower itself, or a model that one was attached to.

    Returns:
        `tuple[SmoothedVisionTower, str]`: the tower, and `"pooled"` where a classifier reads its embedding, else `"tokens"`.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
        ValueError: there is no smoothed tower in it, or more than one.
    """
    if hasattr(model, "sample_features"):
        return model, "tokens"
    if not isinstance(model, nn.Module):
        raise TypeError(f"`tower` must be a SmoothedVisionTower or a model that has one, got {type(model).__name__}")
    towers = [module for module in model.modules() if hasattr(module, "sample_features")]
    if len(towers) != 1:
        given = "a plain one: `attach(host, psm, ...)` first" if not towers else f"one with {len(towers)}"
        raise ValueError(
            f"`tower` must be a SmoothedVisionTower or a model that has one, got {type(model).__name__}, {given}"
        )
    readers = [module for module in model.modules() if getattr(module, "tower", None) is towers[0]]
    return towers[0], getattr(readers[0], "feature", "tokens") if readers else "tokens"


def check_certifiable(tower, pixel_values):
    """Raise `ValueError` unless a certificate of this tower on these images would mean what it says."""
    check_pixel_values(pixel_values)
    config = tower.config
    if not config.sigma > 0:
        raise ValueError(f"`tower.config.sigma` must be > 0 to certify, got {config.sigma}")
    if config.aggregation != "unit":
        raise ValueError(f"`tower.config.aggregation` must be 'unit' to certify, got {config.aggregation!r}")
    if any(module.training for module in tower.modules()):
        raise ValueError("`tower` must be in evaluation mode, got training mode: call `tower.eval()`")
    if pixel_values.dtype not in (torch.float32, torch.float64):
        # In half precision two neighbouring images are rounded to grids as coarse as a certified radius.
        raise ValueError(
            f"`pixel_values` must be float32 to certify, also for a tower in {tower.dtype}, got {pixel_values.dtype}"
        )


def describe_run(tower, pixel_values, feature, generator, center=None, description=None) -> dict:
    """The fields of [`Certified`] that are common to the images of one call, the resolved seed among them."""
    return {
        **(description or describe(tower)),
        "model": model_name(tower),
        "psm": psm_name(tower),
        "image_size": tuple(pixel_values.shape[-2:]),
        "feature": feature,
        "center": None if center is None else vector_hash(center),
        "seed": resolve_seed(generator),
        "seed_source": "os" if generator is None else "given",
    }


def draw_scores(
    tower,
    pixel_values,
    *,
    anchor="clean",
    feature="tokens",
    center=None,
    per_token=False,
    generator=None,
    image_ids=None,
    keep=False,
    progress=None,
    description=None,
):
    """The scores of each image, to be drawn on demand: the part of `certify_features` that needs the model.

    One stream serves several methods: `dataclasses.replace(certify_scores(draws.take(n), ...), **draws.record)`.
    Arguments and errors are those of `certify_features`; `description` is what `describe` says of the tower, for a caller
    with many images, whose weights need to be hashed once only.

    Yields:
        [`ScoreDraws`]: one per image. Draws that were taken are remembered.
    """
    check_certifiable(tower, pixel_values)
    given = anchor if isinstance(anchor, torch.Tensor) else None
    kind = "given" if given is not None else anchor
    if given is None and (not isinstance(kind, str) or kind not in ANCHORS):
        given_kind = repr(anchor) if isinstance(anchor, str) else type(anchor).__name__
        raise ValueError(f"`anchor` must be 'clean', 'smoothed' or a torch.Tensor of unit vectors, got {given_kind}")
    if given is not None and len(given) != len(pixel_values):
        raise ValueError(
            f"`anchor` must hold unit vectors for each of {len(pixel_values)} images, got shape {tuple(given.shape)}"
        )
    if center is not None and not isinstance(center, torch.Tensor):
        raise TypeError(f"`center` must be a torch.Tensor, got {type(center).__name__}")
    if center is not None and not torch.all(torch.isfinite(center)):
        raise ValueError("`center` must be finite")
    image_ids = resolve_image_ids(image_ids, len(pixel_values))
    # One seed for the call, and one image at a time: the noise of an image does not depend on its neighbours.
    record = describe_run(tower, pixel_values, feature, generator, center, description) | {"anchor": kind}
    options = {"feature": feature, "center": center, "per_token": per_token}
    for index, image_id in enumerate(image_ids):
        image = pixel_values[index : index + 1]
        if kind == "smoothed":
            vector = _smoothed_anchor(tower, image, record["seed"], image_id, options)
        else:
            with torch.inference_mode():
                vector = tower.clean_features(image, **options)[0]
        if kind == "given":
            if given[index].shape != vector.shape:
                raise ValueError(
                    f"`anchor` must have shape {(len(given), *vector.shape)}, as the feature, got {tuple(given.shape)}"
                )
            check_unit(given[index], "anchor")
            # To the last digit: a vector that is a little too long would certify a little too much.
            vector = nn.functional.normalize(given[index].double(), dim=-1).to(tower.device, torch.float32)
        check_unit(vector, "anchor")
        yield ScoreDraws(
            tower, image, vector, record | {"image_id": image_id}, seed=record["seed"], image_id=image_id, keep=keep,
            progress=progress, **options,
        )  # fmt: skip


def certify_features(
    tower,
    pixel_values,
    *,
    epsilons=(0.125, 0.25, 0.375, 0.5, 0.75),
    num_samples: int = 10_000,
    alpha: float = 1e-3,
    method: str = "cdf",
    anchor="clean",
    feature: str | None = None,
    per_token: bool = False,
    center=None,
    level: float = 0.5,
    beta: float = 0.05,
    target_radius: float | None = None,
    tolerance: float | None = None,
    null_cosine: float | None = None,
    generator=None,
    image_ids=None,
    progress: bool = False,
) -> list[Certificate] | list[list[Certificate]]:
    """Certify how far an l2 perturbation can turn the smoothed feature of each image.

    Each [`Certificate`] holds with probability at least `1 - alpha` over its own sampling noise, for an image that does
    not depend on that noise (so give a seed only to reproduce a result). It is about the expectation of the unit
    features at the tower's `sigma`; its `deployed` part is about the mean of the tower's `num_samples` draws.

    Args:
        tower ([`SmoothedVisionTower`] or `PreTrainedModel`): in evaluation mode, with `sigma > 0` and
            `aggregation="unit"`, in the very dtype it is served in; or the host that it is attached to.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
        epsilons (`Sequence[float]`): l2 radii in [0, 1]-pixel units.
        num_samples (`int`): draws per image; the most of them where it may stop early.
        alpha (`float`): error probability of each certificate; with `per_token`, of all certificates of an image
            together (a union bound gives each token its equal share).
        method (`str`): see `certify_scores`; `"plugin"` is no certificate.
        anchor (`str` or `torch.Tensor` of shape `(batch_size, num_features)`): `"clean"`, the feature of the unwrapped
            tower on the image (the paper); `"smoothed"`, the mean of 128 draws that are not scored; or unit vectors
            that do not depend on the noise, `(batch_size, tokens, width)` with `per_token`.
        feature (`str`, *optional*): `"tokens"`, the flattened chosen layer, `"pooled"` or `"cls"`; by default `"tokens"`,
            and for a host that classifies a pooled embedding (`CLIPModel`, …) `"pooled"`.
        per_token (`bool`): certify the direction of each token of `"tokens"` by itself. That is the expectation of the
            token's own unit vector; a served tower averages all tokens as one vector, so there is no `deployed` part.
        center (`torch.Tensor` of shape `(num_features,)`, *optional*): fixed vector that is subtracted from the feature
            before it is normalised, such as the mean of `tower.clean_features(references, feature, unit=False)`. The
            same theory holds; it takes away what all images share, and so the null level. The served feature is not
            centred, so there is no `deployed` part.
        level (`float`): cosine that the radius keeps, in [0, 1).
        beta (`float`): failure probability of one query of the served model.
        target_radius (`float`, *optional*): stop as soon as this radius is certified, or will not be (`"cdf"` only).
        tolerance (`float`, *optional*): stop as soon as all `num_samples` draws can be expected to add no more than this
            to the radius (`"cdf"` only). Either spreads `alpha` over the looks, which costs a little radius.
        null_cosine (`float`, *optional*): mean cosine of unrelated images, from `null_level`, to be recorded.
        generator (`torch.Generator`, `int` or `None`): source of the noise; `None` is the operating system.
        image_ids (`list[int]`, *optional*): names of the images in the noise, default their positions.
        progress (`bool`): show a bar over the draws.

    Returns:
        `list[Certificate]`: one per image, whatever the batch the image came in; with `per_token` a list per image.

    Raises:
        ValueError: if the tower cannot be certified (sigma 0, plain averaging, training mode), a feature or an anchor is
            not finite, or an argument is out of its range.
    """
    tower, read = served_tower(tower)
    feature = read if feature is None else feature
    options = {"epsilons": epsilons, "alpha": alpha, "method": method, "level": level, "beta": beta}
    options["sigma"] = tower.config.sigma
    if method in BAND_METHODS and tower.serves(feature) and center is None and not per_token:
        options["deployed_samples"] = tower.config.num_samples
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be >= 1, got {num_samples}")
    # A wrong option is refused before the draws, not after an hour of them.
    check_certifiable(tower, pixel_values)
    check_adaptive(target_radius, tolerance, method)
    check_options(**options)
    certificates = []
    with tqdm(total=len(pixel_values) * num_samples, unit="draw", disable=not progress) as bar:
        for draws in draw_scores(
            tower, pixel_values, anchor=anchor, feature=feature, center=center, per_token=per_token,
            generator=generator, image_ids=image_ids, progress=bar,
        ):  # fmt: skip
            found = certify_stream(
                draws.take,
                num_samples,
                target_radius=target_radius,
                tolerance=tolerance,
                per_token=per_token,
                **options,
            )
            record = draws.record | {"null_cosine": null_cosine}
            described = [dataclasses.replace(c, **record) for c in (found if per_token else [found])]
            certificates.append(described if per_token else described[0])
    return certificates


def check_unit(vectors, name):
    """Refuse vectors along the last axis that are not finite or not of length 1."""
    lengths = vectors.float().norm(dim=-1)
    # Not the other way round: a NaN must fail.
    if not torch.all((lengths - 1.0).abs() < _UNIT):
        worst = lengths.flatten()[(lengths - 1.0).abs().nan_to_num(torch.inf).argmax()].item()
        raise ValueError(f"`{name}` must be finite unit vectors, got one of length {worst:.6g}")


def _smoothed_anchor(tower, image, seed, image_id, options):
    """Direction of the mean of draws that are never scored."""
    total = 0.0
    with torch.inference_mode():
        for draws in tower.sample_features(
            image, _ANCHOR_DRAWS, generator=seed, image_ids=[image_id], start=_ANCHOR_START, **options
        ):
            total = total + draws[0].sum(0)  # (F,) or (tokens, width)
        return total / total.norm(dim=-1, keepdim=True)
