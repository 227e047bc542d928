"""Time against the number of draws n₀, as the paper's Table S.8: a LLaVA with 20 new tokens, and its tower alone.

    python examples/benchmarks/tradeoff.py --json tradeoff.json
    python examples/benchmarks/tradeoff.py --device cuda --true-shapes --json tradeoff_gpu.json
    python examples/benchmarks/tradeoff.py --true-shapes --threads 2 --repeats 1 --json tradeoff_true_shapes.json

True shapes are those of LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, read at layer −2, a purifier of 552.8 M (diffusion) or
43.9 M parameters (light), and a language model of 7 B; else everything is small. Weights are random, which changes no
time. The ratio to n₀ = 1 stands beside the paper's (RTX 4090): on another kind of device it says nothing of either engine.
"""

import argparse

import torch
from measuring import (
    DTYPES,
    TINY_UNET,
    in_turn,
    median,
    median_ratio,
    parser,
    pixel_values,
    prepare,
    psm_model,
    report,
    vision_tower,
)
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fs_psm_hf import PSMConfig, PSMModel, SmoothedVisionTower, attach, detach


MEAN, STD = [0.481, 0.458, 0.408], [0.269, 0.261, 0.276]
# Seconds per sample (paper, Table S.8).
PAPER = {
    "diffusion": {1: 0.28, 2: 0.41, 4: 0.66, 8: 1.12, 16: 2.10},
    "light": {1: 0.20, 2: 0.24, 4: 0.32, 8: 0.49, 16: 0.84},
}
SMALL_VISION = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
SMALL_TEXT = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip
# Of the same kinds of blocks as the true ones, and far smaller.
SMALL_UNETS = {
    "diffusion": {
        "in_channels": 3, "out_channels": 6, "layers_per_block": 2, "block_out_channels": [64, 128, 256],
        "down_block_types": ["ResnetDownsampleBlock2D"] * 2 + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["ResnetUpsampleBlock2D"] * 2, "downsample_type": "resnet",
        "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 32,
    },
    "light": TINY_UNET | {"block_out_channels": [32, 64], "norm_num_groups": 8},
}  # fmt: skip


def language_model(args):
    """A LLaVA with random weights, in the dtype asked for from the start: no float32 copy of 7 B parameters."""
    if args.true_shapes:
        vision = vision_config(args)
        text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    else:
        vision, text = CLIPVisionConfig(**SMALL_VISION), LlamaConfig(vocab_size=1000, **SMALL_TEXT)
    patches = (vision.image_size // vision.patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1, image_seq_length=patches,
        vision_feature_layer=-2,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[args.dtype])
    try:
        with torch.device(args.device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def vision_config(args):
    """CLIP ViT-L/14 at 336 pixels."""
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip


def purifier(args, kind):
    """A PSM with the purifier alone."""
    if args.true_shapes:
        return psm_model(kind, DTYPES[args.dtype], args.device)
    name = {"diffusion": "diffusion", "light": "unet"}[kind]
    psm = PSMModel(PSMConfig(purifier=name, purifier_config=SMALL_UNETS[kind]))
    return psm.to(args.device, DTYPES[args.dtype]).eval()


def prompt(llava, device):
    """Forty tokens of text around one image."""
    config = llava.config
    image = [config.image_token_index] * config.image_seq_length
    ids = torch.tensor([[1, *range(10, 20), *image, *range(20, 50)]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(args, kind, llava):
    """Rows for one purifier; the draws are measured in turn, so that the ratio to n₀ = 1 is of neighbours."""
    options = {"sigma": 0.25, "image_mean": MEAN, "image_std": STD}
    psm = purifier(args, kind)
    if llava is None:
        if args.true_shapes:
            vision = vision_tower("clip-large-336", 336, DTYPES[args.dtype], args.device)
        else:
            vision = CLIPVisionModel(CLIPVisionConfig(**SMALL_VISION)).to(args.device, DTYPES[args.dtype]).eval()
        tower = SmoothedVisionTower.from_components(vision, psm, feature_layer=-2, **options)
    else:
        tower = attach(llava, psm, **options)
    images = pixel_values(argparse.Namespace(image_size=tower.config.image_size, device=args.device), 1)
    functions = {}
    for count in args.num_samples:

        def alone(count=count):
            with tower.smoothing(num_samples=count):
                tower(images, generator=0)

        functions["tower", count] = alone
        if llava is not None:
            inputs = prompt(llava, args.device) | {"pixel_values": images.to(llava.dtype)}

            def whole(count=count, inputs=inputs):
                with tower.smoothing(num_samples=count):
                    llava.generate(
                        **inputs, do_sample=False, min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens
                    )

            functions["end_to_end", count] = whole
    # A CPU takes minutes for a round at the true shapes: there the shortest calls warm up for all.
    slow = args.true_shapes and torch.device(args.device).type == "cpu"
    for name in list(functions)[: 2 if slow else 0]:
        functions[name]()
    seconds = in_turn(args, functions, warm_up=0 if slow else 1)
    rows = []
    for count in args.num_samples:
        row = {"purifier": kind, "num_samples": count}
        row["paper_seconds"] = PAPER[kind].get(count)
        row["paper_ratio"] = None if row["paper_seconds"] is None else row["paper_seconds"] / PAPER[kind][1]
        for what in ("tower", "end_to_end"):
            if (what, count) in seconds:
                row[f"seconds_{what}"] = median(seconds[what, count])
                row[f"ratio_{what}"] = median_ratio(seconds[what, count], seconds[what, args.num_samples[0]])
        print(row, flush=True)
        rows.append(row)
    return rows, sum(p.numel() for p in psm.parameters())


def main():
    made = parser(__doc__, image_size=336, repeats=3)
    made.add_argument(
        "--num-samples", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="the first is the reference"
    )
    made.add_argument("--new-tokens", type=int, default=20)
    made.add_argument("--tower-only", action="store_true", help="no language model: fits where 7 B parameters do not")
    made.add_argument("--purifiers", nargs="+", choices=PAPER, default=list(PAPER))
    args = made.parse_args()
    prepare(args)
    rows, parameters = [], {}
    with torch.inference_mode():
        llava = None if args.tower_only else language_model(args)
        for kind in args.purifiers:
            found, parameters[kind] = measure(args, kind, llava)
            rows += found
            if llava is not None:
                detach(llava)
    args.tower = "clip-large-336" if args.true_shapes else "tiny"
    args.psm, args.image_size = " and ".join(args.purifiers), 336 if args.true_shapes else SMALL_VISION["image_size"]
    report(args, rows=rows, purifier_parameters=parameters, new_tokens=args.new_tokens)


if __name__ == "__main__":
    main()
