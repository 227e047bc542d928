import pytest
import torch
from attack_runs import adaptive_encoder, defended_tower, pictures, plain_encoder
from tiny_models import MEAN, STD, psm_model, smoothed_tower, vision_model
from torch import nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil

from fs_psm_hf.attacks import Encoder, unit_features


IDS = [3, 8]


def normalised(images):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def directions(vectors):
    return F.normalize(vectors.flatten(1), dim=1)


# Features: the wrapped tower's own, or the smoothed tower's own ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "projection", "siglip", "dinov2"])
def test_a_plain_tower_shows_its_own_features(kind):
    images, first = pictures(), 0 if kind == "siglip" else 1
    output = vision_model(kind)(normalised(images), output_hidden_states=True)
    pooled = output.image_embeds if kind == "projection" else output.pooler_output
    expected = {
        ("pooled", None): pooled,
        ("tokens", None): output.last_hidden_state[:, first:],
        ("tokens", -2): output.hidden_states[-2][:, first:],
        ("tokens", 1): output.hidden_states[1][:, first:],
    }
    if first:
        expected |= {("cls", None): output.last_hidden_state[:, 0], ("cls", 3): output.hidden_states[3][:, 0]}
    for (feature, layer), value in expected.items():
        encoder = plain_encoder(kind, feature=feature, layer=layer)
        found = encoder.features(images, seed=1, image_ids=IDS)["vector"]
        torch.testing.assert_close(found, directions(value), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [None, -2])
