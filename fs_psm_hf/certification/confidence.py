"""Confidence bounds on a probability and on the mean of a score, from independent samples in [0, 1]. No model.

Everything broadcasts over leading axes (images) and computes in float64. Bounds on the whole distribution are in `bands`.
"""

import numpy as np
from scipy.special import betaincinv


MEAN_METHODS = ("hoeffding", "bernstein", "betting")
# Largest share of its capital that the bettor risks on one score: 1 could be ruined by a single score of 0, and scores
# of a vision tower, far from 0 and close together, reward a brave one.
_STAKE = 0.99
_BISECTIONS = 48


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


def mean_lower(scores, alpha, method="betting"):
    """Lower confidence bound on the mean of a score: `P(bound <= E[s]) >= 1 - alpha` over the independent scores.

    Args:
        scores (`np.ndarray` of shape `(..., n)`): independent samples in [0, 1], in the order they were drawn.
        alpha (`float`): error probability in (0, 1).
        method (`str`): `"hoeffding"` (Hoeffding 1963); `"bernstein"`, the empirical Bernstein bound (Maurer and Pontil
            2009, Theorem 4); `"betting"`, the one-sided capital process (Waudby-Smith and Ramdas 2024, Theorem 3).

    Returns:
        `np.ndarray` of shape `(...)`: in [0, 1]; 0 says nothing.

    Raises:
        ValueError: if there is no score, one is outside [0, 1], `alpha` is outside (0, 1) or `method` is unknown.
    """
    scores = check_scores(scores, alpha)
    if method not in MEAN_METHODS:
        raise ValueError(f"`method` must be one of {', '.join(MEAN_METHODS)}, got {method!r}")
    n = scores.shape[-1]
    if method == "betting":
        return _betting_lower(scores, alpha)
    if method == "hoeffding":
        return np.maximum(scores.mean(-1) - np.sqrt(np.log(1.0 / alpha) / (2 * n)), 0.0)
    if n == 1:
        return np.zeros(scores.shape[:-1])
    log = np.log(2.0 / alpha)
    width = np.sqrt(2.0 * scores.var(-1, ddof=1) * log / n) + 7.0 * log / (3.0 * (n - 1))
    return np.maximum(scores.mean(-1) - width, 0.0)


def mean_upper(scores, alpha, method="betting"):
    """Upper confidence bound on the mean of a score: `mean_lower` of `1 - s`, mirrored. Arguments as there."""
    return 1.0 - mean_lower(1.0 - np.asarray(scores, np.float64), alpha, method)


def check_scores(scores, alpha):
    """`scores` as float64.

    Raises:
        ValueError: if there is none, one is not in [0, 1], or `alpha` is not strictly between 0 and 1.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError("`scores` must hold at least one sample, got none")
    if not np.all((scores >= 0.0) & (scores <= 1.0)):
        raise ValueError(f"`scores` must be in [0, 1], got values from {scores.min()} to {scores.max()}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"`alpha` must be strictly between 0 and 1, got {alpha}")
    return scores


def _betting_lower(scores, alpha):
    """Smallest mean that a bettor against it could not make rich.

    Against the hypothesis that the mean is m, the capital is `Π (1 + λ_i (s_i - m))` with `0 <= λ_i <= 0.99/m`. Where m
    is the mean, it exceeds 1/α at any time with probability at most α (Ville), and every factor falls as m grows, so the
    means that are not refuted form an interval. λ_i depends on earlier scores alone: `sqrt(2 log(1/α) / (n v_i))` with
    their regularised variance v_i, which is the best stake for n scores.
    """
    n = scores.shape[-1]
    rows = scores.reshape(-1, n)
    counts = np.arange(1, n + 1)
    means = (0.5 + rows.cumsum(-1)) / (counts + 1)
    variances = (0.25 + np.square(rows - means).cumsum(-1)) / (counts + 1)
    before = np.concatenate([np.full((len(rows), 1), 0.25), variances[:, :-1]], axis=-1)
    stakes = np.sqrt(2.0 * np.log(1.0 / alpha) / (n * before))

    low, high = np.zeros(len(rows)), rows.mean(-1)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        most = _STAKE / np.maximum(middle, np.finfo(float).tiny)
        bets = np.minimum(stakes, most[:, None]) * (rows - middle[:, None])
        refuted = np.log1p(bets).cumsum(-1).max(-1) >= np.log(1.0 / alpha)
        low, high = np.where(refuted, middle, low), np.where(refuted, high, middle)
    return low.reshape(scores.shape[:-1])
