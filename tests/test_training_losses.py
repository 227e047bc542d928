"""The losses against their formulas, and the passes of a step against the whole loss written in one go."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from tiny_models import MEAN, SMALL_UNET, STD, psm_model, vision_model
from torch import nn
from training_runs import prepared, save_images, save_tower

from fs_psm_hf.mapper import SmoothnessMapper
from fs_psm_hf.noise import gaussian_noise
from fs_psm_hf.purifier import DiffusionPurifier, build_purifier
from fs_psm_hf.training import losses


SCHEDULER = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tower, its images and a PSM whose mapper visibly moves features."""
    root = tmp_path_factory.mktemp("losses")
    save_tower(root / "tower")
    save_images(root / "images", 10)
    psm_model().save_pretrained(root / "psm")
    return root


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [3, 6])
def test_diffusion_loss_is_the_usual_one(channels, images):
    """MSE of the predicted noise at a whole timestep, by diffusers' own noising, and its gradient."""
    torch.manual_seed(0)
    unet = UNet2DModel(**SMALL_UNET | {"out_channels": channels})
    purifier, noise = DiffusionPurifier(unet), normal(4, 3, 16, 16)
    timesteps = torch.tensor([0, 145, 500, 999])
    levels = losses.diffusion_levels(purifier, (timesteps + 0.5) / 1000, (0.25, 0.25))
    found = losses.diffusion_loss(
        purifier(images + levels[:, None, None, None] * noise, levels), images, noise, levels, purifier
    )
    noisy = SCHEDULER.add_noise(2 * images - 1, noise, timesteps)
    expected = (unet(noisy, timesteps).sample[:, :3] - noise).square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    gradients = [torch.autograd.grad(loss, list(unet.parameters())) for loss in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    if channels == 6:
        assert not gradients[0][-1][3:].any()  # the bias of the last convolution: nothing reaches the variance


def test_every_timestep_is_equally_likely():
    purifier = build_purifier("diffusion", SMALL_UNET)
    levels = losses.diffusion_levels(purifier, (torch.arange(1000) + 0.5) / 1000, (0.25, 0.25))
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(2 * levels.numpy(), np.sqrt(1 / alphas - 1), rtol=2e-4)
    # numpy's largest random number is 1 in float32.
    almost = torch.tensor([1 - 2**-53], dtype=torch.float32)
    assert losses.diffusion_levels(purifier, almost, (0.25, 0.25)) == levels[-1]
    assert purifier(torch.zeros(1, 3, 16, 16), levels[-1:]).isfinite().all()


def test_light_diffusion_loss_is_that_of_karras(images):
    """λ(σ)‖D(y + n) − y‖² in [-1, 1] pixels, with λ = (s² + d²)/(s·d)²; levels are uniform in the logarithm."""
    torch.manual_seed(0)
    purifier, noise = build_purifier("unet", SMALL_UNET), normal(4, 3, 16, 16)
    levels = losses.diffusion_levels(purifier, torch.tensor([0.0, 0.25, 0.5, 1.0]), (0.2, 0.4))
    np.testing.assert_allclose(levels, np.geomspace(0.1, 0.6, 5)[[0, 1, 2, 4]], rtol=1e-5)
    denoised = purifier(images + levels[:, None, None, None] * noise, levels)
    s, d = 2 * levels.double().numpy(), 0.5
    error = (2 * denoised - 2 * images).detach().double().numpy()
    expected = ((s**2 + d**2) / (s * d) ** 2 * (error**2).mean((1, 2, 3))).mean()
    assert losses.diffusion_loss(denoised, images, noise, levels, purifier).item() == pytest.approx(expected, rel=1e-5)


def test_cosine_and_reconstruction(images):
    one, other = normal(3, 5, 4).double().numpy(), normal(3, 5, 4, seed=2).double().numpy()
    flat = [a.reshape(3, -1) for a in (one, other)]
    cosines = (flat[0] * flat[1]).sum(1) / np.linalg.norm(flat[0], axis=1) / np.linalg.norm(flat[1], axis=1)
    found = losses.cosine_loss(torch.from_numpy(one), torch.from_numpy(other)).item()
    assert found == pytest.approx(1 - cosines.mean(), rel=1e-5)
    purified = images + 0.1 * normal(4, 3, 16, 16)
    between = (2 * purified - 1).double().numpy() - (2 * images - 1).double().numpy()
    assert losses.reconstruction_loss(purified, images).item() == pytest.approx((between**2).mean(), rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 4), (6, 4)])
