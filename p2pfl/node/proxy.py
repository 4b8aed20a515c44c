"""A TCP proxy that records what it carries, or carries it late: an observer, or a long cable.

It forwards bytes in order and knows nothing of what they say. With a `Link` it delivers them after a fixed one-way
latency and at a limited rate, with as much in flight as the link holds: a write does not wait for the one before it
to arrive, as it would with a sleep in the forwarding. It is no model of TCP: there is no loss and no slow start, and
the sockets' own buffers on both sides come on top. Timers are late by up to a millisecond.
"""

import errno
import multiprocessing
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import NoReturn

import trio

from p2pfl.core.errors import AddressInUse, InvalidConfig, P2pflError, TransportError
from p2pfl.core.ids import Seconds
from p2pfl.node.capture import Capture, Connection, Ending, Endpoint, Side

READ_BYTES = 64 * 1024
NONE = Seconds(0.0)
RATE_STEP = 1e-3
"""Seconds of a limited link that one read may fill, so that the rate is even."""
MIN_READ = 1500
DIAL_TIMEOUT = 10.0
MAX_CONNECTIONS = 1024
"""Connections through one proxy at a time; more are refused."""
ACCEPT_PAUSE = 0.1
"""Seconds before the next attempt where the system has no file descriptor left; one may close meanwhile."""
START_SECONDS = 30.0
"""How long a proxy in a process of its own may take to listen."""


@dataclass(frozen=True)
class Link:
    """What lies between the two ends, the same in both directions.

    Attributes:
        latency: one way, in seconds; half of a round trip.
        rate: bytes per second in each direction of each connection; None for no limit.
        buffer_bytes: at most so many bytes of a direction are under way here; then the sender must wait. It bounds
            the throughput to `buffer_bytes / latency`: 64 MiB carry 25 Gbit/s over 20 ms.
    """

    latency: Seconds = NONE
    rate: float | None = None
    buffer_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.latency < 0 or (self.rate is not None and self.rate <= 0) or self.buffer_bytes < READ_BYTES:
            raise InvalidConfig(f"{self}: latency is at least 0, rate above 0, buffer_bytes at least {READ_BYTES}")

    @property
    def read_bytes(self) -> int:
        """Bytes taken from a sender at once."""
        return READ_BYTES if self.rate is None else min(READ_BYTES, max(MIN_READ, int(self.rate * RATE_STEP)))


@dataclass(frozen=True)
class Route:
    """Where a proxy listens, and where it carries to."""

    listen: Endpoint
    target: Endpoint


class Proxy:
    """One listening socket and the connections through it.

    Args:
        route: port 0 listens on a free one; see `address`.
        link: what the bytes go through.
        capture: where they are recorded, by several proxies at once if wished; None records nothing.
    """

    def __init__(self, route: Route, link: Link = Link(), capture: Capture | None = None) -> None:
        self._route = route
        self._link = link
        self._capture = capture
        self._active = 0
        self.address = route.listen

    async def serve(
        self,
        *,
        task_status: "trio.TaskStatus[Endpoint]" = trio.TASK_STATUS_IGNORED,  # type: ignore[name-defined]  # old stubs
    ) -> NoReturn:
        """Carry connections until cancelled; tells the bound address once it listens.

        Raises:
            AddressInUse: the address is taken.
            InvalidConfig: it cannot be bound, or the capture is full.
        """
        listener = await _bind(self._route.listen)
        host, port = listener.getsockname()[:2]
        self.address = Endpoint(host, port)
        failure: P2pflError | None = None
        with listener:
            async with trio.open_nursery() as nursery:

                async def carry(stream: trio.SocketStream) -> None:
                    # An error is raised outside the nursery, which would wrap it in a group.
                    nonlocal failure
                    try:
                        await self._carry(stream)
                    except P2pflError as error:
                        failure = failure or error
                        nursery.cancel_scope.cancel()

                task_status.started(self.address)
                await _accept(listener, nursery, carry)
        raise failure if failure is not None else AssertionError("accepting ended, and nobody cancelled it")

    async def _carry(self, dialer: trio.SocketStream) -> None:
        async with dialer:
            if self._active >= MAX_CONNECTIONS:
                _abort(dialer)
                return
            self._active += 1
            try:
                await self._connect(dialer)
            finally:
                self._active -= 1

    async def _connect(self, dialer: trio.SocketStream) -> None:
        try:
            name = dialer.socket.getpeername()
        except OSError:
            return  # gone already
        record = None
        if self._capture is not None:
            record = self._capture.open(Endpoint(name[0], name[1]), self.address, time.time())
        ending = Ending.REFUSED
        try:
            with trio.fail_after(DIAL_TIMEOUT):
                target = await trio.open_tcp_stream(*self._route.target)
        except (OSError, trio.TooSlowError):
            _abort(dialer)
        else:
            ending = Ending.RESET
            async with target:
                if await self._join({Side.DIALER: dialer, Side.LISTENER: target}, record):
                    ending = Ending.CLOSED
                else:
                    _abort(dialer)
                    _abort(target)
        finally:
            if record is not None:
                record.end(time.time(), ending)

    async def _join(self, streams: dict[Side, trio.SocketStream], record: Connection | None) -> bool:
        """Carry both directions to their ends; return whether both ended cleanly."""
        clean: list[bool] = []
        failure: P2pflError | None = None
        async with trio.open_nursery() as nursery:

            async def carry(sender: Side) -> None:
                nonlocal failure
                way = _Way(self._link, streams[sender], streams[sender.other])
                try:
                    ended = await way.run(lambda data: self._record(record, sender, data))
                except P2pflError as error:
                    failure = error
                    nursery.cancel_scope.cancel()
                    return
                clean.append(ended)
                if way.sender_broke:
                    nursery.cancel_scope.cancel()  # and with it what was on its way to that sender

            for sender in Side:
                nursery.start_soon(carry, sender)
        if failure is not None:
            raise failure
        return clean == [True, True]

    def _record(self, record: Connection | None, sender: Side, data: bytes) -> None:
        if record is not None and self._capture is not None:
            self._capture.add(record, time.time(), sender, data)


