"""Certified labels: zero-shot CLIP and linear heads on the smoothed embedding (theory, Fact 5), from the same draws."""

import dataclasses
import math

import numpy as np
import torch
from scipy.special import ndtri
from tqdm.auto import tqdm

from ..noise import resolve_image_ids
from . import bounds
from .certificate import BAND_METHODS, check_options, clean_scores, lower_bounds
from .certified import Certified, round_down
from .certify import Draws, check_certifiable, check_unit, describe_run, served_tower
from .confidence import clopper_pearson_lower
from .identity import vector_hash


LABEL_METHODS = ("cdf", "betting", "bernstein", "hoeffding", "best", "plugin")
_RADIUS_STEPS = 12
# A level of -1 itself must be exceeded, which no bound at any distance shows.
_LOWEST = -1.0 + 1e-9


@dataclasses.dataclass(frozen=True)
class DeployedLabel:
    """The label of the served model, which averages `num_samples` draws.

    For each x' fixed before the serving noise is drawn, with `‖x' - x‖₂ < radius`, one query answers with another label
    with probability at most `alpha + beta`, the latter shared among the rival classes (theory, Facts 4 and 5). A radius
    of 0 says nothing, not even at x.
    """

    num_samples: int
    beta: float
    radius: float


@dataclasses.dataclass(frozen=True)
class LabelCertificate(Certified):
    """A label that no l2 perturbation below `radius` can change.

    With probability at least `1 - alpha` over the sampling noise: for every x' with `‖x' - x‖₂ < radius`, the label of
    the smoothed embedding ĝ(x') is `label` (theory, Fact 5; a union bound over the rivals). With method `"plugin"`
    nothing is guaranteed.

    Args:
        sigma (`float`): noise standard deviation in [0, 1]-pixel units.
        method (`str`): as in `certify_scores`.
        alpha (`float` or `None`): error probability.
        num_samples, num_pilot (`int`): draws counted, and draws that chose the label and are not counted.
        num_classes (`int`): number of labels.
        label (`int`): chosen on the pilot.
        runner_up (`int`): the rival that limits the radius.
        radius (`float`): l2, in [0, 1]-pixel units; 0 where abstained, `inf` where no perturbation helps any rival.
        abstained (`bool`): the label is not certain even at x.
        deployed ([`DeployedLabel`] or `None`): for the mean of the served number of draws.
        hard_vote_label (`int`), hard_vote_radius (`float`): Cohen et al. 2019 from the same draws and confidence: the
            class that most single draws vote for, at an error probability of its own. That is another classifier, which
            is not served here: a comparison.
        classifier (`str`): SHA-256 of text embeddings, or of weight and bias.
    """

    sigma: float
    method: str
    alpha: float | None
    num_samples: int
    num_pilot: int
    num_classes: int
    label: int
    runner_up: int
    radius: float
    abstained: bool
    hard_vote_label: int
    hard_vote_radius: float
    deployed: DeployedLabel | None = None
    classifier: str | None = None

    deployed_class = DeployedLabel

    def __str__(self) -> str:
        radius = f"radius {round_down(self.radius, 4):.4f} against class {self.runner_up}"
        radius = "abstained" if self.abstained else radius
        vote = f"class {self.hard_vote_label}, radius {round_down(self.hard_vote_radius, 4):.4f}"
        about = f"class {self.label}, {self.method}, {self.confidence}, n = {self.num_samples}"
        return f"{about}: {radius}; hard vote (another classifier): {vote}"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Classes as directions in the feature space: text embeddings, or the rows of a linear head.

    Args:
        weight (`torch.Tensor` of shape `(num_classes, num_features)`): one row per class.
        bias (`torch.Tensor` of shape `(num_classes,)`, *optional*): of a head that is applied to ĝ as it is.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, text_embeds=None, head=None) -> "Classifier":
        """From unit text embeddings `(num_classes, num_features)`, or from a `torch.nn.Linear`.

        Raises:
            ValueError: not exactly one is given, it is not finite, not unit length, or two classes are the same.
        """
        if (text_embeds is None) == (head is None):
            raise ValueError("`text_embeds` or `head` must be given, and not both")
        if head is None:
            weight, bias = text_embeds, None
            if not isinstance(weight, torch.Tensor):
                raise TypeError(f"`text_embeds` must be a torch.Tensor, got {type(weight).__name__}")
            if weight.ndim != 2:
                raise ValueError(
                    f"`text_embeds` must have shape (num_classes, num_features), got {tuple(weight.shape)}"
                )
            check_unit(weight, "text_embeds")
        else:
            if not isinstance(head, torch.nn.Linear):
                raise TypeError(f"`head` must be a torch.nn.Linear, got {type(head).__name__}")
            weight, bias = head.weight, head.bias
        name = "text_embeds" if head is None else "head"
        if len(weight) < 2:
            raise ValueError(f"`{name}` must have at least 2 classes, got {len(weight)}")
        if not all(torch.all(torch.isfinite(part)) for part in (weight, bias) if part is not None):
            raise ValueError(f"`{name}` must be finite")
        if len(torch.unique(weight.detach(), dim=0)) < len(weight):
            raise ValueError(f"`{name}` must have a direction of its own for each class, got two the same")
        bias = None if bias is None or not torch.any(bias) else bias.detach().double().cpu()
        return cls(weight.detach().double().cpu(), bias)

    def homogeneous(self) -> "Classifier":
        """The same classifier on `[m, 1]` instead of m: the bias becomes the last column, `(num_classes, num_features + 1)`.

        Without a bias of its own it minds no length, so it is certified as any other (theory, Fact 5).
        """
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        return Classifier(torch.cat([self.weight, bias[:, None]], -1))

    @property
    def hash(self) -> str:
        """SHA-256 of weight and bias."""
        bias = self.weight.new_zeros(0) if self.bias is None else self.bias
        return vector_hash(torch.cat([self.weight.flatten(), bias]))

    def logits(self, features):
        """`<g, W_k> + b_k` in float64, `(m, num_classes)`, on the device of the features."""
        products = features.double() @ self.weight.to(features.device).T
        return products if self.bias is None else products + self.bias.to(features.device)


