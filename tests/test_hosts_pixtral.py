"""Pixtral answers a batch of images of any size with one row of patches: each image keeps its own noise and direction."""

import pytest
import torch
from host_models import HOSTS, llama, pixtral, vision_inputs
from tiny_models import MEAN, STD, images, psm_model
from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralVisionModel

from fs_psm_hf import SmoothedVisionTower, attach, certify_features
from fs_psm_hf.training.tower import FrozenTower


SIZES = [(16, 32), (32, 16), (16, 16)]
PATCHES = [32, 32, 16]


def plain_tower():
    torch.manual_seed(0)
    return PixtralVisionModel(pixtral()).eval()


def smoothed(psm=None, **options):
    settings = {"sigma": 0.2, "num_samples": 3, "image_mean": MEAN, "image_std": STD} | options
    return SmoothedVisionTower.from_components(plain_tower(), psm, **settings)


def padded():
    return vision_inputs("mistral3", 3)


def crop(inputs, i):
    height, width = SIZES[i]
    return inputs["pixel_values"][i : i + 1, :, :height, :width]


def test_without_sizes_every_image_has_the_size_of_the_batch():
    pixels = images(3, 32)
    expected = plain_tower()(pixels).last_hidden_state
    assert expected.shape == (1, 3 * 64, 32)
    assert torch.equal(smoothed(sigma=0, num_samples=1)(pixels).last_hidden_state, expected)
    assert smoothed()(pixels).last_hidden_state.shape == expected.shape


@pytest.mark.parametrize("layer", [None, -1, [-2, 1]])
def test_without_noise_every_output_is_the_plain_one(layer):
    inputs = padded()
    expected = plain_tower()(**inputs, output_hidden_states=True)
    found = smoothed(sigma=0, num_samples=1, feature_layer=layer)(**inputs, output_hidden_states=True)
    if layer is None:
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    wanted = range(5) if layer is None else [4] if layer == -1 else [3, 1]
    for i in range(5):
        if i in wanted:
            assert torch.equal(found.hidden_states[i], expected.hidden_states[i])
        else:
            assert found.hidden_states[i] is None


@pytest.mark.parametrize("kind", ["plain", "purifier", "mapper", "both"])
def test_an_image_is_smoothed_as_if_it_came_alone(kind):
    psm = None if kind == "plain" else psm_model("none" if kind == "mapper" else "unet", kind in ("mapper", "both"))
    tower, inputs = smoothed(psm), padded()
    together = tower(**inputs, generator=5).last_hidden_state
    assert together.shape == (1, sum(PATCHES), 32)
    for i, part in enumerate(together.split(PATCHES, 1)):
        alone = tower(crop(inputs, i), generator=5, image_ids=[i]).last_hidden_state
        torch.testing.assert_close(part, alone)
    # What the padding holds is nobody's.
    inputs["pixel_values"][2, :, 16:] = 7.0
    assert torch.equal(tower(**inputs, generator=5).last_hidden_state, together)


@pytest.mark.parametrize("limit", [1, 2, 4, 7])
def test_the_passes_do_not_matter(limit):
    psm = psm_model()
    expected = smoothed(psm, num_samples=4)(**padded(), generator=5).last_hidden_state
    found = smoothed(psm, num_samples=4, max_batch_size=limit)(**padded(), generator=5).last_hidden_state
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_compiled_pass_gives_the_same():
    tower, inputs = smoothed(psm_model("none")), padded()
    expected = tower(**inputs, generator=5).last_hidden_state
    tower.compile(backend="eager")
    torch.testing.assert_close(tower(**inputs, generator=5).last_hidden_state, expected)


def test_pixel_gradients_reach_each_image_and_no_padding():
    tower, inputs = smoothed(psm_model()), padded()
    pixels = inputs["pixel_values"].requires_grad_()
    tower(**inputs).last_hidden_state.square().sum().backward()
    for gradient, (height, width) in zip(pixels.grad, SIZES, strict=True):
        assert gradient[:, :height, :width].abs().min() > 0
        inside = torch.zeros_like(gradient)
        inside[:, :height, :width] = gradient[:, :height, :width]
        assert torch.equal(gradient, inside)


