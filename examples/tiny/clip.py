"""A small CLIPModel on CIFAR-10, trained contrastively on caption templates."""

import math
import time

import torch
from data import (
    CLASSES,
    TEMPLATES,
    augment,
    build_image_processor,
    build_tokenizer,
    load_cifar10,
    normalise,
    with_article,
)
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, get_cosine_schedule_with_warmup


def build_model(tokenizer):
    """ViT of width 128, depth 6, patch 4 at 32 px (65 tokens), and a two-layer text tower."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "projection_dim": 128,  # also here: the vision model is loaded by itself too
    }
    vision = {
        "projection_dim": 128,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    mimetic_init_(model.vision_model)
    return model


@torch.no_grad()
def mimetic_init_(vision):
    """Start a ViT where trained ones end up (Trockman & Kolter, ICML 2023): worth many epochs on a small set.

    Sinusoidal positions; per head W_q·W_kᵀ near the identity; W_v·W_out near minus the identity.
    """
    config = vision.config
    width, heads = config.hidden_size, config.num_attention_heads
    grid = config.image_size // config.patch_size
    frequencies = 1e4 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies  # (grid, width/4)
    axis = torch.cat([angles.sin(), angles.cos()], -1)  # (grid, width/2)
    table = torch.cat([axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)], -1)
    vision.embeddings.position_embedding.weight[1:] = 0.5 * table.reshape(grid * grid, width)
    eye = torch.eye(width)
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        target = 0.4 * torch.randn(width, width) / math.sqrt(width) - 0.4 * eye
        u, s, v = torch.linalg.svd(target)
        attention.v_proj.weight.copy_((u * s.sqrt()).T)
        attention.out_proj.weight.copy_((s.sqrt()[:, None] * v).T)
        size = width // heads
        for head in range(heads):
            u, s, v = torch.linalg.svd(0.7 * torch.randn(width, width) / math.sqrt(width) + 0.7 * eye)
            rows = slice(head * size, (head + 1) * size)
            attention.q_proj.weight[rows] = (u[:, :size] * s[:size].sqrt()).T
            attention.k_proj.weight[rows] = s[:size].sqrt()[:, None] * v[:size]


def image_embeds(model, pixel_values, keep=1.0):
    """Unit image embeddings (B, D); `keep` < 1 trains on a random part of the patches (FLIP, CVPR 2023)."""
    vision = model.vision_model
    hidden = vision.embeddings(pixel_values)  # (B, 65, D)
    if keep < 1.0:
        patches = hidden.shape[1] - 1
        order = torch.rand(len(hidden), patches).argsort(1)[:, : int(keep * patches)] + 1
        index = torch.cat([torch.zeros(len(hidden), 1, dtype=torch.long), order], 1)
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    return F.normalize(model.visual_projection(vision.post_layernorm(hidden[:, 0])), dim=-1)


def class_embeds(model, tokenizer, templates):
    """Unit text embeddings (10, D): the mean over `templates` of each class's captions."""
    captions = [t.format(with_article(c)) for c in CLASSES for t in templates]
    batch = tokenizer(captions, padding=True, return_tensors="pt", return_token_type_ids=False)
    embeds = F.normalize(model.get_text_features(**batch).pooler_output, dim=-1)
    return F.normalize(embeds.view(len(CLASSES), len(templates), -1).mean(1), dim=-1)


def contrastive_loss(images, texts, labels, scale):
    """CLIP's symmetric loss with equal captions merged: ten texts, so a class's other images are no negatives."""
    logits = scale * images @ texts.T  # (B, 10)
    to_text = F.cross_entropy(logits, labels, label_smoothing=0.1)
    share = F.one_hot(labels, len(CLASSES)).float()
    share = share / share.sum(0, keepdim=True).clamp_min(1)
    to_image = -(share * logits.log_softmax(0)).sum() / len(CLASSES)
    return 0.5 * (to_text + to_image)


@torch.no_grad()
def zero_shot_accuracy(model, tokenizer, images, labels):
    """Share of correct nearest-caption predictions, every template averaged."""
    model.eval()
    texts = class_embeds(model, tokenizer, TEMPLATES)
    hits = 0
    for start in range(0, len(images), 500):
        embeds = F.normalize(
            model.get_image_features(pixel_values=normalise(images[start : start + 500])).pooler_output, dim=-1
        )
        hits += ((embeds @ texts.T).argmax(1) == labels[start : start + 500]).sum().item()
    return hits / len(images)


def train(data_dir, output_dir, epochs=20, batch_size=128, learning_rate=1.5e-3, keep=0.5, seed=0):
    """Train, measure on the 10,000 test images, save model + tokenizer + image processor + results JSON."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_cifar10(data_dir, "train")
    test = load_cifar10(data_dir, "test")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.05},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    steps = len(images) // batch_size
    schedule = get_cosine_schedule_with_warmup(optimizer, steps, epochs * steps)
    started = time.time()
    for epoch in range(epochs):
        model.train()
        full = epoch >= epochs - max(1, epochs // 5)
        order, total = torch.randperm(len(images), generator=generator), 0.0
        for step in range(steps):
            index = order[step * batch_size : (step + 1) * batch_size]
            pixels = normalise(augment(images[index], generator))
            template = TEMPLATES[torch.randint(len(TEMPLATES), (1,), generator=generator).item()]
            texts = class_embeds(model, tokenizer, [template])
            embeds = image_embeds(model, pixels, keep=1.0 if full else keep)
            loss = contrastive_loss(embeds, texts, labels[index], model.logit_scale.exp().clamp(max=100))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        part = zero_shot_accuracy(model, tokenizer, test[0][:2000], test[1][:2000])
        print(
            f"clip epoch {epoch + 1}/{epochs} loss {total / steps:.3f} first-2000 accuracy {part:.3f} {time.time() - started:.0f} s",
            flush=True,
        )
        model.save_pretrained(output_dir)
    model = model.to(torch.bfloat16)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    build_image_processor().save_pretrained(output_dir)
    accuracy = zero_shot_accuracy(CLIPModel.from_pretrained(output_dir, dtype=torch.float32), tokenizer, *test)
    return {
        "task": "zero-shot CIFAR-10",
        "num_images": len(test[0]),
        "accuracy": accuracy,
        "epochs": epochs,
        "seed": seed,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "patches_kept": keep,
        "train_seconds": round(time.time() - started),
    }
