"""An evaluation from its configuration to its cells, on real models; what it says is computed anew from its pictures."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from evaluation_runs import CLASSES, caption_values, head_config, head_values, picture, save_pictures, save_world
from safetensors.torch import load_file
from tiny_models import MEAN, STD
from torch.nn import functional as F

from fs_psm_hf import PSMModel, SmoothedVisionTower
from fs_psm_hf.certification.folder import image_name
from fs_psm_hf.evaluation import runner
from fs_psm_hf.evaluation.cells import read_results
from fs_psm_hf.evaluation.jsonl import read_jsonl
from fs_psm_hf.evaluation.rejudge import rejudge
from fs_psm_hf.evaluation.run_config import parse_config
from fs_psm_hf.evaluation.runner import evaluate
from fs_psm_hf.inputs import load_tower


MEANS, STDS = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
NAMES = [f"{i}.png" for i in range(5)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(root):
    """A whole run: its file, its results, its configuration."""
    output = root / "run.jsonl"
    config = head_config(root)
    return output, evaluate(config, output, progress=False, command="fs-psm evaluate"), config


def lines_of(output, kind):
    return [line for line in read_jsonl(output) if line["kind"] == kind]


def tower_of(root, row, sigma, samples):
    """The row's tower, built by hand."""
    base = load_tower(str(root / "plain"), sigma=0.0, num_samples=1, dtype="float32")[0].vision_tower
    psm = None
    if "+" in row:
        psm = PSMModel.from_pretrained(root / "psm")
        if "P" not in row:
            psm.purifier, psm.config.purifier_config, psm.config.purifier = None, None, "none"
        if "M" not in row:
            psm.mapper = psm.config.mapper_config = None
    return SmoothedVisionTower.from_components(
        base, psm, sigma=sigma, num_samples=samples, image_mean=MEAN, image_std=STD
    )


@torch.no_grad()
def features(tower, pixels, seed, names):
    values = (torch.stack(pixels) - MEANS) / STDS
    return tower(values, generator=seed, image_ids=[image_name(name) for name in names]).last_hidden_state[:, 0]


def test_each_cell_is_there_once(finished):
    output, results, config = finished
    keys = [(one.cell.row, one.cell.sigma, one.cell.mode, one.cell.gradient, one.images) for one in results]
    transfers = [(row, 0.1, "transfer", None, 5) for row in ("FS", "FS+M", "FS+P", "FS+P+M")]
    adaptive = [
        ("FS+M", 0.1, "adaptive", "end-to-end", 3),
        ("FS+P+M", 0.1, "adaptive", "end-to-end", 3),
        ("FS+P+M", 0.1, "adaptive", "straight-through", 3),
        ("FS", 0.0, "adaptive", "end-to-end", 3),
    ]
    expected = [("Org", 0.0, "white-box", None, 5), ("FS", 0.0, "transfer", None, 5), *transfers, *adaptive]
    assert sorted(keys, key=str) == sorted(expected, key=str)
    assert len(config.cells()) == len(expected)
    assert read_results(output) == results
    header = lines_of(output, "header")[0]
    assert header["seed"] == 3
    assert header["config"]["task"]["images"] == "images"  # no path of a machine
    assert str(output.parent) not in output.read_text()


def test_the_plain_tower_is_attacked_once_for_all_rows(finished):
    output, *_ = finished
    attacks = lines_of(output, "attack")
    assert len({line["key"] for line in attacks}) == 5  # plain; FS+M; FS+P+M twice; FS at sigma 0
    assert len(attacks) == 5 + 4 * 3
    assert len([line for line in attacks if line["settings"]["mode"] == "transfer"]) == 5


def test_pictures_lie_in_their_ball_and_are_what_is_recorded(root, finished):
    output, *_ = finished
    for line in lines_of(output, "attack"):
        path = output.with_name("run.jsonl.images") / line["file"]
        change = 255 * (picture(path) - picture(root / "images" / line["image"]))
        assert 1 <= change.abs().max() <= 3.01  # steps of 1/255
        assert line["linf"] == pytest.approx(change.abs().max().item(), abs=0.01)
        assert line["l2"] == pytest.approx(change.norm().item() / 255, abs=1e-4)
    assert not list(output.with_name("run.jsonl.images").rglob("*.safetensors.tmp"))
    assert not list(output.with_name("run.jsonl.images").rglob("batch*.safetensors"))


