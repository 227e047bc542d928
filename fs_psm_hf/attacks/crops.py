"""A random crop of its own for each image, resized back to the image's size, differentiable and in two products.

The boxes are those of a random resized crop as M-Attack and FOA-Attack use it (github.com/VILA-Lab/M-Attack@10f346e:
torchvision's `RandomResizedCrop(224, scale=(0.5, 0.9))`, ratio 3/4 to 4/3, bilinear with antialias), which gives a whole
batch one box. Resizing an axis is a matrix, and both axes of a batch are two batched matrix products, whose gradient is
deterministic on an accelerator too.
"""

import math

import torch

from .streams import uniform_numbers


SCALE = (0.5, 0.9)
RATIO = (3 / 4, 4 / 3)
_TRIES = 10


def random_boxes(height, width, seed, image_ids, step, *, scale=SCALE, ratio=RATIO):
    """Boxes of random area and aspect ratio at random places.

    Args:
        height, width (`int`): size of the images in pixels.
        seed (`int`), image_ids (`list[int]`), step (`int`): name the draw of each image.
        scale (`tuple[float, float]`): least and greatest share of the area, uniform between them.
        ratio (`tuple[float, float]`): least and greatest width over height, uniform in its logarithm.

    Returns:
        `torch.Tensor` of shape `(num_images, 4)`, int64 on the CPU: top, left, height and width.
    """
    area, aspect, vertical, horizontal = uniform_numbers((_TRIES, 4), seed, image_ids, step).unbind(-1)  # (B, tries)
    area = (scale[0] + (scale[1] - scale[0]) * area) * (height * width)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * aspect).exp()
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    # The first try that fits; where none does, the largest centred box of an allowed ratio.
    chosen = fits.to(torch.uint8).argmax(1, keepdim=True)
    found = fits.gather(1, chosen)[:, 0]
    centred_width = min(width, round(height * ratio[1]))
    centred_height = min(height, round(width / ratio[0]))
    widths = torch.where(found, widths.gather(1, chosen)[:, 0], float(centred_width))
    heights = torch.where(found, heights.gather(1, chosen)[:, 0], float(centred_height))
    tops = torch.where(found, vertical.gather(1, chosen)[:, 0], 0.5) * (height - heights + found)
    lefts = torch.where(found, horizontal.gather(1, chosen)[:, 0], 0.5) * (width - widths + found)
    # A uniform number of exactly 1 would fall off the end.
    tops, lefts = tops.floor().minimum(height - heights), lefts.floor().minimum(width - widths)
    return torch.stack([tops, lefts, heights, widths], 1).long()


def crop_and_resize(images, boxes):
    """Cut each image's box out and resize it to the image's size, bilinear with antialias.

    Equal to `interpolate(image[box], size, mode="bilinear", antialias=True, align_corners=False)` for each image.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): floating point.
        boxes (`torch.Tensor` of shape `(batch_size, 4)`): top, left, height and width, in pixels.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, height, width)`.
    """
    height, width = images.shape[2:]
    tops, lefts, heights, widths = boxes.to(images.device).unbind(1)
    rows = _resizing(tops, heights, height, images)  # (B, 1, H, H)
    columns = _resizing(lefts, widths, width, images)  # (B, 1, W, W)
    return rows @ images @ columns.mT


def _resizing(starts, lengths, size, like):
    """Matrices `(B, 1, size, size)` that resize `lengths` entries from `starts` on to `size` entries."""
    starts, lengths = (values.to(torch.float64)[:, None, None, None] for values in (starts, lengths))
    places = torch.arange(size, device=like.device, dtype=torch.float64)
    step = lengths / size
    centres = starts + (places[:, None] + 0.5) * step  # (B, 1, size, 1)
    # A triangle of one entry. A box is never shrunk, where antialias would make it wider.
    weights = (1 - (places + 0.5 - centres).abs()).clamp_min(0)
    weights = weights * ((places >= starts) & (places < starts + lengths))
    return (weights / weights.sum(-1, keepdim=True)).to(like.dtype)
