"""One contract test for each trap of libp2p 0.8.1 that the transport guards against, by the number of the trap.

They fail where a guard is removed, and most of them where an upgrade changes what it guards. Traps 4, 5, 6 and 8 are
those of the muxer: our own is free of them, libp2p's own is mended as far as that goes, except for 8: over it a peer
that stops without closing (a suspended process, a pulled cable) looks connected. Trap 13 concerns whole simulations.
"""

import ast
import logging
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.exceptions import IncompleteReadError
from libp2p.io.utils import read_exactly
from libp2p.network import swarm
from libp2p.network.connection import swarm_connection
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.stream.exceptions import StreamReset as NetStreamReset
from libp2p.peer.id import ID
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream
from libp2p.transport.tcp.tcp import _open_reuseport_listeners
from libp2p.utils import encode_delim
from multiaddr import Multiaddr

import p2pfl
from p2pfl.core.errors import AddressInUse, InvalidConfig, StreamReset, Unreachable
from p2pfl.core.ids import PeerId
from p2pfl.node.libp2p import guard
from p2pfl.node.libp2p.frames import Limits
from p2pfl.node.libp2p.guard import GuardedYamux
from p2pfl.node.libp2p.host import Libp2pTransport
from p2pfl.node.libp2p.tcp import ByteCount, SocketConnection, TcpTransport
from p2pfl.node.libp2p.yamux import YamuxConnection
from p2pfl.node.transport import IncomingLane, LaneKind
from tests.node.libp2p.libp2p_tools import (
    Node,
    dead_address,
    network,
    nodes,
    pair,
    port_of,
    receive,
    running,
    silent_listener,
)
from tests.trio_tools import trio_test

pytestmark = pytest.mark.slow

GONE = (StreamEOF, NetStreamReset)
"""How stock shows a reset: the first where nothing was buffered, the second where something was."""

both_muxers = pytest.mark.parametrize("muxer", [YamuxConnection, GuardedYamux])


def host_of(node: Node) -> Any:
    return node.transport._host


async def assert_works(a: Node, b: Node) -> None:
    """A fresh lane each way still carries bytes."""
    for sender, reader in ((a, b), (b, a)):
        outgoing, incoming = await sender.lane_to(reader, LaneKind.CONTROL)
        await outgoing.write(b"alive")
        assert await receive(incoming, 5) == b"alive"


def test_0_the_version_is_the_one_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    guard.verify_version()
    monkeypatch.setattr(guard, "version", lambda _: "0.9.0")
    with pytest.raises(InvalidConfig, match=r"^libp2p 0\.9\.0 is installed.*pip install libp2p==0\.8\.1$"):
        Libp2pTransport(bytes(32), set(), None)


@trio_test
async def test_0_every_private_attribute_we_touch_exists() -> None:
    host = new_host()
    net = host.get_network()
    assert isinstance(host, BasicHost)
    touched = {
        host: ["_schedule_identify", "remove_stream_handler"],
        net: ["retry_config", "common_stream_handler", "_schedule_auto_connect", "connections", "_inbound_limiter"],
        net.upgrader: ["muxer_multistream", "security_multistream"],
        net.auto_connector: ["maybe_connect", "run_background_task", "record_disconnect"],
        net.upgrader.muxer_multistream: ["_selector", "negotiate_timeout"],
        MuxerMultistream: ["_annotate_connection"],
        Yamux: ["_write_frame", "_read_data_body", "start"],
        YamuxStream: ["_auto_tune_and_send_window_update"],
        swarm_connection: ["logging"],
    }
    missing = [(owner, name) for owner, names in touched.items() for name in names if not hasattr(owner, name)]
    assert not missing
    async with pair(GuardedYamux) as (a, _):
        muxer = network(a).get_connections()[0].muxed_conn
        stream = await muxer.open_stream()
        for owner, names in {
            muxer: ["_write_lock", "secured_conn", "stream_buffers", "stream_events", "streams", "is_initiator"],
            stream: [
                "closed",
                "send_closed",
                "recv_closed",
                "reset_received",
                "send_window",
                "recv_window",
                "target_recv_window",
            ],
        }.items():
            assert not [name for name in names if not hasattr(owner, name)]


