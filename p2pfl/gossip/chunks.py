"""A vector in as many chunks as a session has aggregators, and their average in the clear."""

import hashlib
from collections.abc import Sequence

import numpy as np

from p2pfl.core.machine import Payload, Vector
from p2pfl.gossip.average import is_sane


def bounds(parameters: int, chunks: int, chunk: int) -> tuple[int, int]:
    """Return the first index of a chunk, and the first after it."""
    return chunk * parameters // chunks, (chunk + 1) * parameters // chunks


def cut(vector: Vector, weight: float, count: int) -> tuple[Vector, ...]:
    """Cut float32 [parameters] into so many chunks, each float32 [1 + its length], the weight first."""
    chunks = []
    for chunk in range(count):
        start, end = bounds(len(vector), count, chunk)
        chunks.append(np.concatenate((np.array([weight], np.float32), vector[start:end])))
    return tuple(chunks)


def reduce(chunks: Sequence[Vector]) -> Vector:
    """Average chunks, each float32 [1 + length] with its weight first, in float64 in the order given.

    Returns:
        float32 [1 + length]: the total weight, and the weighted average.
    """
    total = float(sum(float(chunk[0]) for chunk in chunks))
    average = np.zeros(len(chunks[0]) - 1)
    for chunk in chunks:
        average += float(chunk[0]) / total * chunk[1:].astype(np.float64)
    return np.concatenate(([total], average)).astype("<f4")


def digest(vector: Payload) -> bytes:
    """Return the SHA-256 of a vector's bytes."""
    return hashlib.sha256(vector.data.cast("B")).digest()


def sane_digest(vector: Vector, most: float) -> bytes | None:
    """Return the digest of a chunk in the clear, of at most this weight; None if it must not enter a sum or a model."""
    return digest(vector) if is_sane(vector) and 0 < vector[0] <= most else None


def pair(aggregators: Sequence[int], chunk: int) -> tuple[int, int]:
    """Return a chunk's aggregator and its deputy, which is the same where there is only one."""
    return aggregators[chunk], aggregators[(chunk + 1) % len(aggregators)]
