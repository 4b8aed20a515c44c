"""Bodies that are opened in their reader's memory: they come whole and once, and nothing that is forged is seen."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.exceptions import MuxedStreamReset

from p2pfl.node.libp2p.frames import DATA, FIN, RST, SYN, WINDOW, encode
from p2pfl.node.libp2p.records import RekeyPolicy
from p2pfl.node.libp2p.streams import YamuxStream
from p2pfl.node.libp2p.writer import OWN_RECORD
from p2pfl.node.libp2p.yamux import YamuxConnection
from tests.node.libp2p.test_channel import PEER, Tape, channel, memory_pair, played, recorded, socket_pair
from tests.trio_tools import trio_test

SIZE = 100_000
BODY = bytes(range(1, 251)) * (SIZE // 250)
OPEN = encode(WINDOW, SYN, 1, 0)


class Memory:
    """A `Place` that gives one piece of memory, and counts how often it was asked."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(b"\xff" * size))
        self.asked: list[int] = []

    def __call__(self, size: int) -> memoryview | None:
        self.asked.append(size)
        return self.view if size == len(self.view) else None


def forged(record: bytes) -> bytes:
    return record[:-20] + bytes([record[-20] ^ 1]) + record[-19:]


# Records


@trio_test
async def test_a_record_is_opened_in_the_memory_that_it_is_given() -> None:
    reader = channel(Tape(b"".join(await recorded([b"head", BODY, b"tail"]))), is_initiator=False)
    memory = Memory(SIZE)
    assert bytes(await reader.read_record(memory)) == b"head"
    assert (await reader.read_record(memory)).obj is memory.view.obj
    assert memory.view == BODY
    assert bytes(await reader.read_record(memory)) == b"tail"
    assert memory.asked == [4, SIZE, 4]


@trio_test
async def test_nothing_of_a_forged_record_stays_in_the_memory_it_was_opened_in() -> None:
    tape = Tape(forged((await recorded([BODY]))[0]))
    memory = Memory(SIZE)
    with pytest.raises(ConnectionClosedError, match="changed, repeated, dropped or moved"):
        await channel(tape, is_initiator=False).read_record(memory)
    assert memory.view == bytes(SIZE)
    assert tape.closed


@trio_test
async def test_memory_is_asked_for_only_once_the_record_is_there_whole() -> None:
    (record,) = await recorded([BODY])
    memory = Memory(SIZE)
    with pytest.raises(ConnectionClosedError, match="inside a record"):
        await channel(Tape(record[:-1]), is_initiator=False).read_record(memory)
    ours, theirs = memory_pair()
    reader = channel(ours, is_initiator=False)
    await theirs.write(record[:-1])
    with trio.move_on_after(0):
        await reader.read_record(memory)
    assert memory.asked == []
    await theirs.write(record[-1:])
    assert await reader.read_record() == BODY
    assert memory.view == b"\xff" * SIZE


@pytest.mark.parametrize("after", [1, 1000, SIZE + 100, 2 * SIZE])
@trio_test
async def test_a_key_changes_between_the_records_of_one_write(after: int) -> None:
    policy = RekeyPolicy(after_bytes=after)
    tape = Tape()
    writer = channel(tape, is_initiator=True, rekey=policy)
    for _ in range(3):
        await writer.write_vec((b"head", BODY))
    assert len(tape.written) == 3
    got, _, _ = await played(b"".join(tape.written), rekey=policy)
    assert got == [b"head", BODY] * 3


@trio_test
async def test_a_write_of_several_records_is_whole_whoever_is_cancelled() -> None:
    """Also where it finds somebody else writing: what it carries for others must not be lost with its caller."""
    tape = Tape()
    tape.blocked = trio.Event()
    writer = channel(tape, is_initiator=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.write, b"first")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(writer.write_vec, (b"head", BODY))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        tape.blocked.set()
    with trio.CancelScope() as scope:
        scope.cancel()
        await writer.write_vec((b"head", BODY))
    got, _, _ = await played(b"".join(data for data in tape.written if len(data) > 1))
    assert got == [b"first", b"head", BODY, b"head", BODY]


# Streams


