"""Results as JSON lines that survive a kill at any moment, also when several processes write them."""

import contextlib
import json
import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

from .certificate import Certificate
from .labels import LabelCertificate


class ResultsFile:
    """JSON lines, one per finished image, behind a header that says what was asked.

    A line counts once its newline is on disk; a half-written last line is dropped on resume. Each further process writes
    to a file of its own beside it (`out.jsonl.part1`), which the first one takes in.

    Args:
        path (`Path`): the file.
        settings (`dict`): what was asked; JSON-safe.
        resume (`bool`): go on with an existing file.
        adopt (`tuple[str, ...]`): settings that an existing file decides.
        part (`int`): number of this process. Those after the first join a file that the first has made.

    Raises:
        ValueError: the file exists and `resume` is not set, it holds no header, or it was made with other settings.
    """

    def __init__(self, path, settings, resume=False, adopt=(), part=0):
        self.path, self.part = Path(path), part
        self.settings = json.loads(json.dumps(settings))
        self.lines = []
        if part > 0:
            self._read(self.path, adopt)
            self.own = self._part_path(part)
            return
        self.own = self.path
        if self.path.exists():
            if not resume:
                raise ValueError(f"`output` {path} exists: use --resume to go on with it, or give another file")
            self._read(self.path, adopt)
        if self.lines:
            self._take_in_parts()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for stale in self._parts():
                stale.unlink()
            self.lines = [{"kind": "header", **self.settings}]
        self._rewrite(self.lines)

    def _part_path(self, part):
        return self.path.with_name(f"{self.path.name}.part{part}")

    def _parts(self):
        own = re.compile(re.escape(self.path.name) + r"\.part\d+")
        return sorted(path for path in self.path.parent.iterdir() if own.fullmatch(path.name))

    def _rewrite(self, lines):
        # Rewritten whole, then renamed: what was half-written is gone, and a kill here loses nothing.
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temporary, self.path)
        self.lines = lines

    def _read(self, path, adopt):
        lines = read_lines(path)
        if not lines:
            return
        if lines[0]["kind"] != "header":
            raise ValueError(f"`output` {path} was not written by this command")
        header = {name: value for name, value in lines[0].items() if name != "kind"}
        self.settings |= {name: header.get(name) for name in adopt}
        for name in sorted(header.keys() | self.settings.keys()):
            if header.get(name) != self.settings.get(name):
                raise ValueError(
                    f"`output` {path} was made with {name}={header.get(name)!r}, not {self.settings.get(name)!r}: "
                    "give another file or the same settings"
                )
        # Unreadable files get another chance; the summary is made again.
        self.lines = [lines[0]] + [line for line in lines[1:] if line["kind"] == "image"]

    def _take_in_parts(self):
        found = self._parts()
        done = self.done
        for part in found:
            self.lines += [line for line in read_lines(part) if line["kind"] == "image" and line["file"] not in done]
        if found:
            self._rewrite(self.lines)
        for part in found:
            part.unlink()

    @property
    def done(self):
        """Names of the finished images."""
        return {line["file"] for line in self.lines if line["kind"] == "image"}

    def append(self, line):
        """Write one line and wait until it is on disk."""
        self.lines.append(line)
        with open(self.own, "a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def close(self, files, summarize):
        """Put all lines of all processes in the order of `files`, and a summary behind them: the same file however made.

        Args:
            files (`list[str]`): names of the images.
            summarize (`Callable[[list[dict]], dict]`): the summary of the lines of images.

        Returns:
            `list[str]`: the files that could not be read.
        """
        lines = list(self.lines)
        for part in self._parts():
            lines += read_lines(part)
        entries = {line["file"]: line for line in lines if line["kind"] in ("image", "error")}
        missing = [name for name in files if name not in entries]
        if missing:
            raise ValueError(f"`output` {self.path} lacks {len(missing)} images, such as {missing[0]}: use --resume")
        ordered = [entries[name] for name in files]
        images = [line for line in ordered if line["kind"] == "image"]
        summary = [{"kind": "summary", **summarize(images)}] if images else []
        self._rewrite([self.lines[0], *ordered, *summary])
        for part in self._parts():
            part.unlink()
        return [line["file"] for line in ordered if line["kind"] == "error"]

    def certificates(self):
        """Every [`Certificate`] in the file, image by image."""
        return [
            Certificate.from_dict(entry)
            for line in self.lines
            if line["kind"] == "image"
            for entry in line["certificates"]
        ]

    def label_certificates(self):
        """Every [`LabelCertificate`] in the file, image by image."""
        return [LabelCertificate.from_dict(line["label"]) for line in self.lines if line.get("label") is not None]


def read_lines(path) -> list[dict]:
    """The whole lines of a results file.

    Raises:
        ValueError: a line before the last is damaged, or is not one of ours.
    """
    complete = Path(path).read_text().rpartition("\n")[0]
    try:
        lines = [json.loads(line) for line in complete.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"`output` {path} is damaged before its last line: {error}") from error
    if not all(
        isinstance(line, dict) and "kind" in line and ("file" in line or line["kind"] not in ("image", "error"))
        for line in lines
    ):
        raise ValueError(f"`output` {path} was not written by this command")
    return lines


def versions():
    """Versions of what computes, and the commit of this package where it runs from a checkout."""
    found = {name: metadata.version(name) for name in ("torch", "transformers", "diffusers", "numpy", "scipy")}
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError):
            answer = subprocess.run(git, capture_output=True, text=True)
            found |= {"fs_psm_hf_commit": answer.stdout.strip()} if answer.returncode == 0 else {}
    return found
