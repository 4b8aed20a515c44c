"""Everything of ours that reaches into libp2p's private parts, and nothing else does.

Each patch answers a fault of the one version it was written against; `tests/node/libp2p/test_libp2p_contract.py` has a
test for each, to be read beside it on an upgrade. Decides nothing about peers or lanes.
"""

import logging
import struct
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection import swarm_connection
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import RetryConfig, Swarm
from libp2p.peer.id import ID
from libp2p.security.security_multistream import SecurityMultistream
from libp2p.stream_muxer.exceptions import MuxedStreamError, MuxedStreamReset
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import (
    HEADER_SIZE,
    PROTOCOL_ID,
    TYPE_DATA,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)

from p2pfl.core.errors import InvalidConfig

logger = logging.getLogger(__name__)

KNOWN_VERSIONS = frozenset({"0.8.1"})
"""Versions of libp2p whose private parts were read; a new one is added after its contract tests pass."""

FRAME_DEADLINE = 30.0
"""Seconds one frame of at most 64 KiB may take to enter the socket before the connection is given up; a guess."""

STALL_DEADLINE = 60.0
"""Seconds a reader may give no credit before its stream is given up (stock: 5, which a busy peer can need); a guess."""

CREDIT_POLL = 0.005
"""Seconds between looks for credit: stock yamux announces it to nobody (and looks every 10 ms)."""

MAX_PAYLOAD = 65519 - HEADER_SIZE
"""Payload bytes of a frame that fits one Noise record (65535 minus a tag of 16); stock's 65524 take two records."""

MAX_BUFFERED = 64 * 1024 * 1024
"""Bytes one connection may send ahead of our readers; stock enforces no window. Four full windows of 16 MiB."""

MAX_INCOMING_STREAMS = 32
"""Streams one connection may have open towards us; a link needs two, identify and ping one each for a moment."""

IDENTIFY_PUSH = TProtocol("/ipfs/id/push/1.0.0")


def verify_version() -> None:
    """Refuse to patch a libp2p whose private parts nobody here has read.

    Raises:
        InvalidConfig: another version is installed.
    """
    found = version("libp2p")
    if found not in KNOWN_VERSIONS:
        known = ", ".join(sorted(KNOWN_VERSIONS))
        raise InvalidConfig(f"libp2p {found} is installed, but this works with {known}: pip install libp2p=={known}")


def silence() -> None:
    """Keep libraries' log lines from the console; a handler on the logger `libp2p` still gets its warnings."""
    for name in ("libp2p", "multiaddr"):
        log = logging.getLogger(name)
        log.setLevel(logging.WARNING)
        log.propagate = False
        if not log.handlers:
            log.addHandler(logging.NullHandler())
    # This module logs through the root logger, and the first such call gives the whole process a console handler.
    swarm_connection.logging = logging.getLogger(swarm_connection.__name__)


