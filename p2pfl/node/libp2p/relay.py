"""Circuits over a relay (libp2p circuit relay v2), for a peer that nobody can dial.

Such a peer keeps a connection to the relay and a reservation there. Who wants to reach it opens a stream to the relay,
the relay one to it, and pours one into the other. The channel is set up through these streams, end to end: the relay
sees who talks to whom, how much and when, and nothing else. All three are members of one roster.

The messages are libp2p's. Its own relay is not used: it remembers one circuit for each peer, so that the end of one
takes another down; and a reader that pauses for 15 s ends a circuit.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio
from libp2p.abc import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as PeerField
from libp2p.relay.circuit_v2.utils import read_delimited_msg, write_delimited_msg
from multiaddr import Multiaddr

from p2pfl.core.errors import Unreachable
from p2pfl.core.ids import PeerId

logger = logging.getLogger(__name__)

HOP = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
STOP = TProtocol("/libp2p/circuit/relay/0.2.0/stop")

ANSWER_DEADLINE = 10.0
"""Seconds for a message and its answer; libp2p's own default for a stream."""
RESERVED_FOR = 120.0
"""Seconds that a reservation stands without being renewed; a guess."""
RENEW_EVERY = 20.0
"""Seconds between renewals: so long is a peer out of reach whose relay started again. A guess."""
MOST_CIRCUITS, MOST_CIRCUITS_TO_ONE = 256, 32
"""Circuits through one relay, and to one peer behind it. Guesses: each holds two streams."""
PIECE = 256 * 1024
"""Bytes poured at once: a frame's."""


@dataclass(frozen=True)
class Circuit:
    """The way to a peer over a relay.

    Attributes:
        relay: who relays.
        address: the relay's own multiaddress.
    """

    relay: PeerId
    address: str


def circuit_of(text: str) -> Circuit | None:
    """Read an address `ADDRESS/p2p/RELAY/p2p-circuit[/p2p/PEER]`; None where it is another kind."""
    before, circuit, _ = text.partition("/p2p-circuit")
    address, named, relay = before.rpartition("/p2p/")
    if not circuit or not named:
        return None
    return Circuit(PeerId(relay), address)


