"""The yamux wire format and its arithmetic: bounds, frames, windows, stream numbers, when a silent peer is given up.

Pure functions and small values: no I/O, no clock, no memory taken on a peer's word. The format is that of
hashicorp/yamux `spec.md`, which libp2p/specs `yamux/README.md` adopts as `/yamux/1.0.0`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

HEADER = struct.Struct("!BBHII")
"""Version, kind, flags, stream number, length (spec, "Framing")."""

DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

NORMAL, PROTOCOL_ERROR = 0, 1
"""What a GO_AWAY carries in place of a length (spec, "Session termination")."""

INITIAL_WINDOW = 256 * 1024
"""Bytes that may be sent on a new stream before any credit for it arrives (spec, "Flow Control")."""

LARGEST = 2**32 - 1
"""What the fields for lengths and stream numbers hold."""

MAX_SKIPPED = 256
"""Numbers a peer may leave out and use later: the backlog of unacknowledged streams that libp2p's spec allows."""


@dataclass(frozen=True)
class Limits:
    """What bounds a connection. Sizes in bytes, times in seconds."""

    window: int = 32 * 1024 * 1024
    """What a peer may send ahead on a stream that it opened; a measurement: at 20 ms round trip 860 MB/s of
    the link's 1240, with 8 MiB 330. Our readers always read, so it is under way, and not in memory. A stream that we
    opened has the initial window only: what comes back on ours are answers."""
    buffered: int = 80 * 1024 * 1024
    """What it may send ahead on all. The initial windows of as many streams as there may be are set aside, 16 MiB; the
    rest makes the windows of two streams full, and those of others stay initial: a link has one lane for bulk, which
    may wait behind the one for control or an old one that ends."""
    frame: int = 256 * 1024
    """Payload of a frame; a measurement: larger ones delay other streams, and gain nothing."""
    plain_frame: int = 4 * 65519 - HEADER.size
    """The same where the channel is standard Noise: four whole records of 65,519 bytes."""
    incoming: int = 32
    """Streams a peer may have open; a link needs two, identify and ping one each for a moment."""
    outgoing: int = 32
    """Streams we may have open: as many as a peer of ours takes."""
    control: int = 1024
    """Frames without a body that wait to be written; a peer that provokes more does not read."""
    idle: float = 15.0
    """Silence after which a peer is pinged; a guess, below the minute or so after which routers forget a connection."""
    answer: float = 30.0
    """Silence after a ping that ends the connection; a guess: several times what a full socket buffer takes."""
    stuck: float = 60.0
    """How long one frame may take to enter the socket: 256 KiB at 35 kbit/s; a guess."""
    goodbye: float = 0.5
    """How long the end waits for the peer to take note of it; a guess: several round trips."""

    @property
    def spare(self) -> int:
        """What is left of `buffered` beyond the initial windows, which the specification gives to every stream."""
        return max(0, self.buffered - (self.incoming + self.outgoing) * INITIAL_WINDOW)


class Violation(Exception):
    """The peer broke the protocol in a way that costs the connection."""


class Frame(NamedTuple):
    """A header, checked as far as it can be on its own."""

    kind: int
    flags: int
    stream: int
    length: int


def encode(kind: int, flags: int, stream: int, length: int) -> bytes:
    """Return the 12 bytes of a header."""
    return HEADER.pack(0, kind, flags, stream, length)


def decode(header: bytes | bytearray | memoryview) -> Frame:
    """Read the 12 bytes of a header.

    Raises:
        Violation: another version, an unknown kind or flag, flags that contradict each other, or a stream where none
            belongs.
    """
    version, kind, flags, stream, length = HEADER.unpack(header)
    if version != 0 or kind > GO_AWAY:
        raise Violation(f"version {version}, kind {kind}")
    if flags > SYN | ACK | FIN | RST or flags & (SYN | ACK) == SYN | ACK:
        raise Violation(f"flags {flags:#x}")
    if kind == PING and flags not in (SYN, ACK):
        raise Violation(f"a ping with flags {flags:#x}")
    if (stream == 0) != (kind in (PING, GO_AWAY)):
        raise Violation(f"kind {kind} on stream {stream}")
    return Frame(kind, flags, stream, length)


