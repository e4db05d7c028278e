"""What malloc does with memory that is freed, on the CPU."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
OF_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next step, where malloc is glibc's.

    By default every tensor above 32 MB is given back to the system and asked for anew in every step, and filled with
    zeros page by page: a sixth of the time of a training from kept tokens. What the user has set stays.
    """
    if any(name in os.environ for name in OF_USER):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
