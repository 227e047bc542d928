"""Certify a folder of images, or scores saved from one, into a results file."""

import dataclasses
import hashlib
import os
from datetime import timedelta
from pathlib import Path

import numpy as np
from accelerate import PartialState
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from ..configuration_fs_psm import check_smoothing
from ..noise import resolve_seed
from .adaptive import look_schedule
from .certify import draw_scores, null_level_of_sum
from .identity import describe, model_name, psm_name, vector_hash
from .results_file import ResultsFile, versions
from .saved import load_draws, save_draws, saved_path


def certify_folder(
    tower, processor, root, files, output, question, *, anchor="clean", feature="tokens", per_token=False, center=None,
    seed=None, resume=False, progress=True, save_scores=None, save_features=False, settings=None, command=None,
):  # fmt: skip
    """Certify images one by one, each method from the same draws, writing each as soon as it is done.

    Under `accelerate launch` the images are split among the processes; the results file is the same.

    Args:
        tower ([`SmoothedVisionTower`]): what is certified.
        processor: its image processor.
        root (`Path`), files (`list[str]`): folder, and the images in it by relative path.
        output (`Path`): JSON-lines file: header, one line per image or unreadable file, summary.
        question ([`Question`]): what is asked of the scores.
        seed (`int`, *optional*): of the noise; the operating system's where not given, and recorded.
        save_scores (`Path`, *optional*): folder for the scores themselves; see `saved`.
        save_features (`bool`): save the unit features beside them, which label questions need.
        settings (`dict`, *optional*): further facts for the header; a resumed file must agree with all of them.
        command (`str`, *optional*): what was typed, for the summary.

    The other arguments are those of [`certify_features`].

    Returns:
        `tuple[ResultsFile, list[str]]`: the finished file, and the images that could not be read; `None` in every
        process but the first.

    Raises:
        ValueError: nothing to certify, settings out of range, or an output made with other settings.
    """
    if not files:
        raise ValueError(f"`images` {root} holds no image")
    sigma = tower.config.sigma
    check_smoothing(sigma, question.num_samples)
    if save_features and save_scores is None:
        raise ValueError("`--save-features` needs `--save-scores`, the folder to save them in")
    served = tower.config.num_samples if tower.serves(feature) and center is None and not per_token else None
    question.check(sigma, served)
    if question.classifier is not None:
        # Of the first image that can be read; where there is none, nothing is certified either.
        for pixels in _images(tower, processor, root, files):
            question.check_width(tower.clean_features(pixels, feature).shape[-1])
            break
    description = describe(tower)
    asked = {
        **(settings or {}), **question.settings(), "sigma": sigma, "served_samples": served,
        "anchor": anchor, "feature": feature, "per_token": per_token, "center": center is not None and vector_hash(center),
        **_asked_mode(description), "model": model_name(tower), "psm": psm_name(tower), "device": tower.device.type,
        "max_batch_size": tower.config.max_batch_size, "seed": resolve_seed(seed),
        "seed_source": "os" if seed is None else "given",
    }  # fmt: skip
    state = one_of_several(tower.device.type)
    adopt = ("seed", "seed_source") if seed is None or state.process_index > 0 else ()
    if state.process_index == 0:
        results = ResultsFile(output, asked, resume, adopt)
    state.wait_for_everyone()
    if state.process_index > 0:
        results = ResultsFile(output, asked, adopt=adopt, part=state.process_index)
    state.wait_for_everyone()  # nobody writes a part before all have read
    seed = results.settings["seed"]
    progress = progress and state.is_local_main_process

    null_cosine = None
    if state.process_index == 0:
        options = {"center": center, "per_token": per_token}
        null_cosine = _null_cosine(
            _clean_features(tower, processor, root, files, feature, progress, "null level", **options)
        )
    # An image whose scores were asked for and are not there is drawn again.
    todo = [
        name
        for name in files
        if name not in results.done
        or (save_scores is not None and not saved_path(save_scores, image_name(name)).exists())
    ]
    mine = todo[state.process_index :: state.num_processes]
    keep = save_features or question.classifier is not None
    with tqdm(total=len(mine) * question.num_samples, unit="draw", disable=not progress) as bar:
        for number, name in enumerate(mine):
            try:
                pixels = read_image(Path(root) / name, processor).to(tower.device)
            except OSError as error:
                results.append(
                    {"kind": "error", "file": name, "error": str(error).replace(str(root), Path(root).name)}
                )
                continue
            (draws,) = draw_scores(
                tower, pixels, anchor=anchor, feature=feature, center=center, per_token=per_token, generator=seed,
                image_ids=[image_name(name)], keep=keep, progress=bar, description=description,
            )  # fmt: skip
            draws.record["seed_source"] = results.settings["seed_source"]
            line = question.answer(draws, sigma, served)
            if save_scores is not None:
                looks = len(look_schedule(question.num_samples)) if question.adaptive else 1
                facts = {"file": name, "sigma": sigma, "served_samples": served, "num_looks": looks}
                draws.features = draws.features if save_features else None
                save_draws(save_scores, draws, draws.take(len(draws.values)), facts)
            results.append({"kind": "image", "file": name, **line})
            bar.update((number + 1) * question.num_samples - bar.n)  # where it stopped early
            bar.set_postfix_str(f"radius {line['certificates'][0]['radius']:.3f}")
    state.wait_for_everyone()
    if state.process_index > 0:
        return None
    facts = {"null_cosine": null_cosine, "command": command, "versions": versions()}
    unreadable = results.close(files, lambda lines: summarize(lines) | facts)
    return results, unreadable


