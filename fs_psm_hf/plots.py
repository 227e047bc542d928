"""Pictures of certificates: curves for any of them, and the picture that the demo draws."""

import os
from pathlib import Path

import numpy as np


# Okabe and Ito's palette, which most colour-blind readers can tell apart; method is also told by the line's kind.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#595959"
_LINES = {"plugin": ":"}
_EPSILON_LABEL = "ε, ℓ₂ norm in [0, 1] pixels"
_COSINE_LABEL = "cosine with the clean feature, at least"
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
    """Draw cosine bounds against the l2 radius, a line per sigma and method; it ends where no cosine is bounded.

    A line of several certificates is their median, in a band from the 10 % to the 90 % quantile over the images. What
    carries no confidence is dotted and says so. Below the null level a bound means nothing; that part is shaded.

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
    groups = {}
    for certificate in certificates:
        groups.setdefault((certificate.sigma, certificate.method, certificate.alpha), []).append(certificate)
    several_sigmas = len({sigma for sigma, _, _ in groups}) > 1
    for index, ((sigma, method, alpha), group) in enumerate(groups.items()):
        label = "plug-in: no confidence" if alpha is None else f"certified, {100 * (1 - alpha):.6g} % confidence"
        label += f", σ = {sigma:g}" if several_sigmas else ""
        label += f", median of {len(group)} images" if len(group) > 1 else ""
        colour = _COLOURS[index % len(_COLOURS)]
        # An order statistic, not a mean: it stays right where some of the bounds are -1, "no cosine is bounded".
        cosines = np.array([c.cosine_bounds for c in group])[:, order]
        low, middle, high = np.quantile(cosines, (0.1, 0.5, 0.9), axis=0, method="lower")
        bounded = np.where(middle >= 0.0, middle, np.nan)
        axes.plot(epsilons, bounded, color=colour, linestyle=_LINES.get(method, "-"), linewidth=2, label=label)
        if len(group) > 1:
            shown = high >= 0.0
            axes.fill_between(epsilons, low.clip(0.0), high, where=shown, color=colour, alpha=0.15, linewidth=0)
    bottom = 0.0
    if null_cosine is not None:
        bottom = min(bottom, null_cosine - 0.05)
        axes.axhline(null_cosine, color=_GREY, linestyle="--", linewidth=1.2, label="null level: unrelated images")
        axes.axhspan(bottom, null_cosine, color=_GREY, alpha=0.12, linewidth=0)
    axes.set(xlim=(epsilons[0], epsilons[-1]), ylim=(bottom, 1.0), xlabel=_EPSILON_LABEL, ylabel=_COSINE_LABEL)
    axes.grid(color="#D9D9D9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def plot_certificates(certificates, path, null_cosine: float | None = None):
    """Draw the certificates of many images in one picture; see `certificate_curve`.

    Args:
        certificates (`Iterable[Certificate]`): with the same `epsilons`.
        path (`str` or `os.PathLike`): PNG file to write.
        null_cosine (`float`, *optional*): default the mean of those that the certificates record.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no certificate, or their `epsilons` differ.
    """
    certificates = list(certificates)
    recorded = [c.null_cosine for c in certificates if c.null_cosine is not None]
    if null_cosine is None and recorded:
        null_cosine = float(np.mean(recorded))
    figure = new_figure(6.4, 4.4)
    certificate_curve(figure.subplots(), certificates, null_cosine).legend(frameon=False, fontsize=9)
    save_figure(figure, path)


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
