import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from fs_psm_hf import PSMConfig, PSMModel
from fs_psm_hf.purifier import (
    GUIDED_DIFFUSION_256,
    LIGHT_UNET,
    LIGHT_UNET_SMALL,
    DiffusionPurifier,
    UNetPurifier,
    build_purifier,
    noise_level_to_timestep,
)


# Two levels deep, so that sizes must be multiples of 2.
TINY_UNET = LIGHT_UNET_SMALL | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
}
# The guided-diffusion schedule, independently of diffusers.
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LEVELS = np.sqrt((1 - ABAR) / ABAR)


class GaussianPosterior(UNet2DModel):
    """E[ε | x_t] for clean pixels x0 ~ N(0, spread²), the exact network for such data; its variance is junk."""

    spread = 0.7

    def forward(self, sample, timestep):
        self.seen = timestep
        level = np.exp(np.interp(timestep.numpy().astype(np.float64), np.arange(1000), np.log(LEVELS)))
        abar = torch.from_numpy(1 / (1 + level**2)).to(sample.dtype)[:, None, None, None]
        noise = (1 - abar).sqrt() * sample / (abar * self.spread**2 + 1 - abar)
        return UNet2DOutput(sample=torch.cat([noise, torch.full_like(noise, 1e6)], dim=1))


@pytest.fixture
def images():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["diffusion", "unet"])
def purifier(request):
    torch.manual_seed(0)
    return build_purifier(request.param, TINY_UNET)


@pytest.mark.parametrize(("sigma", "timestep"), [(0.12, 70), (0.25, 145), (0.5, 259), (1.0, 396)])
def test_known_timesteps(sigma, timestep):
    found = noise_level_to_timestep(sigma, LEVELS.tolist())
    assert found.dtype == torch.float32
    # Carlini et al. take the first timestep that is noisy enough.
    assert math.ceil(found.item()) == timestep


def test_timestep_round_trip_and_ends():
    sigma = torch.logspace(math.log10(0.0051), math.log10(78), 200, dtype=torch.float64)
    timestep = noise_level_to_timestep(sigma, LEVELS.tolist())
    back = np.exp(np.interp(timestep.numpy().astype(np.float64), np.arange(1000), np.log(LEVELS))) / 2
    np.testing.assert_allclose(back, sigma.numpy(), rtol=1e-5)
    assert (timestep.diff() > 0).all()
    assert noise_level_to_timestep(torch.tensor([0.0, 0.004]), LEVELS.tolist()).tolist() == [0, 0]
    assert noise_level_to_timestep(LEVELS[-1] / 2, LEVELS.tolist()) == 999
    with pytest.raises(ValueError, match="`sigma` must be <= 78.7"):
        noise_level_to_timestep(torch.tensor([0.1, 79.0]), LEVELS.tolist())


@pytest.mark.parametrize("sigma", [0.01, 0.25, 0.5, 3.0])
def test_gaussian_data_gives_the_wiener_filter(sigma, images):
    unet = GaussianPosterior(**TINY_UNET | {"out_channels": 6})
    noisy = images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    purified = DiffusionPurifier(unet).denoise(noisy, sigma)
    # In [-1, 1] units the data have mean 0 and variance spread², the noise 4σ².
    wiener = 0.5 + (noisy - 0.5) * unet.spread**2 / (unet.spread**2 + 4 * sigma**2)
    torch.testing.assert_close(purified, wiener, rtol=0, atol=1e-5)


def test_timestep_reaches_the_unet_as_a_fraction(images):
    unet = GaussianPosterior(**TINY_UNET | {"out_channels": 6})
    DiffusionPurifier(unet).denoise(images, 0.25)
    assert unet.seen.dtype == torch.float32
    assert unet.seen.shape == (2,)
    assert unet.seen[0].item() == pytest.approx(np.interp(math.log(0.5), np.log(LEVELS), np.arange(1000)), abs=1e-3)
    assert unet.seen[0].item() % 1 > 0.1


