"""Networks that diffusers' `UNet2DModel` cannot express: how they are built, converted and saved."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor
from original_unet import Original, run_both
from tiny_models import smoothed_tower

from fs_psm_hf import PSMConfig, PSMModel
from fs_psm_hf.certification.identity import model_hash
from fs_psm_hf.conversion import convert_guided_diffusion, convert_guided_diffusion_checkpoint
from fs_psm_hf.purifier import build_purifier
from fs_psm_hf.unet import ExtendedUNet2DModel


HEADS = Original(mult=(1, 2, 3), attention=(2, 4), heads=4)
NARROW = Original(channels=64, mult=(0.5, 1, 2), attention=(2, 4), head_channels=16)
NETWORKS = {
    "heads": HEADS,
    "heads, new": replace(HEADS, new_order=True),
    "heads, no scale-shift, convolutions, classes": replace(HEADS, scale_shift=False, updown=False, classes=5),
    "heads, the defaults": Original(mult=(1, 2, 3, 4), blocks=2, attention=(4, 8), heads=4, updown=False, out=3),
    "heads, as at 128 px": Original(mult=(1, 1, 2, 3, 4), blocks=2, attention=(4, 8, 16), heads=4, classes=5),
    "narrow": NARROW,
    "narrow, new, classes, one block": replace(NARROW, new_order=True, classes=5),
    "narrow, no scale-shift, convolutions": replace(NARROW, scale_shift=False, updown=False, blocks=2),
    "narrow, attention at the first level": replace(NARROW, attention=(1,)),
    "narrow, as at 512 px": Original(
        channels=64, mult=(0.5, 1, 1, 2, 2, 4, 4), blocks=2, attention=(16, 32, 64), head_channels=64, classes=5
    ),
    "a quarter": Original(channels=128, mult=(0.25, 1), head_channels=16),
    "three halves": Original(channels=64, mult=(1.5, 1), head_channels=16),
    "an odd number of channels": Original(channels=65, mult=(0.5,), attention=(1,), head_channels=8),
    "both": replace(HEADS, channels=64, mult=(0.5, 1, 2)),
    "both, new, classes": replace(HEADS, channels=64, mult=(0.5, 1, 2), new_order=True, classes=5),
}
TINY = {
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["AttnDownBlock2D"] * 2,
    "up_block_types": ["AttnUpBlock2D"] * 2,
    "norm_num_groups": 4,
}


@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
def test_the_function_is_the_same(net):
    state = net.state()
    unet = convert_guided_diffusion(state, **net.options)
    expected, found = run_both(net, unet, state)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert type(unet) is ExtendedUNet2DModel
    assert not unet.training
    assert unet.config.get("num_attention_heads") == net.heads
    narrow = net.channels != int(net.channels * net.mult[0])
    assert unet.config.get("time_proj_dim") == (net.channels if narrow else None)


def test_the_number_of_heads_and_the_order_matter():
    state = HEADS.state()
    wrong = [
        {"num_heads": 2},
        {"num_heads": 1},
        {"num_head_channels": 16},
        {"num_heads": 4, "use_new_attention_order": True},
    ]
    for options in wrong:
        unet = convert_guided_diffusion(state, **options)
        expected, found = run_both(HEADS, unet, state)
        assert (found - expected).abs().max() > 1e-3


@pytest.mark.parametrize("processor", [AttnProcessor, partial(SlicedAttnProcessor, 1)])
def test_other_kernels_give_the_same_attention(processor):
    state = HEADS.state()
    unet = convert_guided_diffusion(state, **HEADS.options)
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    assert [layer.inner_dim // layer.heads for layer in layers] == [16, 24, 24, 24, 16, 16, 24]
    for layer in layers:
        layer.set_processor(processor())
    expected, found = run_both(HEADS, unet, state)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # these two take the softmax in float32


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (HEADS, {"num_attention_heads": 4, "time_proj_dim": None}),
        (NARROW, {"num_attention_heads": None, "time_proj_dim": 64}),
        (NETWORKS["both"], {"num_attention_heads": 4, "time_proj_dim": 64}),
    ],
    ids=["heads", "narrow", "both"],
)
def test_a_purifier_reloads_exactly(net, options, tmp_path):
    state = net.state(torch.float32)
    torch.save(state, tmp_path / "model.pt")
    folder = convert_guided_diffusion_checkpoint(tmp_path / "model.pt", tmp_path / "psm", **net.options)
    psm = PSMModel.from_pretrained(folder)
    assert {key: psm.config.purifier_config[key] for key in options} == options
    psm.save_pretrained(tmp_path / "again")
    again = PSMModel.from_pretrained(tmp_path / "again")
    # As training does with a PSM to start from.
    rebuilt = PSMModel(PSMConfig(purifier="diffusion", purifier_config=again.config.purifier_config)).eval()
    rebuilt.load_state_dict(psm.state_dict())
    images, sigma = torch.rand(2, 3, 8, 8), 0.25
    with torch.no_grad():
        purified = psm(images, sigma)
        for other in (again, rebuilt):
            assert torch.equal(other(images, sigma), purified)
    double = {key: value.double() for key, value in state.items()}
    expected, found = run_both(net, psm.double().purifier.unet, double)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("net", "given"),
    [
        (HEADS, "num_attention_heads 4"),
        (NARROW, "time_proj_dim 64"),
        (NETWORKS["both"], "num_attention_heads 4 and time_proj_dim 64"),
    ],
    ids=["heads", "narrow", "both"],
)
def test_no_folder_of_diffusers_holds_them(net, given, tmp_path):
    reason = f"because diffusers' UNet2DModel has no {given}"
    torch.save(net.state(torch.float32), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"^`output_format` must be 'psm' for model.pt, {reason}, got 'unet'$"):
        convert_guided_diffusion_checkpoint(
            tmp_path / "model.pt", tmp_path / "unet", output_format="unet", **net.options
        )
    unet = convert_guided_diffusion(net.state(torch.float32), **net.options)
    with pytest.raises(ValueError, match=f"^`unet` must be saved as the purifier of a PSMModel, {reason}.$"):
        unet.save_pretrained(tmp_path / "unet")
    torch.save(replace(net, classes=3).state(torch.float32), tmp_path / "classes.pt")
    for output_format in ("psm", "unet"):  # the published models of 128 and 512 px
        with pytest.raises(
            ValueError, match=f"got classes.pt with classes, and diffusers' UNet2DModel has no {given}$"
        ):
            convert_guided_diffusion_checkpoint(
                tmp_path / "classes.pt", tmp_path / "unet", output_format=output_format, **net.options
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.pt", "model.pt"]


@pytest.mark.parametrize("kind", ["unet", "diffusion"])
def test_they_train(kind):
    torch.manual_seed(0)
    purifier = build_purifier(kind, TINY | {"num_attention_heads": 4, "time_proj_dim": 24}).train()
    assert purifier.unet.time_embedding.linear_1.weight.shape == (32, 24)
    images = torch.rand(2, 3, 8, 8)
    gradients = []
    for _ in range(2):
        purifier.zero_grad()
        purifier(images, torch.tensor([0.1, 0.5])).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in purifier.parameters()])
        purifier.unet.enable_gradient_checkpointing()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert purifier.unet.time_embedding.linear_1.weight.grad.abs().min() > 0


def test_a_certificate_sees_the_heads():
    hashes = set()
    for heads in (None, 1, 2, 4):
        torch.manual_seed(0)
        config = TINY | {"num_attention_heads": heads}
        psm = PSMModel(PSMConfig(purifier="unet", purifier_config=config))
        hashes.add(model_hash(smoothed_tower(psm=psm)))
    assert len(hashes) == 4


def test_without_the_options_it_is_diffusers_own():
    nothing = {"num_attention_heads": None, "time_proj_dim": None}
    assert type(build_purifier("unet", TINY | nothing).unet) is UNet2DModel
    assert type(build_purifier("unet", TINY).unet) is UNet2DModel
    unet = build_purifier("unet", TINY | {"time_proj_dim": 24}).unet
    assert type(unet) is ExtendedUNet2DModel
    again = build_purifier("unet", dict(unet.config) | {"_class_name": "ExtendedUNet2DModel"}).unet
    assert {key: again.config[key] for key in again.config} == {key: unet.config[key] for key in again.config}
    assert again.time_embedding.linear_1.in_features == 24


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_attention_heads": 0}, "`num_attention_heads` must be an integer >= 1, got 0."),
        ({"num_attention_heads": True}, "`num_attention_heads` must be an integer >= 1, got True."),
        ({"num_attention_heads": "4"}, "`num_attention_heads` must be an integer >= 1, got '4'."),
        (
            {"num_attention_heads": 3},
            "`num_attention_heads` must divide the widths of all attention layers, [8, 16], got 3.",
        ),
        (
            {"num_attention_heads": 4, "attention_head_dim": 8},
            "`attention_head_dim` must not be given beside `num_attention_heads`, got 8 and 4.",
        ),
        ({"time_proj_dim": 1}, "`time_proj_dim` must be an integer >= 2, got 1."),
        ({"time_proj_dim": 16.0}, "`time_proj_dim` must be an integer >= 2, got 16.0."),
        (
            {"time_proj_dim": 16, "time_embedding_type": "fourier"},
            "`time_proj_dim` must go with time_embedding_type 'positional' and without class_embed_type 'timestep', "
            "got 'fourier' and None.",
        ),
        (
            {"time_proj_dim": 16, "class_embed_type": "timestep"},
            "`time_proj_dim` must go with time_embedding_type 'positional' and without class_embed_type 'timestep', "
            "got 'positional' and 'timestep'.",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence(options, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        build_purifier("unet", TINY | options)
