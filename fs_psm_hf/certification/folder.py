"""Certify a folder of images, or scores saved from one, into a results file."""

import dataclasses
import hashlib
import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from ..configuration_fs_psm import check_smoothing
from ..noise import resolve_seed
from .adaptive import certify_stream, check_adaptive, look_schedule
from .certificate import BAND_METHODS, certify_scores, check_options
from .certify import draw_scores, null_level_of_sum
from .identity import describe, model_name, psm_name, vector_hash
from .labels import Classifier, certify_logits, check_label_options
from .results_file import ResultsFile, versions
from .saved import load_draws, save_draws, saved_path


CURVE_METHODS = ("plugin", "betting", "cdf")
_CURVE_POINTS = 61


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of the scores of an image; the model is not needed to answer it.

    Args:
        methods (`tuple[str, ...]`): see `certify_scores`; the first is the one that may stop early.
        num_samples (`int`): draws to use.
        classifier ([`Classifier`], *optional*): also certify the label.
        curve (`bool`): also bound the cosine on a fine grid of radii, for a picture.

    The other arguments are those of `certify_features`.
    """

    methods: tuple[str, ...] = ("cdf", "plugin")
    epsilons: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.75)
    num_samples: int = 10_000
    alpha: float = 1e-3
    level: float = 0.5
    beta: float = 0.05
    target_radius: float | None = None
    tolerance: float | None = None
    classifier: Classifier | None = None
    curve: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether the draws may stop early."""
        return check_adaptive(self.target_radius, self.tolerance, self.methods[0])

    def check(self, sigma, served_samples):
        """Refuse what cannot be asked, before hours of draws."""
        if not self.methods:
            raise ValueError("`--method` must be given at least once")
        check_adaptive(self.target_radius, self.tolerance, self.methods[0])
        for method in self.methods:
            check_options(method=method, sigma=sigma, **self._options(), **self._served(method, served_samples))
        if self.classifier is not None and self.num_samples:
            check_label_options(self.num_samples, sigma=sigma, alpha=self.alpha, method="cdf", beta=self.beta)

    def check_width(self, width):
        """Refuse classes that do not fit a feature of this width."""
        if self.classifier is not None and self.classifier.weight.shape[1] != width:
            own = self.classifier.weight.shape[1]
            raise ValueError(f"`--labels` has {own} values per class, must have {width} as the feature")

    def _options(self):
        return {"epsilons": self.epsilons, "alpha": self.alpha, "level": self.level, "beta": self.beta}

    def _served(self, method, served_samples):
        return {"deployed_samples": served_samples} if served_samples is not None and method in BAND_METHODS else {}

    def answer(self, draws, sigma, served_samples) -> dict:
        """The entries of one image's line: `certificates`, and `label` where there is a classifier."""
        looks = draws.num_looks
        if self.adaptive:
            if looks > 1:
                raise ValueError("`--target-radius` and `--tolerance` need scores that did not stop early themselves")
            looks = len(look_schedule(self.num_samples))
        per_token = draws.anchor.ndim == 2
        taken, found = self.num_samples, []
        for method in self.methods:
            options = {"method": method, "sigma": sigma, **self._options(), **self._served(method, served_samples)}
            options["per_token"] = per_token
            if self.adaptive and not found:
                goal = {"target_radius": self.target_radius, "tolerance": self.tolerance}
                certified = certify_stream(draws.take, self.num_samples, **goal, **options)
                taken = (certified[0] if per_token else certified).num_samples
            else:
                # Where the draws ended depends on them: every statement about them pays for the looks, not the first alone.
                certified = certify_scores(draws.take(taken), num_looks=looks, **options)
            found += [dataclasses.replace(c, **draws.record) for c in (certified if per_token else [certified])]
        line = {"certificates": [certificate.to_dict() for certificate in found]}
        if self.curve and not per_token:
            line["curve"] = self._curve(draws.take(taken), sigma, served_samples, looks)
        if self.classifier is not None:
            line["label"] = self._label(draws, taken, sigma, served_samples, looks).to_dict()
        return line

    def _curve(self, scores, sigma, served_samples, num_looks):
        """Bounds on the inner product from 0 to 3 σ: the paper's estimate, its valid counterpart, and ours."""
        grid = np.linspace(0.0, 3.0 * sigma, _CURVE_POINTS)
        options = {"sigma": sigma, "epsilons": grid, "alpha": self.alpha, "level": self.level, "num_looks": num_looks}
        found = {"epsilons": grid.tolist()}
        for method in CURVE_METHODS:
            served = (
                {"deployed_samples": served_samples, "beta": self.beta} if method == "cdf" and served_samples else {}
            )
            certificate = certify_scores(scores, method=method, **options, **served).to_dict()
            found[method] = {name: certificate[name] for name in ("inner_product_bounds", "radius", "abstained")}
            if served:
                found["deployed"] = {"inner_product_bounds": certificate["deployed"]["inner_product_bounds"]}
        return found

    def _label(self, draws, taken, sigma, served_samples, looks):
        features = draws.features
        if features is None:
            raise ValueError("`--labels` needs saved features: draw them again with --save-features")
        features = torch.cat(features) if isinstance(features, list) else features
        self.check_width(features.shape[1])
        certificate = certify_logits(
            self.classifier.logits(features[:taken]).numpy(), self.classifier, sigma=sigma, alpha=self.alpha,
            beta=self.beta, deployed_samples=served_samples, num_looks=looks,
        )  # fmt: skip
        record = {name: value for name, value in draws.record.items() if name != "anchor"}
        return dataclasses.replace(certificate, classifier=self.classifier.hash, **record)

    def settings(self) -> dict:
        """For the header of a results file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "classifier"}
        return values | {"classifier": self.classifier and self.classifier.hash}


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
        for clean in _clean_features(tower, processor, root, files, feature, progress=False, desc=None):
            question.check_width(len(clean))
            break
    asked = {
        **(settings or {}), **question.settings(), "sigma": sigma, "served_samples": served,
        "anchor": anchor, "feature": feature, "per_token": per_token, "center": center is not None and vector_hash(center),
        **describe(tower), "model": model_name(tower), "psm": psm_name(tower), "device": tower.device.type,
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
                image_ids=[image_name(name)], keep=keep, progress=bar,
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


def one_of_several(device) -> PartialState:
    """This process among those that `accelerate launch` started, or the only one."""
    # One may wait for another for hours: their images need not cost alike.
    return PartialState(cpu=str(device) == "cpu", timeout=timedelta(days=30))


def certify_saved(folder, output, question, *, served_samples=None, command=None):
    """Answer a question from saved scores: no model, no images.

    Args:
        folder (`Path`): written by `certify_folder(..., save_scores=...)`.
        question ([`Question`]): `num_samples=0` takes all that were saved.
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
    if not question.num_samples:
        question = dataclasses.replace(question, num_samples=min(draws.num_samples for draws in saved))
    shared = {name: value for name, value in saved[0].record.items() if name != "image_id"}
    settings = question.settings() | {"from_scores": Path(folder).resolve().name, "sigma": sigma, **shared}
    results = ResultsFile(output, settings | {"served_samples": served})
    for draws in saved:
        results.append({"kind": "image", "file": draws.facts["file"], **question.answer(draws, sigma, served)})
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
    for name in tqdm(files, desc=desc, unit="image", disable=not progress):
        try:
            pixels = read_image(Path(root) / name, processor).to(tower.device)
        except OSError:
            continue
        yield tower.clean_features(pixels, feature, **options)[0].double()


def _mean(values):
    """A mean for JSON, which knows no infinity."""
    mean = float(np.mean([float(value) for value in values]))
    return mean if np.isfinite(mean) else "inf"
