"""Images of CIFAR-10 with a target of another class each, as examples/tables/tiny_llava.yaml reads them.

    python examples/tables/cifar10_pairs.py --parquet cifar10/test.parquet --output DATA/cifar10_pairs

The first images of the file, classes in turn; the target of each is the next image of the next class.
"""

import argparse
import csv
import io
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", type=Path, required=True, help="with columns image and label")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    classes = {}
    for row in pq.read_table(args.parquet).to_pylist():
        classes.setdefault(row["label"], []).append(row["image"]["bytes"])
    labels = sorted(classes)
    each = -(-args.count // len(labels))
    short = [label for label in labels if len(classes[label]) < 2 * each]
    if short:
        raise SystemExit(f"`--count` needs {2 * each} images of each class, {args.parquet} has fewer of {short[0]}")
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(args.count):
        place, turn = number % len(labels), number // len(labels)
        wanted = (place + 1) % len(labels)
        names = []
        for kind, label, index in (("clean", place, turn), ("target", wanted, each + turn)):
            name = f"images/{number:03d}-{kind}.png"
            Image.open(io.BytesIO(classes[labels[label]][index])).convert("RGB").save(args.output / name)
            names.append(name)
        rows.append([*names, labels[place], labels[wanted]])
    with open(args.output / "metadata.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file_name", "target_file", "label", "target_label"])
        writer.writerows(rows)
    print(f"{args.count} pairs in {args.output}")


if __name__ == "__main__":
    main()
