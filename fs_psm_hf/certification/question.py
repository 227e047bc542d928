"""What is asked of the draws of an image, and the answer: a line of a results file."""

import dataclasses

import numpy as np
import torch

from .adaptive import certify_stream, check_adaptive, look_schedule
from .certificate import BAND_METHODS, certify_scores, check_options
from .labels import Classifier, certify_logits, check_label_options


CURVE_METHODS = ("plugin", "betting", "cdf")
_CURVE_POINTS = 61


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of the scores of an image; the model is not needed to answer it.

    Args:
        methods (`tuple[str, ...]`): see `certify_scores`; the first is the one that may stop early.
        num_samples (`int` or `None`): draws to use; `None` for all that were saved.
        classifier ([`Classifier`], *optional*): also certify the label.
        curve (`bool`): also bound the cosine on a fine grid of radii, for a picture.

    The other arguments are those of `certify_features`.
    """

    methods: tuple[str, ...] = ("cdf", "plugin")
    epsilons: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.75)
    num_samples: int | None = 10_000
    alpha: float = 1e-3
    level: float = 0.5
    beta: float = 0.05
    target_radius: float | None = None
    tolerance: float | None = None
    classifier: Classifier | None = None
    curve: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether the draws may stop early."""
        return check_adaptive(self.target_radius, self.tolerance, self.methods[0])

    def check(self, sigma, served_samples):
        """Refuse what cannot be asked, before hours of draws."""
        if not self.methods:
            raise ValueError("`--method` must be given at least once")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"`num_samples` must be >= 1, got {self.num_samples}")
        check_adaptive(self.target_radius, self.tolerance, self.methods[0])
        for method in self.methods:
            check_options(method=method, sigma=sigma, **self._options(), **self._served(method, served_samples))
        if self.classifier is not None and self.num_samples:
            check_label_options(self.num_samples, sigma=sigma, alpha=self.alpha, method="cdf", beta=self.beta)

    def check_width(self, width):
        """Refuse classes that do not fit a feature of this width."""
        if self.classifier is not None and self.classifier.weight.shape[1] != width:
            own = self.classifier.weight.shape[1]
            raise ValueError(f"`--labels` has {own} values per class, must have {width} as the feature")

    def _options(self):
        return {"epsilons": self.epsilons, "alpha": self.alpha, "level": self.level, "beta": self.beta}

    def _served(self, method, served_samples):
        return {"deployed_samples": served_samples} if served_samples is not None and method in BAND_METHODS else {}

    def answer(self, draws, sigma, served_samples) -> dict:
        """The entries of one image's line: `certificates`, and `label` where there is a classifier."""
        looks = draws.num_looks
        if self.adaptive:
            if looks > 1:
                raise ValueError("`--target-radius` and `--tolerance` need scores that did not stop early themselves")
            looks = len(look_schedule(self.num_samples))
        per_token = draws.anchor.ndim == 2
        taken, found = self.num_samples, []
        for method in self.methods:
            options = {"method": method, "sigma": sigma, **self._options(), **self._served(method, served_samples)}
            options["per_token"] = per_token
            if self.adaptive and not found:
                goal = {"target_radius": self.target_radius, "tolerance": self.tolerance}
                certified = certify_stream(draws.take, self.num_samples, **goal, **options)
                taken = (certified[0] if per_token else certified).num_samples
            else:
                # Where the draws ended depends on them: every statement about them pays for the looks, not the first alone.
                certified = certify_scores(draws.take(taken), num_looks=looks, **options)
            found += [dataclasses.replace(c, **draws.record) for c in (certified if per_token else [certified])]
        line = {"certificates": [certificate.to_dict() for certificate in found]}
        if self.curve and not per_token:
            line["curve"] = self._curve(draws.take(taken), sigma, served_samples, looks)
        if self.classifier is not None:
            line["label"] = self._label(draws, taken, sigma, served_samples, looks).to_dict()
        return line

    def _curve(self, scores, sigma, served_samples, num_looks):
        """Bounds on the inner product from 0 to 3 σ: the paper's estimate, its valid counterpart, and ours."""
        grid = np.linspace(0.0, 3.0 * sigma, _CURVE_POINTS)
        options = {"sigma": sigma, "epsilons": grid, "alpha": self.alpha, "level": self.level, "num_looks": num_looks}
        found = {"epsilons": grid.tolist()}
        for method in CURVE_METHODS:
            served = (
                {"deployed_samples": served_samples, "beta": self.beta} if method == "cdf" and served_samples else {}
            )
            certificate = certify_scores(scores, method=method, **options, **served).to_dict()
            found[method] = {name: certificate[name] for name in ("inner_product_bounds", "radius", "abstained")}
            if served:
                found["deployed"] = {"inner_product_bounds": certificate["deployed"]["inner_product_bounds"]}
        return found

    def _label(self, draws, taken, sigma, served_samples, looks):
        features = draws.features
        if features is None:
            raise ValueError("`--labels` needs saved features: draw them again with --save-features")
        features = torch.cat(features) if isinstance(features, list) else features
        self.check_width(features.shape[1])
        certificate = certify_logits(
            self.classifier.logits(features[:taken]).numpy(), self.classifier, sigma=sigma, alpha=self.alpha,
            beta=self.beta, deployed_samples=served_samples, num_looks=looks,
        )  # fmt: skip
        record = {name: value for name, value in draws.record.items() if name != "anchor"}
        return dataclasses.replace(certificate, classifier=self.classifier.hash, **record)

    def settings(self) -> dict:
        """For the header of a results file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "classifier"}
        return values | {"classifier": self.classifier and self.classifier.hash}
