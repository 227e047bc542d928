"""open_clip's Vision Transformers, robust CLIP (FARE, TeCoA) among them, as transformers' CLIP vision models.

The layout is that of `VisionTransformer` in https://github.com/mlfoundations/open_clip, which is also OpenAI's. Keys and
shapes tell patch, width, layers, image size and projection. They do not tell

- **the activation**. OpenAI's weights, and all that was fine-tuned from them (FARE and TeCoA of the ViT-L/14), have
  QuickGELU, the default here. Those that open_clip trained anew (LAION, and FARE from these) mostly have GELU:
  `hidden_act="gelu"`. With the wrong one the features are wrong, and nothing else shows it;
- **the heads**, 64 channels wide but in the largest networks (`num_heads`);
- **the pooling** (of the class token, after the last LayerNorm) and **the normalisation of images** (OpenAI's).
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .checkpoints import (
    check_dtypes,
    check_integer,
    check_output,
    check_shape,
    check_state_dict,
    existing_file,
    load_pickle,
    refuse_other_keys,
    shape_at,
    whole_folder,
)


NETWORK = "an open_clip Vision Transformer"
ACTIVATIONS = ("quick_gelu", "gelu")
HEAD_WIDTH = 64
# ViT-H, -g, -bigG and -e of open_clip have 16 wider heads; a multiple of 64 is no sign of heads of 64 there.
UNCLEAR_WIDTHS = (1280, 1408, 1664, 1792)
# The first holds the visual of the original TeCoA, beside visual prompts under the second.
WRAPPERS = ("vision_encoder_state_dict", "state_dict")
TRAINING_STATE = ("optimizer", "scheduler", "scaler")
# Beginnings of names by which other networks are known.
OTHER_NETWORKS = {
    "trunk.": "a timm visual, such as ConvNeXt, EVA or SigLIP",
    "layer1.": "a ResNet",
    "vision_model.": "a model of transformers, which needs no conversion",
    "embeddings.": "a model of transformers, which needs no conversion",
}
# Names of modules and weights: transformers' on the left, open_clip's on the right.
ENDS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "visual_projection.weight": "proj",
}
PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
# What a whole CLIP has beside `visual.`: the text tower, maybe under `text.`, and scalars, the last three of OpenAI's.
BESIDE_VISUAL = re.compile(
    r"(text\.)?(positional_embedding|text_projection|attn_mask|token_embedding\.weight|ln_final\.(weight|bias)"
    r"|transformer\.resblocks\.\d+\.((ln_1|ln_2|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
    r"|attn\.in_proj_(weight|bias)))"
    r"|logit_scale|logit_bias|input_resolution|context_length|vocab_size"
)


def load_open_clip_checkpoint(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Load the state dict of a visual or of a whole CLIP without running code from the file.

    Args:
        checkpoint (`str` or `Path`):
            `.safetensors`, or a file written by `torch.save`. It holds a flat `dict` from names to tensors, which may
            stand under `state_dict` or `vision_encoder_state_dict` beside what training left (counters, the
            optimizer), and whose names may all begin with `module.`.

    Raises:
        ValueError: the file is missing or damaged, a TorchScript archive, holds code, or weights beside those named.
        TypeError: it holds anything but a state dict.
    """
    path = existing_file(checkpoint)
    if path.suffix == ".safetensors":
        try:
            state_dict = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"`checkpoint` must be an undamaged safetensors file, got {path.name}") from error
    else:
        state_dict = _unwrap(load_pickle(path))
    check_state_dict(state_dict)
    if all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    return state_dict


