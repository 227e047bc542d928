"""Cells: their names, their summaries, which of two gradients counts, and when an attack is too weak to say anything."""

import dataclasses
import json

import pytest

from fs_psm_hf.cards.tables import format_attacks
from fs_psm_hf.evaluation.cells import (
    Cell,
    Result,
    format_strength,
    read_attacks,
    read_results,
    summarize_items,
    verdict,
    worst,
    write_attacks,
)
from fs_psm_hf.evaluation.judges import KeywordJudge
from fs_psm_hf.evaluation.records import RunFile
from fs_psm_hf.evaluation.retrieval import Retrieval
from fs_psm_hf.evaluation.tasks import Captioning


ORG = Cell("DINOv2-small", "org", "Org", "foa", "white-box", 16 / 255, "retrieval")
SMOOTHED = {"row": "FS+P+M", "sigma": 0.25, "num_samples": 4, "purifier": "light"}
TRANSFER = dataclasses.replace(ORG, mode="transfer", **SMOOTHED)
ADAPTIVE = dataclasses.replace(TRANSFER, mode="adaptive", gradient="end-to-end", draws=8)
STRAIGHT = dataclasses.replace(ADAPTIVE, gradient="straight-through")
STRONG = dataclasses.replace(ADAPTIVE, epsilon=64 / 255)
ZERO = dataclasses.replace(ADAPTIVE, row="FS", sigma=0.0, num_samples=1, purifier="none", draws=1)


def result(cell, asr, fcs=0.5, acc=0.5, images=5, **extras):
    return Result(cell, images, fcs, asr, acc, extras)


def test_no_two_cells_share_a_name():
    changes = {
        "model": "x", "encoder": "FARE", "row": "FS+P", "attack": "m_attack", "epsilon": 32 / 255, "task": "head",
        "norm": "l2", "steps": 20, "sigma": 0.5, "num_samples": 8, "purifier": "own", "draws": 16,
        "gradient": "straight-through",
    }  # fmt: skip
    changed = [dataclasses.replace(ADAPTIVE, **{name: value}) for name, value in changes.items()]
    keys = {cell.key for cell in (ADAPTIVE, TRANSFER, ORG, *changed)}
    assert len(keys) == len(changes) + 3
    assert set(changes) | {"mode"} == {field.name for field in dataclasses.fields(Cell)}
    assert Cell.from_dict(json.loads(json.dumps(ADAPTIVE.to_dict()))) == ADAPTIVE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row": "FSM"}, "`row` must be one of Org, FS, FS+M, FS+P, FS+P+M, got 'FSM'"),
        ({"mode": "black-box"}, "`mode` must be one of white-box, transfer, adaptive, got 'black-box'"),
        ({"attack": "pdg"}, "`attack` must be one of"),
        ({"norm": "l1"}, "`norm` must be one of linf, l2, got 'l1'"),
        ({"mode": "white-box", "gradient": None}, "`mode` must be 'white-box' for the row Org and for no other"),
        ({"gradient": None}, "`gradient` must be one of end-to-end, straight-through for an adaptive attack"),
        ({"mode": "transfer"}, "and None for any other, got 'end-to-end' for transfer"),
    ],
)
def test_what_no_cell_can_be(change, words):
    with pytest.raises(ValueError, match="must be") as raised:
        dataclasses.replace(ADAPTIVE, **change)
    assert words in str(raised.value)


def test_a_cell_with_another_field_is_refused():
    with pytest.raises(ValueError, match="must have the fields of a Cell.*colour"):
        Cell.from_dict(ADAPTIVE.to_dict() | {"colour": "red"})


def test_a_summary_is_the_mean_of_its_items():
    task = Retrieval()
    hit, kept, lost = "target:a", "clean:a", "clean:b"
    items = [
        {
            "task": "retrieval",
            "adversarial": said,
            "clean": kept,
            "reference": kept,
            "target": hit,
            "fcs": cosine,
            "psnr": db,
        }
        for said, cosine, db in ((hit, 0.1, 30.0), (kept, 0.9, 32.0), (lost, 0.2, None), (hit, 0.4, 31.0))
    ]
    summary = summarize_items(task, items)
    assert (summary["images"], summary["asr"], summary["acc"], summary["clean_acc"]) == (4, 0.5, 0.25, 1.0)
    assert summary["fcs"] == pytest.approx(0.4)
    assert summary["psnr"] == pytest.approx(31.0)
    with pytest.raises(ValueError, match="`items` must hold at least one image, got none"):
        summarize_items(task, [])


def test_captions_are_judged_by_the_judge():
    judge = KeywordJudge({"cat": [], "dog": [], "car": []})
    items = [
        {
            "task": "captioning",
            "adversarial": said,
            "clean": "a cat",
            "reference": "a cat",
            "target": "a dog",
            "fcs": 0.5,
        }
        for said in ("a dog", "a cat", "a cat and a dog", "a car")
    ]
    summary = summarize_items(Captioning(), items, judge)
    # Against the reference 0, 1, 1/2, 0; against the target 1, 0, 1/2, 0.
    assert (summary["acc"], summary["mean_acc_score"]) == (0.5, 0.375)
    assert (summary["asr"], summary["mean_asr_score"]) == (0.5, 0.375)


