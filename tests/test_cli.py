import functools
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
from tiny_models import MEAN, SIZE, STD, images, llava, psm_model, smoothed_tower, vision_model
from transformers import CLIPImageProcessorPil

from fs_psm_hf import Certificate, attach, certify_scores
from fs_psm_hf.certification.folder import image_name
from fs_psm_hf.certification.results_file import ResultsFile
from fs_psm_hf.cli import main
from fs_psm_hf.inputs import load_tower


@pytest.fixture
def processor():
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size, image_mean=MEAN, image_std=STD)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "sub/c.png"]):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


@pytest.fixture
def tower(tmp_path, processor):
    smoothed_tower(sigma=0.25, num_samples=2).save_pretrained(tmp_path / "tower")
    processor.save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def run(monkeypatch, *arguments):
    """Exit code of `fs-psm` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["fs-psm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_certify_writes_certificates_and_a_table(monkeypatch, capsys, tmp_path, tower, folder):
    output = tmp_path / "out.jsonl"
    options = [
        "--num-samples",
        300,
        "--epsilon",
        0.1,
        "--epsilon",
        0.2,
        "--seed",
        4,
        "--save-scores",
        tmp_path / "scores",
    ]
    assert run(monkeypatch, "certify", "--tower", tower, "--images", folder, "--output", output, *options) == 0
    printed = capsys.readouterr().out
    assert "not a certificate" in printed
    assert "null level" in printed
    header, *images, summary = lines(output)
    assert (header["kind"], header["sigma"], header["seed"], header["epsilons"]) == ("header", 0.25, 4, [0.1, 0.2])
    assert [line["file"] for line in images] == ["a.png", "b.jpg", "sub/c.png"]
    assert [row["method"] for row in summary["rows"]] == ["cdf", "plugin"]
    assert summary["command"].startswith(
        "fs-psm certify --output out.jsonl --tower tower --images images --num-samples"
    )
    assert str(tmp_path) not in output.read_text()
    # The certificates are those of the saved scores.
    for line in images:
        scores = load_file(tmp_path / "scores" / f"{image_name(line['file'])}.safetensors")["scores"].numpy()
        assert scores.shape == (300,)
        for entry in line["certificates"]:
            certificate = Certificate.from_dict(entry)
            again = certify_scores(scores, sigma=0.25, epsilons=(0.1, 0.2), method=certificate.method)
            assert certificate.inner_product_bounds == again.inner_product_bounds
            assert certificate.radius == again.radius
    radii = [entry["radius"] for line in images for entry in line["certificates"] if entry["method"] == "plugin"]
    assert summary["rows"][1]["mean_radius"] == pytest.approx(np.mean(radii))


def test_an_unreadable_file_is_reported_and_the_rest_goes_on(monkeypatch, capsys, tmp_path, tower, folder):
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:300])
    output = tmp_path / "out.jsonl"
    command = ["certify", "--tower", tower, "--images", folder, "--output", output, "--num-samples", 150]
    assert run(monkeypatch, *command) == 1
    assert "not certified: broken.png" in capsys.readouterr().err
    kinds = [line["kind"] for line in lines(output)]
    assert kinds.count("image") == 3
    assert kinds.count("error") == 2
    # Mended, the same command with --resume finishes and succeeds.
    Image.new("RGB", (20, 20)).save(folder / "broken.png")
    (folder / "cut.png").unlink()
    assert run(monkeypatch, *command, "--resume") == 0
    assert [line["kind"] for line in lines(output)] == ["header", *["image"] * 4, "summary"]


@pytest.mark.parametrize("works", [True, False])
def test_the_mode_asked_for_is_the_one_recorded(works, monkeypatch, tmp_path, tower, folder):
    """A pass that does not compile makes certificates of eager draws, which say so, and the run goes on as any other."""

    def backend(graph, inputs):
        if not works:
            raise RuntimeError("no C++ compiler here")
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    output, options = tmp_path / "out.jsonl", ["--num-samples", 300, "--seed", 4, "--dtype", "bfloat16", "--compile"]
    assert run(monkeypatch, "certify", "--tower", tower, "--images", folder, "--output", output, *options) == 0
    header, *images, summary = lines(output)
    assert (header["dtype"], header["compile"]) == ("bfloat16", "inductor")  # asked for
    assert {entry["compiled"] for line in images for entry in line["certificates"]} == {"inductor" if works else None}
    written = lines(output)
    output.write_text("\n".join(output.read_text().splitlines()[:2]) + "\n")
    again = ["certify", "--tower", tower, "--images", folder, "--output", output, *options, "--resume"]
    assert run(monkeypatch, *again) == 0
    assert lines(output)[1:-1] == written[1:-1]
    assert "--dtype bfloat16 --compile" in summary["command"]


def test_a_killed_run_resumes_to_the_same_result(monkeypatch, tmp_path, tower, folder):
    options = ["--num-samples", "3000", "--seed", "4", "--max-batch-size", "10"]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert run(monkeypatch, "certify", "--tower", tower, "--images", folder, "--output", whole, *options) == 0
    command = ["certify", "--tower", str(tower), "--images", str(folder), "--output", str(killed), *options]
    process = subprocess.Popen(
        [sys.executable, "-c", "from fs_psm_hf.cli import main; main()", *command],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while (not killed.exists() or len(killed.read_text().splitlines()) < 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = killed.read_text().count("\n") - 1
    assert 1 <= finished < 4
    killed.write_text(killed.read_text().rpartition("\n")[0] + "\n")
    with open(killed, "a") as stream:
        stream.write('{"kind": "image", "fi')  # a kill in the middle of a line
    assert run(monkeypatch, *command, "--resume") == 0
    (*found, end), (*expected, expected_end) = lines(killed), lines(whole)
    assert found == expected
    assert end | {"command": ""} == expected_end | {"command": ""}  # they name their files


@pytest.mark.parametrize("kind", ["llava", "clip", "plain"])
def test_other_models_are_smoothed_on_the_way_in(kind, monkeypatch, tmp_path, folder, processor):
    model = llava() if kind == "llava" else vision_model("projection" if kind == "clip" else "dinov2")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    psm_model(mapper=False).save_pretrained(tmp_path / "psm")
    output = tmp_path / "out.jsonl"
    options = ["--psm", tmp_path / "psm", "--sigma", 0.1, "--num-samples", 150, "--limit", 1]
    assert (
        run(monkeypatch, "certify", "--tower", tmp_path / "model", "--images", folder, "--output", output, *options)
        == 0
    )
    (certificate, _) = lines(output)[1]["certificates"]
    assert certificate["feature_layer"] == (-2 if kind == "llava" else None)
    if kind == "clip":  # the embedding after the projection, 24 wide, not the 32 before it
        tower, _ = load_tower(str(tmp_path / "model"), None, None, None, None)
        assert tower.clean_features(images(1), "pooled").shape == (1, 24)


def test_settings_reach_a_smoothed_host_too(tmp_path, processor):
    host = llava()
    attach(host, sigma=0.1, num_samples=2, processor=processor)
    host.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tower, _ = load_tower(str(tmp_path), None, None, 0.5, 16)
    assert (tower.config.sigma, tower.config.num_samples) == (0.5, 16)
    tower, _ = load_tower(str(tmp_path), None, None, None, None)
    assert (tower.config.sigma, tower.config.num_samples) == (0.1, 2)
    psm_model(mapper=False).save_pretrained(tmp_path / "psm")
    with pytest.raises(ValueError, match="`--psm` must not be given"):
        load_tower(str(tmp_path), str(tmp_path / "psm"), None, None, None)


@pytest.mark.parametrize("kind", ["llava", "plain"])
@pytest.mark.parametrize("damage", ["lost", "reshaped", "truncated"])
def test_damaged_weights_are_one_sentence(damage, kind, monkeypatch, capsys, tmp_path, folder, processor):
    model = llava() if kind == "llava" else vision_model("dinov2")
    if kind == "llava":
        attach(model, psm_model(), sigma=0.1, num_samples=2, processor=processor)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    name = max(key for key in state if key.endswith("scale") or key.endswith("layernorm.weight"))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        state = {key: value for key, value in state.items() if damage != "lost" or key != name}
        state |= {name: torch.zeros(5)} if damage == "reshaped" else {}
        save_file(state, path, metadata={"format": "pt"})
    command = ["certify", "--tower", tmp_path / "model", "--images", folder, "--output", tmp_path / "out.jsonl"]
    assert run(monkeypatch, *command) == 2
    words = {"lost": "1 missing keys", "reshaped": "1 mismatched keys", "truncated": "damaged safetensors file"}[
        damage
    ]
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("fs-psm: ")
    assert words in complaint


def test_rows_of_the_metadata_choose_the_images(monkeypatch, tmp_path, tower, folder):
    (folder / "metadata.csv").write_text("file_name,split\na.png,x\nb.jpg,y\nsub/c.png,x\n")
    output = tmp_path / "out.jsonl"
    command = ["certify", "--tower", tower, "--images", folder, "--num-samples", 150, "--output", output]
    assert run(monkeypatch, *command, "--where", "split=x") == 0
    assert [line["file"] for line in lines(output) if line["kind"] == "image"] == ["a.png", "sub/c.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sigma", "-1"], "`sigma` must be a finite number >= 0"),
        (["--alpha", "2"], "`alpha`"),
        (["--epsilon", "-0.5"], "`epsilon"),
        (["--feature", "x"], "`feature` must be one of tokens, pooled, cls"),
        (["--anchor", "x"], "`anchor`"),
        (["--limit", "0"], "`--limit` must be >= 1"),
        (["--where", "split=x"], "`--where` must be COLUMN=VALUE"),
        (["--images", "nowhere"], "`--images` must be a folder, got nowhere"),
        (["--device", "tpu9"], "`--device` must be one torch can use here, got tpu9"),
        (["--num-samples", "0"], "`--num-samples` must be >= 1, got 0"),
        (["--tower", "nowhere/nothing"], "`--tower` must be a model folder or a Hub id, got nowhere/nothing"),
        (["--psm", "TOWER"], "does not fit PSMModel"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, monkeypatch, capsys, tmp_path, tower, folder):
    output = tmp_path / "out.jsonl"
    given = {"--tower": str(tower), "--images": str(folder), "--output": str(output), "--num-samples": "150"}
    given |= dict(zip(arguments[::2], [a.replace("TOWER", str(tower)) for a in arguments[1::2]], strict=True))
    capsys.readouterr()
    assert run(monkeypatch, "certify", *(word for pair in given.items() for word in pair)) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("fs-psm: ")
    assert words in complaint
    assert not output.exists() or len(lines(output)) == 1


def test_other_settings_are_refused_on_resume(monkeypatch, capsys, tmp_path, tower, folder):
    output = tmp_path / "out.jsonl"
    command = ["certify", "--tower", tower, "--images", folder, "--output", output, "--num-samples", 150, "--limit", 1]
    assert run(monkeypatch, *command) == 0
    before = output.read_text()
    assert run(monkeypatch, *command) == 2
    assert "exists: use --resume" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--resume", "--sigma", "0.5") == 2
    assert "made with sigma=0.25, not 0.5" in capsys.readouterr().err
    assert output.read_text() == before


def test_a_run_without_a_seed_goes_on_with_the_one_it_drew(monkeypatch, tmp_path, tower, folder):
    output = tmp_path / "out.jsonl"
    command = ["certify", "--tower", tower, "--images", folder, "--output", output, "--num-samples", 150]
    assert run(monkeypatch, *command) == 0
    whole = lines(output)
    output.write_text("".join(json.dumps(line) + "\n" for line in whole[:2]))
    assert run(monkeypatch, *command, "--resume") == 0
    assert lines(output) == whole
    output.write_text('{"kind": "hea')  # killed before the first line was whole
    assert run(monkeypatch, *command, "--resume") == 0
    assert lines(output)[0]["seed"] not in (None, whole[0]["seed"])


def test_a_results_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"kind": "image"}\n')
    with pytest.raises(ValueError, match="was not written by this command"):
        ResultsFile(tmp_path / "x.jsonl", {}, resume=True)
    (tmp_path / "y.jsonl").write_text('{"kind": "header"}\nnonsense\n{"kind": "image"}\n')
    with pytest.raises(ValueError, match="damaged before its last line"):
        ResultsFile(tmp_path / "y.jsonl", {}, resume=True)


@pytest.mark.parametrize("command", [[], ["certify"], ["tables"], ["demo"], ["env"]])
def test_help(command, monkeypatch, capsys):
    assert run(monkeypatch, *command, "--help") == 0
    assert "Usage" in capsys.readouterr().out


def test_no_default_is_lost_from_the_help(monkeypatch, capsys):
    """Words in square brackets are markup to the help's renderer."""
    assert run(monkeypatch, "certify", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: the checkpoint's)" in shown
    assert "(default: the operating system's)" in shown


def test_env_prints_versions(monkeypatch, capsys):
    assert run(monkeypatch, "env") == 0
    assert "transformers: 5." in capsys.readouterr().out
