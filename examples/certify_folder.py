"""Certify the images of a folder from Python and print the paper's columns: plug-in beside certificate.

    python examples/certify_folder.py --vision-tower DIR_OR_ID --images DIR --sigma 0.25

For long runs use `fs-psm certify`, which writes every image as it is done and resumes.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from fs_psm_hf import SmoothedVisionTower, certify_scores
from fs_psm_hf.certification import draw_scores, format_table, null_level


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision-tower", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--sigma", type=float, default=0.25, help="noise, in [0, 1] pixels")
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--feature", default="tokens")
    args = parser.parse_args()

    processor = AutoImageProcessor.from_pretrained(args.vision_tower)
    tower = SmoothedVisionTower.from_components(
        AutoModel.from_pretrained(args.vision_tower), None, sigma=args.sigma, processor=processor
    )
    paths = sorted(path for path in args.images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    pixels = torch.cat([processor(images=picture, return_tensors="pt")["pixel_values"] for picture in pictures])

    certificates = []
    for draws in draw_scores(tower, pixels, feature=args.feature):
        scores = draws.take(args.num_samples)  # the same draws serve both methods
        for method in ("cdf", "plugin"):
            certificate = certify_scores(scores, sigma=args.sigma, method=method)
            certificates.append(dataclasses.replace(certificate, **draws.record))
    null = null_level(tower.clean_features(pixels, args.feature)) if len(pixels) > 1 else None
    print(format_table(certificates, null_cosine=null))


if __name__ == "__main__":
    main()
