"""The paper's tasks, from a folder to the figures of a cell, with scores counted by hand."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from fs_psm_hf.evaluation.data import Example, label_of, load_images
from fs_psm_hf.evaluation.judges import KeywordJudge
from fs_psm_hf.evaluation.prompts import CAPTION_PROMPT
from fs_psm_hf.evaluation.tasks import VQA, Captioning, Classification, HeadClassification, make_task


JUDGE = KeywordJudge(["dog", "cat", "ship", "rocket"])


def write(folder, rows):
    """A folder of pictures with a metadata.csv; each row begins with a file name."""
    folder.mkdir(exist_ok=True)
    for row in rows:
        pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / row["file_name"])
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def labelled(folder, labels):
    return write(folder, [{"file_name": f"{i:02}.png", "label": label} for i, label in enumerate(labels)])


def through_json(items):
    return json.loads(json.dumps(items))


def test_captions_from_folder_to_figures(tmp_path):
    clean = write(tmp_path / "clean", [{"file_name": f"{number}.png"} for number in range(4)])
    targets = write(tmp_path / "targets", [{"file_name": f"{number}.jpg"} for number in range(4)])
    task = make_task("captioning")
    examples = task.read(clean, targets)
    assert [task.prompt(example) for example in examples] == [CAPTION_PROMPT] * 4
    assert load_images(examples, 8, target=True).shape == (4, 3, 8, 8)
    answers = [
        # adversarial, clean; the reference is a dog and the target a cat
        ("a dog", "two dogs"),  # right
        ("a cat", "a dog"),  # the attack succeeds
        ("a dog and a cat", "a ship"),  # 0.5 against each: both
        ("a dog, a cat, a ship", None),  # 1/3 against each: the attack's threshold is lower
    ]
    items = [
        task.item(example, adversarial=said, clean=before, reference="a dog", target="a cat")
        for example, (said, before) in zip(examples, answers, strict=True)
    ]
    assert items[0] == {
        "task": "captioning",
        "id": "0.png",
        "prompt": CAPTION_PROMPT,
        "clean": "two dogs",
        "adversarial": "a dog",
        "reference": "a dog",
        "target": "a cat",
    }
    assert task.score(through_json(items), JUDGE) == {
        "acc": 0.5,
        "asr": 0.75,
        "clean_acc": pytest.approx(2 / 3),
        "mean_acc_score": pytest.approx((1 + 0 + 1 / 2 + 1 / 3) / 4),
        "mean_asr_score": pytest.approx((0 + 1 + 1 / 2 + 1 / 3) / 4),
        "count": 4,
        "unjudged": 0,
    }
    strict = Captioning(acc_threshold=0.6, asr_threshold=0.6).score(items, JUDGE)
    assert (strict["acc"], strict["asr"]) == (0.25, 0.25)


def test_captions_that_nobody_can_judge_are_counted():
    task, example = Captioning(), Example("0.png", None)
    item = task.item(example, adversarial="a dog", clean="a dog", reference="a dog", target="a teapot")
    figures = task.score([item], JUDGE)
    assert (figures["acc"], figures["asr"], figures["clean_acc"], figures["unjudged"]) == (1.0, None, 1.0, 1)
    assert task.score([], JUDGE)["acc"] is None


def test_classes_are_asked_by_number_and_sharks_are_targets(tmp_path):
    folder = labelled(tmp_path / "images", [0, 0, 0, 3, 3, 7, 10, 10])
    task = make_task("classification")
    assert [(e.id, label_of(e)) for e in task.read(folder, limit=4)] == [
        ("00.png", 0),
        ("03.png", 3),
        ("05.png", 7),
        ("01.png", 0),
    ]
    examples = task.read(folder)
    assert len(examples) == 6
    assert {label_of(e, e.target_row) for e in examples} == {10}
    assert len({e.target for e in examples}) == 2
    assert "10. shark. Output only a single integer between 0 and 10" in task.prompt(examples[0])
    said = {
        "00.png": "0",
        "03.png": "10",
        "05.png": "a shark",
        "01.png": "no idea",
        "04.png": "goldfish",
        "02.png": "4.",
    }
    before = {"00.png": "0", "03.png": "3. goldfish", "05.png": "6"}
    items = [task.item(e, adversarial=said[e.id], clean=before.get(e.id)) for e in examples]
    figures = task.score(through_json(items))
    assert (figures["acc"], figures["asr"]) == (pytest.approx(2 / 6), pytest.approx(2 / 6))
    assert figures["clean_acc"] == pytest.approx(2 / 3)
    assert figures["mean_acc_score"] is figures["mean_asr_score"] is None
    assert figures["unjudged"] == 0


def test_multiple_choice_with_none_of_the_above_as_the_target(tmp_path):
    rows = [
        {
            "file_name": "0.png",
            "question": "Which?",
            "options": '["a gibbon", "a kite"]',
            "answer": "1",
            "target_file": "1.png",
        },
        {
            "file_name": "1.png",
            "question": "Who?",
            "options": '["x", "y", "z"]',
            "answer": "A",
            "target_file": "0.png",
        },
    ]
    task = VQA()
    first, second = task.read(write(tmp_path / "images", rows))
    assert "Question: Which? Options: A. a gibbon B. a kite C. None of the above. If" in task.prompt(first)
    items = [
        task.item(first, adversarial="C. None of the above", clean="B"),
        task.item(second, adversarial="A", clean="D"),
    ]
    assert [(item["reference"], item["target"]) for item in items] == [(1, 2), (0, 3)]
    figures = task.score(through_json(items))
    assert (figures["acc"], figures["asr"], figures["clean_acc"]) == (0.5, 0.5, 0.5)
    # As ScienceQA has them: a list and a number.
    third = Example("q", None, {"question": "Who?", "options": ["x", "y"], "answer": 0})
    assert task.item(third, adversarial="x")["reference"] == 0


def test_an_encoder_with_a_head(tmp_path):
    folder = labelled(tmp_path / "images", [0, 0, 0, 1, 1, 1, 2, 2])
    task = HeadClassification(["a", "b", "c"], seed=1)
    examples = task.read(folder, limit=3)
    assert [label_of(e) for e in examples] == [0, 1, 2]  # one of each class, not the first three
    assert all(label_of(e, e.target_row) != label_of(e) for e in examples)
    assert task.prompt(examples[0]) is None
    goals = [label_of(e, e.target_row) for e in examples]
    neither = 3 - label_of(examples[2]) - goals[2]
    answers = [label_of(examples[0]), goals[1], neither]
    items = [task.item(e, adversarial=a, clean=label_of(e)) for e, a in zip(examples, answers, strict=True)]
    figures = task.score(through_json(items))
    assert (figures["acc"], figures["asr"], figures["clean_acc"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 1.0)
    one = HeadClassification(["a", "b", "c"], target_label=2)
    assert {label_of(e, e.target_row) for e in one.read(folder)} == {2}
    paired = one.read(folder, targets=folder, limit=2)
    assert [(e.id, label_of(e, e.target_row)) for e in paired] == [("00.png", 0), ("01.png", 0)]


PLAIN = Example("7.png", None, {})


def vqa_row(**changes):
    return Example("7.png", None, {"question": "Who?", "options": '["x", "y"]', "answer": "0"} | changes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: make_task("chess"),
            ValueError,
            "`task` must be one of captioning, classification, vqa, head, got 'chess'",
        ),
        (lambda: Captioning(acc_threshold=2), ValueError, r"`acc_threshold` must be in \[0, 1\], got 2"),
        (lambda: Classification(target_label=11), ValueError, r"`target_label` must be in \[0, 11\), got 11"),
        (lambda: HeadClassification(["a", "b"], 2), ValueError, r"`target_label` must be in \[0, 2\), got 2"),
        (
            lambda: Captioning().item(PLAIN, adversarial="a dog", target="a cat"),
            ValueError,
            "`reference` of 7.png must be a caption by the vanilla model, got None",
        ),
        (
            lambda: Captioning().item(PLAIN, adversarial=3, reference="", target=""),
            TypeError,
            "`adversarial` of 7.png must be of type str, got int",
        ),
        (
            lambda: HeadClassification(["a", "b"]).item(PLAIN, adversarial=0, clean="a", reference=0, target=1),
            TypeError,
            "`clean` of 7.png must be of type int, got str",
        ),
        (
            lambda: HeadClassification(["a", "b"]).item(PLAIN, adversarial=0, reference=2, target=1),
            ValueError,
            r"`reference` of 7.png must be a whole number in \[0, 2\), got 2",
        ),
        (lambda: Classification().item(PLAIN, adversarial="1"), ValueError, "`label` of 7.png must be a whole number"),
        (lambda: VQA().prompt(PLAIN), ValueError, "`question` of 7.png must be given, its row has nothing"),
        (
            lambda: VQA().prompt(vqa_row(options="x, y")),
            ValueError,
            r"""`options` of 7.png must be a JSON list like \["a", "b"\], got 'x, y'""",
        ),
        (
            lambda: VQA().item(vqa_row(answer="C"), adversarial="A"),
            ValueError,
            r"`answer` of 7.png must be a number in \[0, 2\) or a letter of AB, got 'C'",
        ),
        (lambda: Captioning().score([]), ValueError, "`judge` must be given for the task captioning, got None"),
        (
            lambda: VQA().score([{"task": "head"}]),
            ValueError,
            "`items` must be of the task vqa, got head",
        ),
    ],
)
def test_what_a_task_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_task_names_the_column_that_is_missing(tmp_path):
    folder = write(tmp_path / "images", [{"file_name": "0.png", "question": "Who?", "answer": "0"}])
    with pytest.raises(
        ValueError, match="metadata.csv` lacks the column `options`: it has file_name, question, answer"
    ):
        VQA().read(folder)
    with pytest.raises(ValueError, match="lacks the column `target_file`"):
        Captioning().read(folder)
