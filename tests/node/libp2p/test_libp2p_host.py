"""What `p2pfl.node.transport` promises, kept by the libp2p transport over real loopback sockets."""

import gc
import socket
import sys

import pytest
import trio
import trio.testing

from p2pfl.core.errors import InvalidConfig, NotAMember, OutOfTurn, StreamReset, Unreachable, WrongCharter
from p2pfl.node.libp2p.addresses import parse, resolve
from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport
from p2pfl.node.transport import IncomingLane, LaneKind, OutgoingLane, Talk
from tests.node.libp2p.libp2p_tools import (
    LOOPBACK,
    Node,
    dead_address,
    network,
    nodes,
    open_sockets,
    pair,
    port_of,
    receive,
    running,
    silent_listener,
)
from tests.trio_tools import trio_test

pytestmark = pytest.mark.slow


@trio_test
async def test_a_lane_carries_bytes_in_order_and_ends_cleanly() -> None:
    async with pair() as (a, b):
        outgoing, incoming = await a.lane_to(b)
        assert (outgoing.peer, incoming.peer) == (b.identity, a.identity)
        await outgoing.write(b"hello ")
        await outgoing.write(memoryview(bytearray(b"world")))
        assert await receive(incoming, 11) == b"hello world"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outgoing.close)
            assert await receive(incoming, 1) == b""
        assert await receive(incoming, 1) == b""
        with pytest.raises(StreamReset):
            await outgoing.write(b"more")


@trio_test
async def test_large_arrays_pass_whole_both_ways_at_once() -> None:
    data = bytes(range(256)) * (3 * 4096)  # 3 MiB, past stock's first window of 256 KiB
    async with pair() as (a, b), trio.open_nursery() as nursery:
        for sender, reader in ((a, b), (b, a)):
            outgoing, incoming = await sender.lane_to(reader)
            nursery.start_soon(outgoing.write, data)
            nursery.start_soon(_expect, incoming, data)


async def _expect(lane: IncomingLane, data: bytes) -> None:
    assert await receive(lane, len(data)) == data


@trio_test
async def test_closing_delivers_everything_even_where_the_writer_leaves_at_once() -> None:
    data = bytes(1_000_000)
    a, b = nodes(2)
    received = []

    async def read_all(kind: LaneKind, lane: IncomingLane) -> None:
        received.append(await receive(lane, len(data)))
        received.append(await receive(lane, 1))

    async with b.run(read_all):
        async with a.run():
            await a.connect(b)
            outgoing = await a.transport.open(b.identity, LaneKind.BULK)
            await outgoing.write(data)
            await outgoing.close()
        assert received == [data, b""]


@trio_test
async def test_closing_waits_for_the_reader() -> None:
    closed = trio.Event()

    async def close(lane: OutgoingLane) -> None:
        await lane.close()
        closed.set()

    async with pair() as (a, b), trio.open_nursery() as nursery:
        outgoing, incoming = await a.lane_to(b)
        await outgoing.write(b"x")
        nursery.start_soon(close, outgoing)
        assert not closed.is_set()
        assert [await receive(incoming, 1), await receive(incoming, 1)] == [b"x", b""]
        await closed.wait()


@trio_test
async def test_an_end_inside_a_frame_is_a_reset() -> None:
    async with pair() as (a, b):
        outgoing, incoming = await a.lane_to(b)
        await outgoing.write(b"half")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outgoing.close)
            with pytest.raises(StreamReset):
                await receive(incoming, 8)


@trio_test
async def test_a_reset_here_wakes_the_reader_here() -> None:
    async with pair() as (a, b):
        _, incoming = await a.lane_to(b)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect_reset, incoming)
            await trio.testing.wait_all_tasks_blocked()
            await incoming.reset()


async def _expect_reset(lane: IncomingLane) -> None:
    with pytest.raises(StreamReset):
        await receive(lane, 1)


@trio_test
async def test_a_newer_lane_of_a_kind_resets_the_older() -> None:
    async with pair() as (a, b):
        _, older = await a.lane_to(b, LaneKind.CONTROL)
        _, bulk = await a.lane_to(b, LaneKind.BULK)
        outgoing, newer = await a.lane_to(b, LaneKind.CONTROL)
        await _expect_reset(older)
        await outgoing.write(b"x")
        assert await receive(newer, 1) == b"x"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect_reset, bulk)
            await trio.testing.wait_all_tasks_blocked()
            await bulk.reset()  # only now


