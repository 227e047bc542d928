"""What each method certifies from the same recorded scores, and what stopping early saves.

    python examples/benchmarks/tightness.py --scores model_cards/dinov2-small-fs/scores/* --json tightness.json

`--scores` are folders that `fs-psm certify --save-scores` wrote. For n up to what a folder holds, the first n scores of
each image are bounded. For n = 100,000 the recorded scores of an image are taken as a known population and drawn from
with replacement: the radii are then about that population, whose own radius stands beside them, and none may exceed it.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np

from fs_psm_hf.certification import bands, bounds, certify_scores
from fs_psm_hf.certification.adaptive import certify_stream
from fs_psm_hf.certification.results_file import versions
from fs_psm_hf.certification.saved import load_draws


SIZES = (1_000, 10_000, 100_000)
METHODS = ("plugin", "hoeffding", "bernstein", "betting", "cdf_pilot", "cdf", "best")
EPSILONS = (0.125, 0.25, 0.375, 0.5, 0.75)


def berk_jones(scores, sigma, alpha):
    """Radius of the unweighted Berk–Jones band, all ranks at one level: what the weights of `cdf` gain."""
    n = scores.shape[-1]
    _, survival = bands.calibrated_levels(n, alpha, tuple(range(1, n + 1)), 1.0)
    return bounds.layer_cake_radius(survival, np.sort(scores, axis=-1), sigma, 0.5)


def bound(scores, sigma, alpha):
    """Means over the images, one entry per method."""
    found = {}
    for method in METHODS:
        certificates = certify_scores(scores, sigma=sigma, epsilons=EPSILONS, alpha=alpha, method=method)
        radii = [c.radius for c in certificates]
        found[method] = {
            "mean_radius": float(np.mean(radii)),
            "radii": radii,
            "abstained": sum(c.abstained for c in certificates),
            "mean_inner_product_bounds": np.mean([c.inner_product_bounds for c in certificates], 0).tolist(),
        }
    return found


def savings(saved, sigma, alpha, num_samples):
    """Scores used and radius certified where the sampling may stop early, beside all of the scores."""
    fixed = [certify_scores(d.take(num_samples), sigma=sigma, alpha=alpha).radius for d in saved]
    rows = [{"fixed_num_samples": num_samples, "mean_radius": float(np.mean(fixed))}]
    goals = [{"target_radius": r} for r in (0.1, 0.2, 0.3, 0.4)] + [{"tolerance": t} for t in (0.02, 0.05, 0.1)]
    for goal in goals:
        found = [certify_stream(d.take, num_samples, sigma=sigma, alpha=alpha, **goal) for d in saved]
        used = [c.num_samples for c in found]
        row = {**goal, "num_looks": found[0].num_looks, "num_samples": used, "saved": 1 - np.mean(used) / num_samples}
        row["mean_radius"] = float(np.mean([c.radius for c in found]))
        if "target_radius" in goal:
            row["reached"] = sum(c.radius >= goal["target_radius"] for c in found)
            row["reached_with_all"] = sum(radius >= goal["target_radius"] for radius in fixed)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, nargs="+", required=True)
    parser.add_argument("--alpha", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()

    rows = []
    for folder in args.scores:
        saved = load_draws(folder)
        sigma, recorded = saved[0].facts["sigma"], saved[0].num_samples
        row = {"scores": folder.name, "sigma": sigma, "images": len(saved), "recorded": recorded, "n": {}}
        row["feature"], row["model"], row["dtype"] = (saved[0].record[k] for k in ("feature", "model", "dtype"))
        for n in SIZES:
            if n <= recorded:
                scores = np.stack([draws.take(n) for draws in saved])
                row["n"][n] = bound(scores, sigma, args.alpha)
                if n == 1_000:
                    radii = berk_jones(scores, sigma, args.alpha)
                    row["n"][n]["cdf, Berk-Jones"] = {"mean_radius": float(radii.mean()), "radii": radii.tolist()}
        if recorded >= 10_000:
            row["adaptive"] = savings(saved, sigma, args.alpha, recorded)
            rng = np.random.default_rng(0)
            scores = np.stack([rng.choice(draws.take(recorded), 100_000) for draws in saved])
            row["n"][100_000] = bound(scores, sigma, args.alpha) | {"resampled": True}
            ordered = np.sort([draws.take(recorded) for draws in saved], axis=-1)
            survival = 1.0 - np.arange(recorded) / recorded  # P(s >= s_(i)) in the recorded population
            population = bounds.layer_cake_radius(np.minimum(survival, 1.0), ordered, sigma, 0.5)
            row["population_radii"] = [float(r) if np.isfinite(r) else "inf" for r in population]
        rows.append(row)
        for n, found in row["n"].items():
            line = ", ".join(f"{m} {v['mean_radius']:.4f}" for m, v in found.items() if m != "resampled")
            print(f"{folder.name}, n = {n:,}: {line}")
        for entry in row.get("adaptive", []):
            print("  ", entry)
    if args.json is not None:
        command = f"python examples/benchmarks/tightness.py --scores {' '.join(p.name for p in args.scores)}"
        result = {"command": command, "alpha": args.alpha, "level": 0.5, "versions": versions(), "rows": rows}
        unfinished = args.json.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(unfinished, args.json)


if __name__ == "__main__":
    main()