def certify_labels(
    tower,
    pixel_values,
    text_embeds=None,
    *,
    head=None,
    feature: str = "pooled",
    num_samples: int = 10_000,
    alpha: float = 1e-3,
    method: str = "cdf",
    beta: float = 0.05,
    generator=None,
    image_ids=None,
    progress: bool = False,
) -> list[LabelCertificate]:
    """Certify the label of each image: zero-shot against text embeddings, or by a linear head on the smoothed embedding.

    What is certified is `argmax_k <ĝ(x'), e_k>` of the mean of unit embeddings ĝ. Without a bias it does not matter
    whether ĝ is normalised again, so the tower's own output may be classified. A head with a bias must be applied to ĝ as
    it is: `mean(tower.sample_features(...))`, not the tower's output, which has another length; then there is no
    `deployed` part.

    The towers of `CLIPForImageClassification` and `SiglipForImageClassification` are the exception: they average the mean of
    the patch tokens m as `[m, 1]/‖[m, 1]‖`, on which a head with a bias is one without. So `head=host.classifier` certifies
    the label of the host's own logits, bias and `deployed` part included.

    Args:
        tower ([`SmoothedVisionTower`] or `PreTrainedModel`): around a model whose `feature` the classes live beside: for
            CLIP the embedding after the projection (`CLIPVisionModelWithProjection`, `"pooled"`); or a host that a tower is
            attached to (`CLIPModel`, `SiglipModel`, …).
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
        text_embeds (`torch.Tensor` of shape `(num_classes, num_features)`): unit vectors.
        head (`torch.nn.Linear`): in place of `text_embeds`.
        num_samples (`int`): draws per image; the first tenth, at least 100, chooses the label.
        alpha (`float`): error probability of each certificate, shared equally among the rival classes.

    The other arguments are those of `certify_features`.

    Returns:
        `list[LabelCertificate]`: one per image.

    Raises:
        ValueError: as `certify_features`, and where the classes do not fit the feature.
    """
    tower, _ = served_tower(tower)
    classifier = Classifier.of(text_embeds, head)
    check_certifiable(tower, pixel_values)
    options = {"sigma": tower.config.sigma, "alpha": alpha, "method": method, "beta": beta}
    if tower.serves(feature) and method in BAND_METHODS:
        options["deployed_samples"] = tower.config.num_samples
    check_label_options(num_samples, **options)
    width = tower.clean_features(pixel_values[:1], feature).shape[-1]
    extra = head is not None and feature == "pooled" and getattr(tower.vision_tower, "homogeneous", False)
    width -= int(extra)
    if classifier.weight.shape[1] != width:
        name = "text_embeds" if head is None else "head"
        raise ValueError(
            f"`{name}` must have {width} values per class, the width of `feature` {feature!r}, "
            f"got {classifier.weight.shape[1]}"
        )
    classifier = classifier.homogeneous() if extra else classifier
    record = describe_run(tower, pixel_values, feature, generator) | {"classifier": classifier.hash}
    found = []
    with tqdm(total=len(pixel_values) * num_samples, unit="draw", disable=not progress) as bar:
        for index, image_id in enumerate(resolve_image_ids(image_ids, len(pixel_values))):
            draws = Draws(
                tower, pixel_values[index : index + 1], classifier.logits, seed=record["seed"], image_id=image_id,
                progress=bar, feature=feature,
            )  # fmt: skip
            certificate = certify_logits(draws.take(num_samples), classifier, **options)
            found.append(
                dataclasses.replace(certificate, **record | {"image_id": image_id, "compiled": draws.compiled})
            )
    return found


