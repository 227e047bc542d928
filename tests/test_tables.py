import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from fs_psm_hf import certify_scores
from fs_psm_hf.cli import main
from fs_psm_hf.evaluation.tables import format_paper_table


CARDS = Path(__file__).parents[1] / "model_cards"
MEASURED = CARDS / "dinov2-small-fs" / "results" / "sigma0.25-n1000.jsonl"
SCORES = [np.random.default_rng(i).beta(95, 5, 400) for i in range(3)]
SIGMA = 0.5


def run(monkeypatch, *arguments):
    """Exit code of `fs-psm` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["fs-psm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def rows(text):
    """Cells of a Markdown table by the names of its columns, row by row."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    header, rule, *body = [[cell.strip() for cell in line] for line in lines]
    assert all(set(cell) == {"-"} for cell in rule)
    return [dict(zip(header, row, strict=True)) for row in body]


def results_file(path, epsilons=(0.25, 0.4, 0.75), level=0.5, null_cosine=0.123, **header):
    """A results file of three images with two methods, as `fs-psm certify` writes it."""
    lines = [{"kind": "header", "sigma": SIGMA, "model": "some/encoder", "psm": "some/psm"} | header]
    for i, scores in enumerate(SCORES):
        options = {"sigma": SIGMA, "epsilons": epsilons, "level": level}
        found = [certify_scores(scores, method=method, **options).to_dict() for method in ("cdf", "plugin")]
        found = [entry | {"feature": "pooled", "anchor": "clean"} for entry in found]
        lines.append({"kind": "image", "file": f"{i}.png", "certificates": found})
    lines.append({"kind": "summary", "null_cosine": null_cosine, "rows": []})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_table_2_is_the_papers():
    # Typed from the paper's page, not from the code.
    expected = """
        CLIP-B16 none 0.25  0.828 0.623 0.313 -0.06 /      0.31
        CLIP-B16 P&M  0.25  0.975 0.920 0.789 0.553 /      0.53
        CLIP-B16 none 0.50  0.717 0.586 0.439 0.253 -0.132 0.33
        CLIP-B16 P&M  0.50  0.970 0.945 0.907 0.846 0.649  0.89
    """
    text = format_paper_table(2)
    columns = ["encoder", "PSM", "sigma", *(f"FCSB at {e}" for e in ("0.125", "0.25", "0.375", "0.5", "0.75")), "R"]
    assert [[row[c] for c in columns] for row in rows(text)] == [
        line.split() for line in expected.strip().splitlines()
    ]
    for row in rows(text):
        facts = [row[name] for name in ("source", "n", "images", "method", "confidence")]
        assert facts == ["paper", "1,000", "100", "plug-in", "no confidence"]
    assert text.startswith("Xia et al., 2026, arXiv:2601.16200v1, Table 2")


def test_table_5_is_the_papers_and_says_where_it_contradicts_table_2():
    expected = """
        none /    /     /     /      /    1.6 95.6
        none 0.50 0.586 0.253 -0.132 0.33 42.4 0.8
        M    0.50 0.884 0.717 0.436  0.71 66.8 0.4
        P&M  0.50 0.970 0.907 0.846  0.89 91.6 0.4
    """
    text = format_paper_table(5)
    columns = ["PSM", "sigma", "FCSB at 0.25", "FCSB at 0.5", "FCSB at 0.75", "R", "ACC", "ASR"]
    found = [[row[column].removesuffix(" %") for column in columns] for row in rows(text)]
    assert found == [line.split() for line in expected.strip().splitlines()]
    assert [row["confidence"] for row in rows(text)] == ["/", *["no confidence"] * 3]
    assert text.startswith("Xia et al., 2026, arXiv:2601.16200v1, Table 5")
    assert "clean accuracy without attack is 92.4 %" in text
    # The note quotes what the tables print.
    (note,) = [line for line in text.splitlines() if "disagree" in line]
    other = rows(format_paper_table(2))[3]
    for epsilon in ("0.25", "0.5", "0.75"):
        assert rows(text)[3][f"FCSB at {epsilon}"] != other[f"FCSB at {epsilon}"]
    fives = [rows(text)[3][f"FCSB at {epsilon}"] for epsilon in ("0.25", "0.5", "0.75")]
    assert "{}, {} and {}".format(*fives) in note
    assert "{}, {} and {}".format(*(other[f"FCSB at {e}"] for e in ("0.25", "0.5", "0.75"))) in note
    assert fives == [other[f"FCSB at {e}"] for e in ("0.125", "0.375", "0.5")]


@pytest.mark.parametrize("number", [2, 5])
def test_our_rows_are_the_means_of_the_images(number, tmp_path):
    path = results_file(tmp_path / "ours.jsonl")
    certified, plugin = [row for row in rows(format_paper_table(number, [path])) if row["source"] != "paper"]
    assert (certified["method"], certified["confidence"]) == ("cdf", "99.9 %")
    assert (plugin["method"], plugin["confidence"]) == ("plug-in", "no confidence")
    for row in (certified, plugin):
        assert row["source"] == "ours, ours.jsonl"
        assert (row["encoder"], row["PSM"]) == ("some/encoder, pooled feature", "some/psm")
        assert [row[name] for name in ("sigma", "n", "images", "null level")] == ["0.5", "400", "3", "0.123"]
        assert row["FCSB at 0.5"] == "-"
    # The paper's Theorem 1 and Corollary 1 in closed form.
    quantiles = [norm.ppf(scores.mean()) for scores in SCORES]
    for epsilon in (0.25, 0.75):
        bound = statistics.mean(2 * norm.cdf(z - epsilon / SIGMA) - 1 for z in quantiles)
        assert plugin[f"FCSB at {epsilon:g}"] == f"{bound:.3f}"
    assert plugin["R"] == f"{statistics.mean(SIGMA * (z - norm.ppf(0.75)) for z in quantiles):.3f}"
    again = [certify_scores(scores, sigma=SIGMA, epsilons=0.75) for scores in SCORES]
    assert certified["FCSB at 0.75"] == f"{statistics.mean(c.inner_product_bounds[0] for c in again):.3f}"
    assert certified["R"] == f"{statistics.mean(c.radius for c in again):.3f}"
    if number == 5:
        assert {row[name] for row in (certified, plugin) for name in ("ACC", "ASR")} == {"not measured"}


