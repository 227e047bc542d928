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
        about = (sorted(describe(tower.tower).items()), tower.feature, tower.post_layernorm)
        name = hashlib.sha256(repr(about).encode()).hexdigest()
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
                _save(paths[i], features.contiguous())
        return torch.stack(kept).to(images.device).float()


def _digest(tensor):
    values = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(memoryview(values), digest_size=16).hexdigest()


def _save(path, features):
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    digest = torch.frombuffer(bytearray.fromhex(_digest(features)), dtype=torch.uint8)
    try:
        save_file({"features": features, "digest": digest}, unfinished)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"`--feature_cache_dir` {path.parent}: clean features cannot be written: {error}") from error


def _load(path):
    try:
        found = load_file(path)
        whole = _digest(found["features"]) == bytes(found["digest"].tolist()).hex()
    except (OSError, SafetensorError, KeyError):
        return None
    return found["features"] if whole else None
