"""The losses of the two stages (theory.md "Losses", paper eq. 7-13), in float32.

The paper states no reductions: everything here is a mean, over images, draws, pixels, channels. Its similarities (eq. 8 and
11) are maximised, so their losses are 1 − cos. A loss over n₀ draws is the mean of the losses of single draws, so it can be
differentiated draw by draw and memory does not grow with n₀.
"""

import torch
import torch.distributed
from torch.nn import functional as F

from ..noise import gaussian_noise
from ..purifier import DiffusionPurifier


def cosine_loss(features, anchors):
    """1 − mean cosine: l_rb of both stages.

    Args:
        features, anchors (`torch.Tensor` of shape `(batch_size, ...)`): certified features, flattened here.
    """
    return 1 - F.cosine_similarity(features.float().flatten(1), anchors.float().flatten(1), dim=1).mean()


def reconstruction_loss(purified, images):
    """l_mse: mean squared error of [0, 1] images, in the [-1, 1] scale that the U-Net sees, so four times that of [0, 1]."""
    return 4 * (purified.float() - images.float()).square().mean()


def diffusion_levels(purifier, uniform, sigma_range):
    """Noise levels for l_diff, in [0, 1] pixels: of a random timestep, or log-uniform around the levels that are served.

    Args:
        purifier ([`UNetPurifier`]): a [`DiffusionPurifier`] has a schedule, whose timesteps are equally likely.
        uniform (`torch.Tensor` of shape `(batch_size,)`): random numbers in [0, 1).
        sigma_range (pair of `float`): smallest and largest σ that is trained for; the light U-Net is also shown half of
            the one and 1.5 times the other.
    """
    if isinstance(purifier, DiffusionPurifier):
        levels = torch.tensor(purifier.noise_levels, device=uniform.device)
        # A random number just below 1 is 1 in float32.
        return levels[(uniform * len(levels)).long().clamp(max=len(levels) - 1)] / 2
    low, high = 0.5 * sigma_range[0], 1.5 * sigma_range[1]
    return low * (high / low) ** uniform


def diffusion_loss(denoised, images, noise, levels, purifier):
    """l_diff: the ε-prediction error of the network at the noise of `levels`.

    A diffusion purifier's answer is images + σn − σε̂, so ε̂ − n = (images − denoised)/σ: the mean of its square is the
    usual loss. The light U-Net predicts, by Karras et al. (2022), a target of unit variance scaled by c_out; its error is
    weighted by 1/c_out², their λ(σ), for the same reason.

    Args:
        denoised (`torch.Tensor` of shape `(batch_size, 3, height, width)`): `denoise(images + levels·noise, levels)`.
        levels (`torch.Tensor` of shape `(batch_size,)`): noise levels in [0, 1] pixels, > 0.
    """
    if isinstance(purifier, DiffusionPurifier):
        scale = levels
    else:
        scale = purifier.scalings(levels)[1] / 2
    error = (denoised.float() - images.float()) / scale[:, None, None, None]
    return error.square().mean()


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes; what each does with it comes back to each."""

    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total


def _global_mean(values):
    """Mean over all processes, with a gradient; equal numbers everywhere."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return _SumOfAll.apply(values) / torch.distributed.get_world_size()
    return values


def statistics_loss(mapped, clean, reference_norm):
    """l_stats (eq. 12): squared differences of each channel's mean and standard deviation, averaged over channels.

    Means and deviations are over the batch (of all processes) and the tokens of one draw, in units of the clean token's
    length: without them, a tower with tokens of length 50 would train nothing but its statistics.

    Args:
        mapped, clean (`torch.Tensor` of shape `(batch_size, tokens, hidden_size)` or `(batch_size, hidden_size)`).
        reference_norm (`torch.Tensor` of shape `()`): r, the mapper's `token_norm`.
    """
    found = []
    for features in (mapped, clean):
        tokens = (features.float() / reference_norm).reshape(-1, features.shape[-1])
        mean = _global_mean(tokens.mean(0))
        variance = _global_mean((tokens - mean).square().mean(0))
        # The square root has no slope at zero, where one lone token has its deviation.
        found.append((mean, (variance + 1e-12).sqrt()))
    (mean, deviation), (clean_mean, clean_deviation) = found
    return ((mean - clean_mean).square() + (deviation - clean_deviation).square()).mean()


def identity_loss(mapper, features, reference_norm):
    """l_id = ‖M(z̃, 0)‖² (eq. 12), a mean over tokens in units of r²; zero by construction for [`SmoothnessMapper`]."""
    update = mapper(features, 0.0).float() / reference_norm
    return update.square().sum(-1).mean()


def draw_noise(images, seed, names, draw):
    """Unit noise of draw number `draw` of each image, `(batch_size, 3, height, width)`: a function of those numbers alone.

    Args:
        names (`list[int]`): position of each image in the whole run, whatever the process and the batch it is in.
    """
    return gaussian_noise(tuple(images.shape[1:]), seed, names, draw, 1, images.device)
