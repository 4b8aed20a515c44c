"""One contract test for each trap of libp2p 0.8.1 that the transport guards against, by the number of the trap.

They fail where a guard is removed, and most of them where an upgrade changes what it guards. Trap 8 has none: a peer
that stops without closing (a suspended process, a pulled cable) looks connected until something is written to it for
long enough; the transport makes no promise, and the protocols above send heartbeats. Traps 5 and 13 concern the muxer
and whole simulations; of 5 only our own bounds are tested here.
"""

import ast
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from libp2p import new_host
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
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream
from libp2p.transport.tcp.tcp import _open_reuseport_listeners
from libp2p.utils import encode_delim
from multiaddr import Multiaddr

import p2pfl
from p2pfl.core.errors import AddressInUse, InvalidConfig, StreamReset, Unreachable
from p2pfl.node.libp2p import guard
from p2pfl.node.libp2p.host import Libp2pTransport
from p2pfl.node.libp2p.tcp import ByteCount, SocketConnection, TcpTransport
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
        Libp2pTransport(bytes(32), set())


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
    async with pair() as (a, _):
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


@trio_test
async def test_4_cancelling_a_write_leaves_whole_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    halfway, go_on = trio.Event(), trio.Event()
    async with pair() as (a, b):
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
                nursery.start_soon(outgoing.write, bytes(200_000))
                await halfway.wait()
                scope.cancel()
                go_on.set()
        with pytest.raises(StreamReset):
            await outgoing.write(b"x")
        await assert_works(a, b)


@trio_test
async def test_4_a_frame_that_never_ends_costs_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: bytes) -> None:
        await trio.sleep_forever()

    async with pair() as (a, b):
        outgoing, incoming = await a.lane_to(b)
        (connection,) = a.transport._tcp.connections
        monkeypatch.setattr(connection, "write", never)
        monkeypatch.setattr(guard, "FRAME_DEADLINE", 0.05)
        with pytest.raises(StreamReset):
            await outgoing.write(b"x")
        assert connection.closed.is_set()
        with pytest.raises(StreamReset):
            await receive(incoming, 1)


@trio_test
async def test_5_a_reader_that_never_reads_costs_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "STALL_DEADLINE", 0.05)
    async with pair() as (a, b):
        outgoing, _ = await a.lane_to(b)
        outgoing._raw.send_window = 100
        with pytest.raises(StreamReset):
            await outgoing.write(bytes(1000))
        await assert_works(a, b)


@trio_test
async def test_5_a_writer_beyond_its_credit_costs_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as (a, b):
        outgoing, _ = await a.lane_to(b)
        monkeypatch.setattr(guard, "MAX_BUFFERED", 100_000)
        with pytest.raises(StreamReset):
            await outgoing.write(bytes(1_000_000))
        assert not b.transport.is_connected(a.identity)


@trio_test
async def test_6_a_reset_is_no_end() -> None:
    ends: list[type[BaseException]] = []
    done = trio.Event()

    async def stock_reader(stream: Any) -> None:
        try:
            await stream.read(1)
        except GONE as error:
            ends.append(type(error))
        done.set()

    async with pair() as (a, b):
        host_of(b).set_stream_handler(TProtocol("/stock"), stock_reader)
        stream = await host_of(a).new_stream(ID.from_base58(b.identity), [TProtocol("/stock")])
        await stream.reset()
        await done.wait()
        assert ends == [StreamEOF]

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


@trio_test
async def test_17_ping_and_identify_are_answered_and_nothing_else() -> None:
    async with pair() as (a, b):
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
