"""The secure channel: who is let in and who is told why, and a record layer that delivers all or breaks."""

import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure

from p2pfl.core.errors import BadTag, InvalidConfig, Malformed, NotAMember, TooLarge, WrongCharter
from p2pfl.crypto.noise import CipherState, Handshake, Session
from p2pfl.crypto.suite import TAG_BYTES, suite
from p2pfl.node.libp2p.channel import (
    HANDSHAKE_DEADLINE,
    PROTOCOLS,
    VERDICT_GRACE,
    ChannelTransport,
    Verdict,
    _framed,
    _message,
)
from p2pfl.node.libp2p.choice import MAX_LINES, SecurityChoice
from p2pfl.node.libp2p.gate import explain
from p2pfl.node.libp2p.records import (
    IDLE_AFTER,
    IDLE_BUFFER,
    MAX_PLAINTEXT,
    REKEY,
    SEND_DEADLINE,
    UNYIELDED,
    Channel,
    Inbox,
    RekeyPolicy,
    Scratch,
)
from p2pfl.node.libp2p.tcp import ByteCount, TcpTransport
from tests.trio_tools import trio_test

CHARTER = hashlib.sha256(b"ours").digest()
OTHER_CHARTER = hashlib.sha256(b"theirs").digest()
SUITES = ["aes", "sm4"]


class Memory:
    """A raw connection over a trio memory stream, as libp2p's own would be over anything but our sockets."""

    def __init__(self, stream: trio.StapledStream[Any, Any], is_initiator: bool) -> None:
        self.stream = stream
        self.is_initiator = is_initiator
        self.closed = False

    async def read(self, n: int | None = None) -> bytes:
        try:
            return bytes(await self.stream.receive_some(n))
        except (trio.ClosedResourceError, trio.BrokenResourceError) as error:
            raise ConnectionClosedError("gone") from error

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.ClosedResourceError, trio.BrokenResourceError) as error:
            raise ConnectionClosedError("gone") from error

    async def close(self) -> None:
        self.closed = True
        await self.stream.aclose()

    def get_remote_address(self) -> tuple[str, int]:
        return "192.0.2.1", 4001


def memory_pair() -> tuple[Memory, Memory]:
    one, other = trio.testing.memory_stream_pair()
    return Memory(one, True), Memory(other, False)


@asynccontextmanager
async def socket_pair() -> AsyncIterator[tuple[RawConnection, RawConnection, ByteCount, ByteCount]]:
    counts = ByteCount(), ByteCount()
    one, other = trio.socket.socketpair()
    dialling = TcpTransport(counts[0]).adopt(trio.SocketStream(one))
    listening = TcpTransport(counts[1]).adopt(trio.SocketStream(other))
    try:
        yield RawConnection(dialling, True), RawConnection(listening, False), *counts
    finally:
        dialling.abort()
        listening.abort()


class End:
    """One peer's transport, and what it refused."""

    def __init__(self, number: int, *, name: str = "aes", charter: bytes = CHARTER, **options: Any) -> None:
        self.key_pair = create_new_key_pair(bytes([number]) * 32)
        self.id = ID.from_pubkey(self.key_pair.public_key)
        self.roster: set[str] = set()
        self.refused: list[tuple[str, str]] = []
        self.transport = ChannelTransport(
            suite(name),
            self.key_pair,
            charter,
            self.roster,
            lambda who, why: self.refused.append((who, why)),
            **options,
        )


def ends(**options: Any) -> tuple[End, End]:
    one, other = End(1, **options), End(2, **options)
    for end in (one, other):
        end.roster.update((str(one.id), str(other.id)))
    return one, other


async def outcome(secure: Callable[[], Awaitable[Channel]], into: list[Any], position: int) -> None:
    try:
        into[position] = await secure()
    except HandshakeFailure as error:
        into[position] = error


async def meet(one: End, other: End, raw: Any = None, expected: ID | None = None) -> list[Any]:
    """What the dialling end and the listening end come out with: channels or the failures."""
    dialling, listening = raw or memory_pair()
    results: list[Any] = [None, None]
    async with trio.open_nursery() as nursery:
        dial = lambda: one.transport.secure_outbound(dialling, expected or other.id)  # noqa: E731
        nursery.start_soon(outcome, dial, results, 0)
        nursery.start_soon(outcome, lambda: other.transport.secure_inbound(listening), results, 1)
    return results


@pytest.mark.parametrize("name", SUITES)
@trio_test
async def test_members_of_one_charter_meet(name: str) -> None:
    one, other = ends(name=name)
    assert one.transport.protocol == PROTOCOLS[name]
    a, b = await meet(one, other)
    assert (a.get_remote_peer(), b.get_remote_peer()) == (other.id, one.id)
    assert (a.get_local_peer(), a.is_initiator, b.is_initiator) == (one.id, True, False)
    assert a.get_remote_public_key().to_bytes() == other.key_pair.public_key.to_bytes()
    await a.write_vec((b"head", bytearray(b"body"), memoryview(b"tail")))
    assert [bytes(await b.read_record()) for _ in range(3)] == [b"head", b"body", b"tail"]
    await b.write(b"answer")
    assert await a.read(6) == b"answer"
    assert one.refused == other.refused == []


