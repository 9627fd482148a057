"""Freed memory is kept for the next tensor: much of a flow's time on a processor otherwise goes into asking for it again."""

from __future__ import annotations

import ctypes
import sys

#: Parameters of mallopt(3): no blocks of their own for large arrays, return memory above 2 GB only, ask for 256 MB at a time.
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = (-4, 0), (-1, 2**31 - 1), (-2, 2**28)


def keep_freed_memory() -> bool:
    """Tell glibc to keep what a process frees: only what lies free above 2 GB at the end of the heap goes back to the system.

    By default large arrays are mapped one by one, and the kernel zeroes their pages at first touch, again and again. Values do not
    change; a process holds on to about the most memory that it ever needed. Elsewhere than on Linux with glibc nothing is done.

    Returns:
        Whether the allocator took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all([mallopt(*setting) == 1 for setting in (_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD)])
