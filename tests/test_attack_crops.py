import math

import pytest
import torch
from attack_runs import pictures
from torch.nn import functional as F

from fs_psm_hf.attacks.crops import crop_and_resize, random_boxes


def resized_by_torch(image, box):
    top, left, height, width = box.tolist()
    part = image[None, :, top : top + height, left : left + width]
    return F.interpolate(part, image.shape[1:], mode="bilinear", antialias=True, align_corners=False)[0]


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_a_batch_of_crops_is_what_torch_makes_one_by_one(size):
    images = torch.rand(12, 3, *size, generator=torch.Generator().manual_seed(1))
    boxes = random_boxes(*size, 3, list(range(12)), 0)
    assert len(boxes.unique(dim=0)) > 6
    expected = torch.stack([resized_by_torch(*pair) for pair in zip(images, boxes, strict=True)])
    torch.testing.assert_close(crop_and_resize(images, boxes), expected, rtol=0, atol=3e-6)


def test_the_whole_image_is_itself_and_other_pixels_have_no_say():
    images = pictures(2)
    assert torch.equal(crop_and_resize(images, torch.tensor([[0, 0, 16, 16]] * 2)), images)
    box = torch.tensor([[2, 3, 9, 8]] * 2)
    outside = images.clone()
    outside[:, :, 2:11, 3:11] = torch.nan
    inside = torch.zeros_like(images)
    inside[:, :, 2:11, 3:11] = images[:, :, 2:11, 3:11]
    assert torch.equal(crop_and_resize(inside, box), crop_and_resize(torch.where(outside.isnan(), images, 0), box))


def test_gradient_is_that_of_torchs_own_resizing():
    images = pictures(3).requires_grad_()
    boxes = random_boxes(16, 16, 5, [0, 1, 2], 1)
    weights = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    (ours,) = torch.autograd.grad((crop_and_resize(images, boxes) * weights).sum(), images)
    expected = sum((resized_by_torch(*row[:2]) * row[2]).sum() for row in zip(images, boxes, weights, strict=True))
    (theirs,) = torch.autograd.grad(expected, images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_boxes_have_the_area_and_the_ratio_that_they_should():
    height = width = 224
    boxes = torch.cat([random_boxes(height, width, 1, list(range(50)), step) for step in range(20)]).double()
    tops, lefts, heights, widths = boxes.unbind(1)
    assert ((tops >= 0) & (lefts >= 0) & (tops + heights <= height) & (lefts + widths <= width)).all()
    share, ratio = heights * widths / (height * width), widths / heights
    assert 0.49 < share.min() < 0.52
    assert 0.86 < share.max() < 0.91
    # Wide boxes of much area do not fit and are drawn again, so the mean lies below the middle, 0.7.
    assert 0.66 < share.mean() < 0.70
    assert math.log(0.74) < ratio.log().min() < -0.2
    assert 0.2 < ratio.log().max() < math.log(1.35)
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.02)
    # Where a box stands is uniform over the places that it has.
    room = heights < height
    assert (tops[room] / (height - heights[room])).mean().item() == pytest.approx(0.5, abs=0.04)


def test_a_box_is_a_function_of_seed_image_and_step():
    boxes = random_boxes(32, 32, 7, [4, 9, 2], 5)
    assert torch.equal(random_boxes(32, 32, 7, [9], 5)[0], boxes[1])
    for other in (random_boxes(32, 32, 8, [9], 5), random_boxes(32, 32, 7, [9], 6), random_boxes(32, 32, 7, [3], 5)):
        assert not torch.equal(other[0], boxes[1])


def test_where_no_try_fits_the_box_is_the_largest_one_in_the_middle():
    # A strip of 4 x 100: no box of half its area has a ratio below 4/3.
    boxes = random_boxes(4, 100, 1, list(range(5)), 0)
    assert boxes.tolist() == [[0, 47, 4, 5]] * 5
    assert random_boxes(100, 4, 1, [0], 0).tolist() == [[47, 0, 5, 4]]
