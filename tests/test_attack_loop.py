import json

import pytest
import torch
from attack_runs import (
    TARGETED,
    UNTARGETED,
    adaptive_encoder,
    defended_tower,
    noisy_encoder,
    pictures,
    plain_encoder,
    run,
)
from tiny_models import SIZE, smoothed_tower, vision_model
from torch import nn

from fs_psm_hf.attacks import METHODS, Encoder, attack, check_adversarial, expected_objective
from fs_psm_hf.attacks.ball import is_eight_bit
from fs_psm_hf.attacks.objectives import ensemble_weights


EPSILON = 16 / 255


def expected(encoders, images, targets, method):
    return expected_objective(encoders, images, targets, method=method, samples=6, generator=77)


def test_the_methods_are_those_that_are_tested():
    assert (*TARGETED, *UNTARGETED) == METHODS


# What an attack does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "method"),
    [
        *((plain_encoder, method) for method in METHODS),
        *((noisy_encoder, method) for method in ("m_attack", "foa", "apgd")),
    ],
)
def test_the_expected_objective_rises_further_than_by_chance(make, method):
    encoder, images, targets = make(feature="tokens"), pictures(2), pictures(2, seed=9)
    result = run(encoder, images, targets, method, steps=12)
    goal = targets if method in TARGETED else images
    chance = torch.where(torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    before, after, random = (
        expected(encoder, x, goal, method) for x in (images, result.images, (images + EPSILON * chance).clamp(0, 1))
    )
    assert (after - before > 0.003).all()
    assert (after - before > 2 * (random - before)).all()
    assert result.mode == encoder.mode
    assert result.objective.shape == (2, 12)
    assert torch.isfinite(result.objective).all()


@pytest.mark.parametrize("method", ["m_attack", "apgd"])
@pytest.mark.parametrize(
    ("norm", "epsilon", "eight_bit"),
    [
        ("linf", 16 / 255, True),
        ("linf", 32 / 255, False),
        ("linf", 0.0173, True),
        ("l2", 0.8, True),
        ("l2", 2.0, False),
    ],
)
def test_ball_and_range_are_kept(method, norm, epsilon, eight_bit):
    encoder, images = plain_encoder(feature="tokens"), pictures(2)
    options = {"norm": norm, "epsilon": epsilon, "eight_bit": eight_bit, "steps": 5}
    result = run(encoder, images, pictures(2, seed=9), method, **options)
    check_adversarial(images, result.images, epsilon, norm)
    assert is_eight_bit(result.images) or not eight_bit
    difference = (result.images - images).double().flatten(1)
    assert result.linf_norms == pytest.approx(difference.abs().amax(1).tolist())
    assert result.l2_norms == pytest.approx(difference.norm(dim=1).tolist())
    own = result.linf_norms if norm == "linf" else result.l2_norms
    assert min(own) > 0.1 * epsilon


def test_the_defaults_are_the_authors():
    result = attack(plain_encoder(), pictures(1), pictures(1, seed=9), method="attackvlm", generator=1)
    facts = json.loads(json.dumps(result.facts()))
    assert (facts["epsilon"], facts["step_size"], facts["steps"]) == (16 / 255, 1 / 255, 300)
    assert (facts["norm"], facts["eight_bit"], facts["mode"], facts["seed"]) == ("linf", True, "transfer", 1)
    assert facts["recipe"] == {"crop_source": False, "crop_target": False, "reference_factor": 8}
    assert facts["encoders"][0]["feature"] == "pooled"
    assert facts["zero_gradients"] == [0]
    # 300 steps are many for 768 pixels: the target is reached.
    assert facts["objective_last"][0] > 0.99 > facts["objective_first"][0]
    foa = run(plain_encoder(), pictures(1), pictures(1, seed=9), "foa", steps=1).facts()
    assert foa["recipe"]["crop_scale"] == [0.5, 0.9]
    assert (foa["recipe"]["clusters"], foa["recipe"]["local_weight"], foa["recipe"]["regularisation"]) == (
        10,
        0.2,
        0.1,
    )
    assert foa["encoders"][0]["feature"] == "cls+tokens"


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_gives_the_same_images_and_another_does_not(method):
    encoder, images, targets = noisy_encoder(), pictures(2), pictures(2, seed=9)
    first = run(encoder, images, targets, method, steps=2)
    again = run(encoder, images, targets, method, steps=2)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.objective, again.objective)
    assert first.facts() == again.facts()
    other = run(encoder, images, targets, method, steps=2, generator=4)
    assert not torch.equal(first.images, other.images)
    # The global generator has no say.
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(run(encoder, images, targets, method, steps=2).images, first.images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_neighbours(method):
    images, targets = pictures(3), pictures(3, seed=9)
    # One image a pass, so that the products are the same ones and the results too, to the bit.
    encoder = noisy_encoder(max_batch_size=8)
    together = run(encoder, images, targets, method, steps=2, image_ids=[4, 7, 1])
    alone = run(encoder, images[[1]], targets[[1]], method, steps=2, image_ids=[7])
    assert torch.equal(together.images[[1]], alone.images)
    assert torch.equal(together.objective[[1]], alone.objective)
    # All in one pass: the same up to the rounding of a product.
    packed = run(noisy_encoder(max_batch_size=64), images, targets, method, steps=1, image_ids=[4, 7, 1])
    assert packed.objective[:, 0].tolist() == pytest.approx(together.objective[:, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_without_noise_and_psm_the_adaptive_attack_is_the_plain_one_to_the_bit(method):
    images, targets = pictures(2), pictures(2, seed=9)
    undefended = smoothed_tower(sigma=0.0, num_samples=1)
    found = [
        run(encoder, images, targets, method, steps=4)
        for encoder in (Encoder(undefended, mode="adaptive"), Encoder(undefended, mode="transfer"), plain_encoder())
    ]
    for other in found[1:]:
        assert torch.equal(found[0].images, other.images)
        assert torch.equal(found[0].objective, other.objective)
    assert [result.mode for result in found] == ["adaptive", "transfer", "transfer"]


def test_end_to_end_and_straight_through_differ():
    images, targets = pictures(2), pictures(2, seed=9)
    tower = defended_tower()
    whole, straight = (
        run(adaptive_encoder(tower, straight_through=flag), images, targets, "attackvlm", steps=2)
        for flag in (False, True)
    )
    # The first values are the same, since only the gradient is another one.
    assert torch.equal(whole.objective[:, 0], straight.objective[:, 0])
    assert not torch.equal(whole.images, straight.images)
    assert (whole.facts()["straight_through"], straight.facts()["straight_through"]) == ([False], [True])


class Mirror(nn.Module):
    """A defence that a transfer attack does not see."""

    def denoise(self, images, sigma):
        return images.flip(-1)


def test_the_adaptive_attack_gets_further_against_the_defence_than_transfer():
    images, targets = pictures(2), pictures(2, seed=9)
    tower = smoothed_tower(psm=Mirror(), sigma=0.05)
    adaptive = Encoder(tower, mode="adaptive")
    after = [
        expected(adaptive, run(e, images, targets, "attackvlm", steps=10).images, targets, "attackvlm")
        for e in (adaptive, Encoder(tower, mode="transfer"))
    ]
    assert (after[0] > after[1] + 0.005).all()


# Ensembles --------------------------------------------------------------------------------------------------------------


def test_one_tower_has_the_weight_one():
    values = torch.tensor([[0.3, -0.2, 0.9]])
    for previous in (None, values, values + 0.3, torch.zeros_like(values)):
        assert torch.equal(ensemble_weights(values, previous), torch.ones_like(values))


def test_weights_are_the_softmax_of_the_progress():
    values, previous = torch.tensor([[0.6, 0.5], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.5, 0.25]])
    weights = ensemble_weights(values, previous)
    ratio = torch.tensor([[1.2, 1.0], [1.0, 2.0]]).exp()
    torch.testing.assert_close(weights, 2 * ratio / ratio.sum(0))
    assert torch.equal(ensemble_weights(values, None), torch.ones(2, 2))
    assert torch.isfinite(ensemble_weights(values, torch.tensor([[0.0, 1e-9], [-1e-9, 0.5]]))).all()


@pytest.mark.parametrize("method", ["m_attack", "foa", "pgd"])
def test_the_same_tower_twice_is_the_tower_once(method):
    images, targets, encoder = pictures(2), pictures(2, seed=9), plain_encoder()
    # Only the first centres of the clusters differ between two encoders of an ensemble.
    once, twice = (
        run(encoder, images, targets, method, steps=3),
        run([encoder, encoder], images, targets, method, steps=3),
    )
    if method == "foa":
        assert twice.objective[:, 0].tolist() == pytest.approx(once.objective[:, 0].tolist(), abs=0.02)
    else:
        torch.testing.assert_close(twice.images, once.images, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["m_attack", "foa", "apgd"])
def test_an_ensemble_moves_towards_the_target_on_every_tower(method):
    towers = [plain_encoder("clip"), plain_encoder("dinov2"), plain_encoder("siglip")]
    images, targets = pictures(2), pictures(2, seed=9)
    result = run(towers, images, targets, method, steps=8)
    goal = targets if method in TARGETED else images
    for tower in towers:
        assert (expected(tower, result.images, goal, method) > expected(tower, images, goal, method)).all()
    assert len(result.facts()["encoders"]) == 3


def test_foa_weighs_its_towers_by_their_progress(monkeypatch):
    """With both weights 1, as in its first step, the third step goes elsewhere."""
    towers = [plain_encoder("clip"), plain_encoder("siglip")]
    images, targets = pictures(1), pictures(1, seed=9)
    weighted = run(towers, images, targets, "foa", steps=3, norm="l2", epsilon=1.0, eight_bit=False)
    monkeypatch.setattr("fs_psm_hf.attacks.loop.ensemble_weights", lambda values, _: torch.ones_like(values))
    equal = run(towers, images, targets, "foa", steps=3, norm="l2", epsilon=1.0, eight_bit=False)
    assert torch.equal(weighted.objective[:, :2], equal.objective[:, :2])
    assert not torch.equal(weighted.objective[:, 2], equal.objective[:, 2])


def test_weights_keep_their_own_wish_for_gradients_and_inference_mode_is_no_hindrance():
    model = vision_model()
    encoder = Encoder(model, mode="transfer", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    first = next(model.parameters()).requires_grad_(False)
    with torch.inference_mode():
        inside = run(encoder, pictures(1), pictures(1, seed=9), "foa", steps=2)
    assert [p.requires_grad for p in model.parameters()] == [p is not first for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(inside.images, run(encoder, pictures(1), pictures(1, seed=9), "foa", steps=2).images)


def test_a_bar_counts_the_steps(capsys):
    run(plain_encoder(), pictures(1), pictures(1, seed=9), "attackvlm", steps=5, progress=True)
    assert "5/5" in capsys.readouterr().err
    run(plain_encoder(), pictures(1), pictures(1, seed=9), "attackvlm", steps=5)
    assert capsys.readouterr().err == ""


def test_images_of_another_size_than_the_tower_wants():
    images, targets = pictures(1, size=20), pictures(1, seed=9, size=20)
    with pytest.raises(ValueError, match="size"):
        run(plain_encoder(), images, targets, "foa", steps=1)
    result = run(plain_encoder(size=(SIZE, SIZE)), images, targets, "foa", steps=8)
    check_adversarial(images, result.images, EPSILON, "linf")
    encoder = plain_encoder(size=(SIZE, SIZE))
    assert expected(encoder, result.images, targets, "foa") > expected(encoder, images, targets, "foa")
