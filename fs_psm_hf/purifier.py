"""One-step purifiers: networks that take Gaussian noise of known level out of an image.

Every purifier is an `nn.Module` with `denoise(images, sigma) -> images`; images are in [0, 1] pixel scale plus noise,
never clipped, and `sigma` is the noise standard deviation in the same units. A user's own module needs nothing more.

**Size policy.** The UNet runs at the image's own size, reflect-padded on all sides to the next multiple of its
downsampling factor and cropped afterwards. The alternative, resizing to the UNet's training size and back, falsifies
the noise level that the UNet is told and blurs the image. `examples/benchmarks/purifier_size_policy.py`, 50 ImageNet
photographs: bilinear 224 → 256 leaves 67 % of the noise level and correlates neighbouring pixels at 0.36 (336 → 256:
51 % and 0.26), so no timestep fits; the round trip alone limits a perfect purifier to a mean PSNR of 33.7 dB (bicubic
39.9 dB). Padding leaves level and independence of the noise as they are. Not measured there: what a UNet trained at
256 pixels loses at another size.

**No clipping.** The output may leave [0, 1]. Clipping could only bring it closer to the clean image, but it would set
the pixel gradient to zero wherever it acts, and attacks on the tower would look weaker than they are.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn
from torch.nn import functional as F

from .configuration_fs_psm import PURIFIERS
from .unet import build_unet


# The 256x256 unconditional guided-diffusion network (Dhariwal & Nichol 2021), 552,814,086 parameters. Six channels
# come out: the noise and a learned variance. Without `attn_norm_num_groups` the middle attention silently lacks its
# GroupNorm.
GUIDED_DIFFUSION_256 = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 2,
    "block_out_channels": [256, 256, 512, 512, 1024, 1024],
    "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "norm_num_groups": 32,
}

# The light denoiser, 43,861,507 parameters (the paper's has 43.7 M and no further description). Its downsampling
# factor 8 divides 224 and 336, so these sizes need no padding.
LIGHT_UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [64, 128, 256, 512],
    "down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * 3,
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "norm_num_groups": 32,
}

# For 32-pixel images on a CPU: 403,003 parameters, 62 million multiply-adds per 32x32 image.
LIGHT_UNET_SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [16, 24, 48],
    "down_block_types": ["DownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D"] * 3,
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 16,
    "attn_norm_num_groups": 8,
    "norm_num_groups": 8,
}


def expand_sigma(sigma: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Check a noise level and give it one entry per row of `like`.

    Args:
        sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
            Noise standard deviation in [0, 1] pixel units. A number costs no device synchronisation, a tensor one.
        like (`torch.Tensor` of shape `(batch_size, ...)`):
            Gives the batch size, the device and, if it is wider than float32, the dtype.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32 or wider.

    Raises:
        ValueError: if `sigma` is negative, not finite, or a tensor of another shape.
        TypeError: if `sigma` is neither a number nor a tensor of numbers.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(sigma, torch.Tensor):
        if sigma.dtype == torch.bool or sigma.is_complex():
            raise TypeError(f"`sigma` must hold real numbers, got a tensor of dtype {sigma.dtype}.")
        if sigma.shape not in ((), like.shape[:1]):
            raise ValueError(f"`sigma` must have shape () or ({like.shape[0]},), got {tuple(sigma.shape)}.")
        if not bool((sigma.isfinite() & (sigma >= 0)).all()):
            raise ValueError(f"`sigma` must be finite and >= 0, got {sigma.tolist()}.")
        return sigma.to(like.device, dtype).expand(like.shape[0])
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
        raise TypeError(f"`sigma` must be a number or a torch.Tensor, got {type(sigma).__name__}.")
    if not 0 <= sigma < math.inf:
        raise ValueError(f"`sigma` must be finite and >= 0, got {sigma}.")
    return torch.full(like.shape[:1], sigma, dtype=dtype, device=like.device)


def noise_levels(scheduler: DDPMScheduler) -> tuple[float, ...]:
    """Noise level sqrt((1 - abar_t) / abar_t) of every timestep, in units of [-1, 1] images, as Python floats.

    The table is rebuilt from the scheduler's config on the CPU, so it is right also for a scheduler made under
    `torch.device("meta")`, and it is no buffer, which loading could leave unfilled.

    Args:
        scheduler (`DDPMScheduler`): any schedule with ε-prediction.

    Raises:
        ValueError: if the schedule predicts anything but the noise.
    """
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(f"`scheduler` must have prediction_type 'epsilon', got {scheduler.config.prediction_type!r}.")
    with torch.device("cpu"):
        alphas = type(scheduler).from_config(scheduler.config).alphas_cumprod.tolist()
    return tuple(math.sqrt((1 - alpha) / alpha) for alpha in alphas)


def noise_level_to_timestep(sigma: float | torch.Tensor, levels: Sequence[float]) -> torch.Tensor:
    """Fractional timestep at which a diffusion process has the noise of `sigma` (theory.md, "One-step purifier").

    Solves `levels[t] = 2 * sigma` (doubling the pixel range to [-1, 1] doubles the noise), linear in t between
    neighbouring log-levels. Below the first level t is clamped to 0, the cleanest input that the network knows.

    Args:
        sigma (`float` or `torch.Tensor` of shape `(batch_size,)`): noise standard deviation in [0, 1] pixel units.
        levels (sequence of `float`): increasing table of [`noise_levels`].

    Returns:
        float32 `torch.Tensor` on the CPU, of shape `()` or `(batch_size,)`: a tensor, because `UNet2DModel` truncates
        Python floats.

    Raises:
        ValueError: if `sigma` is beyond the last level.
    """

    if (sigma.max() if isinstance(sigma, torch.Tensor) else sigma) > levels[-1] / 2:
        raise ValueError(f"`sigma` must be <= {levels[-1] / 2:.4g}, the schedule's last noise level, got {sigma}.")
    table = torch.tensor(levels, dtype=torch.float64, device="cpu").log()
    level = (2 * torch.as_tensor(sigma, dtype=torch.float64, device="cpu")).clamp(min=levels[0]).log()
    right = torch.searchsorted(table, level, right=True).clamp(max=len(levels) - 1)
    low, high = table.take(right - 1), table.take(right)
    return (right - 1 + (level - low) / (high - low)).float()


class UNetPurifier(nn.Module):
    r"""A light U-Net denoiser conditioned on the noise level, preconditioned as in Karras et al. (2022), table 1.

    With y = 2·images − 1 and s = 2σ (both in [-1, 1] units), x̂ = c_skip·y + c_out·F(c_in·y, c_noise). σ = 0 gives the
    images back exactly, whatever the weights.

    A UNet of 3·p² channels works on patches of p × p pixels (`pixel_unshuffle`, as FFDNet does with p = 2): the costly
    convolutions at full resolution fall away, which a strong noise leaves little to find for.

    Args:
        unet (`UNet2DModel`): 3·p² channels in and out, three for p = 1.
        sigma_data (`float`, *optional*, defaults to 0.5): standard deviation of clean [-1, 1] pixels.
    """

    def __init__(self, unet: UNet2DModel, sigma_data: float = 0.5):
        super().__init__()
        self.patch = self._patch_of(unet.config.in_channels, unet.config.out_channels)
        self.unet = unet
        self.sigma_data = sigma_data

    @staticmethod
    def _patch_of(in_channels: int, out_channels: int) -> int:
        patch = math.isqrt(in_channels // 3)
        if patch < 1 or in_channels != 3 * patch**2 or out_channels != in_channels:
            raise ValueError(
                "`unet` must have 3, 12, 27, ... (3·p²) in_channels and as many out_channels, "
                f"got {in_channels} and {out_channels}."
            )
        return patch

    @property
    def downsample_factor(self) -> int:
        """`int`: the UNet works on heights and widths that this divides; others are padded and cropped."""
        return self.patch * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Preconditioning factors c_skip, c_out, c_in and c_noise for [-1, 1] images.

        c_noise = 1000·(2/π)·atan(2σ / sigma_data) lies in [0, 1000), the range that the UNet's sinusoidal embedding
        resolves. The usual log(2σ)/4 has no value at σ = 0.

        Args:
            sigma (`torch.Tensor` of shape `(batch_size,)`): noise standard deviation in [0, 1] pixel units.
        """
        level, data = 2 * sigma, self.sigma_data
        total = (level**2 + data**2).sqrt()
        return data**2 / total**2, level * data / total, 1 / total, 2000 / math.pi * torch.atan(level / data)

    def denoise(self, images: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Estimate the clean images.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): [0, 1] images plus noise, not clipped.
            sigma (`float` or `torch.Tensor` of shape `(batch_size,)`): noise standard deviation in [0, 1] pixel units.

        Returns:
            `torch.Tensor` like `images`, in [0, 1] scale, not clipped.

        Raises:
            ValueError: for other shapes, or a `sigma` that is negative or not finite.
            TypeError: for images that are not floating point.
        """
        images, dtype = self._check_images(images), images.dtype
        c_skip, c_out, c_in, c_noise = self.scalings(expand_sigma(sigma, images))
        c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
        prediction = self._run_unet(c_in * (2 * images - 1), c_noise)
        # The map back to [0, 1] is folded in: 2·images − 1 would round small pixels, and σ = 0 could not be exact.
        return (c_skip * images + (1 - c_skip) / 2 + c_out / 2 * prediction).to(dtype)

    def forward(self, images: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Same as `denoise`: the entry point that data-parallel wrappers and module hooks need."""
        return self.denoise(images, sigma)

    def _check_images(self, images: torch.Tensor) -> torch.Tensor:
        if not images.is_floating_point():
            raise TypeError(f"`images` must be floating point, got {images.dtype}.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"`images` must have shape (batch_size, 3, height, width), got {tuple(images.shape)}.")
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def _run_unet(self, inputs: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """First three output channels in the dtype of `inputs`, padded and cropped as the size policy says."""
        height, width = inputs.shape[-2:]
        down, across = -height % self.downsample_factor, -width % self.downsample_factor
        top, left = down // 2, across // 2
        if down - top >= height or across - left >= width:
            raise ValueError(
                f"`images` must be at least {self.downsample_factor // 2 + 1} pixels high and wide, "
                f"got {height}x{width}."
            )
        if down or across:
            padded = F.pad(inputs, (left, across - left, top, down - top), mode="reflect")
        else:
            padded = inputs
        if self.patch > 1:
            padded = F.pixel_unshuffle(padded, self.patch)
        # Channels last: every convolution keeps the layout of its input, and the fast kernels read this one without a
        # reordering of each activation (`examples/benchmarks/engine.py`). The weights stay as they were loaded. Not where
        # a compiler differentiates: in layouts of its choice torch 2.13 gives wrong gradients of a U-Net on CPUs.
        differentiated = torch.compiler.is_compiling() and torch.is_grad_enabled()
        layout = torch.preserve_format if differentiated else torch.channels_last
        padded = padded.to(self.unet.dtype, memory_format=layout)
        # The timestep stays float32: bfloat16 has 8 bits, too few to tell neighbouring timesteps apart.
        output = self.unet(padded, timestep.to(inputs.device, torch.float32)).sample
        if self.patch > 1:
            output = F.pixel_shuffle(output, self.patch)
        return output[:, :3, top : top + height, left : left + width].to(inputs)


class DiffusionPurifier(UNetPurifier):
    r"""One step of a diffusion model as a denoiser (theory.md, "One-step purifier"; Carlini et al., ICLR 2023).

    An image with noise σ is a point of the diffusion process with ᾱ = 1/(1 + 4σ²) exactly:
    x_t = sqrt(ᾱ)·(2·images − 1). The network predicts its noise ε̂, and x̂₀ = (x_t − sqrt(1 − ᾱ)·ε̂)/sqrt(ᾱ) is
    images − σ·ε̂ in [0, 1] units. That form is used: nothing is divided by a small ᾱ, and σ = 0 gives the images back
    exactly. Below σ = 0.005 the timestep is 0 while σ itself stays exact.

    Args:
        unet (`UNet2DModel`): an ε-predicting network; of six output channels the last three (learned variance) are
            dropped.
        scheduler (`DDPMScheduler`, *optional*): the schedule that `unet` was trained with; the default is
            guided-diffusion's, 1000 steps with β linear from 1e-4 to 0.02, which reaches σ = 78.
    """

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler | None = None):
        super().__init__(unet)
        if scheduler is None:
            scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        self.noise_levels = noise_levels(scheduler)

    @staticmethod
    def _patch_of(in_channels: int, out_channels: int) -> int:
        if in_channels != 3 or out_channels not in (3, 6):
            raise ValueError(
                f"`unet` must have in_channels 3 and out_channels 3 or 6, got {in_channels} and {out_channels}."
            )
        return 1

    def denoise(self, images: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Estimate the clean images in one step; arguments and errors as in [`UNetPurifier.denoise`].

        A `sigma` beyond the schedule's last noise level is a `ValueError`.
        """
        images, dtype = self._check_images(images), images.dtype
        levels = expand_sigma(sigma, images)
        timestep = noise_level_to_timestep(sigma, self.noise_levels)
        if isinstance(sigma, torch.Tensor):
            timestep = timestep.to(images.device).expand(len(images))
        else:  # added as a number: a copy to the device would make the host wait in every pass
            timestep = torch.zeros(images.shape[:1], device=images.device) + timestep
        levels = levels[:, None, None, None]
        noise = self._run_unet((2 * images - 1) / (1 + 4 * levels**2).sqrt(), timestep)
        return (images - levels * noise).to(dtype)


def build_purifier(kind: str, unet_config: dict | None = None) -> UNetPurifier | None:
    """Make a purifier with random weights; loading them is `from_pretrained`'s work.

    Args:
        kind (`str`): `"diffusion"` ([`DiffusionPurifier`]), `"unet"` ([`UNetPurifier`]) or `"none"` (gives `None`).
        unet_config (`dict`, *optional*): arguments of `UNet2DModel`, and `num_attention_heads` and `time_proj_dim` of
            [`ExtendedUNet2DModel`]; by default `GUIDED_DIFFUSION_256` for `"diffusion"` and `LIGHT_UNET` for `"unet"`.

    Raises:
        ValueError: for another kind, or options out of range.
    """
    if kind not in PURIFIERS:
        raise ValueError(f"`kind` must be one of {', '.join(PURIFIERS)}, got {kind!r}.")
    if kind == "none":
        return None
    purifier_class, default = {
        "diffusion": (DiffusionPurifier, GUIDED_DIFFUSION_256),
        "unet": (UNetPurifier, LIGHT_UNET),
    }[kind]
    return purifier_class(build_unet(default if unet_config is None else unet_config))
