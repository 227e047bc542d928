"""What an attack on features returns."""

import dataclasses

import torch

from .ball import lengths


@dataclasses.dataclass(frozen=True)
class FeatureAttackResult:
    """Adversarial images and how they were found; one entry per image.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): adversarial images, float32 in [0, 1], multiples of
            1/255 where the attack rounded them.
        objective (`torch.Tensor` of shape `(batch_size, steps)`): the attack's own objective before each step, larger is
            better for the attacker, estimated from that step's crops and noise: noisy, and no verdict on the last
            image (`expected_objective` gives one).
        linf_norms, l2_norms (`tuple[float, ...]`): lengths of the perturbations in [0, 1]-pixel units.
        zero_gradients (`tuple[int, ...]`): steps in which an image's gradient was exactly zero.
        mode (`str`): `"transfer"` or `"adaptive"`.
        settings (`dict`): JSON-safe, what [`facts`] returns without what was measured.
    """

    images: torch.Tensor
    objective: torch.Tensor
    linf_norms: tuple[float, ...]
    l2_norms: tuple[float, ...]
    zero_gradients: tuple[int, ...]
    mode: str
    settings: dict

    @classmethod
    def of(cls, clean, images, objective, zero_gradients, mode, settings):
        """The result for `images`, whose distances from `clean` are measured here."""
        perturbation = images.double() - clean.double()
        linf, l2 = (tuple(lengths(perturbation, norm).tolist()) for norm in ("linf", "l2"))
        return cls(images, objective, linf, l2, tuple(zero_gradients.int().tolist()), mode, settings)

    def facts(self):
        """A JSON-safe record: the settings, the seed, the encoders, and what was measured."""
        rows = self.objective.double()
        return {
            **self.settings,
            "linf_norms": list(self.linf_norms),
            "l2_norms": list(self.l2_norms),
            "zero_gradients": list(self.zero_gradients),
            "objective_first": rows[:, 0].tolist(),
            "objective_last": rows[:, -1].tolist(),
        }
