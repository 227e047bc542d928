"""Caption an image with an OpenFlamingo before and after its vision encoder is smoothed, and certify what it reads.

    pip install 'fs-psm-hf[openflamingo]' && pip install --no-deps open-flamingo==2.0.1
    python examples/plug_into_openflamingo.py --image photo.jpg --psm user/psm-for-openflamingo

The defaults are those of OpenFlamingo-9B. Three things to know:

- open_clip's `ViT-L-14-quickgelu`, not its `ViT-L-14`, is the network of OpenAI's weights and of FARE and TeCoA.
- `anas-awadalla/mpt-7b` brings code of its own for an older transformers. Where that fails, download it, delete
  `auto_map` from its config.json and give the folder: transformers has the same network.
- A PSM with a mapper must be one trained with `--preset openflamingo`; without `--psm` the smoothing is plain.
"""

import argparse
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from PIL import Image

from fs_psm_hf import PSMModel, attach, certify_features
from fs_psm_hf.openflamingo import prepare_open_flamingo, warn_of_plain_gelu


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision-encoder", default="ViT-L-14-quickgelu", help="open_clip's name of the network")
    parser.add_argument(
        "--vision-weights", default="openai", help="open_clip's tag, a file, or 'none' for random ones"
    )
    parser.add_argument("--vision-config", type=Path, help="open_clip configuration (.json) to register first")
    parser.add_argument("--language-model", default="anas-awadalla/mpt-7b", help="Hub id or folder")
    parser.add_argument("--tokenizer", help="Hub id or folder; the language model's where not given")
    parser.add_argument("--cross-attn-every-n-layers", type=int, default=4)
    parser.add_argument(
        "--checkpoint",
        default="openflamingo/OpenFlamingo-9B-vitl-mpt7b",
        help="resampler and cross-attention: Hub id with a checkpoint.pt, or a file",
    )
    parser.add_argument("--psm", default="none", help="Hub id or folder; 'none' for plain smoothing")
    parser.add_argument("--image", required=True)
    parser.add_argument("--prompt", default="<image>An image of")
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--sigma", type=float, default=0.25, help="noise, in [0, 1] pixels")
    parser.add_argument("--num-samples", type=int, default=4, help="draws the served model averages")
    parser.add_argument("--certify", type=int, default=1000, help="draws for the certificate, 0 for none")
    return parser.parse_args(arguments)


def load_checkpoint(host, name_or_path):
    """The trained parts of an OpenFlamingo; what it took from its vision encoder and language model is not in the file."""
    path = name_or_path if Path(name_or_path).is_file() else hf_hub_download(name_or_path, "checkpoint.pt")
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("model_state_dict", state)  # beside the optimizer, as training leaves it
    state = {key.removeprefix("module."): value for key, value in state.items()}
    unexpected = host.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise SystemExit(
            f"{name_or_path} does not fit: {len(unexpected)} weights are left over, {unexpected[0]} first"
        )
    # Their weights have two names each, as a part of the language model and in a list beside it.
    names = [name for name, _ in host.named_parameters(remove_duplicate=False) if name in state]
    loaded = {id(host.get_parameter(name)) for name in names}
    own = [name for name, _ in host.named_parameters() if "perceiver." in name or "gated_cross_attn" in name]
    missing = [name for name in own if id(host.get_parameter(name)) not in loaded]
    if missing:
        raise SystemExit(f"{name_or_path} does not fit: {len(missing)} weights are missing, {missing[0]} first")


def main(arguments=None):
    args = parse(arguments)
    open_flamingo = prepare_open_flamingo()
    if args.vision_config:
        import open_clip

        open_clip.add_model_config(args.vision_config)
    host, processor, tokenizer = open_flamingo.create_model_and_transforms(
        clip_vision_encoder_path=args.vision_encoder,
        clip_vision_encoder_pretrained=None if args.vision_weights == "none" else args.vision_weights,
        lang_encoder_path=args.language_model,
        tokenizer_path=args.tokenizer or args.language_model,
        cross_attn_every_n_layers=args.cross_attn_every_n_layers,
    )
    load_checkpoint(host, args.checkpoint)
    warn_of_plain_gelu(host, args.vision_weights, args.vision_encoder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    host = host.to(device, dtype).eval()
    psm = None if args.psm == "none" else PSMModel.from_pretrained(args.psm)

    pixels = processor(Image.open(args.image).convert("RGB"))[None].to(device)  # (1, 3, H, W), float32
    tokenizer.padding_side = "left"
    prompt = tokenizer([args.prompt], return_tensors="pt").to(device)
    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}

    def caption():
        tokens = host.generate(
            vision_x=pixels.to(dtype)[:, None, None],  # (prompts, images, frames, 3, H, W)
            lang_x=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
        return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    print("plain:   ", caption())
    tower = attach(host, psm, sigma=args.sigma, num_samples=args.num_samples, processor=processor)
    print("smoothed:", caption())
    if args.certify:
        (certificate,) = certify_features(tower, pixels, num_samples=args.certify, progress=True)
        print(certificate)


if __name__ == "__main__":
    main()
