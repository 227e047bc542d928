"""Putting generated blocks and metadata into a card without losing a word that a human has written."""

import re

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump


# Metadata that we write. Lists are joined, since a human adds to them; the rest of a card's metadata is never touched.
_JOINED = ("tags", "datasets")
_REPLACED = ("library_name", "base_model", "base_model_relation", "pipeline_tag", "license")
# What `dataset_config` of our evaluation results starts with.
OWN_RESULT = "fs-psm: "

_MARK = re.compile(r"[ \t]*<!--[ \t]*(/?)fs-psm:([a-z0-9-]+)[ \t]*-->[ \t]*")
_KNOWN = re.compile(r"[ \t]*<!--[ \t]*fs-psm blocks:([^;]*)(;.*)?-->[ \t]*")
_KEY = re.compile(r"""("[^"]*"|'[^']*'|[^\s#'"{\[-][^:]*?)\s*:(\s|$)""")
_KNOWN_LINE = (
    "<!-- fs-psm blocks: {}; marked text is generated, all other text is yours; a block you delete stays away -->"
)


def merge_card(old_text, new_text):
    """The old card with the generated blocks and our metadata of the new one.

    A block is what stands between the lines `<!-- fs-psm:NAME -->` and `<!-- /fs-psm:NAME -->`. Everything else in the old
    card stays, to the byte: text before, between and after blocks, other metadata, and its comments and order.

    - A block of both cards is replaced where it stands; one that the new card lacks stays as it is.
    - A block that is new is put at the end, in the new card's order. So is every block where the old card has none.
    - A block that a human took out stays out: the last line, `<!-- fs-psm blocks: … -->`, names those that the card has had.
      Take a name from that line to get its block back. Marks that were taken away make a block's text a human's own.
    - Metadata: `library_name`, `base_model`, `pipeline_tag` and `license` are replaced where the new card has them, `tags`
      and `datasets` joined, and in `model-index` the results whose `dataset_config` starts with `fs-psm: ` replaced.

    Text of the new card outside its blocks is not taken over, unless the old card is empty.

    Args:
        old_text (`str`): the card that a human may have edited.
        new_text (`str`): from [`render_card`], or a card that was merged before.

    Raises:
        ValueError: marks of one of the two are damaged, or its metadata is not YAML with names and values.
    """
    if not old_text.strip():
        return new_text
    newline = "\r\n" if "\r\n" in old_text else "\n"
    old, new = split_card(old_text), split_card(new_text)
    parts, known = parse_blocks(old[3], "old")
    fresh = {name: _with_newlines(text, newline) for name, text in parse_blocks(new[3], "new")[0] if name}
    parts = [(name, fresh.get(name, text)) for name, text in parts]
    present = [name for name, _ in parts if name]
    added = [name for name in fresh if name not in (*present, *(known or ()))]
    if fresh and (added or known is None):
        # New blocks, and the line that names all, go where that line is; to the end where there is none.
        at = next((i for i, (name, _) in enumerate(parts) if name == ""), len(parts))
        before = "".join(text for _, text in parts[:at])
        for name in added:
            before = _with_blank_line(before, newline) + fresh[name]
        line = known_line(dict.fromkeys([*(known or ()), *present, *added]))
        parts[: at + 1] = [(None, _with_blank_line(before, newline) + line + newline)]
    return _merge_metadata(old, new, newline) + "".join(text for _, text in parts)


def known_line(names):
    """The line that tells a later merge which blocks this card has had."""
    return _KNOWN_LINE.format(", ".join(names))


def parse_blocks(body, which):
    """Cut a card's text at its marks.

    Args:
        body (`str`): a card without its metadata.
        which (`str`): "old" or "new", for the errors.

    Returns:
        `tuple[list[tuple[str | None, str]], list[str] | None]`: (name, text) in order, which joined give the body: the name
        of a block, `None` for a human's text, `""` for the line that names the blocks; and these names, if there is one.

    Raises:
        ValueError: a block is opened twice, in another or not closed, closed without being opened, or the line that names
            the blocks stands twice.
    """
    parts, known, current, opened = [], None, None, {}
    for number, line in enumerate(body.splitlines(keepends=True), 1):
        bare = line.rstrip("\r\n")
        mark, names = _MARK.fullmatch(bare), _KNOWN.fullmatch(bare)
        closing = bool(mark and mark[1])
        if mark and not closing:
            if mark[2] in opened or current is not None:
                where = "a second time" if mark[2] in opened else f"inside `{current}`"
                raise _damaged(which, f"`{mark[2]}` opened {where}", number)
            current = mark[2]
            opened[current] = number
            parts.append((current, ""))
        elif closing and mark[2] != current:
            raise _damaged(which, f"`{mark[2]}` closed without being opened", number)
        elif names and current is None:
            if known is not None:
                raise _damaged(which, "the names of the blocks a second time", number)
            known = [name.strip() for name in names[1].split(",") if name.strip()]
            parts.append(("", ""))
        elif current is None and (not parts or parts[-1][0] is not None):
            parts.append((None, ""))
        parts[-1] = (parts[-1][0], parts[-1][1] + line)
        if closing:
            current = None
    if current is not None:
        raise _damaged(which, f"`{current}` not closed", opened[current])
    return parts, known