@trio_test
async def test_1_only_noise_is_listed() -> None:
    assert PLAINTEXT_PROTOCOL_ID in new_host().get_network().upgrader.security_multistream.transports
    async with running(1) as (a,):
        assert list(network(a).upgrader.security_multistream.transports) == [NOISE]
        async with await trio.open_tcp_stream("127.0.0.1", port_of(a.addresses[0])) as stream:
            await stream.send_all(encode_delim(b"/multistream/1.0.0") + encode_delim(b"/plaintext/2.0.0"))
            expected = encode_delim(b"/multistream/1.0.0") + encode_delim(b"na")
            answer = b""
            while len(answer) < len(expected):
                answer += await stream.receive_some()
            assert answer == expected


@pytest.mark.parametrize("error", [ValueError("ours"), ExceptionGroup("ours", [ValueError()])])
def test_2_what_leaves_a_stream_handler_does_not_end_the_host(error: Exception) -> None:
    async def failing(stream: Any) -> None:
        await stream.read(1)
        raise error

    @trio_test
    async def check() -> None:
        async with pair() as (a, b):
            host_of(b).set_stream_handler(TProtocol("/failing"), failing)
            stream = await host_of(a).new_stream(ID.from_base58(b.identity), [TProtocol("/failing")])
            await stream.write(b"x")
            with pytest.raises(GONE):
                await stream.read(1)
            await assert_works(a, b)

    check()


@trio_test
async def test_2_what_leaves_a_lane_handler_costs_the_lane() -> None:
    calls = []

    async def failing(_: LaneKind, lane: IncomingLane) -> None:
        calls.append(await receive(lane, 1))
        raise ValueError("ours")

    a, b = nodes(2)
    async with a.run(), b.run(failing):
        await a.connect(b)
        for _ in range(2):
            outgoing = await a.transport.open(b.identity, LaneKind.BULK)
            await outgoing.write(b"x")
            await outgoing.close()
        assert calls == [b"x", b"x"]


@trio_test
async def test_3_a_protocol_name_that_is_not_utf8_ends_one_stream() -> None:
    async with pair() as (a, b):
        stream = await network(a).get_connections()[0].new_stream()
        await stream.write(encode_delim(b"/multistream/1.0.0") + encode_delim(b"\xff\xfe"))
        with pytest.raises(GONE):
            while True:
                await stream.read(1)
        await assert_works(a, b)


@trio_test
async def test_3_nor_does_it_hurt_before_the_handshake() -> None:
    async with pair() as (a, b):
        async with await trio.open_tcp_stream("127.0.0.1", port_of(b.addresses[0])) as stream:
            await stream.send_all(encode_delim(b"/multistream/1.0.0") + encode_delim(b"\xff\xfe"))
            while await stream.receive_some():
                pass
        await assert_works(a, b)


