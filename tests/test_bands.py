import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from scipy.special import betaincinv, ndtri

from fs_psm_hf.certification import bounds
from fs_psm_hf.certification.bands import (
    calibrated_levels,
    coverage,
    order_band,
    pilot_band,
    pilot_thresholds,
    split_alpha,
    spread_ranks,
    survival_band,
)
from fs_psm_hf.certification.confidence import clopper_pearson_lower


def levels_for(n, alpha):
    ranks = spread_ranks(n)
    return ranks, *calibrated_levels(n, alpha, tuple(ranks.tolist()))


def exact_coverage(n, ranks, survival):
    """In rational numbers, over every way in which n samples can fall between the places `1 - survival_j`."""
    places = [Fraction(0), *(1 - Fraction(float(p)) for p in survival), Fraction(1)]
    widths = [after - before for before, after in zip(places, places[1:], strict=False)]

    def total(cell, below):
        if cell == len(ranks):
            return widths[cell] ** (n - below) / math.factorial(n - below)
        return sum(
            (
                widths[cell] ** more / math.factorial(more) * total(cell + 1, below + more)
                for more in range(max(0, int(ranks[cell]) - below), n - below + 1)
            ),
            Fraction(0),
        )

    return float(total(0, 0) * math.factorial(n))


@pytest.mark.parametrize(
    ("n", "ranks"),
    [(1, [1]), (2, [1, 2]), (3, [2]), (5, [1, 2, 3, 4, 5]), (7, [1, 4, 6]), (8, [1, 2, 4, 7, 8])],
)
@pytest.mark.parametrize("level", [0.4, 0.05, 1e-3])
def test_coverage_is_the_rational_sum(n, ranks, level):
    survival = betaincinv(n - np.array(ranks) + 1, ranks, level)
    assert coverage(n, ranks, survival) == pytest.approx(exact_coverage(n, ranks, survival), abs=1e-13)
    tied = np.full(len(ranks), survival[-1])  # one place for all ranks: the highest decides
    assert coverage(n, ranks, tied) == pytest.approx(exact_coverage(n, ranks, tied), abs=1e-13)
    assert coverage(n, ranks, tied) == pytest.approx(1 - level, abs=1e-13)


def test_coverage_in_the_extremes():
    assert coverage(4, [1, 4], [0.0, 0.0]) == pytest.approx(1.0, abs=1e-13)
    assert coverage(4, [1, 4], [1.0, 0.0]) == 0.0
    assert coverage(4, [4], [0.25]) == pytest.approx(0.75**4, abs=1e-13)


@pytest.mark.parametrize(("n", "ranks"), [(5, [1, 2, 4]), (50, [1, 3, 10, 25, 40, 50])])
def test_coverage_agrees_with_simulation(n, ranks):
    trials = 2_000_000 // n
    survival = betaincinv(n - np.array(ranks) + 1, ranks, 0.1)
    ordered = np.sort(np.random.default_rng(n).random((trials, n)), axis=1)
    hits = (ordered[:, np.array(ranks) - 1] <= 1.0 - survival).all(axis=1).sum()
    assert stats.binomtest(int(hits), trials, coverage(n, ranks, survival)).pvalue > 1e-4
    assert stats.binomtest(int(hits), trials, 0.9 ** len(ranks)).pvalue < 1e-9  # as if ranks were independent


@pytest.mark.parametrize("n", [100, 10_000, 200_000, 1_000_000])
def test_coverage_is_as_precise_as_the_calibration_assumes(n):
    """For one rank it is a Beta probability, for bounds that never fail it is 1."""
    for rank in (1, n // 10, n // 2, n - n // 50):
        place = betaincinv(n - rank + 1, rank, 1e-3)
        assert coverage(n, [rank], [place]) == pytest.approx(1 - 1e-3, abs=1e-9 + 1e-14 * n)
    ranks = spread_ranks(n)
    assert coverage(n, ranks, betaincinv(n - ranks + 1, ranks, 1e-25)) == pytest.approx(1.0, abs=1e-9 + 1e-14 * n)


@pytest.mark.parametrize("n", [2, 3, 10, 100, 1000, 10_000])
@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-6])
def test_joint_error_is_alpha_and_hardly_less(n, alpha):
    ranks, levels, survival = levels_for(n, alpha)
    error = 1.0 - coverage(n, ranks, survival)
    assert 0.99 * alpha < error <= alpha
    assert levels.sum() >= alpha * (1 - 1e-11)  # never less than a union bound gives
    assert np.all(np.diff(survival) <= 0)
    if n >= 100:
        assert levels.sum() > 1.5 * alpha


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7, 0.9])
def test_the_share_of_a_large_alpha_is_not_below_the_union_bound(alpha):
    for n in (1, 2, 100):
        ranks, levels, survival = levels_for(n, alpha)
        assert 1.0 - coverage(n, ranks, survival) <= alpha
        assert levels.sum() >= alpha * (1 - 1e-11)


