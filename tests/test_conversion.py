"""The converter against a restatement of the original network that reads the original keys."""

import json
import math
import os
import resource
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from original_unet import INPUTS_256, OUTPUTS_256, TYPED, Original, module_shapes, run_both, with_biases

from fs_psm_hf import PSMModel
from fs_psm_hf.cli import main
from fs_psm_hf.conversion import (
    convert_guided_diffusion,
    convert_guided_diffusion_checkpoint,
    load_guided_diffusion_checkpoint,
)
from fs_psm_hf.purifier import GUIDED_DIFFUSION_256


def meta(shapes):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


BASE = Original(heads=1)
LEGACY = Original(head_channels=16)
NETWORKS = {
    "one head": BASE,
    "several heads, legacy": LEGACY,
    "several heads, new": replace(LEGACY, new_order=True),
    "one head, new": replace(BASE, new_order=True),
    "heads by number": Original(heads=4),
    "one head at several widths": Original(mult=(1, 2, 3), attention=(2, 4), heads=1),
    "convolutions resample": replace(LEGACY, updown=False),
    "no scale-shift": replace(LEGACY, scale_shift=False),
    "no scale-shift, new, convolutions": replace(LEGACY, scale_shift=False, new_order=True, updown=False),
    "fixed variance": replace(LEGACY, out=3),
    "classes": replace(LEGACY, classes=5),
    "two blocks, three levels": Original(mult=(1, 2, 3), blocks=2, attention=(2, 4), head_channels=32),
    "three blocks, as at 64 px": Original(
        mult=(1, 2, 3, 4), blocks=3, attention=(2, 4, 8), head_channels=32, new_order=True, classes=10
    ),
    "attention in the middle only": Original(mult=(1, 1, 2, 2), attention=(), head_channels=32),
    "attention at one level between": Original(mult=(1, 2, 2), attention=(2,), head_channels=16, updown=False),
    "attention at the first level": Original(attention=(1,), head_channels=8),
    "narrower below": Original(channels=64, mult=(1, 0.5, 1), attention=(2, 4), head_channels=16),
    "one level": Original(mult=(1,), blocks=2, attention=(1,), head_channels=8),
    "default width of heads": Original(channels=64, mult=(1, 2), attention=(2,)),
}


@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
def test_the_function_is_the_same(net):
    state = net.state()
    unet = convert_guided_diffusion(state, **net.options)
    expected, found = run_both(net, unet, state)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert not unet.training
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_what_the_options_and_the_time_embedding_change():
    for net, matters in [(LEGACY, True), (replace(LEGACY, new_order=True), True), (BASE, False)]:
        state = net.state()
        wrong = convert_guided_diffusion(state, **net.options | {"use_new_attention_order": not net.new_order})
        expected, found = run_both(net, wrong, state)
        assert ((found - expected).abs().max() > 1e-3) == matters
    state = LEGACY.state()
    expected, found = run_both(LEGACY, convert_guided_diffusion(state, num_head_channels=32), state)
    assert (found - expected).abs().max() > 1e-3
    unet = convert_guided_diffusion(state, **LEGACY.options)
    unet.time_proj.flip_sin_to_cos = False
    expected, found = run_both(LEGACY, unet, state)
    assert (found - expected).abs().max() > 1e-3


def test_a_typed_state_dict():
    entries = [entry.split() for entry in TYPED.strip().replace("\n", ";").split(";")]
    shapes = with_biases({name: tuple(map(int, shape)) for name, *shape in entries}) | {"label_emb.weight": (10, 128)}
    assert len(shapes) == 2 * len(entries) + 1
    net = Original(updown=False, scale_shift=False, out=3, classes=10)
    assert shapes == net.shapes()  # the restatement has the same keys
    unet = convert_guided_diffusion(meta(shapes), num_heads=4)
    assert sum(weight.numel() for weight in unet.parameters()) == sum(map(math.prod, shapes.values()))
    assert (unet.config.num_class_embeds, unet.config.attention_head_dim, unet.config.sample_size) == (10, 16, None)


