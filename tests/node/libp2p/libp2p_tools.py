"""Transports on loopback for the tests of the libp2p layer."""

import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from p2pfl.core.ids import PeerId
from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport
from p2pfl.node.libp2p.yamux import YamuxConnection
from p2pfl.node.transport import IncomingLane, LaneKind

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class Node:
    """One transport, where it listens, the lanes that came in and the refusals it reported."""

    def __init__(self, transport: Libp2pTransport) -> None:
        self.transport = transport
        self.identity = transport.identity
        self.addresses: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self._send, self.lanes = trio.open_memory_channel[tuple[LaneKind, IncomingLane]](1000)

    async def on_lane(self, kind: LaneKind, lane: IncomingLane) -> None:
        """Hand the lane to the test, which owns it from here on."""
        self._send.send_nowait((kind, lane))
        await trio.sleep_forever()

    @asynccontextmanager
    async def run(self, on_lane: Any = None, listen: tuple[str, ...] = (LOOPBACK,)) -> AsyncIterator["Node"]:
        async with self.transport.run(listen, on_lane or self.on_lane, self._on_refused) as addresses:
            self.addresses = list(addresses)
            yield self

    def _on_refused(self, who: str, why: str) -> None:
        self.refused.append((who, why))

    async def connect(self, other: "Node", timeout: float = 10) -> None:
        await self.transport.connect(other.identity, other.addresses, timeout)

    async def lane_to(self, other: "Node", kind: LaneKind = LaneKind.BULK) -> tuple[Any, IncomingLane]:
        """Both ends of a new lane."""
        outgoing = await self.transport.open(other.identity, kind)
        arrived, incoming = await other.lanes.receive()
        assert arrived == kind
        return outgoing, incoming


def nodes(
    count: int, strangers: int = 0, muxer: Any = YamuxConnection, channel: ChannelTerms | None = None
) -> list[Node]:
    """Nodes that list each other on their rosters, then strangers who list everyone but are listed by nobody else."""
    roster: set[PeerId] = set()
    everyone: set[PeerId] = set()
    members = [Node(Libp2pTransport(bytes([i + 1]) * 32, roster, channel, muxer)) for i in range(count)]
    outside = [Node(Libp2pTransport(bytes([200 + i]) * 32, everyone, channel)) for i in range(strangers)]
    roster.update(node.identity for node in members)
    everyone.update(node.identity for node in members + outside)
    return members + outside


def network(of: Any) -> Any:
    """libp2p's own network object under a node that runs."""
    return of.transport._host.get_network()


@asynccontextmanager
async def running(
    count: int, strangers: int = 0, muxer: Any = YamuxConnection, channel: ChannelTerms | None = None
) -> AsyncIterator[list[Node]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(node.run()) for node in nodes(count, strangers, muxer, channel)]


@asynccontextmanager
async def pair(muxer: Any = YamuxConnection) -> AsyncIterator[tuple[Node, Node]]:
    """Two nodes, the first connected to the second."""
    async with running(2, muxer=muxer) as (a, b):
        await a.connect(b)
        yield a, b


async def receive(lane: IncomingLane, size: int) -> bytes:
    """`size` bytes, or b"" at the lane's end."""
    buffer = bytearray(size)
    return bytes(buffer) if await lane.read_into(memoryview(buffer)) else b""


def port_of(address: str) -> int:
    return int(address.split("/")[4])


def silent_listener() -> AbstractAsyncContextManager[str]:
    """The address of a socket that accepts connections and never says a word."""

    @asynccontextmanager
    async def listening() -> AsyncIterator[str]:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            yield f"/ip4/127.0.0.1/tcp/{sock.getsockname()[1]}"

    return listening()


def dead_address() -> str:
    """An address at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"/ip4/127.0.0.1/tcp/{sock.getsockname()[1]}"


def open_sockets() -> int:
    """Sockets of this process, from /proc."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += str(entry.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue
    return count