class _Way:
    """One direction of a connection: read, keep for the latency, write. Order is that of reading."""

    def __init__(self, link: Link, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        self._link = link
        self._source, self._sink = source, sink
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._changed = trio.Event()
        self._departed = 0.0
        self._ended: float | None = None
        self._sink_broke = False
        self.sender_broke = False

    async def run(self, record: Callable[[bytes], None]) -> bool:
        """Carry until the sender ends, and pass its end on; False where either side broke.

        Raises:
            InvalidConfig: the capture is full.
        """
        failure: P2pflError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, nursery.cancel_scope)
            try:
                await self._read(record)
            except P2pflError as error:
                failure = error
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return not (self._sink_broke or self.sender_broke)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _read(self, record: Callable[[bytes], None]) -> None:
        while True:
            while self._held > self._link.buffer_bytes - self._link.read_bytes:
                await self._changed.wait()
            try:
                data = bytes(await self._source.receive_some(self._link.read_bytes))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data, self.sender_broke = b"", True
            if data:
                record(data)
                await self._depart(len(data))
            due = trio.current_time() + self._link.latency
            if not data:
                self._ended = due
                self._notify()
                return
            self._under_way.append((due, data))
            self._held += len(data)
            self._notify()

    async def _depart(self, size: int) -> None:
        """Wait until a link of limited rate has taken these bytes in; what it cannot take waits at its sender."""
        if self._link.rate is not None:
            self._departed = max(self._departed, trio.current_time()) + size / self._link.rate
            await trio.sleep_until(self._departed)

    async def _write(self, scope: trio.CancelScope) -> None:
        try:
            while self._under_way or self._ended is None:
                if not self._under_way:
                    await self._changed.wait()
                    continue
                due, data = self._under_way.popleft()
                if due > trio.current_time():
                    await trio.sleep_until(due)
                await self._sink.send_all(data)
                self._held -= len(data)
                self._notify()
            await trio.sleep_until(self._ended)
            if not self.sender_broke:
                await self._sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._sink_broke = True
            scope.cancel()  # nobody is left to read for


@contextmanager
def proxies_in_process(routes: Sequence[Route], link: Link = Link()) -> Iterator[list[Endpoint]]:
    """Run a proxy for each route in one process of its own, recording nothing, while the context lasts.

    Yields:
        Where they listen.

    Raises:
        TransportError: they do not; the message says why.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_process, args=(list(routes), link, theirs), name="proxy", daemon=True)
    process.start()
    theirs.close()
    try:
        yield _bound(ours)
    finally:
        ours.close()  # which ends the process
        process.join(START_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _bound(pipe: "Pipe[object, object]") -> list[Endpoint]:
    answer: object = "it did not start"
    with suppress(EOFError):
        if pipe.poll(START_SECONDS):
            answer = pipe.recv()
    if not isinstance(answer, list):
        raise TransportError(f"the proxy does not listen: {answer}")
    return answer


def _serve_process(routes: list[Route], link: Link, pipe: "Pipe[object, object]") -> None:
    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            try:
                pipe.send([await nursery.start(Proxy(route, link).serve) for route in routes])
            except P2pflError as error:
                pipe.send(str(error))
            else:
                await trio.lowlevel.wait_readable(pipe.fileno())  # the other end closed, or its process died
            nursery.cancel_scope.cancel()

    trio.run(serve)


async def _accept(
    listener: trio.socket.SocketType, nursery: trio.Nursery, carry: Callable[[trio.SocketStream], Awaitable[None]]
) -> None:
    """Start a task for each connection, until cancelled."""
    while True:
        try:
            sock, _ = await listener.accept()
        except OSError:
            await trio.sleep(ACCEPT_PAUSE)
        else:
            nursery.start_soon(carry, trio.SocketStream(sock))


async def _bind(endpoint: Endpoint) -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind(endpoint)
        sock.listen()
        return sock
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{endpoint} is taken by another process") from error
        raise InvalidConfig(f"cannot listen on {endpoint}: {error.strerror}") from error


def _abort(stream: trio.SocketStream) -> None:
    """Close with a reset, as the end that broke would have."""
    with suppress(OSError):
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