def test_what_a_row_says_follows_from_the_pictures(root, finished):
    """FCS, answers and PSNR from the files, by towers built here and the saved head's numbers."""
    output, results, _ = finished
    pictures = output.with_name("run.jsonl.images")
    made = {line["key"]: {} for line in lines_of(output, "attack")}
    for line in lines_of(output, "attack"):
        made[line["key"]][line["image"]] = pictures / line["file"]
    head = load_file(pictures / "head-tiny-org.safetensors")
    plain_job = next(key for key in made if "plain" in key)
    adaptive_jobs = {
        ("FS+M", "end-to-end"): "FS+M_sigma0.1", ("FS+P+M", "end-to-end"): "FS+P+M_sigma0.1_attackvlm_16-255_end",
        ("FS+P+M", "straight-through"): "FS+P+M_sigma0.1_attackvlm_16-255_straight", ("FS", "end-to-end"): "FS_sigma0_",
    }  # fmt: skip
    labels = [i % 3 for i in range(5)]
    for result in results:
        cell = result.cell
        start = adaptive_jobs.get((cell.row, cell.gradient))
        job = plain_job if start is None else next(key for key in made if key.startswith(f"org_{start}"))
        tower = tower_of(root, cell.row, cell.sigma, cell.num_samples)
        expected = []
        for first in range(0, result.images, 2):
            batch = NAMES[first : min(first + 2, 5)]
            shown = batch[: result.images - first]
            clean = features(tower, [picture(root / "images" / name) for name in batch], 3, batch)[: len(shown)]
            theirs = features(tower, [picture(made[job][name]) for name in shown], 4, shown)
            said = (theirs @ head["weight"].T + head["bias"]).argmax(1).tolist()
            cosines = F.cosine_similarity(clean, theirs, dim=1).tolist()
            expected += list(zip(shown, said, cosines, strict=True))
        items = [line for line in lines_of(output, "item") if line["key"] == cell.key]
        found = [(item["image"], item["adversarial"], pytest.approx(item["fcs"], abs=1e-5)) for item in items]
        assert expected == found, cell.key
        assert result.acc == sum(said == labels[i] for i, (_, said, _) in enumerate(expected)) / result.images
        targets = [labels[(NAMES.index(item["image"]) + 1) % 5] for item in items]
        # The head's targets are drawn by the task, so they are read from the items and only counted here.
        assert result.asr == sum(item["adversarial"] == item["target"] for item in items) / result.images
        assert len(targets) == result.images
        assert result.fcs == pytest.approx(sum(cosine for *_, cosine in expected) / result.images, abs=1e-5)


def test_without_noise_the_adaptive_attack_is_the_white_box_one(finished):
    """Sanity of the attack, picture by picture, and what the cell says of it."""
    output, results, _ = finished
    pictures = output.with_name("run.jsonl.images")
    attacks = lines_of(output, "attack")
    zero = {line["image"]: line for line in attacks if "FS_sigma0_" in line["key"]}
    plain = {line["image"]: line for line in attacks if "plain" in line["key"]}
    assert len(zero) == 3
    for name, line in zero.items():
        assert torch.equal(picture(pictures / line["file"]), picture(pictures / plain[name]["file"]))
    (cell,) = [one for one in results if one.cell.mode == "adaptive" and one.cell.sigma == 0]
    assert cell.extras["org"] == {"fcs": pytest.approx(cell.fcs, abs=1e-6), "asr": cell.asr}


def test_nothing_is_done_twice(root, finished, monkeypatch):
    output, results, config = finished
    before = output.read_bytes()
    monkeypatch.setattr(runner, "Defended", None)  # no model may be loaded
    assert evaluate(config, output, progress=False) == results
    assert output.read_bytes() == before


def test_lost_pictures_and_lines_are_made_again_the_same(root, finished, tmp_path):
    output, results, config = finished
    copy = tmp_path / "run.jsonl"
    shutil.copytree(output.with_name("run.jsonl.images"), tmp_path / "run.jsonl.images")
    lines = output.read_text().splitlines(keepends=True)
    # What a kill leaves: some lines, the last one torn; and a picture that is gone.
    copy.write_text("".join(lines[:20]) + lines[20][:40])
    first = json.loads(lines[1])
    (tmp_path / "run.jsonl.images" / first["file"]).unlink()
    assert [
        dataclasses.replace(one, source="")
        for one in evaluate(config, copy, progress=False, command="fs-psm evaluate")
    ] == [dataclasses.replace(one, source="") for one in results]
    assert copy.read_bytes() == output.read_bytes()


def test_another_configuration_is_refused(root, finished):
    output, *_ = finished
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"another configuration \(seed: 3, not 4\)"):
        evaluate(head_config(root, seed=4), output, progress=False)
    assert output.read_bytes() == before


