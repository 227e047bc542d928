"""Feature-space smoothing for vision-language models, with certificates: a plugin for HuggingFace transformers."""

from transformers import AutoConfig, AutoModel

from .configuration_fs_psm import PSMConfig, SmoothedVisionTowerConfig
from .modeling_fs_psm import SmoothedVisionTower
from .modeling_psm import PSMModel


__version__ = "0.1.0"
__all__ = [
    "Certificate",
    "PSMConfig",
    "PSMModel",
    "SmoothedVisionTower",
    "SmoothedVisionTowerConfig",
    "attach",
    "certify_features",
    "certify_scores",
    "detach",
]

AutoConfig.register(PSMConfig.model_type, PSMConfig)
AutoConfig.register(SmoothedVisionTowerConfig.model_type, SmoothedVisionTowerConfig)
AutoModel.register(PSMConfig, PSMModel)
AutoModel.register(SmoothedVisionTowerConfig, SmoothedVisionTower)
# One class each, so that `trust_remote_code` works for whoever has not installed the package.

from .certification import Certificate, certify_features, certify_scores  # noqa: E402
from .hosts import attach, detach  # noqa: E402
