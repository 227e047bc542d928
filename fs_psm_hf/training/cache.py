"""Clean features on disk, one file per image, found again by the pixels and the tower they belong to."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..certification.identity import describe


class FeatureCache:
    """Clean features of a tower, kept in a folder; a damaged file is computed anew.

    Args:
        folder (`str` or `os.PathLike`): shared by any towers and data; made where it does not exist.
        tower ([`FrozenTower`]): computes what is not there.
    """

    def __init__(self, folder, tower):
        self.tower = tower
        name = hashlib.sha256(repr((sorted(describe(tower.tower).items()), tower.feature)).encode()).hexdigest()
        self.folder = Path(folder) / name[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found = 0

    def raw(self, images):
        """As [`FrozenTower.raw`], from the disk where it is there; kept in the dtype of the tower."""
        paths = [self.folder / f"{_digest(image)}.safetensors" for image in images.cpu()]
        kept = [_load(path) for path in paths]
        missing = [i for i, features in enumerate(kept) if features is None]
        self.found += len(paths) - len(missing)
        if missing:
            dtype = self.tower.tower.dtype
            for i, features in zip(missing, self.tower.raw(images[missing]).to(dtype).cpu(), strict=True):
                kept[i] = features
                unfinished = paths[i].with_suffix(f".{os.getpid()}.tmp")
                save_file({"features": features.contiguous()}, unfinished)
                os.replace(unfinished, paths[i])
        return torch.stack(kept).to(images.device).float()


def _digest(image):
    return hashlib.blake2b(memoryview(image.contiguous().numpy().reshape(-1)).cast("B"), digest_size=16).hexdigest()


def _load(path):
    try:
        return load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
