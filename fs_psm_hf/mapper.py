"""Residual smoothness mapper: a small network after the vision tower that pulls noisy features back to clean ones.

theory.md "Mapper"; paper S.8.2 and figure S.3. The mapper M gives an update, and f' = z + M(z, σ) (eq. 14).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .purifier import expand_sigma


# Width of the networks of σ alone (FiLM, α, b): functions of one number need no more.
_SIGMA_WIDTH = 64
_INITIAL_SCALE = 5e-4
# log σ stands still below this level: M(z, 0) stays finite, and σ^b is far below float32 resolution of z there.
_MIN_SIGMA = 1e-6
_TINY = 1e-12


def _function_of_sigma(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, _SIGMA_WIDTH), nn.GELU(), nn.Linear(_SIGMA_WIDTH, outputs))


class MapperAttention(nn.Module):
    """Plain multi-head self-attention over the tokens of one image.

    Args:
        hidden_size (`int`): width of a token.
        num_heads (`int`): number of heads, a divisor of `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Attend; `hidden` and the result have shape `(batch_size, tokens, hidden_size)`."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, L, D / heads)
        return self.out(attended.transpose(1, 2).flatten(2))


class MapperBlock(nn.Module):
    """One block of the mapper; see [`SmoothnessMapper`] for the formulas.

    Args:
        hidden_size (`int`): width of a token.
        num_heads (`int`): attention heads; 0 leaves the attention branch out.
        mlp_ratio (`float`): hidden width of the MLP branch over `hidden_size`.
        kernel_size (`int`): reach of the convolution in tokens, odd; 0 leaves the branch out.
        num_prefix_tokens (`int`): leading tokens that the convolution neither reads nor writes.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, kernel_size: int, num_prefix_tokens: int):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.film = _function_of_sigma(1, 2 * hidden_size)
        self.attention = MapperAttention(hidden_size, num_heads) if num_heads else None
        inner = int(mlp_ratio * hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size))
        self.conv = None
        if kernel_size:
            self.conv = nn.Conv1d(hidden_size, hidden_size, kernel_size, padding="same", groups=hidden_size)
        self.amplitude = _function_of_sigma(2, 1)
        self.exponent = _function_of_sigma(1, 1)
        self.scale = nn.Parameter(torch.full((hidden_size,), _INITIAL_SCALE))

    def forward(self, tokens: torch.Tensor, sigma: torch.Tensor, reference_norm: torch.Tensor) -> torch.Tensor:
        """Update Δz of the tokens.

        Args:
            tokens (`torch.Tensor` of shape `(batch_size, tokens, hidden_size)`): float32 or wider.
            sigma (`torch.Tensor` of shape `(batch_size,)`, or `(1,)` for one level of all images): noise level in [0, 1]
                pixel units, dtype of `tokens`.
            reference_norm (`torch.Tensor` of shape `()`): r, the length that the update is measured in.
        """
        wide, narrow = tokens.dtype, self.scale.dtype
        sigma = sigma[:, None]
        gamma, beta = self.film(sigma.to(narrow)).to(wide)[:, None].chunk(2, dim=-1)  # (B or 1, 1, D) each
        # The same shape on purpose: the same kernel runs, and the difference at σ = 0 is exactly zero.
        beta_clean = self.film(torch.zeros_like(sigma, dtype=narrow)).to(wide)[:, None].chunk(2, dim=-1)[1]

        hidden = torch.addcmul(beta, self.norm(tokens), 1 + gamma).to(narrow)
        branches = self.mlp(hidden)
        if self.attention is not None:
            branches = branches + self.attention(hidden)
        if self.conv is not None and tokens.shape[1] > self.num_prefix_tokens:
            local = self.conv(hidden[:, self.num_prefix_tokens :].transpose(1, 2)).transpose(1, 2)
            branches = branches.add(F.pad(local, (0, 0, self.num_prefix_tokens, 0)), alpha=0.5)
        direction = branches.to(wide)
        length = direction.norm(dim=-1, keepdim=True) + _TINY  # (B, L, 1)

        log_sigma = sigma.clamp(min=_MIN_SIGMA).log()
        amplitude = F.softplus(self.amplitude(torch.cat([sigma, log_sigma], dim=-1).to(narrow)).to(wide))
        exponent = F.softplus(self.exponent(sigma.to(narrow)).to(wide))
        strength = (amplitude * sigma**exponent)[:, None]  # (B or 1, 1, 1)
        # What depends on σ alone is multiplied out first, small: the tokens are read once.
        unit = reference_norm * self.scale.to(wide)
        return torch.addcmul((beta - beta_clean) * unit, direction / length, (1 + gamma) * strength * unit)


class SmoothnessMapper(nn.Module):
    r"""Residual smoothness mapper M(z, σ) (theory.md "Mapper"; paper S.28-S.33), the sum of the updates of its blocks.

    Per block, on tokens z, with γ, β from FiLM(σ) = W₂·GELU(W₁σ + b₁) + b₂:

        z̄ = (1 + γ) ⊙ LN(z) + β                                 h = h_attn + h_mlp + 0.5·h_conv,  v = h/‖h‖ per token
        α = softplus(MLP([σ, log σ])),  b = softplus(MLP(σ))     Δz = r·[(1 + γ) ⊙ v·α·σ^b + β(σ) − β(0)] ⊙ scale

    Attention stands in the first block only. A token depends on the tokens of its own image and on its own σ, never on
    the rest of the batch. Norms, σ^b and sums are float32 or wider, the branches run in the parameters' dtype.

    Deviations from the print:

    - S.28 shows the LayerNorm only; FiLM modulates its output, as figure S.3 draws it. The LayerNorm has no affine
      parameters of its own, FiLM's are those.
    - S.29 prints FiLM without biases; they are there.
    - S.32 lets `scale` damp β alone, although the text calls it the damping factor of the update; it damps all of it.
    - β(0) is subtracted in S.32, so M(z, 0) = 0 exactly and M → 0 as σ → 0 by construction, which the text promises.
      The identity loss ‖M(z̃, 0)‖² (eq. 12) is then zero from the start.
    - The update is measured in r (`token_norm`), the mean length of a clean token of the wrapped tower. Without it the
      update of a tower with tokens of length 50 would be invisible and of one with length 0.5 violent.
    - W₂ and b₂ start at zero (the paper says "Fixup-style" without details), so a fresh mapper moves features by at
      most α·σ^b·num_blocks·0.05 % of r.

    Args:
        hidden_size (`int`): width D of a token.
        num_blocks (`int`, *optional*, defaults to 3): k of the paper.
        num_heads (`int`, *optional*): attention heads; by default the largest divisor of `hidden_size` that leaves 64
            channels or more per head.
        mlp_ratio (`float`, *optional*, defaults to 2): hidden width of the MLP branch over `hidden_size`. The paper
            states none; 2 keeps the mapper at 17 M parameters for D = 1024, a twentieth of the tower it serves.
        kernel_size (`int`, *optional*, defaults to 3): reach of the depth-wise convolution in tokens, odd. 0 leaves it
            out, which suits pooled features: they have no neighbours.
        num_prefix_tokens (`int`, *optional*, defaults to 1): leading class or register tokens; the convolution leaves
            them alone, because a class token is no neighbour of the first patch. 0 where the host drops them.
    """

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int = 3,
        num_heads: int | None = None,
        mlp_ratio: float = 2,
        kernel_size: int = 3,
        num_prefix_tokens: int = 1,
    ):
        super().__init__()
        for name, value, least in (
            ("hidden_size", hidden_size, 1),
            ("num_blocks", num_blocks, 1),
            ("kernel_size", kernel_size, 0),
            ("num_prefix_tokens", num_prefix_tokens, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")
        if kernel_size and kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, or 0 for no convolution, got {kernel_size}.")
        if num_heads is None:
            num_heads = next(n for n in range(max(1, hidden_size // 64), 0, -1) if hidden_size % n == 0)
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"`num_heads` must divide `hidden_size` {hidden_size}, got {num_heads}.")
        if not mlp_ratio * hidden_size >= 1:
            raise ValueError(f"`mlp_ratio` must give at least one hidden unit, got {mlp_ratio}.")
        self.hidden_size = hidden_size
        self.blocks = nn.ModuleList(
            MapperBlock(hidden_size, num_heads if i == 0 else 0, mlp_ratio, kernel_size, num_prefix_tokens)
            for i in range(num_blocks)
        )
        self.register_buffer("token_norm", torch.ones(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every parameter and buffer its first value, submodules included.

        All writes respect weights that `from_pretrained` has already loaded.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                module.reset_parameters()
        for block in self.blocks:
            init.zeros_(block.film[-1].weight)
            init.zeros_(block.film[-1].bias)
            init.constant_(block.scale, _INITIAL_SCALE)
        init.ones_(self.token_norm)

    def set_reference_norm(self, norm: float) -> None:
        """Set r, the mean length ‖z‖₂ of a clean token (or pooled feature) of the wrapped tower, in feature units.

        Raises:
            ValueError: if `norm` is not positive and finite.
        """
        norm = float(norm)
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"`norm` must be positive and finite, got {norm}.")
        with torch.no_grad():
            self.token_norm.fill_(norm)

    def forward(self, features: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Compute M(features, sigma); the mapped features are `features + mapper(features, sigma)`.

        Args:
            features (`torch.Tensor` of shape `(batch_size, tokens, hidden_size)` or `(batch_size, hidden_size)`):
                Features of the wrapped tower; pooled ones count as one token and see no convolution.
            sigma (`float` or `torch.Tensor` of shape `(batch_size,)`): noise standard deviation in [0, 1] pixel units.

        Returns:
            `torch.Tensor` like `features`, exactly zero where `sigma` is.

        Raises:
            ValueError: for features of another width or rank, or a `sigma` that is negative or not finite.
            TypeError: for features that are not floating point.
        """
        if not features.is_floating_point():
            raise TypeError(f"`features` must be floating point, got {features.dtype}.")
        if features.ndim not in (2, 3) or features.shape[-1] != self.hidden_size:
            raise ValueError(
                f"`features` must have shape (batch_size, tokens, {self.hidden_size}) or "
                f"(batch_size, {self.hidden_size}), got {tuple(features.shape)}."
            )
        # One noise level for all images is one row, whose FiLM is computed once and broadcast.
        levels = expand_sigma(sigma, features if isinstance(sigma, torch.Tensor) else features[:1])
        tokens = features.to(levels.dtype)
        pooled = tokens.ndim == 2
        if pooled:
            tokens = tokens[:, None]  # (B, 1, D)
        update = torch.zeros_like(tokens)
        for block in self.blocks:
            update = update + block(tokens + update, levels, self.token_norm.to(levels.dtype))
        return (update[:, 0] if pooled else update).to(features.dtype)
