"""What a run leaves for its model card: `results/card.json`, what was trained on what, and by which command."""

import dataclasses
import json
import os
import shlex
from pathlib import Path

import torch
from transformers import AutoConfig

from ..hosts import HOSTS


FILE = Path("results") / "card.json"
# Of the machine or the account rather than of the result.
_LEFT_OUT = (
    "output_dir", "resume_from_checkpoint", "hub_token", "hub_model_id", "hub_private_repo", "push_to_hub", "report_to",
    "logging_dir", "tracker_project_name", "cache_dir", "feature_cache_dir", "dataloader_num_workers", "preset",
    "checkpointing_steps", "checkpoints_total_limit",
)  # fmt: skip


def write_record(args, tower, steps):
    """Write the facts of a stage, after those of the PSM that it started from.

    Args:
        args ([`PSMTrainingArguments`]): of the stage.
        tower ([`SmoothedVisionTower`]): the frozen one.
        steps (`int`): optimiser steps.
    """
    folder = Path(args.output_dir)
    names = args.train_data_dir or [args.dataset_name]
    low, high = args.sigma_range
    before = []
    if args.pretrained_psm_name_or_path is not None:
        before = _steps_of(Path(args.pretrained_psm_name_or_path) / FILE)
    facts = {
        "tower": {
            "name": _short(args.pretrained_model_name_or_path),
            "class": _class_name(args, tower),
            "feature": args.feature,
            "text": f"`{_short(args.pretrained_model_name_or_path)}`{_layer(tower)}",
        },
        "example": {"sigma": low, "num_samples": 4},
        "training": {
            "text": "Trained by `fs-psm train` around the frozen tower (Algorithm 1 of the paper).",
            "data": ", ".join(f"`{_short(name)}`" for name in names),
            "sigma_min": low,
            "sigma_max": high,
            "steps": [*before, {"stage": args.stage, "steps": steps, "text": f"batches of {args.train_batch_size}"}],
            "hardware": torch.cuda.get_device_name() if tower.device.type == "cuda" else "CPU",
            "command": _command(args),
        },
    }
    if args.dataset_name is not None and not Path(args.dataset_name).exists():
        facts["datasets"] = [args.dataset_name]
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    unfinished = (folder / FILE).with_suffix(".tmp")
    unfinished.write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(unfinished, folder / FILE)


def _steps_of(path):
    """The steps that another record names; none where there is none."""
    try:
        return json.loads(path.read_text())["training"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _short(name):
    """A folder by its last name, so that no machine is named; an id of the Hub as it is."""
    return Path(name).resolve().name if Path(name).exists() else str(name)


def _class_name(args, tower):
    """What loads the tower, or the host around it."""
    config = AutoConfig.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision)
    if config.model_type in HOSTS:
        return (config.architectures or ["AutoModelForImageTextToText"])[0]
    return type(tower.vision_tower).__name__


def _layer(tower):
    layer = tower.config.feature_layer
    return "" if layer is None else f", layer {layer}"


def _command(args):
    words = ["fs-psm", "train", "--stage", args.stage]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in (*_LEFT_OUT, "stage") or value is None or value == field.default:
            continue
        words.append(f"--{field.name}")
        several = value if isinstance(value, list) else [value]
        several = [json.dumps(value)] if isinstance(value, dict) else several
        words += [] if value is True else [_short(v) if isinstance(v, str) else str(v) for v in several]
    return shlex.join([*words, "--output_dir", "OUT"])
