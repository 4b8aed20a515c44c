"""The record layer of our secure channel: what travels after the handshake.

    record = header (4 bytes, big endian) | ciphertext | tag (16 bytes)
    header = rekey (1 bit) | length of ciphertext and tag (31 bits)

The header is authenticated with its record. A record whose rekey bit is set is the last under its key: both ends
replace the key of that direction right after it. A record that does not open as the next one ends the connection, and
nothing of it is delivered.

Owns buffers, records and the time to rekey. Knows no handshake and no peer's rights: that is `channel`.
"""

import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import trio
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import PrivateKey, PublicKey
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from multiaddr import Multiaddr

from p2pfl.core.errors import BadTag, Malformed, OutOfTurn, RemoteError, TooLarge
from p2pfl.core.ids import PeerId
from p2pfl.crypto.noise import CipherState, Session
from p2pfl.crypto.suite import TAG_BYTES, Buffer
from p2pfl.node.libp2p.tcp import SocketConnection

HEADER_BYTES = 4
REKEY = 1 << 31

MAX_PLAINTEXT = 1 << 20
"""Bytes in one record: a muxer's frame of 256 KiB fits in one with its header, and a buffer stays small; a guess."""

SEND_DEADLINE = 60.0
"""Seconds one record may take to enter the socket before the connection is given up; a guess (17 kB/s)."""

IDLE_BUFFER = 8 * 1024
"""Bytes a buffer has while only control messages pass; a guess."""

OVERHEAD = HEADER_BYTES + TAG_BYTES
"""Bytes of a record beyond its plaintext."""

MAX_RECORD = MAX_PLAINTEXT + OVERHEAD
"""Bytes of the largest record, and the most that are sealed before they are sent."""

EARLY_PLAINTEXT = 1024
"""Bytes in one record until the channel is established; a verdict has one, the rest is room for a later version."""

READ_AHEAD = 64 * 1024
"""Bytes taken from the kernel beyond a small record, at most: many small ones come in one call. A measurement."""

LOOK_AHEAD = 2 * OVERHEAD + 16
"""Bytes taken beyond a large record: the muxer's header of the next one, which is a record of its own, and the length
of that next one. More would have to be moved to make room for the rest of it. A measurement."""

UNYIELDED = 1 << 20
"""Bytes of large records after which whoever reads or writes them lets other tasks run: 0.4 ms of work, while a
checkpoint for each record costs a tenth of it. Measurements."""

Place = Callable[[int], memoryview | None]
"""Given the length of a plaintext, says where to open it: so many writable bytes, or None for anywhere."""

IDLE_AFTER = 5.0
"""Seconds without a large record after which a buffer shrinks at the next small one; a guess."""


def anywhere(size: int) -> None:
    """Be a `Place` that has none."""
    del size


@dataclass(frozen=True)
class RekeyPolicy:
    """When the sender of a direction replaces its key, whatever comes first, and what its receiver puts up with.

    The receiver ends a connection whose key has served twice the bytes: the cipher's bound binds both ends, and the
    double leaves room for a sender that counts otherwise. It enforces no time. Age wears no key out, only the sender's
    own interest asks for a younger one; a connection that was idle has an old key whose next record is due to replace
    it; and neither a sender's clock nor the network's delay is known here.
    """

    after_bytes: int = 64 << 30
    """2^32 blocks under one key: a sixth of the bound of AES-GCM (RFC 8446, section 5.5); SM4 has the same block."""
    after_seconds: float = 3600.0
    """While traffic flows; a guess."""

    @property
    def most_bytes(self) -> int:
        """What a receiver opens under one key before it ends the connection."""
        return 2 * self.after_bytes