class GuardedYamux(Yamux):
    """Stock yamux with whole frames, our own reads and writes, and a bound on what it buffers.

    What to fall back on where `yamux.YamuxConnection`, which needs none of this, misbehaves. On the wire they are one.
    `send`, `receive_into` and `abandon` are `lanes.Muxer`; streams of other protocols go through stock's methods, and
    so through `_write_frame` below.
    """

    async def start(self) -> None:
        """Run the connection to its end; what it dies of is not the host's affair."""
        try:
            await super().start()
        except Exception as error:  # noqa: BLE001 - leaving here would end every connection
            logger.debug("the muxer of %s failed: %r", self.peer_id, error)
            await self.secured_conn.close()

    async def _write_frame(self, data: bytes) -> None:
        """Write one frame whole, whoever is cancelled meanwhile: half a frame would garble the connection.

        Waiting for one's turn can be cancelled; the frame itself only times out, which costs the connection.
        """
        async with self._write_lock:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + FRAME_DEADLINE) as scope:
                await self.secured_conn.write(data)
            if scope.cancelled_caught:
                await self.secured_conn.close()
                raise ConnectionClosedError("the peer reads nothing", transport="tcp")

    async def send(self, stream: YamuxStream, data: memoryview) -> None:
        """Send all of `data` as the reader's credit allows; see `lanes.Muxer`.

        Raises:
            MuxedStreamError: the stream is broken, or its reader gave no credit for `STALL_DEADLINE` seconds.
        """
        sent = 0
        while sent < len(data):
            # No checkpoint between looking at the window and taking from it, so no lock either.
            if stream.send_closed or stream.closed:
                raise MuxedStreamError("the stream is closed")
            size = min(stream.send_window, MAX_PAYLOAD, len(data) - sent)
            if size <= 0:
                await self._wait_for_credit(stream)
                continue
            stream.send_window -= size
            header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.stream_id, size)
            await self._write_frame(header + data[sent : sent + size])
            sent += size

    async def _wait_for_credit(self, stream: YamuxStream) -> None:
        with trio.move_on_after(STALL_DEADLINE):
            while stream.send_window <= 0 and not stream.closed:
                await trio.sleep(CREDIT_POLL)
            return
        raise MuxedStreamError("the reader is stalled")

    async def receive_into(self, stream: YamuxStream, view: memoryview) -> int:
        """Put what has come into `view`, waiting for the first byte; see `lanes.Muxer`.

        Reads stock's buffer rather than calling its `read`, which reports a reset as an end, loses bytes when
        cancelled, and sends a window update for every read.

        Raises:
            MuxedStreamReset: the stream was reset, or its connection is gone.
        """
        number = stream.stream_id
        while True:
            buffer = self.stream_buffers.get(number)
            if buffer is None or stream.reset_received or self.streams.get(number) is not stream:
                raise MuxedStreamReset("the stream was reset, or its connection closed")
            if buffer:
                return await self._take(stream, buffer, view)
            if stream.recv_closed:
                return 0
            event = self.stream_events[number]
            await event.wait()
            if self.stream_events.get(number) is event:
                self.stream_events[number] = trio.Event()

    async def _take(self, stream: YamuxStream, buffer: bytearray, view: memoryview) -> int:
        size = min(len(buffer), len(view))
        with memoryview(buffer) as source:
            view[:size] = source[:size]
        del buffer[:size]
        unreturned = stream.target_recv_window - stream.recv_window - len(buffer)
        if unreturned >= stream.target_recv_window // 2:
            # The bytes are ours already: a cancelled caller must still learn how many.
            with trio.CancelScope(shield=True):
                await stream._auto_tune_and_send_window_update()
        return size

    async def abandon(self, stream: YamuxStream) -> None:
        """Reset `stream`; stock forgets the reader that waits on it here. See `lanes.Muxer`."""
        event = self.stream_events.get(stream.stream_id)
        try:
            await stream.reset()
        finally:
            if event is not None:
                event.set()

    async def _read_data_body(self, length: int) -> bytes:
        if length + sum(map(len, self.stream_buffers.values())) > MAX_BUFFERED:
            # The one exception on which the stock reader closes the connection; after others it reads on, out of step.
            raise trio.TooSlowError("the peer sends beyond its credit")
        return await super()._read_data_body(length)


class MuxerChoice(MuxerMultistream):
    """Negotiates a muxer and builds the class that was asked for; stock builds its own yamux whatever is listed."""

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Agree on a muxer over `conn`.

        Raises:
            MultiselectError: none is common.
        """
        protocol, muxer = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(muxer(conn, peer_id), conn, protocol)


def harden(
    host: BasicHost,
    muxers: Mapping[TProtocol, Callable[[ISecureConn, ID], IMuxedConn]],
    security: SecurityMultistream,
) -> None:
    """Take from a new host, before it runs, whatever would dial, deny, remember or crash on its own account."""
    network = host.get_network()
    network.upgrader.security_multistream = security
    network.upgrader.muxer_multistream = MuxerChoice(muxers)
    network.retry_config = RetryConfig(max_retries=0)
    network.set_resource_manager(None)  # denies by host-wide memory and rates; ours are bounds per connection
    network.set_stream_handler(_contained(network.common_stream_handler))
    _silence_auto_connector(network)
    # Asking every peer who it is costs a stream per connection, runs in trio's system tasks, and fills the peerstore
    # with addresses of the peer's choosing; being asked stays possible.
    host._schedule_identify = _do_nothing
    host.remove_stream_handler(IDENTIFY_PUSH)


def _silence_auto_connector(network: Swarm) -> None:
    connector = network.auto_connector
    connector.maybe_connect = _do_nothing_async
    connector.run_background_task = _do_nothing_async
    network._schedule_auto_connect = _do_nothing
    network.auto_connector.record_disconnect = _do_nothing  # a table of every peer ever lost


def _contained(handler: Any) -> Any:
    """Wrap the one handler that all incoming streams pass: what leaves it otherwise ends the host."""

    async def contained(stream: NetStream) -> None:
        if len(stream.swarm_conn.streams) > MAX_INCOMING_STREAMS + _outgoing(stream):
            await _reset(stream)
            return
        try:
            await handler(stream)
        except BaseExceptionGroup as group:
            await _reset(stream)
            _, fatal = group.split(Exception)
            if fatal is not None:
                raise fatal from None
        except Exception as error:  # noqa: BLE001 - see above; trio.Cancelled passes
            logger.debug("a stream of %s failed: %r", stream.muxed_conn.peer_id, error)
            await _reset(stream)

    return contained


def _outgoing(stream: NetStream) -> int:
    ours = 1 if stream.muxed_conn.is_initiator else 0
    return sum(s.muxed_stream.stream_id % 2 == ours for s in stream.swarm_conn.streams)


async def _reset(stream: NetStream) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(1):
        await stream.reset()  # swallows what goes wrong


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


async def _do_nothing_async(*_: Any, **__: Any) -> None:
    return None


YAMUX = TProtocol(PROTOCOL_ID)
