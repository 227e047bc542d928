"""Give a LLaVA a robust CLIP (FARE, TeCoA) for a vision tower, smooth it, and caption an image at each step.

    fs-psm convert open-clip --checkpoint fare_eps_4.pt --no-projection --output fare4
    python examples/robust_clip_in_llava.py --model llava-hf/llava-1.5-7b-hf --tower fare4 --image photo.jpg

The tower may see images of another size than the host's own: FARE and TeCoA were trained at 224 px, which are 256 tokens
of the language model in place of the 576 of LLaVA-1.5's 336 px. `replace_tower` changes what must agree with it.
Saves the whole model with `--save DIR`; `LlavaForConditionalGeneration.from_pretrained(DIR)` loads it after
`import fs_psm_hf`.
"""

import argparse

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from fs_psm_hf import PSMModel, attach


def replace_tower(llava, processor, folder):
    """Put the CLIP vision model of `folder` into a LLaVA, in place, and its image processor into the LLaVA's processor.

    The projector and the language model stay as they are, so the tower must be as wide as the one before. Tokens are
    counted by the processor from the image it makes; a processor left as it was makes images that the tower refuses.

    Raises:
        ValueError: the widths differ; nothing is changed.
    """
    tower = CLIPVisionModel.from_pretrained(folder, dtype=llava.dtype).to(llava.device)
    width, needed = tower.config.hidden_size, llava.config.vision_config.hidden_size
    if width != needed:
        raise ValueError(f"`folder` must hold a tower of width {needed}, which the projector reads, got {width}")
    image_processor = AutoImageProcessor.from_pretrained(folder)
    llava.model.vision_tower = tower.train(llava.training)
    for config in (llava.config, llava.model.config):
        config.vision_config = tower.config
        config.image_seq_length = (tower.config.image_size // tower.config.patch_size) ** 2
    processor.image_processor = image_processor
    processor.patch_size = tower.config.patch_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/tiny-llava-cifar10")
    parser.add_argument("--tower", required=True, help="folder of `fs-psm convert open-clip`")
    parser.add_argument("--psm", default="none", help="a PSM that fits the tower; plain smoothing without")
    parser.add_argument("--image", required=True)
    parser.add_argument("--prompt", default="describe this image in one sentence.")
    parser.add_argument("--sigma", type=float, default=0.25, help="noise, in [0, 1] pixels")
    parser.add_argument("--num-samples", type=int, default=4, help="draws the served model averages")
    parser.add_argument("--save")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(args.model)
    llava = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=dtype).to(device)
    psm = None if args.psm == "none" else PSMModel.from_pretrained(args.psm)
    image = Image.open(args.image).convert("RGB")

    def caption(name):
        content = [{"type": "image"}, {"type": "text", "text": args.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt").to(device)
        count = (inputs["input_ids"] == llava.config.image_token_id).sum()
        tokens = llava.generate(**inputs, max_new_tokens=40, do_sample=False)
        words = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"{name} ({inputs['pixel_values'].shape[-1]} px, {count} image tokens): {words}")

    caption("its own tower")
    replace_tower(llava, processor, args.tower)
    caption("robust tower")
    attach(llava, psm, sigma=args.sigma, num_samples=args.num_samples, processor=processor)
    caption("robust and smoothed")
    if args.save:
        llava.save_pretrained(args.save)
        processor.save_pretrained(args.save)


if __name__ == "__main__":
    main()
