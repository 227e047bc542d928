"""What is given in place of a host, or is a part of one: adapters around it, the model without its head, padded images."""

import peft
import pytest
import torch
from clip_hosts import host_model
from host_models import HOSTS, host_inputs
from tiny_models import MEAN, STD, images, llava
from transformers import CLIPImageProcessorPil, LlavaModel

from fs_psm_hf import SmoothedVisionTower, attach, certify_features, detach
from fs_psm_hf.host_kinds import find_tower
from fs_psm_hf.inputs import load_tower


STATISTICS = {"image_mean": MEAN, "image_std": STD}


def adapted(host, targets):
    return peft.get_peft_model(host, peft.LoraConfig(target_modules=targets, r=2))


@pytest.mark.parametrize("name", ["blip-2", "llava", "idefics2"])
def test_a_peft_model_is_refused_and_the_host_inside_it_is_taken(name):
    host = HOSTS[name].build()
    inputs = host_inputs(host, name, 1, 1)
    wrapped = adapted(host, r".*(language|text)_model.*\.(q_proj|v_proj)")
    with torch.no_grad():
        expected = wrapped(**inputs).logits
        for call in (attach, detach, find_tower):
            with pytest.raises(ValueError, match=r"got the PeftModel around it: give `host.get_base_model\(\)`"):
                call(wrapped)
        assert torch.equal(wrapped(**inputs).logits, expected)
        attach(wrapped.get_base_model(), sigma=0.5, num_samples=1, **STATISTICS)
        assert not torch.allclose(wrapped(**inputs).logits, expected, atol=1e-4)
        with pytest.raises(ValueError, match="got the PeftModel around it"):
            detach(wrapped)
        detach(wrapped.get_base_model())
        assert torch.equal(wrapped(**inputs).logits, expected)


def test_a_peft_model_of_a_clip_is_refused():
    with pytest.raises(ValueError, match="got the PeftModel around it"):
        attach(adapted(host_model("clip"), ["q_proj"]), sigma=0.5, **STATISTICS)


def test_a_loaded_model_without_its_head_is_detached(tmp_path):
    llava().model.save_pretrained(tmp_path)
    model = LlavaModel.from_pretrained(tmp_path)
    tower = find_tower(model).tower
    for _ in range(2):
        attach(model, sigma=0.2, num_samples=2, **STATISTICS)
        assert isinstance(model.vision_tower, SmoothedVisionTower)
        assert detach(model) is tower
    assert model.config.vision_config is tower.config


@pytest.mark.parametrize("name", ["idefics2", "idefics3", "smolvlm"])
def test_a_padded_image_is_not_certified(name):
    """The host masks its padding, which a certificate has no way to do."""
    tower = attach(HOSTS[name].build(), sigma=0.2, num_samples=2, **STATISTICS)
    pixels = images(1)
    assert len(certify_features(tower, pixels, num_samples=20, generator=0)) == 1
    pixels[..., -4:, :] = 0
    with pytest.raises(ValueError, match="without padding, got one whose last row is all zero"):
        certify_features(tower, pixels, num_samples=20, generator=0)


@pytest.mark.parametrize("kind", ["clip_images", "siglip_images"])
def test_image_classification_models_are_certified_in_python(kind, tmp_path):
    host_model(kind).save_pretrained(tmp_path)
    CLIPImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with `attach` and `certify_labels`"):
        load_tower(str(tmp_path), sigma=0.1, num_samples=2)
