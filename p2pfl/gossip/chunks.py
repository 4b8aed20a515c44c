"""A vector in as many chunks as a session has aggregators: cut, summed in the clear, committed to and read.

A chunk in the clear is float32 [4 + its length]: weight alpha, loss, local steps, 1 where these two are told, and the
values. Under masks it is ring words behind a header of the same meaning (`p2pfl.crypto.ring`). Either has 16 bytes in
front, and the average over chunks is by weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from p2pfl.core.errors import RemoteError
from p2pfl.core.machine import Bytes, Payload, Vector
from p2pfl.crypto.ring import (
    HEADER_BYTES,
    MOST_LOSS,
    MOST_STEPS,
    WEIGHT_ONE,
    Layout,
    Metrics,
    Ring,
    Totals,
    bounded,
    decode_into,
    read_header,
)
from p2pfl.gossip.average import is_sane
from p2pfl.gossip.mixing import squared_distance

HEADER = HEADER_BYTES // 4
"""Values in front of a chunk in the clear."""
COMMITTED_BYTES = 1 << 16
"""What a commitment's leaves cover; so a single block of a chunk can be checked. The design's size."""
_BLOCK = 1 << 16


def bounds(parameters: int, chunks: int, chunk: int) -> tuple[int, int]:
    """Return the first index of a chunk, and the first after it."""
    return chunk * parameters // chunks, (chunk + 1) * parameters // chunks


def pair(aggregators: Sequence[int], chunk: int) -> tuple[int, int]:
    """Return a chunk's aggregator and its deputy, which is the same where there is only one."""
    return aggregators[chunk], aggregators[(chunk + 1) % len(aggregators)]


def cut(vector: Vector, chunks: int, chunk: int, weight: int, metrics: Metrics) -> Vector:
    """Return a chunk of float32 [parameters] in the clear: float32 [4 + its length].

    Args:
        vector: the whole.
        chunks: how many there are.
        chunk: which.
        weight: in units of 1 / WEIGHT_ONE.
        metrics: of this peer's local steps.
    """
    start, end = bounds(len(vector), chunks, chunk)
    told = metrics.loss is not None
    loss, steps = bounded(metrics.loss or 0.0, MOST_LOSS), bounded(float(metrics.steps), MOST_STEPS) if told else 0.0
    header = np.array([weight / WEIGHT_ONE, loss, steps, told], np.float32)
    return np.concatenate((header, vector[start:end]))


def reduce(chunks: Sequence[Vector]) -> Vector:
    """Average chunks in the clear, in float64 in the order given.

    Returns:
        float32, as long as each: the total weight first, the weighted average of all that follows it.
    """
    total = float(sum(float(chunk[0]) for chunk in chunks))
    result: Vector = np.empty(len(chunks[0]), np.float32)
    for begin in range(0, len(result), _BLOCK):
        block = np.zeros(len(result[begin : begin + _BLOCK]))
        for chunk in chunks:
            block += float(chunk[0]) / total * chunk[begin : begin + _BLOCK].astype(np.float64)
        result[begin : begin + _BLOCK] = block
    result[0] = total
    return result


def digest(chunk: Payload) -> bytes:
    """Return the commitment to a chunk's bytes: BLAKE3 over the BLAKE3 of each block of 64 KiB, the last one shorter.

    The same under every suite: SM3 has 0.35 GB/s where BLAKE3 has 7 (one x86 core with AVX-512), and what is committed
    to is neither secret nor chosen by anybody but its signer.
    """
    view = chunk.data.cast("B")
    blocks = (blake3(view[begin : begin + COMMITTED_BYTES]).digest() for begin in range(0, len(view), COMMITTED_BYTES))
    return blake3(b"".join(blocks), derive_key_context="p2pfl 1 chunk of blocks").digest()


def sane_digest(chunk: Vector, least: int) -> bytes | None:
    """Return the commitment to an upload in the clear; None if it must not enter a sum.

    Args:
        chunk: float32 [4 + its length].
        least: the smallest weight that a member may have, in units of 1 / WEIGHT_ONE.
    """
    return digest(chunk) if is_sane(chunk) and _is_header(chunk, 1, least) else None


def _is_header(chunk: Vector, contributors: int, least: int) -> bool:
    weight, loss, steps, told = chunk[:HEADER].tolist()
    weighs = contributors * least / WEIGHT_ONE <= weight <= contributors
    return bool(weighs and -MOST_LOSS <= loss <= MOST_LOSS and 0 <= steps <= MOST_STEPS and 0 <= told <= 1)


@dataclass(frozen=True, slots=True)
class Format:
    """How the chunks and results of one session are written.

    Attributes:
        parameters: length of the vector.
        chunks: how many parts it has.
        ring: of the words; None where everything is in the clear.
        least: the smallest weight that a member may have, in units of 1 / WEIGHT_ONE.
        base: the digest of the base that changes are averaged from; empty where whole models are.
    """

    parameters: int
    chunks: int
    ring: Ring | None
    least: int
    base: bytes = b""

    def size(self, chunk: int) -> int:
        """Return the bytes of a chunk or its result."""
        bits = 32 if self.ring is None else self.ring.bits
        return Layout(self.parameters, self.chunks, bits).chunk(chunk).size

    @property
    def length(self) -> int:
        """The bytes of all results, one after the other; before them the base, if they are changes from one."""
        return sum(map(self.size, range(self.chunks))) + (4 * self.parameters if self.base else 0)

    def read(self, payload: bytes | bytearray | Bytes) -> Payload:
        """Return the bytes of chunks or results as an array, which is not copied."""
        if self.ring is None:
            return np.frombuffer(payload, np.dtype("<f4"))
        return np.frombuffer(payload, np.uint8)

    def decode_into(
        self,
        out: Vector,
        chunk: int,
        result: Payload,
        contributors: int,
        own: Vector | None = None,
        base: Vector | None = None,
    ) -> tuple[Totals, float]:
        """Write the average that a result says into its place: of models, or the base with the average change.

        Args:
            out: float32 [parameters].
            chunk: which.
            result: as `read` gives it.
            contributors: how many survived.
            own: float32 [parameters], may be `out`: what the average, or average change, is compared with before it is
                written.
            base: float32 [parameters], which has the digest in this format, where there is one.

        Returns:
            What the header says; and the squared L2 distance of this part of `own` to the average, 0 without it.

        Raises:
            RemoteError: it cannot be the sum of so many members' chunks; nothing is written then.
        """
        place = slice(*bounds(self.parameters, self.chunks, chunk))
        mine = None if own is None else own[place]
        if self.ring is not None:
            data = result.data.cast("B")
            totals = read_header(data, contributors, self.ring.members, self.least)
            divisor, under = totals.weight / WEIGHT_ONE, None if base is None else base[place]
            return totals, decode_into(self.ring, data, contributors, divisor, out[place], mine, under)
        plain: Vector = np.asarray(result, np.float32)
        if not (is_sane(plain) and _is_header(plain, contributors, self.least)):
            raise RemoteError(f"a result that is no average of {contributors} members' chunks")
        weight, loss, steps, told = plain[:HEADER].tolist()
        distance = 0.0 if mine is None else squared_distance(mine, plain[HEADER:])
        out[place] = plain[HEADER:]
        known = (loss, steps) if told == 1 else (None, None)
        return Totals(round(weight * WEIGHT_ONE), *known), distance