@trio_test
async def test_losing_the_connection_breaks_every_lane_at_both_ends() -> None:
    async with pair() as (a, b):
        outgoing, incoming = await a.lane_to(b)
        back, incoming_back = await b.lane_to(a)
        await b.transport.disconnect(a.identity)
        assert not b.transport.is_connected(a.identity)
        await _expect_reset(incoming)
        await _expect_reset(incoming_back)
        for lane in (outgoing, back):
            with pytest.raises(StreamReset):
                await lane.write(b"x")
        with pytest.raises(Unreachable):
            await b.transport.open(a.identity, LaneKind.BULK)
        await a.connect(b)
        outgoing, incoming = await a.lane_to(b)
        await outgoing.write(b"x")
        assert await receive(incoming, 1) == b"x"


@trio_test
async def test_a_stranger_is_closed_after_the_handshake_and_reported() -> None:
    async with running(1, strangers=1) as (member, stranger):
        with pytest.raises(Unreachable, match="roster"):
            await stranger.connect(member)
        assert member.refused == [(stranger.identity, "is not on the roster")]
        assert not member.transport.is_connected(stranger.identity)
        assert network(member).get_connections() == []


@trio_test
async def test_a_peer_that_left_the_roster_gets_no_lane() -> None:
    async with pair() as (a, b):
        b.transport._roster.discard(a.identity)  # type: ignore[attr-defined]
        with pytest.raises((StreamReset, Unreachable)):  # the reset may overtake the answer to the negotiation
            outgoing = await a.transport.open(b.identity, LaneKind.BULK)
            while True:
                await outgoing.write(b"x")
        assert b.refused[0][0] == a.identity


@trio_test
async def test_our_own_key_elsewhere_is_refused() -> None:
    (a,) = nodes(1)
    twin = Node(Libp2pTransport(bytes([1]) * 32, {a.identity}, None))
    async with a.run(), twin.run():
        with pytest.raises(Unreachable, match="this peer itself"):
            await twin.connect(a)


@trio_test
async def test_connecting_is_shared_and_idempotent() -> None:
    async with running(2) as (a, b):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(a.connect, b)
        await a.connect(b)
        assert len(network(a).get_connections()) == 1


@trio_test
async def test_an_address_of_another_peer_does_not_answer() -> None:
    async with running(3) as (a, b, c):
        with pytest.raises(Unreachable, match=b.addresses[0]):
            await a.transport.connect(c.identity, b.addresses, 10)
        assert not a.transport.is_connected(b.identity)


@trio_test
async def test_an_unusable_address_is_passed_over() -> None:
    async with running(2) as (a, b):
        await a.transport.connect(b.identity, ["nonsense", "/ip4/127.0.0.1/udp/1", *b.addresses], 10)


@trio_test
async def test_a_peer_without_addresses_is_unreachable() -> None:
    async with running(2) as (a, b):
        with pytest.raises(Unreachable, match="no address is known"):
            await a.transport.connect(b.identity, [], 10)


@trio_test
async def test_a_name_is_looked_up() -> None:
    async with running(2) as (a, b):
        await a.transport.connect(b.identity, [f"/dns4/localhost/tcp/{port_of(b.addresses[0])}"], 10)
        assert a.transport.is_connected(b.identity)


@trio_test
async def test_an_address_may_carry_the_peer_id() -> None:
    address = parse("/dns4/localhost/tcp/1/p2p/12D3KooWGzBCvBcCBxRBbDpmMHVzmWiZcaiDkBN1TYdJ2UrRhp9T")
    assert [str(found) for found in await resolve(address)] == ["/ip4/127.0.0.1/tcp/1"]


@pytest.mark.parametrize(
    "address", ["", "/ip4/1.2.3.4", "/ip4/1.2.3.4/tcp/1/ws", "/unix/x", "127.0.0.1:80", "/ip4/x/tcp/1"]
)
def test_an_address_that_cannot_be_used_is_named(address: str) -> None:
    with pytest.raises(InvalidConfig, match=r"/ip4/192\.0\.2\.1/tcp/4001"):
        parse(address)


@trio_test
async def test_an_address_that_is_not_ours_cannot_be_bound() -> None:
    (a,) = nodes(1)
    with pytest.raises(InvalidConfig, match=r"192\.0\.2\.1"):
        async with a.run(listen=("/ip4/192.0.2.1/tcp/0",)):
            pass
    with pytest.raises(InvalidConfig, match="listen on an IP address"):
        async with a.run(listen=("/dns4/localhost/tcp/0",)):
            pass


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="32 bytes"):
        Libp2pTransport(b"short", set(), None)


