"""Train the small real models that the repository carries: CLIP, denoiser, LLaVA.

python examples/tiny/train.py --data DIR_WITH_CIFAR10_PARQUET --output model_cards
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch


STAGES = ("clip", "denoiser", "llava")
COMMAND = "python examples/tiny/train.py --data DIR_WITH_CIFAR10_PARQUET --output model_cards --only {stage}"
RESULTS = {"clip": "zero_shot", "denoiser": "denoising", "llava": "captioning"}
FRONT_MATTER = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: {pipeline_tag}
tags:
- cifar10
- tiny
- fs-psm
datasets:
- cifar10
---
"""
CLOSING = """
Trained on CIFAR-10 only (32-pixel pictures of ten classes), for tests, demonstrations and research, not for use on real
pictures. The licence is that of the weights. Settings, seed and versions are in `{results_file}`. Made by

    {command}
"""
BODIES = {
    "clip": """
# tiny-clip-cifar10

A `CLIPModel` (ViT of width 128, depth 6, patch 4, 32-pixel images; two-layer text tower) trained contrastively on
CIFAR-10 with caption templates, with tokenizer and image processor. Weights in bfloat16.

| zero-shot, CIFAR-10 test | value |
| --- | --- |
| images | {num_images} |
| accuracy | {accuracy:.2%} |
""",
    "denoiser": """
# tiny-denoiser-cifar10

A `PSMModel` of `fs_psm_hf` (`import fs_psm_hf` before `AutoModel`) without a mapper: a U-Net denoiser with
{num_parameters:,} parameters for 32-pixel images, conditioned on the noise level. σ is in [0, 1] pixel units; training
levels lie around 0.12, from {sigma_range[0]} to {sigma_range[1]}. Weights in bfloat16. Mean PSNR over {num_images}
CIFAR-10 test images, nothing clipped:

| σ | noisy, dB | denoised, dB |
| --- | --- | --- |
{rows}
""",
    "llava": """
# tiny-llava-cifar10

A `LlavaForConditionalGeneration` with {num_parameters:,} parameters: the vision tower of `tiny-clip-cifar10`, frozen
(features of layer −2, patch tokens only), a projector and a three-layer LLaMA of width 128, trained from scratch to
caption CIFAR-10. It knows two questions, "{question}" (answer: "a photo of a truck.") and
"what is in the picture?" (answer: "a truck."). Weights in bfloat16.

| greedy captions, CIFAR-10 test | value |
| --- | --- |
| images | {num_images} |
| right class | {caption_accuracy:.2%} |
| one of the ten captions | {valid_captions:.2%} |

It names one of the ten classes whatever the picture shows.
""",
}
PIPELINE_TAGS = {"clip": "zero-shot-image-classification", "denoiser": "image-to-image", "llava": "image-text-to-text"}


def run_stage(stage, data_dir, output_dir):
    """Train one model in `output_dir/tiny-<stage>-cifar10`, then write its results and its card."""
    folder = output_dir / f"tiny-{stage}-cifar10"
    folder.mkdir(parents=True, exist_ok=True)
    # Imported here: CLIP and LLaVA need nothing of the package itself.
    if stage == "clip":
        import clip

        results = clip.train(data_dir, folder)
    elif stage == "denoiser":
        import denoiser

        results = denoiser.train(data_dir, folder)
    else:
        import llava

        results = llava.train(data_dir, output_dir / "tiny-clip-cifar10", folder)
    results["threads"] = torch.get_num_threads()
    write_results(stage, folder, results)


def write_results(stage, folder, results):
    """`results/<name>.json` with versions and command, and the card made from it."""
    names = ("torch", "transformers", "diffusers", "tokenizers")
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    results = results | {"versions": versions, "command": COMMAND.format(stage=stage)}
    path = folder / "results" / f"{RESULTS[stage]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    (folder / "README.md").write_text(render_card(stage, json.loads(path.read_text())))


def render_card(stage, results):
    """The model card: every number comes from `results`."""
    rows = ""
    if stage == "denoiser":
        line = "| {} | {noisy_psnr_db:.2f} | {denoised_psnr_db:.2f} |"
        rows = "\n".join(line.format(sigma, **values) for sigma, values in results["sigma"].items())
    values = results | {"rows": rows, "results_file": f"results/{RESULTS[stage]}.json"}
    front = FRONT_MATTER.format(pipeline_tag=PIPELINE_TAGS[stage])
    return front + BODIES[stage].format(**values) + CLOSING.format(**values)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets one folder per model")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=STAGES, help="llava needs a trained clip in --output"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options = parser.parse_args()
    missing = [name for name in ("train.parquet", "test.parquet") if not (options.data / name).is_file()]
    if missing:
        parser.error(
            f"`--data` must be a folder with train.parquet and test.parquet, {options.data} lacks {missing[0]}"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    for stage in STAGES:
        if stage in options.only:
            run_stage(stage, options.data, options.output)


if __name__ == "__main__":
    main()
