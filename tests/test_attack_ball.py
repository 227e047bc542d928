import math

import pytest
import torch
from attack_runs import pictures

from fs_psm_hf.attacks import check_adversarial
from fs_psm_hf.attacks.ball import is_eight_bit, lengths, project, random_start, round_eight_bit, steepest


def noisy(images, size, seed=1):
    return images + size * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("linf", 1.0), ("l2", 0.7), ("l2", 30.0)])
def test_a_projection_is_in_the_ball_and_in_the_range_and_keeps_what_is(norm, epsilon):
    images = pictures(3)
    for size in (0.01, 0.2, 5.0):
        found = project(noisy(images, size), images, epsilon, norm)
        check_adversarial(images, found, epsilon, norm)
        again = project(found, images, epsilon, norm)
        torch.testing.assert_close(again, found, rtol=0, atol=1e-6)
    assert lengths(project(noisy(images, 5.0), images, epsilon, norm) - images, norm).min() > 0.4 * min(epsilon, 1)


def test_the_steepest_direction_beats_random_ones_of_its_length():
    gradient = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 1e-30
    for norm, dual in (("linf", gradient.abs().sum((1, 2, 3))), ("l2", gradient.double().flatten(1).norm(dim=1))):
        direction = steepest(gradient, norm)
        assert lengths(direction, norm).tolist() == pytest.approx([1, 1], abs=1e-6)
        assert ((direction * gradient).double().sum((1, 2, 3)) / dual).tolist() == pytest.approx([1, 1], abs=1e-5)
        assert torch.equal(steepest(torch.zeros_like(gradient), norm), torch.zeros_like(gradient))


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 1.0)])
def test_starts_are_random_and_inside(norm, epsilon):
    images = torch.full((2, 3, 16, 16), 0.5)
    start = random_start(images, epsilon, norm, 5, [0, 1])
    check_adversarial(images, start, epsilon, norm)
    assert lengths(start - images, norm).min() > 0.98 * epsilon
    assert not torch.equal(start[0], start[1])
    assert torch.equal(random_start(images[:1], epsilon, norm, 5, [1])[0], start[1])
    if norm == "linf":  # uniform: variance ε²/3
        assert (start - 0.5).std().item() == pytest.approx(epsilon / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize("epsilon", [1 / 255, 4.5 / 255, 16 / 255, 64 / 255])
@pytest.mark.parametrize("eight_bit", [True, False])
def test_rounding_stays_in_the_linf_ball(epsilon, eight_bit):
    images = pictures(2)
    images = images if eight_bit else (images * 0.97 + 0.0123)
    moved = project(noisy(images, 0.3), images, epsilon, "linf")
    found = round_eight_bit(moved, images, epsilon, "linf")
    check_adversarial(images, found, epsilon, "linf")
    assert is_eight_bit(found)
    # What an 8-bit file gives back, to the bit.
    assert torch.equal((found * 255).round().to(torch.uint8).float() / 255, found)
    assert (found - moved).abs().max() <= 1.0001 / 255
    if eight_bit and (epsilon * 255).is_integer():
        assert lengths(found - images, "linf").tolist() == pytest.approx([epsilon] * 2, abs=1e-6)


@pytest.mark.parametrize("epsilon", [0.01, 0.2, 3.0])
def test_rounding_stays_in_the_l2_ball_and_keeps_most_of_it(epsilon):
    images = pictures(2)
    moved = project(noisy(images, 1.0), images, epsilon, "l2")
    found = round_eight_bit(moved, images, epsilon, "l2")
    check_adversarial(images, found, epsilon, "l2")
    assert is_eight_bit(found)
    if epsilon > 0.1:  # a share of 1/255 or more in many pixels
        assert lengths(found - images, "l2").min() > 0.9 * lengths(moved - images, "l2").min()


# check_adversarial ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "norm", "message"),
    [
        (
            lambda x: x.clamp(0.2, 0.8) + 0.06,
            "linf",
            "`adversarial` must lie in the linf ball of 0.05, got a distance of",
        ),
        (lambda x: (x + 0.03).clamp(0, 1), "l2", "`adversarial` must lie in the l2 ball of 0.05, got a distance of"),
        (lambda x: x + 0.04, "linf", "`adversarial` must be pixels in .0, 1., got 0.04 to 1.04"),
        (lambda x: x - 0.04, "linf", "`adversarial` must be pixels in .0, 1., got -0.04 to 0.96"),
        (lambda x: x * float("nan"), "linf", "`adversarial` must be finite, got NaN or Inf"),
        (lambda x: x[:1], "linf", "`adversarial` must have the shape of the images"),
        (lambda x: x[0], "linf", "`adversarial` must have shape .batch_size, 3, height, width., got .3, 16, 16."),
        (lambda x: x, "l1", "`norm` must be 'linf' or 'l2', got 'l1'"),
    ],
)
def test_what_left_the_ball_or_the_range_is_refused(change, norm, message):
    images = pictures(2)
    with pytest.raises(ValueError, match=message):
        check_adversarial(images, change(images), 0.05, norm)


def test_double_precision_is_no_image_of_ours():
    with pytest.raises(
        TypeError, match="`adversarial` must be a float32 tensor of pixels in .0, 1., got torch.float64"
    ):
        check_adversarial(pictures(1), pictures(1).double(), 0.05, "linf")


def test_what_lies_on_the_sphere_is_in_the_ball():
    images = torch.full((1, 3, 16, 16), 0.5)
    check_adversarial(images, images + 16 / 255, 16 / 255, "linf")
    check_adversarial(images, images + 0.5 / math.sqrt(768), 0.5, "l2")
    with pytest.raises(ValueError, match="on image 0"):
        check_adversarial(images, images + 17 / 255, 16 / 255, "linf")