def test_the_256_px_network_at_full_size():
    weights = {"time_embed.0": (1024, 256), "time_embed.2": (1024, 1024), "input_blocks.0.0": (256, 3, 3, 3)}
    blocks = [f"input_blocks.{i} {text}" for i, text in enumerate(INPUTS_256.split(";"), start=1)]
    blocks += [f"output_blocks.{i} {text}" for i, text in enumerate(OUTPUTS_256.split(";"))]
    for block, wide, out, *more in map(str.split, blocks):
        for position, kind in enumerate(["res", *more]):
            kind, channels = {"A": "attention", "U": "res"}.get(kind, kind), int(wide if position == 0 else out)
            weights |= module_shapes(f"{block}.{position}", kind, channels, int(out), 1024, 2)
    for position, kind in enumerate(["res", "attention", "res"]):
        weights |= module_shapes(f"middle_block.{position}", kind, 1024, 1024, 1024, 2)
    shapes = with_biases(weights | {"out.0": (256,), "out.2": (6, 256, 3, 3)})
    published = Original(256, (1, 1, 2, 2, 4, 4), blocks=2, attention=(8, 16, 32))
    assert shapes == published.shapes()
    assert sum(map(math.prod, shapes.values())) == 552_814_086
    unet = convert_guided_diffusion(meta(shapes))
    assert {key: unet.config[key] for key in GUIDED_DIFFUSION_256} == GUIDED_DIFFUSION_256
    assert sum(parameter.numel() for parameter in unet.parameters()) == 552_814_086


