"""Numbers in the README and the cards are those of the committed results."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from fs_psm_hf import Certificate, PSMModel
from fs_psm_hf.certification.folder import summarize


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"


@pytest.mark.parametrize("sigma", ["0.25", "0.5"])
def test_the_certified_table_is_the_measured_one(sigma, monkeypatch):
    """Documents, rows, summary and certificates say the same."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    from certified_table import rows

    path = CARDS / "dinov2-small-fs" / "results" / f"sigma{sigma}.jsonl"
    header, *images, end = [json.loads(line) for line in path.read_text().splitlines()]
    assert (header["sigma"], header["num_samples"]) == (float(sigma), 1000)
    assert len(images) == 20
    assert end["rows"] == summarize(
        [Certificate.from_dict(entry) for line in images for entry in line["certificates"]]
    )
    for document in (ROOT / "README.md", CARDS / "dinov2-small-fs" / "README.md"):
        assert all(row in document.read_text() for row in rows(path)), document


def test_the_embedded_models_are_small():
    def size(name):
        return sum(path.stat().st_size for path in (CARDS / name).rglob("*") if path.is_file())

    assert size("tiny-clip-cifar10") + size("tiny-llava-cifar10") < 15e6
    assert size("tiny-denoiser-cifar10") < 3e6


def test_the_embedded_models_are_as_good_as_the_documents_say(monkeypatch):
    accuracy = json.loads((CARDS / "tiny-clip-cifar10" / "results" / "zero_shot.json").read_text())
    captions = json.loads((CARDS / "tiny-llava-cifar10" / "results" / "captioning.json").read_text())
    assert accuracy["num_images"] == 10_000
    assert accuracy["accuracy"] >= 0.70
    denoising = json.loads((CARDS / "tiny-denoiser-cifar10" / "results" / "denoising.json").read_text())
    decibels = denoising["sigma"]["0.12"]
    numbers = [f"{accuracy['accuracy']:.2%}", f"{captions['caption_accuracy']:.2%}"]
    numbers += [f"{decibels[name]:.2f} dB" for name in ("noisy_psnr_db", "denoised_psnr_db")]
    assert all(number in (ROOT / "README.md").read_text() for number in numbers)
    monkeypatch.syspath_prepend(ROOT / "examples" / "tiny")
    from train import render_card

    for stage, results in (("clip", accuracy), ("llava", captions), ("denoiser", denoising)):
        assert (CARDS / f"tiny-{stage}-cifar10" / "README.md").read_text() == render_card(stage, results)


def test_the_embedded_models_load_and_belong_together():
    clip = CLIPModel.from_pretrained(CARDS / "tiny-clip-cifar10")
    llava = LlavaForConditionalGeneration.from_pretrained(CARDS / "tiny-llava-cifar10")
    own, given = llava.model.vision_tower.state_dict(), clip.vision_model.state_dict()
    assert all(torch.equal(own[key], given[key]) for key in given)
    assert PSMModel.from_pretrained(CARDS / "tiny-denoiser-cifar10").purifier is not None
    processor = AutoProcessor.from_pretrained(CARDS / "tiny-llava-cifar10")
    assert (
        processor.image_processor.image_mean
        == AutoProcessor.from_pretrained(CARDS / "tiny-clip-cifar10").image_processor.image_mean
    )
