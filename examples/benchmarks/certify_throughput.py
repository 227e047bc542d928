"""Draws per second of certification against the usual loop, and draws needed for a given certified radius.

    python examples/benchmarks/certify_throughput.py --json certify_throughput.json
    python examples/benchmarks/certify_throughput.py --device cuda --true-shapes --compile --json certify_throughput_gpu.json
    python examples/benchmarks/certify_throughput.py --radius-only --tower model_cards/tiny-llava-cifar10 \\
        --psm model_cards/fs-psm-tiny-clip-cifar10 --image-size 32 --sigma 0.12 --dtype float32 --max-draws 10000 \\
        --json certify_to_radius.json

The loop is a restatement of the published way (github.com/ethz-spylab/diffusion_denoised_smoothing, described, not copied):
one image per batch, float32, copies of the image for the noise, and after each batch a wait for the device and a count in
Python. Both score the same number of draws of the same networks with the same weights; the two lower bounds come from
different noise and, with `--dtype bfloat16`, from functions that differ by rounding, so they agree within their confidence only.

Draws to a radius: what Hoeffding's inequality and the paper's bound certify from `--max-draws` draws is the target, and the
adaptive layer-cake bound stops as soon as it certifies as much. `--radius-only` takes any `--tower` that `fs-psm certify`
takes, with the layer that its host reads, and three photographs of scikit-image: there the weights matter.
"""

import dataclasses
import math

import numpy as np
import torch
from measuring import (
    clock,
    in_turn,
    median,
    median_ratio,
    parser,
    pixel_values,
    prepare,
    report,
    smoothed_tower,
    unit_images,
    usual_features,
)
from PIL import Image
from skimage import data

from fs_psm_hf import certify_features, certify_scores
from fs_psm_hf.certification.certify import draw_scores
from fs_psm_hf.certification.identity import describe
from fs_psm_hf.inputs import load_tower
from fs_psm_hf.pixels import channel_tensor, from_unit


def usual_loop(tower, image, anchor, num_samples, sigma, batch_size=200):
    """Scores of one image, a batch at a time."""
    clean, scores = unit_images(image), []
    remaining = num_samples
    while remaining > 0:
        count = min(batch_size, remaining)
        remaining -= count
        batch = clean.repeat(count, 1, 1, 1)
        noisy = batch + sigma * torch.randn_like(batch)
        products = (usual_features(tower, noisy, sigma) * anchor).sum(1)
        for product in products.cpu().numpy():  # waits for the device
            scores.append((1.0 + float(product)) / 2.0)
    return np.array(scores)


def photographs(args, tower):
    """Three photographs of scikit-image, as pixel values normalised for the tower."""
    size = args.image_size
    made = []
    for picture in (data.chelsea()[:, 75:375], data.astronaut(), data.coffee()[:, 100:500]):
        pixels = np.asarray(Image.fromarray(picture).resize((size, size), Image.BICUBIC), np.float32) / 255
        made.append(torch.from_numpy(pixels).permute(2, 0, 1))
    images = torch.stack(made)
    mean, std = (channel_tensor(values, images) for values in (tower.config.image_mean, tower.config.image_std))
    return from_unit(images, mean, std).to(args.device)


