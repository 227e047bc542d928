"""A smoothed host in the hands of those who serve and tune it: settings at run time, dtypes, placement, compilation, pipelines."""

from pathlib import Path

import pytest
import torch
from test_hosts import fixed_noise
from tiny_models import MEAN, STD, images, llava, llava_inputs, psm_model, smoothed_tower
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

from fs_psm_hf import PSMModel, attach, detach
from fs_psm_hf.demo import demo_images


CARDS = Path(__file__).parents[1] / "model_cards"
STATISTICS = {"image_mean": MEAN, "image_std": STD}
SETTINGS = {"sigma": 0.2, "num_samples": 3} | STATISTICS


def smoothed_llava():
    host = llava()
    attach(host, psm_model(), **SETTINGS)
    return host


def logits(host, **changes):
    with torch.no_grad(), fixed_noise(host.model.vision_tower):
        return host(**(llava_inputs(2) | changes)).logits


# Settings ---------------------------------------------------------------------------------------------------------


def passes(tower):
    rows = []
    tower.vision_tower.embeddings.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    return rows


def test_sigma_and_n0_are_changed_where_the_tower_runs_and_in_its_configuration(tmp_path):
    tower, plain = smoothed_tower(sigma=0.1, num_samples=3), smoothed_tower(sigma=0.5, num_samples=16)
    assert (tower.sigma, tower.num_samples) == (0.1, 3)
    tower.sigma, tower.num_samples = 0.5, 16
    assert (tower.config.sigma, tower.config.num_samples) == (0.5, 16)
    rows = passes(tower)
    output = tower(images(1), generator=2).last_hidden_state
    assert sum(rows) == 16
    assert torch.equal(output, plain(images(1), generator=2).last_hidden_state)
    tower.save_pretrained(tmp_path)
    again = type(tower).from_pretrained(tmp_path)
    assert (again.sigma, again.num_samples) == (0.5, 16)
    again.sigma = 1  # a whole number of pixels is a length too
    assert again.config.sigma == 1


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), None, "0.5", True])
def test_a_sigma_out_of_range_is_refused_at_once(value):
    tower = smoothed_tower(sigma=0.1)
    with pytest.raises(ValueError, match=r"`sigma` must be a finite number >= 0 in \[0, 1\] pixel units, got"):
        tower.sigma = value
    assert tower.config.sigma == tower.sigma == 0.1


@pytest.mark.parametrize("value", [0, -4, 2.0, None, "4", True])
def test_an_n0_out_of_range_is_refused_at_once(value):
    tower = smoothed_tower(num_samples=3)
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1, got"):
        tower.num_samples = value
    assert tower.config.num_samples == tower.num_samples == 3


def test_a_setting_for_one_request():
    host = smoothed_llava()
    tower = host.model.vision_tower
    rows = passes(tower)
    with tower.smoothing(sigma=0.5, num_samples=9):
        assert (tower.sigma, tower.num_samples) == (0.5, 9)
        tower.num_samples = 2  # wins until the end of the block
        host.generate(**llava_inputs(), max_new_tokens=2)
    assert sum(rows) == 2
    assert (tower.sigma, tower.num_samples) == (0.2, 3)
    with pytest.raises(ValueError, match="`num_samples`"), tower.smoothing(num_samples=0):
        raise AssertionError
    assert (tower.sigma, tower.num_samples) == (0.2, 3)


def test_a_bad_setting_written_past_the_checks_is_refused_by_the_next_call():
    tower = smoothed_tower()
    tower.config.sigma = -1.0
    with pytest.raises(ValueError, match="`sigma` must be a finite number >= 0"):
        tower(images())


# dtypes, placement, compilation ------------------------------------------------------------------------------------


def test_bfloat16_host():
    host, low = smoothed_llava(), llava().to(torch.bfloat16)
    attach(low, psm_model(), **SETTINGS)
    assert {weight.dtype for weight in low.parameters()} == {torch.bfloat16}
    expected, got = logits(host), logits(low)
    assert got.dtype == torch.bfloat16
    assert torch.cosine_similarity(got.float().flatten(1), expected.flatten(1)).min() > 0.999
    tokens = low.generate(**llava_inputs(2), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 24)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_before_attach(device_map, tmp_path):
    llava().save_pretrained(tmp_path / "plain")
    host = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain", device_map=device_map)
    attach(host, psm_model(), **SETTINGS)
    torch.testing.assert_close(logits(host), logits(smoothed_llava()), rtol=0, atol=1e-6)
    assert host.generate(**llava_inputs(), max_new_tokens=4, min_new_tokens=4).shape == (1, 24)
    host.save_pretrained(tmp_path / "smoothed")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "smoothed", device_map=device_map)
    torch.testing.assert_close(logits(again), logits(host), rtol=0, atol=1e-6)
    detach(again)
    plain = llava()
    torch.testing.assert_close(again(**llava_inputs()).logits, plain(**llava_inputs()).logits, rtol=0, atol=1e-6)


def test_a_compiled_tower_in_its_host():
    host = smoothed_llava()
    expected = logits(host)
    tokens = host.generate(**llava_inputs(), max_new_tokens=4, min_new_tokens=4, num_beams=2)
    compiler = CompileCounterWithBackend("aot_eager")
    host.model.vision_tower.compile(backend=compiler)
    torch.testing.assert_close(logits(host), expected, rtol=1e-4, atol=1e-5)
    assert compiler.frame_count > 0
    assert host.generate(**llava_inputs(), max_new_tokens=4, min_new_tokens=4, num_beams=2).shape == tokens.shape


@pytest.mark.slow
def test_a_compiled_host():
    host = smoothed_llava()
    expected = logits(host)
    host.model.vision_tower.sigma = 0.0
    host.model.vision_tower.num_samples = 1
    quiet = logits(host)
    assert not torch.allclose(quiet, expected, atol=1e-3)
    compiled = torch.compile(host, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**llava_inputs(2)).logits, quiet, rtol=1e-4, atol=1e-5)


# The embedded LLaVA and the tools around it ------------------------------------------------------------------------


def embedded():
    name = CARDS / "tiny-llava-cifar10"
    host = LlavaForConditionalGeneration.from_pretrained(name, dtype="float32")
    processor = AutoProcessor.from_pretrained(name)
    psm = PSMModel.from_pretrained(CARDS / "fs-psm-tiny-clip-cifar10")
    attach(host, psm, sigma=0.1, num_samples=4, processor=processor)
    return host, processor


def chat(*pictures):
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "describe this image in one sentence."}]}]


def test_pipeline_with_the_chat_template():
    host, processor = embedded()
    rows = passes(host.model.vision_tower)
    answer = pipeline("image-text-to-text", model=host, processor=processor)
    ship = demo_images()[4].image
    (result,) = answer(text=chat(ship), generate_kwargs={"max_new_tokens": 12, "do_sample": False})
    assert result["generated_text"][-1]["content"].strip() == "a photo of a ship."
    assert sum(rows) == 4
