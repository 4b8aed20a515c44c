"""TCP under libp2p: opens, binds, counts, bounds and closes sockets.

Owns every socket of one transport, so that leaving it can close them all, and the places of those accepted: strangers
have their own, which end where a handshake proves a member. Knows no encryption and no stream, and no peer but by the
name that its handshake proved.
"""

import errno
import ipaddress
import itertools
import logging
import os
import socket
from dataclasses import dataclass

import trio
from libp2p.abc import IListener, IRawConnection, ITransport
from libp2p.custom_types import THandler
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from p2pfl.core.ids import PeerId
from p2pfl.node.transport import RefusalHandler

logger = logging.getLogger(__name__)

READ_SIZE = 256 * 1024
"""Bytes asked of the kernel at once: four Noise records; a measurement (one system call for many small frames)."""

BACKLOG = 128
"""Connections the kernel may hold before we accept them; libp2p's own number."""

STRANGER_READ_SIZE = 2 * 1024
"""Bytes asked of the kernel for whoever has not proved who it is: all strangers together make us hold little."""

MAX_STRANGERS = 256
"""Accepted connections that have not proved who they are; a guess. A handshake takes milliseconds."""

MAX_STRANGERS_FROM_ONE = 128
"""Of these from one IPv4 address or one IPv6 network of 64 bits, which a NAT can make many members share; a guess."""

CONNECTIONS_PER_PEER = 3
"""Connections to one peer beyond which old ones close: dialling each other at once makes two, a restart one more."""

ACCEPT_PAUSE = 0.1
"""Seconds until the next try where the system has no descriptor or memory for a connection; trio's own number."""

ALLOW_MORE_FILES = ": allow this process more of them (ulimit -n)"


@dataclass
class ByteCount:
    """Bytes that crossed the sockets of one transport, above TCP."""

    received: int = 0
    sent: int = 0


