"""A card on disk: written whole or not at all."""

import os
from pathlib import Path

from .merge import merge_card, parse_blocks, read_metadata, split_card
from .render import render_card


def write_card(folder, check=False):
    """Render the `README.md` of a folder into the one that is there; text of a human stays.

    Args:
        folder (`str` or `os.PathLike`): a model folder, see [`render_card`].
        check (`bool`): write nothing.

    Returns:
        `list[str]`: what has changed, or would; empty where the card is up to date, and the file is then not touched.

    Raises:
        ValueError: see [`render_card`] and [`merge_card`].
        OSError: the card cannot be read or written; the old one is then whole.
    """
    path = Path(folder) / "README.md"
    new = render_card(folder)
    try:
        old = path.read_bytes().decode() if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path.name}` of {path.parent.name} must be UTF-8 text, got other bytes: {error}"
        ) from error
    merged = merge_card(old, new)
    changes = _changes(old, merged)
    if changes and not check:
        _replace(path, merged)
    return changes


def _changes(old, new):
    if old == new:
        return []
    if not old.strip():
        return ["new card"]
    before, after = read_metadata(old), read_metadata(new)
    found = [f"metadata: {key}" for key in after if key not in before or after[key] != before[key]]
    old_blocks, new_blocks = (dict(parse_blocks(split_card(text)[3], "old")[0]) for text in (old, new))
    for name, text in new_blocks.items():
        if name and old_blocks.get(name) != text:
            found.append(f"block {name}: {'changed' if name in old_blocks else 'added'}")
    return found or ["names of the blocks"]


def _replace(path, text):
    """Through a file beside it, so that a full disk or a kill leaves the old card."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
