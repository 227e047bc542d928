"""`Certificate`, and `certify_scores`, which makes one from scores alone: no model, no images."""

import dataclasses
import math

import numpy as np

from . import bounds
from .bands import order_band, pilot_band
from .certified import Certified, round_down
from .confidence import MEAN_METHODS, mean_lower


METHODS = ("cdf", "cdf_pilot", *MEAN_METHODS, "best", "plugin")
# Methods that bound the whole distribution of a score, which the mean of a few draws needs too.
BAND_METHODS = ("cdf", "cdf_pilot", "best")
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
class Certificate(Certified):
    """What is guaranteed about the direction of the smoothed feature ĝ(x') for every x' near one image x.

    With probability at least `1 - alpha` over the sampling noise, for all listed `epsilons` at once and every x' with
    `‖x' - x‖₂ <= epsilon`: `<ĝ(x'), u> >= inner_product_bound` and `cos(ĝ(x'), u) >= cosine_bound`, u being the anchor
    (theory, Facts 1 to 3). With method `"plugin"` nothing is guaranteed: the sample mean stands where a confidence
    bound should, as in the paper's tables, `alpha` is `None` and `is_certificate` is `False`.

    Args:
        sigma (`float`): noise standard deviation in [0, 1]-pixel units.
        epsilons (`tuple[float, ...]`): l2 radii in [0, 1]-pixel units.
        method (`str`): one of `METHODS`; see `certify_scores`.
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
        token (`int` or `None`): the token that this is about, counted from the first the host reads; `None` for all of
            them as one vector.
        joint_alpha (`float` or `None`): error probability of the statement that the certificates of all tokens of this
            image hold together: the sum of theirs (union bound).

    The subject of the certificate is described by the fields of [`Certified`].
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
    token: int | None = None
    joint_alpha: float | None = None

    deployed_class = Deployed

    def __str__(self) -> str:
        bound = "  ".join(
            f"{round_down(c, 3):+.3f} at {e:g}" for e, c in zip(self.epsilons, self.cosine_bounds, strict=True)
        )
        radius = f"radius {round_down(self.radius, 4):.4f} for cosine >= {self.level:g}"
        radius = "abstained" if self.abstained else radius
        about = f"{self.method}, {self.confidence}, n = {self.num_samples}, sigma {self.sigma:g}"
        return f"{about}: {radius}; cosine {bound}"


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
    num_looks: int = 1,
    per_token: bool = False,
):
    """Turn independent scores `s(x + n)`, n ~ N(0, sigma² I), into a [`Certificate`] around x.

    The method must be chosen before the scores are looked at; `"best"` pays for the choice.

    Args:
        scores (`np.ndarray` of shape `(n,)` or `(batch_size, n)`): values in [0, 1]. Excess by rounding, up to 1e-6, is
            clamped, and every bound on the score is lowered by it.
        sigma (`float`): noise standard deviation in [0, 1]-pixel units, > 0.
        epsilons (`Sequence[float]`): l2 radii in [0, 1]-pixel units, finite, >= 0.
        alpha (`float`): error probability of the certificate; with `per_token`, of all of them together. Ignored by
            `"plugin"`.
        method (`str`): with confidence `1 - alpha`: `"cdf"`, the layer-cake bound (theory, Fact 3) over a band through
            the sorted scores (`bands.order_band`); `"cdf_pilot"`, over Clopper–Pearson bounds at thresholds from a pilot;
            `"betting"`, `"bernstein"`, `"hoeffding"`, the paper's Theorem 1 at a lower bound on the mean score;
            `"best"`, the larger of `"cdf"` and `"betting"`, each at `alpha / 2`. Without: `"plugin"`, Theorem 1 at the
            sample mean, which certifies nothing.
        pilot (`int`, *optional*): how many of the first scores are not counted. For `"cdf_pilot"` they choose the
            thresholds: `max(100, n // 10)`, or half where that is less; for the others 0, unless something else, such
            as the anchor, depends on them.
        level (`float`): cosine that the radius keeps, in [0, 1).
        deployed_samples (`int`, *optional*): also bound the mean of this many served draws (`"cdf"`, `"cdf_pilot"` and
            `"best"`).
        beta (`float`): failure probability of one served query, over the serving noise.
        num_looks (`int`): planned looks at the scores, one of which ended the sampling; each has its equal share of
            `alpha`.
        per_token (`bool`): the rows of a batch are the tokens of one image: each has its equal share of `alpha`.

    Returns:
        [`Certificate`], or a list of them for a batch.

    Raises:
        ValueError: if an argument is out of its range, or a score is not finite or outside [0, 1].
    """
    check_options(
        sigma=sigma, epsilons=epsilons, alpha=alpha, method=method, level=level, beta=beta,
        deployed_samples=deployed_samples,
    )  # fmt: skip
    epsilons = np.array(epsilons, np.float64, ndmin=1)
    scores, slack = clean_scores(scores)
    batch = np.atleast_2d(scores)
    slack = np.atleast_1d(slack)[:, None]  # (B, 1)
    n = batch.shape[-1]
    if pilot is None:
        pilot = min(max(100, n // 10), n // 2) if method == "cdf_pilot" else 0
    if isinstance(pilot, bool) or not isinstance(pilot, int) or not 0 <= pilot < n:
        raise ValueError(f"`pilot` must be an integer from 0 to {n - 1}, one less than the scores, got {pilot!r}")
    if per_token and scores.ndim == 1:
        raise ValueError("`per_token` needs a batch of scores, a row per token, got a vector")
    own_alpha = alpha / len(batch) if per_token else alpha

    at = np.concatenate([[0.0], epsilons])
    # A level raised by the slack, rather than a bound lowered by it: the same radius.
    raised = np.minimum(level + 2.0 * slack[:, 0], 1.0)
    lower, radius, band = lower_bounds(
        batch, at, raised, sigma=sigma, alpha=own_alpha / num_looks, method=method, pilot=pilot
    )
    lower = np.maximum(lower - slack, 0.0)  # (B, E + 1)
    products = bounds.inner_product(lower[:, 1:])
    cosines = bounds.cosine(products)
    abstained = lower[:, 0] < 0.5 * (1.0 + level)
    served = None
    if deployed_samples is not None:
        quantile = bounds.deployed_score(band[0][:, None], band[1][:, None], epsilons, sigma, deployed_samples, beta)
        served = bounds.inner_product(np.maximum(quantile - slack, 0.0))
    means = batch[:, pilot:].mean(-1)

    found = [
        Certificate(
            sigma=float(sigma),
            epsilons=_floats(epsilons),
            method=method,
            alpha=None if method == "plugin" else float(own_alpha),
            joint_alpha=float(alpha) if per_token and method != "plugin" else None,
            token=i if per_token else None,
            num_looks=num_looks,
            level=float(level),
            num_samples=n - pilot,
            num_pilot=pilot,
            robustness_score=float(means[i]),
            score_lower_bound=float(lower[i, 0]),
            inner_product_bounds=_floats(products[i]),
            cosine_bounds=_floats(cosines[i]),
            radius=0.0 if abstained[i] else float(radius[i]),
            abstained=bool(abstained[i]),
            deployed=None
            if served is None
            else Deployed(deployed_samples, beta, _floats(served[i]), _floats(bounds.cosine(served[i]))),
        )
        for i in range(len(batch))
    ]
    return found[0] if scores.ndim == 1 else found


def lower_bounds(scores, epsilons, level, *, sigma, alpha, method, pilot=0):
    """Lower bounds on the mean score inside the ball and the radius at a level: the numbers of a certificate, bare.

    Args:
        scores (`np.ndarray` of shape `(batch_size, n)`): in [0, 1].
        epsilons (`np.ndarray` of shape `(num_epsilons,)`): l2 radii in [0, 1]-pixel units.
        level (`np.ndarray` of shape `(batch_size,)`): inner product that the radius keeps, in [-1, 1].

    Returns:
        `tuple`: bounds on the mean score `(batch_size, num_epsilons)`, radii `(batch_size,)`, and the band they came
        from, `(survival, thresholds)`, or `None` for a method that bounds a mean only.
    """
    if method == "best":
        half = {"sigma": sigma, "alpha": alpha / 2.0, "pilot": pilot}
        lower, radius, band = lower_bounds(scores, epsilons, level, method="cdf", **half)
        other, other_radius, _ = lower_bounds(scores, epsilons, level, method="betting", **half)
        return np.maximum(lower, other), np.maximum(radius, other_radius), band
    if method in BAND_METHODS:
        if method == "cdf":
            thresholds, survival = order_band(scores[:, pilot:], alpha)
        else:
            thresholds, survival = pilot_band(scores, pilot, alpha)
        lower = bounds.layer_cake(survival[:, None], thresholds[:, None], epsilons, sigma)
        return lower, bounds.layer_cake_radius(survival, thresholds, sigma, level), (survival, thresholds)
    counted = scores[:, pilot:]
    mean = counted.mean(-1) if method == "plugin" else mean_lower(counted, alpha, method)  # (B,)
    lower = bounds.shift(mean[:, None], epsilons, sigma)
    return lower, bounds.certified_radius(mean, sigma, level), None


def check_options(*, sigma, alpha, method, beta, epsilons=(), level=0.5, deployed_samples=None):
    """Raise `ValueError` unless a certificate can be asked for like this."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(f"`sigma` must be finite and > 0, got {sigma}")
    epsilons = np.array(epsilons, np.float64, ndmin=1)
    if epsilons.ndim != 1 or not np.all(np.isfinite(epsilons) & (epsilons >= 0.0)):
        raise ValueError(f"`epsilons` must be finite numbers >= 0, got {epsilons.tolist()}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"`alpha` must be strictly between 0 and 1, got {alpha}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"`beta` must be strictly between 0 and 1, got {beta}")
    if not 0.0 <= level < 1.0:
        raise ValueError(f"`level` must be in [0, 1), got {level}")
    if deployed_samples is None:
        return
    if (
        isinstance(deployed_samples, bool)
        or not isinstance(deployed_samples, int)
        or not 1 <= deployed_samples <= 1024
    ):
        raise ValueError(f"`deployed_samples` must be an integer from 1 to 1024, got {deployed_samples!r}")
    if method not in BAND_METHODS:
        raise ValueError(
            f"`deployed_samples` needs `method` {', '.join(BAND_METHODS)}, got {method!r}, which bounds a mean only"
        )


def clean_scores(scores):
    """Scores clamped to [0, 1], and the largest excess that was clamped, per row."""
    if np.iscomplexobj(scores):
        raise ValueError("`scores` must be real numbers, got complex ones")
    scores = np.asarray(scores, np.float64)
    if scores.ndim not in (1, 2) or scores.size == 0:
        raise ValueError(f"`scores` must be a non-empty vector or a batch of them, got shape {scores.shape}")
    if not np.all(np.isfinite(scores)):
        raise ValueError(f"`scores` must be finite, got {np.count_nonzero(~np.isfinite(scores))} NaN or infinite")
    slack = np.maximum(np.maximum(-scores.min(-1), scores.max(-1) - 1.0), 0.0)
    if np.any(slack > _ROUNDING):
        raise ValueError(f"`scores` must be in [0, 1], got values from {scores.min()} to {scores.max()}")
    return np.clip(scores, 0.0, 1.0), slack


def _floats(values):
    return tuple(float(value) for value in values)
