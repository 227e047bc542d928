"""The paper's tables with rows of ours beside them, as Markdown: those of certificates here, those of attacks by their own."""

import math
from pathlib import Path

import numpy as np

from ..certification import Certificate
from ..certification.results_file import read_lines
from .attack_tables import format_attack_table, format_results, is_attack_file
from .paper import ATTACK_TABLES, CITATION, TABLES


# The FCSB that the paper's radii keep.
LEVEL = 0.5
NO_CONFIDENCE = "no confidence"
_FILL = "Missing; `fs-psm evaluate --config examples/tables/{config}` fills them."
_NOTES = (
    "FCSB: mean over the images of a lower bound on the inner product with the anchor, by the paper's Theorem 1, or by the "
    "layer-cake bound where the method is cdf, cdf_pilot or best; a negative FCSB bounds no cosine.",
    "R: mean l2 radius in [0, 1] pixels that keeps an FCSB of {level:g}; an image whose bound is lower even at the image "
    "itself counts as 0.",
    "no confidence: the sample mean in place of a confidence bound (plug-in); not a certificate. A confidence is that of "
    "one image by itself, for all its radii at once.",
    "null level: mean cosine of unrelated images. /: not printed in the paper. -: not in the results.",
)


def format_paper_table(number: int, paths=()) -> str:
    """A table of the paper with rows of ours: of Tables 2 and 5 one per results file and method under the paper's.

    Args:
        number (`int`): of the table, 1 to 8; 6, 7 and 8 are S.6, S.7 and S.8.
        paths (`Iterable[Path]`): results files of `fs-psm certify` for Tables 2 and 5, of `fs-psm evaluate` for the others;
            Table 5 takes both.

    Returns:
        `str`: Markdown. The paper's numbers stand as it prints them.

    Raises:
        ValueError: there is no such table, or a file is no results file with at least one certified image.
        OSError: a file cannot be read.
    """
    known = sorted(TABLES.keys() | ATTACK_TABLES.keys())
    if number not in known:
        raise ValueError(f"`--paper` must be one of {', '.join(map(str, known))}, got {number}")
    if number in ATTACK_TABLES:
        return format_attack_table(number, paths)
    table = TABLES[number]
    attacked = [path for path in paths if table.attacked and is_attack_file(path)]
    paths = [path for path in paths if path not in attacked]
    header = ["source", "encoder", "PSM", "sigma", "n", "images", "method", "confidence"]
    header += [f"FCSB at {epsilon:g}" for epsilon in table.epsilons] + ["R"]
    header += ["ACC", "ASR"] * table.attacked + ["null level"]
    rows = [_paper_row(table, row) for row in table.rows]
    for path in paths:
        rows += _our_rows(table, path)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [f"{CITATION}, Table {number}: {table.title}", ""]
    for row in (header, ["-" * width for width in widths], *rows):
        lines.append("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    notes, below = [*_NOTES, *table.notes], []
    if table.attacked:
        notes.append(
            "ACC and ASR: accuracy and attack success rate under FOA; not measured by `fs-psm certify`. "
            + ("Rows of ours that were attacked stand below." if attacked else _FILL.format(config="table5.yaml"))
        )
    if attacked:
        below = ["", format_results(attacked, attacks=("foa",), title="Rows of ours under FOA")]
    return "\n".join([*lines, "", *(f"- {note.format(level=LEVEL)}" for note in notes), *below])


def _paper_row(table, row):
    encoder, psm, sigma, *numbers = row
    smoothed = sigma != "/"
    method = ["plug-in", NO_CONFIDENCE] if smoothed else ["/", "/"]
    counts = [table.num_samples, table.num_images] if smoothed else ["/", table.num_images]
    return ["paper", encoder, psm, sigma, *counts, *method, *numbers, "/"]


def _our_rows(table, path):
    """A row per method of one results file, from the certificates of its images."""
    header, certificates, null_cosine = _read(path)
    groups = {}
    for certificate in certificates:
        groups.setdefault((certificate.method, certificate.alpha), []).append(certificate)
    rows = []
    for (method, alpha), group in groups.items():
        first = group[0]
        encoder = [header.get("model") or "-", f"{first.feature or '-'} feature"]
        encoder += ["centred"] * bool(first.center) + ["smoothed anchor"] * (first.anchor == "smoothed")
        row = [f"ours, {Path(path).name}", ", ".join(encoder), header.get("psm") or "-", f"{header['sigma']:g}"]
        row += [_range(group), f"{len(group):,}", "plug-in" if method == "plugin" else method]
        row += [NO_CONFIDENCE if alpha is None else f"{100 * (1 - alpha):.6g} %"]
        means = np.mean([c.inner_product_bounds for c in group], axis=0)
        row += [_at(epsilon, first.epsilons, means) for epsilon in table.epsilons]
        other_level = "" if first.level == LEVEL else f" (FCSB {first.level:g})"
        row += [f"{np.mean([c.radius for c in group]):.3f}{other_level}"]
        row += ["not measured"] * (2 * table.attacked)
        rows.append([*row, "-" if null_cosine is None else f"{null_cosine:.3f}"])
    return rows


def _read(path):
    """Header, certificates and null level (`None` where there is none) of a results file."""
    try:
        lines = read_lines(path)
        images = [line for line in lines if line["kind"] == "image"]
        certificates = [Certificate.from_dict(entry) for line in images for entry in line.get("certificates", ())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"`--results` {path} was not written by `fs-psm certify`: {error}") from error
    if not lines or lines[0]["kind"] != "header" or "sigma" not in lines[0]:
        raise ValueError(f"`--results` {path} was not written by `fs-psm certify`: it has no header")
    if not certificates:
        raise ValueError(f"`--results` {path} must hold at least one certified image, got none")
    if any(certificate.token is not None for certificate in certificates):
        raise ValueError(
            f"`--results` {path} is per token, must be of all tokens as one vector, as the paper's tables are"
        )
    summary = next((line for line in lines if line["kind"] == "summary"), {})
    return lines[0], certificates, summary.get("null_cosine")


def _range(group):
    """Draws per image, counted and pilot ones; a range where sampling stopped early."""
    taken = [c.num_samples + c.num_pilot for c in group]
    return f"{min(taken):,}" if min(taken) == max(taken) else f"{min(taken):,} to {max(taken):,}"


def _at(epsilon, epsilons, bounds):
    """The bound at a radius, "-" where the file has none."""
    for own, bound in zip(epsilons, bounds, strict=True):
        if math.isclose(own, epsilon, rel_tol=1e-9):
            return f"{bound:.3f}"
    return "-"
