"""Pictures of attacks: what the images look like and what the models say, and how strength grows with steps and draws."""

import textwrap

import numpy as np

from .plots import new_figure, save_figure


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#595959"
_COLUMN = 2.3
_FIGURES = {
    "asr": "attack success rate",
    "fcs": "FCS, cosine of clean and attacked feature",
    "acc": "accuracy under attack",
}


def attack_figure(rows, magnify=8.0):
    """A row of pictures per attacked image: clean, adversarial, change, purified.

    Args:
        rows (`Sequence[tuple[str, dict]]`): a title, and by heading the picture with the text to stand under it:
            `{"clean": (picture, text), "adversarial": …, "purified": …}`, pictures of shape `(height, width, 3)`, clipped to
            [0, 1] here for the eye alone. `purified` may be left out. The change is drawn from clean and adversarial.
        magnify (`float`): the change is shown times this, around grey.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no row, or one without its clean or adversarial picture.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one image, got none")
    panels = [_panels(title, views, magnify) for title, views in rows]
    columns = max(map(len, panels))
    figure = new_figure(_COLUMN * columns, 3.0 * len(panels))
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for line, (title, _), shown in zip(axes, rows, panels, strict=True):
        for place in line:
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
        line[0].set_title(title, loc="left", fontsize=9, color=_GREY)
        for place, (heading, picture, text) in zip(line, shown, strict=False):
            place.imshow(np.clip(picture, 0.0, 1.0), interpolation="nearest")
            words = "\n".join(textwrap.wrap(text, 30, max_lines=4, placeholder=" …"))
            place.set_xlabel(f"{heading}\n{words}", fontsize=8)
    return figure


def _panels(title, views, magnify):
    missing = [name for name in ("clean", "adversarial") if name not in views]
    if missing:
        raise ValueError(f"`rows` must hold a clean and an adversarial picture each, {title!r} lacks {missing[0]}")
    clean, adversarial = (np.asarray(views[name][0], dtype=np.float64) for name in ("clean", "adversarial"))
    if clean.shape != adversarial.shape:
        raise ValueError(f"`rows` must hold pictures of one size, {title!r} has {clean.shape} and {adversarial.shape}")
    change = 0.5 + magnify * (adversarial - clean) / 2
    largest = 255 * np.abs(adversarial - clean).max()
    panels = [("clean", *views["clean"]), ("adversarial", *views["adversarial"])]
    panels.append((f"change × {magnify:g}", change, f"at most {largest:.3g}/255"))
    return panels + ([("purified", *views["purified"])] if "purified" in views else [])


def plot_attacks(rows, path, magnify=8.0):
    """Write the picture of [`attack_figure`] as PNG."""
    save_figure(attack_figure(rows, magnify), path)


def strength_figure(results, by="steps", figure="asr"):
    """A figure of attacked rows against the steps or the noise draws of the attack; flat means that more would not help.

    Args:
        results (`Iterable[Result]`): finished cells; a line per row, attack, mode, strength and gradient that was run with at
            least two numbers of steps or draws.
        by (`str`): `"steps"` or `"draws"`.
        figure (`str`): `"asr"`, `"fcs"` or `"acc"`.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `by` or `figure` is another word, or no row was run with two numbers.
    """
    if by not in ("steps", "draws"):
        raise ValueError(f"`by` must be 'steps' or 'draws', got {by!r}")
    if figure not in _FIGURES:
        raise ValueError(f"`figure` must be one of {', '.join(_FIGURES)}, got {figure!r}")
    lines = {}
    for result in results:
        cell, value = result.cell, getattr(result, figure)
        if value is None or getattr(cell, by) is None:
            continue
        name = f"{cell.row}, {cell.attack}, {cell.mode}" + (f", {cell.gradient}" if cell.gradient else "")
        other = cell.draws if by == "steps" else cell.steps
        key = (*cell.defence, cell.attack, cell.mode, cell.gradient, cell.epsilon, other)
        lines.setdefault(key, (f"{name}, {255 * cell.epsilon:.4g}/255", []))[1].append((getattr(cell, by), value))
    lines = [(name, sorted(points)) for name, points in lines.values() if len({x for x, _ in points}) > 1]
    if not lines:
        raise ValueError(f"`results` must hold a row with at least two numbers of {by}, got none")
    drawn = new_figure(6.4, 4.2)
    axes = drawn.subplots()
    for number, (name, points) in enumerate(lines):
        axes.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[number % len(_COLOURS)], label=name)
    _finish(axes, "steps of the attack" if by == "steps" else "noise draws per step", _FIGURES[figure])
    axes.set_ylim(-0.03, 1.03)
    return drawn


def objective_figure(histories):
    """The attack's own objective against its steps, a line per attack; still rising means too few steps.

    Args:
        histories (`dict[str, tuple[Sequence[int], Sequence[float]]]`): by name the steps and the mean over the images.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is none.
    """
    if not histories:
        raise ValueError("`histories` must hold at least one attack, got none")
    drawn = new_figure(6.4, 4.2)
    axes = drawn.subplots()
    for number, (name, (steps, values)) in enumerate(histories.items()):
        axes.plot(
            steps,
            values,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=("-", "--", ":")[number // 6 % 3],
            label=name,
        )
    _finish(axes, "steps of the attack", "its own objective, mean over the images")
    return drawn


def _finish(axes, across, up):
    axes.set(xlabel=across, ylabel=up)
    axes.grid(color="#D9D9D9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
