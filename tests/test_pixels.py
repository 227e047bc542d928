import pytest
import torch
from tiny_models import MEAN, STD

from fs_psm_hf.pixels import check_pixel_values, check_statistics, from_symmetric, from_unit, to_symmetric, to_unit


def test_normalisation_is_the_image_processors():
    images = torch.rand(2, 3, 5, 7)
    expected = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    torch.testing.assert_close(from_unit(images, MEAN, STD), expected)
    torch.testing.assert_close(to_unit(expected, MEAN, STD), images)


def test_symmetric_scale_doubles_noise():
    images, noise = torch.rand(1, 3, 4, 4), torch.randn(1, 3, 4, 4) * 0.25
    torch.testing.assert_close(to_symmetric(images + noise) - to_symmetric(images), 2 * noise)
    torch.testing.assert_close(from_symmetric(to_symmetric(images)), images)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "torch.uint8"),
        ([[1.0]], TypeError, "list"),
        (torch.zeros(1, 4, 4, 4), ValueError, r"\(1, 4, 4, 4\)"),
        (torch.zeros(3, 4, 4), ValueError, r"\(3, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), ValueError, r"\(0, 3, 4, 4\)"),
        (torch.full((1, 3, 4, 4), float("nan")), ValueError, "NaN"),
        (torch.full((1, 3, 4, 4), float("inf")), ValueError, "Inf"),
    ],
)
def test_bad_pixel_values_are_named(values, error, words):
    with pytest.raises(error, match=words):
        check_pixel_values(values)


def test_wrong_size_is_named():
    with pytest.raises(ValueError, match="4x4 pixels for this tower, got 5x4"):
        check_pixel_values(torch.zeros(1, 3, 5, 4), image_size=4)


@pytest.mark.parametrize("std", [None, [0.1, 0.1], [0.1, 0.1, 0.0], [0.1, 0.1, float("nan")]])
def test_bad_statistics_are_named(std):
    with pytest.raises(ValueError, match="image_std"):
        check_statistics(MEAN, std)
