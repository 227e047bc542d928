"""Attacks on vision towers and on their smoothed features, for attackers who know the defence and for those who do not."""

from .base import AttackResult, l2_pgd, unit_features
from .checks import AttackWarning, check_adversarial
from .encoders import Encoder
from .loop import attack, expected_objective
from .objectives import METHODS
from .result import FeatureAttackResult


__all__ = [
    "METHODS",
    "AttackResult",
    "AttackWarning",
    "Encoder",
    "FeatureAttackResult",
    "attack",
    "check_adversarial",
    "expected_objective",
    "l2_pgd",
    "unit_features",
]
