"""Balls around images in [0, 1]: steepest steps, projections, random starts and rounding to 8 bits that stays inside."""

import torch

from ..noise import gaussian_noise
from .streams import derive_seed


NORMS = ("linf", "l2")
# The ball in floating point is a hair smaller, so that rounding stays inside.
_INSIDE = 1.0 - 1e-6
# In grey levels: float32 pixels that came from 8 bits are this near to whole numbers.
_LEVEL_ROUNDING = 1e-4
_HALVINGS = 24


def lengths(perturbation, norm):
    """Length of each perturbation in [0, 1]-pixel units, `(batch_size,)`, float64."""
    flat = perturbation.double().flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def steepest(gradient, norm):
    """The direction of length 1 in which a linear function rises most; 0 where the gradient is 0."""
    if norm == "linf":
        return gradient.sign()
    # Scaled first: the squares of a very small gradient underflow.
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    scaled = gradient / torch.where(largest > 0, largest, 1.0)
    length = scaled.square().sum((1, 2, 3), keepdim=True).sqrt()
    return scaled / torch.where(length > 0, length, 1.0)


def project(adversarial, images, epsilon, norm):
    """Nearest point of the ball around `images`, then of [0, 1].

    Args:
        adversarial, images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): float32, `images` in [0, 1].
        epsilon (`float`): radius in [0, 1]-pixel units.
        norm (`str`): `"linf"` or `"l2"`.
    """
    if norm == "linf":
        return adversarial.maximum(images - epsilon).minimum(images + epsilon).clamp(0, 1)
    perturbation = adversarial - images
    length = perturbation.square().sum((1, 2, 3), keepdim=True).sqrt()
    shrink = (epsilon * _INSIDE / length.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1)
    # Clipping to [0, 1], where the images are, only shortens.
    return (images + perturbation * shrink).clamp(0, 1)


def random_start(images, epsilon, norm, seed, image_ids):
    """A random point of each ball: uniform in l∞, on the sphere in l2, then clipped to [0, 1]."""
    shape = tuple(images.shape[1:])
    draws = gaussian_noise(shape, derive_seed(seed, "start"), image_ids, 0, 1, images.device)
    if norm == "linf":
        draws = 2 * torch.special.ndtr(draws) - 1
        return project(images + epsilon * draws, images, epsilon, norm)
    return project(images + epsilon * steepest(draws, norm), images, epsilon, norm)


def is_eight_bit(images):
    """Whether every pixel is a whole number of grey levels (1/255), up to the rounding of float32."""
    levels = images.double() * 255
    return bool(((levels - levels.round()).abs() <= _LEVEL_ROUNDING).all())


def round_eight_bit(adversarial, images, epsilon, norm):
    """The adversarial images as an 8-bit file holds them, still inside the ball.

    In l∞ each pixel goes to the nearest grey level that its interval allows. In l2, where `images` must be 8-bit
    themselves, the perturbation is rounded, and shortened first by as little as needed where rounding left the ball.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, height, width)`, float32: multiples of 1/255 in [0, 1].
    """
    clean, moved = images.double() * 255, adversarial.double() * 255
    radius = epsilon * 255
    if norm == "linf":
        low, high = (clean - radius - _LEVEL_ROUNDING).ceil(), (clean + radius + _LEVEL_ROUNDING).floor()
        return (moved.round().maximum(low).minimum(high).clamp(0, 255) / 255).float()
    clean, perturbation = clean.round(), moved - clean
    inside = torch.zeros(len(images), 1, 1, 1, dtype=torch.float64, device=images.device)
    outside = torch.ones_like(inside)

    def fits(share):
        return (share * perturbation).round().square().sum((1, 2, 3), keepdim=True).sqrt() <= radius

    whole = fits(outside)
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        good = fits(middle)
        inside, outside = torch.where(good, middle, inside), torch.where(good, outside, middle)
    rounded = (torch.where(whole, 1.0, inside) * perturbation).round()
    return ((clean + rounded).clamp(0, 255) / 255).float()
