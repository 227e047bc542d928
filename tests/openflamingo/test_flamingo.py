"""Real OpenFlamingos of every kind of language model: what they read, say and load once their tower is smoothed."""

import copy

import pytest
import torch
from flamingo_models import LANGUAGE_MODELS, PATCH, SIZE, TOKENS, WIDTH, flamingo, flamingo_inputs
from tiny_models import psm_model
from torch import nn
from transformers import CLIPImageProcessorPil
from transformers.activations import QuickGELUActivation

from fs_psm_hf import PSMConfig, PSMModel, SmoothedVisionTower, attach, certify_features, detach
from fs_psm_hf.openflamingo import CLIPVisionModelWithPatchTokens, attach_flamingo, detach_flamingo


ROUNDING = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(params=LANGUAGE_MODELS)
def any_host(request, language_models):
    return flamingo(language_models / request.param)


@pytest.fixture
def host(language_models):
    return flamingo(language_models / "opt")


def encoder_rows(tower):
    """Rows of each pass through the wrapped tower."""
    rows = []
    tower.vision_tower.vision_model.embeddings.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    return rows


def patch_psm(purifier="unet"):
    """A PSM as it is trained for an OpenFlamingo."""
    fields = psm_model(purifier, width=WIDTH).config.to_dict()
    fields["mapper_config"] = fields["mapper_config"] | {"num_prefix_tokens": 0}
    torch.manual_seed(2)
    return PSMModel(PSMConfig.from_dict(fields)).eval()


