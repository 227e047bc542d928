"""Merging a rendered card into one that humans have edited."""

import random
import re

import pytest
import yaml
from card_text import blocks, names_of_blocks

from fs_psm_hf.cards import merge_card
from fs_psm_hf.cards.merge import parse_blocks, split_card


def bench(numbers):
    """A small rendered card."""
    text = "---\nlicense: mit\ntags:\n- fs-psm\n---\n\n# name\n\n"
    for name, value in numbers.items():
        text += f"<!-- fs-psm:{name} -->\n## {name}\n\n{value}\n<!-- /fs-psm:{name} -->\n\n"
    return text + f"<!-- fs-psm blocks: {', '.join(numbers)}; note -->\n"


@pytest.mark.parametrize("seed", range(60))
def test_merging_keeps_every_line_of_a_human(seed):
    """Random edits outside the blocks, random new numbers: all human lines stay in order, all blocks become the new ones."""
    rng = random.Random(seed)
    old, new = (bench({name: rng.random() for name in "abcd"}) for _ in range(2))
    body = split_card(old)[3]
    parts = [text for _, text in parse_blocks(body, "old")[0]]
    words = [
        "I wrote this.",
        "",
        "  indented",
        "| a | table |",
        "---",
        "```",
        "<!-- mine -->",
        "# Title",
        "a: b",
        "`<!-- fs-psm:a -->`",
    ]
    newline = rng.choice(["\n", "\r\n"])
    pieces, human = [], []
    for part in parts:
        for _ in range(rng.randrange(3)):
            line = f"{rng.choice(words)} {rng.randrange(10**6)}\n"
            human.append(line.strip())
            pieces.append(line)
        pieces.append(part)
    gone = {name for name in "abcd" if rng.random() < 0.2}
    pieces = [piece for piece in pieces if not any(piece.startswith(f"<!-- fs-psm:{name} ") for name in gone)]
    metadata = "---\n# a remark\nlanguage: en   # kept\nlicense: mit\ntags: [mine,  fs-psm]\n---\n"
    card = (rng.choice([metadata, "", "\ufeff" + metadata]) + "".join(pieces)).replace("\n", newline)
    merged = merge_card(card, new)

    kept = [line.strip() for line in merged.splitlines() if line.strip() in set(human)]
    assert kept == human
    expected = {name: text.replace("\n", newline) for name, text in blocks(new).items() if name not in gone}
    assert blocks(merged) == expected
    assert merge_card(merged, new) == merged
    assert merge_card(merged, old) == merge_card(card, old)
    if metadata.splitlines()[1] in card:
        assert newline.join(metadata.split("\n")) in merged  # nothing to change: as it was written, comments and all


def test_a_card_without_marks_stays_whole():
    human = "# My model\n\nAll of this is mine.\n---\nTo the last word"
    new = bench({"a": 1, "b": 2})
    merged = merge_card(human, new)
    assert human in merged
    assert merged.startswith("---\nlicense: mit\ntags:\n- fs-psm\n---\n\n# My model")
    assert blocks(merged) == blocks(new)
    assert names_of_blocks(merged) == ["a", "b"]
    assert merged.index("To the last word") < merged.index("fs-psm:a") < merged.index("fs-psm:b")
    assert merge_card(merged, new) == merged
    assert merge_card("", new) == merge_card(" \n", new) == new
    assert merge_card(human, "# no blocks, no metadata\n") == human


