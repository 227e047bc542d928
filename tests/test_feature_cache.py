"""The memory of smoothed features: what it answers, and what its keys tell apart."""

import copy

import numpy as np
import pytest
import torch
from cache_runs import N, assert_equal, cached_tower, passes, tensors
from tiny_models import MEAN, SIZE, STD, images, llava, llava_inputs, psm_model, smoothed_tower

from fs_psm_hf import attach
from fs_psm_hf.feature_cache import FeatureCache, image_keys


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_off_by_default():
    tower = smoothed_tower()
    assert tower.feature_cache is None
    assert not torch.equal(tower(images()).last_hidden_state, tower(images()).last_hidden_state)


@pytest.mark.parametrize("kind", ["clip", "projection", "siglip", "dinov2"])
@pytest.mark.parametrize("options", [{}, {"feature_layer": [-2, 1]}, {"psm": psm_model(feature="pooled", width=32)}])
def test_a_known_image_is_not_smoothed_again(kind, options):
    if kind == "projection" and "psm" in options:
        options = {"psm": psm_model(feature="pooled", width=24)}
    tower = cached_tower(kind, **options)
    rows = passes(tower)
    first = tower(images())
    assert sum(rows) == 2 * N
    assert_equal(tower(images()), first)
    assert sum(rows) == 2 * N
    assert (tower.feature_cache.hits, tower.feature_cache.misses, len(tower.feature_cache)) == (2, 2, 2)
    assert repr(tower.feature_cache) == "FeatureCache(max_images=8): 2 images, 2 hits, 2 misses"


@pytest.mark.parametrize("known", [[], [1], [2, 0], [0, 1, 2]])
def test_the_unknown_images_of_a_batch_are_computed_and_stand_in_their_places(known):
    """Without noise the tower is a function, so every mixture of old and new rows has one right answer."""
    tower = cached_tower(sigma=0, num_samples=2, psm=psm_model(), feature_layer=-2)
    pixels = images(3)
    plain = smoothed_tower(sigma=0, num_samples=2, psm=psm_model(), feature_layer=-2)
    for i in known:
        tower(pixels[i : i + 1])
    rows = passes(tower)
    output, expected = tensors(tower(pixels)), tensors(plain(pixels))
    assert sum(rows) == 2 * (3 - len(known))
    assert output.keys() == expected.keys()
    for place, value in expected.items():
        torch.testing.assert_close(output[place], value, rtol=1e-4, atol=1e-5)


def test_equal_images_of_a_batch_are_computed_once():
    tower = cached_tower()
    rows = passes(tower)
    output = tower(images(2)[[1, 0, 1]]).last_hidden_state
    assert sum(rows) == 2 * N
    assert torch.equal(output[0], output[2])
    assert not torch.equal(output[0], output[1])
    assert (tower.feature_cache.hits, tower.feature_cache.misses) == (1, 2)


def test_the_image_unused_for_longest_leaves():
    tower = cached_tower(max_images=2)
    first, second, third = images(3).split(1)
    for image in (first, second, first, third):
        tower(image)
    rows = passes(tower)
    tower(first)
    tower(third)
    assert rows == []
    tower(second)
    assert sum(rows) == N
    assert len(tower.feature_cache) == 2


def test_a_batch_larger_than_the_memory_is_answered_whole():
    tower = cached_tower(max_images=1)
    expected = tower(images(3)).last_hidden_state
    assert len(tower.feature_cache) == 1
    assert torch.equal(tower(images(3)[2:]).last_hidden_state, expected[2:])


def test_what_a_host_does_to_the_answer_stays_with_the_host():
    tower = cached_tower()
    first = tower(images())
    expected = first.last_hidden_state.clone()
    first.last_hidden_state.zero_()
    first.pooler_output = None
    second = tower(images())
    assert torch.equal(second.last_hidden_state, expected)
    second.last_hidden_state.zero_()
    third = tower(images())
    assert torch.equal(third.last_hidden_state, expected)
    assert third.pooler_output is not None


