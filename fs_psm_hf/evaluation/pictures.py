"""The picture of a run: attacked images with what each row says, purified where a row purifies."""

import numpy as np
import torch

from ..certification.folder import image_name
from ..noise import gaussian_noise
from ..plots_attacks import plot_attacks
from .cells import ATTACK_NAMES, format_strength
from .data import load_image
from .jobs import job_of, picture_path, read_picture
from .records import RunFile
from .rows import Defended
from .run_config import HOST_TASKS
from .setup import build_task, read_examples


def plot_run(config, output, path, *, images=3, device="cpu"):
    """Draw the first images of a finished run under the white-box attack on `Org` and an attack on a row that purifies.

    Args:
        config ([`RunConfig`]), output (`Path`): the run.
        path (`Path`): PNG file to write.
        images (`int`): rows per attack.
        device (`str`): of the purifier.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the run has no finished item.
    """
    examples = read_examples(config, build_task(config.task))
    run = RunFile(output, config.settings())
    rows = []
    for cell, model, encoder, row, attack in _chosen(config.cells()):
        folder = output.with_name(output.name + ".images") / job_of(config, cell, model, encoder, row, attack).key
        tower = Defended(model, encoder, device) if "P" in row.row else None
        for number, example in enumerate(examples[: min(images, attack.limit or images)]):
            item = run.get("item", cell.key, example.id)
            if item is None:
                continue
            clean = load_image(example.image, config.image_size)
            adversarial = read_picture(picture_path(folder, number, example.id))
            words = _words(config, item)
            views = {"clean": (_shown(clean), words[0]), "adversarial": (_shown(adversarial), words[1])}
            if tower is not None:
                purified = purify(tower, row, adversarial, config.seed, example.id)
                views["purified"] = _shown(purified), f"one draw, σ = {row.sigma:g}"
            strength = format_strength(attack.epsilon, attack.norm)
            title = f"{model.name}, {row.row}: {ATTACK_NAMES[attack.method]} {strength}, {cell.mode}; FCS {item['fcs']:.2f}"
            rows.append((title, views))
    if not rows:
        raise ValueError(f"`output` {output} must hold finished items to draw, got none")
    plot_attacks(rows, path)


def _chosen(cells):
    """The first cell of `Org`, and of the last row that purifies, or else smooths, its adaptive cell, or else its first."""
    found = [entry for entry in cells if entry[0].row == "Org"][:1]
    smoothed = [entry for entry in cells if entry[0].row != "Org" and entry[0].sigma > 0]
    last = max(smoothed, key=lambda entry: "P" in entry[0].row, default=None)
    if last is not None:
        same = [entry for entry in smoothed if entry[0].row == last[0].row]
        ordinary = [entry for entry in same if entry[0].epsilon <= min(other[0].epsilon for other in same)]
        found.append(next((entry for entry in ordinary if entry[0].mode == "adaptive"), ordinary[0]))
    return found


@torch.inference_mode()
def purify(model, row, image, seed, example_id):
    """What the purifier of a row makes of one noisy draw of an image.

    Args:
        model ([`Defended`]): whose row is set.
        row ([`RowConfig`]): with a purifier.
        image (`torch.Tensor` of shape `(3, height, width)`): [0, 1] pixels.
        seed (`int`), example_id (`str`): name the noise, that of the served draw 0.

    Returns:
        `torch.Tensor` of shape `(3, *model.size)`: not clipped.
    """
    tower = model.use(row.row, row.psm, row.sigma, row.num_samples)
    pixels = model.pixel_values(image[None])
    mean, std = (
        torch.tensor(values).view(3, 1, 1).to(pixels) for values in (tower.config.image_mean, tower.config.image_std)
    )
    noise = gaussian_noise(tuple(pixels.shape[1:]), seed, [image_name(example_id)], 0, 1, pixels.device)
    return tower.psm((pixels * std + mean) + row.sigma * noise, row.sigma)[0].float().cpu()


def _shown(image):
    return np.moveaxis(image.float().numpy(), 0, -1)


def _words(config, item):
    """What the row says of the clean and of the attacked image."""
    if config.task.kind in HOST_TASKS:
        return [f"“{item[name]}”" for name in ("clean", "adversarial")]
    names = config.task.options.get("class_names")
    return [names[item[name]] if names else str(item[name]) for name in ("clean", "adversarial")]