def test_new_blocks_come_last_and_removed_ones_stay_away():
    old = bench({"a": 1, "c": 3}) + "\nMy last words.\n"
    new = bench({"a": 10, "b": 20, "c": 30, "d": 40})
    merged = merge_card(old, new)
    assert list(blocks(merged)) == ["a", "c", "b", "d"]
    assert names_of_blocks(merged) == ["a", "c", "b", "d"]
    assert merged.endswith("\nMy last words.\n")

    taken_out = merged.replace(blocks(merged)["b"], "")
    again = merge_card(taken_out, new)
    assert again == taken_out
    back = merge_card(taken_out.replace("a, c, b, d", "a, c, d"), new)
    assert list(blocks(back)) == ["a", "c", "d", "b"]
    # Marks that are taken away make it a human's text, which is not doubled.
    own = re.sub(r"<!-- /?fs-psm:c -->\n", "", merged)
    assert merge_card(own, bench({"a": 10, "b": 20, "c": 31, "d": 40})) == own
    # A block that the new card does not have is not ours to remove.
    assert blocks(merge_card(merged, bench({"a": 5})))["d"] == blocks(merged)["d"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text + "<!-- fs-psm:a -->\nx\n<!-- /fs-psm:a -->\n", "`a` opened a second time"),
        (lambda text: text.replace("<!-- /fs-psm:b -->\n", ""), "`b` not closed"),
        (lambda text: text.replace("<!-- /fs-psm:a -->\n", ""), "`b` opened inside `a`"),
        (lambda text: text.replace("<!-- fs-psm:b -->\n", ""), "`b` closed without being opened"),
        (lambda text: text.replace("<!-- fs-psm:a -->\n", "<!-- fs-psm:a -->\n" * 2), "`a` opened a second time"),
        (lambda text: text + "<!-- fs-psm blocks: a; -->\n", "the names of the blocks a second time"),
    ],
)
def test_damaged_marks_are_refused(damage, message):
    good = bench({"a": 1, "b": 2})
    for old, new, which in [(damage(good), good, "old"), (good, damage(good), "new")]:
        with pytest.raises(ValueError, match=rf"the {which} card must have .*{message} \(line \d+"):
            merge_card(old, new)


def test_metadata_of_others_stays():
    theirs = {"task": {"type": "t"}, "dataset": {"name": "d", "type": "d"}, "metrics": [{"type": "m", "value": 1}]}
    ours = {"task": {"type": "t"}, "dataset": {"name": "d", "type": "d", "config": "fs-psm: row FS"}, "metrics": []}
    stale, fresh = (ours | {"metrics": [{"type": "m", "value": v}]} for v in (2, 3))
    old = {
        "language": "en", "license": "other", "license_name": "mine", "tags": "mine", "datasets": ["d1"], "co2": {"x": 1},
        "model-index": [{"name": "old", "results": [stale, theirs]}],
    }  # fmt: skip
    new = {
        "license": "mit", "library_name": "fs_psm_hf", "tags": ["fs-psm"], "datasets": ["d1", "d2"],
        "model-index": [{"name": "n", "results": [fresh]}], "language": "fr",
    }  # fmt: skip
    merged = merge_card(*(f"---\n{yaml.safe_dump(values)}---\ntext\n" for values in (old, new)))
    assert yaml.safe_load(split_card(merged)[1]) == {
        "language": "en", "license": "mit", "license_name": "mine", "tags": ["mine", "fs-psm"], "datasets": ["d1", "d2"],
        "co2": {"x": 1}, "library_name": "fs_psm_hf",
        "model-index": [{"name": "n", "results": [fresh]}, {"name": "old", "results": [theirs]}],
    }  # fmt: skip
    assert merge_card(merged, merged) == merged


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("tags:\n# mine\n- a\n\nlanguage: en # c", "tags:\n- a\n- fs-psm\n\nlanguage: en # c\nlicense: mit"),
        ("'license': gpl\nx: |\n  license: no\ntags: [fs-psm]", "license: mit\nx: |\n  license: no\ntags: [fs-psm]"),
        ("{language: en,\ntags: [a]}", "language: en\ntags:\n- a\n- fs-psm\nlicense: mit"),
    ],
)
def test_metadata_is_edited_line_by_line(metadata, expected):
    assert merge_card(f"---\n{metadata}\n---\nx\n", bench({})).startswith(f"---\n{expected}\n---\nx\n")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("a: [", "the metadata of the old card must be YAML"),
        ("- a", "the metadata of the old card must be names and values, got list"),
        ("model-index: x", "`model-index` of a card must be a list"),
        ("model-index:\n- name: x", "`model-index` of a card must be a list"),
    ],
)
def test_metadata_that_is_none_is_refused(metadata, message):
    new = "---\nmodel-index:\n- name: n\n  results: []\n---\nx\n"
    with pytest.raises(ValueError, match=message):
        merge_card(f"---\n{metadata}\n---\nx\n", new)
