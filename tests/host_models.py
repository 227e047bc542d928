"""Real vision-language models of transformers at tiny size: one entry per kind of host, with inputs that fit it."""

from dataclasses import dataclass, field

import torch
import transformers as hf
from tiny_models import SHAPE, SIZE, images


IMAGE, VIDEO = 7, 8  # ids of the placeholder tokens
TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 39,
    "pad_token_id": 0,
}
PATCHES = (SIZE // SHAPE["patch_size"]) ** 2


def clip(**options):
    return hf.CLIPVisionConfig(**SHAPE | options)


def siglip(**options):
    return hf.SiglipVisionConfig(**SHAPE | {"vision_use_head": False} | options)


def pixtral():
    return hf.PixtralVisionConfig(**SHAPE | {"image_size": 2 * SIZE, "head_dim": 8})


def llama(**options):
    return hf.LlamaConfig(**TEXT | options)


def _llava(vision=None, **options):
    settings = {"image_token_index": IMAGE, "image_seq_length": PATCHES, "vision_feature_layer": -2}
    return hf.LlavaConfig(vision_config=vision or clip(), text_config=llama(), **settings | options)


def _anyres(config_class, vision=None, **options):
    settings = {"image_token_index": IMAGE, "image_grid_pinpoints": [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]}
    if config_class is not hf.LlavaNextConfig:
        settings["video_token_index"] = VIDEO
    return config_class(vision_config=vision or clip(), text_config=llama(), **settings | options)


def _gemma3():
    text = hf.Gemma3TextConfig(
        **TEXT, head_dim=12, sliding_window=64, layer_types=["sliding_attention", "full_attention"]
    )
    return hf.Gemma3Config(
        vision_config=siglip(), text_config=text, image_token_index=IMAGE, mm_tokens_per_image=4, boi_token_index=5,
        eoi_token_index=6,
    )  # fmt: skip


def _paligemma():
    text = hf.GemmaConfig(**TEXT, head_dim=12)
    return hf.PaliGemmaConfig(vision_config=siglip(), text_config=text, image_token_index=IMAGE, projection_dim=24)


def _internvl(config_class, vision_class, **options):
    vision = vision_class(**SHAPE | {"image_size": [SIZE, SIZE], "patch_size": [4, 4]}, use_qk_norm=False)
    return config_class(vision_config=vision, text_config=llama(), image_token_id=IMAGE, image_seq_length=4, **options)


def _cohere(config_class, **options):
    text = hf.Cohere2Config(**TEXT, sliding_window=64, layer_types=["sliding_attention", "full_attention"])
    token = {"image_token_id" if config_class is hf.Cohere2VisionConfig else "image_token_index": IMAGE}
    return config_class(vision_config=siglip(), text_config=text, **token, **options)


def _aria():
    vision = hf.Idefics3VisionConfig(**SHAPE)
    text = hf.AriaTextConfig(**TEXT, moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1)
    return hf.AriaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projector_patch_to_query_dict={PATCHES: 4}
    )


def _granite4_vision():
    return hf.Granite4VisionConfig(
        vision_config=siglip(hidden_size=64),  # its Q-Former has one head for each 64
        text_config=hf.Granite4VisionTextConfig(**TEXT),
        vision_feature_select_strategy="full",
        image_token_index=IMAGE,
        image_grid_pinpoints=[[SIZE, 2 * SIZE]],
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0], [1, 1]],
        spatial_vision_layer=3,  # layer -2 again
        spatial_target_layers=[0, 1],
    )


def _blip(config_class, kind):
    qformer = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
               "encoder_hidden_size": SHAPE["hidden_size"], "vocab_size": 40}  # fmt: skip
    text = hf.OPTConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
                        word_embed_proj_dim=24, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
                        eos_token_id=39)  # fmt: skip
    vision = getattr(hf, f"{kind}VisionConfig")(**SHAPE, initializer_range=0.02)
    qformer = getattr(hf, f"{kind}QFormerConfig")(**qformer)
    return config_class(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=IMAGE
    )


def _idefics():
    vision = {"embed_dim": 32, "image_size": SIZE, "patch_size": 4, "num_hidden_layers": 3, "intermediate_size": 48}
    perceiver = {"use_resampler": False}
    return hf.IdeficsConfig(
        **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"},
        additional_vocab_size=0,
        cross_layer_interval=1,
        vision_config=vision | {"num_attention_heads": 4},
        perceiver_config=perceiver,
        alpha_type="vector",
        alpha_initializer="ones",
    )


def _idefics2():
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8,
                 "num_key_value_heads": 2, "hidden_size": 24}  # fmt: skip
    return hf.Idefics2Config(
        vision_config=SHAPE, perceiver_config=perceiver, text_config=hf.MistralConfig(**TEXT), image_token_id=IMAGE
    )


