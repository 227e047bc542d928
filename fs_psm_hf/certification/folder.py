"""Certify a folder of images into a JSON-lines file that survives a kill at any moment."""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from ..configuration_fs_psm import check_smoothing
from ..noise import resolve_seed
from .certificate import Certificate, certify_scores
from .certify import model_name, null_level_of_sum, psm_name, score_images


def image_name(path):
    """Integer name of an image in the noise: a hash of its relative path, so the listing order does not matter."""
    return int.from_bytes(hashlib.blake2b(Path(path).as_posix().encode(), digest_size=7).digest(), "little")


def read_image(path, processor):
    """Normalised pixels of one file, `(1, 3, height, width)` float32.

    Raises:
        OSError: the file is missing or is no image.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise OSError(f"{path} is not a readable image: {error}") from error
    return processor(images=picture, return_tensors="pt")["pixel_values"].float()


class ResultsFile:
    """JSON lines, one per finished image, behind a header that says what was asked.

    A line counts once its newline is on disk; a half-written last line is dropped on resume.

    Args:
        path (`Path`): the file.
        settings (`dict`): what was asked; JSON-safe.
        resume (`bool`): go on with an existing file.
        adopt (`tuple[str, ...]`): settings that an existing file decides.

    Raises:
        ValueError: the file exists and `resume` is not set, it holds no header, or it was made with other settings.
    """

    def __init__(self, path, settings, resume=False, adopt=()):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.lines = []
        if self.path.exists():
            if not resume:
                raise ValueError(f"`output` {path} exists: use --resume to go on with it, or give another file")
            self._read(adopt)
        if not self.lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = [{"kind": "header", **self.settings}]
        # Rewritten whole, then renamed: what was half-written is gone, and a kill here loses nothing.
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(temporary, self.path)

    def _read(self, adopt):
        complete = self.path.read_text().rpartition("\n")[0]
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(f"`output` {self.path} is damaged before its last line: {error}") from error
        if not lines:
            return
        if not all(isinstance(line, dict) and "kind" in line for line in lines) or lines[0]["kind"] != "header":
            raise ValueError(f"`output` {self.path} was not written by this command")
        header = {name: value for name, value in lines[0].items() if name != "kind"}
        self.settings |= {name: header.get(name) for name in adopt}
        for name in sorted(header.keys() | self.settings.keys()):
            if header.get(name) != self.settings.get(name):
                raise ValueError(
                    f"`output` {self.path} was made with {name}={header.get(name)!r}, not {self.settings.get(name)!r}: "
                    "give another file or the same settings"
                )
        # Unreadable files get another chance; the summary is made again.
        self.lines = [lines[0]] + [line for line in lines[1:] if line["kind"] == "image"]

    @property
    def done(self):
        """Names of the finished images."""
        return {line["file"] for line in self.lines if line["kind"] == "image"}

    def append(self, line):
        """Write one line and wait until it is on disk."""
        self.lines.append(line)
        with open(self.path, "a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def certificates(self):
        """Every [`Certificate`] in the file."""
        return [
            Certificate.from_dict(entry)
            for line in self.lines
            if line["kind"] == "image"
            for entry in line["certificates"]
        ]


def versions():
    """Versions of what computes, and the commit of this package where it runs from a checkout."""
    found = {name: metadata.version(name) for name in ("torch", "transformers", "diffusers", "numpy", "scipy")}
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError):
            answer = subprocess.run(git, capture_output=True, text=True)
            found |= {"fs_psm_hf_commit": answer.stdout.strip()} if answer.returncode == 0 else {}
    return found


def _save_array(path, array):
    """Write a `.npy` file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as stream:
        np.save(stream, array)
    os.replace(temporary, path)


def _finite(value):
    """A number for JSON, which knows no infinity."""
    return float(value) if np.isfinite(value) else "inf"


def summarize(certificates):
    """Means over the images, one entry per method: what the closing table prints, as data."""
    groups = {}
    for certificate in certificates:
        groups.setdefault(certificate.method, []).append(certificate)
    return [
        {
            "method": method,
            "is_certificate": group[0].is_certificate,
            "images": len(group),
            "epsilons": list(group[0].epsilons),
            "mean_robustness_score": float(np.mean([c.robustness_score for c in group])),
            "mean_inner_product_bounds": np.mean([c.inner_product_bounds for c in group], 0).tolist(),
            "mean_radius": _finite(np.mean([c.radius for c in group])),
            "abstained": sum(c.abstained for c in group),
        }
        for method, group in groups.items()
    ]


