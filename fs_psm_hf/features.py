"""Which tensors of a vision model's output are the feature, and how they get out of it and back in."""

from dataclasses import dataclass

import torch

from .smoothing import vector_norm


FEATURES = ("tokens", "pooled", "cls")
# Beginnings of the `model_type` of vision models whose first token is a patch like the others.
_NO_CLASS_TOKEN = ("siglip", "pixtral", "idefics2", "idefics3", "smolvlm", "clip_patch_tokens")


def pooled_name(output):
    """Name of the final embedding of an output: after the projection where there is one.

    Raises:
        ValueError: the output has none.
    """
    name = "image_embeds" if getattr(output, "image_embeds", None) is not None else "pooler_output"
    if getattr(output, name, None) is None:
        raise ValueError("`feature` must not be 'pooled' for this vision tower: it has no pooled output")
    return name


@dataclass(frozen=True)
class FeatureSelection:
    """The feature of a tower.

    Args:
        layers (`tuple[int, ...]`): indices into `hidden_states`, counted from the first; empty for the last output.
        num_layers (`int`): blocks of the wrapped tower, one less than its hidden states.
        first_token (`int`): first token the host reads.
        mapped (`str`, *optional*): `"tokens"` or `"pooled"` where a mapper refines the feature.
        has_class_token (`bool`): whether the first token stands for the whole image.
    """

    layers: tuple[int, ...]
    num_layers: int
    first_token: int
    mapped: str | None
    has_class_token: bool

    @classmethod
    def of(cls, config):
        """The selection of a [`SmoothedVisionTowerConfig`].

        Raises:
            ValueError: a layer that does not exist, or a mapper of another width.
        """
        for name in ("num_hidden_layers", "hidden_size"):
            if not isinstance(getattr(config.vision_config, name, None), int):
                raise ValueError(
                    f"`vision_tower` must be a model with one `{name}`, got a {config.vision_config.model_type!r} without"
                )
        given, count = config.feature_layer, config.vision_config.num_hidden_layers
        layers = [] if given is None else [given] if isinstance(given, int) else list(given)
        if (given is not None and not layers) or any(not -count - 1 <= layer <= count for layer in layers):
            raise ValueError(
                f"`feature_layer` must be in [{-count - 1}, {count}] for a tower of {count} layers, got {given}"
            )
        layers = tuple(i % (count + 1) for i in layers)
        psm = config.psm_config
        mapped = None if psm.mapper_config is None else psm.mapper_feature
        width, mapper_width = config.hidden_size * max(1, len(layers)), (psm.mapper_config or {}).get("hidden_size")
        if mapped == "tokens" and mapper_width != width:
            raise ValueError(
                f"`mapper_config['hidden_size']` must be {width}, the width of the tower's feature, got {mapper_width}"
            )
        if mapped == "tokens" and len(set(layers)) < len(layers):
            raise ValueError(
                f"`feature_layer` must name each layer once where a mapper refines the tokens, got {given}"
            )
        has_class_token = not config.vision_config.model_type.startswith(_NO_CLASS_TOKEN)
        return cls(layers, count, config.first_token, mapped, has_class_token)

    @property
    def restricted(self):
        """Whether the feature alone is computed and returned, not every output of the wrapped tower."""
        return bool(self.layers) or self.mapped is not None

    @property
    def depth(self):
        """Blocks that have to run for the feature, or `None` for all and what comes after them."""
        return None if not self.layers or self.mapped == "pooled" else max(self.layers)

    def tokens(self, output):
        """Tokens of the feature, `(rows, tokens, width)`: layers side by side."""
        states = [output.hidden_states[i] for i in self.layers] if self.layers else [output.last_hidden_state]
        return torch.cat(states, -1) if len(states) > 1 else states[0]

    def refine(self, output, mapper, sigma):
        """Add the mapper's update to the feature, in place in `output` (eq. 14), in float32: small updates survive."""
        if self.mapped == "pooled":
            name = pooled_name(output)
            pooled = output[name].float()
            output[name] = pooled + mapper(pooled, sigma).to(pooled.device)
            return
        tokens = self.tokens(output).float()
        refined = tokens + mapper(tokens, sigma).to(tokens.device)
        if not self.layers:
            output.last_hidden_state = refined
            return
        states = list(output.hidden_states)
        for layer, part in zip(self.layers, refined.chunk(len(self.layers), -1), strict=True):
            states[layer] = part
        output.hidden_states = tuple(states)

    def collect(self, output):
        """The tensors to average, as lists keyed by their place; the layers of a feature are one vector."""
        if self.mapped == "pooled":
            return {(pooled_name(output),): [output[pooled_name(output)]]}
        if self.layers:
            return {("hidden_states",): [output.hidden_states[layer] for layer in self.layers]}
        if self.mapped:
            return {("last_hidden_state",): [output.last_hidden_state]}
        places = {}
        for name, value in output.items():
            if isinstance(value, torch.Tensor):
                places[(name,)] = [value]
            else:
                places |= {(name, i): [state] for i, state in enumerate(value) if state is not None}
        return places

    def first_token_of(self, place):
        """First token that counts for the length of what stands at `place` of [`collect`]."""
        return self.first_token if place in (("hidden_states",), ("last_hidden_state",)) else 0

    def rebuild(self, template, averaged):
        """An output of the class of `template` that holds the `averaged` tensors in their places and nothing else."""
        fields = {}
        for (name, *index), tensors in averaged.items():
            if name == "hidden_states" and not index:
                index, length = self.layers, self.num_layers + 1
            elif index:
                length = len(template[name])
            else:
                fields[name] = tensors[0]
                continue
            states = fields.setdefault(name, [None] * length)
            for i, tensor in zip(index, tensors, strict=True):
                states[i] = tensor
        return type(template)(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})

    def check(self, feature, per_token=False):
        """Raise `ValueError` where `feature` is unknown, not there, or not the one the mapper refines."""
        if per_token and feature != "tokens":
            raise ValueError(f"`per_token` needs `feature` 'tokens', got {feature!r}")
        if feature not in FEATURES:
            raise ValueError(f"`feature` must be one of {', '.join(FEATURES)}, got {feature!r}")
        if feature == "cls" and not self.has_class_token:
            raise ValueError("`feature` must not be 'cls' for this vision tower: it has no class token")
        if self.mapped is not None and (self.mapped == "pooled") != (feature == "pooled"):
            raise ValueError(f"`feature` must be the one the mapper refines ({self.mapped!r}), got {feature!r}")

    def serves(self, feature):
        """Whether the host is given this very feature, so that a mean of its draws has a certificate too (Fact 4)."""
        return feature == "tokens" or (feature == "pooled" and (not self.layers or self.mapped == "pooled"))

    def options(self, feature):
        """How to call the wrapped tower for one certified feature: its options, and whether it runs to the end."""
        whole = feature == "pooled" or not self.layers
        return ({} if whole else {"output_hidden_states": list(self.layers)}), whole

    def vector(self, output, feature):
        """The feature a certificate speaks of: `(rows, F)` or, for `"tokens"`, `(rows, tokens, width)`, float32."""
        if feature == "pooled":
            return output[pooled_name(output)].float()
        tokens = self.tokens(output).float()
        return tokens[:, 0] if feature == "cls" else tokens[:, self.first_token :]


def unit_vector(vector, center=None, per_token=False):
    """The unit feature g of theory.md, float32: all tokens as one vector, or each token by itself.

    Args:
        vector (`torch.Tensor` of shape `(rows, F)` or `(rows, tokens, width)`): raw features.
        center (`torch.Tensor` of shape `(F,)`, *optional*): fixed vector to subtract first, tokens side by side.
        per_token (`bool`): normalise each token by itself.

    Returns:
        `torch.Tensor` of shape `(rows, F)`, or `(rows, tokens, width)` with `per_token`.

    Raises:
        ValueError: `center` has another size.
    """
    if center is not None:
        if center.numel() != vector[0].numel():
            raise ValueError(f"`center` must have {vector[0].numel()} values, one per feature, got {center.numel()}")
        vector = vector - center.to(vector).view(vector.shape[1:])
    if per_token:
        return vector / vector.square().sum(-1, keepdim=True).sqrt()
    vector = vector.flatten(1)
    return vector / vector_norm([vector])[:, None]
