"""The paper's tables of attacks with cells of ours beside them; what was not measured is shown as missing, with its command."""

import math
from pathlib import Path

from .cells import ATTACK_NAMES, GRADIENTS, format_strength, read_results, verdict, worst
from .paper import ATTACK_TABLES, CITATION


MISSING = "missing"
_NOT_STATED = "not stated"
# n₀ of the paper's smoothed rows, and their σ, section 5.1.
_PAPER_SAMPLES, _PAPER_SIGMA = 4, "0.25"
_NOTES = (
    "FCS: mean cosine of the clean and the attacked feature of the same encoder; ACC: right answers under attack; ASR: attacks "
    "that reach their target; in parentheses the mean score of the judge. /: not in the paper. -: not measured.",
    "white-box: made on the plain tower and shown to it. transfer: made on the plain tower, shown to a smoothed one, so it does "
    "not know the defence. adaptive: made on the smoothed tower itself, with expectation over its noise. No mode is a "
    "certificate.",
    "adaptive rows show the worse for the defender of a gradient through the purifier (end-to-end) and one that passes it by "
    "(straight-through), cell by cell; `both` where both were run.",
    "strength: an adaptive attack says something only if it reaches an ASR of 90 % at 64/255 and at sigma 0 without a PSM does to "
    "the tower what the white-box attack does.",
)
_NOT_STATED_NOTE = "paper: it calls its attacks white-box and does not say whether those on smoothed models knew the noise, purifier and mapper."


def format_attack_table(number, paths=()) -> str:
    """Table 1, 3, 4, S.6, S.7 or S.8 of the paper and under each of its rows ours.

    Args:
        number (`int`): 1, 3, 4, 6, 7 or 8; the last three are S.6, S.7 and S.8.
        paths (`Iterable[Path]`): run files of `fs-psm evaluate`, or `attacks*.json` made from them.

    Returns:
        `str`: Markdown. The paper's numbers stand as it prints them.

    Raises:
        ValueError: a file is of another kind.
        OSError: a file cannot be read.
    """
    table = ATTACK_TABLES[number]
    everything = _read(paths)
    ours = [result for result in everything if _belongs(result, table)]
    left_out = len(everything) - len(ours)
    command = f"fs-psm evaluate --config examples/tables/{table.config}"
    header = ["source", "model", "row", "mode", "σ", "n₀", *["purifier"] * table.by_samples, "images"]
    for attack in table.attacks:
        header += [f"{attack} {figure}" for figure in ("FCS", "ACC", "ASR")]
    header += ["seconds"] * table.by_samples + ["strength"]
    rows, shown = [], set()
    for row in table.rows:
        rows.append(_paper_row(table, row))
        found = [result for result in ours if _answers(result, table, row)]
        rows += _our_rows(table, found, everything, command, model=row[0], encoder=row[1], smoothed=row[2], row=row)
        shown |= {id(result) for result in found}
    rest = {}
    for result in ours:
        if id(result) not in shown:
            smoothed = result.cell.row != "Org"
            rest.setdefault((result.cell.model, result.cell.encoder, smoothed), []).append(result)
    for (model, encoder, smoothed), found in rest.items():
        rows += _our_rows(table, found, everything, command, model=model, encoder=encoder, smoothed=smoothed)
    notes = [*_NOTES, _NOT_STATED_NOTE, *table.notes, *_missing_notes(rows, command)]
    if left_out:
        notes.append(
            f"{left_out} cells of ours are of another task, attack, strength or purifier and are not shown here."
        )
    title = f"{CITATION}, Table {table.name}: {table.title}, {format_strength(table.epsilon)}"
    return _markdown(title, header, rows, notes)


def is_attack_file(path):
    """Whether a results file comes from `fs-psm evaluate`, not from `fs-psm certify`."""
    with open(path, "rb") as stream:
        start = stream.readline()
    return Path(path).suffix == ".json" or b'"config_hash"' in start


