"""Numbers that the paper prints, character by character; every FCSB and R is a plug-in estimate, without a confidence."""

import dataclasses


CITATION = "Xia et al., 2026, arXiv:2601.16200v1"


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
