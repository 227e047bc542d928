"""The paper's tables of attacks: its numbers, ours beside them, and what is missing said with its command."""

import dataclasses
import json
from pathlib import Path

import pytest

from fs_psm_hf.evaluation.attack_tables import format_results
from fs_psm_hf.evaluation.cells import Cell
from fs_psm_hf.evaluation.paper import ATTACK_TABLES
from fs_psm_hf.evaluation.records import RunFile
from fs_psm_hf.evaluation.tables import format_paper_table


TABLES = Path(__file__).parents[1] / "examples" / "tables"
ORG = Cell("LLaVA-1.5-7B", "org", "Org", "foa", "white-box", 16 / 255, "classification")
SMOOTHED = {"row": "FS+P+M", "sigma": 0.25, "num_samples": 4, "purifier": "diffusion"}
TRANSFER = dataclasses.replace(ORG, mode="transfer", **SMOOTHED)
ADAPTIVE = dataclasses.replace(TRANSFER, mode="adaptive", gradient="end-to-end", draws=8)
STRAIGHT = dataclasses.replace(ADAPTIVE, gradient="straight-through")
STRONG = dataclasses.replace(ADAPTIVE, epsilon=64 / 255)


def rows(text):
    """Cells of a Markdown table by the names of its columns."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    header, _, *body = lines
    return [dict(zip(header, line, strict=True)) for line in body]


def run_file(path, *cells):
    """A finished run of `(cell, asr, acc, fcs)`, or with a dict of more of its summary."""
    run = RunFile(path, {"name": path.stem})
    for cell, asr, acc, fcs, *more in cells:
        summary = {"images": 5, "asr": asr, "acc": acc, "fcs": fcs} | (more[0] if more else {})
        run.add("cell", cell.key, cell=cell.to_dict(), summary=summary)
    return path


def percent(text):
    return float(text.partition("%")[0])


@pytest.mark.parametrize("number", ATTACK_TABLES)
def test_numbers_of_the_paper_are_whole(number):
    table = ATTACK_TABLES[number]
    for row in table.rows:
        figures = row[5:-1] if table.by_samples else row[3:]
        assert len(figures) == 3 * len(table.attacks), row
        for place, figure in enumerate(figures):
            if place % 3 == 0:
                assert 0.3 < float(figure) < 1
            else:
                assert 0 <= percent(figure) <= 100
                assert ("(" in figure) == (number == 1)
    assert len({row[:5] if table.by_samples else row[:3] for row in table.rows}) == len(table.rows)
    assert (TABLES / table.config).is_file()


def test_numbers_agree_with_what_the_papers_text_says():
    """Typed from its sentences, not from its tables."""

    def of(number, model, encoder, smoothed, attack, figure):
        table = ATTACK_TABLES[number]
        (row,) = [row for row in table.rows if row[:3] == (model, encoder, smoothed)]
        return row[3 + 3 * table.attacks.index(attack) + ("FCS", "ACC", "ASR").index(figure)]

    llava = "LLaVA-1.5-7B"
    # "the accuracy of LLaVA with FARE drops from 44% to 19%, and that of TeCoA declines from 51% to 21%"
    assert [percent(of(1, llava, "FARE", False, a, "ACC")) for a in ("M-Attack", "FOA")] == [44, 19]
    assert [percent(of(1, llava, "TeCoA", False, a, "ACC")) for a in ("M-Attack", "FOA")] == [51, 21]
    # "the accuracy of LLaVA increasing from 1% to 87% and the ASR dropping from 94% to 1% under the strongest FOA attack"
    assert [percent(of(1, llava, "org", s, "FOA", "ACC")) for s in (False, True)] == [1, 87]
    assert [percent(of(1, llava, "org", s, "FOA", "ASR")) for s in (False, True)] == [94, 1]
    # "FARE with LLaVA drops from 55.4% to 24.8%, and that of TeCoA declines from 67.4% to 29.0%"
    assert [percent(of(3, llava, "FARE", False, a, "ACC")) for a in ("M-Attack", "FOA")] == [55.4, 24.8]
    assert [percent(of(3, llava, "TeCoA", False, a, "ACC")) for a in ("M-Attack", "FOA")] == [67.4, 29.0]
    # "the accuracy of LLaVA increasing from 3.8% to 88.0% and the ASR dropping from 81% to 0.4%": the table has 88.8%.
    assert [percent(of(3, llava, "org", s, "FOA", "ASR")) for s in (False, True)] == [81, 0.4]
    assert percent(of(3, llava, "org", True, "FOA", "ACC")) == 88.8
    assert "its text says that smoothed LLaVA reaches 88.0% under FOA, the table prints 88.8%" in format_paper_table(3)
    # "the best accuracy is obtained by integrating FS-PSM with FARE, reaching 48.4% on LLaVA, while the lowest ASR (9.6%)"
    table = ATTACK_TABLES[7].rows
    assert max(table, key=lambda row: percent(row[4]))[1:5] == ("FARE", True, "0.605", "48.4%")
    assert min(table, key=lambda row: percent(row[5]))[1:] == ("TeCoA", True, "0.576", "32.0%", "9.6%")
    # "from approximately 0.595 to 0.728"; "from 4 to 16 raises the inference latency from 0.66 seconds to 2.10"
    eights = {row[3]: row for row in ATTACK_TABLES[8].rows if row[4] == "diffusion"}
    assert (eights["1"][5], eights["16"][5], eights["4"][8], eights["16"][8]) == ("0.595", "0.728", "0.66", "2.10")
    # Tables 3 and S.6 share every row without smoothing; S.8 shares n₀ = 4 with both.
    plain = [[row for row in ATTACK_TABLES[number].rows if not row[2]] for number in (3, 6)]
    assert plain[0] == plain[1]
    assert eights["4"][5:8] == tuple(of(3, llava, "org", True, "FOA", figure) for figure in ("FCS", "ACC", "ASR"))


@pytest.mark.parametrize("number", ATTACK_TABLES)
def test_without_results_everything_of_ours_is_missing(number):
    text, table = format_paper_table(number), ATTACK_TABLES[number]
    found = rows(text)
    assert [row["source"] for row in found].count("paper") == len(table.rows)
    ours = [row for row in found if row["source"] == "ours"]
    # One mode for a plain row, two for a smoothed one.
    assert len(ours) == sum(2 if row[2] else 1 for row in table.rows)
    assert {row["mode"] for row in ours} <= {"white-box: missing", "transfer: missing", "adaptive: missing"}
    assert {row["strength"] for row in ours} == {f"`fs-psm evaluate --config examples/tables/{table.config}`"}
    assert f"Table {table.name}: " in text
    assert f"{len(ours)} rows of ours are missing" in text


def test_our_rows_stand_under_the_papers(tmp_path):
    path = run_file(
        tmp_path / "a.jsonl",
        (ORG, 0.9, 0.1, 0.4),
        (TRANSFER, 0.0, 0.9, 0.8),
        (ADAPTIVE, 0.2, 0.7, 0.6),
        (STRAIGHT, 0.4, 0.5, 0.7),
        (dataclasses.replace(ADAPTIVE, attack="m_attack"), 0.1, 0.6, 0.5),
        (STRONG, 1.0, 0.0, 0.1),
        (dataclasses.replace(ORG, epsilon=32 / 255), 1.0, 0.0, 0.3),
    )
    text = format_paper_table(3, [path])
    found = rows(text)
    assert [row["source"] for row in found[:5]] == [
        "paper",
        "ours, a.jsonl",
        "paper",
        "ours, a.jsonl",
        "ours, a.jsonl",
    ]
    org, transfer, adaptive = found[1], found[3], found[4]
    assert [org[name] for name in ("row", "mode", "FOA FCS", "FOA ACC", "FOA ASR", "images")] == [
        "Org", "white-box", "0.400", "10.0%", "90.0%", "5",
    ]  # fmt: skip
    assert (transfer["mode"], transfer["FOA ASR"], transfer["M-Attack ASR"]) == ("transfer", "0.0%", "-")
    # The worse of both gradients for the defender.
    assert (adaptive["mode"], adaptive["FOA ASR"], adaptive["FOA FCS"]) == ("adaptive (both)", "40.0%", "0.700")
    assert adaptive["M-Attack ASR"] == "10.0%"
    assert adaptive["strength"] == "sanity: missing (sigma 0)"
    assert "2 cells of ours are of another task, attack, strength or purifier" in text


def test_transfer_never_stands_alone(tmp_path):
    path = run_file(tmp_path / "a.jsonl", (ORG, 0.9, 0.1, 0.4), (TRANSFER, 0.0, 0.9, 0.8))
    found = rows(format_paper_table(3, [path]))
    assert [row["mode"] for row in found[3:5]] == ["transfer", "adaptive: missing"]
    assert found[4]["strength"] == "`fs-psm evaluate --config examples/tables/table3.yaml`"
    alone = rows(format_results([path]))
    assert [row["mode"] for row in alone] == ["white-box", "transfer", "adaptive: missing"]
    assert "1 smoothed rows have transfer attacks only" in format_results([path])


def test_a_weak_attack_is_called_weak(tmp_path):
    path = run_file(tmp_path / "a.jsonl", (ADAPTIVE, 0.0, 0.9, 0.8), (STRONG, 0.4, 0.5, 0.3))
    for text in (format_paper_table(3, [path]), format_results([path])):
        assert {
            row["strength"]
            for row in rows(text)
            if row["mode"].startswith("adaptive") and "missing" not in row["mode"]
        } == {"attack too weak: ASR 40.0% at 64/255"}
    assert "robust" not in {word for row in rows(format_results([path])) for word in row.values()}


def test_scores_of_the_judge_stand_in_parentheses(tmp_path):
    cell = dataclasses.replace(ORG, task="captioning")
    path = run_file(tmp_path / "a.jsonl", (cell, 0.9, 0.1, 0.4, {"mean_acc_score": 0.123, "mean_asr_score": 0.456}))
    found = rows(format_paper_table(1, [path]))[1]
    assert (found["FOA ACC"], found["FOA ASR"]) == ("10.0% (0.123)", "90.0% (0.456)")


def test_draws_and_purifiers_find_their_rows_in_s8(tmp_path):
    cells = [
        (dataclasses.replace(cell, num_samples=n, purifier=purifier), 0.1, 0.8, 0.5 + n / 100)
        for cell in (TRANSFER, ADAPTIVE)
        for n in (1, 4)
        for purifier in ("diffusion", "light")
    ]
    found = rows(format_paper_table(8, [run_file(tmp_path / "a.jsonl", *cells)]))
    ours = [row for row in found if row["source"] == "ours, a.jsonl"]
    assert [(row["n₀"], row["purifier"], row["mode"], row["FOA FCS"]) for row in ours] == [
        (n, purifier, mode, f"{0.5 + int(n) / 100:.3f}")
        for purifier in ("diffusion", "light")
        for n in ("1", "4")
        for mode in ("transfer", "adaptive (end-to-end)")
    ]
    assert len(found) == 10 + 20
    # Tables 3 and S.6 take the rows of their own purifier.
    for number, purifier in ((3, "diffusion"), (6, "light")):
        text = format_paper_table(number, [tmp_path / "a.jsonl"])
        places = [i for i, row in enumerate(rows(text)) if row["source"].startswith("ours, ") and row["n₀"] == "4"]
        assert rows(text)[places[0] - 1]["row"] == "Smoothed org", purifier


def test_models_that_the_paper_does_not_have_come_last(tmp_path):
    cell = dataclasses.replace(ORG, model="DINOv2-small", task="head")
    found = rows(format_paper_table(3, [run_file(tmp_path / "a.jsonl", (cell, 0.9, 0.1, 0.4))]))
    assert (found[-1]["source"], found[-1]["model"], found[-1]["FOA ASR"]) == (
        "ours, a.jsonl",
        "DINOv2-small",
        "90.0%",
    )


def test_table_5_shows_attacked_rows_below(tmp_path):
    path = run_file(tmp_path / "a.jsonl", (dataclasses.replace(ORG, model="CLIP-B16", task="head"), 0.956, 0.016, 0.4))
    text = format_paper_table(5, [path])
    assert "Rows of ours under FOA" in text
    assert "| 95.6% |" in text.partition("Rows of ours under FOA")[2]
    assert "`fs-psm evaluate --config examples/tables/table5.yaml` fills them" in format_paper_table(5)


def test_an_unfinished_run_is_no_table(tmp_path):
    RunFile(tmp_path / "a.jsonl", {"name": "a"})
    with pytest.raises(ValueError, match="`--results` must hold at least one finished cell, got none"):
        format_results([tmp_path / "a.jsonl"])
    (tmp_path / "b.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="b.json` must be a JSON object with `norm` and `rows`"):
        format_results([tmp_path / "b.json"])
