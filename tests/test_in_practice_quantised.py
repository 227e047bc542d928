"""A language model in int8 behind a smoothed tower in float32, by torchao; without it this file is skipped.

torchao prints warnings at every import of diffusers, so it is not among the requirements and gets an environment of its own:

    python -m venv torchao && torchao/bin/pip install -c constraints.txt -e '.[test]' torchao==0.18.0
    torchao/bin/python -m pytest tests/test_in_practice_quantised.py
"""

import importlib.util

import pytest
import torch


if importlib.util.find_spec("torchao") is None:
    pytest.skip("torchao is not installed", allow_module_level=True)

from test_in_practice import SETTINGS, logits, smoothed_llava
from tiny_models import images, llava, llava_inputs, psm_model, smoothed_tower
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import LlavaForConditionalGeneration, TorchAoConfig

from fs_psm_hf import SmoothedVisionTower, attach, certify_features, detach


# By whole names: "vision_tower" alone matches no module of the loader.
FULL_PRECISION = ["model.vision_tower", "model.multi_modal_projector"]


def config():
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=FULL_PRECISION)


def quantised(host):
    return {name for name, weight in host.named_parameters() if type(weight) is not torch.nn.Parameter}


def assert_close(host, expected):
    got = logits(host)
    assert not torch.equal(got, expected)
    assert torch.cosine_similarity(got.flatten(1), expected.flatten(1)).min() > 0.999


def assert_only_the_language_model_is(host):
    names = quantised(host)
    assert len([name for name in names if ".language_model.layers." in name]) == 2 * 7
    assert not [name for name in names if "vision_tower" in name or "projector" in name]


def test_in_place():
    host, plain = smoothed_llava(), smoothed_llava()
    quantize_(host.model.language_model, Int8WeightOnlyConfig())
    assert_only_the_language_model_is(host)
    assert_close(host, logits(plain))
    features = [h.model.vision_tower(images(), generator=1).hidden_states[-2] for h in (host, plain)]
    assert torch.equal(*features)
    tokens = host.generate(**llava_inputs(2), max_new_tokens=4, min_new_tokens=4, num_beams=2)
    assert tokens.shape == (2, 24)


@pytest.mark.parametrize("order", ["attached, then quantised", "quantised, then attached"])
def test_loaded_saved_and_loaded_again(order, tmp_path):
    host = smoothed_llava()
    expected = logits(host)
    source = host if order.startswith("attached") else llava()
    source.save_pretrained(tmp_path / "full")
    host = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "full", quantization_config=config(), dtype="float32"
    )
    if not isinstance(host.model.vision_tower, SmoothedVisionTower):
        attach(host, psm_model(), **SETTINGS)
    assert_only_the_language_model_is(host)
    assert_close(host, expected)
    host.save_pretrained(tmp_path / "int8")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "int8")
    assert_only_the_language_model_is(again)
    torch.testing.assert_close(logits(again), logits(host), rtol=0, atol=1e-6)
    plain = detach(again)
    assert torch.equal(plain(images()).last_hidden_state, llava().model.vision_tower(images()).last_hidden_state)


def test_a_certificate_of_a_quantised_tower_says_so_and_is_of_that_mode_alone():
    found = {}
    for config in (None, Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        tower = smoothed_tower(psm=psm_model(), sigma=0.2)
        if config is not None:
            quantize_(tower.vision_tower, config)
        (certificate,) = certify_features(tower, images(1), num_samples=100, generator=1)
        certificate.verify(tower)
        found[certificate.model_hash] = certificate.quantization
    assert len(found) == 3
    plain, *quantised = found.values()
    assert plain is None
    assert all(said.endswith("Tensor in vision_tower") for said in quantised)
    with pytest.raises(ValueError, match="`quantization` was '.*', this tower has None"):
        certificate.verify(smoothed_tower(psm=psm_model(), sigma=0.2))