def _damaged(which, what, number):
    return ValueError(
        f"the {which} card must have each generated block once, between `<!-- fs-psm:NAME -->` and "
        f"`<!-- /fs-psm:NAME -->`, got {what} (line {number} after the metadata)"
    )


def split_card(text):
    """(first fence, metadata, second fence, body); no fences and no metadata (`None`) where a card has none."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix(mark)
    match = REGEX_YAML_BLOCK.search(text)
    return (mark + match[1], match[2], match[3], text[match.end() :]) if match else (mark, None, "", text)


def _with_newlines(text, newline):
    text = text.replace("\r\n", "\n")
    return (text if text.endswith("\n") else text + "\n").replace("\n", newline)


def _with_blank_line(text, newline):
    if not text or text.endswith(newline * 2):
        return text
    return text + (newline if text.endswith("\n") else newline * 2)


def read_metadata(text, which="old"):
    """The metadata of a card as a `dict`, empty where it has none.

    Raises:
        ValueError: it is not YAML with names and values.
    """
    return _load(split_card(text)[1], which)


def _load(text, which):
    try:
        found = yaml.safe_load(text or "") or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of the {which} card must be YAML, got: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"the metadata of the {which} card must be names and values, got {type(found).__name__}")
    return found


def _merge_metadata(old, new, newline):
    """The old card up to its body, keys of ours replaced and the rest as it was written."""
    start, text, end, _ = old
    values, ours = _load(text, "old"), _load(new[1], "new")
    merged = values | {key: ours[key] for key in _REPLACED if key in ours}
    merged |= {key: _join(values.get(key), ours[key]) for key in _JOINED if key in ours}
    if "model-index" in ours:
        merged["model-index"] = _join_results(values.get("model-index"), ours["model-index"])
    changed = {key: value for key, value in merged.items() if key not in values or values[key] != value}
    if not changed:
        return start + (text or "") + end
    written = _replace_keys((text or "").replace("\r\n", "\n"), changed)
    if not _reads_as(written, merged):
        # Not a list of keys, line by line: comments are lost here, values are not.
        written = yaml_dump(merged, sort_keys=False).strip()
    if text is None:
        start, end = start + "---" + newline, newline + "---" + newline * 2
    return start + written.replace("\n", newline) + end


def _reads_as(text, values):
    try:
        return yaml.safe_load(text) == values
    except yaml.YAMLError:
        return False


def _join(old, new):
    old, new = ([] if v is None else v if isinstance(v, list) else [v] for v in (old, new))
    return [*old, *(value for value in new if value not in old)]


def _join_results(old, new):
    """Entries of `model-index`: our results of the new card, and those that others have put into the old one."""
    try:
        found = _entries(new, own=True)
        for entry in _entries(old or [], own=False):
            same = next((ours for ours in found if ours["name"] == entry["name"]), None)
            if same is None:
                found.append(entry)
            else:
                same["results"] += entry["results"]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            "`model-index` of a card must be a list of entries with `name` and `results`, got another form"
        ) from error
    return found


def _entries(index, own):
    found = [entry | {"results": [result for result in entry["results"] if _is_own(result) == own]} for entry in index]
    return [entry for entry in found if entry["results"]]


def _is_own(result):
    return str(result["dataset"].get("config", "")).startswith(OWN_RESULT)


def _replace_keys(text, changed):
    """YAML in which the lines of some top-level keys are replaced, or added at the end."""
    chunks = []  # [key or None, lines]
    for line in text.split("\n"):
        match = _KEY.match(line)
        if match:
            chunks.append([match[1].strip("'\""), line])
        elif not line.strip() or line.startswith("#"):
            chunks.append([None, line])
        else:
            # A line that goes on belongs to its key, with the comments between them.
            while len(chunks) > 1 and chunks[-1][0] is None:
                _, comment = chunks.pop()
                chunks[-1][1] += "\n" + comment
            if not chunks:
                chunks.append([None, line])
                continue
            chunks[-1][1] += "\n" + line
    if chunks == [[None, ""]]:
        chunks = []
    for key, value in changed.items():
        written = yaml_dump({key: value}, sort_keys=False).strip()
        found = next((chunk for chunk in chunks if chunk[0] == key), None)
        if found is None:
            chunks.append([key, written])
        else:
            found[1] = written
    return "\n".join(lines for _, lines in chunks)