class Recorder(nn.Module):
    """A purifier that changes nothing and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def denoise(self, images, sigma):
        self.given.append(images)
        return images


def of(array, values):
    return array.new_tensor(values).view(3, 1, 1)


@torch.no_grad()
def test_without_noise_nothing_changes_but_rounding(any_host):
    host, processor, tokenizer = any_host
    inputs = flamingo_inputs(tokenizer, prompts=2, images=2)
    visual, pixels = host.vision_encoder, inputs["vision_x"].flatten(0, 2)
    expected, tokens = host(**inputs).logits, visual(pixels)[1]
    other = host(**inputs | {"vision_x": inputs["vision_x"] + 1}).logits
    assert (other - expected).abs().max() > 1e-3  # it sees images
    attach_flamingo(host, sigma=0, num_samples=1, processor=processor)
    pooled, found = host.vision_encoder(pixels)
    assert pooled is None
    assert found.shape == (4, TOKENS, WIDTH)
    torch.testing.assert_close(found, tokens, **ROUNDING)
    torch.testing.assert_close(host(**inputs).logits, expected, **ROUNDING)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_smooths_each_image_once(any_host, beams):
    host, processor, tokenizer = any_host
    inputs = flamingo_inputs(tokenizer, prompts=2, images=2)
    options = {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = host.generate(**inputs, **options)
    assert expected.shape[1] == inputs["lang_x"].shape[1] + 5
    tower = attach_flamingo(host, sigma=0, num_samples=1, processor=processor)
    rows = encoder_rows(tower)
    assert torch.equal(host.generate(**inputs, **options), expected)
    assert sum(rows) == 4
    rows.clear()
    with tower.smoothing(sigma=0.1, num_samples=3):
        host.generate(**inputs, **options)
    assert sum(rows) == 4 * 3


@torch.no_grad()
def test_the_language_model_reads_the_mean_of_the_visuals_tokens(host):
    """Direction of the mean unit feature, mean length: by the visual itself, on the very noisy images."""
    host, processor, tokenizer = host
    visual, recorder = copy.deepcopy(host.vision_encoder), Recorder()
    tower = attach_flamingo(host, recorder, sigma=0.2, num_samples=5, processor=processor)
    inputs = flamingo_inputs(tokenizer, images=1)
    read = []
    host.perceiver.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    host(**inputs)
    noisy, mean, std = torch.cat(recorder.given), tower.config.image_mean, tower.config.image_std
    assert noisy.shape == (5, 3, SIZE, SIZE)
    noise = noisy - (inputs["vision_x"].flatten(0, 2) * of(noisy, std) + of(noisy, mean))
    assert noise.std().item() == pytest.approx(0.2, rel=0.05)
    features = visual((noisy - of(noisy, mean)) / of(noisy, std))[1].flatten(1)
    lengths = features.norm(dim=-1, keepdim=True)
    direction = (features / lengths).mean(0)
    expected = direction / direction.norm() * lengths.mean()
    torch.testing.assert_close(read[0].flatten(), expected, **ROUNDING)


@torch.no_grad()
def test_a_mapper_refines_the_patch_tokens(host):
    host, processor, _ = host
    visual, psm, images = copy.deepcopy(host.vision_encoder), patch_psm("none"), torch.randn(2, 3, SIZE, SIZE)
    for name, parameter in psm.mapper.named_parameters():
        if name.endswith("scale"):
            parameter.fill_(0.2)
    tower, seen = attach_flamingo(host, psm, sigma=0.2, num_samples=1, processor=processor), []
    tower.vision_tower.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    _, tokens = host.vision_encoder(images)
    raw = visual(seen[0])[1]
    assert psm.mapper(raw, 0.2).abs().max() > 0.01
    torch.testing.assert_close(tokens, raw + psm.mapper(raw, 0.2), rtol=0, atol=2e-5)


@torch.no_grad()
def test_an_image_that_comes_again_gets_the_same_answer(host):
    host, processor, _ = host
    tower = attach_flamingo(host, sigma=0.2, num_samples=2, processor=processor)
    rows, images = encoder_rows(tower), torch.randn(3, 3, SIZE, SIZE)
    _, tokens = host.vision_encoder(images[[2, 0, 2, 1, 0]])
    assert sum(rows) == 3 * 2
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[1], tokens[4])
    _, again = host.vision_encoder(images[[2, 0, 2, 1, 0]], generator=11)
    expected = tower(images[[2, 0, 1]], generator=11).last_hidden_state
    torch.testing.assert_close(again, expected[[0, 1, 0, 2, 1]], rtol=0, atol=0)
    # Named images keep their own noise, whatever they show.
    _, named = host.vision_encoder(images[[0, 0]], generator=11, image_ids=[7, 8])
    assert (named[0] - named[1]).abs().max() > 1e-3


@torch.no_grad()
def test_media_can_be_cached(host):
    host, processor, tokenizer = host
    inputs = flamingo_inputs(tokenizer, prompts=1, images=2)
    expected = host(**inputs).logits
    tower = attach_flamingo(host, sigma=0, num_samples=1, processor=processor)
    rows = encoder_rows(tower)
    host.cache_media(inputs["lang_x"], inputs["vision_x"])
    for _ in range(3):
        logits = host(None, inputs["lang_x"], inputs["attention_mask"], clear_conditioned_layers=False).logits
    assert sum(rows) == 2
    host.uncache_media()
    torch.testing.assert_close(logits, expected, **ROUNDING)


@torch.no_grad()
def test_a_checkpoint_of_the_trained_parts_loads_before_and_after(any_host, language_models):
    """As those of the Hub: without what the encoder and the language model bring along."""
    host, processor, tokenizer = any_host
    inputs = flamingo_inputs(tokenizer, images=2)
    trained = {name for name, weight in host.named_parameters() if weight.requires_grad}
    state = host.state_dict()
    checkpoint = {name: state[name] + 0.02 * torch.randn_like(state[name]) for name in trained}
    before = host(**inputs).logits
    keys = {name for name in host.state_dict() if not name.startswith("vision_encoder.")}
    host.load_state_dict(checkpoint, strict=False)
    expected = host(**inputs).logits
    assert (expected - before).abs().max() > 1e-3
    loaded_after = flamingo(language_models / host.lang_encoder.config.model_type)[0]
    for own in (host, loaded_after):
        attach_flamingo(own, sigma=0, num_samples=1, processor=processor)
        assert {name for name in own.state_dict() if not name.startswith("vision_encoder.")} == keys
    result = loaded_after.load_state_dict(checkpoint, strict=False)
    assert result.unexpected_keys == []
    assert torch.equal(loaded_after(**inputs).logits, host(**inputs).logits)
    torch.testing.assert_close(host(**inputs).logits, expected, **ROUNDING)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_detach_gives_the_very_visual_back(host, training):
    host, processor, tokenizer = host
    inputs, visual = flamingo_inputs(tokenizer, images=2), host.vision_encoder
    visual.train(training)
    expected = host(**inputs).logits
    before = {name: value.clone() for name, value in host.state_dict().items()}
    attach_flamingo(host, patch_psm(), processor=processor)
    host(**inputs)
    assert detach_flamingo(host) is visual
    assert host.vision_encoder is visual
    assert visual.training is training
    after = host.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(host(**inputs).logits, expected)


def test_attach_and_detach_are_those_of_every_host(host):
    host, processor, _ = host
    visual = host.vision_encoder
    options = {"sigma": 0.3, "num_samples": 5, "max_batch_size": 7, "aggregation": "mean", "processor": processor}
    tower = attach(host, patch_psm(), **options)
    assert isinstance(tower, SmoothedVisionTower)
    assert host.vision_encoder.tower is tower
    assert host.vision_encoder.config is tower.config
    options["image_mean"] = list(processor.transforms[-1].mean)
    assert all(getattr(tower.config, name) == value for name, value in options.items() if name != "processor")
    with pytest.raises(ValueError, match="smoothed already"):
        attach(host)
    with pytest.raises(ValueError, match="`feature_layer` must be None for a Flamingo"):
        detach(host) and attach(host, feature_layer=-2)
    assert host.vision_encoder is visual


def test_no_weight_is_copied(host):
    host, processor, _ = host
    visual = host.vision_encoder
    tower = attach_flamingo(host, processor=processor)
    storages = {weight.untyped_storage().data_ptr() for weight in visual.parameters()}
    assert {weight.untyped_storage().data_ptr() for weight in tower.vision_tower.parameters()} <= storages
    # The visual is no second part of the host, and what it held frozen stays so.
    assert all(module is not visual for module in host.modules())
    assert not any(weight.requires_grad for weight in host.vision_encoder.parameters())


@torch.no_grad()
def test_a_tower_that_shares_its_weights_is_saved_whole(host, tmp_path):
    host, processor, _ = host
    tower = attach_flamingo(host, patch_psm(), processor=processor)
    images = torch.randn(1, 3, SIZE, SIZE)
    tower.save_pretrained(tmp_path)
    again = type(tower).from_pretrained(tmp_path)
    assert type(again.vision_tower) is CLIPVisionModelWithPatchTokens
    expected = tower(images, generator=3).last_hidden_state
    torch.testing.assert_close(again(images, generator=3).last_hidden_state, expected, **ROUNDING)


def test_pixel_gradients_pass_through_the_tower(host):
    host, processor, _ = host
    attach_flamingo(host, patch_psm(), sigma=0.1, num_samples=2, processor=processor)
    images = torch.randn(1, 3, SIZE, SIZE).expand(2, -1, -1, -1).clone().requires_grad_()
    host.vision_encoder(images)[1].square().sum().backward()
    assert images.grad.abs().amin(dim=(1, 2, 3)).min() > 0  # also of a row that is another's equal


@torch.no_grad()
def test_bfloat16_before_and_after(host):
    host, processor, tokenizer = host
    inputs = flamingo_inputs(tokenizer, images=2)
    half = copy.deepcopy(host).bfloat16()
    inputs["vision_x"] = inputs["vision_x"].bfloat16()
    expected = half.vision_encoder(inputs["vision_x"].flatten(0, 2))[1]
    tower = attach_flamingo(half, patch_psm(), sigma=0, num_samples=1, processor=processor)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    tower.psm.purifier = tower.psm.mapper = None
    found = half.vision_encoder(inputs["vision_x"].flatten(0, 2))[1]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15)
    assert half(**inputs).logits.isfinite().all()
    # Converted while it is smoothed, the visual follows, or the host could not run.
    attach_flamingo(host, processor=processor)
    host.bfloat16()
    visual = detach_flamingo(host)
    assert {weight.dtype for weight in visual.parameters()} == {torch.bfloat16}
    assert torch.equal(visual(inputs["vision_x"].flatten(0, 2))[1], expected)


def test_the_certificate_is_about_what_the_host_reads(host):
    host, processor, _ = host
    visual, images = copy.deepcopy(host.vision_encoder), torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        anchor = nn.functional.normalize(visual(images)[1].flatten(1), dim=-1)
    tower = attach_flamingo(host, sigma=0.1, num_samples=4, processor=processor)
    torch.testing.assert_close(tower.clean_features(images), anchor)
    options = {"epsilons": [0.05], "num_samples": 400, "generator": 2}
    (own,) = certify_features(tower, images, **options)
    (through_host,) = certify_features(host, images, **options)
    assert own.robustness_score == through_host.robustness_score
    assert own.score_lower_bound == through_host.score_lower_bound
    assert own.deployed is not None


def test_the_normalisation_is_that_of_the_images(host):
    host, processor, _ = host
    own = list(host.vision_encoder.image_mean), list(host.vision_encoder.image_std)
    step = processor.transforms[-1]
    assert own == (list(step.mean), list(step.std))
    step.mean, step.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    huggingface = CLIPImageProcessorPil(image_mean=[0.3] * 3, image_std=[0.2] * 3)
    given = [
        ({}, own),
        ({"processor": processor}, ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])),
        ({"processor": huggingface}, ([0.3] * 3, [0.2] * 3)),
        ({"processor": processor, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}, ([0.5] * 3, [0.25] * 3)),
    ]
    for options, expected in given:
        config = attach_flamingo(host, **options).config
        assert (config.image_mean, config.image_std) == expected
        detach_flamingo(host)


@torch.no_grad()
@pytest.mark.parametrize(("vision", "activation"), [("tiny", "gelu"), ("tiny-quickgelu", "quick_gelu")])
def test_the_visual_decides_the_activation(language_models, vision, activation):
    host, processor, _ = flamingo(language_models / "opt", vision)
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = host.vision_encoder(images)[1]
    tower = attach_flamingo(host, sigma=0, num_samples=1, processor=processor)
    config = tower.config.vision_config
    assert (config.hidden_act, config.num_attention_heads, config.patch_size) == (activation, 4, PATCH)
    torch.testing.assert_close(tower(images).last_hidden_state, expected, **ROUNDING)
    other = {"gelu": nn.GELU(), "quick_gelu": QuickGELUActivation()}
    del other[activation]
    for layer in tower.vision_tower.vision_model.encoder.layers:
        layer.mlp.activation_fn = next(iter(other.values()))
    assert (tower(images).last_hidden_state - expected).abs().max() > 1e-2  # with the other one it shows