@trio_test
async def test_the_gm_suite_meets_too() -> None:
    try:
        suite("gm")
    except Exception as error:  # noqa: BLE001 - says what is missing
        pytest.skip(str(error))
    a, b = await meet(*ends(name="gm"))
    await a.write(b"text")
    assert await b.read(4) == b"text"


@trio_test
async def test_a_socket_is_used_directly_counted_and_labelled() -> None:
    one, other = ends()
    async with socket_pair() as (dialling, listening, sent, received):
        a, b = await meet(one, other, (dialling, listening))
        assert (dialling.stream.peer, listening.stream.peer) == (str(other.id), str(one.id))
        before = sent.sent, received.received
        await a.write(bytes(1000))
        await b.read(1000)
        assert (sent.sent - before[0], received.received - before[1]) == (1020, 1020)
        assert (sent.sent, sent.received) == (received.received, received.sent)
        await a.close()
        with pytest.raises(ConnectionClosedError, match="hung up"):
            await b.read_record()


@trio_test
async def test_both_ends_name_a_difference_in_charters() -> None:
    one, other = End(1), End(2, charter=OTHER_CHARTER)
    one.roster.add(str(other.id))  # who answers is known by then; of the other roster nothing is asked
    a, b = await meet(one, other)
    for end, failed, peer, theirs, ours in (
        (one, a, other, OTHER_CHARTER, CHARTER),
        (other, b, one, CHARTER, OTHER_CHARTER),
    ):
        assert isinstance(failed.__cause__, WrongCharter)
        reason = f"is under charter {theirs.hex()[:8]}…, ours is {ours.hex()[:8]}…"
        assert str(failed) == explain(failed) == f"{peer.id}: {reason}"
        assert end.refused == [(str(peer.id), reason)]


@pytest.mark.parametrize("refusing", [0, 1])
@trio_test
async def test_both_ends_learn_that_one_is_not_on_the_others_roster(refusing: int) -> None:
    pair = ends()
    pair[refusing].roster.clear()
    raw = memory_pair()
    failed = await meet(*pair, raw)
    assert [type(failure.__cause__) for failure in failed] == [NotAMember, NotAMember]
    assert str(failed[refusing]) == f"{pair[1 - refusing].id}: is not on the roster"
    # Whoever dialled does not tell who it is where it refuses.
    dialler = pair[0].id
    assert str(failed[1 - refusing]) == ("" if refusing == 0 else f"{pair[1].id}: ") + "has us not on its roster"
    assert pair[1].refused[0][0] == ("192.0.2.1:4001" if refusing == 0 else str(dialler))
    assert [connection.closed for connection in raw] == [True, True]


@trio_test
async def test_another_peer_than_the_one_dialled_is_named_and_told() -> None:
    one, other = ends()
    a, b = await meet(one, other, expected=End(3).id)
    assert str(a) == f"{other.id}: answers where {End(3).id} was expected"
    assert str(b) == "expected another peer at our address"
    assert other.refused == [("192.0.2.1:4001", "expected another peer at our address")]


@pytest.mark.parametrize("why", ["another peer", "not on the roster", "unsigned"])
@trio_test
async def test_who_answers_in_a_members_place_does_not_learn_who_dialled(why: str) -> None:
    """It completes its part of the handshake, and may open whatever it is sent: no identity and no charter is in it."""
    one, other = ends()
    if why == "not on the roster":
        one.roster.clear()
    dialling, listening = memory_pair()
    results: list[Any] = [None]
    expected = End(3).id if why == "another peer" else other.id
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outcome, lambda: one.transport.secure_outbound(dialling, expected), results, 0)
        static = bytes(range(1, 33))
        stranger = Handshake(
            suite("aes"),
            is_initiator=False,
            static=static,
            ephemeral=bytes(range(2, 34)),
            prologue=one.transport._prologue,
        )
        inbox = Inbox(listening)
        seen = await _message(inbox)
        stranger.read(seen)
        signed = static if why != "unsigned" else bytes(range(3, 35))
        await listening.write(_framed(stranger.write(other.transport._make_hello(signed))))
        third = b""
        try:
            third = await _message(inbox)
            opened = stranger.read(third)
        except ConnectionClosedError:
            opened = b""
    assert isinstance(results[0], HandshakeFailure)
    assert opened == {"another peer": b"\x03", "not on the roster": b"\x02", "unsigned": b""}[why]
    for secret in (CHARTER, one.key_pair.public_key.to_bytes(), one.id.to_bytes()):
        assert secret not in seen + third + opened
    assert one.refused[0][1].startswith(("answers where", "is not on the roster", "a handshake key"))