def certify_logits(
    logits,
    classifier,
    *,
    sigma,
    alpha=1e-3,
    method="cdf",
    pilot=None,
    deployed_samples=None,
    beta=0.05,
    num_looks=1,
) -> LabelCertificate:
    """Turn the logits of independent draws into a [`LabelCertificate`]: no model needed.

    Args:
        logits (`np.ndarray` of shape `(n, num_classes)`): `<g(x + n), W_k> + b_k` of each draw, g of length 1.
        classifier ([`Classifier`]): what they are logits of.
        pilot (`int`, *optional*): draws that choose the label, default `max(100, n // 10)`, or half where that is less.
        deployed_samples (`int`, *optional*): also certify the mean of this many draws; not for a head with a bias.

    The other arguments are those of `certify_scores`.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or not np.all(np.isfinite(logits)):
        raise ValueError(f"`logits` must be finite, of shape (draws, classes), got shape {logits.shape}")
    n, num_classes = logits.shape
    check_label_options(n, sigma=sigma, alpha=alpha, method=method, beta=beta, deployed_samples=deployed_samples)
    alpha_of_look = alpha / num_looks
    if num_classes != len(classifier.weight):
        raise ValueError(
            f"`logits` must have a column for each of {len(classifier.weight)} classes, got {num_classes}"
        )
    pilot = min(max(100, n // 10), n // 2) if pilot is None else pilot
    if not 1 <= pilot < n:
        raise ValueError(f"`pilot` must be from 1 to {n - 1}, one less than the draws, got {pilot}")
    weight = classifier.weight.numpy()
    bias = np.zeros(num_classes) if classifier.bias is None else classifier.bias.numpy()
    label = int(logits[:pilot].mean(0).argmax())
    rivals = np.delete(np.arange(num_classes), label)

    # <g, w_k> with w_k = (W_a - W_k)/‖W_a - W_k‖, and the level c_k that it must exceed.
    distances = np.linalg.norm(weight[label] - weight[rivals], axis=1)  # (K-1,)
    levels = (bias[rivals] - bias[label]) / distances
    margins = (logits[pilot:, [label]] - logits[pilot:, rivals] - bias[label] + bias[rivals]) / distances
    scores, slack = clean_scores((1.0 + margins.T) / 2.0)  # (K-1, n')
    # Twice the slack as a raised level, as in `certify_scores`; beyond [-1, 1] the answer is known without sampling.
    raised = levels + 2.0 * slack
    share = alpha_of_look / len(rivals)
    at_image, radii, band = lower_bounds(
        scores, np.zeros(1), np.clip(raised, _LOWEST, 1.0), sigma=sigma, alpha=share, method=method
    )
    won = bounds.inner_product(at_image[:, 0]) > raised
    radii = np.where(raised < -1.0, np.inf, np.where(won, radii, 0.0))
    abstained = bool(np.any(radii <= 0.0))
    deployed = None
    if deployed_samples is not None and band is not None and classifier.bias is None:
        radius = 0.0 if abstained else _deployed_radius(*band, raised, radii, sigma, deployed_samples, beta)
        deployed = DeployedLabel(deployed_samples, beta, radius)

    votes = logits.argmax(1)
    voted = int(np.bincount(votes[:pilot]).argmax())
    hits = int((votes[pilot:] == voted).sum())
    share_of_votes = (
        hits / (n - pilot) if method == "plugin" else float(clopper_pearson_lower(hits, n - pilot, alpha_of_look))
    )
    return LabelCertificate(
        sigma=float(sigma),
        method=method,
        alpha=None if method == "plugin" else float(alpha),
        num_looks=num_looks,
        num_samples=n - pilot,
        num_pilot=pilot,
        num_classes=num_classes,
        label=label,
        runner_up=int(rivals[radii.argmin()]),
        radius=0.0 if abstained else float(radii.min()),
        abstained=abstained,
        hard_vote_label=voted,
        hard_vote_radius=float(sigma * max(ndtri(share_of_votes), 0.0)),
        deployed=deployed,
    )


def check_label_options(num_samples, *, method, **options):
    """Raise `ValueError` unless a label can be certified like this."""
    if method not in LABEL_METHODS:
        raise ValueError(f"`method` must be one of {', '.join(LABEL_METHODS)}, got {method!r}")
    check_options(method=method, **options)
    if num_samples < 2:
        raise ValueError(f"`num_samples` must be >= 2, one to choose the label, got {num_samples}")


def _deployed_radius(survival, thresholds, levels, radii, sigma, num_draws, beta):
    """Largest radius, up to 1/4096 of the certified one, at which a mean of served draws keeps the label."""
    share = beta / len(levels)

    def holds(rows, radius):
        quantile = bounds.deployed_score(survival[rows], thresholds[rows], radius, sigma, num_draws, share)
        return bounds.inner_product(quantile) > levels[rows]

    limiting = np.array([radii.argmin()])
    low, high = 0.0, float(radii.min())
    if math.isinf(high):
        high = 100.0 * sigma
    if not np.all(holds(np.arange(len(levels)), 0.0)):
        return 0.0
    while True:
        # The rival that limits the expectation mostly limits the mean of a few draws too: the others are only checked.
        for _ in range(_RADIUS_STEPS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if np.all(holds(limiting, middle)) else (low, middle)
        failing = np.flatnonzero(~holds(np.arange(len(levels)), low))
        if len(failing) == 0:
            return low
        limiting, low, high = np.union1d(limiting, failing), 0.0, low
