"""What the paper's tables count: FCS, ACC, ASR and mean judge score, and the size of a change as PSNR."""

import torch
from torch.nn.functional import cosine_similarity


# Section 5.1: a caption keeps its meaning from this score against the reference on, and an attack has succeeded from
# this score against the target on (the latter is M-Attack's own, VILA-Lab/M-Attack@10f346e4).
ACC_THRESHOLD = 0.5
ASR_THRESHOLD = 0.3


def _same_shape(first, second, names):
    for name, value in zip(names, (first, second), strict=True):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}")
    if first.shape != second.shape or first.ndim < 2 or first.numel() == 0:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must have the same shape (batch_size, ...), got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )


def fcs(clean_features, adversarial_features):
    """Feature cosine similarity (section 5.1): of the clean and the adversarial image under *the same* encoder.

    A row of a table compares the smoothed encoder with itself, never with the plain one. For a smoothed encoder a
    feature is what it serves, the mean over its noisy draws; fix the noise with `generator` and `image_ids`, or two
    calls on one image already differ.

    Args:
        clean_features, adversarial_features (`torch.Tensor` of shape `(batch_size, ...)`): one feature per image; tokens
            are flattened to one vector.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: cosines, float32, on the CPU.

    Raises:
        TypeError: no tensors.
        ValueError: other shapes than each other's, not finite, or a feature of length 0.
    """
    names = ("clean_features", "adversarial_features")
    _same_shape(clean_features, adversarial_features, names)
    flat = [value.detach().float().flatten(1).cpu() for value in (clean_features, adversarial_features)]
    for name, value in zip(names, flat, strict=True):
        lengths = value.norm(dim=1)
        if not torch.isfinite(lengths).all() or not lengths.all():
            raise ValueError(f"`{name}` must be finite and not all zero, got lengths {lengths.tolist()}")
    return cosine_similarity(*flat, dim=1)


def psnr(clean, adversarial):
    """Peak signal-to-noise ratio of a change, in decibels; infinite where nothing changed.

    Args:
        clean, adversarial (`torch.Tensor` of shape `(batch_size, 3, height, width)`): [0, 1] pixels.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: -10 log10(mean squared difference), float64, on the CPU.

    Raises:
        TypeError: no tensors.
        ValueError: other shapes than each other's, or pixels outside [0, 1].
    """
    _same_shape(clean, adversarial, ("clean", "adversarial"))
    for name, images in (("clean", clean), ("adversarial", adversarial)):
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):  # also where they are NaN
            raise ValueError(f"`{name}` must be in [0, 1], got values in [{low:g}, {high:g}]")
    squared = (clean.detach().double() - adversarial.detach().double()).square().flatten(1).mean(1)
    return -10 * squared.log10().cpu()


def rate(scores, threshold):
    """The share of scores that reach `threshold`; `None` scores, which no judge could give, are left out.

    Args:
        scores (`list[float | None]`): in [0, 1].
        threshold (`float`): in [0, 1], itself enough.

    Returns:
        `float` or `None`: in [0, 1]; `None` where there is no score at all.
    """
    judged = [score for score in scores if score is not None]
    return sum(score >= threshold for score in judged) / len(judged) if judged else None


def mean_score(scores):
    """The mean of the scores that are there, `None` where none is; the paper's figures in parentheses."""
    judged = [score for score in scores if score is not None]
    return sum(judged) / len(judged) if judged else None
