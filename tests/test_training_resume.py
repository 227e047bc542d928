"""Runs that stop and go on: to the bit, from whole checkpoints only, whatever stopped them."""

import json
import os
import resource
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SMALL_UNET, psm_model
from training_runs import (
    assert_equal,
    command,
    log_of,
    losses_of,
    save_images,
    save_tower,
    start,
    train,
    words,
)

from fs_psm_hf import PSMModel


# Dropout also takes part: its draws go on where they stopped.
DROPOUT = json.dumps(SMALL_UNET | {"dropout": 0.1})
# Large enough to be caught in the middle of a write.
LARGE = json.dumps(SMALL_UNET | {"block_out_channels": [64, 192]})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Ten images, one of them held out: an epoch of nine ends in the third step."""
    root = tmp_path_factory.mktemp("resume")
    save_tower(root / "tower")
    save_images(root / "images", 10)
    psm_model(mapper=False).save_pretrained(root / "psm")
    return root


OPTIONS = {
    "purifier": {"purifier_config": DROPOUT, "lr_scheduler": "linear", "random_flip": True},
    "mapper": {"num_samples": 1},
}
COMMON = {"max_train_steps": 6, "checkpointing_steps": 3, "validation_steps": 2}


@pytest.fixture(scope="module", params=["purifier", "mapper"])
def whole(request, root):
    """An uninterrupted run of each stage."""
    options = OPTIONS[request.param] | COMMON
    if request.param == "mapper":
        options |= {"pretrained_psm_name_or_path": root / "psm"}
    train(root, root / f"whole-{request.param}", request.param, **options)
    return root / f"whole-{request.param}", request.param, options


def killed_after_checkpoint_3(whole, folder, kept=("checkpoint-3",)):
    """What a run leaves that is killed between its checkpoints 3 and 6, in the middle of a line of its log."""
    folder.mkdir()
    for name in kept:
        shutil.copytree(whole / name, folder / name)
    shutil.copytree(whole / "samples", folder / "samples")
    lines = (whole / "log.jsonl").read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if json.loads(line).get("step") == 5)
    (folder / "log.jsonl").write_text("\n".join(lines[:cut]) + "\n" + lines[cut][:20])
    return folder


def tensors_of(checkpoint):
    """Weights, optimiser, schedule and average of a checkpoint, flat."""
    found = {}

    def add(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                add(f"{name}/{i}", inner)
        else:
            found[name] = value if isinstance(value, torch.Tensor) else torch.tensor(float(value or 0))

    add("model", load_file(checkpoint / "model.safetensors"))
    for path in sorted([checkpoint / "optimizer.bin", *checkpoint.glob("custom_checkpoint_*.pkl")]):
        add(path.name, torch.load(path))
    return found


def assert_same_run(found, expected):
    """Final state, trained PSM, log and pictures of two folders are the same to the bit."""
    assert_equal(tensors_of(found / "checkpoint-6"), tensors_of(expected / "checkpoint-6"))
    assert_equal(load_file(found / "model.safetensors"), load_file(expected / "model.safetensors"))
    assert log_of(found) == log_of(expected)
    pictures = [
        sorted((p.name, p.read_bytes()) for p in (folder / "samples").iterdir()) for folder in (found, expected)
    ]
    assert pictures[0] == pictures[1]


def test_a_resumed_run_is_the_same_to_the_bit(whole, root, tmp_path):
    folder, stage, options = whole
    losses = losses_of(folder)
    assert len(set(losses)) == 6
    killed = killed_after_checkpoint_3(folder, tmp_path / "killed")
    train(root, killed, stage, resume_from_checkpoint="latest", **options)
    assert_same_run(killed, folder)
    state = tensors_of(killed / "checkpoint-6")
    assert {value.item() for name, value in state.items() if name.endswith("/step")} == {6}
    # It also ends well where nothing is left but to save the result.
    (killed / "config.json").unlink()
    train(root, killed, stage, resume_from_checkpoint="latest", **options)
    assert_same_run(killed, folder)


def test_latest_without_a_checkpoint_starts_anew(whole, root, tmp_path):
    folder, stage, options = whole
    killed = killed_after_checkpoint_3(folder, tmp_path / "killed", kept=())
    train(root, killed, stage, resume_from_checkpoint="latest", **options)
    assert_same_run(killed, folder)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken_only_when_asked(whole, root, tmp_path, capsys):
    folder, stage, options = whole
    killed = killed_after_checkpoint_3(folder, tmp_path / "killed", kept=("checkpoint-3", "checkpoint-6"))
    path = killed / "checkpoint-6" / "optimizer.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resume = words(root, killed, stage, resume_from_checkpoint="latest", **options)
    assert command(*resume) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        "fs-psm train: `--resume_from_checkpoint` checkpoint-6 is damaged (optimizer.bin has changed); to go on from the "
        "one before it: --resume_from_checkpoint checkpoint-3"
    )
    for damage, fault in (
        (lambda: path.unlink(), "optimizer.bin is missing"),
        (lambda: (killed / "checkpoint-6" / "manifest.json").write_text("{"), "manifest.json is missing or broken"),
    ):
        damage()
        assert command(*resume) == 2
        assert f"checkpoint-6 is damaged ({fault})" in capsys.readouterr().err
    # Of the other two, only what was written after it survives a limit of one.
    asked = options | {"resume_from_checkpoint": "checkpoint-3", "checkpoints_total_limit": 1}
    assert command(*words(root, killed, stage, **asked)) == 0
    assert_same_run(killed, folder)
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.2}, "was made with sigma_range [0.1, 0.1], this run has [0.2, 0.2]"),
        ({"num_samples": 3}, "num_samples 2, this run has 3"),
        ({"train_batch_size": 2}, "global_batch_size 4, this run has 2"),
        ({"lambda_mse": 0.1}, "lambda_mse 0.25, this run has 0.1"),
        ({"seed": 1}, "seed 0, this run has 1"),
        ({"max_train_samples": 8}, "num_train_images 9, this run has 7"),
        ({"use_ema": "false"}, "use_ema True, this run has False"),
        ({"feature": "pooled"}, "feature tokens, this run has pooled"),
        ({"feature_layer": -2}, "feature_layer None, this run has -2"),
        ({"purifier_config": LARGE}, "was made with purifier_config {"),
        ({"mixed_precision": "bf16"}, "mixed_precision no, this run has bf16"),
        ({"learning_rate": 2e-3}, "learning_rate 0.001, this run has 0.002"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler linear, this run has cosine"),
        ({"random_flip": None}, "random_flip True, this run has False"),
        ({"max_train_steps": 2}, "`--max_train_steps` must be >= 3, where the checkpoint is, got 2"),
        ({"stage": "mapper", "purifier": "none", "purifier_config": None}, "made with stage purifier, this run has mapper"),
        ({"resume_from_checkpoint": "checkpoint-4"}, "must be latest or a checkpoint, got checkpoint-4; there is checkpoint-3"),
        ({"resume_from_checkpoint": None}, "holds checkpoint-3 of another run: give --resume_from_checkpoint latest, or"),
    ],
)  # fmt: skip
def test_what_would_not_go_on_exactly_is_refused(change, message, root, tmp_path, capsys):
    options = OPTIONS["purifier"] | {"max_train_steps": 6}
    if not (root / "short").exists():
        train(root, root / "short", **options | {"max_train_steps": 3})
    shutil.copytree(root / "short", tmp_path / "short")
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "short").rglob("*") if p.is_file())
    options |= {"resume_from_checkpoint": "latest"} | change
    options.setdefault("stage", "purifier")
    assert command(*words(root, tmp_path / "short", **options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fs-psm train: ")
    assert message in error
    # Nothing was touched, the log neither.
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "short").rglob("*") if p.is_file()) == before


def test_another_tower_is_refused(root, tmp_path, capsys):
    options = {"max_train_steps": 2, "checkpointing_steps": 1}
    train(root, tmp_path / "out", **options)
    (tmp_path / "out" / "checkpoint-2" / "manifest.json").unlink()
    shutil.copytree(root / "tower", tmp_path / "tower")
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    next(iter(weights.values())).add_(0.01)
    save_file(weights, tmp_path / "tower" / "model.safetensors", metadata={"format": "pt"})
    options |= {"resume_from_checkpoint": "checkpoint-1", "pretrained_model_name_or_path": tmp_path / "tower"}
    assert command(*words(root, tmp_path / "out", **options)) == 2
    assert "checkpoint-1 was made with tower " in capsys.readouterr().err


def test_other_images_are_refused(root, tmp_path, capsys):
    """As many, but one of them has another name: positions would be those of other pictures."""
    shutil.copytree(root / "images", tmp_path / "images")
    options = {"max_train_steps": 1, "train_data_dir": tmp_path / "images"}
    train(root, tmp_path / "out", **options)
    first = min((tmp_path / "images").iterdir())
    first.rename(first.with_name("zz.png"))
    assert command(*words(root, tmp_path / "out", resume_from_checkpoint="latest", **options)) == 2
    assert "checkpoint-1 was made with train_images " in capsys.readouterr().err


def test_another_purifier_below_the_mapper_is_refused(root, tmp_path, capsys):
    psm_model(mapper=False, seed=7).save_pretrained(tmp_path / "other")
    options = {"max_train_steps": 1, "pretrained_psm_name_or_path": root / "psm"}
    train(root, tmp_path / "out", "mapper", **options)
    options |= {"resume_from_checkpoint": "latest", "pretrained_psm_name_or_path": tmp_path / "other"}
    assert command(*words(root, tmp_path / "out", "mapper", **options)) == 2
    assert "checkpoint-1 was made with purifier " in capsys.readouterr().err


def test_checkpoints_to_keep(root, tmp_path):
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "validation_steps": 1}
    train(root, tmp_path / "out", max_train_steps=5, **options)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    for path in (tmp_path / "out").glob("checkpoint-*"):
        listed = json.loads((path / "manifest.json").read_text())
        step = int(path.name.rpartition("-")[2])
        assert listed["facts"]["step"] == step
        # A run that goes on from here need not validate again.
        picture = tmp_path / "out" / "samples" / f"step-{step:06d}.png"
        assert picture.stat().st_mtime_ns <= (path / "manifest.json").stat().st_mtime_ns
        assert set(listed["sha256"]) == {p.name for p in path.iterdir()} - {"manifest.json"}


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_exactly(root, tmp_path, one_thread):
    """A real process, killed by SIGKILL as soon as the second checkpoint is begun."""
    options = {"purifier_config": LARGE, "checkpointing_steps": 1, "validation_steps": 100, "num_samples": 1}
    options |= {"train_batch_size": 1, "max_train_steps": 4}
    train(root, tmp_path / "whole", **options)
    killed, resume = tmp_path / "killed", None
    for _ in range(5):
        process = start(words(root, killed, resume_from_checkpoint=resume, **options))
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if (killed / "checkpoint-1").exists() and any(killed.glob(".unfinished-checkpoint-*/model.safetensors")):
                break
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == -signal.SIGKILL, printed
        if list(killed.glob(".unfinished-checkpoint-*")):
            break
        resume = "latest"  # it was quicker
    (unfinished,) = killed.glob(".unfinished-checkpoint-*")
    assert not (unfinished / "manifest.json").exists()
    assert not (killed / "config.json").exists()
    assert len(list(killed.glob("checkpoint-*"))) < 4
    train(root, killed, resume_from_checkpoint="latest", **options)
    assert not list(killed.glob(".unfinished*"))
    assert_equal(tensors_of(killed / "checkpoint-4"), tensors_of(tmp_path / "whole" / "checkpoint-4"))
    assert log_of(killed) == log_of(tmp_path / "whole")
    assert_equal(load_file(killed / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors"))


@pytest.fixture
def one_thread():
    """As the processes of their own have: sums run in another order on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Limit:
    """No file larger than so many bytes, as on a full disk; Python ignores the signal, so a write just fails."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin"])
def test_a_full_disk_while_a_checkpoint_is_written(file, root, tmp_path, capsys):
    """One line, exit code 2; the checkpoint before is whole, nothing of the new one is there, and the run can go on."""
    options = {"checkpointing_steps": 1, "validation_steps": 100}
    train(root, tmp_path / "whole", max_train_steps=3, **options)
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", out / "checkpoint-1")
    shutil.copy(tmp_path / "whole" / "log.jsonl", out)
    more = words(root, out, max_train_steps=3, resume_from_checkpoint="latest", **options)
    before = {p.name: p.read_bytes() for p in (out / "checkpoint-1").iterdir()}
    with Limit(len(before[file]) - 100):
        assert command(*more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"fs-psm train: `--output_dir` {out}: checkpoint-2 cannot be written: ")
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-1", "log.jsonl"]
    assert {p.name: p.read_bytes() for p in (out / "checkpoint-1").iterdir()} == before
    assert command(*more) == 0
    assert_equal(tensors_of(out / "checkpoint-3"), tensors_of(tmp_path / "whole" / "checkpoint-3"))


def test_a_full_disk_while_the_result_is_written(root, tmp_path, capsys):
    """The trained PSM is whole or not there, and saved by the next try."""
    out = tmp_path / "out"
    train(root, out, max_train_steps=1)
    expected = (out / "model.safetensors").read_bytes()
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    again = words(root, out, max_train_steps=1, resume_from_checkpoint="latest")
    with Limit(len(expected) - 100):
        assert command(*again) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"fs-psm train: `--output_dir` {out}: the PSM cannot be written: ")
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-1", "log.jsonl", "results", "samples"]
    assert command(*again) == 0
    assert (out / "model.safetensors").read_bytes() == expected
    assert PSMModel.from_pretrained(out).purifier is not None


def test_both_stages_killed_in_the_second(root, tmp_path, capsys):
    """The first is not trained again; the result is that of a run that was never killed."""
    options = {"max_train_steps": 4, "checkpointing_steps": 2}
    assert command(*words(root, tmp_path / "whole", "both", **options)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("config.json", "model.safetensors", "mapper/config.json", "mapper/model.safetensors"):
        (tmp_path / "killed" / name).unlink()
    shutil.rmtree(tmp_path / "killed" / "mapper" / "checkpoint-4")
    first = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "killed" / "purifier").rglob("*"))
    assert command(*words(root, tmp_path / "killed", "both", resume_from_checkpoint="latest", **options)) == 0
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "killed" / "purifier").rglob("*")) == first
    for name in (".", "purifier", "mapper"):
        found, expected = (load_file(tmp_path / run / name / "model.safetensors") for run in ("killed", "whole"))
        assert_equal(found, expected)
    assert log_of(tmp_path / "killed" / "mapper") == log_of(tmp_path / "whole" / "mapper")
    psm = PSMModel.from_pretrained(tmp_path / "killed")
    assert psm.purifier is not None
    assert psm.mapper is not None
    # Killed in the first stage, or before the end of it: the same again.
    shutil.rmtree(tmp_path / "killed" / "mapper")
    shutil.rmtree(tmp_path / "killed" / "purifier" / "checkpoint-4")
    (tmp_path / "killed" / "purifier" / "config.json").unlink()
    assert command(*words(root, tmp_path / "killed", "both", resume_from_checkpoint="latest", **options)) == 0
    assert_equal(
        load_file(tmp_path / "killed" / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    )
