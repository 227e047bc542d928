"""The three pixel scales: normalised `pixel_values`, [0, 1] images (where σ and ε live), [-1, 1] images (diffusion)."""

import math

import torch


def channel_view(values, like):
    """Per-channel constants as a tensor of shape `(3, 1, 1)` on the device and in the dtype of `like`."""
    return like.new_tensor(values).view(-1, 1, 1)


def to_unit(pixel_values, mean, std):
    """Undo the image processor's normalisation.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised pixels.
        mean, std (`list[float]`): the processor's `image_mean` and `image_std`, in [0, 1] units.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, height, width)`: pixels in [0, 1].
    """
    return pixel_values * channel_view(std, pixel_values) + channel_view(mean, pixel_values)


def from_unit(images, mean, std):
    """Normalise [0, 1] images of shape `(batch_size, 3, height, width)` as the image processor does."""
    return (images - channel_view(mean, images)) / channel_view(std, images)


def to_symmetric(images):
    """[0, 1] → [-1, 1]; noise of standard deviation σ becomes 2σ."""
    return images * 2 - 1


def from_symmetric(images):
    """[-1, 1] → [0, 1]."""
    return (images + 1) / 2


def check_statistics(mean, std):
    """Raise `ValueError` unless `mean` and `std` are three finite numbers each and `std` is positive."""
    for name, values in (("image_mean", mean), ("image_std", std)):
        if values is None:
            raise ValueError(
                f"`{name}` is missing: give `processor=` or `image_mean=` and `image_std=`, the values the vision tower "
                "was trained with; they are never assumed."
            )
        good = len(values) == 3 and all(math.isfinite(v) for v in values)
        if not good or (name == "image_std" and min(values) <= 0):
            allowed = "three finite numbers" + (" > 0" if name == "image_std" else "")
            raise ValueError(f"`{name}` must be {allowed}, got {list(values)}")


def check_pixel_values(pixel_values, image_size=None):
    """Refuse what would silently become a wrong certificate.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised pixels.
        image_size (`int` or pair of `int`, *optional*): the only height and width allowed.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: not four dimensions, not three channels, empty, another size, NaN or Inf.
    """
    if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
        given = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise TypeError(f"`pixel_values` must be a floating point tensor, got {given}")
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(f"`pixel_values` must have shape (batch_size, 3, height, width), got {shape}")
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if shape[2:] != size:
            raise ValueError(
                f"`pixel_values` must be {size[0]}x{size[1]} pixels for this tower, got {shape[2]}x{shape[3]}"
            )
    if not torch.isfinite(pixel_values).all():
        raise ValueError("`pixel_values` must be finite, got NaN or Inf")
