"""What a process does with memory that it no longer needs."""

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
LARGE = 1 << 20
"""Bytes from which a block is a mapping of its own; a guess: chunks of vectors are larger, and little else is."""


def return_large_blocks() -> bool:
    """Have the C library give large blocks back to the system as soon as they are freed; return whether it will.

    glibc raises the size from which it does that to that of the largest block ever freed, up to 32 MiB (mallopt(3)).
    Chunks of vectors come and go below that: a peer with 25 million parameters held two vectors more than it used. To
    set the size is to fix it. Other C libraries have no such setting, or ignore it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGE))