def certify_folder(
    tower, processor, root, files, output, *, settings, methods, epsilons, alpha, level, num_samples, anchor, feature,
    seed=None, resume=False, progress=True, save_scores=None, command=None,
):  # fmt: skip
    """Certify images one by one, each method from the same draws, writing each as soon as it is done.

    Args:
        tower ([`SmoothedVisionTower`]): what is certified.
        processor: its image processor.
        root (`Path`), files (`list[str]`): folder, and the images in it by relative path.
        output (`Path`): JSON-lines file: header, one line per image or unreadable file, summary.
        settings (`dict`): further facts for the header; a resumed file must agree with all of them.
        methods (`list[str]`): such as `["cdf", "plugin"]`.
        seed (`int`, *optional*): of the noise; the operating system's where not given, and recorded.
        save_scores (`Path`, *optional*): folder for the scores themselves, `<image id>.npy` of shape `(num_samples,)`.
        command (`str`, *optional*): what was typed, for the summary.

    The other arguments are those of [`certify_features`].

    Returns:
        `tuple[list[Certificate], list[str]]`: all certificates in the file, and the files that could not be read.

    Raises:
        ValueError: nothing to certify, settings out of range, or an output made with other settings.
    """
    if not files:
        raise ValueError(f"`images` {root} holds no image")
    check_smoothing(tower.config.sigma, num_samples)
    options = {"sigma": tower.config.sigma, "epsilons": epsilons, "alpha": alpha, "level": level}
    for method in methods:
        certify_scores([0.5, 0.5], method=method, **options)  # a bad option is refused before hours of draws
    asked = {
        **settings, "sigma": tower.config.sigma, "num_samples": num_samples, "served_samples": tower.config.num_samples,
        "alpha": alpha, "epsilons": list(epsilons), "level": level, "methods": list(methods), "anchor": anchor,
        "feature": feature, "feature_layer": tower.config.feature_layer, "first_token": tower.config.first_token,
        "aggregation": tower.config.aggregation, "model": model_name(tower), "psm": psm_name(tower),
        "dtype": str(tower.dtype).removeprefix("torch."), "device": tower.device.type,
        "max_batch_size": tower.config.max_batch_size, "seed": resolve_seed(seed),
    }  # fmt: skip
    results = ResultsFile(output, asked, resume, adopt=("seed",) if seed is None else ())
    seed = results.settings["seed"]

    unreadable, total, count = [], 0, 0
    readable = []
    for name in tqdm(files, desc="null level", unit="image", disable=not progress):
        try:
            pixels = read_image(Path(root) / name, processor)
        except OSError as error:
            unreadable.append(name)
            results.append({"kind": "error", "file": name, "error": str(error)})
            continue
        total, count = total + tower.clean_features(pixels.to(tower.device), feature)[0].double(), count + 1
        readable.append(name)
    null_cosine = null_level_of_sum(total, count) if count > 1 else None

    todo = [name for name in readable if name not in results.done]
    with tqdm(total=len(readable), initial=len(readable) - len(todo), unit="image", disable=not progress) as bar:
        for name in todo:
            pixels = read_image(Path(root) / name, processor).to(tower.device)
            stream = score_images(
                tower, pixels, num_samples=num_samples, anchor=anchor, feature=feature, generator=seed,
                image_ids=[image_name(name)],
            )  # fmt: skip
            for scores, record in stream:
                if save_scores is not None:
                    _save_array(Path(save_scores) / f"{record['image_id']}.npy", scores)
                found = []
                for method in methods:
                    deployed = method != "plugin" and tower.serves(feature)
                    served = {"deployed_samples": tower.config.num_samples} if deployed else {}
                    certificate = certify_scores(scores, method=method, **options, **served)
                    found.append(dataclasses.replace(certificate, **record))
                results.append({"kind": "image", "file": name, "certificates": [c.to_dict() for c in found]})
            bar.update()
            bar.set_postfix_str(f"radius {found[0].radius:.3f}")
    certificates = results.certificates()
    if certificates:
        summary = {"kind": "summary", "null_cosine": null_cosine, "rows": summarize(certificates)}
        results.append(summary | {"command": command, "versions": versions()})
    # The null level belongs to the whole set, which grows when an unreadable file is mended.
    return [dataclasses.replace(c, null_cosine=null_cosine) for c in certificates], unreadable
