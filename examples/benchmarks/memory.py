"""Peak memory of the smoothed forward: flat in n₀, against the batch, and the largest pass that fits.

    python examples/benchmarks/memory.py --json memory.json
    python examples/benchmarks/memory.py --device cuda --true-shapes --json memory_gpu.json

The peak is what the tensors of a call needed beyond the weights. A call of B images and n₀ draws runs in passes of at most
`max_batch_size` noisy images, so its need is that of a pass, and of the sums. "The largest pass" doubles `max_batch_size`
until memory ends (a GPU) or `--budget-gib` is passed: that many noisy images, B·n₀, would also fit at once.
"""

import torch
from measuring import parser, peak_memory, pixel_values, prepare, report, smoothed_tower


def call(tower, images, num_samples, limit):
    def run():
        with torch.inference_mode(), tower.smoothing(num_samples=num_samples, max_batch_size=limit):
            tower(images, generator=0)

    return run


def largest_pass(args, tower, budget):
    """Rows of `(max_batch_size, peak)`, and the last that fits."""
    rows, size = [], 1
    while size <= args.most:
        images = pixel_values(args, 1)
        try:
            peak = peak_memory(args, call(tower, images, size, size))
        except RuntimeError as error:  # out of memory, or more elements than a kernel counts
            print(f"{size} noisy images in one pass: {error}", flush=True)
            torch.cuda.empty_cache()
            break
        if peak > budget:
            break
        rows.append({"max_batch_size": size, "peak_bytes": peak})
        print(rows[-1], flush=True)
        size *= 2
    return rows


def main():
    made = parser(__doc__, image_size=56, repeats=1)
    made.add_argument("--num-samples", type=int, nargs="+", default=[1, 4, 16, 64])
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    made.add_argument("--max-batch-size", type=int, default=4, help="of the first two tables")
    made.add_argument("--budget-gib", type=float, default=1.0, help="where the largest pass stops on a CPU")
    made.add_argument("--most", type=int, default=64, help="largest pass to try")
    args = made.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    if args.true_shapes:
        args.max_batch_size, args.most = 64, 65_536
    prepare(args)
    tower = smoothed_tower(args)
    call(tower, pixel_values(args, 1), 1, 1)()
    limit, by_samples, by_batch = args.max_batch_size, [], []
    # Every pass is full from the first row on, or the first would look smaller than the rest for no reason of n₀.
    for num_samples in [n * limit for n in args.num_samples]:
        peak = peak_memory(args, call(tower, pixel_values(args, 1), num_samples, limit))
        by_samples.append({"batch_size": 1, "num_samples": num_samples, "peak_bytes": peak})
        print(by_samples[-1], flush=True)
    for batch in args.batch_sizes:
        peak = peak_memory(args, call(tower, pixel_values(args, batch), limit, limit))
        by_batch.append({"batch_size": batch, "num_samples": limit, "peak_bytes": peak})
        print(by_batch[-1], flush=True)
    fits = largest_pass(args, tower, float("inf") if cuda else args.budget_gib * 2**30)
    peaks = [row["peak_bytes"] for row in by_samples]
    report(
        args,
        max_batch_size=limit,
        by_samples=by_samples,
        by_batch=by_batch,
        growth_over_samples=max(peaks) / min(peaks),
        largest_pass=fits,
        largest_product_that_fits=fits[-1]["max_batch_size"] if fits else None,
        budget_gib=None if cuda else args.budget_gib,
    )


if __name__ == "__main__":
    main()