def test_the_local_features_are_the_class_token_and_the_patches(layer):
    images = pictures()
    state = vision_model("clip")(normalised(images), output_hidden_states=True)
    state = state.last_hidden_state if layer is None else state.hidden_states[layer]
    found = plain_encoder(layer=layer).features(images, seed=1, image_ids=IDS, local=True)
    torch.testing.assert_close(directions(found["global"]), directions(state[:, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(directions(found["tokens"]), directions(state[:, 1:]), rtol=0, atol=1e-5)
    siglip = plain_encoder("siglip").features(images, seed=1, image_ids=IDS, local=True)
    output = vision_model("siglip")(normalised(images))
    torch.testing.assert_close(directions(siglip["global"]), directions(output.pooler_output), rtol=0, atol=1e-5)
    assert siglip["tokens"].shape == output.last_hidden_state.shape


@pytest.mark.parametrize("aggregation", ["unit", "mean"])
def test_adaptive_features_are_what_the_tower_serves_under_the_same_noise(aggregation):
    images = pictures()
    tower = defended_tower(num_samples=6, aggregation=aggregation)
    served = tower(normalised(images), output_hidden_states=-2, generator=5, image_ids=IDS).hidden_states[-2]
    encoder = adaptive_encoder(tower, draws=6)
    vector = encoder.features(images, seed=5, image_ids=IDS)["vector"]
    torch.testing.assert_close(directions(vector), directions(served[:, 1:]), rtol=0, atol=1e-5)
    local = encoder.features(images, seed=5, image_ids=IDS, local=True)
    both = torch.cat([local["global"][:, None], local["tokens"]], 1)
    torch.testing.assert_close(directions(both), directions(served), rtol=0, atol=1e-5)
    # … and the paper's other feature, with a mapper of its own.
    tower = smoothed_tower("projection", psm_model(feature="pooled", width=24), num_samples=6, aggregation=aggregation)
    served = tower(normalised(images), generator=5, image_ids=IDS).image_embeds
    encoder = adaptive_encoder(tower, feature="pooled", draws=6)
    vector = encoder.features(images, seed=5, image_ids=IDS)["vector"]
    torch.testing.assert_close(directions(vector), directions(served), rtol=0, atol=1e-5)
    # There are no tokens to show then, and the global part is that feature.
    local = encoder.features(images, seed=5, image_ids=IDS, local=True)
    assert list(local) == ["global"]
    torch.testing.assert_close(local["global"], vector)
    assert encoder.facts(local=True)["feature"] == "pooled"


def test_the_mean_is_that_of_the_certified_draws():
    image = pictures(1)
    tower = defended_tower()
    encoder = adaptive_encoder(tower, draws=5)
    found = encoder.features(image, seed=9, image_ids=[6], draws=range(10, 15))["vector"]
    drawn = torch.cat(list(unit_features(tower, normalised(image), range(10, 15), seed=9, image_id=6)))
    torch.testing.assert_close(found[0], drawn.mean(0), rtol=0, atol=1e-6)
    assert found.norm() < 0.999  # a mean of unit vectors is no unit vector


def test_transfer_sees_the_wrapped_tower_and_leaves_the_defence_as_it_was():
    images, tower = pictures(), defended_tower()
    before = tower(normalised(images), generator=1).hidden_states[-2]
    encoder = Encoder(tower, mode="transfer", feature="tokens")
    plain = tower.vision_tower(normalised(images), output_hidden_states=True).hidden_states[-2][:, 1:]
    found = encoder.features(images, seed=1, image_ids=IDS)["vector"]
    torch.testing.assert_close(found, directions(plain), rtol=0, atol=1e-5)
    assert (encoder.sigma, encoder.draws) == (0, 1)
    facts = encoder.facts(local=False)
    assert (facts["mode"], facts["mapper"], facts["purifier"], facts["sigma"]) == ("transfer", False, "none", 0)
    assert torch.equal(tower(normalised(images), generator=1).hidden_states[-2], before)
    assert tower.config.sigma == 0.1


def test_a_tower_of_another_size_gets_resized_images_and_the_gradient_comes_back():
    images = pictures(2, size=20)
    encoder = plain_encoder(size=(16, 16))
    small = F.interpolate(images, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    expected = plain_encoder().features(small, seed=1, image_ids=IDS)["vector"]
    assert torch.equal(encoder.features(images, seed=1, image_ids=IDS)["vector"], expected)
    _, gradient = encoder.gradient(
        images, lambda found, _: found["vector"][:, 0], seed=1, image_ids=IDS, draws=range(1)
    )
    assert gradient.shape == images.shape
    assert (gradient != 0).any(1).all()


def test_half_precision_networks_take_float32_images():
    tower = vision_model("clip").to(torch.bfloat16)
    encoder = Encoder(tower, mode="transfer", image_mean=MEAN, image_std=STD)
    full = plain_encoder()
    arguments = {"seed": 1, "image_ids": IDS, "draws": range(1)}
    target = full.features(pictures(2, seed=9), seed=1, image_ids=IDS)["vector"]
    (value, gradient), (wanted, exact) = (
        e.gradient(pictures(), lambda found, _: (found["vector"] * target).sum(1), **arguments)
        for e in (encoder, full)
    )
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=0, atol=0.01)
    assert F.cosine_similarity(gradient.flatten(1), exact.flatten(1)).min() > 0.9


def test_the_processor_tells_the_normalisation():
    encoder = plain_encoder(
        image_mean=None, image_std=None, processor=CLIPImageProcessorPil(image_mean=MEAN, image_std=STD)
    )
    assert (encoder.tower.config.image_mean, encoder.tower.config.image_std) == (MEAN, STD)


# Gradients --------------------------------------------------------------------------------------------------------------


def cosine_to(target):
    return lambda found, chosen: F.cosine_similarity(found["vector"], target[chosen])


@pytest.mark.parametrize("make", [plain_encoder, adaptive_encoder])
def test_gradient_agrees_with_finite_differences_of_the_smoothed_objective(make):
    encoder, images = make(feature="tokens"), pictures()
    target = encoder.features(pictures(2, seed=9), seed=2, image_ids=IDS)["vector"]
    noise = {"seed": 5, "image_ids": IDS, "draws": range(16, 16 + encoder.draws)}
    value, gradient = encoder.gradient(images, cosine_to(target), **noise)
    score, slope = cosine_to(target), gradient.flatten(1).norm(dim=1)
    assert value.tolist() == pytest.approx(score(encoder.features(images, **noise), slice(0, 2)).tolist(), abs=1e-5)
    step = 0.05 * gradient / slope[:, None, None, None]
    up, down = (score(encoder.features(images + s * step, **noise), slice(0, 2)) for s in (1, -1))
    assert ((up - down) / 0.1).tolist() == pytest.approx(slope.tolist(), rel=0.02)


def test_the_objective_is_averaged_inside_not_outside():
    """The gradient of the cosine of the mean, not the mean of the cosines' gradients: those differ."""
    encoder, images = adaptive_encoder(smoothed_tower(sigma=1.0), feature="pooled", draws=4), pictures(1)
    target = encoder.features(pictures(1, seed=9), seed=2, image_ids=[0])["vector"]
    value, _ = encoder.gradient(images, cosine_to(target), seed=1, image_ids=[0], draws=range(4))
    single = [encoder.features(images, seed=1, image_ids=[0], draws=range(k, k + 1))["vector"] for k in range(4)]
    inside = F.cosine_similarity(torch.stack(single).mean(0), target)
    outside = torch.stack([F.cosine_similarity(one, target) for one in single]).mean()
    assert value.item() == pytest.approx(inside.item(), abs=1e-5)
    assert abs(value.item() - outside.item()) > 1e-3


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("limit", [1, 3, 8, 16])
def test_passes_of_any_size_give_the_same_gradient(limit, local):
    tower, images = defended_tower(), pictures(3)
    found = []
    for most in (24, limit):
        encoder = adaptive_encoder(tower, max_batch_size=most)

        def score(parts, chosen):
            total = sum((value.flatten(1)[:, 1] * value.flatten(1).norm(dim=1)) for value in parts.values())
            return total * torch.arange(1, 4)[chosen]

        found.append(encoder.gradient(images, score, seed=4, image_ids=[0, 1, 2], draws=range(8), local=local))
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Squash(nn.Module):
    """A purifier whose gradient is small everywhere."""

    def denoise(self, images, sigma):
        return 0.5 + 0.1 * torch.tanh(images - 0.5)


def test_straight_through_keeps_the_features_and_takes_the_purifiers_gradient_for_the_identity():
    images, tower = pictures(), smoothed_tower(psm=Squash(), sigma=0.1)
    whole, straight = (adaptive_encoder(tower, feature="pooled", straight_through=flag) for flag in (False, True))
    target = whole.features(pictures(2, seed=9), seed=2, image_ids=IDS)["vector"]
    noise = {"seed": 5, "image_ids": IDS, "draws": range(8)}
    (value, gradient), (same, other) = (e.gradient(images, cosine_to(target), **noise) for e in (whole, straight))
    assert torch.equal(value, same)
    # Of tanh at noise 0.1 the slope is near 1, so that of the purifier is near 0.1 times the identity's.
    ratio = gradient.flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
    assert ((ratio > 0.05) & (ratio < 0.1)).all()
    assert F.cosine_similarity(gradient.flatten(1), other.flatten(1)).min() > 0.95
    # It is a view: the tower itself keeps its purifier.
    assert isinstance(tower.psm.purifier, Squash)
    assert straight.facts(local=False)["straight_through"] is True


class Steps(nn.Module):
    """A purifier with a gradient of zero, or none."""

    def __init__(self, detach):
        super().__init__()
        self.detach = detach

    def denoise(self, images, sigma):
        return images.detach() if self.detach else (images * 8).round() / 8


def test_straight_through_passes_a_purifier_that_has_no_gradient():
    images, ones = pictures(), {"seed": 5, "image_ids": IDS, "draws": range(8)}
    for detach in (True, False):
        encoder = adaptive_encoder(smoothed_tower(psm=Steps(detach)), feature="pooled", straight_through=True)
        _, gradient = encoder.gradient(images, lambda found, _: found["vector"][:, 0], **ones)
        assert (gradient != 0).flatten(1).any(1).all()
    encoder = adaptive_encoder(smoothed_tower(psm=Steps(True)), feature="pooled")
    with pytest.raises(ValueError, match="`model` gives no gradient from its feature to the pixels"):
        encoder.gradient(images, lambda found, _: found["vector"][:, 0], **ones)


# Refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plain_encoder(mode="white-box"), "`mode` must be 'transfer' or 'adaptive', got 'white-box'"),
        (
            lambda: plain_encoder(mode="adaptive"),
            "`mode` must be 'transfer' for a plain tower, got 'adaptive' for a CLIP",
        ),
        (lambda: plain_encoder(feature="patch"), "`feature` must be one of tokens, pooled, cls, got 'patch'"),
        (lambda: plain_encoder("siglip", feature="cls"), "`feature` must not be 'cls' for this vision tower"),
        (lambda: plain_encoder(layer=5), r"`layer` must be an integer in \[-5, 4\], got 5"),
        (lambda: plain_encoder(draws=0), "`draws` must be an integer >= 1, got 0"),
        (lambda: plain_encoder(size=16), r"`size` must be \(height, width\), two integers > 0, got 16"),
        (lambda: plain_encoder(max_batch_size=0), "`max_batch_size`"),
        (lambda: plain_encoder(image_mean=None), "`image_mean` is missing"),
        (
            lambda: plain_encoder(straight_through=True),
            "`straight_through` must be False where the attack passes no pur",
        ),
        (lambda: adaptive_encoder(smoothed_tower(), straight_through=True), "`straight_through` must be False where"),
        (lambda: adaptive_encoder(layer=-1), "`layer` must be the one this tower serves .`feature_layer=-2`., got -1"),
        (lambda: adaptive_encoder(layer="last"), r"`layer` must be an integer in \[-5, 4\], got 'last'"),
        (
            lambda: adaptive_encoder(image_mean=MEAN),
            "`processor`, `image_mean` and `image_std` must not be given for a Sm",
        ),
        (lambda: adaptive_encoder(defended_tower().train()), "`model` must be in evaluation mode, got training mode"),
        (lambda: adaptive_encoder(feature="pooled").check(False), "`feature` must be the one the mapper refines"),
        (
            lambda: adaptive_encoder(smoothed_tower(feature_layer=-2), feature="pooled").check(False),
            "`feature` must be 'tokens' or 'cls' for a tower that serves hidden states, got 'pooled'",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_kind_of_model_is_refused():
    with pytest.raises(
        TypeError, match="`model` must be a vision tower of transformers or a SmoothedVisionTower, got Linear"
    ):
        Encoder(nn.Linear(2, 2), mode="transfer", image_mean=MEAN, image_std=STD)