@trio_test
async def test_bytes_are_counted_at_both_ends() -> None:
    async with pair() as (a, b):
        outgoing, incoming = await a.lane_to(b)
        sent, received = a.transport.bytes_out, b.transport.bytes_in
        await outgoing.write(bytes(100_000))
        await receive(incoming, 100_000)
        assert 100_000 < a.transport.bytes_out - sent < 101_000
        assert 100_000 < b.transport.bytes_in - received < 101_000


@trio_test
async def test_small_frames_are_not_held_back() -> None:
    async with pair() as (a, _):
        (connection,) = a.transport._tcp.connections
        assert connection._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@trio_test
async def test_outside_run_the_transport_reaches_nobody() -> None:
    (a, b) = nodes(2)
    assert not a.transport.is_connected(b.identity)
    await a.transport.disconnect(b.identity)
    with pytest.raises(OutOfTurn):
        await a.transport.connect(b.identity, [dead_address()], 1)
    async with a.run():
        with pytest.raises(OutOfTurn):
            async with a.transport.run([LOOPBACK], a.on_lane, lambda *_: None):
                pass


@trio_test
async def test_what_the_body_raises_leaves_as_it_is() -> None:
    (a,) = nodes(1)
    with pytest.raises(KeyError):
        async with a.run():
            raise KeyError("ours")


@pytest.mark.skipif(sys.platform != "linux", reason="counts sockets in /proc")
@trio_test
async def test_leaving_leaves_no_socket_and_no_task() -> None:
    gc.collect()
    before = open_sockets(), trio.lowlevel.current_statistics().tasks_living
    with trio.CancelScope() as scope:
        async with running(3) as (a, b, c), trio.open_nursery() as nursery:
            await a.connect(b)
            await c.connect(a)
            outgoing, _ = await a.lane_to(b)
            nursery.start_soon(outgoing.write, bytes(10_000_000))  # blocks: nobody reads
            await trio.testing.wait_all_tasks_blocked()
            assert open_sockets() > before[0]
            scope.cancel()
    assert (open_sockets(), trio.lowlevel.current_statistics().tasks_living) == before


@trio_test
async def test_a_transport_can_run_again() -> None:
    a, b = nodes(2)
    async with a.run():
        for _ in range(2):
            async with b.run():
                await b.connect(a)
                outgoing, incoming = await b.lane_to(a)
                await outgoing.write(b"x")
                assert await receive(incoming, 1) == b"x"


# Talks, and probes of addresses

TALK = "/test/talk/1"


async def _echo(talk: Talk) -> None:
    word = bytearray(4)
    while await talk.read_into(memoryview(word)):
        await talk.write(word)


@trio_test
async def test_a_talk_goes_both_ways_until_the_asking_end_has_enough() -> None:
    async with pair() as (a, b):
        ended = trio.Event()

        async def echo(talk: Talk) -> None:
            assert talk.peer == a.identity
            await _echo(talk)
            ended.set()

        b.transport.answer(TALK, echo)
        talk = await a.transport.talk(b.identity, TALK)
        for word in (b"ping", b"pong"):
            await talk.write(word)
            answer = bytearray(4)
            assert await talk.read_into(memoryview(answer))
            assert answer == word
        await talk.close()
        await ended.wait()


@trio_test
async def test_a_talk_that_nobody_answers_is_unreachable() -> None:
    async with pair() as (a, b):
        with pytest.raises(Unreachable, match="does not accept a stream of /test/talk/1"):
            await a.transport.talk(b.identity, TALK)
        with pytest.raises(Unreachable, match="is not connected"):
            await a.transport.talk(Node(Libp2pTransport(bytes([9]) * 32, (), None)).identity, TALK)
        outgoing, incoming = await a.lane_to(b)
        await outgoing.write(b"well")
        assert await receive(incoming, 4) == b"well", "the connection stands"


@trio_test
async def test_a_members_newer_talk_breaks_off_its_older_one_and_nobody_elses() -> None:
    async with running(3) as (a, b, c):
        c.transport.answer(TALK, _echo)
        await a.connect(c)
        await b.connect(c)
        others, older, newer = [await node.transport.talk(c.identity, TALK) for node in (b, a, a)]
        answer = memoryview(bytearray(4))
        with pytest.raises(StreamReset):
            await older.write(b"ping")
            await older.read_into(answer)
            await older.read_into(answer)
        for talk in (newer, others):
            await talk.write(b"ping")
            assert await talk.read_into(answer)


