"""Saved scores, early stopping, labels and several processes through `fs-psm certify`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import MEAN, SIZE, STD, smoothed_tower
from transformers import CLIPImageProcessorPil

from fs_psm_hf import certify_labels, certify_scores
from fs_psm_hf.certification import Certificate, LabelCertificate
from fs_psm_hf.certification.adaptive import look_schedule
from fs_psm_hf.certification.folder import image_name, read_image
from fs_psm_hf.certification.results_file import ResultsFile
from fs_psm_hf.cli import main
from fs_psm_hf.inputs import load_classifier, load_tower


WIDTH = 24


@pytest.fixture
def setting(tmp_path):
    """A CLIP tower with a projection, four images, and classes."""
    smoothed_tower("projection", sigma=0.05, num_samples=4).save_pretrained(tmp_path / "tower")
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=MEAN, image_std=STD
    )  # fmt: skip
    processor.save_pretrained(tmp_path / "tower")
    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    texts = torch.nn.functional.normalize(torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    save_file({"text_embeds": texts}, tmp_path / "labels.safetensors")
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fs-psm", "certify", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def command(root, output, *more):
    model = ["--tower", root / "tower", "--images", root / "images", "--feature", "pooled", "--seed", 4]
    return [*model, "--output", root / output, "--num-samples", 600, *more]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def images_of(path):
    return [line for line in lines(path) if line["kind"] == "image"]


def test_saved_scores_answer_without_model_and_images(setting, monkeypatch, capsys):
    labels = ["--labels", setting / "labels.safetensors"]
    saved = ["--save-scores", setting / "scores", "--save-features", *labels]
    assert run(monkeypatch, *command(setting, "direct.jsonl", *saved)) == 0
    printed = capsys.readouterr().out
    assert "hard vote (another classifier)" in printed
    for name in ("tower", "images"):
        (setting / name).rename(setting / f"{name}-gone")
    asked = ["--from-scores", setting / "scores", "--output"]
    assert run(monkeypatch, *asked, setting / "later.jsonl", *labels) == 0
    assert images_of(setting / "later.jsonl") == images_of(setting / "direct.jsonl")
    later, direct = lines(setting / "later.jsonl")[-1], lines(setting / "direct.jsonl")[-1]
    assert later["null_cosine"] == pytest.approx(direct["null_cosine"], abs=1e-6)
    assert later["rows"] == direct["rows"]
    # Another question: radii, confidence, method, draws, served draws.
    other = ["--epsilon", 0.03, "--alpha", 0.05, "--method", "betting", "--method", "best", "--num-samples", 400]
    assert run(monkeypatch, *asked, setting / "other.jsonl", *other, "--served-samples", 16) == 0
    for line in images_of(setting / "other.jsonl"):
        scores = load_file(setting / "scores" / f"{image_name(line['file'])}.safetensors")["scores"].numpy()
        for entry, method, served in zip(line["certificates"], ("betting", "best"), (None, 16), strict=True):
            options = {"sigma": 0.05, "epsilons": [0.03], "alpha": 0.05, "method": method}
            expected = certify_scores(scores[:400], **options, deployed_samples=served)
            found = Certificate.from_dict(entry)
            assert (found.radius, found.inner_product_bounds) == (expected.radius, expected.inner_product_bounds)
            assert found.deployed == expected.deployed


def test_labels_are_those_of_certify_labels(setting, monkeypatch):
    assert run(monkeypatch, *command(setting, "out.jsonl", "--labels", setting / "labels.safetensors")) == 0
    tower, processor = load_tower(str(setting / "tower"))
    texts = load_classifier(setting / "labels.safetensors").weight.float()
    for line in images_of(setting / "out.jsonl"):
        pixels = read_image(setting / "images" / line["file"], processor)
        options = {"num_samples": 600, "generator": 4, "image_ids": [image_name(line["file"])]}
        (expected,) = certify_labels(tower, pixels, texts, **options)
        found = LabelCertificate.from_dict(line["label"])
        assert (found.label, found.runner_up, found.model_hash) == (
            expected.label,
            expected.runner_up,
            expected.model_hash,
        )
        assert found.radius == pytest.approx(expected.radius, abs=1e-6)
        found.verify(tower)


def test_stopping_early_is_paid_for_by_every_number(setting, monkeypatch):
    adaptive = [
        "--num-samples",
        2000,
        "--target-radius",
        0.001,
        "--save-scores",
        setting / "scores",
        "--save-features",
    ]
    labels = ["--labels", setting / "labels.safetensors", "--plot", setting / "curve.png"]
    assert (
        run(monkeypatch, *command(setting, "out.jsonl", *adaptive, *labels, "--method", "cdf", "--method", "betting"))
        == 0
    )
    looks = look_schedule(2000)
    assert looks == [500, 1000, 2000]
    for line in images_of(setting / "out.jsonl"):
        path = setting / "scores" / f"{image_name(line['file'])}.safetensors"
        scores = load_file(path)["scores"].numpy()
        assert len(scores) == 500
        for entry in line["certificates"]:
            assert (entry["alpha"], entry["num_looks"], entry["num_samples"]) == (1e-3, 3, 500)
            expected = certify_scores(scores, sigma=0.05, alpha=1e-3 / 3, method=entry["method"])
            assert entry["radius"] == expected.radius
        curve = certify_scores(scores, sigma=0.05, alpha=1e-3 / 3, epsilons=line["curve"]["epsilons"])
        assert line["curve"]["cdf"]["inner_product_bounds"] == list(curve.inner_product_bounds)
        assert (line["label"]["alpha"], line["label"]["num_looks"]) == (1e-3, 3)
    assert (setting / "curve.png").exists()
    # What is asked later of scores that stopped early pays for the looks too, and may not stop early again.
    asked = ["--from-scores", setting / "scores", "--output", setting / "later.jsonl"]
    assert run(monkeypatch, *asked, "--method", "cdf", "--method", "betting") == 0
    later = [entry for line in images_of(setting / "later.jsonl") for entry in line["certificates"]]
    assert later == [entry for line in images_of(setting / "out.jsonl") for entry in line["certificates"]]
    (setting / "later.jsonl").unlink()
    assert run(monkeypatch, *asked, "--tolerance", 0.1) == 2


def test_images_that_stopped_at_different_looks_keep_all_their_draws(setting, monkeypatch):
    saved = [*command(setting, "out.jsonl", "--save-scores", setting / "scores")]
    for count, only in ((1000, []), (500, ["--limit", 1, "--resume"])):
        (setting / "out.jsonl").unlink(missing_ok=True)
        assert run(monkeypatch, *saved, "--num-samples", count, *only) == 0
    asked = ["--from-scores", setting / "scores", "--output", setting / "later.jsonl"]
    assert run(monkeypatch, *asked) == 0
    found = [line["certificates"][0]["num_samples"] for line in images_of(setting / "later.jsonl")]
    assert found == [500, 1000, 1000, 1000]
    assert lines(setting / "later.jsonl")[0]["num_samples"] is None


def test_per_token_and_centred_runs(setting, monkeypatch, capsys):
    tokens = ["--feature", "tokens", "--per-token", "--num-samples", 200]
    assert run(monkeypatch, *command(setting, "tokens.jsonl", *tokens)) == 0
    for line in images_of(setting / "tokens.jsonl"):
        assert len(line["certificates"]) == 2 * 17  # two methods, a class token and 16 patches
        assert {entry["joint_alpha"] for entry in line["certificates"]} == {1e-3, None}
    # The null level of a token is the mean over the tokens.
    tower, processor = load_tower(str(setting / "tower"))
    pictures = [read_image(setting / "images" / f"{i}.png", processor) for i in range(4)]
    clean = torch.cat([tower.clean_features(p, "tokens", per_token=True) for p in pictures])
    pairs = [(clean[i] * clean[j]).sum(-1).mean().item() for i in range(4) for j in range(4) if i != j]
    assert lines(setting / "tokens.jsonl")[-1]["null_cosine"] == pytest.approx(np.mean(pairs), abs=1e-5)
    centred = ["--center", setting / "images", "--feature", "cls", "--num-samples", 200]
    assert run(monkeypatch, *command(setting, "centred.jsonl", *centred)) == 0
    first = Certificate.from_dict(images_of(setting / "centred.jsonl")[0]["certificates"][0])
    assert first.center is not None
    assert first.deployed is None
    # Centred on the mean of these very images, the clean features of the four point apart.
    assert lines(setting / "centred.jsonl")[-1]["null_cosine"] < 0


def launch(arguments, processes):
    program = ["-m", "fs_psm_hf.cli"]
    if processes > 1:
        program = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), *program]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    arguments = ["certify", *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, *program, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def test_two_processes_write_the_file_of_one_also_after_a_kill(setting):
    """The lines are equal to the bit; the second run is killed on the way and resumed."""
    (setting / "images" / "broken.png").write_bytes(b"no image")
    options = ["--num-samples", 1500, "--max-batch-size", 16]
    one = launch(command(setting, "one.jsonl", *options), 1)
    assert "not certified: broken.png" in one.communicate(timeout=300)[0]
    assert one.returncode == 1
    output = setting / "two.jsonl"
    two = launch(command(setting, "two.jsonl", *options), 2)
    deadline = time.monotonic() + 300
    part = setting / "two.jsonl.part1"
    while (
        not (part.exists() and part.read_text().endswith("\n")) and two.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    # Both processes were at work: the second has finished an image in a file of its own.
    assert images_of(part)
    os.killpg(two.pid, signal.SIGKILL)
    two.communicate(timeout=60)
    with open(part, "a") as stream:
        stream.write('{"kind": "image", "fi')  # a kill in the middle of a line
    two = launch([*command(setting, "two.jsonl", *options), "--resume"], 2)
    printed = two.communicate(timeout=300)[0]
    assert "not certified: broken.png" in printed
    (*found, end), (*expected, expected_end) = lines(output), lines(setting / "one.jsonl")
    assert found == expected
    assert end | {"command": ""} == expected_end | {"command": ""}
    assert not list(setting.glob("*.part*"))


def test_parts_are_those_of_this_file_only(tmp_path):
    """Names with characters of a pattern, and neighbours whose names only begin alike."""
    path, neighbour = tmp_path / "run[1].jsonl", tmp_path / "run[1].jsonl.partial-notes"
    neighbour.write_text("mine")
    first = ResultsFile(path, {})
    second = ResultsFile(path, {}, part=1)
    first.append({"kind": "image", "file": "a", "certificates": []})
    second.append({"kind": "image", "file": "b", "certificates": []})
    with pytest.raises(ValueError, match="lacks 1 images, such as c: use --resume"):
        first.close(["a", "b", "c"], lambda images: {})
    assert first.close(["a", "b"], lambda images: {"images": len(images)}) == []
    assert [line.get("file") for line in lines(path)] == [None, "a", "b", None]
    assert neighbour.read_text() == "mine"
    assert not (tmp_path / "run[1].jsonl.part1").exists()


def test_scores_that_were_not_saved_are_drawn_again_on_resume(setting, monkeypatch):
    few = ["--num-samples", 100]
    assert run(monkeypatch, *command(setting, "out.jsonl", *few)) == 0
    before = lines(setting / "out.jsonl")
    again = [*few, "--resume", "--save-scores", setting / "scores"]
    assert run(monkeypatch, *command(setting, "out.jsonl", *again)) == 0
    assert len(list((setting / "scores").glob("*.safetensors"))) == 4
    assert lines(setting / "out.jsonl")[:-1] == before[:-1]
    (setting / "scores" / f"{image_name('2.png')}.safetensors").unlink()
    assert run(monkeypatch, *command(setting, "out.jsonl", *again)) == 0
    assert len(list((setting / "scores").glob("*.safetensors"))) == 4


def test_bad_options_are_refused_before_any_draw(setting, monkeypatch, capsys):
    for option, words in (("--beta", "`beta` must be"), ("--served-samples", "`deployed_samples` must be")):
        assert run(monkeypatch, *command(setting, "out.jsonl", option, 2000)) == 2
        assert words in capsys.readouterr().err
    assert not (setting / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from-scores", "nowhere"], "`--from-scores` must be a folder of saved scores (*.safetensors), got nowhere"),
        (["--from-scores", "SCORES", "--sigma", 0.5], "`--from-scores` takes the draws as they are, got --sigma as well"),
        (["--from-scores", "SCORES", "--resume"], "got --resume as well"),
        (["--from-scores", "SCORES", "--feature", "tokens"], "got --feature as well"),
        (["--from-scores", "SCORES", "--beta", 2], "`beta` must be strictly between 0 and 1, got 2.0"),
        (["--from-scores", "SCORES", "--served-samples", 0], "`deployed_samples` must be an integer from 1 to 1024, got 0"),
        (["--from-scores", "SCORES", "--num-samples", 500], "`num_samples` must be at most the 200 saved scores, got 500"),
        (["--from-scores", "SCORES", "--labels", "LABELS"], "`--labels` needs saved features"),
        (["--from-scores", "SCORES", "--labels", "nowhere"], "`--labels` must be a safetensors file, got nowhere"),
        (["--from-scores", "SCORES", "--alpha", 1.5], "`alpha` must be strictly between 0 and 1, got 1.5"),
        (["--from-scores", "SCORES", "--epsilon", -1], "`epsilons` must be finite numbers >= 0"),
        (["--from-scores", "SCORES", "--method", "magic"], "`method` must be one of"),
        (["--from-scores", "SCORES", "--target-radius", -1], "`target_radius` must be finite and > 0"),
        (["--from-scores", "SCORES", "--plot", "curve.pdf"], "`--plot` must be a .png file"),
        (["--from-scores", "BROKEN"], "is not a file of saved scores"),
        (["--from-scores", "MIXED"], "mixes scores of sigma 0.05"),
        ([], "`--tower` and `--images` must be given, or `--from-scores`"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments, words, setting, monkeypatch, capsys):
    few = ["--num-samples", 200, "--limit", 1, "--save-scores"]
    assert run(monkeypatch, *command(setting, "out.jsonl", *few, setting / "scores")) == 0
    (setting / "broken").mkdir()
    (setting / "broken" / "1.safetensors").write_bytes(b"nothing")
    if "MIXED" in arguments:
        where = command(setting, "o2.jsonl", "--num-samples", 200, "--sigma", 0.1, "--save-scores", setting / "mixed")
        assert run(monkeypatch, *where) == 0
        assert run(monkeypatch, *command(setting, "o3.jsonl", *few, setting / "mixed")) == 0
    names = {"SCORES": "scores", "LABELS": "labels.safetensors", "BROKEN": "broken", "MIXED": "mixed"}
    arguments = [setting / names[a] if a in names else a for a in arguments]
    capsys.readouterr()
    assert run(monkeypatch, "--output", setting / "answer.jsonl", *arguments) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("fs-psm: ")
    assert words in complaint


def test_saving_features_needs_a_folder(setting, monkeypatch, capsys):
    assert run(monkeypatch, *command(setting, "out.jsonl", "--save-features")) == 2
    assert "`--save-features` needs `--save-scores`" in capsys.readouterr().err


def test_classes_of_another_width_are_refused(setting, monkeypatch, capsys):
    wrong = torch.nn.functional.normalize(torch.randn(3, 7), dim=-1)
    save_file({"text_embeds": wrong}, setting / "wrong.safetensors")
    assert run(monkeypatch, *command(setting, "out.jsonl", "--labels", setting / "wrong.safetensors")) == 2
    assert "`--labels` has 7 values per class, must have 24 as the feature" in capsys.readouterr().err
    assert not (setting / "out.jsonl").exists()
    save_file({"weights": wrong}, setting / "names.safetensors")
    assert run(monkeypatch, *command(setting, "out2.jsonl", "--labels", setting / "names.safetensors")) == 2
    assert "must hold `text_embeds`, or `weight` and `bias`" in capsys.readouterr().err
