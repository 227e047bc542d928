"""CIFAR-10 as tensors, the caption templates, and a tokenizer for both language towers of the embedded models."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGE_MEAN = [0.4914, 0.4822, 0.4465]
IMAGE_STD = [0.2470, 0.2435, 0.2616]
IMAGE_SIZE = 32
TEMPLATES = [
    "a photo of {}.",
    "a small photo of {}.",
    "a blurry photo of {}.",
    "a low resolution photo of {}.",
    "a close photo of {}.",
    "a good photo of {}.",
    "a picture of {}.",
    "an image of {}.",
]


def with_article(name):
    """'airplane' -> 'an airplane'."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def load_cifar10(folder, split):
    """`train.parquet` or `test.parquet` with an image column (encoded bytes) and an integer label column.

    Returns:
        uint8 images of shape (N, 3, 32, 32) and int64 labels of shape (N,).
    """
    table = pq.read_table(Path(folder) / f"{split}.parquet")
    names = table.column_names
    images, labels = table[names[0]].to_pylist(), table[names[1]].to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def normalise(images):
    """Uint8 or [0, 1] float images (B, 3, H, W) -> normalised pixel_values."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std


def augment(images, generator, pad=4):
    """Random flip and shifted crop of uint8 images (B, 3, 32, 32), one draw per image."""
    size = images.shape[-1]
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = torch.nn.functional.pad(images, [pad] * 4)
    top, left = torch.randint(0, 2 * pad + 1, (2, len(images)), generator=generator)
    rows = (top[:, None] + torch.arange(size))[:, None, :, None]  # (B, 1, H, 1)
    columns = (left[:, None] + torch.arange(size))[:, None, None, :]  # (B, 1, 1, W)
    index = torch.arange(len(images))[:, None, None, None], torch.arange(3)[None, :, None, None]
    return padded[index[0], index[1], rows, columns]


def build_tokenizer(vocab_size=400):
    """Byte-level BPE over the captions; `<image>` is LLaVA's placeholder, `<|endoftext|>` ends every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    # `<|endoftext|>` must not get id 2: CLIPTextModel treats that value as a mark of old checkpoints and pools elsewhere.
    special = ["<|pad|>", "<|startoftext|>", "<image>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    chat = ["USER: ASSISTANT: describe this image in one sentence. what is in the picture?"]
    captions = [t.format(with_article(c)) for t in TEMPLATES for c in CLASSES]
    tokenizer.train_from_iterator(captions + chat, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        additional_special_tokens=["<image>"],
        model_max_length=32,
        padding_side="right",
    )


def build_image_processor():
    """Resize the shorter side to 32 px, centre crop, rescale, normalise with CIFAR-10's statistics."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
