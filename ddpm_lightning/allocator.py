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
    if not _is_ours_to_set():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # both: once one is set, glibc no longer adapts the other
    taken = mallopt(M_MMAP_THRESHOLD, KEPT) or mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
    return bool(taken and mallopt(M_TRIM_THRESHOLD, KEPT))


def return_freed_memory() -> bool:
    """Have glibc hand back, once, what this process has freed: the holes among blocks in use, too.

    Returns:
        Whether it was asked to: not without glibc or beside the user's settings, as above.
    """
    if not _is_ours_to_set():
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _is_ours_to_set() -> bool:
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    is_set |= "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    return not is_set and platform.libc_ver()[0] == "glibc"
