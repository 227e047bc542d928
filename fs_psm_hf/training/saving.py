"""The trained PSM in its folder: loadable when all of it is there, never a mixture of two."""

import os
import shutil
import tempfile
from pathlib import Path

from ..cards import write_card
from ..hub import push_folder
from .record import FILE


_UNFINISHED = ".unfinished-psm"


def save_psm(psm, folder, max_shard_size="50GB"):
    """Save a [`PSMModel`] aside, then put it in place of the one before.

    Args:
        max_shard_size (`str`): as of `save_pretrained`.

    Raises:
        OSError, RuntimeError, SafetensorError: it cannot be written; what was there before is untouched.
    """
    unfinished = Path(folder) / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        psm.save_pretrained(unfinished, max_shard_size=max_shard_size)
        _install(unfinished, Path(folder))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def copy_psm(source, folder):
    """Put a copy of the PSM of one folder, and of its record, into another, as [`save_psm`] does.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    unfinished = Path(folder) / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for path in [*_weights(Path(source)), Path(source) / "config.json"]:
            shutil.copyfile(path, unfinished / path.name)
        _install(unfinished, Path(folder))
        if (Path(source) / FILE).exists():
            (Path(folder) / FILE).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(source) / FILE, Path(folder) / FILE)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def publish(folder, repo_id, token=None, private=None):
    """Upload the PSM of a folder and its card, without checkpoints and logs.

    Raises:
        ValueError, OSError: as [`push_folder`].
    """
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place) / repo_id.rpartition("/")[2]  # the card is named like it
        copy_psm(folder, staged)
        write_card(staged)
        push_folder(staged, repo_id, token=token, private=private)


def _weights(folder):
    return [*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")]


def _install(unfinished, folder):
    """Move everything; between first and last there is no config.json, so that a kill leaves nothing that loads."""
    new = _weights(unfinished)
    (folder / "config.json").unlink(missing_ok=True)
    for path in _weights(folder):
        if path.name not in {fresh.name for fresh in new}:
            path.unlink()
    for path in new:
        os.replace(path, folder / path.name)
    os.replace(unfinished / "config.json", folder / "config.json")
