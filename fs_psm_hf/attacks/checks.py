"""What is checked before, during and after an attack, so that a weak or wrong one cannot pass for a robust model."""

import math
import warnings

import torch

from .ball import NORMS, is_eight_bit, lengths


# Float32 rounding of pixels and of their differences.
_ROUNDING = 1e-6
LEAST_DRAWS = 8
_LEVEL = 1 / 255
# Share of the largest feature by which two answers to one image may differ: an accelerator's sums may change their order.
_SAME = 1e-3


class AttackWarning(UserWarning):
    """An attack is weaker than it looks."""


def check_images(images, name):
    """Raise unless `images` are float32 pixels in [0, 1] of shape `(batch_size, 3, height, width)`.

    Raises:
        TypeError: no float32 tensor.
        ValueError: another shape, NaN, infinite or outside [0, 1].
    """
    if not isinstance(images, torch.Tensor) or images.dtype != torch.float32:
        given = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"`{name}` must be a float32 tensor of pixels in [0, 1], got {given}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"`{name}` must have shape (batch_size, 3, height, width), got {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError(f"`{name}` must be finite, got NaN or Inf")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(f"`{name}` must be pixels in [0, 1], got {low:.4g} to {high:.4g}")


def check_targets(images, targets, method):
    """Raise `ValueError` or `TypeError` unless there is a fitting target for each image, or none is wanted."""
    if not method.targeted:
        if targets is not None:
            raise ValueError(f"`targets` must be None for the untargeted method {method.name!r}")
        return
    if targets is None:
        raise ValueError(f"`targets` must be given for the targeted method {method.name!r}")
    check_images(targets, "targets")
    if len(targets) != len(images):
        raise ValueError(f"`targets` must hold one image for each of the {len(images)} images, got {len(targets)}")
    if targets.shape != images.shape:
        raise ValueError(
            f"`targets` must have the size of the images, {tuple(images.shape[2:])}, got {tuple(targets.shape[2:])}"
        )


def check_ball(images, epsilon, norm, eight_bit):
    """Raise `ValueError` unless the ball is one that an attack can be made in."""
    if norm not in NORMS:
        raise ValueError(f"`norm` must be 'linf' or 'l2', got {norm!r}")
    largest = 1.0 if norm == "linf" else math.sqrt(images[0].numel())
    good = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool) and math.isfinite(epsilon)
    if not good or not 0 < epsilon <= largest:
        raise ValueError(
            f"`epsilon` must be in (0, {largest:.4g}], in [0, 1]-pixel units of {norm}, since no image lies further, "
            f"got {epsilon!r}"
        )
    if eight_bit and norm == "linf" and epsilon < _LEVEL - _ROUNDING:
        raise ValueError(
            f"`epsilon` must be at least 1/255 with `eight_bit=True`, or nothing can change, got {epsilon}"
        )
    if eight_bit and norm == "l2" and not is_eight_bit(images):
        raise ValueError(
            "`images` must be multiples of 1/255 for `eight_bit=True` in an l2 ball, got others: rounding alone would leave "
            "the ball"
        )


def check_adversarial(images, adversarial, epsilon, norm):
    """Raise `ValueError` unless `adversarial` lies in the ball around `images` and in [0, 1].

    Args:
        images, adversarial (`torch.Tensor` of shape `(batch_size, 3, height, width)`): float32 in [0, 1].
        epsilon (`float`): radius in [0, 1]-pixel units; 1e-6 more is allowed for the rounding of float32.
        norm (`str`): `"linf"` or `"l2"`.
    """
    if norm not in NORMS:
        raise ValueError(f"`norm` must be 'linf' or 'l2', got {norm!r}")
    check_images(adversarial, "adversarial")
    if adversarial.shape != images.shape:
        raise ValueError(
            f"`adversarial` must have the shape of the images, {tuple(images.shape)}, got {tuple(adversarial.shape)}"
        )
    found = lengths(adversarial.double() - images.to(adversarial.device).double(), norm)
    allowed = epsilon * (1 + _ROUNDING * (norm == "l2")) + _ROUNDING
    if (found > allowed).any():
        worst = found.argmax().item()
        raise ValueError(
            f"`adversarial` must lie in the {norm} ball of {epsilon:.6g}, got a distance of {found[worst].item():.6g} on "
            f"image {worst}"
        )


def check_encoders(encoders, local):
    """Raise unless the encoders can be attacked together; warn where the attack would be weak."""
    modes = {encoder.mode for encoder in encoders}
    if len(modes) > 1:
        raise ValueError("`encoders` must have one mode, got 'transfer' and 'adaptive'")
    devices = sorted({str(encoder.device) for encoder in encoders})
    if len(devices) > 1:
        raise ValueError(f"`encoders` must be on one device, got {' and '.join(devices)}")
    for encoder in encoders:
        encoder.check(local)
        if any(module.training for module in encoder.tower.modules()):
            raise ValueError("`encoders` must hold models in evaluation mode, got training mode: call `model.eval()`")
        if encoder.sigma > 0 and encoder.draws == 1:
            _warn(
                "`draws=1` on a tower that draws noise: a gradient without expectation over it follows one draw's noise, and "
                "the attack looks weaker than an adaptive one is"
            )
        elif encoder.sigma > 0 and encoder.draws < LEAST_DRAWS:
            _warn(f"`draws` should be at least {LEAST_DRAWS} on a tower that draws noise, got {encoder.draws}")


def check_deterministic(encoders, images, image_ids, seed, local):
    """Warn where a model draws at random by itself: the expectation over our noise does not cover that."""
    for encoder in encoders:
        first, second = (
            encoder.features(images[:1], seed=seed, image_ids=image_ids[:1], draws=range(1), local=local)
            for _ in range(2)
        )
        # A feature that is not finite is judged with the first gradient.
        moved = [(value - second[name]).abs().max() > _SAME * value.abs().max() for name, value in first.items()]
        if any(moved):
            _warn(
                f"`{type(encoder.tower.vision_tower).__name__}` or its purifier answers the same image differently each "
                "time: its randomness is not a noise that the attack averages over"
            )


def check_first_gradient(gradient, values, image_ids):
    """Raise `ValueError` where the first gradient is zero or not finite on an image."""
    finite = torch.isfinite(gradient).flatten(1).all(1) & torch.isfinite(values)
    check_finite(finite, image_ids)
    zero = (gradient == 0).flatten(1).all(1)
    if zero.any():
        raise ValueError(
            f"`encoders` give a gradient that is exactly zero on image {image_ids[zero.int().argmax().item()]}: this attack "
            "would say nothing about robustness (is the target the image itself, or a part a function of steps?)"
        )


def check_finite(finite, image_ids):
    """Raise `ValueError` unless every image's objective and gradient were finite so far."""
    if not finite.all():
        raise ValueError(
            f"`encoders` gave a NaN or infinite feature or gradient on image {image_ids[(~finite).int().argmax().item()]} "
            "(a half-precision overflow?)"
        )


def _warn(message):
    # Past this function, the check and `attack`: at the line of whoever called that.
    warnings.warn(message, AttackWarning, stacklevel=4)
