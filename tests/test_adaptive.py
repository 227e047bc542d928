import dataclasses

import numpy as np
import pytest

from fs_psm_hf.certification import certify_scores
from fs_psm_hf.certification.adaptive import certify_stream, check_adaptive, expected_radius, look_schedule


class Stream:
    """Scores on demand, and how many were asked for."""

    def __init__(self, scores):
        self.scores, self.taken = scores, []

    def __call__(self, n):
        self.taken.append(n)
        return self.scores[..., :n]


def good_encoder(n=8000, seed=0):
    return np.random.default_rng(seed).beta(95, 5, n)


@pytest.mark.parametrize(
    ("num_samples", "looks"),
    [
        (1, [1]),
        (999, [999]),
        (1000, [500, 1000]),
        (1001, [501, 1001]),
        (4000, [500, 1000, 2000, 4000]),
        (10_000, [625, 1250, 2500, 5000, 10_000]),
    ],
)
def test_looks_double_up_to_the_last(num_samples, looks):
    assert look_schedule(num_samples) == looks


def test_without_a_target_there_is_one_look_at_the_whole_of_alpha():
    stream = Stream(good_encoder())
    certificate = certify_stream(stream, 8000, sigma=0.25, method="betting", alpha=0.01)
    assert stream.taken == [8000]
    assert certificate == certify_scores(stream.scores, sigma=0.25, method="betting", alpha=0.01)
    assert certificate.num_looks == 1


def test_stops_at_the_first_look_that_reaches_the_target():
    scores = good_encoder()
    looks = look_schedule(8000)
    radii = [certify_scores(scores[:n], sigma=0.25, alpha=1e-3 / len(looks)).radius for n in looks]
    assert radii == sorted(radii)
    for i, n in enumerate(looks):
        stream = Stream(scores)
        certificate = certify_stream(stream, 8000, sigma=0.25, target_radius=radii[i] - 1e-9)
        assert stream.taken == looks[: i + 1]
        assert certificate.num_samples == n
        assert certificate.radius == radii[i]


@pytest.mark.parametrize("aim", [{"target_radius": 0.3}, {"target_radius": 9.0}, {"tolerance": 0.1}])
def test_is_the_certificate_of_the_scores_so_far_at_a_share_of_alpha(aim):
    scores = good_encoder()
    options = {"sigma": 0.25, "epsilons": (0.0, 0.2), "level": 0.4, "deployed_samples": 4}
    certificate = certify_stream(Stream(scores), 8000, alpha=0.05, **aim, **options)
    looks = look_schedule(8000)
    alone = certify_scores(scores[: certificate.num_samples], alpha=0.05 / len(looks), **options)
    assert certificate == dataclasses.replace(alone, alpha=0.05, num_looks=len(looks))
    assert certificate.num_looks == 5
    assert "confidence 0.95," in str(certificate)


def test_stops_as_hopeless_after_the_first_look():
    stream = Stream(np.random.default_rng(0).beta(8, 2, 8000))
    certificate = certify_stream(stream, 8000, sigma=0.25, target_radius=2.0)
    assert stream.taken == [500]
    assert certificate == dataclasses.replace(
        certify_scores(stream.scores[:500], sigma=0.25, alpha=1e-3 / 5), alpha=1e-3, num_looks=5
    )
    assert certificate.radius < 2.0


def test_goes_to_the_end_for_a_target_that_only_the_last_look_reaches():
    for seed in range(5):
        scores = good_encoder(seed=seed)
        last = certify_scores(scores, sigma=0.25, alpha=1e-3 / 5).radius
        stream = Stream(scores)
        assert certify_stream(stream, 8000, sigma=0.25, target_radius=0.97 * last).radius == last
        assert stream.taken == look_schedule(8000)


def test_the_forecast_is_close_to_what_comes():
    """Neither a bound nor always hopeful: a target within 2 % of what can be reached may be given up too early."""
    error = []
    for seed in range(30):
        scores = good_encoder(seed=seed)
        last = certify_scores(scores, sigma=0.25).radius
        error.append([expected_radius(scores[:n], 8000, 1e-3, 0.25, 0.5)[0] / last - 1 for n in (500, 2000, 8000)])
    error = np.array(error)
    assert np.all(np.abs(error.mean(0)) < 0.01)
    assert np.abs(error[:, 0]).max() < 0.04
    assert np.abs(error[:, 1]).max() < 0.02
    assert np.all((error[:, 2] >= 0) & (error[:, 2] < 5e-3))  # of all scores it is the radius, but for the next rank


