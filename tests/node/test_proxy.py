"""The recording proxy, over real sockets on the loopback interface."""

import functools
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio
import trio.testing

from p2pfl.core.errors import AddressInUse, InvalidConfig
from p2pfl.core.ids import Seconds
from p2pfl.node.capture import Capture, Ending, Endpoint, Side
from p2pfl.node.launcher import free_ports
from p2pfl.node.proxy import READ_BYTES, Link, Proxy, Route, proxies_in_process
from tests.trio_tools import trio_test

ANY = Endpoint("127.0.0.1", 0)
DIRECT = Link()
Handler = Callable[[trio.SocketStream], Awaitable[None]]


async def listen(nursery: trio.Nursery, handler: Handler) -> Endpoint:
    (listener,) = await nursery.start(functools.partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
    return Endpoint("127.0.0.1", listener.socket.getsockname()[1])


@asynccontextmanager
async def through_proxy(
    handler: Handler, link: Link = DIRECT, capture: Capture | None = None
) -> AsyncIterator[trio.SocketStream]:
    """Yield a connection to `handler` through a proxy."""
    async with trio.open_nursery() as nursery:
        target = await listen(nursery, handler)
        address = await nursery.start(Proxy(Route(ANY, target), link, capture).serve)
        async with await trio.open_tcp_stream(*address) as stream:
            yield stream
        nursery.cancel_scope.cancel()


async def read_all(stream: trio.SocketStream) -> bytes:
    return b"".join([bytes(piece) async for piece in stream])


async def echo(stream: trio.SocketStream) -> None:
    async for piece in stream:
        await stream.send_all(piece)
    await stream.send_eof()


def reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


@trio_test
async def test_every_byte_is_carried_and_recorded_in_order_and_ends_are_passed_on() -> None:
    sent = np.random.default_rng(1).bytes(3_000_001)
    capture = Capture()
    # The server ends each connection's record once it has seen its end: the client's half-close must arrive.
    async with through_proxy(echo, capture=capture) as stream, trio.open_nursery() as nursery:

        async def send() -> None:
            for start in range(0, len(sent), 70_001):
                await stream.send_all(sent[start : start + 70_001])
            await stream.send_eof()

        nursery.start_soon(send)
        assert await read_all(stream) == sent
    (connection,) = capture.connections
    assert connection.stream(Side.DIALER) == connection.stream(Side.LISTENER) == sent
    assert connection.size(Side.DIALER) == len(sent)
    assert capture.size == 2 * len(sent)
    times = [connection.opened_at, *(piece.at for piece in connection.pieces)]
    assert times == sorted(times)
    assert connection.dialer.host == connection.listener.host == "127.0.0.1"


@trio_test
async def test_a_connection_that_both_ends_closed_is_recorded_so() -> None:
    capture = Capture()
    done = trio.Event()

    class Watched(Proxy):
        async def _carry(self, dialer: trio.SocketStream) -> None:
            await super()._carry(dialer)
            done.set()

    async with trio.open_nursery() as nursery:
        proxy = Watched(Route(ANY, await listen(nursery, echo)), capture=capture)
        async with await trio.open_tcp_stream(*await nursery.start(proxy.serve)) as stream:
            await stream.send_all(b"x")
            await stream.send_eof()
            assert await read_all(stream) == b"x"
        await done.wait()
        assert capture.connections[0].ending is Ending.CLOSED
        assert capture.connections[0].ended_at is not None
        nursery.cancel_scope.cancel()


@trio_test
async def test_what_was_sent_before_a_reset_arrives_and_then_the_reset() -> None:
    capture, got = Capture(), trio.Event()
    received = bytearray()
    broke = trio.Event()

    async def server(stream: trio.SocketStream) -> None:
        try:
            async for piece in stream:
                received.extend(piece)
                got.set()
        except trio.BrokenResourceError:
            broke.set()

    async with through_proxy(server, capture=capture) as stream:
        await stream.send_all(b"last words")
        await got.wait()
        reset(stream)
        await broke.wait()
    assert received == b"last words"
    assert capture.connections[0].ending is Ending.RESET


@trio_test
async def test_a_reset_by_the_listener_reaches_the_dialer() -> None:
    async def server(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        reset(stream)

    async with through_proxy(server) as stream:
        await stream.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
            raise AssertionError("a clean end")


@trio_test
async def test_a_target_that_does_not_listen_is_a_reset_connection_with_no_bytes() -> None:
    capture = Capture()
    (port,) = free_ports(1)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(Proxy(Route(ANY, Endpoint("127.0.0.1", port)), capture=capture).serve)
        async with await trio.open_tcp_stream(*address) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
                raise AssertionError("a clean end")
        assert [(c.ending, c.pieces) for c in capture.connections] == [(Ending.REFUSED, [])]
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_full_capture_ends_the_proxy_with_one_clear_error() -> None:
    told = ""
    try:
        async with through_proxy(echo, capture=Capture(max_bytes=1000)) as stream:
            await stream.send_all(bytes(600))
            await stream.send_all(bytes(600))
            await trio.sleep_forever()
    except* InvalidConfig as group:
        (error,) = group.exceptions
        told = str(error)
    assert "limit of 1000 bytes" in told


@trio_test
async def test_a_taken_address_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AddressInUse, match="is taken"):
            await Proxy(Route(Endpoint("127.0.0.1", taken.getsockname()[1]), ANY)).serve()


@trio_test
async def test_latency_delays_each_byte_once_and_not_each_after_the_other() -> None:
    latency, count = 0.1, 40
    async with through_proxy(echo, Link(latency=Seconds(latency))) as stream:
        began = trio.current_time()
        await stream.send_all(b"\0")
        await stream.receive_some(1)
        assert trio.current_time() - began >= 2 * latency
        got = bytearray()
        began = trio.current_time()
        for number in range(count):
            await stream.send_all(bytes([number]))
            # The next is read on its own, while this one is under way.
            await trio.testing.wait_all_tasks_blocked()
        while len(got) < count:
            got += await stream.receive_some()
        # One after the other they would take twice the latency each.
        assert 2 * latency <= trio.current_time() - began < count * latency / 2
        assert got == bytes(range(count))


@trio_test
async def test_a_long_fat_link_holds_what_is_under_way_and_a_limited_one_takes_its_time() -> None:
    size = 4_000_000
    sent = np.random.default_rng(2).bytes(size)

    async def take(link: Link) -> float:
        finished = trio.Event()
        received = bytearray()

        async def server(stream: trio.SocketStream) -> None:
            async for piece in stream:
                received.extend(piece)
            finished.set()

        async with through_proxy(server, link) as stream:
            began = trio.current_time()
            await stream.send_all(sent)
            await stream.send_eof()
            await finished.wait()
            assert received == sent
            return trio.current_time() - began

    # Were one read after another delivered with the latency, this would take 62 of them.
    assert 0.1 <= await take(Link(latency=Seconds(0.1))) < 3
    assert await take(Link(rate=10e6)) >= size / 10e6


@trio_test
async def test_no_more_than_the_buffer_is_taken_from_a_sender() -> None:
    capture = Capture()
    link = Link(latency=Seconds(3600), buffer_bytes=4 * READ_BYTES)
    async with through_proxy(echo, link, capture) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, bytes(32 << 20))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert capture.size <= 4 * READ_BYTES
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("values", [{"latency": -1.0}, {"rate": 0.0}, {"buffer_bytes": 10}])
def test_a_link_that_cannot_be_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match="latency is at least 0"):
        Link(**values)  # type: ignore[arg-type]


@pytest.mark.slow
@trio_test
async def test_a_proxy_in_a_process_of_its_own_carries_until_the_context_ends() -> None:
    async with trio.open_nursery() as nursery:
        target = await listen(nursery, echo)
        context = proxies_in_process([Route(ANY, target)], Link(latency=Seconds(0.05)))
        (address,) = await trio.to_thread.run_sync(context.__enter__)
        async with await trio.open_tcp_stream(*address) as stream:
            began = trio.current_time()
            await stream.send_all(b"there and back")
            assert await stream.receive_some() == b"there and back"
            assert trio.current_time() - began >= 0.1
        await trio.to_thread.run_sync(context.__exit__, None, None, None)
        with pytest.raises(OSError, match="all attempts"):
            await trio.open_tcp_stream(*address)
        nursery.cancel_scope.cancel()
