"""What the converter of open_clip's visuals refuses: in one sentence, leaving nothing behind, running nothing."""

import os
import sys
from dataclasses import replace

import pytest
import torch
from original_open_clip import Visual, whole_clip
from safetensors.torch import save_file

from fs_psm_hf.cli import main
from fs_psm_hf.conversion_open_clip import convert_open_clip_checkpoint


BASE = Visual()
STATE = BASE.state(torch.float32)


def fs_psm(monkeypatch, *arguments):
    """Exit code of `fs-psm convert open-clip` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["fs-psm", "convert", "open-clip", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_code_in_a_checkpoint_is_not_run(zipped, inside, tmp_path):
    held = Code(tmp_path / "ran")
    held = {"state_dict": STATE, "args": held} if inside else held
    torch.save(held, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"must hold nothing but tensors, got code \(\w+.mkdir\) in x.pt, which was not"
    ):
        convert_open_clip_checkpoint(tmp_path / "x.pt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]


def test_a_torchscript_archive_is_refused(tmp_path, capsys, monkeypatch, recwarn):
    """The form of OpenAI's own files."""
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "ViT-L-14.pt")
    recwarn.clear()
    assert fs_psm(monkeypatch, "--checkpoint", tmp_path / "ViT-L-14.pt", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        "fs-psm: `checkpoint` must be a state dict, got the TorchScript archive ViT-L-14.pt, which is a program: "
        "save the state dict of the model that it makes\n"
    )
    assert not recwarn.list
    assert not (tmp_path / "out").exists()


