import secrets

import pytest
import torch
from scipy import stats

from fs_psm_hf import noise
from fs_psm_hf.noise import gaussian_noise, resolve_image_ids, resolve_seed


def draws(seed=5, ids=(0, 1), first=0, count=4, shape=(3, 6, 6)):
    return gaussian_noise(shape, seed, list(ids), first, count, torch.device("cpu"))


def test_noise_is_standard_normal_and_independent():
    values = draws(ids=range(8), count=16, shape=(3, 16, 16)).double()
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    flat = values.flatten(1)
    correlation = torch.corrcoef(flat)
    off_diagonal = correlation - torch.eye(len(flat), dtype=torch.float64)
    # 128 rows of 768 values: correlations of independent rows have standard deviation 0.036.
    assert off_diagonal.abs().max() < 0.036 * 5.5


def test_noise_depends_on_seed_image_and_sample_only():
    whole = draws().view(2, 4, 3, 6, 6)
    alone = draws(ids=[1], first=2, count=1)
    assert torch.equal(whole[1, 2], alone[0])
    assert not torch.equal(whole[0, 2], whole[1, 2])
    assert not torch.equal(whole[1, 2], whole[1, 3])
    assert not torch.equal(whole[1, 2], draws(seed=6, ids=[1], first=2, count=1)[0])


def test_the_system_seeds_even_after_manual_seed(monkeypatch):
    monkeypatch.setattr(noise, "secrets", secrets)
    torch.manual_seed(0)
    first = resolve_seed(None)
    torch.manual_seed(0)
    assert resolve_seed(None) != first


def test_a_generator_repeats_and_advances():
    generator = torch.Generator().manual_seed(1)
    first, second = resolve_seed(generator), resolve_seed(generator)
    assert first != second
    assert resolve_seed(torch.Generator().manual_seed(1)) == first
    assert resolve_seed(17) == 17


@pytest.mark.parametrize(
    ("generator", "error"), [(-1, ValueError), (2**63, ValueError), ("a", TypeError), (True, TypeError)]
)
def test_bad_generators_are_named(generator, error):
    with pytest.raises(error, match="`generator`"):
        resolve_seed(generator)


def test_image_ids():
    assert resolve_image_ids(None, 3) == [0, 1, 2]
    assert resolve_image_ids(torch.tensor([5, 9]), 2) == [5, 9]
    with pytest.raises(ValueError, match="2 images, got 1 ids"):
        resolve_image_ids([1], 2)
    with pytest.raises(ValueError, match="image_ids"):
        resolve_image_ids([-1], 1)


@pytest.mark.gpu
def test_noise_on_a_gpu_is_chunk_independent():
    device = torch.device("cuda")
    whole = gaussian_noise((3, 6, 6), 5, [0, 1], 0, 4, device).view(2, 4, 3, 6, 6)
    assert torch.equal(whole[1, 2], gaussian_noise((3, 6, 6), 5, [1], 2, 1, device)[0])
    values = gaussian_noise((3, 64, 64), 5, list(range(8)), 0, 8, device).flatten().cpu().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
