"""What it costs to turn scores into certificates, against the usual loop over thresholds. One core.

    python examples/benchmarks/bounding_cost.py --json bounding_cost.json

The loop is a restatement of the published way (aounon/cdf-smoothing, described, not copied): for each image and radius,
10,000 thresholds, each counted, corrected by the DKW inequality and shifted with `scipy.stats.norm` in Python. It is timed
on a few of the images and radii, in turn with ours on all of them; the ratio is of seconds per image and radius.
"""

import argparse
import json
import os
import time
from pathlib import Path


for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402
from scipy.stats import norm  # noqa: E402

from fs_psm_hf.certification import bands, bounds  # noqa: E402
from fs_psm_hf.certification.certificate import lower_bounds  # noqa: E402
from fs_psm_hf.certification.results_file import versions  # noqa: E402


SIGMA, ALPHA = 0.25, 1e-3


def loop(scores, epsilon, num_thresholds=10_000):
    """The layer-cake bound with the DKW inequality, a threshold at a time."""
    correction = np.sqrt(np.log(1 / ALPHA) / (2 * len(scores)))
    total = 0.0
    for threshold in np.linspace(0.0, 1.0, num_thresholds + 1)[1:]:
        share = (scores >= threshold).mean() - correction
        if share > 0:
            total += norm.cdf(norm.ppf(share) - epsilon / SIGMA) / num_thresholds
    return total


def ours(scores, epsilons):
    bands.calibrated_levels.cache_clear()
    level = np.full(len(scores), 0.5)
    return lower_bounds(scores, epsilons, level, sigma=SIGMA, alpha=ALPHA, method="cdf")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--radii", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    scores = np.random.default_rng(0).beta(95, 5, (args.images, args.num_samples))
    epsilons = np.linspace(0.0, 1.0, args.radii)
    whole, each, tighter = [], [], []
    for repeat in range(args.repeats):
        start = time.process_time()
        lower, _, _ = ours(scores, epsilons)
        whole.append(time.process_time() - start)
        start = time.process_time()
        bound = loop(scores[repeat], epsilons[10])
        each.append(time.process_time() - start)
        tighter.append(float(lower[repeat, 10] - bound))
        print(f"ours, all: {whole[-1]:.2f} s; loop, one image and radius: {each[-1]:.2f} s")
    per_bound = float(np.median(whole)) / (args.images * args.radii)
    band, survival = bands.order_band(scores[0], ALPHA)
    deployed = {}
    for num_draws in (1, 4, 16, 64):
        start = time.process_time()
        for _ in range(10):
            bounds.deployed_score(survival, band, 0.1, SIGMA, num_draws)
        deployed[num_draws] = (time.process_time() - start) / 10
    result = {
        "images": args.images, "num_samples": args.num_samples, "radii": args.radii, "repeats": args.repeats,
        "seconds": float(np.median(whole)), "seconds_of_loop_per_image_and_radius": float(np.median(each)),
        "ratio_loop_to_ours": float(np.median(each)) / per_bound,
        "mean_gain_in_score_over_dkw": float(np.mean(tighter)), "seconds_deployed": deployed,
        "clock": "process time of one core", "versions": versions(),
        "command": "python examples/benchmarks/bounding_cost.py",
    }  # fmt: skip
    print(json.dumps({k: v for k, v in result.items() if k != "versions"}, indent=1))
    if args.json is not None:
        unfinished = args.json.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(unfinished, args.json)


if __name__ == "__main__":
    main()
