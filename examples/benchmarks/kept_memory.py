"""A purifier on a CPU in processes that keep the memory they free, as `fs-psm` does, against others.

    python examples/benchmarks/kept_memory.py --psm light --image-size 224 --json kept_memory.json

There is no way back within a process, so that each measurement is one of its own, the two kinds in turn.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from measuring import DTYPES, clock, median, median_ratio, parser, prepare, psm_model, report

from fs_psm_hf.heap import keep_freed_memory
from fs_psm_hf.smoothing import default_batch_size


def child(args):
    """Seconds of a pass in this process, one per call."""
    if args.child == "kept" and not keep_freed_memory():
        raise RuntimeError("this C library does not keep freed memory, or MALLOC_* is set")
    purifier = psm_model(args.psm, DTYPES[args.dtype], "cpu").purifier
    noisy = torch.rand(args.pass_size, 3, args.image_size, args.image_size)
    seconds = []
    with torch.inference_mode():
        for _ in range(args.calls + 2):
            start = clock(args)
            purifier.denoise(noisy, 0.25)
            seconds.append(clock(args) - start)
    return seconds[2:]  # the first two make the layouts of the weights and the heap


def main():
    made = parser(__doc__, image_size=224, repeats=3)
    made.add_argument("--pass-size", type=int, help="noisy images in a pass (default: the tower's own)")
    made.add_argument("--calls", type=int, default=8, help="in each process")
    made.add_argument("--child", choices=("default", "kept"), help="one process, for this script itself")
    args = made.parse_args()
    prepare(args)
    if args.child:
        print(json.dumps(child(args)))
        return
    purifier = psm_model(args.psm, DTYPES[args.dtype], "cpu").purifier
    args.pass_size = args.pass_size or default_batch_size(args.image_size, args.image_size, "cpu", purifier)
    seconds = {"default": [], "kept": []}
    for _ in range(args.repeats):
        for kind, found in seconds.items():
            words = [
                "--child", kind, "--psm", args.psm, "--image-size", args.image_size, "--dtype", args.dtype,
                "--threads", args.threads, "--pass-size", args.pass_size, "--calls", args.calls,
            ]  # fmt: skip
            done = subprocess.run(
                [sys.executable, str(Path(__file__)), *map(str, words)], capture_output=True, text=True, check=True
            )
            found.append(median(json.loads(done.stdout.splitlines()[-1])))
            print(kind, found[-1], flush=True)
    args.tower = "none"
    report(
        args,
        pass_size=args.pass_size,
        seconds_default=median(seconds["default"]),
        seconds_kept=median(seconds["kept"]),
        ratio=median_ratio(seconds["default"], seconds["kept"]),
    )


if __name__ == "__main__":
    main()
