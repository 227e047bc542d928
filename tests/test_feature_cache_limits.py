"""What the memory of smoothed features must not answer, and what it belongs to."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from cache_runs import N, cached_tower
from tiny_models import MEAN, SIZE, STD, images, psm_model, smoothed_tower, vision_model
from torch import nn
from transformers import PixtralVisionConfig, PixtralVisionModel
from transformers.modeling_outputs import BaseModelOutput

from fs_psm_hf import SmoothedVisionTower
from fs_psm_hf.feature_cache import FeatureCache, image_keys


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_what_was_begun_before_a_clear_is_not_stored_after_it():
    tower = cached_tower()
    handle = tower.vision_tower.register_forward_pre_hook(lambda *_: tower.feature_cache.clear())
    tower(images(2))
    assert len(tower.feature_cache) == 0
    handle.remove()
    tower(images(2))
    assert len(tower.feature_cache) == 2


# When it is not used ----------------------------------------------------------------------------------------------


def test_noise_of_ones_own_is_neither_answered_from_it_nor_remembered():
    tower, plain = cached_tower(), smoothed_tower()
    remembered = tower(images()).last_hidden_state
    asked = tower(images(), generator=4, image_ids=[7, 8]).last_hidden_state
    assert torch.equal(asked, plain(images(), generator=4, image_ids=[7, 8]).last_hidden_state)
    assert not torch.equal(tower(images(), image_ids=[7, 8]).last_hidden_state, remembered)
    assert torch.equal(tower(images()).last_hidden_state, remembered)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"generator": -1}, ValueError, "`generator` as a seed"),
        ({"generator": "7"}, TypeError, "`generator` must be"),
        ({"image_ids": [1]}, ValueError, "`image_ids` must name each of the 2 images"),
        ({"image_ids": "ab"}, TypeError, "`image_ids` must be integers"),
        ({"output_attentions": True}, ValueError, "attention maps are not smoothed"),
    ],
)
def test_what_is_refused_without_it_is_refused_with_it(options, error, words):
    tower = cached_tower()
    tower(images())
    with pytest.raises(error, match=words):
        tower(images(), **options)


def test_a_bad_image_and_a_bad_setting_are_refused_with_it():
    tower = cached_tower()
    with pytest.raises(ValueError, match="`pixel_values`"):
        tower(torch.full((1, 3, SIZE, SIZE), torch.nan))
    tower(images())
    tower.config.num_samples = 0
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1, got 0"):
        tower(images())


def test_gradients_flow_and_are_not_remembered():
    tower = cached_tower()
    tower.requires_grad_(False)
    tower(images())
    with torch.enable_grad():
        pixels = images().requires_grad_()
        output = tower(pixels).last_hidden_state
        (gradient,) = torch.autograd.grad(output.square().sum(), pixels)
    assert gradient.abs().min() > 0
    assert (tower.feature_cache.hits, tower.feature_cache.misses) == (0, 2)


def test_with_gradients_recorded_only_a_frozen_tower_is_remembered():
    tower = cached_tower()
    with torch.enable_grad():
        output = tower(images()).last_hidden_state
        assert output.requires_grad
        assert tower.feature_cache.misses == 0
        tower.requires_grad_(False)
        expected = tower(images()).last_hidden_state
        assert torch.equal(tower(images()).last_hidden_state, expected)
    assert (tower.feature_cache.hits, tower.feature_cache.misses) == (2, 2)


@pytest.mark.parametrize("part", ["", "vision_tower", "psm"])
def test_training_mode_is_not_remembered(part):
    tower = cached_tower(psm=psm_model())
    tower.get_submodule(part).train()
    tower(images())
    assert len(tower.feature_cache) == 0
    tower.eval()
    tower(images())
    assert len(tower.feature_cache) == 2


def test_an_answer_of_inference_mode_serves_outside_of_it():
    tower = cached_tower()
    with torch.inference_mode():
        expected = tower(images()).last_hidden_state.clone()
    tower.requires_grad_(False)
    with torch.enable_grad():
        output = tower(images()).last_hidden_state
        head = nn.Linear(32, 1)
        head(output).sum().backward()
    assert torch.equal(output, expected)
    assert head.weight.grad is not None


def test_a_model_that_packs_its_images_is_not_remembered():
    """One row of Pixtral's output holds the patches of all images."""
    torch.manual_seed(0)
    config = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8, image_size=16,
        patch_size=4,
    )  # fmt: skip
    tower = SmoothedVisionTower.from_components(
        PixtralVisionModel(config).eval(), sigma=0.1, num_samples=N, image_mean=MEAN, image_std=STD
    )
    tower.feature_cache = FeatureCache()
    first = tower(images(1)).last_hidden_state
    assert tower(images(2)).last_hidden_state.shape == (1, 2 * 16, 32)
    assert not torch.equal(tower(images(1)).last_hidden_state, first)
    assert tower.feature_cache.misses == 0


