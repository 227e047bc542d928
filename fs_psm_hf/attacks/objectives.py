"""What each attack maximises, written anew from the descriptions and code of its authors.

* `"attackvlm"`: cosine to the target's embedding (Zhao et al. 2023, github.com/yunqing-me/AttackVLM@06cc93b, MF-ii).
* `"m_attack"`: cosine between a random crop of the image and one of the target, both fresh in each step (Li et al. 2025,
  github.com/VILA-Lab/M-Attack@10f346e, local to local); `"m_attack_global"` leaves the target whole.
* `"foa"`: the same crops; cosine of the class tokens plus 0.2 times the optimal transport similarity of k-means centres of
  the patch tokens (Jia et al. 2025, github.com/jiaxiaojunQAQ/FOA-Attack@fbf4239). Patch tokens are normalised over their
  channels before they are clustered; the released code does so over the tokens.
* `"pgd"` and `"apgd"`: minus the cosine to the feature of the clean image, untargeted.

Of an adaptive encoder every feature here is the smoothed one: that of the target's crop, too, over as many fresh draws
as the source's, and that of a target (or clean image) that stays whole over eight times as many, once.
"""

import dataclasses

import torch
from torch.nn import functional as F

from .clusters import NUM_CLUSTERS, cluster_centres, first_centres
from .crops import RATIO, SCALE, crop_and_resize, random_boxes
from .streams import derive_seed
from .transport import REGULARISATION, transport_similarity


LOCAL_WEIGHT = 0.2
# A reference that is made once costs little, and its noise would stay in every step.
REFERENCE_FACTOR = 8
_LEAST_RATIO = 1e-3


@dataclasses.dataclass(frozen=True)
class Method:
    """Of what an attack is made."""

    name: str
    targeted: bool = True
    crop_source: bool = False
    crop_target: bool = False
    local: bool = False
    dynamic_weights: bool = False
    adaptive_steps: bool = False

    def facts(self):
        """JSON-safe constants of the method."""
        found = {"crop_source": self.crop_source, "crop_target": self.crop_target}
        if self.crop_source:
            found |= {"crop_scale": list(SCALE), "crop_ratio": list(RATIO)}
        if self.local:
            found |= {"clusters": NUM_CLUSTERS, "local_weight": LOCAL_WEIGHT, "regularisation": REGULARISATION}
        if not self.crop_target:
            found["reference_factor"] = REFERENCE_FACTOR
        return found

    def crop(self, images, which, seed, image_ids, step):
        """`images`, cropped where this method crops the `"source"` or `"target"`."""
        if not (self.crop_source if which == "source" else self.crop_target):
            return images
        boxes = random_boxes(*images.shape[2:], derive_seed(seed, "crop", which), image_ids, step)
        return crop_and_resize(images, boxes)


_ALL = (
    Method("attackvlm"),
    Method("m_attack", crop_source=True, crop_target=True),
    Method("m_attack_global", crop_source=True),
    Method("foa", crop_source=True, crop_target=True, local=True, dynamic_weights=True),
    Method("pgd", targeted=False),
    Method("apgd", targeted=False, adaptive_steps=True),
)
METHODS = tuple(method.name for method in _ALL)


def method_named(name):
    """The [`Method`] of this name.

    Raises:
        ValueError: there is none.
    """
    for method in _ALL:
        if method.name == name:
            return method
    raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {name!r}")


