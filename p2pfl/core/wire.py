"""The messages peers exchange, and their bytes.

A frame is `length of the header (2 bytes, big endian) | header | payload | BLAKE3 of the payload`; payload and hash
are there when the header announces a payload. The header is a msgpack array: version, kind, charter hash, round, and
what the kind adds; of at most `MAX_HEADER_BYTES` if a payload follows, else of `MAX_MESSAGE_BYTES`. Everything is
checked before anything is allocated. The channel below authenticates the bytes; the hash proves that what the
receiver assembled is what the sender meant.

Peers of several versions run beside each other: a `Hello`, whose bytes are the same in all versions, says which its
sender speaks, and what follows on a link is of the highest that both do. Whoever adds a version keeps the one before.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import msgpack
from blake3 import blake3

from p2pfl.core.errors import Malformed, TooLarge, WrongVersion
from p2pfl.core.ids import Round
from p2pfl.core.ledger import SESSION_BYTES
from p2pfl.core.statements import (
    KINDS,
    MAX_ATTEMPTS,
    MAX_GROUP,
    MAX_ROUND,
    Statement,
    decode_statement,
    fixed_bytes,
    integer,
    place,
)

VERSION = 4
MAX_VERSION = 2**16 - 1
MAX_HEADER_BYTES = 200
MAX_MESSAGE_BYTES = 40 * 1024
"""The proof of a released average in a group of 64 members under `gm`, whose signatures are 128 bytes, is 34 kB."""
MAX_STATEMENTS = 3 * MAX_GROUP
CHARTER_HASH_BYTES = 32
LENGTH_BYTES = 2
DIGEST_BYTES = 32
MAX_ADDRESSES, MAX_ADDRESS_BYTES = 8, 300
"""Of a member: several networks, each by a name of at most 253 letters."""
MAX_SEQUENCE = 2**48
MAX_PEER_ID_BYTES = 64
SIGNATURE_BYTES = 64
MAX_WEIGHT = 2**16
"""Of a whole member; `WEIGHT_ONE` of p2pfl.crypto.ring."""
MAX_PAYLOAD_BYTES = 2**36
"""64 GiB: only so that arithmetic stays bounded; the charter's model size is the real limit."""


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions of this protocol that a peer speaks: all from `lowest` to `highest`."""

    lowest: int
    highest: int

    def __contains__(self, version: object) -> bool:
        return isinstance(version, int) and self.lowest <= version <= self.highest

    def __str__(self) -> str:
        """Write them for people: 4, or 4 to 6."""
        return f"{self.lowest}" if self.lowest == self.highest else f"{self.lowest} to {self.highest}"

    def common(self, other: "Versions") -> int:
        """Return the highest version of `other` that is among these, too.

        Raises:
            WrongVersion: there is none.
        """
        highest = min(self.highest, other.highest)
        if highest < max(self.lowest, other.lowest):
            older = "it" if other.highest < self.lowest else "this peer"
            raise WrongVersion(f"speaks wire version {other}, this peer {self}: {older} needs a newer p2pfl")
        return highest


SPOKEN = Versions(VERSION, VERSION)


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on a control lane: under which charter we are here, and in which versions we speak.

    Its header begins with the lowest of them, and has one further field if there are more: the highest.
    """

    kind: ClassVar[int] = 0
    charter: bytes
    round: Round
    versions: Versions = SPOKEN


@dataclass(frozen=True, slots=True)
class Ping:
    """Still here, in this round."""

    kind: ClassVar[int] = 1
    charter: bytes
    round: Round


@dataclass(frozen=True, slots=True)
class Update:
    """A peer's vector of one round; the payload is `length` bytes of little-endian float32.

    Attributes:
        spread: while settling, the largest squared distance between two neighbors' vectors that the sender knows of
            (see `p2pfl.gossip.settle`); 0 in training rounds.
        complete: while settling, whether that covers every link the sender could have heard of.
        weight: the sender's, in units of 1 / MAX_WEIGHT.
    """

    kind: ClassVar[int] = 2
    charter: bytes
    round: Round
    length: int
    spread: float
    complete: bool
    weight: int = MAX_WEIGHT


@dataclass(frozen=True, slots=True)
class Bye:
    """The sender takes part in no round after this one; all its updates up to it are sent.

    In groups a round after training stands here only if the sender holds an average that was released after training.
    """

    kind: ClassVar[int] = 3
    charter: bytes
    round: Round


@dataclass(frozen=True, slots=True)
class Told:
    """A signed statement, of the sender or passed on."""

    kind: ClassVar[int] = 4
    charter: bytes
    round: Round
    statement: Statement