class Sender:
    """The other end of a muxer of ours, over the real record layer: writes what it is told to, or changes it first."""

    def __init__(self) -> None:
        ours, self.raw = memory_pair()
        self.muxer = YamuxConnection(channel(ours, is_initiator=False), PEER)
        self.tape = Tape()
        self.writer = channel(self.tape, is_initiator=True)

    async def send(self, *parts: bytes) -> None:
        """Write each part as a record, and let it arrive."""
        await self.writer.write_vec(parts)
        await self.raw.write(self.sealed())
        await trio.testing.wait_all_tasks_blocked()

    def sealed(self) -> bytes:
        data = b"".join(self.tape.written)
        self.tape.written.clear()
        return data


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Sender, YamuxStream, list[int]]]:
    """A sender, the stream that it opened, and how many bytes the stream was given by a copy each time."""
    sender = Sender()
    copied: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.muxer.start)
        await sender.send(OPEN)
        stream = await sender.muxer.accept_stream()
        deliver = stream.deliver

        def count(piece: memoryview) -> None:
            copied.append(len(piece))
            deliver(piece)

        stream.deliver = count  # type: ignore[method-assign]
        yield sender, stream, copied
        await sender.raw.close()
        nursery.cancel_scope.cancel()


async def fill(stream: YamuxStream, view: memoryview, result: list[Any]) -> None:
    try:
        result.append(await stream.receive_into(view))
    except MuxedStreamReset as error:
        result.append(error)


@trio_test
async def test_a_waiting_reader_gets_bodies_without_a_copy() -> None:
    view, result = memoryview(bytearray(2 * SIZE)), []
    async with listening() as (sender, stream, copied), trio.open_nursery() as nursery:
        nursery.start_soon(fill, stream, view, result)
        await trio.testing.wait_all_tasks_blocked()
        await sender.send(encode(DATA, 0, 1, SIZE), BODY)
        assert view[:SIZE] == BODY
        assert result == []
        await sender.send(encode(DATA, FIN, 1, SIZE), BODY[::-1])
        assert result == [2 * SIZE]
        assert view == BODY + BODY[::-1]
        assert copied == []
        assert await stream.receive_into(view) == 0


@pytest.mark.parametrize("cut", [1, 5000, SIZE - 1])
@trio_test
async def test_a_frame_may_span_records_and_a_record_frames(cut: int) -> None:
    view, result = memoryview(bytearray(3 * SIZE)), []
    async with listening() as (sender, stream, _), trio.open_nursery() as nursery:
        nursery.start_soon(fill, stream, view, result)
        await trio.testing.wait_all_tasks_blocked()
        header = encode(DATA, 0, 1, SIZE)
        await sender.send(header + BODY[:cut], BODY[cut:], header[:7], header[7:], BODY[:cut], BODY[cut:] + header)
        await sender.send(BODY)
        assert result == [3 * SIZE]
        assert view == BODY * 3


@pytest.mark.parametrize("size", [1, SIZE - 1])
@trio_test
async def test_a_short_read_takes_its_part_and_leaves_the_rest(size: int) -> None:
    view, result = memoryview(bytearray(b"\xff" * SIZE)), []
    async with listening() as (sender, stream, copied), trio.open_nursery() as nursery:
        nursery.start_soon(fill, stream, view[:size], result)
        await trio.testing.wait_all_tasks_blocked()
        await sender.send(encode(DATA, 0, 1, SIZE), BODY)
        assert result == [size]
        assert view == BODY[:size] + b"\xff" * (SIZE - size)
        assert copied == [SIZE]
        assert await stream.receive_into(view[size:]) == SIZE - size
        assert view == BODY


@trio_test
async def test_a_reader_sees_nothing_of_a_forged_body() -> None:
    view, result = memoryview(bytearray(b"\xff" * 3 * SIZE)), []
    async with listening() as (sender, stream, copied), trio.open_nursery() as nursery:
        nursery.start_soon(fill, stream, view, result)
        await trio.testing.wait_all_tasks_blocked()
        await sender.send(encode(DATA, 0, 1, SIZE), BODY)
        await sender.writer.write_vec((encode(DATA, 0, 1, SIZE), BODY))
        await sender.raw.write(forged(sender.sealed()))
        await sender.muxer.event_closed.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(result[0], MuxedStreamReset)
        assert "changed, repeated, dropped or moved" in str(result[0])
        assert view == BODY + bytes(SIZE) + b"\xff" * SIZE
        assert copied == []