def test_statistics(shape):
    mapped, clean, norm = 50 * normal(*shape) + 3, 40 * normal(*shape, seed=2), torch.tensor(60.0)
    found = losses.statistics_loss(mapped, clean, norm).item()
    one, other = ((t.double() / 60).reshape(-1, 4).numpy() for t in (mapped, clean))
    expected = ((one.mean(0) - other.mean(0)) ** 2 + (one.std(0) - other.std(0)) ** 2).mean()
    assert found == pytest.approx(expected, rel=1e-4)
    assert losses.statistics_loss(clean, clean, norm) == 0


def test_statistics_of_one_token_have_a_gradient():
    mapped = normal(1, 4).requires_grad_()
    losses.statistics_loss(mapped, normal(1, 4, seed=2), torch.tensor(1.0)).backward()
    assert mapped.grad.isfinite().all()
    assert mapped.grad.any()


def test_identity():
    class Affine(nn.Module):
        def forward(self, features, sigma):
            return 0.1 * features + 2 + sigma

    features = 30 * normal(3, 5, 4)
    update = 0.1 * features.double().numpy() + 2
    expected = ((update / 20) ** 2).sum(-1).mean()
    assert losses.identity_loss(Affine(), features, torch.tensor(20.0)).item() == pytest.approx(expected, rel=1e-5)
    mapper = SmoothnessMapper(4)
    with torch.no_grad():
        for parameter in mapper.parameters():
            parameter.add_(0.3)
    assert mapper(features, 0.2).any()
    assert losses.identity_loss(mapper, features, torch.tensor(20.0)) == 0


def test_noise_belongs_to_seed_position_and_draw():
    images = torch.zeros(3, 3, 4, 4)
    noise = losses.draw_noise(images, 5, [7, 8, 9], 2)
    assert torch.equal(noise[1:], losses.draw_noise(images[1:], 5, [8, 9], 2))
    assert torch.equal(noise, gaussian_noise((3, 4, 4), 5, [7, 8, 9], 2, 1, torch.device("cpu")))
    for other in (losses.draw_noise(images, 5, [7, 8, 9], 3), losses.draw_noise(images, 6, [7, 8, 9], 2)):
        assert (noise != other).all()
    assert len(noise.unique()) == noise.numel()


def clean_tokens(root, pixels):
    """The tower by itself, by transformers alone."""
    model = vision_model()
    model.load_state_dict(type(model).from_pretrained(root / "tower").state_dict())
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return model(pixel_values=(pixels - mean) / std).last_hidden_state


def mean_cosine_loss(features, clean):
    norms = features.flatten(1).norm(dim=1) * clean.flatten(1).norm(dim=1)
    return 1 - ((features * clean).flatten(1).sum(1) / norms).mean()


def noisy_draws(images, seed, positions, sigma, draws):
    noise = gaussian_noise((3, 16, 16), seed, positions, 0, draws, images.device).view(len(images), draws, 3, 16, 16)
    return [images + sigma[:, None, None, None] * noise[:, draw] for draw in range(draws)]


def purifier_loss(trainer, root, images, positions):
    """L_P of one batch in one go."""
    args, purifier = trainer.args, trainer.stage.trained
    sigma = trainer.stage.sigmas(positions, images)
    clean = clean_tokens(root, images).detach()
    l_rb = l_mse = 0
    for noisy in noisy_draws(images, args.seed, positions, sigma, args.num_samples):
        purified = purifier(noisy, sigma)
        l_rb = l_rb + mean_cosine_loss(clean_tokens(root, purified), clean) / args.num_samples
        l_mse = l_mse + (2 * purified - 2 * images).square().mean() / args.num_samples
    uniform = [np.random.default_rng([args.seed, 6, position]).random() for position in positions]
    noise = losses.draw_noise(images, args.seed, positions, 2**32)
    if args.purifier == "diffusion":
        timesteps = torch.tensor([int(1000 * u) for u in uniform])
        noisy = SCHEDULER.add_noise(2 * images - 1, noise, timesteps)
        l_diff = (purifier.unet(noisy, timesteps).sample[:, :3] - noise).square().mean()
    else:
        levels = torch.tensor([0.5 * args.sigma_min * (3 * args.sigma_max / args.sigma_min) ** u for u in uniform])
        denoised = purifier(images + levels[:, None, None, None] * noise, levels)
        weight = ((2 * levels) ** 2 + 0.25) / levels**2
        l_diff = (weight[:, None, None, None] * (2 * denoised - 2 * images).square()).mean()
    return l_diff + args.lambda_rb * l_rb + args.lambda_mse * l_mse


