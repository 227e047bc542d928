import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad
from scipy.special import ndtr, ndtri

from fs_psm_hf.certification import bounds


EPSILONS = np.array([0.0, 0.05, 0.125, 0.25, 0.5, 1.0])


def step_survival(distribution, m):
    thresholds = np.linspace(0.0, 1.0, m + 1)[1:]
    # Below 1, where float64 rounds up: an event of probability 1 would never lose any.
    return np.minimum(distribution.sf(thresholds), 1 - 1e-15), thresholds


def test_fcsb_is_the_formula_of_theorem_1():
    expected = 2 * stats.norm.cdf(stats.norm.ppf(0.9) - 0.3 / 0.25) - 1
    assert bounds.fcsb(0.9, 0.3, 0.25) == pytest.approx(expected, abs=1e-14)


def test_half_space_attains_the_shift():
    # s(y) = 1 where <w, y> > 0, |w| = 1, at distance a from the plane; the worst x' is straight through it.
    a, sigma = 0.2, 0.25
    truth = stats.norm.cdf((a - EPSILONS) / sigma)
    assert np.allclose(bounds.shift(stats.norm.cdf(a / sigma), EPSILONS, sigma), truth, atol=1e-14)


def test_half_space_attains_the_upper_shift_too():
    # Now x' moves away from the plane, or towards it from outside.
    for a in (-0.6, -0.1, 0.2):
        truth = stats.norm.cdf((a + EPSILONS) / 0.25)
        assert np.allclose(bounds.shift_upper(stats.norm.cdf(a / 0.25), EPSILONS, 0.25), truth, atol=1e-13)
        assert np.allclose(bounds.fcsb_upper(stats.norm.cdf(a / 0.25), EPSILONS, 0.25), 2 * truth - 1, atol=1e-13)


def test_upper_and_lower_bounds_enclose_and_mirror():
    p = np.linspace(0.01, 0.99, 50)[:, None]
    assert np.all(bounds.shift(p, EPSILONS, 0.25) <= p)
    assert np.all(bounds.shift_upper(p, EPSILONS, 0.25) >= p - 1e-15)
    assert np.allclose(bounds.shift_upper(bounds.shift(p, 0.1, 0.25), 0.1, 0.25), p, atol=1e-12)  # there and back
    assert np.allclose(bounds.fcsb_upper(p, EPSILONS, 0.25), -bounds.fcsb(1 - p, EPSILONS, 0.25), atol=1e-13)
    assert bounds.shift_upper([0.0, 1.0], 0.7, 0.25).tolist() == [0.0, 1.0]


def test_the_upper_shift_of_a_tiny_probability_is_not_rounded_away():
    """1e-17 is far below the spacing of float64 at 1, but 8.5 sigma away it is more likely than not."""
    assert bounds.shift_upper(1e-17, 8.5, 1.0) == pytest.approx(ndtr(ndtri(1e-17) + 8.5), abs=1e-9)


def test_the_ball_of_a_monotone_score_lies_between_its_layer_cakes():
    """A score that rises along one direction: every level set is a half-space, so both bounds are met exactly."""
    sigma, nodes = 0.25, np.linspace(-8, 8, 4001)
    weights = stats.norm.pdf(nodes) * (nodes[1] - nodes[0])
    places = np.linspace(-8, 8, 4000) * sigma  # s >= h(place) on one side of the plane through `place`

    def height(y):
        return 0.5 + 0.4 * np.tanh(2 * y) + 0.05 * (y > 0.1)

    survival, mirrored = ndtr(-places / sigma), ndtr(places / sigma)
    for epsilon in (0.0, 0.1, 0.4):
        lowest = (weights * height(sigma * nodes - epsilon)).sum()
        highest = (weights * height(sigma * nodes + epsilon)).sum()
        lower = bounds.layer_cake(survival, height(places), epsilon, sigma)
        upper = bounds.layer_cake_upper(mirrored[::-1], 1 - height(places)[::-1], epsilon, sigma)
        assert lowest - 2e-3 < lower < lowest + 1e-4
        assert highest - 1e-4 < upper < highest + 2e-3