def test_another_schedule_is_followed(images):
    scheduler = DDPMScheduler(num_train_timesteps=10, beta_schedule="scaled_linear", beta_start=0.1, beta_end=0.5)
    purifier = DiffusionPurifier(UNet2DModel(**TINY_UNET), scheduler)
    abar = np.cumprod(1 - np.linspace(0.1**0.5, 0.5**0.5, 10) ** 2)
    np.testing.assert_allclose(purifier.noise_levels, np.sqrt(1 / abar - 1), rtol=1e-4)
    with pytest.raises(ValueError, match="'epsilon', got 'v_prediction'"):
        DiffusionPurifier(UNet2DModel(**TINY_UNET), DDPMScheduler(prediction_type="v_prediction"))


def test_schedule_survives_the_meta_device():
    with torch.device("meta"):
        purifier = build_purifier("diffusion", TINY_UNET)
    np.testing.assert_allclose(purifier.noise_levels, LEVELS, rtol=1e-4)
    assert not list(purifier.buffers())


def test_preconditioning_restated(images):
    torch.manual_seed(0)
    purifier = UNetPurifier(UNet2DModel(**TINY_UNET)).double()
    noisy, s, data = images.double(), 0.5, 0.5  # s = 2σ, data = standard deviation of [-1, 1] pixels
    y = 2 * noisy - 1
    c_noise = 1000 * math.atan(s / data) / (math.pi / 2)
    output = purifier.unet(y / math.hypot(s, data), torch.full((2,), c_noise, dtype=torch.float32)).sample
    expected = y * data**2 / (s**2 + data**2) + output * s * data / math.hypot(s, data)
    torch.testing.assert_close(purifier.denoise(noisy, 0.25), (expected + 1) / 2, rtol=0, atol=1e-9)


def test_sigma_zero_is_the_identity(purifier, images):
    assert torch.equal(purifier.denoise(images, 0), images)
    assert torch.equal(purifier.denoise(images, torch.zeros(2)), images)


@pytest.mark.parametrize("size", [(7, 8), (9, 5), (3, 3)])
def test_padding_is_a_reflection_and_is_cropped(purifier, size):
    height, width = size
    torch.manual_seed(1)
    image = torch.rand(1, 3, height, width)
    purified = purifier.denoise(image, 0.25)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (0, height % 2), (0, width % 2)), mode="reflect")
    whole = purifier.denoise(torch.from_numpy(padded), 0.25)
    torch.testing.assert_close(purified, whole[..., :height, :width], rtol=0, atol=1e-6)


def test_padding_is_on_both_sides():
    torch.manual_seed(0)
    purifier = build_purifier("unet", LIGHT_UNET_SMALL)
    assert purifier.downsample_factor == 4
    image = torch.rand(1, 3, 10, 12)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (1, 1), (0, 0)), mode="reflect")
    whole = purifier.denoise(torch.from_numpy(padded), 0.25)
    torch.testing.assert_close(purifier.denoise(image, 0.25), whole[:, :, 1:11], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="at least 3 pixels high and wide, got 1x12"):
        purifier.denoise(image[:, :, :1], 0.25)