class Objective:
    """One method's objective on one encoder of a run.

    Args:
        method ([`Method`]), encoder ([`Encoder`]).
        seed (`int`): of the run.
        number (`int`): of the encoder in its ensemble; each has its own noise.
        image_ids (`list[int]`): names of the images.
    """

    def __init__(self, method, encoder, seed, number, image_ids):
        self.method, self.encoder, self.image_ids = method, encoder, image_ids
        self.seed, self.number = seed, number
        self._fixed = None

    def evaluate(self, view, step, targets):
        """Value and gradient at `view`, the cropped image of this step.

        Args:
            view (`torch.Tensor` of shape `(batch_size, 3, height, width)`), targets (the same, cropped).
            step (`int`): names crops, noise and first centres.

        Returns:
            pair of `torch.Tensor`: values `(batch_size,)`, to be maximised, and gradients in the shape of `view`.
        """
        reference, score = self.reference(step, targets), self.score
        starts = self._starts(reference, "source", step)
        return self.encoder.gradient(
            view, lambda found, chosen: score(found, reference, starts, chosen), seed=self._noise("source"),
            image_ids=self.image_ids, draws=self._draws(step), local=self.method.local,
        )  # fmt: skip

    @torch.no_grad()
    def values(self, view, step, targets):
        """The values alone."""
        reference = self.reference(step, targets)
        starts = self._starts(reference, "source", step)
        found = self.encoder.features(
            view,
            seed=self._noise("source"),
            image_ids=self.image_ids,
            draws=self._draws(step),
            local=self.method.local,
        )
        return self.score(found, reference, starts, slice(0, len(view)))

    def reference(self, step, targets):
        """Features of the targets of this step; made once where they are not cropped."""
        if self._fixed is None or self.method.crop_target:
            factor = 1 if self.method.crop_target or self.encoder.sigma == 0 else REFERENCE_FACTOR
            draws = self._draws(step) if self.method.crop_target else range(factor * self.encoder.draws)
            found = self.encoder.features(
                targets, seed=self._noise("target"), image_ids=self.image_ids, draws=draws, local=self.method.local
            )
            if "tokens" in found:
                tokens = F.normalize(found.pop("tokens"), dim=-1)
                found["centres"] = cluster_centres(tokens, self._starts_for(tokens, "target", step))
                found["num_tokens"] = tokens.shape[1]
            self._fixed = found
        return self._fixed

    def score(self, found, reference, starts, chosen):
        """The objective of the images of `chosen`, of shape `(b,)`."""
        if not self.method.local:
            similarity = F.cosine_similarity(found["vector"], reference["vector"][chosen])
            return similarity if self.method.targeted else -similarity
        total = F.cosine_similarity(found["global"], reference["global"][chosen])
        if "tokens" in found:
            centres = cluster_centres(F.normalize(found["tokens"], dim=-1), starts[chosen])
            total = total + LOCAL_WEIGHT * transport_similarity(centres, reference["centres"][chosen])
        return total

    def _draws(self, step):
        return range(step * self.encoder.draws, (step + 1) * self.encoder.draws)

    def _noise(self, which):
        return derive_seed(self.seed, "noise", which, self.number)

    def _starts(self, reference, which, step):
        return self._starts_for(reference["num_tokens"], which, step) if "centres" in reference else None

    def _starts_for(self, tokens, which, step):
        count = tokens if isinstance(tokens, int) else tokens.shape[1]
        return first_centres(count, derive_seed(self.seed, "centres", which, self.number), self.image_ids, step)


def ensemble_weights(values, previous):
    """FOA-Attack's dynamic weights of the encoders: their number times the softmax of `value / previous value`.

    An encoder whose similarity rises more slowly gets less. The weights of one encoder alone are exactly 1, and those of
    a first step too. "Previous" is the step before, as in the paper; the released code takes the whole image of the same
    step.

    Args:
        values (`torch.Tensor` of shape `(num_encoders, batch_size)`), previous (the same or `None`).

    Returns:
        `torch.Tensor` of shape `(num_encoders, batch_size)`; each image's weights add up to `num_encoders`.
    """
    if previous is None:
        return torch.ones_like(values)
    # A similarity near zero would make a weight of anything.
    least = torch.where(previous < 0, -_LEAST_RATIO, _LEAST_RATIO)
    ratio = values / torch.where(previous.abs() < _LEAST_RATIO, least, previous)
    return len(values) * ratio.softmax(0)
