"""How often the bounds are wrong, by simulation: at most as often as they say."""

import dataclasses
from collections.abc import Callable
from functools import cached_property

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from fs_psm_hf.certification.adaptive import certify_stream, look_schedule
from fs_psm_hf.certification.bands import order_band
from fs_psm_hf.certification.certificate import lower_bounds


LEVEL = 0.5  # of the radius
METHODS = ("cdf", "cdf_pilot", "hoeffding", "bernstein", "betting", "best")
BANDS = ("cdf", "cdf_pilot")
# Trials of each size: the cost of all sizes is about the same.
TRIALS = {100: 1500, 1000: 250, 10_000: 30}
ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Scores:
    """A distribution on [0, 1]: how to draw from it, `P(s >= t)`, and the mean."""

    draw: Callable
    survival: Callable
    mean: float
    jumps: tuple = ()

    def shifted(self, distance):
        """Population layer-cake bound at `distance` sigmas, rounded up: each cell at the survival of its lower end."""
        widths, survival = self.cells
        return float((widths * ndtr(ndtri(survival) - distance)).sum()) + 1e-9

    @cached_property
    def cells(self):
        quantiles = np.quantile(self.draw(np.random.default_rng(0), 4000), np.linspace(0, 1, 4001))
        ends = np.unique(np.concatenate([np.linspace(0, 1, 20_001), quantiles, self.jumps]))
        # The survival falls just above a jump, where the next cell begins.
        return np.diff(ends), np.minimum(self.survival(np.nextafter(ends[:-1], 1.0)), 1.0)

    @cached_property
    def truth(self):
        """Population values: mean, bound one sigma away, radius in sigmas, the latter two rounded up."""
        target = 0.5 * (1 + LEVEL)
        if self.shifted(0.0) < target:
            radius = 0.0
        elif self.shifted(50.0) >= target:
            radius = np.inf
        else:
            radius = brentq(lambda r: self.shifted(r) - target, 0.0, 50.0) + 1e-9
        return self.mean, self.shifted(1.0), radius


def continuous(distribution):
    return Scores(lambda rng, size: distribution.rvs(size, random_state=rng), distribution.sf, distribution.mean())


def discrete(values, chances):
    values, chances = np.array(values), np.array(chances)

    def survival(t):
        return (chances * (values >= np.asarray(t)[..., None])).sum(-1)

    def draw(rng, size):
        return values[np.searchsorted(chances.cumsum()[:-1], rng.random(size), side="right")]

    return Scores(draw, survival, float(chances @ values), tuple(values))


def mixture(parts, chances):
    def draw(rng, size):
        which = np.searchsorted(np.cumsum(chances)[:-1], rng.random(size), side="right")
        return np.select([which == i for i in range(len(parts))], [part.draw(rng, size) for part in parts])

    def survival(t):
        return sum(chance * part.survival(t) for chance, part in zip(chances, parts, strict=True))

    mean = sum(chance * part.mean for chance, part in zip(chances, parts, strict=True))
    return Scores(draw, survival, mean, sum((part.jumps for part in parts), ()))


TOWER = continuous(stats.truncnorm(-0.84 / 0.017, 0.16 / 0.017, 0.84, 0.017))
SHAPES = {
    "good encoder": continuous(stats.beta(95, 5)),
    "wide": continuous(stats.beta(8, 2)),
    "skewed low": continuous(stats.beta(2, 5)),
    "arcsine": continuous(stats.beta(0.5, 0.5)),
    "uniform": continuous(stats.uniform(0, 1)),
    "nearly constant": continuous(stats.uniform(0.9, 1e-4)),
    "real tower": TOWER,
    "two levels": discrete([0.2, 0.9], [0.5, 0.5]),
    "labels": discrete([0.0, 1.0], [0.03, 0.97]),
    "sure labels": discrete([0.0, 1.0], [0.002, 0.998]),
    "three levels": discrete([0.1, 0.6, 1.0], [0.02, 0.18, 0.8]),
    "drop in a thousand": mixture([discrete([0.05], [1.0]), TOWER], [1e-3, 1 - 1e-3]),
    "drop in two hundred": mixture([continuous(stats.uniform(0, 0.2)), TOWER], [5e-3, 1 - 5e-3]),
    "rare gain": mixture([continuous(stats.uniform(0.4, 0.2)), discrete([1.0], [1.0])], [1 - 5e-3, 5e-3]),
    "mass at one value": mixture([discrete([0.8], [1.0]), continuous(stats.beta(8, 2))], [0.4, 0.6]),
}
each_shape = pytest.mark.parametrize("name", SHAPES)


def plausible(violations, trials, alpha):
    return stats.binomtest(int(violations), trials, alpha, alternative="greater").pvalue > 1e-6


