"""Whose connection gives way where there are too many, and what the accept loop survives."""

import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from p2pfl.core.ids import PeerId
from p2pfl.node.libp2p import tcp
from p2pfl.node.libp2p.tcp import ByteCount, SocketConnection, Strangers, TcpListener, TcpTransport, source_of
from tests.trio_tools import trio_test


class Named:
    """Stands for a connection, where only who it is matters."""

    def __init__(self, name: str) -> None:
        self.name = name


def crowded(*names: str) -> tuple[Strangers, dict[str, Any]]:
    """Strangers that entered in this order; the letter is the source."""
    strangers, all_of_them = Strangers(), {name: Named(name) for name in names}
    for name, connection in all_of_them.items():
        strangers.enter(connection, f"192.0.2.{ord(name[0])}")  # type: ignore[arg-type]
    return strangers, all_of_them


def gives_way(strangers: Strangers) -> str:
    crowd = strangers.crowd()
    assert crowd is not None
    connection: Any = crowd[0]
    return str(connection.name)


@pytest.mark.parametrize(
    ("entered", "first"),
    [
        (["a1", "b1", "b2", "a2", "b3"], "b1"),  # the oldest of whoever holds most, and not the oldest of all
        (["b1", "a1", "c1"], "b1"),  # equals: the oldest of all
        (["a1", "b1", "b2", "a2"], "a1"),
    ],
)
def test_the_oldest_of_the_largest_source_gives_way(entered: list[str], first: str) -> None:
    assert gives_way(crowded(*entered)[0]) == first


def test_places_are_bounded_by_source_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "MAX_STRANGERS", 5)
    monkeypatch.setattr(tcp, "MAX_STRANGERS_FROM_ONE", 3)
    strangers, named = crowded("a1", "a2", "a3", "b1", "b2")
    assert strangers.surplus() is None
    strangers.enter(named.setdefault("a4", Named("a4")), "192.0.2.97")
    assert strangers.surplus() == (named["a1"], "192.0.2.97")
    strangers.leave(named["a1"])
    assert strangers.surplus() is None
    strangers.enter(named.setdefault("c1", Named("c1")), "192.0.2.99")
    assert strangers.surplus() == (named["a2"], "192.0.2.97")
    for connection in named.values():
        strangers.leave(connection)
    assert (len(strangers), strangers.crowd(), strangers.surplus()) == (0, None, None)


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_network_of_ipv6_is_one_source(address: str, source: str) -> None:
    assert source_of(address) == source


@pytest.fixture(autouse=True)
def _one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    # Socket pairs have no address.
    monkeypatch.setattr(SocketConnection, "get_remote_address", lambda _: ("192.0.2.7", 4001))


@asynccontextmanager
async def accepted(transport: TcpTransport, count: int) -> AsyncIterator[tuple[list[Any], list[SocketConnection]]]:
    """Connections as a listener gets them, and their far ends."""
    pairs = [trio.socket.socketpair() for _ in range(count)]
    near = [transport.receive(trio.SocketStream(pair[1])) for pair in pairs]
    try:
        yield [pair[0] for pair in pairs], near
    finally:
        for connection in near:
            connection.abort()
        for pair in pairs:
            pair[0].close()


PEER = PeerId("12D3KooWpeer")


@trio_test
async def test_whoever_proved_to_be_a_member_is_no_stranger_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "MAX_STRANGERS_FROM_ONE", 2)
    refused: list[tuple[str, str]] = []
    transport = TcpTransport(ByteCount(), lambda who, why: refused.append((who, why)))
    async with accepted(transport, 1) as (_, (member,)):
        member.admit(PEER)
        assert len(transport.strangers) == 0
        async with accepted(transport, 5) as (_, strangers):
            assert [stranger.closed.is_set() for stranger in strangers] == [True, True, True, False, False]
            assert not member.closed.is_set()
            assert (
                refused
                == [("192.0.2.7", "holds too many connections without saying who it is; the oldest was closed")] * 3
            )


@trio_test
async def test_a_peer_holds_few_connections_and_the_newest() -> None:
    transport = TcpTransport(ByteCount())
    async with accepted(transport, 5) as (_, connections):
        for connection in connections:
            connection.admit(PEER)
        assert [c.closed.is_set() for c in connections] == [True, True, False, False, False]
        assert transport.of(PEER) == connections[2:]
        async with accepted(transport, 1) as (_, (other,)):
            other.admit(PeerId("12D3KooWother"))
            assert transport.of(PEER) == connections[2:]


@trio_test
async def test_of_a_stranger_little_is_read_ahead() -> None:
    transport = TcpTransport(ByteCount())
    async with accepted(transport, 1) as ((far,), (near,)):
        await far.send(bytes(100_000))
        assert await near.read(1) == b"\0"
        assert len(near._leftover) < tcp.STRANGER_READ_SIZE
        near.admit(PEER)
        await near.read(tcp.STRANGER_READ_SIZE)
        assert len(near._leftover) > 10 * tcp.STRANGER_READ_SIZE


class Failing:
    """A listening socket whose `accept` raises these, then gives sockets."""

    def __init__(self, errors: Sequence[OSError], streams: Sequence[trio.SocketStream]) -> None:
        self.results = [*errors, *streams]
        self.calls: list[float] = []

    async def accept(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        self.calls.append(trio.current_time())
        if not self.results:
            await trio.sleep_forever()
        result = self.results.pop(0)
        if isinstance(result, OSError):
            raise result
        return result


def test_the_accept_loop_outlives_every_shortage() -> None:
    numbers = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL]

    async def run() -> None:
        refused: list[tuple[str, str]] = []
        handled: list[Any] = []
        both = trio.Event()

        async def handler(connection: Any) -> None:
            handled.append(connection)
            if len(handled) == 2:
                both.set()
            await trio.sleep_forever()

        transport = TcpTransport(ByteCount(), lambda who, why: refused.append((who, why)))
        listener = TcpListener(handler, transport)
        ends = [trio.socket.socketpair() for _ in range(2)]
        failing: Any = Failing(
            [OSError(number, f"error {number}") for number in numbers], [trio.SocketStream(end[1]) for end in ends]
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener._serve, failing)
            await both.wait()
            listener.abort()
        assert failing.calls[5] - failing.calls[0] == pytest.approx(5 * tcp.ACCEPT_PAUSE)  # it waits, and does not spin
        files = ": allow this process more of them (ulimit -n)"
        assert [why for _, why in refused] == [f"error {n}" + files * (n == errno.EMFILE) for n in numbers]
        for end in ends:
            end[0].close()

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@trio_test
async def test_where_the_system_has_no_room_a_stranger_makes_some_and_a_member_none() -> None:
    transport = TcpTransport(ByteCount())
    async with accepted(transport, 3) as (_, connections):
        connections[0].admit(PEER)
        full = OSError(errno.EMFILE, "Too many open files")
        assert [transport.make_room(full) for _ in range(3)] == [True, True, False]
        assert [c.closed.is_set() for c in connections] == [False, True, True]