@both_muxers
@trio_test
async def test_4_cancelling_a_write_leaves_whole_frames(muxer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    halfway, go_on = trio.Event(), trio.Event()
    async with pair(muxer) as (a, b):
        outgoing, _ = await a.lane_to(b)
        (connection,) = a.transport._tcp.connections
        write = connection.write

        async def slowly(data: bytes) -> None:
            monkeypatch.undo()
            await write(data[: len(data) // 2])
            halfway.set()
            await go_on.wait()
            await write(data[len(data) // 2 :])

        monkeypatch.setattr(connection, "write", slowly)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outgoing.write, bytes(1_000_000))
                await halfway.wait()
                scope.cancel()
                go_on.set()
        with pytest.raises(StreamReset):
            await outgoing.write(b"x")
        await assert_works(a, b)


@pytest.mark.parametrize("muxer", [GuardedYamux, partial(YamuxConnection, limits=Limits(idle=0.02, answer=0.03))])
@trio_test
async def test_4_a_frame_that_never_ends_costs_the_connection(muxer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: bytes) -> None:
        await trio.sleep_forever()

    async with pair(muxer) as (a, b):
        outgoing, incoming = await a.lane_to(b)
        (connection,) = a.transport._tcp.connections
        monkeypatch.setattr(connection, "write", never)
        monkeypatch.setattr(guard, "FRAME_DEADLINE", 0.05)
        with pytest.raises(StreamReset):
            await outgoing.write(b"x")
        with pytest.raises(StreamReset):
            await receive(incoming, 1)
        assert connection.closed.is_set()


@trio_test
async def test_5_a_reader_that_pauses_fails_nobody() -> None:
    """For how long, `test_yamux` tests in virtual time."""
    data = bytes(40_000_000)
    async with pair() as (a, b), trio.open_nursery() as nursery:
        outgoing, incoming = await a.lane_to(b)
        nursery.start_soon(outgoing.write, data)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await assert_works(a, b)
        assert await receive(incoming, len(data)) == data


@trio_test
async def test_5_over_stock_a_reader_that_never_reads_costs_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "STALL_DEADLINE", 0.05)
    async with pair(GuardedYamux) as (a, b):
        outgoing, _ = await a.lane_to(b)
        outgoing._raw.send_window = 100
        with pytest.raises(StreamReset):
            await outgoing.write(bytes(1000))
        await assert_works(a, b)


@trio_test
async def test_5_a_writer_beyond_its_credit_costs_the_connection() -> None:
    async with pair() as (a, b):
        outgoing, _ = await a.lane_to(b)
        await assert_works(a, b)  # the credit has come
        outgoing._raw._credit.grant(1)
        with pytest.raises(StreamReset):
            await outgoing.write(bytes(40_000_000))
        assert not b.transport.is_connected(a.identity)


@trio_test
async def test_5_over_stock_what_is_held_without_credit_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(GuardedYamux) as (a, b):
        outgoing, _ = await a.lane_to(b)
        monkeypatch.setattr(guard, "MAX_BUFFERED", 100_000)
        with pytest.raises(StreamReset):
            await outgoing.write(bytes(1_000_000))
        assert not b.transport.is_connected(a.identity)


@pytest.mark.parametrize(("muxer", "shown"), [(GuardedYamux, StreamEOF), (YamuxConnection, NetStreamReset)])
@trio_test
async def test_6_a_reset_is_no_end(muxer: Any, shown: type[Exception]) -> None:
    ends: list[type[BaseException]] = []
    done = trio.Event()

    async def stock_reader(stream: Any) -> None:
        try:
            await stream.read(1)
        except GONE as error:
            ends.append(type(error))
        done.set()

    async with pair(muxer) as (a, b):
        host_of(b).set_stream_handler(TProtocol("/stock"), stock_reader)
        stream = await host_of(a).new_stream(ID.from_base58(b.identity), [TProtocol("/stock")])
        await stream.reset()
        await done.wait()
        assert ends == [shown]

        outgoing, incoming = await a.lane_to(b)
        await outgoing.reset()
        with pytest.raises(StreamReset):
            await receive(incoming, 1)


class Dripping:
    """A stream that delivers one byte at a time."""

    async def receive_some(self, _: int) -> bytes:
        return b"x"

    read = receive_some


@trio_test
async def test_7_small_pieces_are_read_however_many() -> None:
    with pytest.raises(IncompleteReadError):
        await read_exactly(Dripping(), 150)  # type: ignore[arg-type]
    connection = SocketConnection(Dripping(), TcpTransport(ByteCount()))  # type: ignore[arg-type]
    assert await read_exactly(connection, 150) == b"x" * 150
    async with pair() as (a, b):
        outgoing, incoming = await a.lane_to(b)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drip, outgoing)
            assert await receive(incoming, 300) == b"x" * 300


async def _drip(lane: Any) -> None:
    for _ in range(300):
        await lane.write(b"x")


@trio_test
async def test_8_a_peer_that_stops_without_closing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_: memoryview | bytes) -> None:
        """Accept bytes that never arrive, as the kernel does after a cable was pulled."""

    async with pair(partial(YamuxConnection, limits=Limits(idle=0.1, answer=0.1))) as (a, b):
        _, incoming = await b.lane_to(a)
        (connection,) = b.transport._tcp.connections
        monkeypatch.setattr(connection, "write", nothing)
        with pytest.raises(StreamReset):
            await receive(incoming, 1)
        assert not a.transport.is_connected(b.identity)


@trio_test
async def test_9_a_silent_listener_costs_our_deadline_and_is_not_held_against_the_peer() -> None:
    async with running(2) as (a, b), silent_listener() as silent:
        with trio.fail_after(5):
            with pytest.raises(Unreachable, match="no answer"):
                await a.transport.connect(b.identity, [silent], 0.2)
            with pytest.raises(Unreachable, match="refused"):
                await a.transport.connect(b.identity, [dead_address()], 5)
            await a.connect(b)


@trio_test
async def test_9_every_address_is_tried() -> None:
    async with running(2) as (a, b), silent_listener() as silent:
        await a.transport.connect(b.identity, [dead_address(), silent, *b.addresses], 0.6)
        assert a.transport.is_connected(b.identity)


@trio_test
async def test_9_a_dial_waits_for_nothing_but_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "_HAPPY_EYEBALLS_DELAY", 3600)  # raises where an upgrade renames it
    with trio.fail_after(10):
        async with pair():
            pass


