from types import SimpleNamespace

import pytest
import torch

from fs_psm_hf.smoothing import RunningFeature, default_batch_size, plan_passes, vector_norm


@pytest.mark.parametrize(("images", "samples", "limit"), [(1, 1, 1), (3, 4, 8), (3, 5, 8), (2, 10, 4), (5, 3, 100)])
def test_passes_cover_every_draw_once_within_the_limit(images, samples, limit):
    seen = []
    for chosen, numbers in plan_passes(images, samples, limit, first_sample=7):
        assert (chosen.stop - chosen.start) * len(numbers) <= limit
        seen += [(image, sample) for image in range(images)[chosen] for sample in numbers]
    assert sorted(seen) == [(i, 7 + s) for i in range(images) for s in range(samples)]


def test_images_share_a_pass():
    assert len(list(plan_passes(8, 4, 32))) == 1


def test_default_batch_size_falls_with_the_image():
    assert default_batch_size(224, 224, "cpu") == 8
    assert default_batch_size(224, 224, "cpu", SimpleNamespace(patch=1)) == 2
    assert default_batch_size(224, 224, "cpu", SimpleNamespace(patch=2)) == 8
    assert default_batch_size(224, 224, "cuda") == 64
    assert default_batch_size(4096, 4096, "cpu") == 1
    assert default_batch_size(32, 32, "cpu") == 64
    assert default_batch_size(32, 32, "cuda") == 512


def running_mean(draws, parts, unit=True, first_token=0):
    """Aggregate (B, n, L, D) draws fed in `parts` passes."""
    count, samples = draws.shape[:2]
    feature = RunningFeature(count, samples, unit, first_token)
    for chunk in draws.split(-(-samples // parts), 1):
        feature.add(slice(0, count), [chunk.flatten(0, 1)])
    return feature.result(torch.float32)[0]


@pytest.mark.parametrize("parts", [1, 2, 6])
@pytest.mark.parametrize("first_token", [0, 1])
def test_unit_mean_by_definition(parts, first_token):
    draws = torch.randn(2, 6, 5, 4, dtype=torch.float64) * 7
    chosen = draws[:, :, first_token:].flatten(2)
    lengths = chosen.norm(dim=-1)
    direction = (draws / lengths[..., None, None]).mean(1)
    direction = direction / direction[:, first_token:].flatten(1).norm(dim=-1)[:, None, None]
    expected = direction * lengths.mean(1)[:, None, None]
    torch.testing.assert_close(
        running_mean(draws.float(), parts, True, first_token), expected.float(), rtol=2e-5, atol=1e-5
    )


def test_plain_mean_by_definition():
    draws = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(running_mean(draws, 3, unit=False), draws.mean(1))


def test_layers_share_one_length():
    first, second = torch.randn(2, 6, 3, 4), torch.randn(2, 6, 3, 4)
    feature = RunningFeature(2, 6)
    feature.add(slice(0, 2), [first.flatten(0, 1), second.flatten(0, 1)])
    separate = torch.cat(feature.result(torch.float32), -1)
    torch.testing.assert_close(separate, running_mean(torch.cat([first, second], -1), 1))


def test_one_draw_is_kept_to_the_bit():
    draw = torch.randn(2, 1, 5, 4)
    assert torch.equal(running_mean(draw, 1), draw[:, 0])


def test_low_precision_draws_are_summed_in_float32():
    draws = torch.full((1, 4096, 1, 4), 1.0, dtype=torch.bfloat16)
    # A bfloat16 running sum of ones stops at 256.
    assert torch.equal(running_mean(draws, 4096, unit=False), torch.ones(1, 1, 4))


def test_norm_counts_the_chosen_tokens():
    tokens = torch.randn(3, 5, 4)
    torch.testing.assert_close(vector_norm([tokens], 2), tokens[:, 2:].flatten(1).norm(dim=1))
