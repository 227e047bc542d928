"""Adaptive sampling: look at the scores a few times as they come, and stop when more would not help. No model."""

import math

import numpy as np

from . import bounds
from .bands import calibrated_levels, spread_ranks
from .certificate import certify_scores, clean_scores


# Looks below this many scores certify too little to be worth their share of alpha.
FIRST_LOOK = 500


def look_schedule(num_samples) -> list[int]:
    """Numbers of scores at which to look: doubling, at least 500, the last one `num_samples` itself."""
    looks = [num_samples]
    while looks[0] // 2 >= FIRST_LOOK:
        looks.insert(0, math.ceil(looks[0] / 2))
    return looks


def check_adaptive(target_radius, tolerance, method) -> bool:
    """Whether to stop early.

    Raises:
        ValueError: a target out of range, both given, or a method other than `"cdf"`.
    """
    for name, value in (("target_radius", target_radius), ("tolerance", tolerance)):
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"`{name}` must be finite and > 0, an l2 length in [0, 1] pixels, got {value}")
    if target_radius is not None and tolerance is not None:
        raise ValueError("`target_radius` and `tolerance` must not both be given")
    adaptive = target_radius is not None or tolerance is not None
    if adaptive and method != "cdf":
        raise ValueError(f"`target_radius` and `tolerance` need `method` 'cdf', got {method!r}")
    return adaptive


def certify_stream(take, num_samples, *, target_radius=None, tolerance=None, **options):
    """Certify scores that are drawn on demand, and stop as soon as more of them would not help.

    The error probability is spread evenly over the planned looks, so that the certificate holds whichever look ends the
    sampling, and for whatever reason. It ends when the radius reaches `target_radius`, or when not even the last look
    can be expected to reach it; or when the last look can be expected to add at most `tolerance`. Several rows of scores
    (tokens) go on until all of them may stop.

    Args:
        take (`Callable[[int], np.ndarray]`): the first so many scores, shape `(n,)` or `(rows, n)`.
        num_samples (`int`): most scores per row.
        target_radius, tolerance (`float`, *optional*): l2 lengths in [0, 1]-pixel units.
        options: of `certify_scores`.

    Returns:
        [`Certificate`] or list of them, whose `alpha` covers all looks.
    """
    if not check_adaptive(target_radius, tolerance, options.get("method", "cdf")):
        return certify_scores(take(num_samples), **options)
    looks = look_schedule(num_samples)
    alpha = options.pop("alpha", 1e-3)
    for n in looks:
        scores = take(n)
        found = certify_scores(scores, alpha=alpha, num_looks=len(looks), **options)
        if n == num_samples:
            return found
        rows = found if isinstance(found, list) else [found]
        radii = np.array([c.radius for c in rows])
        share = rows[0].alpha / len(looks)
        expected = expected_radius(scores, num_samples, share, options["sigma"], options.get("level", 0.5))
        if target_radius is not None:
            stop = (radii >= target_radius) | (expected < target_radius)
        else:
            stop = expected - radii <= tolerance
        if np.all(stop):
            return found


def expected_radius(scores, num_samples, alpha, sigma, level):
    """Radius that `num_samples` scores would certify if they were spread like these: a forecast, not a bound.

    The sorted scores at the ranks of the larger sample are taken from the smaller one, and its smallest score where it
    has none so low. A target close to what can be reached may be given up for it; the certificate is valid all the same.
    """
    scores = np.sort(np.atleast_2d(clean_scores(scores)[0]), axis=-1)
    ranks = spread_ranks(num_samples)
    _, survival = calibrated_levels(num_samples, float(alpha), tuple(ranks.tolist()))
    places = np.minimum(ranks * scores.shape[-1] // num_samples, scores.shape[-1] - 1)
    return bounds.layer_cake_radius(survival, scores[:, places], sigma, level)
