"""OpenAI guided-diffusion checkpoints as diffusers' `UNet2DModel` and as a purifier.

The layout of the state dict is that of `UNetModel` in https://github.com/openai/guided-diffusion (Dhariwal & Nichol, 2021).
Keys and shapes tell channels, levels, residual blocks, attention, kind of resampling, scale-shift, learned variance and
classes. They do not tell how the attention splits its heads (options, by default those of `256x256_diffusion_uncond.pt`),
the dropout of training (0 here), nor the noise schedule: see [`convert_guided_diffusion_checkpoint`].

**What `UNet2DModel` cannot express** becomes an [`ExtendedUNet2DModel`], in memory or as the purifier of a `PSMModel`:

- a fixed number of heads at levels of different widths (guided-diffusion's default flags; the published 128 px model);
- a first level of another width than the sinusoidal time embedding (the published 512 px model, multipliers 0.5, 1, 1, 2,
  2, 4, 4). Repeating its 128 channels does not help: where they meet 256 of the next level, the original normalises groups
  of 12, channels 252 to 263 on both sides; 256 beside 256 make groups of 16. Groups stay only if all levels are repeated.

These two published models know classes: neither is a purifier, and only [`convert_guided_diffusion`] takes them.
"""

import re
from pathlib import Path

import torch
from diffusers import UNet2DModel

from .checkpoints import (
    check_dtypes,
    check_integer,
    check_output,
    check_shape,
    check_state_dict,
    load_pickle,
    refuse_other_keys,
    shape_at,
    whole_folder,
)
from .configuration_fs_psm import PSMConfig
from .modeling_psm import PSMModel
from .unet import ExtendedUNet2DModel, build_unet


