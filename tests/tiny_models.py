"""Real transformers classes at tiny size, with random weights from a fixed seed."""

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from fs_psm_hf import PSMConfig, PSMModel, SmoothedVisionTower


MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SIZE, WIDTH, LAYERS = 16, 32, 4
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 4,
}
SMALL_UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def vision_model(kind="clip", seed=0):
    """A wrapped tower: `clip`, `projection`, `siglip` or `dinov2`."""
    torch.manual_seed(seed)
    model = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE)),
        "projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**SHAPE, projection_dim=24)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE)),
        "dinov2": lambda: Dinov2Model(
            Dinov2Config(**{k: v for k, v in SHAPE.items() if k != "intermediate_size"}, mlp_ratio=2)
        ),
    }[kind]()
    return model.eval()


def psm_model(purifier="unet", mapper=True, feature="tokens", width=WIDTH, seed=1):
    """A PSM with random weights whose mapper visibly moves features."""
    torch.manual_seed(seed)
    config = PSMConfig(
        purifier=purifier,
        purifier_config=None if purifier == "none" else SMALL_UNET,
        mapper_config={"hidden_size": width, "num_heads": 4} if mapper else None,
        mapper_feature=feature,
    )
    model = PSMModel(config).eval()
    if mapper:
        with torch.no_grad():
            for name, parameter in model.mapper.named_parameters():
                if name.endswith("scale"):
                    parameter.fill_(0.2)
    return model


def smoothed_tower(kind="clip", psm=None, **options):
    """A smoothed tower around `vision_model(kind)`."""
    settings = {"sigma": 0.1, "num_samples": 3, "image_mean": MEAN, "image_std": STD} | options
    return SmoothedVisionTower.from_components(vision_model(kind), psm, **settings)


def images(count=2, size=SIZE, seed=2):
    """Normalised pixel values."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def llava(seed=3, layer=-2):
    """A LLaVA whose images are 16 tokens each, with `<image>` id 7."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=39,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SHAPE),
        text_config=text,
        image_token_index=7,
        image_seq_length=16,
        vision_feature_layer=layer,
    )
    return LlavaForConditionalGeneration(config).eval()


def llava_inputs(count=1):
    """Prompt ids with one image each, and the images."""
    ids = torch.tensor([[1, *[7] * 16, 11, 12, 13]]).repeat(count, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images(count)}
