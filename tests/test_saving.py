import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MEAN, STD, images, psm_model, smoothed_tower, vision_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from fs_psm_hf import PSMConfig, PSMModel, SmoothedVisionTower, SmoothedVisionTowerConfig


def output(tower):
    with torch.no_grad():
        return tower(images(), generator=3)


@pytest.mark.parametrize("kind", ["clip", "projection", "siglip", "dinov2"])
def test_a_tower_reloads_exactly_twice(kind, tmp_path):
    tower = smoothed_tower(kind, psm_model(mapper=False), num_samples=2)
    expected = output(tower)
    for round_trip in ("first", "second"):
        tower.save_pretrained(tmp_path / round_trip)
        tower = AutoModel.from_pretrained(tmp_path / round_trip)
        assert type(tower) is SmoothedVisionTower
        assert type(tower.vision_tower) is type(vision_model(kind))
        found = output(tower)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_settings_are_saved(tmp_path):
    options = {"sigma": 0.5, "num_samples": 7, "feature_layer": [-2, 1], "first_token": 1, "max_batch_size": 3}
    smoothed_tower(**options).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SmoothedVisionTowerConfig
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("feature", ["tokens", "pooled"])
def test_a_psm_reloads_exactly(feature, tmp_path):
    psm = psm_model(feature=feature)
    psm.mapper.set_reference_norm(3.5)
    psm.save_pretrained(tmp_path)
    for cls in (PSMModel, AutoModel):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is PSMModel
        fields = ("purifier", "purifier_config", "mapper_config", "mapper_feature")
        assert all(getattr(again.config, name) == getattr(psm.config, name) for name in fields)
        state = psm.state_dict()
        assert state.keys() == again.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    assert again.mapper.token_norm == 3.5


def test_dtype_is_honoured(tmp_path):
    smoothed_tower(psm=psm_model()).save_pretrained(tmp_path)
    tower = SmoothedVisionTower.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    assert output(tower).last_hidden_state.dtype == torch.bfloat16
    tower.save_pretrained(tmp_path / "half")
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize("tower_dtype", [torch.float32, torch.bfloat16])
def test_a_psm_of_another_dtype_follows_the_tower_and_reloads_exactly(tower_dtype, tmp_path):
    other = torch.bfloat16 if tower_dtype == torch.float32 else torch.float32
    tower = SmoothedVisionTower.from_components(
        vision_model().to(tower_dtype), psm_model().to(other), sigma=0.2, image_mean=MEAN, image_std=STD
    )
    assert {p.dtype for p in tower.parameters()} == {tower_dtype}
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(output(again).last_hidden_state, output(tower).last_hidden_state)


def test_own_purifiers_cannot_be_saved(tmp_path):
    class Mine(nn.Module):
        def denoise(self, images, sigma):
            return images

    with pytest.raises(ValueError, match="`Mine` is a purifier of yours"):
        smoothed_tower(psm=Mine()).save_pretrained(tmp_path / "tower")
    assert not (tmp_path / "tower").exists()


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_extra_weights_are_errors(tmp_path):
    psm_model().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.pop("mapper.blocks.0.scale"))
    with pytest.raises(ValueError, match="1 missing keys, such as 'mapper.blocks.0.scale'"):
        PSMModel.from_pretrained(tmp_path)
    psm_model().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.update({"mapper.other": torch.zeros(1)}))
    with pytest.raises(ValueError, match="1 unexpected keys, such as 'mapper.other'"):
        PSMModel.from_pretrained(tmp_path)
    psm_model().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.update({"mapper.blocks.0.scale": torch.zeros(5)}))
    with pytest.raises(ValueError, match="1 mismatched keys, such as 'mapper.blocks.0.scale'"):
        PSMModel.from_pretrained(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    psm_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged safetensors file"):
        PSMModel.from_pretrained(tmp_path)


def test_another_kind_of_checkpoint_is_named(tmp_path):
    vision_model().save_pretrained(tmp_path)
    for cls in (SmoothedVisionTower, PSMModel):
        with pytest.raises(ValueError, match="got 'clip_vision_model'.*from_components"):
            cls.from_pretrained(tmp_path)


def test_an_unknown_purifier_in_a_file_is_named(tmp_path):
    psm_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"purifier": "gan"}))
    with pytest.raises(ValueError, match="`purifier` must be one of none, diffusion, unet, got 'gan'"):
        PSMModel.from_pretrained(tmp_path)


def test_auto_classes_know_the_models():
    assert type(AutoModel.from_config(PSMConfig())) is PSMModel
    assert AutoConfig.for_model("smoothed_vision_tower", image_mean=[0, 0, 0]).sigma == 0.25
    with pytest.raises(ValueError, match="SmoothedVisionTowerConfig"):
        AutoModelForImageTextToText.from_config(SmoothedVisionTowerConfig())


REMOTE = """
import sys, torch
sys.modules["fs_psm_hf"] = None  # not installed
from transformers import AutoModel
tower = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
pixels = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(tower(pixels, generator=3).last_hidden_state, sys.argv[3])
"""


def test_remote_code_runs_without_the_package(tmp_path):
    """A fresh process in which `import fs_psm_hf` fails loads the exported tower."""
    tower = smoothed_tower(psm=psm_model(), num_samples=2)
    SmoothedVisionTowerConfig.register_for_auto_class()
    SmoothedVisionTower.register_for_auto_class("AutoModel")
    try:
        tower.save_pretrained(tmp_path / "tower")
    finally:
        SmoothedVisionTower._auto_class = SmoothedVisionTowerConfig._auto_class = None
    torch.save(images(), tmp_path / "pixels.pt")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", REMOTE, *(str(tmp_path / name) for name in ("tower", "pixels.pt", "out.pt"))]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(found, output(tower).last_hidden_state, rtol=1e-5, atol=1e-6)