def test_a_refusal_that_nobody_takes_costs_the_dialler_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        one, other = ends()
        one.roster.clear()
        dialling, listening = memory_pair()
        write, writes = dialling.write, []

        async def first_only(data: bytes) -> None:
            if writes:
                await trio.sleep_forever()
            writes.append(trio.current_time())
            await write(data)

        monkeypatch.setattr(dialling, "write", first_only)
        failed, _ = await meet(one, other, (dialling, listening))
        assert str(failed) == f"{other.id}: is not on the roster"
        assert trio.current_time() - writes[0] == pytest.approx(VERDICT_GRACE)

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@trio_test
async def test_our_own_identity_is_not_a_peer() -> None:
    one, _ = ends()
    a, b = await meet(one, one)
    assert "same key in use twice" in str(a)
    assert "same key in use twice" in str(b)


@trio_test
async def test_a_verdict_nobody_knows_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ends()
    monkeypatch.setattr(other.transport, "_judge", lambda *_: (77, None))
    a, b = await meet(one, other)
    assert isinstance(a.__cause__, Malformed)
    assert isinstance(b, Channel)  # which the dialler has closed
    assert Verdict(0) == Verdict.WELCOME


@trio_test
async def test_an_identity_that_did_not_sign_the_key_is_refused() -> None:
    one, other = ends()
    static = bytes(range(1, 33))
    other.transport._entropy = lambda size: static[:size]
    hello = other.transport._make_hello(static)
    for forged, reason in (
        (hello[:-1] + bytes([hello[-1] ^ 1]), "did not sign"),
        (other.transport._make_hello(bytes(32)[:-1] + b"1"), "did not sign"),  # the identity's, for another static key
        (hello[:32], "no identity"),
        (b"", "no identity"),
        (hello[:32] + b"\x0a\x03abc\x12\x01x", "no identity"),
    ):
        other.transport._make_hello = lambda _, forged=forged: forged
        a, b = await meet(one, other)
        assert reason in str(a)
        assert "hung up" in str(b)


def test_suites_differ() -> None:
    async def run() -> None:
        one, other = End(1), End(2, name="sm4")
        a, b = await meet(one, other)
        assert isinstance(a, HandshakeFailure)
        assert isinstance(b, HandshakeFailure)

    trio.run(run)


@pytest.mark.parametrize("dialling", [True, False])
def test_a_silent_end_costs_the_deadline_and_no_more(dialling: bool) -> None:
    async def run() -> None:
        one, other = ends()
        ours, _theirs = memory_pair()
        begun = trio.current_time()
        with pytest.raises(HandshakeFailure, match="no handshake in 10 s"):
            await (one.transport.secure_outbound(ours, other.id) if dialling else one.transport.secure_inbound(ours))
        assert trio.current_time() - begun == pytest.approx(HANDSHAKE_DEADLINE)
        assert ours.closed

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@trio_test
async def test_a_large_handshake_message_is_refused_at_its_length() -> None:
    one, _ = ends()
    ours, theirs = memory_pair()
    await theirs.write(b"\xff\xff")
    with pytest.raises(HandshakeFailure, match="65535 bytes") as refused:
        await one.transport.secure_inbound(ours)
    assert isinstance(refused.value.__cause__, TooLarge)
    assert one.refused == [("192.0.2.1:4001", "a handshake message of 65535 bytes; 1024 are the most")]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_handshake_changed_anywhere_fails_and_hurts_nobody(data: st.DataObject) -> None:
    from_dialler = data.draw(st.booleans())
    position, mask = data.draw(st.integers(0, 330)), data.draw(st.integers(1, 255))

    async def run() -> None:
        one, other = ends()
        left, left_outside = memory_pair()
        right_outside, right = memory_pair()
        changed = False

        async def pump(source: Memory, target: Memory, change: bool) -> None:
            nonlocal changed
            passed = 0
            while piece := await _or_nothing(source.read(65536)):
                passed += len(piece)
                if change and passed - len(piece) <= position < passed:
                    at = position - (passed - len(piece))
                    piece = piece[:at] + bytes([piece[at] ^ mask]) + piece[at + 1 :]
                    changed = True
                await _or_nothing(target.write(piece))
            await target.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump, left_outside, right_outside, from_dialler)
            nursery.start_soon(pump, right_outside, left_outside, not from_dialler)
            results = await meet(one, other, (left, right))
            for connection in (left, right):
                await connection.close()
        assert all(isinstance(result, Channel | HandshakeFailure) for result in results)
        assert changed == any(isinstance(result, HandshakeFailure) for result in results)

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


