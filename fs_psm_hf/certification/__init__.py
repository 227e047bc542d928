"""Certificates for smoothed features: bounds, confidence, and their use on scores and on towers."""

from .certificate import METHODS, Certificate, Deployed, certify_scores
from .certify import ANCHORS, certify_features, null_level, score_images, score_samples
from .report import format_table


__all__ = [
    "ANCHORS",
    "METHODS",
    "Certificate",
    "Deployed",
    "certify_features",
    "certify_scores",
    "format_table",
    "null_level",
    "score_images",
    "score_samples",
]
