"""Steps per second and memory of training a PSM, each stage against the way it is usually written.

    python examples/benchmarks/train_throughput.py --json train_throughput.json
    python examples/benchmarks/train_throughput.py --device cuda --true-shapes --json train_throughput_gpu.json

Ours is one step of `fs-psm train` with its own arguments, on a tower and images that are written to a temporary folder: one draw
after the other. The usual way, restated: one graph over all n₀ draws, all frozen but what is trained, the clean features made
once per step. Both compute in float32, or under bfloat16 autocast, and make one AdamW step of the same part with the same
losses but l_diff and l_id.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import torch
from measuring import (
    MEAN,
    STD,
    in_turn,
    median,
    median_ratio,
    parser,
    peak_memory,
    prepare,
    psm_model,
    report,
    usual_denoise,
    vision_tower,
)
from PIL import Image
from transformers import CLIPImageProcessorPil

from fs_psm_hf.pixels import channel_tensor, from_unit
from fs_psm_hf.training import losses, parse_arguments
from fs_psm_hf.training.trainer import Trainer


def trainer(args, folder, stage):
    """Everything `fs-psm train` makes before its first step."""
    words = {
        "stage": stage, "output_dir": folder / stage, "pretrained_model_name_or_path": folder / "tower",
        "train_data_dir": folder / "images", "train_batch_size": args.batch_size, "num_samples": args.num_samples,
        "sigma": 0.25, "max_train_steps": 10_000, "num_validation_images": 2, "resolution": args.image_size,
        "lambda_diff": 0, "lambda_id": 0, "mixed_precision": {"bfloat16": "bf16"}.get(args.dtype, "no"),
        "pretrained_psm_name_or_path": folder / "psm",
    }  # fmt: skip
    (arguments,) = parse_arguments([part for name, value in words.items() for part in (f"--{name}", str(value))])
    return Trainer(arguments)


def usual_step(own, images, optimizer, autocast):
    """One optimiser step on all draws at once."""
    args, psm, tower = own.args, own.psm, own.tower
    model = tower.tower.vision_tower
    count = args.num_samples
    mean, std = channel_tensor(MEAN, images), channel_tensor(STD, images)
    noisy = images.repeat(count, 1, 1, 1)
    noisy = noisy + args.sigma * torch.randn_like(noisy)
    with autocast():
        with torch.no_grad():
            clean = model(pixel_values=from_unit(images, mean, std)).last_hidden_state.repeat(count, 1, 1)
        purified = usual_denoise(psm.purifier, noisy, args.sigma)
        features = model(pixel_values=from_unit(purified, mean, std)).last_hidden_state
        if args.stage == "purifier":
            loss = args.lambda_mse * losses.reconstruction_loss(purified, images.repeat(count, 1, 1, 1))
        else:
            features = features.float()
            features = features + psm.mapper(features, torch.full((len(features),), args.sigma, device=images.device))
            loss = args.lambda_stats * losses.statistics_loss(features, clean.float(), psm.mapper.token_norm)
        loss = loss + args.lambda_rb * losses.cosine_loss(tower.vector(features), tower.vector(clean))
    loss.backward()
    optimizer.step()
    psm.zero_grad()
    return loss.item()


def measure(args, folder, stage):
    """Steps per second and bytes of one stage."""
    own = trainer(args, folder, stage)
    own.stage.train()
    own.psm.requires_grad_(False)
    own.stage.trained.requires_grad_(True)
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    optimizer = torch.optim.AdamW(own.stage.trained.parameters(), lr=1e-6)
    kind = torch.device(args.device).type

    def autocast():
        return torch.autocast(kind, torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()

    def ours():
        own._backward(images, list(range(args.batch_size)))

    def usual():
        usual_step(own, images, optimizer, autocast)

    ours()  # also makes the state of the optimiser
    memory = {"ours": peak_memory(args, ours), "usual": peak_memory(args, usual)}
    seconds = in_turn(args, {"ours": ours, "usual": usual}, warm_up=0)
    row = {
        "stage": stage,
        "batch_size": args.batch_size,
        "num_samples": args.num_samples,
        "steps_per_second_ours": 1 / median(seconds["ours"]),
        "steps_per_second_usual": 1 / median(seconds["usual"]),
        "ratio": median_ratio(seconds["usual"], seconds["ours"]),
        "peak_bytes_ours": memory["ours"],
        "peak_bytes_usual": memory["usual"],
    }
    print(row, flush=True)
    return row


def main():
    made = parser(__doc__, image_size=112, repeats=3)
    made.add_argument("--batch-size", type=int, default=4)
    made.add_argument("--num-samples", type=int, default=4)
    args = made.parse_args()
    if args.true_shapes:
        args.batch_size, args.num_samples = max(args.batch_size, 16), max(args.num_samples, 8)
    if torch.device(args.device).type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    prepare(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tower = vision_tower(args.tower, args.image_size, torch.float32, "cpu")
        tower.save_pretrained(folder / "tower")
        side = {"height": args.image_size, "width": args.image_size}
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": args.image_size}, crop_size=side, image_mean=MEAN, image_std=STD
        )
        processor.save_pretrained(folder / "tower")
        psm_model(args.psm, torch.float32, "cpu", tower.config.hidden_size).save_pretrained(folder / "psm")
        (folder / "images").mkdir()
        generator = torch.Generator().manual_seed(0)
        for index in range(8):
            pixels = torch.randint(256, (args.image_size, args.image_size, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "images" / f"{index}.png")
        rows = [measure(args, folder, stage) for stage in ("purifier", "mapper")]
    report(args, rows=rows)


if __name__ == "__main__":
    main()
