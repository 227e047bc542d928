"""The memory of smoothed features forgets when weights change."""

import copy

import peft
import pytest
import torch
from cache_runs import N, cached_tower, passes
from tiny_models import images, psm_model
from torch import nn


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def optimise(tower):
    weights = list(tower.parameters())
    with torch.enable_grad():
        sum(weight.square().sum() for weight in weights).backward()
    torch.optim.SGD(weights, 0.1).step()
    tower.requires_grad_(False)


def exchange_data(tower):
    weight = tower.vision_tower.post_layernorm.weight
    weight.data = weight.data * 2


def exchange_parameter(tower):
    """A new parameter where the old one was, with the same address and version."""
    norm = tower.vision_tower.post_layernorm
    fresh = nn.Parameter(norm.weight.data.mul_(2))
    while fresh._version < norm.weight._version:
        fresh.add_(0)
    assert (fresh.data_ptr(), fresh._version) == (norm.weight.data_ptr(), norm.weight._version)
    norm.weight = fresh


WRITES = {
    "in place": lambda t: t.vision_tower.post_layernorm.weight.mul_(2),
    "load_state_dict": lambda t: t.load_state_dict({k: v * 2 for k, v in t.state_dict().items()}),
    "the same values loaded": lambda t: t.load_state_dict(copy.deepcopy(t.state_dict())),
    "optimiser": optimise,
    "data exchanged": exchange_data,
    "another parameter": exchange_parameter,
    "another module": lambda t: setattr(t.vision_tower, "post_layernorm", nn.LayerNorm(32).eval()),
    "dtype": lambda t: t.bfloat16(),
    "mapper": lambda t: next(t.psm.mapper.parameters()).add_(1),
    "purifier": lambda t: next(t.psm.purifier.parameters()).add_(1),
    "purifier taken out": lambda t: setattr(t.psm, "purifier", None),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_changed_weights_empty_it(write):
    tower = cached_tower(psm=psm_model())
    tower(images(2))
    write(tower)
    rows = passes(tower)
    tower(images(1))
    assert sum(rows) == N
    assert len(tower.feature_cache) == 1


class Scale(nn.Module):
    """A purifier of a user's that keeps its only number in no tensor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def denoise(self, images, sigma):
        return images * self.factor


def test_another_purifier_without_weights_empties_it():
    tower = cached_tower(psm=Scale(0.9), sigma=0, num_samples=1)
    first = tower(images(1)).last_hidden_state
    assert torch.equal(tower(images(1)).last_hidden_state, first)
    tower.psm.purifier = Scale(0.5).eval()
    assert not torch.allclose(tower(images(1)).last_hidden_state, first)


def lora(tower):
    config = peft.LoraConfig(target_modules=r"vision_tower\..*(q_proj|v_proj)", init_lora_weights=False)
    return peft.inject_adapter_in_model(config, tower)


def lora_layer(tower):
    return tower.vision_tower.encoder.layers[0].self_attn.q_proj


def each_adapted_layer(method, *arguments):
    def change(tower):
        for module in tower.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                getattr(module, method)(*arguments)

    return change


ADAPTERS = {
    "switched off": each_adapted_layer("enable_adapters", False),
    "merged": each_adapted_layer("merge"),
    "scaled": lambda t: lora_layer(t).scale_layer(3.0),
    "trained": lambda t: lora_layer(t).lora_B["default"].weight.add_(1),
}


@pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS)
def test_a_changed_adapter_empties_it(change):
    tower = cached_tower()
    plain = tower(images(1)).last_hidden_state
    lora(tower).eval().requires_grad_(False)
    rows = passes(tower)
    adapted = tower(images(1)).last_hidden_state
    assert sum(rows) == N
    assert not torch.equal(adapted, plain)
    assert torch.equal(tower(images(1)).last_hidden_state, adapted)
    change(tower)
    tower(images(1))
    assert sum(rows) == 2 * N


def test_a_write_into_data_is_not_noticed_until_clear():
    """What the docstring says."""
    tower = cached_tower(sigma=0, num_samples=1)
    before = tower(images(1)).last_hidden_state
    tower.vision_tower.embeddings.patch_embedding.weight.data.mul_(2)
    now = tower.vision_tower(images(1)).last_hidden_state
    assert not torch.allclose(now, before)
    assert torch.equal(tower(images(1)).last_hidden_state, before)
    tower.feature_cache.clear()
    assert len(tower.feature_cache) == 0
    assert torch.equal(tower(images(1)).last_hidden_state, now)
