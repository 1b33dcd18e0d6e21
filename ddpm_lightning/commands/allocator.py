"""How the C library treats memory that is freed."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
KEPT = 2**30
OLD_LIMIT = 2**25
"""What glibc before 2.35 takes at most as M_MMAP_THRESHOLD."""


def keep_freed_memory() -> bool:
    """Have glibc keep what this process frees, instead of handing it back to the system.

    Every pass of a network on a CPU frees its activations and takes as much again; what had gone
    back comes as pages that the kernel must find and clear one by one, a tenth of the time and
    more. The highest use of memory stays what it is, but for fragments; blocks above `KEPT` bytes
    go back.

    Returns:
        Whether it does so now: not without glibc, and not where the user has set MALLOC_ variables
        or tunables of malloc.
    """
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    is_set |= "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if is_set or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # both: once one is set, glibc no longer adapts the other
    taken = mallopt(M_MMAP_THRESHOLD, KEPT) or mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
    return bool(taken and mallopt(M_TRIM_THRESHOLD, KEPT))