@trio_test
async def test_10_nobody_is_dialled_on_libp2ps_own_account(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = []

    async def record(_: Any, peer: ID, *__: Any) -> None:
        dialled.append(peer)

    monkeypatch.setattr(swarm.Swarm, "dial_peer", record)
    async with running(3) as (a, b, c):
        await a.connect(b)
        net = network(a)
        net.connection_config.low_watermark = net.connection_config.min_connections = 100
        net.peerstore.add_addrs(ID.from_base58(c.identity), [Multiaddr("/ip4/192.0.2.1/tcp/1")], 3600)
        async with trio.open_nursery() as nursery:
            await net.auto_connector.run_background_task(nursery)
            await net.auto_connector.maybe_connect()
            await a.transport.disconnect(b.identity)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert dialled == []


@trio_test
async def test_11_two_connections_between_two_peers_are_tolerated() -> None:
    async with pair() as (a, b):
        await network(b).dial_addr(Multiaddr(a.addresses[0]), ID.from_base58(a.identity))
        assert [len(network(node).get_connections()) for node in (a, b)] == [2, 2]
        await assert_works(a, b)
        outgoing, incoming = await a.lane_to(b)
        unused = next(c for c in network(a).get_connections() if outgoing._stream.swarm_conn is not c)
        await unused.close()
        await outgoing.write(b"x")
        assert await receive(incoming, 1) == b"x"
        assert a.transport.is_connected(b.identity)


@trio_test
async def test_12_a_port_has_one_listener() -> None:
    async with running(1) as (a,):
        port = port_of(a.addresses[0])
        other = nodes(2)[1]
        with pytest.raises(AddressInUse, match=str(port)):
            async with other.run(listen=(a.addresses[0],)):
                pass
        with pytest.raises(AddressInUse):
            async with other.run(listen=(f"/ip4/0.0.0.0/tcp/{port}",)):
                pass
        with pytest.raises(Exception, match="Failed to listen"):
            await _open_reuseport_listeners("127.0.0.1", port)
        listener = a.transport._tcp.listeners[0]._listener
        assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0


def test_14_no_module_of_ours_imports_what_libp2p_installs_beside_itself() -> None:
    strays = []
    for path in Path(p2pfl.__file__).parent.rglob("*.py"):
        for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in item.names] if isinstance(item, ast.Import) else []
            if isinstance(item, ast.ImportFrom) and item.level == 0:
                names.append(item.module or "")
            strays += [(path.name, name) for name in names if name.split(".")[0] in {"examples", "docs", "interop"}]
    assert strays == []


@trio_test
async def test_15_places_for_connections_come_back() -> None:
    """Stock holds one of a few hundred places for each connection it ever accepted, until the host ends."""
    async with running(2) as (a, b):
        for _ in range(3):
            await a.connect(b)
            assert network(b)._inbound_limiter.borrowed_tokens == 1
            await b.transport.disconnect(a.identity)
            await a.transport.disconnect(b.identity)
            await trio.testing.wait_all_tasks_blocked()
        assert network(b)._inbound_limiter.borrowed_tokens == 0
        assert not b.transport._tcp.connections


@trio_test
async def test_16_libp2p_logs_nothing_through_the_root_logger(caplog: pytest.LogCaptureFixture) -> None:
    """Stock's first connection gives a process without logging a handler that prints to the console."""
    caplog.set_level(logging.DEBUG)
    async with pair() as (a, b):
        await assert_works(a, b)
    assert [record for record in caplog.records if not record.name.startswith("p2pfl")] == []


