"""Simultaneous lower bounds on the survival function of a score, `P(s >= t)`, from independent samples. No model.

Both bands feed the layer-cake bound (`bounds.layer_cake`) and hold for every radius at once. Everything broadcasts over
leading axes (images) and computes in float64.
"""

from functools import lru_cache

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import betaincinv, gammaln, ndtr, ndtri, xlogy

from .confidence import check_scores, clopper_pearson_lower


NUM_RANKS = 128
# Weight of each rank's share of the error probability, relative to the rank below it: see `order_band`.
_RANK_DECAY = 0.85
# Halvings of the search for the largest common share at which the joint error probability, plus what its computation
# may be wrong by, stays below alpha.
_CALIBRATIONS = 10
_COVERAGE_ERROR, _COVERAGE_ERROR_PER_SAMPLE = 1e-9, 1e-14

NUM_THRESHOLDS = 32
# Places below the smallest pilot score, in units of (median - smallest): see `pilot_thresholds`.
_TAIL = np.array([1.5, 1.0, 0.6, 0.3, 0.1])
_THRESHOLD_DECAY = 0.8


def order_band(scores, alpha):
    """Bound the survival function at some of the sorted scores themselves: a weighted Berk–Jones band.

    With probability at least `1 - alpha` over the independent `scores`, `survival_j <= P(s >= t_j)` for all j at once.
    The threshold t_j is the score of rank i_j from below, and survival_j the Beta quantile that `P(s >= s_(i))` of a
    continuous score reaches with probability 1 - η_j; ties only help. The η_j are as large as the exact joint
    probability allows (`coverage`, any distribution), and fall by a factor of 0.85 from rank to rank, because the
    bound on the survival at the lowest scores is carried over the widest step. No pilot is needed, and every score counts.

    Berk and Jones (1979) take all ranks at one level; that costs the lowest ranks most of their α. Measured in
    `examples/benchmarks/tightness.py`.

    Args:
        scores (`np.ndarray` of shape `(..., n)`): independent samples in [0, 1].
        alpha (`float`): error probability in (0, 1).

    Returns:
        `tuple[np.ndarray, np.ndarray]`: thresholds, ascending, and the lower bounds on the survival there,
        non-increasing, both of shape `(..., min(n, about 128))`.

    Raises:
        ValueError: if there is no score, one is outside [0, 1] or `alpha` is outside (0, 1).
    """
    scores = check_scores(scores, alpha)
    n = scores.shape[-1]
    ranks = spread_ranks(n)
    _, survival = calibrated_levels(n, float(alpha), tuple(ranks.tolist()))
    thresholds = np.sort(scores, axis=-1)[..., ranks - 1]
    return thresholds, np.where(thresholds <= 0.0, 1.0, survival)  # a score is never negative


def spread_ranks(n, m=NUM_RANKS):
    """At most `m` ranks from 1 to the upper 2 %, evenly spread on the scale of Gaussian quantiles, where the bound works."""
    spread = ndtr(np.linspace(ndtri(1.0 / (n + 1)), 2.0, m)) * n
    return np.unique(np.clip(np.round(spread).astype(int), 1, n))


@lru_cache(maxsize=256)
def calibrated_levels(n, alpha, ranks, decay=_RANK_DECAY):
    """Error probability η_j of each rank, and the bound on the survival there.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: η_j and `survival_j`, each of shape `(m,)`; the bounds are non-increasing.
    """
    ranks = np.array(ranks)
    weights = decay ** np.arange(len(ranks))
    weights = weights / weights.sum()

    def survival(share):
        lower = betaincinv(n - ranks + 1, ranks, share * weights)
        return np.maximum.accumulate(lower[::-1])[::-1]  # survival is monotone

    # A union bound needs no further argument; the ranks depend on each other, so the exact share is larger.
    share, too_much = alpha * (1.0 - 1e-12), min(4.0 * alpha, 1.0)
    error = _COVERAGE_ERROR + _COVERAGE_ERROR_PER_SAMPLE * n
    for _ in range(_CALIBRATIONS):
        middle = np.sqrt(share * too_much)
        if 1.0 - coverage(n, ranks, survival(middle)) <= alpha - error:
            share = middle
        else:
            too_much = middle
    levels, lower = share * weights, survival(share)
    for array in (levels, lower):
        array.setflags(write=False)  # shared by all callers
    return levels, lower


