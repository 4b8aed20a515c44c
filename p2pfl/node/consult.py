"""What members' doctors ask each other: who is there, what time it is, how fast the path is, and can you reach me.

    /p2pfl/doctor/1.0.0 over the authenticated channel; a talk of at most MOST_QUESTIONS, each answered at once
    a frame: length (2 bytes, big endian) | msgpack array [version, kind, ...]; a `Load` is followed by its bytes

Whoever runs answers roster members only, and tells them nothing of its data or its training. A member dials back to
that member's addresses in the charter and to no others. Who asks more than its allowance waits.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar, Literal

import msgpack
import trio

from p2pfl.core.errors import Malformed, P2pflError, RemoteError, StreamReset, TooLarge, TransportError
from p2pfl.core.ids import PeerId, Seconds
from p2pfl.core.wire import CHARTER_HASH_BYTES, MAX_ADDRESS_BYTES, MAX_ADDRESSES, MAX_VERSION, Versions
from p2pfl.node.budget import Allowance
from p2pfl.node.transport import Talk

PROTOCOL = "/p2pfl/doctor/1.0.0"
VERSION = 1
RELEASE = metadata.version("p2pfl-mesh")
LENGTH_BYTES = 2
MOST_QUESTION, MOST_ANSWER = 64, 8192
"""Bytes of a frame; an answer's holds `MAX_ADDRESSES` addresses with a reason each."""
MOST_QUESTIONS = 16
"""In a talk; `consult` asks nine."""
MOST_LOAD = 4 << 20
"""Bytes of one load; at 100 Mbit/s a third of a second, at which TCP has found its speed. A guess."""
FIRST_LOAD, SHORT = 256 * 1024, 0.5
"""The load that is tried first, and how many seconds it may take if the large one is to follow; guesses."""
PIECE_BYTES = 64 * 1024
TALK_SECONDS = 60.0
"""A talk as a whole; a guess: a load of 4 MiB at 1 Mbit/s takes 34 s."""
DIAL_SECONDS = Seconds(5.0)
"""For each address that is dialled back; a guess: several round trips around the world."""
RATE, BURST = 1.0, 400.0
"""Cost that a member may cause in a second, on and on, and at once: a question costs 1, a piece of a load 1, dialling
back 20. So four runs of the doctor at once, and one each two minutes; guesses."""
DIAL_COST = 20.0
LONGEST_TEXT = 200
ROUND_TRIPS = 5
"""Of which the fastest counts: other load only ever adds. A guess."""


@dataclass(frozen=True)
class About:
    """Asks who is there, under what, and what time it is."""

    kind: ClassVar[int] = 0


@dataclass(frozen=True)
class Load:
    """Brings so many bytes, to be told when they are there; none, to time the question itself."""

    kind: ClassVar[int] = 1
    size: int


@dataclass(frozen=True)
class DialBack:
    """Asks whether the asking member's addresses in the charter lead to it."""

    kind: ClassVar[int] = 2


Question = About | Load | DialBack


@dataclass(frozen=True)
class Facts:
    """What a member says of itself.

    Attributes:
        release: its version of p2pfl.
        wire: the versions of its messages; see `p2pfl.core.wire`.
        clock: seconds since 1970.
        charter: the hash of its charter, 32 bytes.
        serves: whether a peer answers, or a doctor that waits.
    """

    release: str
    wire: Versions
    clock: float
    charter: bytes
    serves: Literal["peer", "doctor"]


@dataclass(frozen=True)
class Reached:
    """Whether an address led to whom it should; `reason` says why not, and is empty where it did."""

    address: str
    reason: str = ""


@dataclass(frozen=True)
class Consultation:
    """What asking one member gave.

    Attributes:
        facts: what it says of itself.
        ahead: by how many seconds its clock is ahead of ours.
        within: how far from the truth that may be, in seconds: half the round trip of the question.
        round_trip: seconds.
        bytes_per_second: from here to there, over one connection.
        dialled_back: whether it reaches us, for each of our addresses in the charter.
    """

    facts: Facts
    ahead: float
    within: float
    round_trip: float
    bytes_per_second: float
    dialled_back: tuple[Reached, ...]


