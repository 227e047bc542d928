"""What a configuration may say; and every file of examples/tables, dry-run at true shapes."""

import copy
import json
from pathlib import Path

import pytest
from evaluation_runs import head_values, save_world

from fs_psm_hf.evaluation.dry_run import dry_run
from fs_psm_hf.evaluation.run_config import parse_config, read_config


TABLES = Path(__file__).parents[1] / "examples" / "tables"
CAPTIONS = {
    "name": "x",
    "task": {"kind": "captioning", "images": "a"},
    "judge": {"kind": "keyword", "keywords": ["cat"]},
    "models": [{"name": "m", "host": "h", "rows": [{"row": "Org"}]}],
    "attacks": [{"method": "foa"}],
}


def changed(path, value, start=CAPTIONS):
    """The values with one of them changed, or taken away where `value` is `None`."""
    values = copy.deepcopy(start)
    place = values
    *way, last = path.split(".")
    for part in way:
        place = place[int(part) if part.isdigit() else part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("jugde", {}, "`the file` has an unknown key `jugde`: did you mean `judge`?"),
        ("task.imges", "b", "`task` has an unknown key `imges`: did you mean `images`?"),
        ("models.0.rows.0.sigam", 1, "`models.0.rows.0` has an unknown key `sigam`: did you mean `sigma`?"),
        ("attacks.0.qqq", 1, "`attacks.0` has an unknown key `qqq`, must be one of method, mode"),
        ("name", None, "`the file` must have `name`, got none"),
        ("task.images", None, "`task` must have `images`, got none"),
        ("task", [], "`task` must be a mapping, got list"),
        ("models", [], "`models` must be a list with at least one entry, got []"),
        ("task.kind", "caption", "(did you mean 'captioning'?)"),
        ("task.kind", "head", "`task.head_images` or `task.head` must be given for the task head"),
        ("task.kind", "retrieval", "`task.targets` must be given for the task retrieval"),
        ("task.limit", 0, "`task.limit` must be an integer >= 1, got 0"),
        ("judge", None, "`judge` must be given for captions: keyword, embedding, llm"),
        ("judge.kind", "gpt", "`judge` must have a `kind` of keyword, embedding, llm, got"),
        ("models.0.host", None, "`models.0.encoders` must name a folder or Hub id each where there is no `host`"),
        ("models.0.dtype", "float61", "`models.0.dtype` must be one of float32, bfloat16, float16, got 'float61'"),
        ("models.0.feature", "token", "(did you mean 'tokens'?)"),
        ("models.0.rows.0.row", "FS+P", "`models.0.rows.0.psm` must be given for FS+M, FS+P and FS+P+M"),
        (
            "models.0.rows.0.psm",
            "p",
            "`models.0.rows.0.psm` must be given for FS+M, FS+P and FS+P+M and for no other row, got Org",
        ),
        ("models.0.rows.0.sigma", -1, "`models.0.rows.0.sigma` must be >= 0, got -1"),
        ("models.0.rows.0.num_samples", 0, "`models.0.rows.0.num_samples` must be an integer >= 1, got 0"),
        ("models.0.rows.0.purifier", "light", "`models.0.rows.0.purifier` must be 'none' for rows without P"),
        ("models.0.rows.0.encoders", ["FARE"], "`models.0.rows` names the encoder 'FARE', not one of org"),
        ("attacks.0.method", "fao", "(did you mean 'foa'?)"),
        ("attacks.0.mode", "white-box", "`attacks.0.mode` must be one of transfer, adaptive, got 'white-box'"),
        ("attacks.0.epsilon", "16", "`attacks.0.epsilon` must be in (0, 1], the range of a pixel, got 16"),
        ("attacks.0.epsilon", "a/b", "`attacks.0.epsilon` must be a number or a fraction such as 16/255, got 'a/b'"),
        ("attacks.0.epsilon", "1/0", "`attacks.0.epsilon` must be a number or a fraction"),
        ("attacks.0.epsilon", 0, "`attacks.0.epsilon` must be in (0, 1]"),
        ("attacks.0.steps", 1.5, "`attacks.0.steps` must be an integer >= 1, got 1.5"),
        ("attacks.0.gradients", ["straight"], "`attacks.0.gradients` must be one of end-to-end, straight-through"),
        ("attacks.0.rows", ["FSM"], "`attacks.0.rows` must be one of Org, FS, FS+M, FS+P, FS+P+M, got 'FSM'"),
        ("batch_size", 0, "`batch_size` must be an integer >= 1, got 0"),
        ("seed", -1, "`seed` must be an integer >= 0, got -1"),
    ],
)
def test_a_mistake_is_named_in_one_sentence(path, value, words):
    with pytest.raises(ValueError, match="`") as raised:
        parse_config(changed(path, value))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_asks_for_nothing_or_twice_is_refused():
    with pytest.raises(ValueError, match="must fit at least one row"):
        parse_config(changed("attacks", [{"method": "foa", "mode": "adaptive"}])).cells()
    with pytest.raises(ValueError, match="must ask for each cell once, got m, org, Org"):
        parse_config(changed("attacks", [{"method": "foa"}, {"method": "foa", "limit": 3}])).cells()


