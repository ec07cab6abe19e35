"""Nothing in, glibc's malloc told to keep what it has: for messages of a hundred kilobytes and more."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8

# Blocks below this size come from the heap: the most that glibc allows.
_MMAP_THRESHOLD = 32 << 20
# So much of the heap's free end is kept, and it grows by so much at once.
_KEPT_BYTES = 64 << 20
_TOP_PAD = 4 << 20


def keep_freed_memory() -> bool:
    """
    Have malloc reuse memory instead of giving it back to the kernel at once; return whether it does.

    By default each block above 128 KiB is mapped and unmapped again, and each of its pages costs a fault:
    1,500 faults for a message of 3 MB, more than all that is computed from it. Only glibc has these settings.
    One arena, because the heaps of others end at 64 MB. Up to 64 MB of free memory stay with the process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # musl has none.
    settings = (
        (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        (_M_TOP_PAD, _TOP_PAD),
        (_M_ARENA_MAX, 1),
    )
    taken = [
        mallopt(parameter, value) for parameter, value in settings
    ]  # Each, whatever becomes of the others.
    return all(taken)
