"""The rows of the measured tables in README and card, from committed results.

python examples/benchmarks/certified_table.py model_cards/dinov2-small-fs/results/*.jsonl
python examples/benchmarks/certified_table.py examples/benchmarks/results/tightness.json
"""

import argparse
import json
from pathlib import Path


TIGHTNESS = ("plugin", "hoeffding", "bernstein", "betting", "cdf_pilot", "cdf", "best")
NAMES = {"plugin": "plug-in", "betting": "FCSB, betting", "cdf": "cdf"}


def rows(path):
    """Markdown rows of one results file: a row per method, and the null level."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    header, end = lines[0], lines[-1]
    for row in end["rows"]:
        confidence = f"{100 * (1 - header['alpha']):g} %" if row["is_certificate"] else "no confidence"
        bounds = " | ".join(f"{bound:.3f}" for bound in row["mean_inner_product_bounds"])
        cosine = 2 * row["mean_robustness_score"] - 1
        start = f"| {header['sigma']:g} | {row['images']} × {row['mean_num_samples']:,.0f} | {NAMES[row['method']]}, {confidence}"
        yield f"{start} | {cosine:.3f} | {bounds} | {row['mean_radius']:.3f} |"
    yield f"| {header['sigma']:g} | {end['rows'][0]['images']} images | null level | {end['null_cosine']:.3f} | | | | | | |"


def tightness_rows(path):
    """Markdown rows of `tightness.py`: mean certified radius per method, a row per scores and n."""
    for row in json.loads(Path(path).read_text())["rows"]:
        for n, found in row["n"].items():
            kind = "resampled" if found.get("resampled") else "recorded"
            radii = " | ".join(f"{found[method]['mean_radius']:.3f}" for method in TIGHTNESS)
            yield f"| {row['sigma']:g} | {row['images']} × {int(n):,} {kind} | {radii} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    for path in parser.parse_args().results:
        print("\n".join(rows(path) if path.endswith(".jsonl") else tightness_rows(path)))


if __name__ == "__main__":
    main()
