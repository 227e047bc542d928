"""Finished evaluations as the README shows them: a line for each row and mode, the attacks side by side.

python examples/tables/summary.py examples/tables/results/dinov2_small.jsonl
"""

import argparse
from pathlib import Path

from fs_psm_hf.evaluation.cells import SANITY_EPSILON, format_strength, read_results, verdict, worst
from fs_psm_hf.plots import save_figure
from fs_psm_hf.plots_attacks import strength_figure


METHODS = {"attackvlm": "AttackVLM", "m_attack": "M-Attack", "foa": "FOA"}
_DEFENCES = ("Org", "FS", "FS+M", "FS+P", "FS+P+M")


def rows(*paths):
    """Markdown lines: per row and mode FCS / ACC / ASR of each attack, and whether the adaptive attack is strong enough.

    The worse for the defender of two gradients is shown, clean accuracy on the images of the transfer attacks.
    """
    results = [result for path in paths for result in read_results(path)]
    shown = worst(
        result for result in results
        if result.cell.epsilon != SANITY_EPSILON and (result.cell.row == "Org" or result.cell.sigma > 0)
    )  # fmt: skip
    lines = [
        f"| row | clean ACC | attack | images | steps | {' | '.join(METHODS.values())} | strength of the attack |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(METHODS) + " --- |",
    ]
    for row in _DEFENCES:
        for mode in ("white-box", "transfer", "adaptive"):
            mine = {found.cell.attack: found for found in shown if (found.cell.row, found.cell.mode) == (row, mode)}
            if mine:
                lines.append(_line(row, mode, mine, results))
    return lines


def _line(row, mode, mine, results):
    first = next(iter(mine.values()))
    sigma = f", σ = {first.cell.sigma:g}" if first.cell.sigma else ""
    judged = verdict(first.cell.defence, results) if mode == "adaptive" else ""
    figures = [_figures(mine.get(method)) for method in METHODS]
    strength = format_strength(first.cell.epsilon)
    clean = f"{first.extras['clean_acc']:.0%}"
    head = [row + sigma, clean, f"{mode}, {strength}", str(first.images), str(first.cell.steps)]
    return f"| {' | '.join([*head, *figures, judged])} |"


def _figures(result):
    return "" if result is None else f"{result.fcs:.2f} / {result.acc:.0%} / {result.asr:.0%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="run files of `fs-psm evaluate`")
    parser.add_argument("--plot", type=Path, help="picture of the ASR against steps or draws, in place of the lines")
    parser.add_argument("--by", choices=("steps", "draws"), default="steps")
    given = parser.parse_args()
    if given.plot is None:
        print("\n".join(rows(*given.results)))
    else:
        found = [result for path in given.results for result in read_results(path)]
        save_figure(strength_figure(found, given.by), given.plot)