def coverage(n, ranks, survival):
    """Exact probability that all bounds hold: `P(U_(i_j) <= 1 - survival_j for all j)` for n uniform order statistics.

    The number of uniform samples below `1 - survival_j` must be at least i_j. Given their total n, these numbers are
    those of a Poisson process, whose distribution is carried from place to place by a convolution, dropping what has
    failed (Moscovich and Nadler 2017). What lies beyond ten standard deviations is dropped too, which can only lower
    the answer. Rounding is below 1e-9 + 1e-14 n.

    Args:
        n (`int`): number of samples.
        ranks (`np.ndarray` of shape `(m,)`): ascending, from 1 to n.
        survival (`np.ndarray` of shape `(m,)`): non-increasing, in [0, 1].
    """
    state, lowest, place = np.ones(1), 0, 0.0  # probability of `lowest`, `lowest + 1`, ... samples below `place`
    for rank, below in zip(ranks, 1.0 - np.asarray(survival, np.float64), strict=True):
        counts = _likely_counts(n * (below - place), n)
        steps = _poisson(counts, n * (below - place))
        length = len(state) + len(steps) - 1
        size = next_fast_len(length, real=True)
        state = np.maximum(irfft(rfft(state, size) * rfft(steps, size), size)[:length], 0.0)
        lowest, place = lowest + counts[0], below
        failed = max(0, rank - lowest)
        likely = _likely_counts(n * below, n)
        end = min(len(state), likely[-1] + 1 - lowest)
        start = max(failed, min(likely[0] - lowest, end))
        state, lowest = state[start:end], lowest + start
        if len(state) == 0:
            return 0.0
    rest = _poisson(n - np.arange(lowest, lowest + len(state)), n * (1.0 - place))
    return float((state * rest).sum() / _poisson(n, n))


def _likely_counts(mean, n):
    """Whole numbers from 0 to n within ten standard deviations of a Poisson mean, and a few more for small means."""
    reach = 10.0 * np.sqrt(mean) + 30.0
    return np.arange(max(0, int(mean - reach)), min(n, int(np.ceil(mean + reach))) + 1)


def _poisson(counts, mean):
    counts = np.asarray(counts, np.float64)
    inside = np.maximum(counts, 0.0)
    return np.where(counts >= 0.0, np.exp(xlogy(inside, mean) - mean - gammaln(inside + 1.0)), 0.0)


def pilot_band(scores, num_pilot, alpha):
    """Bound the survival function at thresholds that the first `num_pilot` scores choose and are not counted for.

    Clopper–Pearson at each threshold and a union bound over them, for theory's Fact 3 as it stands.

    Args:
        scores (`np.ndarray` of shape `(..., n)`): independent samples in [0, 1].
        num_pilot (`int`): from 0 to n - 1.
        alpha (`float`): error probability in (0, 1).

    Returns:
        `tuple[np.ndarray, np.ndarray]`: thresholds and lower bounds, as `order_band`, of shape `(..., 32)`.
    """
    scores = check_scores(scores, alpha)
    if not 0 <= num_pilot < scores.shape[-1]:
        raise ValueError(f"`num_pilot` must be from 0 to {scores.shape[-1] - 1}, got {num_pilot}")
    thresholds = pilot_thresholds(scores[..., :num_pilot])
    return thresholds, survival_band(scores[..., num_pilot:], thresholds, alpha)


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
    weights = np.where(counted, _THRESHOLD_DECAY ** counted.cumsum(axis=-1), 0.0)
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
