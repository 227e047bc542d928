"""Every host of the tables, by its real class at tiny size: the same promises for all of them."""

import copy
from functools import cache

import pytest
import torch
from host_models import HOSTS, host_inputs
from tiny_models import MEAN, STD, psm_model
from transformers.conversion_mapping import get_model_conversion_mapping

from fs_psm_hf import SmoothedVisionTower, attach, detach
from fs_psm_hf.host_kinds import HOSTS as REBUILT
from fs_psm_hf.host_kinds import OWN_CLASS_HOSTS, find_tower
from fs_psm_hf.noise import gaussian_noise


STATISTICS = {"image_mean": MEAN, "image_std": STD}
SIGMA, SEED = 0.3, 5
each_host = pytest.mark.parametrize("name", HOSTS)


two_levels = pytest.mark.parametrize("name", [name for name in HOSTS if "blip" not in name])


@cache
def _built(name):
    return HOSTS[name].build()


def plain(name):
    """A host of its own, with the weights that all of its kind have here."""
    return copy.deepcopy(_built(name))


def logits(host, inputs):
    with torch.no_grad():
        return host(**inputs).logits


def seeded(tower):
    """The host calls its tower without a seed; from now on it gets one."""
    forward = tower.forward
    tower.forward = lambda *args, **kwargs: forward(*args, **(kwargs | {"generator": SEED}))
    return tower


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def rows_seen(tower):
    """Filled with the number of images of each pass through the wrapped tower."""
    rows = []
    tower.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return rows


def sizes_of(inputs, kind):
    """Height and width of each image that reaches the tower, and the images in one row."""
    flat = inputs["pixel_values"].flatten(0, -4)
    sized = inputs["image_sizes"].tolist() if kind == "sized" else [list(flat.shape[2:])] * len(flat)
    return flat, sized


def test_each_type_of_the_tables_is_tried_here():
    assert {_built(name).config.model_type for name in HOSTS} == set(REBUILT) | set(OWN_CLASS_HOSTS)


@each_host
def test_images_matter_to_the_tiny_host(name):
    host = plain(name)
    first, second = (logits(host, host_inputs(host, name, seed=seed)) for seed in (2, 3))
    assert (first - second).abs().max() > 1e-4


@each_host
@pytest.mark.parametrize(("prompts", "images"), [(1, 2), (2, 1), (2, 2)])
def test_without_noise_no_logit_changes(name, prompts, images):
    if HOSTS[name].images == "sized" and prompts * images > 3:
        images = 1
    host = plain(name)
    inputs = host_inputs(host, name, prompts, images)
    expected = logits(host, inputs)
    tower = attach(host, sigma=0, num_samples=1, **STATISTICS)
    assert find_tower(host).tower is tower
    assert (tower.config.feature_layer, tower.config.first_token) == HOSTS[name].feature
    assert torch.equal(logits(host, inputs), expected)


@each_host
def test_one_draw_is_the_plain_host_on_noisy_images(name):
    host = plain(name)
    inputs = host_inputs(host, name, 1, 2)
    flat, sizes = sizes_of(inputs, HOSTS[name].images)
    noisy = flat.clone()
    for i, (height, width) in enumerate(sizes):
        noise = gaussian_noise((3, height, width), SEED, [i], 0, 1, "cpu")[0]
        noisy[i, :, :height, :width] += SIGMA / torch.tensor(STD).view(3, 1, 1) * noise
    expected = logits(host, inputs | {"pixel_values": noisy.view_as(inputs["pixel_values"])})
    clean = logits(host, inputs)
    seeded(attach(host, sigma=SIGMA, num_samples=1, **STATISTICS))
    torch.testing.assert_close(logits(host, inputs), expected, rtol=0, atol=1e-5)
    assert (expected - clean).abs().max() > 1e-4


def tower_call(host, inputs):
    """What the host gives its tower: positional arguments and options."""
    calls = []
    tower = find_tower(host).tower
    handle = tower.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    logits(host, inputs)
    handle.remove()
    ((args, kwargs),) = calls
    pixels = args[0] if args else kwargs.pop("pixel_values")
    return pixels, kwargs


def read(output, layer):
    """The tensors that the host reads of its tower's output."""
    if layer is None:
        return [output.last_hidden_state]
    return [output.hidden_states[i] for i in (layer if isinstance(layer, list) else [layer])]


@each_host
def test_the_tower_answers_with_the_mean_direction_of_each_image(name):
    """theory.md "Direction and length", image by image and draw by draw through the plain tower."""
    host, draws = plain(name), 3
    inputs = host_inputs(host, name, 1, 2)
    plain_tower = find_tower(host).tower
    pixels, options = tower_call(host, inputs)
    (layer, first_token), count = HOSTS[name].feature, len(pixels)
    _, sizes = sizes_of(inputs, HOSTS[name].images)
    expected = []
    for i, (height, width) in enumerate(sizes):
        one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) and len(v) == count else v for k, v in options.items()}
        features = []
        for draw in range(draws):
            noise = gaussian_noise((3, height, width), SEED, [i], draw, 1, "cpu")
            noisy = pixels[i : i + 1, :, :height, :width] + SIGMA / torch.tensor(STD).view(3, 1, 1) * noise
            with torch.no_grad():
                features.append(torch.cat(read(plain_tower(pixel_values=noisy, **one), layer), -1)[0])
        lengths = [feature[first_token:].norm() for feature in features]
        mean = sum(feature / length for feature, length in zip(features, lengths, strict=True)) / draws
        expected.append(mean / mean[first_token:].norm() * sum(lengths) / draws)
    tower = attach(host, sigma=SIGMA, num_samples=draws, **STATISTICS)
    with torch.no_grad():
        output = tower(pixels, generator=SEED, **options)
    found = torch.cat(read(output, layer), -1)
    packed = HOSTS[name].images == "sized"
    torch.testing.assert_close(found, torch.cat(expected)[None] if packed else torch.stack(expected))


