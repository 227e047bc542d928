"""The U-Net of OpenAI's guided-diffusion in words of our own: its keys, its shapes, and what it computes from them."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F


# Every weight of a small network with classes, typed from the source: 32 channels, multipliers 1 and 2, one residual
# block, attention at half resolution, convolutions that resample, no scale-shift. A bias is as long as its weight.
TYPED = """
time_embed.0 128 32; time_embed.2 128 128
input_blocks.0.0 32 3 3 3
input_blocks.1.0.in_layers.0 32; input_blocks.1.0.in_layers.2 32 32 3 3; input_blocks.1.0.emb_layers.1 32 128
input_blocks.1.0.out_layers.0 32; input_blocks.1.0.out_layers.3 32 32 3 3
input_blocks.2.0.op 32 32 3 3
input_blocks.3.0.in_layers.0 32; input_blocks.3.0.in_layers.2 64 32 3 3; input_blocks.3.0.emb_layers.1 64 128
input_blocks.3.0.out_layers.0 64; input_blocks.3.0.out_layers.3 64 64 3 3; input_blocks.3.0.skip_connection 64 32 1 1
input_blocks.3.1.norm 64; input_blocks.3.1.qkv 192 64 1; input_blocks.3.1.proj_out 64 64 1
middle_block.0.in_layers.0 64; middle_block.0.in_layers.2 64 64 3 3; middle_block.0.emb_layers.1 64 128
middle_block.0.out_layers.0 64; middle_block.0.out_layers.3 64 64 3 3
middle_block.1.norm 64; middle_block.1.qkv 192 64 1; middle_block.1.proj_out 64 64 1
middle_block.2.in_layers.0 64; middle_block.2.in_layers.2 64 64 3 3; middle_block.2.emb_layers.1 64 128
middle_block.2.out_layers.0 64; middle_block.2.out_layers.3 64 64 3 3
output_blocks.0.0.in_layers.0 128; output_blocks.0.0.in_layers.2 64 128 3 3; output_blocks.0.0.emb_layers.1 64 128
output_blocks.0.0.out_layers.0 64; output_blocks.0.0.out_layers.3 64 64 3 3; output_blocks.0.0.skip_connection 64 128 1 1
output_blocks.0.1.norm 64; output_blocks.0.1.qkv 192 64 1; output_blocks.0.1.proj_out 64 64 1
output_blocks.1.0.in_layers.0 96; output_blocks.1.0.in_layers.2 64 96 3 3; output_blocks.1.0.emb_layers.1 64 128
output_blocks.1.0.out_layers.0 64; output_blocks.1.0.out_layers.3 64 64 3 3; output_blocks.1.0.skip_connection 64 96 1 1
output_blocks.1.1.norm 64; output_blocks.1.1.qkv 192 64 1; output_blocks.1.1.proj_out 64 64 1
output_blocks.1.2.conv 64 64 3 3
output_blocks.2.0.in_layers.0 96; output_blocks.2.0.in_layers.2 32 96 3 3; output_blocks.2.0.emb_layers.1 32 128
output_blocks.2.0.out_layers.0 32; output_blocks.2.0.out_layers.3 32 32 3 3; output_blocks.2.0.skip_connection 32 96 1 1
output_blocks.3.0.in_layers.0 64; output_blocks.3.0.in_layers.2 32 64 3 3; output_blocks.3.0.emb_layers.1 32 128
output_blocks.3.0.out_layers.0 32; output_blocks.3.0.out_layers.3 32 32 3 3; output_blocks.3.0.skip_connection 32 64 1 1
out.0 32; out.2 3 32 3 3
"""

# The blocks of 256x256_diffusion_uncond.pt, typed from the source and its flags: channels into and out of the residual
# block, then A for attention, U for a second residual block that doubles the resolution.
INPUTS_256 = """
256 256; 256 256; 256 256; 256 256; 256 256; 256 256; 256 512; 512 512; 512 512;
512 512 A; 512 512 A; 512 512; 512 1024 A; 1024 1024 A; 1024 1024; 1024 1024 A; 1024 1024 A
"""
OUTPUTS_256 = """
2048 1024 A; 2048 1024 A; 2048 1024 A U; 2048 1024 A; 2048 1024 A; 1536 1024 A U; 1536 512 A; 1024 512 A; 1024 512 A U;
1024 512; 1024 512; 768 512 U; 768 256; 512 256; 512 256 U; 512 256; 512 256; 512 256
"""


@dataclass(frozen=True)
class Original:
    """A network of guided_diffusion/unet.py; `attention` holds downsampling factors, as there."""

    channels: int = 32
    mult: tuple = (1, 2)
    blocks: int = 1
    attention: tuple = (2,)
    heads: int | None = None
    head_channels: int | None = None
    new_order: bool = False
    updown: bool = True
    scale_shift: bool = True
    out: int = 6
    classes: int | None = None
    inputs: int = 3

    @property
    def options(self):
        return {
            "num_heads": self.heads,
            "num_head_channels": self.head_channels,
            "use_new_attention_order": self.new_order,
        }

    def layers(self):
        """{key prefix: (kind, channels in, channels out)}, in the order in which they run."""
        width = int(self.channels * self.mult[0])
        rows, skips, factor = [("input_blocks", [("conv", self.inputs, width)])], [width], 1
        for level, mult in enumerate(self.mult):
            out = int(self.channels * mult)
            for _ in range(self.blocks):
                attention = [("attention", out, out)] if factor in self.attention else []
                rows.append(("input_blocks", [("res", width, out), *attention]))
                width = out
                skips.append(width)
            if level < len(self.mult) - 1:
                rows.append(("input_blocks", [("res down" if self.updown else "down", width, width)]))
                skips.append(width)
                factor *= 2
        rows.append(("middle_block", [("res", width, width), ("attention", width, width), ("res", width, width)]))
        for level, mult in reversed(list(enumerate(self.mult))):
            out = int(self.channels * mult)
            for block in range(self.blocks + 1):
                row = [("res", width + skips.pop(), out)]
                width = out
                row += [("attention", out, out)] if factor in self.attention else []
                if level > 0 and block == self.blocks:
                    row.append(("res up" if self.updown else "up", out, out))
                    factor //= 2
                rows.append(("output_blocks", row))
        assert not skips
        counts, found = {"input_blocks": 0, "output_blocks": 0}, {}
        for stack, row in rows:
            block = stack
            if stack in counts:
                block = f"{stack}.{counts[stack]}"
                counts[stack] += 1
            found |= {f"{block}.{position}": layer for position, layer in enumerate(row)}
        return found

    def shapes(self):
        """{key: shape} of the state dict."""
        emb, first = 4 * self.channels, int(self.channels * self.mult[0])
        weights = {"time_embed.0": (emb, self.channels), "time_embed.2": (emb, emb)}
        for prefix, (kind, wide, out) in self.layers().items():
            weights |= module_shapes(prefix, kind, wide, out, emb, 2 if self.scale_shift else 1)
        weights |= {"out.0": (first,), "out.2": (self.out, first, 3, 3)}
        shapes = with_biases(weights)
        return shapes if self.classes is None else shapes | {"label_emb.weight": (self.classes, emb)}

    def state(self, dtype=torch.float64):
        """Random weights, also where the original starts from zero."""
        generator = torch.Generator().manual_seed(0)
        state = {}
        for key, shape in self.shapes().items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if len(shape) > 1:
                value /= math.prod(shape[1:]) ** 0.5
            elif key.endswith(".weight"):
                value = 1 + 0.2 * value
            state[key] = value.to(dtype)
        return state

    def run(self, state, x, timesteps, classes=None):
        """The output, of shape (batch_size, out, height, width)."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(self.channels // 2) / (self.channels // 2))
        angles = timesteps.float()[:, None] * frequencies  # in float32, as the original computes them
        waves = F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, self.channels % 2))
        emb = linear(state, "time_embed.0", waves.to(x.dtype))
        emb = linear(state, "time_embed.2", F.silu(emb))
        if classes is not None:
            emb = emb + state["label_emb.weight"][classes]
        skips = []
        for prefix, (kind, *_) in self.layers().items():
            stack, *_, position = prefix.split(".")
            if stack == "input_blocks" and position == "0" and kind != "conv":
                skips.append(x)  # what the block before gave
            elif prefix == "middle_block.0":
                skips.append(x)
            elif stack == "output_blocks" and position == "0":
                x = torch.cat([x, skips.pop()], dim=1)
            if kind == "attention":
                x = self.attend(state, prefix, x)
            elif kind == "conv":
                x = conv(state, prefix, x)
            elif kind == "down":
                x = F.conv2d(x, state[f"{prefix}.op.weight"], state[f"{prefix}.op.bias"], stride=2, padding=1)
            elif kind == "up":
                x = conv(state, f"{prefix}.conv", twice(x))
            else:
                x = self.residual(state, prefix, x, emb, {"res down": half, "res up": twice}.get(kind, lambda h: h))
        assert not skips
        return conv(state, "out.2", F.silu(norm(state, "out.0", x)))

    def residual(self, state, prefix, x, emb, resample):
        h = conv(state, f"{prefix}.in_layers.2", resample(F.silu(norm(state, f"{prefix}.in_layers.0", x))))
        time = linear(state, f"{prefix}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            out = h.shape[1]
            h = norm(state, f"{prefix}.out_layers.0", h) * (1 + time[:, :out]) + time[:, out:]
        else:
            h = norm(state, f"{prefix}.out_layers.0", h + time)
        h = conv(state, f"{prefix}.out_layers.3", F.silu(h))
        x = resample(x)
        return h + (conv(state, f"{prefix}.skip_connection", x) if f"{prefix}.skip_connection.weight" in state else x)

    def attend(self, state, prefix, x):
        width = x.shape[1]
        heads = self.heads or width // (self.head_channels or 64)
        size = width // heads
        h = norm(state, f"{prefix}.norm", x).flatten(2)  # (B, C, pixels)
        rows = F.conv1d(h, state[f"{prefix}.qkv.weight"], state[f"{prefix}.qkv.bias"])
        answers = []
        for head in range(heads):
            starts = [(part * heads + head if self.new_order else head * 3 + part) * size for part in range(3)]
            query, key, value = (rows[:, start : start + size] for start in starts)
            weights = (torch.einsum("bct,bcs->bts", query, key) / size**0.5).softmax(dim=2)
            answers.append(torch.einsum("bts,bcs->bct", weights, value))
        h = F.conv1d(torch.cat(answers, dim=1), state[f"{prefix}.proj_out.weight"], state[f"{prefix}.proj_out.bias"])
        return x + h.view_as(x)


def module_shapes(prefix, kind, wide, out, emb, factor):
    if kind == "attention":
        parts = {"norm": (out,), "qkv": (3 * out, out, 1), "proj_out": (out, out, 1)}
    elif kind.startswith("res"):
        parts = {
            "in_layers.0": (wide,),
            "in_layers.2": (out, wide, 3, 3),
            "emb_layers.1": (factor * out, emb),
            "out_layers.0": (out,),
            "out_layers.3": (out, out, 3, 3),
        }
        parts |= {} if wide == out else {"skip_connection": (out, wide, 1, 1)}
    else:
        return {prefix + {"conv": "", "down": ".op", "up": ".conv"}[kind]: (out, wide, 3, 3)}
    return {f"{prefix}.{part}": shape for part, shape in parts.items()}


def with_biases(weights):
    return {
        f"{name}.{kind}": s for name, shape in weights.items() for kind, s in (("weight", shape), ("bias", shape[:1]))
    }


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def conv(state, name, x):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def norm(state, name, x):
    groups = x.reshape(len(x), 32, -1)
    variance, mean = torch.var_mean(groups, dim=2, keepdim=True, correction=0)
    shape = (1, -1, *[1] * (x.ndim - 2))
    normal = ((groups - mean) / (variance + 1e-5).sqrt()).view_as(x)
    return normal * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


def half(x):
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def twice(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def run_both(net, unet, state):
    """What the original gives with these weights, and what its conversion gives."""
    generator, size = torch.Generator().manual_seed(1), max(8, 2 ** (len(net.mult) - 1))
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([3.25, 871.5], dtype=torch.float64)
    labels = None if net.classes is None else torch.tensor([1, net.classes - 1])
    with torch.no_grad():
        return net.run(state, x, timesteps, labels), unet(x, timesteps, labels).sample
