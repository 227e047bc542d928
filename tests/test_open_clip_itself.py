"""The converter against open_clip itself, which is not among the requirements: without it this file is skipped.

open_clip imports torchvision, and a torchvision that does not match torch breaks `import transformers`; so it gets an
environment of its own, with the versions of `constraints.txt` and the torchvision that belongs to its torch:

    python -m venv open-clip && open-clip/bin/pip install -c constraints.txt -e '.[test]'
    open-clip/bin/pip install --no-deps torchvision==0.28.0 open_clip_torch==3.3.0 timm ftfy wcwidth
    open-clip/bin/python -m pytest tests/test_open_clip_itself.py

`--no-deps` keeps pip from replacing a CPU build of torch by one for CUDA. PyPI's torchvision is built for CUDA; beside a
CPU build of torch it does not import until two operators are declared, which is done here.
"""

import importlib.util
import sys

import pytest
import torch
from original_open_clip import Visual


if importlib.util.find_spec("open_clip") is None:
    pytest.skip("open_clip is not installed", allow_module_level=True)
try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import numpy as np
import open_clip
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from fs_psm_hf.conversion_open_clip import (
    convert_open_clip,
    convert_open_clip_checkpoint,
    load_open_clip_checkpoint,
)


TEXT = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}


def build(net, kind=CLIP):
    """open_clip's CLIP with a visual like `net` and the weights of `net.state()`, in evaluation mode."""
    vision = CLIPVisionCfg(
        layers=net.layers, width=net.width, head_width=net.width // net.heads, mlp_ratio=net.mlp / net.width,
        patch_size=net.patch, image_size=net.size, output_tokens=True,
    )  # fmt: skip
    clip = kind(net.embed, vision, CLIPTextCfg(**TEXT), quick_gelu=net.quick).double().eval()
    clip.visual.load_state_dict(net.state())  # strict: the restatement's keys are open_clip's
    return clip


def compare(visual, model, images):
    """Largest difference of embeddings, of class and patch tokens after the last LayerNorm, and of every layer's output."""
    states = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: states.append(output))
        for block in visual.transformer.resblocks
    ]
    with torch.no_grad():
        embeds, tokens = visual(images)
        found = model(images, output_hidden_states=True)
        patches = model.vision_model.post_layernorm(found.last_hidden_state)[:, 1:]
    for hook in hooks:
        hook.remove()
    assert len(states) == len(found.hidden_states) - 1
    pairs = [(embeds, found.image_embeds), (tokens, patches), *zip(states, found.hidden_states[1:], strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs)


NETWORKS = {
    "one head": Visual(),
    "several heads": Visual(heads=4),
    "GELU": Visual(heads=2, quick=False),
    "wide heads, as in ViT-H": Visual(width=80, heads=1),
    "28 px": Visual(heads=2, patch=14, grid=2),
    "42 px, twelve layers": Visual(heads=2, patch=7, grid=6, layers=12),
}


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
def test_the_function_is_open_clips(net, kind):
    clip = build(net, kind)
    model = convert_open_clip(clip.state_dict(), **net.options)
    images = torch.randn(2, 3, net.size, net.size, dtype=torch.float64)
    difference = compare(clip.visual, model, images)
    print("largest difference:", difference)
    assert difference < 1e-10
    embeds, tokens = clip.visual(images)
    assert embeds.std() > 0.1
    # The restatement that the other tests hold the converter against.
    expected = net.run(net.state(), images)[2]
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-10)


def test_position_embeddings_are_resampled_as_open_clip_does():
    for old, new in ((3, 5), (5, 3), (4, 6)):
        net, other = Visual(grid=old), Visual(grid=new)
        state = {f"visual.{key}": value for key, value in net.state().items()}
        model = convert_open_clip(state, **net.options, image_size=other.size)
        clip = build(other)
        open_clip.model.resize_pos_embed(state, clip)
        clip.visual.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
        assert compare(clip.visual, model, torch.randn(2, 3, other.size, other.size, dtype=torch.float64)) < 1e-10


def test_images_are_prepared_as_open_clip_does(tmp_path):
    net = Visual(grid=8)
    torch.save(net.state(torch.float32), tmp_path / "x.pt")
    folder = convert_open_clip_checkpoint(tmp_path / "x.pt", tmp_path / "out")
    prepare = open_clip.image_transform(net.size, is_train=False)
    # Beside torchvision, transformers' default resizes tensors, and is a grey level off here and there.
    kinds = ((CLIPImageProcessorPil, 2e-6), (AutoImageProcessor, 1.01 / 255 / 0.26))
    # Where an odd number of rows is cut off, the two leave the odd one at different ends.
    for height, width in ((40, 50), (32, 32), (64, 34)):
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        for kind, tolerance in kinds:
            found = kind.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"][0]
            print(kind.__name__, height, width, "largest difference:", (found - prepare(image)).abs().max().item())
            torch.testing.assert_close(found, prepare(image), rtol=0, atol=tolerance)


@pytest.mark.slow
def test_the_published_network_at_full_size(tmp_path):
    """FARE's network with weights from a seed: as a file of its visual only, the way FARE is published."""
    clip = open_clip.create_model("ViT-L-14", pretrained=None, force_quick_gelu=True).eval()
    visual = clip.visual
    del clip
    assert sum(weight.numel() for weight in visual.parameters()) == 303_966_208
    torch.save(visual.state_dict(), tmp_path / "fare.pt")
    model = convert_open_clip(load_open_clip_checkpoint(tmp_path / "fare.pt"))
    visual.output_tokens = True
    difference = compare(visual, model, torch.randn(1, 3, 224, 224))
    print("largest difference in float32:", difference)
    assert difference < 1e-3
