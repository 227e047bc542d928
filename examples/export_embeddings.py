"""Export what the language model reads: smoothed image embeddings, for servers that take embeddings instead of pixels.

    python examples/export_embeddings.py --host smoothed-llava --images photo.jpg folder --output embeddings
    python examples/export_embeddings.py --host llava-hf/llava-1.5-7b-hf --psm user/psm --images folder --output embeddings

For each image `NAME.safetensors` with one tensor, `image_embeds` of shape `(tokens, width)` in the host's dtype: the
smoothed features behind the host's own projector, in the order of its image tokens (crops, line breaks and all, for a
LLaVA-NeXT). `NAME.json` beside it says how they were made and is written last: where it stands, the image is done.
A prompt must hold as many image tokens as there are rows. In transformers they replace the embeddings of those tokens
(`inputs_embeds`); vLLM takes them as `multi_modal_data={"image": image_embeds[None]}`, or base64-encoded as the
`image_embeds` of a chat message, from a server started with `--enable-mm-embeds`. vLLM was not run where this was written.

A file holds one draw of the smoothing noise. It is about the image as it was exported: a server that takes embeddings
takes any embedding, so let it take them from the exporter alone.
"""

import argparse
import inspect
import json
import os
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import fs_psm_hf
from fs_psm_hf import PSMModel, SmoothedVisionTower, attach
from fs_psm_hf.certification.identity import describe, psm_name, short_name
from fs_psm_hf.host_kinds import find_tower
from fs_psm_hf.inputs import list_images


def load(host_name, psm=None, sigma=None, num_samples=None, dtype="auto", device="cpu"):
    """A host with a smoothed tower, its tower and its processor; what is `None` stays as an already smoothed host has it.

    Raises:
        ValueError: a PSM for a host that is smoothed already, or a setting out of range.
    """
    host = AutoModelForImageTextToText.from_pretrained(host_name, dtype=dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(host_name)
    settings = {"sigma": sigma, "num_samples": num_samples}
    settings = {name: value for name, value in settings.items() if value is not None}
    tower = find_tower(host).tower
    if not isinstance(tower, SmoothedVisionTower):
        psm = None if psm in (None, "none") else PSMModel.from_pretrained(psm)
        return host, attach(host, psm, processor=processor, **settings), processor
    if psm is not None:
        raise ValueError(f"`--psm` must not be given for a host that is smoothed already, got {psm}")
    for name, value in settings.items():
        setattr(tower, name, value)
    return host, tower, processor


@torch.no_grad()
def embed(host, processor, picture):
    """The rows that take the place of an image's tokens, `(tokens, width)`, by the host's own method."""
    inputs = processor.image_processor(images=picture, return_tensors="pt").to(host.device)
    taken = inspect.signature(host.get_image_features).parameters
    output = host.get_image_features(**{name: value for name, value in inputs.items() if name in taken})
    features = output.pooler_output
    if len(features) != 1:
        raise ValueError(f"`--host` must give one block of embeddings for an image, got {len(features)}")
    return features[0]


def export(host, tower, processor, path, output, host_name):
    """Write the embeddings of one image file, whole or not at all, and return how many there are.

    Raises:
        OSError: the file is missing or is no image.
    """
    with Image.open(path) as image:
        rows = embed(host, processor, image.convert("RGB"))
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "image": path.name,
        "tokens": rows.shape[0],
        "width": rows.shape[1],
        "dtype": str(rows.dtype).removeprefix("torch."),
        "host": short_name(host_name),
        "psm": psm_name(tower),
        "sigma": tower.sigma,
        "num_samples": tower.num_samples,
        "tower": describe(tower),
        "versions": {module.__name__: module.__version__ for module in (fs_psm_hf, transformers, torch)},
    }
    unfinished = output / f"{path.name}.tmp"
    save_file({"image_embeds": rows.contiguous().cpu()}, unfinished)
    (output / f"{path.name}.json").unlink(missing_ok=True)  # of other settings, if there is one
    os.replace(unfinished, output / f"{path.name}.safetensors")
    unfinished.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, output / f"{path.name}.json")
    return len(rows)


def image_files(given):
    """The files that are named, and those of the folders that are.

    Raises:
        ValueError: a folder without images, or two files whose embeddings would have one name.
    """
    files = []
    for path in given:
        files += [path / name for name in list_images(path, None, None)] if path.is_dir() else [path]
    names = [path.name for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`--images` must have names of their own, got {twice[0]} twice")
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, help="a vision-language model, smoothed already or not")
    parser.add_argument("--psm", help="for a host that is not smoothed yet; plain smoothing where not given")
    parser.add_argument("--sigma", type=float, help="noise, in [0, 1] pixels; the host's where not given, or 0.25")
    parser.add_argument("--num-samples", type=int, help="draws that are averaged; the host's where not given, or 4")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="files, and folders of them")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--dtype", default="auto", help="the host's where not given")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        files = image_files(args.images)
        host, tower, processor = load(args.host, args.psm, args.sigma, args.num_samples, args.dtype, device)
        for path in files:
            print(f"{path.name}: {export(host, tower, processor, path, args.output, args.host)} tokens")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
