"""The demo: a small real LLaVA captions images through its plain and its smoothed tower, with a certificate for each."""

import dataclasses
import json
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from .certification import Certificate, certify_scores, draw_scores, null_level
from .hosts import attach
from .modeling_psm import PSMModel
from .noise import gaussian_noise, resolve_seed
from .pixels import channel_tensor, to_unit
from .plots import new_figure, plot_rows


LLAVA = "tiny-llava-cifar10"
PSM = "fs-psm-tiny-clip-cifar10"
RESULTS = Path("results") / "captioning.json"
QUESTION = "describe this image in one sentence."
SIGMA = 0.25
NUM_SAMPLES = 4
# A fine grid for the curves; the confidence of a certificate covers all of it at once.
EPSILONS = tuple(step / 100 for step in range(61))
TABLE_EPSILONS = (0.1, 0.2, 0.3)
# What attacks on vision-language models commonly allow every pixel.
ATTACK_BUDGET = 16 / 255


@dataclasses.dataclass(frozen=True)
class DemoImage:
    """One image of the demo.

    Args:
        name (`str`): what it shows.
        kind (`str`): `"photograph"` or `"drawing"`.
        image (`PIL.Image.Image`): a square picture, of any size.
    """

    name: str
    kind: str
    image: Image.Image


@dataclasses.dataclass(frozen=True)
class DemoRecord:
    """What the demo found for one image; `plugin` is the paper's estimate on the same draws, without a confidence."""

    name: str
    kind: str
    plain_caption: str
    smoothed_caption: str
    certificate: Certificate
    plugin: Certificate


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found; `str` of it says so in plain words.

    Args:
        records (`list[DemoRecord]`): one per image.
        null_cosine (`float`): mean cosine of the clean features of different images.
        image_size (`int`): height and width that the tower sees.
        results (`dict`): how the language model was measured, as written when it was trained.
        output (`Path`): the picture.
    """

    records: list[DemoRecord]
    null_cosine: float
    image_size: int
    results: dict
    output: Path

    def __str__(self) -> str:
        words = [textwrap.fill(text, 118, initial_indent="- ", subsequent_indent="  ") for text in _words(self)]
        return "\n".join([*_table(self), "", *words])


def run(models, output, *, num_samples: int = 1000, alpha: float = 1e-3, generator=None, progress: bool = False):
    """Caption and certify the demo's images, and draw a picture of it; nothing is downloaded.

    Args:
        models (`str` or `os.PathLike`): folder with the embedded models, `model_cards` in the repository.
        output (`str` or `os.PathLike`): PNG file to write.
        num_samples (`int`): noisy draws per certificate.
        alpha (`float`): error probability of each certificate.
        generator (`torch.Generator`, `int` or `None`): source of the noise in certificates and picture; `None` is the
            operating system. The smoothed captions draw noise of their own, as when the model is served.
        progress (`bool`): show a bar over the draws.

    Returns:
        [`DemoResult`]: its `str` is what to tell a person.

    Raises:
        ImportError: if matplotlib or scikit-image is not installed.
        ValueError: if `models` lacks a model, or the folder of `output` does not exist.
    """
    models, output = Path(models), Path(output)
    needed = [Path(LLAVA) / "config.json", Path(LLAVA) / RESULTS, Path(PSM) / "config.json"]
    missing = [name.as_posix() for name in needed if not (models / name).is_file()]
    if missing:
        raise ValueError(
            f"`models` must be a folder with the embedded models, {str(models)!r} lacks {', '.join(missing)}: run the "
            "demo in the repository's root or give its `model_cards` folder"
        )
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise ValueError(f"`output` must be a .png file in a folder that exists, got {str(output)!r}")
    new_figure(1, 1)  # a missing matplotlib is noticed now, not after a minute
    pictures = demo_images()

    # Float32: the weights are stored in bfloat16, which few CPUs compute fast.
    llava = LlavaForConditionalGeneration.from_pretrained(models / LLAVA, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(models / LLAVA)
    psm = PSMModel.from_pretrained(models / PSM, dtype=torch.float32)
    inputs = encode(processor, [picture.image for picture in pictures])
    plain = caption(llava, processor, inputs)
    tower = attach(llava, psm, sigma=SIGMA, num_samples=NUM_SAMPLES, processor=processor)
    smoothed = caption(llava, processor, inputs)

    pixel_values = inputs["pixel_values"]
    null_cosine = null_level(tower.clean_features(pixel_values))
    seed = resolve_seed(generator)
    bar = tqdm(total=len(pictures) * num_samples, unit="draw", disable=not progress)
    stream = draw_scores(tower, pixel_values, generator=seed, progress=bar)
    records, rows = [], []
    for picture, plain_caption, smoothed_caption, views, draws in zip(
        pictures, plain, smoothed, stages(tower, pixel_values, seed), stream, strict=True
    ):
        scores, scored = draws.take(num_samples), draws.record | {"null_cosine": null_cosine}
        options = {"sigma": SIGMA, "epsilons": EPSILONS}
        certified = certify_scores(scores, **options, alpha=alpha, deployed_samples=NUM_SAMPLES)
        certificate = dataclasses.replace(certified, **scored)
        plugin = dataclasses.replace(certify_scores(scores, **options, method="plugin"), **scored)
        records.append(DemoRecord(picture.name, picture.kind, plain_caption, smoothed_caption, certificate, plugin))
        said = [textwrap.shorten(text, 45, placeholder=" …") for text in (plain_caption, smoothed_caption)]
        title = f"{picture.name} ({picture.kind})    plain: “{said[0]}”    smoothed: “{said[1]}”"
        rows.append((title, views, [certificate, plugin]))
    bar.close()
    plot_rows(rows, output, sigma=SIGMA, null_cosine=null_cosine)
    results = json.loads((models / LLAVA / RESULTS).read_text(encoding="utf-8"))
    return DemoResult(records, null_cosine, pixel_values.shape[-1], results, output)


def demo_images() -> list[DemoImage]:
    """Three photographs that lie in scikit-image's wheel (CC0 or public domain), and three drawings made here.

    CIFAR-10 itself may not be handed on. Of the photographs only the cat is of its classes; the drawings are.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError('the demo needs scikit-image: `pip install "fs-psm-hf[demo]"`') from error
    # Squares in which the subject stands as large as in CIFAR-10: left, top, right, bottom in pixels.
    photographs = {
        "cat": (data.chelsea, (151, 0, 451, 300)),
        "rocket": (data.rocket, (150, 127, 450, 427)),
        "cup of coffee": (data.coffee, (100, 0, 500, 400)),
    }
    images = [
        DemoImage(name, "photograph", Image.fromarray(load()).crop(box)) for name, (load, box) in photographs.items()
    ]
    drawings = {"airplane": draw_airplane, "ship": draw_ship, "truck": draw_truck}
    return images + [DemoImage(name, "drawing", draw()) for name, draw in drawings.items()]


