"""Pictures, encoders and short runs that the tests of the attacks share."""

import torch
from tiny_models import MEAN, SIZE, STD, psm_model, smoothed_tower, vision_model

from fs_psm_hf.attacks import Encoder, attack


TARGETED = ("attackvlm", "m_attack", "m_attack_global", "foa")
UNTARGETED = ("pgd", "apgd")


def pictures(count=2, seed=4, size=SIZE):
    """Smooth 8-bit pictures in [0, 1], some of their pixels exactly 0 or 1: on noise no crop looks like another."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (smooth.clamp(0, 1) * 255).round() / 255


def plain_encoder(kind="clip", **options):
    """A plain tower as a transfer attacker sees it."""
    return Encoder(vision_model(kind), **{"mode": "transfer", "image_mean": MEAN, "image_std": STD} | options)


def defended_tower(**options):
    """Purifier, tower and mapper; the host reads the patch tokens of the last layer but one, as LLaVA does."""
    return smoothed_tower(psm=psm_model(), **{"feature_layer": -2, "first_token": 1} | options)


def noisy_encoder(**options):
    """A tower that is smoothed and nothing else, as an attacker sees it who knows that: quick."""
    return Encoder(smoothed_tower(), **{"mode": "adaptive", "draws": 8} | options)


def adaptive_encoder(tower=None, **options):
    """A defended tower as an attacker sees it who knows the defence."""
    tower = defended_tower() if tower is None else tower
    return Encoder(tower, mode="adaptive", **{"feature": "tokens", "draws": 8} | options)


def run(encoders, images, targets, method, **options):
    """A short attack from a fixed seed, with the targets that the method takes."""
    targets = targets if method in TARGETED else None
    return attack(encoders, images, targets, method=method, **{"steps": 8, "generator": 3} | options)


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def interrupt_after(model, calls):
    """Makes the model raise in its forward pass number `calls + 1`; returns the hook's handle."""
    left = [calls]

    def count(*_):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted

    return model.register_forward_pre_hook(count)
