"""`examples/plug_into_openflamingo.py` on a tiny OpenFlamingo: the code path of the 9B one, folders for Hub ids."""

import importlib.util
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from flamingo_models import flamingo
from PIL import Image
from test_flamingo import patch_psm


EXAMPLE = Path(__file__).parents[2] / "examples" / "plug_into_openflamingo.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("plug_into_openflamingo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(language_models, tmp_path):
    """Those of a tiny MPT, as the 9B one has, with a checkpoint as the authors' training code writes it."""
    host, _, _ = flamingo(language_models / "mpt")
    trained = {name for name, weight in host.named_parameters() if weight.requires_grad}
    state = {name: value for name, value in host.state_dict().items() if name in trained}
    assert any("blocks.0.gated_cross_attn_layer." in name for name in state)
    torch.save(state, tmp_path / "checkpoint.pt")
    patch_psm().save_pretrained(tmp_path / "psm")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return {
        "--vision-encoder": "tiny-quickgelu",
        "--vision-weights": "none",
        "--vision-config": language_models / "tiny-quickgelu.json",
        "--language-model": language_models / "mpt",
        "--cross-attn-every-n-layers": 1,
        "--checkpoint": tmp_path / "checkpoint.pt",
        "--psm": tmp_path / "psm",
        "--image": tmp_path / "photo.png",
        "--max-new-tokens": 4,
        "--certify": 200,
    }


def run(example, arguments):
    example.main([str(part) for pair in arguments.items() for part in pair])


def test_it_captions_before_and_after_and_certifies(example, arguments, capsys):
    run(example, arguments)
    printed = capsys.readouterr().out
    assert "plain:" in printed
    assert "smoothed:" in printed
    assert "for cosine >= 0.5; cosine" in printed
    # Without noise and PSM it says the same twice.
    run(example, arguments | {"--psm": "none", "--sigma": 0, "--num-samples": 1, "--certify": 0})
    lines = capsys.readouterr().out.splitlines()
    plain, smoothed = (
        next(line for line in lines if line.startswith(name)).split(":", 1)[1].strip()
        for name in ("plain", "smoothed")
    )
    assert plain == smoothed


def test_it_starts_from_the_right_network(example):
    """The published weights are OpenAI's, which have QuickGELU; open_clip has that under this name alone."""
    args = example.parse(["--image", "photo.png"])
    assert open_clip.get_model_config(args.vision_encoder)["quick_gelu"] is True
    assert not open_clip.get_model_config("ViT-L-14").get("quick_gelu")
    assert (args.vision_weights, args.cross_attn_every_n_layers) == ("openai", 4)
    assert open_clip.get_pretrained_cfg(args.vision_encoder, args.vision_weights)


def test_it_tells_of_the_wrong_network(example, arguments, caplog, tmp_path, language_models):
    from open_clip import create_model

    weights = tmp_path / "fare.pt"
    torch.save(create_model("tiny").state_dict(), weights)
    wrong = {"--vision-encoder": "tiny", "--vision-config": language_models / "tiny.json", "--vision-weights": weights}
    run(example, arguments | wrong | {"--certify": 0})
    assert "weights that go back to OpenAI's" in caplog.text


@pytest.mark.parametrize("change", ["left over", "missing"])
def test_a_checkpoint_of_another_model_is_refused(example, arguments, change):
    state = torch.load(arguments["--checkpoint"], weights_only=True)
    if change == "missing":
        del state["perceiver.latents"]
    else:
        state["perceiver.other"] = torch.zeros(1)
    torch.save(state, arguments["--checkpoint"])
    with pytest.raises(SystemExit, match=f"does not fit: 1 weights are {change}, perceiver"):
        run(example, arguments)
