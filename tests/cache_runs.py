"""What the tests of the feature cache share."""

import torch
from tiny_models import smoothed_tower

from fs_psm_hf.feature_cache import FeatureCache


N = 3  # draws of each image, those of `smoothed_tower`


def cached_tower(kind="clip", psm=None, max_images=8, **options):
    tower = smoothed_tower(kind, psm, **options)
    tower.feature_cache = FeatureCache(max_images)
    return tower


def passes(tower):
    """Noisy images that went through the wrapped tower, as a list that grows."""
    rows = []
    inner = getattr(tower.vision_tower, "vision_model", tower.vision_tower)
    inner.embeddings.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    return rows


def tensors(output):
    found = {}
    for name, value in output.items():
        for i, entry in enumerate(value if isinstance(value, tuple) else [value]):
            if entry is not None:
                found[name, i] = entry
    return found


def assert_equal(output, expected):
    assert type(output) is type(expected)
    output, expected = tensors(output), tensors(expected)
    assert output.keys() == expected.keys()
    for place, value in expected.items():
        assert torch.equal(output[place], value), place


# What it answers --------------------------------------------------------------------------------------------------
