"""Confidence statements on the survival function of a score, from independent samples in [0, 1]. No model.

Everything broadcasts over leading axes (images) and computes in float64.
"""

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri


NUM_THRESHOLDS = 32
# Places below the smallest pilot score, in units of (median - smallest): see `pilot_thresholds`.
_TAIL = np.array([1.5, 1.0, 0.6, 0.3, 0.1])
_DECAY = 0.8


def clopper_pearson_lower(successes, n, alpha):
    """One-sided Clopper–Pearson lower confidence bound on a success probability.

    `P(bound <= p) >= 1 - alpha` over `n` independent trials, for every p. Exactly 0 without a success or for
    `alpha = 0`, and `alpha ** (1 / n)` without a failure.

    Args:
        successes (`int` or `np.ndarray`): number of successes, 0 to `n`.
        n (`int`): number of trials, >= 1.
        alpha (`float` or `np.ndarray`): error probability in [0, 1).

    Raises:
        ValueError: if a count, `n` or `alpha` is out of range.
    """
    successes, alpha = np.asarray(successes), np.asarray(alpha, np.float64)
    if n < 1:
        raise ValueError(f"`n` must be >= 1, got {n}")
    if np.any(successes < 0) or np.any(successes > n):
        raise ValueError(f"`successes` must be from 0 to `n` = {n}, got {successes.min()} to {successes.max()}")
    if not np.all((alpha >= 0.0) & (alpha < 1.0)):
        raise ValueError(f"`alpha` must be in [0, 1), got {alpha.min()} to {alpha.max()}")
    lower = betaincinv(np.maximum(successes, 1), n - np.maximum(successes, 1) + 1, alpha)
    return np.where(successes == n, alpha ** (1.0 / n), np.where(successes == 0, 0.0, lower))


def pilot_thresholds(pilot, m=NUM_THRESHOLDS):
    """Choose `m` thresholds from pilot scores, which must not be counted again.

    Most are pilot values whose survival is `Φ(z)` for evenly spaced z, from the smallest value to the highest 2 %; the
    bound works on that scale, so steps are short where it is sensitive. Five lie below the smallest pilot score, where
    the scored samples can show survival near 1 that no pilot of a tenth their number can: without them the bound on
    Beta(95, 5) scores at ε/σ = 1 and 99.9 % confidence falls from 0.67 to 0.53 at n = 1,000 and from 0.81 to 0.78 at
    n = 10,000. Any choice is valid, because it is independent of the scored samples. Without a pilot they are even.

    Args:
        pilot (`np.ndarray` of shape `(..., num_pilot)`): independent scores in [0, 1], possibly none.
        m (`int`): number of thresholds, at least 6.

    Returns:
        `np.ndarray` of shape `(..., m)`: ascending, in [0, 1], tied where the pilot is.

    Raises:
        ValueError: if `m` is below 6.
    """
    if m <= len(_TAIL):
        raise ValueError(f"`m` must be at least {len(_TAIL) + 1}, got {m}")
    pilot = np.sort(np.asarray(pilot, np.float64), axis=-1)
    size = pilot.shape[-1]
    if size == 0:
        return np.broadcast_to(np.arange(1, m + 1) / m, (*pilot.shape[:-1], m))
    below = 1.0 - ndtr(np.linspace(ndtri(1.0 - 1.0 / (size + 1)), -2.0, m - len(_TAIL)))
    body = pilot[..., np.minimum((below * size).astype(int), size - 1)]
    smallest = pilot[..., :1]
    tail = np.maximum(smallest - _TAIL * (pilot[..., [size // 2]] - smallest), 0.0)
    return np.concatenate([tail, body], axis=-1)


def split_alpha(thresholds, alpha):
    """Spread the error probability over ascending thresholds: each distinct one gets 0.8 times what the one before got.

    The low thresholds matter most: nearly all samples exceed them, and a bound on the survival there is carried over
    the widest step. On Beta(95, 5) at ε/σ = 1, 99.9 %: even split 0.653 at n = 1,000 and 0.806 at n = 10,000, this one
    0.674 and 0.810 (means of 200 runs); at ε/σ = 2: 0.09 and 0.53 against 0.14 and 0.55. Thresholds at 0 (survival is 1) and all but the
    last of tied ones get nothing, so 0/1-valued scores lose nothing to the split.

    Args:
        thresholds (`np.ndarray` of shape `(..., m)`): ascending, in [0, 1].
        alpha (`float`): total, in (0, 1).

    Returns:
        `np.ndarray` of shape `(..., m)`: sums to `alpha` along the last axis (to 0 where all thresholds are 0).
    """
    last_of_tie = np.diff(thresholds, axis=-1, append=np.inf) > 0.0
    counted = last_of_tie & (thresholds > 0.0)
    weights = np.where(counted, _DECAY ** counted.cumsum(axis=-1), 0.0)
    # Rounding must not lift the sum above alpha.
    return alpha * (1.0 - 1e-12) * weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.finfo(float).tiny)


def survival_band(scores, thresholds, alpha):
    """Simultaneous lower bounds on the survival function of the score at fixed thresholds.

    With probability at least `1 - alpha` over the independent `scores`, `band_j <= P(s >= t_j)` for all j at once:
    Clopper–Pearson at each threshold, a union bound over them (`split_alpha`), and the running maximum from above,
    since survival is monotone (theory, Fact 3).

    Args:
        scores (`np.ndarray` of shape `(..., n)`): independent samples in [0, 1].
        thresholds (`np.ndarray` of shape `(..., m)`): ascending, in [0, 1], chosen independently of `scores`.
        alpha (`float`): error probability in (0, 1).

    Returns:
        `np.ndarray` of shape `(..., m)`: non-increasing along the last axis.

    Raises:
        ValueError: if there is no score or `alpha` is outside (0, 1).
    """
    scores, thresholds = np.asarray(scores, np.float64), np.asarray(thresholds, np.float64)
    if scores.shape[-1] == 0:
        raise ValueError("`scores` must hold at least one sample, got none")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"`alpha` must be strictly between 0 and 1, got {alpha}")
    successes = np.count_nonzero(scores[..., None, :] >= thresholds[..., :, None], axis=-1)
    lower = clopper_pearson_lower(successes, scores.shape[-1], split_alpha(thresholds, alpha))
    lower = np.where(thresholds <= 0.0, 1.0, lower)  # a score is never negative
    return np.maximum.accumulate(lower[..., ::-1], axis=-1)[..., ::-1]