def test_an_output_without_a_row_for_each_image_is_handed_on_and_not_remembered():
    cache, model, calls = FeatureCache(), nn.Linear(1, 1), []

    def compute(rows):
        calls.append(rows)
        return BaseModelOutput(last_hidden_state=torch.ones(1, 5 * len(rows), 2))

    keys = image_keys((), images(2), {})
    assert cache.through(model, keys, compute).last_hidden_state.shape == (1, 10, 2)
    # Equal images are found out before the output is seen; then all of them are computed after all.
    assert cache.through(model, [*keys, keys[0]], compute).last_hidden_state.shape == (1, 15, 2)
    assert calls == [[0, 1], [0, 1], [0, 1, 2]]
    assert len(cache) == 0


def test_a_replica_with_other_weights_does_not_use_it():
    tower = cached_tower()
    expected = tower(images()).last_hidden_state
    replica = tower._replicate_for_data_parallel()
    assert not torch.equal(replica(images()).last_hidden_state, expected)
    assert torch.equal(tower(images()).last_hidden_state, expected)


def test_offloaded_weights_are_never_remembered(tmp_path):
    tower = smoothed_tower()
    tower.save_pretrained(tmp_path / "saved")
    offloaded = SmoothedVisionTower.from_pretrained(
        tmp_path / "saved", device_map={"vision_tower": "disk", "psm": "cpu"}, offload_folder=tmp_path / "offload"
    )
    offloaded.feature_cache = FeatureCache()
    for _ in range(2):
        offloaded(images())
    assert offloaded.feature_cache.hits == 0
    torch.testing.assert_close(
        offloaded(images(), generator=1).last_hidden_state, tower(images(), generator=1).last_hidden_state
    )


# One tower, many threads ------------------------------------------------------------------------------------------


def test_a_cache_belongs_to_one_tower():
    first, second = cached_tower(), smoothed_tower()
    cache = first.feature_cache
    with pytest.raises(ValueError, match="`feature_cache` must be a FeatureCache of this tower alone, got one that"):
        second.feature_cache = cache
    assert second.feature_cache is None
    first(images())
    first.feature_cache = cache
    assert len(cache) == 2
    first.feature_cache = None
    assert len(cache) == 0
    second.feature_cache = cache
    second(images())
    assert len(cache) == 2
    del second
    first.feature_cache = cache
    assert len(cache) == 0


@pytest.mark.parametrize("value", [True, {}, 256, FeatureCache])
def test_another_kind_of_cache_is_refused(value):
    tower = smoothed_tower()
    with pytest.raises(TypeError, match=f"`feature_cache` must be a FeatureCache or None, got {type(value).__name__}"):
        tower.feature_cache = value
    assert tower.feature_cache is None


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None, "9"])
def test_another_size_is_refused(size):
    with pytest.raises(ValueError, match=f"`max_images` must be an integer >= 1, got {size!r}"):
        FeatureCache(max_images=size)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_has_none(copied, tmp_path):
    tower = cached_tower()
    expected = tower(images()).last_hidden_state
    twin = copied(tower)
    assert twin.feature_cache is None
    assert not torch.equal(twin(images()).last_hidden_state, expected)
    assert torch.equal(tower(images()).last_hidden_state, expected)


def test_it_does_not_enter_the_saved_model(tmp_path):
    tower, plain = cached_tower(), smoothed_tower()
    tower(images())
    assert tower.state_dict().keys() == plain.state_dict().keys()
    tower.save_pretrained(tmp_path)
    assert type(tower).from_pretrained(tmp_path).feature_cache is None
    assert tower.config.to_dict().keys() == plain.config.to_dict().keys()


def test_threads():
    """Eight threads ask for six images in memory of four: every answer is the right image's."""
    tower = cached_tower(sigma=0, num_samples=1, max_images=4)
    pixels = images(6)
    expected = vision_model()(pixels).last_hidden_state
    wrong = []

    def ask(seed):
        order = np.random.default_rng(seed)
        with torch.no_grad():
            for _ in range(12):
                chosen = order.integers(0, 6, 2).tolist()
                output = tower(pixels[chosen]).last_hidden_state
                if not torch.allclose(output, expected[chosen], rtol=1e-4, atol=1e-5):
                    wrong.append(chosen)

    threads = [threading.Thread(target=ask, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(tower.feature_cache) == 4
    assert tower.feature_cache.hits + tower.feature_cache.misses == 8 * 12 * 2
    assert tower.feature_cache.hits > 0
