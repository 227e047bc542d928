"""Table 5's rows from saved scores, and the PSNR of the purifiers on the same noisy images.

    python examples/benchmarks/psm_table.py --scores scores --images imagenet_sample_1000 --processor dinov2-small \\
        --purifier P=PSM --purifier FFDNet=ffdnet:WEIGHTS --json table.json

`--scores` is what `psm_scores.py` wrote: a folder per row and σ. Plug-in numbers take the first 200 draws of every image,
certificates (99.9 %, `cdf`) all draws of the images that have at least 1,000.
"""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from psm_scores import load_purifier
from transformers import AutoImageProcessor

from fs_psm_hf.cards.tables import ROWS, format_table
from fs_psm_hf.certification import certify_scores
from fs_psm_hf.certification.folder import image_name, read_image
from fs_psm_hf.certification.results_file import versions
from fs_psm_hf.certification.saved import load_draws
from fs_psm_hf.noise import gaussian_noise
from fs_psm_hf.pixels import channel_tensor, to_unit


EPSILONS = (0.125, 0.25, 0.375, 0.5, 0.75)
PLUGIN_DRAWS, CERTIFIED_DRAWS, ALPHA, LEVEL = 200, 1000, 1e-3, 0.5


def bound(scores, sigma, method):
    """Means over images of the bounds of `certify_scores`."""
    question = {"epsilons": EPSILONS, "alpha": ALPHA, "level": LEVEL}
    found = [certify_scores(s, sigma=sigma, method=method, **question) for s in scores]
    return {
        "images": len(scores),
        "num_samples": len(scores[0]),
        "mean_cosine": float(np.mean([2 * s.mean() - 1 for s in scores])),
        "mean_inner_product_bounds": np.mean([c.inner_product_bounds for c in found], 0).tolist(),
        "mean_radius": float(np.mean([c.radius for c in found])),
        "abstained": sum(c.abstained for c in found),
    }


def table_row(folder):
    """Plug-in and certified means of one folder of scores."""
    draws = load_draws(folder)
    sigma = draws[0].facts["sigma"]
    row = {"sigma": sigma, "psm": draws[0].record["psm"], "dtype": draws[0].record["dtype"]}
    row["plugin"] = bound([d.take(PLUGIN_DRAWS) for d in draws], sigma, "plugin")
    many = [d for d in draws if d.num_samples >= CERTIFIED_DRAWS]
    if many:
        row["cdf"] = bound([d.take(CERTIFIED_DRAWS) for d in many], sigma, "cdf")
        row["cdf_images_plugin"] = bound([d.take(CERTIFIED_DRAWS) for d in many], sigma, "plugin")
    return row, [d.facts["file"] for d in draws]


@torch.inference_mode()
def psnr(purifier, images, names, sigma, draws):
    """Mean PSNR in dB of noisy and of purified images, unclipped, on the noise that the scores saw."""
    found = []
    for image, name in zip(images, names, strict=True):
        noise = gaussian_noise(tuple(image.shape[1:]), 0, [image_name(name)], 0, draws, image.device)
        noisy = image + sigma * noise
        pairs = [noisy, noisy if purifier is None else purifier.denoise(noisy, sigma).float()]
        found.append([-10 * (p - image).square().flatten(1).mean(1).log10().mean().item() for p in pairs])
    return np.mean(found, 0).tolist()


def typed():
    """The command that was typed, folders by their last name."""
    words = [re.sub(r"(^|(?<=[=:]))/\S*/", "", word) for word in sys.argv[1:]]
    return shlex.join(["python", f"examples/benchmarks/{Path(sys.argv[0]).name}", *words])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--processor", required=True)
    parser.add_argument("--purifier", action="append", default=[], help="NAME=none, a PSM, or ffdnet:WEIGHTS")
    parser.add_argument("--dtype", default="bfloat16", help="of the purifiers")
    parser.add_argument("--feature", default="class token", help="what the scores are of, for the record")
    parser.add_argument("--draws", type=int, default=4, help="noisy copies per image for the PSNR")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows, files, any_files = {}, None, None
    for folder in sorted(args.scores.iterdir()):
        name, _, sigma = folder.name.rpartition("-sigma")
        if name not in ROWS:
            continue
        rows.setdefault(sigma, {})[name], files = table_row(folder)
        any_files = any_files or files
        if files != any_files:
            raise SystemExit(f"`--scores` {folder.name} is of other images than the folder before it")
    processor = AutoImageProcessor.from_pretrained(args.processor)
    purifiers = {}
    for given in args.purifier:
        name, _, path = given.partition("=")
        own, psm = load_purifier(path)
        purifiers[name] = own or psm.to(getattr(torch, args.dtype)).purifier
    images = []
    for name in files:
        pixels = read_image(args.images / name, processor)
        images.append(
            to_unit(pixels, *(channel_tensor(v, pixels) for v in (processor.image_mean, processor.image_std)))
        )
    quality = {}
    for sigma in rows:
        for name, purifier in purifiers.items():
            noisy, purified = psnr(purifier, images, files, float(sigma), args.draws)
            quality.setdefault(sigma, {"noisy": noisy})[name] = purified
    found = {
        "rows": rows, "psnr_db": quality, "epsilons": EPSILONS, "alpha": ALPHA, "level": LEVEL, "files": files,
        "feature": args.feature, "versions": versions(), "command": typed(),
    }  # fmt: skip
    unfinished = args.json.with_suffix(".tmp")
    unfinished.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(unfinished, args.json)
    print(format_table(found))


if __name__ == "__main__":
    main()
