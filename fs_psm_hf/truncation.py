"""A view of a vision model that stops after its first layers, sharing every weight with the whole one."""

import copy

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks


def _shallow(module):
    """A second module object with the same parameters, buffers and children."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    # accelerate's hooks live on the instance and call the whole module; those of the children stay.
    for name in ("forward", "_old_forward", "_hf_hook"):
        twin.__dict__.pop(name, None)
    return twin


def truncated(model, num_layers):
    """`model` with only its first `num_layers` encoder blocks, or `model` itself where its layout is not known.

    No forward code is copied: the encoder's list of blocks is shortened in shallow twins of the model and its
    encoder, so hidden states up to index `num_layers` are those of the whole model, to the bit. What comes after the
    blocks (final norm, pooled output) is computed from the wrong place and must not be used.

    Args:
        model (`PreTrainedModel`): `encoder.layers` or `encoder.layer` holds its blocks, directly or, as in
            `CLIPVisionModelWithProjection`, in its `vision_model`.
        num_layers (`int`): blocks to keep.
    """
    inner = model.vision_model if isinstance(getattr(model, "vision_model", None), PreTrainedModel) else model
    encoder = getattr(inner, "encoder", None)
    name = next((n for n in ("layers", "layer") if isinstance(getattr(encoder, n, None), nn.ModuleList)), None)
    if name is None or len(getattr(encoder, name)) != inner.config.num_hidden_layers:
        return model
    if num_layers == len(getattr(encoder, name)):
        return model
    # The hooks that record hidden states sit on the blocks. They are put there once, through the whole model: a twin
    # that installed its own would record every shared block twice.
    maybe_install_capturing_hooks(encoder if isinstance(encoder, PreTrainedModel) else inner)
    short_encoder = _shallow(encoder)
    short_encoder._modules[name] = nn.ModuleList(list(getattr(encoder, name))[:num_layers])
    short = _shallow(inner)
    short._modules["encoder"] = short_encoder
    for twin in (short, short_encoder):
        if isinstance(twin, PreTrainedModel):
            # Where the whole model reports its normed output as the last hidden state, the cut one must not.
            twin.config = copy.copy(twin.config)
            twin.config.tie_last_hidden_states = False
    if inner is model:
        return short
    outer = _shallow(model)
    outer._modules["vision_model"] = short
    return outer
