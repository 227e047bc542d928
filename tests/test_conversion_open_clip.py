"""The converter against a restatement of open_clip's visual that reads the original keys."""

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from original_open_clip import TYPED_L14, TYPED_L14_BLOCK, Visual, in_open_clip_layout, typed, whole_clip
from PIL import Image
from safetensors.torch import save_file
from tiny_models import images
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from fs_psm_hf import SmoothedVisionTower
from fs_psm_hf.cli import main
from fs_psm_hf.conversion_open_clip import (
    convert_open_clip,
    convert_open_clip_checkpoint,
    load_open_clip_checkpoint,
)
from fs_psm_hf.inputs import load_tower


ROOT = Path(__file__).parents[1]
BASE = Visual()
VISUALS = {
    "one head": BASE,
    "several heads": replace(BASE, heads=4),
    "heads of 64": replace(BASE, width=128, heads=2, layers=2),
    "no projection": replace(BASE, heads=2, embed=None),
    "embedding as wide as the network": replace(BASE, embed=64),
    "GELU": replace(BASE, heads=2, quick=False),
    "a single layer": replace(BASE, layers=1),
    "twelve layers": replace(BASE, width=32, heads=2, layers=12),
    "28 px": replace(BASE, heads=2, patch=14, grid=2),
    "42 px": replace(BASE, heads=2, patch=7, grid=6),
    "one patch": replace(BASE, grid=1),
}


def pixels(net, dtype=torch.float64):
    return images(2, net.size).to(dtype)


def outputs(model, x):
    """(hidden states, pooled tokens, embeddings), whether the model projects or not."""
    with torch.no_grad():
        out = getattr(model, "vision_model", model)(x, output_hidden_states=True)
        embeds = model(x).image_embeds if hasattr(model, "visual_projection") else None
    return out.hidden_states, out.pooler_output, embeds


def largest_difference(net, model, state, x=None):
    """Over everything the network computes; layer -2 without the last LayerNorm, as LLaVA reads it, is among it."""
    x = pixels(net) if x is None else x
    expected, found = net.run(state, x), outputs(model, x)
    assert len(expected[0]) == len(found[0]) == net.layers + 1
    pairs = [*zip(expected[0], found[0], strict=True), *zip(expected[1:], found[1:], strict=True)]
    assert all((a is None) == (b is None) for a, b in pairs)
    return max((a - b).abs().max().item() for a, b in pairs if a is not None)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("net", VISUALS.values(), ids=VISUALS)
def test_the_function_is_the_same(net, kernel):
    state = net.state()
    model = convert_open_clip(state, **net.options)
    assert type(model) is (CLIPVisionModel if net.embed is None else CLIPVisionModelWithProjection)
    model.set_attn_implementation(kernel)
    assert net.run(state, pixels(net))[1].std() > 0.3
    # transformers' eager attention takes its softmax in float32, whatever the dtype.
    assert largest_difference(net, model, state) < (1e-10 if kernel == "sdpa" else 1e-5)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_the_options_change():
    net = replace(BASE, heads=2)
    state = net.state()
    for wrong in ({"num_heads": 1}, {"hidden_act": "gelu"}):
        assert largest_difference(net, convert_open_clip(state, **net.options | wrong), state) > 1e-3
    assert convert_open_clip(state).config.num_attention_heads == 1  # heads of 64 channels
    without = convert_open_clip(state, **net.options, projection=False)
    assert type(without) is CLIPVisionModel
    assert (
        largest_difference(replace(net, embed=None), without, {k: v for k, v in state.items() if k != "proj"}) < 1e-10
    )


