"""Feature-space smoothing for vision-language models, with certificates: a plugin for HuggingFace transformers.

Importing it registers `PSMModel` and `SmoothedVisionTower` with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel

from .configuration_fs_psm import PSMConfig, SmoothedVisionTowerConfig
from .feature_cache import FeatureCache
from .modeling_fs_psm import SmoothedVisionTower
from .modeling_psm import PSMModel


__version__ = "0.1.0"
__all__ = [
    "Certificate",
    "FeatureCache",
    "PSMConfig",
    "PSMModel",
    "SmoothedVisionTower",
    "SmoothedVisionTowerConfig",
    "attach",
    "certify_features",
    "certify_labels",
    "certify_scores",
    "detach",
]

for _config, _model in ((PSMConfig, PSMModel), (SmoothedVisionTowerConfig, SmoothedVisionTower)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)

from .certification import Certificate, certify_features, certify_labels, certify_scores  # noqa: E402
from .hosts import attach, detach  # noqa: E402
