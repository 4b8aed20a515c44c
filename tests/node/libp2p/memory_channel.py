"""Secured connections over memory, in the two kinds that a muxer meets: standard ones, and ones made of records."""

from collections.abc import Sequence
from typing import Any

import trio
from libp2p.io.exceptions import ConnectionClosedError

BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel)


class PlainChannel:
    """An `ISecureConn` with nothing but `read` and `write`, like standard Noise."""

    def __init__(self, is_initiator: bool, send: Any, receive: Any) -> None:
        self.is_initiator = is_initiator
        self.written: list[bytes] = []
        self.deaf = trio.Event()
        """Set when nothing that is written leaves any more."""
        self._send, self._receive = send, receive
        self._ahead = b""

    async def write(self, data: bytes) -> None:
        # In two, so that a write can be cut short.
        await self._send_pieces((data[: len(data) // 2], data[len(data) // 2 :]))

    async def _send_pieces(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        self.written.append(b"".join(pieces))
        if self.deaf.is_set():
            return
        try:
            for piece in pieces:
                await self._send.send(bytes(piece))
        except BROKEN as error:
            raise ConnectionClosedError("gone") from error

    async def read(self, n: int | None = None) -> bytes:
        if not self._ahead:
            self._ahead = await self._next()
        size = len(self._ahead) if n is None else n
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    async def _next(self) -> bytes:
        try:
            return bytes(await self._receive.receive())
        except trio.EndOfChannel:
            return b""
        except BROKEN as error:
            raise ConnectionClosedError("gone") from error

    async def close(self) -> None:
        self._send.close()
        self._receive.close()
        await trio.lowlevel.checkpoint()

    def get_remote_address(self) -> None:
        return None


class RecordChannel(PlainChannel):
    """One with records, which a muxer must use instead; `written` has all records of a write as one."""

    ahead = b""
    buffer = bytearray()

    async def write_vec(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        with trio.CancelScope(shield=True):
            await self._send_pieces(parts)

    async def read_record(self, place: Any = None) -> memoryview:
        record = await self._next()
        if not record:
            raise ConnectionClosedError("the end")
        if place is not None and (target := place(len(record))) is not None:
            target[:] = record
            return target
        self.buffer[:] = bytes(len(self.buffer))  # what was returned before is not valid any more
        if len(record) > len(self.buffer):
            self.buffer = bytearray(len(record))
        self.buffer[: len(record)] = record
        return memoryview(self.buffer)[: len(record)]

    def leftover(self) -> bytes:
        ahead, self.ahead = self.ahead, b""
        return ahead

    async def write(self, data: bytes) -> None:
        raise AssertionError("write_vec is there")

    async def read(self, n: int | None = None) -> bytes:
        raise AssertionError("read_record is there")


def channels(kind: type[PlainChannel], capacity: int = 8) -> tuple[Any, Any]:
    """Both ends of a pipe that holds `capacity` records each way; the first end dialled."""
    there, here = trio.open_memory_channel[bytes](capacity), trio.open_memory_channel[bytes](capacity)
    return kind(True, there[0], here[1]), kind(False, here[0], there[1])
