"""One stream of a yamux connection: its two windows, its two ends, and where its bytes wait.

Owns what a stream promises to libp2p and to lanes. Sees of its connection only `Carrier`; reads no socket.
"""

from collections import deque
from typing import Any, Protocol

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from p2pfl.node.libp2p.frames import FIN, RST, WINDOW, ReceiveWindow, SendWindow, encode

SMALL = 4096
"""Bytes up to which a piece is copied behind the one before it: one-byte frames must not cost an object each."""

MERGED = 64 * 1024
"""Bytes up to which small pieces share a chunk; a guess."""


class Carrier(Protocol):
    """What a stream needs of its connection."""

    def post(self, frame: bytes) -> None:
        """Send a frame without a body soon, ahead of any data; nothing once the connection is over."""

    async def write_data(self, stream: "YamuxStream", data: memoryview) -> int:
        """Send a frame with as much of `data` as `stream.claim` allows, whole, and say how much that was."""

    def settle(self, stream: "YamuxStream") -> None:
        """Forget the stream if it is over."""

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the IP address and port of the other end."""


class YamuxStream(IMuxedStream):
    """See `libp2p.abc.IMuxedStream`. One task at a time reads; writers' frames mix where there are several."""

    def __init__(self, connection: Carrier, number: int, window: ReceiveWindow) -> None:
        self.muxed_conn: Any = connection
        self.stream_id = number
        self.window = window
        self._carrier = connection
        self._credit = SendWindow()
        self._chunks: deque[memoryview | bytearray] = deque()
        self._offset = 0
        self._target: memoryview | None = None
        self._reader: trio.Event | None = None
        self._writers: trio.Event | None = None
        self._sent_end = self._received_end = False
        self._broken = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing can be read or written here any more."""
        return bool(self._broken) or (self._sent_end and self._received_end and not self._chunks)

    is_closed = is_over
    """libp2p's name for it."""

    # What the connection brings; none of these waits.

    @property
    def has_ended(self) -> bool:
        """Whether the peer said that it will send no more."""
        return self._received_end

    def deliver(self, piece: memoryview) -> None:
        """Take in a part of a body: into the view of a waiting reader if there is one, else into memory."""
        if self._broken:
            return
        if self._target is not None:
            size = min(len(self._target), len(piece))
            self._target[:size] = piece[:size]
            self._advance(self._target, size)
            piece = piece[size:]
        if len(piece):
            self._keep(piece)
        if not self._target:  # full, or the reader takes whatever there is
            self._wake_reader()

    def place(self, size: int) -> memoryview | None:
        """Return where a waiting reader wants the next `size` bytes of a body, None unless it wants all of them.

        Whoever puts them there calls `placed` before anything else runs.
        """
        if self._broken or self._target is None or size > len(self._target):
            return None
        return self._target[:size]

    def placed(self, size: int) -> None:
        """Take note that so many bytes are where `place` said."""
        if self._target is not None:
            self._advance(self._target, size)
            if not self._target:
                self._wake_reader()

    def _advance(self, target: memoryview, size: int) -> None:
        self._target = target[size:]
        self._release(size)

    def _keep(self, piece: memoryview) -> None:
        if len(piece) > SMALL and isinstance(piece.obj, bytes) and 2 * len(piece) >= len(piece.obj):
            self._chunks.append(piece)  # no copy: the record stays alive, of which this is the larger part
        elif self._chunks and isinstance(last := self._chunks[-1], bytearray) and len(last) + len(piece) <= MERGED:
            last += piece
        else:
            self._chunks.append(bytearray(piece))

    def grant(self, credit: int) -> None:
        """Let writers go on.

        Raises:
            Violation: more credit than a window can hold.
        """
        self._credit.grant(credit)
        if credit:
            self._wake_writers()

    def end(self) -> None:
        """Take note that the peer will send no more."""
        if self._broken:
            return
        self._received_end = True
        self._wake_reader()
        self._carrier.settle(self)

    def discard(self, reason: str) -> None:
        """Break both directions at once, and drop what was not read."""
        self._chunks.clear()
        self._received_end = False
        self.lose(reason)
        self._carrier.settle(self)

    def lose(self, reason: str) -> None:
        """Break both directions with the connection; what came before can still be read, a clean end included."""
        self._broken = self._broken or reason
        self._wake_reader()
        self._wake_writers()

    def _wake_reader(self) -> None:
        if self._reader is not None:
            self._reader.set()

    def _wake_writers(self) -> None:
        if self._writers is not None:
            self._writers.set()
            self._writers = None

    # Reading

    async def receive_into(self, view: memoryview) -> int:
        """Fill `view`; less only where the stream ends cleanly. Cancelling after the first byte resets the stream.

        Raises:
            MuxedStreamError: another task reads.
            MuxedStreamReset: the stream broke before `view` was full.
        """
        await self._check_reader()
        left = view[self._take(view) :]
        if left and not self._received_end and not self._broken:
            self._target = left
            try:
                await self._wait()
            except BaseException:
                if len(self._target) < len(view):
                    self.abort()
                raise
            finally:
                left, self._target = self._target, None
        if left and not self._received_end:
            raise MuxedStreamReset(self._broken)
        return len(view) - len(left)

    async def read(self, n: int | None = None) -> bytes:
        """Return what has come, `n` bytes at most, waiting for the first.

        Raises:
            MuxedStreamEOF: the stream ended cleanly.
            MuxedStreamError: another task reads.
            MuxedStreamReset: the stream broke.
        """
        if n == 0:
            return b""
        await self._check_reader()
        while not self._chunks:
            if self._received_end:
                raise MuxedStreamEOF("the stream has ended")
            if self._broken:
                raise MuxedStreamReset(self._broken)
            await self._wait()
        held = sum(map(len, self._chunks)) - self._offset
        data = bytearray(held if n is None or n < 0 else min(n, held))
        self._take(memoryview(data))
        return bytes(data)

    async def _check_reader(self) -> None:
        if self._reader is not None:
            raise MuxedStreamError("another task reads this stream")
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _wait(self) -> None:
        self._reader = trio.Event()
        try:
            await self._reader.wait()
        finally:
            self._reader = None

    def _take(self, view: memoryview) -> int:
        filled = 0
        while self._chunks and filled < len(view):
            chunk = self._chunks[0]
            size = min(len(chunk) - self._offset, len(view) - filled)
            with memoryview(chunk) as source:
                view[filled : filled + size] = source[self._offset : self._offset + size]
            filled += size
            self._offset += size
            if self._offset == len(chunk):
                self._chunks.popleft()
                self._offset = 0
        self._release(filled)
        if filled and not self._chunks:
            self._carrier.settle(self)
        return filled

    def _release(self, size: int) -> None:
        credit = self.window.release(size)
        if credit and not self._received_end and not self._broken:
            self._carrier.post(encode(WINDOW, 0, self.stream_id, credit))

    # Writing

    async def send(self, data: memoryview) -> None:
        """Send all of `data` as the reader gives credit, however long that takes.

        Raises:
            MuxedStreamError: this end is closed.
            MuxedStreamReset: the stream broke.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self.claim(0)
        while data:
            if not self._credit.left:
                await self._await_credit()
            data = data[await self._carrier.write_data(self, data) :]

    async def write(self, data: bytes) -> None:
        """Send all of `data`; see `send`."""
        await self.send(memoryview(data).cast("B"))

    def claim(self, size: int) -> int:
        """Take credit for up to `size` bytes, which are sent next; 0 where there is none.

        Raises:
            MuxedStreamError: this end is closed.
            MuxedStreamReset: the stream broke.
        """
        if self._broken:
            raise MuxedStreamReset(self._broken)
        if self._sent_end:
            raise MuxedStreamError("the stream is closed for writing")
        return self._credit.take(size)

    async def _await_credit(self) -> None:
        while not self._credit.left:
            self.claim(0)
            if self._writers is None:
                self._writers = trio.Event()
            await self._writers.wait()

    # Ending

    async def close(self) -> None:
        """End our direction; what the peer sends can still be read."""
        if not self._sent_end and not self._broken:
            self._sent_end = True
            self._carrier.post(encode(WINDOW, FIN, self.stream_id, 0))
            self._wake_writers()
            self._carrier.settle(self)
        await trio.lowlevel.checkpoint_if_cancelled()

    async def reset(self) -> None:
        """Break both directions, and tell the peer."""
        self.abort()
        await trio.lowlevel.checkpoint_if_cancelled()

    def abort(self) -> None:
        """Reset the stream without waiting."""
        if not self.is_over:
            self._carrier.post(encode(WINDOW, RST, self.stream_id, 0))
            self.discard("the stream was reset here")

    def set_deadline(self, ttl: int) -> None:
        """Not supported, like in libp2p's own yamux.

        Raises:
            NotImplementedError: always; trio has cancel scopes.
        """
        raise NotImplementedError("use trio's cancel scopes")

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the IP address and port of the other end."""
        return self._carrier.get_remote_address()

    async def __aenter__(self) -> "YamuxStream":
        return self
