import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from fs_psm_hf.certification import Certificate, certify_scores, format_table


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


def test_cdf_is_below_the_mean_above_the_paper_and_counts_no_pilot():
    values = scores()
    certificate = certify_scores(values, sigma=0.25, epsilons=EPSILONS)
    plugin = certify_scores(values, sigma=0.25, epsilons=EPSILONS, method="plugin")
    assert (certificate.num_samples, certificate.num_pilot) == (1800, 200)
    assert certificate.robustness_score == values[200:].mean()
    assert certificate.score_lower_bound < 0.95
    assert certificate.is_certificate
    assert "not a certificate" not in str(certificate) + format_table([certificate])
    assert certificate.inner_product_bounds[2] > plugin.inner_product_bounds[2] + 0.2
    assert certificate.radius > 1.5 * plugin.radius
    # The order of the counted scores is of no importance; that of the pilot's neither.
    shuffled = np.concatenate([values[:200][::-1], values[200:][::-1]])
    assert certify_scores(shuffled, sigma=0.25, epsilons=EPSILONS).radius == certificate.radius


@pytest.mark.parametrize("method", ["cdf", "plugin"])
def test_radius_is_where_the_bound_meets_the_level(method):
    radius = certify_scores(scores(), sigma=0.25, method=method, level=0.3).radius
    at_radius = certify_scores(scores(), sigma=0.25, epsilons=[radius, radius + 1e-6], method=method)
    assert at_radius.cosine_bounds[0] == pytest.approx(0.3, abs=1e-9)
    assert at_radius.cosine_bounds[1] < 0.3


@pytest.mark.parametrize("method", ["cdf", "plugin"])
def test_sign_rule_and_order(method):
    certificate = certify_scores(scores(), sigma=0.25, epsilons=(0.1, 0.3, 2.0), method=method)
    assert list(certificate.inner_product_bounds) == sorted(certificate.inner_product_bounds, reverse=True)
    assert certificate.inner_product_bounds[-1] < 0
    assert certificate.cosine_bounds[-1] == -1.0
    assert certificate.cosine_bounds[0] == certificate.inner_product_bounds[0]


@pytest.mark.parametrize("method", ["cdf", "plugin"])
def test_abstains_below_the_level(method):
    certificate = certify_scores(np.linspace(0.4, 0.6, 500), sigma=0.25, epsilons=[0.1], method=method)
    assert certificate.abstained
    assert certificate.radius == 0.0
    assert "abstained" in str(certificate)
    assert not certify_scores(scores(), sigma=0.25, method=method).abstained


@pytest.mark.parametrize("method", ["cdf", "plugin"])
@pytest.mark.parametrize("values", [scores(), np.ones(300), np.zeros(300)], ids=["beta", "ones", "zeros"])
def test_json_round_trip(method, values):
    certificate = certify_scores(values, sigma=0.25, method=method, deployed_samples=None if method == "plugin" else 4)
    certificate = dataclasses.replace(certificate, model="m", image_size=(32, 32), feature_layer=(-2, 3), seed=2**62)
    text = json.dumps(certificate.to_dict(), allow_nan=False)
    assert Certificate.from_dict(json.loads(text)) == certificate


def test_all_ones_are_infinite_for_the_plugin_only():
    assert math.isinf(certify_scores(np.ones(300), sigma=0.25, method="plugin").radius)
    certificate = certify_scores(np.ones(300), sigma=0.25)
    lower = (1e-3 * (1 - 1e-12)) ** (1 / 200)
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
    assert 0.0 < certificate.score_lower_bound < 0.05
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
        ({"scores": np.full((3, 3), 0.5)}, "`scores` must be a non-empty vector"),
        ({"scores": [0.5, np.nan]}, "`scores` must be finite"),
        ({"scores": [0.5, np.inf]}, "`scores` must be finite"),
        ({"scores": [0.5, -0.1]}, r"`scores` must be in \[0, 1\]"),
        ({"alpha": 0.0}, "`alpha` must be strictly between 0 and 1, got 0.0"),
        ({"alpha": 1.0}, "`alpha` must be"),
        ({"epsilons": [0.1, -0.1]}, "`epsilons` must be finite numbers >= 0"),
        ({"epsilons": [np.inf]}, "`epsilons` must be"),
        ({"sigma": 0.0}, "`sigma` must be finite and > 0, got 0.0"),
        ({"sigma": np.nan}, "`sigma` must be"),
        ({"pilot": 500}, "`pilot` must be from 0 to 499, one less than the scores, got 500"),
        ({"pilot": -1}, "`pilot` must be"),
        ({"level": 1.0}, r"`level` must be in \[0, 1\)"),
        ({"method": "magic"}, "`method` must be one of cdf, plugin, got 'magic'"),
        ({"method": "plugin", "deployed_samples": 4}, "`deployed_samples` needs"),
        ({"deployed_samples": 0}, "`num_draws` must be"),
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