class Desk:
    """Answers what other members' doctors ask.

    Args:
        facts: of this member, as they are now.
        addresses: of each member, by the charter.
        dial: tries whether an address leads to a member; see `p2pfl.node.libp2p.host.Libp2pTransport.probe`.
    """

    def __init__(
        self,
        facts: Callable[[], Facts],
        addresses: Mapping[PeerId, Sequence[str]],
        dial: Callable[[PeerId, str, Seconds], Awaitable[None]],
    ) -> None:
        self._facts = facts
        self._addresses = addresses
        self._dial = dial
        self._allowances: dict[PeerId, Allowance] = {}
        self.consulted: set[PeerId] = set()

    async def hold(self, talk: Talk) -> None:
        """Answer one member's questions until it ends the talk; a `TalkHandler`.

        Raises:
            RemoteError: it asked something else.
            TransportError: the talk broke.
        """
        if talk.peer not in self._addresses:
            return
        allowance = self._allowances.setdefault(talk.peer, Allowance(RATE, BURST))
        with trio.move_on_after(TALK_SECONDS):
            for _ in range(MOST_QUESTIONS):
                frame = await _read_frame(talk, MOST_QUESTION)
                if frame is None:
                    # It has heard all it wanted: from here on nobody needs to wait for it.
                    self.consulted.add(talk.peer)
                    break
                await allowance.spend(1.0)
                await talk.write(_framed(await self._answer(talk, decode_question(frame, talk.peer), allowance)))

    async def _answer(self, talk: Talk, question: Question, allowance: Allowance) -> bytes:
        match question:
            case About():
                return encode_facts(self._facts())
            case Load(size):
                await _take(talk, size, allowance)
                return _packed(Load.kind, size)
            case DialBack():
                await allowance.spend(DIAL_COST)
                tried = [
                    await reach(self._dial, talk.peer, address)
                    for address in self._addresses[talk.peer][:MAX_ADDRESSES]
                ]
                return encode_reached(tried)


async def reach(dial: Callable[[PeerId, str, Seconds], Awaitable[None]], peer: PeerId, address: str) -> Reached:
    """Try one address of a member."""
    try:
        await dial(peer, address, DIAL_SECONDS)
    except RemoteError as error:
        return Reached(address, error.reason)
    except P2pflError as error:
        return Reached(address, str(error))
    return Reached(address)


async def consult(talk: Talk, now: Callable[[], float]) -> Consultation:
    """Ask a member everything.

    Args:
        talk: with it, just begun.
        now: this machine's clock, seconds since 1970.

    Raises:
        RemoteError: it answered something else.
        TransportError: it did not answer, or not in `TALK_SECONDS`.
    """
    try:
        with trio.fail_after(TALK_SECONDS):
            return await _consult(talk, now)
    except trio.TooSlowError as error:
        raise TransportError(f"did not answer all questions in {TALK_SECONDS:.3g} s") from error


async def _consult(talk: Talk, now: Callable[[], float]) -> Consultation:
    # Opening a stream takes a round trip of its own: what is timed comes after.
    trips = [await _load(talk, 0) for _ in range(ROUND_TRIPS)]
    asked = now()
    started = trio.current_time()
    await talk.write(_framed(_packed(About.kind)))
    facts = decode_facts(await _answered(talk), talk.peer)
    trip = trio.current_time() - started
    ahead = facts.clock - (asked + trip / 2)
    await talk.write(_framed(_packed(DialBack.kind)))
    dialled_back = decode_reached(await _answered(talk), talk.peer)
    size, seconds = FIRST_LOAD, await _load(talk, FIRST_LOAD)
    if seconds < SHORT:
        size, seconds = MOST_LOAD, await _load(talk, MOST_LOAD)
    await talk.close()
    fastest = min(trips)
    # The answer's way back carries no load.
    return Consultation(facts, ahead, trip / 2, fastest, size / max(seconds - fastest / 2, 1e-6), dialled_back)


async def _load(talk: Talk, size: int) -> float:
    started = trio.current_time()
    await talk.write(_framed(_packed(Load.kind, size)))
    piece = memoryview(bytes(min(size, PIECE_BYTES)))
    for start in range(0, size, PIECE_BYTES):
        await talk.write(piece[: size - start])
    frame = await _answered(talk)
    if _fields(frame, talk.peer)[1:] != [Load.kind, size]:
        raise Malformed("answered another question than was asked", talk.peer)
    return trio.current_time() - started


# Frames


