"""What a repository must not do to its reader, and what an upload must not give away; models that do not belong together."""

import json
import logging
import pickle
import traceback

import pytest
import torch
from safetensors.torch import save_file
from stand_in_hub import READER, TOKENS, WRITER, StandInHub
from tiny_models import MEAN, STD, llava, psm_model, smoothed_tower, vision_model
from transformers import AutoConfig, AutoModel

from fs_psm_hf import PSMModel, SmoothedVisionTower, attach
from fs_psm_hf.hub import prepare_repo, push_folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with StandInHub() as hub:
        hub.connect(monkeypatch, tmp_path)
        yield hub


def files_of(model, folder, **options):
    model.save_pretrained(folder, **options)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Code -------------------------------------------------------------------------------------------------------------------


class Malicious:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", ["hub", "folder"])
@pytest.mark.parametrize("archive", ["plain", "torch"])
def test_no_pickle_runs(hub, tmp_path, place, archive, monkeypatch):
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
    trap = tmp_path / "trap"
    files = files_of(psm_model(), tmp_path / "saved")
    del files["model.safetensors"]
    (tmp_path / "saved" / "model.safetensors").unlink()
    weights = tmp_path / "saved" / "pytorch_model.bin"
    if archive == "torch":
        torch.save({"a": Malicious(trap)}, weights)
    else:
        weights.write_bytes(pickle.dumps(Malicious(trap)))
    hub.write("user/psm", files | {"pytorch_model.bin": weights.read_bytes()})
    name = "user/psm" if place == "hub" else tmp_path / "saved"
    with pytest.raises(ValueError, match="holds weights that would run code when they are read"):
        PSMModel.from_pretrained(name)
    with pytest.raises(ValueError, match="`weights_only` must be True, got False"):
        PSMModel.from_pretrained(name, weights_only=False)
    assert not trap.exists()


def test_no_code_of_a_repository_runs_unasked(hub, tmp_path):
    trap = tmp_path / "trap"
    code = f"open({str(trap)!r}, 'w')\n"
    for name, model, config in (
        ("tower", smoothed_tower(psm=psm_model()), "SmoothedVisionTowerConfig"),
        ("psm", psm_model(), "PSMConfig"),
    ):
        files = files_of(model, tmp_path / name)
        settings = json.loads(files["config.json"])
        settings["auto_map"] = {"AutoConfig": f"evil.{config}", "AutoModel": f"evil.{type(model).__name__}"}
        if name == "tower":
            settings["vision_config"]["auto_map"] = {"AutoModel": "user/tower--evil.Evil"}
            settings["psm_config"]["auto_map"] = {"AutoModel": "user/tower--evil.Evil"}
        hub.write(f"user/{name}", files | {"config.json": json.dumps(settings).encode(), "evil.py": code.encode()})
        for load in (AutoModel, type(model)):
            assert type(load.from_pretrained(f"user/{name}")) is type(model)
        assert type(AutoConfig.from_pretrained(f"user/{name}")).__module__ == "fs_psm_hf.configuration_fs_psm"
    assert not any("evil.py" in request for request in hub.requests)
    assert not trap.exists()


def test_a_configuration_names_classes_of_transformers_only(hub, tmp_path):
    files = files_of(smoothed_tower(), tmp_path / "tower")
    for name in ("os.system", "logging", "pipeline"):
        config = json.loads(files["config.json"]) | {"vision_architecture": name}
        hub.write("user/tower", files | {"config.json": json.dumps(config).encode()})
        with pytest.raises(ValueError, match="`vision_architecture` must be a model class of transformers"):
            SmoothedVisionTower.from_pretrained("user/tower")


# File names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../../../secret.safetensors", "/{folder}/secret.safetensors", "..\\secret.safetensors"]
)
@pytest.mark.parametrize("place", ["hub", "folder"])
def test_file_names_do_not_lead_out_of_the_folder(hub, tmp_path, name, place):
    name = name.replace("/{folder}", str(tmp_path))
    files = files_of(psm_model(), tmp_path / "deep" / "saved", max_shard_size="40KB")
    index = json.loads(files["model.safetensors.index.json"])
    first = min(index["weight_map"].values())
    (tmp_path / "secret.safetensors").write_bytes(files[first])
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    (tmp_path / "deep" / "saved" / "model.safetensors.index.json").write_bytes(files["model.safetensors.index.json"])
    hub.write("user/psm", files | {name: files[first]})
    before = sorted(path for path in tmp_path.glob("*") if path.name != "cache")
    with pytest.raises((OSError, ValueError)):  # noqa: PT011 (huggingface_hub's or ours)
        PSMModel.from_pretrained("user/psm" if place == "hub" else tmp_path / "deep" / "saved")
    assert sorted(path for path in tmp_path.glob("*") if path.name != "cache") == before
    outside = [path for path in (tmp_path / "cache").rglob("*secret*") if "snapshots" not in path.parts]
    assert not outside


