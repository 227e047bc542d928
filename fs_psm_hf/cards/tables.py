"""The tables of a card, as Markdown, from results; numbers are formatted here and nowhere else."""

ROWS = ("FS", "FS+M", "FS+denoiser", "FS+FFDNet", "FS+P", "FS+P+M")
METHODS = {
    "plugin": "plug-in",
    "betting": "FCSB, betting",
    "bernstein": "FCSB, Bernstein",
    "hoeffding": "FCSB, Hoeffding",
    "cdf_pilot": "cdf, pilot",
}
MODES, NORMS = ("adaptive", "transfer"), {"linf": "ℓ∞", "l2": "ℓ₂"}


def confidence(alpha):
    """`99.9 %` of an α of 0.001."""
    return f"{100 * (1 - alpha):g} %"


def format_table(found):
    """The rows of the paper's Table 5 with what `examples/benchmarks/psm_table.py` has measured."""
    header = ["σ", "row", "mean cosine", "plug-in FCSB at " + ", ".join(f"{e:g}" for e in found["epsilons"])]
    header += ["plug-in radius", f"{confidence(found['alpha'])} radius (images)", "PSNR, dB"]
    lines = []
    for sigma, rows in found["rows"].items():
        for name in [*(n for n in ROWS if n in rows), *(n for n in rows if n not in ROWS)]:
            row, quality = rows[name], found["psnr_db"][sigma]
            plugin, cdf = row["plugin"], row.get("cdf")
            bounds = ", ".join(f"{b:.3f}" for b in plugin["mean_inner_product_bounds"])
            certified = "-" if cdf is None else f"{cdf['mean_radius']:.3f} ({cdf['images']})"
            part = next((part for part in quality if f"+{part}" in name), "noisy")
            cells = [sigma, name, f"{plugin['mean_cosine']:.3f}", bounds, f"{plugin['mean_radius']:.3f}", certified]
            lines.append([*cells, f"{quality[part]:.2f}"])
    return _markdown(header, lines)


def format_rows(result):
    """What `examples/benchmarks/clean_utility.py` has measured."""
    lines = [
        [name, f"{row['plain_gallery']:.1%}", f"{row['own_gallery']:.1%}", f"{row['mean_cosine_with_plain']:.3f}"]
        for name, row in result["rows"].items()
    ]
    return _markdown(["feature", "plain gallery", "own gallery", "cosine with the plain feature"], lines)


def format_certified(files):
    """A table per set of radii of results files of `fs-psm certify`, `[(header, summary)]`."""
    tables = {}
    for header, end in files:
        lines = tables.setdefault(tuple(header["epsilons"]), [])
        sigma, empty = f"{header['sigma']:g}", [""] * (len(header["epsilons"]) + 1)
        for row in end["rows"]:
            certain = confidence(header["alpha"]) if row["is_certificate"] else "no confidence"
            method = f"{METHODS.get(row['method'], row['method'])}, {certain}"
            bounds = [f"{bound:.3f}" for bound in row["mean_inner_product_bounds"]]
            lines.append([sigma, f"{row['images']} × {row['mean_num_samples']:,.0f}", method])
            lines[-1] += [f"{2 * row['mean_robustness_score'] - 1:.3f}", *bounds, _optional(row["mean_radius"], ".3f")]
        if end["null_cosine"] is not None:
            lines.append(
                [sigma, f"{end['rows'][0]['images']} images", "null level", f"{end['null_cosine']:.3f}", *empty]
            )
    first = ["σ", "images × draws", "method", "mean cosine"]
    found = []
    for epsilons, lines in tables.items():
        radii = [f"{e:g}" for e in epsilons]
        found.append(_markdown([*first, *(["ε = " + radii[0], *radii[1:]] if radii else []), "mean radius"], lines))
    return "\n\n".join(found)


def format_attacks(found):
    """Attacked rows: `row`, `attack`, `mode`, `epsilon`, `fcs`, `asr`, `acc`, `images`, and `sigma` where it was smoothed.

    Raises:
        ValueError: the norm of the file or the mode of a row is another than those known.
    """
    if found["norm"] not in NORMS:
        raise ValueError(f"`norm` of attacks must be one of {', '.join(NORMS)}, got {found['norm']!r}")
    lines = []
    for row in found["rows"]:
        if row["mode"] not in MODES:
            raise ValueError(f"`mode` of an attack must be one of {', '.join(MODES)}, got {row['mode']!r}")
        shown = [_optional(row[name], form) for name, form in (("fcs", ".3f"), ("asr", ".1%"), ("acc", ".1%"))]
        cells = [_optional(row.get("sigma"), "g"), row["row"], row["attack"], row["mode"]]
        lines.append([*cells, format_epsilon(row["epsilon"], found["norm"]), f"{row['images']}", *shown])
    header = ["σ", "row", "attack", "mode", f"ε, {NORMS[found['norm']]}", "images", "FCS", "ASR", "ACC"]
    return _markdown(header, lines)


def format_epsilon(epsilon, norm):
    """A strength in [0, 1] pixels; largest changes of a pixel are read in 255ths."""
    return f"{255 * epsilon:.4g}/255" if norm == "linf" else f"{epsilon:g}"


def format_cost(found):
    """Measured times: `row`, `device`, `num_samples`, `seconds_per_image`."""
    lines = [
        [row["row"], row["device"], f"{row['num_samples']}", f"{row['seconds_per_image']:.3g}"]
        for row in found["rows"]
    ]
    return _markdown(["row", "device", "draws", "seconds per image"], lines)


def _optional(value, form):
    """A number; a dash where there is none; words, such as the `inf` of a results file, as they are."""
    return "-" if value is None else value if isinstance(value, str) else f"{value:{form}}"


def _markdown(header, lines):
    rows = [header, ["---"] * len(header), *lines]
    # An empty cell has one space, not two.
    return "\n".join("|" + "|".join(f" {_cell(c)} " if c else " " for c in row) + "|" for row in rows)


def _cell(text):
    return " ".join(text.replace("|", "\\|").split())
