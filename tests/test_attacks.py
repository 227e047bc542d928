import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import MEAN, SIZE, STD, psm_model, smoothed_tower
from tiny_models import images as tiny_images

from fs_psm_hf import certify_features
from fs_psm_hf.attacks import l2_pgd, unit_features
from fs_psm_hf.certification import draw_scores
from fs_psm_hf.certification.certificate import clean_scores
from fs_psm_hf.certification.confidence import mean_upper


ROOT = Path(__file__).parents[1]
MEANS, STDS = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
QUICK = {"steps": 3, "num_draws": 3, "evaluation_draws": 8, "generator": 1}


def pictures(count=2, seed=4):
    """Normalised images of [0, 1] pixels, some of them 0 or 1."""
    pixels = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.2
    return (pixels.clamp(0, 1) - MEANS) / STDS


def lengths(result, pixel_values):
    return ((result.pixel_values - pixel_values).double() * STDS).flatten(1).norm(dim=1)


@pytest.fixture
def benchmark_script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    import attack_certificates

    return attack_certificates


class OwnPurifier(torch.nn.Module):
    """A purifier of ours that breaks the gradient, or one that makes the tower easy to attack."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        normal = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
        self.normal = normal / normal.norm()

    def denoise(self, images, sigma):
        if self.kind == "detached":
            return images.detach()
        if self.kind == "steps":
            return images.round()
        if self.kind == "infinite":
            return images * 1e38 * 1e38
        # "funnel": one direction of 768 is amplified. Random weights alone hardly react to so short a perturbation, and a
        # tower that does not react keeps any certificate.
        distance = ((images - 0.5) * self.normal).sum((1, 2, 3), keepdim=True)
        return images + 50 * distance * self.normal


# The function that is attacked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "psm", "feature", "options"),
    [
        ("clip", None, "tokens", {}),
        ("clip", None, "cls", {"feature_layer": -2}),
        ("clip", psm_model, "tokens", {"feature_layer": [-3, -2], "first_token": 1, "width": 64}),
        ("projection", psm_model, "pooled", {"width": 24}),
        ("siglip", None, "pooled", {}),
        ("dinov2", psm_model, "cls", {"max_batch_size": 2}),
    ],
)
def test_the_attacked_function_is_the_certified_one_to_the_bit(kind, psm, feature, options):
    width = options.pop("width", 32)
    if psm is not None:
        psm = psm_model(width=width, feature="pooled" if feature == "pooled" else "tokens")
    tower, image = smoothed_tower(kind, psm, **options), tiny_images(1)
    expected = torch.cat(list(tower.sample_features(image, 5, feature, generator=9, image_ids=[6], start=3)), 1)[0]
    found = torch.cat(list(unit_features(tower, image, range(3, 8), feature=feature, seed=9, image_id=6)))
    assert found.requires_grad
    assert torch.equal(found, expected)


def objective(tower, image, anchor, samples):
    features = torch.cat(list(unit_features(tower, image, samples, seed=5, image_id=0)))
    return (features * anchor).sum()


@pytest.mark.parametrize("with_psm", [False, True])
def test_gradient_agrees_with_finite_differences(with_psm):
    tower, image = smoothed_tower(psm=psm_model() if with_psm else None, sigma=0.2), tiny_images(1)
    anchor = tower.clean_features(image)[0]
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(tower, image, anchor, range(4)), image)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (objective(tower, image + s * 0.02 * direction, anchor, range(4)) for s in (1, -1))
    assert ((up - down) / 0.04).item() == pytest.approx(gradient.norm().item(), rel=0.02)


# The attack -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("epsilon", [0.03, 3.0])
def test_ball_and_pixel_range_are_kept(clip, epsilon):
    tower, images = smoothed_tower(), pictures()
    result = l2_pgd(tower, images, epsilon=epsilon, clip=clip, restarts=2, **QUICK)
    found = lengths(result, images)
    assert result.l2_norms == pytest.approx(found.tolist(), abs=1e-6)
    assert max(result.l2_norms) <= epsilon
    pixels = result.pixel_values * STDS + MEANS
    outside = max(-pixels.min().item(), pixels.max().item() - 1)
    if clip:
        assert outside < 1e-5
        assert min(result.l2_norms) > 0.5 * epsilon  # the clipped pixels cost length
    else:
        assert outside > 1e-3
        assert min(result.l2_norms) > 0.999 * epsilon


def test_a_float64_image_and_a_tiny_ball_are_kept_too():
    tower, images = smoothed_tower(), pictures().double()
    result = l2_pgd(tower, images, epsilon=1e-6, clip=False, **QUICK)
    assert result.pixel_values.dtype == torch.float64
    assert 0 < min(result.l2_norms) <= max(result.l2_norms) <= 1e-6
    # A ball below the spacing of float32 pixels.
    assert max(l2_pgd(tower, images.float(), epsilon=1e-8, **QUICK).l2_norms) <= 1e-8


def test_an_empty_ball_returns_the_image():
    tower, images = smoothed_tower(), pictures()
    result = l2_pgd(tower, images, epsilon=0, **QUICK)
    assert torch.equal(result.pixel_values, images)
    assert result.objective_before == result.objective_after
    assert result.l2_norms == (0.0, 0.0)


def test_the_objective_falls_further_than_by_chance():
    tower, images = smoothed_tower(), pictures()
    result = l2_pgd(tower, images, epsilon=2.0, steps=10, clip=False, generator=1)
    anchors = tower.clean_features(images)
    for i in range(2):
        # The reported values are estimates of the smoothed feature: fresh draws agree.
        image = torch.stack([images[i], result.pixel_values[i]])
        fresh = torch.cat(list(tower.sample_features(image, 200, generator=8)), 1).mean(1) @ anchors[i]
        reported = [result.objective_before[i], result.objective_after[i]]
        assert reported == pytest.approx(fresh.tolist(), abs=0.02)
        # A random point of the sphere does far less.
        random = torch.randn(images[i].shape, generator=torch.Generator().manual_seed(i))
        moved = images[[i]] + 2.0 * random / random.norm() / STDS
        chance = torch.cat(list(tower.sample_features(moved, 200, generator=8)), 1).mean(1)[0] @ anchors[i]
        fall = fresh[0] - fresh[1]
        assert fall > 0.05
        assert fall > 3 * (fresh[0] - chance)


def test_a_given_anchor_is_used():
    tower, images = smoothed_tower(), pictures()
    anchor = tower.clean_features(images.flip(0))
    result = l2_pgd(tower, images, epsilon=1.0, anchor=anchor, clip=False, **QUICK)
    fresh = torch.cat(list(tower.sample_features(images, 200, generator=8)), 1).mean(1)
    assert result.objective_before == pytest.approx((fresh * anchor).sum(-1).tolist(), abs=0.05)
    assert np.all(np.array(result.objective_after) < result.objective_before)


def test_an_undefended_tower_is_attacked_from_a_random_point():
    tower, images = smoothed_tower(sigma=0.0), pictures()
    result = l2_pgd(tower, images, epsilon=1.0, clip=False, **QUICK)
    assert result.objective_before == pytest.approx([1, 1], abs=1e-5)
    assert max(result.objective_after) < 0.99


def test_restarts_keep_the_best():
    tower, images = smoothed_tower(sigma=0.05), pictures()
    options = QUICK | {"epsilon": 1.0, "clip": False, "evaluation_draws": 100}
    one, three = (l2_pgd(tower, images, restarts=restarts, **options) for restarts in (1, 3))
    assert np.all(np.array(three.objective_after) <= np.array(one.objective_after) + 0.01)


def test_same_seed_same_result_whatever_the_batch():
    tower, images = smoothed_tower(psm=psm_model()), pictures(3)
    options = QUICK | {"epsilon": 0.5, "restarts": 2, "steps": 2, "evaluation_draws": 3}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    together = l2_pgd(tower, images, image_ids=[5, 8, 2], **options)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        alone = l2_pgd(tower, images[1:2], image_ids=[8], **options)
    assert torch.equal(alone.pixel_values[0], together.pixel_values[1])
    for field in dataclasses.fields(alone):
        if field.name not in ("pixel_values", "epsilon", "seed"):
            assert getattr(alone, field.name) == getattr(together, field.name)[1:2], field.name
    other = l2_pgd(tower, images[1:2], image_ids=[8], **options | {"generator": 2})
    assert not torch.equal(other.pixel_values, alone.pixel_values)
    first, second = (l2_pgd(tower, images[:1], **options | {"generator": None}) for _ in range(2))
    assert first.seed != second.seed
    assert all(parameter.grad is None for parameter in tower.parameters())


# Refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("detached", "`tower` gives no gradient from its feature to the pixels"),
        ("steps", "`tower` gives a gradient that is zero in each of 3 steps on image 0"),
        ("infinite", "`tower` gave a NaN or infinite feature or gradient on image 0"),
    ],
)
def test_a_tower_without_a_useful_gradient_is_reported(kind, message):
    tower = smoothed_tower(psm=OwnPurifier(kind))
    with pytest.raises(ValueError, match=message):
        l2_pgd(tower, pictures(1), epsilon=0.5, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.1}, "`epsilon` must be a finite number >= 0 in .0, 1. pixel units, got -0.1"),
        ({"epsilon": float("nan")}, "`epsilon` must be a finite number"),
        ({"epsilon": "1"}, "`epsilon` must be a finite number"),
        ({"steps": 0}, "`steps` must be an integer >= 1, got 0"),
        ({"num_draws": 0}, "`num_draws` must be an integer >= 1, got 0"),
        ({"restarts": 1.5}, "`restarts` must be an integer >= 1, got 1.5"),
        ({"evaluation_draws": True}, "`evaluation_draws` must be an integer >= 1, got True"),
        ({"step_size": 0.0}, "`step_size` must be a finite number > 0"),
        ({"anchor": "text"}, "`anchor` must be 'clean' or a tensor of unit vectors, got 'text'"),
        ({"anchor": torch.ones(2, 544)}, "`anchor` must be finite unit vectors"),
        ({"anchor": torch.ones(2, 1)}, "`anchor` must have shape .2, 544., a unit vector for each image, got .2, 1."),
        ({"anchor": torch.ones(3, 544)}, "`anchor` must have shape .2, 544."),
        ({"feature": "words"}, "`feature` must be one of"),
        ({"image_ids": [1]}, "`image_ids` must name each"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        l2_pgd(smoothed_tower(), pictures(), **{"epsilon": 0.5} | QUICK | options)


def test_bad_images_and_towers_are_refused():
    tower, images = smoothed_tower(), pictures()
    with pytest.raises(ValueError, match="`pixel_values` must be pixels in .0, 1. once the normalisation is undone"):
        l2_pgd(tower, images * 2, epsilon=0.5, **QUICK)
    with pytest.raises(ValueError, match="`pixel_values` must be float32 or float64"):
        l2_pgd(tower, images.bfloat16(), epsilon=0.5, **QUICK)
    with pytest.raises(ValueError, match="`pixel_values` must be finite"):
        l2_pgd(tower, images * float("nan"), epsilon=0.5, **QUICK)
    with pytest.raises(ValueError, match="`tower` must be in evaluation mode"):
        l2_pgd(tower.train(), images, epsilon=0.5, **QUICK)


# The promise ------------------------------------------------------------------------------------------------------------


def upper_bound(tower, image, anchor, num_draws, alpha=1e-3):
    """Upper confidence bound on `<ĝ(image), anchor>` from draws that neither certificate nor attack has seen."""
    draws = next(draw_scores(tower, image, anchor=anchor, generator=77))
    scores, _ = clean_scores(draws.take(num_draws))
    return 2 * mean_upper(scores, alpha, "betting") - 1


@pytest.mark.parametrize(
    ("kind", "sigma", "count"),
    [("plain", 0.25, 2), ("psm", 0.1, 1), ("funnel", 0.1, 2), ("funnel", 0.25, 2)],
)
def test_an_attack_never_beats_a_certificate(kind, sigma, count, record_property):
    psm = {"plain": lambda: None, "psm": psm_model, "funnel": lambda: OwnPurifier("funnel")}[kind]()
    tower, images, epsilons = smoothed_tower(psm=psm, sigma=sigma), pictures(count), [0.5 * sigma, sigma]
    certificates = certify_features(tower, images, epsilons=epsilons, num_samples=2000, generator=11)
    margins, closed = [], []
    for i, certificate in enumerate(certificates):
        anchor, clean = tower.clean_features(images[[i]]), 2 * certificate.robustness_score - 1
        for epsilon, bound in zip(epsilons, certificate.inner_product_bounds, strict=True):
            attack = l2_pgd(tower, images[[i]], epsilon=epsilon, steps=10, num_draws=8, clip=False, generator=12)
            assert attack.l2_norms[0] > 0.999 * epsilon
            upper = upper_bound(tower, attack.pixel_values, anchor, 2000)
            margins.append(upper - bound)
            closed.append((clean - upper) / (clean - bound))
    record_property("margins", margins)
    assert min(margins) > 0  # no violation …
    assert max(margins) < 0.15  # … of bounds that are near what was attacked
    if kind == "funnel":
        assert min(closed) > 0.25  # of the way from the clean value to the bound, at the least
        assert np.mean(closed) > 0.45


@pytest.mark.parametrize("distance", [0.15, 0.35])
def test_on_a_half_space_the_attack_reaches_the_bound_and_does_not_pass_it(distance, benchmark_script):
    """Here the bound is attained, so a weak attack, a wrong unit of length or an unsound bound would show."""
    script, sigma, epsilons = benchmark_script, 0.25, [0.05, 0.125, 0.25, 0.5]
    tower = script.half_space_tower(sigma)
    image, anchor = script.half_space_images(tower, [distance]), torch.tensor([[1.0, 0.0]])
    certificate = certify_features(
        tower, image, epsilons=epsilons, num_samples=20_000, anchor=anchor, generator=3
    )[0]  # fmt: skip
    for epsilon, bound in zip(epsilons, certificate.inner_product_bounds, strict=True):
        attack = l2_pgd(tower, image, epsilon=epsilon, anchor=anchor, clip=False, generator=4)
        exact = script.half_space_population(tower, image, attack.pixel_values, epsilon)
        clean, attacked = exact["population_clean"], exact["population_attacked"]
        assert bound <= attacked  # the certificate holds, with no sampling error on this side
        assert exact["population_certified"] - 1e-6 <= attacked
        assert exact["population_paper_bound"] <= exact["population_certified"]
        assert exact["population_gap_closed"] > 0.99  # nothing in the ball is worse than what the attack found
        if epsilon >= 0.125:
            assert (clean - attacked) / (clean - bound) > 0.5  # also of the certificate from samples
        assert upper_bound(tower, attack.pixel_values, anchor, 2000) > bound


def test_the_half_space_formulas_agree_with_simulation(benchmark_script):
    tower = benchmark_script.half_space_tower(0.25)
    image = benchmark_script.half_space_images(tower, [0.2])
    exact = benchmark_script.half_space_population(tower, image, image, 0.1)
    draws = torch.cat(list(tower.sample_features(image, 20_000, generator=6)), 1)[0]
    assert draws.norm(dim=-1).numpy() == pytest.approx(1, abs=1e-5)
    assert draws[:, 0].mean().item() == pytest.approx(exact["population_clean"], abs=0.02)
    assert exact["population_attacked"] == exact["population_clean"]


def test_the_benchmark_writes_what_it_measured(benchmark_script, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out" / "half_space.json"
    arguments = ["--half-space", "--num-samples", "500", "--evaluation-draws", "500", "--epsilon", "0.1", "0.2"]
    arguments += ["--steps", "4", "--distance", "0.3", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["attack_certificates.py", *arguments])
    benchmark_script.main()
    capsys.readouterr()
    results = json.loads(path.read_text())
    assert str(tmp_path) not in path.read_text()
    assert results["settings"]["epsilon"] == [0.1, 0.2]
    assert results["summary"]["violations"] == 0
    assert results["summary"]["comparisons"] == len(results["rows"]) == 2
    assert all(row["margin"] > 0 and row["population_gap_closed"] > 0.99 for row in results["rows"])
    assert [file.name for file in path.parent.iterdir()] == ["half_space.json"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples/benchmarks/results").glob("attack_certificates_*.json")))
def test_the_committed_measurements_hold_no_violation(path):
    results = json.loads(path.read_text())
    rows = results["rows"]
    assert results["summary"]["violations"] == sum(row["attacked_upper"] < row["certified"] for row in rows) == 0
    assert all(row["l2_norm"] <= row["epsilon"] for row in rows)
    assert "/tmp" not in path.read_text()