class Scratch:
    """A buffer that grows with the traffic and shrinks when it stops."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(IDLE_BUFFER))
        self._busy = 0.0

    def take(self, size: int) -> memoryview:
        """Return `size` writable bytes, good until the next call."""
        if size > IDLE_BUFFER:
            self._busy = trio.current_time()
            if size > len(self._view):
                self._view = memoryview(bytearray(size))
        elif len(self._view) > IDLE_BUFFER and trio.current_time() > self._busy + IDLE_AFTER:
            self._view = memoryview(bytearray(IDLE_BUFFER))
        return self._view[:size]


class Inbox:
    """What has arrived on a raw connection and was not taken yet. Taking nothing, a cancelled reader loses nothing."""

    def __init__(self, connection: IRawConnection) -> None:
        self._connection = connection
        stream = getattr(connection, "stream", None)
        self._socket = stream if isinstance(stream, SocketConnection) else None
        self._view = memoryview(bytearray(IDLE_BUFFER))
        self._start = self._end = 0
        self._busy = 0.0
        self._unyielded = 0

    def held(self, size: int) -> memoryview | None:
        """Return the next `size` bytes if they are here, good until the next call."""
        end = self._start + size
        return self._view[self._start : end] if end <= self._end else None

    async def peek(self, size: int) -> memoryview:
        """Return the next `size` bytes, waiting for them; good until the next call.

        Raises:
            ConnectionClosedError: the connection ended or broke before them.
        """
        while self._end - self._start < size:
            self._make_room(size)
            received = await self._receive(size - (self._end - self._start))
            if received == 0:
                inside = self._end > self._start or size > HEADER_BYTES
                raise ConnectionClosedError("the connection ended inside a record" if inside else "the peer hung up")
            self._end += received
        return self._view[self._start : self._start + size]

    def drop(self, size: int) -> None:
        """Take the next `size` bytes, which were peeked at, from the inbox."""
        self._start += size
        if self._start == self._end:
            self._start = self._end = 0

    async def _receive(self, least: int) -> int:
        if self._socket is not None:
            if least <= IDLE_BUFFER:
                return await self._socket.receive_into(self._view[self._end : self._end + least + READ_AHEAD])
            view = self._view[self._end : self._end + least + LOOK_AHEAD]
            if self._unyielded < UNYIELDED and (size := self._socket.receive_now(view)):
                self._unyielded += size
                return size
            self._unyielded = 0
            return await self._socket.receive_into(view)
        try:
            data = await self._connection.read(min(least, len(self._view) - self._end))
        except (IOException, RawConnError) as error:
            raise ConnectionClosedError(str(error)) from error
        self._view[self._end : self._end + len(data)] = data
        return len(data)

    def _make_room(self, size: int) -> None:
        """Make room for a part of the next `size` bytes; the buffer doubles as they come, whatever was announced."""
        capacity, held = len(self._view), self._end - self._start
        if size > IDLE_BUFFER:
            self._busy = trio.current_time()
            if size + READ_AHEAD > capacity and 2 * held >= capacity:
                self._move(min(2 * capacity, size + 2 * READ_AHEAD))
        elif capacity > IDLE_BUFFER and self._end <= IDLE_BUFFER and trio.current_time() > self._busy + IDLE_AFTER:
            self._move(IDLE_BUFFER)
        if self._start and self._start + size > len(self._view):
            self._move(len(self._view))

    def _move(self, capacity: int) -> None:
        held = self._end - self._start
        view = self._view if capacity == len(self._view) else memoryview(bytearray(capacity))
        view[:held] = self._view[self._start : self._end]
        self._view, self._start, self._end = view, 0, held


class Channel(BaseSession):
    """An encrypted, authenticated connection. One task reads at a time; any number may write.

    `read_record` and `write_vec` are for a muxer that knows them, `read` and `write` for libp2p's own code. Until
    `establish` the other end may be anyone, and its records have `EARLY_PLAINTEXT` bytes at most.
    """

    def __init__(
        self,
        connection: IRawConnection,
        inbox: Inbox,
        session: Session,
        rekey: RekeyPolicy,
        *,
        local_peer: ID,
        local_private_key: PrivateKey,
        remote_peer: ID,
        remote_permanent_pubkey: PublicKey,
        is_initiator: bool,
    ) -> None:
        super().__init__(
            local_peer=local_peer,
            local_private_key=local_private_key,
            remote_peer=remote_peer,
            remote_permanent_pubkey=remote_permanent_pubkey,
            is_initiator=is_initiator,
        )
        self._connection = connection
        self._socket = inbox._socket
        self._inbox = inbox
        self._sending: CipherState = session.sending
        self._receiving: CipherState = session.receiving
        self._rekey = rekey
        self._rekeyed_at = trio.current_time()
        self._max_plaintext = EARLY_PLAINTEXT
        self._turn = trio.Lock()
        self._sealed, self._opened = Scratch(), Scratch()
        self._unyielded = 0
        self._held = bytearray()
        self._peer = PeerId(str(remote_peer))
        self._broken: str | None = None

    def __repr__(self) -> str:
        return f"Channel({self._peer}, {self._broken or 'open'})"

    def establish(self) -> None:
        """Take records of `MAX_PLAINTEXT` bytes from now on: the other end is welcome, and so are we."""
        self._max_plaintext = MAX_PLAINTEXT

    async def write(self, data: bytes) -> None:
        """Send `data` like `write_vec`, but cancelling it while it waits for its turn sends nothing.

        Raises:
            ConnectionClosedError: see `write_vec`.
        """
        async with self._turn:
            await self._write((data,))

    async def write_vec(self, parts: Sequence[Buffer]) -> None:
        """Send each of `parts` as a record, or as several where it is longer than `MAX_PLAINTEXT`, in as few sends.

        Nothing is copied before it is encrypted. Cancelling has no effect: what was begun is finished, or the
        connection is broken, as half a record would garble it.

        Raises:
            ConnectionClosedError: the connection is broken, or the peer read nothing for `SEND_DEADLINE` seconds.
        """
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            with trio.CancelScope(shield=True):  # whoever has the turn is bounded by its own deadline
                await self._turn.acquire()
        try:
            await self._write(parts)
        finally:
            self._turn.release()

    async def _write(self, parts: Sequence[Buffer]) -> None:
        """Send records, together as far as the buffer for the largest one holds them."""
        self._verify_open()
        plaintexts = [plaintext for part in parts for plaintext in _cut(memoryview(part).cast("B"))]
        now = trio.current_time()
        room = self._sealed.take(min(sum(map(len, plaintexts)) + len(plaintexts) * OVERHEAD, MAX_RECORD))
        end = 0
        for plaintext in plaintexts:
            if end + len(plaintext) + OVERHEAD > len(room):
                await self._send(room[:end])
                end = 0
            self._seal(plaintext, room[end : (end := end + len(plaintext) + OVERHEAD)], now)
        if end:
            await self._send(room[:end])

    def _seal(self, plaintext: memoryview, record: memoryview, now: float) -> None:
        size = len(plaintext) + TAG_BYTES
        last = (
            self._sending.used + size >= self._rekey.after_bytes or now >= self._rekeyed_at + self._rekey.after_seconds
        )
        header = (size | REKEY if last else size).to_bytes(HEADER_BYTES, "big")
        record[:HEADER_BYTES] = header
        try:
            self._sending.seal_into(plaintext, header, record[HEADER_BYTES:])
        except OutOfTurn as error:
            raise ConnectionClosedError(f"{self._peer}: {error}") from error
        if last:
            self._sending.rekey()
            self._rekeyed_at = now

    async def _send(self, rest: memoryview) -> None:
        """Send sealed records, whoever is cancelled meanwhile."""
        total = len(rest)
        try:
            if self._socket is not None:
                # As a rule that is all of it, in one call or two. A scope would cost as much as encrypting 64 KiB.
                while sent := self._socket.send_now(rest):
                    rest = rest[sent:]
                    if not rest:
                        self._unyielded += total if total > IDLE_BUFFER else UNYIELDED
                        if self._unyielded >= UNYIELDED:
                            self._unyielded = 0
                            await trio.lowlevel.cancel_shielded_checkpoint()
                        return
            await self._send_slowly(rest)
        except (IOException, RawConnError) as error:
            await self._break(f"{self._peer}: {error}", error)

    async def _send_slowly(self, rest: memoryview) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SEND_DEADLINE) as waiting:
            if self._socket is not None:
                await self._socket.write(rest)
            else:
                await self._connection.write(bytes(rest))
        if waiting.cancelled_caught:
            await self._break(f"{self._peer}: reads nothing", None)

    def read_record(self, place: Place = anywhere) -> Coroutine[Any, Any, memoryview]:
        """Return the plaintext of the next record, after what `read` left over; good until the next call.

        Cancelling it loses nothing. `place` is asked once the record is there whole, and nothing else runs until it is
        open in the memory that it gives; where the record does not open, that memory is zeros.

        Raises:
            ConnectionClosedError: the connection ended or broke, or a record did not open or should not have come.
        """
        return self._open_next(place) if not self._held else self._hand_out()

    async def _hand_out(self) -> memoryview:
        return memoryview(self.leftover())

    async def read(self, n: int | None = None) -> bytes:
        """Return `n` bytes, as libp2p's own session does; without `n`, whatever comes. Cancelling it loses nothing.

        Raises:
            ConnectionClosedError: the connection ended or broke before them, or a record did not open.
        """
        wanted = 1 if n is None else n
        while len(self._held) < wanted:
            self._held += await self._open_next()
        size = len(self._held) if n is None else n
        data = bytes(self._held[:size])
        del self._held[:size]
        return data

    def leftover(self) -> bytes:
        """Take what was received and `read` did not hand out."""
        data = bytes(self._held)
        self._held.clear()
        return data

    async def _open_next(self, place: Place = anywhere) -> memoryview:
        self._verify_open()
        inbox = self._inbox
        try:
            header = bytes(inbox.held(HEADER_BYTES) or await inbox.peek(HEADER_BYTES))
            fields = int.from_bytes(header, "big")
            size = fields & ~REKEY
            self._verify_record(size)
            record = inbox.held(HEADER_BYTES + size) or await inbox.peek(HEADER_BYTES + size)
            plaintext = place(size - TAG_BYTES) or self._opened.take(size - TAG_BYTES)
            self._receiving.open_into(record[HEADER_BYTES:], header, plaintext)
        except BadTag as error:
            await self._break(f"{self._peer}: a record that was changed, repeated, dropped or moved on its way", error)
        except RemoteError as error:
            await self._break(f"{self._peer}: {error.reason}", error)
        except (ConnectionClosedError, OutOfTurn) as error:
            await self._break(f"{self._peer}: {error}", error)
        inbox.drop(HEADER_BYTES + size)
        if fields & REKEY:
            self._receiving.rekey()
        return plaintext

    def _verify_record(self, size: int) -> None:
        """Check the length of a record and the age of its key, before anything is allocated or opened for it.

        Raises:
            Malformed: it has no content, or its key has served too long.
            TooLarge: it is longer than any at this time.
        """
        if size <= TAG_BYTES:
            raise Malformed("a record without content")
        if size > self._max_plaintext + TAG_BYTES:
            raise TooLarge(f"a record of {size} bytes; {self._max_plaintext + TAG_BYTES} are the most")
        if self._receiving.used >= self._rekey.most_bytes:
            raise Malformed(f"no change of its key after {self._receiving.used} bytes; it owed one long before")

    def _verify_open(self) -> None:
        if self._broken is not None:
            raise ConnectionClosedError(self._broken)

    async def _break(self, reason: str, cause: Exception | None) -> NoReturn:
        if self._broken is None:
            self._broken = reason
        await self._close_raw()
        raise ConnectionClosedError(self._broken) from cause

    async def _close_raw(self) -> None:
        # What goes wrong here says that it is closed already.
        with trio.CancelScope(shield=True), trio.move_on_after(1), contextlib.suppress(Exception):
            await self._connection.close()

    async def close(self) -> None:
        """Close the connection; whoever reads or writes it is woken with an error."""
        if self._broken is None:
            self._broken = f"{self._peer}: the connection was closed here"
        await self._close_raw()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the other end's IP address and port, None where it is not known."""
        return self._connection.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Return the other end's addresses, for libp2p's own records."""
        return self._connection.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Return libp2p's word for direct or relayed."""
        return self._connection.get_connection_type()


def _cut(part: memoryview) -> list[memoryview]:
    """Return what of `part` each record carries."""
    return [part[i : i + MAX_PLAINTEXT] for i in range(0, len(part), MAX_PLAINTEXT)]
