import dataclasses
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import MEAN, SIZE, STD, llava, psm_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from fs_psm_hf import PSMModel, attach, certify_features
from fs_psm_hf.demo import EPSILONS, LLAVA, PSM, QUESTION, SIGMA, demo_images, encode, run, stages


MODEL_CARDS = Path(__file__).parents[1] / "model_cards"
CLASSES = "airplane|automobile|bird|cat|deer|dog|frog|horse|ship|truck"
DRAWS, SEED = 30, 5


def tiny_processor():
    """Words 3, 4, … are named after their ids; `<image>` has id 7, as in `tiny_models.llava`."""
    names = {0: "<pad>", 1: "<s>", 2: "<unk>", 7: "<image>", 39: "</s>"}
    vocabulary = {names.get(i, f"word{i}"): i for i in range(40)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=MEAN,
            image_std=STD,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, **special, additional_special_tokens=["<image>"], padding_side="left"
        ),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template="{% for part in messages[0]['content'] %}{{ '<image>' if part['type'] == 'image' else "
        "' ' + part['text'] }}{% endfor %}",
    )


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """A folder like model_cards/, with random weights."""
    folder = tmp_path_factory.mktemp("cards")
    host = llava()
    host.generation_config.max_new_tokens = 8
    host.generation_config.min_new_tokens = 2
    host.save_pretrained(folder / LLAVA)
    tiny_processor().save_pretrained(folder / LLAVA)
    psm_model(mapper=False).save_pretrained(folder / PSM)
    (folder / LLAVA / "results").mkdir()
    results = {"caption_accuracy": 0.8125, "num_images": 2000}
    (folder / LLAVA / "results" / "captioning.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def shown(cards, tmp_path_factory):
    return run(cards, tmp_path_factory.mktemp("out") / "demo.png", num_samples=DRAWS, generator=SEED)


@pytest.fixture(scope="module")
def parts(cards):
    """A fresh smoothed tower and the images as it reads them."""
    host = LlavaForConditionalGeneration.from_pretrained(cards / LLAVA).eval()
    processor = AutoProcessor.from_pretrained(cards / LLAVA)
    inputs = encode(processor, [picture.image for picture in demo_images()])
    tower = attach(host, PSMModel.from_pretrained(cards / PSM), sigma=SIGMA, num_samples=4, processor=processor)
    return tower, inputs["pixel_values"]


def test_the_picture_is_written_whole(shown):
    with Image.open(shown.output) as picture:
        assert picture.size[0] > 1000
        assert picture.size[1] > 200 * len(shown.records)
    assert [path.name for path in shown.output.parent.iterdir()] == [shown.output.name]


def test_plain_captions_are_those_of_one_image_at_a_time(cards, shown):
    host = LlavaForConditionalGeneration.from_pretrained(cards / LLAVA).eval()
    processor = AutoProcessor.from_pretrained(cards / LLAVA)
    for picture, record in zip(demo_images(), shown.records, strict=True):
        inputs = processor(text="<image> " + QUESTION, images=picture.image, return_tensors="pt")
        tokens = host.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = processor.decode(tokens, skip_special_tokens=True)
        assert (record.name, record.kind, record.plain_caption) == (picture.name, picture.kind, expected)


def test_smoothed_captions_are_answers(shown):
    for record in shown.records:
        words = record.smoothed_caption.split()
        assert words
        assert all(re.fullmatch(r"word\d+|<unk>", word) for word in words)


def test_certificates_are_those_of_certify_features(parts, shown):
    tower, pixel_values = parts
    options = {"epsilons": EPSILONS, "num_samples": DRAWS, "generator": SEED, "null_cosine": shown.null_cosine}
    for method in ("cdf", "plugin"):
        expected = certify_features(tower, pixel_values, method=method, **options)
        found = [record.certificate if method == "cdf" else record.plugin for record in shown.records]
        models_agree = [dataclasses.replace(c, model=e.model) for c, e in zip(found, expected, strict=True)]
        assert models_agree == expected
    assert [record.certificate.image_id for record in shown.records] == list(range(6))


def test_the_null_level_is_the_mean_over_pairs(parts, shown):
    features = parts[0].clean_features(parts[1]).double().numpy()
    pairs = [a @ b for a, b in itertools.permutations(features, 2)]
    assert shown.null_cosine == pytest.approx(np.mean(pairs), abs=1e-6)


def test_the_views_are_the_image_the_noise_and_the_purified(parts):
    tower, pixel_values = parts
    plain = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_normalize=False
    )
    differences = []
    for picture, (clean, noisy, purified) in zip(demo_images(), stages(tower, pixel_values, SEED), strict=True):
        expected = plain(picture.image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert clean == pytest.approx(expected, abs=1e-5)
        differences.append(noisy - clean)
        with torch.no_grad():
            single = torch.from_numpy(noisy).permute(2, 0, 1)[None]
            expected = tower.psm.purifier.denoise(single, SIGMA)[0].permute(1, 2, 0).numpy()
        assert purified == pytest.approx(expected, abs=1e-5)
    assert np.std(differences) == pytest.approx(SIGMA, rel=0.05)
    assert abs(np.mean(differences)) < 0.01


def test_the_words_say_what_holds_and_what_does_not(shown):
    text = " ".join(str(shown).split())
    assert "99.9 % confidence" in text
    assert "no certificate" in text
    assert f"mean cosine of {shown.null_cosine:.2f}" in text
    assert "16/255 reaches an ℓ₂ norm of 1.74" in text  # 16/255 * sqrt(3 * 16 * 16)
    assert "right on 81.2 % of 2,000 test images" in text
    for record in shown.records:
        assert f"{record.name} ({record.kind})" in text
        assert record.plain_caption in text
        assert record.smoothed_caption in text


def test_printed_bounds_are_never_rounded_up(shown):
    first = shown.records[0]
    certificate = dataclasses.replace(
        first.certificate, cosine_bounds=tuple(0.999 if e < 0.25 else -1.0 for e in EPSILONS), radius=0.0999
    )
    line = str(dataclasses.replace(shown, records=[dataclasses.replace(first, certificate=certificate)])).split("\n")[
        2
    ]
    assert re.findall(r"(\S+) \(", line)[1:] == ["0.99", "0.99", "none", "0.09"]


def test_images_are_square_and_named():
    pictures = demo_images()
    assert [picture.kind for picture in pictures] == ["photograph"] * 3 + ["drawing"] * 3
    assert all(picture.image.size[0] == picture.image.size[1] >= 256 for picture in pictures)
    assert all(picture.image.mode == "RGB" for picture in pictures)


@pytest.mark.parametrize("lost", [f"{LLAVA}/config.json", f"{LLAVA}/results/captioning.json", f"{PSM}/config.json"])
def test_a_missing_model_is_one_sentence(cards, tmp_path, lost):
    shutil.copytree(cards, tmp_path / "cards")
    (tmp_path / "cards" / lost).unlink()
    with pytest.raises(ValueError, match=f"^`models` must be a folder with .* lacks {lost}: [^\n]*$"):
        run(tmp_path / "cards", tmp_path / "demo.png")


@pytest.mark.parametrize("output", ["nowhere/demo.png", "demo.jpg"])
def test_an_output_that_cannot_be_written_is_refused_first(cards, tmp_path, output):
    with pytest.raises(ValueError, match=r"`output` must be a \.png file in a folder that exists, got"):
        run(cards, tmp_path / output)


def test_without_scikit_image_the_error_says_what_to_install(monkeypatch, cards, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r'pip install "fs-psm-hf\[demo\]"'):
        run(cards, tmp_path / "demo.png")


def test_the_embedded_models_caption_and_certify(tmp_path):
    shown = run(MODEL_CARDS, tmp_path / "demo.png", num_samples=60, generator=SEED)
    for record in shown.records:
        for text in (record.plain_caption, record.smoothed_caption):
            assert re.fullmatch(rf"a photo of an? ({CLASSES})\.", text)
        assert record.plugin.cosine_bounds[0] > shown.null_cosine
    assert shown.image_size == 32
    named = {record.name for record in shown.records if record.plain_caption.rstrip(".").endswith(record.name)}
    assert named >= {"airplane", "ship"}
