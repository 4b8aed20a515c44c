"""What members sign in a round: short statements that anyone may pass on, since the signature proves who made them.

A statement's body is a msgpack array with one encoding; the signature covers the charter's hash and these very bytes,
never a second encoding of their values. Members are named by their place in the roster.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

import msgpack

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import Malformed, TooLarge
from p2pfl.core.ids import Round
from p2pfl.core.ledger import SESSION_BYTES

DOMAIN = "p2pfl/statement/1"
MAX_MEMBERS = 1024
"""The largest roster; places in it are below."""
MAX_GROUP = 64
"""The largest group: the list of its members' digests stays far below a message's bound."""
MAX_ATTEMPTS = 3
MAX_BODY_BYTES = 20 * 1024
"""A deal among 64 members has 17 kB."""
MAX_KEYS_BYTES = 256
MAX_SEALED_BYTES = 256
MAX_PRODUCTS_BYTES = 80
"""Of one chunk: `PRODUCT_BYTES` of p2pfl.crypto.products. Of 64 chunks there are 5.5 kB."""
MAX_SIGNATURE_BYTES = 256
DIGEST_BYTES = 32
MAX_ROUND = 2**48
MAX_SECONDS = 10.0**7


@dataclass(frozen=True, slots=True)
class Advert:
    """I take part in this round.

    Attributes:
        attempt: 0, or more after an attempt to enroll that did not get everybody's word.
        seconds: until the signer expects to have trained.
        keys: under masks, the signer's public keys of this attempt and what it commits to; see `gossip.secure_sum`.
        base: where changes may be averaged, the digest (`p2pfl.gossip.chunks.digest`) of the base that the signer
            would average the change from; else empty.
    """

    kind: ClassVar[int] = 1
    round: Round
    attempt: int
    seconds: float
    keys: bytes = b""
    base: bytes = b""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Let these members begin a session.

    Attributes:
        members: their places, ascending.
        adverts: SHA-256 of each one's signed advert, in the same order.
        base: the base that all these adverts name: the changes from it are averaged; empty if they name several, or
            none: whole models are. No member begins a session whose enrolment says otherwise than its adverts.
    """

    kind: ClassVar[int] = 2
    round: Round
    attempt: int
    members: tuple[int, ...]
    adverts: tuple[bytes, ...]
    base: bytes = b""


@dataclass(frozen=True, slots=True)
class Ready:
    """I begin this session; once all members have said so, I upload.

    Attributes:
        deals: SHA-256 over all members' deals, in their order, so that all have the same; zeros without masks.
    """

    kind: ClassVar[int] = 3
    round: Round
    session: bytes
    deals: bytes = bytes(32)


@dataclass(frozen=True, slots=True)
class Roots:
    """What I uploaded: the commitment to the chunk for each member, in their order (`p2pfl.gossip.chunks.digest`)."""

    kind: ClassVar[int] = 4
    round: Round
    session: bytes
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """I hold my chunk of these uploaders, and no further one will count."""

    kind: ClassVar[int] = 5
    round: Round
    session: bytes
    uploaders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Let these be in the sum.

    Attributes:
        live: whose acknowledgements say so.
        survivors: who is in the sum.
    """

    kind: ClassVar[int] = 6
    round: Round
    session: bytes
    live: tuple[int, ...]
    survivors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Vote:
    """These and no others are in the sum. Enough votes are a certificate."""

    kind: ClassVar[int] = 7
    round: Round
    session: bytes
    survivors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """The sum of one chunk over the certificate's survivors, or in the clear its average, has this digest."""

    kind: ClassVar[int] = 8
    round: Round
    session: bytes
    chunk: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Deal:
    """Under masks, what lets the others do without me, should I fall silent. All lists are in the members' order.

    Attributes:
        of_seed: a commitment to each member's share of my self mask's seed.
        of_key: a commitment to each member's share of my private mask key.
        pairs: a commitment to my pair key with each; empty for myself.
        sealed: each member's two shares, for its eyes only; empty for myself.
    """

    kind: ClassVar[int] = 9
    round: Round
    session: bytes
    of_seed: tuple[bytes, ...]
    of_key: tuple[bytes, ...]
    pairs: tuple[bytes, ...]
    sealed: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Reveal:
    """Under masks, now that the survivors are certified: what takes my masks off their sum.

    Attributes:
        seed: of my self mask; empty if I am not in the sum.
        pairs: my pair keys with those who are not, in the members' order; none if I am not.
    """

    kind: ClassVar[int] = 10
    round: Round
    session: bytes
    seed: bytes
    pairs: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """Under masks: my shares for members that are silent.

    Attributes:
        owners: whose secrets, ascending: the seed's share of a survivor, the mask key's of one that is not.
        shares: in the same order.
    """

    kind: ClassVar[int] = 11
    round: Round
    session: bytes
    owners: tuple[int, ...]
    shares: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Challenge:
    """Under masks: I hold a signed result of every chunk; now random words may be drawn to check them with.

    Attributes:
        digests: of the results, in the chunks' order.
        nonce: what nobody could foresee when it signed one.
        by_deputy: bit i if what I hold of chunk i is signed by its deputy.
    """

    kind: ClassVar[int] = 12
    round: Round
    session: bytes
    digests: tuple[bytes, ...]
    nonce: bytes
    by_deputy: int