def test_one_sigma_per_image(purifier, images):
    together = purifier.denoise(images, torch.tensor([0.1, 0.5]))
    apart = torch.cat([purifier.denoise(images[:1], 0.1), purifier.denoise(images[1:], 0.5)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_pixel_gradient_is_the_derivative(purifier, images):
    purifier.double()
    images = images.double().requires_grad_()
    direction = torch.randn(images.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(purifier.denoise(images, 0.25).square().sum(), images)
    with torch.no_grad():
        values = [purifier.denoise(images + h * direction, 0.25).square().sum() for h in (1e-5, -1e-5)]
    assert (gradient * direction).sum().item() == pytest.approx(((values[0] - values[1]) / 2e-5).item(), rel=1e-5)


def test_activation_checkpointing_changes_no_gradient(purifier, images):
    purifier.train()
    gradients = []
    for _ in range(2):
        purifier.zero_grad()
        purifier(images, 0.25).square().sum().backward()
        gradients.append([p.grad.clone() for p in purifier.parameters()])
        purifier.unet.enable_gradient_checkpointing()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_bfloat16_weights_with_float32_images(purifier, images):
    exact = purifier.denoise(images, 0.25)
    rounded = purifier.to(torch.bfloat16).denoise(images, 0.25)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)
    assert purifier.denoise(images.bfloat16(), 0.25).dtype == torch.bfloat16


def test_output_is_not_clipped(purifier, images):
    assert purifier.denoise(images + 3, 0.01).min() > 1


def test_whole_graph_compiles_for_several_sigmas(images):
    torch.manual_seed(0)
    purifier = build_purifier("diffusion", TINY_UNET)
    compiled = torch.compile(purifier.denoise, fullgraph=True, backend="eager")
    with torch.no_grad():
        for sigma in (0.25, 0.5):
            torch.testing.assert_close(compiled(images, sigma), purifier.denoise(images, sigma))


@pytest.mark.parametrize(
    ("kind", "config", "low", "high"),
    [
        ("diffusion", None, 552_814_086, 552_814_086),
        ("diffusion", GUIDED_DIFFUSION_256, 552_814_086, 552_814_086),
        ("unet", None, 43.7e6 * 0.99, 43.7e6 * 1.01),
        ("unet", LIGHT_UNET, 43_861_507, 43_861_507),
        ("unet", LIGHT_UNET_SMALL, 403_003, 403_003),
    ],
)
def test_parameter_counts(kind, config, low, high):
    with torch.device("meta"):
        purifier = build_purifier(kind, config)
    assert low <= sum(p.numel() for p in purifier.parameters()) <= high


def test_guided_diffusion_has_its_middle_group_norm():
    with torch.device("meta"):
        purifier = build_purifier("diffusion")
    assert purifier.unet.mid_block.attentions[0].group_norm is not None
    assert purifier.downsample_factor == 32


def test_build_purifier():
    assert build_purifier("none") is None
    saved = dict(build_purifier("unet", TINY_UNET).unet.config)
    rebuilt = build_purifier("unet", saved | {"_class_name": "UNet2DModel", "_diffusers_version": "0"})
    assert type(rebuilt) is UNetPurifier
    with pytest.raises(ValueError, match="must be one of none, diffusion, unet, got 'vae'"):
        build_purifier("vae")
    for inside, outside in ((3, 6), (12, 3), (6, 6), (24, 24)):
        with pytest.raises(ValueError, match=rf"3, 12, 27, .* as many out_channels, got {inside} and {outside}"):
            UNetPurifier(UNet2DModel(**TINY_UNET | {"in_channels": inside, "out_channels": outside}))
    with pytest.raises(ValueError, match="in_channels 3 and out_channels 3 or 6, got 12 and 12"):
        build_purifier("diffusion", TINY_UNET | {"in_channels": 12, "out_channels": 12})
    with pytest.raises(ValueError, match="in_channels 3"):
        build_purifier("diffusion", TINY_UNET | {"in_channels": 1})


@pytest.mark.parametrize(
    ("bad_images", "error", "message"),
    [
        (torch.zeros(1, 1, 8, 8), ValueError, r"shape \(batch_size, 3, height, width\), got \(1, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), ValueError, r"got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "must be floating point, got torch.uint8"),
    ],
)
def test_bad_images(purifier, bad_images, error, message):
    with pytest.raises(error, match=message):
        purifier.denoise(bad_images, 0.25)


@pytest.mark.parametrize(
    ("sigma", "error", "message"),
    [
        (-0.1, ValueError, "`sigma` must be finite and >= 0, got -0.1"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        (torch.tensor([0.1, math.nan]), ValueError, "finite"),
        (torch.tensor([0.1, -0.1]), ValueError, ">= 0"),
        (torch.tensor([0.1, 0.1, 0.1]), ValueError, r"shape \(\) or \(2,\), got \(3,\)"),
        ("0.1", TypeError, "got str"),
        (True, TypeError, "got bool"),
        (torch.tensor([True, False]), TypeError, "torch.bool"),
    ],
)
def test_bad_sigma(purifier, images, sigma, error, message):
    with pytest.raises(error, match=message):
        purifier.denoise(images, sigma)


def test_sigma_beyond_the_schedule(images):
    with pytest.raises(ValueError, match=r"<= 78.7, the schedule's last noise level, got 100"):
        build_purifier("diffusion", TINY_UNET).denoise(images, 100.0)


def patches(images, size):
    """Non-overlapping patches as channels, by numpy: channel c·p² + i·p + j is pixel (i, j) of channel c."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // size, size, width // size, size)
    return cut.transpose(0, 1, 3, 5, 2, 4).reshape(batch, channels * size**2, height // size, width // size)


@pytest.mark.parametrize("size", [2, 3])
def test_a_unet_on_patches(size):
    """The network sees patches of the padded image and answers with patches; the preconditioning stays per pixel."""
    torch.manual_seed(0)
    channels = {"in_channels": 3 * size**2, "out_channels": 3 * size**2}
    purifier = build_purifier("unet", TINY_UNET | channels).double()
    assert (purifier.patch, purifier.downsample_factor) == (size, 2 * size)
    noisy = torch.rand(2, 3, 4 * size, 6 * size, dtype=torch.float64)
    s, data = 0.5, 0.5
    c_noise = torch.full((2,), 1000 * math.atan(s / data) / (math.pi / 2), dtype=torch.float32)
    seen = torch.from_numpy(patches(((2 * noisy - 1) / math.hypot(s, data)).numpy(), size))
    output = purifier.unet(seen, c_noise).sample.detach().numpy()
    found = purifier.denoise(noisy, 0.25)
    level = math.hypot(s, data)
    prediction = ((2 * found - 1) - (2 * noisy - 1) * data**2 / level**2) * level / (s * data)
    np.testing.assert_allclose(patches(prediction.detach().numpy(), size), output, rtol=0, atol=1e-9)
    assert torch.equal(purifier.denoise(noisy, 0), noisy)


def test_a_unet_on_patches_pads_and_keeps_pixels_in_place():
    torch.manual_seed(0)
    purifier = build_purifier("unet", TINY_UNET | {"in_channels": 12, "out_channels": 12})
    image = torch.rand(1, 3, 10, 13)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (1, 1), (1, 2)), mode="reflect")
    whole = purifier.denoise(torch.from_numpy(padded), 0.25)
    assert whole.shape[-2:] == (12, 16)
    torch.testing.assert_close(purifier.denoise(image, 0.25), whole[:, :, 1:11, 1:14], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="at least 3 pixels high and wide, got 1x16"):
        purifier.denoise(torch.rand(1, 3, 1, 16), 0.25)


def test_a_unet_on_patches_saves_and_reloads(tmp_path, images):
    torch.manual_seed(0)
    unet = TINY_UNET | {"in_channels": 12, "out_channels": 12}
    psm = PSMModel(PSMConfig(purifier="unet", purifier_config=unet)).eval()
    psm.save_pretrained(tmp_path)
    reloaded = PSMModel.from_pretrained(tmp_path)
    assert reloaded.purifier.patch == 2
    assert torch.equal(reloaded(images, 0.25), psm(images, 0.25))
    assert not torch.equal(reloaded(images, 0.25), images)


def test_a_unet_on_patches_learns():
    """The error at the noise level it is trained for falls below that of the noisy image, and gradients reach it."""
    torch.manual_seed(0)
    purifier = build_purifier("unet", TINY_UNET | {"in_channels": 12, "out_channels": 12})
    optimizer = torch.optim.Adam(purifier.parameters(), lr=1e-2)
    clean = torch.rand(8, 3, 1, 1).expand(-1, -1, 8, 8)
    for _ in range(60):
        noisy = clean + 0.25 * torch.randn(8, 3, 8, 8)
        loss = (purifier(noisy, 0.25) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noisy = (clean + 0.25 * torch.randn(8, 3, 8, 8)).requires_grad_()
    purified = purifier(noisy, 0.25)
    assert (purified - clean).square().mean() < 0.3 * 0.25**2
    purified.sum().backward()
    assert (noisy.grad != 0).all()