@pytest.mark.parametrize("alpha", [0.3, 0.05, 1e-3])
def test_levels_in_closed_form_for_one_and_two_scores(alpha):
    _, levels, survival = levels_for(1, alpha)
    assert levels.tolist() == survival.tolist() == [pytest.approx(alpha, rel=1e-10)]

    ranks, levels, survival = levels_for(2, alpha)
    assert ranks.tolist() == [1, 2]
    assert np.allclose(survival, [np.sqrt(levels[0]), 1 - np.sqrt(1 - levels[1])], rtol=1e-10)
    first, second = 1 - survival
    # Both samples below the second place, and not both between the places.
    error = 1 - (second**2 - (second - first) ** 2)
    assert 0.99 * alpha < error <= alpha


@pytest.mark.parametrize("alpha", [1e-9, 1e-12])
def test_a_tiny_alpha_falls_back_to_the_union_bound(alpha):
    n = 50
    ranks, levels, survival = levels_for(n, alpha)
    assert alpha * (1 - 1e-11) <= levels.sum() <= alpha
    # Each bound by itself, from the binomial tail: P(U_(i) > 1 - p), fewer than i of n samples below 1 - p.
    alone = stats.binom.sf(n - ranks, n, survival)
    assert np.allclose(alone, levels, rtol=1e-6)
    band = order_band(np.random.default_rng(0).random(n), alpha)
    assert np.array_equal(band[1], survival)
    assert np.all(band[1] < 1 - band[0])  # true of these uniform scores


def test_the_cached_arrays_cannot_be_written():
    for array in levels_for(20, 0.05)[1:]:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.5
    thresholds, survival = order_band(np.random.default_rng(0).random(20), 0.05)
    survival[:] = thresholds[:] = 0.0  # what a caller gets is the caller's own
    assert np.all(order_band(np.random.default_rng(0).random(20), 0.05)[1] > 0)


@pytest.mark.parametrize("n", [1, 2, 7, 100, 10_000, 300_000])
def test_ranks_are_distinct_and_reach_from_the_lowest_to_the_upper_2_percent(n):
    ranks = spread_ranks(n)
    assert np.all(np.diff(ranks) > 0)
    assert ranks[0] == 1
    assert ranks[-1] == round(stats.norm.cdf(2.0) * n)
    if n >= 1000:
        spread = ndtri(ranks / n)
        assert np.diff(spread[spread > -1.5]).max() < 0.15  # even and fine where nothing has to be rounded


def test_order_band_takes_any_order_and_any_number_of_images():
    scores = np.random.default_rng(0).beta(8, 2, (2, 3, 60))
    thresholds, survival = order_band(scores, 0.01)
    assert thresholds.shape == survival.shape == (2, 3, len(spread_ranks(60)))
    for index in np.ndindex(2, 3):
        one = order_band(scores[index][::-1], 0.01)
        assert np.array_equal(one[0], thresholds[index])
        assert np.array_equal(one[1], survival[index])
    assert np.all(np.diff(thresholds) >= 0)
    assert np.all(np.isin(thresholds[0, 0], scores[0, 0]))


def test_the_order_band_fails_exactly_as_often_as_alpha_allows():
    """On uniform scores, P(s >= t) = 1 - t: not only covered, but with nothing given away."""
    trials, alpha = 20_000, 0.05
    thresholds, survival = order_band(np.random.default_rng(0).random((trials, 200)), alpha)
    wrong = int((survival > 1 - thresholds).any(axis=1).sum())
    ranks, _, at = levels_for(200, alpha)
    assert stats.binomtest(wrong, trials, 1 - coverage(200, ranks, at)).pvalue > 1e-4


@pytest.mark.parametrize("values", [(0.0, 0.5, 1.0), (0.2, 0.7, 0.9), (0.3, 0.3, 0.8)])
def test_ties_only_help(values):
    trials, alpha = 10_000, 0.05
    chances = np.array([0.1, 0.3, 0.6])
    scores = np.random.default_rng(0).choice(values, (trials, 40), p=chances)
    thresholds, survival = order_band(scores, alpha)
    truth = (chances * (np.array(values) >= thresholds[..., None])).sum(-1)
    wrong = int((survival > truth + 1e-12).any(axis=1).sum())
    assert stats.binomtest(wrong, trials, alpha, alternative="greater").pvalue > 1e-6


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_equal_scores(value):
    thresholds, survival = order_band(np.full(500, value), 1e-3)
    lowest = levels_for(500, 1e-3)[1][0]
    expected = value * lowest ** (1 / 500)
    assert bounds.layer_cake(survival, thresholds, 0.0, 1.0) == pytest.approx(expected, rel=1e-12)
    assert np.all(thresholds == value)
    assert value > 0.0 or np.all(survival == 1.0)

    thresholds, survival = pilot_band(np.full(500, value), 100, 1e-3)
    expected = value * 1e-3 ** (1 / 400)
    assert bounds.layer_cake(survival, thresholds, 0.0, 1.0) == pytest.approx(expected, rel=1e-12)


