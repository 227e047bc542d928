import copy
import weakref

import pytest
import torch
from tiny_models import LAYERS, MEAN, SHAPE, STD, WIDTH, images, psm_model, smoothed_tower, vision_model
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig, ViTModel

from fs_psm_hf import PSMConfig, PSMModel, SmoothedVisionTower, SmoothedVisionTowerConfig


KINDS = ["clip", "projection", "siglip", "dinov2"]
SELECTIONS = [None, False, True, -2, 0, [1, -1]]


def tensors(output):
    """Every tensor of an output, by where it stands."""
    found = {}
    for name, value in output.items():
        entries = value if isinstance(value, tuple) else [value]
        for i, entry in enumerate(entries):
            if entry is not None:
                found[name, i] = entry
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_without_noise_the_tower_is_the_wrapped_one_to_the_bit(kind, selection):
    tower = smoothed_tower(kind, sigma=0, num_samples=1)
    pixels = images()
    expected = vision_model(kind)(pixels, output_hidden_states=selection)
    output = tower(pixels, output_hidden_states=selection)
    assert type(output) is type(expected)
    assert list(output.keys()) == list(expected.keys())
    mine, theirs = tensors(output), tensors(expected)
    assert mine.keys() == theirs.keys()
    for place in theirs:
        assert torch.equal(mine[place], theirs[place]), place


@pytest.mark.parametrize("kind", KINDS)
def test_faint_noise_through_the_whole_path(kind):
    tower = smoothed_tower(kind, sigma=1e-6, num_samples=2)
    expected = vision_model(kind)(images(), output_hidden_states=True)
    mine, theirs = tensors(tower(images(), output_hidden_states=True)), tensors(expected)
    assert mine.keys() == theirs.keys()
    for place in theirs:
        torch.testing.assert_close(mine[place], theirs[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-2, 1, [0, -2], 4])
def test_only_the_feature_layers_are_returned_and_they_are_the_wrapped_ones(kind, layer):
    tower = smoothed_tower(kind, sigma=0, num_samples=1, feature_layer=layer)
    expected = vision_model(kind)(images(), output_hidden_states=True)
    for _ in range(2):  # recording hooks must not pile up
        output = tower(images())
        asked = {i % (LAYERS + 1) for i in ([layer] if isinstance(layer, int) else layer)}
        assert len(output.hidden_states) == LAYERS + 1
        assert {i for i, state in enumerate(output.hidden_states) if state is not None} == asked
        assert list(output.keys()) == ["hidden_states"]
        for i in asked:
            assert torch.equal(output.hidden_states[i], expected.hidden_states[i])
    # The wrapped tower is left as it was.
    again = tower.vision_tower(images(), output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(again.hidden_states, expected.hidden_states, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_stops_at_the_feature_layer(kind):
    tower = smoothed_tower(kind, feature_layer=2)
    encoder = (tower.vision_tower.vision_model if kind == "projection" else tower.vision_tower).encoder
    blocks = encoder.layer if kind == "dinov2" else encoder.layers
    calls = []
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    tower(images())
    assert calls == [0, 1]


def test_the_mean_is_the_definition():
    """n₀ draws, noise of exactly σ in [0, 1] pixels, never clipped: restated with the public parts."""
    from fs_psm_hf.noise import gaussian_noise

    psm = psm_model()
    tower = smoothed_tower(psm=psm, sigma=0.2, num_samples=5, feature_layer=-2, first_token=1)
    pixels = images()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    noise = gaussian_noise((3, 16, 16), 11, [4, 9], 0, 5, torch.device("cpu")).view(2, 5, 3, 16, 16)
    wrapped, results = vision_model(), []
    with torch.no_grad():
        for image, draws in zip(pixels, noise, strict=True):
            units, lengths = [], []
            for draw in draws:
                noisy = (image * std + mean) + 0.2 * draw
                tokens = wrapped(
                    (psm.purifier.denoise(noisy, 0.2) - mean) / std, output_hidden_states=True
                ).hidden_states[-2]
                tokens = tokens + psm.mapper(tokens, 0.2)
                length = tokens[:, 1:].norm()
                units.append(tokens / length)
                lengths.append(length)
            direction = torch.cat(units).mean(0)
            results.append(direction / direction[1:].norm() * torch.stack(lengths).mean())
        output = tower(pixels, generator=11, image_ids=[4, 9])
    torch.testing.assert_close(output.hidden_states[-2], torch.stack(results), rtol=1e-4, atol=1e-5)


def test_a_purifier_sees_unclipped_pixels_with_noise_of_exactly_sigma():
    class Spy(nn.Module):
        def denoise(self, images, sigma):
            self.seen, self.sigma = images, sigma
            return images

    spy = Spy()
    tower = smoothed_tower(psm=spy, sigma=0.5, num_samples=64)
    tower.config.max_batch_size = 64
    pixels = images(1)
    tower(pixels)
    unit = pixels * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    noise = spy.seen - unit
    assert spy.sigma == 0.5
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)  # 49,152 values: standard error 0.3 %
    assert spy.seen.min() < -0.5
    assert spy.seen.max() > 1.5


def test_without_a_purifier_the_noise_is_the_same_in_pixels():
    class Same(nn.Module):
        def denoise(self, images, sigma):
            return images

    plain = smoothed_tower(sigma=0.3)(images(), generator=1).last_hidden_state
    through_pixels = smoothed_tower(psm=Same(), sigma=0.3)(images(), generator=1).last_hidden_state
    torch.testing.assert_close(plain, through_pixels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 2, 4, 12, None])
