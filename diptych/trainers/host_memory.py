"""Memory of the host that the next step will want again."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's `mallopt`, as its header malloc.h numbers them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER, _WHOLE_HEAP, _LARGEST = -1, 64 << 20, 32 << 20
"""Trimming switched off; what a thread's heap may hold; above what size glibc can't let the threshold of `mmap` grow, in bytes."""


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for good and for the whole process, rather than give it back to the system; False where the C library isn't glibc.

    The activations of a step are freed by its backward pass, and from a heap whose end is free glibc returns memory at once. The next step
    touches it all as new pages, which the system has to find and clear: 10,000 a step of a small U-Net, 4 to 5 % of its time
    (`docs/performance.md`). Blocks above 32 MiB are given back as before, so a process doesn't hold more than the largest step needs.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_TOP_PAD, _WHOLE_HEAP)])