def decode_question(frame: bytes, peer: PeerId) -> Question:
    """Read a question.

    Raises:
        Malformed: it is none.
        TooLarge: a load over `MOST_LOAD`.
    """
    match _fields(frame, peer)[1:]:
        case [About.kind]:
            return About()
        case [Load.kind, int(size)] if size >= 0 and not isinstance(size, bool):
            if size > MOST_LOAD:
                raise TooLarge(f"announced a load of {size} bytes; {MOST_LOAD} are the most", peer)
            return Load(size)
        case [DialBack.kind]:
            return DialBack()
    raise Malformed("asked what is no question of this version", peer)


def encode_facts(facts: Facts) -> bytes:
    """Return the answer to `About`."""
    return _packed(
        About.kind, facts.release, facts.wire.lowest, facts.wire.highest, facts.clock, facts.charter, facts.serves
    )


def decode_facts(frame: bytes, peer: PeerId) -> Facts:
    """Read the answer to `About`.

    Raises:
        Malformed: it is none.
    """
    match _fields(frame, peer)[1:]:
        case [
            About.kind,
            str(release),
            int(lowest),
            int(highest),
            float(clock),
            bytes(charter),
            ("peer" | "doctor") as serves,
        ] if (
            0 < len(release) <= LONGEST_TEXT
            and release.isprintable()
            and 0 <= lowest <= highest <= MAX_VERSION
            and 0 <= clock < 2**40  # neither of these for what is no number
            and len(charter) == CHARTER_HASH_BYTES
        ):
            return Facts(release, Versions(lowest, highest), clock, charter, serves)
    raise Malformed("said of itself what cannot be", peer)


def encode_reached(tried: Sequence[Reached]) -> bytes:
    """Return the answer to `DialBack`."""
    return _packed(DialBack.kind, [[each.address, _line(each.reason)] for each in tried[:MAX_ADDRESSES]])


def _line(text: str) -> str:
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text[:LONGEST_TEXT])


def decode_reached(frame: bytes, peer: PeerId) -> tuple[Reached, ...]:
    """Read the answer to `DialBack`.

    Raises:
        Malformed: it is none.
    """
    match _fields(frame, peer)[1:]:
        case [DialBack.kind, list(tried)] if len(tried) <= MAX_ADDRESSES and all(map(_is_reached, tried)):
            return tuple(Reached(address, reason) for address, reason in tried)
    raise Malformed("answered another question than was asked", peer)


def _is_reached(value: object) -> bool:
    match value:
        case [str(address), str(reason)]:
            fits = len(address) <= MAX_ADDRESS_BYTES and len(reason) <= LONGEST_TEXT
            return fits and address.isprintable() and reason.isprintable()
    return False


def _fields(frame: bytes, peer: PeerId) -> list[object]:
    try:
        fields = msgpack.unpackb(frame, use_list=True, max_ext_len=0)
    except Exception as error:  # whatever the library raises
        raise Malformed("sent a frame that is no msgpack", peer) from error
    if not isinstance(fields, list) or not fields or fields[0] != VERSION:
        raise Malformed(f"sent a frame of another version than {VERSION}", peer)
    return fields


def _packed(kind: int, *fields: object) -> bytes:
    packed: bytes = msgpack.packb([VERSION, kind, *fields])
    return packed


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


async def _read_frame(talk: Talk, most: int) -> bytes | None:
    prefix = bytearray(LENGTH_BYTES)
    if not await talk.read_into(memoryview(prefix)):
        return None
    size = int.from_bytes(prefix, "big")
    if not 0 < size <= most:
        raise TooLarge(f"announced a frame of {size} bytes; {most} are the most", talk.peer)
    body = bytearray(size)
    if not await talk.read_into(memoryview(body)):
        raise StreamReset(f"{talk.peer}: the talk ended in the middle of a frame")
    return bytes(body)


async def _answered(talk: Talk) -> bytes:
    frame = await _read_frame(talk, MOST_ANSWER)
    if frame is None:
        raise StreamReset(f"{talk.peer}: ended the talk without an answer")
    return frame


async def _take(talk: Talk, size: int, allowance: Allowance) -> None:
    scratch = memoryview(bytearray(min(size, PIECE_BYTES)))
    while size:
        piece = min(size, PIECE_BYTES)
        if not await talk.read_into(scratch[:piece]):
            raise StreamReset(f"{talk.peer}: the talk ended in the middle of a load")
        await allowance.spend(1.0)
        size -= piece