@pytest.mark.parametrize("shape", [(95, 5), (2, 5), (8, 2), (0.5, 0.5)])
@pytest.mark.parametrize("epsilon", [0.1, 0.25, 0.5])
def test_layer_cake_approaches_quadrature_from_below(shape, epsilon):
    sigma, distribution = 0.25, stats.beta(*shape)
    truth, _ = quad(lambda t: ndtr(ndtri(distribution.sf(t)) - epsilon / sigma), 0, 1, limit=500, points=[0.5, 0.9])
    bound = bounds.layer_cake(*step_survival(distribution, 4000), epsilon, sigma)
    assert truth - 3e-4 < bound < truth + 1e-8


def test_layer_cake_beats_theorem_1_in_the_population():
    distribution = stats.beta(95, 5)
    bound = bounds.inner_product(bounds.layer_cake(*step_survival(distribution, 4000), EPSILONS[1:], 0.25))
    assert np.all(bound > bounds.fcsb(0.95, EPSILONS[1:], 0.25) + 0.005)
    assert bound[2] == pytest.approx(0.8515, abs=1e-3)  # epsilon = sigma: theory, Fact 3


def test_layer_cake_is_theorem_1_for_scores_of_0_and_1():
    bound = bounds.layer_cake(np.array([0.93]), np.array([1.0]), EPSILONS, 0.25)
    assert np.allclose(bounds.inner_product(bound), bounds.fcsb(0.93, EPSILONS, 0.25), atol=1e-15)


def test_bounds_fall_with_epsilon_and_rise_with_sigma():
    epsilons = np.linspace(0, 2, 200)
    survival, thresholds = step_survival(stats.beta(8, 2), 30)
    assert np.all(np.diff(bounds.fcsb(0.9, epsilons, 0.25)) < 0)
    assert np.all(np.diff(bounds.layer_cake(survival, thresholds, epsilons, 0.25)) < 0)
    assert bounds.layer_cake(survival, thresholds, 0.3, 0.5) > bounds.layer_cake(survival, thresholds, 0.3, 0.25)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5])
def test_radius_inverts_the_bound(level):
    sigma = 0.25
    radius = bounds.certified_radius(0.95, sigma, level)
    assert bounds.fcsb(0.95, radius, sigma) == pytest.approx(level, abs=1e-12)
    survival, thresholds = step_survival(stats.beta(95, 5), 100)
    radius = bounds.layer_cake_radius(survival, thresholds, sigma, level)
    assert bounds.inner_product(bounds.layer_cake(survival, thresholds, radius, sigma)) == pytest.approx(
        level, abs=1e-12
    )


def test_radius_of_corollary_1_in_closed_form():
    assert bounds.certified_radius(0.95, 0.25) == pytest.approx(0.25 * (ndtri(0.95) - ndtri(0.75)), abs=1e-15)
    one_step = bounds.layer_cake_radius(np.array([0.95]), np.array([1.0]), 0.25)
    assert one_step == pytest.approx(bounds.certified_radius(0.95, 0.25), abs=1e-14)


def test_radius_is_zero_below_the_level_and_infinite_where_nothing_can_fall():
    assert bounds.certified_radius([0.2, 0.7, 1.0], 0.25).tolist() == [0.0, 0.0, np.inf]
    thresholds = np.array([0.9])
    assert bounds.layer_cake_radius(np.array([0.8]), thresholds, 0.25) == 0.0
    assert bounds.layer_cake_radius(np.array([1.0]), thresholds, 0.25) == np.inf
    assert bounds.certified_radius(0.3, 0.25, -1.0) == np.inf
    assert bounds.layer_cake_radius(np.array([0.3]), thresholds, 0.25, -1.0) == np.inf
    # A sure part of 0.7 and a likely part of 0.2: the bound falls from 0.88 towards 0.7, never below.
    mixed = np.array([1.0, 0.9]), np.array([0.7, 0.9])
    assert bounds.layer_cake_radius(*mixed, 0.25, 0.39) == np.inf
    assert 0.0 < bounds.layer_cake_radius(*mixed, 0.25, 0.41) < np.inf


