"""The state of an evaluation as JSON lines: a restart goes on where a kill, or a judge that was down, has stopped it.

Line by line: one `header` with the configuration and its hash; an `attack` line for each adversarial picture that is on
disk; an `item` line for each image of each cell, with the texts or features' cosines that were measured; and a `cell` line
with the summary of each finished cell. Items hold every pair of captions, so that another judge can score them later
without a model.
"""

import hashlib
import json
import re
from pathlib import Path

from .jsonl import append_jsonl, read_jsonl, write_jsonl


_ORDER = {"attack": 0, "item": 1, "cell": 2}


def config_hash(settings) -> str:
    """Sixteen hexadecimal digits that two configurations share if they are equal, whatever the order of their keys."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def difference(one, other, where=""):
    """The first place at which two JSON values differ, `"attacks.0.steps: 300, not 20"`; `None` where they do not."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            found = difference(one.get(key), other.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            found = difference(left, right, f"{where}.{number}")
            if found:
                return found
        return None
    return None if one == other else f"{where}: {one!r}, not {other!r}"


class RunFile:
    """The lines of one evaluation.

    Each further process writes to a file of its own beside it (`run.jsonl.part1`), which the first one takes in.

    Args:
        path (`Path`): the file; made where it is not there, gone on with where it is.
        settings (`dict`): the configuration; JSON-safe. Its hash names the run.
        header (`dict`, *optional*): further facts for the first line, such as versions; those of an existing file stay.
        part (`int`): number of this process. Those after the first join a file that the first has made.

    Raises:
        ValueError: the file was made with another configuration, or holds something else.
    """

    def __init__(self, path, settings, header=None, part=0):
        self.path, self.part = Path(path), part
        settings = json.loads(json.dumps(settings))
        own = {"kind": "header", "config_hash": config_hash(settings), "config": settings, **(header or {})}
        lines = read_jsonl(self.path) if self.path.exists() else []
        if lines:
            _check_header(self.path, lines[0], own)
        elif part == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for stale in self._parts():
                stale.unlink()
        else:
            raise ValueError(f"`output` {path} must have been made by the first process, got no header")
        self.header = lines[0] if lines else own
        self._entries = {}
        for line in lines[1:]:
            self._keep(line)
        if part == 0:
            self.merge()

    def _keep(self, line):
        if line["kind"] not in _ORDER or "key" not in line or (line["kind"] != "cell" and "image" not in line):
            raise ValueError(f"`output` {self.path} must hold an evaluation, got a line of kind {line['kind']!r}")
        self._entries[line["kind"], line["key"], line.get("image")] = line

    def _parts(self):
        own = re.compile(re.escape(self.path.name) + r"\.part\d+")
        return sorted(path for path in self.path.parent.iterdir() if own.fullmatch(path.name))

    def _own_path(self):
        return self.path.with_name(f"{self.path.name}.part{self.part}") if self.part else self.path

    def merge(self, keys=(), images=()):
        """Take in the files of the other processes and write all lines anew, the same however they were made.

        Args:
            keys (`Sequence[str]`): the order of attacks and cells; others follow as they came.
            images (`Sequence[str]`): the order of the images within one.
        """
        parts = self._parts()
        for part in parts:
            for line in read_jsonl(part):
                self._keep(line)
        places = {key: place for place, key in enumerate(keys)}, {name: place for place, name in enumerate(images)}

        def place(line):
            key = places[0].get(line["key"], len(places[0]))
            return key, _ORDER[line["kind"]], places[1].get(line.get("image"), len(places[1]))

        lines = sorted(self._entries.values(), key=place) if keys else list(self._entries.values())
        self._entries = {(line["kind"], line["key"], line.get("image")): line for line in lines}
        write_jsonl(self.path, [self.header, *lines])
        for part in parts:
            part.unlink()

    def reload(self):
        """Read what the first process has merged since."""
        for line in read_jsonl(self.path)[1:]:
            self._keep(line)

    def add(self, kind, key, image=None, **values):
        """Write an `"attack"`, an `"item"` or a `"cell"` line and wait until it is on disk; it replaces one of its name."""
        if kind not in _ORDER:
            raise ValueError(f"`kind` must be one of {', '.join(_ORDER)}, got {kind!r}")
        line = {"kind": kind, "key": key, **({} if image is None else {"image": image}), **values}
        line = json.loads(json.dumps(line))
        self._entries[kind, key, image] = line
        append_jsonl(self._own_path(), line)
        return line

    def get(self, kind, key, image=None):
        """One line, or `None`."""
        return self._entries.get((kind, key, image))

    def items(self, key, images=None):
        """The item lines of a cell, in the order of `images` where given; those not there yet are left out."""
        found = {name: line for (kind, own, name), line in self._entries.items() if kind == "item" and own == key}
        return [found[name] for name in (found if images is None else images) if name in found]

    def cells(self):
        """The lines of the finished cells."""
        return [line for line in self._entries.values() if line["kind"] == "cell"]


def _check_header(path, found, own):
    if found.get("kind") != "header" or "config" not in found:
        raise ValueError(f"`output` {path} must be a file of `fs-psm evaluate`, got a first line of another kind")
    if found.get("config_hash") != own["config_hash"]:
        where = difference(found["config"], own["config"])
        raise ValueError(
            f"`output` {path} was made with another configuration ({where}): give another file or the same settings"
        )


def read_run(path):
    """Header and lines of a run file, finished or not.

    Raises:
        ValueError: the file is not one of `fs-psm evaluate`.
        OSError: it cannot be read.
    """
    lines = read_jsonl(path)
    if not lines or lines[0]["kind"] != "header" or "config" not in lines[0]:
        raise ValueError(f"`{path}` must be a file of `fs-psm evaluate`, got one without its header")
    return lines[0], lines[1:]