def test_a_local_index_is_named(tmp_path):
    psm_model().save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": dict.fromkeys(index["weight_map"], "../x.safetensors")}))
    with pytest.raises(
        ValueError, match=r"`model.safetensors.index.json` of .* must name files of its own folder, got '../x"
    ):
        PSMModel.from_pretrained(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must be JSON with a `weight_map`"):
        PSMModel.from_pretrained(tmp_path)


# Tokens -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def everything_said(caplog):
    """Every log line of the libraries, debug included."""
    loggers = [
        logging.getLogger(name) for name in ("transformers", "huggingface_hub", "fs_psm_hf", "httpx2", "httpcore2")
    ]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.propagate = True
        logger.setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    yield caplog
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate


def test_tokens_appear_nowhere(hub, tmp_path, everything_said, capfd):
    said = []

    def attempt(action):
        try:
            action()
        except (OSError, ValueError) as error:
            said.append("".join(traceback.format_exception(error)))

    psm_model().save_pretrained(tmp_path / "psm")
    (tmp_path / "psm" / "README.md").write_text("# Ours\n")
    bad = "hf_" + "Z" * 34
    for token in (WRITER, READER, bad, WRITER + "\n", WRITER + "é", f"{WRITER} x"):
        attempt(lambda token=token: prepare_repo("user/psm", token, private=True))
        attempt(lambda token=token: push_folder(tmp_path / "psm", "user/psm", token=token))
        attempt(lambda token=token: PSMModel.from_pretrained("user/psm", token=token))
        for kind in ("status", "cut"):
            hub.fault("/preupload/|/config.json", kind)
            attempt(lambda token=token: push_folder(tmp_path / "psm", "user/psm", token=token))
            attempt(
                lambda token=token: PSMModel.from_pretrained("user/psm", token=token, cache_dir=tmp_path / "other")
            )
            hub.faults.clear()
    assert len(said) > 20
    model = PSMModel.from_pretrained("user/psm", token=READER)
    model.save_pretrained(tmp_path / "again")
    model.push_to_hub("user/again", token=WRITER)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    written += [
        content for repo in hub.repos.values() for commit in repo.commits.values() for content in commit.files.values()
    ]
    output = capfd.readouterr()
    text = "\n".join([*said, everything_said.text, output.out, output.err])
    for token in (*TOKENS, bad):
        assert token not in text
        assert not any(token.encode() in content for content in written)
    assert {token for place, token in hub.tokens_seen if place == "storage"} == {None}
    assert {token for place, token in hub.tokens_seen if place == "api"} >= {WRITER, READER, bad}


# Models that do not belong together -------------------------------------------------------------------------------------


def test_the_wrong_kind_of_repository(hub, tmp_path):
    host = llava()
    hub.write("user/clip", files_of(vision_model(), tmp_path / "clip"))
    hub.write("user/plain-llava", files_of(host, tmp_path / "plain"))
    hub.write("user/tower", files_of(smoothed_tower(psm=psm_model()), tmp_path / "tower"))
    hub.write("user/psm", files_of(psm_model(), tmp_path / "psm"))
    attach(host, psm_model(), image_mean=MEAN, image_std=STD)
    hub.write("user/llava", files_of(host, tmp_path / "llava"))
    for cls, repo, words in (
        (
            SmoothedVisionTower,
            "user/clip",
            "does not fit SmoothedVisionTower: got 'clip_vision_model', a model that is not",
        ),
        (SmoothedVisionTower, "user/plain-llava", "got 'llava', a model that is not smoothed.*`attach"),
        (SmoothedVisionTower, "user/llava", "got 'llava', a host whose tower is smoothed already"),
        (SmoothedVisionTower, "user/psm", "got 'fs_psm', a purifier and mapper alone: load it with `PSMModel"),
        (PSMModel, "user/tower", "does not fit PSMModel: got 'smoothed_vision_tower', a whole smoothed tower"),
        (PSMModel, "user/clip", "got 'clip_vision_model': to smooth it, load it with its own class and use"),
        (PSMModel, "user/llava", "got 'llava', a host whose tower is smoothed already"),
    ):
        with pytest.raises(ValueError, match=f"`{repo}` .*{words}") as error:
            cls.from_pretrained(repo)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("feature", ["tokens", "pooled"])
@pytest.mark.parametrize("kind", ["clip", "projection"])
def test_a_psm_of_another_width(hub, tmp_path, feature, kind):
    hub.write("user/psm", files_of(psm_model(feature=feature, width=64), tmp_path / "psm"))
    psm = PSMModel.from_pretrained("user/psm")
    width = 24 if (feature, kind) == ("pooled", "projection") else 32
    with pytest.raises(ValueError, match=rf"`mapper_config\['hidden_size'\]` must be {width}, the width.*got 64"):
        smoothed_tower(kind, psm)
    fitting = psm_model(feature=feature, width=width)
    assert smoothed_tower(kind, fitting)(torch.zeros(1, 3, 16, 16)) is not None


def named(model, name):
    model.config.name_or_path = name
    return model


@pytest.mark.parametrize(
    ("base", "tower", "host", "warned"),
    [
        ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", None, False),
        ("openai/clip-vit-large-patch14", "chs20/fare4-clip", None, True),
        ("openai/clip-vit-large-patch14", "mirror/clip-vit-large-patch14", None, True),
        ("openai/clip-vit-large-patch14", "/models/clip-vit-large-patch14/", None, False),
        ("openai/clip-vit-large-patch14", "/models/fare4", None, True),
        ("openai/clip", "/home/x/.cache/hub/models--openai--clip/snapshots/0123", None, False),
        ("openai/clip", "", None, False),
        (None, "openai/clip", None, False),
        ("model_cards/tiny-llava", "", "../../model_cards/tiny-llava", False),
        ("model_cards/tiny-llava", "", "/models/other-llava", True),
        ("model_cards/tiny-llava", "", "", False),
        ("openai/clip-vit-large-patch14-336", "", "llava-hf/llava-1.5-7b-hf", False),
        ("llava-hf/llava-1.5-7b-hf", "", "/models/llava-1.5-13b-hf", False),
        ("openai/clip-vit-large-patch14", "", "llava-hf/llava-1.5-7b-hf", True),
        ("llava-hf/llava-1.5-7b-hf", "chs20/fare4-clip", "llava-hf/llava-1.5-7b-hf", True),
    ],
)
def test_a_psm_of_another_base_of_the_same_width(base, tower, host, warned, caplog):
    psm = psm_model()
    psm.config.base_model_name_or_path = base
    settings = {"image_mean": MEAN, "image_std": STD}
    if host is None:
        SmoothedVisionTower.from_components(named(vision_model(), tower), psm, **settings)
    else:
        model = named(llava(), host)
        named(model.model.vision_tower, tower)
        attach(model, psm, **settings)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fs_psm_hf")]
    assert len(lines) == warned
    if warned:
        other = (tower or host).rstrip("/")
        assert lines[0].startswith(f"`psm` was trained for {base!r}, and this tower comes from {other!r}")


def test_a_base_is_remembered_across_the_hub(hub, tmp_path, caplog):
    psm = psm_model()
    psm.config.base_model_name_or_path = "user/clip"
    hub.write("user/psm", files_of(psm, tmp_path / "psm"))
    for name in ("clip", "robust"):
        hub.write(f"user/{name}", files_of(vision_model(), tmp_path / name))
    for name in ("clip", "robust"):
        tower = AutoModel.from_pretrained(f"user/{name}")
        SmoothedVisionTower.from_components(
            tower, PSMModel.from_pretrained("user/psm"), image_mean=MEAN, image_std=STD
        )
        assert ("'user/robust'" in caplog.text) is (name == "robust")
        assert ("'user/clip'" in caplog.text) is (name == "robust")
    # A saved tower is one thing: loading it compares nothing.
    caplog.clear()
    smoothed_tower(psm=psm).save_pretrained(tmp_path / "tower")
    AutoModel.from_pretrained(tmp_path / "tower")
    assert not caplog.records


def test_files_with_odd_names_load_no_more_than_they_hold(tmp_path):
    """Weights beside the model are not read because they lie there."""
    psm_model().save_pretrained(tmp_path)
    save_file({"mapper.other": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert PSMModel.from_pretrained(tmp_path) is not None
