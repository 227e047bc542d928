import json
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from card_text import blocks, names_of_blocks
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from tiny_models import MEAN, SIZE, STD, psm_model, smoothed_tower, vision_model
from transformers import CLIPImageProcessorPil

from fs_psm_hf.cards import merge_card, render_card, write_card
from fs_psm_hf.cards.merge import split_card
from fs_psm_hf.cards.tables import format_epsilon
from fs_psm_hf.cli import main


CARDS = Path(__file__).parents[1] / "model_cards"
TINY = CARDS / "fs-psm-tiny-clip-cifar10"
PLAIN = CARDS / "dinov2-small-fs"
COMMITTED = [
    path.parents[1]
    for path in sorted(CARDS.glob("*/results/card.json"))
    if (path.parents[1] / "config.json").exists() or list(path.parent.glob("*.jsonl"))
]
each_committed = pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
BLOCKS = [
    "summary", "intended-use", "what-is-certified", "training", "certified", "attacks", "clean-utility", "cost", "limits",
    "licence", "citation",
]  # fmt: skip
# From the Hub's list of licences: those that could be ours.
LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "other"}
TOKEN = "hf_" + "aB3" * 11


def run(monkeypatch, *arguments):
    """Exit code of `fs-psm` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["fs-psm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def edit(path, change):
    """Change the JSON of a file in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny PSM without its weights and card."""
    copy = tmp_path / TINY.name
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    return copy


# The committed cards


@each_committed
def test_every_committed_card_renders_again_to_the_same_bytes(folder):
    card = (folder / "README.md").read_bytes().decode()
    assert merge_card(card, render_card(folder)) == card
    assert write_card(folder, check=True) == []
    assert list(blocks(card)) == names_of_blocks(card) == BLOCKS


def test_every_psm_and_every_folder_of_results_has_such_a_card():
    assert {TINY, PLAIN} <= set(COMMITTED)
    for config in CARDS.glob("*/config.json"):
        # Rendered by examples/tiny/train.py, as a model that needs no mapper and no tower.
        if json.loads(config.read_text())["model_type"] == "fs_psm" and config.parent.name != "tiny-denoiser-cifar10":
            assert config.parent in COMMITTED, f"{config.parent.name} needs results/card.json, then `fs-psm card`"


@pytest.mark.parametrize("path", sorted(CARDS.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_metadata_of_every_card_is_what_the_hub_reads(path):
    text = path.read_text()
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    found = yaml.safe_load(split_card(text)[1])
    assert card.data.to_dict() == found
    assert str(card) == text
    assert found["license"] in LICENCES
    assert "fs-psm" in found["tags"]
    assert "base_model" not in found or re.fullmatch(r"[\w.-]+/[\w.-]+", found["base_model"])
    assert found.get("library_name") in ("fs_psm_hf", "transformers")
    assert found.get("pipeline_tag") in (
        None, "image-feature-extraction", "image-to-image", "image-text-to-text", "zero-shot-image-classification",
    )  # fmt: skip
    if "model-index" in found:
        name, results = model_index_to_eval_results(found["model-index"])
        assert name == path.parent.name
        assert len({(r.unique_identifier, r.metric_type) for r in results}) == len(results) > 0
        assert all(r.dataset_config.startswith("fs-psm: row FS") for r in results)


def test_numbers_of_the_metadata_are_those_of_the_results():
    _, results = model_index_to_eval_results(ModelCard((TINY / "README.md").read_text()).data.to_dict()["model-index"])
    row = json.loads((TINY / "results" / "table5.json").read_text())["rows"]["0.25"]["FS+P+M"]
    (found,) = [r for r in results if r.dataset_config.endswith("0.25, cdf, 1000 draws") and "radius" in r.metric_type]
    assert found.metric_type == "certified_radius"
    assert row["cdf"]["mean_radius"] - 1e-4 < found.metric_value <= row["cdf"]["mean_radius"]
    assert found.metric_args == {"images": 20, "level": 0.5, "alpha": 0.001}
    plugin = [r for r in results if "plugin" in r.dataset_config and "radius" in r.metric_type]
    assert {r.metric_type for r in plugin} == {"plugin_radius"}


def test_facts_are_those_of_the_recipes():
    facts = json.loads((TINY / "results" / "card.json").read_text())["training"]
    recipe = yaml.safe_load((TINY / "training.yaml").read_text())
    assert {part["stage"]: part["steps"] for part in facts["steps"]} == {
        stage: recipe[stage]["max_train_steps"] for stage in ("purifier", "mapper")
    }
    assert (facts["sigma_min"], facts["sigma_max"]) == (recipe["sigma_min"], recipe["sigma_max"])
    psm = CARDS / "fs-psm-dinov2-small"
    facts = json.loads((psm / "results" / "card.json").read_text())["training"]
    recipe = (psm / "train.sh").read_text()
    assert [part["steps"] for part in facts["steps"]] == [
        int(n) for n in re.findall(r"--max_train_steps (\d+)", recipe)
    ]
    assert f"--sigma_min {facts['sigma_min']} --sigma_max {facts['sigma_max']}" in recipe


def test_the_example_of_a_committed_card_runs(monkeypatch):
    monkeypatch.chdir(CARDS)
    (code,) = re.findall(r"```python\n(.*?)```", (TINY / "README.md").read_text(), re.DOTALL)
    found = {}
    exec(code, found)
    assert found["host"].model.vision_tower is found["tower"]
    assert (found["tower"].config.sigma, found["tower"].config.num_samples) == (0.25, 4)


# What is rendered


@pytest.mark.parametrize(
    ("kind", "feature", "output"),
    [("dinov2", "cls", ".last_hidden_state[:, 0]"), ("projection", "pooled", ".image_embeds")],
)
def test_a_psm_of_another_tower_is_loaded_by_its_own_example(kind, feature, output, tmp_path, monkeypatch):
    tower, psm = vision_model(kind), psm_model(mapper=False)
    tower.save_pretrained(tmp_path / "tower")
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size=size, crop_size=size, image_mean=MEAN, image_std=STD).save_pretrained(
        tmp_path / "tower"
    )
    psm.save_pretrained(tmp_path / "psm")
    (tmp_path / "psm" / "results").mkdir()
    facts = {"tower": {"name": "tower", "class": type(tower).__name__, "feature": feature, "text": "a tower"}}
    (tmp_path / "psm" / "results" / "card.json").write_text(json.dumps(facts))
    text = render_card(tmp_path / "psm")
    assert f"tower(pixel_values){output}`" in text
    parameters = sum(p.numel() for p in psm.parameters())
    assert f"{parameters:,} parameters (purifier: {parameters:,})" in text
    assert "\nPurifier (a `PSMModel`" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    assert found["tower"].config.sigma == 0.25


def test_a_smoothed_tower_has_a_card_too(tmp_path, monkeypatch):
    smoothed_tower(sigma=0.25, num_samples=2).save_pretrained(tmp_path / "tower")
    text = render_card(tmp_path / "tower")
    assert (
        "over 2 noisy copies of an image (σ = 0.25 in\n[0, 1] pixels), around a `clip_vision_model`. Inside: plain smoothing."
        in text
    )
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = {}
    exec(code, found)
    assert found["tower"].config.num_samples == 2


def test_what_is_not_there_is_said_to_be_not_there(tmp_path):
    """A folder as training leaves it: no facts, no results, and a tower that was a folder of some machine."""
    psm = psm_model()
    psm.config.base_model_name_or_path = "/home/someone/models/llava"
    psm.save_pretrained(tmp_path / "my-psm")
    text = render_card(tmp_path / "my-psm")
    found = blocks(text)
    assert list(found) == BLOCKS
    assert "Not recorded" in found["training"]
    assert all("Not measured" in found[name] for name in ("certified", "attacks", "clean-utility"))
    assert "Not stated" in found["licence"]
    assert "someone" not in text
    data = ModelCard(text).data.to_dict()
    assert not {"license", "base_model", "model-index", "datasets"} & set(data)
    assert "None" not in text


def test_the_hub_id_in_a_config_is_the_base_model(tmp_path):
    psm = psm_model()
    for given, expected in [("openai/clip-vit-large-patch14", True), ("my-models/llava", False)]:
        (tmp_path / "my-models" / "llava").mkdir(parents=True, exist_ok=True)
        psm.config.base_model_name_or_path = given
        psm.save_pretrained(tmp_path / "cards" / "psm")
        data = ModelCard(render_card(tmp_path / "cards" / "psm")).data
        assert data.to_dict().get("base_model") == (given if expected else None)


def table(rows):
    """As `psm_table.py` writes it."""
    bounds = {
        "images": 20,
        "num_samples": 200,
        "mean_cosine": 0.5,
        "mean_inner_product_bounds": [0.5, 0.2],
        "mean_radius": 0.25,
    }
    row = {"dtype": "bfloat16", "plugin": bounds, "cdf": bounds | {"num_samples": 1000, "mean_radius": 0.31259}}
    quality = {"noisy": 12.0, "P": 24.0, "FFDNet": 23.0}
    return {
        "rows": {sigma: dict.fromkeys(rows, row) for sigma in ("0.25", "0.5")}, "psnr_db": {"0.25": quality, "0.5": quality},
        "epsilons": [0.1, 0.2], "alpha": 0.001, "level": 0.6, "versions": {}, "command": "python table.py",
    }  # fmt: skip


ATTACKS = {
    "norm": "linf",
    "rows": [
        {"row": row, "sigma": sigma, "attack": attack, "mode": mode, "epsilon": epsilon / 255, "fcs": 0.25, "asr": asr,
         "acc": 0.5, "images": 100}
        for row, sigma, attack, mode, epsilon, asr in [
            ("FS", 0.25, "FOA", "transfer", 16, 0.9), ("FS+P+M", 0.25, "FOA", "transfer", 16, 0.1),
            ("FS+P+M", 0.25, "FOA", "transfer", 8, 0.0), ("FS+P+M", 0.25, "FOA", "adaptive", 16, 0.2),
            ("FS+P+M", 0.5, "FOA", "adaptive", 16, 0.2), ("FS+P+M", 0.25, "M-Attack", "transfer", 16, None),
        ]
    ],
    "versions": {"fs_psm_hf_commit": "abc"},
    "command": "fs-psm attack x",
}  # fmt: skip
UTILITY = json.loads((TINY / "results" / "clean_utility.json").read_text())


def test_all_results_are_rendered(folder):
    results = folder / "results"
    (results / "table5.json").write_text(json.dumps(table(["FS+FFDNet", "FS+P+M", "FS+P", "FS+M", "FS", "FS+mine"])))
    (results / "attacks_linf.json").write_text(json.dumps(ATTACKS))
    cost = {"row": "FS+P+M", "device": "one CPU core", "num_samples": 4, "seconds_per_image": 0.12345}
    (results / "cost.json").write_text(json.dumps({"rows": [cost], "versions": {}, "command": "python cost.py"}))
    shutil.copy(PLAIN / "results" / "sigma0.5-n1000.jsonl", results)
    edit(
        results / "card.json", lambda facts: facts["evaluation"].update(attacks={"type": "nips17", "name": "NIPS-17"})
    )
    text = render_card(folder)
    rows = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| 0.25 |") and "0.313 (20)" in line]
    assert rows == ["FS", "FS+M", "FS+FFDNet", "FS+P", "FS+P+M", "FS+mine"]
    assert "| 0.25 | FS+FFDNet | 0.500 | 0.500, 0.200 | 0.250 | 0.313 (20) | 23.00 |" in text
    assert "Radii keep a cosine of 0.6" in text
    assert "| 0.5 | 20 × 1,000 | cdf, 99.9 % | 0.018 |" in text
    assert "| 0.25 | FS+P+M | FOA | transfer | 16/255 | 100 | 0.250 | 10.0% | 50.0% |" in text
    assert "| 0.25 | FS+P+M | M-Attack | transfer | 16/255 | 100 | 0.250 | - | 50.0% |" in text
    assert "| FS+P+M | one CPU core | 4 | 0.123 |" in text
    assert "at commit `abc`" in blocks(text)["attacks"]


def test_utility_on_two_data_sets(folder):
    """Each with its own words and results; one that `card.json` does not name is shown and not in the metadata."""
    results = folder / "results"
    (results / "clean_utility_flowers.json").write_text(json.dumps(UTILITY | {"images": 123, "chance": 0.01}))
    text = blocks(render_card(folder))["clean-utility"]
    assert text.count("| FS+PSM, σ = 0.25 |") == 2
    assert "on 123 images that nobody attacked: 5 nearest others\nby cosine (chance: 1.0%)" in text
    before = ModelCard(render_card(folder)).data.eval_results
    edit(
        results / "card.json",
        lambda facts: facts["evaluation"].update(clean_utility_flowers={"type": "flowers", "name": "Flowers"}),
    )
    after = ModelCard(render_card(folder)).data.eval_results
    added = [result for result in after if result.dataset_type == "flowers"]
    assert len(after) - len(before) == len(added) == 4


def test_settings_that_the_hub_would_merge_stay_apart(folder):
    """Results are grouped by task, data set, config and split; two attacks on one data set differ in none but the config."""
    (folder / "results" / "attacks.json").write_text(json.dumps(ATTACKS))
    (folder / "results" / "attacks_again.json").write_text(json.dumps(ATTACKS | {"rows": ATTACKS["rows"][1:2]}))
    edit(
        folder / "results" / "card.json", lambda facts: facts["evaluation"].update(attacks={"type": "x", "name": "X"})
    )
    data = ModelCard(render_card(folder)).data
    _, results = model_index_to_eval_results(data.to_dict()["model-index"])
    rates = {r.dataset_config: r.metric_value for r in results if r.metric_type == "asr"}
    assert rates == {
        "fs-psm: row FS+P+M, sigma 0.25, FOA, transfer, linf 16/255": 0.1,
        "fs-psm: row FS+P+M, sigma 0.25, FOA, transfer, linf 8/255": 0.0,
        "fs-psm: row FS+P+M, sigma 0.25, FOA, adaptive, linf 16/255": 0.2,
        "fs-psm: row FS+P+M, sigma 0.5, FOA, adaptive, linf 16/255": 0.2,
        "fs-psm: row FS+P+M, sigma 0.25, FOA, transfer, linf 16/255 (2)": 0.1,
    }


def test_strengths():
    assert format_epsilon(16 / 255, "linf") == "16/255"
    assert format_epsilon(0.5, "l2") == "0.5"


# Refusals


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("results/table5.json", ["epsilons"]),
        ("results/table5.json", ["rows", "0.25", "FS", "plugin", "mean_cosine"]),
        ("results/table5.json", ["rows", "0.25", "FS+P+M", "cdf", "num_samples"]),
        ("results/table5.json", ["psnr_db", "0.12"]),
        ("results/table5.json", ["versions"]),
        ("results/clean_utility.json", ["rows", "plain", "own_gallery"]),
        ("results/clean_utility.json", ["chance"]),
        ("results/card.json", ["training", "hardware"]),
        ("results/card.json", ["tower", "feature"]),
        ("results/card.json", ["evaluation", "table5", "type"]),
        ("config.json", ["model_type"]),
    ],
)
def test_a_key_that_is_missing_is_named_with_its_file(folder, name, keys):
    def remove(values):
        for key in keys[:-1]:
            values = values[key]
        del values[keys[-1]]

    edit(folder / name, remove)
    message = f"`{re.escape(name)}` must have the key `{re.escape('.'.join(keys))}`, which it lacks"
    with pytest.raises(ValueError, match=message):
        write_card(folder)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results/table5.json", "{", "`results/table5.json` must be JSON"),
        ("results/table5.json", "[]", "`results/table5.json` must be a JSON object, got list"),
        ("results/table5.json", '{"rows": {}}', "`results/table5.json` must have rows"),
        ("results/clean_utility.json", json.dumps(UTILITY | {"rows": 1}), "`results/clean_utility.json` has another form"),
        ("results/x.jsonl", '{"kind": "header"}\n{"kind": "image"}\n', "`results/x.jsonl` must be a finished results file"),
        ("results/x.jsonl", "", "`results/x.jsonl` must be a finished results file"),
        ("results/attacks.json", json.dumps(ATTACKS | {"norm": "l0"}), "`norm` of attacks must be one of linf, l2"),
        ("results/attacks.json", json.dumps({**ATTACKS, "rows": [ATTACKS["rows"][0] | {"mode": "white"}]}), "adaptive, tran"),
        ("results/attacks.json", json.dumps({"norm": "l2", "rows": [{}]}), "`results/attacks.json` must have .*`rows.0.mode`"),
        ("results/card.json", '{"base_model": "a/b/c"}', "`base_model` in `results/card.json` must be an id of the Hub"),
        ("results/card.json", '{"datasets": ["../x"]}', "`datasets` in `results/card.json` must be an id of the Hub"),
        ("results/card.json", '{"limits": ["<!-- /fs-psm:cost -->"]}', None),
        ("results/card.json", '{"rows": {"FS": "x\\n<!-- fs-psm:cost -->\\n"}}', "opened inside `certified`"),
        ("config.json", '{"model_type": "llava"}', "`model_type` in `config.json` must be one of fs_psm"),
        ("model.safetensors", "not a header", "`model.safetensors` must be a safetensors file"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_named(folder, name, text, message):
    (folder / name).write_text(text)
    if message is None:
        assert "- <!-- /fs-psm:cost -->" in render_card(folder)  # not a line of its own: no mark
        return
    with pytest.raises(ValueError, match=message) as raised:
        render_card(folder)
    assert len(" ".join(str(raised.value).split())) < 300


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`folder` must hold config.json or results"):
        render_card(tmp_path)
    with pytest.raises(ValueError, match="`folder` must be a folder"):
        render_card(tmp_path / "nowhere")


def test_tokens_never_reach_a_card(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert TOKEN not in render_card(folder)
    for name, key, value in [
        ("config.json", "hub_token", TOKEN),
        ("results/table5.json", "command", f"python x --purifier P={TOKEN}"),
        ("results/clean_utility.json", "command", "fs-psm push --token secret"),
        ("results/card.json", "limits", ["fine", f"see {TOKEN}"]),
    ]:
        before = (folder / name).read_text()
        edit(folder / name, lambda values, key=key, value=value: values.update({key: value}))
        with pytest.raises(
            ValueError, match=f"`{name}` must hold no token, got what looks like one in `{key}"
        ) as raised:
            write_card(folder)
        assert TOKEN not in str(raised.value)
        assert "secret" not in str(raised.value)
        (folder / name).write_text(before)
    assert not (folder / "README.md").exists()


# On disk


def test_the_command(folder, monkeypatch, capsys):
    card = folder / "README.md"
    assert run(monkeypatch, "card", folder, "--check") == 1
    assert not card.exists()
    assert run(monkeypatch, "card", folder) == 0
    assert "- new card" in capsys.readouterr().out
    assert card.read_text() == render_card(folder)
    card.write_text("---\nmine: 1\n---\nI wrote this.\n" + card.read_text().split("---\n", 2)[2])
    edit(folder / "results" / "table5.json", lambda values: values.update(command="another"))
    assert run(monkeypatch, "card", folder) == 0
    out = capsys.readouterr().out
    assert "written" in out
    assert "- metadata: license" in out
    assert "- block certified: changed" in out
    assert "attacks" not in out
    text = card.read_text()
    assert "I wrote this." in text
    assert "mine: 1" in text
    before = card.stat().st_mtime_ns
    assert run(monkeypatch, "card", folder, "--check") == 0
    assert run(monkeypatch, "card", folder) == 0
    assert "up to date" in capsys.readouterr().out
    assert card.stat().st_mtime_ns == before
    card.write_text(text.replace("<!-- /fs-psm:cost -->", ""))
    assert run(monkeypatch, "card", folder) == 2
    assert capsys.readouterr().err.count("\n") == 1
    card.write_bytes(b"\xff\xfe")
    assert run(monkeypatch, "card", folder) == 2
    assert "`README.md` of fs-psm-tiny-clip-cifar10 must be UTF-8" in capsys.readouterr().err
    assert card.read_bytes() == b"\xff\xfe"
    assert run(monkeypatch, "card", folder / "nowhere") == 2
    assert [path.name for path in folder.iterdir() if "tmp" in path.name] == []


def test_a_full_disk_leaves_the_old_card(folder):
    card = folder / "README.md"
    card.write_text("I wrote this.\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_card(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert card.read_text() == "I wrote this.\n"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "results", "training.yaml"]
    assert "metadata: license" in write_card(folder)
    assert card.read_text().count("I wrote this.\n") == 1
