"""Training of purifier and mapper around a frozen tower: `accelerate launch -m fs_psm_hf.training`, `fs-psm train`."""

from .arguments import PSMTrainingArguments, parse_arguments
from .trainer import train


__all__ = ["PSMTrainingArguments", "parse_arguments", "train"]
