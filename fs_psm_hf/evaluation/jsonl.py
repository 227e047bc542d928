"""JSON lines that survive a kill at any moment."""

import json
import os
from pathlib import Path


def read_jsonl(path) -> list[dict]:
    """The whole lines of a file; a last line without its newline, left by a kill, does not count.

    Raises:
        ValueError: a line before the last is damaged, or is no JSON object with a `kind`.
        OSError: the file cannot be read.
    """
    try:
        complete = Path(path).read_bytes().rpartition(b"\n")[0].decode("utf-8")
        lines = [json.loads(line) for line in complete.splitlines()]
    except ValueError as error:  # bytes that are no text included
        raise ValueError(f"`{path}` must hold JSON lines, got a damaged one before the last: {error}") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or "kind" not in line:
            raise ValueError(f"`{path}` must hold JSON objects with a `kind`, got another in line {number}")
    return lines


def append_jsonl(path, line):
    """Write one line and wait until it is on disk."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_jsonl(path, lines):
    """Replace a file whole: a kill leaves the old one or the new one, never half of it."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_text(path, text):
    """As [`write_jsonl`], for any text."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
