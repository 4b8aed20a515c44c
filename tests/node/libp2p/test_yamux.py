"""The muxer over memory: two of ours, one of ours against libp2p's own, and one against whatever bytes come.

Time is virtual: it jumps on when every task waits, so pings and deadlines cost nothing.
"""

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.abc import IMuxedConn
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError, MuxedStreamReset
from libp2p.stream_muxer.yamux.yamux import Yamux

from p2pfl.node.libp2p.frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW,
    LARGEST,
    NORMAL,
    PING,
    PROTOCOL_ERROR,
    RST,
    SYN,
    WINDOW,
    Deframer,
    Frame,
    Limits,
    decode,
    encode,
)
from p2pfl.node.libp2p.streams import MERGED, YamuxStream
from p2pfl.node.libp2p.yamux import YamuxConnection
from tests.node.libp2p.memory_channel import PlainChannel, RecordChannel, channels

PEER = ID(b"peer")
LIMITS = Limits()
HANG = 24 * 3600.0
"""Virtual seconds after which a test hangs."""

KINDS = [RecordChannel, PlainChannel]


def virtual(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in virtual time."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        async def guarded() -> None:
            with trio.fail_after(HANG):
                await function(*args, **kwargs)

        trio.run(guarded, clock=trio.testing.MockClock(autojump_threshold=0))

    return run


@asynccontextmanager
async def started(*connections: IMuxedConn) -> AsyncIterator[None]:
    """Connections that run, and are closed in the end."""
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(connection.start)
            await connection.event_started.wait()
        yield
        for connection in connections:
            nursery.start_soon(connection.close)


@asynccontextmanager
async def muxers(
    kind: type[PlainChannel] = RecordChannel, limits: Limits = LIMITS, capacity: int = 8
) -> AsyncIterator[tuple[YamuxConnection, YamuxConnection]]:
    here, there = (YamuxConnection(end, PEER, limits) for end in channels(kind, capacity))
    async with started(here, there):
        yield here, there


async def streams(here: YamuxConnection, there: YamuxConnection) -> tuple[YamuxStream, YamuxStream]:
    """Both ends of a new stream."""
    mine = await here.open_stream()
    return mine, await there.accept_stream()


async def receive(stream: YamuxStream, size: int) -> bytes:
    buffer = bytearray(size)
    filled = await stream.receive_into(memoryview(buffer))
    return bytes(buffer[:filled])


async def settle() -> None:
    """Let everything happen that needs no time."""
    await trio.testing.wait_all_tasks_blocked()


def frames_in(channel: PlainChannel) -> list[list[Frame]]:
    """The frames in each record that was written to a channel."""
    deframer = Deframer()
    return [
        [part for part in deframer.feed(memoryview(record)) if isinstance(part, Frame)] for record in channel.written
    ]


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


# Carrying bytes


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_bytes_pass_in_order_both_ways_at_once(kind: type[PlainChannel]) -> None:
    data = pattern(10_000_000)
    async with muxers(kind) as (here, there), trio.open_nursery() as nursery:
        for sender, reader in ((here, there), (there, here)):
            mine, yours = await streams(sender, reader)
            for ours, other in ((mine, yours), (yours, mine)):
                nursery.start_soon(ours.write, data)
                nursery.start_soon(expect, other, data)


async def expect(stream: YamuxStream, data: bytes) -> None:
    assert await receive(stream, len(data)) == data


@virtual
async def test_a_frame_of_256_kib_leaves_in_one_write() -> None:
    async with muxers() as (here, there):
        mine, yours = await streams(here, there)
        await settle()
        here.secured_conn.written.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.write, bytes(1_000_000))
            await receive(yours, 1_000_000)
        sizes = [frame.length for record in frames_in(here.secured_conn) for frame in record]
        assert sizes == [262144, 262144, 262144, 213568]
        assert [len(record) for record in here.secured_conn.written] == [size + HEADER.size for size in sizes]