# Flags of the README of guided-diffusion; attention at 32, 16 and 8 pixels unless said otherwise.
WIDE_512 = (0.5, 1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Original(192, (1, 2, 3, 4), 3, (2, 4, 8), head_channels=64, new_order=True, classes=1000), 64),
        (Original(256, (1, 1, 2, 3, 4), 2, (4, 8, 16), heads=4, classes=1000), 128),
        (Original(256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), head_channels=64, classes=1000), 256),
        (Original(256, WIDE_512, 2, (16, 32, 64), head_channels=64, classes=1000), 512),
        (Original(256, WIDE_512, 2, (16, 32, 64), head_channels=64), 512),
        (Original(256, (1, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), head_channels=64), None),
        # The defaults of its scripts: attention at 16 and 8 pixels.
        (Original(128, (1, 2, 3, 4), 2, (4, 8), heads=4, updown=False, out=3), 64),
        (Original(192, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), heads=4, classes=1000, inputs=6), "got 6: an upsampler"),
        (
            Original(192, (1, 1, 2, 2, 4, 4), 2, (16, 32), head_channels=64, classes=1000, inputs=6),
            "got 6: an upsampler",
        ),
    ],
    ids=["64", "128", "256", "512", "512, no classes", "512, others", "defaults", "64 to 256", "128 to 512"],
)
def test_published_flags(net, expected):
    state = meta(net.shapes())
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            convert_guided_diffusion(state, **net.options)
        return
    unet = convert_guided_diffusion(state, **net.options)
    assert unet.config.sample_size == expected
    assert sum(p.numel() for p in unet.parameters()) == sum(value.numel() for value in state.values())
    assert all(p.is_meta for p in unet.parameters())


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(LEGACY.state(torch.float32), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def fs_psm(monkeypatch, *arguments):
    """Exit code of `fs-psm convert guided-diffusion` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["fs-psm", "convert", "guided-diffusion", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_the_command_writes_a_purifier(monkeypatch, capsys, tmp_path, checkpoint):
    output = tmp_path / "new" / "psm"
    assert fs_psm(monkeypatch, "--help") == 0
    assert "(default: by the channels, if known)" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert fs_psm(monkeypatch, "--checkpoint", checkpoint, "--output", output, "--num-head-channels", 16) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert [path.name for path in output.parent.iterdir()] == ["psm"]
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors"]
    assert str(tmp_path) not in (output / "config.json").read_text()
    psm = PSMModel.from_pretrained(output)
    assert (psm.config.purifier, psm.mapper, psm.dtype) == ("diffusion", None, torch.float32)
    state = LEGACY.state(torch.float32)
    unet = convert_guided_diffusion(state, num_head_channels=16)
    assert unet.state_dict().keys() == psm.purifier.unet.state_dict().keys()
    for name, weight in psm.purifier.unet.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name]), name

    # One step of the original network, at the place of sigma on its own schedule.
    sigma, images = 0.25, torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    time = np.interp(math.log(2 * sigma), np.log(np.sqrt(1 / abar - 1)), np.arange(1000))
    x = (2 * images.double() - 1) / math.sqrt(1 + 4 * sigma**2)
    noise = LEGACY.run({key: value.double() for key, value in state.items()}, x, torch.full((2,), time))[:, :3]
    with torch.no_grad():
        torch.testing.assert_close(psm(images, sigma), (images - sigma * noise).float(), rtol=0, atol=1e-4)


def test_a_diffusers_folder_reloads_exactly(monkeypatch, tmp_path):
    net = replace(LEGACY, classes=5, new_order=True)
    torch.save(net.state(torch.float32), tmp_path / "model.pt")
    (tmp_path / "unet").mkdir()  # an empty folder is as good as none
    options = ["--format", "unet", "--num-head-channels", 16, "--new-attention-order", "--image-size", 48]
    command = ["--checkpoint", tmp_path / "model.pt", "--output", tmp_path / "unet"]
    assert fs_psm(monkeypatch, *command, *options) == 0
    unet = convert_guided_diffusion(net.state(torch.float32), num_head_channels=16, use_new_attention_order=True)
    loaded = UNet2DModel.from_pretrained(tmp_path / "unet")
    assert loaded.config.sample_size == 48
    x, time, labels = torch.rand(2, 3, 8, 8), torch.tensor([3.5, 700.0]), torch.tensor([0, 4])
    with torch.no_grad():
        assert torch.equal(loaded(x, time, labels).sample, unet(x, time, labels).sample)
    loaded.save_pretrained(tmp_path / "again")
    again = UNet2DModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in unet.state_dict().items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_class_embeds"] == 5


def test_dtypes(monkeypatch, tmp_path, checkpoint):
    command = ["--checkpoint", checkpoint, "--num-head-channels", 16]
    assert fs_psm(monkeypatch, *command, "--output", tmp_path / "half", "--dtype", "bfloat16") == 0
    half = PSMModel.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    state = LEGACY.state(torch.float32)
    assert torch.equal(half.purifier.unet.conv_in.weight, state["input_blocks.0.0.weight"].bfloat16())
    mixed = state | {"out.2.bias": state["out.2.bias"].half()}
    with pytest.raises(TypeError, match="of one type unless `dtype` is given, got torch.float16, torch.float32"):
        convert_guided_diffusion(mixed)
    unet = convert_guided_diffusion(mixed, dtype=torch.float32, num_head_channels=16)
    assert {weight.dtype for weight in unet.parameters()} == {torch.float32}
    with pytest.raises(TypeError, match="must hold floating-point tensors"):
        convert_guided_diffusion({key: value.int() for key, value in state.items()})


@pytest.mark.parametrize(("heads", "new_order"), [(1, False), (4, False), (1, True)])
def test_nothing_is_copied_but_attention(heads, new_order, checkpoint):
    state = load_guided_diffusion_checkpoint(checkpoint)
    unet = convert_guided_diffusion(state, num_heads=heads, use_new_attention_order=new_order)
    spans = [(weight.data_ptr(), weight.data_ptr() + weight.nbytes) for weight in unet.parameters()]
    assert all(end <= start for (_, end), (start, _) in pairwise(sorted(spans)))
    stored = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    copied = {name for name, w in unet.named_parameters() if w.untyped_storage().data_ptr() not in stored}
    assert copied == {name for name, _ in unet.named_parameters() if name.split(".")[-2] in ("to_q", "to_k", "to_v")}
    torch.save(state, checkpoint.with_suffix(".old"), _use_new_zipfile_serialization=False)
    old = load_guided_diffusion_checkpoint(checkpoint.with_suffix(".old"))
    assert all(torch.equal(old[key], value) for key, value in state.items())


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(zipped, tmp_path):
    torch.save({"a": Code(tmp_path / "ran")}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"must hold nothing but tensors, got code \(\w+.mkdir\) in x.pt, which was not"
    ):
        load_guided_diffusion_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def edited(**changes):
    """The state with other tensors; `None` takes a key away, dots are written as two underscores."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in (LEGACY.state() | changes).items() if value is not None}


X = torch.zeros(1)
BROKEN_STATES = {
    "left over": (edited(extra=X, out__2__more=X), "got 2 keys left over: extra, out.2.more"),
    "missing": (edited(middle_block__1__norm__bias=None), "got 1 keys missing: middle_block.1.norm.bias"),
    "both": (
        edited(out__0__bias=None, out__0__beta=X),
        "got 1 keys missing: out.0.bias; 1 keys left over: out.0.beta",
    ),
    "no attention in one block": (
        {key: value for key, value in LEGACY.state().items() if not key.startswith("input_blocks.3.1.")},
        "got 6 keys missing: input_blocks.3.1.norm.bias, input_blocks.3.1.norm.weight, input_blocks.3.1.proj_out.bias, "
        "input_blocks.3.1.proj_out.weight, input_blocks.3.1.qkv.bias, …",
    ),
    "shape": (
        edited(input_blocks__1__0__in_layers__2__weight=torch.zeros(32, 32, 1, 1, dtype=torch.float64)),
        "must have shape (32, 32, 3, 3) at input_blocks.1.0.in_layers.2.weight to fit its other weights, "
        "got (32, 32, 1, 1)",
    ),
    "attention of two dimensions": (
        edited(middle_block__1__qkv__weight=torch.zeros(192, 64, 1, 1, dtype=torch.float64)),
        "must have shape (192, 64, 1) at middle_block.1.qkv.weight",
    ),
    "another network": ({"fc.weight": X}, "got one with input_blocks.0.0.weight missing"),
    "empty": ({}, "got one with input_blocks.0.0.weight missing"),
    "a classifier": (
        {key: value for key, value in LEGACY.state().items() if not key.startswith("output_blocks.")},
        "must have output blocks in levels of one length",
    ),
    "no resampling weights": (  # `conv_resample=False`, which no flag of the scripts sets
        {k: v for k, v in replace(LEGACY, updown=False).state().items() if ".op." not in k and ".2.conv." not in k},
        "keys",
    ),
    "four channels out": (
        edited(out__2__weight=torch.zeros(4, 32, 3, 3, dtype=torch.float64)),
        "must give 3 channels, or 6 with a learned variance, got 4",
    ),
    "two kinds of resampling": (
        replace(LEGACY, mult=(1, 1, 2)).state() | {"output_blocks.3.1.conv.weight": X},
        "must have output blocks in levels of one length, all but the last closed by a convolution or all by a residual "
        "block, got 6 blocks with resampling in [1, 3]",
    ),
    "no multiple of 32": (
        Original(channels=48).state(),
        "must have multiples of 32 channels at every level, got [48, 96]",
    ),
    "a wrapped state dict": ({"state_dict": LEGACY.state()}, "must be a flat dict from names to tensors, got dict at"),
    "a list": ([X], "must be a flat dict from names to tensors, got list"),
}


@pytest.mark.parametrize(("state", "words"), BROKEN_STATES.values(), ids=BROKEN_STATES)
def test_a_state_dict_that_does_not_fit_is_one_line(state, words, monkeypatch, capsys, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    command = ["--checkpoint", tmp_path / "x.pt", "--output", tmp_path / "out", "--num-head-channels", 16]
    assert fs_psm(monkeypatch, *command) == 2
    (complaint,) = capsys.readouterr().err.strip().splitlines()
    assert complaint.startswith("fs-psm: `state_dict` must ")
    assert words in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "nowhere.pt"], "`checkpoint` must be a file, got nowhere.pt"),
        (["--checkpoint", "text.pt"], "`checkpoint` must be an undamaged file of torch.save, got text.pt"),
        (["--checkpoint", "empty.pt"], "`checkpoint` must be an undamaged file of torch.save, got empty.pt"),
        (["--checkpoint", "cut.pt"], "`checkpoint` must be an undamaged file of torch.save, got cut.pt"),
        (
            ["--checkpoint", "classes.pt"],
            "`checkpoint` must be unconditional to become a purifier, got classes.pt with classes: write a plain U-Net",
        ),
        (
            ["--checkpoint", "narrow.pt", "--format", "unet"],
            "`output_format` must be 'psm' for narrow.pt, because diffusers' UNet2DModel has no time_proj_dim 64, got 'unet'",
        ),
        (["--output", "full"], "`output` must be a new or an empty folder"),
        (["--output", "model.pt"], "`output` must be a new or an empty folder"),
        (["--format", "onnx"], "`output_format` must be one of psm, unet, got 'onnx'"),
        (["--dtype", "int8"], "`--dtype` must be one of float32, bfloat16, float16, got int8"),
        (["--num-heads", "2"], "`num_heads` must not be given beside `num_head_channels`, got 2 and 16"),
        (["--num-head-channels", "0"], "`num_head_channels` must be an integer >= 1, got 0"),
        (
            ["--num-head-channels", "48"],
            "`num_head_channels` must divide the widths of all attention layers, [64], got 48",
        ),
        (["--image-size", "-1"], "`image_size` must be an integer >= 1, got -1"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, words, monkeypatch, capsys, tmp_path, checkpoint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "text.pt").write_text("no checkpoint\n" * 9)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:-5000])
    torch.save(replace(LEGACY, classes=3).state(), "classes.pt")
    torch.save(replace(LEGACY, channels=64, mult=(0.5, 1)).state(), "narrow.pt")
    before = sorted(tmp_path.rglob("*"))
    given = {"--checkpoint": checkpoint, "--output": "out", "--num-head-channels": 16}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert fs_psm(monkeypatch, *(word for pair in given.items() for word in pair)) == 2
    (complaint,) = capsys.readouterr().err.strip().splitlines()
    assert complaint.startswith(f"fs-psm: {words}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_full_leaves_nothing(tmp_path, checkpoint):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="`output` could not be written"):
            convert_guided_diffusion_checkpoint(checkpoint, tmp_path / "out", num_head_channels=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
