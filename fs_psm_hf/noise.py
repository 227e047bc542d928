"""Gaussian draws that are a function of (seed, image, sample) and of nothing else.

Chunking, batching, resuming and the number of processes cannot change them. On the CPU the draw is numpy's
counter-based Philox with key (seed, image) and counter (sample); elsewhere it is the device's own counter-based
generator, seeded by a 64-bit hash of the three. Kinds of devices give different, equally distributed noise.
"""

import hashlib
import operator
import secrets

import numpy as np
import torch


MAX_ID = 2**63 - 1


def resolve_seed(generator):
    """The 63-bit seed of one call.

    Args:
        generator (`torch.Generator`, `int` or `None`): a generator gives its next draw (and advances), an integer is
            the seed itself, `None` asks the operating system, so that nobody can predict the noise of a served
            model, not even after `torch.manual_seed` (theory.md "Floating point").

    Raises:
        TypeError: another kind of value.
        ValueError: a negative integer or one beyond 63 bits.
    """
    if generator is None:
        return secrets.randbits(63)
    if isinstance(generator, torch.Generator):
        return torch.randint(MAX_ID, (1,), generator=generator, device=generator.device).item()
    if isinstance(generator, int) and not isinstance(generator, bool):
        if not 0 <= generator <= MAX_ID:
            raise ValueError(f"`generator` as a seed must be in [0, 2**63 - 1], got {generator}")
        return generator
    raise TypeError(f"`generator` must be a torch.Generator, an int or None, got {type(generator).__name__}")


def resolve_image_ids(image_ids, batch_size):
    """One integer name per image; its position in the batch where none is given."""
    if image_ids is None:
        return list(range(batch_size))
    try:
        ids = [operator.index(i) for i in (image_ids.tolist() if isinstance(image_ids, torch.Tensor) else image_ids)]
    except TypeError as error:
        raise TypeError(f"`image_ids` must be integers, got {image_ids}") from error
    if len(ids) != batch_size:
        raise ValueError(f"`image_ids` must name each of the {batch_size} images, got {len(ids)} ids")
    if min(ids) < 0 or max(ids) > MAX_ID:
        raise ValueError(f"`image_ids` must be in [0, 2**63 - 1], got {ids}")
    return ids


def gaussian_noise(shape, seed, image_ids, first_sample, num_samples, device):
    """Standard normal draws for a rectangle of images × samples.

    Args:
        shape (`tuple[int, ...]`): shape of one draw, such as `(3, height, width)`.
        seed (`int`): from [`resolve_seed`].
        image_ids (`list[int]`): from [`resolve_image_ids`].
        first_sample, num_samples (`int`): samples `first_sample … first_sample + num_samples - 1` of each image.
        device (`torch.device`): where the draws are made.

    Returns:
        `torch.Tensor` of shape `(num_images * num_samples, *shape)`, float32, samples folded after images.
    """
    draws = torch.empty((len(image_ids) * num_samples, *shape), device=device, dtype=torch.float32)
    on_cpu = draws.device.type == "cpu"
    rows = draws.view(len(draws), -1)
    rows = rows.numpy() if on_cpu else rows
    device_generator = None if on_cpu else torch.Generator(device)
    for row in range(len(draws)):
        image, sample = image_ids[row // num_samples], first_sample + row % num_samples
        if on_cpu:
            stream = np.random.Philox(key=[seed, image], counter=[0, 0, 0, sample])
            np.random.Generator(stream).standard_normal(out=rows[row], dtype=np.float32)
        else:
            name = b"".join(value.to_bytes(8, "little") for value in (seed, image, sample))
            digest = hashlib.blake2b(name, digest_size=8).digest()
            device_generator.manual_seed(int.from_bytes(digest, "little", signed=True))
            rows[row].normal_(generator=device_generator)
    return draws
