"""Random products of ring words: they show whether a sum is one, without its terms.

A chunk's words x in Z_(2^b), filled up with zeros to rows of W, are multiplied with two random matrices, modulo 2^b:

    Y = A X            A: PRODUCTS x rows, entries of 8 bits; X: rows x W
    P = B vec(Y)       B: PRODUCTS x (PRODUCTS W), entries of 32 bits

P is linear in x, so members' products add up to those of their words' sum. How often is an error E other than zero
missed? Let 2^k be the highest power of two that divides it, and E_ij / 2^k be odd. Whatever else a row of A is,
(row E)_j = 0 modulo 2^b fixes the lowest min(8, b - k) bits of its entry i; and the rows are independent. So Y(E) = 0
with probability at most 2^(-PRODUCTS min(8, b - k)); and likewise for B, whose entries have bits enough. Together at
most 2^(1 - PRODUCTS): that is the worst case, an error in the highest bit of words alone, which a single row misses
every second time. An odd error in words of 32 bits is missed with about 2^-128.

Two matrices, since one of random words for each word costs more than all else: this one reads each x once, and A is
small. Entries of 8 bits let Y be computed in float64, exactly: |x| <= 2^31, and 2^13 rows stay below 2^53. So the
library of linear algebra under numpy does it.

The four words of the header are told as they are: they are words of 32 bits in any ring, and few.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import LocalError
from p2pfl.core.machine import Bytes
from p2pfl.crypto.masks import Mask, Masker
from p2pfl.crypto.ring import HEADER_BYTES, HEADER_WORD, Layout
from p2pfl.crypto.suite import Suite

PRODUCTS = 16
"""An error goes unseen with 2^-15 at most, once for each lie: more would be dearer, not wiser."""
PRODUCT_BYTES = HEADER_BYTES + 4 * PRODUCTS
"""Of what `products` returns for a chunk."""
_LEAST_WIDTH, _USUAL_WIDTH = 16, 512
"""Words in a row. From 256 to 1024 it makes no difference that was measured. Few words have shorter rows, so that B is
not much larger than they are."""
_PIECE_WORDS, _BLOCK_WORDS = 1 << 16, 1 << 14
"""Words that are read at a time, and multiplied at a time: in larger blocks OpenBLAS uses further threads, which for
the most part wait, and take six times the CPU time for it."""
_EXACT_ROWS = 1 << 12
"""After so many, sums are reduced modulo 2^32: 2^12 products below 2^39 more stay far below 2^53."""

Source = Callable[[int, memoryview], None]
"""Writes a chunk's bytes from an offset on, a multiple of 16, into a buffer."""