def test_the_published_shapes():
    shapes = typed(TYPED_L14)
    for layer in range(24):
        shapes |= typed(TYPED_L14_BLOCK, f"transformer.resblocks.{layer}.")
    net = Visual(1024, 16, 24, 14, 16, 4096, 768)
    assert shapes == net.shapes()  # the restatement has the same keys
    assert sum(map(math.prod, shapes.values())) == 303_966_208
    for grid, size, more in ((16, 224, 0), (24, 336, (577 - 257) * 1024)):
        shapes["positional_embedding"] = (1 + grid**2, 1024)
        model = convert_open_clip({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
        assert sum(weight.numel() for weight in model.parameters()) == 303_966_208 + more
        assert all(weight.is_meta for weight in model.parameters())
        config = model.config
        assert (config.image_size, config.patch_size, config.num_attention_heads) == (size, 14, 16)
        assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (1024, 4096, 24)
        assert (config.projection_dim, config.hidden_act, config.layer_norm_eps) == (768, "quick_gelu", 1e-5)
        assert model.vision_model.embeddings.position_ids.shape == (1, 1 + grid**2)


def test_nothing_is_copied_but_what_is_joined(tmp_path):
    torch.save(BASE.state(torch.float32), tmp_path / "x.pt")
    state = load_open_clip_checkpoint(tmp_path / "x.pt")
    draws = torch.random.get_rng_state()
    model = convert_open_clip(state)
    assert torch.equal(torch.random.get_rng_state(), draws)
    spans = [(weight.data_ptr(), weight.data_ptr() + weight.nbytes) for weight in model.parameters()]
    assert all(end <= start for (_, end), (start, _) in pairwise(sorted(spans)))
    stored = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    copied = {name for name, w in model.named_parameters() if w.untyped_storage().data_ptr() not in stored}
    joined = (".q_proj.", ".k_proj.", ".v_proj.", "visual_projection.")
    assert copied == {name for name, _ in model.named_parameters() if any(part in f".{name}" for part in joined)}


def test_position_embeddings_are_resampled_when_asked():
    """Against PyTorch's own image resizing in another layout, and against what resampling must keep."""
    net, larger = replace(BASE, grid=3), replace(BASE, grid=5)
    state = net.state()
    assert convert_open_clip(state, image_size=12).config.image_size == 12
    assert torch.equal(
        convert_open_clip(state, image_size=12).vision_model.embeddings.position_embedding.weight,
        state["positional_embedding"],
    )
    model = convert_open_clip(state, image_size=20)
    found = model.vision_model.embeddings.position_embedding.weight.detach()
    resized = resampling_matrix(3, 5)
    patches = torch.einsum("ai,bj,ijc->abc", resized, resized, state["positional_embedding"][1:].view(3, 3, 64))
    expected = torch.cat([state["positional_embedding"][:1], patches.reshape(25, 64)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    state = state | {"positional_embedding": expected}
    assert largest_difference(larger, model, state) < 1e-10
    smaller = convert_open_clip(state, image_size=8).vision_model.embeddings.position_embedding.weight.detach()
    shrunk = resampling_matrix(5, 2)
    patches = torch.einsum("ai,bj,ijc->abc", shrunk, shrunk, expected[1:].view(5, 5, 64))
    torch.testing.assert_close(smaller[1:], patches.reshape(4, 64), rtol=0, atol=1e-12)
    half = convert_open_clip({key: value.half() for key, value in state.items()}, image_size=8)
    assert half.dtype == torch.float16
    difference = half.vision_model.embeddings.position_embedding.weight.detach() - smaller
    assert difference.abs().max() < 2e-3


def resampling_matrix(old, new):
    """Bicubic (a = -0.5) weights of `old` values in each of `new`, widened where it shrinks, so that nothing aliases."""
    scale = max(1, old / new)
    rows = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        center = (row + 0.5) * old / new
        for column in range(old):
            x = abs(column + 0.5 - center) / scale
            if x < 1:
                rows[row, column] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                rows[row, column] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return rows / rows.sum(1, keepdim=True)


def test_a_trained_clip_comes_back_bit_for_bit():
    """The embedded CLIP, its vision part written in open_clip's layout by hand."""
    clip = CLIPModel.from_pretrained(ROOT / "model_cards" / "tiny-clip-cifar10")
    visual = in_open_clip_layout(clip.vision_model) | {"proj": clip.visual_projection.weight.detach().T.clone()}
    heads = clip.config.vision_config.num_attention_heads
    model = convert_open_clip(visual, num_heads=heads)
    expected = {key: w for key, w in clip.state_dict().items() if key.startswith(("vision_model.", "visual_"))}
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, expected[key]) for key, weight in model.state_dict().items())
    x = images(2, 32)
    with torch.no_grad():
        assert torch.equal(model(x).image_embeds, clip.get_image_features(x).pooler_output)


STATE = BASE.state(torch.float32)
MODULE = {f"module.{key}": value for key, value in STATE.items()}
TRAINED = {
    "epoch": 2,
    "name": "run",
    "optimizer": {"state": {0: {"step": torch.ones(3)}}},
    "best_acc1": torch.tensor(50.0),
}
EMPTY_PROMPTS = {"state_dict": {}, "add_prompter": {"prompt": torch.zeros(1, 0, 768)}}
ACCEPTED = {
    "a visual": STATE,
    "a whole CLIP": whole_clip(STATE),
    "a whole CLIP of its own text class": whole_clip(STATE, "text.", logit_bias=torch.zeros(())),
    "OpenAI's whole CLIP": whole_clip(STATE, input_resolution=torch.tensor(16), context_length=torch.tensor(77)),
    "DataParallel": MODULE,
    "open_clip's training": {"state_dict": {f"module.{k}": v for k, v in whole_clip(STATE).items()}} | TRAINED,
    "the original TeCoA": {"vision_encoder_state_dict": STATE} | EMPTY_PROMPTS | TRAINED,
}


@pytest.mark.parametrize("held", ACCEPTED.values(), ids=ACCEPTED)
def test_what_a_file_may_hold(held, tmp_path):
    torch.save(held, tmp_path / "x.pt")
    model = convert_open_clip(load_open_clip_checkpoint(tmp_path / "x.pt"))
    expected = convert_open_clip(STATE).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[key]) for key, weight in model.state_dict().items())