def edited(**changes):
    """The state with other tensors; `None` takes a key away, dots are written as two underscores."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in (STATE | changes).items() if value is not None}


X = torch.zeros(1)
BROKEN_STATES = {
    "left over": (
        edited(extra=X, transformer__resblocks__0__ls_1__gamma=X),
        "2 keys left over: extra, transformer.res",
    ),
    "attention pooling": (edited(attn_pool__query=X), "got 1 keys left over: attn_pool.query"),
    "no LayerNorm before": (
        edited(ln_pre__weight=None, ln_pre__bias=None),
        "exactly the keys of an open_clip Vision Transformer, got 2 keys missing: ln_pre.bias, ln_pre.weight",
    ),
    "a layer missing": (
        {k: v for k, v in STATE.items() if ".1." not in k},
        "got 12 keys missing: transformer.resblocks.1.attn.in_proj_bias",
    ),
    "no layers": (
        {k: v for k, v in STATE.items() if "resblocks" not in k},
        "transformer.resblocks.0.mlp.c_fc.weight missing",
    ),
    "shape": (
        edited(ln_post__weight=torch.ones(32)),
        "must have shape (64,) at ln_post.weight to fit its other weights, got (32,)",
    ),
    "attention": (
        edited(transformer__resblocks__1__attn__in_proj_weight=torch.zeros(64, 64)),
        "must have shape (192, 64) at transformer.resblocks.1.attn.in_proj_weight to fit",
    ),
    "attention of another width": (
        edited(transformer__resblocks__1__attn__in_proj_weight=torch.zeros(192, 32)),
        "must have shape (192, 64) at transformer.resblocks.1.attn.in_proj_weight to fit",
    ),
    "projection": (
        edited(proj=torch.zeros(32, 24)),
        "must have shape (64, 24) at proj to fit its other weights, got (32, 24)",
    ),
    "positions": (
        edited(positional_embedding=torch.zeros(17, 32)),
        "must have shape (17, 64) at positional_embedding",
    ),
    "no square": (edited(positional_embedding=torch.zeros(16, 64)), "at positional_embedding, got 16 positions"),
    "no position": (edited(positional_embedding=torch.zeros(0, 64)), "at positional_embedding, got 0 positions"),
    "grey images": (
        edited(conv1__weight=torch.zeros(64, 1, 4, 4)),
        "square patches of 3 channels, got (1, 4, 4) at conv1.weight",
    ),
    "a patch that is no square": (edited(conv1__weight=torch.zeros(64, 3, 4, 2)), "got (3, 4, 2) at conv1.weight"),
    "width 80": (
        replace(BASE, width=80).state(),
        "`num_heads` must be given for a network of width 80 (no multiple of 64)",
    ),
    "ViT-H": (
        replace(BASE, width=1280, layers=1).state(torch.bfloat16),
        "`num_heads` must be given for a network of width 1280 (16 in open_clip's own), got None",
    ),
    "a ResNet": (
        {"conv1.weight": torch.zeros(8, 3, 3, 3), "layer1.0.conv1.weight": X},
        "must be that of an open_clip Vision Transformer, got that of a ResNet (layer1.0.conv1.weight)",
    ),
    "a ResNet in a CLIP": (
        {"visual.layer1.0.conv1.weight": X, "logit_scale": X},
        "got that of a ResNet (layer1.0.conv1.weight)",
    ),
    "timm": (
        {"visual.trunk.stem.0.weight": X},
        "got that of a timm visual, such as ConvNeXt, EVA or SigLIP (trunk.stem.0.weight)",
    ),
    "transformers": (
        {"vision_model.embeddings.class_embedding": X, "text_model.final_layer_norm.bias": X},
        "got that of a model of transformers, which needs no conversion (vision_model.embeddings.class_embedding)",
    ),
    "another network": ({"fc.weight": X}, "got one with conv1.weight missing"),
    "empty": ({}, "got one with conv1.weight missing"),
    "a text tower only": (
        {k: v for k, v in whole_clip({}).items() if "visual" not in k},
        "got one with conv1.weight missing",
    ),
    "more in a CLIP": (
        whole_clip(STATE) | {"text_decoder.ln_final.bias": X},
        "must have nothing beside `visual.` but a text tower of open_clip's own, got 1 keys left over: text_decoder.ln_f",
    ),
    "a text tower of transformers": (
        whole_clip(STATE) | {"text.transformer.embeddings.word_embeddings.weight": X},
        "got 1 keys left over: text.transformer.embeddings.word_embeddings.weight",
    ),
    "prefix on some": (STATE | {"module.proj": X}, "got 1 keys left over: module.proj"),
    "trained prompts": (
        {"vision_encoder_state_dict": STATE, "state_dict": {"prompt": torch.ones(3)}},
        "`checkpoint` must hold no weights beside those of its vision_encoder_state_dict, got some in state_dict",
    ),
    "an average beside": (
        {"state_dict": STATE, "ema": [torch.ones(3)]},
        "`checkpoint` must hold no weights beside those of its state_dict, got some in ema",
    ),
    "something in between": (
        {"state_dict": {"model": STATE}},
        "must be a flat dict from names to tensors, got dict at",
    ),
    "a list": ([X], "must be a flat dict from names to tensors, got list"),
}


@pytest.mark.parametrize(("state", "words"), BROKEN_STATES.values(), ids=BROKEN_STATES)
def test_what_does_not_fit_is_one_line(state, words, monkeypatch, capsys, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    assert fs_psm(monkeypatch, "--checkpoint", tmp_path / "x.pt", "--output", tmp_path / "out") == 2
    (complaint,) = capsys.readouterr().err.strip().splitlines()
    assert complaint.startswith("fs-psm: `")
    assert words in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "nowhere.pt"], "`checkpoint` must be a file, got nowhere.pt"),
        (["--checkpoint", "text.pt"], "`checkpoint` must be an undamaged file of torch.save, got text.pt"),
        (["--checkpoint", "cut.pt"], "`checkpoint` must be an undamaged file of torch.save, got cut.pt"),
        (
            ["--checkpoint", "cut.safetensors"],
            "`checkpoint` must be an undamaged safetensors file, got cut.safetensors",
        ),
        (["--output", "full"], "`output` must be a new or an empty folder"),
        (["--output", "x.pt"], "`output` must be a new or an empty folder"),
        (["--hidden-act", "relu"], "`hidden_act` must be one of quick_gelu, gelu, got 'relu'"),
        (["--dtype", "int8"], "`--dtype` must be one of float32, bfloat16, float16, got int8"),
        (["--num-heads", "0"], "`num_heads` must be an integer >= 1, got 0"),
        (["--num-heads", "3"], "`num_heads` must divide the width, 64, got 3"),
        (["--image-size", "0"], "`image_size` must be an integer >= 1, got 0"),
        (["--image-size", "18"], "`image_size` must be a multiple of the patch, 4, got 18"),
        (["--projection", ""], "`projection` must be False for a `state_dict` without proj, got True"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save(edited(proj=None), "x.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "text.pt").write_text("no checkpoint\n" * 9)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-5000])
    save_file(STATE, "cut.safetensors")
    os.truncate("cut.safetensors", 3000)
    before = sorted(tmp_path.rglob("*"))
    given = {"--checkpoint": "x.pt", "--output": "out"} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    words_given = [word for pair in given.items() for word in pair if word != ""]
    assert fs_psm(monkeypatch, *words_given) == 2
    (complaint,) = capsys.readouterr().err.strip().splitlines()
    assert complaint.startswith(f"fs-psm: {words}")
    assert sorted(tmp_path.rglob("*")) == before
