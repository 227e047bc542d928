"""Vision models that `AutoModel` does not build: those of the first two IDEFICS, which only their hosts construct."""

import torch
from transformers import IdeficsVisionConfig
from transformers.models.idefics.modeling_idefics import IdeficsPreTrainedModel
from transformers.models.idefics.vision import IdeficsVisionTransformer
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer


class IdeficsVisionModel(IdeficsPreTrainedModel):
    """The vision tower of IDEFICS, a bare `torch.nn.Module` in transformers, as a model: same call, same output."""

    config: IdeficsVisionConfig
    config_class = IdeficsVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["IdeficsVisionEncoderLayer"]
    # Its encoder has no hooks that record hidden states or attention maps.
    _can_record_outputs = {}

    def __init__(self, config):
        super().__init__(config)
        self.model = IdeficsVisionTransformer(config)
        self.post_init()

    @classmethod
    def around(cls, module):
        """The model whose only part is this `IdeficsVisionTransformer`; nothing is copied."""
        kernel = module.config._attn_implementation
        with torch.device("meta"):
            model = cls(module.config)
        module.config._attn_implementation = kernel
        model.model = module
        return model.train(module.training)

    def forward(self, pixel_values, interpolate_pos_encoding=False, **kwargs):
        """`last_hidden_state` of shape `(batch_size, 1 + patches, hidden_size)` and its normed class token.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
            interpolate_pos_encoding (`bool`): whether the images may have another size than the tower's.
        """
        return self.model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)


# By the name that a saved configuration gives.
OWN_VISION_CLASSES = {
    "IdeficsVisionModel": IdeficsVisionModel,
    "Idefics2VisionTransformer": Idefics2VisionTransformer,
}
