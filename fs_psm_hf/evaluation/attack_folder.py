"""Attacks the images of a folder and keeps the pictures: the body of `fs-psm attack`."""

import math
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..attacks import METHODS, Encoder, attack
from ..certification.folder import image_name
from ..certification.identity import describe, short_name
from ..certification.results_file import versions
from ..noise import resolve_seed
from .data import load_images, pair_by_stem, read_folder
from .jobs import attack_record, picture_path, save_picture
from .records import RunFile, read_run
from .run_config import UNTARGETED


RECORDS = "attacks.jsonl"
NORMS = ("linf", "l2")


def attack_folder(
    tower, images, output, *, targets=None, method="foa", mode="transfer", epsilon=16 / 255, norm="linf", steps=300,
    step_size=None, draws=8, straight_through=False, feature="tokens", image_size=224, size=None, limit=None, batch_size=4,
    seed=None, name=None, command=None, progress=True,
):  # fmt: skip
    """Attack every image of a folder and write 8-bit PNGs and `attacks.jsonl`; a second call goes on where one stopped.

    Args:
        tower ([`SmoothedVisionTower`]): on its device.
        images, targets (`Path`): folders; paired by file stem. Untargeted methods take no targets.
        output (`Path`): folder.
        mode (`str`): `"transfer"`, the plain tower within, or `"adaptive"`, the smoothed one.
        image_size (`int`): side of the attacks' frame in pixels: short side resized, centre cropped.
        size (`tuple[int, int]`, *optional*): what the tower sees, where that differs.
        limit (`int`, *optional*): the first images only.
        batch_size (`int`): images at a time; a batch is done as a whole.
        seed (`int`, *optional*): of crops and noise; where not given that of the folder's earlier run, else the operating
            system's.
        name, command (`str`, *optional*): for the records.

    The others are those of [`fs_psm_hf.attacks.Encoder`] and [`fs_psm_hf.attacks.attack`].

    Returns:
        `list[dict]`: the records of all images, in their order.

    Raises:
        ValueError, OSError: images and targets that do not match, settings out of range, or a folder of another run.
    """
    output, images = Path(output), Path(images)
    if method not in METHODS:
        raise ValueError(f"`--method` must be one of {', '.join(METHODS)}, got {method!r}")
    if (method in UNTARGETED) != (targets is None):
        wanted = "must not be given" if method in UNTARGETED else "must be given"
        raise ValueError(f"`--targets` {wanted} for the method {method}, got {targets}")
    if norm not in NORMS:
        raise ValueError(f"`--norm` must be one of {', '.join(NORMS)}, got {norm!r}")
    if not 0 < epsilon <= (1 if norm == "linf" else math.inf):
        raise ValueError(f"`--epsilon` must be > 0, and of linf at most 1, the range of a pixel, got {epsilon:g}")
    if steps < 1:
        raise ValueError(f"`--steps` must be >= 1, got {steps}")
    examples = read_folder(images, limit=limit)
    if targets is not None:
        examples = pair_by_stem(examples, read_folder(targets))
    path = output / RECORDS
    if seed is None and path.is_file():
        seed = read_run(path)[0]["config"]["seed"]
    settings = {
        "tower": name, "images": short_name(str(images.resolve())), "method": method, "mode": mode, "epsilon": epsilon,
        "targets": None if targets is None else short_name(str(Path(targets).resolve())), "norm": norm, "steps": steps,
        "step_size": step_size, "draws": draws if mode == "adaptive" else 1, "straight_through": straight_through,
        "feature": feature, "image_size": image_size, "size": None if size is None else list(size), "limit": limit,
        "batch_size": batch_size, "seed": resolve_seed(seed), "sigma": tower.config.sigma, "model": describe(tower),
    }  # fmt: skip
    encoder = Encoder(
        tower, mode=mode, feature=feature, draws=draws, straight_through=straight_through,
        size=None if size in (None, (image_size, image_size)) else size,
    )  # fmt: skip
    run = RunFile(path, settings, {"versions": versions(), "command": command})
    batches = [range(i, min(i + batch_size, len(examples))) for i in range(0, len(examples), batch_size)]
    with tqdm(total=len(examples), unit="image", disable=not progress) as bar:
        for number, batch in enumerate(batches):
            if not all(_is_done(run, output, i, examples[i].id) for i in batch):
                _attack_batch(run, output, encoder, [examples[i] for i in batch], batch, number, settings, progress)
            bar.update(len(batch))
    run.merge([method], [example.id for example in examples])
    return [run.get("attack", method, example.id) for example in examples]


def _is_done(run, output, i, name):
    found = run.get("attack", run.header["config"]["method"], name)
    return found is not None and picture_path(output, i, name).is_file()


def _attack_batch(run, output, encoder, examples, batch, number, settings, progress):
    clean = load_images(examples, settings["image_size"])
    targets = None if settings["targets"] is None else load_images(examples, settings["image_size"], target=True)
    checkpoint = output / f"batch{number:04d}.safetensors"
    asked = {name: settings[name] for name in ("method", "epsilon", "norm", "steps", "step_size")}
    result = attack(
        encoder, clean, targets, **asked, generator=settings["seed"], eight_bit=True, checkpoint=checkpoint,
        image_ids=[image_name(example.id) for example in examples], progress=progress,
    )  # fmt: skip
    for place, (i, example) in enumerate(zip(batch, examples, strict=True)):
        path = picture_path(output, i, example.id)
        save_picture(result.images[place], path)
        run.add("attack", settings["method"], example.id, file=path.name, **attack_record(result, place))
    checkpoint.unlink(missing_ok=True)


def summary_line(records):
    """One line for a person: how many pictures, how far they moved, and how the attack's own objective rose."""
    first, last = (torch.tensor([record["objective"][end] for record in records]).mean().item() for end in (0, -1))
    zeros = sum(record["zero_gradients"] for record in records)
    largest = max(record["linf"] for record in records)
    settings = records[0]["settings"]
    return (
        f"{len(records)} pictures, {settings['method']}, {settings['mode']}: objective {first:.3f} to {last:.3f}, largest change "
        f"{largest:g}/255, {zeros} steps without a gradient"
    )
