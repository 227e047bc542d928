import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from tiny_models import images as tiny_images
from tiny_models import psm_model, smoothed_tower

from fs_psm_hf.certification import certify_features, certify_scores, draw_scores, null_level
from fs_psm_hf.noise import gaussian_noise, resolve_seed


SIZE = (3, 4, 4)


class Settings(SimpleNamespace):
    """A configuration with the two things of one that are read."""

    def to_diff_dict(self):
        return dict(vars(self))


class Encoder(torch.nn.Module):
    """An encoder whose smoothed feature is known in closed form, with a tower's interface.

    `half_space`: the unit feature is +e or -e by the side of a plane. `rotation`: it turns by an angle that is linear
    in the image, so that E cos(angle + noise) = cos(angle) exp(-variance/2).
    """

    def __init__(self, kind, rate=1.0, sigma=0.25, chunk=64, **config):
        super().__init__()
        self.eval()
        settings = {"num_samples": 4, "feature_layer": [-2], "first_token": 0, "aggregation": "unit"}
        settings["vision_config"] = Settings(name_or_path="", _attn_implementation="none")
        settings["psm_config"] = Settings(name_or_path="", purifier="none", mapper_config=None)
        settings |= {"name_or_path": "analytic", "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        self.config = SimpleNamespace(sigma=sigma, **settings | config)
        self.vision_tower, self.psm = torch.nn.Identity().eval(), SimpleNamespace(purifier=None)
        self.kind, self.rate, self.chunk = kind, rate, chunk
        self.dtype, self.device, self.compiled = torch.float32, torch.device("cpu"), False
        self.direction = torch.full((48,), 48**-0.5)
        self.largest = 0

    def coordinate(self, images):
        return images.flatten(-3) @ self.direction

    def features(self, images):
        t = self.coordinate(images)
        if self.kind == "half_space":
            return torch.stack([t.sign(), torch.zeros_like(t)], -1)
        return torch.stack([(self.rate * t).cos(), (self.rate * t).sin()], -1)

    def serves(self, feature):
        return feature == "tokens"

    def clean_features(self, pixel_values, feature, **options):
        return self.features(pixel_values)

    def sample_features(
        self, pixel_values, num_samples, feature="tokens", generator=None, image_ids=None, start=0, **options
    ):
        seed = resolve_seed(generator)
        for first in range(start, start + num_samples, self.chunk):
            count = min(self.chunk, start + num_samples - first)
            noise = gaussian_noise(SIZE, seed, image_ids, first, count, self.device)
            noise = noise.view(len(image_ids), count, *SIZE)
            draws = self.features(pixel_values[:, None] + self.config.sigma * noise)  # (B, m, F)
            self.largest = max(self.largest, draws.shape[1])
            yield draws


def image_at(encoder, *coordinates):
    """Images whose linear coordinate has the given values."""
    return torch.stack([(encoder.direction * c).view(SIZE) for c in coordinates])


# Scores of 0 and 1 are the worst for the band through the sorted scores: most of its ranks are tied.
@pytest.mark.parametrize(("method", "loss"), [("cdf", 0.1), ("cdf_pilot", 0.06), ("betting", 0.06), ("best", 0.07)])
def test_half_space_bound_is_met_and_not_exceeded(method, loss):
    encoder, epsilons = Encoder("half_space"), np.array([0.0, 0.1, 0.2, 0.3, 0.5])
    images = image_at(encoder, 0.3, 0.5)
    certificates = certify_features(encoder, images, epsilons=epsilons, num_samples=20_000, method=method, generator=1)
    for certificate, distance in zip(certificates, (0.3, 0.5), strict=True):
        truth = 2 * ndtr((distance - epsilons) / 0.25) - 1
        assert np.all(np.array(certificate.inner_product_bounds) <= truth)
        assert np.all(np.array(certificate.inner_product_bounds) > truth - loss)
        true_radius = distance - 0.25 * 0.6744897501960817  # where the score falls to 3/4
        assert true_radius - loss / 2.5 < certificate.radius <= true_radius


@pytest.mark.parametrize("anchor", ["clean", "smoothed"])
def test_rotation_certificate_is_below_the_true_worst_case(anchor):
    encoder, epsilons = Encoder("rotation", rate=1.5), np.array([0.0, 0.125, 0.25, 0.5])
    certificate = certify_features(
        encoder, image_at(encoder, 0.7), epsilons=epsilons, num_samples=5000, anchor=anchor, generator=3
    )[0]
    truth = np.cos(1.5 * epsilons) * np.exp(-((1.5 * 0.25) ** 2) / 2)
    bound = np.array(certificate.inner_product_bounds)
    assert np.all(bound < truth)
    assert bound[0] > truth[0] - 0.03
    assert bound[2] > 0.45
    assert certificate.anchor == anchor
    assert certificate.robustness_score == pytest.approx((1 + truth[0]) / 2, abs=0.005)


def test_given_anchor_of_known_cosine():
    encoder = Encoder("rotation")
    turned = torch.tensor([[np.cos(1.0), np.sin(1.0)]], dtype=torch.float32)
    certificate = certify_features(encoder, image_at(encoder, 0.0), num_samples=5000, anchor=turned, generator=3)[0]
    assert certificate.anchor == "given"
    truth = np.cos(1.0) * np.exp(-(0.25**2) / 2)
    assert certificate.robustness_score == pytest.approx((1 + truth) / 2, abs=0.01)


def test_a_given_anchor_that_is_a_little_long_certifies_no_more():
    encoder = Encoder("rotation")
    options = {"num_samples": 2000, "generator": 3}
    exact = torch.tensor([[np.cos(0.3), np.sin(0.3)]], dtype=torch.float32)
    (long,) = certify_features(encoder, image_at(encoder, 0.0), anchor=1.0009 * exact, **options)
    (unit,) = certify_features(encoder, image_at(encoder, 0.0), anchor=exact, **options)
    assert long.inner_product_bounds == pytest.approx(unit.inner_product_bounds, abs=1e-6)


def test_result_does_not_depend_on_batch_or_chunk():
    encoder = Encoder("rotation")
    images = image_at(encoder, 0.1, 0.9, 1.7)
    options = {"num_samples": 300, "generator": 5}
    together = certify_features(encoder, images, image_ids=[4, 9, 2], **options)
    alone = certify_features(encoder, images[1:2], image_ids=[9], **options)
    assert together[1] == alone[0]
    # Other chunks give the same noise, and features that differ by the rounding of float32.
    chunked = certify_features(Encoder("rotation", chunk=7), images[1:2], image_ids=[9], **options)
    assert chunked[0].robustness_score == pytest.approx(alone[0].robustness_score, abs=1e-7)
    assert chunked[0].cosine_bounds == pytest.approx(alone[0].cosine_bounds, abs=1e-6)
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    first, second = (certify_features(encoder, images, num_samples=300, generator=g) for g in generators)
    assert first == second


def test_noise_is_fresh_without_a_generator():
    encoder = Encoder("rotation")
    first, second = (certify_features(encoder, image_at(encoder, 0.1), num_samples=300)[0] for _ in range(2))
    assert first.robustness_score != second.robustness_score
    assert first.seed != second.seed


def test_scores_are_streamed_and_exact():
    encoder = Encoder("rotation", rate=2.0)
    image = image_at(encoder, 0.4)
    (draws,) = draw_scores(encoder, image, generator=7, image_ids=[3])
    first = draws.take(300)
    scores = draws.take(1000)  # goes on where the first call stopped
    assert np.array_equal(scores[:300], first)
    assert np.array_equal(draws.take(20), first[:20])
    noise = gaussian_noise(SIZE, 7, [3], 0, 1000, torch.device("cpu"))
    turned = 2.0 * 0.25 * encoder.coordinate(noise).double().numpy()
    assert scores.dtype == np.float64
    assert np.allclose(scores, (1 + np.cos(turned)) / 2, atol=1e-6)
    assert encoder.largest == 64


def test_one_stream_serves_several_methods():
    encoder = Encoder("rotation")
    images = image_at(encoder, 0.1, 0.2)
    stream = list(draw_scores(encoder, images, generator=5))
    for method, served in (("plugin", None), ("cdf", 4), ("betting", None)):
        expected = certify_features(encoder, images, method=method, num_samples=400, generator=5)
        for draws, certificate in zip(stream, expected, strict=True):
            made = certify_scores(draws.take(400), sigma=0.25, method=method, deployed_samples=served)
            assert dataclasses.replace(made, **draws.record) == certificate


def test_certificate_says_what_was_certified():
    encoder = Encoder("rotation", num_samples=6)
    certificate = certify_features(
        encoder, image_at(encoder, 0.1), num_samples=300, null_cosine=0.2, image_ids=[17], generator=5
    )[0]
    said = {name: getattr(certificate, name) for name in ("model", "dtype", "image_size", "feature", "feature_layer")}
    assert said == {
        "model": "analytic",
        "dtype": "float32",
        "image_size": (4, 4),
        "feature": "tokens",
        "feature_layer": (-2,),
    }
    assert (certificate.aggregation, certificate.image_id, certificate.seed) == ("unit", 17, 5)
    assert certificate.null_cosine == 0.2
    assert certificate.deployed.num_samples == 6


def test_served_mean_keeps_the_deployed_bound():
    encoder = Encoder("rotation", rate=1.5)
    certificate = certify_features(encoder, image_at(encoder, 0.7), epsilons=[0.25], num_samples=5000, generator=3)[0]
    served = 0.25 * np.random.default_rng(0).standard_normal((20_000, 4))
    worst = np.cos(1.5 * (0.25 + served)).mean(axis=1)
    assert np.mean(worst < certificate.deployed.inner_product_bounds[0]) <= 0.05


def test_null_level_is_the_mean_over_pairs():
    features = torch.nn.functional.normalize(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = [(features[i] @ features[j]).item() for i in range(6) for j in range(6) if i != j]
    assert null_level(features) == pytest.approx(np.mean(pairs), abs=1e-6)
    with pytest.raises(ValueError, match="`features` must have shape"):
        null_level(features[:1])
    with pytest.raises(ValueError, match="`features` must be finite unit vectors"):
        null_level(2 * features)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_overflows_gives_no_certificate(bad):
    encoder = Encoder("rotation", rate=bad)
    images = image_at(encoder, 0.5)
    with pytest.raises(ValueError, match="`anchor` must be finite unit vectors"):
        certify_features(encoder, images, num_samples=300)
    with pytest.raises(ValueError, match="`tower` gave a NaN or infinite feature"):
        certify_features(encoder, images, num_samples=300, anchor=torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"sigma": 0.0}, {}, "`tower.config.sigma` must be > 0 to certify, got 0.0"),
        ({"aggregation": "mean"}, {}, "`tower.config.aggregation` must be 'unit' to certify, got 'mean'"),
        ({}, {"anchor": "text"}, "`anchor` must be 'clean', 'smoothed' or"),
        ({}, {"anchor": torch.ones(3, 2)}, "`anchor` must hold unit vectors for each of 1 images"),
        ({}, {"anchor": torch.ones(1, 1)}, r"`anchor` must have shape \(1, 2\), as the feature, got \(1, 1\)"),
        ({}, {"anchor": np.ones((1, 2))}, "`anchor` must be 'clean', 'smoothed' or a torch.Tensor .* got ndarray"),
        ({}, {"beta": 1.0}, "`beta` must be strictly between 0 and 1, got 1.0"),
        ({"num_samples": 2000}, {}, "`deployed_samples` must be an integer from 1 to 1024, got 2000"),
        ({}, {"anchor": torch.ones(1, 2)}, "`anchor` must be finite unit vectors"),
        ({}, {"method": "magic"}, "`method` must be one of"),
        ({}, {"alpha": 2.0}, "`alpha` must be"),
        ({}, {"num_samples": 0}, "`num_samples` must be >= 1, got 0"),
        ({}, {"image_ids": [1, 2]}, "`image_ids` must name each"),
    ],
)
def test_bad_input_is_refused(config, options, message):
    encoder = Encoder("rotation", **config)
    with pytest.raises(ValueError, match=message):
        certify_features(encoder, image_at(encoder, 0.5), **{"num_samples": 300} | options)


