import contextlib
import copy

import pytest
import torch
from tiny_models import MEAN, STD, images, llava, llava_inputs, psm_model, vision_model
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration
from transformers.utils import logging

from fs_psm_hf import PSMModel, SmoothedVisionTower, attach, detach


STATISTICS = {"image_mean": MEAN, "image_std": STD}


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def encoder_calls(host):
    """Rows of each pass through the wrapped tower."""
    rows = []
    tower = host.model.vision_tower.vision_tower
    tower.embeddings.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    return rows


def test_attach_without_noise_changes_no_logit():
    host = llava()
    expected = host(**llava_inputs(2)).logits
    attach(host, sigma=0, num_samples=1, **STATISTICS)
    assert torch.equal(host(**llava_inputs(2)).logits, expected)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_tower_keeps_its_attention_kernel(kernel):
    host = llava()
    host.model.vision_tower.set_attn_implementation(kernel)
    expected = host(**llava_inputs()).logits
    tower = attach(host, sigma=0, num_samples=1, **STATISTICS)
    assert tower.vision_tower.config._attn_implementation == kernel
    assert torch.equal(host(**llava_inputs()).logits, expected)
    assert detach(host).config._attn_implementation == kernel
    assert torch.equal(host(**llava_inputs()).logits, expected)


def test_the_language_model_reads_the_smoothed_patches():
    host = llava()
    tower = attach(host, psm_model(), sigma=0.2, num_samples=3, **STATISTICS)
    assert (tower.config.feature_layer, tower.config.first_token) == (-2, 1)
    assert host.model.vision_tower is tower
    states = tower(images(1), generator=5).hidden_states[-2][:, 1:]
    with fixed_noise(tower):
        features = host.model.get_image_features(images(1)).pooler_output[0]
    torch.testing.assert_close(features, host.model.multi_modal_projector(states)[0])


def test_pixel_gradients_pass_through_the_host():
    host = llava()
    attach(host, psm_model(), sigma=0.2, num_samples=3, **STATISTICS)
    inputs = llava_inputs()
    pixels = inputs.pop("pixel_values").requires_grad_()
    host(pixel_values=pixels, **inputs).logits.square().sum().backward()
    assert pixels.grad.abs().min() > 0


def test_several_layers_as_in_vipllava():
    host = llava(layer=[-2, 1])
    host.config.vision_feature_layer = [-2, 1]
    host.model.multi_modal_projector.linear_1 = torch.nn.Linear(64, 24)
    expected = host(**llava_inputs()).logits
    attach(host, sigma=0, num_samples=1, **STATISTICS)
    assert torch.equal(host(**llava_inputs()).logits, expected)


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"]
)
def test_generate_smooths_each_image_once(options):
    host = llava()
    attach(host, psm_model(), sigma=0.1, num_samples=4, **STATISTICS)
    rows = encoder_calls(host)
    tokens = host.generate(**llava_inputs(2), max_new_tokens=4, min_new_tokens=4, **options)
    assert tokens.shape == (2, 24)
    assert sum(rows) == 2 * 4


def test_detach_gives_the_first_tower_back():
    host = llava()
    before, config = copy.deepcopy(host), host.config.to_dict()
    tower = host.model.vision_tower
    attach(host, psm_model(), **STATISTICS)
    assert detach(host) is tower
    assert host.model.vision_tower is tower
    assert host.config.to_dict() == config
    assert same_weights(host, before)
    assert torch.equal(host(**llava_inputs()).logits, before(**llava_inputs()).logits)


def saved_and_loaded(host, folder):
    host.save_pretrained(folder)
    loaded, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return loaded


@contextlib.contextmanager
def fixed_noise(tower):
    """The host calls its tower without a seed; here the tower gets one."""
    forward = tower.forward
    tower.forward = lambda *args, **kwargs: forward(*args, **(kwargs | {"generator": 5}))
    try:
        yield
    finally:
        tower.__dict__.pop("forward")


def logits(host):
    """Logits with fixed noise, through the host's own code."""
    with torch.no_grad(), fixed_noise(host.model.vision_tower):
        return host(**llava_inputs(2)).logits


def assert_same_logits(host, expected):
    """Up to the rounding of kernels, which may choose their path by where a loaded weight lies in memory."""
    torch.testing.assert_close(logits(host), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["plain", "real"])