def _idefics3(config_class):
    return config_class(vision_config=SHAPE, text_config=llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=0)


@dataclass(frozen=True)
class TinyHost:
    """A host class, its tiny configuration, and what its images look like.

    Args:
        images (`str`): `"plain"`, `"anyres"` (crops, with sizes), `"sized"` (padded, with sizes), `"nested"` (a list of images
            per prompt), `"one each"` (a single one per prompt).
        feature (tuple): the feature layer and first token that `attach` must find.
    """

    model: str
    config: callable
    feature: tuple
    images: str = "plain"
    extra: dict = field(default_factory=dict)

    def build(self, seed=3):
        torch.manual_seed(seed)
        host = getattr(hf, self.model)(self.config()).eval()
        for name, parameter in host.named_parameters():
            # As they are made, at or near zero, an image would not reach the logits.
            if "mm_input_projection_weight" in name or ("qformer" in name and parameter.ndim == 2):
                torch.nn.init.normal_(parameter, std=0.5)
        return host


HOSTS = {
    "llava": TinyHost("LlavaForConditionalGeneration", _llava, (-2, 1)),
    "llava-siglip": TinyHost(
        "LlavaForConditionalGeneration",
        lambda: _llava(siglip(), vision_feature_select_strategy="full", vision_feature_layer=-1),
        (-1, 0),
    ),
    "llava-pixtral": TinyHost(
        "LlavaForConditionalGeneration",
        lambda: _llava(pixtral(), vision_feature_select_strategy="full", vision_feature_layer=-1),
        (-1, 0),
        "sized",
    ),
    "llava_next": TinyHost(
        "LlavaNextForConditionalGeneration", lambda: _anyres(hf.LlavaNextConfig), (-2, 1), "anyres"
    ),
    "llava_next-layers": TinyHost(
        "LlavaNextForConditionalGeneration",
        lambda: _anyres(
            hf.LlavaNextConfig, siglip(), vision_feature_layer=[-4, 2, -1], vision_feature_select_strategy="full"
        ),
        ([-4, 2, -1], 0),
        "anyres",
    ),
    "llava_next_video": TinyHost(
        "LlavaNextVideoForConditionalGeneration", lambda: _anyres(hf.LlavaNextVideoConfig), (-2, 1), "anyres"
    ),
    "llava_onevision": TinyHost(
        "LlavaOnevisionForConditionalGeneration",
        lambda: _anyres(hf.LlavaOnevisionConfig, siglip()),
        (-1, 0),
        "anyres",
    ),
    "vipllava": TinyHost(
        "VipLlavaForConditionalGeneration",
        lambda: hf.VipLlavaConfig(
            vision_config=clip(), text_config=llama(), image_token_index=IMAGE, vision_feature_layer=[-2, -4, 4]
        ),
        ([-2, -4, 4], 1),
    ),
    "mistral3": TinyHost(
        "Mistral3ForConditionalGeneration",
        lambda: hf.Mistral3Config(
            vision_config=pixtral(),
            text_config=hf.MistralConfig(**TEXT, head_dim=12),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        ),
        (-1, 0),
        "sized",
    ),
    "mistral_large4": TinyHost(
        "MistralLarge4ForConditionalGeneration",
        lambda: hf.MistralLarge4Config(
            vision_config=pixtral(),
            text_config=hf.MistralLarge4TextConfig(
                **TEXT,
                moe_intermediate_size=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_rope_head_dim=4,
                qk_nope_head_dim=8,
                v_head_dim=12,
                max_position_embeddings=256,
            ),
            image_token_index=IMAGE,
        ),
        (-1, 0),
        "sized",
    ),
    "paligemma": TinyHost("PaliGemmaForConditionalGeneration", _paligemma, (None, 0), extra={"token_type_ids": 0}),
    "gemma3": TinyHost("Gemma3ForConditionalGeneration", _gemma3, (None, 0), extra={"token_type_ids": 0}),
    "internvl": TinyHost(
        "InternVLForConditionalGeneration", lambda: _internvl(hf.InternVLConfig, hf.InternVLVisionConfig), (None, 1)
    ),
    "internvl-layer": TinyHost(
        "InternVLForConditionalGeneration",
        lambda: _internvl(hf.InternVLConfig, hf.InternVLVisionConfig, vision_feature_layer=-2),
        (-2, 1),
    ),
    "qianfan_ocr": TinyHost(
        "QianfanOCRForConditionalGeneration",
        lambda: _internvl(hf.QianfanOCRConfig, hf.QianfanOCRVisionConfig),
        (None, 1),
    ),
    "aya_vision": TinyHost("AyaVisionForConditionalGeneration", lambda: _cohere(hf.AyaVisionConfig), (-1, 0)),
    "cohere2_vision": TinyHost(
        "Cohere2VisionForConditionalGeneration",
        lambda: _cohere(hf.Cohere2VisionConfig, alignment_intermediate_size=32),
        (None, 0),
    ),
    "aria": TinyHost("AriaForConditionalGeneration", _aria, (-1, 0)),
    "deepseek_vl": TinyHost(
        "DeepseekVLForConditionalGeneration",
        lambda: hf.DeepseekVLConfig(vision_config=siglip(), text_config=llama(), image_token_id=IMAGE),
        (None, 0),
    ),
    "lighton_ocr": TinyHost(
        "LightOnOcrForConditionalGeneration",
        lambda: hf.LightOnOcrConfig(
            vision_config=pixtral(), text_config=hf.Qwen3Config(**TEXT, head_dim=12), image_token_id=IMAGE
        ),
        (None, 0),
        "sized",
    ),
    "granite4_vision": TinyHost("Granite4VisionForConditionalGeneration", _granite4_vision, ([-2, 1], 0), "anyres"),
    "blip-2": TinyHost("Blip2ForConditionalGeneration", lambda: _blip(hf.Blip2Config, "Blip2"), (None, 0), "one each"),
    "instructblip": TinyHost(
        "InstructBlipForConditionalGeneration",
        lambda: _blip(hf.InstructBlipConfig, "InstructBlip"),
        (None, 0),
        "one each",
        extra={"qformer_input_ids": 3},
    ),
    "idefics": TinyHost("IdeficsForVisionText2Text", _idefics, (None, 0), "idefics"),
    "idefics2": TinyHost("Idefics2ForConditionalGeneration", _idefics2, (None, 0), "nested"),
    "idefics3": TinyHost(
        "Idefics3ForConditionalGeneration", lambda: _idefics3(hf.Idefics3Config), (None, 0), "nested"
    ),
    "smolvlm": TinyHost("SmolVLMForConditionalGeneration", lambda: _idefics3(hf.SmolVLMConfig), (None, 0), "nested"),
}