async def _or_nothing(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except ConnectionClosedError:
        return None


@settings(deadline=None, max_examples=60)
@given(st.booleans(), st.binary(max_size=700))
def test_garbage_is_no_handshake(dialling: bool, garbage: bytes) -> None:
    async def run() -> None:
        one, other = ends()
        ours, theirs = memory_pair()
        await theirs.write(garbage)
        await theirs.stream.send_stream.aclose()
        with pytest.raises(HandshakeFailure):
            await (one.transport.secure_outbound(ours, other.id) if dialling else one.transport.secure_inbound(ours))
        assert ours.closed

    trio.run(run)


def test_the_hash_of_a_charter_has_its_length() -> None:
    with pytest.raises(InvalidConfig):
        End(1, charter=b"short")


# The record layer


class Tape:
    """A raw connection that plays one recording and makes another."""

    def __init__(self, recording: bytes = b"", step: int = 1 << 30) -> None:
        self.recording = bytearray(recording)
        self.written: list[bytes] = []
        self.step = step
        self.closed = False
        self.blocked: trio.Event | None = None

    async def read(self, n: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        piece = bytes(self.recording[: min(n or self.step, self.step)])
        del self.recording[: len(piece)]
        return piece

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.blocked is not None:
            self.written.append(data[:1])
            await self.blocked.wait()
        self.written.append(data)

    async def close(self) -> None:
        self.closed = True


KEY_PAIR = create_new_key_pair(bytes(32))
PEER = ID.from_pubkey(KEY_PAIR.public_key)


def channel(
    tape: Any, *, is_initiator: bool, rekey: RekeyPolicy | None = None, name: str = "aes", is_established: bool = True
) -> Channel:
    states = [CipherState(suite(name), bytes([i + 1]) * 32) for i in range(2)]
    sending, receiving = states if is_initiator else reversed(states)
    made = Channel(
        tape,
        Inbox(tape),
        Session(sending, receiving, b""),
        rekey or RekeyPolicy(),
        local_peer=PEER,
        local_private_key=KEY_PAIR.private_key,
        remote_peer=PEER,
        remote_permanent_pubkey=KEY_PAIR.public_key,
        is_initiator=is_initiator,
    )
    if is_established:
        made.establish()
    return made


async def recorded(texts: list[bytes], **options: Any) -> list[bytes]:
    tape = Tape()
    writer = channel(tape, is_initiator=True, **options)
    for text in texts:
        await writer.write(text)
    return tape.written


async def played(
    recording: bytes, step: int = 1 << 30, **options: Any
) -> tuple[list[bytes], ConnectionClosedError, Tape]:
    """What a reader gets from these bytes before it breaks, and of what."""
    tape = Tape(recording, step)
    reader = channel(tape, is_initiator=False, **options)
    got = []
    try:
        while True:
            got.append(bytes(await reader.read_record()))
    except ConnectionClosedError as error:
        assert tape.closed
        with pytest.raises(ConnectionClosedError, match=r".+"):
            await reader.read(1)
        with pytest.raises(ConnectionClosedError, match=r".+"):
            await reader.write(b"x")
        assert tape.written == []
        return got, error, tape


TEXTS = [b"one", b"two" * 100, bytes(20_000), b"four"]


@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 30])
@trio_test
async def test_records_come_whole_however_they_are_cut(step: int) -> None:
    got, error, _ = await played(b"".join(await recorded(TEXTS)), step)
    assert got == TEXTS
    assert "hung up" in str(error)


@trio_test
async def test_a_record_is_its_header_ciphertext_and_tag() -> None:
    (record,) = await recorded([b"text"])
    assert record[:4] == (4 + TAG_BYTES).to_bytes(4, "big")
    assert len(record) == 4 + 4 + TAG_BYTES


