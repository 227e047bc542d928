import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from fs_psm_hf.certification import METHODS, Certificate, certify_scores, format_table
from fs_psm_hf.certification.bands import calibrated_levels, order_band, pilot_band, spread_ranks
from fs_psm_hf.certification.certificate import lower_bounds
from fs_psm_hf.certification.confidence import mean_lower


EPSILONS = (0.0, 0.125, 0.25, 0.75)


def scores(n=2000, seed=0):
    return np.random.default_rng(seed).beta(95, 5, n)


def test_plugin_is_the_paper_and_no_certificate():
    values = scores()
    certificate = certify_scores(values, sigma=0.25, epsilons=EPSILONS, method="plugin")
    mean = values.mean()
    assert certificate.robustness_score == certificate.score_lower_bound == mean
    expected = 2 * ndtr(ndtri(mean) - np.array(EPSILONS) / 0.25) - 1
    assert np.allclose(certificate.inner_product_bounds, expected, atol=1e-14)
    assert certificate.radius == pytest.approx(0.25 * (ndtri(mean) - ndtri(0.75)), abs=1e-14)
    assert (certificate.num_samples, certificate.num_pilot, certificate.alpha) == (2000, 0, None)
    assert not certificate.is_certificate
    assert certificate.to_dict()["is_certificate"] is False
    assert "not a certificate" in str(certificate)
    assert "not a certificate" in format_table([certificate])


def test_cdf_is_below_the_mean_above_the_paper_and_counts_every_score():
    values = scores()
    certificate = certify_scores(values, sigma=0.25, epsilons=EPSILONS)
    plugin = certify_scores(values, sigma=0.25, epsilons=EPSILONS, method="plugin")
    assert (certificate.num_samples, certificate.num_pilot) == (2000, 0)
    assert certificate.robustness_score == values.mean()
    assert certificate.score_lower_bound < 0.95
    assert certificate.is_certificate
    assert "not a certificate" not in str(certificate) + format_table([certificate])
    assert certificate.inner_product_bounds[2] > plugin.inner_product_bounds[2] + 0.2
    assert certificate.radius > 1.5 * plugin.radius
    assert certify_scores(values[::-1], sigma=0.25, epsilons=EPSILONS).radius == certificate.radius


def test_cdf_pilot_spends_a_tenth_of_the_scores_on_thresholds():
    values = scores()
    certificate = certify_scores(values, sigma=0.25, epsilons=EPSILONS, method="cdf_pilot")
    assert (certificate.num_samples, certificate.num_pilot) == (1800, 200)
    assert certificate.robustness_score == values[200:].mean()
    # The order of the counted scores is of no importance; that of the pilot's neither.
    shuffled = np.concatenate([values[:200][::-1], values[200:][::-1]])
    again = certify_scores(shuffled, sigma=0.25, epsilons=EPSILONS, method="cdf_pilot")
    assert again.radius == certificate.radius
    thresholds, _ = pilot_band(values, 200, 1e-3)
    assert certificate.score_lower_bound < thresholds[-1]
    counts = [certify_scores(scores(n), sigma=0.25, method="cdf_pilot").num_pilot for n in (3, 100, 500, 5000)]
    assert counts == [1, 50, 100, 500]


@pytest.mark.parametrize("method", METHODS)
def test_a_pilot_that_is_asked_for_is_not_counted(method):
    values = scores(600)
    values[:100:2] = 0.5  # counted, they would ruin every bound
    certificate = certify_scores(values, sigma=0.25, method=method, pilot=100)
    assert (certificate.num_samples, certificate.num_pilot) == (500, 100)
    assert certificate.robustness_score == values[100:].mean()
    if method != "cdf_pilot":
        rest = certify_scores(values[100:], sigma=0.25, method=method)
        assert dataclasses.replace(certificate, num_pilot=0) == rest
    assert certificate.score_lower_bound > 0.8


