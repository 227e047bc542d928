import copy
import math

import pytest
import torch

from fs_psm_hf.mapper import SmoothnessMapper


WIDTH = 32


@pytest.fixture
def tokens():
    return torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fresh():
    torch.manual_seed(0)
    return SmoothnessMapper(WIDTH, num_heads=2)


@pytest.fixture
def trained(fresh):
    """A mapper whose every parameter is away from its start, so that no term hides."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return fresh


def relative_change(mapper, features, sigma):
    return (mapper(features, sigma).norm(dim=-1) / features.norm(dim=-1)).max().item()


@pytest.mark.parametrize("length", [0.5, 50, 1e3])
@pytest.mark.parametrize("sigma", [0.0, 0.25, 1.0])
def test_fresh_mapper_changes_less_than_one_percent(length, sigma):
    for hidden_size in (WIDTH, 768):
        torch.manual_seed(0)
        mapper = SmoothnessMapper(hidden_size)
        features = torch.randn(2, 5, hidden_size)
        features = features * length / features.norm(dim=-1, keepdim=True)
        assert relative_change(mapper, features, sigma) < 0.01
        mapper.set_reference_norm(length)
        change = relative_change(mapper, features, sigma)
        assert change < 0.01
        # Not by being dead: in units of r the change is the same for every length.
        assert sigma == 0 or change > 1e-5


@pytest.mark.parametrize("length", [0.5, 50])
def test_training_moves_features_by_ten_percent(length):
    torch.manual_seed(0)
    mapper = SmoothnessMapper(WIDTH)
    mapper.set_reference_norm(length)
    features = torch.randn(8, 5, WIDTH)
    features = features * length / features.norm(dim=-1, keepdim=True)
    direction = torch.randn(WIDTH)
    target = features + 0.15 * length * direction / direction.norm()
    optimizer = torch.optim.AdamW(mapper.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (features + mapper(features, 0.25) - target).square().sum(-1).mean() / length**2
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        update = mapper(features, 0.25)
    assert (update.norm(dim=-1) / length).min() >= 0.1
    assert loss.item() < 0.25 * 0.15**2


def restated_block(p, z, sigma, r, prefix, heads):
    """theory.md "Mapper", one block, written out with matrices; `p` maps parameter names to float64 tensors."""

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def film(s):
        return linear("film.2", gelu(linear("film.0", torch.tensor([s], dtype=torch.float64)))).chunk(2)

    def softplus(x):
        return torch.log1p(torch.exp(x))

    (gamma, beta), (_, beta_clean) = film(sigma), film(0.0)
    mean, variance = z.mean(-1, keepdim=True), z.var(-1, unbiased=False, keepdim=True)
    bar = (1 + gamma) * (z - mean) / torch.sqrt(variance + 1e-5) + beta

    h = linear("mlp.2", gelu(linear("mlp.0", bar)))
    if heads:
        head_width = z.shape[-1] // heads
        query, key, value = linear("attention.qkv", bar).chunk(3, dim=-1)
        attended = []
        for i in range(heads):
            part = slice(i * head_width, (i + 1) * head_width)
            weights = torch.softmax(
                query[..., part] @ key[..., part].transpose(-1, -2) / math.sqrt(head_width), dim=-1
            )
            attended.append(weights @ value[..., part])
        h = h + linear("attention.out", torch.cat(attended, dim=-1))
    patches = bar[:, prefix:]
    kernel = p["conv.weight"][:, 0]  # (D, 3)
    for i in range(patches.shape[1]):
        local = p["conv.bias"].expand(len(z), -1)
        for offset in (-1, 0, 1):
            if 0 <= i + offset < patches.shape[1]:
                local = local + kernel[:, offset + 1] * patches[:, i + offset]
        h[:, prefix + i] = h[:, prefix + i] + 0.5 * local
    v = h / torch.sqrt((h**2).sum(-1, keepdim=True))

    level = torch.tensor([sigma], dtype=torch.float64)
    alpha = softplus(linear("amplitude.2", gelu(linear("amplitude.0", torch.cat([level, torch.log(level)])))))
    b = softplus(linear("exponent.2", gelu(linear("exponent.0", level))))
    return r * ((1 + gamma) * v * alpha * sigma**b + beta - beta_clean) * p["scale"]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_blocks_follow_the_formulas(trained, tokens, prefix):
    mapper = SmoothnessMapper(WIDTH, num_blocks=2, num_heads=2, num_prefix_tokens=prefix).double()
    mapper.load_state_dict({k: v for k, v in trained.state_dict().items() if not k.startswith("blocks.2.")})
    mapper.set_reference_norm(7.0)
    sigma = 0.3
    z = tokens.double()
    with torch.no_grad():
        for block, heads in zip(mapper.blocks, (2, 0), strict=True):
            z = z + restated_block(dict(block.named_parameters()), z, sigma, 7.0, prefix, heads)
        torch.testing.assert_close(mapper(tokens.double(), sigma), z - tokens.double(), rtol=0, atol=1e-10)


def test_sigma_zero_is_exactly_no_change(trained, tokens):
    assert torch.equal(trained(tokens, 0), torch.zeros_like(tokens))
    update = trained(tokens, torch.tensor([0.0, 0.25]))
    assert torch.equal(update[0], torch.zeros_like(tokens[0]))
    assert update[1].abs().max() > 0
    sizes = [trained(tokens, sigma).norm().item() for sigma in (0.5, 1e-2, 1e-4, 1e-6, 1e-8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-4 * sizes[0]


@pytest.mark.parametrize("sigma", [0.0, torch.tensor([0.0, 0.25])])
def test_gradients_at_sigma_zero_are_finite(trained, tokens, sigma):
    tokens.requires_grad_()
    (tokens + trained(tokens, sigma)).square().sum().backward()
    for tensor in (tokens, *trained.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


def test_every_parameter_learns(trained, tokens):
    trained(tokens, 0.25).square().sum().backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_fresh_mapper_learns_at_once(fresh, tokens):
    (fresh(tokens, 0.25) * tokens.roll(1, -1)).sum().backward()
    # FiLM's first layer stands behind a zero matrix and follows after one step.
    still = {name for name, p in fresh.named_parameters() if not p.grad.abs().sum() > 0}
    assert still == {f"blocks.{i}.film.0.{kind}" for i in range(3) for kind in ("weight", "bias")}


def test_convolution_leaves_the_class_token_alone(trained, tokens):
    without = copy.deepcopy(trained)
    for block in without.blocks:
        block.conv = None
    # One block: in the first, the class token's own direction has no part of the convolution.
    block, plain = trained.blocks[0], without.blocks[0]
    sigma, r = torch.full((2,), 0.25), torch.tensor(1.0)
    torch.testing.assert_close(block(tokens, sigma, r)[:, 0], plain(tokens, sigma, r)[:, 0])
    assert not torch.allclose(block(tokens, sigma, r)[:, 1], plain(tokens, sigma, r)[:, 1], atol=1e-3)

    # Second block, which has no attention: the class token and the patches do not see each other, neighbours do.
    moved = tokens.clone()
    moved[:, 0] += 1
    block = trained.blocks[1]
    assert torch.equal(block(moved, sigma, r)[:, 1:], block(tokens, sigma, r)[:, 1:])
    moved = tokens.clone()
    moved[:, 1] += torch.linspace(-1, 1, WIDTH)
    changed = (block(moved, sigma, r) - block(tokens, sigma, r)).abs().amax(dim=(0, 2)) > 0
    assert changed.tolist() == [False, True, True] + [False] * 7


def test_rows_do_not_see_each_other(trained, tokens):
    alone = trained(tokens[:1], 0.25)
    other = torch.cat([tokens[:1], 100 * tokens[1:]])
    torch.testing.assert_close(trained(other, 0.25)[:1], alone, rtol=0, atol=1e-6)


def test_one_sigma_per_image(trained, tokens):
    together = trained(tokens, torch.tensor([0.1, 0.5]))
    apart = torch.cat([trained(tokens[:1], 0.1), trained(tokens[1:], 0.5)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    assert not torch.allclose(together[0], trained(tokens, 0.5)[0], atol=1e-3)


def test_pooled_features_are_one_token(trained, tokens):
    pooled = tokens[:, 0]
    update = trained(pooled, 0.25)
    assert update.shape == (2, WIDTH)
    torch.testing.assert_close(update, trained(pooled[:, None], 0.25)[:, 0])
    assert SmoothnessMapper(WIDTH, kernel_size=0)(pooled, 0.25).shape == (2, WIDTH)


def test_update_is_measured_in_the_reference_norm(trained, tokens):
    unit = trained(tokens, 0.25)
    trained.set_reference_norm(40.0)
    # LayerNorm does not see the length, so features and update grow together (its eps aside).
    torch.testing.assert_close(trained(40 * tokens, 0.25), 40 * unit, rtol=1e-3, atol=1e-3)


def test_bfloat16_weights_keep_a_float32_border(trained, tokens):
    exact = trained(tokens, 0.25)
    trained.to(torch.bfloat16)
    rounded = trained(tokens, 0.25)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    assert trained(tokens.bfloat16(), 0.25).dtype == torch.bfloat16
    assert torch.equal(trained(tokens, 0), torch.zeros_like(tokens))


def test_reset_parameters_restores_the_start(trained):
    trained.set_reference_norm(9.0)
    with torch.device("meta"):
        blank = SmoothnessMapper(WIDTH, num_heads=2)
    blank = blank.to_empty(device="cpu")
    for mapper in (trained, blank):
        for tensor in mapper.state_dict().values():
            tensor.fill_(math.nan)
        torch.manual_seed(3)
        mapper.reset_parameters()
    torch.manual_seed(3)
    reference = SmoothnessMapper(WIDTH, num_heads=2).state_dict()
    for mapper in (trained, blank):
        state = mapper.state_dict()
        assert state.keys() == reference.keys()
        assert all(tensor.isfinite().all() for tensor in state.values())
        assert state["token_norm"] == 1
        assert (state["blocks.1.scale"] == 5e-4).all()
        assert (state["blocks.1.film.2.weight"] == 0).all()
        bound = 1 / math.sqrt(WIDTH)
        assert 0.9 * bound < state["blocks.0.mlp.0.weight"].abs().max() <= bound


def test_state_reloads_exactly_and_has_no_hidden_buffers(trained, tokens):
    trained.set_reference_norm(3.5)
    assert {name for name, _ in trained.named_buffers()} == {"token_norm"} <= trained.state_dict().keys()
    again = SmoothnessMapper(WIDTH, num_heads=2)
    again.load_state_dict(trained.state_dict())
    assert torch.equal(again(tokens, 0.25), trained(tokens, 0.25))


def test_whole_graph_compiles_for_several_sigmas(trained, tokens):
    compiled = torch.compile(trained, fullgraph=True, backend="eager")
    with torch.no_grad():
        for sigma in (0.25, 0.5):
            torch.testing.assert_close(compiled(tokens, sigma), trained(tokens, sigma))


@pytest.mark.parametrize(
    ("hidden_size", "heads"), [(1024, 16), (768, 12), (384, 6), (1152, 18), (96, 1), (160, 2), (7, 1)]
)
def test_default_heads(hidden_size, heads):
    with torch.device("meta"):
        assert SmoothnessMapper(hidden_size).blocks[0].attention.num_heads == heads


@pytest.mark.parametrize(
    ("shape", "sigma", "error", "message"),
    [
        ((2, 5, 31), 0.1, ValueError, r"or \(batch_size, 32\), got \(2, 5, 31\)"),
        ((32,), 0.1, ValueError, r"got \(32,\)"),
        ((1, 2, 5, 32), 0.1, ValueError, r"got \(1, 2, 5, 32\)"),
        ((2, 5, 32), -0.1, ValueError, "`sigma` must be finite and >= 0, got -0.1"),
        ((2, 5, 32), math.nan, ValueError, "got nan"),
        ((2, 5, 32), torch.tensor([0.1] * 3), ValueError, r"shape \(\) or \(2,\), got \(3,\)"),
        ((2, 5, 32), None, TypeError, "got NoneType"),
    ],
)
def test_bad_input(fresh, shape, sigma, error, message):
    with pytest.raises(error, match=message):
        fresh(torch.zeros(shape), sigma)


def test_bad_dtype(fresh):
    with pytest.raises(TypeError, match=r"must be floating point, got torch.int64"):
        fresh(torch.zeros(2, 5, WIDTH, dtype=torch.long), 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "`hidden_size` must be a whole number >= 1, got 0"),
        ({"num_blocks": 0}, "`num_blocks` must be a whole number >= 1, got 0"),
        ({"num_blocks": True}, "got True"),
        ({"num_heads": 5}, "`num_heads` must divide `hidden_size` 32, got 5"),
        ({"num_heads": 0}, "`num_heads` must divide `hidden_size` 32, got 0"),
        ({"kernel_size": 4}, "`kernel_size` must be odd"),
        ({"num_prefix_tokens": -1}, "`num_prefix_tokens` must be a whole number >= 0, got -1"),
        ({"mlp_ratio": 0}, "`mlp_ratio` must give at least one hidden unit, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SmoothnessMapper(**{"hidden_size": 32} | options)


@pytest.mark.parametrize("norm", [0, -1, math.nan, math.inf])
def test_bad_reference_norm(fresh, norm):
    with pytest.raises(ValueError, match="`norm` must be positive and finite"):
        fresh.set_reference_norm(norm)
