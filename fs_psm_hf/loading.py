"""Loading that refuses what does not fit."""

from safetensors import SafetensorError


def load_strictly(loader, cls, name, *args, leftover=(), **kwargs):
    """Load a checkpoint with `loader`, a `from_pretrained` of transformers, and refuse one that does not fit.

    Args:
        loader (`Callable`): the `from_pretrained`.
        cls (`type`), name (`str`): the class for the message, and what to load.
        leftover (`tuple[str, ...]`): beginnings of keys that may be left over.

    Returns:
        `tuple[PreTrainedModel, dict]`: the model and transformers' loading info.

    Raises:
        ValueError: weights are missing, left over or of another shape, or a weight file is damaged.
    """
    try:
        # Mismatched sizes are refused below, with the names.
        model, info = loader(name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"`{name}` holds a damaged safetensors file: {error}; download it again") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info.get(kind) or ())
        keys = [key for key in keys if kind != "unexpected_keys" or not key.startswith(tuple(leftover))]
        if keys:
            raise ValueError(
                f"`{name}` does not fit {cls.__name__}: {len(keys)} {kind.replace('_', ' ')}, such as {keys[0]!r}; the "
                "checkpoint and its config.json must belong together"
            )
    return model, info


class StrictLoading:
    """`from_pretrained` that refuses a checkpoint which does not fit, instead of filling in random weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: weights are missing, left over or of another shape, or a weight file is damaged.
        """
        model, info = load_strictly(super().from_pretrained, cls, pretrained_model_name_or_path, *model_args, **kwargs)
        return (model, info) if output_loading_info else model
