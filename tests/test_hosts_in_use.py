"""What is done with hosts: videos, other image sizes, several layers, one PSM for two, the command line; and bad input."""

import copy

import pytest
import torch
from host_models import HOSTS, IMAGE, VIDEO, clip, host_inputs
from tiny_models import MEAN, SIZE, STD, images, llava, llava_inputs, psm_model, vision_model
from transformers import AutoModel, AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fs_psm_hf import SmoothedVisionTower, attach, detach
from fs_psm_hf.host_kinds import HOSTS as REBUILT
from fs_psm_hf.host_kinds import OWN_CLASS_HOSTS, REFUSED, find_tower
from fs_psm_hf.inputs import load_tower


STATISTICS = {"image_mean": MEAN, "image_std": STD}


def transparent(host):
    return attach(host, sigma=0, num_samples=1, **STATISTICS)


# Videos ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_each_frame_of_a_video_is_smoothed(name):
    host, frames = HOSTS[name].build(), images(4)[None]
    with torch.no_grad():
        expected = host.model.get_video_features(frames).pooler_output
    ids = torch.tensor([[1, *[VIDEO] * expected.shape[1], 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": frames}
    with torch.no_grad():
        logits = host(**inputs).logits
    plain = find_tower(host).tower
    tower = transparent(host)
    with torch.no_grad():
        assert torch.equal(host.model.get_video_features(frames).pooler_output, expected)
        assert torch.equal(host(**inputs).logits, logits)
    rows = []
    plain.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["pixel_values"])), with_kwargs=True)
    with tower.smoothing(sigma=0.2, num_samples=3):
        host.generate(**inputs, max_new_tokens=2, min_new_tokens=2, num_beams=2, do_sample=False)
        assert sum(rows) == 4 * 3
        first, second = (tower(frames[0], output_hidden_states=True, generator=5).hidden_states for _ in range(2))
        layer = tower.config.feature_layer
        assert torch.equal(first[layer], second[layer])
        # Equal frames get noise of their own.
        same = tower(frames[0, :1].expand(2, -1, -1, -1), output_hidden_states=True, generator=5).hidden_states[layer]
        assert not torch.equal(same[0], same[1])


