"""Loading that refuses what does not fit."""


def check_loaded(name, cls, info, allowed=()):
    """Raise `ValueError` where the `output_loading_info` of a checkpoint tells of weights that do not fit.

    Args:
        name (`str`), cls (`type`): what was loaded, and as what.
        info (`dict`): transformers' loading info.
        allowed (`tuple[str, ...]`): beginnings of keys that may be left over.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info.get(kind) or ())
        keys = [key for key in keys if kind != "unexpected_keys" or not key.startswith(tuple(allowed))]
        if keys:
            raise ValueError(
                f"`{name}` does not fit {cls.__name__}: {len(keys)} {kind.replace('_', ' ')}, such as {keys[0]!r}; the "
                "checkpoint and its config.json must belong together"
            )


class StrictLoading:
    """`from_pretrained` that refuses a checkpoint which does not fit, instead of filling in random weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: weights are missing, left over or of another shape, or a weight file is damaged.
        """
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the names
                **kwargs,
            )
        except (OSError, ValueError, TypeError):
            raise
        except Exception as error:
            # safetensors' own error type is private to it and does not name the file.
            if type(error).__name__ != "SafetensorError":
                raise
            raise ValueError(
                f"`{pretrained_model_name_or_path}` holds a damaged safetensors file: {error}; download it again"
            ) from error
        check_loaded(pretrained_model_name_or_path, cls, info)
        return (model, info) if output_loading_info else model
