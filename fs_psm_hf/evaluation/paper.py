"""Numbers that the paper prints, character by character; every FCSB and R is a plug-in estimate, without a confidence."""

import dataclasses


CITATION = "Xia et al., 2026, arXiv:2601.16200v1"
# The order of the columns in the paper.
PAPER_ATTACKS = ("M-Attack", "FOA", "AttackVLM")
LLAVA, FLAMINGO, CLIP = "LLaVA-1.5-7B", "OpenFlamingo-9B", "CLIP-L14"


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Args:
        title (`str`): what it is about.
        epsilons (`tuple[float, ...]`): its columns, l2 radii in [0, 1]-pixel units.
        num_samples, num_images (`str`): draws per image and images, where the paper states them.
        rows (`tuple[tuple[str, ...], ...]`): encoder, PSM, sigma, an FCSB per radius, average radius, and with `attacked`
            accuracy and attack success rate.
        attacked (`bool`): whether the rows end in accuracy and attack success rate.
        notes (`tuple[str, ...]`): what a reader should know of the numbers.
    """

    title: str
    epsilons: tuple[float, ...]
    num_samples: str
    num_images: str
    rows: tuple[tuple[str, ...], ...]
    attacked: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PaperAttackTable:
    """A table of the paper with FCS, ACC and ASR under attack.

    Args:
        name (`str`): as the paper calls it, `"1"` or `"S.6"`.
        title (`str`): what it is about.
        tasks (`tuple[str, ...]`): our tasks that ask the same.
        epsilon (`float`): strength of the attacks, the largest change of a pixel in [0, 1].
        images (`str`): images per cell, as the paper's text says.
        attacks (`tuple[str, ...]`): its groups of columns, in the paper's order.
        rows (`tuple[tuple, ...]`): model, encoder (`"org"`, `"FARE"`, `"TeCoA"`), whether smoothed, and FCS, ACC and ASR per
            attack as printed; where the rows differ in draws and purifier, those two before the numbers.
        config (`str`): file below `examples/tables/` that fills our cells.
        by_samples (`bool`): rows differ in draws n₀ and purifier, Table S.8.
        purifier (`str`): `"diffusion"` or `"light"`.
        notes (`tuple[str, ...]`): what a reader should know of the numbers.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    epsilon: float
    images: str
    attacks: tuple[str, ...]
    rows: tuple[tuple, ...]
    config: str
    by_samples: bool = False
    purifier: str = "diffusion"
    notes: tuple[str, ...] = ()


def _rows(model, *lines):
    """Rows `(model, encoder, smoothed, number, …)` of lines `"encoder | FCS ACC ASR | FCS ACC ASR | …"`."""
    found = []
    for line in lines:
        method, *groups = (part.strip() for part in line.split("|"))
        smoothed = method.startswith("Smoothed ")
        numbers = [cell.replace("(", " (") for group in groups for cell in group.split()]
        found.append((model, method.removeprefix("Smoothed "), smoothed, *numbers))
    return tuple(found)


TABLES = {
    2: PaperTable(
        title="average FCSB at given radii and average certified radius",
        epsilons=(0.125, 0.25, 0.375, 0.5, 0.75),
        num_samples="1,000",
        num_images="100",
        rows=(
            ("CLIP-B16", "none", "0.25", "0.828", "0.623", "0.313", "-0.06", "/", "0.31"),
            ("CLIP-B16", "P&M", "0.25", "0.975", "0.920", "0.789", "0.553", "/", "0.53"),
            ("CLIP-B16", "none", "0.50", "0.717", "0.586", "0.439", "0.253", "-0.132", "0.33"),
            ("CLIP-B16", "P&M", "0.50", "0.970", "0.945", "0.907", "0.846", "0.649", "0.89"),
        ),
        notes=("paper: images of ImageNet.",),
    ),
    5: PaperTable(
        title="ablation: average FCSB, average certified radius, accuracy and attack success under FOA",
        epsilons=(0.25, 0.5, 0.75),
        num_samples="not stated",
        num_images="not stated",
        rows=(
            ("CLIP-B16, no smoothing", "none", "/", "/", "/", "/", "/", "1.6 %", "95.6 %"),
            ("FS CLIP-B16", "none", "0.50", "0.586", "0.253", "-0.132", "0.33", "42.4 %", "0.8 %"),
            ("CLIP-B16", "M", "0.50", "0.884", "0.717", "0.436", "0.71", "66.8 %", "0.4 %"),
            ("CLIP-B16", "P&M", "0.50", "0.970", "0.907", "0.846", "0.89", "91.6 %", "0.4 %"),
        ),
        attacked=True,
        notes=(
            "paper: the clean accuracy without attack is 92.4 %.",
            "paper: its tables disagree about P&M at sigma 0.50: for eps 0.25, 0.50 and 0.75 Table 5 prints 0.970, 0.907 "
            "and 0.846, Table 2 prints 0.945, 0.846 and 0.649 (and 0.970, 0.907 and 0.846 for eps 0.125, 0.375 and 0.50).",
        ),
    ),
}