def format_results(paths, attacks=tuple(ATTACK_NAMES), title="Attacked rows") -> str:
    """All cells of some results files, as they are: every mode and strength, without the paper.

    Args:
        paths (`Iterable[Path]`): run files of `fs-psm evaluate`, or `attacks*.json` made from them.
        attacks (`Sequence[str]`): methods to show.
        title (`str`): line above the table.

    Raises:
        ValueError: a file is of another kind, or none holds a finished cell.
        OSError: a file cannot be read.
    """
    results = [result for result in _read(paths) if result.cell.attack in attacks]
    if not results:
        raise ValueError(
            "`--results` must hold at least one finished cell, got none: run `fs-psm evaluate` to its end"
        )
    header = ["source", "model", "row", "mode", "σ", "n₀", "attack", "ε", "steps", "draws", "images"]
    header += ["FCS", "ACC", "ASR", "clean ACC", "strength"]
    rows, lone = [], 0
    for defence, group in _by_defence(results).items():
        for result in sorted(worst(group), key=_order):
            cell = result.cell
            strength = verdict(defence, results) if cell.mode == "adaptive" and cell.sigma > 0 else "/"
            mode = cell.mode if cell.gradient is None else f"{cell.mode}, {cell.gradient}"
            row = [result.source, cell.model, _row_name(cell), mode, f"{cell.sigma:g}", f"{cell.num_samples}"]
            row += [ATTACK_NAMES[cell.attack], format_strength(cell.epsilon, cell.norm), f"{cell.steps}"]
            row += [f"{cell.draws or '/'}", f"{result.images}", *_figures(result)]
            rows.append([*row, _optional(result.extras.get("clean_acc"), ".1%"), strength])
        modes = {result.cell.mode for result in group}
        if modes == {"transfer"}:
            cell = group[0].cell
            row = [group[0].source, cell.model, _row_name(cell), f"adaptive: {MISSING}", f"{cell.sigma:g}"]
            rows.append([*row, f"{cell.num_samples}", *["-"] * 9, "sanity: missing"])
            lone += 1
    notes = list(_NOTES)
    if lone:
        notes.append(
            f"{lone} smoothed rows have transfer attacks only, which say little; an entry with `mode: adaptive` under `attacks` "
            "of the configuration and `fs-psm evaluate --config` of it fill them."
        )
    return _markdown(title, header, rows, notes)


def _read(paths):
    return [result for path in paths for result in read_results(Path(path))]


def _belongs(result, table):
    cell = result.cell
    return (
        cell.task in table.tasks
        and cell.norm == "linf"
        and math.isclose(cell.epsilon, table.epsilon, rel_tol=1e-6)
        and ATTACK_NAMES[cell.attack] in table.attacks
        and (cell.row == "Org" or cell.sigma > 0)
        and (table.purifier == "diffusion" or cell.row == "Org" or cell.purifier in (table.purifier, "none"))
    )


def _answers(result, table, row):
    """Whether a result is of the paper's row; its smoothed rows have purifier and mapper."""
    cell = result.cell
    smoothed = row[2]
    if (cell.model, cell.encoder, cell.row) != (row[0], row[1], "FS+P+M" if smoothed else "Org"):
        return False
    if table.by_samples:
        return (str(cell.num_samples), cell.purifier) == row[3:5]
    return not smoothed or (cell.purifier, cell.num_samples) == (table.purifier, _PAPER_SAMPLES)


def _by_defence(results):
    groups = {}
    for result in results:
        groups.setdefault(result.cell.defence, []).append(result)
    return groups


def _order(result):
    cell = result.cell
    return ("white-box", "transfer", "adaptive").index(cell.mode), list(ATTACK_NAMES).index(cell.attack), cell.epsilon


def _paper_row(table, row):
    model, encoder, smoothed, *numbers = row
    name = f"Smoothed {encoder}" if smoothed else ("Org." if encoder == "org" else encoder)
    cells = ["paper", model, name, _NOT_STATED if smoothed else "white-box"]
    cells += [_PAPER_SIGMA, numbers[0] if table.by_samples else f"{_PAPER_SAMPLES}"] if smoothed else ["/", "/"]
    if table.by_samples:
        *figures, seconds = numbers[2:]
        return [*cells, numbers[1], table.images, *figures, seconds, "/"]
    return [*cells, table.images, *numbers, "/"]


