"""The control of `verify-wire`: peers that talk in the clear, so that a search for their updates must find them.

Part of the verification and of nothing else. Nothing here is authenticated or encrypted, and no charter, setting or
command can make a peer use it: `run_plaintext_process` puts it into a peer that was prepared for the real transport,
and only `p2pfl.simulation.verify_wire` starts that.

A connection begins with a line from each end that names its peer. Then it carries frames: type, lane and length (4
bytes, big endian), and the lane's bytes as they are.
"""

import signal
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import trio

from p2pfl.core.errors import P2pflError, StreamReset, Unreachable
from p2pfl.core.ids import PeerId, Seconds
from p2pfl.node.federation import open_home
from p2pfl.node.peer import Peer
from p2pfl.node.transport import LaneHandler, LaneKind, OutgoingLane, RefusalHandler, TalkHandler

MAX_LINE = 200
READ_BYTES = 64 * 1024
HELLO_DEADLINE = 10.0
GOODBYE_DEADLINE = 1.0
_HEAD = struct.Struct(">BBI")
_OPEN, _DATA, _END = 0, 1, 2
_LANES = tuple(LaneKind)


class PlaintextTransport:
    """See `p2pfl.node.transport.PeerTransport`, less all it says of authentication: the control, no peer's choice."""

    def __init__(self, identity: PeerId) -> None:
        self._identity = identity
        self._connections: dict[PeerId, _Connection] = {}
        self._nursery: trio.Nursery
        self._on_lane: LaneHandler
        self.bytes_in = 0
        self.bytes_out = 0

    @property
    def identity(self) -> PeerId:
        """Our own peer id."""
        return self._identity

    def run(
        self, listen: Sequence[str], on_lane: LaneHandler, on_refused: RefusalHandler
    ) -> AbstractAsyncContextManager[Sequence[str]]:
        """Listen, and accept lanes from anyone, while the context lasts."""
        del on_refused
        return self._run(listen, on_lane)

    async def keep_reachable(self, addresses: Sequence[str]) -> None:
        """Do nothing: the control has no relays."""

    def answer(self, protocol: str, handler: TalkHandler) -> None:
        """Do nothing: the control has lanes alone, and nobody's doctor visits it."""
        del protocol, handler

    async def probe(self, peer: PeerId, address: str, timeout: Seconds, *, keep: bool = False) -> None:
        """Reach nobody: what would ask for it is never answered.

        Raises:
            Unreachable: always.
        """
        del peer, address, timeout, keep
        await trio.lowlevel.checkpoint()
        raise Unreachable("the control tries no addresses")

    @asynccontextmanager
    async def _run(self, listen: Sequence[str], on_lane: LaneHandler) -> AsyncIterator[Sequence[str]]:
        self._on_lane = on_lane
        failure: Exception | None = None
        async with trio.open_nursery() as self._nursery:
            listeners: list[trio.SocketListener] = []
            for address in listen:
                host, port = _endpoint(address)
                listeners += await trio.open_tcp_listeners(port, host=host)
            self._nursery.start_soon(trio.serve_listeners, self._accept, listeners)
            try:
                yield [f"/ip4/{host}/tcp/{port}" for host, port in (each.socket.getsockname() for each in listeners)]
            except Exception as error:  # noqa: BLE001 - raised below, outside the nursery and its group
                failure = error
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(GOODBYE_DEADLINE):
                    for connection in list(self._connections.values()):
                        await connection.leave()
            self._nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _accept(self, stream: trio.SocketStream) -> None:
        connection = _Connection(self, stream)
        with suppress(StreamReset):
            await self._greet(connection)
            await connection.serve()

    async def connect(self, peer: PeerId, addresses: Sequence[str], timeout: Seconds) -> None:
        """Have a connection to `peer`, dialling its addresses one after another if there is none.

        Raises:
            Unreachable: none answered in time.
        """
        for address in addresses:
            if self.is_connected(peer):
                return
            with suppress(OSError, StreamReset), trio.move_on_after(timeout / len(addresses)):
                connection = _Connection(self, await trio.open_tcp_stream(*_endpoint(address)))
                await self._greet(connection)
                self._nursery.start_soon(connection.serve)
        if not self.is_connected(peer):
            raise Unreachable(f"{peer} does not answer")

    async def _greet(self, connection: "_Connection") -> None:
        """Say who we are, and hear who the other end claims to be.

        Raises:
            StreamReset: it says nothing of the kind.
        """
        with trio.move_on_after(HELLO_DEADLINE):
            await connection.send(f"{self._identity}\n".encode())
            line = bytearray()
            while not line.endswith(b"\n") and len(line) < MAX_LINE:
                line += await connection.receive(1)
            connection.peer = PeerId(line.decode("ascii", "replace").strip())
            self._connections[connection.peer] = connection
            return
        connection.abort()
        raise StreamReset("the other end does not say who it is")

    def is_connected(self, peer: PeerId) -> bool:
        """Whether a connection to `peer` stands, whoever dialled it."""
        return peer in self._connections

    async def open(self, peer: PeerId, kind: LaneKind) -> OutgoingLane:
        """Open a lane on the standing connection.

        Raises:
            Unreachable: there is none.
        """
        connection = self._connections.get(peer)
        if connection is None:
            raise Unreachable(f"{peer} is not connected")
        lane = _Outgoing(connection, kind)
        try:
            await connection.send_frame(_OPEN, kind)
        except StreamReset as error:
            raise Unreachable(str(error)) from error
        return lane

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connection to `peer`. Never raises."""
        await trio.lowlevel.checkpoint()
        if peer in self._connections:
            self._connections[peer].abort()

    def forget(self, connection: "_Connection") -> None:
        """Take note that a connection is gone."""
        if self._connections.get(connection.peer) is connection:
            del self._connections[connection.peer]

    def start_lane(self, kind: LaneKind, lane: "_Incoming") -> None:
        """Have an incoming lane read, in a task of its own."""
        self._nursery.start_soon(self._read_lane, kind, lane)

    async def _read_lane(self, kind: LaneKind, lane: "_Incoming") -> None:
        with suppress(StreamReset):
            await self._on_lane(kind, lane)


class _Connection:
    """A socket, and the lanes in frames on it. Any fault of a lane is the end of all."""

    def __init__(self, transport: PlaintextTransport, stream: trio.SocketStream) -> None:
        self.peer = PeerId("")
        self._transport = transport
        self._stream = stream
        self._writing = trio.Lock()
        self._incoming: dict[int, trio.MemorySendChannel[bytes]] = {}
        self._gone = trio.Event()

    @property
    def is_broken(self) -> bool:
        """Whether the socket is closed."""
        return self._gone.is_set()

    async def send(self, data: bytes) -> None:
        """Send all of `data`.

        Raises:
            StreamReset: the connection is gone.
        """
        async with self._writing:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.abort()
                raise StreamReset(f"{self.peer}: the connection broke") from error
            except BaseException:  # cancelled: part of it may be out
                self.abort()
                raise
        self._transport.bytes_out += len(data)

    async def send_frame(self, frame: int, kind: LaneKind, data: bytes | bytearray | memoryview = b"") -> None:
        """Send a frame; one send, so that a lane's bytes follow their header directly.

        Raises:
            StreamReset: the connection is gone.
        """
        await self.send(b"".join((_HEAD.pack(frame, _LANES.index(kind), len(data)), data)))

    async def receive(self, most: int) -> bytes:
        """Return between 1 and `most` bytes.

        Raises:
            StreamReset: the connection is gone, or has ended.
        """
        try:
            data = bytes(await self._stream.receive_some(most))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamReset(f"{self.peer}: the connection broke") from error
        if not data:
            raise StreamReset(f"{self.peer}: the connection ended")
        self._transport.bytes_in += len(data)
        return data

    async def serve(self) -> None:
        """Read frames until the connection ends."""
        try:
            while True:
                head = b""
                while len(head) < _HEAD.size:
                    head += await self.receive(_HEAD.size - len(head))
                await self._take(*_HEAD.unpack(head))
        except (StreamReset, trio.BrokenResourceError):  # a lane whose reader has gone
            pass
        finally:
            self.abort()

    async def _take(self, frame: int, lane: int, length: int) -> None:
        if frame == _OPEN:
            # No room in between: a reader that does not read stops the sender.
            self._incoming[lane], channel = trio.open_memory_channel[bytes](0)
            self._transport.start_lane(_LANES[lane], _Incoming(self, channel))
        elif frame == _END:
            self._incoming.pop(lane).close()
        while length:
            data = await self.receive(min(length, READ_BYTES))
            length -= len(data)
            await self._incoming[lane].send(data)

    async def leave(self) -> None:
        """End our side, and wait for the other end to close."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_eof()
            await self._gone.wait()

    def abort(self) -> None:
        """Close the socket now; whoever reads or writes is woken with an error."""
        self._gone.set()
        self._stream.socket.close()
        for channel in self._incoming.values():
            channel.close()
        self._transport.forget(self)


