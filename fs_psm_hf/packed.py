"""Vision models that answer a batch of images with one row of all their patches, as Pixtral does for any image size.

Images of several sizes come padded, with their `image_sizes`. Each is smoothed at its own size: its noise, its purified
image and the direction of its feature are those it has when it comes alone and unpadded.
"""

from itertools import groupby

import torch
from torch.nn import functional as F

from .smoothing import RunningFeature


# `model_type` of the vision models whose output has shape (1, patches of all images, width).
PACKED = ("pixtral",)
# Their hosts say by a mask which pixels are padding; a certificate has no mask.
_MASKED = ("idefics2_vision", "idefics3_vision", "smolvlm_vision")


def is_packed(vision_config):
    """Whether the vision model of this configuration packs the patches of a batch into one row."""
    return vision_config.model_type in PACKED


def read_sizes(image_sizes, pixel_values, patch_size):
    """Height and width of each image of a padded batch.

    Args:
        image_sizes (`torch.Tensor` of shape `(batch_size, 2)`, list of pairs or `None`): as the host gives them, in pixels; the
            size of the batch where `None`.

    Returns:
        `list[tuple[int, int]]`.

    Raises:
        ValueError: not one size per image, or one that is less than a patch or more than the batch.
    """
    count, _, height, width = pixel_values.shape
    if image_sizes is None:
        return [(height, width)] * count
    sizes = [tuple(map(int, size)) for size in image_sizes]
    good = all(len(s) == 2 and patch_size <= s[0] <= height and patch_size <= s[1] <= width for s in sizes)
    if len(sizes) != count or not good:
        raise ValueError(
            f"`image_sizes` must be {count} pairs from one patch, {patch_size}, up to ({height}, {width}), got {sizes}"
        )
    return sizes


def check_unpadded(pixel_values, vision_config):
    """Raise `ValueError` where an image of a tower whose images come padded ends in rows or columns of zeros.

    The noise of a certificate is the image's alone.
    """
    if vision_config.model_type not in (*PACKED, *_MASKED):
        return
    for name, edge in (("row", pixel_values[..., -1, :]), ("column", pixel_values[..., -1])):
        if not edge.flatten(1).any(1).all():
            raise ValueError(
                f"`pixel_values` must hold images without padding, got one whose last {name} is all zero: crop it to its "
                "own size, and ask for images of one size at a time"
            )


def equal_runs(sizes, images):
    """The slice `images` cut into slices of neighbours of one size."""
    start = images.start
    for _, group in groupby(sizes[images]):
        stop = start + len(list(group))
        yield slice(start, stop)
        start = stop


def pack(runs, canvas):
    """Pad images of several sizes to one and tell their sizes, as the host does.

    Args:
        runs (`list[torch.Tensor]`): each of shape `(rows, 3, height, width)`.
        canvas (`tuple[int, int]`): height and width of the batch.

    Returns:
        `tuple[torch.Tensor, list[tuple[int, int]]]`: images of shape `(all rows, 3, *canvas)`, and the size of each.
    """
    padded = [F.pad(run, (0, canvas[1] - run.shape[3], 0, canvas[0] - run.shape[2])) for run in runs]
    sizes = [tuple(run.shape[2:]) for run in runs for _ in range(len(run))]
    return torch.cat(padded), sizes


def unpack(output, runs, patch_size):
    """Cut a packed output into ordinary ones, one per run of images of one size.

    Args:
        output (`ModelOutput`): its tensors have shape `(1, patches of all rows, width)`.
        runs (`list[torch.Tensor]`): the images given to [`pack`].

    Returns:
        `list[ModelOutput]`: tensors of shape `(rows, patches of one row, width)`.
    """
    rows = [len(run) for run in runs]
    lengths = [len(run) * (run.shape[2] // patch_size) * (run.shape[3] // patch_size) for run in runs]

    def cut(tensor):
        pieces = tensor[0].split(lengths)
        return [piece.view(count, -1, piece.shape[-1]) for count, piece in zip(rows, pieces, strict=True)]

    fields = [{} for _ in runs]
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            entries = cut(value)
        else:
            states = [[None] * len(runs) if state is None else cut(state) for state in value]
            entries = [tuple(state[i] for state in states) for i in range(len(runs))]
        for own, entry in zip(fields, entries, strict=True):
            own[name] = entry
    return [type(output)(**own) for own in fields]


class PackedFeature:
    """[`RunningFeature`] of images that differ in their number of patches: one for each image, joined in one row."""

    def __init__(self, num_images, num_samples, unit=True, first_token=0):
        self.features = [RunningFeature(1, num_samples, unit, first_token) for _ in range(num_images)]

    def add(self, images, tensors):
        """As [`RunningFeature.add`], for images of one size."""
        count = images.stop - images.start
        split = [tensor.view(count, -1, *tensor.shape[1:]) for tensor in tensors]  # (images, samples, tokens, width)
        for i, feature in enumerate(self.features[images]):
            feature.add(slice(0, 1), [tensor[i] for tensor in split])

    def result(self, dtype):
        """The aggregated tensors, each of shape `(1, patches of all images, width)`, in `dtype`."""
        results = zip(*(feature.result(dtype) for feature in self.features), strict=True)
        return [torch.cat(parts, 1) for parts in results]