@both_muxers
@trio_test
async def test_17_ping_and_identify_are_answered_and_nothing_else(muxer: Any) -> None:
    async with pair(muxer) as (a, b):
        peer = ID.from_base58(b.identity)
        ping = await host_of(a).new_stream(peer, [TProtocol("/ipfs/ping/1.0.0")])
        await ping.write(bytes(32))
        assert await read_exactly(ping, 32) == bytes(32)
        identify = await host_of(a).new_stream(peer, [TProtocol("/ipfs/id/1.0.0")])
        assert await identify.read(1)
        offered = host_of(b).multiselect.get_protocols()
        assert set(offered) == {"/ipfs/ping/1.0.0", "/ipfs/id/1.0.0", "/p2pfl/control/1", "/p2pfl/bulk/1"}
        assert host_of(a).peerstore.peers_with_addrs() == []  # nobody was asked who they are


@trio_test
async def test_18_a_connection_carries_a_bounded_number_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_INCOMING_STREAMS", 4)
    async with pair() as (a, b):
        streams = [await network(a).get_connections()[0].new_stream() for _ in range(5)]
        with pytest.raises(GONE):
            while True:
                await streams[-1].read(100)
        for stream in streams[:4]:
            assert await stream.read(100) == encode_delim(b"/multistream/1.0.0")
            await stream.reset()
        await assert_works(b, a)


@pytest.mark.parametrize("ours_dials", [True, False])
@trio_test
async def test_19_lanes_work_between_our_muxer_and_libp2ps(ours_dials: bool) -> None:
    data = bytes(range(256)) * 12_000
    ours, stock = nodes(2)[0], nodes(2, muxer=GuardedYamux)[1]
    for roster in (ours.transport._roster, stock.transport._roster):
        assert {ours.identity, stock.identity} == roster
    async with ours.run(), stock.run(), trio.open_nursery() as nursery:
        await (ours.connect(stock) if ours_dials else stock.connect(ours))
        for sender, reader in ((ours, stock), (stock, ours)):
            outgoing, incoming = await sender.lane_to(reader)
            nursery.start_soon(_write_and_close, outgoing, data)
            assert await receive(incoming, len(data)) == data
            assert await receive(incoming, 1) == b""
            outgoing, incoming = await sender.lane_to(reader)
            await outgoing.reset()
            with pytest.raises(StreamReset):
                await receive(incoming, 1)


async def _write_and_close(lane: Any, data: bytes) -> None:
    await lane.write(data)
    await lane.close()


@trio_test
async def test_19_a_host_that_is_all_stock_reaches_ours_and_ours_reaches_it() -> None:
    (ours,) = nodes(1)
    keys = create_new_key_pair(bytes([9]) * 32)
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    stock = new_host(key_pair=keys, sec_opt={NOISE: noise})
    ours.transport._roster.add(PeerId(str(stock.get_id())))  # type: ignore[attr-defined]
    data = bytes(range(256)) * 4000

    async def echo(stream: Any) -> None:
        await stream.write(await read_exactly(stream, 100_000))
        await stream.close()

    async with ours.run(), stock.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        stock.set_stream_handler(TProtocol("/echo"), echo)
        peer = ID.from_base58(ours.identity)
        await stock.get_network().dial_addr(Multiaddr(ours.addresses[0]), peer)
        stream = await stock.new_stream(peer, [TProtocol("/p2pfl/bulk/1")])
        _, incoming = await ours.lanes.receive()
        await stream.write(data)
        await stream.close()
        assert await receive(incoming, len(data)) == data
        assert await receive(incoming, 1) == b""
        ping = await stock.new_stream(peer, [TProtocol("/ipfs/ping/1.0.0")])
        await ping.write(bytes(32))
        assert await read_exactly(ping, 32) == bytes(32)

        stream = await host_of(ours).new_stream(stock.get_id(), [TProtocol("/echo")])
        await stream.write(data[:100_000])
        assert await read_exactly(stream, 100_000) == data[:100_000]
        with pytest.raises(StreamEOF):
            await stream.read(1)
        await stock.close()


@trio_test
async def test_20_leaving_delivers_what_was_written() -> None:
    """Stock's muxer drops, at the end of a connection, what its reader has not asked for yet."""
    data = bytes(range(256)) * 8000
    a, b = nodes(2)
    async with b.run():
        async with a.run():
            await a.connect(b)
            outgoing, incoming = await a.lane_to(b)
            await assert_works(a, b)
            await outgoing.write(data)
        assert not b.transport.is_connected(a.identity)
        assert await receive(incoming, len(data)) == data
        with pytest.raises(StreamReset):
            await receive(incoming, 1)
