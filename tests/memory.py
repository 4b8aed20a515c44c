"""A transport over memory, and a network of machines without any driver: for tests."""

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from p2pfl.core.errors import StreamReset, Unreachable
from p2pfl.core.ids import PeerId, Seconds
from p2pfl.node.transport import LaneHandler, LaneKind, RefusalHandler


class MemoryLane:
    """Both ends of a lane."""

    def __init__(self, writer: PeerId, reader: PeerId) -> None:
        self.writer, self.reader = writer, reader
        self.buffer = bytearray()
        self.ended = self.broken = False
        self.changed = trio.Event()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken or self.ended:
            raise StreamReset("the lane is broken")
        self.buffer += data
        self._notify()

    async def read_into(self, view: memoryview) -> bool:
        await trio.lowlevel.checkpoint()
        while len(self.buffer) < len(view):
            if self.broken or (self.ended and self.buffer):
                raise StreamReset("the lane is broken")
            if self.ended:
                return False
            await self.changed.wait()
        view[:] = self.buffer[: len(view)]
        del self.buffer[: len(view)]
        return True

    async def close(self) -> None:
        self.ended = True
        self._notify()

    async def reset(self) -> None:
        self.broken = True
        self._notify()


class End:
    """One end of a `MemoryLane`, as that end's peer sees it."""

    def __init__(self, lane: MemoryLane, peer: PeerId) -> None:
        self.peer = peer
        self.write, self.read_into, self.close, self.reset = lane.write, lane.read_into, lane.close, lane.reset


class MemoryNetwork:
    """Who listens, and which connections stand."""

    def __init__(self) -> None:
        self.peers: dict[PeerId, MemoryTransport] = {}
        self.lanes: dict[frozenset[PeerId], list[MemoryLane]] = defaultdict(list)
        self.connected: set[frozenset[PeerId]] = set()

    async def cut(self, left: PeerId, right: PeerId) -> None:
        pair = frozenset((left, right))
        self.connected.discard(pair)
        for lane in self.lanes.pop(pair, []):
            await lane.reset()


class MemoryTransport:
    """`p2pfl.node.transport.Transport` over a `MemoryNetwork`."""

    bytes_in = bytes_out = 0

    def __init__(self, network: MemoryNetwork, identity: PeerId, at: str = "memory") -> None:
        self.network, self.identity, self.at = network, identity, at
        self.nursery: trio.Nursery
        self.on_lane: LaneHandler

    @asynccontextmanager
    async def run(
        self, listen: Sequence[str], on_lane: LaneHandler, on_refused: RefusalHandler
    ) -> AsyncIterator[Sequence[str]]:
        async with trio.open_nursery() as self.nursery:
            self.on_lane = on_lane
            self.network.peers[self.identity] = self
            try:
                yield listen
            finally:
                # Shielded: where the peer is killed, its connections end all the same.
                with trio.CancelScope(shield=True):
                    await self._leave()
            self.nursery.cancel_scope.cancel()

    async def _leave(self) -> None:
        del self.network.peers[self.identity]
        for pair in [pair for pair in self.network.connected if self.identity in pair]:
            for lane in self.network.lanes.pop(pair, []):
                await lane.close()
            self.network.connected.discard(pair)

    def is_connected(self, peer: PeerId) -> bool:
        return frozenset((self.identity, peer)) in self.network.connected

    async def connect(self, peer: PeerId, addresses: Sequence[str], timeout: Seconds) -> None:
        await trio.lowlevel.checkpoint()
        if peer not in self.network.peers or self.network.peers[peer].at not in addresses:
            raise Unreachable(f"{peer} does not listen at {', '.join(addresses)}")
        self.network.connected.add(frozenset((self.identity, peer)))

    async def open(self, peer: PeerId, kind: LaneKind) -> End:
        await trio.lowlevel.checkpoint()
        if not self.is_connected(peer) or peer not in self.network.peers:
            raise Unreachable(f"no connection to {peer}")
        lane = MemoryLane(self.identity, peer)
        self.network.lanes[frozenset((self.identity, peer))].append(lane)
        other = self.network.peers[peer]
        other.nursery.start_soon(other.on_lane, kind, End(lane, self.identity))
        return End(lane, peer)

    async def disconnect(self, peer: PeerId) -> None:
        await self.network.cut(self.identity, peer)


def run_trio(function: Callable[[], Awaitable[None]], seconds: float = 60.0) -> None:
    """Run an async test, with a guard against hanging.

    On the real clock: a clock that jumps would take the time that worker threads need for time that passes.
    """

    async def guarded() -> None:
        with trio.fail_after(seconds):
            await function()

    trio.run(guarded)