def vision_inputs(name, count, seed=2):
    """`count` images as the host's own processor would give them."""
    kind = HOSTS[name].images
    if kind == "anyres":
        # A thumbnail and two crops of each image.
        crops = images(3 * count, seed=seed).unflatten(0, (count, 3))
        return {"pixel_values": crops, "image_sizes": torch.tensor([[SIZE, 2 * SIZE]] * count)}
    if kind == "sized":
        # Padded to the largest, as PixtralImageProcessor does.
        sizes = [(SIZE, 2 * SIZE), (2 * SIZE, SIZE), (SIZE, SIZE)][:count]
        pixels = torch.zeros(count, 3, max(h for h, _ in sizes), max(w for _, w in sizes))
        for image, source, (height, width) in zip(pixels, images(count, 2 * SIZE, seed), sizes, strict=True):
            image[:, :height, :width] = source[:, :height, :width]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    return {"pixel_values": images(count, seed=seed)}


def _token_counts(host, name, inputs, count):
    """Placeholder tokens of each image, as many as the plain host makes features of it."""
    if HOSTS[name].images in ("nested", "one each"):
        return [4] * count
    with torch.no_grad():
        output = host.model.get_image_features(**inputs)
    features = output.deepstack_features[0][1] if hasattr(output, "deepstack_features") else output.pooler_output
    return [feature.shape[:-1].numel() for feature in features]


def host_inputs(host, name, prompts=1, images_per_prompt=1, seed=2):
    """Everything `forward` and `generate` take: one row of ids per prompt, with its images inside; the host is plain."""
    kind, count = HOSTS[name], prompts * images_per_prompt
    if kind.images == "one each":
        prompts, images_per_prompt = count, 1
    inputs = vision_inputs(name, count, seed)
    if kind.images == "idefics":
        ids = torch.tensor([[1, *[11] * 3 * images_per_prompt, 12]] * prompts)
        mask = torch.ones(prompts, ids.shape[1], images_per_prompt, dtype=torch.long)
        pixels = inputs["pixel_values"].unflatten(0, (prompts, images_per_prompt))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels,
            "image_attention_mask": mask,
        }
    counts = _token_counts(host, name, inputs, count)
    rows = []
    for prompt in range(prompts):
        row = [1]
        for image in range(prompt * images_per_prompt, (prompt + 1) * images_per_prompt):
            row += [*[IMAGE] * counts[image], 11]
        rows.append([*row, 12, 13])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    inputs |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if kind.images == "nested":
        inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (prompts, images_per_prompt))
    for extra in kind.extra:
        inputs[extra] = (ids == IMAGE).long() if "gemma3" in name else torch.full_like(ids, kind.extra[extra])
    return inputs