@trio_test
async def test_long_texts_take_several_records_and_none_takes_none() -> None:
    long = bytes(range(256)) * (MAX_PLAINTEXT // 256) + b"rest"
    tape = Tape()
    writer = channel(tape, is_initiator=True)
    await writer.write_vec((long, b"more"))
    await writer.write_vec(())
    await writer.write_vec((b"", b""))
    await writer.write(b"")
    got, _, _ = await played(b"".join(tape.written))
    assert [len(text) for text in got] == [MAX_PLAINTEXT, 4, 4]
    assert b"".join(got) == long + b"more"


@trio_test
async def test_a_frame_of_the_muxer_is_two_records_in_one_send() -> None:
    tape = Tape()
    await channel(tape, is_initiator=True).write_vec((bytes(12), memoryview(bytearray(256 * 1024))))
    assert [len(data) for data in tape.written] == [2 * (4 + TAG_BYTES) + 12 + 256 * 1024]


@pytest.mark.parametrize("sizes", [[MAX_PLAINTEXT] * 2, [1, MAX_PLAINTEXT, 1], [MAX_PLAINTEXT + 1], [300_000] * 8])
@trio_test
async def test_no_more_is_sealed_at_once_than_the_largest_record(sizes: list[int]) -> None:
    tape = Tape()
    writer = channel(tape, is_initiator=True)
    texts = [bytes([number]) * size for number, size in enumerate(sizes)]
    await writer.write_vec(texts)
    assert max(len(data) for data in tape.written) <= len(writer._sealed._view) <= MAX_PLAINTEXT + 4 + TAG_BYTES
    got, _, _ = await played(b"".join(tape.written))
    assert b"".join(got) == b"".join(texts)


@trio_test
async def test_read_gives_what_is_asked_and_leaves_the_rest() -> None:
    tape = Tape(b"".join(await recorded([b"abc", b"defgh", b"ij"])))
    reader = channel(tape, is_initiator=False)
    assert await reader.read(0) == b""
    assert await reader.read(2) == b"ab"
    assert await reader.read(4) == b"cdef"
    assert reader.leftover() == b"gh"
    assert reader.leftover() == b""
    assert await reader.read() == b"ij"
    tape.recording += (await recorded([b"abc", b"defgh", b"ij", b"klm", b"no"]))[3]
    assert await reader.read(1) == b"k"
    assert bytes(await reader.read_record()) == b"lm"


DAMAGE = {
    "flipped in the text": lambda r: [r[0], r[1][:9] + bytes([r[1][9] ^ 1]) + r[1][10:], *r[2:]],
    "flipped in the tag": lambda r: [r[0], r[1][:-1] + bytes([r[1][-1] ^ 128]), *r[2:]],
    "rekeying claimed": lambda r: [r[0], bytes([r[1][0] ^ 128]) + r[1][1:], *r[2:]],
    "shorter by its header": lambda r: [r[0], r[1][:3] + bytes([r[1][3] - 1]) + r[1][4:-1], *r[2:]],
    "repeated": lambda r: [r[0], r[0], *r[1:]],
    "dropped": lambda r: [r[0], *r[2:]],
    "exchanged": lambda r: [r[0], r[2], r[1], *r[3:]],
    "from the other direction": lambda r: [r[0], b"\0\0\0\x14" + bytes(20)],
}


@pytest.mark.parametrize("damage", DAMAGE)
@trio_test
async def test_a_damaged_record_breaks_the_connection_and_nothing_of_it_is_delivered(damage: str) -> None:
    got, error, _ = await played(b"".join(DAMAGE[damage](await recorded(TEXTS))))
    assert got == TEXTS[:1]
    assert isinstance(error.__cause__, BadTag)
    assert "changed, repeated, dropped or moved" in str(error)
    assert str(PEER) in str(error)


@pytest.mark.parametrize("left", [1, 4, 10, 23 + 300 + 10])
@trio_test
async def test_a_cut_record_breaks_the_connection(left: int) -> None:
    recording = b"".join(await recorded(TEXTS))
    got, error, _ = await played(recording[:23] + recording[23 : 23 + left])
    assert got == TEXTS[: 1 if left < 300 else 2]
    assert "inside a record" in str(error)


@pytest.mark.parametrize("size", [0, TAG_BYTES, MAX_PLAINTEXT + TAG_BYTES + 1, REKEY - 1])
@trio_test
async def test_lengths_are_checked_before_anything_is_allocated(size: int) -> None:
    tape = Tape(size.to_bytes(4, "big") + bytes(100))
    reader = channel(tape, is_initiator=False)
    with pytest.raises(ConnectionClosedError) as broken:
        await reader.read_record()
    assert isinstance(broken.value.__cause__, TooLarge if size > TAG_BYTES else Malformed)
    assert len(reader._inbox._view) == IDLE_BUFFER


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_whatever_is_done_to_the_bytes_only_a_prefix_comes_out(data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=6))
    after = data.draw(st.sampled_from([100, 1 << 30]))

    async def run() -> None:
        records = await recorded(texts, rekey=RekeyPolicy(after_bytes=after))
        recording = bytearray(b"".join(records))
        position = data.draw(st.integers(0, len(recording) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "repeat"])):
            case "flip":
                recording[position] ^= data.draw(st.integers(1, 255))
            case "cut":
                del recording[position:]
            case "insert":
                recording[position:position] = data.draw(st.binary(min_size=1, max_size=40))
            case "remove":
                del recording[position : position + data.draw(st.integers(1, 40))]
            case "repeat":
                recording += recording[position:]
        got, _, _ = await played(bytes(recording), data.draw(st.sampled_from([1, 13, 1 << 30])))
        assert got == texts[: len(got)]

    trio.run(run)


@pytest.mark.parametrize("name", SUITES)
@trio_test
async def test_the_connection_outlives_many_keys_with_data_both_ways(name: str) -> None:
    policy = RekeyPolicy(after_bytes=3000)
    a, b = await meet(*ends(name=name, rekey=policy))
    keys = [set(), set()]

    async def write(end: Channel, seen: set[bytes]) -> None:
        for i in range(200):
            await end.write_vec((i.to_bytes(4, "big") + bytes(i * 7),))
            seen.add(end._sending._key)

    async def read(end: Channel) -> None:
        for i in range(200):
            assert bytes(await end.read_record()) == i.to_bytes(4, "big") + bytes(i * 7)

    async with trio.open_nursery() as nursery:
        for end, seen in ((a, keys[0]), (b, keys[1])):
            nursery.start_soon(write, end, seen)
            nursery.start_soon(read, end)
    assert len(keys[0]) > 40
    assert len(keys[1]) > 40
    assert not keys[0] & keys[1]
    assert a._sending._nonce == 201  # with the verdict: the count goes on over all keys


