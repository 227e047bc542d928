"""A cell of a table: one attack on one row of defences, its summary, and what a reader may conclude from it."""

import dataclasses
import json
import math
from pathlib import Path

from ..certification.results_file import versions
from .jsonl import write_text
from .records import read_run


ROWS = ("Org", "FS", "FS+M", "FS+P", "FS+P+M")
MODES = ("white-box", "transfer", "adaptive")
GRADIENTS = ("end-to-end", "straight-through")
ATTACK_NAMES = {
    "m_attack": "M-Attack",
    "m_attack_global": "M-Attack, whole target",
    "foa": "FOA",
    "attackvlm": "AttackVLM",
    "pgd": "PGD",
    "apgd": "APGD",
}
# An adaptive attack of this strength moves every pixel by a quarter of its range: nothing withstands it but a weak attack.
SANITY_EPSILON = 64 / 255
SANITY_ASR = 0.9
# At sigma 0 and without a PSM the adaptive attack is the one on the plain tower, up to the rounding of another order.
_SAME_FCS = 0.02
_FIGURES = ("fcs", "asr", "acc")
_EXTRAS = ("mean_acc_score", "mean_asr_score", "clean_acc", "psnr", "unjudged", "judge", "org")


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one row of a table was asked: a defence, an attack, a task.

    Args:
        model (`str`): such as `LLaVA-1.5-7B`; the encoder's own name where there is no host.
        encoder (`str`): `"org"`, `"FARE"`, `"TeCoA"` or another.
        row (`str`): `Org`, `FS`, `FS+M`, `FS+P` or `FS+P+M`.
        attack (`str`): method, as `fs_psm_hf.attacks` calls it.
        mode (`str`): `"transfer"`, made on the plain tower and shown to a smoothed one; `"adaptive"`, made on what it is
            shown to, with expectation over the noise; `"white-box"`, made on the plain tower and shown to it (`Org`).
        epsilon (`float`): strength of the attack, in [0, 1]-pixel units of `norm`.
        task (`str`): `"captioning"`, `"classification"`, `"vqa"`, `"head"` or `"retrieval"`.
        norm (`str`): `"linf"` or `"l2"`.
        steps (`int`): of the attack.
        sigma (`float`): noise of the row in [0, 1]-pixel units; 0 for `Org`.
        num_samples (`int`): the paper's n₀ of the row.
        purifier (`str`): `"none"`, `"diffusion"`, `"light"` or another word.
        gradient (`str`, *optional*): of an adaptive attack, how it passes the purifier: `"end-to-end"` or
            `"straight-through"`.
        draws (`int`, *optional*): of an adaptive attack, noise draws per step.

    Raises:
        ValueError: a field out of its range, or a mode that does not belong to the row.
    """

    model: str
    encoder: str
    row: str
    attack: str
    mode: str
    epsilon: float
    task: str
    norm: str = "linf"
    steps: int = 300
    sigma: float = 0.0
    num_samples: int = 1
    purifier: str = "none"
    gradient: str | None = None
    draws: int | None = None

    def __post_init__(self):
        for name, allowed in (("row", ROWS), ("mode", MODES), ("attack", ATTACK_NAMES), ("norm", ("linf", "l2"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if (self.row == "Org") != (self.mode == "white-box"):
            raise ValueError(
                f"`mode` must be 'white-box' for the row Org and for no other, got {self.mode!r} for {self.row}"
            )
        if (self.mode == "adaptive") != (self.gradient in GRADIENTS):
            raise ValueError(
                f"`gradient` must be one of {', '.join(GRADIENTS)} for an adaptive attack and None for any other, "
                f"got {self.gradient!r} for {self.mode}"
            )

    @property
    def key(self):
        """A name that no two different cells share."""
        parts = [self.model, self.encoder, self.row, f"sigma{self.sigma:g}", f"n{self.num_samples}", self.purifier]
        parts += [
            self.task,
            self.attack,
            self.mode,
            f"{self.norm}{format_strength(self.epsilon)}",
            f"{self.steps}steps",
        ]
        parts += [] if self.gradient is None else [self.gradient, f"{self.draws}draws"]
        return ", ".join(parts)

    @property
    def defence(self):
        """What is attacked, whatever the attack."""
        names = ("model", "encoder", "row", "sigma", "num_samples", "purifier", "task", "norm")
        return tuple(getattr(self, name) for name in names)

    def to_dict(self):
        """JSON-safe."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The cell of [`to_dict`].

        Raises:
            ValueError: a field is missing, unknown or out of range.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"`cell` must have the fields of a Cell, got another: {error}") from error


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished cell.

    Args:
        cell ([`Cell`]): what was asked.
        images (`int`): how many were attacked.
        fcs, asr, acc (`float`, *optional*): mean cosine of clean and attacked feature of the same encoder, share of attacks
            that reach their target, share of right answers under attack.
        extras (`dict`): mean scores of the judge, clean accuracy, PSNR in dB and who judged, where there are any; and at
            sigma 0 as `org` the `fcs` and `asr` of the white-box attack on the plain tower, on the same images.
        source (`str`): the file it comes from.
    """

    cell: Cell
    images: int
    fcs: float | None
    asr: float | None
    acc: float | None
    extras: dict = dataclasses.field(default_factory=dict)
    source: str = ""

    def badness(self):
        """Orders results from the best for the defender to the worst."""
        asr = -math.inf if self.asr is None else self.asr
        return asr, *(-math.inf if value is None else -value for value in (self.acc, self.fcs))


def format_strength(epsilon, norm="linf"):
    """`16/255` of a largest change of a pixel; a plain number of an l2 length."""
    return f"{255 * epsilon:.4g}/255" if norm == "linf" else f"{epsilon:g}"


def summarize_items(task, items, judge=None):
    """The summary of a cell from its items.

    Args:
        task: one of `fs_psm_hf.evaluation.tasks`; `score(items, judge)` gives `acc`, `asr` and more.
        items (`list[dict]`): one per image.
        judge (*optional*): scores pairs of captions.

    Returns:
        `dict`: `images`, mean `fcs` and `psnr`, and what the task scores.

    Raises:
        ValueError: there is no item.
    """
    if not items:
        raise ValueError("`items` must hold at least one image, got none")
    summary = {"images": len(items), "fcs": _mean(items, "fcs"), "psnr": _mean(items, "psnr")}
    return summary | task.score(items, judge)


def _mean(items, name):
    values = [item[name] for item in items if item.get(name) is not None]
    return math.fsum(values) / len(values) if values else None


def worst(results):
    """Of results that differ only in how the gradient passes the purifier, the one that is worst for the defender."""
    groups = {}
    for result in results:
        named = {"gradient": None} if result.cell.mode != "adaptive" else {"gradient": GRADIENTS[0]}
        groups.setdefault(dataclasses.replace(result.cell, **named), []).append(result)
    return [max(group, key=Result.badness) for group in groups.values()]


def verdict(defence, results):
    """Whether the adaptive attack on a defence is strong enough to say something, in words.

    At ε = 64/255 it must reach an ASR of at least 90 %, and at σ = 0 without a PSM it must reproduce what the white-box
    attack does to `Org`. Else the figures show a weak attack, not a robust model.

    Args:
        defence (`tuple`): `Cell.defence` of the row.
        results (`Iterable[Result]`): of the whole evaluation.

    Returns:
        `str`: `"passed: …"`, `"attack too weak: …"` or `"sanity: missing"` with what is missing.
    """
    results = list(results)
    strong = [
        result
        for result in results
        if result.cell.defence == defence
        and result.cell.mode == "adaptive"
        and math.isclose(result.cell.epsilon, SANITY_EPSILON, rel_tol=1e-6)
        and result.asr is not None
    ]
    best = max((result.asr for result in strong), default=None)
    if best is not None and best < SANITY_ASR:
        return f"attack too weak: ASR {best:.1%} at 64/255"
    zeros = _at_sigma_zero(defence, results)
    for zero in zeros:
        plain = zero.extras["org"]
        if zero.asr != plain["asr"] or not _close(zero.fcs, plain["fcs"]):
            return (
                f"attack too weak: at sigma 0 {ATTACK_NAMES[zero.cell.attack]} does not reproduce Org (ASR "
                f"{_shown(zero.asr, '.1%')} for {_shown(plain['asr'], '.1%')}, FCS {_shown(zero.fcs, '.3f')} for "
                f"{_shown(plain['fcs'], '.3f')})"
            )
    missing = [word for word, there in (("64/255", best is not None), ("sigma 0", bool(zeros))) if not there]
    if missing:
        return f"sanity: missing ({', '.join(missing)})"
    return f"passed: ASR {best:.1%} at 64/255, Org at sigma 0"


def _at_sigma_zero(defence, results):
    """Adaptive attacks at sigma 0 without a PSM that know what the white-box one did to `Org` on the same images."""
    model, encoder, _, _, _, _, *asked = defence
    return [
        result
        for result in results
        if (result.cell.row, result.cell.mode, result.cell.sigma) == ("FS", "adaptive", 0)
        and [result.cell.model, result.cell.encoder, result.cell.task, result.cell.norm] == [model, encoder, *asked]
        and "org" in result.extras
    ]


def _close(one, other):
    return one is not None and other is not None and abs(one - other) <= _SAME_FCS


def _shown(value, form):
    return "-" if value is None else f"{value:{form}}"


# Files ----------------------------------------------------------------------------------------------------------------


def result_of(line, source=""):
    """The [`Result`] of a `cell` line of a run file.

    Raises:
        ValueError: the line is not like that.
    """
    missing = [name for name in ("cell", "summary") if not isinstance(line.get(name), dict)]
    if missing:
        raise ValueError(f"`{source}` must have {' and '.join(missing)} in each line of kind 'cell', got one without")
    summary = line["summary"]
    figures = {name: summary.get(name) for name in _FIGURES}
    extras = {name: summary[name] for name in _EXTRAS if summary.get(name) is not None}
    return Result(Cell.from_dict(line["cell"]), summary.get("images", 0), **figures, extras=extras, source=source)


def read_results(path):
    """The finished cells of a run file of `fs-psm evaluate`, or of an `attacks*.json` that was made from one.

    Raises:
        ValueError: it is another file.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.suffix == ".json":
        return read_attacks(path)
    _, lines = read_run(path)
    return [result_of(line, path.name) for line in lines if line["kind"] == "cell"]