@pytest.mark.parametrize("method", ["hoeffding", "bernstein", "betting"])
def test_mean_methods_are_theorem_1_at_the_lower_bound(method):
    values = scores()
    certificate = certify_scores(values, sigma=0.25, epsilons=EPSILONS, method=method, alpha=0.01)
    lower = float(mean_lower(values, 0.01, method))
    assert certificate.score_lower_bound == lower
    assert np.allclose(certificate.inner_product_bounds, 2 * ndtr(ndtri(lower) - np.array(EPSILONS) / 0.25) - 1)
    assert certificate.radius == pytest.approx(0.25 * (ndtri(lower) - ndtri(0.75)), abs=1e-14)
    assert (certificate.alpha, certificate.num_samples, certificate.num_pilot) == (0.01, 2000, 0)
    assert certificate.is_certificate


def test_best_is_the_larger_of_two_at_half_the_error():
    differ = set()
    for values in (scores(), (np.random.default_rng(0).random(2000) < 0.99).astype(float), np.full(300, 0.9)):
        best = certify_scores(values, sigma=0.25, epsilons=EPSILONS, method="best", alpha=0.01, deployed_samples=4)
        halves = [
            certify_scores(values, sigma=0.25, epsilons=EPSILONS, method=method, alpha=0.005)
            for method in ("cdf", "betting")
        ]
        for name in ("score_lower_bound", "radius"):
            assert getattr(best, name) == max(getattr(half, name) for half in halves)
        products = [half.inner_product_bounds for half in halves]
        assert best.inner_product_bounds == tuple(np.maximum(*products).tolist())
        differ.update(np.greater(*products).tolist())
        assert best.alpha == 0.01
        served = certify_scores(values, sigma=0.25, epsilons=EPSILONS, alpha=0.005, deployed_samples=4).deployed
        assert best.deployed == served
    assert differ == {True, False}  # neither is always the larger


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_the_list_of_its_images(method):
    batch = np.stack([scores(300), scores(300, seed=1), np.linspace(0.4, 0.6, 300), np.ones(300)])
    batch[1, 7] = 1 + 5e-7
    options = {"sigma": 0.25, "epsilons": EPSILONS, "method": method}
    if method in ("cdf", "cdf_pilot", "best"):
        options["deployed_samples"] = 4
    together = certify_scores(batch, **options)
    for certificate, row in zip(together, batch, strict=True):
        alone, same = certify_scores(row, **options), {}
        for name in ("score_lower_bound", "robustness_score", "radius", "inner_product_bounds", "cosine_bounds"):
            # Sums in another order may differ in the last digit.
            assert getattr(certificate, name) == pytest.approx(getattr(alone, name), abs=1e-12)
            same[name] = getattr(alone, name)
        if alone.deployed is not None:
            assert certificate.deployed.inner_product_bounds == pytest.approx(alone.deployed.inner_product_bounds)
            same["deployed"] = alone.deployed
        assert dataclasses.replace(certificate, **same) == alone
    assert [c.abstained for c in together[:3]] == [False, False, True]
    (only,) = certify_scores(batch[:1], **options)
    assert only.radius == pytest.approx(together[0].radius, abs=1e-12)


def test_bare_numbers_are_those_of_the_certificate():
    batch = np.stack([scores(300), scores(300, seed=1)])
    for method in METHODS:
        pilot = 100 if method == "cdf_pilot" else 0
        lower, radius, band = lower_bounds(
            batch, np.array([0.0, 0.25]), np.full(2, 0.5), sigma=0.25, alpha=0.01, method=method, pilot=pilot
        )
        certificates = certify_scores(batch, sigma=0.25, epsilons=[0.25], alpha=0.01, method=method)
        assert lower[:, 0].tolist() == [c.score_lower_bound for c in certificates]
        assert (2 * lower[:, 1] - 1).tolist() == [c.inner_product_bounds[0] for c in certificates]
        assert radius.tolist() == [c.radius for c in certificates]
        assert (band is None) == (method not in ("cdf", "cdf_pilot", "best"))
    thresholds, survival = order_band(batch, 0.01)
    band = lower_bounds(batch, np.zeros(1), np.zeros(2), sigma=0.25, alpha=0.01, method="cdf")[2]
    assert np.array_equal(band[0], survival)
    assert np.array_equal(band[1], thresholds)


