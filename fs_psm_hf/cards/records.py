"""JSON of a model folder that names its file and key where one is missing."""

import json
import re
from pathlib import Path


# Tokens of the Hub and of services that results may have passed by; a card, and the file itself, would publish them.
_TOKEN = re.compile(r"\b(hf_|api_org_|sk-(proj-)?)[A-Za-z0-9]{16,}|--(hub_)?token[ =]+[^\s-]")


class Record(dict):
    """A JSON object. A missing key raises `ValueError`: one sentence with the file and the key, dotted from the top.

    Args:
        values (`dict`): what the file holds here.
        file (`str`): its path in the folder.
        where (`tuple[str, ...]`): keys that lead here.

    Raises:
        ValueError: a value looks like a token.
    """

    def __init__(self, values, file, where=()):
        self._file, self._where = file, where
        super().__init__({key: _record(value, file, (*where, str(key))) for key, value in values.items()})

    def __missing__(self, key):
        raise ValueError(f"`{self._file}` must have the key `{'.'.join((*self._where, str(key)))}`, which it lacks")


def _record(value, file, where):
    if isinstance(value, str) and _TOKEN.search(value):
        raise ValueError(f"`{file}` must hold no token, got what looks like one in `{'.'.join(where)}`")
    if isinstance(value, dict):
        return Record(value, file, where)
    if isinstance(value, list):
        return [_record(part, file, (*where, str(i))) for i, part in enumerate(value)]
    return value


def read_record(folder, name):
    """The JSON object of one file.

    Raises:
        ValueError: it is no JSON object, or holds a token.
        OSError: it cannot be read.
    """
    return _parse((Path(folder) / name).read_bytes(), name)


def read_results_lines(folder, name):
    """`(header, summary)` of a results file of `fs-psm certify`.

    Raises:
        ValueError: it is another file, or one that is not finished.
        OSError: it cannot be read.
    """
    lines = (Path(folder) / name).read_bytes().splitlines()
    first, last = (_parse(line, name) for line in (lines[0], lines[-1])) if lines else ({}, {})
    if first.get("kind") != "header" or last.get("kind") != "summary":
        raise ValueError(
            f"`{name}` must be a finished results file of `fs-psm certify`, from a header to a summary, got "
            f"{first.get('kind')} to {last.get('kind')}"
        )
    return first, last


def _parse(text, name):
    try:
        values = json.loads(text)
    except ValueError as error:  # bytes that are no text included
        raise ValueError(f"`{name}` must be JSON, got a file that is not: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{name}` must be a JSON object, got {type(values).__name__}")
    return Record(values, name)
