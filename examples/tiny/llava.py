"""A `LlavaForConditionalGeneration` on the small CLIP's frozen vision tower: projector and LLaMA learn to caption."""

import time

import torch
from data import (
    CLASSES,
    IMAGE_SIZE,
    augment,
    build_image_processor,
    build_tokenizer,
    load_cifar10,
    normalise,
    with_article,
)
from PIL import Image
from tokenizers import processors
from transformers import (
    CLIPModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    get_cosine_schedule_with_warmup,
)


# Each question has one answer per class, so that greedy decoding is as definite as the picture.
ANSWERS = {
    "describe this image in one sentence.": "a photo of {}.",
    "what is in the picture?": "{}.",
}
QUESTION = "describe this image in one sentence."
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if not loop.first %} {% endif -%}
    {{- message['role'] | upper + ': ' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}{{- '<|endoftext|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"""


def build_processor(vision_config):
    """The tokenizer is CLIP's, except that a prompt is not ended: the language model goes on from it."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 256
    return LlavaProcessor(
        image_processor=build_image_processor(),
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(vision, tokenizer):
    """LLaVA with a three-layer LLaMA of width 128 and a frozen copy of the `CLIPVisionModel`."""
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=16,
    )
    return model


def conversation(question, answer=None):
    """Messages of one picture and one question, answered or not."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def to_pil(images):
    """Uint8 images (B, 3, H, W) -> list of PIL images."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


def encode_conversations(processor):
    """Every question with every class's answer, question-major: input_ids and labels of shape (Q*10, T).

    Padded on the right, where causal attention needs no mask. Only the answer and the end after it are labelled.
    """
    blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    prompts, texts = [], []
    for question, answer in ANSWERS.items():
        for name in CLASSES:
            filled = conversation(question, answer.format(with_article(name)))
            prompts.append(processor.apply_chat_template(filled[:1], add_generation_prompt=True))
            texts.append(processor.apply_chat_template(filled))
    batch = processor(text=texts, images=[blank] * len(texts), padding=True, padding_side="right", return_tensors="pt")
    lengths = [len(ids) for ids in processor(text=prompts, images=[blank] * len(prompts))["input_ids"]]
    positions = torch.arange(batch["input_ids"].shape[1])
    answered = (positions >= torch.tensor(lengths)[:, None]) & batch["attention_mask"].bool()
    return batch["input_ids"], batch["input_ids"].where(answered, -100)


@torch.no_grad()
def caption(model, processor, images, batch_size=250):
    """Greedy captions of uint8 images (B, 3, 32, 32), through the processor as a user would."""
    prompt = processor.apply_chat_template(conversation(QUESTION), add_generation_prompt=True)
    captions = []
    for batch in images.split(batch_size):
        inputs = processor(text=[prompt] * len(batch), images=to_pil(batch), return_tensors="pt").to(model.dtype)
        tokens = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        captions += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return captions


def caption_accuracy(captions, labels):
    """(share that names the right class, share that is one of the ten captions)."""
    answers = [ANSWERS[QUESTION].format(with_article(name)) for name in CLASSES]
    right = sum(text == answers[label] for text, label in zip(captions, labels.tolist(), strict=True))
    return right / len(captions), sum(text in answers for text in captions) / len(captions)


def train(data_dir, clip_dir, output_dir, epochs=2, batch_size=64, learning_rate=2e-3, num_test_images=2000, seed=0):
    """Train projector and LLaMA on flipped and shifted images, save in bfloat16 and measure; returns the results."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_cifar10(data_dir, "train")
    vision = CLIPModel.from_pretrained(clip_dir, dtype=torch.float32).vision_model
    processor = build_processor(vision.config)
    model = build_model(vision, processor.tokenizer)
    input_ids, targets = encode_conversations(processor)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    steps = len(images) // batch_size
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, epochs * steps)
    started = time.time()
    model.model.vision_tower.eval()
    for epoch in range(1, epochs + 1):
        order, total = torch.randperm(len(images), generator=generator), 0.0
        for step in range(steps):
            index = order[step * batch_size : (step + 1) * batch_size]
            row = torch.randint(len(ANSWERS), (batch_size,), generator=generator) * len(CLASSES) + labels[index]
            loss = model(
                input_ids=input_ids[row],
                pixel_values=normalise(augment(images[index], generator)),
                labels=targets[row],
            ).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
            if (step + 1) % 100 == 0:
                seconds = time.time() - started
                print(
                    f"llava epoch {epoch} step {step + 1}/{steps} loss {total / 100:.3f} {seconds:.0f} s", flush=True
                )
                total = 0.0
    seconds = round(time.time() - started)
    test_images, test_labels = (part[:num_test_images] for part in load_cifar10(data_dir, "test"))
    trained_accuracy, _ = caption_accuracy(caption(model.eval(), processor, test_images), test_labels)
    model.to(torch.bfloat16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    reloaded = LlavaForConditionalGeneration.from_pretrained(output_dir, dtype=torch.bfloat16).eval()
    captions = caption(reloaded, LlavaProcessor.from_pretrained(output_dir), test_images)
    accuracy, valid = caption_accuracy(captions, test_labels)
    return {
        "task": "captioning CIFAR-10 test images, greedy",
        "question": QUESTION,
        "num_images": len(test_images),
        "caption_accuracy": accuracy,
        "valid_captions": valid,
        "caption_accuracy_float32": trained_accuracy,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "bfloat16",
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "train_seconds": seconds,
    }