@trio_test
async def test_a_reader_that_is_cancelled_while_its_body_comes_is_not_written_to() -> None:
    view, result = memoryview(bytearray(b"\xff" * SIZE)), []
    async with listening() as (sender, stream, copied):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill, stream, view, result)
            await trio.testing.wait_all_tasks_blocked()
            await sender.writer.write_vec((encode(DATA, 0, 1, SIZE), BODY))
            sealed = sender.sealed()
            await sender.raw.write(sealed[:-1])
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await sender.raw.write(sealed[-1:])
        await trio.testing.wait_all_tasks_blocked()
        assert view == b"\xff" * SIZE
        assert copied == [SIZE]
        assert await stream.receive_into(view) == SIZE  # it was cancelled before its first byte, so none is lost
        assert view == BODY


@trio_test
async def test_a_reader_that_is_cancelled_as_its_body_comes_leaves_a_broken_stream() -> None:
    """The body is in its memory by then, and in no other."""
    view, result = memoryview(bytearray(2 * SIZE)), []
    async with listening() as (sender, stream, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill, stream, view, result)
            await trio.testing.wait_all_tasks_blocked()
            await sender.send(encode(DATA, 0, 1, SIZE), BODY)
            nursery.cancel_scope.cancel()
        with pytest.raises(MuxedStreamReset):
            await stream.receive_into(view)
        await sender.send(encode(DATA, 0, 1, SIZE), BODY)  # crosses the reset
        assert sender.muxer.is_established


@pytest.mark.parametrize("by_peer", [True, False])
@trio_test
async def test_the_body_of_a_stream_that_was_reset_goes_nowhere(by_peer: bool) -> None:
    view, result = memoryview(bytearray(b"\xff" * SIZE)), []
    async with listening() as (sender, stream, _), trio.open_nursery() as nursery:
        nursery.start_soon(fill, stream, view, result)
        await trio.testing.wait_all_tasks_blocked()
        if by_peer:
            await sender.send(encode(WINDOW, RST, 1, 0), encode(DATA, 0, 1, SIZE), BODY)
        else:
            await sender.send(encode(DATA, 0, 1, SIZE))
            await stream.reset()
            await sender.send(BODY)
        assert isinstance(result[0], MuxedStreamReset)
        assert view == b"\xff" * SIZE
        assert sender.muxer.is_established


@trio_test
async def test_windows_bind_bodies_that_are_placed_too() -> None:
    async with listening() as (sender, stream, copied), trio.open_nursery() as nursery:
        size = stream.window.size + 1
        view, result = memoryview(bytearray(size)), []
        nursery.start_soon(fill, stream, view, result)
        await trio.testing.wait_all_tasks_blocked()
        await sender.send(encode(DATA, 0, 1, size), BODY)
        assert isinstance(result[0], MuxedStreamReset)
        assert "with credit for" in str(result[0])
        assert view[:SIZE] == bytes(SIZE)
        assert copied == []


@pytest.mark.parametrize("size", [OWN_RECORD - 1, OWN_RECORD, 1_000_000])
@trio_test
async def test_bodies_cross_a_socket_both_ways_at_once(size: int) -> None:
    async with socket_pair() as (dialling, accepting, *_), trio.open_nursery() as nursery:
        here, there = (
            YamuxConnection(channel(end, is_initiator=first), PEER)
            for end, first in ((dialling, True), (accepting, False))
        )
        for muxer in (here, there):
            nursery.start_soon(muxer.start)
            await muxer.event_started.wait()
        mine = await here.open_stream()
        await mine.write(b"x")
        yours = await there.accept_stream()
        assert await yours.read(1) == b"x"
        data = bytes(range(250)) * (10 * size // 250)
        views, results = [memoryview(bytearray(len(data))) for _ in range(2)], [[], []]  # type: ignore[var-annotated]
        async with trio.open_nursery() as both:
            for stream, view, result in zip((mine, yours), views, results, strict=True):
                both.start_soon(fill, stream, view, result)
                both.start_soon(stream.write, data)
        assert results == [[len(data)], [len(data)]]
        assert views == [data, data]
        await here.close()
        await there.close()
