"""Checkpoints that are whole or not there: written aside, hashed, renamed."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError


_NAME = re.compile(r"checkpoint-(\d+)")
_MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished-"


def list_checkpoints(folder):
    """Checkpoints of a folder, oldest first, as `(step, path)`."""
    found = []
    if Path(folder).is_dir():
        for path in Path(folder).iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found)


def save_checkpoint(accelerator, folder, step, facts, limit=None):
    """Write `checkpoint-{step}`; all processes call it.

    Args:
        facts (`dict`): JSON-safe, to be compared when the run goes on.
        limit (`int`, *optional*): checkpoints to keep, this one included.

    Raises:
        OSError: it cannot be written, for lack of space perhaps; then nothing of it is left, and older ones are there.
    """
    folder = Path(folder)
    unfinished = folder / f"{_UNFINISHED}checkpoint-{step}"
    if accelerator.is_main_process:
        remove_unfinished(folder)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _seal(unfinished, {"step": step, **facts})
            final = folder / f"checkpoint-{step}"
            if final.exists():
                shutil.rmtree(final)
            os.replace(unfinished, final)
            _sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # "no space left" in torch's words and in safetensors'
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"`--output_dir` {folder}: checkpoint-{step} cannot be written: {error}") from error
    if accelerator.is_main_process and limit is not None:
        # Later ones are leftovers: the run went on from an earlier one.
        older = [path for before, path in list_checkpoints(folder) if before < step]
        for path in older[: max(0, len(older) + 1 - limit)]:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def remove_unfinished(folder):
    """Remove what a killed run left of a checkpoint."""
    for path in Path(folder).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(folder, asked):
    """The checkpoint to go on from, and its facts.

    Args:
        folder (`Path`): the output folder.
        asked (`str`): `"latest"`, or a name in `folder`, or a path.

    Returns:
        `tuple[Path, dict]`, or `(None, None)` for `"latest"` where there is none.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged; the one before it is named and not taken.
    """
    known = list_checkpoints(folder)
    if asked == "latest":
        if not known:
            return None, None
        path = known[-1][1]
    else:
        path = next((p for p in (Path(folder) / asked, Path(asked)) if p.is_dir()), None)
        if path is None:
            there = ", ".join(p.name for _, p in known) or "no checkpoint"
            raise ValueError(
                f"`--resume_from_checkpoint` must be latest or a checkpoint, got {asked}; there is {there}"
            )
    fault, facts = _check(path)
    if fault is not None:
        match = _NAME.fullmatch(path.name)
        before = [p for step, p in known if match and step < int(match[1]) and _check(p)[0] is None]
        advice = f"; to go on from the one before it: --resume_from_checkpoint {before[-1].name}" if before else ""
        raise ValueError(f"`--resume_from_checkpoint` {path.name} is damaged ({fault}){advice}")
    return path, facts


def _seal(folder, facts):
    """Hash and flush every file, then list them."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[path.relative_to(folder).as_posix()] = _sha256(path)
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
    with open(folder / _MANIFEST, "w") as stream:
        json.dump({"facts": facts, "sha256": files}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    _sync(folder)


def _check(folder):
    """What is wrong with a checkpoint, or `None`, and its facts."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        facts, files = manifest["facts"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MANIFEST} is missing or broken", None
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing", facts
        if _sha256(folder / name) != digest:
            return f"{name} has changed", facts
    return None, facts


def _sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(folder):
    """Flush a folder's list of names, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
