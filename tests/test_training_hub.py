"""What training publishes: the PSM with a card of its own, after a word with the Hub before the first step."""

import json

import pytest
from stand_in_hub import READER, WRITER, StandInHub
from training_runs import command, save_images, save_tower, words

from fs_psm_hf import PSMModel
from fs_psm_hf.cards import write_card


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    save_tower(root / "tower")
    save_images(root / "images", 6)
    return root


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with StandInHub() as hub:
        hub.connect(monkeypatch, tmp_path)
        yield hub


def test_both_stages_are_published_as_one_psm_with_its_card(hub, root, tmp_path):
    options = {"hub_model_id": "user/mine", "hub_token": WRITER, "hub_private_repo": True, "sigma": 0.2}
    assert command(*words(root, tmp_path / "out", "both", push_to_hub=True, **options)) == 0
    assert hub.repos["user/mine"].private
    files = hub.files("user/mine")
    assert set(files) - {".gitattributes"} == {"README.md", "config.json", "model.safetensors", "results/card.json"}
    psm = PSMModel.from_pretrained("user/mine", token=WRITER)
    assert psm.purifier is not None
    assert psm.mapper is not None
    card, facts = files["README.md"].decode(), json.loads(files["results/card.json"])
    assert facts == json.loads((tmp_path / "out" / "results" / "card.json").read_text())
    assert [step["stage"] for step in facts["training"]["steps"]] == ["purifier", "mapper"]
    for text in ("# mine", "- Images: `images`.", "`tower`", "--sigma 0.2", "purifier: 2 steps", "Not measured"):
        assert text in card
    for secret in (WRITER, str(root), str(tmp_path)):
        assert secret not in card + files["results/card.json"].decode()
    # What was trained has a card of its own without the Hub, too.
    assert write_card(tmp_path / "out") == ["new card"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_token": "hf_" + "x" * 34}, "the token is not valid (401)"),
        ({"hub_token": READER}, "this is forbidden to the token (403)"),
        ({"hub_model_id": "no spaces"}, "no spaces"),
    ],
)
def test_what_the_hub_refuses_is_said_before_the_first_step(options, message, hub, root, tmp_path, capsys):
    options = {"hub_model_id": "user/mine", "hub_token": WRITER} | options
    assert command(*words(root, tmp_path / "out", "both", push_to_hub=True, **options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert options["hub_token"] not in error
    assert not (tmp_path / "out").exists()