def test_radius_reaches_the_level_where_a_sure_part_bears_most_of_it():
    sure, level = (np.array([1.0, 0.9]), np.array([0.7, 0.9])), 0.41
    # 0.7 + 0.2 Φ(Φ⁻¹(0.9) - r/σ) = (1 + level)/2
    expected = 0.25 * (ndtri(0.9) - ndtri(0.005 / 0.2))
    assert bounds.layer_cake_radius(*sure, 0.25, level) == pytest.approx(expected, rel=1e-9)


def test_extreme_cases_are_exact():
    p = np.array([0.0, 1e-300, 0.1, 0.5, 1 - 1e-16, 1.0])
    assert np.array_equal(bounds.shift(p, 0.0, 0.25), p)
    assert bounds.shift(p, np.inf, 0.25).tolist() == [0, 0, 0, 0, 0, 1]
    assert bounds.shift(p, 1.0, 1e-320).tolist() == [0, 0, 0, 0, 0, 1]
    assert bounds.fcsb([0.0, 1.0], 0.7, 0.25).tolist() == [-1.0, 1.0]
    assert bounds.layer_cake(np.array([1.0, 1.0]), np.array([0.5, 1.0]), 3.0, 0.25) == 1.0


def test_tied_thresholds_count_once():
    single = bounds.layer_cake(np.array([0.9]), np.array([0.6]), EPSILONS, 0.25)
    tied = bounds.layer_cake(np.array([0.9, 0.9, 0.9]), np.array([0.6, 0.6, 0.6]), EPSILONS, 0.25)
    assert np.array_equal(single, tied)


def test_images_and_radii_broadcast():
    survival = np.array([[0.99, 0.9, 0.5], [0.95, 0.6, 0.1]])
    thresholds = np.array([[0.3, 0.8, 0.9], [0.2, 0.7, 0.95]])
    both = bounds.layer_cake(survival[:, None], thresholds[:, None], EPSILONS, 0.25)
    radii = bounds.layer_cake_radius(survival, thresholds, 0.25, 0.2)
    served = bounds.deployed_score(survival[:, None], thresholds[:, None], EPSILONS, 0.25, 4)
    assert both.shape == served.shape == (2, len(EPSILONS))
    for i in range(2):
        assert np.array_equal(both[i], bounds.layer_cake(survival[i], thresholds[i], EPSILONS, 0.25))
        assert radii[i] == bounds.layer_cake_radius(survival[i], thresholds[i], 0.25, 0.2)
        assert np.array_equal(served[i], bounds.deployed_score(survival[i], thresholds[i], EPSILONS, 0.25, 4))


def test_a_negative_bound_is_never_a_cosine():
    assert bounds.cosine([-0.9, -1e-9, 0.0, 0.4]).tolist() == [-1.0, -1.0, 0.0, 0.4]


@pytest.mark.parametrize("num_draws", [1, 2, 4])
@pytest.mark.parametrize("beta", [0.05, 0.3])
def test_deployed_quantile_agrees_with_enumeration(num_draws, beta):
    survival, thresholds = np.array([0.97, 0.8, 0.55, 0.2]), np.array([0.31, 0.62, 0.77, 0.93])
    moved = bounds.shift(survival, 0.1, 0.25)
    values, masses = np.concatenate([[0.0], thresholds]), -np.diff(np.concatenate([[1.0], moved, [0.0]]))
    outcomes = sorted(
        (sum(values[list(draw)]) / num_draws, np.prod(masses[list(draw)]))
        for draw in itertools.product(range(len(values)), repeat=num_draws)
    )
    means, cdf = np.array([o[0] for o in outcomes]), np.cumsum([o[1] for o in outcomes])
    exact = means[np.argmax(cdf > beta)]
    quantile = bounds.deployed_score(survival, thresholds, 0.1, 0.25, num_draws, beta)
    assert exact - 2.0 * num_draws / 2**18 < quantile <= exact


