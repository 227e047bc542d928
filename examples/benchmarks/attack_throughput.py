"""Steps per second and memory of the white-box attack against the way it is usually written.

    python examples/benchmarks/attack_throughput.py --json attack_throughput.json
    python examples/benchmarks/attack_throughput.py --device cuda --true-shapes --json attack_throughput_gpu.json

The usual way, restated (SmoothAdv, github.com/Hadisalman/smoothing-adversarial, described, not copied): all copies of the
image through one graph, the weights frozen. Ours (`l2_pgd`) goes a pass at a time. Same networks, same dtype, same number of
draws; the perturbations differ only by the noise they met.
"""

import torch
from measuring import (
    in_turn,
    median,
    median_ratio,
    parser,
    peak_memory,
    pixel_values,
    prepare,
    report,
    smoothed_tower,
    unit_images,
    usual_features,
)

from fs_psm_hf.attacks import l2_pgd


def usual_attack(tower, image, anchor, *, epsilon, steps, num_draws, sigma):
    """The perturbation after `steps` normalised gradient steps, `(1, 3, H, W)` in [0, 1] units."""
    clean = unit_images(image)
    delta = torch.zeros_like(clean)
    for _ in range(steps):
        delta.requires_grad_(True)
        batch = (clean + delta).repeat(num_draws, 1, 1, 1)
        noisy = batch + sigma * torch.randn_like(batch)
        loss = (usual_features(tower, noisy, sigma) * anchor).sum(1).mean()
        loss.backward()
        with torch.no_grad():
            delta = delta - 2 * epsilon / steps * delta.grad / delta.grad.norm()
            delta = delta * (epsilon / delta.norm()).clamp(max=1)
    return delta.detach()


def main():
    made = parser(__doc__, image_size=112, repeats=3)
    made.add_argument("--steps", type=int, default=2)
    made.add_argument("--num-draws", type=int, default=16)
    made.add_argument("--epsilon", type=float, default=0.5, help="l2, of [0, 1] pixels")
    args = made.parse_args()
    if args.true_shapes:
        args.steps, args.num_draws = max(args.steps, 10), max(args.num_draws, 32)
    prepare(args)
    tower = smoothed_tower(args).requires_grad_(False)
    image = pixel_values(args, 1)
    anchor = tower.clean_features(image)
    lengths = {}

    def ours():
        found = l2_pgd(
            tower, image, epsilon=args.epsilon, steps=args.steps, num_draws=args.num_draws, evaluation_draws=1,
            anchor=anchor, clip=False, generator=0,
        )  # fmt: skip
        lengths["ours"] = found.l2_norms[0]

    def usual():
        delta = usual_attack(
            tower, image, anchor, epsilon=args.epsilon, steps=args.steps, num_draws=args.num_draws, sigma=0.25
        )
        lengths["usual"] = delta.norm().item()

    memory = {"ours": peak_memory(args, ours), "usual": peak_memory(args, usual)}
    seconds = in_turn(args, {"ours": ours, "usual": usual}, warm_up=0)
    report(
        args,
        steps=args.steps,
        num_draws=args.num_draws,
        epsilon=args.epsilon,
        steps_per_second_ours=args.steps / median(seconds["ours"]),
        steps_per_second_usual=args.steps / median(seconds["usual"]),
        ratio=median_ratio(seconds["usual"], seconds["ours"]),
        l2_norms=lengths,
        peak_bytes_ours=memory["ours"],
        peak_bytes_usual=memory["usual"],
        passes_of=tower._limit(image),
    )


if __name__ == "__main__":
    main()
