"""The C library's heap in a process that computes.

A step allocates and frees the same megabytes in every block. glibc gives such memory back to the system at once and has
it mapped and cleared again, page by page, which takes longer than what is computed in it.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
MAX_KEPT_BYTES = 1 << 30  # free memory at the heap's end
MAX_HEAP_BYTES = 32 << 20  # of one allocation; what is larger, like weights, is mapped by itself


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, for all of its threads; call it before they allocate.

    Nothing happens where the C library has no such settings. `malloc_trim` still gives everything back.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    set_option(_M_ARENA_MAX, 1)  # the heaps of other threads are unmapped whenever they are empty
    set_option(_M_MMAP_THRESHOLD, MAX_HEAP_BYTES)
    set_option(_M_TRIM_THRESHOLD, MAX_KEPT_BYTES)


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can: what loading or shifting weights took."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
