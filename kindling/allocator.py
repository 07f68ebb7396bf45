"""Lets a training process keep the memory of large tensors that are freed, for the next ones.

    keep_freed_memory()

glibc gives blocks above 32 MiB back to the kernel at once. The kernel then clears the pages of the next block, and that took up
to a fifth of a training step on a CPU (`code-50m` in bfloat16, whose logits are 100 MB at a time).
"""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 128 << 20  # bytes. With no limit, `code-50m` takes more memory at its peak and is no faster
LARGEST_INT = 2**31 - 1  # the highest threshold that can be set


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to LARGEST_KEPT bytes, for good; return whether its C library can do so.

    Newer versions of glibc can. Older ones refuse so large a limit, and are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # the second alone would set the first one to a low value
        return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
    return False