@pytest.mark.parametrize("method", ["cdf", "cdf_pilot", "bernstein", "betting", "best", "plugin"])
def test_radius_is_where_the_bound_meets_the_level(method):
    radius = certify_scores(scores(), sigma=0.25, method=method, level=0.3).radius
    at_radius = certify_scores(scores(), sigma=0.25, epsilons=[radius, radius + 1e-6], method=method)
    assert at_radius.cosine_bounds[0] == pytest.approx(0.3, abs=1e-9)
    assert at_radius.cosine_bounds[1] < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_sign_rule_and_order(method):
    certificate = certify_scores(scores(), sigma=0.25, epsilons=(0.1, 0.3, 2.0), method=method)
    assert list(certificate.inner_product_bounds) == sorted(certificate.inner_product_bounds, reverse=True)
    assert certificate.inner_product_bounds[-1] < 0
    assert certificate.cosine_bounds[-1] == -1.0
    assert certificate.cosine_bounds[0] == certificate.inner_product_bounds[0]


@pytest.mark.parametrize("method", METHODS)
def test_abstains_below_the_level(method):
    certificate = certify_scores(np.linspace(0.4, 0.6, 500), sigma=0.25, epsilons=[0.1], method=method)
    assert certificate.abstained
    assert certificate.radius == 0.0
    assert "abstained" in str(certificate)
    assert not certify_scores(scores(), sigma=0.25, method=method).abstained


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [scores(), np.ones(300), np.zeros(300)], ids=["beta", "ones", "zeros"])
def test_json_round_trip(method, values):
    served = 4 if method in ("cdf", "cdf_pilot", "best") else None
    certificate = certify_scores(values, sigma=0.25, method=method, deployed_samples=served)
    certificate = dataclasses.replace(certificate, model="m", image_size=(32, 32), feature_layer=(-2, 3), seed=2**62)
    text = json.dumps(certificate.to_dict(), allow_nan=False)
    assert Certificate.from_dict(json.loads(text)) == certificate


def test_json_round_trip_of_the_infinite():
    certificate = certify_scores(scores(), sigma=0.25, deployed_samples=4)
    served = dataclasses.replace(certificate.deployed, inner_product_bounds=(math.inf, -1.0))
    certificate = dataclasses.replace(certificate, radius=math.inf, deployed=served, joint_alpha=0.1, token=3)
    text = json.dumps(certificate.to_dict(), allow_nan=False)
    assert '"radius": "inf"' in text
    again = Certificate.from_dict(json.loads(text))
    assert again == certificate
    assert again.deployed.inner_product_bounds == (math.inf, -1.0)
    assert isinstance(again.epsilons, tuple)


def test_all_ones_are_infinite_for_the_plugin_only():
    assert math.isinf(certify_scores(np.ones(300), sigma=0.25, method="plugin").radius)
    certificate = certify_scores(np.ones(300), sigma=0.25)
    levels, _ = calibrated_levels(300, 1e-3, tuple(spread_ranks(300).tolist()))
    lower = levels[0] ** (1 / 300)  # all 300 samples above, at the level of the lowest rank
    assert certificate.score_lower_bound == pytest.approx(lower, abs=1e-12)
    assert certificate.radius == pytest.approx(0.25 * (ndtri(lower) - ndtri(0.75)), abs=1e-9)
    assert 1e-4 < levels[0] < 1e-3

    certificate = certify_scores(np.ones(300), sigma=0.25, method="cdf_pilot")
    lower = 1e-3 ** (1 / 200)
    assert certificate.score_lower_bound == pytest.approx(lower, abs=1e-12)
    assert certificate.radius == pytest.approx(0.25 * (ndtri(lower) - ndtri(0.75)), abs=1e-9)


def test_rounding_is_clamped_and_paid_for():
    values = np.ones(300)
    clean = certify_scores(values, sigma=0.25, epsilons=EPSILONS)
    values[250] = 1 + 5e-7
    paid = certify_scores(values, sigma=0.25, epsilons=EPSILONS)
    lost = np.subtract(clean.inner_product_bounds, paid.inner_product_bounds)
    assert np.allclose(lost, 1e-6, rtol=1e-3)
    assert paid.radius < clean.radius
    values[250] = 1 + 2e-6
    with pytest.raises(ValueError, match=r"`scores` must be in \[0, 1\]"):
        certify_scores(values, sigma=0.25)


