"""Loading that refuses what does not fit."""


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
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
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
        for kind, keys in info.items():
            if keys and kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                names = sorted(key if isinstance(key, str) else key[0] for key in keys)
                raise ValueError(
                    f"`{pretrained_model_name_or_path}` does not fit {cls.__name__}: {len(names)} {kind.replace('_', ' ')}, "
                    f"such as {names[0]!r}; the checkpoint and its config.json must belong together"
                )
        return (model, info) if output_loading_info else model
