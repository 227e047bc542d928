"""Certificates for smoothed features and labels: bounds, confidence, and their use on scores and on towers."""

from .certificate import METHODS, Certificate, Deployed, certify_scores
from .certify import ANCHORS, ScoreDraws, certify_features, draw_scores, null_level
from .labels import Classifier, DeployedLabel, LabelCertificate, certify_labels, certify_logits
from .report import format_label_table, format_table


__all__ = [
    "ANCHORS",
    "METHODS",
    "Certificate",
    "Classifier",
    "Deployed",
    "DeployedLabel",
    "LabelCertificate",
    "ScoreDraws",
    "certify_features",
    "certify_labels",
    "certify_logits",
    "certify_scores",
    "draw_scores",
    "format_label_table",
    "format_table",
    "null_level",
]
