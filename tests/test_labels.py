"""Certified labels through real towers; their mathematics is in test_known_truth."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from tiny_models import images, llava, psm_model, smoothed_tower, vision_model
from torch import nn

from fs_psm_hf import certify_features, certify_labels, certify_scores
from fs_psm_hf.certification import Classifier, LabelCertificate, certify_logits
from fs_psm_hf.certification.confidence import clopper_pearson_lower


WIDTH = 24


def texts(count=5, seed=0):
    draws = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(draws, dim=-1)


def tower_and_embeds(**options):
    """A CLIP tower, two images, and text embeddings near the smoothed embedding of each."""
    tower = smoothed_tower("projection", sigma=0.05, num_samples=4, **options)
    pixels = images(2)
    near = torch.cat([next(iter(tower.sample_features(pixels[[i]], 64, "pooled", 9))).mean(1) for i in range(2)])
    embeds = nn.functional.normalize(torch.cat([texts(3), near]), dim=-1)
    return tower, pixels, embeds


@pytest.mark.parametrize("psm", [None, psm_model(mapper=False)], ids=["plain", "purifier"])
def test_the_served_tower_answers_with_the_certified_label(psm):
    tower, pixels, embeds = tower_and_embeds(psm=psm)
    certificates = certify_labels(tower, pixels, embeds, num_samples=1500, generator=3, beta=0.3)
    assert [c.label for c in certificates] == [3, 4]
    for certificate in certificates:
        assert not certificate.abstained
        assert 0.0 < certificate.deployed.radius < certificate.radius
        assert (certificate.num_pilot, certificate.num_samples, certificate.num_classes) == (150, 1350, 5)
    served = torch.stack([tower(pixels, generator=seed).image_embeds @ embeds.T for seed in range(50)]).argmax(-1)
    assert (served != torch.tensor([3, 4])).float().mean(0).max() <= 0.3
    # No perturbation in the certified ball changes it: the steepest descent of the margin is the worst we can do.
    direction = pixels.clone().requires_grad_()
    output = tower(direction, generator=1).image_embeds
    sum(
        (output[i] * (embeds[certificates[i].label] - embeds[certificates[i].runner_up])).sum() for i in (0, 1)
    ).backward()
    std = torch.tensor(tower.config.image_std).view(3, 1, 1)
    step = direction.grad / std
    step = -step / step.flatten(1).norm(dim=1)[:, None, None, None]
    for i, certificate in enumerate(certificates):
        moved = pixels[[i]] + 0.99 * certificate.radius * step[[i]] / std
        mean = torch.cat(list(tower.sample_features(moved, 500, "pooled", 5)), 1).mean(1)
        assert (mean @ embeds.T).argmax() == certificate.label


def test_scores_of_one_rival_are_those_of_a_given_anchor():
    """Two classes: the label is kept while <ĝ, w> > 0, which is a feature certificate with anchor w at level 0."""
    tower, pixels, embeds = tower_and_embeds()
    pair = embeds[3:]
    (certificate, other) = certify_labels(tower, pixels, pair, num_samples=1000, generator=3)
    assert (certificate.label, certificate.runner_up, other.label) == (0, 1, 1)
    weight = nn.functional.normalize(pair[[0]].double() - pair[[1]].double(), dim=-1).float()
    draws = torch.cat(list(tower.sample_features(pixels[:1], 1000, "pooled", 3, [0])), 1)[0]
    scores = (1 + (draws.double() @ weight[0].double()).numpy()) / 2
    expected = certify_scores(scores[100:], sigma=0.05, level=0.0)
    assert certificate.radius == pytest.approx(expected.radius, abs=1e-6)


def test_the_hard_vote_is_cohens():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2000, WIDTH)) * 0.3 + texts().numpy()[2]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    classifier = Classifier.of(texts())
    logits = classifier.logits(torch.from_numpy(features)).numpy()
    certificate = certify_logits(logits, classifier, sigma=0.25)
    hits = (logits[200:].argmax(1) == 2).sum()
    assert certificate.hard_vote_label == 2
    assert certificate.hard_vote_radius == pytest.approx(0.25 * ndtri(clopper_pearson_lower(hits, 1800, 1e-3)))


def test_a_head_with_a_bias():
    tower, pixels, embeds = tower_and_embeds()
    head = nn.Linear(WIDTH, 5)
    with torch.no_grad():
        head.weight.copy_(embeds)
        head.bias.zero_()
    plain = certify_labels(tower, pixels, embeds, num_samples=800, generator=3)
    same = certify_labels(tower, pixels, head=head, num_samples=800, generator=3)
    assert [c.radius for c in same] == [c.radius for c in plain]
    rival = plain[1].runner_up
    with torch.no_grad():
        head.bias[rival] = 0.01
    first, hurt = certify_labels(tower, pixels, head=head, num_samples=800, generator=3)
    assert (first.label, hurt.label, hurt.runner_up) == (3, 4, rival)
    assert 0.0 < hurt.radius < plain[1].radius
    with torch.no_grad():
        head.bias[rival] = -0.01
    helped = certify_labels(tower, pixels, head=head, num_samples=800, generator=3)[1]
    assert helped.radius > plain[1].radius
    # The tower's output has another length than ĝ, and a bias minds lengths: no claim about what is served.
    assert helped.deployed is None
    assert plain[1].deployed is not None
    with torch.no_grad():
        head.bias[rival] = 0.0
        head.bias[3] = 50.0
    sure = certify_labels(tower, pixels, head=head, num_samples=800, generator=3)
    assert [c.label for c in sure] == [3, 3]
    assert all(math.isinf(c.radius) for c in sure)


def test_homogeneous_coordinates_carry_the_bias():
    head = nn.Linear(WIDTH, 4)
    classifier, features = Classifier.of(head=head), texts().double()
    lifted = classifier.homogeneous()
    assert lifted.bias is None
    assert torch.equal(
        lifted.logits(torch.cat([features, torch.ones(5, 1)], -1)).argmax(-1), classifier.logits(features).argmax(-1)
    )
    # At any positive length.
    longer = 7 * torch.cat([features, torch.ones(5, 1)], -1)
    assert torch.allclose(lifted.logits(longer), 7 * classifier.logits(features))
    unbiased = Classifier.of(texts()).homogeneous()
    assert torch.equal(unbiased.weight[:, :-1], texts().double())
    assert not unbiased.weight[:, -1].any()


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (vision_model(), ValueError, "or a model that has one, got CLIPVisionModel, a plain one: `attach"),
        (llava(), ValueError, "got LlavaForConditionalGeneration, a plain one"),
        (nn.ModuleList([smoothed_tower("projection"), smoothed_tower("projection")]), ValueError, "ModuleList, one with 2"),
        ("clip", TypeError, "`tower` must be a SmoothedVisionTower or a model that has one, got str"),
    ],
)  # fmt: skip
def test_a_model_without_its_one_tower_is_refused(model, error, message):
    for certify in (lambda: certify_labels(model, images(1), texts()), lambda: certify_features(model, images(1))):
        with pytest.raises(error, match=message) as caught:
            certify()
        assert "\n" not in str(caught.value)


def test_an_undecided_label_abstains():
    tower, pixels, embeds = tower_and_embeds()
    nearly = torch.stack([embeds[3], nn.functional.normalize(embeds[3] + 1e-4 * embeds[0], dim=-1)])
    certificate = certify_labels(tower, pixels[:1], nearly, num_samples=300, generator=3, method="hoeffding")[0]
    assert certificate.abstained
    assert certificate.radius == 0.0
    assert "abstained" in str(certificate)


def test_plugin_is_marked_and_everything_survives_json():
    tower, pixels, embeds = tower_and_embeds()
    for method in ("cdf", "plugin", "best"):
        certificate = certify_labels(tower, pixels[:1], embeds, num_samples=300, generator=3, method=method)[0]
        assert certificate.is_certificate == (method != "plugin")
        assert ("not a certificate" in str(certificate)) == (method == "plugin")
        assert (
            LabelCertificate.from_dict(json.loads(json.dumps(certificate.to_dict(), allow_nan=False))) == certificate
        )
    endless = dataclasses.replace(certificate, radius=math.inf)
    assert LabelCertificate.from_dict(json.loads(json.dumps(endless.to_dict(), allow_nan=False))) == endless


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_embeds": 2 * texts()}, "`text_embeds` must be finite unit vectors"),
        ({"text_embeds": texts()[0]}, r"`text_embeds` must have shape \(num_classes, num_features\)"),
        ({"text_embeds": texts()[:1]}, "`text_embeds` must have at least 2 classes, got 1"),
        ({"text_embeds": texts()[[0, 1, 0]]}, "`text_embeds` must have a direction of its own for each class"),
        ({"text_embeds": nn.functional.normalize(torch.ones(3, 7) + torch.eye(3, 7), dim=-1)}, "must have 24 values per class"),
        ({"text_embeds": torch.full((3, WIDTH), torch.nan)}, "`text_embeds` must be finite"),
        ({}, "`text_embeds` or `head` must be given, and not both"),
        ({"text_embeds": texts(), "head": nn.Linear(WIDTH, 3)}, "and not both"),
        ({"text_embeds": texts(), "alpha": 0.0}, "`alpha` must be strictly"),
        ({"text_embeds": texts(), "num_samples": 1}, "`num_samples` must be >= 2"),
        ({"text_embeds": texts(), "method": "magic"}, "`method` must be one of"),
        ({"text_embeds": texts(), "method": "cdf_pilot"}, "`method` must be one of"),
        ({"text_embeds": texts(), "beta": 5.0}, "`beta` must be strictly between 0 and 1, got 5.0"),
        ({"text_embeds": texts(), "feature": "x"}, "`feature` must be one of"),
    ],
)  # fmt: skip
def test_bad_classes_are_refused(options, message):
    tower = smoothed_tower("projection", sigma=0.05)
    with pytest.raises(ValueError, match=message) as error:
        certify_labels(tower, images(1), **{"num_samples": 300} | options)
    assert "\n" not in str(error.value)


def test_a_head_must_be_linear():
    with pytest.raises(TypeError, match="`head` must be a torch.nn.Linear, got Sequential"):
        certify_labels(smoothed_tower("projection"), images(1), head=nn.Sequential(), num_samples=300)


def test_per_token_certificates_pay_for_all_tokens():
    tower = smoothed_tower(sigma=0.05, num_samples=2, first_token=1)
    options = {"num_samples": 400, "epsilons": [0.0, 0.02], "generator": 3}
    (tokens,) = certify_features(tower, images(1), per_token=True, **options)
    assert [c.token for c in tokens] == list(range(16))
    assert {c.joint_alpha for c in tokens} == {1e-3}
    assert {c.alpha for c in tokens} == {1e-3 / 16}
    draws = torch.cat(list(tower.sample_features(images(1), 400, "tokens", 3, [0], per_token=True)), 1)[0].double()
    clean = tower.vision_tower(images(1)).last_hidden_state[0, 1:].double()
    cosines = (draws.mean(0) * clean / clean.norm(dim=-1, keepdim=True)).sum(-1)
    assert [2 * c.robustness_score - 1 for c in tokens] == pytest.approx(cosines.tolist(), abs=1e-6)
    assert all(c.score_lower_bound < c.robustness_score and c.deployed is None for c in tokens)
    # The shares do not hang on the shape of the anchor.
    with pytest.raises(ValueError, match=r"`anchor` must have shape \(1, 16, 32\), as the feature, got \(1, 1, 32\)"):
        certify_features(tower, images(1), per_token=True, anchor=torch.full((1, 1, 32), 32**-0.5), **options)
    with pytest.raises(ValueError, match="`per_token` needs `feature` 'tokens', got 'cls'"):
        certify_features(tower, images(1), per_token=True, feature="cls", **options)


def test_one_token_is_still_per_token():
    tower = smoothed_tower(sigma=0.05, num_samples=2, first_token=16)
    ((certificate,),) = certify_features(tower, images(1), per_token=True, num_samples=200)
    assert (certificate.token, certificate.alpha, certificate.joint_alpha) == (0, 1e-3, 1e-3)


def test_centring_takes_away_what_all_images_share():
    tower = smoothed_tower(sigma=0.05, num_samples=2)
    references = images(8, seed=7)
    center = tower.clean_features(references, "cls", unit=False).mean(0)
    options = {"feature": "cls", "num_samples": 300, "epsilons": [0.0], "generator": 3}
    (plain,) = certify_features(tower, images(1), **options)
    (centred,) = certify_features(tower, images(1), center=center, **options)
    raw = tower.vision_tower(images(1)).last_hidden_state[0, 0] - center
    anchor = (raw / raw.norm()).double()
    noisy = torch.cat(list(tower.sample_features(images(1), 300, "cls", 3, [0], center=center)), 1)[0].double()
    assert 2 * centred.robustness_score - 1 == pytest.approx((noisy @ anchor).mean().item(), abs=1e-6)
    assert noisy.norm(dim=-1).tolist() == pytest.approx([1.0] * 300, abs=1e-5)
    assert centred.robustness_score != plain.robustness_score
    assert centred.center is not None
    assert centred.deployed is None
    with pytest.raises(ValueError, match="`center` must have 32 values"):
        certify_features(tower, images(1), center=center[:5], **options)
    with pytest.raises(ValueError, match="`center` must be finite"):
        certify_features(tower, images(1), center=center * torch.nan, **options)
