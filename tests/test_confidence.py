import math

import numpy as np
import pytest
from scipy import stats

from fs_psm_hf.certification.confidence import MEAN_METHODS, clopper_pearson_lower, mean_lower, mean_upper


each_method = pytest.mark.parametrize("method", MEAN_METHODS)


@pytest.mark.parametrize("n", [1, 7, 1000])
@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-9])
def test_clopper_pearson_is_the_root_of_the_binomial_tail(n, alpha):
    k = np.unique([1, n // 2 + 1, n])
    lower = clopper_pearson_lower(k, n, alpha)
    assert np.allclose(stats.binom.sf(k - 1, n, lower), alpha, rtol=1e-8)


def test_clopper_pearson_in_the_extremes():
    assert clopper_pearson_lower(0, 50, 0.01) == 0.0
    assert clopper_pearson_lower(50, 50, 0.01) == 0.01 ** (1 / 50)
    assert clopper_pearson_lower([0, 20, 50], 50, 0.0).tolist() == [0.0, 0.0, 0.0]


def test_clopper_pearson_covers_exactly():
    n, alpha = 40, 0.05
    k = np.arange(n + 1)
    lower = clopper_pearson_lower(k, n, alpha)
    for p in np.linspace(0.01, 0.99, 99):
        assert stats.binom.pmf(k, n, p)[lower > p].sum() <= alpha + 1e-12


def test_hoeffding_by_hand():
    # exp(-2 n t²) = 0.02 for n = 50: t = 0.197788
    scores = np.array([0.7, 0.9] * 25)
    assert mean_lower(scores, 0.02, "hoeffding") == pytest.approx(0.8 - 0.197788, abs=1e-6)


def test_bernstein_by_hand():
    # Sample variance 0.01 * 50/49, log(2/0.02) = 4.60517: 0.8 - sqrt(2 v log/50) - 7 log/(3 * 49)
    scores = np.array([0.7, 0.9] * 25)
    variance = 0.01 * 50 / 49
    expected = 0.8 - math.sqrt(2 * variance * 4.605170186 / 50) - 7 * 4.605170186 / 147
    assert mean_lower(scores, 0.02, "bernstein") == pytest.approx(expected, abs=1e-9)


def is_refuted(scores, mean, alpha):
    """The one-sided capital process of Waudby-Smith and Ramdas (2024), bet by bet: does it ever reach 1/alpha?"""
    capital, total, squares, variance = 1.0, 0.0, 0.0, 0.25
    for count, score in enumerate(scores, start=1):
        stake = min(math.sqrt(2 * math.log(1 / alpha) / (len(scores) * variance)), 0.99 / mean)
        capital *= 1 + stake * (score - mean)
        if capital >= 1 / alpha:
            return True
        total += score
        squares += (score - (0.5 + total) / (count + 1)) ** 2
        variance = (0.25 + squares) / (count + 1)
    return False


@pytest.mark.parametrize("shape", [(95, 5), (2, 5), (0.5, 0.5)])
@pytest.mark.parametrize("alpha", [0.05, 1e-3])
def test_betting_is_the_edge_of_what_the_capital_process_refutes(shape, alpha):
    for seed in range(5):
        scores = np.random.default_rng(seed).beta(*shape, 30)
        lower = mean_lower(scores, alpha, "betting")
        assert 0.0 < lower < scores.mean()
        assert is_refuted(scores, lower - 1e-9, alpha)
        assert not is_refuted(scores, lower + 1e-9, alpha)
        for mean in np.linspace(0.01, 0.99, 99):  # the refuted means are an interval
            assert is_refuted(scores, mean, alpha) == (mean <= lower)


def test_betting_believes_the_best_moment_of_the_capital():
    """What was refuted once stays refuted, so the order counts: here the good news comes first, or last."""
    scores = np.concatenate([np.full(60, 0.9), np.full(40, 0.7)])
    first, last = mean_lower(np.stack([scores, scores[::-1]]), 1e-3)
    assert 0.7 < last < first < scores.mean()
    assert is_refuted(scores, first - 1e-9, 1e-3)
    assert not is_refuted(scores, first + 1e-9, 1e-3)
    # Never above the sample mean, even where an early lucky streak refuted more.
    lucky = np.concatenate([np.full(60, 0.9), np.full(40, 0.2)])
    assert mean_lower(lucky, 1e-3) == pytest.approx(lucky.mean(), abs=1e-12)
    assert is_refuted(lucky, lucky.mean() + 0.01, 1e-3)


@each_method
def test_upper_is_lower_mirrored(method):
    scores = np.random.default_rng(0).beta(8, 2, (3, 400))
    upper = mean_upper(scores, 0.01, method)
    assert np.all((upper > scores.mean(-1)) & (upper <= 1.0))
    assert np.allclose(upper, 1.0 - mean_lower(1.0 - scores, 0.01, method), atol=1e-15)
    if method == "hoeffding":  # symmetric about the mean
        assert np.allclose(upper + mean_lower(scores, 0.01, method), 2 * scores.mean(-1), atol=1e-12)


@each_method
def test_upper_covers(method):
    trials, alpha = 1000, 0.05
    scores = np.random.default_rng(0).beta(2, 5, (trials, 200))
    wrong = int((mean_upper(scores, alpha, method) < 2 / 7).sum())
    assert stats.binomtest(wrong, trials, alpha, alternative="greater").pvalue > 1e-6


@each_method
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_equal_scores(method, value):
    lower = mean_lower(np.full(1000, value), 1e-3, method)
    expected = {
        "hoeffding": max(value - math.sqrt(math.log(1000) / 2000), 0.0),
        "bernstein": max(value - 7 * math.log(2000) / 2997, 0.0),
    }
    if method in expected:
        assert lower == pytest.approx(expected[method], abs=1e-12)
    elif value == 0.0:
        assert lower == 0.0
    else:
        # Without variance the stakes reach 0.99/m: hardly worse than risking all, which needs (value/m)^n = 1/alpha.
        assert value * 0.98 < lower < value * 1e-3 ** (1 / 1000)


@each_method
@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_one_score(method, score):
    lower = mean_lower([score], 0.3, method)
    assert lower.shape == ()
    assert 0.0 <= lower <= score
    # 0 or `score`, the latter with probability 0.3 or less: more than 0.3 of it would be wrong too often.
    assert lower <= 0.3 * score + 1e-12


@each_method
def test_a_smaller_alpha_and_fewer_scores_say_less(method):
    scores = np.random.default_rng(0).beta(95, 5, 2000)
    by_alpha = [mean_lower(scores, alpha, method) for alpha in (0.1, 1e-2, 1e-3, 1e-6)]
    assert np.all(np.diff(by_alpha) < 0)
    by_count = [mean_lower(scores[:n], 1e-3, method) for n in (100, 500, 2000)]
    assert np.all(np.diff(by_count) > 0)
    assert by_count[-1] < scores.mean()


def test_the_sharper_methods_are_sharper_on_a_good_encoder():
    scores = np.random.default_rng(0).beta(95, 5, (20, 10_000))
    hoeffding, bernstein, betting = (mean_lower(scores, 1e-3, m).mean() for m in MEAN_METHODS)
    assert hoeffding + 0.01 < bernstein < betting < 0.95
    assert betting > 0.95 - 1.3 * np.sqrt(2 * 95 * 5 / 100**2 / 101 * math.log(1000) / 10_000)  # the Gaussian width


@each_method
def test_images_broadcast(method):
    scores = np.random.default_rng(0).beta(8, 2, (2, 3, 50))
    lower = mean_lower(scores, 0.05, method)
    assert lower.shape == (2, 3)
    for index in np.ndindex(2, 3):
        assert lower[index] == mean_lower(scores[index], 0.05, method)
    assert np.allclose(mean_lower(scores.astype(np.float32), 0.05, method), lower, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: clopper_pearson_lower(1, 0, 0.1), "n"),
        (lambda: clopper_pearson_lower(6, 5, 0.1), "successes"),
        (lambda: clopper_pearson_lower(-1, 5, 0.1), "successes"),
        (lambda: clopper_pearson_lower(1, 5, 1.0), "alpha"),
        (lambda: mean_lower([], 0.1), "scores"),
        (lambda: mean_lower(0.5, 0.1), "scores"),
        (lambda: mean_lower([0.5, 1.1], 0.1), "scores"),
        (lambda: mean_lower([0.5, np.nan], 0.1), "scores"),
        (lambda: mean_lower([0.5], 0.0), "alpha"),
        (lambda: mean_lower([0.5], 1.0), "alpha"),
        (lambda: mean_lower([0.5], 0.1, "cdf"), "method"),
        (lambda: mean_upper([0.5, -0.1], 0.1), "scores"),
        (lambda: mean_upper([0.5], 0.1, "best"), "method"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        call()
