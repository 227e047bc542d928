import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtr, ndtri

from fs_psm_hf.certification import bounds
from fs_psm_hf.certification.confidence import (
    clopper_pearson_lower,
    pilot_thresholds,
    split_alpha,
    survival_band,
)


def two_point(low, high, p):
    return (
        lambda rng, size: np.where(rng.random(size) < p, high, low),
        lambda t: np.where(t <= low, 1.0, np.where(t <= high, p, 0.0)),
        low + (high - low) * p,
    )


def continuous(distribution):
    return lambda rng, size: distribution.rvs(size, random_state=rng), distribution.sf, distribution.mean()


# name: (draw, P(s >= t), mean)
SHAPES = {
    "good encoder": continuous(stats.beta(95, 5)),
    "wide": continuous(stats.beta(8, 2)),
    "skewed low": continuous(stats.beta(2, 5)),
    "arcsine": continuous(stats.beta(0.5, 0.5)),
    "nearly constant": continuous(stats.uniform(0.9, 1e-4)),
    "real tower": continuous(stats.truncnorm(-26, 14, 0.65, 0.025)),
    "labels": two_point(0.0, 1.0, 0.97),
    "two levels": two_point(0.2, 0.9, 0.5),
    "rare drop": two_point(0.1, 0.95, 0.999),
}
each_shape = pytest.mark.parametrize("name", SHAPES)


def plausible(violations, trials, alpha):
    return stats.binomtest(int(violations), trials, alpha, alternative="greater").pvalue > 1e-6


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


@each_shape
@pytest.mark.parametrize(("n", "alpha"), [(100, 0.05), (300, 0.05), (300, 1e-3)])
def test_band_and_bound_cover(name, n, alpha):
    draw, survival, mean = SHAPES[name]
    trials = 1500
    scores = draw(np.random.default_rng(n), (trials, n + 100))
    thresholds = pilot_thresholds(scores[:, :100])
    band = survival_band(scores[:, 100:], thresholds, alpha)
    # `sf` is P(s > t), which for a continuous shape is P(s >= t).
    wrong = (band > survival(thresholds) + 1e-12).any(axis=1)
    assert plausible(wrong.sum(), trials, alpha)
    bound = bounds.layer_cake(band, thresholds, 0.0, 1.0)
    assert plausible((bound > mean + 1e-12).sum(), trials, alpha)


@each_shape
def test_bound_inside_the_ball_is_below_the_population_bound(name):
    draw, survival, _ = SHAPES[name]
    scores = draw(np.random.default_rng(1), (300, 600))
    thresholds = pilot_thresholds(scores[:, :100])
    bound = bounds.layer_cake(survival_band(scores[:, 100:], thresholds, 0.05), thresholds, 1.0, 1.0)
    grid = np.linspace(0, 1, 20001)[1:]
    truth = ndtr(ndtri(np.minimum(survival(grid), 1.0)) - 1.0).mean() + 1 / 20000  # rounded up
    assert plausible((bound > truth).sum(), 300, 0.05)


@pytest.mark.parametrize("name", ["good encoder", "wide", "arcsine", "labels"])
def test_the_sample_mean_violates(name):
    draw, _, mean = SHAPES[name]
    scores = draw(np.random.default_rng(0), (1500, 400))
    assert not plausible((scores.mean(axis=1) > mean).sum(), 1500, 0.05)


@pytest.mark.parametrize(("n", "least"), [(1000, 0.66), (10_000, 0.80)])
def test_tightness_on_a_good_encoder(n, least):
    """Prototypes gave 0.55 to 0.64 and 0.79; the population bound is 0.85, the paper's plug-in 0.48."""
    scores = stats.beta(95, 5).rvs((20, n), random_state=np.random.default_rng(0))
    pilot = max(100, n // 10)
    thresholds = pilot_thresholds(scores[:, :pilot])
    bound = bounds.layer_cake(survival_band(scores[:, pilot:], thresholds, 1e-3), thresholds, 1.0, 1.0)
    assert bounds.inner_product(bound).mean() > least


def test_scores_of_0_and_1_pay_nothing_for_the_thresholds():
    scores = np.random.default_rng(0).random(2000) < 0.96
    thresholds = pilot_thresholds(scores[:200])
    bound = bounds.layer_cake(survival_band(scores[200:], thresholds, 1e-3), thresholds, [0.0, 0.3], 0.25)
    lower = clopper_pearson_lower(scores[200:].sum(), 1800, 1e-3)
    assert np.allclose(bound, bounds.shift(lower, [0.0, 0.3], 0.25), atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_equal_scores(value):
    scores = np.full(500, value)
    thresholds = pilot_thresholds(scores[:100])
    bound = bounds.layer_cake(survival_band(scores[100:], thresholds, 1e-3), thresholds, 0.0, 1.0)
    assert bound == pytest.approx(value * 1e-3 ** (1 / 400), rel=1e-12)


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
        (lambda: clopper_pearson_lower(1, 0, 0.1), "n"),
        (lambda: clopper_pearson_lower(6, 5, 0.1), "successes"),
        (lambda: clopper_pearson_lower(1, 5, 1.0), "alpha"),
        (lambda: pilot_thresholds(np.zeros(5), 5), "m"),
        (lambda: survival_band(np.zeros(0), np.array([0.5]), 0.1), "scores"),
        (lambda: survival_band(np.zeros(5), np.array([0.5]), 0.0), "alpha"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        call()
