"""Tiny real CLIP-like hosts and what they classify."""

from pathlib import Path

import pytest
import torch
from tiny_models import MEAN, SHAPE, STD
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
)


CARDS = Path(__file__).parents[1] / "model_cards"
TEXT = {
    "vocab_size": 384,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
KINDS = ["clip", "siglip", "clip_images", "siglip_images"]
STATISTICS = {"image_mean": MEAN, "image_std": STD}
each_kind = pytest.mark.parametrize("kind", KINDS)


def host_model(kind, seed=3, dtype=torch.float32):
    """A real host at tiny size with random weights; an image classification model has four labels and a bias that counts."""
    torch.manual_seed(seed)
    labels = {"num_labels": 4}
    # Another width than the vision model's own field says, which only the host's own projection knows.
    clip = {"text_config": TEXT, "vision_config": SHAPE | {"projection_dim": 7}, "projection_dim": 24}
    siglip = {"text_config": TEXT | {"hidden_size": 32, "projection_size": 32}, "vision_config": SHAPE}
    host = {
        "clip": lambda: CLIPModel(CLIPConfig(**clip)),
        "siglip": lambda: SiglipModel(SiglipConfig(**siglip)),
        "clip_images": lambda: CLIPForImageClassification(CLIPConfig(**clip, **labels)),
        "siglip_images": lambda: SiglipForImageClassification(SiglipConfig(**siglip, **labels)),
    }[kind]()
    if kind.endswith("images"):
        nn.init.normal_(host.classifier.bias, std=0.5)
    return host.to(dtype).eval()


def read_by(host, pixels):
    """What a plain host classifies, from the outputs of its parts."""
    output = host.vision_model(pixel_values=pixels)
    if isinstance(host, CLIPModel):
        return host.visual_projection(output.pooler_output)
    if isinstance(host, SiglipModel):
        return output.pooler_output
    first = int(isinstance(host, CLIPForImageClassification))
    return output.last_hidden_state[:, first:].mean(1)


def answer(host, pixels, **options):
    """What a host says of images: its logits, against some texts where it takes texts."""
    if hasattr(host, "text_model"):
        ids = torch.tensor([[1, 5 + i, 9, 3] for i in range(4)])
        return host(input_ids=ids, pixel_values=pixels, **options).logits_per_image
    return host(pixels, **options).logits
