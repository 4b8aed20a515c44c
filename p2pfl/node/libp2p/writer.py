"""Who writes next to a yamux connection: frames whole, one at a time, those without a body first.

Owns the writing half of a secured connection. Over a channel that has `write_vec` (see `RecordChannel`) a long body is
a record of its own behind that of its header, so that neither end copies it; over any other it uses `write`.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import trio
from libp2p.abc import ISecureConn
from libp2p.stream_muxer.exceptions import MuxedStreamReset

from p2pfl.node.libp2p.frames import DATA, Limits, encode
from p2pfl.node.libp2p.streams import YamuxStream

OWN_RECORD = 192 * 1024
"""Bytes from which a body has a record of its own; a measurement: with 256 KiB it saves 8 % of both ends' CPU, with
128 KiB nothing."""

_NOTHING = memoryview(b"")


class RecordChannel(Protocol):
    """What a security channel may offer besides `ISecureConn`."""

    async def write_vec(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send each of `parts` as a record; nobody's cancellation cuts it short, only `close` does."""

    def read_record(self, place: Callable[[int], memoryview | None]) -> Coroutine[Any, Any, memoryview]:
        """Return the next record, valid until the next call; raise at the end of the connection.

        `place` is told how long it is, just before it is opened, and may say where to put it.
        """

    def leftover(self) -> bytes:
        """Return, and forget, what was read ahead before the muxer took over."""


def records_of(channel: ISecureConn) -> RecordChannel | None:
    """Return the channel as one of records, if it is."""
    return channel if hasattr(channel, "write_vec") else None


class FrameWriter:
    """Writes the frames of one connection until it is closed or breaks.

    Args:
        channel: what to write to.
        limits: how large a frame is, how many may wait, and how long one may take.
        on_broken: told why nothing can be written any more.
    """

    def __init__(self, channel: ISecureConn, limits: Limits, on_broken: Callable[[str], None]) -> None:
        self._channel = channel
        self._records = records_of(channel)
        self._limits = limits
        self._frame_size = limits.plain_frame if self._records is None else limits.frame
        self._on_broken = on_broken
        self._outbox: list[bytes] = []
        self._posted = trio.Event()
        self._turn = trio.Lock()
        self._frame = trio.CancelScope()
        self._began: float | None = None
        self._closed = False
        self.said_all = trio.Event()
        """Set when everything that was posted before `close` is written."""

    def post(self, frame: bytes) -> None:
        """Write a frame without a body soon, ahead of any data; nothing once closed."""
        if self._closed:
            return
        self._outbox.append(frame)
        self._posted.set()
        if len(self._outbox) > self._limits.control:
            self._on_broken("the peer provokes answers that it does not read")

    def close(self) -> None:
        """Take nothing more; what was posted is still written by `run`."""
        self._closed = True

    def abort(self) -> None:
        """Give up the frame that is being written, after the channel was closed."""
        self._frame.cancel()

    def is_stuck(self, now: float) -> bool:
        """Whether a frame takes longer than any should."""
        return self._began is not None and now - self._began >= self._limits.stuck

    async def run(self) -> None:
        """Write what is posted, until cancelled or broken."""
        while True:
            await self._posted.wait()
            self._posted = trio.Event()
            async with self._turn:
                if self._outbox:
                    try:
                        await self._write()
                    except MuxedStreamReset:
                        return

    async def write_data(self, stream: YamuxStream, data: memoryview) -> int:
        """Write a frame with as much of `data` as `stream.claim` allows, whole, and say how much that was.

        Only waiting for one's turn can be cancelled. Each frame takes its own, so streams share the connection.

        Raises:
            MuxedStreamError: the stream is closed.
            MuxedStreamReset: the stream or the connection broke.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            size = stream.claim(min(len(data), self._frame_size))
            if size:
                await self._write(encode(DATA, 0, stream.stream_id, size), data[:size])
            return size
        finally:
            self._turn.release()

    async def _write(self, frame: bytes = b"", body: memoryview = _NOTHING) -> None:
        """Write posted frames, and a frame behind them, in one go that nobody's cancellation cuts short.

        Raises:
            MuxedStreamReset: the connection broke.
        """
        head = b"".join((*self._outbox, frame))
        self._outbox = []
        is_last = self._closed
        self._began = trio.current_time()
        try:
            if self._records is None:
                with trio.CancelScope(shield=True) as self._frame:
                    await self._channel.write(b"".join((head, body)))
            elif len(body) < OWN_RECORD:
                await self._records.write_vec((b"".join((head, body)),))
            else:
                await self._records.write_vec((head, body))
        except Exception as error:  # whatever the channel raises
            reason = f"the connection broke: {error}"
            self._on_broken(reason)
            raise MuxedStreamReset(reason) from error
        finally:
            self._began = None
        if self._frame.cancelled_caught:
            raise MuxedStreamReset("the connection was closed while writing")
        if is_last:
            self.said_all.set()