def test_the_result_does_not_depend_on_chunks_or_batch(limit):
    tower = smoothed_tower(psm=psm_model(), num_samples=4)
    pixels = images(3)
    expected = tower(pixels, generator=3, image_ids=[10, 11, 12]).last_hidden_state
    with tower.smoothing(max_batch_size=limit):
        torch.testing.assert_close(
            tower(pixels, generator=3, image_ids=[10, 11, 12]).last_hidden_state, expected, rtol=1e-4, atol=1e-5
        )
        alone = tower(pixels[1:2], generator=3, image_ids=[11]).last_hidden_state
    torch.testing.assert_close(alone, expected[1:2], rtol=1e-4, atol=1e-5)


def test_samples_are_bit_equal_in_any_batch_and_from_any_start():
    tower = smoothed_tower(psm=psm_model(), feature_layer=-2, max_batch_size=4)
    pixels = images(3)
    whole = torch.cat(list(tower.sample_features(pixels, 8, generator=3, image_ids=[10, 11, 12])), 1)
    assert whole.shape == (3, 8, 17 * WIDTH)
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(3, 8))
    alone = torch.cat(list(tower.sample_features(pixels[2:], 8, generator=3, image_ids=[12])), 1)
    assert torch.equal(alone[0], whole[2])
    later = torch.cat(list(tower.sample_features(pixels, 4, generator=3, image_ids=[10, 11, 12], start=4)), 1)
    assert torch.equal(later, whole[:, 4:])


def test_samples_stream():
    tower = smoothed_tower(max_batch_size=4)
    shapes = [chunk.shape[1] for chunk in tower.sample_features(images(1), 10, generator=0)]
    assert shapes == [4, 4, 2]


def test_the_served_mean_has_the_direction_of_the_certified_samples():
    tower = smoothed_tower(psm=psm_model(), num_samples=6, feature_layer=-2, first_token=1)
    samples = torch.cat(list(tower.sample_features(images(), 6, generator=4)), 1)
    served = tower(images(), generator=4).hidden_states[-2][:, 1:].flatten(1)
    cosine = torch.cosine_similarity(samples.mean(1), served)
    torch.testing.assert_close(cosine, torch.ones(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "field"), [("clip", "pooler_output"), ("projection", "image_embeds")])