class SocketConnection(ReadWriteCloser):
    """One TCP connection, read in large pieces and handed out in exact ones."""

    def __init__(self, stream: trio.SocketStream, transport: "TcpTransport") -> None:
        self._stream = stream
        self._transport = transport
        self._leftover = bytearray()
        self.closed = trio.Event()
        self.peer: PeerId | None = None

    def admit(self, peer: PeerId) -> None:
        """Note that a member is at the other end, as its handshake proved: it leaves the strangers' places.

        Of its connections beyond `CONNECTIONS_PER_PEER` the oldest are closed.
        """
        self.peer = peer
        self._transport.admitted(self)

    async def read(self, n: int | None = None) -> bytes:
        """Return `n` bytes, fewer only at the end of the connection; without `n`, whatever came.

        Giving exactly what was asked is what keeps libp2p's `read_exactly`, which gives up after 101 reads, from ever
        counting on a link that delivers in small pieces. At most `n` + `READ_SIZE` bytes are held, of a stranger `n` +
        `STRANGER_READ_SIZE`.

        Raises:
            ConnectionClosedError: the connection broke or was closed here.
        """
        wanted = 1 if n is None else n
        while len(self._leftover) < wanted:
            piece = await self._receive()
            if not piece:
                break
            self._leftover += piece
        size = len(self._leftover) if n is None else min(n, len(self._leftover))
        with memoryview(self._leftover) as view:
            data = bytes(view[:size])
        del self._leftover[:size]
        return data

    async def _receive(self) -> bytes:
        try:
            piece = await self._stream.receive_some(STRANGER_READ_SIZE if self.peer is None else READ_SIZE)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("the TCP connection is gone", transport="tcp") from error
        self._transport.count.received += len(piece)
        return bytes(piece)

    async def receive_into(self, view: memoryview) -> int:
        """Put what has come into `view`, waiting for the first byte, without a copy on the way; 0 at the end.

        Raises:
            ConnectionClosedError: the connection broke or was closed here.
        """
        if self._leftover:
            size = min(len(self._leftover), len(view))
            view[:size] = self._leftover[:size]
            del self._leftover[:size]
            return size
        try:
            size = await self._stream.socket.recv_into(view)
        except (OSError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("the TCP connection is gone", transport="tcp") from error
        self._transport.count.received += size
        return size

    def receive_now(self, view: memoryview) -> int:
        """Put what has come into `view`, without waiting and without letting other tasks run; 0 where nothing came.

        Nothing came, too, at the end of the connection: `receive_into` tells.

        Raises:
            ConnectionClosedError: the connection broke or was closed here.
        """
        if self._leftover:
            return 0
        try:
            size = os.readv(self._stream.socket.fileno(), (view,))
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ConnectionClosedError("the TCP connection is gone", transport="tcp") from error
        self._transport.count.received += size
        return size

    def send_now(self, data: memoryview) -> int:
        """Send what the kernel takes of `data` at once, and return how much that was. Not while `write` runs.

        Raises:
            ConnectionClosedError: the connection broke or was closed here.
        """
        try:
            # trio's sockets do not block, and have no public way to send without a checkpoint.
            size = os.write(self._stream.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ConnectionClosedError("the TCP connection is gone", transport="tcp") from error
        self._transport.count.sent += size
        return size

    async def write(self, data: bytes | memoryview) -> None:
        """Send all of `data`; bytes of a send that fails are not counted.

        Raises:
            ConnectionClosedError: the connection broke or was closed here.
        """
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("the TCP connection is gone", transport="tcp") from error
        self._transport.count.sent += len(data)

    async def close(self) -> None:
        """Close the socket; bytes the kernel has accepted are still delivered, unless unread ones have arrived."""
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Close the socket now, without a checkpoint; whoever reads or writes it is woken with an error."""
        self._stream.socket.close()
        self._transport.forget(self)
        self.closed.set()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the other end's IP address and port, None once the socket is closed."""
        try:
            name = self._stream.socket.getpeername()
        except OSError:
            return None
        return str(name[0]), int(name[1])


class Strangers:
    """The accepted connections that have not proved who they are: bounded by source, and in all.

    Where there is no place, the oldest connection of whoever holds most gives way. A member needs a place for as long
    as its handshake takes; whoever wants to keep members out has to keep places, and it is those that are taken back.
    """

    def __init__(self) -> None:
        self._sources: dict[str, dict[SocketConnection, int]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._sources.values()))

    def enter(self, connection: SocketConnection, address: str) -> None:
        """Give `connection`, which came from this IP address, a place."""
        self._sources.setdefault(source_of(address), {})[connection] = next(self._numbers)

    def leave(self, connection: SocketConnection) -> None:
        """Take its place back, if it has one."""
        for source, held in self._sources.items():
            if held.pop(connection, None) is not None:
                if not held:
                    del self._sources[source]
                return

    def surplus(self) -> tuple[SocketConnection, str] | None:
        """Return the connection that has to give way to the bounds, and its source; None within them."""
        crowd = self.crowd()
        if crowd is None:
            return None
        over = len(self._sources[crowd[1]]) > MAX_STRANGERS_FROM_ONE or len(self) > MAX_STRANGERS
        return crowd if over else None

    def crowd(self) -> tuple[SocketConnection, str] | None:
        """Return the oldest connection of the source that holds most, and that source; of equal ones the oldest."""
        if not self._sources:
            return None
        source, held = max(self._sources.items(), key=lambda item: (len(item[1]), -next(iter(item[1].values()))))
        return next(iter(held)), source


def source_of(address: str) -> str:
    """Return whom an IP address stands for: itself, or its network of 64 bits, of which anybody has all addresses."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


class TcpListener(IListener):
    """One bound socket and the tasks of the connections it accepted."""

    background_nursery: trio.Nursery  # set by libp2p's swarm before it calls listen()

    def __init__(self, handler: THandler, transport: "TcpTransport") -> None:
        self._handler = handler
        self._transport = transport
        self._scope = trio.CancelScope()
        self._listener: trio.SocketListener | None = None

    async def listen(self, maddr: Multiaddr) -> None:
        """Bind and accept.

        Raises:
            OpenConnectionError: the address cannot be bound; the reason is left in `TcpTransport.bind_error`, for
                libp2p's swarm swallows this exception.
        """
        try:
            self._listener = await _bind(*_endpoint(maddr))
        except (OSError, OverflowError) as error:
            self._transport.bind_error = error
            raise OpenConnectionError(f"cannot listen on {maddr}: {error}") from error
        self._transport.listeners.append(self)
        self.background_nursery.start_soon(self._serve, self._listener)

    async def _serve(self, listener: trio.SocketListener) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        stream = await listener.accept()
                    except OSError as error:
                        # No descriptor, most likely, and not for long: a stranger's is free at once.
                        if not self._transport.make_room(error):
                            await trio.sleep(ACCEPT_PAUSE)
                        continue
                    nursery.start_soon(self._accept, self._transport.receive(stream))

    async def _accept(self, connection: SocketConnection) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._handle, connection)
                await connection.closed.wait()
                # libp2p's handler waits for the end of the host, and holds a place among the accepted connections
                # until then: a host would stop accepting after some hundred connections, however short.
                nursery.cancel_scope.cancel()
        finally:
            connection.abort()

    async def _handle(self, connection: SocketConnection) -> None:
        try:
            await self._handler(connection)
        except Exception as error:  # noqa: BLE001 - a stranger's connection must not end the accept loop
            logger.debug("an incoming connection failed: %r", error)
        finally:
            connection.abort()

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """Return the bound address, with the port the kernel chose."""
        if self._listener is None:
            return ()
        ip, port = self._listener.socket.getsockname()[:2]
        return (Multiaddr(f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}"),)

    async def close(self) -> None:
        """Stop accepting, and close what was accepted."""
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Stop accepting now, without a checkpoint."""
        self._scope.cancel()
        if self._listener is not None:
            self._listener.socket.close()
            self._listener = None


class TcpTransport(ITransport):
    """The sockets of one host: counted, bounded, without SO_REUSEPORT, closed together.

    Args:
        count: where to count what crosses them.
        on_refused: told of each source whose connections had to give way, and of what the system refused us.
    """

    def __init__(self, count: ByteCount, on_refused: RefusalHandler = lambda *_: None) -> None:
        self.count = count
        self.connections: dict[SocketConnection, None] = {}  # the oldest first
        self.strangers = Strangers()
        self.listeners: list[TcpListener] = []
        self.bind_error: Exception | None = None
        self._on_refused = on_refused

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect to an IP address; no name is looked up and no other address tried. TCP_NODELAY is trio's default.

        Raises:
            OpenConnectionError: nobody answers there.
        """
        try:
            stream = await trio.open_tcp_stream(*_endpoint(maddr))
        except OSError as error:
            raise OpenConnectionError(str(error)) from (error.__cause__ or error)
        return RawConnection(self.adopt(stream), True)

    def adopt(self, stream: trio.SocketStream) -> SocketConnection:
        """Take a connected socket into our keeping."""
        connection = SocketConnection(stream, self)
        self.connections[connection] = None
        return connection

    def receive(self, stream: trio.SocketStream) -> SocketConnection:
        """Take a socket that was accepted into our keeping, as a stranger's; another may have to give way."""
        connection = self.adopt(stream)
        address = connection.get_remote_address()
        self.strangers.enter(connection, address[0] if address else "0.0.0.0")  # noqa: S104 - has gone already
        while (surplus := self.strangers.surplus()) is not None:
            self._on_refused(surplus[1], "holds too many connections without saying who it is; the oldest was closed")
            surplus[0].abort()
        return connection

    def make_room(self, error: OSError) -> bool:
        """Close a stranger's connection, since the system has no room for another one; False where there is none."""
        is_ours = error.errno == errno.EMFILE
        self._on_refused("incoming connections", f"{error.strerror}{ALLOW_MORE_FILES if is_ours else ''}")
        crowd = self.strangers.crowd()
        if crowd is None:
            return False
        crowd[0].abort()
        return True

    def admitted(self, connection: SocketConnection) -> None:
        """Move `connection` from the strangers to those of its peer, and close the oldest of these beyond the bound."""
        self.strangers.leave(connection)
        for older in self.of(connection.peer)[:-CONNECTIONS_PER_PEER]:
            older.abort()

    def of(self, peer: PeerId | None) -> list[SocketConnection]:
        """Return the connections whose other end proved to be `peer`, the oldest first."""
        return [connection for connection in self.connections if connection.peer == peer]

    def forget(self, connection: SocketConnection) -> None:
        """Strike a closed connection from all lists."""
        self.connections.pop(connection, None)
        self.strangers.leave(connection)

    def abort_peer(self, peer: PeerId) -> None:
        """Close every socket whose other end proved to be `peer`."""
        for connection in self.of(peer):
            connection.abort()

    def abort_all(self) -> None:
        """Close every socket, listening ones first."""
        for listener in self.listeners:
            listener.abort()
        for connection in list(self.connections):
            connection.abort()

    def create_listener(self, handler_function: THandler) -> IListener:
        """Return a listener that is not bound yet."""
        return TcpListener(handler_function, self)

    def can_dial(self, maddr: Multiaddr) -> bool:
        """Tell whether this is an IP address with a TCP port, and nothing more than a peer id above."""
        names = [protocol.name for protocol in maddr.protocols()]
        return names[1:] in (["tcp"], ["tcp", "p2p"]) and names[0] in ("ip4", "ip6")

    def can_listen(self, maddr: Multiaddr) -> bool:
        """Tell the same as `can_dial`."""
        return self.can_dial(maddr)

    def protocols(self) -> list[str]:
        """Return the multiaddress protocol this transport is chosen for."""
        return ["tcp"]


def is_address_in_use(error: Exception) -> bool:
    """Tell a taken address from one that cannot be bound at all."""
    return isinstance(error, OSError) and error.errno == errno.EADDRINUSE


def _endpoint(maddr: Multiaddr) -> tuple[str, int]:
    (_, host), (_, port) = list(maddr.items())[:2]
    return str(host), int(port)


async def _bind(host: str, port: int) -> trio.SocketListener:
    """Bind and listen. SO_REUSEADDR only passes over dead connections; a second live listener fails."""
    sock = trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind((host, port))
        sock.listen(BACKLOG)
        return trio.SocketListener(sock)
    except BaseException:
        sock.close()
        raise
