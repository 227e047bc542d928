"""open_clip's Vision Transformer in words of our own: its keys, its shapes, and what it computes from them."""

import math
import re
from dataclasses import dataclass

import torch
from torch.nn import functional as F


# One block and the ends of the ViT-L/14 at 224 px, typed from its configuration; all 24 blocks are alike.
TYPED_L14 = """
class_embedding 1024; positional_embedding 257 1024; proj 1024 768; conv1.weight 1024 3 14 14
ln_pre.weight 1024; ln_pre.bias 1024; ln_post.weight 1024; ln_post.bias 1024
"""
TYPED_L14_BLOCK = """
ln_1.weight 1024; ln_1.bias 1024; attn.in_proj_weight 3072 1024; attn.in_proj_bias 3072
attn.out_proj.weight 1024 1024; attn.out_proj.bias 1024; ln_2.weight 1024; ln_2.bias 1024
mlp.c_fc.weight 4096 1024; mlp.c_fc.bias 4096; mlp.c_proj.weight 1024 4096; mlp.c_proj.bias 1024
"""


def typed(table, prefix=""):
    """{key: shape} of a table."""
    entries = [entry.split() for entry in table.strip().replace("\n", ";").split(";")]
    return {prefix + name: tuple(map(int, shape)) for name, *shape in entries}


@dataclass(frozen=True)
class Visual:
    """A visual of open_clip, with `grid` patches along each side."""

    width: int = 64
    heads: int = 1
    layers: int = 3
    patch: int = 4
    grid: int = 4
    mlp: int = 160
    embed: int | None = 24
    quick: bool = True

    @property
    def options(self):
        return {"num_heads": self.heads, "hidden_act": "quick_gelu" if self.quick else "gelu"}

    @property
    def size(self):
        return self.grid * self.patch

    def shapes(self):
        width = self.width
        shapes = {"class_embedding": (width,), "positional_embedding": (1 + self.grid**2, width)}
        shapes |= {"conv1.weight": (width, 3, self.patch, self.patch)}
        if self.embed is not None:
            shapes |= {"proj": (width, self.embed)}
        linear = {"attn.in_proj": (3 * width, width), "attn.out_proj.": (width, width)}
        linear |= {"mlp.c_fc.": (self.mlp, width), "mlp.c_proj.": (width, self.mlp)}
        norms = ["ln_pre.", "ln_post."]
        for layer in range(self.layers):
            block = f"transformer.resblocks.{layer}."
            norms += [f"{block}ln_1.", f"{block}ln_2."]
            for name, shape in linear.items():
                name = f"{block}{name}" + ("" if name.endswith(".") else "_")
                shapes |= {f"{name}weight": shape, f"{name}bias": shape[:1]}
        for norm in norms:
            shapes |= {f"{norm}weight": (width,), f"{norm}bias": (width,)}
        return shapes

    def state(self, dtype=torch.float64, seed=0):
        """Random weights; large enough that the attention is far from uniform."""
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for key, shape in self.shapes().items():
            scale = 1.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3
            mean = float(bool(re.search(r"ln_\w+\.weight", key)))
            state[key] = mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return {key: value.to(dtype) for key, value in state.items()}

    def run(self, state, images):
        """Images `(B, 3, H, W)` to (what enters each block and leaves the last, pooled tokens, embeddings).

        The attention is torch's own, with the weights joined as they lie in the state dict.
        """

        def norm(x, name):
            return F.layer_norm(x, (self.width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

        def linear(x, name):
            return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

        patches = F.conv2d(images, state["conv1.weight"], stride=self.patch).flatten(2).mT  # (B, grid², width)
        first = state["class_embedding"].repeat(len(images), 1, 1)
        x = norm(torch.cat([first, patches], 1) + state["positional_embedding"], "ln_pre")
        states = [x]
        for layer in range(self.layers):
            block = f"transformer.resblocks.{layer}."
            attention = torch.nn.MultiheadAttention(self.width, self.heads, batch_first=True, dtype=x.dtype)
            attention.load_state_dict(
                {key.removeprefix(f"{block}attn."): w for key, w in state.items() if key.startswith(f"{block}attn.")}
            )
            y = norm(x, f"{block}ln_1")
            x = x + attention(y, y, y, need_weights=False)[0]
            y = linear(norm(x, f"{block}ln_2"), f"{block}mlp.c_fc")
            y = y * torch.sigmoid(1.702 * y) if self.quick else y * torch.special.ndtr(y)
            x = x + linear(y, f"{block}mlp.c_proj")
            states.append(x)
        pooled = norm(x, "ln_post")[:, 0]
        return states, pooled, pooled @ state["proj"] if "proj" in state else None


def whole_clip(visual, prefix="", **more):
    """The state dict of a CLIP around the state dict of a visual, with a text tower of width 8 below `prefix`."""
    text = {"positional_embedding": (6, 8), "text_projection": (8, 24), "token_embedding.weight": (20, 8)}
    text |= {"ln_final.weight": (8,), "ln_final.bias": (8,)}
    blocks = Visual(width=8, mlp=32, layers=2).shapes()
    text |= {key: shape for key, shape in blocks.items() if key.startswith("transformer.")}
    state = {f"visual.{key}": value for key, value in visual.items()} | {"logit_scale": torch.tensor(4.6)}
    return state | {prefix + key: torch.zeros(shape) for key, shape in text.items()} | more


def in_open_clip_layout(tower):
    """The weights of a `CLIPVisionModel` as open_clip would have saved them, without a projection."""
    vision = {key: weight.detach() for key, weight in tower.state_dict().items()}
    visual = {
        "class_embedding": vision["embeddings.class_embedding"],
        "positional_embedding": vision["embeddings.position_embedding.weight"],
        "conv1.weight": vision["embeddings.patch_embedding.weight"],
    }
    for end in ("weight", "bias"):
        visual |= {f"ln_pre.{end}": vision[f"pre_layrnorm.{end}"], f"ln_post.{end}": vision[f"post_layernorm.{end}"]}
        for layer in range(tower.config.num_hidden_layers):
            old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            joined = [vision[f"{old}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            visual |= {
                f"{new}.ln_1.{end}": vision[f"{old}.layer_norm1.{end}"],
                f"{new}.attn.in_proj_{end}": torch.cat(joined),
                f"{new}.attn.out_proj.{end}": vision[f"{old}.self_attn.out_proj.{end}"],
                f"{new}.ln_2.{end}": vision[f"{old}.layer_norm2.{end}"],
                f"{new}.mlp.c_fc.{end}": vision[f"{old}.mlp.fc1.{end}"],
                f"{new}.mlp.c_proj.{end}": vision[f"{old}.mlp.fc2.{end}"],
            }
    return visual
