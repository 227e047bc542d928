"""The tracker that is always there: one JSON object per line."""

import json
import os
from pathlib import Path

from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import is_tensorboard_available, is_wandb_available


TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}


def check_report_to(report_to):
    """The chosen trackers of accelerate.

    Raises:
        ImportError: one is not installed; accelerate would only warn, and log nothing.
        ValueError: an unknown one.
    """
    if report_to in (None, "none"):
        return []
    names = [n for n, there in TRACKERS.items() if there()] if report_to == "all" else [report_to]
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"`--report_to` must be tensorboard, wandb, all or none, got {name}")
        if not TRACKERS[name]():
            raise ImportError(f"`--report_to` {name} needs a package: pip install {name}")
    return names


class JSONLTracker(GeneralTracker):
    """Writes what is logged to `log.jsonl`: `{"step": 1, "loss": ...}`, after a first line with the settings.

    Args:
        path (`Path`): the file.
        first_step (`int`): a run that goes on from here; what an earlier one logged of later steps is dropped.
    """

    name = "jsonl"
    requires_logging_directory = False

    @on_main_process
    def __init__(self, path, first_step=0):
        super().__init__()
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if first_step and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line).get("step", 0) <= first_step:
                        kept.append(line)
                except ValueError:
                    continue  # cut in the middle by a kill
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text("".join(line + "\n" for line in kept))
        os.replace(unfinished, self.path)
        self._stream = open(self.path, "a")

    @property
    def tracker(self):
        """The open file."""
        return self._stream

    @on_main_process
    def store_init_configuration(self, values):
        """The settings, as the first line; accelerate calls it."""
        if not self._stream.tell():
            self._write({"config": values})

    @on_main_process
    def log(self, values, step=None, **kwargs):
        """One line; accelerate calls it."""
        self._write({"step": step, **values})

    @on_main_process
    def finish(self):
        """Close the file."""
        self._stream.close()

    def _write(self, entry):
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()


def flat(values):
    """Settings as every tracker can take them."""
    simple = (str, int, float, bool)
    return {name: v if isinstance(v, simple) else str(v) for name, v in values.items() if v is not None}
