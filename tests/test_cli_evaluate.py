"""`fs-psm attack`, `evaluate` and `tables` as a user types them, on real tiny models."""

import json
import sys

import pytest
import torch
from evaluation_runs import head_values, picture, save_pictures, save_world
from PIL import Image
from tiny_models import SIZE

from fs_psm_hf.cards.tables import format_attacks
from fs_psm_hf.cli import main
from fs_psm_hf.evaluation.attack_tables import format_results
from fs_psm_hf.evaluation.jsonl import read_jsonl
from fs_psm_hf.evaluation.tables import format_paper_table


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = save_world(tmp_path_factory.mktemp("world"))
    save_pictures(root / "targets", seed=9, targets=False)
    return root


def run(monkeypatch, *arguments):
    """Exit code of `fs-psm` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["fs-psm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def attack_words(root, output, **changes):
    options = {
        "tower": root / "plain", "images": root / "images", "targets": root / "targets", "output": output, "method": "attackvlm",
        "steps": 3, "batch-size": 2, "image-size": SIZE, "feature": "cls", "seed": 5, "limit": 3, "dtype": "float32",
    } | changes  # fmt: skip
    return ["attack", *(word for name, value in options.items() if value is not None for word in (f"--{name}", value))]


def test_attack_writes_pictures_inside_the_ball_and_goes_on(root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "adversarial"
    assert run(monkeypatch, *attack_words(root, output, epsilon="2/255")) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 pictures, attackvlm, transfer: objective ")
    assert "largest change 2/255, 0 steps without a gradient" in said
    names = ["0000-0.png", "0001-1.png", "0002-2.png"]
    assert sorted(path.name for path in output.iterdir()) == [*names, "attacks.jsonl"]
    pictures = [picture(output / name) for name in names]
    for number, adversarial in enumerate(pictures):
        change = 255 * (adversarial - picture(root / "images" / f"{number}.png"))
        assert 0 < change.abs().max() <= 2.001
    lines = read_jsonl(output / "attacks.jsonl")
    assert [line.get("file") for line in lines] == [None, *names]
    assert lines[0]["command"].startswith("fs-psm attack --tower plain --images images")
    assert str(root) not in (output / "attacks.jsonl").read_text()

    # A picture and a line that are lost are made again, the same.
    before = (output / "attacks.jsonl").read_bytes()
    (output / names[2]).unlink()
    (output / "attacks.jsonl").write_bytes(b"\n".join(before.split(b"\n")[:3]) + b"\n")
    assert run(monkeypatch, *attack_words(root, output, epsilon="2/255", seed=None)) == 0
    assert (output / "attacks.jsonl").read_bytes() == before
    assert torch.equal(picture(output / names[2]), pictures[2])
    # Other settings are refused.
    capsys.readouterr()
    assert run(monkeypatch, *attack_words(root, output, epsilon="4/255")) == 2
    assert "was made with another configuration (epsilon: " in capsys.readouterr().err


def test_an_adaptive_attack_goes_through_the_defence(root, tmp_path, monkeypatch, capsys):
    words = attack_words(root, tmp_path / "a", mode="adaptive", psm=root / "psm", sigma=0.1, draws=8, limit=1)
    assert run(monkeypatch, *words, "--straight-through") == 0
    assert "1 pictures, attackvlm, adaptive" in capsys.readouterr().out
    (line,) = read_jsonl(tmp_path / "a" / "attacks.jsonl")[1:]
    assert (line["settings"]["mode"], line["settings"]["draws"], line["settings"]["straight_through"]) == (
        "adaptive",
        [8],
        [True],
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "fao"}, "`--method` must be one of"),
        ({"targets": None}, "`--targets` must be given for the method attackvlm, got None"),
        ({"method": "pgd"}, "`--targets` must not be given for the method pgd"),
        ({"epsilon": "300/255"}, "`--epsilon` must be > 0, and of linf at most 1, the range of a pixel, got 1.17647"),
        ({"norm": "l1"}, "`--norm` must be one of linf, l2, got 'l1'"),
        ({"steps": 0}, "`--steps` must be >= 1, got 0"),
        ({"epsilon": "x"}, "`--epsilon` must be a number or a fraction such as 16/255, got 'x'"),
        ({"limit": 0}, "`--limit` must be >= 1, got 0"),
        ({"targets": "other"}, "`targets` must hold an image for every clean image, by file stem, got none for 1"),
        ({"images": "nowhere"}, "nowhere"),
        ({"mode": "adaptiv"}, "`mode` must be 'transfer' or 'adaptive', got 'adaptiv'"),
    ],
)
def test_a_mistake_of_attack_is_one_line(changes, words, root, tmp_path, monkeypatch, capsys):
    other = root / "other"
    if not other.exists():
        other.mkdir()
        Image.new("RGB", (SIZE, SIZE)).save(other / "0.png")
    changes = {name: root / value if value in ("other", "nowhere") else value for name, value in changes.items()}
    assert run(monkeypatch, *attack_words(root, tmp_path / "a", **changes)) == 2
    (complaint,) = capsys.readouterr().err.strip().splitlines()
    assert complaint.startswith("fs-psm: ")
    assert words in complaint
    assert not (tmp_path / "a").exists()


def test_evaluate_prints_what_it_wrote(root, tmp_path, monkeypatch, capsys):
    values = head_values(
        root, attacks=[{"method": "attackvlm", "steps": 2, "epsilon": "16/255", "rows": ["Org", "FS+P+M"]}]
    )
    values["task"] |= {"images": "${data}/images", "limit": 3}
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(values))
    output, card, plot = (tmp_path / name for name in ("run.jsonl", "attacks.json", "run.png"))
    words = [
        "evaluate",
        "--config",
        config,
        "--set",
        f"data={root}",
        "--limit",
        2,
        "--output",
        output,
        "--device",
        "cpu",
    ]
    assert run(monkeypatch, *words, "--attacks", card, "--plot", plot) == 0
    assert capsys.readouterr().out == format_results([output]) + "\n"
    header = read_jsonl(output)[0]
    assert header["command"].startswith("fs-psm evaluate --config small.yaml --output run.jsonl --set data=")
    assert str(tmp_path) not in output.read_text()
    assert header["config"]["task"]["limit"] == 2
    shown = format_attacks(json.loads(card.read_text())).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in shown] == ["Org", "FS+P+M"]
    with Image.open(plot) as drawn:
        assert drawn.width > 400
    # And as the paper's table.
    assert run(monkeypatch, "tables", "--paper", 3, "--results", output) == 0
    assert capsys.readouterr().out == format_paper_table(3, [output]) + "\n"
    assert run(monkeypatch, "tables", "--results", card) == 0
    assert "adaptive: missing" in capsys.readouterr().out

    # Judged again into the same file is refused.
    assert run(monkeypatch, *words[:-2], "--rejudge", output) == 2
    assert "`--output` must be another file than `--rejudge`" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(root, tmp_path, monkeypatch, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(head_values(root)))
    assert run(monkeypatch, "evaluate", "--config", config, "--dry-run") == 0
    assert capsys.readouterr().out.strip().endswith("nothing was run")
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("changes", "words", "complaint"),
    [
        ({"jugde": {}}, [], "`the file` has an unknown key `jugde`: did you mean `judge`?"),
        ({}, ["--set", "data"], "`--set` must be NAME=VALUE, got data"),
        ({}, ["--limit", 0], "`--limit` must be >= 1, got 0"),
        ({}, ["--plot", "nowhere/x.png"], "`--plot` must be a .png file in a folder that exists"),
        ({}, ["--device", "tpu9"], "`--device` must be one torch can use here, got tpu9"),
    ],
)
def test_a_mistake_of_evaluate_is_one_line(changes, words, complaint, root, tmp_path, monkeypatch, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(head_values(root) | changes))
    assert run(monkeypatch, "evaluate", "--config", config, "--output", tmp_path / "run.jsonl", *words) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in said


def test_a_missing_column_is_named(root, tmp_path, monkeypatch, capsys):
    folder = save_pictures(tmp_path / "bare", count=2)
    (folder / "metadata.csv").write_text("file_name\n0.png\n1.png\n")
    values = head_values(root)
    values["task"]["images"] = str(folder)
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(values))
    assert run(monkeypatch, "evaluate", "--config", config, "--output", tmp_path / "run.jsonl") == 2
    assert "lacks the column `label`" in capsys.readouterr().err
    assert not (tmp_path / "run.jsonl").exists()