@each_host
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_smooths_each_image_once(name, beams):
    host = plain(name)
    inputs = host_inputs(host, name, 2, 1)
    images = len(sizes_of(inputs, HOSTS[name].images)[0])
    rows = rows_seen(attach(host, psm_for(name), sigma=0.1, num_samples=3, **STATISTICS))
    tokens = host.generate(**inputs, max_new_tokens=3, min_new_tokens=3, num_beams=beams, do_sample=False)
    assert tokens.shape == (2, inputs["input_ids"].shape[1] + 3)
    # IDEFICS runs its tower inside the forward pass of each beam.
    assert sum(rows) == images * 3 * (beams if name == "idefics" else 1)


def psm_for(name):
    """A PSM whose mapper has the width of the feature that the host reads."""
    layer = HOSTS[name].feature[0]
    width = 64 if name == "granite4_vision" else 32
    return psm_model(width=width * (len(layer) if isinstance(layer, list) else 1))


@each_host
def test_detach_restores_everything(name):
    host, before = plain(name), plain(name)
    inputs = host_inputs(host, name, 1, 2)
    expected, config, tower = logits(host, inputs), host.config.to_dict(), find_tower(host).tower
    prefix = find_tower(host).attribute + "."
    rest = [key for key in host.state_dict() if not key.removeprefix("model.").startswith(prefix)]
    attach(host, psm_for(name), sigma=0.2, num_samples=2, **STATISTICS)
    assert (logits(host, inputs) - expected).abs().max() > 0
    assert [key for key in host.state_dict() if not key.removeprefix("model.").startswith(prefix)] == rest
    assert detach(host) is tower
    assert find_tower(host).tower is tower
    assert same_weights(host, before)
    assert host.config.to_dict() == config
    assert type(host.config) is type(before.config)
    assert torch.equal(logits(host, inputs), expected)


@each_host
def test_a_refused_attach_changes_nothing(name):
    host = plain(name)
    inputs = host_inputs(host, name)
    expected, config, tower = logits(host, inputs), host.config.to_dict(), find_tower(host).tower
    with pytest.raises(ValueError, match="the width of the tower's feature, got 48"):
        attach(host, psm_model(width=48), **STATISTICS)
    with pytest.raises(ValueError, match="`feature_layer` must be the one the host reads"):
        attach(host, feature_layer=-3, **STATISTICS)
    with pytest.raises(ValueError, match="must have a smoothed vision tower, got a"):
        detach(host)
    assert find_tower(host).tower is tower
    assert host.config.to_dict() == config
    assert type(host.config) is type(_built(name).config)
    assert torch.equal(logits(host, inputs), expected)


@two_levels
def test_both_levels_are_one_host(name):
    host = plain(name)
    expected = logits(host, host_inputs(host, name))
    inputs = host_inputs(host, name)
    tower = attach(host.model, sigma=0, num_samples=1, **STATISTICS)
    assert find_tower(host) == find_tower(host.model)
    assert find_tower(host).tower is tower
    with pytest.raises(ValueError, match="smoothed already"):
        attach(host, **STATISTICS)
    assert torch.equal(logits(host, inputs), expected)
    detach(host)
    assert same_weights(host, _built(name))


rebuilt = pytest.mark.parametrize("name", [n for n in HOSTS if _built(n).config.model_type in REBUILT])


@rebuilt
def test_save_and_reload_twice(name, tmp_path):
    host, psm = plain(name), psm_for(name)
    inputs = host_inputs(host, name, 1, 2)
    clean = logits(host, inputs)
    attach(host, psm, sigma=0.2, num_samples=2, **STATISTICS)
    reloaded = [host]
    for folder in ("first", "second"):
        reloaded[-1].save_pretrained(tmp_path / folder)
        loaded, info = type(host).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        reloaded.append(loaded)
    for loaded in reloaded[1:]:
        assert isinstance(find_tower(loaded).tower, SmoothedVisionTower)
        assert same_weights(loaded, host)
    expected, *found = (logits_with_noise(loaded, inputs) for loaded in reloaded)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-6)
    detach(reloaded[-1])
    assert same_weights(reloaded[-1], _built(name))
    torch.testing.assert_close(logits(reloaded[-1], inputs), clean, rtol=0, atol=1e-6)


def logits_with_noise(host, inputs):
    seeded(find_tower(host).tower)
    return logits(host, inputs)


@rebuilt
def test_a_checkpoint_in_the_published_layout_reloads_smoothed(name, tmp_path):
    """Hosts rename old keys when they load, and remember it for saving: the smoothed tower must not be renamed with them."""
    host = plain(name)
    host._weight_conversions = get_model_conversion_mapping(host)  # as if it had come from there
    host.save_pretrained(tmp_path / "published")
    host = type(host).from_pretrained(tmp_path / "published")
    assert same_weights(host, _built(name))
    conversions = host._weight_conversions
    attach(host, psm_for(name), sigma=0.2, num_samples=2, **STATISTICS)
    host.save_pretrained(tmp_path / "smoothed")
    loaded, info = type(host).from_pretrained(tmp_path / "smoothed", output_loading_info=True)
    assert not any(info.values()), info
    assert same_weights(loaded, host)
    with pytest.raises(ValueError, match="`host` must be the whole model that `attach` was given"):
        detach(host.model)
    detach(host)
    assert host._weight_conversions is conversions
    with pytest.raises(ValueError, match="`host` must be the whole model that was loaded"):
        attach(host.model, **STATISTICS)
