"""`fs-psm certify` in one process and split over two by accelerate, a thread each: wall time, and the same certificates.

    python examples/benchmarks/two_processes.py --images FOLDER --tower DIR_OR_ID --psm DIR_OR_ID --json two_processes.json

`ratio` is the time of one process over that of two, starts included; `ratio_without_start` takes off the time that the same
command needs for one draw of each image. Two is perfect, and needs two idle cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from measuring import device_name, median

from fs_psm_hf.certification.identity import short_name
from fs_psm_hf.certification.results_file import versions


CONFIG = Path(__file__).parents[1] / "accelerate_configs" / "two_cpu_processes.yaml"


def certify(args, processes, output, num_samples):
    """Seconds of a whole run, and the file's lines without what names the run."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", str(processes), "-m"]
    command = [*launch, "fs_psm_hf.cli", "certify", "--tower", args.tower, "--images", str(args.images)]
    command += ["--psm", args.psm] if args.psm else []
    command += ["--sigma", str(args.sigma), "--num-samples", str(num_samples), "--seed", "0", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"`certify` in {processes} processes ended with {done.returncode}: {done.stderr[-2000:]}")
    return seconds, [json.loads(line) for line in output.read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", required=True)
    parser.add_argument("--psm")
    parser.add_argument("--images", type=Path, required=True, help="a folder")
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--num-samples", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True, help="for the files of the runs; must not exist")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    seconds, same = {1: [], 2: [], "start 1": [], "start 2": []}, True
    for repeat in range(args.repeats):
        found = {}
        for processes in (1, 2):
            output = args.folder / f"{repeat}-{processes}" / "out.jsonl"  # the name stands in the file
            spent, found[processes] = certify(args, processes, output, args.num_samples)
            seconds[processes].append(spent)
            spent, _ = certify(args, processes, args.folder / f"{repeat}-{processes}" / "start.jsonl", 2)
            seconds[f"start {processes}"].append(spent)
        same = same and found[1] == found[2]
        print({name: values[-1] for name, values in seconds.items()}, "same file:", same, flush=True)
    one, two, start_one, start_two = (median(values) for values in seconds.values())
    result = {
        "seconds_one_process": one, "seconds_two_processes": two, "seconds_start_one": start_one,
        "seconds_start_two": start_two, "ratio": one / two,
        "ratio_without_start": (one - start_one) / (two - start_two), "same_file": same,
        "images": sum(line["kind"] == "image" for line in found[1]), "num_samples": args.num_samples,
        "tower": short_name(args.tower), "psm": short_name(args.psm) if args.psm else None, "sigma": args.sigma,
        "device": device_name("cpu"), "cores": os.cpu_count(), "threads": 1, "repeats": args.repeats,
        "versions": versions(),
        "command": "python examples/benchmarks/two_processes.py --images FOLDER "
        f"--tower {short_name(args.tower)} --num-samples {args.num_samples}",
    }  # fmt: skip
    print(json.dumps({k: v for k, v in result.items() if k != "versions"}, indent=1))
    if args.json is not None:
        unfinished = args.json.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(unfinished, args.json)


if __name__ == "__main__":
    main()
