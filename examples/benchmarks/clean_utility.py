"""What smoothing costs on clean images: nearest-neighbour accuracy of plain, smoothed, and purified and mapped features.

    python examples/benchmarks/clean_utility.py --tower dinov2-small --psm PSM --images imagenette10_500 --label label \\
        --sigma 0.25 --json utility.json

Each image asks its 5 nearest others (cosine; leave-one-out). They are either plain features, which is what a head
trained on the plain tower knows ("plain gallery"), or features of the asking kind ("own gallery"). Served features: the mean
of `--num-samples` draws. `--images` is a folder with metadata.csv (`--label` is its column), or CIFAR-10 as a parquet file.
"""

import argparse
import csv
import io
import json
import os
from pathlib import Path

import torch
from PIL import Image
from psm_table import typed
from torch.nn import functional as F
from tqdm import tqdm

from fs_psm_hf import PSMModel, SmoothedVisionTower
from fs_psm_hf.cards.tables import format_rows
from fs_psm_hf.certification.folder import image_name
from fs_psm_hf.certification.results_file import versions
from fs_psm_hf.inputs import load_tower


NEIGHBOURS = 5


def read_images(path, label, limit):
    """`[(name, image, class)]`, as many of each class as possible where there is a limit."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path).slice(0, limit or None).to_pylist()
        return [
            (str(i), Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), row[label])
            for i, row in enumerate(table)
        ]
    with open(path / "metadata.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if limit is not None:
        rows = rows[:: max(1, len(rows) // limit)][:limit]
    return [(row["file_name"], Image.open(path / row["file_name"]).convert("RGB"), row[label]) for row in rows]


def accuracy(queries, gallery, labels):
    """Leave-one-out accuracy of the vote of the nearest neighbours, each weighted by its cosine."""
    similarity = queries @ gallery.T
    similarity.fill_diagonal_(-1)
    values, nearest = similarity.topk(NEIGHBOURS, dim=1)
    votes = torch.zeros(len(queries), int(labels.max()) + 1).scatter_add_(1, labels[nearest], values)
    return (votes.argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--psm", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--label", default="label")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--sigma", type=float, nargs="+", required=True)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--feature", default="cls")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    tower, processor = load_tower(args.tower, dtype=args.dtype)
    names = ("image_mean", "image_std", "feature_layer", "first_token")
    settings = {name: getattr(tower.config, name) for name in names}
    base, psm = tower.vision_tower, PSMModel.from_pretrained(args.psm)
    towers = {"plain": tower}
    for sigma in args.sigma:
        options = settings | {"sigma": sigma, "num_samples": args.num_samples}
        towers[f"FS, σ = {sigma:g}"] = SmoothedVisionTower.from_components(base, None, **options)
        towers[f"FS+PSM, σ = {sigma:g}"] = SmoothedVisionTower.from_components(base, psm, **options)
    images = read_images(args.images, args.label, args.limit)
    classes = sorted({label for _, _, label in images})
    labels = torch.tensor([classes.index(label) for _, _, label in images])
    features = {name: [] for name in towers}
    for name, image, _ in tqdm(images):
        pixels = processor(images=image, return_tensors="pt")["pixel_values"].float()
        features["plain"].append(tower.clean_features(pixels, args.feature)[0])
        for row, smoothed in list(towers.items())[1:]:
            (draws,) = smoothed.sample_features(
                pixels, args.num_samples, args.feature, generator=0, image_ids=[image_name(name)]
            )
            features[row].append(F.normalize(draws[0].mean(0), dim=0))
    features = {name: torch.stack(rows) for name, rows in features.items()}
    found = {
        name: {
            "plain_gallery": accuracy(rows, features["plain"], labels),
            "own_gallery": accuracy(rows, rows, labels),
            "mean_cosine_with_plain": (rows * features["plain"]).sum(1).mean().item(),
        }
        for name, rows in features.items()
    }
    result = {
        "rows": found, "images": len(images), "classes": len(classes), "chance": 1 / len(classes),
        "data": args.images.name, "num_samples": args.num_samples, "neighbours": NEIGHBOURS, "feature": args.feature,
        "dtype": args.dtype, "versions": versions(), "command": typed(),
    }  # fmt: skip
    unfinished = args.json.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(unfinished, args.json)
    print(format_rows(result))


if __name__ == "__main__":
    main()
