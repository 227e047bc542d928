"""A command keeps the memory that its layers free."""

import os
import platform
import subprocess
import sys

import pytest


FAULTS = """
import resource
import torch
from fs_psm_hf.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16_000_000)  # 64 MB, above what glibc keeps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
done = keep_freed_memory()
faults()
print(done, given_back, faults())
"""


def run(**environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, given_back, faults = done.stdout.split()
    return kept == "True", int(given_back), int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_large_blocks_are_fetched_from_the_system_once():
    kept, given_back, faults = run()
    assert kept
    assert given_back > 100  # even where a page is 2 MB
    assert faults < given_back / 10


def test_settings_of_the_environment_stay():
    kept, given_back, faults = run(MALLOC_MMAP_MAX_="65536")
    assert not kept
    assert faults == pytest.approx(given_back, rel=0.2)
