"""Our own muxer for `/yamux/1.0.0`: driven by events, with enforced windows, large frames and a keep-alive.

Owns a connection from its negotiation to its end: what is read, and when it is over. The format and its
arithmetic are `frames`, a stream's own state `streams`, the writing half `writer`.
"""

import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from multiaddr import Multiaddr

from p2pfl.node.budget import CONNECTION_BURST, CONNECTION_RATE, FRAME_COST, OPEN_COST, Allowance
from p2pfl.node.libp2p import frames
from p2pfl.node.libp2p.frames import Deframer, Frame, Limits, Pulse, ReceiveWindow, StreamNumbers, Violation, encode
from p2pfl.node.libp2p.streams import YamuxStream
from p2pfl.node.libp2p.writer import FrameWriter, records_of

logger = logging.getLogger(__name__)


class YamuxConnection(IMuxedConn):
    """See `libp2p.abc.IMuxedConn`, and `p2pfl.node.libp2p.lanes.Muxer` for the methods of lanes.

    Whatever goes wrong, `start` ends the connection and returns: nothing a peer sends leaves it as an exception.
    """

    def __init__(self, secured_conn: ISecureConn, peer_id: ID, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        self.secured_conn = secured_conn
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self._limits = limits
        self._records = records_of(secured_conn)
        self._streams: dict[int, YamuxStream] = {}
        self._numbers = StreamNumbers(secured_conn.is_initiator)
        self._spare = limits.spare
        self._accept, self._accepted = trio.open_memory_channel[YamuxStream](limits.incoming)
        # Reading
        self._deframer = Deframer()
        self._allowance = Allowance(CONNECTION_RATE, CONNECTION_BURST)
        self._sink: YamuxStream | None = None
        self._sink_ends = False
        self._placed = False
        self._reading = trio.CancelScope()
        self._pulse = Pulse(limits.idle, limits.answer, heard=0.0)
        self._writer = FrameWriter(secured_conn, limits, self._fail)
        # Ending
        self._leaving = False
        self._reason = "the connection was closed"

    # What libp2p asks

    @property
    def is_initiator(self) -> bool:
        """Whether this end dialled."""
        return bool(self.secured_conn.is_initiator)

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self._leaving

    @property
    def is_closed(self) -> bool:
        """Whether the socket is closed."""
        return self.event_closed.is_set()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Return the addresses of the transport beneath."""
        return list(self.secured_conn.get_transport_addresses())

    def get_connection_type(self) -> ConnectionType:
        """Return whether the transport beneath is direct or relayed."""
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the IP address and port of the other end."""
        address: tuple[str, int] | None = self.secured_conn.get_remote_address()
        return address

    async def open_stream(self) -> YamuxStream:
        """Open a stream; the peer may still refuse it, which then reads as a reset.

        Raises:
            MuxedStreamError: the connection is over, or has as many streams as it may.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self.is_established:
            raise MuxedStreamError(self._reason)
        if self._count(ours=True) >= self._limits.outgoing:
            raise MuxedStreamError(f"{self._limits.outgoing} streams are open")
        return self._add(self._numbers.allot(), frames.SYN)

    async def accept_stream(self) -> YamuxStream:
        """Wait for the next stream that the peer opens.

        Raises:
            MuxedConnUnavailable: the connection is over.
        """
        try:
            return await self._accepted.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable(self._reason) from None

    async def start(self) -> None:
        """Run the connection to its end."""
        if self.event_started.is_set():
            return
        self._pulse.hear(trio.current_time())
        self.event_started.set()
        if self.event_closed.is_set():
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._writer.run)
                nursery.start_soon(self._watch)
                try:
                    with self._reading:
                        await self._read()
                finally:
                    await self._hang_up()
                    nursery.cancel_scope.cancel()
        finally:
            self.event_closed.set()
        if self.on_close is not None:
            try:
                await self.on_close()
            except Exception as error:  # noqa: BLE001 - libp2p's own bookkeeping must not end the host
                logger.debug("the connection of %s was not cleared away: %r", self.peer_id, error)

    async def close(self) -> None:
        """End the connection; what was written before reaches a peer that reads. Bounded by `Limits.goodbye`."""
        if not self.event_started.is_set():
            await self._hang_up()
            self.event_closed.set()
            return
        self._leave(frames.NORMAL, "the connection was closed here")
        try:
            # The peer closes its end once it has read all. Closing ours before could destroy what is on its way.
            with trio.move_on_after(self._limits.goodbye):
                await self.event_closed.wait()
        finally:
            self._reading.cancel()
            with trio.CancelScope(shield=True):  # bounded, like `_hang_up`
                await self.event_closed.wait()

    # What lanes ask

    def send(self, stream: YamuxStream, data: memoryview) -> Coroutine[Any, Any, None]:
        """See `lanes.Muxer`."""
        return stream.send(data)

    def receive_into(self, stream: YamuxStream, view: memoryview) -> Coroutine[Any, Any, int]:
        """See `lanes.Muxer`."""
        return stream.receive_into(view)

    def abandon(self, stream: YamuxStream) -> Coroutine[Any, Any, None]:
        """See `lanes.Muxer`."""
        return stream.reset()

    # What streams ask

    def post(self, frame: bytes) -> None:
        """See `streams.Carrier`."""
        self._writer.post(frame)

    def write_data(self, stream: YamuxStream, data: memoryview) -> Coroutine[Any, Any, int]:
        """See `streams.Carrier`."""
        return self._writer.write_data(stream, data)

    def settle(self, stream: YamuxStream) -> None:
        """Forget the stream if it is over."""
        if stream.is_over and self._streams.pop(stream.stream_id, None) is not None:
            self._spare += stream.window.size - frames.INITIAL_WINDOW

    # Keep-alive

    async def _watch(self) -> None:
        while True:
            await trio.sleep_until(self._pulse.deadline)
            now = trio.current_time()
            if self._writer.is_stuck(now):
                self._fail("the peer reads nothing")
            elif self._pulse.is_dead(now):
                self._fail("the peer is silent")
            elif self._pulse.is_due(now):
                self._pulse.asked = now
                self.post(encode(frames.PING, frames.SYN, 0, 0))

    # Reading

    async def _read(self) -> None:
        try:
            if self._records is not None:
                await self._feed(memoryview(self._records.leftover()))
            while True:
                self._placed = False
                piece = await self._receive()
                if self._placed:  # its header was heard
                    self._on_placed(len(piece))
                else:
                    self._pulse.hear(trio.current_time())
                    await self._feed(memoryview(piece))
        except Violation as violation:
            logger.debug("%s broke the muxer's protocol: %s", self.peer_id, violation)
            self._leave(frames.PROTOCOL_ERROR, f"the peer broke the protocol: {violation}")
            with trio.move_on_after(self._limits.goodbye):
                await self._writer.said_all.wait()
        except ConnectionClosedError as error:
            self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - whatever the channel raises, it costs this connection only
            logger.debug("the connection of %s broke: %r", self.peer_id, error)
            self._fail(f"the connection broke: {error}")

    def _receive(self) -> Coroutine[Any, Any, bytes | memoryview]:
        return self._read_any() if self._records is None else self._records.read_record(self._place)

    async def _read_any(self) -> bytes:
        piece: bytes = await self.secured_conn.read()
        if not piece:
            raise ConnectionClosedError("the peer closed the connection", transport="tcp")
        return piece

    def _place(self, size: int) -> memoryview | None:
        """Let a record that is nothing but body be opened in the memory of whoever waits for it."""
        place = self._sink.place(size) if self._sink is not None and size <= self._deframer.left else None
        self._placed = place is not None
        return place

    def _on_placed(self, size: int) -> None:
        self._deframer.left -= size
        if self._sink is not None:
            self._sink.placed(size)
            if self._sink_ends and not self._deframer.left:
                self._sink.end()

    async def _feed(self, piece: memoryview) -> None:
        for part in self._deframer.feed(piece):
            if isinstance(part, Frame):
                self._on_frame(part)
                if self._allowance.note(_cost(part)):
                    await self._allowance.rest()
            elif self._sink is not None:
                self._sink.deliver(part)
                if self._sink_ends and not self._deframer.left:
                    self._sink.end()

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind == frames.GO_AWAY:
            raise ConnectionClosedError("the peer closed the connection", transport="tcp")
        if frame.kind != frames.PING:
            self._on_stream_frame(frame)
        elif frame.flags == frames.SYN:
            self.post(encode(frames.PING, frames.ACK, 0, frame.length))

    def _on_stream_frame(self, frame: Frame) -> None:
        self._sink = None
        stream = self._on_open(frame.stream) if frame.flags & frames.SYN else self._streams.get(frame.stream)
        if stream is None and not self._numbers.is_used(frame.stream):
            raise Violation(f"stream {frame.stream} was never opened")
        if frame.kind == frames.DATA:
            if stream is not None and not stream.has_ended:
                stream.window.take(frame.length)
            elif frame.length > self._limits.window:  # of a stream that is over: dropped as it comes
                raise Violation(f"{frame.length} bytes, more than any credit")
            elif stream is not None:
                stream.abort()
                stream = None
        elif stream is not None:
            stream.grant(frame.length)
        if stream is None:
            return
        if frame.flags & frames.RST:
            stream.discard("the peer reset the stream")
            return
        self._sink_ends = bool(frame.flags & frames.FIN)
        if self._deframer.left:
            self._sink = stream
        elif self._sink_ends:
            stream.end()

    def _on_open(self, number: int) -> YamuxStream | None:
        self._numbers.admit(number)
        if self._leaving or self._count(ours=False) >= self._limits.incoming:
            self.post(encode(frames.WINDOW, frames.RST, number, 0))
            return None
        stream = self._add(number, frames.ACK)
        try:
            self._accept.send_nowait(stream)
        except trio.WouldBlock:  # streams that ended before anyone looked at them fill the queue
            stream.abort()
            return None
        return stream

    # Streams

    def _add(self, number: int, flag: int) -> YamuxStream:
        """Make a stream and announce its window. Credit for all streams together stays within `Limits.buffered`."""
        extra = 0 if self._numbers.is_ours(number) else min(self._limits.window - frames.INITIAL_WINDOW, self._spare)
        self._spare -= extra
        stream = YamuxStream(self, number, ReceiveWindow(frames.INITIAL_WINDOW + extra))
        self._streams[number] = stream
        self.post(encode(frames.WINDOW, flag, number, extra))
        return stream

    def _count(self, ours: bool) -> int:
        return sum(self._numbers.is_ours(number) == ours for number in self._streams)

    # Ending

    def _leave(self, code: int, reason: str) -> None:
        """Say that nothing more will come, and break all streams."""
        if not self._leaving:
            self.post(encode(frames.GO_AWAY, 0, 0, code))
            self._break_off(reason)

    def _fail(self, reason: str) -> None:
        """End the connection without another word."""
        self._break_off(reason)
        self._reading.cancel()

    def _break_off(self, reason: str) -> None:
        if self._leaving:
            return
        self._leaving = True
        self._reason = reason
        self._writer.close()
        self._accept.close()
        for stream in list(self._streams.values()):
            stream.lose(reason)
        self._streams.clear()

    async def _hang_up(self) -> None:
        """Close the socket, which frees whoever is stuck writing to it."""
        self._break_off(self._reason)
        with trio.CancelScope(shield=True), trio.move_on_after(self._limits.goodbye):
            try:
                await self.secured_conn.close()
            except Exception as error:  # noqa: BLE001 - it was gone before
                logger.debug("a connection of %s did not close cleanly: %r", self.peer_id, error)
        self._writer.abort()


def _cost(frame: Frame) -> float:
    return OPEN_COST if frame.flags & frames.SYN and frame.kind != frames.PING else FRAME_COST
