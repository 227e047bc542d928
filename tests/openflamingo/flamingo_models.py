"""Real OpenFlamingos at tiny size, made by the package's own factory from files, with random weights of a fixed seed."""

import json

import open_clip
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from fs_psm_hf.openflamingo import prepare_open_flamingo


open_flamingo = prepare_open_flamingo()

SIZE, PATCH, WIDTH, TOKENS = 28, 7, 64, 16
VISION = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": 3, "head_width": 16, "mlp_ratio": 2.0}
TEXT = {"context_length": 8, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1}
LANGUAGE_MODELS = ("opt", "llama", "gpt_neox", "mpt")


def register_vision(folder):
    """Tiny encoders among open_clip's own: `tiny` and `tiny-quickgelu`, as with its `ViT-L-14`."""
    for name, quick in (("tiny", False), ("tiny-quickgelu", True)):
        config = {"embed_dim": 32, "quick_gelu": quick, "vision_cfg": VISION, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


def save_language_model(kind, folder):
    """A language model and its byte-level tokenizer, trained on one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["</s>"])
    tokenizer.train_from_iterator(["An image of a cat on a mat. An image of a dog in the fog."], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="</s>", padding_side="left")
    fast.save_pretrained(folder)
    common = {"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = common | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(5)
    model = {
        "opt": lambda: OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=48)),
        "mpt": lambda: MptForCausalLM(MptConfig(**common, d_model=32, n_layers=2, n_heads=2, max_seq_len=64)),
    }[kind]()
    model.save_pretrained(folder)


def open_gates(host):
    """Let images through: the gates of the cross-attention start at zero, where a Flamingo sees no image."""
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if name.endswith(("attn_gate", "ff_gate")):
                parameter.fill_(1.5)


def flamingo(folder, vision="tiny-quickgelu"):
    """A host with the language model in `folder`, its image processor and its tokenizer."""
    torch.manual_seed(6)
    host, processor, tokenizer = open_flamingo.create_model_and_transforms(
        vision, None, str(folder), str(folder), cross_attn_every_n_layers=1
    )
    # Far from what the factory starts with, where LayerNorm is the identity and an activation hardly bends.
    with torch.no_grad():
        for name, parameter in host.vision_encoder.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.5
            offset = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(offset + scale * torch.randn_like(parameter))
    open_gates(host)
    return host.eval(), processor, tokenizer


def flamingo_inputs(tokenizer, prompts=1, images=1, seed=7):
    """Prompts with some images each."""
    texts = ["<image>An image of a cat.<|endofchunk|>" * (images - 1) + "<image>An image of" for _ in range(prompts)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    generator = torch.Generator().manual_seed(seed)
    vision_x = torch.randn(prompts, images, 1, 3, SIZE, SIZE, generator=generator)
    return {"vision_x": vision_x, "lang_x": batch["input_ids"], "attention_mask": batch["attention_mask"]}
