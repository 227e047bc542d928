"""Scores on disk: one safetensors file per image, enough to answer later questions without the model."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .certify import ScoreDraws


class SavedDraws:
    """The draws of one image as they were saved; takes the place of [`ScoreDraws`].

    Args:
        path (`Path`): file written by `save_draws`.

    Raises:
        ValueError: the file is damaged or holds something else.
    """

    def __init__(self, path):
        try:
            with safe_open(path, "pt") as file:
                self.facts = json.loads((file.metadata() or {})["facts"])
                self.num_looks = self.facts["num_looks"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.scores, self.anchor = tensors["scores"].numpy(), tensors["anchor"]
            for name in ("file", "sigma", "served_samples", "record"):
                self.facts[name]
        except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
            raise ValueError(f"`{path}` is not a file of saved scores: {error}") from error
        self.features = tensors.get("features")
        self.record = {name: tuple(v) if isinstance(v, list) else v for name, v in self.facts["record"].items()}

    @property
    def num_samples(self) -> int:
        """How many draws there are."""
        return self.scores.shape[-1]

    def take(self, num_samples) -> np.ndarray:
        """The first scores, `(num_samples,)` or `(tokens, num_samples)`.

        Raises:
            ValueError: there are not so many.
        """
        if num_samples > self.num_samples:
            raise ValueError(f"`num_samples` must be at most the {self.num_samples} saved scores, got {num_samples}")
        return self.scores[..., :num_samples]


def saved_path(folder, image_id) -> Path:
    """Where the draws of an image are saved."""
    return Path(folder) / f"{image_id}.safetensors"


def save_draws(folder, draws: ScoreDraws, scores, facts):
    """Write `<image id>.safetensors`, whole or not at all.

    Args:
        folder (`Path`): made where it does not exist.
        draws ([`ScoreDraws`]): with `features` where they were kept.
        scores (`np.ndarray`): all scores that were taken.
        facts (`dict`): JSON-safe: sigma, file, number of served draws, …
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {"scores": torch.from_numpy(np.ascontiguousarray(scores)), "anchor": draws.anchor.cpu().contiguous()}
    if draws.features is not None:
        tensors["features"] = torch.cat(draws.features)
    path = saved_path(folder, draws.record["image_id"])
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata={"facts": json.dumps(facts | {"record": draws.record})})
    os.replace(unfinished, path)


def load_draws(folder) -> list[SavedDraws]:
    """All saved draws of a folder, in the order of their images' names.

    Raises:
        ValueError: there are none, one is damaged, or they were not made alike.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise ValueError(f"`--from-scores` must be a folder of saved scores (*.safetensors), got {folder}")
    found = sorted((SavedDraws(path) for path in paths), key=lambda draws: draws.facts["file"])
    own = ("image_id",)
    first = found[0]
    for draws in found[1:]:
        for name, value in (first.record | first.facts).items():
            other = (draws.record | draws.facts).get(name)
            if name not in (*own, "record", "file") and other != value:
                raise ValueError(
                    f"`--from-scores` {folder} mixes scores of {name} {value!r} ({first.facts['file']}) and "
                    f"{other!r} ({draws.facts['file']})"
                )
    return found
