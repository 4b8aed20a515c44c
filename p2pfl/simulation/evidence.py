"""What a capture gives away: a search for known plaintext, and what anyone on the wire reads from it without a key.

Pure functions over bytes. The search is for exact bytes: it finds plaintext that travels as it is, at any offset and
across the borders of packets. That it finds nothing does not prove a cipher right: published test vectors do that.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from p2pfl.node.capture import Piece, Side

WINDOW = 16
"""Bytes compared at once. Any 31 bytes in a row of a known text contain a whole aligned window of it."""
MIN_DISTINCT = 6
"""Windows of fewer different byte values, such as zeros, are everywhere, and tell nothing."""
SCAN_BYTES = 1 << 20
_PREFIX_BITS = 24
BURST_GAP = 0.002
"""Seconds of silence in one direction that part two bursts. A guess: loopback delivers a large write without any."""
MAX_LINE = 256
MIN_RECORD = 17
"""A record with a tag of 16 bytes holds at least a byte."""


@dataclass(frozen=True)
class Match:
    """How much of a known text was found.

    Attributes:
        windows: how many windows were looked for.
        found: how many of them occur.
        offset: where the first occurrence begins, in its stream; None without one.
    """

    windows: int
    found: int
    offset: int | None


class KnownText:
    """An index of known plaintexts' windows, to be looked for in many streams.

    Args:
        texts: the plaintexts; windows are taken at every multiple of `WINDOW` in each.
    """

    def __init__(self, texts: Iterable[bytes]) -> None:
        windows: set[bytes] = set()
        for text in texts:
            windows.update(text[start : start + WINDOW] for start in range(0, len(text) - WINDOW + 1, WINDOW))
        self.windows = frozenset(window for window in windows if len(set(window)) >= MIN_DISTINCT)
        # Three bytes of each window, as a table: one look-up for each offset of the stream leaves few to compare whole.
        self._prefixes = np.zeros(1 << _PREFIX_BITS, np.bool_)
        for window in self.windows:
            self._prefixes[int.from_bytes(window[:3], "little")] = True

    def search(self, streams: Iterable[bytes]) -> Match:
        """Look for every window at every offset of every stream."""
        found: set[bytes] = set()
        first: int | None = None
        for stream in streams:
            for offset in self._candidates(stream):
                window = stream[offset : offset + WINDOW]
                if window in self.windows:
                    found.add(window)
                    first = offset if first is None else first
        return Match(len(self.windows), len(found), first)

    def _candidates(self, stream: bytes) -> Iterable[int]:
        values = np.frombuffer(stream, np.uint8)
        for start in range(0, len(stream) - WINDOW + 1, SCAN_BYTES):
            end = min(start + SCAN_BYTES, len(stream) - WINDOW + 1)
            yield from (start + np.flatnonzero(self._prefixes[_prefixes(values[start : end + 2])])).tolist()


def _prefixes(values: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the little-endian number of three bytes at each offset, uint32 [len(values) - 2]."""
    wide = values.astype(np.uint32)
    return wide[:-2] | np.left_shift(wide[1:-1], 8) | np.left_shift(wide[2:], 16)


# What an observer reads


@dataclass(frozen=True)
class ClearText:
    """The part of a stream before its encryption.

    Attributes:
        lines: of multistream-select, without their newlines.
        length: how many bytes they take.
    """

    lines: tuple[str, ...]
    length: int


def clear_lines(stream: bytes) -> ClearText:
    """Read the lines of multistream-select that a stream begins with: each after its length, ended by a newline."""
    lines, position = [], 0
    while (line := _line(stream, position)) is not None:
        text, position = line
        lines.append(text)
    return ClearText(tuple(lines), position)


def _line(stream: bytes, position: int) -> tuple[str, int] | None:
    length = shift = 0
    for count in range(2):
        if position + count >= len(stream):
            return None
        byte = stream[position + count]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    start = position + count + 1
    line = stream[start : start + length]
    if not 0 < length <= MAX_LINE or len(line) < length or not re.fullmatch(rb"[\x20-\x7e]+\n", line):
        return None
    return line[:-1].decode("ascii"), start + length


@dataclass(frozen=True)
class Record:
    """An encrypted record, as the length in the clear before it says.

    Attributes:
        offset: of that length, in the stream.
        size: of the record, without the length's own bytes.
    """

    offset: int
    size: int


def records(stream: bytes, start: int, sender: Side) -> tuple[Record, ...]:
    """Return the records of a direction, without the handshake's messages.

    Args:
        stream: everything that this end sent.
        start: where the clear lines end.
        sender: whose; the dialer's first two messages are the handshake's (Noise XX), the listener's first one.

    Returns:
        The records; nothing where no framing that we know fits the whole stream.
    """
    handshake = 2 if sender is Side.DIALER else 1
    for length_bytes in (2, 4):
        found = _records(stream, start, handshake, length_bytes)
        if found is not None:
            return found
    return ()


def _records(stream: bytes, position: int, handshake: int, length_bytes: int) -> tuple[Record, ...] | None:
    found: list[Record] = []
    while position < len(stream):
        is_handshake = len(found) < handshake
        width = 2 if is_handshake else length_bytes
        # The highest bit of a length of 4 bytes is a flag.
        size = int.from_bytes(stream[position : position + width], "big") & 0x7FFF_FFFF
        if position + width + size > len(stream) or (not is_handshake and size < MIN_RECORD):
            return None
        found.append(Record(position, size))
        position += width + size
    return tuple(found[handshake:])


def times(pieces: Sequence[Piece], sender: Side, offsets: Sequence[int]) -> list[float]:
    """Return when the bytes at these offsets of a direction were sent, in seconds since 1970."""
    own = [piece for piece in pieces if piece.sender is sender]
    ends = np.cumsum([len(piece.data) for piece in own])
    return [own[number].at for number in np.searchsorted(ends, offsets, side="right").tolist()]


@dataclass(frozen=True)
class Burst:
    """Bytes of one direction without a pause between them.

    Attributes:
        at: when it began, in seconds since 1970.
    """

    at: float
    size: int


def bursts(pieces: Iterable[Piece], sender: Side) -> list[Burst]:
    """Group what one end sent by the pauses in it."""
    result: list[Burst] = []
    last = -math.inf
    for piece in pieces:
        if piece.sender is not sender:
            continue
        if piece.at - last > BURST_GAP:
            result.append(Burst(piece.at, len(piece.data)))
        else:
            result[-1] = Burst(result[-1].at, result[-1].size + len(piece.data))
        last = piece.at
    return result


def commonest(sizes: Sequence[int]) -> tuple[int, int]:
    """Return, of sizes at least half the largest, the commonest, the larger of equals, and how often it occurs."""
    counts = Counter(size for size in sizes if 2 * size >= max(sizes))
    return max(counts.items(), key=lambda item: (item[1], item[0]), default=(0, 0))


def median_interval(times: Sequence[float]) -> float | None:
    """Return the median time between one and the next, in seconds."""
    return float(np.median([later - earlier for earlier, later in pairwise(times)])) if len(times) > 1 else None


def entropy(data: bytes) -> float:
    """Return the Shannon entropy of single bytes, in bits per byte."""
    if not data:
        return 0.0
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    shares = counts[counts > 0] / len(data)
    return float(-(shares * np.log2(shares)).sum())


def random_entropy(size: int) -> float:
    """Return what `entropy` gives of that many random bytes, to first order (Miller 1955: the bias is (k - 1) / 2n)."""
    return max(0.0, 8 - 255 / (2 * size * math.log(2))) if size else 0.0
