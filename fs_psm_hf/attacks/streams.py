"""Random numbers of an attack: functions of (seed, image, step) and of nothing else, whatever the batch or the device."""

import hashlib

import torch

from ..noise import MAX_ID, gaussian_noise


def derive_seed(seed, *names):
    """A 63-bit seed for one purpose of a run, so that crops, noise and starts do not share their draws.

    Args:
        seed (`int`): of the run, from `resolve_seed`.
        names (`str` or `int`): the purpose.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & MAX_ID


def uniform_numbers(shape, seed, image_ids, number):
    """Numbers in [0, 1] for each image, made on the CPU so that crops do not depend on the device.

    Returns:
        `torch.Tensor` of shape `(num_images, *shape)`, float64.
    """
    draws = gaussian_noise(shape, seed, image_ids, number, 1, torch.device("cpu"))
    return torch.special.ndtr(draws.double())