# Other image sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_of_another_size(kind):
    settings = STATISTICS | {"num_samples": 1}
    plain, pixels = vision_model(kind), images(2, 24)
    tower = SmoothedVisionTower.from_components(vision_model(kind), sigma=0, **settings)
    expected = plain(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(tower(pixels, interpolate_pos_encoding=True).last_hidden_state, expected)
    noisy = SmoothedVisionTower.from_components(vision_model(kind), psm_model(), sigma=0.2, **settings)
    found = noisy(pixels, interpolate_pos_encoding=True, generator=5).last_hidden_state
    assert found.shape == expected.shape
    assert (found - expected).abs().amax((1, 2)).min() > 1e-3
    if kind == "clip":
        with pytest.raises(ValueError, match=r"Input image size \(24\*24\) doesn't match model"):
            noisy(pixels)


def test_a_host_passes_the_option_on():
    host = llava()
    with torch.no_grad():
        expected = host.model.get_image_features(images(1, 24), interpolate_pos_encoding=True).pooler_output[0]
        transparent(host)
        found = host.model.get_image_features(images(1, 24), interpolate_pos_encoding=True).pooler_output[0]
    assert torch.equal(found, expected)


# Several layers -------------------------------------------------------------------------------------------------------


def layered(layers):
    host = llava(layer=layers)
    host.model.multi_modal_projector.linear_1 = torch.nn.Linear(32 * len(layers), 24)
    return host


@pytest.mark.parametrize("layers", [[-2, 1, 4], [3, -2], [-5, 0, -1, 2]])
def test_layers_may_be_counted_from_the_end_and_named_twice(layers):
    host = layered(layers)
    with torch.no_grad():
        expected = host(**llava_inputs(2)).logits
        attach(host, sigma=0, num_samples=1, **STATISTICS)
        assert torch.equal(host(**llava_inputs(2)).logits, expected)
        detach(host)
        tower = attach(host, sigma=0.2, num_samples=3, **STATISTICS)
        # The direction that is averaged is that of all the host reads, a layer as often as it reads it.
        states = tower(images(1), generator=5, output_hidden_states=layers).hidden_states
        served = torch.cat([states[layer][:, 1:] for layer in layers], -1).flatten()
        (draws,) = tower.sample_features(images(1), 3, generator=5)
    mean = draws[0].mean(0)
    torch.testing.assert_close(served / served.norm(), mean / mean.norm())


def test_a_mapper_needs_each_layer_once():
    with pytest.raises(
        ValueError, match=r"must name each layer once where a mapper refines the tokens, got \[3, -2\]"
    ):
        attach(layered([3, -2]), psm_model(width=64), **STATISTICS)
    with pytest.raises(ValueError, match="must be 96, the width of the tower's feature, got 64"):
        attach(layered([-2, 1, 4]), psm_model(width=64), **STATISTICS)


def test_the_layers_may_be_given_as_the_host_names_them():
    host = layered([-2, 1, 4])
    with pytest.raises(ValueError, match=r"`feature_layer` must be the one the host reads, \[-2, 1, 4\], got -2"):
        attach(host, feature_layer=-2, **STATISTICS)
    assert attach(host, feature_layer=(-2, 1, 4), **STATISTICS).config.feature_layer == [-2, 1, 4]
    with pytest.raises(ValueError, match=r"must be the one the host reads, its last output \(None\), got -1"):
        attach(HOSTS["gemma3"].build(), feature_layer=-1, **STATISTICS)


def test_internvl_asks_for_a_state_that_it_does_not_read():
    """It reads `last_hidden_state`; with a mapper that is all there is, and no raw state is given in its place."""
    host = HOSTS["internvl"].build()
    inputs = host_inputs(host, "internvl")
    tower = attach(host, psm_model(), sigma=0.2, num_samples=2, **STATISTICS)
    assert host(**inputs).logits.isfinite().all()
    output = tower(images(1), output_hidden_states=-1)
    assert set(output) == {"last_hidden_state"}
    with pytest.raises(ValueError, match="`output_hidden_states` asks for layer -2"):
        tower(images(1), output_hidden_states=-2)


# One PSM for two hosts ------------------------------------------------------------------------------------------------


def test_a_second_host_does_not_move_the_psm_of_the_first():
    psm, first, second = psm_model(), llava(), llava().to(torch.bfloat16)
    tower = attach(first, psm, sigma=0.2, num_samples=2, **STATISTICS)
    expected = tower(images(1), generator=5, output_hidden_states=-2).hidden_states[-2]
    other = attach(second, psm, sigma=0.2, num_samples=2, **STATISTICS)
    assert tower.psm is psm
    assert {p.dtype for p in psm.parameters()} == {torch.float32}
    assert {p.dtype for p in other.psm.parameters()} == {torch.bfloat16}
    assert torch.equal(tower(images(1), generator=5, output_hidden_states=-2).hidden_states[-2], expected)
    # Where nothing would move, it is shared.
    assert attach(llava(), psm, **STATISTICS).psm is psm


def test_the_model_without_its_head_reloads_by_itself(tmp_path):
    host = llava()
    host.save_pretrained(tmp_path / "whole")
    inner = LlavaModel.from_pretrained(tmp_path / "whole")
    attach(inner, psm_model(), sigma=0.2, num_samples=2, **STATISTICS)
    inner.save_pretrained(tmp_path / "inner")
    again, info = LlavaModel.from_pretrained(tmp_path / "inner", output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(again.vision_tower, SmoothedVisionTower)
    first, second = inner.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_tower_of_another_shape_is_seen():
    host = llava()
    config = copy.deepcopy(host.config.to_dict())
    torch.manual_seed(0)
    host.model.vision_tower = AutoModel.from_config(clip(image_size=2 * SIZE))
    with pytest.raises(
        ValueError, match=r"of image_size, patch_size, hidden_size \[16, 4, 32\], got \[32, 4, 32\]: the number"
    ):
        attach(host, **STATISTICS)
    assert type(host.model.vision_tower).__name__ == "CLIPVisionModel"
    assert host.config.to_dict() == config


def test_a_host_without_weights_in_memory_is_refused():
    with torch.device("meta"):
        host = llava()
    tower = host.model.vision_tower
    with pytest.raises(ValueError, match="`vision_tower` must be in memory, got one that is offloaded"):
        attach(host, **STATISTICS)
    assert host.model.vision_tower is tower
    # One offloaded weight is enough.
    host = llava()
    host.model.vision_tower.embeddings.patch_embedding.to("meta")
    with pytest.raises(ValueError, match="`vision_tower` must be in memory"):
        attach(host, **STATISTICS)


def test_the_reasons_are_about_known_kinds():
    known = {*REFUSED, *REBUILT, *OWN_CLASS_HOSTS}
    assert known <= set(CONFIG_MAPPING)
    assert len(known) == len(REFUSED) + len(REBUILT) + len(OWN_CLASS_HOSTS)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen2_vl", "its processor cuts images into patches"),
        ("lfm2_vl", "its processor cuts images into patches"),
        ("got_ocr2", "its tower answers with a map of channels"),
        ("video_llava", "it has two vision towers"),
        ("mllama", "its tower takes tiles of a picture"),
        ("kosmos-2", "it reads weights inside its vision model"),
    ],
)
def test_hosts_that_cannot_work_are_refused_with_the_reason(model_type, reason):
    config = CONFIG_MAPPING[model_type]()
    with torch.device("meta"):  # the real class at its real size, without its memory
        host = AutoModelForImageTextToText.from_config(config)
    before = host.config.to_dict()
    for call in (lambda: attach(host, **STATISTICS), lambda: detach(host)):
        with pytest.raises(ValueError, match=rf"must be a model whose vision tower can be smoothed, got .*: {reason}"):
            call()
    assert host.config.to_dict() == before


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_next", "gemma3", "mistral3", "blip-2", "smolvlm", "deepseek_vl"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_tower_of_a_saved_host_is_found(name, smoothed, tmp_path):
    host, processor = HOSTS[name].build(), CLIPImageProcessorPil(image_mean=MEAN, image_std=STD)
    weights = copy.deepcopy(find_tower(host).tower.state_dict())
    if smoothed and host.config.model_type in REBUILT:
        attach(host, psm_model("none", mapper=False), sigma=0.4, num_samples=7, **STATISTICS)
    host.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tower, _ = load_tower(str(tmp_path), sigma=0.1, num_samples=2)
    assert (tower.config.sigma, tower.config.num_samples) == (0.1, 2)
    assert tower.config.feature_layer == HOSTS[name].feature[0]
    state = tower.vision_tower.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


def test_the_statistics_may_come_from_the_processor_of_any_host():
    processor = CLIPImageProcessorPil(image_mean=MEAN, image_std=STD)
    for name in ("mistral3", "smolvlm"):
        assert attach(HOSTS[name].build(), processor=processor).config.image_std == STD


def test_prompts_of_one_batch_may_hold_different_numbers_of_images():
    host = llava()
    one, two = [1, *[IMAGE] * 16, 12], [1, *[IMAGE] * 16, 11, *[IMAGE] * 16, 12]
    ids = torch.tensor([[0] * (len(two) - len(one)) + one, two])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": images(3)}
    with torch.no_grad():
        expected = host(**inputs).logits
        transparent(host)
        assert torch.equal(host(**inputs).logits, expected)