@pytest.mark.parametrize("tolerance", [0.2, 0.05, 0.01])
def test_stops_when_the_rest_would_add_less_than_the_tolerance(tolerance):
    scores = good_encoder()
    stream = Stream(scores)
    certificate = certify_stream(stream, 8000, sigma=0.25, tolerance=tolerance)
    assert stream.taken == look_schedule(8000)[: len(stream.taken)]
    share = 1e-3 / 5
    for n in stream.taken[:-1]:  # the looks before saw more to be gained
        radius = certify_scores(scores[:n], sigma=0.25, alpha=share).radius
        assert expected_radius(scores[:n], 8000, share, 0.25, 0.5)[0] - radius > tolerance
    if certificate.num_samples < 8000:
        assert certify_scores(scores, sigma=0.25, alpha=share).radius - certificate.radius < 1.5 * tolerance


def test_a_larger_tolerance_stops_earlier():
    counts = [
        certify_stream(Stream(good_encoder()), 8000, sigma=0.25, tolerance=tolerance).num_samples
        for tolerance in (0.3, 0.1, 1e-6)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 8000


def test_rows_go_on_until_all_of_them_may_stop():
    easy, hard = good_encoder(), np.random.default_rng(1).beta(50, 5, 8000)
    share = 1e-3 / 5
    target = certify_scores(hard[:4000], sigma=0.25, alpha=share).radius  # reached by `hard` at the fourth look
    assert certify_scores(easy[:2000], sigma=0.25, alpha=share).radius > target
    stream = Stream(np.stack([easy, hard]))
    both = certify_stream(stream, 8000, sigma=0.25, target_radius=target)
    assert stream.taken == [500, 1000, 2000, 4000]
    assert [c.num_samples for c in both] == [4000, 4000]
    assert {(c.alpha, c.num_looks) for c in both} == {(1e-3, 5)}
    assert min(c.radius for c in both) == pytest.approx(target, abs=1e-12)
    (only,) = certify_stream(Stream(easy[None]), 8000, sigma=0.25, target_radius=target)
    assert only.num_samples <= 2000


def test_scores_of_1_and_of_0():
    assert certify_stream(Stream(np.ones(4000)), 4000, sigma=0.25, target_radius=0.1).num_samples == 500
    found = certify_stream(Stream(np.zeros(4000)), 4000, sigma=0.25, target_radius=0.1)
    assert (found.num_samples, found.radius, found.abstained) == (500, 0.0, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_radius": 0.0}, "`target_radius` must be finite and > 0"),
        ({"target_radius": -0.1}, "`target_radius` must be finite and > 0"),
        ({"target_radius": np.inf}, "`target_radius` must be"),
        ({"tolerance": np.nan}, "`tolerance` must be"),
        ({"tolerance": 0.0}, "`tolerance` must be"),
        ({"target_radius": 0.1, "tolerance": 0.1}, "`target_radius` and `tolerance` must not both"),
        ({"target_radius": 0.1, "method": "betting"}, "need `method` 'cdf', got 'betting'"),
        ({"tolerance": 0.1, "method": "best"}, "need `method` 'cdf', got 'best'"),
        ({"tolerance": 0.1, "sigma": 0.0}, "`sigma` must be"),
        ({"tolerance": 0.1, "alpha": 0.0}, "`alpha` must be"),
        ({"tolerance": 0.1, "level": 1.0}, "`level` must be"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as error:
        certify_stream(Stream(good_encoder()), 8000, **({"sigma": 0.25} | options))
    assert "\n" not in str(error.value)


def test_only_a_target_makes_it_adaptive():
    assert not check_adaptive(None, None, "betting")
    assert check_adaptive(0.1, None, "cdf")
    assert check_adaptive(None, 0.1, "cdf")