def test_pooled_features_are_the_final_embedding_of_each_draw(kind, field):
    tower = smoothed_tower(kind, num_samples=5)
    samples = torch.cat(list(tower.sample_features(images(), 5, feature="pooled", generator=4)), 1)
    served = tower(images(), generator=4)[field]
    assert samples.shape[-1] == served.shape[-1]
    torch.testing.assert_close(torch.cosine_similarity(samples.mean(1), served), torch.ones(2), rtol=0, atol=1e-6)
    clean = tower.clean_features(images(), "pooled")
    torch.testing.assert_close(clean, nn.functional.normalize(vision_model(kind)(images())[field], dim=-1))


def test_clean_features_are_the_wrapped_tower_alone():
    tower = smoothed_tower(psm=psm_model(), feature_layer=-2, first_token=1)
    tokens = vision_model()(images(), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(
        tower.clean_features(images()), nn.functional.normalize(tokens[:, 1:].flatten(1), dim=-1)
    )
    torch.testing.assert_close(tower.clean_features(images(), "cls"), nn.functional.normalize(tokens[:, 0], dim=-1))


def test_nothing_unsmoothed_leaks():
    restricted = smoothed_tower(psm=psm_model(), feature_layer=-2)
    assert set(tensors(restricted(images(), output_hidden_states=True))) == {("hidden_states", LAYERS - 1)}
    with pytest.raises(ValueError, match="asks for layer 1"):
        restricted(images(), output_hidden_states=1)
    with pytest.raises(ValueError, match="attention maps are not smoothed"):
        restricted(images(), output_attentions=True)
    mapped_last = smoothed_tower(psm=psm_model())
    assert list(mapped_last(images()).keys()) == ["last_hidden_state"]
    with pytest.raises(ValueError, match="asks for layer -1"):
        mapped_last(images(), output_hidden_states=-1)
    pooled = smoothed_tower(psm=psm_model(feature="pooled"))
    assert list(pooled(images()).keys()) == ["pooler_output"]
    with pytest.raises(ValueError, match="the mapper refines"):
        next(pooled.sample_features(images(), 2))


def test_noise_reaches_every_output():
    """Two calls differ in every tensor, so none of them is the raw tower's."""
    tower = smoothed_tower("projection", sigma=0.2)
    first, second = (tensors(tower(images(), output_hidden_states=True)) for _ in range(2))
    for place, value in first.items():
        if place != ("hidden_states", 0):
            assert not torch.equal(value, second[place]), place
    raw = tensors(tower.vision_tower(images(), output_hidden_states=True))
    assert not torch.equal(first["hidden_states", 0], raw["hidden_states", 0])


def test_serving_is_random_unless_a_generator_is_given():
    tower = smoothed_tower()
    torch.manual_seed(0)
    first = tower(images()).last_hidden_state
    torch.manual_seed(0)
    assert not torch.equal(tower(images()).last_hidden_state, first)
    repeat = [tower(images(), generator=torch.Generator().manual_seed(1)).last_hidden_state for _ in range(2)]
    assert torch.equal(*repeat)


@pytest.mark.parametrize("psm", [None, "psm"])
def test_gradients_reach_the_pixels(psm):
    tower = smoothed_tower(psm=psm and psm_model(), num_samples=3, feature_layer=-2, max_batch_size=2).double()
    pixels = images(1).double().requires_grad_()
    torch.manual_seed(0)
    weight = torch.randn(1, 17, WIDTH, dtype=torch.float64)

    def loss(x):
        return (tower(x, generator=0).hidden_states[-2] * weight).sum()

    (gradient,) = torch.autograd.grad(loss(pixels), pixels)
    direction = torch.randn_like(pixels)
    step = 1e-2
    with torch.no_grad():
        difference = (loss(pixels + step * direction) - loss(pixels - step * direction)) / (2 * step)
    assert difference.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2)
    assert gradient.abs().min() > 0


