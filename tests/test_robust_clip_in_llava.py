"""A converted tower of another image size in a LLaVA: the helper of `examples/robust_clip_in_llava.py`."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from original_open_clip import Visual, in_open_clip_layout
from PIL import Image
from safetensors.torch import save_file
from tiny_models import images, llava
from transformers import AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from fs_psm_hf import SmoothedVisionTower, attach, detach
from fs_psm_hf.conversion_open_clip import convert_open_clip_checkpoint


ROOT = Path(__file__).parents[1]


def example():
    """The module of `examples/robust_clip_in_llava.py`."""
    spec = importlib.util.spec_from_file_location("robust_clip", ROOT / "examples" / "robust_clip_in_llava.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def embedded_llava():
    folder = ROOT / "model_cards" / "tiny-llava-cifar10"
    processor = AutoProcessor.from_pretrained(folder)
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), processor


def ask(processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    return processor(images=image, text="USER: <image>\nwhat is in the picture? ASSISTANT:", return_tensors="pt")


def write_tower(folder, host, name="robust.pt", **options):
    """The tower of a host as a file of open_clip, converted."""
    torch.save(in_open_clip_layout(host.model.vision_tower), folder / name)
    heads = host.config.vision_config.num_attention_heads
    return convert_open_clip_checkpoint(folder / name, folder / "robust", num_heads=heads, **options)


def test_a_llava_with_its_own_tower_converted_is_as_before(tmp_path):
    host, processor = embedded_llava()
    folder = write_tower(tmp_path, host)
    inputs = ask(processor)
    statistics = {"image_mean": processor.image_processor.image_mean, "image_std": processor.image_processor.image_std}
    with torch.no_grad():
        expected = host(**inputs).logits
        example().replace_tower(host, processor, folder)
        assert torch.equal(host(**inputs).logits, expected)
        attach(host, sigma=0, num_samples=1, **statistics)
        assert torch.equal(host(**inputs).logits, expected)


def test_a_smaller_image_size_than_the_hosts(tmp_path):
    """As 224 px in a host of 336 px: fewer image tokens, counted by the processor, and everything saves and reloads."""
    host, processor = embedded_llava()
    before = ask(processor)
    folder = write_tower(tmp_path, host, image_size=24)
    # What happens without the helper's changes: the tower refuses the host's images, and says why.
    tower = CLIPVisionModel.from_pretrained(folder)
    own, host.model.vision_tower = host.model.vision_tower, tower
    with pytest.raises(ValueError, match=r"Input image size \(32\*32\) doesn't match model \(24\*24\)"):
        host(**before)
    host.model.vision_tower = own

    example().replace_tower(host, processor, folder)
    inputs = ask(processor)
    assert [(i["input_ids"] == host.config.image_token_id).sum().item() for i in (before, inputs)] == [64, 36]
    assert inputs["pixel_values"].shape == (1, 3, 24, 24)
    assert (host.config.image_seq_length, host.config.vision_config.image_size) == (36, 24)
    with torch.no_grad():
        plain = host(**inputs).logits
        attach(host, sigma=0, num_samples=1, processor=processor)
        assert torch.equal(host(**inputs).logits, plain)
        detach(host)
        attach(host, sigma=0.25, num_samples=4, processor=processor)
    assert host.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4
    host.save_pretrained(tmp_path / "smoothed")
    processor.save_pretrained(tmp_path / "smoothed")
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "smoothed", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(loaded.model.vision_tower, SmoothedVisionTower)
    reloaded = AutoProcessor.from_pretrained(tmp_path / "smoothed")
    again = ask(reloaded)
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert torch.equal(again["pixel_values"], inputs["pixel_values"])
    assert type(detach(loaded)) is CLIPVisionModel
    with torch.no_grad():
        torch.testing.assert_close(loaded(**again).logits, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["plain", "published"])
def test_a_replaced_tower_without_smoothing_saves_and_reloads(layout, tmp_path):
    """A host that was loaded from the published layout remembers its renamings; the new tower has the same names."""
    host = llava()
    folder = write_tower(tmp_path, host, image_size=12)
    state = host.state_dict()
    if layout == "published":
        state = {
            key.replace("model.vision_tower.", "vision_tower.vision_model.")
            .replace("model.multi_modal_projector.", "multi_modal_projector.")
            .replace("model.language_model.", "language_model.model.")
            .replace("lm_head.", "language_model.lm_head."): value.clone()
            for key, value in state.items()
        }
    host.config.save_pretrained(tmp_path / "hub")
    save_file(state, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    host = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hub")
    _, processor = embedded_llava()
    example().replace_tower(host, processor, folder)
    host.save_pretrained(tmp_path / "again")
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[1, *[7] * 9, 11, 12]])
    with torch.no_grad():
        expected = host(input_ids=ids, pixel_values=images(1, 12)).logits
        assert torch.equal(loaded(input_ids=ids, pixel_values=images(1, 12)).logits, expected)


def test_a_tower_of_another_width_is_refused(tmp_path):
    host, processor = embedded_llava()
    torch.save(Visual().state(torch.float32), tmp_path / "x.pt")
    folder = convert_open_clip_checkpoint(tmp_path / "x.pt", tmp_path / "out", projection=False)
    own = host.model.vision_tower
    with pytest.raises(ValueError, match="must hold a tower of width 128, which the projector reads, got 64"):
        example().replace_tower(host, processor, folder)
    assert host.model.vision_tower is own
    assert processor.image_processor.crop_size["height"] == 32


def test_the_example_runs_as_its_docstring_says(tmp_path):
    host, _ = embedded_llava()
    folder = write_tower(tmp_path, host, image_size=24)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    command = [sys.executable, "examples/robust_clip_in_llava.py", "--tower", folder, "--image", tmp_path / "a.png"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*map(str, command), "--save", str(tmp_path / "saved")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "its own tower (32 px, 64 image tokens): a photo of" in result.stdout
    assert "robust tower (24 px, 36 image tokens):" in result.stdout
    assert "robust and smoothed (24 px, 36 image tokens):" in result.stdout
    assert (tmp_path / "saved" / "model.safetensors").exists()
