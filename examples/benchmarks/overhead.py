"""What smoothing adds to its networks: the smoothed forward over purifier, tower and mapper on noisy images made before.

    python examples/benchmarks/overhead.py --json overhead.json
    python examples/benchmarks/overhead.py --device cuda --true-shapes --json overhead_gpu.json

The bare networks see the same B·n₀ noisy images in the same passes, and nobody averages what they give. 1.00 would be noise,
normalisation and averaging for nothing.
"""

import torch
from measuring import in_turn, median, median_ratio, parser, pixel_values, prepare, report, smoothed_tower, unit_images

from fs_psm_hf.noise import gaussian_noise
from fs_psm_hf.pixels import channel_tensor, from_unit
from fs_psm_hf.smoothing import plan_passes


def noisy_passes(tower, images, num_samples):
    """The noisy images of every pass of a call, `(m, 3, H, W)` each, in [0, 1] scale."""
    clean, shape = unit_images(images), tuple(images.shape[1:])
    made = []
    for chosen, numbers in plan_passes(len(images), num_samples, tower._limit(images)):
        ids = list(range(len(images)))[chosen]
        noise = gaussian_noise(shape, 0, ids, numbers.start, len(numbers), images.device)
        made.append(clean[chosen].repeat_interleave(len(numbers), 0) + tower.config.sigma * noise)
    return made


def bare(tower, passes):
    """Purifier, tower and mapper alone."""
    mean, std = (channel_tensor(v, passes[0]) for v in (tower.config.image_mean, tower.config.image_std))
    for noisy in passes:
        clean = tower.psm.purifier.denoise(noisy, tower.config.sigma)
        tokens = tower.vision_tower(pixel_values=from_unit(clean, mean, std).to(tower.dtype)).last_hidden_state
        if tower.psm.mapper is not None:
            tokens = tokens + tower.psm.mapper(tokens, tower.config.sigma)


def main():
    made = parser(__doc__, image_size=112, repeats=5)
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    made.add_argument("--num-samples", type=int, nargs="+", default=[1, 4, 16])
    made.add_argument("--at-least", type=float, default=30.0, help="seconds to measure each row for")
    args = made.parse_args()
    prepare(args)
    tower, rows = smoothed_tower(args), []
    with torch.inference_mode():
        for batch in args.batch_sizes:
            for num_samples in args.num_samples:
                images = pixel_values(args, batch)
                passes = noisy_passes(tower, images, num_samples)

                def smoothed(images=images, num_samples=num_samples):
                    with tower.smoothing(num_samples=num_samples):
                        tower(images, generator=0)

                seconds = in_turn(
                    args,
                    {"smoothed": smoothed, "bare": lambda passes=passes: bare(tower, passes)},
                    at_least=args.at_least,
                )
                rows.append({
                    "batch_size": batch, "num_samples": num_samples,
                    "seconds_smoothed": median(seconds["smoothed"]), "seconds_bare": median(seconds["bare"]),
                    "ratio": median_ratio(seconds["smoothed"], seconds["bare"]),
                })  # fmt: skip
                print(rows[-1], flush=True)
    report(args, rows=rows, worst_ratio=max(row["ratio"] for row in rows))


if __name__ == "__main__":
    main()