class _Outgoing:
    """See `p2pfl.node.transport.OutgoingLane`."""

    def __init__(self, connection: _Connection, kind: LaneKind) -> None:
        self._connection = connection
        self._kind = kind
        self.peer = connection.peer

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await self._connection.send_frame(_DATA, self._kind, data)

    async def close(self) -> None:
        with suppress(StreamReset):
            await self._connection.send_frame(_END, self._kind)

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()
        self._connection.abort()


class _Incoming:
    """See `p2pfl.node.transport.IncomingLane`."""

    def __init__(self, connection: _Connection, channel: trio.MemoryReceiveChannel[bytes]) -> None:
        self._connection = connection
        self._channel = channel
        self._rest = memoryview(b"")
        self._ended = False
        self.peer = connection.peer

    async def read_into(self, view: memoryview) -> bool:
        filled = 0
        while filled < len(view):
            if not self._rest and not await self._next():
                if filled or self._connection.is_broken:
                    raise StreamReset(f"{self.peer}: the lane broke")
                return False
            size = min(len(self._rest), len(view) - filled)
            view[filled : filled + size] = self._rest[:size]
            self._rest = self._rest[size:]
            filled += size
        return True

    async def _next(self) -> bool:
        try:
            self._rest = memoryview(await self._channel.receive())
        except trio.EndOfChannel:
            self._ended = True
        return not self._ended

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()
        self._channel.close()
        if not self._ended:
            self._connection.abort()


def run_plaintext_process(home: str, tell: Connection) -> None:
    """Run one peer of the control in a process of its own: prepared as any peer, then robbed of its secrecy.

    What is wrong goes through `tell` to whoever started it, in one line.
    """
    # The terminal sends Ctrl-C to everyone at once; who started this process asks it to leave with SIGTERM, which it
    # inherits as ignored.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        peer = Peer.prepare(open_home(Path(home)))
        transport = PlaintextTransport(peer.transport.identity)
        replace(peer, transport=transport).run()
    except P2pflError as error:
        with suppress(OSError):  # nobody listens any more
            tell.send_bytes(" ".join(str(error).split()).encode(errors="replace"))
        sys.exit(error.exit_code)


def _endpoint(address: str) -> tuple[str, int]:
    """Read `/ip4/127.0.0.1/tcp/4001`."""
    _, _, host, _, port = address.split("/")
    return host, int(port)