class _CircuitStream(ReadWriteCloser):
    """A stream through a relay in the place of a socket."""

    def __init__(self, stream: NetStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        """Return what has come, `n` bytes at most; nothing at the end."""
        try:
            return bytes(await self._stream.read(n))
        except StreamEOF:
            return b""

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""
        await self._stream.write(data)

    async def close(self) -> None:
        """End the stream both ways; what is written already still arrives."""
        await self._stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return None: the other end's address is the relay's affair."""
        return None


def _raw(stream: NetStream, relay: ID, other: ID, *, is_initiator: bool) -> tuple[RawConnection, Multiaddr]:
    address = Multiaddr(f"/p2p/{relay}/p2p-circuit/p2p/{other}")
    kind = ConnectionType.RELAYED
    return RawConnection(_CircuitStream(stream), is_initiator, connection_type=kind, addresses=[address]), address


async def dial_through(host: BasicHost, relay: PeerId, peer: PeerId) -> None:
    """Connect to `peer` over a relay that we are connected to.

    Raises:
        Unreachable: the relay does not take us there; what libp2p raises where the handshake fails.
    """
    via, target = ID.from_base58(relay), ID.from_base58(peer)
    with trio.fail_after(ANSWER_DEADLINE):
        stream = await host.new_stream(via, [HOP])
        message = HopMessage(type=HopMessage.CONNECT, peer=PeerField(id=target.to_bytes()))
        status = await _ask(stream, message, HopMessage)
    if status != Status.OK:
        raise Unreachable(f"the relay {relay} does not lead there: status {status}")
    raw, _ = _raw(stream, via, target, is_initiator=True)
    await host.get_network().upgrade_outbound_raw_conn(raw, target)


async def reserve(host: BasicHost, relay: PeerId) -> None:
    """Ask a relay that we are connected to to lead others to us, for some time.

    Raises:
        Unreachable: it does not.
    """
    try:
        with trio.fail_after(ANSWER_DEADLINE):
            stream = await host.new_stream(ID.from_base58(relay), [HOP])
            status = await _ask(stream, HopMessage(type=HopMessage.RESERVE), HopMessage)
            await stream.close()
    except Exception as error:
        raise Unreachable(f"{relay} does not relay: {error!r}") from error
    if status != Status.OK:
        raise Unreachable(f"{relay} gives no reservation: status {status}")


async def _ask(stream: NetStream, message: object, kind: type[HopMessage] | type[StopMessage]) -> Status.ValueType:
    """Send a message and return the status of the answer; the stream is reset where it is not OK."""
    status = Status.CONNECTION_FAILED
    try:
        await write_delimited_msg(stream, message)
        answer = await read_delimited_msg(stream, kind)
        status = answer.status if answer.HasField("status") else Status.CONNECTION_FAILED
    finally:
        if status != Status.OK:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await stream.reset()
    return status


def expect_circuits(host: BasicHost, is_relay: Callable[[PeerId], bool]) -> None:
    """Let relays lead others to this peer.

    Args:
        host: this peer's.
        is_relay: whether this peer asked that one to.
    """

    async def handle(stream: NetStream) -> None:
        relay = stream.muxed_conn.peer_id
        with trio.fail_after(ANSWER_DEADLINE):
            message = await read_delimited_msg(stream, StopMessage)
            welcome = message.type == StopMessage.CONNECT and is_relay(PeerId(str(relay)))
            status = Status.OK if welcome else Status.PERMISSION_DENIED
            await write_delimited_msg(stream, StopMessage(type=StopMessage.STATUS, status=status))
        if status != Status.OK:
            await stream.close()
            return
        # Who it says is there counts for nothing: the channel finds out.
        raw, address = _raw(stream, relay, ID(message.peer.id), is_initiator=False)
        await host.get_network().upgrade_inbound_raw_conn(raw, address)

    host.set_stream_handler(STOP, handle)


class Relay:
    """Leads members to members that are connected here and asked for it.

    Args:
        host: this peer's.
        is_connected: whether a connection to a peer stands.
    """

    def __init__(self, host: BasicHost, is_connected: Callable[[PeerId], bool]) -> None:
        self._host = host
        self._is_connected = is_connected
        self._reserved: dict[PeerId, float] = {}
        self._circuits: Counter[PeerId] = Counter()
        host.set_stream_handler(HOP, self._handle)

    async def _handle(self, stream: NetStream) -> None:
        with trio.fail_after(ANSWER_DEADLINE):
            message = await read_delimited_msg(stream, HopMessage)
        source = PeerId(str(stream.muxed_conn.peer_id))
        if message.type == HopMessage.RESERVE:
            self._reserved[source] = trio.current_time() + RESERVED_FOR
            await self._answer(stream, Status.OK)
            await stream.close()
        elif message.type == HopMessage.CONNECT:
            await self._connect(stream, source, PeerId(str(ID(message.peer.id))))
        else:
            await self._answer(stream, Status.MALFORMED_MESSAGE)
            await stream.close()

    async def _answer(self, stream: NetStream, status: Status.ValueType) -> None:
        with trio.fail_after(ANSWER_DEADLINE):
            await write_delimited_msg(stream, HopMessage(type=HopMessage.STATUS, status=status))

    async def _connect(self, stream: NetStream, source: PeerId, target: PeerId) -> None:
        status = self._objection(target)
        if status == Status.OK:
            self._circuits[target] += 1
            try:
                status = await self._pour(stream, source, target)
            finally:
                self._circuits[target] -= 1
        if status != Status.OK:
            await self._answer(stream, status)
            await stream.close()

    def _objection(self, target: PeerId) -> Status.ValueType:
        if self._reserved.get(target, 0.0) < trio.current_time() or not self._is_connected(target):
            return Status.NO_RESERVATION
        is_full = self._circuits[target] >= MOST_CIRCUITS_TO_ONE or self._circuits.total() >= MOST_CIRCUITS
        return Status.RESOURCE_LIMIT_EXCEEDED if is_full else Status.OK

    async def _pour(self, stream: NetStream, source: PeerId, target: PeerId) -> Status.ValueType:
        """Open the far half of a circuit and keep it going; return why there was none, OK after one."""
        try:
            with trio.fail_after(ANSWER_DEADLINE):
                far = await self._host.new_stream(ID.from_base58(target), [STOP])
                told = StopMessage(type=StopMessage.CONNECT, peer=PeerField(id=ID.from_base58(source).to_bytes()))
                if await _ask(far, told, StopMessage) != Status.OK:
                    return Status.CONNECTION_FAILED
        except Exception as error:  # noqa: BLE001 - whatever libp2p raises, there is no way to that peer
            logger.debug("no circuit from %s to %s: %r", source, target, error)
            return Status.CONNECTION_FAILED
        try:
            await self._answer(stream, Status.OK)
            await _both(lambda: _copy(stream, far), lambda: _copy(far, stream))
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await far.reset()
                await stream.reset()
        return Status.OK


async def _copy(source: NetStream, sink: NetStream) -> None:
    with contextlib.suppress(Exception):  # a circuit that breaks is over: its ends notice
        while data := await source.read(PIECE):
            await sink.write(data)
    with contextlib.suppress(Exception):
        await sink.close()


async def _both(*functions: Callable[[], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(function)
