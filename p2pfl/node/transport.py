"""What a running peer needs of a network, and nothing more.

A *lane* is a one-way, ordered byte stream to one authenticated peer. Each peer opens its own outgoing lanes, one for
control messages and one for bulk, and keeps them; so a heartbeat never queues behind a model, and two peers that dial
each other at once end with nothing to reconcile. `p2pfl.node.libp2p` implements this over libp2p, the tests over
memory.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Protocol

from p2pfl.core.ids import PeerId, Seconds


class LaneKind(StrEnum):
    """Which of the two kept streams of a link."""

    CONTROL = "control"
    BULK = "bulk"


class OutgoingLane(Protocol):
    """Our end of a stream that we opened."""

    @property
    def peer(self) -> PeerId:
        """Who reads at the other end, as authenticated by the channel."""

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`. One task writes to a lane at a time.

        Cancelling never leaves half a record on the wire: a write that has begun is finished, or the lane is reset.

        Raises:
            StreamReset: the lane is broken; nothing is known of what was sent before.
        """

    async def close(self) -> None:
        """End the lane cleanly: the reader sees its end after the last byte. Never raises."""

    async def reset(self) -> None:
        """Abandon the lane at once. Never raises."""


class IncomingLane(Protocol):
    """Our end of a stream that a peer opened."""

    @property
    def peer(self) -> PeerId:
        """Who writes at the other end, as authenticated by the channel."""

    async def read_into(self, view: memoryview) -> bool:
        """Fill `view` (writable bytes, not empty) whole.

        Returns:
            True when filled; False when the lane ended cleanly before its first byte.

        Raises:
            StreamReset: the lane broke, or ended in the middle.
        """

    async def reset(self) -> None:
        """Refuse whatever else would come. Never raises."""


class Talk(Protocol):
    """A stream on which both ends speak in turn: a question, its answer, the next question."""

    @property
    def peer(self) -> PeerId:
        """Who is at the other end, as authenticated by the channel."""

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; see `OutgoingLane.write`."""

    async def read_into(self, view: memoryview) -> bool:
        """Fill `view` whole; see `IncomingLane.read_into`."""

    async def close(self) -> None:
        """Say no more; the other end reads what was said. Never raises."""

    async def reset(self) -> None:
        """Break off at once. Never raises."""


TalkHandler = Callable[[Talk], Awaitable[None]]
"""Holds one talk that a peer began, until it ends. What it raises costs the talk, nothing else."""

LaneHandler = Callable[[LaneKind, IncomingLane], Awaitable[None]]
"""Reads one incoming lane until it ends. What it raises is contained: the lane is reset, the host lives on."""

RefusalHandler = Callable[[str, str], None]
"""Told (who, why) of each connection or stream that was refused before it became a lane, for the trace."""


class Transport(Protocol):
    """A peer's own end of the network."""

    @property
    def identity(self) -> PeerId:
        """Our own peer id."""

    @property
    def bytes_in(self) -> int:
        """Bytes received from sockets so far, everything above TCP included."""

    @property
    def bytes_out(self) -> int:
        """Bytes written to sockets so far, everything above TCP included."""

    def run(
        self, listen: Sequence[str], on_lane: LaneHandler, on_refused: RefusalHandler
    ) -> AbstractAsyncContextManager[Sequence[str]]:
        """Listen, and accept lanes from the roster, while the context lasts.

        Args:
            listen: multiaddresses to bind, e.g. `/ip4/0.0.0.0/tcp/4001`; port 0 takes a free one.
            on_lane: called in a task of its own for each incoming lane.
            on_refused: see `RefusalHandler`.

        Returns:
            A context that yields the bound multiaddresses, without the peer id.

        Raises:
            AddressInUse: an address is taken.
            InvalidConfig: an address cannot be bound, with the reason.
        """

    async def connect(self, peer: PeerId, addresses: Sequence[str], timeout: Seconds) -> None:
        """Have an authenticated connection to `peer`, dialling its addresses one after another if there is none.

        Raises:
            Unreachable: none answered as that peer in time; the message says why for each.
        """

    def is_connected(self, peer: PeerId) -> bool:
        """Whether an authenticated connection to `peer` stands, whoever dialled it."""

    async def open(self, peer: PeerId, kind: LaneKind) -> OutgoingLane:
        """Open a lane on the standing connection.

        Raises:
            Unreachable: there is no connection, or the peer does not answer.
        """

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to `peer`. Never raises."""


class PeerTransport(Transport, Protocol):
    """What a running peer needs of its network beside what its driver does."""

    def answer(self, protocol: str, handler: TalkHandler) -> None:
        """Have `handler` hold the talks that members begin under `protocol`; within `run`."""

    async def probe(self, peer: PeerId, address: str, timeout: Seconds) -> None:
        """Dial `address` anew, and let the handshake prove that `peer` is there.

        Raises:
            RemoteError: somebody is there, and one end objects to the other.
            Unreachable: nobody answers there as that peer in time; the message says why, without the address.
        """

    async def keep_reachable(self, addresses: Sequence[str]) -> None:
        """Keep a reservation at the relays among one's own addresses, until cancelled; return where there is none."""
