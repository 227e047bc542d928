"""Bounds on a smoothed feature inside an l2 ball, as exact functions of probabilities. No sampling, no model.

Every length (`epsilon`, `sigma`, a radius) is an l2 length in [0, 1]-pixel units. A *score* is `s = (1 + <g, u>)/2`, in
[0, 1], of a unit feature `g` and a fixed unit anchor `u`. All functions broadcast over leading axes and compute in
float64. The confidence in the probabilities that go in is the business of `confidence`.
"""

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtr, ndtri


_BISECTIONS = 64  # halves any bracket of Gaussian quantiles (< 100) to below the spacing of float64
_GRID = 2**18  # cells of the convolution grid, over all draws together …
_FEWEST_CELLS = 2**13 - 1  # … and at least so many per draw: a score is rounded down by at most 1.3e-4
_MOST_VALUES = 2**23  # of the grid in memory at once
_FFT_ERROR = 1e-9  # generous: at most 2**23 summed terms, each wrong by some 1e-17


def inner_product(score):
    """Turn a bound on the mean score into one on the inner product: `2 * score - 1`."""
    return 2.0 * np.asarray(score, np.float64) - 1.0


def cosine(inner_product_bound):
    """Turn a lower bound on `<ĝ(x'), u>` into one on the cosine: the same where it is >= 0, else -1.

    The smoothed feature has length at most 1, and dividing by that length preserves a lower bound only when the bound
    is not negative; a negative one says nothing about the cosine (theory, "Negative values").
    """
    bound = np.asarray(inner_product_bound, np.float64)
    return np.where(bound >= 0.0, bound, -1.0)


def shift(probability, epsilon, sigma):
    """Smallest probability an event of Gaussian probability `probability` can have after the centre moves by `epsilon`.

    Equals `Φ(Φ⁻¹(p) - ε/σ)`, attained by a half-space (theory, Fact 1). An event of probability 0 or 1 keeps it.

    Args:
        probability (`float` or `np.ndarray`): probabilities in [0, 1].
        epsilon (`float` or `np.ndarray`): l2 distance in [0, 1]-pixel units, >= 0, `inf` allowed.
        sigma (`float` or `np.ndarray`): noise standard deviation in [0, 1]-pixel units, > 0.

    Raises:
        ValueError: if a probability is outside [0, 1], `epsilon` is negative or `sigma` is not positive.
    """
    probability = _probability(probability, "probability")
    epsilon, sigma = _lengths(epsilon, sigma)
    with np.errstate(over="ignore", invalid="ignore"):
        moved = ndtr(ndtri(probability) - epsilon / sigma)
    # Exact where rounding, or infinity minus infinity, would blur it.
    return np.where((epsilon == 0.0) | (probability == 0.0) | (probability == 1.0), probability, moved)


def fcsb(score, epsilon, sigma):
    """Feature cosine similarity bound of the paper: `2 Φ(Φ⁻¹(Ŝ) - ε/σ) - 1 <= <ĝ(x'), u>` for `‖x' - x‖₂ <= ε`.

    Holds with certainty for the true mean score Ŝ, or with the confidence of a lower bound on it (Theorem 1, Fact 1).
    Negative values bound the inner product only: see `cosine`.

    Args:
        score (`float` or `np.ndarray`): mean score Ŝ in [0, 1].
        epsilon (`float` or `np.ndarray`): l2 radius in [0, 1]-pixel units, >= 0.
        sigma (`float` or `np.ndarray`): noise standard deviation in [0, 1]-pixel units, > 0.
    """
    return inner_product(shift(score, epsilon, sigma))


def shift_upper(probability, epsilon, sigma):
    """Largest probability an event of Gaussian probability `probability` can have: `Φ(Φ⁻¹(p) + ε/σ)`; as `shift`."""
    probability = _probability(probability, "probability")
    epsilon, sigma = _lengths(epsilon, sigma)
    with np.errstate(over="ignore", invalid="ignore"):
        moved = ndtr(ndtri(probability) + epsilon / sigma)
    return np.where((epsilon == 0.0) | (probability == 0.0) | (probability == 1.0), probability, moved)


def fcsb_upper(score, epsilon, sigma):
    """Upper counterpart of `fcsb`, by symmetry: `<ĝ(x'), u> <= 2 Φ(Φ⁻¹(Ŝ) + ε/σ) - 1` for `‖x' - x‖₂ <= ε`.

    Holds with the confidence of an upper bound on Ŝ. Arguments as in `fcsb`.
    """
    return inner_product(shift_upper(score, epsilon, sigma))