@virtual
async def test_a_stream_opens_in_front_of_its_first_bytes() -> None:
    async with muxers() as (here, there):
        mine = await here.open_stream()
        await mine.write(b"at once")
        assert frames_in(here.secured_conn)[0] == [
            Frame(WINDOW, SYN, 1, 0),
            Frame(DATA, 0, 1, 7),
        ]
        assert await receive(await there.accept_stream(), 7) == b"at once"


@virtual
async def test_over_standard_noise_a_frame_fills_whole_records() -> None:
    async with muxers(PlainChannel) as (here, there):
        mine, _ = await streams(here, there)
        await mine.write(bytes(1_000_000))
        assert max(map(len, here.secured_conn.written)) == 4 * 65519


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_a_waiting_reader_gets_its_bytes_without_a_chunk(
    kind: type[PlainChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    monkeypatch.setattr(YamuxStream, "_keep", lambda self, piece: kept.append(len(piece)))
    data = pattern(20_000_000)
    async with muxers(kind) as (here, there), trio.open_nursery() as nursery:
        mine, yours = await streams(here, there)
        nursery.start_soon(expect, yours, data)
        await settle()
        await mine.write(data)
    assert kept == []


@virtual
async def test_what_was_read_ahead_of_the_muxer_comes_first() -> None:
    here, there = channels(RecordChannel)
    there.ahead = encode(WINDOW, SYN, 1, 0) + encode(DATA, FIN, 1, 2)[:5]
    connection = YamuxConnection(there, PEER)
    async with started(connection):
        await here.write_vec([encode(DATA, FIN, 1, 2)[5:], b"hi"])
        stream = await connection.accept_stream()
        assert await receive(stream, 5) == b"hi"


@pytest.mark.parametrize(("size", "together"), [(1, 1000), (1, 1), (100, 1)])
@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_small_frames_do_not_cost_an_object_each(kind: type[PlainChannel], size: int, together: int) -> None:
    here, there = channels(kind)
    connection = YamuxConnection(there, PEER)
    record = (encode(DATA, 0, 1, size) + b"x" * size) * together
    count = 20_000 // (size * together)
    async with started(connection):
        await here._send.send(encode(WINDOW, SYN, 1, 0))
        for _ in range(count):
            await here._send.send(record)
        stream = await connection.accept_stream()
        await settle()
        assert len(stream._chunks) <= 20_000 // MERGED + 2
        total = count * size * together
        await receive(stream, 1000)
        await here._send.send(record)
        assert await receive(stream, total - 1000 + size) == b"x" * (total - 1000 + size)


@virtual
async def test_read_returns_what_has_come() -> None:
    async with muxers() as (here, there):
        mine, yours = await streams(here, there)
        await mine.write(b"hello")
        await mine.write(b" world")
        await settle()
        assert [await yours.read(0), await yours.read(2), await yours.read(), await mine.write(b"x")] == [
            b"",
            b"he",
            b"llo world",
            None,
        ]
        assert await yours.read(-1) == b"x"
        await mine.close()
        with pytest.raises(MuxedStreamEOF):
            await yours.read(1)


@virtual
async def test_two_tasks_do_not_read_one_stream() -> None:
    async with muxers() as (here, there), trio.open_nursery() as nursery:
        mine, yours = await streams(here, there)
        nursery.start_soon(expect, yours, b"abc")
        await settle()
        with pytest.raises(MuxedStreamError, match="another task"):
            await yours.read(1)
        await mine.write(b"abc")


# Windows


@virtual
async def test_a_window_is_announced_at_once_and_never_exceeded() -> None:
    async with muxers() as (here, there), trio.open_nursery() as nursery:
        for sender, reader in ((here, there), (there, here)):
            mine, yours = await streams(sender, reader)
            await settle()
            nursery.start_soon(mine.write, bytes(LIMITS.window + 1))
            await settle()
            assert sum(map(len, yours._chunks)) == LIMITS.window
            assert mine._credit.left == 0
            nursery.start_soon(receive, yours, LIMITS.window + 1)


@virtual
async def test_credit_comes_back_as_the_application_reads_in_halves() -> None:
    async with muxers() as (here, there):
        mine, yours = await streams(here, there)
        await settle()
        there.secured_conn.written.clear()
        await mine.write(bytes(LIMITS.window))
        for _ in range(2):
            await receive(yours, LIMITS.window // 2 - 1)
            await receive(yours, 1)
            await settle()
        assert frames_in(there.secured_conn) == [[Frame(WINDOW, 0, 1, LIMITS.window // 2)]] * 2


@virtual
async def test_a_paused_reader_fails_nobody() -> None:
    data = bytes(2 * LIMITS.window)
    async with muxers() as (here, there), trio.open_nursery() as nursery:
        mine, yours = await streams(here, there)
        nursery.start_soon(mine.write, data)
        await trio.sleep(3600)
        assert await receive(yours, len(data)) == data


@virtual
async def test_a_peer_beyond_its_credit_loses_the_connection() -> None:
    async with muxers() as (here, there):
        mine, yours = await streams(here, there)
        await settle()
        mine._credit.grant(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, mine.write, bytes(LIMITS.window + 1_000_000))
            await there.event_closed.wait()
        assert here.is_closed
        with pytest.raises(MuxedStreamReset):
            await receive(yours, LIMITS.window + 1)


async def fails(function: Callable[..., Awaitable[Any]], *args: Any) -> None:
    with pytest.raises(MuxedStreamReset):
        await function(*args)


@virtual
async def test_what_a_peer_may_send_ahead_is_bounded_however_many_its_streams() -> None:
    limits = Limits(window=1 << 20, buffered=8 << 20, incoming=12, outgoing=12)
    async with muxers(limits=limits) as (here, there), trio.open_nursery() as nursery:
        pairs = [await streams(here, there) for _ in range(limits.incoming)]
        windows = [yours.window.size for _, yours in pairs]
        assert windows[:2] == [1 << 20, 1 << 20]
        assert set(windows[3:]) == {INITIAL_WINDOW}
        pairs += [(await streams(there, here))[::-1] for _ in range(limits.outgoing)]
        for mine, _ in pairs:
            nursery.start_soon(mine.write, bytes(limits.window + 1))
        await settle()
        assert sum(len(chunk) for _, yours in pairs for chunk in yours._chunks) == limits.buffered
        nursery.cancel_scope.cancel()


@virtual
async def test_the_window_of_a_stream_that_is_over_goes_to_the_next() -> None:
    async with muxers() as (here, there):
        pairs = [await streams(here, there) for _ in range(3)]
        assert [yours.window.size for _, yours in pairs] == [LIMITS.window, LIMITS.window, 3 * INITIAL_WINDOW]
        await pairs[0][0].reset()
        await settle()
        _, again = await streams(here, there)
        assert again.window.size == LIMITS.window


@virtual
async def test_what_comes_back_on_a_stream_of_ours_has_the_initial_window() -> None:
    async with muxers() as (here, there):
        pairs = [await streams(here, there) for _ in range(LIMITS.outgoing)]
        assert {mine.window.size for mine, _ in pairs} == {INITIAL_WINDOW}
        _, theirs = await streams(there, here)
        assert theirs.window.size == LIMITS.window


# Taking turns


@virtual
async def test_small_messages_pass_between_the_frames_of_a_large_one() -> None:
    async with muxers(capacity=1) as (here, there), trio.open_nursery() as nursery:
        bulk, reads_bulk = await streams(here, there)
        control, reads_control = await streams(here, there)
        await settle()
        nursery.start_soon(receive, reads_bulk, 20_000_000)
        nursery.start_soon(bulk.write, bytes(20_000_000))
        while len(here.secured_conn.written) < 20:
            await trio.lowlevel.checkpoint()
        before = len(here.secured_conn.written)
        await control.write(b"now")
        assert await receive(reads_control, 3) == b"now"
        assert len(here.secured_conn.written) - before <= 5


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_a_cancelled_write_leaves_whole_frames(kind: type[PlainChannel], after: int) -> None:
    end, raw = channels(kind, capacity=0)
    connection = YamuxConnection(end, PEER)
    deframer = Deframer()
    async with started(connection), trio.open_nursery() as nursery:
        stream = await connection.open_stream()
        await raw._send.send(encode(WINDOW, 0, 1, LIMITS.window))
        scope = trio.CancelScope()

        async def write() -> None:
            with scope:
                await stream.write(bytes(5_000_000))

        nursery.start_soon(write)
        for count in range(100):
            await settle()
            if count == after:
                scope.cancel()
            with trio.move_on_after(1) as waiting:
                list(deframer.feed(memoryview(await raw._receive.receive())))
            if waiting.cancelled_caught:
                break
        assert count <= after + 3  # no frame is begun after it
        assert not deframer.left
        assert not deframer._header
        await raw.close()


@virtual
async def test_a_read_that_is_cancelled_before_its_first_byte_costs_nothing() -> None:
    async with muxers() as (here, there):
        mine, yours = await streams(here, there)
        with trio.move_on_after(1):
            await receive(yours, 10)
        await mine.write(b"0123456789")
        assert await receive(yours, 10) == b"0123456789"
        await mine.write(b"01234")
        with trio.move_on_after(1):
            await receive(yours, 10)
        with pytest.raises(MuxedStreamReset):
            await receive(yours, 5)
        await settle()
        with pytest.raises(MuxedStreamReset):
            await mine.write(b"56789")


# Ends of streams


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_each_direction_ends_on_its_own(kind: type[PlainChannel]) -> None:
    async with muxers(kind) as (here, there):
        mine, yours = await streams(here, there)
        await mine.write(b"question")
        await mine.close()
        await mine.close()
        with pytest.raises(MuxedStreamError, match="closed for writing"):
            await mine.write(b"more")
        assert await receive(yours, 100) == b"question"
        assert await receive(yours, 1) == b""
        await yours.write(b"answer")
        await yours.close()
        assert await receive(mine, 6) == b"answer"
        assert await receive(mine, 1) == b""
        assert mine.is_closed
        assert yours.is_closed
        assert here._streams == there._streams == {}


@virtual
async def test_closing_wakes_whoever_writes() -> None:
    async with muxers() as (here, there), trio.open_nursery() as nursery:
        mine, _ = await streams(here, there)

        async def write() -> None:
            with pytest.raises(MuxedStreamError, match="closed for writing"):
                await mine.write(bytes(2 * LIMITS.window))

        nursery.start_soon(write)
        await settle()
        await mine.close()


@virtual
async def test_an_end_that_comes_with_data_comes_after_it() -> None:
    raw, connection = raw_listener()
    async with started(connection), trio.open_nursery() as nursery:
        await raw.write_vec([OPEN])
        stream = await connection.accept_stream()
        nursery.start_soon(expect, stream, b"whole")
        await settle()
        await raw.write_vec([encode(DATA, FIN, 1, 5) + b"who"])
        await settle()
        await raw.write_vec([b"le"])
        await settle()
        assert await receive(stream, 1) == b""


@virtual
async def test_a_reset_inside_a_frame_drops_the_rest_and_is_no_end() -> None:
    raw, connection = raw_listener()
    async with started(connection):
        await raw.write_vec([OPEN + encode(DATA, FIN, 1, 5) + b"who"])
        stream = await connection.accept_stream()
        await settle()
        await stream.reset()
        await raw.write_vec([b"le" + encode(PING, SYN, 0, 1)])
        await settle()
        assert not stream._chunks
        with pytest.raises(MuxedStreamReset):
            await receive(stream, 1)
        assert connection.is_established


@virtual
async def test_a_stream_with_unread_bytes_counts_until_they_are_read() -> None:
    async with muxers() as (here, there):
        mine, yours = await streams(here, there)
        await mine.write(b"unread")
        await mine.close()
        await yours.close()
        await settle()
        assert list(there._streams) == [1]
        assert await receive(yours, 6) == b"unread"
        assert there._streams == {}


@virtual
async def test_a_reset_is_no_end() -> None:
    async with muxers() as (here, there), trio.open_nursery() as nursery:
        mine, yours = await streams(here, there)
        nursery.start_soon(fails, receive, yours, 10)
        nursery.start_soon(fails, receive, mine, 10)
        back, reads_back = await streams(there, here)
        nursery.start_soon(fails, back.write, bytes(2 * LIMITS.window))
        await settle()
        await reads_back.reset()
        await mine.reset()
        await settle()
        for stream in (mine, yours, back, reads_back):
            with pytest.raises(MuxedStreamReset):
                await stream.write(b"x")
            with pytest.raises(MuxedStreamReset):
                await stream.read(1)
            with pytest.raises(MuxedStreamReset):
                await receive(stream, 1)
            await stream.close()
            await stream.reset()
        assert here._streams == there._streams == {}
        with pytest.raises(NotImplementedError):
            mine.set_deadline(1)


@virtual
async def test_bytes_for_a_stream_that_was_reset_are_dropped() -> None:
    async with muxers(capacity=0) as (here, there), trio.open_nursery() as nursery:
        mine, yours = await streams(here, there)
        await settle()
        nursery.start_soon(fails, mine.write, bytes(3_000_000))
        await receive(yours, 100)
        await yours.reset()
        other, reads_other = await streams(here, there)
        await other.write(b"lives")
        assert await receive(reads_other, 5) == b"lives"


@virtual
async def test_a_peer_may_have_a_bounded_number_of_streams() -> None:
    limits = Limits(incoming=3, outgoing=5)
    async with muxers(limits=limits) as (here, there):
        pairs = [await streams(here, there) for _ in range(3)]
        refused = await here.open_stream()
        with pytest.raises(MuxedStreamReset):
            await refused.read(1)
        await pairs[0][1].reset()
        await settle()
        pairs.append(await streams(here, there))
        for mine, yours in pairs[1:]:
            await mine.write(b"x")
            assert await receive(yours, 1) == b"x"
        for mine, _ in [await streams(there, here) for _ in range(3)]:
            await mine.write(b"x")  # ours do not count against the peer's


@virtual
async def test_we_have_a_bounded_number_of_streams() -> None:
    async with muxers(limits=Limits(outgoing=2)) as (here, there):
        for _ in range(2):
            await streams(here, there)
        with pytest.raises(MuxedStreamError, match="2 streams"):
            await here.open_stream()


# Ends of connections


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_closing_delivers_what_was_written(kind: type[PlainChannel]) -> None:
    data = pattern(3_000_000)
    async with muxers(kind) as (here, there):
        whole, reads_whole = await streams(here, there)
        half, reads_half = await streams(here, there)
        await settle()
        await whole.write(data)
        await whole.close()
        await half.write(data)
        began = trio.current_time()
        await here.close()
        assert trio.current_time() == began
        await there.event_closed.wait()
        assert await receive(reads_whole, len(data) + 1) == data
        assert await receive(reads_half, len(data)) == data
        with pytest.raises(MuxedStreamReset):
            await receive(reads_half, 1)
        for connection in (here, there):
            assert not connection.is_established
            with pytest.raises(MuxedStreamError):
                await connection.open_stream()
            with pytest.raises(MuxedConnUnavailable):
                await connection.accept_stream()
        with pytest.raises(MuxedStreamReset):
            await half.write(b"x")
        await here.close()


@virtual
async def test_closing_towards_a_peer_that_takes_no_note_is_bounded() -> None:
    for kind in KINDS:
        async with muxers(kind, capacity=0) as (here, there):
            mine, _ = await streams(here, there)
            await settle()
            here.secured_conn.deaf.set()
            began = trio.current_time()
            await here.close()
            assert trio.current_time() - began == LIMITS.goodbye
            assert here.is_closed
            with pytest.raises(MuxedStreamReset):
                await mine.write(b"x")


@virtual
async def test_nothing_follows_a_goodbye() -> None:
    raw, connection = raw_listener()
    async with started(connection), trio.open_nursery() as nursery:
        await connection.open_stream()
        nursery.start_soon(connection.close)
        await settle()
        await raw.write_vec([encode(PING, SYN, 0, 1) + OPEN])
        await connection.event_closed.wait()
    assert [frame.kind for record in frames_in(connection.secured_conn) for frame in record] == [WINDOW, GO_AWAY]


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_a_channel_that_fails_to_write_costs_the_connection(
    kind: type[PlainChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Any) -> None:
        raise RuntimeError("whatever the channel raises")

    async with muxers(kind) as (here, there):
        mine, _ = await streams(here, there)
        await settle()
        monkeypatch.setattr(here.secured_conn, "write_vec" if kind is RecordChannel else "write", fail)
        with pytest.raises(MuxedStreamReset):
            await mine.write(b"x")
        await here.event_closed.wait()
        assert trio.current_time() == 0


@virtual
async def test_a_connection_closes_before_it_has_started() -> None:
    end, _ = channels(RecordChannel)
    connection = YamuxConnection(end, PEER)
    await connection.close()
    assert connection.is_closed
    await connection.start()
    assert connection.event_started.is_set()
    assert not connection.is_established


@pytest.mark.parametrize("error", [None, ValueError("libp2p's")])
@virtual
async def test_libp2p_is_told_of_the_end_once(error: Exception | None) -> None:
    told = []

    async def on_close() -> None:
        assert here.is_closed
        told.append(here)
        await here.close()
        if error is not None:
            raise error

    async with muxers() as (here, there):
        here.on_close = on_close
        await there.close()
    assert told == [here]


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_a_lost_connection_breaks_every_stream(kind: type[PlainChannel]) -> None:
    async with muxers(kind) as (here, there), trio.open_nursery() as nursery:
        mine, _ = await streams(here, there)
        nursery.start_soon(fails, mine.write, bytes(2 * LIMITS.window))
        nursery.start_soon(fails, receive, mine, 1)
        other, _ = await streams(there, here)
        nursery.start_soon(fails, receive, other, 1)
        nursery.start_soon(fails, other.write, bytes(2 * LIMITS.window))
        await settle()
        await there.secured_conn.close()


# Keep-alive


@virtual
async def test_a_silent_peer_that_answers_lives() -> None:
    async with muxers() as (here, _):
        await trio.sleep(7200)
        assert here.is_established
        pings = [frame for record in frames_in(here.secured_conn) for frame in record]
        assert 400 <= len(pings) <= 1000
        assert {frame.kind for frame in pings} == {PING}


@virtual
async def test_a_busy_peer_is_not_pinged() -> None:
    async with muxers() as (here, there):
        mine, yours = await streams(here, there)
        for _ in range(100):
            for sender, reader in ((mine, yours), (yours, mine)):
                await sender.write(b"x")
                await receive(reader, 1)
            await trio.sleep(10)
        assert all(frame.kind != PING for record in frames_in(here.secured_conn) for frame in record)


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_a_stopped_peer_is_noticed(kind: type[PlainChannel]) -> None:
    end, _ = channels(kind)
    connection = YamuxConnection(end, PEER)
    async with started(connection), trio.open_nursery() as nursery:
        stream = await connection.open_stream()
        nursery.start_soon(fails, stream.write, bytes(2 * LIMITS.window))
        await fails(receive, stream, 1)
        await connection.event_closed.wait()
        assert trio.current_time() == LIMITS.idle + LIMITS.answer


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_a_peer_that_talks_but_never_reads_is_noticed(kind: type[PlainChannel]) -> None:
    end, other = channels(kind, capacity=0)
    connection = YamuxConnection(end, PEER)
    async with started(connection), trio.open_nursery() as nursery:
        stream = await connection.open_stream()
        nursery.start_soon(_chatter, other)
        await fails(stream.write, bytes(2 * LIMITS.window))
        await connection.event_closed.wait()
        assert LIMITS.stuck <= trio.current_time() <= LIMITS.stuck + LIMITS.idle


async def _chatter(channel: Any) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        while True:
            await channel._send.send(encode(WINDOW, ACK, 1, 0))
            await trio.sleep(5)


# Peers that break the protocol


def raw_listener(limits: Limits = LIMITS) -> tuple[RecordChannel, YamuxConnection]:
    """Our muxer, and the other end of its channel."""
    here, there = channels(RecordChannel, capacity=1000)
    return here, YamuxConnection(there, PEER, limits)


OPEN = encode(WINDOW, SYN, 1, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\x01" + bytes(11),
        b"\x00\x09" + bytes(10),
        HEADER.pack(0, DATA, 0x10, 1, 0),
        encode(DATA, SYN, 2, 0),
        encode(WINDOW, SYN, 2, 0),
        OPEN + OPEN,
        OPEN + encode(WINDOW, FIN, 1, 0) + OPEN,
        OPEN + encode(WINDOW, RST, 1, 0) + OPEN,
        encode(DATA, 0, 1, 5),
        encode(DATA, 0, 2, 5),
        encode(WINDOW, 0, 3, 5),
        OPEN + encode(DATA, 0, 1, LIMITS.window + 1),
        OPEN + encode(DATA, 0, 1, LARGEST),
        OPEN + encode(WINDOW, RST, 1, 0) + encode(DATA, 0, 1, LIMITS.window + 1),
        OPEN + encode(WINDOW, 0, 1, LARGEST),
        OPEN + encode(WINDOW, 0, 1, LARGEST - INITIAL_WINDOW) + encode(WINDOW, 0, 1, 1),
        encode(WINDOW, SYN, 1, LARGEST),
    ],
)
@virtual
async def test_what_breaks_the_protocol_costs_the_connection(data: bytes) -> None:
    raw, connection = raw_listener()
    async with started(connection):
        await raw.write_vec([data])
        await connection.event_closed.wait()
        assert trio.current_time() == 0
    assert frames_in(connection.secured_conn)[-1][-1] == Frame(GO_AWAY, 0, 0, PROTOCOL_ERROR)


@pytest.mark.parametrize(
    "data",
    [
        encode(WINDOW, RST, 1, 0) + encode(DATA, 0, 1, 5) + b"after" + encode(WINDOW, 0, 1, 7),
        encode(DATA, RST, 1, 5) + b"with-",
        encode(WINDOW, FIN, 1, 0) + encode(DATA, 0, 1, 5) + b"after" + encode(DATA, FIN, 1, 0),
    ],
)
@virtual
async def test_what_can_cross_a_reset_costs_the_stream_only(data: bytes) -> None:
    raw, connection = raw_listener()
    async with started(connection):
        await raw.write_vec([OPEN + data + encode(DATA, SYN, 3, 2) + b"hi"])
        broken, whole = await connection.accept_stream(), await connection.accept_stream()
        with pytest.raises(MuxedStreamReset):
            await receive(broken, 1)
        assert await receive(whole, 2) == b"hi"


@virtual
async def test_pings_are_answered_with_what_they_carry() -> None:
    raw, connection = raw_listener()
    async with started(connection):
        await raw.write_vec([encode(PING, SYN, 0, 77) + encode(PING, ACK, 0, 78)])
        assert decode(await raw.read_record()) == Frame(PING, ACK, 0, 77)


@virtual
async def test_a_peer_that_provokes_answers_it_does_not_read_loses_the_connection() -> None:
    end, other = channels(RecordChannel, capacity=0)
    connection = YamuxConnection(end, PEER)
    async with started(connection):
        await other.write_vec([encode(PING, SYN, 0, 1) * 10_000])
        await connection.event_closed.wait()
        assert trio.current_time() == 0


@virtual
async def test_streams_that_end_at_once_do_not_pile_up() -> None:
    raw, connection = raw_listener()
    async with started(connection):
        for number in range(1, 401, 2):
            await raw.write_vec([encode(WINDOW, SYN, number, 0) + encode(WINDOW, RST, number, 0)])
        await settle()
        assert connection.is_established
        assert connection._streams == {}
        assert connection._spare == LIMITS.spare == 2 * (LIMITS.window - INITIAL_WINDOW) + 2 * INITIAL_WINDOW
        await raw.write_vec([encode(WINDOW, SYN, 401, 0)])
        await settle()
        assert frames_in(connection.secured_conn)[-1][-1] == Frame(WINDOW, RST, 401, 0)


KNOWN = st.integers(0, 5)
FRAMES = st.builds(
    lambda kind, flags, stream, length, body: encode(kind, flags, stream, len(body) if kind == DATA else length) + body,
    st.sampled_from([DATA, DATA, WINDOW, WINDOW, PING]),
    st.sampled_from([0, 0, SYN, ACK, FIN, RST, SYN | FIN, 16]),
    KNOWN,
    st.sampled_from([0, 1, INITIAL_WINDOW, LARGEST]),
    st.binary(max_size=30),
)
INPUTS = st.lists(st.one_of(FRAMES, FRAMES, FRAMES, st.binary(max_size=30)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(INPUTS, st.booleans(), st.sampled_from(KINDS))
def test_no_bytes_get_out_of_the_connection_as_an_exception(
    inputs: list[bytes], is_listener: bool, kind: type[PlainChannel]
) -> None:
    async def read_all(connection: YamuxConnection) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    nursery.start_soon(_read_quietly, await connection.accept_stream())
                except MuxedConnUnavailable:
                    return

    @virtual
    async def check() -> None:
        dialled, accepted = channels(kind, capacity=100)
        end, raw = (accepted, dialled) if is_listener else (dialled, accepted)
        limits = Limits(window=INITIAL_WINDOW + 10, buffered=4 * INITIAL_WINDOW + 20, incoming=2, outgoing=2)
        connection = YamuxConnection(end, PEER, limits)
        async with started(connection), trio.open_nursery() as nursery:
            await connection.open_stream()
            nursery.start_soon(read_all, connection)
            for data in inputs:
                if not connection.is_closed:
                    await raw._send.send(data)
                await settle()
                assert 0 <= connection._spare <= 20
                assert len(connection._streams) <= 3
            await raw.close()
            await connection.event_closed.wait()

    check()


async def _read_quietly(stream: YamuxStream) -> None:
    try:
        while await stream.read(7):
            await stream.write(b"echo")
    except MuxedStreamError:
        await stream.close()


# libp2p's own yamux at the other end


@asynccontextmanager
async def mixed(ours_dials: bool) -> AsyncIterator[tuple[YamuxConnection, Yamux]]:
    first, second = channels(PlainChannel)
    end, other = (first, second) if ours_dials else (second, first)
    ours, stock = YamuxConnection(end, PEER), Yamux(other, PEER)
    async with started(ours, stock):
        yield ours, stock


@pytest.mark.parametrize("ours_dials", [True, False])
@pytest.mark.parametrize("ours_opens", [True, False])
@virtual
async def test_stock_yamux_understands_us_and_we_it(ours_dials: bool, ours_opens: bool) -> None:
    data = pattern(3_000_000)
    async with mixed(ours_dials) as (ours, stock):
        if ours_opens:
            mine = await ours.open_stream()
            its = await stock.accept_stream()
        else:
            its = await stock.open_stream()
            mine = await ours.accept_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.write, data)
            nursery.start_soon(_expect_stock, its, data)
            nursery.start_soon(its.write, data)
            nursery.start_soon(expect, mine, data)
        await mine.close()
        with pytest.raises(MuxedStreamEOF):
            await its.read(1)
        await its.close()
        assert await receive(mine, 1) == b""
        assert mine.is_over
        await trio.sleep(200)  # pings both ways
        assert ours.is_established
        assert stock.is_established


async def _expect_stock(stream: Any, data: bytes) -> None:
    received = b""
    while len(received) < len(data):
        received += await stream.read(100_000)
    assert received == data


@virtual
async def test_stock_yamux_resets_and_is_reset() -> None:
    async with mixed(True) as (ours, stock):
        mine, its = await ours.open_stream(), await stock.accept_stream()
        await its.reset()
        with pytest.raises(MuxedStreamReset):
            await receive(mine, 1)
        mine, its = await ours.open_stream(), await stock.accept_stream()
        await mine.reset()
        with pytest.raises((MuxedStreamReset, MuxedStreamEOF)):  # stock forgets which
            await its.read(1)
        await stock.close()
        await ours.event_closed.wait()


@virtual
async def test_stock_yamux_closes_when_we_say_goodbye() -> None:
    async with mixed(False) as (ours, stock):
        began = trio.current_time()
        await ours.close()
        assert trio.current_time() == began
        await stock.event_closed.wait()
    assert frames_in(ours.secured_conn)[-1][-1] == Frame(GO_AWAY, 0, 0, NORMAL)