def test_the_worse_gradient_counts():
    found = worst([result(ADAPTIVE, 0.2), result(STRAIGHT, 0.4), result(TRANSFER, 0.9), result(STRONG, 1.0)])
    assert [(one.cell, one.asr) for one in found] == [(STRAIGHT, 0.4), (TRANSFER, 0.9), (STRONG, 1.0)]
    # Of equal ASR the lower accuracy, then the lower cosine.
    assert worst([result(ADAPTIVE, 0.2, acc=0.1), result(STRAIGHT, 0.2, acc=0.3)])[0].cell == ADAPTIVE
    assert worst([result(ADAPTIVE, 0.2, fcs=0.1), result(STRAIGHT, 0.2, fcs=0.3)])[0].cell == ADAPTIVE


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([], "sanity: missing (64/255, sigma 0)"),
        ([result(STRONG, 1.0)], "sanity: missing (sigma 0)"),
        ([result(STRONG, 0.8)], "attack too weak: ASR 80.0% at 64/255"),
        # One of two attacks is enough.
        (
            [result(STRONG, 0.8), result(dataclasses.replace(STRONG, attack="m_attack"), 0.9)],
            "sanity: missing (sigma 0)",
        ),
        ([result(ZERO, 0.8, org={"fcs": 0.5, "asr": 0.8})], "sanity: missing (64/255)"),
        ([result(ZERO, 0.8, org={"fcs": 0.5, "asr": 1.0})], "attack too weak: at sigma 0 FOA does not reproduce Org"),
        ([result(ZERO, 0.8, org={"fcs": 0.53, "asr": 0.8})], "attack too weak: at sigma 0 FOA does not reproduce Org"),
        (
            [result(STRONG, 0.9), result(ZERO, 0.8, org={"fcs": 0.51, "asr": 0.8})],
            "passed: ASR 90.0% at 64/255, Org at sigma 0",
        ),
        # Another encoder, another strength or a transfer attack prove nothing.
        (
            [
                result(dataclasses.replace(STRONG, encoder="FARE"), 1.0),
                result(dataclasses.replace(STRONG, epsilon=32 / 255), 1.0),
                result(dataclasses.replace(TRANSFER, epsilon=64 / 255), 1.0),
                result(dataclasses.replace(ZERO, encoder="FARE"), 0.8, org={"fcs": 0.5, "asr": 0.8}),
            ],
            "sanity: missing (64/255, sigma 0)",
        ),
    ],
)
def test_when_an_attack_is_too_weak(others, words):
    assert verdict(ADAPTIVE.defence, [result(ADAPTIVE, 0.0), *others]).startswith(words)


def test_a_card_shows_what_was_written(tmp_path):
    path = tmp_path / "attacks_16.json"
    results = [result(ORG, 0.9, judge={"judge": "keyword"}), result(TRANSFER, 0.0), result(ADAPTIVE, 0.4, psnr=31.5)]
    write_attacks(path, results, "fs-psm evaluate --config x.yaml", seed=3)
    found = json.loads(path.read_text())
    assert (found["norm"], found["command"], found["seed"]) == ("linf", "fs-psm evaluate --config x.yaml", 3)
    assert "torch" in found["versions"]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_attacks(found).splitlines()[2:]]
    assert shown[0] == ["-", "Org", "foa", "adaptive", "16/255", "5", "0.500", "90.0%", "50.0%"]
    assert shown[1] == ["0.25", "FS+P+M", "foa", "transfer", "16/255", "5", "0.500", "0.0%", "50.0%"]
    assert shown[2][3] == "adaptive"
    again = read_attacks(path)
    assert [dataclasses.replace(one, source="") for one in again] == results
    assert read_results(path) == again


def test_only_one_norm_stands_in_a_file(tmp_path):
    for results in ([], [result(ORG, 0.9), result(dataclasses.replace(ORG, norm="l2", epsilon=1.0), 0.9)]):
        with pytest.raises(ValueError, match="`results` must be finished cells of one norm"):
            write_attacks(tmp_path / "attacks.json", results, "x")
    assert list(tmp_path.iterdir()) == []


def test_finished_cells_of_a_run_are_read(tmp_path):
    path = tmp_path / "run.jsonl"
    run = RunFile(path, {"name": "x"})
    run.add("item", ORG.key, "0.png", fcs=0.5)
    run.add("cell", ORG.key, cell=ORG.to_dict(), summary={"images": 5, "fcs": 0.5, "asr": 0.9, "acc": 0.5})
    assert read_results(path) == [dataclasses.replace(result(ORG, 0.9), source="run.jsonl")]
    run.add("cell", "broken", cell=ORG.to_dict())
    with pytest.raises(ValueError, match="must have summary in each line of kind 'cell'"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be a JSON object with `norm` and `rows`"),
        ("[]", "must be a JSON object with `norm` and `rows`"),
        ('{"norm": "linf"}', "must be a JSON object with `norm` and `rows`"),
        ('{"norm": "linf", "rows": [{"row": "Org"}]}', "must have fcs, asr, acc, images in each row"),
    ],
)
def test_another_json_is_refused(text, words, tmp_path):
    path = tmp_path / "attacks.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="must") as raised:
        read_attacks(path)
    assert words in str(raised.value)


def test_strengths_are_read_in_255ths():
    assert [format_strength(16 / 255), format_strength(0.5 / 255), format_strength(1.5, "l2")] == [
        "16/255",
        "0.5/255",
        "1.5",
    ]