def test_what_is_served_is_the_mean_of_what_is_certified():
    tower, inputs = smoothed(psm_model(), num_samples=4), padded()
    served = tower(**inputs, generator=5).last_hidden_state.split(PATCHES, 1)
    for i, part in enumerate(served):
        (draws,) = tower.sample_features(crop(inputs, i), 4, generator=5, image_ids=[i])
        assert draws.shape == (1, 4, PATCHES[i] * 32)
        mean = draws[0].mean(0)
        torch.testing.assert_close(part.flatten() / part.norm(), mean / mean.norm())


def test_clean_features_are_the_plain_tower_s():
    pixels = images(2, 32)
    expected = torch.cat([plain_tower()(one[None]).last_hidden_state for one in pixels])
    found = smoothed(psm_model()).clean_features(pixels, unit=False)
    torch.testing.assert_close(found, expected.flatten(1))
    per_token = smoothed(psm_model()).clean_features(pixels, per_token=True)
    torch.testing.assert_close(per_token, torch.nn.functional.normalize(expected, dim=-1))


def test_images_are_certified_cropped():
    tower, inputs = smoothed(), padded()
    (certificate,) = certify_features(tower, crop(inputs, 0), num_samples=150, generator=1)
    assert certificate.image_size == (16, 32)
    certificate.verify(tower, crop(inputs, 0))
    for i, edge in ((0, "row"), (1, "column")):
        with pytest.raises(ValueError, match=f"without padding, got one whose last {edge} is all zero: crop it"):
            certify_features(tower, inputs["pixel_values"][i : i + 1], num_samples=150, generator=1)
        with pytest.raises(ValueError, match="without padding"):
            tower.clean_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="`feature` must not be 'cls'"):
        tower.sample_features(crop(inputs, 0), 4, feature="cls")
    with pytest.raises(ValueError, match="it has no pooled output"):
        tower.clean_features(crop(inputs, 0), feature="pooled")


@pytest.mark.parametrize(
    "sizes", [[(16, 16)], [(16, 32), (32, 16), (16, 36)], [(16, 32), (32, 16), (2, 16)], [(16,), (16,), (16,)]]
)
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=r"`image_sizes` must be 3 pairs from one patch, 4, up to \(32, 32\), got"):
        smoothed()(padded()["pixel_values"], image_sizes=sizes)


def test_sizes_may_be_a_list_of_pairs():
    tower, inputs = smoothed(), padded()
    expected = tower(**inputs, generator=5).last_hidden_state
    assert torch.equal(tower(inputs["pixel_values"], image_sizes=SIZES, generator=5).last_hidden_state, expected)


def test_a_host_that_would_drop_a_class_token_is_refused():
    config = LlavaConfig(vision_config=pixtral(), text_config=llama(), image_token_index=7)
    host = LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match="`vision_feature_select_strategy` must be 'full' for a pixtral tower"):
        attach(host, image_mean=MEAN, image_std=STD)
    assert isinstance(host.model.vision_tower, PixtralVisionModel)


@pytest.mark.parametrize("name", ["llava-pixtral", "mistral3", "lighton_ocr"])
def test_the_tower_reloads_alone(name, tmp_path):
    tower = attach(HOSTS[name].build(), psm_model(), sigma=0.2, num_samples=2, image_mean=MEAN, image_std=STD)
    tower.save_pretrained(tmp_path)
    again = SmoothedVisionTower.from_pretrained(tmp_path)
    for first, second in zip(
        tower(**padded(), generator=5).values(), again(**padded(), generator=5).values(), strict=True
    ):
        first, second = (value[-1] if isinstance(value, tuple) else value for value in (first, second))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_training_for_a_packed_tower_is_refused():
    with pytest.raises(ValueError, match="got a pixtral, which packs the tokens of all images into one row"):
        FrozenTower(smoothed(), "tokens")