def test_keys_change_with_time_while_traffic_flows() -> None:
    async def run() -> None:
        records = await recorded([b"a"], rekey=RekeyPolicy(after_seconds=100))
        tape = Tape()
        writer = channel(tape, is_initiator=True, rekey=RekeyPolicy(after_seconds=100))
        for i in range(10):
            await writer.write(b"text %d" % i)
            await trio.sleep(40)
        flags = [record[0] >> 7 for record in tape.written]
        assert flags == [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]
        got, _, _ = await played(b"".join(tape.written))
        assert got == [b"text %d" % i for i in range(10)]
        assert records[0][0] >> 7 == 0

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@trio_test
async def test_a_cancelled_reader_loses_nothing() -> None:
    ours, theirs = memory_pair()
    writer, reader = channel(theirs, is_initiator=True), channel(ours, is_initiator=False)
    tape = Tape()
    twin = channel(tape, is_initiator=True)
    await twin.write(b"hello world")
    (record,) = tape.written
    got = []
    for byte in record:
        with trio.move_on_after(0):
            got.append(await reader.read(11))
        await theirs.write(bytes([byte]))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read_into, reader, got)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught
    assert got == [b"hello world"]
    assert writer.is_initiator


async def _read_into(reader: Channel, got: list[bytes]) -> None:
    got.append(await reader.read(11))


@trio_test
async def test_a_write_that_has_begun_is_finished_whoever_is_cancelled() -> None:
    tape = Tape()
    tape.blocked = trio.Event()
    writer = channel(tape, is_initiator=True)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(writer.write, b"one")
                await trio.testing.wait_all_tasks_blocked()
                inner.start_soon(writer.write, b"never")  # waits for its turn
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                nursery.start_soon(_set_when_idle, tape.blocked)
        tape.blocked = None
        await writer.write(b"two")
    got, _, _ = await played(b"".join(record for record in tape.written if len(record) > 1))
    assert got == [b"one", b"two"]


async def _set_when_idle(event: trio.Event) -> None:
    await trio.testing.wait_all_tasks_blocked()
    event.set()


@trio_test
async def test_a_cancelled_writer_that_never_waits_still_notices() -> None:
    writer = channel(Tape(), is_initiator=True)
    with trio.CancelScope() as scope:
        scope.cancel()
        await writer.write(b"x")
    assert scope.cancelled_caught