def test_one_score_is_enough_to_say_little():
    certificate = certify_scores([0.9], sigma=0.25, epsilons=[0.0], alpha=0.05)
    assert (certificate.num_samples, certificate.num_pilot) == (1, 0)
    # One rank at the whole of alpha: survival of at least 0.05 at 0.9, and Markov's inequality allows no more.
    assert certificate.score_lower_bound == pytest.approx(0.05 * 0.9, rel=1e-9)
    assert certificate.abstained


def test_deployed_is_true_of_served_means():
    """Scores of 0 and 1 shifted to their worst case: the served mean of 8 draws is a binomial count."""
    values = np.random.default_rng(0).random(20_000) < 0.995
    certificate = certify_scores(values, sigma=0.25, epsilons=[0.0, 0.25], deployed_samples=8)
    for epsilon, bound in zip(certificate.epsilons, certificate.deployed.inner_product_bounds, strict=True):
        worst = ndtr(ndtri(0.995) - epsilon / 0.25)
        served = np.random.default_rng(1).binomial(8, worst, 100_000) / 8
        assert np.mean(2 * served - 1 < bound) <= 0.05
    assert certificate.deployed.cosine_bounds[0] >= 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": []}, "`scores` must be a non-empty vector"),
        ({"scores": np.full((3, 3, 3), 0.5)}, "`scores` must be a non-empty vector"),
        ({"scores": np.zeros((3, 0))}, "`scores` must be a non-empty vector"),
        ({"scores": 0.5}, "`scores` must be a non-empty vector"),
        ({"scores": [0.5, np.nan]}, "`scores` must be finite"),
        ({"scores": [0.5, np.inf]}, "`scores` must be finite"),
        ({"scores": [0.5, -0.1]}, r"`scores` must be in \[0, 1\]"),
        ({"alpha": 0.0}, "`alpha` must be strictly between 0 and 1, got 0.0"),
        ({"alpha": 1.0}, "`alpha` must be"),
        ({"epsilons": [0.1, -0.1]}, "`epsilons` must be finite numbers >= 0"),
        ({"epsilons": [np.inf]}, "`epsilons` must be"),
        ({"sigma": 0.0}, "`sigma` must be finite and > 0, got 0.0"),
        ({"sigma": np.nan}, "`sigma` must be"),
        ({"pilot": 500}, "`pilot` must be an integer from 0 to 499, one less than the scores, got 500"),
        ({"pilot": -1}, "`pilot` must be"),
        ({"level": 1.0}, r"`level` must be in \[0, 1\)"),
        (
            {"method": "magic"},
            "`method` must be one of cdf, cdf_pilot, hoeffding, bernstein, betting, best, plugin, got 'magic'",
        ),
        ({"method": "plugin", "deployed_samples": 4}, "`deployed_samples` needs `method` cdf, cdf_pilot, best, got"),
        ({"method": "betting", "deployed_samples": 4}, "`deployed_samples` needs"),
        ({"deployed_samples": 0}, "`deployed_samples` must be an integer from 1 to 1024, got 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, message):
    arguments = {"scores": scores(500), "sigma": 0.25} | change
    with pytest.raises(ValueError, match=message) as error:
        certify_scores(arguments.pop("scores"), **arguments)
    assert "\n" not in str(error.value)


def test_foreign_dicts_are_refused():
    values = certify_scores(scores(), sigma=0.25).to_dict()
    with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
        Certificate.from_dict(values | {"extra": 1})
    with pytest.raises(ValueError, match=r"missing \['sigma'\]"):
        Certificate.from_dict({name: value for name, value in values.items() if name != "sigma"})
    with pytest.raises(ValueError, match="contradicts"):
        Certificate.from_dict(values | {"is_certificate": False})


def test_table_has_a_row_per_setting_and_the_null_level():
    certificates = [certify_scores(scores(seed=s), sigma=0.25, method=m) for s in range(3) for m in ("plugin", "cdf")]
    table = format_table(certificates, null_cosine=0.123)
    lines = table.splitlines()
    assert [line.split()[3] for line in lines[2:4]] == ["plugin", "cdf"]
    mean = np.mean([c.inner_product_bounds[0] for c in certificates[1::2]])
    assert f"{mean:+.4f}" in lines[3]
    assert "mean cosine of +0.1230" in lines[-1]
    with pytest.raises(ValueError, match="`certificates` must be"):
        format_table([])
