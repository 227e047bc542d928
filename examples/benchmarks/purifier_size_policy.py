"""Should a 256-pixel purifier see a tower's image resized to 256, or padded at its own size? What resizing does.

For every size and kernel: the noise level after resizing (as a share of what was added) and its correlation between
neighbouring pixels, both of which break the rule that finds the timestep; and, with --images, the PSNR of real images
after size → 256 → size with no noise and a perfect purifier, which is the ceiling of any purifier used that way.
Padding leaves the level at 1, the correlation at 0 and the PSNR without a ceiling.

    python examples/benchmarks/purifier_size_policy.py --images DIR --json sizes.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


def resize(images, size, mode):
    return F.interpolate(images, size=(size, size), mode=mode, antialias=True)


def describe_noise(noise):
    """Standard deviation and the correlation of horizontal neighbours."""
    return {
        "level": round(noise.std().item(), 4),
        "correlation": round(((noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()).item(), 4),
    }


def load(path, size):
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs, for the PSNR of the round trip")
    parser.add_argument("--limit", type=int, default=50, help="photographs to read")
    parser.add_argument("--unet-size", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    paths = (
        [] if args.images is None else sorted(p for p in args.images.iterdir() if p.suffix.lower() in (".jpg", ".png"))
    )

    rows = []
    for size in (224, 336):
        noise = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))
        images = [load(path, size) for path in paths[: args.limit]]
        for mode in ("bilinear", "bicubic"):
            there = resize(noise, args.unet_size, mode)
            row = {"size": size, "kernel": mode, "at_unet": describe_noise(there)}
            row["after_round_trip"] = describe_noise(resize(there, size, mode))
            if images:
                errors = [(resize(resize(x, args.unet_size, mode), size, mode) - x).square().mean() for x in images]
                psnr = -10 * torch.stack(errors).log10()
                row["psnr_db"] = {"mean": round(psnr.mean().item(), 2), "lowest": round(psnr.min().item(), 2)}
            rows.append(row)
            print(json.dumps(row))
    if args.json is not None:
        settings = {"images": args.images and args.images.resolve().name, "images_read": min(len(paths), args.limit)}
        settings["unet_size"] = args.unet_size
        args.json.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