def test_notes_stand_under_every_table():
    for number in (2, 5):
        text = format_paper_table(number)
        notes = " ".join(line for line in text.splitlines() if line.startswith("- "))
        assert "a negative FCSB bounds no cosine" in notes
        assert "not a certificate" in notes
        assert ("not measured" in notes) == (number == 5)
        assert "{" not in text


def test_committed_results_are_read_from_their_images():
    """Not from the summary: a file whose run was killed has none."""
    lines = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    for row, entry in zip(rows(format_paper_table(2, [MEASURED]))[4:], lines[-1]["rows"], strict=True):
        shown = [row[f"FCSB at {epsilon:g}"] for epsilon in entry["epsilons"]]
        assert shown == [f"{bound:.3f}" for bound in entry["mean_inner_product_bounds"]]
        assert (row["R"], row["images"], row["n"]) == (f"{entry['mean_radius']:.3f}", "20", "1,000")
        assert row["null level"] == f"{lines[-1]['null_cosine']:.3f}"


def test_a_file_without_a_summary_is_shown_as_far_as_it_goes(tmp_path):
    path = results_file(tmp_path / "killed.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    for row in rows(format_paper_table(2, [path]))[4:]:
        assert (row["images"], row["null level"]) == ("2", "-")


def test_what_differs_from_the_paper_is_said(tmp_path):
    path = results_file(tmp_path / "other.jsonl", level=0.8)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:-1]:
        for entry in line["certificates"]:
            entry |= {"center": "abc", "anchor": "smoothed", "num_samples": 400 - 100 * (line["file"] == "0.png")}
    lines[1]["certificates"][0]["radius"] = "inf"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    certified, plugin = rows(format_paper_table(2, [path]))[4:]
    assert certified["R"] == "inf (FCSB 0.8)"
    assert plugin["R"].endswith(" (FCSB 0.8)")
    assert plugin["encoder"] == "some/encoder, pooled feature, centred, smoothed anchor"
    assert plugin["n"] == "300 to 400"


def test_the_command_line_prints_several_files(monkeypatch, capsys, tmp_path):
    paths = [results_file(tmp_path / "a.jsonl"), results_file(tmp_path / "b.jsonl")]
    assert run(monkeypatch, "tables", "--paper", 5, "--results", paths[0], "--results", paths[1]) == 0
    printed = capsys.readouterr().out
    assert printed == format_paper_table(5, paths) + "\n"
    assert [row["source"] for row in rows(printed)] == [*["paper"] * 4, *["ours, a.jsonl"] * 2, *["ours, b.jsonl"] * 2]
    assert run(monkeypatch, "tables", "--paper", 2) == 0
    assert len(rows(capsys.readouterr().out)) == 4
    assert run(monkeypatch, "tables", "--help") == 0


def edited(change):
    """What a results file becomes by a change of its lines."""

    def write(path):
        lines = [json.loads(line) for line in results_file(path).read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))

    return write


def per_token(lines):
    for line in lines[1:-1]:
        for entry in line["certificates"]:
            entry["token"] = 0
    return lines


def incomplete(lines):
    del lines[1]["certificates"][0]["sigma"]
    return lines


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_text("nonsense\n"), "was not written by `fs-psm certify`"),
        (lambda path: path.write_bytes(b"\xff\xfe\n"), "was not written by `fs-psm certify`"),
        (lambda path: path.write_text(""), "it has no header"),
        (edited(lambda lines: lines[1:]), "it has no header"),
        (edited(lambda lines: [{"kind": "header"}, *lines[1:]]), "it has no header"),
        (edited(lambda lines: lines[:1]), "must hold at least one certified image"),
        (edited(lambda lines: [*lines[:1], {"kind": "image"}]), "was not written by `fs-psm certify`"),
        (edited(incomplete), "missing ['sigma']"),
        (edited(per_token), "is per token"),
        (lambda path: None, "No such file"),
    ],
)
def test_a_bad_file_is_one_line_and_exit_code_2(write, words, monkeypatch, capsys, tmp_path):
    path = tmp_path / "bad.jsonl"
    write(path)
    assert run(monkeypatch, "tables", "--paper", 2, "--results", path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (complaint,) = printed.err.strip().splitlines()
    assert complaint.startswith("fs-psm: ")
    assert words in complaint
    assert "bad.jsonl" in complaint


@pytest.mark.parametrize("number", [0, 9])
def test_only_eight_tables_are_there(number, monkeypatch, capsys):
    assert run(monkeypatch, "tables", "--paper", number) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint == f"fs-psm: `--paper` must be one of 1, 2, 3, 4, 5, 6, 7, 8, got {number}"