@dataclass(frozen=True, slots=True)
class Have:
    """What the sender holds of a round's statements; the receiver answers with what is missing.

    Attributes:
        attempt: the sender's.
        session: that it takes part in or watches; 32 zeros for none.
        held: for each kind of statement, in the order of their numbers, whose it holds: bit i for the i-th member of
            the round's group, or of chunk i for results.
    """

    kind: ClassVar[int] = 5
    charter: bytes
    round: Round
    attempt: int
    session: bytes
    held: tuple[int, ...]


class Part(IntEnum):
    """What a chunk is, or all of them together."""

    UPLOAD = 0
    RESULT = 1
    AVERAGE = 2


@dataclass(frozen=True, slots=True)
class Want:
    """Send me this chunk; for `AVERAGE`, the latest released average with its proof, whatever round it is of.

    `round` is the session's; for `AVERAGE` the lowest round whose average is of use.
    """

    kind: ClassVar[int] = 6
    charter: bytes
    round: Round
    session: bytes
    part: Part
    chunk: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a session's vector, or its result; the payload is `length` bytes, see `p2pfl.gossip.chunks`."""

    kind: ClassVar[int] = 7
    charter: bytes
    round: Round
    session: bytes
    part: Part
    chunk: int
    length: int


@dataclass(frozen=True, slots=True)
class Proof:
    """Why an average was released: an enrolment, the votes for its survivors, every chunk's result.

    It goes before the average where that was asked for, and before a goodbye of who took over the last one.
    """

    kind: ClassVar[int] = 8
    charter: bytes
    round: Round
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a member can be reached, of the sender or passed on; `round` says nothing.

    Attributes:
        member: its peer id.
        sequence: of two records the one with the higher number counts.
        addresses: multiaddresses.
        signature: the member's (see `p2pfl.node.discovery`), 64 bytes.
    """

    kind: ClassVar[int] = 9
    charter: bytes
    round: Round
    member: str
    sequence: int
    addresses: tuple[str, ...]
    signature: bytes


Message = Hello | Ping | Update | Bye | Told | Have | Want | Chunk | Proof | Whereabouts


def payload_length(message: Message) -> int:
    """Return the bytes of payload that follow the header of `message`."""
    return message.length if isinstance(message, Update | Chunk) else 0


def digest(payload: bytes | bytearray | memoryview) -> bytes:
    """Return the trailer of a frame with this payload: BLAKE3, five times as fast as SHA-256 on what a chunk has."""
    return blake3(payload).digest()


def encode_header(message: Message, version: int = VERSION) -> bytes:
    """Return the frame of `message` up to its payload, in a version that its receiver speaks."""
    if isinstance(message, Hello):
        version = message.versions.lowest
    header: bytes = msgpack.packb([version, message.kind, message.charter, message.round, *_fields(message)])
    return len(header).to_bytes(LENGTH_BYTES, "big") + header


def _fields(message: Message) -> list[object]:
    match message:
        case Hello() if message.versions.highest != message.versions.lowest:
            return [message.versions.highest]
        case Update():
            return [message.length, message.spread, message.complete, message.weight]
        case Told():
            return _packed(message.statement)
        case Have():
            return [message.attempt, message.session, message.held]
        case Want():
            return [message.session, int(message.part), message.chunk]
        case Chunk():
            return [message.session, int(message.part), message.chunk, message.length]
        case Proof():
            return [[_packed(statement) for statement in message.statements]]
        case Whereabouts():
            return [message.member, message.sequence, message.addresses, message.signature]
    return []


def _packed(statement: Statement) -> list[object]:
    return [statement.signer, statement.body, statement.signature]


def header_length(prefix: bytes | bytearray | memoryview, most: int = MAX_MESSAGE_BYTES) -> int:
    """Return how many bytes of header follow these first `LENGTH_BYTES` of a frame.

    Args:
        prefix: these bytes.
        most: bytes that a header may have here: `MAX_HEADER_BYTES` where only those with a payload come.

    Raises:
        Malformed: none.
        TooLarge: more than that.
    """
    length = int.from_bytes(prefix, "big")
    if length == 0:
        raise Malformed("a frame without a header")
    if length > most:
        raise TooLarge(f"a header of {length} bytes; at most {most} are allowed")
    return length


def decode_header(header: bytes | bytearray | memoryview, versions: Versions = SPOKEN) -> Message:
    """Decode the header of a frame; a message has one header, other encodings of the same values are refused.

    Args:
        header: without its length.
        versions: that this peer speaks. A `Hello` is read whatever its sender speaks.

    Raises:
        Malformed: the bytes are not a header of these versions of the protocol.
    """
    try:
        fields = msgpack.unpackb(header, use_list=True, max_array_len=MAX_STATEMENTS, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise Malformed("a header that is not msgpack") from error
    if not isinstance(fields, list) or len(fields) < 4:
        raise Malformed("a header that is not a list of fields")
    version, kind = fields[:2]
    is_hello = kind == Hello.kind
    if version not in (Versions(0, MAX_VERSION) if is_hello else versions) or isinstance(version, bool):
        raise Malformed(f"wire version {ascii(version)[:20]}; this peer speaks {versions}")
    charter, round = _charter(fields[2]), Round(integer("round", fields[3], MAX_ROUND))
    rest = fields[4:]
    message = Hello(charter, round, _versions(version, rest)) if is_hello else _message(kind, charter, round, rest)
    # Python takes True and 1.0 for 1, and msgpack writes a number in several lengths.
    if encode_header(message, version)[LENGTH_BYTES:] != header:
        raise Malformed("a header in another encoding than this version's")
    if payload_length(message) and len(header) > MAX_HEADER_BYTES:
        raise TooLarge(f"a header of {len(header)} bytes before a payload; at most {MAX_HEADER_BYTES} are allowed")
    return message


def _versions(lowest: int, rest: list[object]) -> Versions:
    """Read which versions the sender of a `Hello` speaks, from its header's first field and those behind the round."""
    match rest:
        case []:
            return Versions(lowest, lowest)
        case [highest]:
            return Versions(lowest, max(lowest, integer("version", highest, MAX_VERSION)))
    raise Malformed(f"a Hello with {len(rest)} further fields")