def test_an_entry_holds_no_memory_of_its_batch():
    tower = cached_tower(max_images=1)
    tower(images(4))
    ((_, fields),) = tower.feature_cache._rows.values()
    tensor = fields["last_hidden_state"]
    assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("order", [[True, False], [False, True]])
def test_both_kinds_of_output_share_an_entry(order):
    tower = cached_tower()
    rows = passes(tower)
    first, second = (tower(images(1), return_dict=kind) for kind in order)
    assert sum(rows) == N
    assert [type(first) is tuple, type(second) is tuple] == [not kind for kind in order]
    for value, other in zip(*(v if type(v) is tuple else v.to_tuple() for v in (first, second)), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("order", [[True, None], [None, True]])
def test_hidden_states_are_there_when_asked_for_and_only_then(order):
    tower = cached_tower()
    for asked in order * 2:
        assert (tower(images(1), output_hidden_states=asked).hidden_states is not None) == bool(asked)


def test_a_chat_smooths_its_image_once():
    host = llava()
    tower = attach(host, psm_model(), sigma=0.2, num_samples=N, image_mean=MEAN, image_std=STD)
    tower.feature_cache = FeatureCache()
    rows, inputs = passes(tower), llava_inputs()
    first = host.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert sum(rows) == N
    longer = torch.cat([first, torch.tensor([[12, 13]])], 1)
    question = inputs | {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    host.generate(**question, max_new_tokens=2, num_beams=2)
    assert sum(rows) == N
    assert torch.equal(host.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False), first)
    # A second image joins: it alone is computed.
    host(**llava_inputs(2))
    assert sum(rows) == 2 * N


# What belongs to the key ------------------------------------------------------------------------------------------

CHANGES = {
    "sigma": lambda t: setattr(t, "sigma", 0.3),
    "num_samples": lambda t: setattr(t, "num_samples", 2),
    "aggregation": lambda t: setattr(t.config, "aggregation", "mean"),
    "first_token": lambda t: setattr(t.config, "first_token", 1),
    "feature_layer": lambda t: setattr(t.config, "feature_layer", -2),
    "image_mean": lambda t: setattr(t.config, "image_mean", [0.5, 0.5, 0.5]),
    "image_std": lambda t: setattr(t.config, "image_std", [0.5, 0.5, 0.5]),
    "hidden states by configuration": lambda t: setattr(t.vision_tower.config, "output_hidden_states", True),
    "kernel": lambda t: t.vision_tower.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_setting_is_another_entry_and_the_first_one_stays(change):
    tower = cached_tower()
    before = copy.deepcopy(tower.config)
    attention = tower.vision_tower.config._attn_implementation
    first = tower(images(1))
    rows = passes(tower)
    change(tower)
    changed = tower(images(1))
    assert rows != []
    assert (changed.hidden_states is not None) == (
        tower.vision_tower.config.output_hidden_states or tower.config.feature_layer is not None
    )
    for name in ("sigma", "num_samples", "aggregation", "first_token", "feature_layer", "image_mean", "image_std"):
        setattr(tower.config, name, getattr(before, name))
    tower.vision_tower.config.output_hidden_states = False
    tower.vision_tower.set_attn_implementation(attention)
    rows.clear()
    assert_equal(tower(images(1)), first)
    assert rows == []


def test_another_call_is_another_entry():
    tower = cached_tower("dinov2", max_images=16)
    rows = passes(tower)
    pixels = images(1)
    larger = images(1, size=SIZE + 4)
    calls = [
        lambda: tower(pixels),
        lambda: tower(pixels.double()),
        lambda: tower(pixels.bfloat16()),
        lambda: tower(pixels + 1e-6),
        lambda: tower(pixels.transpose(2, 3)),
        lambda: tower(larger),
        lambda: tower(pixels, output_hidden_states=True),
        lambda: tower(pixels, output_hidden_states=False),
        lambda: tower(pixels, bool_masked_pos=torch.zeros(1, 16, dtype=torch.bool)),
        lambda: tower(pixels, bool_masked_pos=torch.ones(1, 16, dtype=torch.bool)),
    ]
    answers = [call() for call in calls]
    assert len(rows) == len(calls)
    for call, expected in zip(calls, answers, strict=True):
        assert_equal(call(), expected)
    assert len(rows) == len(calls)


def test_autocast_is_another_entry():
    tower = cached_tower()
    rows = passes(tower)
    full = tower(images(1)).last_hidden_state
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            tower(images(1))
            tower(images(1))
    assert sum(rows) == 3 * N
    assert torch.equal(tower(images(1)).last_hidden_state, full)


def test_the_chunk_is_not_part_of_it():
    tower = cached_tower()
    expected = tower(images(1)).last_hidden_state
    with tower.smoothing(max_batch_size=1):
        assert torch.equal(tower(images(1)).last_hidden_state, expected)


def test_an_argument_with_a_row_per_image_enters_row_by_row():
    tower = cached_tower("dinov2", sigma=0, num_samples=2)
    tower.vision_tower.embeddings.mask_token.fill_(1.0)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[1, :8] = True
    pixels = images(1).repeat(2, 1, 1, 1)
    expected = tower.vision_tower(pixels, bool_masked_pos=masks).last_hidden_state
    rows = passes(tower)
    tower(pixels[:1], bool_masked_pos=masks[:1])
    output = tower(pixels, bool_masked_pos=masks).last_hidden_state
    assert sum(rows) == 2 * 2
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_keys_tell_arguments_apart():
    pixels = images(2)
    options = [
        {},
        {"a": None},
        {"a": True},
        {"a": 1},
        {"a": 1.0},
        {"a": "1"},
        {"a": [1]},
        {"a": (1,)},
        {"b": 1},
        {"a": torch.tensor(1)},
        {"a": torch.tensor(1.0)},
        {"a": torch.tensor([1, 1])},
        {"a": torch.tensor([1.0, 1.0])},
        {"a": torch.tensor([[1], [1]])},
    ]
    keys = [image_keys((), pixels, option) for option in options]
    assert len({key for pair in keys for key in pair}) == 2 * len(options)
    assert (
        image_keys((), pixels, {"a": torch.tensor([5, 6])})[0]
        == image_keys((), pixels, {"a": torch.tensor([5, 7])})[0]
    )
    assert image_keys((), pixels[1:], {}) == image_keys((), pixels, {})[1:]
    assert image_keys((0.1,), pixels, {}) != image_keys((0.2,), pixels, {})


@pytest.mark.parametrize("odd", [torch.ones(3), torch.ones(1, 2), np.ones(2), {"x": 1}, [torch.ones(2)], object()])
def test_an_argument_of_another_kind_switches_the_cache_off(odd):
    assert image_keys((), images(2), {"odd": odd}) is None


def test_settings_are_read_once():
    """Another thread turns the noise off between the key and the computation: nothing raw gets under σ = 0.1."""

    class Switching(FeatureCache):
        def through(self, tower, keys, compute):
            tower.sigma = 0.0
            try:
                return super().through(tower, keys, compute)
            finally:
                tower.sigma = 0.1

    tower = smoothed_tower(sigma=0.1, num_samples=1)
    tower.feature_cache = Switching()
    raw = tower.vision_tower(images(1)).last_hidden_state
    assert not torch.equal(tower(images(1)).last_hidden_state, raw)
    with tower.smoothing(sigma=0):
        assert torch.equal(tower(images(1)).last_hidden_state, raw)
    assert not torch.equal(tower(images(1)).last_hidden_state, raw)


# Weights ----------------------------------------------------------------------------------------------------------
