"""Checkpoint files of other code: read without running anything in them, checked, and written as a model folder."""

import contextlib
import pickle
import re
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError


def load_pickle(checkpoint):
    """What a file of `torch.save` holds, without running code from it; its tensors stay on disk until they are read.

    Args:
        checkpoint (`str` or `Path`): the file.

    Raises:
        ValueError: the file is missing, damaged, a TorchScript archive, or holds code.
    """
    path = existing_file(checkpoint)
    if _is_torchscript(path):
        raise ValueError(
            f"`checkpoint` must be a state dict, got the TorchScript archive {path.name}, which is a program: "
            "save the state dict of the model that it makes"
        )
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a file of another kind may fail anywhere in the reader
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise ValueError(
                f"`checkpoint` must hold nothing but tensors, got code ({code[1]}) in {path.name}, which was not run"
            ) from error
        raise ValueError(f"`checkpoint` must be an undamaged file of torch.save, got {path.name}") from error


def existing_file(checkpoint):
    """The path of a file, or `ValueError`."""
    path = Path(checkpoint)
    if not path.is_file():
        raise ValueError(f"`checkpoint` must be a file, got {checkpoint}")
    return path


def _is_torchscript(path):
    # torch.load tells by this name too, but warns before it refuses.
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def check_state_dict(state_dict):
    """Raise `TypeError` unless it is a flat dict from names to tensors."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"`state_dict` must be a flat dict from names to tensors, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TypeError(
                f"`state_dict` must be a flat dict from names to tensors, got {type(value).__name__} at {key!r}"
            )


def check_dtypes(tensors, dtype):
    """Raise `TypeError` unless all are of floating point, and of one type where `dtype` does not give one."""
    dtypes = {tensor.dtype for tensor in tensors}
    if not all(kind.is_floating_point for kind in dtypes) or (dtype is None and len(dtypes) > 1):
        kinds = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(
            f"`state_dict` must hold floating-point tensors, of one type unless `dtype` is given, got {kinds}"
        )


def check_shape(shape, expected, key):
    """Raise `ValueError` unless the tensor at `key` has the shape that fits the others."""
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"`state_dict` must have shape {tuple(expected)} at {key} to fit its other weights, got {tuple(shape)}"
        )


def shape_at(state_dict, key, dimensions, network):
    """The shape of the tensor at `key`, or `ValueError` unless it is there and has so many dimensions."""
    shape = state_dict[key].shape if key in state_dict else ()
    if len(shape) != dimensions:
        found = f"of shape {tuple(shape)}" if key in state_dict else "missing"
        raise ValueError(f"`state_dict` must be that of {network}, got one with {key} {found}")
    return shape


def refuse_other_keys(given, expected, network):
    """Raise `ValueError`, with the first names, unless the two sets of keys are the same."""
    faults = []
    for what, keys in (("missing", expected - given), ("left over", given - expected)):
        if keys:
            shown = ", ".join(sorted(keys)[:5])
            faults.append(f"{len(keys)} keys {what}: {shown}" + (", …" if len(keys) > 5 else ""))
    if faults:
        raise ValueError(f"`state_dict` must have exactly the keys of {network}, got {'; '.join(faults)}")


def check_integer(name, value):
    """Raise `ValueError` unless it is an integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}")


def check_output(output):
    """The absolute path of a folder that is new or empty, or `ValueError`."""
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` must be a new or an empty folder, got {output}")
    return output


@contextlib.contextmanager
def whole_folder(output):
    """A folder to write into, which becomes `output` when the block ends, and disappears when it fails.

    Args:
        output (`Path`): path of [`check_output`].

    Raises:
        OSError: what was written could not be.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / output.name
        try:
            yield folder
        except SafetensorError as error:
            raise OSError(f"`output` could not be written: {error}") from error
        if output.exists():
            output.rmdir()
        folder.rename(output)
