"""The engine: which draws share a pass, and running means that never hold more than one pass."""

import torch


# Most noisy images, and most of their pixels, in one pass when nobody says otherwise. On a CPU larger passes fall out of
# its caches, and their activations are fetched from the system anew in every layer (`heap.py`): it is the U-Net's that
# count, and a U-Net that works on patches has fewer (`examples/benchmarks/engine.py`).
_MOST_ROWS = {"cpu": 64}
_MOST_PIXELS = {"cpu": 2 * 224 * 224}
_MOST_ROWS_ACCELERATOR = 512
_MOST_PIXELS_ACCELERATOR = 64 * 224 * 224


def default_batch_size(height, width, device, purifier=None):
    """Noisy images per pass for images of this size on this device, through this purifier."""
    kind = torch.device(device).type
    pixels = _MOST_PIXELS.get(kind, _MOST_PIXELS_ACCELERATOR)
    if kind == "cpu":
        pixels *= (2 if purifier is None else getattr(purifier, "patch", 1)) ** 2
    return max(1, min(_MOST_ROWS.get(kind, _MOST_ROWS_ACCELERATOR), pixels // (height * width)))


def plan_passes(num_images, num_samples, max_batch_size, first_sample=0):
    """Rectangles of images × samples, each of at most `max_batch_size` noisy images.

    Several images share a pass when all their samples fit; otherwise one image's samples are split. A rectangle
    lets the noise be added by broadcasting, with no repeated copy of the images.

    Yields:
        `tuple[slice, range]`: the images of the pass and their sample numbers.
    """
    images_per_pass = max(1, max_batch_size // num_samples)
    samples_per_pass = min(num_samples, max_batch_size)
    last = first_sample + num_samples
    for image in range(0, num_images, images_per_pass):
        images = slice(image, min(image + images_per_pass, num_images))
        for sample in range(first_sample, last, samples_per_pass):
            yield images, range(sample, min(sample + samples_per_pass, last))


def vector_norm(tensors, first_token=0):
    """Length of the vector made of all `tensors` of one draw, from token `first_token` on, in float32.

    Args:
        tensors (`list[torch.Tensor]`): each of shape `(rows, tokens, width)` or `(rows, width)`.

    Returns:
        `torch.Tensor` of shape `(rows,)`.
    """
    squares = 0
    for tensor in tensors:
        chosen = tensor[:, first_token:] if tensor.ndim == 3 else tensor
        squares = squares + chosen.float().flatten(1).square().sum(1)
    return squares.sqrt()


def _scaled(tensor, factors):
    """`tensor` times one float32 factor per row."""
    return tensor.float() * factors.view(-1, *[1] * (tensor.ndim - 1))


class RunningFeature:
    """Running mean over the draws of one feature, which may be spread over several tensors (a list of layers).

    With `unit` (theory.md "Direction and length") each draw is divided by its length over the chosen tokens, and
    the mean direction, renormalised, is multiplied by the mean length. Without it the raw features are averaged.
    Sums are float32 whatever the dtype of the draws.
    """

    def __init__(self, num_images, num_samples, unit=True, first_token=0):
        self.num_images, self.num_samples = num_images, num_samples
        self.unit, self.first_token = unit, first_token
        self.single = None
        self.sums = None
        self.lengths = None

    def add(self, images, tensors):
        """Count the draws of one pass.

        Args:
            images (`slice`): the images of the pass.
            tensors (`list[torch.Tensor]`): each of shape `(len(images) * samples, …)`, samples folded after images.
        """
        if any(tensor.ndim == 3 and tensor.shape[1] <= self.first_token for tensor in tensors):
            raise ValueError(
                f"`first_token` must be below the number of tokens, {tensors[0].shape[1]}, got {self.first_token}"
            )
        if self.num_samples == 1:
            # One draw is its own mean: kept as it is, to the bit.
            self.single = self.single or [[] for _ in tensors]
            for kept, tensor in zip(self.single, tensors, strict=True):
                kept.append(tensor)
            return
        count = images.stop - images.start
        if self.sums is None:
            self.sums = [t.new_zeros((self.num_images, *t.shape[1:]), dtype=torch.float32) for t in tensors]
            self.lengths = tensors[0].new_zeros(self.num_images, dtype=torch.float32)
        if self.unit:
            lengths = vector_norm(tensors, self.first_token)  # (b*m,)
            self.lengths[images] += lengths.view(count, -1).sum(1)
            weights = 1 / lengths.clamp_min(torch.finfo(torch.float32).tiny)
        for total, tensor in zip(self.sums, tensors, strict=True):
            draws = _scaled(tensor, weights) if self.unit else tensor.float()
            total[images] += draws.view(count, -1, *tensor.shape[1:]).sum(1)  # (b, …)

    def result(self, dtype):
        """The aggregated tensors, each of shape `(num_images, …)`, in `dtype`."""
        if self.num_samples == 1:
            return [(torch.cat(kept) if len(kept) > 1 else kept[0]).to(dtype) for kept in self.single]
        means = [total / self.num_samples for total in self.sums]
        if self.unit:
            lengths = vector_norm(means, self.first_token).clamp_min(torch.finfo(torch.float32).tiny)
            means = [_scaled(mean, self.lengths / self.num_samples / lengths) for mean in means]
        return [mean.to(dtype) for mean in means]
