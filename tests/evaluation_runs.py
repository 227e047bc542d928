"""Small real evaluations: a folder of images with labels and targets, tiny encoders of transformers, the embedded LLaVA."""

import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_models import MEAN, SIZE, STD, psm_model, vision_model

from fs_psm_hf.evaluation.run_config import parse_config


ROOT = Path(__file__).parents[1]
CLASSES = ["red", "green", "blue"]


def save_pictures(folder, count=5, size=SIZE, seed=0, targets=True):
    """Smooth pictures whose class is their strongest colour, with metadata.csv; `target_file` is one of another class."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        coarse = generator.uniform(0, 110, (4, 4, 3))
        coarse[..., number % 3] += 120
        name = f"{number}.png"
        Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC).save(folder / name)
        rows.append({"file_name": name, "label": number % 3, "label_name": CLASSES[number % 3]})
    for number, row in enumerate(rows):
        row |= {"target_file": f"{(number + 1) % count}.png"} if targets else {}
    with open(folder / "metadata.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def save_encoder(folder, seed=0):
    """A DINOv2 with its image processor, as a model folder holds them."""
    vision_model("dinov2", seed).save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": SIZE}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_world(root):
    """Images, labelled images for a head, two encoders and a PSM."""
    save_pictures(root / "images")
    save_pictures(root / "labelled", count=12, seed=7, targets=False)
    save_encoder(root / "plain")
    save_encoder(root / "robust", seed=5)
    psm_model(feature="tokens").save_pretrained(root / "psm")
    return root


def head_values(root, **changes):
    """Values of a configuration: every row, attacks of all modes, few steps."""
    smoothed = {"sigma": 0.1, "num_samples": 2}
    psm = str(root / "psm")
    return {
        "name": "small",
        "seed": 3,
        "batch_size": 2,
        "image_size": SIZE,
        "task": {
            "kind": "head", "images": str(root / "images"), "head_images": str(root / "labelled"), "limit": 5,
            "options": {"class_names": CLASSES},
        },
        "models": [
            {
                "name": "tiny",
                "encoders": {"org": str(root / "plain")},
                "dtype": "float32",
                "feature": "cls",
                "rows": [
                    {"row": "Org"},
                    {"row": "FS", **smoothed},
                    {"row": "FS+M", "psm": psm, **smoothed},
                    {"row": "FS+P", "psm": psm, "purifier": "light", **smoothed},
                    {"row": "FS+P+M", "psm": psm, "purifier": "light", **smoothed},
                    {"row": "FS", "sigma": 0, "num_samples": 1},
                ],
            }
        ],
        "attacks": [
            {"method": "attackvlm", "epsilon": "16/255", "steps": 3},
            {
                "method": "attackvlm", "mode": "adaptive", "epsilon": "16/255", "steps": 2, "draws": 8, "limit": 3,
                "sigmas": [0.1], "rows": ["FS+M", "FS+P+M"], "gradients": ["end-to-end", "straight-through"],
            },
            {"method": "attackvlm", "mode": "adaptive", "epsilon": "16/255", "steps": 3, "draws": 1, "sigmas": [0], "limit": 3},
        ],
    } | changes  # fmt: skip


def head_config(root, **changes):
    return parse_config(head_values(root, **changes))


def caption_values(images, **changes):
    """The embedded LLaVA, plain and smoothed, one attack each way."""
    cards = ROOT / "model_cards"
    words = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return {
        "name": "captions",
        "batch_size": 4,
        "image_size": 32,
        "task": {"kind": "captioning", "images": str(images), "options": {"prompt": "describe this image in one sentence."}},
        "judge": {"kind": "keyword", "keywords": words},
        "models": [
            {
                "name": "tiny-LLaVA", "host": str(cards / "tiny-llava-cifar10"), "dtype": "float32", "layer": -2,
                "rows": [
                    {"row": "Org"},
                    {
                        "row": "FS+P+M", "psm": str(cards / "fs-psm-tiny-clip-cifar10"), "num_samples": 2,
                        "purifier": "light",
                    },
                ],
            }
        ],
        "attacks": [{"method": "attackvlm", "epsilon": "32/255", "steps": 3}],
    } | changes  # fmt: skip


def picture(path):
    """A picture as [0, 1] pixels `(3, H, W)`, read by PIL alone."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