def test_a_whole_llava_reloads_exactly_twice(layout, tmp_path):
    host = llava()
    if layout == "real":
        # The layout of the published checkpoints: `vision_tower.vision_model.` and `language_model.model.` keys.
        from safetensors.torch import save_file

        state = {}
        for key, value in host.state_dict().items():
            key = key.replace("model.vision_tower.", "vision_tower.vision_model.")
            key = key.replace("model.multi_modal_projector.", "multi_modal_projector.")
            key = key.replace("model.language_model.", "language_model.model.").replace(
                "lm_head.", "language_model.lm_head."
            )
            state[key] = value.clone()
        host.config.save_pretrained(tmp_path / "hub")
        save_file(state, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
        reference = host
        host = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hub")
        assert same_weights(host, reference)
    attach(host, psm_model(), sigma=0.2, num_samples=3, **STATISTICS)
    expected = logits(host)
    first = saved_and_loaded(host, tmp_path / "first")
    assert isinstance(first.model.vision_tower, SmoothedVisionTower)
    assert same_weights(first, host)
    assert_same_logits(first, expected)
    second = saved_and_loaded(first, tmp_path / "second")
    assert same_weights(second, host)
    assert_same_logits(second, expected)
    assert second.model.vision_tower.config.to_dict() == first.model.vision_tower.config.to_dict()
    # Detached after the reload, it is a plain LLaVA again, and saves and reloads as one.
    plain = llava()
    detach(second)
    assert same_weights(second, plain)
    again = saved_and_loaded(second, tmp_path / "plain")
    assert same_weights(again, plain)
    assert type(again.model.vision_tower) is type(plain.model.vision_tower)


def test_detach_restores_the_renamings_of_an_old_checkpoint(tmp_path):
    host = llava()
    host.save_pretrained(tmp_path / "plain")
    host = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain")
    before = host._weight_conversions
    attach(host, **STATISTICS)
    detach(host)
    assert host._weight_conversions is before


def test_statistics_come_from_the_processor():
    processor = CLIPImageProcessorPil(image_mean=MEAN, image_std=STD)
    assert attach(llava(), processor=processor).config.image_mean == MEAN


def test_the_psm_is_frozen_and_follows_the_tower():
    host = llava().to(torch.bfloat16)
    psm = psm_model()
    tower = attach(host, psm, **STATISTICS)
    assert tower.psm is psm
    assert {p.dtype for p in psm.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in psm.parameters())
    assert (
        host(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in llava_inputs().items()})
        .logits.isfinite()
        .all()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "`image_mean` is missing"),
        (STATISTICS | {"sigma": -1.0}, "`sigma`"),
        (STATISTICS | {"num_samples": 0}, "`num_samples`"),
        (STATISTICS | {"psm": 64}, "must be 32, the width"),
    ],
)
def test_a_refused_attach_changes_nothing(options, words):
    host = llava()
    config, tower = host.config.to_dict(), host.model.vision_tower
    if "psm" in options:
        options = options | {"psm": psm_model(width=options["psm"])}
    with pytest.raises(ValueError, match=words):
        attach(host, **options)
    assert host.config.to_dict() == config
    assert host.model.vision_tower is tower


def test_unsupported_hosts_are_named():
    with pytest.raises(ValueError, match=r"`host` must be a model of type .*llava.*got CLIPVisionModel"):
        attach(vision_model(), **STATISTICS)
    with pytest.raises(ValueError, match="got Linear"):
        attach(torch.nn.Linear(2, 2), **STATISTICS)
    host = llava()
    with pytest.raises(ValueError, match="must have a smoothed vision tower, got a CLIPVisionModel"):
        detach(host)
    attach(host, **STATISTICS)
    with pytest.raises(ValueError, match="smoothed already"):
        attach(host, **STATISTICS)


def test_device_map_with_offloaded_parts(tmp_path):
    """accelerate's hooks sit on the modules, the truncated view of the tower included."""
    host = llava()
    attach(host, psm_model(), sigma=0.2, num_samples=3, **STATISTICS)
    expected = logits(host)
    host.save_pretrained(tmp_path / "saved")
    places = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "cpu"}
    loaded = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "saved", device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(logits(loaded), expected)
    detach(loaded)
    with pytest.raises(ValueError, match="got one that is offloaded"):
        attach(loaded, psm_model(), **STATISTICS)


def test_an_attention_kernel_can_be_chosen(tmp_path):
    host = llava()
    attach(host, psm_model(), sigma=0.2, num_samples=3, **STATISTICS)
    expected = logits(host)
    host.save_pretrained(tmp_path)
    for kernel in ("sdpa", "eager"):
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=kernel)
        assert loaded.model.vision_tower.vision_tower.config._attn_implementation == kernel
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)


class Blur(torch.nn.Module):
    """A purifier of a user's, with weights."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 3, 3, padding=1)

    def denoise(self, images, sigma):
        return self.net(images)


def test_an_own_purifier_keeps_its_dtype_in_a_half_precision_host():
    host = llava().to(torch.bfloat16)
    purifier = Blur()
    attach(host, purifier, **STATISTICS)
    assert purifier.net.weight.dtype == torch.float32
    assert host(**llava_inputs()).logits.isfinite().all()


def test_a_host_saved_with_an_own_purifier_does_not_reload_without_it(tmp_path):
    host = llava()
    attach(host, Blur(), **STATISTICS)
    host.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`purifier` was a module of yours"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_the_mode_of_the_tower_is_restored():
    host = llava().train()
    tower = attach(host, **STATISTICS)
    assert not tower.training
    assert detach(host).training


def test_only_the_layer_the_host_reads_is_taken():
    with pytest.raises(ValueError, match="`feature_layer` must be the one the host reads, -2, got -1"):
        attach(llava(), feature_layer=-1, **STATISTICS)
    assert attach(llava(), feature_layer=-2, **STATISTICS).config.feature_layer == -2


@pytest.fixture
def propagated():
    logging.enable_propagation()
    yield
    logging.disable_propagation()


def test_loading_says_nothing_alarming(tmp_path, caplog, propagated):
    host = llava()
    attach(host, psm_model(), **STATISTICS)
    host.save_pretrained(tmp_path)
    LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_a_psm_alone_is_small_and_reattaches(tmp_path):
    host, psm = llava(), psm_model()
    attach(host, psm, sigma=0.2, num_samples=3, **STATISTICS)
    expected = logits(host)
    psm.save_pretrained(tmp_path)
    other = llava()
    attach(other, PSMModel.from_pretrained(tmp_path), sigma=0.2, num_samples=3, **STATISTICS)
    assert same_weights(other, host)
    assert_same_logits(other, expected)