def write_attacks(path, results, command, **facts):
    """Results as the model cards read them: `{norm, rows, versions, command}`.

    A card knows the modes `adaptive` and `transfer`; an attack on the plain tower itself knows all there is to know, so `Org`
    is `adaptive` there, with `white_box` beside it.

    Args:
        path (`Path`): `results/attacks*.json` of a model folder.
        results (`list[Result]`): finished cells, all of one norm.
        command (`str`): what makes the file again.
        facts: further JSON-safe keys, such as `seed`.

    Raises:
        ValueError: there is no result, or they are of two norms.
    """
    norms = sorted({result.cell.norm for result in results})
    if len(norms) != 1:
        raise ValueError(f"`results` must be finished cells of one norm, got {', '.join(norms) or 'none'}")
    rows = []
    for result in results:
        cell = result.cell.to_dict()
        del cell["norm"]
        white_box = cell["mode"] == "white-box"
        cell |= {"mode": "adaptive", "white_box": True} if white_box else {}
        if white_box:  # no noise, which a card shows as a dash
            del cell["sigma"]
        rows.append(
            cell | {"images": result.images} | {name: getattr(result, name) for name in _FIGURES} | result.extras
        )
    found = {"norm": norms[0], "rows": rows, "versions": versions(), "command": command, **facts}
    write_text(path, json.dumps(found, indent=2) + "\n")


def read_attacks(path):
    """The results of a file of [`write_attacks`].

    Raises:
        ValueError: the file is not like that.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        norm, rows = found["norm"], found["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{path}` must be a JSON object with `norm` and `rows`, got another: {error}") from error
    results, fields = [], {field.name for field in dataclasses.fields(Cell)}
    for row in rows:
        cell = {name: row[name] for name in fields & row.keys()} | {"norm": norm}
        if row.get("white_box"):
            cell |= {"mode": "white-box", "sigma": 0.0}
        missing = [name for name in (*_FIGURES, "images") if name not in row]
        if missing:
            raise ValueError(f"`{path}` must have {', '.join(missing)} in each row, got one without")
        extras = {name: row[name] for name in _EXTRAS if row.get(name) is not None}
        figures = {name: row[name] for name in _FIGURES}
        results.append(Result(Cell.from_dict(cell), row["images"], **figures, extras=extras, source=path.name))
    return results
