"""Certificates as a table of plain text."""

import numpy as np

from .certified import confidence, round_down


def format_table(certificates, null_cosine: float | None = None) -> str:
    """Mean certified numbers over images, a row per setting: the paper's columns, and what they are worth.

    Columns are mean lower bounds on `<ĝ(x'), u>` per l2 radius (they may be negative, and then bound no cosine), the
    mean radius, and the share of images where the bound at the image itself is below the level.

    Args:
        certificates (`Iterable[Certificate]`): of any mixture of settings, with the same `epsilons`.
        null_cosine (`float`, *optional*): mean cosine of unrelated images; default the mean of those recorded.

    Raises:
        ValueError: if there is no certificate, or their `epsilons` differ.
    """
    certificates = list(certificates)
    if len({c.epsilons for c in certificates}) != 1:
        raise ValueError("`certificates` must be one or more with the same `epsilons`")
    groups = {}
    for c in certificates:
        key = (c.sigma, c.feature, c.anchor, c.method, c.alpha, c.level)
        groups.setdefault(key, []).append(c)

    header = ["sigma", "feature", "anchor", "method", "confidence", "n", "images", "score"]
    header += [f"eps {epsilon:g}" for epsilon in certificates[0].epsilons] + ["radius", "abstained"]
    rows = [header]
    for (sigma, feature, anchor, method, alpha, level), group in groups.items():
        row = [f"{sigma:g}", feature or "-", anchor or "-", method]
        row += ["none" if alpha is None else confidence(alpha)]
        row += [f"{np.mean([c.num_samples for c in group]):.0f}"]
        # A certificate per token is not an image more.
        row += [f"{sum(c.token in (None, 0) for c in group)}"]
        row += [f"{np.mean([c.robustness_score for c in group]):.4f}"]
        means = np.mean([c.inner_product_bounds for c in group], axis=0)
        row += [f"{round_down(bound, 4):+.4f}" for bound in means]
        row += [f"{round_down(float(np.mean([c.radius for c in group])), 4):.4f} ({level:g})"]
        row += [f"{100 * np.mean([c.abstained for c in group]):.0f} %"]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append("eps: mean lower bound on the inner product with the anchor; a negative one bounds no cosine.")
    if any(c.alpha is not None for c in certificates):
        lines.append("confidence: of each certificate by itself.")
    lines.append("radius: mean l2 radius in [0, 1] pixels that keeps the cosine in brackets; 0 where abstained.")
    if any(not c.is_certificate for c in certificates):
        lines.append("plugin: the sample mean in place of a confidence bound; not a certificate.")
    recorded = [c.null_cosine for c in certificates if c.null_cosine is not None]
    if null_cosine is None and recorded:
        null_cosine = float(np.mean(recorded))
    if null_cosine is not None:
        lines.append(f"null level: unrelated images have a mean cosine of {null_cosine:+.4f}.")
    return "\n".join(lines)


def format_label_table(certificates) -> str:
    """Certified labels over images: how many, and how far, beside Cohen's hard vote from the same draws.

    Args:
        certificates (`Iterable[LabelCertificate]`): of one setting.

    Raises:
        ValueError: if there is no certificate.
    """
    certificates = list(certificates)
    if not certificates:
        raise ValueError("`certificates` must be one or more")
    first = certificates[0]
    header = f"labels, {len(certificates)} images, {first.num_classes} classes, {first.method}, {first.confidence}"
    rows = [("what is classified", "certified", "mean radius", "median radius")]
    kinds = [("smoothed embedding", [c.radius for c in certificates])]
    if all(c.deployed is not None for c in certificates):
        served = first.deployed
        name = f"mean of {served.num_samples} draws, 1 query, beta {served.beta:g}"
        kinds.append((name, [c.deployed.radius for c in certificates]))
    kinds.append(("hard vote (another classifier)", [c.hard_vote_radius for c in certificates]))
    for name, radii in kinds:
        certified = f"{100 * np.mean(np.array(radii) > 0):.0f} %"
        rows.append(
            (name, certified, *(f"{round_down(float(mean), 4):.4f}" for mean in (np.mean(radii), np.median(radii))))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append("hard vote: Cohen et al. 2019 on the labels of single draws; it certifies the majority vote, not the")
    lines.append("smoothed embedding that is served.")
    return "\n".join([header, *lines])
