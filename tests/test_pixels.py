import pytest
import torch
from tiny_models import MEAN, STD
from transformers import CLIPImageProcessorPil

from fs_psm_hf.pixels import (
    channel_tensor,
    check_pixel_values,
    check_statistics,
    from_unit,
    read_statistics,
    to_unit,
)


def test_normalisation_is_the_image_processors():
    images = torch.rand(2, 3, 5, 7)
    expected = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    mean, std = channel_tensor(MEAN, images), channel_tensor(STD, images)
    torch.testing.assert_close(from_unit(images, mean, std), expected)
    torch.testing.assert_close(to_unit(expected, mean, std), images)


def test_a_processor_that_works_otherwise_is_refused():
    mean, std = read_statistics(CLIPImageProcessorPil(image_mean=MEAN, image_std=STD))
    assert (list(mean), list(std)) == (MEAN, STD)
    for option in ({"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}):
        with pytest.raises(ValueError, match="`processor` must scale pixels by 1/255 and then normalise"):
            read_statistics(CLIPImageProcessorPil(**option))


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


@pytest.mark.parametrize("std", [None, 0.5, [0.1, 0.1], [0.1, 0.1, 0.0], [0.1, 0.1, float("nan")], ["a", "b", "c"]])
def test_bad_statistics_are_named(std):
    with pytest.raises(ValueError, match="image_std"):
        check_statistics(MEAN, std)
