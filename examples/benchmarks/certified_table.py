"""The rows of the certified table in README and card, from the results of `fs-psm certify`.

python examples/benchmarks/certified_table.py model_cards/dinov2-small-fs/results/*.jsonl
"""

import argparse
import json
from pathlib import Path


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    for path in parser.parse_args().results:
        print("\n".join(rows(path)))


if __name__ == "__main__":
    main()