def throughput(args, tower):
    """Draws per second of both, and whether their lower bounds agree."""
    plain = smoothed_tower(args, dtype=torch.float32, sigma=args.sigma)
    plain.load_state_dict(tower.state_dict())  # the same weights, as wide as the loop runs them
    image, last = pixel_values(args, 1), {}
    anchor = plain.clean_features(image)[0]
    facts = describe(tower)  # the weights are hashed once for a folder of images, so not in the time of one

    def ours():
        seed = args.seeds.pop()
        (draws,) = draw_scores(tower, image, anchor=anchor[None], generator=seed, description=facts)
        found = certify_scores(draws.take(args.num_samples), sigma=args.sigma, epsilons=[0.125], method="betting")
        last["ours"] = dataclasses.replace(found, **draws.record)

    def usual():
        last["usual"] = usual_loop(plain, image, anchor, args.num_samples, args.sigma, args.loop_batch_size)

    seconds = in_turn(args, {"ours": ours, "usual": usual})
    theirs = certify_scores(last["usual"], sigma=args.sigma, epsilons=[0.125], method="betting")
    error = last["usual"].std() / math.sqrt(args.num_samples)
    return {
        "num_samples": args.num_samples,
        "draws_per_second_ours": args.num_samples / median(seconds["ours"]),
        "draws_per_second_usual": args.num_samples / median(seconds["usual"]),
        "ratio": median_ratio(seconds["usual"], seconds["ours"]),
        "robustness_score_ours": last["ours"].robustness_score,
        "robustness_score_usual": theirs.robustness_score,
        # Of two independent means: below 3 or 4 for the same function.
        "difference_in_standard_errors": abs(last["ours"].robustness_score - theirs.robustness_score)
        / (math.sqrt(2) * error),
        "radius_ours": last["ours"].radius,
        "radius_usual": theirs.radius,
        "mode": {
            name: facts[name] for name in sorted(facts) if name in ("dtype", "attention", "compiled", "quantization")
        },
    }


def draws_to_radius(args, tower):
    """For each image: draws and seconds until the radius that Hoeffding certifies from all draws is certified."""
    images = photographs(args, tower) if args.radius_only else pixel_values(args, 1)
    rows = []
    for index in range(len(images)):
        image = images[index : index + 1]
        start = clock(args)
        (usual,) = certify_features(tower, image, num_samples=args.max_draws, method="hoeffding", generator=1)
        middle = clock(args)
        row = {"radius": usual.radius, "draws_hoeffding": args.max_draws, "seconds_hoeffding": middle - start}
        if usual.radius > 0:
            (ours,) = certify_features(
                tower, image, num_samples=args.max_draws, method="cdf", target_radius=usual.radius, generator=2
            )
            row |= {
                "radius_adaptive": ours.radius, "draws_adaptive": ours.num_samples,
                "seconds_adaptive": clock(args) - middle, "ratio_of_draws": args.max_draws / ours.num_samples,
            }  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    return rows


def main():
    made = parser(__doc__, image_size=112, repeats=3)
    made.add_argument("--num-samples", type=int, default=64, help="draws per image and repeat")
    made.add_argument("--loop-batch-size", type=int, default=16, help="of the usual loop (published: 200, on a GPU)")
    made.add_argument("--sigma", type=float, default=0.25)
    made.add_argument("--max-draws", type=int, default=0, help="for the draws to a radius; 0 leaves that out")
    made.add_argument("--radius-only", action="store_true", help="no throughput; see above")
    made.add_argument("--compile", action="store_true")
    args = made.parse_args()
    if args.true_shapes:
        args.num_samples, args.loop_batch_size = max(args.num_samples, 2_000), max(args.loop_batch_size, 200)
    prepare(args)
    args.seeds = list(range(100, 200))  # a seed for each call, so that no two score the same draws
    if args.radius_only:
        tower, _ = load_tower(args.tower, args.psm, sigma=args.sigma, dtype=args.dtype)
        tower = tower.to(args.device)
    else:
        tower = smoothed_tower(args, sigma=args.sigma)
    found = {}
    with torch.inference_mode():
        if args.compile:
            tower.compile()
        if not args.radius_only:
            found["throughput"] = throughput(args, tower)
        if args.compile:
            found["compile_failure"] = tower._compiled_pass.failure
        if args.max_draws:
            found["draws_to_radius"] = rows = draws_to_radius(args, tower)
            ratios = [row["ratio_of_draws"] for row in rows if "ratio_of_draws" in row]
            found["median_ratio_of_draws"] = median(ratios) if ratios else None
    report(args, sigma=args.sigma, **found)


if __name__ == "__main__":
    main()