def test_deployed_quantile_of_64_draws_is_a_binomial_quantile():
    """Scores of 0 and 1: the sum of the served draws is a binomial count."""
    for epsilon in (0.0, 0.1, 0.3):
        worst = ndtr(ndtri(0.97) - epsilon / 0.25)
        exact = stats.binom.ppf(0.05, 64, worst) / 64
        quantile = bounds.deployed_score(np.array([0.97]), np.array([1.0]), epsilon, 0.25, 64)
        assert exact - 2e-4 < quantile <= exact + 1e-12
    simulated = np.random.default_rng(0).choice([0.0, 0.31, 0.77], (200_000, 64), p=[0.03, 0.2, 0.77]).mean(1)
    quantile = bounds.deployed_score(np.array([0.97, 0.77]), np.array([0.31, 0.77]), 0.0, 0.25, 64)
    assert quantile == pytest.approx(np.quantile(simulated, 0.05), abs=2e-3)


@pytest.mark.parametrize("num_draws", [1, 64])
def test_deployed_quantile_of_many_rows_is_that_of_each(num_draws):
    """More rows than fit in memory at once."""
    survival = np.sort(np.random.default_rng(0).random((40, 3)), axis=1)[:, ::-1]
    thresholds = np.array([0.3, 0.8, 0.9])
    together = bounds.deployed_score(survival, thresholds, 0.05, 0.25, num_draws)
    for row in (0, 15, 16, 31, 32, 39):
        assert together[row] == bounds.deployed_score(survival[row], thresholds, 0.05, 0.25, num_draws)


def test_deployed_quantile_tends_to_the_mean_bound():
    survival, thresholds = step_survival(stats.beta(95, 5), 50)
    mean = bounds.layer_cake(survival, thresholds, 0.1, 0.25)
    served = [bounds.deployed_score(survival, thresholds, 0.1, 0.25, n0) for n0 in (1, 4, 64, 1024)]
    assert np.all(np.diff(served) > 0)
    assert mean - 0.02 < served[-1] < mean


def test_deployed_quantile_in_the_extremes():
    sure = np.array([1.0]), np.array([0.75])
    assert bounds.deployed_score(*sure, 1.0, 0.25, 4) == pytest.approx(0.75, abs=2e-5)
    assert bounds.deployed_score(np.array([0.9]), np.array([0.75]), np.inf, 0.25, 4) == 0.0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: bounds.fcsb(1.1, 0.1, 0.25), "probability"),
        (lambda: bounds.fcsb(np.nan, 0.1, 0.25), "probability"),
        (lambda: bounds.fcsb_upper(-0.1, 0.1, 0.25), "probability"),
        (lambda: bounds.shift_upper(0.9, -0.1, 0.25), "epsilon"),
        (lambda: bounds.layer_cake_upper(np.array([0.9]), np.array([1.6]), 0.1, 0.25), "thresholds"),
        (lambda: bounds.fcsb(0.9, -0.1, 0.25), "epsilon"),
        (lambda: bounds.fcsb(0.9, 0.1, 0.0), "sigma"),
        (lambda: bounds.certified_radius(0.9, 0.25, 1.5), "level"),
        (lambda: bounds.layer_cake(np.array([0.9, 0.8]), np.array([0.6, 0.5]), 0.1, 0.25), "thresholds"),
        (lambda: bounds.deployed_score(np.array([0.9]), np.array([0.6]), 0.1, 0.25, 0), "num_draws"),
        (lambda: bounds.deployed_score(np.array([0.9]), np.array([0.6]), 0.1, 0.25, 1025), "num_draws"),
        (lambda: bounds.deployed_score(np.array([0.9]), np.array([0.6]), 0.1, 0.25, 4, 0.0), "beta"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        call()