def test_scores_of_0_and_1_are_bounded_by_one_level():
    """All scores of 1 share one step, at the level of the lowest rank among them; zeros count nothing."""
    scores = (np.random.default_rng(0).random(2000) < 0.96).astype(float)
    thresholds, survival = order_band(scores, 1e-3)
    ranks, levels, _ = levels_for(2000, 1e-3)
    first = np.argmax(ranks > (scores == 0).sum())
    at_least = 2000 - ranks[first] + 1  # so many scores are certainly at least the one of this rank
    lower = clopper_pearson_lower(at_least, 2000, levels[first])
    bound = bounds.layer_cake(survival, thresholds, [0.0, 0.3], 0.25)
    assert np.allclose(bound, bounds.shift(lower, [0.0, 0.3], 0.25), atol=1e-12)
    assert bound[0] < clopper_pearson_lower(int(scores.sum()), 2000, 1e-3)


def test_scores_of_0_and_1_pay_nothing_for_the_thresholds_of_a_pilot():
    scores = np.random.default_rng(0).random(2000) < 0.96
    thresholds, survival = pilot_band(scores, 200, 1e-3)
    bound = bounds.layer_cake(survival, thresholds, [0.0, 0.3], 0.25)
    lower = clopper_pearson_lower(scores[200:].sum(), 1800, 1e-3)
    assert np.allclose(bound, bounds.shift(lower, [0.0, 0.3], 0.25), atol=1e-12)


def test_pilot_band_is_its_two_halves():
    scores = np.random.default_rng(0).beta(8, 2, (3, 300))
    thresholds, survival = pilot_band(scores, 100, 0.01)
    assert np.array_equal(thresholds, pilot_thresholds(scores[:, :100]))
    assert np.array_equal(survival, survival_band(scores[:, 100:], thresholds, 0.01))
    assert pilot_band(scores, 0, 0.01)[0][0].tolist() == (np.arange(1, 33) / 32).tolist()


@pytest.mark.parametrize(("n", "least"), [(1000, 0.66), (10_000, 0.80)])
def test_tightness_on_a_good_encoder(n, least):
    """Prototypes gave 0.55 to 0.64 and 0.79; the population bound is 0.85, the paper's plug-in 0.48."""
    scores = stats.beta(95, 5).rvs((20, n), random_state=np.random.default_rng(0))
    found = []
    for thresholds, survival in (order_band(scores, 1e-3), pilot_band(scores, max(100, n // 10), 1e-3)):
        found.append(bounds.inner_product(bounds.layer_cake(survival, thresholds, 1.0, 1.0)).mean())
    assert found[0] > found[1] > least  # no pilot is lost


def test_thresholds_are_ordered_and_spread():
    thresholds = pilot_thresholds(stats.beta(95, 5).rvs((3, 200), random_state=np.random.default_rng(0)))
    assert thresholds.shape == (3, 32)
    assert np.all(np.diff(thresholds) >= 0)
    assert thresholds.min() >= 0
    assert thresholds.max() <= 1
    assert pilot_thresholds(np.zeros(0), 8).tolist() == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]


def test_alpha_is_spent_once_and_not_on_ties():
    split = split_alpha(np.array([0.0, 0.2, 0.2, 0.5]), 0.01)
    assert split[[0, 1]].tolist() == [0.0, 0.0]
    assert split[3] == pytest.approx(0.8 * split[2])
    assert 0.01 * (1 - 1e-11) < split.sum() <= 0.01


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: order_band(np.zeros(0), 0.1), "scores"),
        (lambda: order_band(0.5, 0.1), "scores"),
        (lambda: order_band([0.5, 1.1], 0.1), "scores"),
        (lambda: order_band([0.5, np.nan], 0.1), "scores"),
        (lambda: order_band([0.5], 1.0), "alpha"),
        (lambda: pilot_band(np.full(5, 0.5), 5, 0.1), "num_pilot"),
        (lambda: pilot_band(np.full(5, 0.5), 9, 0.1), "num_pilot"),
        (lambda: pilot_band(np.full(5, 0.5), -1, 0.1), "num_pilot"),
        (lambda: pilot_band([0.5, -0.1], 1, 0.1), "scores"),
        (lambda: pilot_thresholds(np.zeros(5), 5), "m"),
        (lambda: survival_band(np.zeros(0), np.array([0.5]), 0.1), "scores"),
        (lambda: survival_band(np.zeros(5), np.array([0.5]), 0.0), "alpha"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        call()