NETWORK = "a guided-diffusion U-Net"
FORMATS = ("psm", "unet")
HEAD_CHANNELS = 64
# `GroupNorm32` of the original: the number of groups is fixed.
GROUPS = 32
# Image sizes that the original gives these multipliers; only `sample_size` depends on them, and no forward pass.
IMAGE_SIZES = {(1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256, (0.5, 1, 1, 2, 2, 4, 4): 512}
# Names inside a residual block or an attention layer: diffusers' on the left, the original's on the right.
PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")


def load_guided_diffusion_checkpoint(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Load a state dict without running code from the file; its tensors stay on disk until they are read.

    Args:
        checkpoint (`str` or `Path`): file written by `torch.save`, holding a flat `dict` from names to tensors.

    Raises:
        ValueError: the file is missing or damaged, holds code, or is no checkpoint.
        TypeError: it holds anything but a flat state dict.
    """
    state_dict = load_pickle(checkpoint)
    check_state_dict(state_dict)
    return state_dict


def convert_guided_diffusion(
    state_dict: dict[str, torch.Tensor],
    *,
    num_head_channels: int | None = None,
    num_heads: int | None = None,
    use_new_attention_order: bool = False,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> UNet2DModel:
    """The same function as a diffusers `UNet2DModel`, in evaluation mode, on the device of `state_dict`.

    Only the weights of the attention are copied, and what `dtype` changes: the others are shared with `state_dict`. A
    class-conditional network (`label_emb.weight`) gets `num_class_embeds`. Meta tensors give a model of meta tensors.
    An [`ExtendedUNet2DModel`] does not save by itself.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            State dict of the original `UNetModel`, with `input_blocks.0.0.weight` of shape `(channels, 3, 3, 3)`.
        num_head_channels (`int`, *optional*), num_heads (`int`, *optional*):
            Width or number of attention heads, the original's flags of these names; 64 channels where neither is
            given. A different `--num_heads_upsample` is not represented.
        use_new_attention_order (`bool`, *optional*, defaults to `False`):
            The original's flag: the projection holds (q, k, v) × heads, not heads × (q, k, v).
        image_size (`int`, *optional*):
            Height and width of the training images, for `sample_size`; where not given, those the original takes by
            default with the multipliers found, if any.
        dtype (`torch.dtype`, *optional*):
            Floating-point type of the weights; that of `state_dict` where not given.

    Raises:
        ValueError: keys are missing or left over, shapes disagree, or an option is out of range.
        TypeError: `state_dict` is not a flat dict of floating-point tensors of one type.
    """
    check_state_dict(state_dict)
    config = _read_config(state_dict, num_head_channels, num_heads, image_size)
    with torch.device("meta"):
        unet = build_unet(config)
    expected = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    modules = _original_modules(config)
    sources = {name: _original_name(name, modules) for name in expected}
    refuse_other_keys(state_dict.keys(), set(sources.values()), NETWORK)
    check_dtypes(state_dict.values(), dtype)

    converted = {}
    for name, source in sources.items():
        tensor, shape = state_dict[source].detach(), expected[name]
        part = name.split(".")[-2]
        given_shape = list(shape)
        if part in QUERY_KEY_VALUE:
            given_shape[0] *= 3
        if len(shape) == 2 and source.endswith((".qkv.weight", ".proj_out.weight")):
            given_shape.append(1)  # a convolution over the pixels in a row, linear here
        check_shape(tensor.shape, given_shape, source)
        if part in QUERY_KEY_VALUE:
            heads = config.get("num_attention_heads") or shape[0] // (config["attention_head_dim"] or shape[0])
            tensor = _split_projection(tensor, QUERY_KEY_VALUE.index(part), heads, use_new_attention_order)
        converted[name] = tensor.reshape(shape).to(dtype or tensor.dtype).contiguous()
    unet.load_state_dict(converted, assign=True)
    return unet.eval()


def convert_guided_diffusion_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    output_format: str = "psm",
    dtype: torch.dtype | None = None,
    **options,
) -> Path:
    """Convert a checkpoint file to a model folder, which appears whole or not at all.

    A `"psm"` folder is a [`PSMModel`] without mapper whose purifier takes one step of the network as a denoiser
    ([`DiffusionPurifier`]). That step is right for a network that predicts the noise and was trained with
    guided-diffusion's linear schedule of 1000 steps, which no state dict tells: not for `--noise_schedule cosine` (the
    published 64 px model) or `--predict_xstart True`.

    Args:
        checkpoint (`str` or `Path`): file of [`load_guided_diffusion_checkpoint`].
        output (`str` or `Path`): folder to write, new or empty.
        output_format (`str`, defaults to `"psm"`):
            `"psm"` for `PSMModel.from_pretrained`, `"unet"` for diffusers' `UNet2DModel.from_pretrained`.
        dtype (`torch.dtype`, *optional*), options: as in [`convert_guided_diffusion`].

    Returns:
        `Path`: the folder.

    Raises:
        ValueError, TypeError: as the two functions named, for an `output` that holds something, for `"psm"` with a
            class-conditional network, since a purifier knows no class, or for `"unet"` with one beyond `UNet2DModel`.
    """
    if output_format not in FORMATS:
        raise ValueError(f"`output_format` must be one of {', '.join(FORMATS)}, got {output_format!r}")
    output = check_output(output)
    state_dict = load_guided_diffusion_checkpoint(checkpoint)
    model = convert_guided_diffusion(state_dict, dtype=dtype, **options)
    model = _in_format(model, output_format, Path(checkpoint).name)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
    return output


def _in_format(unet, output_format, name):
    extended, conditional = isinstance(unet, ExtendedUNet2DModel), unet.config.num_class_embeds is not None
    if conditional and (extended or output_format == "psm"):
        way_out = f", and {unet.not_in_diffusers}" if extended else ": write a plain U-Net with the format 'unet'"
        raise ValueError(f"`checkpoint` must be unconditional to become a purifier, got {name} with classes{way_out}")
    if output_format == "unet":
        if extended:
            raise ValueError(f"`output_format` must be 'psm' for {name}, because {unet.not_in_diffusers}, got 'unet'")
        return unet
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        psm = PSMModel(PSMConfig(purifier="diffusion", purifier_config=config))
    psm.purifier.unet = unet
    return psm.eval()


def _read_config(state_dict, num_head_channels, num_heads, image_size):
    """Arguments of `UNet2DModel`, from some of the keys and shapes; the rest is compared once they are known."""
    width, in_channels = shape_at(state_dict, "input_blocks.0.0.weight", 4, NETWORK)[:2]
    out_channels = shape_at(state_dict, "out.2.weight", 4, NETWORK)[0]
    time_width = shape_at(state_dict, "time_embed.0.weight", 2, NETWORK)[1]
    if in_channels != 3:
        upsampler = ": an upsampler, no denoiser of one image" if in_channels == 6 else ""
        raise ValueError(f"`state_dict` must take 3 channels in, got {in_channels}{upsampler}")
    if out_channels not in (3, 6):
        raise ValueError(f"`state_dict` must give 3 channels, or 6 with a learned variance, got {out_channels}")
    per_level, levels, resample = _read_levels(state_dict)
    # From the lowest resolution up, as the output blocks come.
    first_blocks = [f"output_blocks.{per_level * level}" for level in range(levels)]
    widths = [shape_at(state_dict, f"{block}.0.in_layers.2.weight", 4, NETWORK)[0] for block in first_blocks]
    if any(channels % GROUPS for channels in widths):
        raise ValueError(f"`state_dict` must have multiples of {GROUPS} channels at every level, got {widths[::-1]}")
    attends = [f"{block}.1.qkv.weight" in state_dict for block in first_blocks]
    attention_widths = {widths[0], *(channels for channels, yes in zip(widths, attends, strict=True) if yes)}
    time_channels = shape_at(state_dict, "middle_block.0.emb_layers.1.weight", 2, NETWORK)[0]
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resample == "resnet" else ("DownBlock2D", "UpBlock2D")
    )
    if image_size is None:
        image_size = IMAGE_SIZES.get(tuple(channels / time_width for channels in widths[::-1]))
    else:
        check_integer("image_size", image_size)
    config = {
        "sample_size": image_size,
        "in_channels": 3,
        "out_channels": out_channels,
        "layers_per_block": per_level - 1,
        "block_out_channels": widths[::-1],
        "down_block_types": ["AttnDownBlock2D" if yes else plain[0] for yes in attends[::-1]],
        "up_block_types": ["AttnUpBlock2D" if yes else plain[1] for yes in attends],
        "downsample_type": resample,
        "upsample_type": resample,
        "resnet_time_scale_shift": "scale_shift" if time_channels == 2 * widths[0] else "default",
        **_head_options(attention_widths, num_head_channels, num_heads),
        "attn_norm_num_groups": GROUPS,  # without it the middle attention may lose its GroupNorm
        "norm_num_groups": GROUPS,
    }
    if time_width != width:
        config |= {"time_proj_dim": time_width, "time_embedding_dim": 4 * time_width}
    if "label_emb.weight" in state_dict:
        config["num_class_embeds"] = shape_at(state_dict, "label_emb.weight", 2, NETWORK)[0]
    return config


def _read_levels(state_dict):
    """Output blocks per level, number of levels, and `"resnet"` or `"conv"` resampling.

    Only the output blocks tell where a level ends: on the way down, a residual block that halves the resolution has the
    keys of any other.
    """
    matches = [re.match(r"output_blocks\.(\d+)\.(\d+)\.(\w+)\.", key) for key in state_dict]
    parts = {(int(match[1]), int(match[2]), match[3]) for match in matches if match}
    ends = {
        kind: {block for block, position, name in parts if position > 0 and name == layer}
        for kind, layer in (("resnet", "in_layers"), ("conv", "conv"))
    }
    num_blocks = 1 + max((block for block, _, _ in parts), default=-1)
    closed = sorted(ends["resnet"] | ends["conv"])
    levels, per_level = 1 + len(closed), (closed[0] + 1 if closed else num_blocks)
    if (
        (ends["resnet"] and ends["conv"])
        or per_level < 2
        or [*closed, num_blocks - 1] != [per_level * (level + 1) - 1 for level in range(levels)]
    ):
        raise ValueError(
            "`state_dict` must have output blocks in levels of one length, all but the last closed by a convolution or "
            f"all by a residual block, got {num_blocks} blocks with resampling in {closed}"
        )
    return per_level, levels, "resnet" if ends["resnet"] else "conv"


def _head_options(widths, num_head_channels, num_heads):
    """Options for attention of these widths; a width of `None` is diffusers' word for one head at any width."""
    if num_head_channels is not None and num_heads is not None:
        raise ValueError(
            f"`num_heads` must not be given beside `num_head_channels`, got {num_heads} and {num_head_channels}"
        )
    if num_heads is not None:
        name, number = "num_heads", num_heads
    else:
        name, number = "num_head_channels", HEAD_CHANNELS if num_head_channels is None else num_head_channels
    check_integer(name, number)
    if any(width % number for width in widths):
        raise ValueError(f"`{name}` must divide the widths of all attention layers, {sorted(widths)}, got {number}")
    if num_heads is None:
        return {"attention_head_dim": number}
    if num_heads > 1 and len(widths) > 1:
        return {"num_attention_heads": num_heads}
    return {"attention_head_dim": None if num_heads == 1 else max(widths) // num_heads}


def _original_modules(config):
    """The original's name of every block of the `UNet2DModel`: residual blocks, attention, resampling, ends."""
    modules = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    down, up = 1, 0
    for level in range(levels):
        for layer in range(layers):
            modules[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{down + layer}.0"
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{down + layer}.1"
        modules[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{down + layers}.0"
        down += layers + 1
        for layer in range(layers + 1):
            modules[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{up + layer}.0"
            modules[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{up + layer}.1"
        position = 2 if config["up_block_types"][level].startswith("Attn") else 1
        modules[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{up + layers}.{position}"
        up += layers + 1
    return modules


def _original_name(name, modules):
    """The original's name of a weight of the `UNet2DModel`."""
    module, _, leaf = name.rpartition(".")
    part = ""
    while module not in modules:
        module, _, last = module.rpartition(".")
        part = f"{last}.{part}" if part else last
    if part == "conv" and ".downsamplers." in name:
        part = "op"
    part = PARTS.get(part, part)
    return ".".join([modules[module], part, leaf] if part else [modules[module], leaf])


def _split_projection(tensor, index, heads, new_order):
    """Query, key or value (0, 1, 2) of a projection of shape (3 * width, ...), with its heads one after another."""
    rows = tensor.unflatten(0, (3, -1))[index] if new_order else tensor.unflatten(0, (heads, 3, -1))[:, index]
    return rows.clone(memory_format=torch.contiguous_format)  # no view: what is saved must not share memory