def convert_open_clip(
    state_dict: dict[str, torch.Tensor],
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
    hidden_act: str = "quick_gelu",
    projection: bool | None = None,
    dtype: torch.dtype | None = None,
) -> CLIPVisionModel | CLIPVisionModelWithProjection:
    """The same function as a CLIP vision model of transformers, in evaluation mode, on the device of `state_dict`.

    The weights of attention and projection are copied, and what `dtype` and `image_size` change: the others are shared
    with `state_dict`. Meta tensors give a model of meta tensors.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            State dict of a visual, with `conv1.weight` of shape `(width, 3, patch, patch)`, or of a whole CLIP with a
            text tower of open_clip's own, which is left out.
        image_size (`int`, *optional*):
            Height and width of the images, a multiple of the patch. Where it is not that of the checkpoint, the
            position embeddings are resampled as open_clip does (bicubic, antialiased); the weights were not trained
            for it.
        num_heads (`int`, *optional*):
            Number of attention heads; width / 64 where not given. Must be given at the widths of ViT-H, -g, -bigG and
            -e (16 in open_clip's own).
        hidden_act (`str`, defaults to `"quick_gelu"`):
            `"quick_gelu"` for weights that go back to OpenAI's, `"gelu"` for most others of open_clip.
        projection (`bool`, *optional*):
            Whether to keep `proj`, as `CLIPVisionModelWithProjection`; kept where there is one if not given.
        dtype (`torch.dtype`, *optional*):
            Floating-point type of the weights; that of `state_dict` where not given.

    Raises:
        ValueError: keys are missing or left over, shapes disagree, or an option is out of range.
        TypeError: `state_dict` is not a flat dict of floating-point tensors of one type.
    """
    check_state_dict(state_dict)
    state_dict = _visual_part(state_dict)
    if hidden_act not in ACTIVATIONS:
        raise ValueError(f"`hidden_act` must be one of {', '.join(ACTIVATIONS)}, got {hidden_act!r}")
    config, grid = _read_config(state_dict, image_size, num_heads)
    if projection and "proj" not in state_dict:
        raise ValueError("`projection` must be False for a `state_dict` without proj, got True")
    projects = "proj" in state_dict and projection is not False
    if projects:
        config["projection_dim"] = shape_at(state_dict, "proj", 2, NETWORK)[1]
    with torch.device("meta"):
        config = CLIPVisionConfig(hidden_act=hidden_act, **config)
        model = (CLIPVisionModelWithProjection if projects else CLIPVisionModel)(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    sources = {name: _open_clip_name(name) for name in expected}
    left_out = {"proj"} if projection is False else set()
    refuse_other_keys(state_dict.keys() - left_out, set(sources.values()), NETWORK)
    check_dtypes(state_dict.values(), dtype)

    converted = {}
    for name, source in sources.items():
        tensor, shape = state_dict[source].detach(), expected[name]
        if source == "positional_embedding":
            tensor = _resample(tensor, grid, config.image_size // config.patch_size)
        part = next((part for part in QUERY_KEY_VALUE if f".{part}." in name), None)
        if part:
            check_shape(tensor.shape, [3 * shape[0], *shape[1:]], source)
            third = tensor.chunk(3)[QUERY_KEY_VALUE.index(part)]
            tensor = third.clone()  # no view: what is saved must not share memory
        elif source == "proj":
            check_shape(tensor.shape, shape[::-1], source)
            tensor = tensor.T
        else:
            check_shape(tensor.shape, shape, source)
        converted[name] = tensor.to(dtype or tensor.dtype).contiguous()
    model.load_state_dict(converted, assign=True)
    # No weight, and the model of meta tensors has only its shape.
    embeddings = (model.vision_model if projects else model).embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=model.device)[None]
    return model.eval()


def convert_open_clip_checkpoint(checkpoint: str | Path, output: str | Path, **options) -> Path:
    """Convert a checkpoint file to a model folder, which appears whole or not at all.

    `CLIPVisionModel.from_pretrained` (or, with a projection, `CLIPVisionModelWithProjection`) loads the folder, and
    `AutoImageProcessor.from_pretrained` the processor beside it: shorter side and centre crop of the model's image
    size, bicubic, OpenAI's mean and standard deviation.

    Args:
        checkpoint (`str` or `Path`): file of [`load_open_clip_checkpoint`].
        output (`str` or `Path`): folder to write, new or empty.
        options: as in [`convert_open_clip`].

    Returns:
        `Path`: the folder.

    Raises:
        ValueError, TypeError: as the two functions named, and for an `output` that holds something.
    """
    output = check_output(output)
    model = convert_open_clip(load_open_clip_checkpoint(checkpoint), **options)
    size = model.config.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return output


def _unwrap(checkpoint):
    wrappers = (name for name in WRAPPERS if isinstance(checkpoint, dict) and isinstance(checkpoint.get(name), dict))
    wrapper = next(wrappers, None)
    if wrapper is None:
        return checkpoint
    for key, value in checkpoint.items():
        if key != wrapper and key not in TRAINING_STATE and _holds_weights(value):
            raise ValueError(f"`checkpoint` must hold no weights beside those of its {wrapper}, got some in {key}")
    return checkpoint[wrapper]


def _holds_weights(value):
    """Whether there are numbers in a tensor; a single one is a counter or a score."""
    if isinstance(value, dict):
        return any(map(_holds_weights, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_weights, value))
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.numel() > 0


def _visual_part(state_dict):
    """The weights of the visual; whatever else a whole CLIP holds must be of its text tower."""
    visual = {key.removeprefix("visual."): value for key, value in state_dict.items() if key.startswith("visual.")}
    if visual:
        beside = (key for key in state_dict if not key.startswith("visual."))
        others = sorted(key for key in beside if not BESIDE_VISUAL.fullmatch(key))
        if others:
            raise ValueError(
                "`state_dict` must have nothing beside `visual.` but a text tower of open_clip's own, "
                f"got {len(others)} keys left over: {', '.join(others[:5])}" + (", …" if len(others) > 5 else "")
            )
        state_dict = visual
    for prefix, network in OTHER_NETWORKS.items():
        key = next((key for key in state_dict if key.startswith(prefix)), None)
        if key:
            raise ValueError(f"`state_dict` must be that of {NETWORK}, got that of {network} ({key})")
    return state_dict


def _read_config(state_dict, image_size, num_heads):
    """Arguments of `CLIPVisionConfig` and the number of patches along a side of the checkpoint's own images."""
    width, channels, patch, patch_width = shape_at(state_dict, "conv1.weight", 4, NETWORK)
    if channels != 3 or patch != patch_width:
        raise ValueError(
            "`state_dict` must have square patches of 3 channels, got "
            f"{(channels, patch, patch_width)} at conv1.weight"
        )
    positions = shape_at(state_dict, "positional_embedding", 2, NETWORK)[0] - 1
    grid = round(max(positions, 0) ** 0.5)
    if grid < 1 or grid**2 != positions:
        raise ValueError(
            "`state_dict` must have a class token and a square of patches at positional_embedding, "
            f"got {positions + 1} positions"
        )
    if image_size is None:
        image_size = grid * patch
    check_integer("image_size", image_size)
    if image_size % patch:
        raise ValueError(f"`image_size` must be a multiple of the patch, {patch}, got {image_size}")
    if num_heads is None:
        if width in UNCLEAR_WIDTHS or width % HEAD_WIDTH:
            why = "16 in open_clip's own" if width in UNCLEAR_WIDTHS else f"no multiple of {HEAD_WIDTH}"
            raise ValueError(f"`num_heads` must be given for a network of width {width} ({why}), got None")
        num_heads = width // HEAD_WIDTH
    check_integer("num_heads", num_heads)
    if width % num_heads:
        raise ValueError(f"`num_heads` must divide the width, {width}, got {num_heads}")
    blocks = [re.match(r"transformer\.resblocks\.(\d+)\.", key) for key in state_dict]
    config = {
        "hidden_size": width,
        "intermediate_size": shape_at(state_dict, "transformer.resblocks.0.mlp.c_fc.weight", 2, NETWORK)[0],
        "num_hidden_layers": 1 + max(int(block[1]) for block in blocks if block),
        "num_attention_heads": num_heads,
        "image_size": image_size,
        "patch_size": patch,
        "layer_norm_eps": 1e-5,
    }
    return config, grid


def _open_clip_name(name):
    """open_clip's name of a weight of transformers' model."""
    name = name.removeprefix("vision_model.")
    if name in ENDS:
        return ENDS[name]
    module, _, leaf = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{leaf}"
    _, _, layer, part = module.split(".", 3)  # encoder.layers.N.…
    joined = part.removeprefix("self_attn.") in QUERY_KEY_VALUE
    return f"transformer.resblocks.{layer}." + (f"attn.in_proj_{leaf}" if joined else f"{PARTS[part]}.{leaf}")


def _resample(embedding, old, new):
    """Position embeddings `(1 + old², width)`, class token first, as `(1 + new², width)`."""
    if old == new:
        return embedding
    patches = embedding[1:].unflatten(0, (1, old, old)).permute(0, 3, 1, 2)  # (1, width, old, old)
    precise = patches.to(torch.promote_types(patches.dtype, torch.float32))
    resized = F.interpolate(precise, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    resized = resized[0].permute(1, 2, 0).flatten(0, 1).to(embedding.dtype)  # (new², width)
    return torch.cat([embedding[:1], resized])