def encode(processor, images):
    """The question with every image, as LLaVA takes it."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[prompt] * len(images), images=images, return_tensors="pt")


@torch.inference_mode()
def caption(llava, processor, inputs) -> list[str]:
    """Greedy answers, one per image."""
    tokens = llava.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


@torch.inference_mode()
def stages(tower, pixel_values, seed):
    """Clean, noisy and purified picture of every image; the noise is the first draw that is certified.

    Yields:
        `list[np.ndarray]`: three of shape `(height, width, 3)`, [0, 1] pixels, the last two not clipped.
    """
    config = tower.config
    pixels = pixel_values.float()
    clean = to_unit(pixels, channel_tensor(config.image_mean, pixels), channel_tensor(config.image_std, pixels))
    noise = gaussian_noise(clean.shape[1:], seed, list(range(len(clean))), 0, 1, clean.device)
    noisy = clean + config.sigma * noise
    for views in zip(clean, noisy, tower.psm(noisy, config.sigma), strict=True):
        yield [view.permute(1, 2, 0).cpu().numpy() for view in views]


def _table(result):
    """A line per image: both captions, the bounds at some radii, the radius."""
    header = ["image", "plain tower says", "smoothed tower says"]
    header += [f"ε = {epsilon:g}" for epsilon in TABLE_EPSILONS] + ["radius"]
    at = [EPSILONS.index(epsilon) for epsilon in TABLE_EPSILONS]
    rows = [header]
    for record in result.records:
        certified, plugin = record.certificate, record.plugin
        row = [f"{record.name} ({record.kind})", record.plain_caption, record.smoothed_caption]
        row += [f"{_cosine(certified, i)} ({_cosine(plugin, i)})" for i in at]
        rows.append([*row, f"{_down(certified.radius)} ({_down(plugin.radius)})"])
    rows.append(["null level: unrelated images", "", "", *[f"{result.null_cosine:.2f}"] * len(at), ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _down(bound):
    """Two decimals, never rounded up: what is printed must hold, too."""
    return f"{math.floor(100 * bound) / 100:.2f}"


def _cosine(certificate, index):
    """A negative bound is a bound on no cosine."""
    bound = certificate.cosine_bounds[index]
    return _down(bound) if bound >= 0.0 else "none"


def _words(result):
    """What was shown, what it means and what it does not."""
    first, size, results = result.records[0].certificate, result.image_size, result.results
    longest = max(record.certificate.radius for record in result.records)
    near = TABLE_EPSILONS[0]
    served = min(record.certificate.deployed.cosine_bounds[EPSILONS.index(near)] for record in result.records)
    return [
        f"Shown: a LLaVA for {size} x {size} pixels, with its own vision tower and with the smoothed one, which adds "
        f"Gaussian noise (σ = {first.sigma:g}, pixels in [0, 1]), purifies, and averages the features of {NUM_SAMPLES} "
        f"draws. {result.output} has the pictures and a curve for each.",
        f"Certified, for each image with {100 * (1 - first.alpha):g} % confidence from "
        f"{first.num_samples + first.num_pilot} draws: however its pixels are changed, by at most ε in ℓ₂ norm, the "
        "feature that the language model reads, averaged over all noise, keeps at least the cosine in the table with the "
        f"plain tower's feature of the clean image. The radius is the ε up to which {first.level:g} is kept.",
        "In brackets: the plug-in estimate of the paper's tables, which takes the sample mean for the truth. It has no "
        "confidence and is no certificate.",
        f"Null level: different images among these {len(result.records)} have a mean cosine of {result.null_cosine:.2f}. A "
        "bound that is not above it does not tell the image from another.",
        f"One answer averages {NUM_SAMPLES} draws only: after a change of at most {near:g} that was fixed beforehand it "
        + (
            f"keeps a cosine of {_down(served)} on each of these images"
            if served >= 0.0
            else "keeps no certified cosine"
        )
        + f", except with probability {first.alpha + first.deployed.beta:g} per query.",
        "Not certified: the words of the caption, and larger changes. An attack that may move every pixel by 16/255 "
        f"reaches an ℓ₂ norm of {ATTACK_BUDGET * math.sqrt(3 * size**2):.2f} at this size; the largest radius here is "
        f"{_down(longest)}. Robustness out there can only be measured.",
        "The captioner is tiny: it knows the ten classes of CIFAR-10, names one of them whatever it is shown, and is "
        f"right on {100 * results['caption_accuracy']:.1f} % of {results['num_images']:,} test images. It has no word "
        "for a rocket or a cup of coffee.",
        "The photographs come from scikit-image, cropped and scaled down; airplane, ship and truck were drawn by this "
        "program. Noise is new in every run, so numbers, and at times smoothed captions, change.",
    ]


def _sky(top, bottom, size=256):
    """A square canvas whose colour runs from `top` to `bottom`, and its pen."""
    share = np.linspace(0, 1, size)[:, None, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    image = Image.fromarray(rows.repeat(size, 1).astype(np.uint8))
    return image, ImageDraw.Draw(image)


def draw_airplane():
    """An airliner in a blue sky, 256 pixels square."""
    image, pen = _sky((96, 150, 214), (188, 214, 236))
    pen.polygon([(122, 128), (176, 128), (92, 214), (64, 214)], fill=(150, 156, 166))
    pen.polygon([(126, 116), (166, 116), (112, 56), (90, 56)], fill=(120, 126, 138))
    pen.polygon([(38, 116), (72, 116), (52, 62), (28, 62)], fill=(70, 90, 140))
    pen.ellipse((24, 104, 236, 144), fill=(236, 238, 242))
    pen.rectangle((60, 128, 210, 136), fill=(170, 176, 186))
    pen.ellipse((206, 112, 222, 122), fill=(40, 48, 64))
    return image


def draw_ship():
    """A steamer at sea, 256 pixels square."""
    image, pen = _sky((176, 204, 230), (214, 228, 240))
    pen.rectangle((0, 168, 256, 256), fill=(44, 84, 120))
    for y in range(180, 256, 16):
        pen.line((0, y, 256, y + 4), fill=(66, 110, 148), width=4)
    pen.polygon([(16, 136), (244, 130), (214, 190), (44, 190)], fill=(52, 40, 44))
    pen.polygon([(30, 172), (222, 172), (214, 190), (44, 190)], fill=(150, 44, 40))
    pen.rectangle((58, 100, 190, 136), fill=(238, 238, 234))
    pen.rectangle((80, 74, 156, 102), fill=(226, 226, 222))
    pen.rectangle((104, 38, 130, 76), fill=(196, 70, 50))
    for x in range(66, 186, 18):
        pen.rectangle((x, 112, x + 8, 120), fill=(60, 80, 104))
    return image


def draw_truck():
    """A lorry on a road, 256 pixels square."""
    image, pen = _sky((170, 190, 210), (214, 220, 224))
    pen.rectangle((0, 188, 256, 256), fill=(112, 110, 108))
    pen.rectangle((14, 62, 168, 186), fill=(214, 60, 44))
    pen.polygon([(168, 92), (214, 92), (240, 140), (240, 186), (168, 186)], fill=(236, 236, 232))
    pen.polygon([(180, 102), (208, 102), (226, 138), (180, 138)], fill=(52, 70, 92))
    pen.rectangle((10, 184, 244, 198), fill=(48, 48, 52))
    for x in (28, 84, 190):
        pen.ellipse((x, 172, x + 46, 218), fill=(24, 24, 26))
        pen.ellipse((x + 14, 186, x + 32, 204), fill=(150, 150, 154))
    return image
