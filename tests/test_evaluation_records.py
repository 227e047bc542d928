"""The state of an evaluation: what a kill leaves, what a restart finds, what two processes write."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from fs_psm_hf.evaluation.jsonl import append_jsonl, read_jsonl, write_jsonl
from fs_psm_hf.evaluation.records import RunFile, config_hash, difference, read_run


CONFIG = {"name": "x", "attacks": [{"method": "foa", "steps": 300}], "seed": 1}


def test_the_hash_is_of_the_content_not_of_its_order():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1, "b": [1, 2]}) != config_hash({"a": 1, "b": [2, 1]})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (CONFIG, None),
        (CONFIG | {"seed": 2}, "seed: 1, not 2"),
        (CONFIG | {"attacks": [{"method": "foa", "steps": 20}]}, "attacks.0.steps: 300, not 20"),
        (CONFIG | {"attacks": []}, "attacks: [{'method': 'foa', 'steps': 300}], not []"),
        ({"attacks": CONFIG["attacks"], "seed": 1}, "name: 'x', not None"),
    ],
)
def test_the_first_difference_is_named(other, words):
    assert difference(CONFIG, other) == words


def test_what_is_written_is_found_again(tmp_path):
    path = tmp_path / "folder" / "run.jsonl"
    run = RunFile(path, CONFIG, {"seed": 1})
    run.add("attack", "a", "0.png", file="a/0.png")
    run.add("item", "c", "0.png", fcs=0.5)
    run.add("item", "c", "1.png", fcs=0.25)
    again = RunFile(path, CONFIG, {"seed": 9})
    assert again.header["seed"] == 1
    assert again.get("attack", "a", "0.png")["file"] == "a/0.png"
    assert [item["fcs"] for item in again.items("c")] == [0.5, 0.25]
    assert [item["fcs"] for item in again.items("c", ["1.png", "2.png", "0.png"])] == [0.25, 0.5]
    assert again.cells() == []
    run.add("cell", "c", summary={"asr": 1.0})
    (cell,) = RunFile(path, CONFIG).cells()
    assert cell["summary"] == {"asr": 1.0}
    header, lines = read_run(path)
    assert (header["config"], len(lines)) == (CONFIG, 4)


@pytest.mark.parametrize(
    "torn", ['{"kind": "item", "key": "c", "ima', '{"kind": "item", "key": "c", "image": "1.png"}']
)
def test_a_torn_last_line_is_dropped(torn, tmp_path):
    path = tmp_path / "run.jsonl"
    RunFile(path, CONFIG).add("item", "c", "0.png", fcs=0.5)
    with open(path, "a") as stream:
        stream.write(torn)
    run = RunFile(path, CONFIG)
    assert [item["image"] for item in run.items("c")] == ["0.png"]
    run.add("item", "c", "1.png", fcs=0.1)
    assert [line.get("image") for line in read_jsonl(path)] == [None, "0.png", "1.png"]


def test_a_kill_loses_no_line_that_was_reported(tmp_path):
    """A real process is killed while it writes; every line it had reported is there, and the file goes on."""
    script = tmp_path / "writer.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from fs_psm_hf.evaluation.records import RunFile

            run = RunFile({str(tmp_path / "run.jsonl")!r}, {CONFIG!r})
            number = 0
            while True:
                run.add("item", "c", f"{{number}}.png", text="x" * 5000)
                sys.stdout.write(f"{{number}}\\n")
                sys.stdout.flush()
                number += 1
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ)
    reported = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    reported += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.wait()
    run = RunFile(tmp_path / "run.jsonl", CONFIG)
    found = {item["image"] for item in run.items("c")}
    assert found >= {f"{number}.png" for number in reported}
    assert all(len(item["text"]) == 5000 for item in run.items("c"))
    run.add("item", "c", "last.png", text="")
    assert RunFile(tmp_path / "run.jsonl", CONFIG).get("item", "c", "last.png") is not None


def test_another_configuration_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "run.jsonl"
    RunFile(path, CONFIG).add("item", "c", "0.png", fcs=0.5)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another configuration \(seed: 1, not 2\): give another file") as raised:
        RunFile(path, CONFIG | {"seed": 2})
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == before


def test_parts_of_several_processes_are_merged_in_one_order(tmp_path):
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    single = RunFile(one, CONFIG)
    for key in ("a", "c"):
        for image in ("0.png", "1.png", "2.png"):
            single.add("attack" if key == "a" else "item", key, image, value=image)
    single.merge(["a", "c"], ["0.png", "1.png", "2.png"])
    first = RunFile(several, CONFIG)
    second = RunFile(several, CONFIG, part=1)
    second.add("item", "c", "1.png", value="1.png")
    second.add("attack", "a", "1.png", value="1.png")
    for image in ("2.png", "0.png"):
        first.add("item", "c", image, value=image)
        first.add("attack", "a", image, value=image)
    first.merge(["a", "c"], ["0.png", "1.png", "2.png"])
    assert several.read_bytes() == one.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "several.jsonl"]


def test_a_part_that_a_kill_left_is_taken_in(tmp_path):
    path = tmp_path / "run.jsonl"
    RunFile(path, CONFIG)
    RunFile(path, CONFIG, part=1).add("item", "c", "1.png", fcs=0.5)
    with open(tmp_path / "run.jsonl.part1", "a") as stream:
        stream.write('{"kind": "it')
    run = RunFile(path, CONFIG)
    assert run.get("item", "c", "1.png")["fcs"] == 0.5
    assert not (tmp_path / "run.jsonl.part1").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense\n{}\n", "must hold JSON lines, got a damaged one"),
        ("[1]\n", "got another in line 1"),
        ('{"no": "kind"}\n', "got another in line 1"),
        ('{"kind": "header"}\n', "must be a file of `fs-psm evaluate`"),
        ('{"kind": "image", "file": "x"}\n', "must be a file of `fs-psm evaluate`"),
        ("\xff\xfe\n", "must be a file"),
    ],
)
def test_another_file_is_refused(text, words, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(text.encode("latin-1") if "\xff" in text else text.encode())
    with pytest.raises(ValueError, match="must") as raised:
        RunFile(path, CONFIG)
    assert words in str(raised.value) or "damaged" in str(raised.value)
    with pytest.raises(ValueError, match="must"):
        read_run(path)


def test_lines_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    run = RunFile(path, CONFIG)
    with pytest.raises(ValueError, match="`kind` must be one of attack, item, cell, got 'image'"):
        run.add("image", "c")
    append_jsonl(path, {"kind": "image", "key": "c"})
    with pytest.raises(ValueError, match="got a line of kind 'image'"):
        RunFile(path, CONFIG)
    with pytest.raises(ValueError, match="must have been made by the first process"):
        RunFile(tmp_path / "other.jsonl", CONFIG, part=2)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"kind": "a"}, {"kind": "b"}])
    assert path.read_text() == '{"kind": "a"}\n{"kind": "b"}\n'
    write_jsonl(path, [{"kind": "c"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"kind": "c"}]
    assert list(tmp_path.iterdir()) == [path]