def certified_radius(score, sigma, level=0.5):
    """Largest l2 radius at which `fcsb` is still at least `level`; 0 if it never is, `inf` if it always is.

    `σ (Φ⁻¹(Ŝ) - Φ⁻¹((1 + level)/2))`, Corollary 1 of the paper at `level=0.5`.

    Args:
        score (`float` or `np.ndarray`): mean score Ŝ in [0, 1].
        sigma (`float` or `np.ndarray`): noise standard deviation in [0, 1]-pixel units, > 0.
        level (`float` or `np.ndarray`): inner product to keep, in [-1, 1]. It is a cosine where it is >= 0.
    """
    score, target = np.broadcast_arrays(_probability(score, "score"), _target(level))
    _, sigma = _lengths(0.0, sigma)
    with np.errstate(invalid="ignore"):
        radius = sigma * (ndtri(score) - ndtri(target))
    return np.where((score == 1.0) | (target == 0.0), np.inf, np.where(score < target, 0.0, radius))


def layer_cake(survival_lower, thresholds, epsilon, sigma):
    """Lower bound on the mean score anywhere in the ball, from lower bounds on its survival function at x.

    For `‖x' - x‖₂ <= ε`, `Ŝ(x') = ∫ P(s(x'+n) >= t) dt >= Σ_j (t_j - t_{j-1}) Φ(Φ⁻¹(p_j) - ε/σ)` with `t_0 = 0`: the
    step function lies below the survival function (theory, Fact 3). Holds for all ε at once wherever the `p_j` hold.

    Args:
        survival_lower (`np.ndarray` of shape `(..., m)`): `p_j <= P(s(x+n) >= t_j)`, in [0, 1].
        thresholds (`np.ndarray` of shape `(..., m)`): `t_1 <= ... <= t_m` in [0, 1]; ties are allowed.
        epsilon (`float` or `np.ndarray` of shape `(...)`): l2 radius in [0, 1]-pixel units. Five radii for each of B
            images: `survival_lower` of shape `(B, 1, m)` and `epsilon` of shape `(5,)` give `(B, 5)`.
        sigma (`float`): noise standard deviation in [0, 1]-pixel units, > 0.

    Raises:
        ValueError: if the thresholds are unsorted or outside [0, 1], or as in `shift`.
    """
    survival, thresholds = _survival(survival_lower, thresholds)
    widths = np.diff(thresholds, axis=-1, prepend=0.0)
    moved = shift(survival, np.asarray(epsilon, np.float64)[..., None], np.asarray(sigma, np.float64)[..., None])
    return np.minimum((widths * moved).sum(axis=-1), 1.0)


def layer_cake_upper(survival_lower, thresholds, epsilon, sigma):
    """Upper bound on the mean score anywhere in the ball, from lower bounds on the survival function of `1 - s`.

    The score `1 - s` is that of the opposite anchor, so its lower bound mirrors. Arguments as in `layer_cake`, for the
    sorted or thresholded scores `1 - s`.
    """
    return 1.0 - layer_cake(survival_lower, thresholds, epsilon, sigma)


def layer_cake_radius(survival_lower, thresholds, sigma, level=0.5):
    """Largest l2 radius at which `2 * layer_cake - 1` is still at least `level`, by bisection, rounded down.

    0 if it never is, `inf` if it always is.

    Args:
        survival_lower (`np.ndarray` of shape `(..., m)`): as in `layer_cake`.
        thresholds (`np.ndarray` of shape `(..., m)`): as in `layer_cake`.
        sigma (`float`): noise standard deviation in [0, 1]-pixel units, > 0.
        level (`float` or `np.ndarray` of shape `(...)`): inner product to keep, in [-1, 1].
    """
    survival, thresholds = _survival(survival_lower, thresholds)
    target = _target(level)
    _, sigma = _lengths(0.0, sigma)

    widths = np.diff(thresholds, axis=-1, prepend=0.0)
    z = ndtri(survival)
    # In units of sigma. Steps of probability 1 never fall; beyond the bracket all others together have fallen under what
    # is then left of the target.
    left = np.clip(target - np.where(z == np.inf, widths, 0.0).sum(axis=-1), 0.0, 1.0)
    with np.errstate(invalid="ignore"):
        high = np.where(z < np.inf, z, -np.inf).max(axis=-1) - ndtri(left)
    high = np.where(np.isfinite(high), np.maximum(high, 0.0), 0.0) + 1.0
    low = np.zeros_like(high)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        keep = (widths * ndtr(z - middle[..., None])).sum(axis=-1) >= target
        low, high = np.where(keep, middle, low), np.where(keep, high, middle)
    at_all = layer_cake(survival, thresholds, 0.0, 1.0) >= target
    always = layer_cake(survival, thresholds, np.inf, 1.0) >= target
    return np.where(always, np.inf, np.where(at_all, low, 0.0) * sigma)


