"""`PSMModel`: purifier and smoothness mapper, what is trained and published."""

from transformers import PreTrainedModel

from .configuration_fs_psm import OWN_PURIFIER, PSMConfig
from .loading import StrictLoading
from .mapper import SmoothnessMapper
from .purifier import build_purifier


# Blocks that a `device_map` must keep on one device; diffusers' UNet names none.
NO_SPLIT_MODULES = [
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "UNetMidBlock2D",
    "UpBlock2D",
    "AttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "SmoothnessMapper",
]


class PSMModel(StrictLoading, PreTrainedModel):
    """Purifier and smoothness mapper for a frozen vision tower (paper section 4).

    Either part may be absent. `purifier` is anything with `denoise(images, sigma) -> images` on [0, 1] images of shape
    `(batch_size, 3, height, width)`; `mapper` maps features of shape `(batch_size, tokens, width)` or
    `(batch_size, width)` and σ to the update that is added to them.
    """

    config_class = PSMConfig
    base_model_prefix = "psm"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # No attention of transformers' own: whatever the host asks for is fine.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = NO_SPLIT_MODULES

    def __init__(self, config):
        super().__init__(config)
        if config.purifier == OWN_PURIFIER:
            raise ValueError(
                "`purifier` was a module of yours, which config.json cannot describe: load the plain model and give the "
                "module to `attach` or `from_components` again"
            )
        self.purifier = build_purifier(config.purifier, config.purifier_config)
        self.mapper = None if config.mapper_config is None else SmoothnessMapper(**config.mapper_config)
        self.post_init()

    def _init_weights(self, module):
        # torch's own start for the U-Net and the mapper's own for the mapper, never transformers' normal(0, 0.02).
        # Children come first, so the mapper has the last word on its parts.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def forward(self, images, sigma):
        """Purified images: `denoise` of the purifier, or the images themselves without one.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): [0, 1] images plus noise, unclipped.
            sigma (`float` or `torch.Tensor` of shape `(batch_size,)`): noise level in [0, 1] pixel units.
        """
        return images if self.purifier is None else self.purifier.denoise(images, sigma)