def _message(kind: object, charter: bytes, round: Round, rest: list[object]) -> Message:
    match kind, rest:
        case Ping.kind, []:
            return Ping(charter, round)
        case Bye.kind, []:
            return Bye(charter, round)
        case Update.kind, [length, spread, bool(complete), weight]:
            length = integer("length", length, MAX_PAYLOAD_BYTES)
            return Update(charter, round, length, _finite("spread", spread), complete, _weight(weight))
        case Told.kind, [signer, body, signature]:
            return Told(charter, round, _statement([signer, body, signature]))
        case Have.kind, [attempt, session, list(held)]:
            masks = tuple(integer("mask", mask, 2**MAX_GROUP - 1) for mask in held)
            if len(masks) != len(KINDS):
                raise Malformed(f"{len(masks)} masks; there are {len(KINDS)} kinds of statements")
            return Have(charter, round, integer("attempt", attempt, MAX_ATTEMPTS - 1), _session(session), masks)
        case Want.kind, [session, part, chunk]:
            return Want(charter, round, _session(session), _part(part), integer("chunk", chunk, MAX_GROUP - 1))
        case Chunk.kind, [session, part, chunk, length]:
            number = integer("chunk", chunk, MAX_GROUP - 1)
            # A message without a payload goes another way.
            length = integer("length", length, MAX_PAYLOAD_BYTES)
            if length == 0:
                raise Malformed("an empty chunk")
            return Chunk(charter, round, _session(session), _part(part), number, length)
        case Proof.kind, [list(statements)]:
            return Proof(charter, round, tuple(map(_statement, statements)))
        case Whereabouts.kind, [member, sequence, list(addresses), signature]:
            number = integer("sequence", sequence, MAX_SEQUENCE)
            signed = fixed_bytes("signature", signature, SIGNATURE_BYTES)
            who = _text("peer id", member, MAX_PEER_ID_BYTES)
            return Whereabouts(charter, round, who, number, _addresses(addresses), signed)
    raise Malformed(f"a message of unknown kind {ascii(kind)[:20]} with {len(rest)} further fields")


def _statement(value: object) -> Statement:
    match value:
        case [signer, bytes(body), bytes(signature)]:
            return decode_statement(place("signer", signer), body, signature)
    raise Malformed("a statement without signer, body and signature")


def _session(value: object) -> bytes:
    return fixed_bytes("session", value, SESSION_BYTES)


def _part(value: object) -> Part:
    return Part(integer("part", value, max(Part)))


def _charter(value: object) -> bytes:
    return fixed_bytes("charter hash", value, CHARTER_HASH_BYTES)


def _addresses(value: list[object]) -> tuple[str, ...]:
    if len(value) > MAX_ADDRESSES:
        raise Malformed(f"{len(value)} addresses; at most {MAX_ADDRESSES} are allowed")
    return tuple(_text("address", address, MAX_ADDRESS_BYTES) for address in value)


def _text(name: str, value: object, most: int) -> str:
    # Only what has one width in every encoding, and may stand in a log.
    if not isinstance(value, str) or not 0 < len(value) <= most or not value.isascii() or not value.isprintable():
        raise Malformed(f"a {name} that is not 1 to {most} printable ASCII characters")
    return value


def _weight(value: object) -> int:
    weight = integer("weight", value, MAX_WEIGHT)
    if weight == 0:
        raise Malformed("an update without any weight")
    return weight


def _finite(name: str, value: object) -> float:
    if not isinstance(value, float) or not math.isfinite(value) or value < 0:
        raise Malformed(f"a {name} that is not a finite number of at least 0")
    return value