@dataclass(frozen=True, slots=True)
class Products:
    """The inner products of what I uploaded, less my masks, for each chunk in order; see `p2pfl.crypto.products`.

    Attributes:
        products: mine; empty where a chunk is not checked, or not in time.
        witnessed: those of whoever signed the chunk's result, where I hold its upload as the other of the two that can
            sign; empty elsewhere.
    """

    kind: ClassVar[int] = 13
    round: Round
    session: bytes
    products: tuple[bytes, ...]
    witnessed: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SecondChallenge(Challenge):
    """The same for results that replace refuted ones."""

    kind: ClassVar[int] = 14


@dataclass(frozen=True, slots=True)
class SecondProducts(Products):
    """The same for results that replace refuted ones."""

    kind: ClassVar[int] = 15


Content = (
    Advert
    | Enrolment
    | Ready
    | Roots
    | Acknowledged
    | Proposal
    | Vote
    | Result
    | Deal
    | Reveal
    | Returned
    | Challenge
    | Products
)
KINDS: tuple[type[Content], ...] = (
    *(Advert, Enrolment, Ready, Roots, Acknowledged, Proposal, Vote, Result),
    *(Deal, Reveal, Returned),
    *(Challenge, Products, SecondChallenge, SecondProducts),
)
_KINDS: dict[int, type[Content]] = {kind.kind: kind for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Statement:
    """A signed statement.

    Attributes:
        signer: place in the roster.
        body: the signed bytes, but for domain and charter.
        content: what the body says.
    """

    signer: int
    body: bytes
    signature: bytes
    content: Content

    def digest(self) -> bytes:
        """Return the SHA-256 over signer and body."""
        return hashlib.sha256(canonical([self.signer, self.body])).digest()


def message_to_sign(charter: bytes, body: bytes) -> bytes:
    """Return what the signature of a body covers, besides the domain `DOMAIN`."""
    return canonical([charter, body])


def encode_body(content: Content) -> bytes:
    """Return the body that says `content`."""
    body: bytes = msgpack.packb([content.kind, *(getattr(content, field.name) for field in fields(content))])
    return body


def decode_statement(signer: int, body: bytes, signature: bytes) -> Statement:
    """Read a statement; the signature is still to be checked.

    Raises:
        Malformed: the body is none, or not in its one encoding.
        TooLarge: a part is over its bound.
    """
    if len(body) > MAX_BODY_BYTES or len(signature) > MAX_SIGNATURE_BYTES:
        raise TooLarge(f"a statement of {len(body)} bytes with a signature of {len(signature)}")
    try:
        values = msgpack.unpackb(body, use_list=False, max_array_len=MAX_GROUP, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise Malformed("a statement that is not msgpack") from error
    if not isinstance(values, tuple) or not values or not isinstance(values[0], int) or values[0] not in _KINDS:
        raise Malformed("a statement of unknown kind")
    kind: Any = _KINDS[values[0]]
    names = [field.name for field in fields(kind)]
    if len(values) != 1 + len(names):
        raise Malformed(f"a statement with {len(values) - 1} fields, {kind.__name__} has {len(names)}")
    content: Content = kind(**{name: _CHECKS[name](name, value) for name, value in zip(names, values[1:], strict=True)})
    if encode_body(content) != body:
        raise Malformed("a statement in another encoding than this version's")
    return Statement(place("signer", signer), body, signature, content)


def integer(name: str, value: object, maximum: int) -> int:
    """Return `value` if it is a whole number from 0 to `maximum`.

    Raises:
        Malformed: it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise Malformed(f"a {name} that is not a number from 0 to {maximum}")
    return value


def fixed_bytes(name: str, value: object, length: int) -> bytes:
    """Return `value` if it is so many bytes.

    Raises:
        Malformed: it is something else.
    """
    if not isinstance(value, bytes) or len(value) != length:
        raise Malformed(f"a {name} that is not {length} bytes")
    return value


def place(name: str, value: object) -> int:
    """Return `value` if it can be a place in the roster.

    Raises:
        Malformed: it is something else.
    """
    return integer(name, value, MAX_MEMBERS - 1)


def _places(name: str, value: object) -> tuple[int, ...]:
    places = tuple(place(name, each) for each in _tuple(name, value))
    if any(a >= b for a, b in pairwise(places)):
        raise Malformed(f"{name} that do not ascend")
    return places


def _digests(name: str, value: object) -> tuple[bytes, ...]:
    return tuple(fixed_bytes(name, each, DIGEST_BYTES) for each in _tuple(name, value))


def _short(name: str, value: object, most: int) -> tuple[bytes, ...]:
    return tuple(_bounded(name, each, most) for each in _tuple(name, value))


def _bounded(name: str, value: object, most: int) -> bytes:
    if not isinstance(value, bytes) or len(value) > most:
        raise Malformed(f"{name} that are not at most {most} bytes")
    return value


def _base(name: str, value: object) -> bytes:
    return b"" if value == b"" else fixed_bytes(name, value, DIGEST_BYTES)


def _tuple(name: str, value: object) -> tuple[object, ...]:
    if not isinstance(value, tuple):
        raise Malformed(f"{name} that are not a list")
    return value


def _seconds(name: str, value: object) -> float:
    if not isinstance(value, float) or not math.isfinite(value) or not 0 <= value <= MAX_SECONDS:
        raise Malformed(f"{name} that are not a number from 0 to {MAX_SECONDS:g}")
    return value


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "round": lambda name, value: Round(integer(name, value, MAX_ROUND)),
    "attempt": lambda name, value: integer(name, value, MAX_ATTEMPTS - 1),
    "seconds": _seconds,
    "keys": lambda name, value: _bounded(name, value, MAX_KEYS_BYTES),
    "base": _base,
    "deals": lambda name, value: fixed_bytes(name, value, DIGEST_BYTES),
    "of_seed": _digests,
    "of_key": _digests,
    "pairs": lambda name, value: _short(name, value, DIGEST_BYTES),
    "sealed": lambda name, value: _short(name, value, MAX_SEALED_BYTES),
    "seed": lambda name, value: _bounded(name, value, DIGEST_BYTES),
    "owners": _places,
    "shares": lambda name, value: _short(name, value, MAX_SEALED_BYTES),
    "members": _places,
    "adverts": _digests,
    "session": lambda name, value: fixed_bytes(name, value, SESSION_BYTES),
    "digests": _digests,
    "uploaders": _places,
    "live": _places,
    "survivors": _places,
    "chunk": lambda name, value: integer(name, value, MAX_GROUP - 1),
    "nonce": lambda name, value: fixed_bytes(name, value, DIGEST_BYTES),
    "by_deputy": lambda name, value: integer(name, value, 2**MAX_GROUP - 1),
    "products": lambda name, value: _short(name, value, MAX_PRODUCTS_BYTES),
    "witnessed": lambda name, value: _short(name, value, MAX_PRODUCTS_BYTES),
    "digest": lambda name, value: fixed_bytes(name, value, DIGEST_BYTES),
}
