"""`Certificate`, and `certify_scores`, which makes one from scores alone: no model, no images."""

import dataclasses
import math

import numpy as np

from . import bounds
from .confidence import pilot_thresholds, survival_band


METHODS = ("cdf", "plugin")
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Deployed:
    """Bounds for the served model, which averages `num_samples` draws instead of computing an expectation.

    For each x' fixed before the serving noise is drawn, with `‖x' - x‖₂ <= epsilon`, one query falls below its bound
    with probability at most `alpha + beta`; Q queries with at most `alpha + Q * beta`. Not simultaneous over the ball
    (theory, Fact 4). Attributes are as in [`Certificate`].
    """

    num_samples: int
    beta: float
    inner_product_bounds: tuple[float, ...]
    cosine_bounds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What is guaranteed about the direction of the smoothed feature ĝ(x') for every x' near one image x.

    With probability at least `1 - alpha` over the sampling noise, for all listed `epsilons` at once and every x' with
    `‖x' - x‖₂ <= epsilon`: `<ĝ(x'), u> >= inner_product_bound` and `cos(ĝ(x'), u) >= cosine_bound`, u being the anchor
    (theory, Facts 1 to 3). With method `"plugin"` nothing is guaranteed: the sample mean stands where a confidence
    bound should, as in the paper's tables, `alpha` is `None` and `is_certificate` is `False`.

    Args:
        sigma (`float`): noise standard deviation in [0, 1]-pixel units.
        epsilons (`tuple[float, ...]`): l2 radii in [0, 1]-pixel units.
        method (`str`): `"cdf"` or `"plugin"`.
        alpha (`float` or `None`): error probability.
        level (`float`): the cosine that `radius` keeps.
        num_samples (`int`): scores counted.
        num_pilot (`int`): scores spent on choosing thresholds, not counted.
        robustness_score (`float`): sample mean of the counted scores, an estimate of the paper's Ŝ(x).
        score_lower_bound (`float`): lower bound on Ŝ(x) itself (for `"plugin"` the mean).
        inner_product_bounds (`tuple[float, ...]`): one per radius; what the paper's tables print; may be negative.
        cosine_bounds (`tuple[float, ...]`): the same where >= 0, else -1.0: a negative number bounds no cosine.
        radius (`float`): largest l2 radius in [0, 1]-pixel units with a cosine bound of at least `level`; may be `inf`.
        abstained (`bool`): the bound is below `level` even at x; then `radius` is 0.
        deployed ([`Deployed`] or `None`): bounds for the mean of the served number of draws.
        anchor (`str` or `None`): `"clean"`, `"smoothed"` or `"given"`.
        null_cosine (`float` or `None`): mean cosine of unrelated images: what "no information" looks like.
        model, psm, dtype, attention, image_size, feature, feature_layer, first_token, aggregation, image_id: what was
            certified.
        seed (`int` or `None`): seed of the noise.
    """

    sigma: float
    epsilons: tuple[float, ...]
    method: str
    alpha: float | None
    level: float
    num_samples: int
    num_pilot: int
    robustness_score: float
    score_lower_bound: float
    inner_product_bounds: tuple[float, ...]
    cosine_bounds: tuple[float, ...]
    radius: float
    abstained: bool
    deployed: Deployed | None = None
    anchor: str | None = None
    null_cosine: float | None = None
    model: str | None = None
    psm: str | None = None
    dtype: str | None = None
    attention: str | None = None
    image_size: tuple[int, int] | None = None
    feature: str | None = None
    feature_layer: int | tuple[int, ...] | None = None
    first_token: int = 0
    aggregation: str | None = None
    image_id: int | None = None
    seed: int | None = None

    @property
    def is_certificate(self) -> bool:
        """Whether the numbers carry a confidence; `False` for `"plugin"`."""
        return self.method != "plugin"

    def to_dict(self) -> dict:
        """Plain values for JSON, with `is_certificate` beside them. An infinite radius is the string `"inf"`."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        if self.deployed is not None:
            values["deployed"] = {k: list(v) if isinstance(v, tuple) else v for k, v in values["deployed"].items()}
        if math.isinf(self.radius):
            values["radius"] = "inf"
        return values | {"is_certificate": self.is_certificate}

    @classmethod
    def from_dict(cls, values: dict) -> "Certificate":
        """Rebuild what `to_dict` wrote.

        Raises:
            ValueError: if a field is missing or unknown, or `is_certificate` contradicts `method`.
        """
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        marked = values.pop("is_certificate", None)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if unknown or missing:
            raise ValueError(f"a `Certificate` needs exactly its own fields, got unknown {unknown}, missing {missing}")
        if isinstance(values.get("deployed"), dict):
            deployed = {name: tuple(v) if isinstance(v, list) else v for name, v in values["deployed"].items()}
            values["deployed"] = Deployed(**deployed)
        certificate = cls(**values | {"radius": float(values["radius"])})
        if marked not in (None, certificate.is_certificate):
            raise ValueError(f"`is_certificate` is {marked}, which contradicts `method` {certificate.method!r}")
        return certificate

    def __str__(self) -> str:
        confidence = "not a certificate (no confidence)" if self.alpha is None else f"confidence {1 - self.alpha:.6g}"
        bound = "  ".join(f"{c:+.3f} at {e:g}" for e, c in zip(self.epsilons, self.cosine_bounds, strict=True))
        radius = "abstained" if self.abstained else f"radius {self.radius:.4f} for cosine >= {self.level:g}"
        return f"{self.method}, {confidence}, n = {self.num_samples}, sigma {self.sigma:g}: {radius}; cosine {bound}"


def certify_scores(
    scores,
    *,
    sigma: float,
    epsilons=(0.125, 0.25, 0.375, 0.5, 0.75),
    alpha: float = 1e-3,
    method: str = "cdf",
    pilot: int | None = None,
    level: float = 0.5,
    deployed_samples: int | None = None,
    beta: float = 0.05,
) -> Certificate:
    """Turn independent scores `s(x + n)`, n ~ N(0, sigma² I), into a [`Certificate`] around x.

    The method must be chosen before the scores are looked at: taking the better of two costs a union bound.

    Args:
        scores (`np.ndarray` of shape `(n,)`): values in [0, 1]. Excess by rounding, up to 1e-6, is clamped, and every
            bound on the score is lowered by it.
        sigma (`float`): noise standard deviation in [0, 1]-pixel units, > 0.
        epsilons (`Sequence[float]`): l2 radii in [0, 1]-pixel units, finite, >= 0.
        alpha (`float`): error probability of the certificate. Ignored by `"plugin"`.
        method (`str`): `"cdf"`, the layer-cake bound with confidence `1 - alpha` (theory, Fact 3), or `"plugin"`, the
            paper's Theorem 1 with the sample mean, which certifies nothing.
        pilot (`int`, *optional*): how many of the first scores choose the thresholds and are not counted. Defaults to
            `max(100, n // 10)`, and to half where that is less. `"plugin"` counts all scores.
        level (`float`): cosine that the radius keeps, in [0, 1).
        deployed_samples (`int`, *optional*): also bound the mean of this many served draws (`"cdf"` only).
        beta (`float`): failure probability of one served query, over the serving noise.

    Raises:
        ValueError: if an argument is out of its range, or a score is not finite or outside [0, 1].
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
    scores, slack = _checked_scores(scores)
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(f"`sigma` must be finite and > 0, got {sigma}")
    epsilons = np.array(epsilons, np.float64, ndmin=1)
    if epsilons.ndim != 1 or not np.all(np.isfinite(epsilons) & (epsilons >= 0.0)):
        raise ValueError(f"`epsilons` must be finite numbers >= 0, got {epsilons.tolist()}")
    if not 0.0 <= level < 1.0:
        raise ValueError(f"`level` must be in [0, 1), got {level}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"`alpha` must be strictly between 0 and 1, got {alpha}")
    if pilot is None:
        pilot = min(max(100, len(scores) // 10), len(scores) // 2)
    if not 0 <= pilot < len(scores):
        raise ValueError(f"`pilot` must be from 0 to {len(scores) - 1}, one less than the scores, got {pilot}")
    if method == "plugin" and deployed_samples is not None:
        raise ValueError("`deployed_samples` needs `method` 'cdf', got 'plugin', which bounds no probability")

    at = np.concatenate([[0.0], epsilons])
    # A level raised by the slack, rather than a bound lowered by it: the same radius.
    raised = min(level + 2.0 * slack, 1.0)
    deployed = None
    if method == "plugin":
        pilot = 0
        score = float(scores.mean())
        lower = bounds.shift(score, at, sigma)
        radius = bounds.certified_radius(score, sigma, raised)
    else:
        thresholds = pilot_thresholds(scores[:pilot])
        survival = survival_band(scores[pilot:], thresholds, alpha)
        lower = bounds.layer_cake(survival, thresholds, at, sigma)
        radius = bounds.layer_cake_radius(survival, thresholds, sigma, raised)
        if deployed_samples is not None:
            quantile = bounds.deployed_score(survival, thresholds, epsilons, sigma, deployed_samples, beta)
            served = bounds.inner_product(np.maximum(quantile - slack, 0.0))
            deployed = Deployed(deployed_samples, beta, _floats(served), _floats(bounds.cosine(served)))
    lower = np.maximum(lower - slack, 0.0)
    products = bounds.inner_product(lower[1:])
    abstained = bool(lower[0] < 0.5 * (1.0 + level))
    return Certificate(
        sigma=float(sigma),
        epsilons=_floats(epsilons),
        method=method,
        alpha=None if method == "plugin" else float(alpha),
        level=float(level),
        num_samples=len(scores) - pilot,
        num_pilot=pilot,
        robustness_score=float(scores[pilot:].mean()),
        score_lower_bound=float(lower[0]),
        inner_product_bounds=_floats(products),
        cosine_bounds=_floats(bounds.cosine(products)),
        radius=0.0 if abstained else float(radius),
        abstained=abstained,
        deployed=deployed,
    )


def _checked_scores(scores):
    """Scores clamped to [0, 1], and the largest excess that was clamped."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"`scores` must be a non-empty vector, got shape {scores.shape}")
    if not np.all(np.isfinite(scores)):
        raise ValueError(f"`scores` must be finite, got {np.count_nonzero(~np.isfinite(scores))} NaN or infinite")
    slack = max(0.0, float(-scores.min()), float(scores.max()) - 1.0)
    if slack > _ROUNDING:
        raise ValueError(f"`scores` must be in [0, 1], got values from {scores.min()} to {scores.max()}")
    return np.clip(scores, 0.0, 1.0), slack


def _floats(values):
    return tuple(float(value) for value in values)