def start_run(root, output, processes=1):
    """`fs-psm evaluate` in processes of its own, JSON being YAML."""
    config = root / "config.yaml"
    config.write_text(json.dumps(head_values(root)))
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1",
                     "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]  # fmt: skip
    words = ["fs_psm_hf.cli", "evaluate", "--config", str(config), "--output", str(output), "--device", "cpu"]
    return subprocess.Popen(
        [*launcher, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def without_header(path):
    return path.read_text().partition("\n")[2]


def test_a_killed_process_goes_on_to_the_same_file(root, finished, tmp_path):
    output, *_ = finished
    copy = tmp_path / "run.jsonl"
    process = start_run(root, copy)
    until = time.monotonic() + 240
    while not (copy.exists() and copy.read_bytes().count(b"\n") > 8) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = copy.read_bytes().count(b"\n")
    assert 8 < left < output.read_bytes().count(b"\n")
    evaluate(head_config(root), copy, progress=False)
    assert without_header(copy) == without_header(output)


@pytest.mark.slow
def test_two_processes_write_the_same_file(root, finished, tmp_path):
    output, *_ = finished
    copy = tmp_path / "run.jsonl"
    process = start_run(root, copy, processes=2)
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    assert without_header(copy) == without_header(output)
    assert not list(tmp_path.glob("*.part*"))


def test_captions_are_compared_with_those_of_the_vanilla_model(tmp_path):
    images = save_pictures(tmp_path / "images", count=3, size=32)
    output = tmp_path / "run.jsonl"
    config = parse_config(caption_values(images))
    results = evaluate(config, output, progress=False)
    assert [(one.cell.row, one.cell.mode) for one in results] == [("Org", "white-box"), ("FS+P+M", "transfer")]
    lines = lines_of(output, "item")
    vanilla = {line["image"]: line for line in lines if line["key"] == "tiny-LLaVA, vanilla"}
    assert len(vanilla) == 3
    for item in lines:
        if item["key"] == "tiny-LLaVA, vanilla":
            continue
        known = vanilla[item["image"]]
        assert (item["reference"], item["target"]) == (known["reference"], known["target"])
        # The caption of the target is the vanilla model's of the next image.
        following = vanilla[f"{(int(item['image'][0]) + 1) % 3}.png"]
        assert item["target"] == following["reference"]
        assert item["adversarial"].startswith("a photo of")
        if "Org" in item["key"]:
            assert item["clean"] == known["reference"]
    assert results[0].extras["judge"]["judge"] == "keyword"

    # Another judge later, without a model.
    other = parse_config(caption_values(images, judge={"kind": "keyword", "keywords": ["photo"]}))
    again = rejudge(output, tmp_path / "again.jsonl", other)
    assert [one.acc for one in again] == [1.0, 1.0]
    assert [one.asr for one in again] == [1.0, 1.0]
    assert [one.fcs for one in again] == [one.fcs for one in results]
    with pytest.raises(ValueError, match="another configuration"):
        rejudge(output, tmp_path / "again.jsonl", config)


def test_a_judge_that_is_down_loses_nothing(tmp_path):
    images = save_pictures(tmp_path / "images", count=2, size=32)
    output = tmp_path / "run.jsonl"
    down = {"kind": "llm", "model": "x", "base_url": "http://127.0.0.1:9/v1", "max_retries": 0, "timeout": 5.0}
    config = parse_config(caption_values(images, judge=down))
    with pytest.raises((OSError, ValueError, RuntimeError)) as raised:
        evaluate(config, output, progress=False)
    assert "127.0.0.1:9" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert len([line for line in lines_of(output, "item") if "vanilla" not in line["key"]]) == 4
    assert lines_of(output, "cell") == []


@pytest.mark.parametrize("encoders", [{"org": "plain", "FARE": "robust"}])
def test_each_encoder_has_its_own_head_and_pictures(root, tmp_path, encoders):
    values = head_values(root, attacks=[{"method": "attackvlm", "steps": 1, "epsilon": "8/255"}])
    values["models"][0] |= {
        "encoders": {name: str(root / folder) for name, folder in encoders.items()},
        "rows": [{"row": "Org"}, {"row": "FS", "sigma": 0.1, "encoders": ["FARE"]}],
    }
    values["task"]["limit"] = 2
    output = tmp_path / "run.jsonl"
    results = evaluate(parse_config(values), output, progress=False)
    assert [(one.cell.encoder, one.cell.row) for one in results] == [("org", "Org"), ("FARE", "Org"), ("FARE", "FS")]
    heads = [
        load_file(output.with_name("run.jsonl.images") / f"head-tiny-{name}.safetensors")["weight"]
        for name in encoders
    ]
    assert heads[0].shape == heads[1].shape == (len(CLASSES), 32)
    assert not torch.equal(*heads)
    assert len({line["key"] for line in lines_of(output, "attack")}) == 2