def fs_psm(monkeypatch, *arguments):
    """Exit code of `fs-psm convert open-clip` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["fs-psm", "convert", "open-clip", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_command_writes_a_folder_that_reloads_exactly(suffix, monkeypatch, capsys, tmp_path):
    checkpoint, output = tmp_path / f"fare.{suffix}", tmp_path / "new" / "fare"
    (save_file if suffix == "safetensors" else torch.save)(whole_clip(STATE), checkpoint)
    assert fs_psm(monkeypatch, "--checkpoint", checkpoint, "--output", output) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert [path.name for path in output.parent.iterdir()] == ["fare"]
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert not any(str(tmp_path) in path.read_text() for path in output.glob("*.json"))
    written = json.loads((output / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "CLIPImageProcessor"  # also where torchvision is installed

    loaded, info = CLIPVisionModelWithProjection.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    expected = convert_open_clip(STATE)
    assert all(torch.equal(w, expected.state_dict()[key]) for key, w in loaded.state_dict().items())
    x = pixels(BASE, torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(x).image_embeds, expected(x).image_embeds)
        assert torch.equal(AutoModel.from_pretrained(output)(x).last_hidden_state, expected(x).last_hidden_state)
    config = loaded.config
    assert (config.projection_dim, config.hidden_act, config.image_size, config.dtype) == (
        24,
        "quick_gelu",
        16,
        torch.float32,
    )
    tower, processor = load_tower(str(output), sigma=0.2, num_samples=2)
    assert type(tower.vision_tower) is CLIPVisionModelWithProjection
    # Resized so that the shorter side fits, centre cropped, normalised with OpenAI's statistics.
    image = Image.fromarray(np.full((20, 40, 3), 128, dtype=np.uint8))
    found = processor(images=image, return_tensors="pt")["pixel_values"]
    assert found.shape == (1, 3, 16, 16)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    color = (128 / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(found, color.view(1, 3, 1, 1).expand(1, 3, 16, 16), rtol=0, atol=1e-6)
    assert tower.config.image_mean == mean


def test_the_command_has_options(monkeypatch, capsys, tmp_path):
    assert fs_psm(monkeypatch, "--help") == 0
    assert "ViT-H, -g, -bigG and -e have 16" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    net = replace(BASE, heads=4, quick=False)
    torch.save(net.state(torch.float32), tmp_path / "x.pt")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    options = ["--num-heads", 4, "--hidden-act", "gelu", "--image-size", 24, "--no-projection", "--dtype", "bfloat16"]
    assert fs_psm(monkeypatch, "--checkpoint", tmp_path / "x.pt", "--output", tmp_path / "out", *options) == 0
    model = CLIPVisionModel.from_pretrained(tmp_path / "out")
    assert (model.config.num_attention_heads, model.config.hidden_act, model.config.image_size) == (4, "gelu", 24)
    assert (model.dtype, model.config.architectures) == (torch.bfloat16, ["CLIPVisionModel"])
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size["height"] == 24


def test_dtypes():
    # OpenAI's own files hold float16, but LayerNorms and embeddings in float32.
    mixed = {k: v if "ln_" in k or "embedding" in k else v.half() for k, v in STATE.items()}
    with pytest.raises(TypeError, match="of one type unless `dtype` is given, got torch.float16, torch.float32"):
        convert_open_clip(mixed)
    model = convert_open_clip(mixed, dtype=torch.float32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    with pytest.raises(TypeError, match="must hold floating-point tensors"):
        convert_open_clip({key: value.int() for key, value in STATE.items()})


@pytest.mark.parametrize("projection", [True, False])
def test_a_smoothed_tower_keeps_its_promise(projection, tmp_path):
    torch.save(STATE, tmp_path / "x.pt")
    convert_open_clip_checkpoint(tmp_path / "x.pt", tmp_path / "fare", projection=projection)
    kind = CLIPVisionModelWithProjection if projection else CLIPVisionModel
    model, processor = kind.from_pretrained(tmp_path / "fare"), AutoImageProcessor.from_pretrained(tmp_path / "fare")
    x = pixels(BASE, torch.float32)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True)
        tower = SmoothedVisionTower.from_components(model, None, sigma=0, num_samples=1, processor=processor)
        found = tower(x, output_hidden_states=True)
        assert found.keys() == expected.keys()
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))
        tower = SmoothedVisionTower.from_components(model, None, sigma=1e-6, num_samples=2, processor=processor)
        # A fixed draw: values as large as 16 answer some draws of this noise with more than 1e-4.
        torch.testing.assert_close(tower(x, generator=0)[0], expected[0], rtol=0, atol=1e-4)