class Deframer:
    """Cuts pieces of a byte stream, however they fall, into headers and the pieces of their bodies."""

    def __init__(self) -> None:
        self._header = bytearray()
        self.left = 0
        """Bytes of the current body that are still to come."""

    def feed(self, piece: memoryview) -> Iterator[Frame | memoryview]:
        """Yield what `piece` brings: headers, and after one of data its body, in parts of `piece` that are not copied.

        Raises:
            Violation: a header is none.
        """
        position, end = 0, len(piece)
        while position < end:
            if self.left:
                size = min(self.left, end - position)
                self.left -= size
                yield piece[position : position + size]
                position += size
                continue
            size = min(HEADER.size - len(self._header), end - position)
            self._header += piece[position : position + size]
            position += size
            if len(self._header) == HEADER.size:
                frame = decode(self._header)
                self._header.clear()
                self.left = frame.length if frame.kind == DATA else 0
                yield frame


class SendWindow:
    """What a peer still takes on a stream."""

    def __init__(self) -> None:
        self.left = INITIAL_WINDOW

    def take(self, wanted: int) -> int:
        """Return how many of `wanted` bytes may be sent, and count them as sent."""
        size = min(wanted, self.left)
        self.left -= size
        return size

    def grant(self, size: int) -> None:
        """Add what the peer announced.

        Raises:
            Violation: more than a window can hold.
        """
        if size > LARGEST - self.left:
            raise Violation("credit beyond 4 GiB")
        self.left += size


class ReceiveWindow:
    """What a peer may still send on a stream; its credit is returned in halves, so that few frames carry it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._left = size
        self._read = 0

    def take(self, size: int) -> None:
        """Count bytes that the peer announces.

        Raises:
            Violation: they are more than it has credit for.
        """
        if size > self._left:
            raise Violation(f"{size} bytes with credit for {self._left}")
        self._left -= size

    def release(self, size: int) -> int:
        """Count bytes that were read, and return the credit to announce now, which may be none yet."""
        self._read += size
        if 2 * self._read < self.size:
            return 0
        credit, self._read = self._read, 0
        self._left += credit
        return credit


class StreamNumbers:
    """Which stream numbers were used: odd ones by the end that dialled, even ones by the other.

    A peer that opens streams from several threads may send their numbers out of order, so those it skipped are
    remembered, the highest `MAX_SKIPPED` of them.
    """

    def __init__(self, is_initiator: bool) -> None:
        self._next = 1 if is_initiator else 2
        self._highest = 0 if is_initiator else -1
        self._skipped: set[int] = set()

    def is_ours(self, number: int) -> bool:
        """Whether a stream of this number is one that we opened."""
        return number % 2 == self._next % 2

    def is_used(self, number: int) -> bool:
        """Whether a stream of this number was ever opened."""
        if self.is_ours(number):
            return number < self._next
        return number <= self._highest and number not in self._skipped

    def allot(self) -> int:
        """Return the number for our next stream.

        Raises:
            OverflowError: all are used.
        """
        number = self._next
        if number > LARGEST:
            raise OverflowError("all stream numbers are used")
        self._next += 2
        return number

    def admit(self, number: int) -> None:
        """Count a number as used by the peer.

        Raises:
            Violation: it is one of ours, or used already.
        """
        if self.is_ours(number) or self.is_used(number):
            raise Violation(f"opened stream {number}, which is not its to open, or not again")
        if number < self._highest:
            self._skipped.remove(number)
            return
        first = max(self._highest + 2, number - 2 * MAX_SKIPPED)
        self._skipped.update(range(first, number, 2))
        self._skipped = set(sorted(self._skipped)[-MAX_SKIPPED:])
        self._highest = number


@dataclass
class Pulse:
    """When a silent peer is asked for a sign of life, and when it is given up. Times in seconds of one clock."""

    idle: float
    """Silence after which it is asked."""
    answer: float
    """Silence after being asked that makes it dead."""
    heard: float
    asked: float | None = None

    @property
    def deadline(self) -> float:
        """When to look again."""
        return self.heard + self.idle if self.asked is None else self.asked + self.answer

    def hear(self, now: float) -> None:
        """Note that something came: whatever it is, the peer lives."""
        self.heard = now
        self.asked = None

    def is_dead(self, now: float) -> bool:
        """Whether it was asked and had its time."""
        return self.asked is not None and now >= self.deadline

    def is_due(self, now: float) -> bool:
        """Whether to ask it now."""
        return self.asked is None and now >= self.deadline
