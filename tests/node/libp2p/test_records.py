"""The record layer against an end that is not trusted yet, or breaks its word: what it can make us hold and open."""

from typing import Any

import pytest
import trio
from libp2p.io.exceptions import ConnectionClosedError

from p2pfl.crypto.suite import TAG_BYTES
from p2pfl.node.libp2p.records import (
    EARLY_PLAINTEXT,
    HEADER_BYTES,
    IDLE_BUFFER,
    MAX_PLAINTEXT,
    READ_AHEAD,
    Inbox,
    RekeyPolicy,
)
from tests.node.libp2p.test_channel import Tape, channel, ends, meet, played, recorded, socket_pair
from tests.trio_tools import trio_test


@trio_test
async def test_a_long_record_is_refused_until_the_channel_is_established() -> None:
    (largest,) = await recorded([bytes(EARLY_PLAINTEXT)])
    (longer,) = await recorded([bytes(EARLY_PLAINTEXT + 1)])
    for recording, is_welcome in ((largest, True), (longer, False)):
        tape = Tape(recording)
        reader = channel(tape, is_initiator=False, is_established=False)
        if is_welcome:
            assert len(await reader.read_record()) == EARLY_PLAINTEXT
        else:
            with pytest.raises(ConnectionClosedError, match=f"{EARLY_PLAINTEXT + TAG_BYTES} are the most"):
                await reader.read_record()
            assert tape.closed
        assert len(reader._inbox._view) == IDLE_BUFFER


@trio_test
async def test_a_stranger_with_a_handshake_gets_no_large_buffer() -> None:
    """It announces the largest record in place of its verdict."""
    one, other = ends()
    real = other.transport._exchange_verdicts

    async def announce(made: Any, *rest: Any) -> None:
        await made.write(bytes(MAX_PLAINTEXT))
        await real(made, *rest)

    other.transport._exchange_verdicts = announce  # type: ignore[method-assign]
    failure, _ = await meet(one, other)
    assert "are the most" in str(failure)


@trio_test
async def test_welcome_ends_take_the_largest_records() -> None:
    one, other = ends()
    async with socket_pair() as raw:
        a, b = await meet(one, other, raw[:2])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.write, bytes(MAX_PLAINTEXT))
            assert len(await b.read_record()) == MAX_PLAINTEXT


@trio_test
async def test_a_buffer_grows_with_what_comes_not_with_what_was_announced() -> None:
    recording = HEADER_BYTES * b"\0" + bytes(MAX_PLAINTEXT)
    for arrived, step in ((0, 1), (20, 1), (IDLE_BUFFER, 1 << 30), (100_000, 1 << 30), (len(recording), 1 << 30)):
        inbox = Inbox(Tape(recording[:arrived], step))  # type: ignore[arg-type]
        if arrived == len(recording):
            assert len(await inbox.peek(len(recording))) == len(recording)
        else:
            with pytest.raises(ConnectionClosedError):
                await inbox.peek(len(recording))
        assert len(inbox._view) <= max(IDLE_BUFFER, 2 * arrived + 2 * READ_AHEAD)


SIZES = [1, IDLE_BUFFER, 300_000, 20, READ_AHEAD, *[IDLE_BUFFER - 50] * 30, MAX_PLAINTEXT, MAX_PLAINTEXT, 9, 40_000]


@pytest.mark.parametrize("step", [1000, 1 << 30])
@trio_test
async def test_records_of_all_sizes_come_whole_through_a_growing_buffer(step: int) -> None:
    texts = [bytes([number]) * size for number, size in enumerate(SIZES)]
    got, error, _ = await played(b"".join(await recorded(texts)), step)
    assert got == texts
    assert "hung up" in str(error)


@trio_test
async def test_nor_is_anything_lost_where_more_is_read_than_was_asked_for() -> None:
    texts = [bytes([number]) * size for number, size in enumerate(SIZES)]
    recording = b"".join(await recorded(texts))
    async with socket_pair() as (dialling, listening, *_), trio.open_nursery() as nursery:
        nursery.start_soon(dialling.write, recording)
        reader = channel(listening, is_initiator=False)
        assert [bytes(await reader.read_record()) for _ in texts] == texts


@trio_test
async def test_a_key_that_should_have_been_replaced_opens_nothing_more() -> None:
    careless = await recorded([bytes(1000)] * 5, rekey=RekeyPolicy())
    got, error, _ = await played(b"".join(careless), rekey=RekeyPolicy(after_bytes=1500))
    assert len(got) == 3  # 1000, 2000, and the one that reached 3000
    assert "no change of its key" in str(error)


@pytest.mark.parametrize("size", [1, 700, 100_000])
@trio_test
async def test_a_sender_that_keeps_to_the_policy_never_meets_the_limit(size: int) -> None:
    policy = RekeyPolicy(after_bytes=1500)
    texts = [bytes(size)] * 20
    got, error, _ = await played(b"".join(await recorded(texts, rekey=policy)), rekey=policy)
    assert got == texts
    assert "hung up" in str(error)


@trio_test
async def test_the_age_of_a_key_is_its_senders_business() -> None:
    """An idle connection has an old key, and the record that replaces it still comes under that."""
    texts = [b"before", b"after"]
    got, _, _ = await played(
        b"".join(await recorded(texts, rekey=RekeyPolicy(after_seconds=1e9))), rekey=RekeyPolicy(after_seconds=0)
    )
    assert got == texts


@pytest.mark.parametrize("parts", [[], [b""], [b"", memoryview(b"")], [bytearray()]])
@trio_test
async def test_nothing_sends_nothing(parts: list[Any]) -> None:
    tape = Tape()
    await channel(tape, is_initiator=True).write_vec(parts)
    assert tape.written == []