def test_batched_arguments_are_repeated_with_the_images():
    tower = smoothed_tower("dinov2", sigma=0, num_samples=3)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[1, :8] = True
    with torch.no_grad():
        tower.vision_tower.embeddings.mask_token.fill_(1.0)
    expected = tower.vision_tower(images(), bool_masked_pos=masked).last_hidden_state
    torch.testing.assert_close(tower(images(), bool_masked_pos=masked).last_hidden_state, expected)


def test_return_dict_false_gives_a_tuple():
    tower = smoothed_tower(sigma=0, num_samples=1)
    assert torch.equal(tower(images(), return_dict=False)[0], vision_model()(images()).last_hidden_state)


def test_a_temporary_setting_is_checked_and_restored():
    tower = smoothed_tower(sigma=0.1, num_samples=3)
    with tower.smoothing(sigma=0.5, num_samples=16):
        assert (tower.config.sigma, tower.config.num_samples) == (0.5, 16)
    assert (tower.config.sigma, tower.config.num_samples) == (0.1, 3)
    with pytest.raises(ValueError, match="`sigma`"), tower.smoothing(sigma=-1.0):
        raise AssertionError
    assert tower.config.sigma == 0.1
    with pytest.raises(RuntimeError, match="inside"), tower.smoothing(num_samples=1):
        raise RuntimeError("inside")
    assert tower.config.num_samples == 3


def test_bfloat16_is_the_float32_result_within_its_precision():
    tower = smoothed_tower(psm=psm_model(), num_samples=8, feature_layer=-2)
    expected = tower(images(), generator=0).hidden_states[-2]
    low = copy.deepcopy(tower).to(torch.bfloat16)
    output = low(images(), generator=0).hidden_states[-2]
    assert output.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(output.float().flatten(1), expected.flatten(1))
    assert cosine.min() > 0.999


def test_compiled_passes_agree_with_eager_ones():
    tower = smoothed_tower(psm=psm_model(), num_samples=4, feature_layer=-2)
    expected = tower(images(), generator=0).hidden_states[-2]
    tower.compile(backend="aot_eager")
    torch.testing.assert_close(tower(images(), generator=0).hidden_states[-2], expected, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_recomputes_and_keeps_the_gradient():
    tower, calls = smoothed_tower(psm=psm_model(), num_samples=2, feature_layer=-2).train(), []
    parts = {
        "unet": tower.psm.purifier.unet.down_blocks[0].resnets[0].conv1,
        "vision": tower.vision_tower.encoder.layers[0].mlp,
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))

    def gradient():
        calls.clear()
        pixels = images(1).requires_grad_()
        tower(pixels, generator=0).hidden_states[-2].square().sum().backward()
        return pixels.grad

    expected = gradient()
    assert sorted(calls) == ["unet", "vision"]
    tower.activation_checkpointing_enable()
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-6)
    assert sorted(calls) == ["unet", "unet", "vision", "vision"]


def test_memory_does_not_grow_with_the_number_of_samples():
    """No pass is larger than the limit, and no more than two passes' features are alive at a time."""
    tower, rows, seen, most = smoothed_tower(num_samples=64, max_batch_size=4), [], [], []

    def watch(_, __, output):
        rows.append(len(output.last_hidden_state))
        seen.append(weakref.ref(output.last_hidden_state))
        most.append(sum(reference() is not None for reference in seen))

    tower.vision_tower.register_forward_hook(watch)
    with torch.no_grad():
        tower(images(3))
    assert sum(draws.shape[1] for draws in tower.sample_features(images(2), 32)) == 32
    assert max(rows) == 4
    assert sum(rows) == 3 * 64 + 2 * 32
    assert max(most) <= 2


def test_a_stream_keeps_the_setting_it_was_made_under():
    tower = smoothed_tower(sigma=0.1)
    with tower.smoothing(sigma=0.9):
        stream = tower.sample_features(images(), 4, generator=0)
        expected = torch.cat(list(tower.sample_features(images(), 4, generator=0)), 1)
    tower.config.feature_layer = 1
    assert torch.equal(torch.cat(list(stream), 1), expected)