@trio_test
async def test_what_a_talks_handler_raises_costs_the_talk() -> None:
    async def fail(talk: Talk) -> None:
        raise RuntimeError("a fault")

    async with pair() as (a, b):
        b.transport.answer(TALK, fail)
        talk = await a.transport.talk(b.identity, TALK)
        with pytest.raises(StreamReset):
            await talk.read_into(memoryview(bytearray(1)))
        assert a.transport.is_connected(b.identity)


@trio_test
async def test_a_probe_dials_anew_and_leaves_what_stands() -> None:
    async with pair() as (a, b):
        outgoing, incoming = await a.lane_to(b)
        before = len(network(a).get_connections())
        await a.transport.probe(b.identity, b.addresses[0], 10)
        await b.transport.probe(a.identity, a.addresses[0], 10)
        assert len(network(a).get_connections()) <= before + 1, "the other end's may end later"
        await outgoing.write(b"well")
        assert await receive(incoming, 4) == b"well"


@trio_test
async def test_a_second_process_with_ones_key_disturbs_no_lane_that_stands() -> None:
    """As the doctor of a member whose peer runs: it visits, is dialled back at the peer's address, and goes."""
    async with pair() as (a, b):
        b.transport.answer(TALK, _echo)
        lanes = [await a.lane_to(b), await b.lane_to(a)]
        doctor = Node(Libp2pTransport(bytes([1]) * 32, [a.identity, b.identity], None))
        assert doctor.identity == a.identity
        for _ in range(3):
            async with doctor.run(listen=()):
                await doctor.transport.probe(b.identity, b.addresses[0], 10, keep=True)
                talk = await doctor.transport.talk(b.identity, TALK)
                await talk.write(b"ping")
                assert await talk.read_into(memoryview(bytearray(4)))
                await b.transport.probe(a.identity, a.addresses[0], 10)
                await talk.close()
        for outgoing, incoming in lanes:
            await outgoing.write(b"well")
            assert await receive(incoming, 4) == b"well"


@trio_test
async def test_a_probe_that_is_kept_can_be_talked_on() -> None:
    async with running(2) as (a, b):
        b.transport.answer(TALK, _echo)
        await a.transport.probe(b.identity, b.addresses[0], 10, keep=True)
        assert a.transport.is_connected(b.identity)
        await (await a.transport.talk(b.identity, TALK)).reset()


@trio_test
async def test_a_probe_says_what_is_wrong_with_an_address() -> None:
    async with running(2) as (a, b):
        with pytest.raises(Unreachable, match=r"^Connection refused$"):
            await a.transport.probe(b.identity, dead_address(), 10)
        with pytest.raises(Unreachable, match="is not a multiaddress"):
            await a.transport.probe(b.identity, "nonsense", 10)
        with pytest.raises(Unreachable, match="is this peer itself"):
            await a.transport.probe(a.identity, a.addresses[0], 10)
        async with silent_listener() as address:
            with pytest.raises(Unreachable, match=r"^no answer in 0\.2 s$"):
                await a.transport.probe(b.identity, address, 0.2)


@trio_test
async def test_an_address_over_oneself_is_good_while_that_peer_is_connected() -> None:
    async with running(2) as (a, b):
        address = f"{a.addresses[0]}/p2p/{a.identity}/p2p-circuit"
        with pytest.raises(Unreachable, match="keeps no connection"):
            await a.transport.probe(b.identity, address, 10)
        await b.connect(a)
        await b.lane_to(a)  # both ends have the connection now
        await a.transport.probe(b.identity, address, 10)


@trio_test
async def test_a_probe_raises_what_either_end_objects_to() -> None:
    roster = [Libp2pTransport(bytes([i]) * 32, (), None).identity for i in (1, 2, 3)]
    charters = {1: bytes(32), 2: bytes([1]) * 32, 3: bytes(32)}
    a, b, c = (Node(Libp2pTransport(bytes([i]) * 32, roster, ChannelTerms("aes", charters[i]))) for i in charters)
    async with a.run(), b.run(), c.run():
        with pytest.raises(WrongCharter, match="is under charter 01010101"):
            await a.transport.probe(b.identity, b.addresses[0], 10)
        with pytest.raises(NotAMember, match="answers where"):
            await a.transport.probe(b.identity, c.addresses[0], 10)
