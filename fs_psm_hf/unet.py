"""U-Nets from their configuration, also those that diffusers' `UNet2DModel` has no words for."""

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn


# Keys of a purifier's config that are no arguments of `UNet2DModel`.
EXTENSIONS = ("num_attention_heads", "time_proj_dim")


class ExtendedUNet2DModel(UNet2DModel):
    """A `UNet2DModel` with two options of guided-diffusion's U-Net that diffusers has no argument for.

    Its `config` holds them too, and a [`PSMModel`] with that `purifier_config` saves and reloads exactly. By itself it
    does not save: diffusers would ignore the options when it loads the folder, and give another function or none.

    Args:
        num_attention_heads (`int`, *optional*):
            Number of heads of every attention layer, of whatever width; in place of `attention_head_dim`, the width of
            every head, which must not be given beside it.
        time_proj_dim (`int`, *optional*):
            Number of sines and cosines that the time embedding is made from; as many as the first level has channels
            where not given. The width of the embedding itself is `time_embedding_dim` of `UNet2DModel`.
        config:
            Arguments of `UNet2DModel`.

    Raises:
        ValueError: for numbers out of range, heads that do not divide a layer, and a time embedding without sines.
    """

    def __init__(self, *, num_attention_heads: int | None = None, time_proj_dim: int | None = None, **config):
        for name, value, least in (
            ("num_attention_heads", num_attention_heads, 1),
            ("time_proj_dim", time_proj_dim, 2),
        ):
            wrong = isinstance(value, bool) or not isinstance(value, int) or value < least
            if value is not None and wrong:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
        if num_attention_heads is not None:
            if config.get("attention_head_dim") is not None:
                raise ValueError(
                    "`attention_head_dim` must not be given beside `num_attention_heads`, "
                    f"got {config['attention_head_dim']} and {num_attention_heads}."
                )
            config["attention_head_dim"] = None  # one head per layer, split below
        super().__init__(**config)
        if num_attention_heads is not None:
            self._split_heads(num_attention_heads)
        if time_proj_dim is not None:
            if self.config.time_embedding_type != "positional" or self.config.class_embed_type == "timestep":
                raise ValueError(
                    "`time_proj_dim` must go with time_embedding_type 'positional' and without class_embed_type "
                    f"'timestep', got {self.config.time_embedding_type!r} and {self.config.class_embed_type!r}."
                )
            self.time_proj.num_channels = time_proj_dim
            self.time_embedding.linear_1 = nn.Linear(time_proj_dim, self.time_embedding.linear_1.out_features)
        self.register_to_config(num_attention_heads=num_attention_heads, time_proj_dim=time_proj_dim)

    def _split_heads(self, heads):
        layers = [module for module in self.modules() if isinstance(module, Attention)]
        widths = sorted({layer.inner_dim for layer in layers})
        if any(width % heads for width in widths):
            raise ValueError(
                f"`num_attention_heads` must divide the widths of all attention layers, {widths}, got {heads}."
            )
        for layer in layers:
            layer.heads = layer.sliceable_head_dim = heads
            layer.scale = (layer.inner_dim // heads) ** -0.5

    @property
    def not_in_diffusers(self) -> str:
        """`str`: why no folder of diffusers holds this network, for messages."""
        given = " and ".join(f"{name} {self.config[name]}" for name in EXTENSIONS if self.config[name] is not None)
        return f"diffusers' UNet2DModel has no {given}"

    def save_pretrained(self, *args, **kwargs):
        """Refused: see the class.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"`unet` must be saved as the purifier of a PSMModel, because {self.not_in_diffusers}.")


def build_unet(config: dict) -> UNet2DModel:
    """Make a U-Net with random weights.

    Args:
        config (`dict`): arguments of `UNet2DModel`, and of [`ExtendedUNet2DModel`] where it is one.

    Returns:
        `UNet2DModel`: an [`ExtendedUNet2DModel`] only where `config` sets one of its own options.
    """
    # A config saved by diffusers carries its class and version under private keys.
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    extensions = {name: config.pop(name, None) for name in EXTENSIONS}
    if all(value is None for value in extensions.values()):
        return UNet2DModel(**config)
    return ExtendedUNet2DModel(**extensions, **config)