# A number in parentheses is the mean score of the judge, glued to its percentage here.
ATTACK_TABLES = {
    1: PaperAttackTable(
        name="1",
        title="image captioning under attack; in parentheses the mean GPTScore",
        tasks=("captioning",),
        epsilon=16 / 255,
        images="100",
        attacks=PAPER_ATTACKS,
        config="table1.yaml",
        rows=_rows(
            LLAVA,
            "org | 0.385 1%(0.06) 93%(0.54) | 0.388 1%(0.049) 94%(0.578) | 0.430 3%(0.089) 88%(0.490)",
            "Smoothed org | 0.650 82%(0.694) 2%(0.028) | 0.652 87%(0.735) 1%(0.021) | 0.660 89%(0.727) 2%(0.018)",
            "FARE | 0.588 44%(0.409) 24%(0.097) | 0.504 19%(0.197) 51%(0.222) | 0.499 18%(0.190) 44%(0.221)",
            "Smoothed FARE | 0.716 59%(0.501) 14%(0.069) | 0.656 35%(0.327) 29%(0.153) | 0.729 60%(0.503) 11%(0.061)",
            "TeCoA | 0.720 51%(0.458) 16%(0.081) | 0.674 21%(0.236) 37%(0.187) | 0.606 17%(0.179) 43%(0.218)",
            "Smoothed TeCoA | 0.805 59%(0.498) 14%(0.056) | 0.789 39%(0.364) 20%(0.094) | 0.755 42%(0.358) 18%(0.104)",
        )
        + _rows(
            FLAMINGO,
            "org | 0.351 1%(0.089) 86%(0.583) | 0.347 1%(0.091) 87%(0.569) | 0.442 16%(0.222) 59%(0.379)",
            "Smoothed org | 0.673 73%(0.655) 1%(0.063) | 0.672 69%(0.623) 0%(0.061) | 0.703 73%(0.687) 0%(0.055)",
            "FARE | 0.588 36%(0.407) 17%(0.145) | 0.504 20%(0.249) 40%(0.240) | 0.499 15%(0.243) 40%(0.247)",
            "Smoothed FARE | 0.716 55%(0.529) 9%(0.088) | 0.656 40%(0.414) 17%(0.125) | 0.729 50%(0.488) 4%(0.089)",
            "TeCoA | 0.720 51%(0.472) 13%(0.116) | 0.674 21%(0.240) 30%(0.210) | 0.606 19%(0.244) 34%(0.225)",
            "Smoothed TeCoA | 0.805 56%(0.518) 5%(0.090) | 0.789 50%(0.454) 8%(0.095) | 0.755 38%(0.398) 12%(0.126)",
        ),
        notes=("paper: ACC counts a GPTScore >= 0.5 with the clean caption, ASR one >= 0.3 with the target's.",),
    ),
    3: PaperAttackTable(
        name="3",
        title="image classification under attack",
        tasks=("classification", "head"),
        epsilon=16 / 255,
        images="500",
        attacks=PAPER_ATTACKS,
        config="table3.yaml",
        rows=_rows(
            LLAVA,
            "org | 0.427 8.2% 78.2% | 0.437 3.8% 81.0% | 0.458 6.0% 78.4%",
            "Smoothed org | 0.681 90.4% 0.6% | 0.697 88.8% 0.4% | 0.700 88.4% 0.2%",
            "FARE | 0.574 55.4% 14.6% | 0.521 24.8% 39.8% | 0.508 25.8% 45.0%",
            "Smoothed FARE | 0.859 75.6% 5.2% | 0.712 72.0% 5.6% | 0.699 74.0% 6.2%",
            "TeCoA | 0.731 67.4% 2% | 0.626 29.0% 20.0% | 0.592 33.6% 17.8%",
            "Smoothed TeCoA | 0.819 74.4% 0.4% | 0.727 57.2% 3.0% | 0.711 57.4% 2.0%",
        )
        + _rows(
            CLIP,
            "org | 0.427 18.0% 37.2% | 0.437 10.0% 52.4% | 0.458 16.0% 48.4%",
            "Smoothed org | 0.681 92.4% 0.4% | 0.697 92.0% 0.4% | 0.700 92.0% 0.4%",
            "FARE | 0.574 70.4% 5.2% | 0.521 42.0% 14.4% | 0.508 35.6% 24.4%",
            "Smoothed FARE | 0.859 85.2% 0.8% | 0.712 81.6% 0% | 0.699 82.4% 0%",
            "TeCoA | 0.731 81.2% 2.4% | 0.626 39.2% 20.2% | 0.592 35.8% 24.4%",
            "Smoothed TeCoA | 0.819 88.4% 1.6% | 0.727 76.0% 4.8% | 0.711 73.2% 6.0%",
        ),
        notes=(
            "paper: LLaVA and CLIP-L14 share every FCS, so the attacks were made on the encoder alone.",
            "paper: its text says that smoothed LLaVA reaches 88.0% under FOA, the table prints 88.8%.",
        ),
    ),
    4: PaperAttackTable(
        name="4",
        title="visual question answering under attack; the target is `None of the above`",
        tasks=("vqa",),
        epsilon=16 / 255,
        images="100",
        attacks=PAPER_ATTACKS,
        config="table4.yaml",
        rows=_rows(
            LLAVA,
            "org | 0.398 31% 28% | 0.383 22% 22% | 0.474 25% 27%",
            "Smoothed org | 0.732 47% 0% | 0.676 43% 0% | 0.765 43% 1%",
            "FARE | 0.657 47% 5% | 0.590 32% 0% | 0.550 38% 7%",
            "Smoothed FARE | 0.859 48% 1% | 0.768 38% 0% | 0.818 39% 0%",
            "TeCoA | 0.788 31% 2% | 0.748 31% 2% | 0.667 31% 1%",
            "Smoothed TeCoA | 0.917 32% 1% | 0.858 34% 1% | 0.862 29% 1%",
        ),
    ),
    6: PaperAttackTable(
        name="S.6",
        title="image classification under attack, with a light U-Net as purifier",
        tasks=("classification", "head"),
        epsilon=16 / 255,
        images="500",
        attacks=PAPER_ATTACKS,
        config="table6.yaml",
        purifier="light",
        rows=_rows(
            LLAVA,
            "org | 0.427 8.2% 78.2% | 0.437 3.8% 81.0% | 0.458 6.0% 78.4%",
            "Smoothed org | 0.590 84.8% 0.2% | 0.600 87.2% 0.2% | 0.605 87.0% 0.2%",
            "FARE | 0.574 55.4% 14.6% | 0.521 24.8% 39.8% | 0.508 25.8% 45.0%",
            "Smoothed FARE | 0.695 75.6% 5.2% | 0.681 66.2% 1% | 0.671 68.0% 1%",
            "TeCoA | 0.731 67.4% 2% | 0.626 29.0% 20.0% | 0.592 33.6% 17.8%",
            "Smoothed TeCoA | 0.790 70.6% 0.6% | 0.714 58.8% 0.8% | 0.712 56.4% 0.4%",
        )
        + _rows(
            CLIP,
            "org | 0.427 18.0% 37.2% | 0.437 10.0% 52.4% | 0.458 16.0% 48.4%",
            "Smoothed org | 0.590 88.0% 0.4% | 0.600 90.0% 0.4% | 0.604 90.4% 0.4%",
            "FARE | 0.574 70.4% 5.2% | 0.521 42.0% 14.4% | 0.508 35.6% 24.4%",
            "Smoothed FARE | 0.695 84.4% 0% | 0.682 78.4% 0% | 0.671 76.4% 0%",
            "TeCoA | 0.731 81.2% 2.4% | 0.626 39.2% 20.2% | 0.592 35.8% 24.4%",
            "Smoothed TeCoA | 0.790 87.6% 1.2% | 0.714 75.6% 2.4% | 0.712 73.2% 2.0%",
        ),
        notes=(
            "paper: its caption calls the mapper a light U-Net; its text says the purifier is, of 43.7M parameters.",
        ),
    ),
    7: PaperAttackTable(
        name="S.7",
        title="image classification under a large attack",
        tasks=("classification", "head"),
        epsilon=32 / 255,
        images="500",
        attacks=("FOA",),
        config="table7.yaml",
        rows=_rows(
            LLAVA,
            "org | 0.37 3.6% 78.6%",
            "Smoothed org | 0.512 35.2% 24.2%",
            "FARE | 0.408 10.4% 64.2%",
            "Smoothed FARE | 0.605 48.4% 19.2%",
            "TeCoA | 0.454 12.0% 29.6%",
            "Smoothed TeCoA | 0.576 32.0% 9.6%",
        ),
    ),
    8: PaperAttackTable(
        name="S.8",
        title="robustness and time against draws per image",
        tasks=("classification", "head"),
        epsilon=16 / 255,
        images="500",
        attacks=("FOA",),
        config="table8.yaml",
        by_samples=True,
        rows=(
            (LLAVA, "org", True, "1", "diffusion", "0.595", "86.2%", "0.6%", "0.28"),
            (LLAVA, "org", True, "2", "diffusion", "0.652", "88.4%", "0.4%", "0.41"),
            (LLAVA, "org", True, "4", "diffusion", "0.697", "88.8%", "0.4%", "0.66"),
            (LLAVA, "org", True, "8", "diffusion", "0.719", "89.6%", "0.4%", "1.12"),
            (LLAVA, "org", True, "16", "diffusion", "0.728", "89.2%", "0.4%", "2.10"),
            (LLAVA, "org", True, "1", "light", "0.494", "84.4%", "0.2%", "0.20"),
            (LLAVA, "org", True, "2", "light", "0.565", "85.4%", "0%", "0.24"),
            (LLAVA, "org", True, "4", "light", "0.600", "87.2%", "0.2%", "0.32"),
            (LLAVA, "org", True, "8", "light", "0.623", "87.8%", "0.4%", "0.49"),
            (LLAVA, "org", True, "16", "light", "0.643", "86.8%", "0.4%", "0.84"),
        ),
        notes=("paper: seconds per image on one RTX 4090; ours do not time the model.",),
    ),
}
