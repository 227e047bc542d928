"""The real open_flamingo, in an environment of its own: `make test-openflamingo`.

open_clip imports torchvision. PyPI's torchvision is built for CUDA and does not load beside a CPU build of torch: its
binary part declares two operators that are missing then, when it registers their shapes. Declared here, before anything
imports it, its transforms work on any machine. transformers, too, imports whatever torchvision it finds.
"""

import importlib.util
import os
import sys

import pytest
import torch


os.environ["HF_HUB_OFFLINE"] = "1"

if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "FRAGMENT")  # the schemas live as long as this object
        for operator in ("nms", "qnms"):
            operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# `make test` has no open_flamingo: what it can test there is in the other file.
if importlib.util.find_spec("open_flamingo") is None:
    collect_ignore_glob = ["test_flamingo*.py"]
else:
    import flamingo_models

    @pytest.fixture(scope="session")
    def language_models(tmp_path_factory):
        """A folder with a folder for each kind of language model; open_clip knows the tiny encoders."""
        folder = tmp_path_factory.mktemp("language")
        flamingo_models.register_vision(folder)
        for kind in flamingo_models.LANGUAGE_MODELS:
            flamingo_models.save_language_model(kind, folder / kind)
        return folder