def _our_rows(table, found, everything, command, *, model, encoder, smoothed, row=None):
    """Rows of ours for one row of the paper, or for a model it does not have: a row per defence and mode."""
    rows = []
    for defence, group in _by_defence(found).items():
        modes = ["white-box"] if not smoothed else ["transfer", "adaptive"]
        for mode in modes:
            mine = [result for result in group if result.cell.mode == mode]
            if mine:
                strength = verdict(defence, everything) if mode == "adaptive" else "/"
                rows += [_line(table, source, lot, mode, strength) for source, lot in _by_source(mine).items()]
            else:
                rows.append(_missing(table, model, _row_name(group[0].cell), mode, command, group[0].cell))
    if not rows and row is not None:
        name = f"Smoothed {encoder}" if smoothed else ("Org." if encoder == "org" else encoder)
        numbers = row[3:5] if table.by_samples else ()
        for mode in ["transfer", "adaptive"] if smoothed else ["white-box"]:
            rows.append(_missing(table, model, name, mode, command, numbers=numbers))
    return rows


def _by_source(results):
    groups = {}
    for result in results:
        groups.setdefault(result.source, []).append(result)
    return groups


def _row_name(cell):
    name = "" if cell.encoder == "org" else f" {cell.encoder}"
    return f"{cell.row}{name}"


def _line(table, source, results, mode, strength):
    """One row: per attack the worse of both gradients."""
    first = results[0].cell
    cells = [f"ours, {source}", first.model, _row_name(first)]
    counts, figures = [], []
    label = ""
    if mode == "adaptive":
        gradients = {result.cell.gradient for result in results}
        label = " (both)" if gradients == set(GRADIENTS) else f" ({gradients.pop()})"
    for attack in table.attacks:
        mine = [result for result in worst(results) if ATTACK_NAMES[result.cell.attack] == attack]
        best = max(mine, key=lambda result: result.badness(), default=None)
        figures += ["-"] * 3 if best is None else _figures(best)
        counts += [] if best is None else [best.images]
    smoothed = first.row != "Org"
    cells += [mode + label, f"{first.sigma:g}" if smoothed else "/", f"{first.num_samples}" if smoothed else "/"]
    cells += [first.purifier] * table.by_samples
    low, high = min(counts), max(counts)
    cells += [f"{low}" if low == high else f"{low} to {high}", *figures]
    return [*cells, *["-"] * table.by_samples, strength]


def _missing(table, model, name, mode, command, cell=None, numbers=()):
    sigma, samples = ("/", "/") if cell is None else (f"{cell.sigma:g}", f"{cell.num_samples}")
    purifier = "/" if cell is None else cell.purifier
    if numbers:
        samples, purifier = numbers
    row = ["ours", model, name, f"{mode}: {MISSING}", sigma, samples, *[purifier] * table.by_samples, "-"]
    row += ["-"] * (3 * len(table.attacks))
    return [*row, *["-"] * table.by_samples, f"`{command}`"]


def _missing_notes(rows, command):
    count = sum(row[3].endswith(MISSING) for row in rows)
    return [f"{count} rows of ours are missing; `{command}` fills them."] if count else []


def _figures(result):
    """FCS, ACC and ASR in the order of the paper."""
    shown = [_optional(result.fcs, ".3f")]
    for name, score in (("acc", "mean_acc_score"), ("asr", "mean_asr_score")):
        mean = result.extras.get(score)
        shown.append(_optional(getattr(result, name), ".1%") + ("" if mean is None else f" ({mean:.3f})"))
    return shown


def _optional(value, form):
    return "-" if value is None else f"{value:{form}}"


def _markdown(title, header, rows, notes):
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [title, ""]
    for row in (header, ["-" * width for width in widths], *rows):
        lines.append("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])
