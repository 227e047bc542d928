"""Freed memory that stays with the process: on Linux, large activations otherwise go back to the system after every layer."""

import ctypes
import os
import platform


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's malloc.h


def keep_freed_memory():
    """Tell the C library of this process to use freed memory again and not to return it to the system.

    glibc asks the system for every block above 32 MiB and gives it back at once, so a U-Net on a CPU spends its time in page
    faults (`examples/benchmarks/kept_memory.py`). The process keeps its peak until it ends, which is right for a command and
    perhaps not for a program that embeds this package: nobody calls it there. From outside, the same is
    `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000`.

    Returns:
        `bool`: whether it was done: not on other systems and C libraries, and not where the environment has settings of
        malloc already.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))