def test_numbers_variables_and_limits_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    values = changed("task.images", "${data}/images") | {
        "attacks": [{"method": "foa", "epsilon": "32/255", "norm": "l2"}]
    }
    path.write_text(json.dumps(values))
    config = read_config(path, {"data": "/somewhere"}, limit=7)
    assert (config.task.images, config.task.limit, config.attacks[0].epsilon) == ("/somewhere/images", 7, 32 / 255)
    assert config.settings()["task"]["images"] == "images"
    assert config.settings() == read_config(path, {"data": "/elsewhere"}, limit=7).settings()
    with pytest.raises(ValueError, match=r"`--set data=VALUE` must be given"):
        read_config(path)
    path.write_text("a: [1")
    with pytest.raises(ValueError, match="`--config` x.yaml must be YAML"):
        read_config(path)


def test_an_l2_ball_may_be_larger_than_a_pixel():
    assert parse_config(changed("attacks", [{"method": "pgd", "epsilon": 3, "norm": "l2"}])).attacks[0].epsilon == 3.0


@pytest.mark.parametrize("name", sorted(path.name for path in TABLES.glob("*.yaml")))
def test_every_example_is_dry_run(name, tmp_path):
    """At the true shapes of each model, without a weight."""
    variables = {key: str(tmp_path / key) for key in ("data", "psm", "robust", "flamingo", "tower")}
    config = read_config(TABLES / name, variables)
    said = dry_run(config)
    assert said.endswith("nothing was run")
    cells = [cell for cell, *_ in config.cells()]
    assert said.count("\ncell ") == len(cells)
    shapes = {
        "LLaVA-1.5-7B": "336 px, tokens of 576 × 1024", "CLIP-L14": "224 px, pooled of 768", "CLIP-B16": "224 px, pooled of 512",
        "OpenFlamingo-9B": "224 px, tokens of 256 × 1024", "DINOv2-small": "224 px, cls of 384",
        "tiny-LLaVA": "32 px, tokens of 64 × 128",
    }  # fmt: skip
    for model in config.models:
        assert f"tower {model.name}, org: {shapes[model.name]}" in said
    if name.endswith(("_sanity.yaml", "_strength.yaml")):  # they answer a question about the attack of another file
        return
    # Each asks for what makes its rows mean something: adaptive attacks both ways, and their two checks.
    for model in config.models:
        mine = [cell for cell in cells if cell.model == model.name]
        if name.startswith("table"):
            assert {cell.gradient for cell in mine} >= {"end-to-end", "straight-through"}
        assert {cell.row for cell in mine if cell.mode == "transfer"} <= {
            cell.row for cell in mine if cell.mode == "adaptive"
        }
        assert any(cell.mode == "adaptive" and cell.epsilon == 64 / 255 for cell in mine)
        zeros = [cell for cell in mine if cell.mode == "adaptive" and cell.sigma == 0]
        assert zeros
        plain = {(cell.attack, cell.epsilon, cell.steps) for cell in mine if cell.row == "Org"}
        assert {(cell.attack, cell.epsilon, cell.steps) for cell in zeros} <= plain


def test_a_dry_run_counts_passes(tmp_path):
    config = parse_config(head_values(save_world(tmp_path)))
    said = dry_run(config)
    # The plain tower: 5 images, 3 steps. Adaptive: 3 images, 2 steps, 8 draws, three times. At sigma 0: 3 images, 3 steps.
    assert f"5 attacks with {5 * 3 + 3 * (3 * 2 * 8) + 3 * 3} images through the tower, 10 cells" in said
    assert "tower tiny, org: 16 px, cls of 32" in said
    assert "FS+P+M: 16 px, cls of 32" in said


def test_a_psm_that_does_not_fit_is_found_without_weights(tmp_path):
    from tiny_models import psm_model

    values = head_values(save_world(tmp_path))
    psm_model(width=48).save_pretrained(tmp_path / "wide")
    values["models"][0]["rows"][4]["psm"] = str(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"`mapper_config\['hidden_size'\]` must be 32"):
        dry_run(parse_config(values))
    values = head_values(tmp_path)
    values["models"][0]["encoders"]["org"] = "some/hub-id"
    with pytest.raises(ValueError, match="`vision_config` of tiny must be given for a dry run where some/hub-id"):
        dry_run(parse_config(values))
