"""The two pixel scales outside a purifier: normalised `pixel_values`, and [0, 1] images, where σ and ε live."""

import math

import torch


def channel_tensor(values, like):
    """Per-channel constants as a tensor of shape `(3, 1, 1)` on the device and in the dtype of `like`.

    The copy to a device makes the host wait: once per call, not once per pass.
    """
    return like.new_tensor(values).view(-1, 1, 1)


def to_unit(pixel_values, mean, std):
    """Undo the image processor's normalisation.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised pixels.
        mean, std (`torch.Tensor` of shape `(3, 1, 1)`): the processor's `image_mean` and `image_std`, in [0, 1] units.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, height, width)`: pixels in [0, 1].
    """
    return pixel_values * std + mean


def from_unit(images, mean, std):
    """Normalise [0, 1] images of shape `(batch_size, 3, height, width)` as the image processor does."""
    return (images - mean) / std


def check_statistics(mean, std):
    """Raise `ValueError` unless `mean` and `std` are three finite numbers each and `std` is positive."""
    for name, values in (("image_mean", mean), ("image_std", std)):
        if values is None:
            raise ValueError(
                f"`{name}` is missing: give `processor=` or `image_mean=` and `image_std=`, the values the vision tower "
                "was trained with; they are never assumed."
            )
        good = isinstance(values, (list, tuple)) and len(values) == 3
        good = good and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        if not good or (name == "image_std" and min(values) <= 0):
            allowed = "three finite numbers" + (" > 0" if name == "image_std" else "")
            raise ValueError(f"`{name}` must be {allowed}, got {values}")


def read_statistics(processor):
    """`image_mean` and `image_std` of an image processor, or of a processor that has one.

    Raises:
        ValueError: it does not normalise, or does not scale pixels to [0, 1] first.
    """
    processor = getattr(processor, "image_processor", processor)
    factor = getattr(processor, "rescale_factor", 1 / 255)
    rescales = getattr(processor, "do_rescale", True) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
    if not (rescales and getattr(processor, "do_normalize", True)):
        raise ValueError(
            "`processor` must scale pixels by 1/255 and then normalise them, got "
            f"do_rescale={getattr(processor, 'do_rescale', True)}, rescale_factor={factor}, "
            f"do_normalize={getattr(processor, 'do_normalize', True)}"
        )
    return getattr(processor, "image_mean", None), getattr(processor, "image_std", None)


def check_pixel_values(pixel_values):
    """Refuse what would silently become a wrong certificate.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised pixels.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: not four dimensions, not three channels, empty, NaN or Inf.
    """
    if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
        given = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise TypeError(f"`pixel_values` must be a floating point tensor, got {given}")
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(f"`pixel_values` must have shape (batch_size, 3, height, width), got {shape}")
    if not torch.isfinite(pixel_values).all():
        raise ValueError("`pixel_values` must be finite, got NaN or Inf")
