"""A command of `fs-psm` in one process and split over two by accelerate, a thread each: wall time, and the same results.

    python examples/benchmarks/two_processes.py --json two_processes.json -- certify --tower DIR_OR_ID --images FOLDER --seed 0
    python examples/benchmarks/two_processes.py -- evaluate --config examples/benchmarks/two_processes.yaml --set data=DATA

After `--` stands any command that takes `--output` and deals its images out; the output is chosen here. `ratio` is the time of
one process over that of two, imports and loading of models included. Two is perfect, and needs two idle cores.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import device_name, median, median_ratio, write

from fs_psm_hf.certification.results_file import versions


CONFIG = Path(__file__).parents[1] / "accelerate_configs" / "two_cpu_processes.yaml"


def run(words, processes, output):
    """Seconds of a whole run, and the lines of its file but the first, which names the run."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", str(processes), "-m"]
    command = [*launch, "fs_psm_hf.cli", *words, "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(
            f"{shlex.join(words)} in {processes} processes ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    return seconds, [json.loads(line) for line in output.read_text().splitlines()[1:]]


def without_folders(word):
    """A word of a command without folders of this machine."""
    name, equals, value = word.rpartition("=")
    return name + equals + (Path(value).name if Path(value).is_absolute() else value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("words", nargs="+", metavar="COMMAND", help="of fs-psm, after --")
    args = parser.parse_args()
    seconds, same = {1: [], 2: []}, True
    for _ in range(args.repeats):
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for processes in (1, 2):
                output = Path(folder) / str(processes) / "out.jsonl"  # its name stands in the file
                output.parent.mkdir()
                spent, found[processes] = run(args.words, processes, output)
                seconds[processes].append(spent)
        same = same and found[1] == found[2]
        print({processes: values[-1] for processes, values in seconds.items()}, "same file:", same, flush=True)
    options = shlex.join(without_folders(word) for word in args.words)
    write(args.json, {
        "command_measured": f"fs-psm {options}", "seconds_one_process": median(seconds[1]),
        "seconds_two_processes": median(seconds[2]), "ratio": median_ratio(seconds[1], seconds[2]), "same_file": same,
        "device": device_name("cpu"), "cores": os.cpu_count(), "threads": 1, "repeats": args.repeats,
        "versions": versions(), "command": f"python examples/benchmarks/two_processes.py -- {options}",
    })  # fmt: skip


if __name__ == "__main__":
    main()