def test_a_peer_that_reads_nothing_is_given_up() -> None:
    async def run() -> None:
        tape = Tape()
        tape.blocked = trio.Event()
        writer = channel(tape, is_initiator=True)
        begun = trio.current_time()
        with pytest.raises(ConnectionClosedError, match="reads nothing"):
            await writer.write(b"x")
        assert trio.current_time() - begun == pytest.approx(SEND_DEADLINE)
        assert tape.closed

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@trio_test
async def test_a_full_socket_is_waited_for() -> None:
    async with socket_pair() as (dialling, listening, sent, received):
        a, b = channel(dialling, is_initiator=True), channel(listening, is_initiator=False)
        data = bytes(range(256)) * 4096
        got = bytearray()

        async def write() -> None:
            for _ in range(8):
                await a.write_vec((data[:100_000], data[100_000:]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            while len(got) < 8 * len(data):
                got += await b.read_record()
        assert got == data * 8
        assert sent.sent == received.received == 8 * (len(data) + 2 * (4 + TAG_BYTES))


class Tireless:
    """A socket that never makes anyone wait: it takes all that is written, and plays it to whoever reads."""

    def __init__(self) -> None:
        self.held = bytearray()

    def send_now(self, data: memoryview) -> int:
        self.held += data
        return len(data)

    def receive_now(self, view: memoryview) -> int:
        size = min(len(view), len(self.held))
        view[:size] = self.held[:size]
        del self.held[:size]
        return size

    async def receive_into(self, view: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        return self.receive_now(view)


@trio_test
async def test_others_run_while_a_socket_makes_nobody_wait() -> None:
    socket, turns = Tireless(), 0
    writer, reader = channel(Tape(), is_initiator=True), channel(Tape(), is_initiator=False)
    writer._socket = reader._inbox._socket = socket  # type: ignore[assignment]

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    records, size = 32, 256 * 1024
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        for _ in range(records):
            await writer.write_vec((bytes(size),))
        written = turns
        for _ in range(records):
            assert len(await reader.read_record()) == size
        nursery.cancel_scope.cancel()
    assert written >= records * size // (2 * UNYIELDED)
    assert turns - written >= records * size // (2 * UNYIELDED)


@trio_test
async def test_what_libp2p_left_unread_on_the_socket_comes_first() -> None:
    async with socket_pair() as (dialling, listening, _, received):
        await dialling.write(b"negotiated")
        assert await listening.read(4) == b"nego"
        await dialling.write(b"more")
        view = memoryview(bytearray(100))
        assert listening.stream.receive_now(view) == 0, "what is left over comes first"
        assert [await listening.stream.receive_into(view[:2]) for _ in range(3)] == [2, 2, 2]
        assert await listening.stream.receive_into(view) == 4
        assert bytes(view[:4]) == b"more"
        assert received.received == 14
        assert listening.stream.receive_now(view) == 0, "nothing has come"
        await dialling.write(b"now")
        assert listening.stream.receive_now(view) == 3
        assert received.received == 17
        dialling.stream.abort()
        assert listening.stream.receive_now(view) == 0, "and nothing will"
        assert await listening.stream.receive_into(view) == 0
        for use in (
            lambda: dialling.stream.receive_into(view),
            lambda: _async(dialling.stream.send_now(view)),
            lambda: _async(dialling.stream.receive_now(view)),
        ):
            with pytest.raises(ConnectionClosedError):
                await use()


async def _async(value: int) -> int:
    return value


@trio_test
async def test_closing_wakes_the_reader_here() -> None:
    async with socket_pair() as (dialling, _listening, _, _):
        reader = channel(dialling, is_initiator=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect_closed, reader)
            await trio.testing.wait_all_tasks_blocked()
            await reader.close()
        with pytest.raises(ConnectionClosedError, match="closed here"):
            await reader.write(b"x")


async def _expect_closed(reader: Channel) -> None:
    with pytest.raises(ConnectionClosedError, match="closed here"):
        await reader.read_record()


def test_buffers_grow_with_the_traffic_and_shrink_when_it_stops() -> None:
    async def run() -> None:
        scratch = Scratch()
        assert len(scratch.take(300_000)) == 300_000
        assert len(scratch._view) == 300_000
        await trio.sleep(IDLE_AFTER + 1)
        assert len(scratch.take(10)) == 10
        assert len(scratch._view) == IDLE_BUFFER

        big, small = bytes(300_000), b"x"
        tape = Tape(b"".join(await recorded([big, small, small])), step=300_020)
        reader = channel(tape, is_initiator=False)
        await reader.read_record()
        assert len(reader._inbox._view) >= 300_020
        await trio.sleep(IDLE_AFTER + 1)
        for _ in range(2):
            assert bytes(await reader.read_record()) == small
        assert len(reader._inbox._view) == IDLE_BUFFER

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@trio_test
async def test_nothing_secret_is_shown_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    one, other = ends()
    static = bytes(range(101, 133))
    one.transport._entropy = lambda size: static[:size]
    a, b = await meet(one, other)
    await a.write(b"a text nobody may see")
    await b.read_record()
    shown = caplog.text + repr(a) + repr(one.transport) + str(one.refused)
    for secret in (static, a._sending._key, a._receiving._key, b"a text nobody may see"):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


# Agreeing on a transport


async def choose(one: End, other: End, raw: Any = None) -> list[Any]:
    dialling, listening = raw or memory_pair()
    choices = [SecurityChoice({e.transport.protocol: e.transport}, e.transport._on_refused) for e in (one, other)]
    results: list[Any] = [None, None]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outcome, lambda: choices[0].secure_outbound(dialling, other.id), results, 0)
        nursery.start_soon(outcome, lambda: choices[1].secure_inbound(listening), results, 1)
        while results[0] is None:
            await trio.testing.wait_all_tasks_blocked()
        if not isinstance(results[0], Channel):
            await dialling.close()  # as libp2p's swarm does
    return results


@trio_test
async def test_a_common_transport_is_chosen() -> None:
    a, b = await choose(*ends())
    assert a.negotiated_security_protocol == b.negotiated_security_protocol == "/p2pfl/noise-aes/1.0.0"


@trio_test
async def test_both_ends_name_the_transports_that_differ() -> None:
    one, other = End(1), End(2, name="sm4")
    a, b = await choose(one, other)
    reason = "offers sm4, our charter says aes: is it under another charter?"
    assert str(a) == explain(a) == f"{other.id} {reason}"
    assert one.refused == [(str(other.id), reason)]
    reason = "proposed /p2pfl/noise-aes/1.0.0, but this peer speaks /p2pfl/noise-sm4/1.0.0"
    assert other.refused == [("192.0.2.1:4001", reason)]
    assert reason in str(b)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x13/multistream/1.0.0",
        b"\x13/multistream/1.0.0\n",
        b"\x13/multistream/1.0.0\n\x03\xff\xfe\n",
        b"\x13/multistream/1.0.0\n" + b"\x03no\n" * (MAX_LINES + 5),
        b"\x13/multistream/1.0.0\n\xff\x7f" + b"x" * 5000,
        b"\xff" * 20,
        b"\x00",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
@trio_test
async def test_a_stranger_that_talks_nonsense_is_left(said: bytes) -> None:
    one, _ = ends()
    ours, theirs = memory_pair()
    await theirs.write(said)
    await theirs.stream.send_stream.aclose()
    choice = SecurityChoice({one.transport.protocol: one.transport}, one.transport._on_refused)
    with pytest.raises(HandshakeFailure):
        await choice.secure_inbound(ours)
    dialled, answering = memory_pair()
    await answering.write(said)
    await answering.stream.send_stream.aclose()
    with pytest.raises(HandshakeFailure):
        await choice.secure_outbound(dialled, End(2).id)


def line(text: str | bytes) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return bytes([len(text) + 1]) + text + b"\n"


GREETING, LS, NA = line("/multistream/1.0.0"), line("ls"), line("na")
AES, SM4, GM = (line(PROTOCOLS[name]) for name in ("aes", "sm4", "gm"))


class Overheard(Memory):
    """A raw connection of which everything that was written is kept."""

    written = b""

    async def write(self, data: bytes) -> None:
        self.written += data
        await super().write(data)


async def dial(end: End, answers: list[bytes]) -> tuple[HandshakeFailure, bytes]:
    """What comes of dialling somebody who says this, a piece for each line it hears; and all that it was sent."""
    one, other = trio.testing.memory_stream_pair()
    dialling, listening = Overheard(one, True), Memory(other, False)
    choice = SecurityChoice({end.transport.protocol: end.transport}, end.transport._on_refused)
    results: list[Any] = [None]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outcome, lambda: choice.secure_outbound(dialling, End(2).id), results, 0)
        for answer in answers:
            await listening.read(1000)
            await listening.write(answer)
        await trio.testing.wait_all_tasks_blocked()
        if results[0] is None and answers[-1] != b"":
            await listening.stream.send_stream.aclose()
    return results[0], dialling.written


LISTS = {
    "libp2p for Python": (line(SM4[1:]), "offers sm4, our charter says aes"),
    "of two": (line(GM[1:] + b"/noise\n"), "offers gm and standard Noise, our charter says aes"),
    "the specification": (line(SM4 + line("/tls/1.0.0")), "offers sm4, our charter says aes"),
    "unknown": (line("/tls/1.0.0/noise"), "speaks another security protocol, our charter says aes"),
    "none": (NA, "speaks another security protocol, our charter says aes"),
    "no text": (line(b"\xff\xfe"), "speaks another security protocol, our charter says aes"),
    "silence": (b"", "speaks another security protocol, our charter says aes"),
}


@pytest.mark.parametrize("form", LISTS)
def test_the_dialler_names_what_the_other_end_offers_instead(form: str) -> None:
    async def run() -> None:
        end = End(1)
        answer, reason = LISTS[form]
        failure, written = await dial(end, [GREETING, NA, answer])
        reason += ": is it under another charter?"
        assert str(failure) == f"{End(2).id} {reason}"
        assert end.refused == [(str(End(2).id), reason)]
        assert written == GREETING + AES + LS

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    "answers",
    [
        [GREETING, SM4],  # as if that had been proposed
        [GREETING, NA, SM4],  # listed, and chosen at once
        [GREETING, NA, LS],
        [GREETING, NA, SM4 + SM4 + b"\x00\x60" + bytes(96)],  # and a handshake begun
        [GREETING, NA, AES],  # now it is spoken after all: too late
    ],
)
@trio_test
async def test_no_answer_makes_the_dialler_begin_under_another_suite(answers: list[bytes]) -> None:
    failure, written = await dial(End(1), answers)
    assert isinstance(failure, HandshakeFailure)
    assert written in (GREETING + AES, GREETING + AES + LS)  # not one byte of a handshake


@pytest.mark.parametrize("listening", ["sm4", "gm"])
@trio_test
async def test_no_byte_of_a_handshake_is_sent_to_a_member_under_another_suite(listening: str) -> None:
    try:
        suite(listening)
    except Exception as error:  # noqa: BLE001 - says what is missing
        pytest.skip(str(error))
    one, other = End(1), End(2, name=listening)
    left, right = trio.testing.memory_stream_pair()
    dialling, answering = Overheard(left, True), Overheard(right, False)
    results = await choose(one, other, (dialling, answering))
    assert [type(result) for result in results] == [HandshakeFailure, HandshakeFailure]
    assert one.refused[0][1].startswith(f"offers {listening}, our charter says aes")
    assert f"this peer speaks /p2pfl/noise-{listening}/1.0.0" in other.refused[0][1]
    assert dialling.written == GREETING + AES + LS
    assert answering.written == GREETING + NA + line(PROTOCOLS[listening].encode() + b"\n")