def deployed_score(survival_lower, thresholds, epsilon, sigma, num_draws, beta=0.05):
    """Quantile that the mean score of `num_draws` served draws reaches with probability at least `1 - beta`.

    At each x' with `‖x' - x‖₂ <= ε` a score stochastically dominates the variable Y with
    `P(Y >= t_j) = Φ(Φ⁻¹(p_j) - ε/σ)`, so a mean of independent scores dominates a mean of copies of Y. The returned q is
    the β-quantile of the latter: an FFT convolution on a grid rounded down, its error taken off β (theory, Fact 4).
    For an x' fixed before the serving noise is drawn, one query falls below q with probability at most β; Q queries
    with at most Qβ. It is not simultaneous over the ball.

    Args:
        survival_lower (`np.ndarray` of shape `(..., m)`): as in `layer_cake`.
        thresholds (`np.ndarray` of shape `(..., m)`): as in `layer_cake`.
        epsilon (`float` or `np.ndarray` of shape `(...)`): l2 radius in [0, 1]-pixel units.
        sigma (`float`): noise standard deviation in [0, 1]-pixel units, > 0.
        num_draws (`int`): the paper's n₀, 1 to 1024.
        beta (`float`): failure probability of one query over the smoothing noise, in (0, 1).

    Raises:
        ValueError: if `num_draws` or `beta` is out of range, or as in `layer_cake`.
    """
    if not 1 <= num_draws <= 1024:
        raise ValueError(f"`num_draws` must be from 1 to 1024, got {num_draws}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"`beta` must be strictly between 0 and 1, got {beta}")
    survival, thresholds = _survival(survival_lower, thresholds)
    moved = shift(survival, np.asarray(epsilon, np.float64)[..., None], np.asarray(sigma, np.float64)[..., None])
    # Y is at least t_j wherever it is at least a later threshold.
    moved = np.maximum.accumulate(moved[..., ::-1], axis=-1)[..., ::-1]
    steps = np.concatenate([np.ones_like(moved[..., :1]), moved, np.zeros_like(moved[..., :1])], axis=-1)
    masses = -np.diff(steps, axis=-1)  # of the values 0, t_1, ..., t_m

    cells = max((_GRID - 1) // num_draws, _FEWEST_CELLS)
    values = np.floor(np.broadcast_to(thresholds, moved.shape) * cells).astype(np.int64)
    values = np.concatenate([np.zeros_like(values[..., :1]), values], axis=-1)
    rows = masses.reshape(-1, masses.shape[-1])
    values = values.reshape(rows.shape)
    length = cells * num_draws + 1
    size = next_fast_len(length, real=True)
    quantile = np.empty(len(rows))
    for first in range(0, len(rows), max(1, _MOST_VALUES // size)):  # so many rows as fit in memory at once
        some = slice(first, first + max(1, _MOST_VALUES // size))
        pmf = np.zeros((len(rows[some]), cells + 1))
        np.add.at(pmf, (np.arange(len(pmf))[:, None], values[some]), rows[some])
        cdf = irfft(rfft(pmf, size) ** num_draws, size)[:, :length].cumsum(axis=-1)
        # The first sum whose cdf exceeds beta: all smaller sums together have probability at most beta.
        quantile[some] = (cdf > beta - _FFT_ERROR).argmax(axis=-1)
    return (quantile / (cells * num_draws)).reshape(moved.shape[:-1])


def _probability(value, name):
    value = np.asarray(value, np.float64)
    if not np.all((value >= 0.0) & (value <= 1.0)):
        raise ValueError(f"`{name}` must be in [0, 1], got {_outside(value, 0.0, 1.0)}")
    return value


def _target(level):
    level = np.asarray(level, np.float64)
    if not np.all((level >= -1.0) & (level <= 1.0)):
        raise ValueError(f"`level` must be in [-1, 1], got {_outside(level, -1.0, 1.0)}")
    return 0.5 * (1.0 + level)


def _lengths(epsilon, sigma):
    epsilon, sigma = np.asarray(epsilon, np.float64), np.asarray(sigma, np.float64)
    if not np.all(epsilon >= 0.0):
        raise ValueError(f"`epsilon` must be >= 0, got {_outside(epsilon, 0.0, np.inf)}")
    if not np.all((sigma > 0.0) & np.isfinite(sigma)):
        raise ValueError(f"`sigma` must be finite and > 0, got {sigma.min()}")
    return epsilon, sigma


def _survival(survival_lower, thresholds):
    thresholds = _probability(thresholds, "thresholds")
    if thresholds.ndim == 0 or thresholds.shape[-1] == 0 or np.any(np.diff(thresholds, axis=-1) < 0.0):
        raise ValueError("`thresholds` must be at least one number in [0, 1], in ascending order along the last axis")
    return _probability(survival_lower, "survival_lower"), thresholds


def _outside(value, low, high):
    return value[~((value >= low) & (value <= high))].flat[0]