def mapper_loss(trainer, root, images, positions):
    """L_M of one batch in one go."""
    args, mapper = trainer.args, trainer.stage.trained
    sigma = trainer.stage.sigmas(positions, images)
    clean, r = clean_tokens(root, images).detach(), mapper.token_norm
    total = 0
    for noisy in noisy_draws(images, args.seed, positions, sigma, args.num_samples):
        features = clean_tokens(root, trainer.psm.purifier(noisy, sigma)).detach()
        mapped = features + mapper(features, sigma)
        moments = [
            ((t / r).flatten(0, 1).mean(0), (t / r).flatten(0, 1).std(0, correction=0)) for t in (mapped, clean)
        ]
        l_stats = sum((a - b).square().mean() for a, b in zip(*moments, strict=True))
        total = total + mean_cosine_loss(mapped, clean) + args.lambda_stats * l_stats
    return args.lambda_rb * total / args.num_samples


@pytest.mark.parametrize(("stage", "purifier"), [("purifier", "unet"), ("purifier", "diffusion"), ("mapper", "unet")])
def test_gradient_of_the_passes_is_that_of_the_whole_loss(stage, purifier, root, tmp_path):
    """n₀ = 3 draws, differentiated one after the other, and the batch in two micro-batches for the purifier."""
    start = root / "psm"
    if purifier == "diffusion":
        start = tmp_path / "diffusion"
        psm_model("diffusion", mapper=False).save_pretrained(start)
    accumulation = 2 if stage == "purifier" else 1
    trainer = prepared(
        root, tmp_path / "out", stage, pretrained_psm_name_or_path=start, purifier=purifier, purifier_config=None,
        num_samples=3, sigma=None, sigma_min=0.1, sigma_max=0.3, gradient_accumulation_steps=accumulation,
        lambda_rb=0.7 if stage == "purifier" else 1, lambda_mse=0.4,
    )  # fmt: skip
    images, positions = torch.rand(4, 3, 16, 16), [3, 11, 2, 40]
    whole = {"purifier": purifier_loss, "mapper": mapper_loss}[stage](trainer, root, images, positions)
    expected = torch.autograd.grad(whole, list(trainer.stage.trained.parameters()))
    found, steps = {}, []
    for name, parameter in trainer.stage.trained.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    logged = []
    for half in (slice(0, 2), slice(2, 4)) if accumulation == 2 else (slice(None),):
        assert not steps
        logged.append(trainer._backward(images[half], positions[half])["loss"].item())
    assert len(steps) == 1
    assert np.mean(logged) == pytest.approx(whole.item(), rel=1e-4)
    names = [name for name, _ in trainer.stage.trained.named_parameters()]
    assert found.keys() == set(names)
    largest = max(gradient.abs().max() for gradient in expected)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest.item())
    assert not any(parameter.grad is not None for parameter in trainer.tower.tower.parameters())


def test_noise_level_is_drawn_from_a_range(root, tmp_path):
    """One level for each image, of its position alone, uniform in the range."""
    trainer = prepared(root, tmp_path / "out", sigma_min=0.2, sigma_max=0.6)
    like = torch.zeros(1)
    levels = trainer.stage.sigmas(range(2000), like)
    assert 0.2 <= levels.min() < 0.21
    assert 0.59 < levels.max() <= 0.6
    assert levels.mean().item() == pytest.approx(0.4, abs=4 * 0.4 / math.sqrt(12 * 2000))
    assert torch.equal(levels[[7, 3]], trainer.stage.sigmas([7, 3], like))
    fixed = prepared(root, tmp_path / "fixed", sigma=0.3)
    assert torch.equal(fixed.stage.sigmas(range(3), like), torch.full((3,), 0.3))


def test_a_loss_of_weight_zero_is_not_computed(root, tmp_path):
    """Without l_rb the tower is never asked; without all but l_diff there is one pass."""
    for options, passes, calls in (
        ({"lambda_rb": 0}, 3, 0),
        ({"lambda_rb": 0, "lambda_mse": 0}, 1, 0),
        ({"lambda_diff": 0}, 2, 3),
    ):
        trainer, asked, counts = prepared(root, tmp_path / str(passes), **options), [], []
        trainer.tower.tower.vision_tower.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_, counts=counts: counts.append(1))
        found = trainer._backward(torch.rand(2, 3, 16, 16), [0, 1])
        assert (len(asked), len(counts)) == (calls, 1)
        assert ("loss_rb" in found) == (calls > 0)
        assert trainer.stage.passes(trainer.args) == passes
