"""Where an attack stands, on disk: written aside and renamed, and refused by any other run."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def save_state(path, state, step, identity):
    """Write the tensors of `state` and where it stands, whole or not at all.

    Args:
        path (`Path`): folders above it are made.
        state (`dict[str, torch.Tensor]`), step (`int`): steps that are done.
        identity (`dict`): JSON-safe, what the run is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, unfinished, metadata={"step": str(step), "identity": json.dumps(identity)})
    os.replace(unfinished, path)


def load_state(path, device):
    """What `save_state` wrote: `(state, step, identity)`, or `None` where there is no file.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            step, identity = int(facts["step"]), json.loads(facts["identity"])
            state = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"`checkpoint` must be a file that an attack wrote, got {path}: {error}") from error
    return state, step, identity


def check_identity(path, saved, own):
    """Raise `ValueError` where the file is another run's, naming what differs first."""
    for name in sorted(set(saved) | set(own)):
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"`checkpoint` {path} is of another run: its {name} is {saved.get(name)!r}, this one's {own.get(name)!r}"
            )
