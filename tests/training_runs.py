"""Tiny training runs through the command line's own entry: a tower and images on disk, real networks, a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from tiny_models import MEAN, SIZE, SMALL_UNET, STD, llava, vision_model
from transformers import CLIPImageProcessorPil

from fs_psm_hf.training import parse_arguments
from fs_psm_hf.training.__main__ import main
from fs_psm_hf.training.trainer import Trainer


UNET = json.dumps(SMALL_UNET)
# The CPU also where there is a GPU: bits are compared.
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def save_tower(folder, kind="clip"):
    """`vision_model(kind)`, or a LLaVA, with its image processor."""
    (llava() if kind == "llava" else vision_model(kind)).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=MEAN, image_std=STD
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def save_images(folder, count, width=24, height=20, seed=0):
    """Smooth pictures, which a network can learn something about."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        coarse = Image.fromarray(rng.integers(0, 255, (3, 3, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def words(root, output, stage="purifier", **options):
    """A command line: `option=None` is left out, `True` is a flag, a list several words."""
    settings = {
        "stage": stage,
        "output_dir": root / output,
        "pretrained_model_name_or_path": root / "tower",
        "purifier_config": None if stage == "mapper" or "pretrained_psm_name_or_path" in options else UNET,
        "purifier": "none" if stage == "mapper" and "pretrained_psm_name_or_path" not in options else None,
        "train_data_dir": root / "images",
        "train_batch_size": 4,
        "num_samples": 2,
        "max_train_steps": 2,
        "num_validation_images": 2,
        "validation_samples": 2,
        "learning_rate": 1e-3,
        "sigma": 0.1,
    } | options
    found = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        found.append(f"--{name}")
        if value is not True:
            found += [str(part) for part in (value if isinstance(value, (list, tuple)) else [value])]
    return found


def forget_accelerate():
    """accelerate keeps one state per process; every run starts with none."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def prepared(root, output="out", stage="purifier", use_cpu=True, **options):
    """The trainer of a run that has not started."""
    forget_accelerate()
    (arguments,) = parse_arguments(words(root, output, stage, **options))
    before = dict(os.environ)
    os.environ |= ENVIRONMENT if use_cpu else {}
    try:
        return Trainer(arguments)
    finally:
        os.environ.clear()
        os.environ |= before


def train(root, output="out", stage="purifier", **options):
    """A whole run in this process; its trainer."""
    trainer = prepared(root, output, stage, **options)
    trainer.run()
    return trainer


def command(*arguments):
    """The entry point in this process; its exit code."""
    forget_accelerate()
    before = dict(os.environ)
    os.environ |= ENVIRONMENT
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return stopped.code
    finally:
        os.environ.clear()
        os.environ |= before
    return 0


def start(arguments, processes=1):
    """The entry point in processes of its own."""
    program = ["-m", "fs_psm_hf.training"]
    if processes > 1:
        program = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), *program]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)], env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, process_group=0,
    )  # fmt: skip


def log_of(folder, speed=False):
    """The lines of a log after the settings, without what a clock says."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    assert "config" in lines[0]
    if not speed:
        for line in lines:
            line.pop("images_per_second", None)
    return lines[1:]


def losses_of(folder, name="loss"):
    """One loss per step."""
    return [line[name] for line in log_of(folder) if name in line]


def weights_of(module):
    """A copy of a module's weights."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_equal(found, expected):
    """The same tensors, to the bit."""
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
