import logging
import os
import random
import types

import pytest
import torch


# Read when huggingface_hub is imported, hence before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def same_draws_in_any_order(monkeypatch):
    """The same weights and the same noise in every run; `test_noise.py` asks the operating system, as users do."""
    torch.manual_seed(0)
    monkeypatch.setattr("fs_psm_hf.noise.secrets", types.SimpleNamespace(randbits=random.Random(0).getrandbits))


class FailOnDeprecation(logging.Handler):
    """Fails the running test when transformers or diffusers logs that something we call is deprecated."""

    def emit(self, record):
        message = record.getMessage()
        if "deprecated" in message.lower():
            pytest.fail(f"`{record.name}` says: {message}")


@pytest.fixture(autouse=True, scope="session")
def fail_on_deprecation():
    handler = FailOnDeprecation()
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
