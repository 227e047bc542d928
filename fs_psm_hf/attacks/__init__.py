"""Attacks that know the defence: their gradients pass through noise, purifier, tower and mapper."""

from .base import AttackResult, l2_pgd, unit_features


__all__ = ["AttackResult", "l2_pgd", "unit_features"]