def products(suite: Suite, layout: Layout, index: int, challenge: bytes, sources: Sequence[Source]) -> list[bytes]:
    """Return header and products of some words of one chunk, all with the same random words.

    Args:
        suite: the charter's.
        layout: of the sum.
        index: which chunk.
        challenge: the random words' cipher key, `suite.key_bytes`; used for this chunk only.
        sources: each the words of one.

    Returns:
        For each source PRODUCT_BYTES: the header, and the products as little-endian 32-bit words.
    """
    place, size = layout.chunk(index), layout.bits // 8
    count = (place.size - HEADER_BYTES) // size
    width = _width(count)
    height, block = _PIECE_WORDS // width, _BLOCK_WORDS // width
    random, right = suite.keystream(challenge), np.empty(PRODUCTS * width, "<u4")
    lefts: Bytes = np.empty((height, PRODUCTS), np.uint8)
    data: Bytes = np.empty(height * width * size, np.uint8)
    floats, scratch = np.empty((height, width)), np.empty((PRODUCTS, width))
    totals = [np.zeros((PRODUCTS, width)) for _ in sources]
    for first in range(0, -(-count // width), height):
        words = min(height * width, count - first * width)
        used = -(-words // width)
        random.expand_into(PRODUCTS * right.nbytes + first * PRODUCTS, lefts[:used].data.cast("B"))
        left = lefts[:used].T.astype(np.float64)
        flat = floats.reshape(-1)[: used * width]
        for total, source in zip(totals, sources, strict=True):
            source(HEADER_BYTES + first * width * size, data[: words * size].data)
            flat[:words], flat[words:] = data[: words * size].view(f"<i{size}"), 0
            for low in range(0, used, block):
                high = min(low + block, used)
                np.matmul(left[:, low:high], floats[low:high], out=scratch)
                np.add(total, scratch, out=total)
            if (first + used) % _EXACT_ROWS < height:
                np.mod(total, 2.0**32, out=total)
    mixed = [np.mod(total, 2.0**32).astype("<u4").reshape(-1) for total in totals]
    told: NDArray[Any] = np.empty((len(sources), PRODUCTS), "<u4")
    for number in range(PRODUCTS):
        random.expand_into(number * right.nbytes, right.data.cast("B"))
        for mine, each in zip(told, mixed, strict=True):
            mine[number] = np.multiply(right, each).sum(dtype=np.uint32)
    told &= _mask(layout.bits)
    return [_header(source) + each.tobytes() for source, each in zip(sources, told, strict=True)]


def _header(source: Source) -> bytes:
    header = bytearray(HEADER_BYTES)
    source(0, memoryview(header))
    return bytes(header)


def _width(count: int) -> int:
    """Return how many of so many words are in a row; a multiple of 4, so that B's rows begin at cipher blocks."""
    return max(_LEAST_WIDTH, min(_USUAL_WIDTH, count // 64 // 4 * 4))


def words_of(chunk: Bytes) -> Source:
    """Return a chunk's own words, uint8 [its size]."""

    def write(offset: int, out: memoryview) -> None:
        out[:] = chunk[offset : offset + len(out)].data

    return write


def unmasked(suite: Suite, layout: Layout, index: int, chunk: Bytes, masks: Sequence[Mask]) -> Source:
    """Return a chunk's words, uint8 [its size], with masks added.

    Raises:
        LocalError: the chunk has another length.
    """
    place = layout.chunk(index)
    if len(chunk) != place.size:
        raise LocalError(f"a chunk of {len(chunk)} bytes; it has {place.size}")
    masker, word = Masker(suite, masks), np.dtype(f"<u{layout.bits // 8}")

    def write(offset: int, out: memoryview) -> None:
        out[:] = chunk[offset : offset + len(out)].data
        masker.add(np.frombuffer(out, word if offset else HEADER_WORD), place.position + offset)

    return write


def pads(suite: Suite, challenge: bytes, masks: Sequence[Mask]) -> bytes:
    """Return what hides a member's products in the sum of all members': a short mask for each pair.

    Args:
        suite: the charter's.
        challenge: what the products are made with; never the same again.
        masks: which pairs', with the member's sign.

    Returns:
        PRODUCT_BYTES; those of the two of a pair cancel.
    """
    total: NDArray[Any] = np.zeros(PRODUCT_BYTES // 4, "<u4")
    info = canonical(["p2pfl/audit-pad/1", suite.name])
    for mask in masks:
        pad = np.frombuffer(suite.hkdf(mask.key, challenge, info, PRODUCT_BYTES), "<u4")
        (np.add if mask.sign > 0 else np.subtract)(total, pad, out=total)
    return total.tobytes()


def add_up(bits: int, told: Sequence[bytes]) -> bytes:
    """Return the sum of members' products, or pads, in a ring of so many bits."""
    total: NDArray[Any] = np.zeros(PRODUCT_BYTES // 4, "<u4")
    for each in told:
        total += np.frombuffer(each, "<u4")
    total[HEADER_BYTES // 4 :] &= _mask(bits)
    return total.tobytes()


def _mask(bits: int) -> np.uint32:
    return np.uint32((1 << bits) - 1)
