"""The messages peers exchange, and their bytes.

A frame is `length of the header (2 bytes, big endian) | header | payload | SHA-256 of the payload`; payload and hash
are there when the header announces a payload. The header is a msgpack array of at most `MAX_HEADER_BYTES`: version,
kind, charter hash, round, and what the kind adds. Everything is checked before anything is allocated. The channel
below authenticates the bytes; the hash proves that what the receiver assembled is what the sender meant.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar

import msgpack

from p2pfl.core.errors import Malformed, TooLarge
from p2pfl.core.ids import Round

VERSION = 1
MAX_HEADER_BYTES = 200
CHARTER_HASH_BYTES = 32
DIGEST_BYTES = 32
LENGTH_BYTES = 2
MAX_ROUND = 2**48
MAX_PAYLOAD_BYTES = 2**36
"""64 GiB: only so that arithmetic stays bounded; the charter's model size is the real limit."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on a control lane: under which charter we are here."""

    kind: ClassVar[int] = 0
    charter: bytes
    round: Round


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
    """

    kind: ClassVar[int] = 2
    charter: bytes
    round: Round
    length: int
    spread: float
    complete: bool


@dataclass(frozen=True, slots=True)
class Bye:
    """The sender takes part in no round after this one; all its updates up to it are sent."""

    kind: ClassVar[int] = 3
    charter: bytes
    round: Round


Message = Hello | Ping | Update | Bye


def payload_length(message: Message) -> int:
    """Return the bytes of payload that follow the header of `message`."""
    return message.length if isinstance(message, Update) else 0


def digest(payload: bytes | bytearray | memoryview) -> bytes:
    """Return the trailer of a frame with this payload."""
    return hashlib.sha256(payload).digest()


def encode_header(message: Message) -> bytes:
    """Return the frame of `message` up to its payload."""
    fields: list[object] = [VERSION, message.kind, message.charter, message.round]
    if isinstance(message, Update):
        fields += [message.length, message.spread, message.complete]
    header: bytes = msgpack.packb(fields)
    return len(header).to_bytes(LENGTH_BYTES, "big") + header


def header_length(prefix: bytes | bytearray | memoryview) -> int:
    """Return how many bytes of header follow these first `LENGTH_BYTES` of a frame.

    Raises:
        Malformed: none.
        TooLarge: more than `MAX_HEADER_BYTES`.
    """
    length = int.from_bytes(prefix, "big")
    if length == 0:
        raise Malformed("a frame without a header")
    if length > MAX_HEADER_BYTES:
        raise TooLarge(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return length


def decode_header(header: bytes | bytearray | memoryview) -> Message:
    """Decode the header of a frame; a message has one header, other encodings of the same values are refused.

    Raises:
        Malformed: the bytes are not a header of this version of the protocol.
    """
    try:
        fields = msgpack.unpackb(header, use_list=True, max_array_len=8, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise Malformed("a header that is not msgpack") from error
    if not isinstance(fields, list) or len(fields) < 4:
        raise Malformed("a header that is not a list of fields")
    if fields[0] != VERSION or isinstance(fields[0], bool):
        raise Malformed(f"wire version {ascii(fields[0])[:20]}; this peer speaks {VERSION}")
    message = _message(fields[1], _charter(fields[2]), Round(_integer("round", fields[3], MAX_ROUND)), fields[4:])
    # Python takes True and 1.0 for 1, and msgpack writes a number in several lengths.
    if encode_header(message)[LENGTH_BYTES:] != header:
        raise Malformed("a header in another encoding than this version's")
    return message


def _message(kind: object, charter: bytes, round: Round, rest: list[object]) -> Message:
    match kind, rest:
        case Hello.kind, []:
            return Hello(charter, round)
        case Ping.kind, []:
            return Ping(charter, round)
        case Bye.kind, []:
            return Bye(charter, round)
        case Update.kind, [length, spread, bool(complete)]:
            length = _integer("length", length, MAX_PAYLOAD_BYTES)
            return Update(charter, round, length, _finite("spread", spread), complete)
    raise Malformed(f"a message of unknown kind {ascii(kind)[:20]} with {len(rest)} further fields")


def _charter(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != CHARTER_HASH_BYTES:
        raise Malformed("a message without a charter hash")
    return value


def _integer(name: str, value: object, maximum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise Malformed(f"a {name} that is not a number from 0 to {maximum}")
    return value


def _finite(name: str, value: object) -> float:
    if not isinstance(value, float) or not math.isfinite(value) or value < 0:
        raise Malformed(f"a {name} that is not a finite number of at least 0")
    return value
