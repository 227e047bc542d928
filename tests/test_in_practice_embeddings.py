"""`examples/export_embeddings.py`: what it writes, fed to the language model, is what the host itself would have read."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_hosts import fixed_noise
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from fs_psm_hf import PSMModel, attach
from fs_psm_hf.demo import demo_images


ROOT = Path(__file__).parents[1]
LLAVA = ROOT / "model_cards" / "tiny-llava-cifar10"
PSM = ROOT / "model_cards" / "fs-psm-tiny-clip-cifar10"
PROMPT = "USER: <image>\ndescribe this image in one sentence. ASSISTANT:"


def example():
    spec = importlib.util.spec_from_file_location("export_embeddings", ROOT / "examples" / "export_embeddings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    command = [sys.executable, "examples/export_embeddings.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def llava_next():
    """The tower and the language model of the embedded LLaVA in a LLaVA-NeXT that cuts images into crops of 32 px."""
    source = LlavaForConditionalGeneration.from_pretrained(LLAVA, dtype="float32")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**source.config.vision_config.to_dict()),
        text_config=source.config.text_config,
        image_token_index=source.config.image_token_index,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        image_seq_length=64,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    host = LlavaNextForConditionalGeneration(config).eval()
    missing, unexpected = host.load_state_dict(source.state_dict(), strict=False)
    assert (missing, unexpected) == (["model.image_newline"], [])
    own = AutoProcessor.from_pretrained(LLAVA)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=own.image_processor.image_mean,
        image_std=own.image_processor.image_std,
    )
    processor = LlavaNextProcessor(
        images, own.tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return host, processor


def smoothed(kind):
    host, processor = llava_next() if kind == "llava_next" else plain_llava()
    attach(host, PSMModel.from_pretrained(PSM), sigma=0.2, num_samples=3, processor=processor)
    return host, processor


def plain_llava():
    return LlavaForConditionalGeneration.from_pretrained(LLAVA, dtype="float32"), AutoProcessor.from_pretrained(LLAVA)


def save_picture(path, size=(80, 50)):
    demo_images()[4].image.resize(size).save(path)
    return path


def with_embeddings(host, inputs, rows):
    """The prompt as embeddings, with `rows` in the places of the image tokens."""
    embeds = host.get_input_embeddings()(inputs["input_ids"]).clone()
    places = inputs["input_ids"] == host.config.image_token_id
    assert int(places.sum()) == len(rows)
    embeds[places] = rows.to(embeds)
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("size", [(80, 50), (40, 90)])
@torch.no_grad()
def test_the_language_model_reads_the_same(kind, size, tmp_path):
    host, processor = smoothed(kind)
    tower, path = host.model.vision_tower, save_picture(tmp_path / "ship.png", size)
    with fixed_noise(tower):
        count = example().export(host, tower, processor, path, tmp_path / "out", "host")
        inputs = processor(images=Image.open(path), text=PROMPT, return_tensors="pt")
        expected = host(**inputs).logits
        tokens = host.generate(**inputs, max_new_tokens=8, do_sample=False)
    rows = load_file(tmp_path / "out" / "ship.png.safetensors")["image_embeds"]
    assert rows.shape == (count, host.config.text_config.hidden_size)
    assert count == 64 if kind == "llava" else count > 64
    prompt = with_embeddings(host, inputs, rows)
    torch.testing.assert_close(host(**prompt).logits, expected, rtol=1e-5, atol=1e-5)
    answer = host.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(answer, tokens[:, inputs["input_ids"].shape[1] :])


@torch.no_grad()
def test_command_line_on_a_plain_host(tmp_path):
    """No noise and one draw: the file holds the plain host's own embeddings."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.jpg"):
        save_picture(tmp_path / "images" / name)
    options = ["--host", LLAVA, "--sigma", 0, "--num-samples", 1, "--dtype", "float32"]
    result = run(*options, "--images", tmp_path / "images", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "a.png: 64 tokens\nb.jpg: 64 tokens\n"
    names = ["a.png.json", "a.png.safetensors", "b.jpg.json", "b.jpg.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    host, processor = plain_llava()
    picture = Image.open(tmp_path / "images" / "a.png")
    pixels = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    (expected,) = host.get_image_features(pixels).pooler_output
    rows = load_file(tmp_path / "out" / "a.png.safetensors")["image_embeds"]
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    facts = json.loads((tmp_path / "out" / "a.png.json").read_text())
    made = {"image": "a.png", "tokens": 64, "width": rows.shape[1], "dtype": "float32", "host": "tiny-llava-cifar10"}
    made |= {"psm": "none", "sigma": 0.0, "num_samples": 1}
    assert facts.items() >= made.items()
    assert facts["tower"]["feature_layer"] == -2
    assert str(tmp_path) not in json.dumps(facts)


def saved_host(folder):
    host, processor = smoothed("llava")
    host.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_smoothed_host_keeps_its_settings_unless_told(tmp_path):
    module, saved = example(), saved_host(tmp_path / "saved")
    _, tower, _ = module.load(saved)
    assert (tower.sigma, tower.num_samples) == (0.2, 3)
    _, tower, _ = module.load(saved, sigma=0.5)
    assert (tower.sigma, tower.num_samples) == (0.5, 3)
    _, tower, _ = module.load(saved, num_samples=16)
    assert (tower.sigma, tower.num_samples) == (0.2, 16)
    with pytest.raises(ValueError, match="`--psm` must not be given for a host that is smoothed already, got another"):
        module.load(saved, psm="another")
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1, got 0"):
        module.load(saved, num_samples=0)


def test_a_plain_host_takes_a_psm_and_has_defaults():
    _, tower, _ = example().load(LLAVA, psm=PSM)
    assert (tower.sigma, tower.num_samples) == (0.25, 4)
    assert tower.config.psm_config.purifier == "unet"
    _, tower, _ = example().load(LLAVA, psm="none", sigma=0.1, num_samples=2)
    assert (tower.sigma, tower.num_samples) == (0.1, 2)
    assert tower.psm.purifier is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "cannot identify image file"),
        (["--psm", PSM], "`--psm` must not be given for a host that is smoothed already"),
        (["--sigma", -1], "`sigma` must be a finite number >= 0"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_half_file(options, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    saved = saved_host(tmp_path / "saved")
    places = ["--host", saved, "--images", tmp_path / "broken.png", "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["export_embeddings.py", *map(str, [*places, *options])])
    with pytest.raises(SystemExit, match="2"):
        example().main()
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("out/*"))


def test_two_images_of_one_name_and_a_folder_of_none_are_refused(tmp_path):
    for folder in ("one", "two", "empty"):
        (tmp_path / folder).mkdir()
    paths = [save_picture(tmp_path / folder / "same.png") for folder in ("one", "two")]
    with pytest.raises(ValueError, match="`--images` must have names of their own, got same.png twice"):
        example().image_files(paths)
    with pytest.raises(ValueError, match="`--images` .*empty holds no image"):
        example().image_files([tmp_path / "empty"])
    assert example().image_files([tmp_path / "one", paths[1].rename(tmp_path / "two" / "other.png")])[1].name == (
        "other.png"
    )
