"""Pictures of certificates: of a results file, of one image, and the picture that the demo draws."""

import os
from pathlib import Path

import numpy as np


# Okabe and Ito's palette, which most colour-blind readers can tell apart; method is also told by the line's kind.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#595959"
_LINES = {"plugin": ":"}
# What `results_figure` draws; the solid line lies lowest, so that the broken ones stay visible on it.
_KINDS = {
    "plugin": {
        "label": "paper's plug-in FCSB: no confidence",
        "color": "#D55E00",
        "linestyle": ":",
        "zorder": 2.4,
    },
    "betting": {
        "label": "valid FCSB (betting): {confidence} confidence per image",
        "color": "#009E73",
        "linestyle": (0, (7, 2)),
        "zorder": 2.3,
    },
    "cdf": {
        "label": "cdf bound: {confidence} confidence per image",
        "color": "#0072B2",
        "linestyle": "-",
        "zorder": 2.1,
    },
    "deployed": {
        "label": "deployed, mean of n₀ = {n} draws: one query, β = {beta:g}, {confidence} confidence",
        "color": "#CC79A7",
        "linestyle": "-.",
        "zorder": 2.2,
        # It falls off cliffs, where a slanted line between two radii would promise too much.
        "drawstyle": "steps-pre",
    },
}
_EPSILON_LABEL = "ε, ℓ₂ norm in [0, 1] pixels"
_COSINE_LABEL = "cosine with the {anchor} feature, at least"
_PICTURE_HEADINGS = ("clean", "noisy, σ = {sigma:g}", "purified")


def new_figure(width: float, height: float):
    """A matplotlib figure of so many inches that belongs to no window and changes no global state.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: `pip install "fs-psm-hf[plots]"`') from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path, dpi: int = 130):
    """Write `figure` as PNG, whole or not at all."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png", dpi=dpi)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def certificate_curve(axes, certificates, null_cosine: float | None = None):
    """Draw the cosine bounds of one image against the l2 radius, a line per certificate; it ends where none is bounded.

    What carries no confidence is dotted and says so. Below the null level a bound means nothing; that part is shaded.

    Args:
        axes (`matplotlib.axes.Axes`): where to draw.
        certificates (`Iterable[Certificate]`): of any mixture of settings, with the same `epsilons`.
        null_cosine (`float`, *optional*): mean cosine of unrelated images.

    Returns:
        `matplotlib.axes.Axes`: the same, with labelled axes and no legend.

    Raises:
        ValueError: if there is no certificate, or their `epsilons` differ.
    """
    certificates = list(certificates)
    if len({c.epsilons for c in certificates}) != 1:
        raise ValueError("`certificates` must be one or more with the same `epsilons`")
    order = np.argsort(certificates[0].epsilons)
    epsilons = np.array(certificates[0].epsilons)[order]
    several_sigmas = len({c.sigma for c in certificates}) > 1
    for index, c in enumerate(certificates):
        label = "plug-in: no confidence" if c.alpha is None else f"certified, {_percent(1 - c.alpha)} confidence"
        label += f", σ = {c.sigma:g}" if several_sigmas else ""
        style = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": _LINES.get(c.method, "-")}
        axes.plot(epsilons, _where_bounded(np.array(c.inner_product_bounds)[order]), linewidth=2, label=label, **style)
    _finish_cosine_axes(axes, null_cosine)
    axes.set(xlim=(epsilons[0], epsilons[-1]), ylabel=_COSINE_LABEL.format(anchor="clean"))
    return axes


def results_figure(lines):
    """Curves of a results file: certified cosine against the radius, and the share of images certified at it.

    The left panel shows the (lower) median over the images: at least half of them have at least that bound. A line ends
    where the median is negative and so bounds no cosine. Each confidence is that of one image by itself.

    Args:
        lines (`Sequence[dict]`): header, images and summary of `fs-psm certify --plot`.

    Returns:
        `matplotlib.figure.Figure`: two panels and a legend below them.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no image has a curve.
    """
    images = [line for line in lines if line["kind"] == "image" and "curve" in line]
    if not images:
        raise ValueError(
            "`lines` must hold the curve of at least one image, got none: per-token results have no curve"
        )
    header, curves = lines[0], [line["curve"] for line in images]
    figure = new_figure(11.0, 5.2)
    cosines, shares = figure.subplots(1, 2)
    _draw_cosines(cosines, header, curves, lines[-1].get("null_cosine"))
    _draw_shares(shares, header, curves)
    taken = [line["certificates"][0]["num_samples"] + line["certificates"][0]["num_pilot"] for line in images]
    draws = f"{min(taken):,}" if min(taken) == max(taken) else f"{min(taken):,} to {max(taken):,}"
    count = "1 image" if len(images) == 1 else f"{len(images):,} images"
    figure.suptitle(f"σ = {header['sigma']:g}, n = {draws} draws per image, {count}", fontsize=12)
    handles, labels = cosines.get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 2, "handlelength": 3.6}
    figure.legend(handles, labels, frameon=False, fontsize=9, **place)
    return figure


def plot_results(lines, path):
    """Write the picture of a results file; see `results_figure`.

    Args:
        lines (`Sequence[dict]`): header, images and summary of `fs-psm certify --plot`.
        path (`str` or `os.PathLike`): PNG file to write.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no image has a curve.
    """
    save_figure(results_figure(lines), path)