def test_a_tower_in_training_mode_is_refused():
    encoder = Encoder("rotation")
    encoder.training = True
    with pytest.raises(ValueError, match="`tower` must be in evaluation mode"):
        certify_features(encoder, image_at(encoder, 0.5), num_samples=300)


@pytest.mark.parametrize("feature", ["tokens", "pooled", "cls"])
def test_a_real_tower_is_certified(feature):
    tower, images = smoothed_tower(sigma=0.05, num_samples=2), tiny_images(2)
    options = {"feature": feature, "num_samples": 300, "epsilons": [0.0, 0.01, 0.05], "generator": 2}
    certificates = certify_features(tower, images, **options)
    clean = tower.clean_features(images, feature).double()
    for i, certificate in enumerate(certificates):
        # The same draws, held all at once and averaged: the estimate is their inner product with the clean feature.
        draws = torch.cat(list(tower.sample_features(images[[i]], 300, feature, 2, [i])), dim=1)[0].double()
        assert certificate.robustness_score == pytest.approx((1 + (draws @ clean[i]).mean().item()) / 2, abs=1e-6)
        assert certificate.score_lower_bound < certificate.robustness_score
        assert certificate.radius > 0.01
        # The host is never given the class token by itself: no certificate speaks of a mean of its draws.
        assert (certificate.deployed is None) == (feature == "cls")
    assert certify_features(tower, images[1:], image_ids=[1], **options)[0] == certificates[1]
    with (
        tower.smoothing(sigma=0.0, num_samples=1),
        pytest.raises(ValueError, match="`tower.config.sigma` must be > 0"),
    ):
        certify_features(tower, images, **options)


def test_half_precision_pixels_and_hidden_training_modes_are_refused():
    tower = smoothed_tower(psm=psm_model(), sigma=0.05)
    with pytest.raises(ValueError, match="`pixel_values` must be float32 to certify, .* got torch.bfloat16"):
        certify_features(tower, tiny_images(1).bfloat16(), num_samples=300)
    tower.psm.train()
    with pytest.raises(ValueError, match="`tower` must be in evaluation mode"):
        certify_features(tower, tiny_images(1), num_samples=300)
