"""The tables of speed in the README, from the committed results.

python examples/benchmarks/speed_table.py
"""

import json
from pathlib import Path


RESULTS = Path(__file__).parent / "results"


def load(name):
    """One file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def change(result, words):
    """How many times faster the change is whose name holds `words`."""
    (row,) = [row for row in result["changes"] if words in row["change"]]
    if row.get("failure"):
        raise ValueError(f"`{row['change']}` was not measured: {row['failure']}")
    return row["times_faster"]


def ratios_table():
    """What was measured against what, on one CPU thread."""
    ratios = [row["ratio"] for row in load("overhead")["rows"]]
    certify, light, wide = (load(f"certify_throughput{which}")["throughput"] for which in ("_psm", "", "_float32"))
    attack, memory = load("attack_throughput"), load("memory")
    purifier, mapper = load("train_throughput")["rows"]
    processes = [load(f"two_processes_{what}")["ratio"] for what in ("certify", "evaluate")]

    def bytes_of(row):
        return f"{row['peak_bytes_ours'] / row['peak_bytes_usual']:.2f}"

    rows = [
        ("smoothed forward, B = 1 and 8, n₀ = 1, 4, 16, light U-Net, 112 px", "purifier and tower on noisy images made before",
         f"{min(ratios):.2f} to {max(ratios):.2f} times the time"),
        ("certification in bfloat16, DINOv2-small and its PSM, 224 px", "the usual loop in float32",
         f"{certify['ratio']:.1f} times the draws per second"),
        ("the same with the light U-Net, 112 px; both in float32", "the same",
         f"{light['ratio']:.1f}; {wide['ratio']:.2f} times"),
        ("draws to a given certified radius, embedded LLaVA", "Hoeffding and the paper's bound",
         f"{load('certify_to_radius')['median_ratio_of_draws']:.0f} times fewer"),
        ("ℓ₂-PGD step through noise, purifier, tower", "the usual way",
         f"{attack['ratio']:.2f} times the steps per second, {bytes_of(attack)} of the memory"),
        ("training step of the purifier; of the mapper", "the usual way",
         f"{purifier['ratio']:.2f}; {mapper['ratio']:.2f} times the steps per second, "
         f"{bytes_of(purifier)}; {bytes_of(mapper)} of the memory"),
        ("peak memory at n₀ = 256", "at n₀ = 4", f"{memory['growth_over_samples']:.3f} times"),
        ("`fs-psm certify`; `fs-psm evaluate` in two processes, a thread each", "in one",
         f"{processes[0]:.2f}; {processes[1]:.2f} times as fast"),
    ]  # fmt: skip
    return _table(("what", "against", "measured"), rows)


def modes_table():
    """What a user can choose, with its speed."""
    psm, int8 = load("engine_psm"), load("engine_int8")
    dtype, compiled = change(psm, "bfloat16 in place"), change(psm, "torch.compile")
    rows = [
        ("precision", "`dtype=torch.bfloat16` in any `from_pretrained`, `--dtype bfloat16`", "`dtype`",
         f"{dtype:.2f} times as fast as float32"),
        ("compiled passes", "`tower.compile()`, `--compile`", "`compiled`", f"{compiled:.2f} times as fast as eager"),
        ("int8 linear layers of the U-Net", "torchao's `quantize_(tower.psm.purifier, config)`", "`quantization`, weights",
         f"{change(int8, 'U-Net in int8, both'):.2f} times as fast, both compiled"),
        ("int8 linear layers of the tower", "`quantize_(tower.vision_tower, config)`", "`quantization`, weights",
         f"{change(int8, 'tower in int8, both'):.2f} times as fast, both compiled"),
    ]  # fmt: skip
    return _table(("mode", "how", "recorded as", "on this processor"), rows)


def tradeoff_table():
    """The paper's Table S.8 beside ours, at the shapes of LLaVA-1.5-7B."""
    rows = load("tradeoff_true_shapes")["rows"]

    def cells(row):
        paper = f"{row['paper_seconds']:.2f} s ({row['paper_ratio']:.1f})"
        return [
            paper,
            *(f"{row[f'seconds_{what}']:.1f} s ({row[f'ratio_{what}']:.1f})" for what in ("end_to_end", "tower")),
        ]

    lines = []
    for count in sorted({row["num_samples"] for row in rows}):
        pair = [
            cells(row)
            for kind in ("diffusion", "light")
            for row in rows
            if (row["purifier"], row["num_samples"]) == (kind, count)
        ]
        lines.append((count, *pair[0], *pair[1]))
    kinds = [
        f"{kind}: {what}"
        for kind in ("diffusion", "light")
        for what in ("paper, 4090", "CPU, 20 tokens", "tower alone")
    ]
    return _table(("n₀", *kinds), lines)


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    print(ratios_table(), modes_table(), tradeoff_table(), sep="\n\n")
