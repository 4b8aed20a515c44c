"""Memory that a process does not need: given back, kept for the next use, or left to the disk."""

import ctypes
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from p2pfl.core.errors import StoreFailed
from p2pfl.core.machine import Vector

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc
_LARGEST_INT = 2**31 - 1
_USUAL_TRIM = 128 << 10  # what mallopt(3) says of M_TRIM_THRESHOLD
MOST_KEPT = 32 << 20
"""Bytes from which a block is a mapping of its own at the latest: the most that glibc takes (mallopt(3))."""
LARGE = 1 << 20
"""Bytes from which a block is a mapping of its own; a guess: chunks of vectors are larger, and little else is."""


def return_large_blocks() -> bool:
    """Have the C library give large blocks back to the system as soon as they are freed; return whether it will.

    glibc raises the size from which it does that to that of the largest block ever freed, up to 32 MiB (mallopt(3)).
    Chunks of vectors come and go below that: a peer with 25 million parameters held two vectors more than it used. To
    set the size is to fix it.
    """
    return _set({_M_MMAP_THRESHOLD: LARGE})


@contextmanager
def keeping_blocks() -> Iterator[None]:
    """Keep freed blocks of up to 32 MiB while local steps need them again and again; give them back at the end.

    The activations of a small convolutional network are such blocks: with each a mapping of its own, a step took 63 ms,
    and 42 with this. It is for a process that has called `return_large_blocks`; other threads' blocks are kept, too.
    """
    if not _set({_M_MMAP_THRESHOLD: MOST_KEPT, _M_TRIM_THRESHOLD: _LARGEST_INT}):
        yield
        return
    try:
        yield
    finally:
        _set({_M_MMAP_THRESHOLD: LARGE, _M_TRIM_THRESHOLD: _USUAL_TRIM})
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_blocks() -> bool:
    """Have the C library keep what is freed, for a process that soon needs as much again; return whether it will.

    glibc gives blocks of 32 MiB and more back as soon as they are freed, and the system clears the memory of the next
    ones page by page. For a simulated convolutional network, whose activations are such blocks, that was 16 of 39
    seconds of the processor; the process holds a tenth more memory.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _LARGEST_INT})


def _set(options: Mapping[int, int]) -> bool:
    """Set options of the C library's allocator; other libraries than glibc have none, or ignore them."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    accepted = [bool(mallopt(option, value)) for option, value in options.items()]
    return all(accepted)


def mapped(vector: Vector, folder: Path) -> Vector:
    """Return a vector read-only, from a file in `folder` without a name, which ends with the last use of it.

    A small vector is returned as it is.

    Raises:
        StoreFailed: there is no room for the file.
    """
    if vector.nbytes < LARGE:
        return vector
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(vector.data)
            file.flush()
            return np.memmap(file, vector.dtype, "r", shape=vector.shape)
    except OSError as error:
        raise StoreFailed(f"{folder}: the initial model cannot be written: {error.strerror}; make room") from error
