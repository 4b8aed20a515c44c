"""Frames over lanes: what is written is what is read, and nothing less is taken for it."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from p2pfl.core.errors import Malformed, RemoteError, StreamReset, TooLarge
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.wire import DIGEST_BYTES, Bye, Hello, Message, Ping, Update, digest, encode_header
from p2pfl.node.framing import WRITE_BYTES, read_message, read_payload, skip_payload, write_bulk, write_message
from tests.memory import End, MemoryLane, run_trio

WRITER, READER = PeerId("writer"), PeerId("reader")
CHARTER = bytes(32)


class Lane:
    """Both ends of a lane, and how it was written."""

    def __init__(self) -> None:
        self.inside = MemoryLane(WRITER, READER)
        self.out, self.incoming = End(self.inside, READER), End(self.inside, WRITER)
        self.writes: list[int] = []
        write = self.out.write

        async def counted(data: bytes | bytearray | memoryview) -> None:
            self.writes.append(len(data))
            await write(data)

        self.out.write = counted  # type: ignore[method-assign]


def update(payload: bytes) -> Update:
    return Update(CHARTER, Round(3), len(payload), 0.0, False)


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


SIZES = [0, 1, WRITE_BYTES - 1, WRITE_BYTES, WRITE_BYTES + 1, 2 * WRITE_BYTES, 5_000_003]


@pytest.mark.parametrize("size", SIZES)
def test_a_payload_of_any_size_comes_whole(size: int) -> None:
    async def test() -> None:
        lane, payload = Lane(), random_bytes(size)
        message = update(payload)
        await write_bulk(lane.out, message, memoryview(payload), digest(payload))
        await write_message(lane.out, Ping(CHARTER, Round(4)))
        await lane.out.close()
        assert await read_message(lane.incoming) == message
        received = await read_payload(lane.incoming, message)
        assert isinstance(received, bytearray)
        assert received == payload
        assert await read_message(lane.incoming) == Ping(CHARTER, Round(4)), "nothing is left of the frame before"
        assert await read_message(lane.incoming) is None
        head = len(encode_header(message))
        bulk = [head + size + DIGEST_BYTES] if size <= WRITE_BYTES else [head, size, DIGEST_BYTES]
        assert lane.writes[: len(bulk)] == bulk, "a small frame is one write, a large payload is not copied"

    run_trio(test)


def test_messages_without_payload_come_in_order() -> None:
    async def test() -> None:
        lane = Lane()
        messages: list[Message] = [Hello(CHARTER, Round(0)), Ping(CHARTER, Round(2**48)), Bye(CHARTER, Round(1))]
        for message in messages:
            await write_message(lane.out, message)
        await lane.out.close()
        assert [await read_message(lane.incoming) for _ in range(4)] == [*messages, None]

    run_trio(test)


@pytest.mark.parametrize("size", [1, 1000, WRITE_BYTES + 1])
@pytest.mark.parametrize("where", ["first", "last", "digest"])
def test_a_payload_that_is_not_what_was_sent_is_malformed(size: int, where: str) -> None:
    async def test() -> None:
        lane, payload = Lane(), random_bytes(size)
        message = update(payload)
        await write_bulk(lane.out, message, memoryview(payload), digest(payload))
        at = {"first": -DIGEST_BYTES - size, "last": -DIGEST_BYTES - 1, "digest": -1}[where]
        lane.inside.buffer[at] ^= 1
        await read_message(lane.incoming)
        with pytest.raises(Malformed, match="does not match its digest") as raised:
            await read_payload(lane.incoming, message)
        assert raised.value.peer == WRITER

    run_trio(test)


ENDS: dict[str, Callable[[bytes], bytes]] = {
    "in-the-length": lambda frame: frame[:1],
    "behind-the-length": lambda frame: frame[:2],
    "in-the-header": lambda frame: frame[:20],
    "behind-the-header": lambda frame: frame[: -1000 - DIGEST_BYTES],
    "in-the-payload": lambda frame: frame[: -500 - DIGEST_BYTES],
    "behind-the-payload": lambda frame: frame[:-DIGEST_BYTES],
    "in-the-digest": lambda frame: frame[:-1],
}


@pytest.mark.parametrize("cut", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("receive", [read_payload, skip_payload])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_an_end_in_the_middle_of_a_frame_is_a_reset(
    cut: Callable[[bytes], bytes], receive: Callable[[End, Message], object], how: str
) -> None:
    async def test() -> None:
        lane, payload = Lane(), random_bytes(1000)
        await lane.out.write(cut(encode_header(update(payload)) + payload + digest(payload)))
        await (lane.out.close() if how == "close" else lane.out.reset())
        with pytest.raises(StreamReset):
            message = await read_message(lane.incoming)
            assert message is not None
            await receive(lane.incoming, message)  # type: ignore[misc]

    run_trio(test)


@pytest.mark.parametrize(
    ("content", "error"), [(b"\x00\x00", Malformed), (b"\xff\xff", TooLarge), (b"\x00\x03abc", Malformed)]
)
def test_what_is_no_header_costs_its_sender(content: bytes, error: type[RemoteError]) -> None:
    async def test() -> None:
        lane = Lane()
        await lane.out.write(content)
        with pytest.raises(error):
            await read_message(lane.incoming)

    run_trio(test)


class Endless:
    """A lane that never runs dry, and notes how much it was asked for at once."""

    def __init__(self) -> None:
        self.peer = WRITER
        self.total = self.largest = 0

    async def read_into(self, view: memoryview) -> bool:
        self.total += len(view)
        self.largest = max(self.largest, len(view))
        return True

    async def reset(self) -> None:
        pass


@pytest.mark.parametrize("size", [1, WRITE_BYTES - DIGEST_BYTES, WRITE_BYTES, 2**31 + 5])
def test_a_refused_payload_is_skipped_in_bounded_memory(size: int) -> None:
    async def test() -> None:
        lane = Endless()
        tracemalloc.start()
        try:
            await skip_payload(lane, Update(CHARTER, Round(0), size, 0.0, False))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert lane.total == size + DIGEST_BYTES
        assert lane.largest <= WRITE_BYTES
        assert peak < 4 * WRITE_BYTES

    run_trio(test)


@pytest.mark.parametrize("size", SIZES)
def test_behind_a_skipped_payload_the_lane_goes_on(size: int) -> None:
    async def test() -> None:
        lane, payload = Lane(), random_bytes(size)
        # Nobody reads the digest of what is thrown away.
        await write_bulk(lane.out, update(payload), memoryview(payload), bytes(DIGEST_BYTES))
        await write_message(lane.out, Bye(CHARTER, Round(9)))
        message = await read_message(lane.incoming)
        assert message is not None
        await skip_payload(lane.incoming, message)
        assert await read_message(lane.incoming) == Bye(CHARTER, Round(9))

    run_trio(test)


def test_writing_to_a_broken_lane_is_a_reset() -> None:
    async def test() -> None:
        lane, payload = Lane(), bytes(WRITE_BYTES + 1)
        await lane.incoming.reset()
        with pytest.raises(StreamReset):
            await write_message(lane.out, Ping(CHARTER, Round(0)))
        with pytest.raises(StreamReset):
            await write_bulk(lane.out, update(payload), memoryview(payload), digest(payload))

    run_trio(test)