def test_the_feature_follows_the_configuration():
    tower = smoothed_tower(sigma=0, num_samples=1, feature_layer=-2)
    tower(images())
    tower.config.feature_layer = 1
    states = vision_model()(images(), output_hidden_states=True).hidden_states
    assert torch.equal(tower(images()).hidden_states[1], states[1])


def test_a_copy_uses_its_own_weights():
    tower = smoothed_tower(psm=psm_model(), feature_layer=-2)
    tower(images())
    tower.compile(backend="eager")
    twin = copy.deepcopy(tower)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(
        tower(images(), generator=0).hidden_states[-2], twin(images(), generator=0).hidden_states[-2]
    )


@pytest.mark.parametrize("purifier", ["none", "unet", "diffusion"])
def test_constants_are_not_made_anew_in_every_pass(purifier, monkeypatch):
    """Making a tensor from Python numbers copies from the host, and on a GPU waits for it: per call, not per pass."""
    psm = psm_model(purifier=purifier)
    tower, made = smoothed_tower(psm=psm, feature_layer=-2), []
    original = torch.Tensor.new_tensor
    monkeypatch.setattr(
        torch.Tensor, "new_tensor", lambda *args, **kwargs: made.append(1) or original(*args, **kwargs)
    )
    counts = []
    for limit in (2, 8):
        made.clear()
        with tower.smoothing(num_samples=8, max_batch_size=limit):
            tower(images(1))
        counts.append(len(made))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["vit", "registers"])
def test_other_auto_models_are_wrapped_too(name):
    shape = {k: v for k, v in SHAPE.items() if k != "intermediate_size"}
    model = {
        "vit": lambda: ViTModel(ViTConfig(**SHAPE)),
        "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, mlp_ratio=2)),
    }[name]().eval()
    expected = model(images(), output_hidden_states=True)
    tower = SmoothedVisionTower.from_components(
        model, None, sigma=0, num_samples=1, feature_layer=-2, image_mean=MEAN, image_std=STD
    )
    assert torch.equal(tower(images()).hidden_states[-2], expected.hidden_states[-2])


def test_a_fresh_psm_is_almost_the_identity_on_features():
    torch.manual_seed(0)
    psm = PSMModel(PSMConfig(mapper_config={"hidden_size": WIDTH, "num_heads": 4}))
    plain, mapped = smoothed_tower(num_samples=2), smoothed_tower(psm=psm, num_samples=2)
    first, second = (tower(images(), generator=0).last_hidden_state for tower in (plain, mapped))
    assert (second - first).norm() < 0.01 * first.norm()
    assert not torch.equal(first, second)


def test_the_configuration_knows_the_wrapped_shapes():
    config = smoothed_tower().config
    assert isinstance(config, SmoothedVisionTowerConfig)
    assert (config.hidden_size, config.patch_size, config.num_hidden_layers) == (WIDTH, 4, LAYERS)


@pytest.mark.gpu
@pytest.mark.parametrize("purifier", ["none", "unet", "diffusion"])
def test_passes_do_not_wait_for_the_gpu(purifier):
    tower = smoothed_tower(psm=psm_model(purifier=purifier), feature_layer=-2).cuda()
    pixels = images(1).cuda()
    options = {"output_hidden_states": [3]}
    passes = tower._passes(tower._model(whole=False), pixels, options, 0, [0], 0.1, range(8), 2)
    next(passes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(passes)) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    tower = smoothed_tower(psm=psm_model(), sigma=0, num_samples=1)
    expected = tower(images()).last_hidden_state
    torch.testing.assert_close(tower.cuda()(images().cuda()).last_hidden_state.cpu(), expected, rtol=1e-3, atol=1e-4)
    tower.config.sigma, tower.config.num_samples = 0.2, 4
    whole = tower(images(3).cuda(), generator=1, image_ids=[5, 6, 7]).last_hidden_state
    alone = tower(images(3)[1:2].cuda(), generator=1, image_ids=[6]).last_hidden_state
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-3, atol=1e-4)
