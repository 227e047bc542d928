"""Caption an image with a LLaVA whose vision tower is smoothed, and certify what its language model reads.

    python examples/plug_into_llava.py --image photo.jpg                       # the embedded tiny LLaVA
    python examples/plug_into_llava.py --model llava-hf/llava-1.5-7b-hf --psm user/psm --sigma 0.25 --image photo.jpg

Saves the whole model with `--save DIR`; `LlavaForConditionalGeneration.from_pretrained(DIR)` loads it after
`import fs_psm_hf`.
"""

import argparse

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fs_psm_hf import PSMModel, attach, certify_features


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/tiny-llava-cifar10")
    parser.add_argument("--psm", default="model_cards/fs-psm-tiny-clip-cifar10", help="'none' for plain smoothing")
    parser.add_argument("--image", required=True)
    parser.add_argument("--prompt", default="describe this image in one sentence.")
    parser.add_argument("--sigma", type=float, default=0.25, help="noise, in [0, 1] pixels")
    parser.add_argument("--num-samples", type=int, default=4, help="draws the served model averages")
    parser.add_argument("--certify", type=int, default=1000, help="draws for the certificate, 0 for none")
    parser.add_argument("--save")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(args.model)
    llava = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=dtype).to(device)
    psm = None if args.psm == "none" else PSMModel.from_pretrained(args.psm)

    content = [{"type": "image"}, {"type": "text", "text": args.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(args.image).convert("RGB"), text=text, return_tensors="pt").to(device)

    def caption():
        tokens = llava.generate(**inputs, max_new_tokens=40, do_sample=False)
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    print("plain:   ", caption())
    tower = attach(llava, psm, sigma=args.sigma, num_samples=args.num_samples, processor=processor)
    print("smoothed:", caption())
    if args.certify:
        (certificate,) = certify_features(tower, inputs["pixel_values"], num_samples=args.certify, progress=True)
        print(certificate)
    if args.save:
        llava.save_pretrained(args.save)
        processor.save_pretrained(args.save)


if __name__ == "__main__":
    main()
