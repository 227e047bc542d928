"""LoRA on a host whose tower is smoothed: trained a step, saved, loaded elsewhere; the purifier stays out of it."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_hosts import fixed_noise
from test_in_practice import SETTINGS, logits, smoothed_llava
from tiny_models import images, llava, llava_inputs, psm_model, smoothed_tower

from fs_psm_hf import PSMConfig, PSMModel, attach, detach
from fs_psm_hf.feature_cache import FeatureCache


LANGUAGE = (
    r".*language_model.*\.(q_proj|v_proj)"  # by a pattern with a path: bare names may hit the tower and the purifier
)


def lora(host, target=LANGUAGE, **options):
    torch.manual_seed(0)
    return peft.get_peft_model(host, peft.LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM", **options))


def labelled():
    inputs = llava_inputs(2)
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == 7, -100)}


def train(model, steps=1, learning_rate=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0)
    for _ in range(steps):
        model(**labelled()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_one_step_moves_the_adapter_and_nothing_else():
    host = smoothed_llava()
    before, expected = copy.deepcopy(host.state_dict()), logits(host)
    model = lora(host)
    torch.testing.assert_close(logits(host), expected, rtol=0, atol=1e-6)  # B starts at zero
    assert trainable(model)
    assert all(".language_model." in name and ".lora_" in name for name in trainable(model))
    weights = {name: value.clone() for name, value in model.named_parameters() if ".lora_B" in name}
    train(model)
    for name, value in model.named_parameters():
        if name in weights:
            assert not torch.equal(value, weights[name]), name
    with model.disable_adapter():
        torch.testing.assert_close(logits(host), expected, rtol=0, atol=1e-6)
    model.unload()
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())


def test_the_loss_falls_under_served_noise():
    host = smoothed_llava()
    model = lora(host, r".*language_model.*_proj")

    def loss():
        with torch.no_grad(), fixed_noise(host.model.vision_tower):
            return host(**labelled()).loss.item()

    before = loss()
    train(model, steps=30)
    assert loss() < before - 0.4


def test_an_adapter_is_saved_and_loaded_into_another_smoothed_host(tmp_path):
    host = smoothed_llava()
    model = lora(host)
    train(model, steps=3)
    expected = logits(host)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved
    assert not [name for name in saved if "vision_tower" in name]
    other = smoothed_llava()
    assert not torch.allclose(logits(other), expected, atol=1e-3)
    peft.PeftModel.from_pretrained(other, tmp_path)
    torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-6)


def test_an_adapter_of_the_plain_host_serves_the_smoothed_one_and_back(tmp_path):
    plain = lora(llava())
    train(plain, steps=3)
    plain.save_pretrained(tmp_path)
    late = llava()
    peft.PeftModel.from_pretrained(late, tmp_path)
    attach(late, psm_model(), **SETTINGS)  # after the adapter
    early = smoothed_llava()
    peft.PeftModel.from_pretrained(early, tmp_path)  # before it
    torch.testing.assert_close(logits(late), logits(early), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(late), logits(smoothed_llava()), atol=1e-3)
    for host in (late, early):
        detach(host)
        inputs = llava_inputs(2)
        with torch.no_grad():
            torch.testing.assert_close(host(**inputs).logits, plain.base_model.model(**inputs).logits)


def test_a_merged_adapter_saves_as_a_smoothed_host(tmp_path):
    host = smoothed_llava()
    model = lora(host)
    train(model, steps=3)
    expected = logits(host)
    merged = model.merge_and_unload()
    assert merged is host
    torch.testing.assert_close(logits(host), expected, rtol=1e-4, atol=1e-5)
    host.save_pretrained(tmp_path)
    again = type(host).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(host), rtol=0, atol=1e-6)


ATTENTION = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


@pytest.mark.parametrize("bare", [["to_q", "q_proj"], "all-linear"])
def test_a_bare_name_hits_the_purifier_and_a_path_does_not(bare):
    """diffusers calls its projections `to_q` and `to_v`; nobody wants an adapter there by accident."""
    psm = PSMModel(PSMConfig(purifier="unet", purifier_config=ATTENTION)).eval()
    host = llava()
    attach(host, psm, **SETTINGS)
    hit = trainable(lora(copy.deepcopy(host), bare))
    assert any(".psm.purifier." in name for name in hit)
    assert any(".vision_tower.vision_tower." in name for name in hit)
    assert not any(".vision_tower." in name for name in trainable(lora(host)))


def test_an_adapter_on_the_tower_itself():
    """Behind the purifier, before the mapper: the truncated view of the tower runs the adapted blocks."""
    tower = smoothed_tower(psm=psm_model(), feature_layer=-2)
    expected = tower(images(), generator=1).hidden_states[-2]
    config = peft.LoraConfig(r=4, target_modules=r"vision_tower\..*(q_proj|v_proj)")
    model = peft.get_peft_model(tower, config)
    torch.testing.assert_close(tower(images(), generator=1).hidden_states[-2], expected, rtol=0, atol=1e-6)
    target = torch.zeros_like(expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    (tower(images(), generator=1).hidden_states[-2] - target).square().mean().backward()
    optimizer.step()
    adapted = tower(images(), generator=1).hidden_states[-2]
    assert not torch.allclose(adapted, expected, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(tower(images(), generator=1).hidden_states[-2], expected, rtol=0, atol=1e-6)
    model.merge_adapter()
    merged = tower(images(), generator=1).hidden_states[-2]
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("switch", ["disable_adapter", "merge_adapter", "set_adapter"])
def test_the_cache_follows_an_adapter_of_the_tower(switch):
    tower = smoothed_tower()
    config = peft.LoraConfig(target_modules=r"vision_tower\..*(q_proj|v_proj)", init_lora_weights=False)
    model = peft.get_peft_model(tower, config).eval()
    tower.feature_cache = FeatureCache()
    with torch.no_grad():
        first = tower(images()).last_hidden_state
        assert torch.equal(tower(images()).last_hidden_state, first)
        if switch == "disable_adapter":
            with model.disable_adapter():
                changed = tower(images()).last_hidden_state
        else:
            if switch == "set_adapter":
                model.add_adapter("second", config)
                model.set_adapter("second")
            else:
                model.merge_adapter()
            model.eval()
            changed = tower(images()).last_hidden_state
    assert not torch.equal(changed, first)
    assert tower.feature_cache.misses == 4