def count_violations(shape, n, trials, alpha, methods, seed):
    """Per method: how often the bound on the mean, the one a sigma away, the radius and any of the band are too large."""
    scores = shape.draw(np.random.default_rng([n, seed]), (trials, n))
    mean, away, radius = shape.truth
    options = {"sigma": 1.0, "alpha": alpha}
    found = {}
    for method in methods:
        pilot = min(max(100, n // 10), n // 2) if method == "cdf_pilot" else 0
        at = np.array([0.0, 1.0]), np.full(trials, LEVEL)
        lower, radii, band = lower_bounds(scores, *at, method=method, pilot=pilot, **options)
        wrong = [lower[:, 0] > mean + ROUNDING, lower[:, 1] > away + ROUNDING, radii > radius + ROUNDING]
        if method in BANDS:
            survival, thresholds = band
            wrong.append((survival > shape.survival(thresholds) + ROUNDING).any(-1))
        found[method] = np.array([w.sum() for w in wrong])
    return found


def check_plausible(found, trials, alpha):
    """The mean for every method; for those that bound the distribution also everything that follows from it."""
    for method, counts in found.items():
        for violations in counts if method in BANDS else counts[:1]:
            assert plausible(violations, trials, alpha), (method, alpha, counts)


@each_shape
def test_the_population_bound_is_rounded_up_by_little(name):
    shape = SHAPES[name]
    assert shape.mean <= shape.shifted(0.0) < shape.mean + 6e-5
    grid = (np.arange(400_000) + 0.5) / 400_000
    midpoint = ndtr(ndtri(np.minimum(shape.survival(grid), 1.0)) - 1.0).mean()
    assert midpoint - 1e-5 < shape.shifted(1.0) < midpoint + 6e-5
    # The draws are from the distribution that is claimed.
    draws = shape.draw(np.random.default_rng(1), 200_000)
    assert abs(draws.mean() - shape.mean) < 5 * draws.std() / np.sqrt(200_000)
    for t in np.quantile(draws, [0.002, 0.1, 0.5, 0.9]):
        assert (draws >= t).mean() == pytest.approx(float(shape.survival(t)), abs=5.5e-3)


@each_shape
@pytest.mark.parametrize("n", TRIALS)
def test_every_method_covers(name, n):
    for alpha in (0.05, 1e-3):
        found = count_violations(SHAPES[name], n, TRIALS[n], alpha, METHODS, seed=0)
        check_plausible(found, TRIALS[n], alpha)


@pytest.mark.slow
@each_shape
@pytest.mark.parametrize("n", TRIALS)
def test_every_method_covers_in_ten_times_as_many_trials(name, n):
    for alpha in (0.05, 1e-3):
        runs = [count_violations(SHAPES[name], n, TRIALS[n], alpha, METHODS, seed) for seed in range(1, 11)]
        total = {method: sum(run[method] for run in runs) for method in METHODS}
        shown = "  ".join(f"{method} {counts.tolist()}" for method, counts in total.items())
        print(f"{name}, n = {n}, alpha = {alpha}, {10 * TRIALS[n]} trials: {shown}")
        check_plausible(total, 10 * TRIALS[n], alpha)


@pytest.mark.parametrize("name", ["good encoder", "wide", "arcsine", "real tower", "labels", "drop in a thousand"])
@pytest.mark.parametrize("n", [100, 1000])
def test_the_sample_mean_does_not_cover(name, n):
    found = count_violations(SHAPES[name], n, TRIALS[n], 0.05, ["plugin"], seed=0)["plugin"]
    assert stats.binomtest(int(found[0]), TRIALS[n], 0.05, alternative="greater").pvalue < 1e-6


@pytest.mark.parametrize(
    ("name", "target"),
    [("good encoder", 1.827), ("real tower", 1.375), ("drop in two hundred", 0.95), ("labels", 0.9)],
)
@pytest.mark.parametrize("rule", ["target_radius", "tolerance"])
def test_stopping_early_keeps_the_confidence(name, target, rule):
    """The aims are such that the sampling ends at different looks, so that a lucky one could end it."""
    shape, trials, alpha = SHAPES[name], 60, 0.05
    mean, away, radius = shape.truth
    aim = {rule: target if rule == "target_radius" else 0.2}
    counts, wrong = set(), np.zeros(4, int)
    for seed in range(trials):
        scores = shape.draw(np.random.default_rng([seed, 7]), 4000)
        found = certify_stream(lambda n, s=scores: s[:n], 4000, sigma=1.0, epsilons=[1.0], alpha=alpha, **aim)
        assert (found.alpha, found.num_looks) == (alpha, 4)
        counts.add(found.num_samples)
        thresholds, survival = order_band(scores[: found.num_samples], alpha / 4)  # what it was made from
        wrong += [
            found.score_lower_bound > mean + ROUNDING,
            0.5 * (1 + found.inner_product_bounds[0]) > away + ROUNDING,
            found.radius > radius + ROUNDING,
            np.any(survival > shape.survival(thresholds) + ROUNDING),
        ]
    assert counts <= set(look_schedule(4000))
    assert min(counts) < 4000
    assert len(counts) > 1 or rule == "tolerance"
    assert all(plausible(w, trials, alpha) for w in wrong), wrong


def test_a_band_that_is_looked_at_often_must_share_its_alpha():
    """Whoever stops at the look that pleases may meet a false band at any of them."""
    looks, trials, alpha = look_schedule(4000), 1500, 0.05
    scores = np.random.default_rng(0).random((trials, 4000))  # uniform: P(s >= t) = 1 - t

    def wrong_at_any_look(share):
        bands = (order_band(scores[:, :n], share) for n in looks)
        return int(np.any([(survival > 1 - thresholds).any(-1) for thresholds, survival in bands], axis=0).sum())

    assert plausible(wrong_at_any_look(alpha / len(looks)), trials, alpha)
    assert stats.binomtest(wrong_at_any_look(alpha), trials, alpha, alternative="greater").pvalue < 1e-9
