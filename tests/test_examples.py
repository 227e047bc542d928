import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import MEAN, SIZE, STD, psm_model, vision_model
from torch import nn
from transformers import CLIPImageProcessorPil

from fs_psm_hf import PSMModel, SmoothedVisionTower
from fs_psm_hf.certification import draw_scores
from fs_psm_hf.certification.folder import image_name, read_image
from fs_psm_hf.certification.saved import load_draws


ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    """Standard output of an example, run as its docstring says."""
    command = [sys.executable, f"examples/{script}", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def save_tower(folder):
    vision_model("dinov2").save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 20, 24, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


def save_ffdnet(folder):
    """The file layout of the published FFDNet: 3x3 convolutions named model.0, model.2, …"""
    torch.manual_seed(0)
    layers = [nn.Conv2d(13, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 3)]
    state = {
        f"model.{2 * i}.{name}": value for i, layer in enumerate(layers) for name, value in layer.state_dict().items()
    }
    save_file(state, folder / "ffdnet.safetensors")


def test_own_purifier(tmp_path):
    save_tower(tmp_path)
    save_ffdnet(tmp_path)
    options = ["--vision-tower", tmp_path, "--ffdnet", tmp_path / "ffdnet.safetensors", "--image", tmp_path / "0.png"]
    printed = run("own_purifier.py", *options, "--num-samples", 200)
    assert "FFDNet: PSNR" in printed
    assert "with FFDNet: mean cosine" in printed


def test_certify_folder(tmp_path):
    save_tower(tmp_path)
    printed = run("certify_folder.py", "--vision-tower", tmp_path, "--images", tmp_path, "--num-samples", 200)
    assert "not a certificate" in printed
    assert "null level" in printed


def test_plug_into_llava(tmp_path):
    save_tower(tmp_path)
    printed = run("plug_into_llava.py", "--image", tmp_path / "0.png", "--certify", 200, "--save", tmp_path / "saved")
    assert "plain:    a photo of" in printed
    assert "smoothed: a photo of" in printed
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_scores_of_shared_passes_are_those_of_each_tower_alone(tmp_path):
    """`psm_scores.py` runs purifier and tower once for two rows; each row is what certification draws from its tower."""
    save_tower(tmp_path)
    psm_model().save_pretrained(tmp_path / "psm")
    options = ["--tower", tmp_path, "--images", tmp_path, "--sigma", 0.3, "--num-samples", 70, "--dtype", "float32"]
    psm = tmp_path / "psm"
    run("benchmarks/psm_scores.py", *options, "--purifier", psm, "--mapper", psm, "--output", tmp_path / "scores")
    save_ffdnet(tmp_path)
    ffdnet = f"ffdnet:{tmp_path / 'ffdnet.safetensors'}"
    run("benchmarks/psm_scores.py", *options, "--purifier", ffdnet, "--output", tmp_path / "scores")
    assert len(load_draws(tmp_path / "scores" / "FS+FFDNet-sigma0.3")) == 2
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    for row, mapper in (("FS+P", False), ("FS+P+M", True)):
        own = PSMModel.from_pretrained(psm)
        if not mapper:
            own.mapper = own.config.mapper_config = None
        tower = SmoothedVisionTower.from_components(vision_model("dinov2"), own, sigma=0.3, processor=processor)
        for saved in load_draws(tmp_path / "scores" / f"{row}-sigma0.3"):
            pixels = read_image(tmp_path / saved.facts["file"], processor)
            names = [image_name(saved.facts["file"])]
            (draws,) = draw_scores(tower, pixels, feature="cls", generator=0, image_ids=names)
            np.testing.assert_allclose(saved.take(70), draws.take(70), atol=1e-6)