def _asked_mode(description):
    """What the header says of the mode: that compiling was asked for, each line whether it worked; as before without either."""
    modes = {"compile": description["compiled"], "quantization": description["quantization"]}
    rest = {name: value for name, value in description.items() if name not in ("compiled", "quantization")}
    return rest | {name: value for name, value in modes.items() if value is not None}


def one_of_several(device) -> PartialState:
    """This process among those that `accelerate launch` started, or the only one."""
    # One may wait for another for hours: their images need not cost alike.
    return PartialState(cpu=str(device) == "cpu", timeout=timedelta(days=30))


def certify_saved(folder, output, question, *, served_samples=None, command=None):
    """Answer a question from saved scores: no model, no images.

    Args:
        folder (`Path`): written by `certify_folder(..., save_scores=...)`.
        question ([`Question`]): `num_samples=None` takes all that were saved of each image.
        served_samples (`int`, *optional*): another n₀ for the `deployed` part.

    Returns:
        [`ResultsFile`]

    Raises:
        ValueError: as `certify_folder`, or the saved scores cannot answer it.
    """
    saved = load_draws(folder)
    sigma = saved[0].facts["sigma"]
    served = saved[0].facts["served_samples"]
    if served_samples is not None and served is None:
        raise ValueError("`--served-samples` is no question for this feature: the host is not served a mean of it")
    served = served if served_samples is None else served_samples
    question.check(sigma, served)
    if question.curve and saved[0].anchor.ndim == 2:
        raise ValueError("`--plot` draws certificates of whole features, not of single tokens as these are")
    shared = {name: value for name, value in saved[0].record.items() if name != "image_id"}
    settings = question.settings() | {"from_scores": Path(folder).resolve().name, "sigma": sigma, **shared}
    results = ResultsFile(output, settings | {"served_samples": served})
    for draws in saved:
        asked = question
        if question.num_samples is None:  # where the draws stopped early, images have different numbers of them
            asked = dataclasses.replace(question, num_samples=draws.num_samples)
        results.append({"kind": "image", "file": draws.facts["file"], **asked.answer(draws, sigma, served)})
    # The anchors of different images: the clean features themselves, or their smoothed counterparts.
    alike = shared["anchor"] != "given"
    null_cosine = _null_cosine(draws.anchor.double() for draws in saved) if alike else None
    facts = {"null_cosine": null_cosine, "command": command, "versions": versions()}
    results.close([draws.facts["file"] for draws in saved], lambda lines: summarize(lines) | facts)
    return results


def summarize(lines) -> dict:
    """Means over the images: what the closing table prints, as data."""
    groups = {}
    for line in lines:
        for entry in line["certificates"]:
            groups.setdefault(entry["method"], []).append(entry)
    rows = []
    for method, group in groups.items():
        rows.append(
            {
                "method": method,
                "is_certificate": group[0]["is_certificate"],
                "images": len(lines),
                "certificates": len(group),
                "epsilons": group[0]["epsilons"],
                "mean_num_samples": float(np.mean([c["num_samples"] + c["num_pilot"] for c in group])),
                "mean_robustness_score": float(np.mean([c["robustness_score"] for c in group])),
                "mean_inner_product_bounds": np.mean([c["inner_product_bounds"] for c in group], 0).tolist(),
                "mean_radius": _mean([c["radius"] for c in group]),
                "abstained": sum(c["abstained"] for c in group),
            }
        )
        if group[0]["deployed"] is not None:
            served = np.mean([c["deployed"]["inner_product_bounds"] for c in group], 0).tolist()
            rows[-1]["mean_deployed_inner_product_bounds"] = served
    labels = [line["label"] for line in lines if "label" in line]
    found = {"rows": rows}
    if labels:
        found["labels"] = {
            "images": len(labels),
            "mean_radius": _mean([c["radius"] for c in labels]),
            "mean_hard_vote_radius": _mean([c["hard_vote_radius"] for c in labels]),
            "abstained": sum(c["abstained"] for c in labels),
        }
    return found


def image_name(path):
    """Integer name of an image in the noise: a hash of its relative path, so the listing order does not matter."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(Path(path).as_posix()), digest_size=7).digest(), "little")


def read_image(path, processor):
    """Normalised pixels of one file, `(1, 3, height, width)` float32.

    Raises:
        OSError: the file is missing or is no image.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
        return processor(images=picture, return_tensors="pt")["pixel_values"].float()
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise OSError(f"{path} is not a readable image: {error}") from error


def mean_feature(tower, processor, root, files, feature, progress=False):
    """Mean raw clean feature of a folder's readable images, `(num_features,)` float32: a `center`."""
    total, count = 0.0, 0
    for features in _clean_features(tower, processor, root, files, feature, progress, "center", unit=False):
        total, count = total + features, count + 1
    if count == 0:
        raise ValueError(f"`--center` {root} holds no readable image")
    return (total / count).float()


def _null_cosine(features):
    """Mean cosine of different images, from a unit feature of each, or from a unit feature of each token of each."""
    total, count = 0.0, 0
    for vector in features:
        tokens = len(vector) if vector.ndim == 2 else 1
        total, count = total + vector.flatten() / tokens**0.5, count + 1
    return null_level_of_sum(total, count) if count > 1 else None


def _clean_features(tower, processor, root, files, feature, progress, desc, **options):
    for pixels in _images(tower, processor, root, tqdm(files, desc=desc, unit="image", disable=not progress)):
        yield tower.clean_features(pixels, feature, **options)[0].double()


def _images(tower, processor, root, files):
    for name in files:
        try:
            yield read_image(Path(root) / name, processor).to(tower.device)
        except OSError:
            continue


def _mean(values):
    """A mean for JSON, which knows no infinity."""
    mean = float(np.mean([float(value) for value in values]))
    return mean if np.isfinite(mean) else "inf"