def _draw_cosines(axes, header, curves, null_cosine):
    """Left panel of `results_figure`: median bound against the radius, a line per kind."""
    epsilons = np.array(curves[0]["epsilons"])
    facts = {"confidence": _percent(1 - header["alpha"]), "n": header["served_samples"], "beta": header["beta"]}
    end = 0.0
    for name, style in _KINDS.items():
        if name not in curves[0]:
            continue  # the served model averages no such draws
        bounds = np.array([curve[name]["inner_product_bounds"] for curve in curves])
        # An order statistic, not a mean of two: half of it could be a number that bounds no cosine.
        middle = _where_bounded(np.quantile(bounds, 0.5, axis=0, method="lower"))
        axes.plot(epsilons, middle, linewidth=2, **style | {"label": style["label"].format(**facts)})
        end = max(end, epsilons[np.isfinite(middle)].max(initial=0.0))
    if end == 0.0:
        _say(axes, "no cosine is bounded beyond ε = 0")
    _finish_cosine_axes(axes, null_cosine)
    axes.set_xlim(0.0, min(1.05 * end, epsilons[-1]) if end > 0.0 else epsilons[-1])
    axes.set_ylabel(_COSINE_LABEL.format(anchor=header["anchor"]))
    title = "certified cosine, median over the images" if len(curves) > 1 else "certified cosine"
    axes.set_title(f"{title}\na line ends where no cosine is bounded", fontsize=10)


def _draw_shares(axes, header, curves):
    """Right panel of `results_figure`: share of the images whose radius is at least r, as exact steps."""
    # An image that abstained is not certified, even at r = 0.
    radii = {
        name: np.array([-1.0 if c[name]["abstained"] else float(c[name]["radius"]) for c in curves])
        for name in _KINDS
        if "radius" in curves[0].get(name, {})
    }
    every = np.concatenate(list(radii.values()))
    finite = every[np.isfinite(every) & (every > 0.0)]
    end = 1.08 * finite.max() if len(finite) else curves[0]["epsilons"][-1]
    for name, values in radii.items():
        at = np.unique([0.0, *values[np.isfinite(values) & (values > 0.0)], end])
        share = 100.0 * (values >= at[:, None]).mean(axis=1)
        style = {key: value for key, value in _KINDS[name].items() if key != "label"}
        axes.step(at, share, where="pre", linewidth=2, **style)
    if np.all(every < 0.0):
        _say(axes, "no image is certified")
    axes.set(xlim=(0.0, end), ylim=(-3.0, 103.0), xlabel="radius r, ℓ₂ norm in [0, 1] pixels", ylabel="images, %")
    axes.set_title(
        f"share of the images that keep\na cosine of at least {header['level']:g} up to radius r", fontsize=10
    )
    _tidy(axes)


def _where_bounded(inner_products):
    """Bounds on the inner product as cosines, NaN where negative."""
    return np.where(inner_products >= 0.0, inner_products, np.nan)


def _finish_cosine_axes(axes, null_cosine):
    """Null level, limits and labels of an axes of cosines."""
    bottom = 0.0
    if null_cosine is not None:
        bottom = min(bottom, null_cosine - 0.05)
        axes.axhline(null_cosine, color=_GREY, linestyle="--", linewidth=1.2, label="null level: unrelated images")
        axes.axhspan(bottom, null_cosine, color=_GREY, alpha=0.12, linewidth=0)
    axes.set(ylim=(bottom, 1.0), xlabel=_EPSILON_LABEL)
    _tidy(axes)


def _tidy(axes):
    axes.grid(color="#D9D9D9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _say(axes, text):
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", fontsize=11, color=_GREY)


def _percent(share):
    return f"{100 * share:.6g} %"


def plot_rows(rows, path, *, sigma: float, null_cosine: float | None = None):
    """Draw a row per image: clean, noisy and purified picture, and its certificates.

    Args:
        rows (`Sequence[tuple[str, Sequence[np.ndarray], Sequence[Certificate]]]`): title; the three pictures of shape
            `(height, width, 3)`, in [0, 1] and clipped to it here for the eye alone; certificates of that image.
        path (`str` or `os.PathLike`): PNG file to write.
        sigma (`float`): noise standard deviation in [0, 1]-pixel units.
        null_cosine (`float`, *optional*): mean cosine of unrelated images.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one image, got none")
    figure = new_figure(10.5, 0.9 + 2.15 * len(rows))
    strips = np.atleast_1d(figure.subfigures(len(rows), 1))
    for strip, (title, pictures, certificates) in zip(strips, rows, strict=True):
        axes = strip.subplots(1, 4, width_ratios=(1, 1, 1, 2.5))
        strip.suptitle(title, x=0.012, ha="left", fontsize=11)
        for place, heading, picture in zip(axes, _PICTURE_HEADINGS, pictures, strict=False):
            place.imshow(np.clip(picture, 0.0, 1.0), interpolation="nearest")
            place.set(xticks=[], yticks=[])
            place.set_xlabel(heading.format(sigma=sigma), fontsize=9)
            place.spines[:].set_visible(False)
        curve = certificate_curve(axes[3], certificates, null_cosine)
        curve.set_xlabel(_EPSILON_LABEL, fontsize=9)
        curve.set_ylabel("cosine, at least", fontsize=9)
        curve.tick_params(labelsize=8)
    handles, labels = curve.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=9)
    save_figure(figure, path)


def check_picture(path):
    """Raise before a long run where its picture could not be written.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if `path` is no .png file in a folder that exists.
    """
    new_figure(1, 1)
    if Path(path).suffix.lower() != ".png" or not Path(path).absolute().parent.is_dir():
        raise ValueError(f"`--plot` must be a .png file in a folder that exists, got {path}")
