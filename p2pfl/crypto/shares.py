"""Shamir secret sharing of 32-byte secrets, and commitments that show who lied.

A secret s is the value at 0 of a polynomial of degree threshold - 1 over the field of p = 2^256 + 297, with every
other coefficient uniform; holder i gets its value at i = 1, 2, ... (Shamir, CACM 1979). Any `threshold` of them give s
by Lagrange's formula; fewer say nothing about it.

Interpolation does not notice a corrupt share, it gives another secret. So the dealer publishes a salted hash of each
share, which names a holder that returns another one; and every shared secret is committed to before it is shared (a
private key by its public key, a seed by `commit`), which names a dealer whose shares were wrong from the beginning.

Arithmetic is on Python's integers: their timing depends on their values, which only the peer that computes can watch.
"""

import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import LocalError, Malformed, RemoteError
from p2pfl.core.ids import PeerId
from p2pfl.crypto.suite import Suite

PRIME = 2**256 + 297
"""The smallest prime above 2^256: every 32-byte secret is an element."""
SECRET_BYTES = 32
SALT_BYTES = 32
_VALUE_BYTES = 33
_INDEX_BYTES = 2
SHARE_BYTES = _INDEX_BYTES + _VALUE_BYTES + SALT_BYTES
MAX_HOLDERS = 1024
"""A guess, far above any group: it bounds the work that splitting does."""
_COEFFICIENT_BYTES = 64

Entropy = Callable[[int], bytes]
"""Returns that many uniform bytes, never the same again."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one holder keeps of a secret. Its `repr` shows the index only.

    Attributes:
        index: where the polynomial was evaluated: the holder's place, from 1.
        value: its value there, below PRIME.
        salt: 32 bytes that hide the value in its commitment.
    """

    index: int
    value: int = field(repr=False)
    salt: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """Return index (2 bytes), value (33 bytes), both big endian, and salt."""
        return self.index.to_bytes(_INDEX_BYTES, "big") + self.value.to_bytes(_VALUE_BYTES, "big") + self.salt

    @classmethod
    def from_bytes(cls, data: bytes, sender: PeerId) -> "Share":
        """Read a share as `to_bytes` writes it; `sender` is who to blame.

        Raises:
            Malformed: it is none.
        """
        if len(data) != SHARE_BYTES:
            raise Malformed(f"a share has {SHARE_BYTES} bytes, not {len(data)}", sender)
        index = int.from_bytes(data[:_INDEX_BYTES], "big")
        value = int.from_bytes(data[_INDEX_BYTES:-SALT_BYTES], "big")
        if not 1 <= index <= MAX_HOLDERS or value >= PRIME:
            raise Malformed("a share outside the field", sender)
        return cls(index, value, data[-SALT_BYTES:])


@dataclass(frozen=True, slots=True)
class Dealing:
    """A secret that was split.

    Attributes:
        shares: one for each holder, in order; each goes to its holder only.
        commitments: 32 bytes for each share, in the same order; for everybody.
    """

    shares: tuple[Share, ...] = field(repr=False)
    commitments: tuple[bytes, ...]


def split(suite: Suite, context: bytes, secret: bytes, threshold: int, holders: int, entropy: Entropy) -> Dealing:
    """Split a secret.

    Args:
        suite: the charter's, for its hash.
        context: which secret this is, in which session, whose: no two dealings have the same.
        secret: 32 bytes.
        threshold: how many shares give it back, from 2: with 1, each share is the secret.
        holders: how many shares there are.
        entropy: gives 64 bytes for each coefficient and 32 for each salt.

    Raises:
        LocalError: a number or a length is out of range.
    """
    if len(secret) != SECRET_BYTES:
        raise LocalError(f"a secret to share has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 2 <= threshold <= holders <= MAX_HOLDERS:
        raise LocalError(f"{threshold} of {holders} shares; of at most {MAX_HOLDERS}, 2 or more must be needed")
    # 512 bits modulo a 257-bit prime: within 2^-255 of uniform.
    coefficients = [_integer(entropy, _COEFFICIENT_BYTES) % PRIME for _ in range(threshold - 1)]
    polynomial = [*coefficients, int.from_bytes(secret, "big")]
    shares = tuple(
        Share(index, _evaluate(polynomial, index), _drawn(entropy, SALT_BYTES)) for index in range(1, holders + 1)
    )
    return Dealing(shares, tuple(_commitment(suite, context, share) for share in shares))


def verify_share(
    suite: Suite, context: bytes, share: Share, index: int, commitments: Sequence[bytes], sender: PeerId
) -> None:
    """Check that a share is the one its dealer committed to: when it is dealt, and again when it comes back.

    Args:
        suite: the charter's.
        context: as for `split`.
        share: what came.
        index: the place, from 1, of the holder that it belongs to.
        commitments: what the dealer published, one for each holder.
        sender: whom it came from.

    Raises:
        RemoteError: it is another share; names the sender.
        LocalError: there is no holder with this index.
    """
    if not 1 <= index <= len(commitments):
        raise LocalError(f"holder {index} of {len(commitments)}")
    if share.index != index or not hmac.compare_digest(_commitment(suite, context, share), commitments[index - 1]):
        raise RemoteError("a share that is not the one committed to", sender)


def recover(shares: Sequence[Share], threshold: int, dealer: PeerId) -> bytes:
    """Return the secret that `threshold` or more shares give, which were checked by `verify_share`.

    Shares beyond the threshold must agree with it. The result is still what the dealer made it: compare it with what
    the dealer committed to.

    Args:
        shares: of one dealing, in any order.
        threshold: as for `split`.
        dealer: whom to blame if they lie on no common polynomial, or on one without a secret.

    Raises:
        LocalError: there are too few, or two with the same index.
        RemoteError: the dealer's shares contradict each other.
    """
    if len({share.index for share in shares}) != len(shares):
        raise LocalError("two shares have the same index")
    if threshold < 2 or len(shares) < threshold:
        raise LocalError(f"{len(shares)} shares, and {threshold} are needed")
    points = [(share.index, share.value) for share in shares[:threshold]]
    secret = _interpolate(points, 0)
    if secret >= 1 << 8 * SECRET_BYTES or any(_interpolate(points, s.index) != s.value for s in shares[threshold:]):
        raise RemoteError("dealt shares that contradict each other", dealer)
    return secret.to_bytes(SECRET_BYTES, "big")


def commit(suite: Suite, purpose: str, context: bytes, secret: bytes) -> bytes:
    """Return a commitment to a uniform 32-byte secret, for one purpose, such as `self-mask`: 32 bytes.

    Args:
        suite: the charter's, for its hash.
        purpose: what the secret is for.
        context: of which session, and whose.
        secret: 32 bytes, uniform: a guessable one would not be hidden.
    """
    return suite.hash(canonical(["p2pfl/commitment/1", purpose, context, secret]))


def verify_commitment(
    suite: Suite, purpose: str, context: bytes, secret: bytes, commitment: bytes, committed: PeerId
) -> None:
    """Check that a revealed or recovered secret is the one committed to.

    Raises:
        RemoteError: it is not; names who committed.
    """
    if not hmac.compare_digest(commit(suite, purpose, context, secret), commitment):
        raise RemoteError(f"a {purpose} secret that is not the one committed to", committed)


def verified_shares(
    suite: Suite,
    context: bytes,
    shares: Mapping[PeerId, Share],
    places: Mapping[PeerId, int],
    commitments: Sequence[bytes],
) -> tuple[tuple[Share, ...], tuple[PeerId, ...]]:
    """Sort shares that came back into those that are right, and who sent the others.

    Args:
        suite: the charter's.
        context: as for `split`.
        shares: what each holder returned.
        places: the index of every holder, from 1.
        commitments: what the dealer published.
    """
    good: list[Share] = []
    liars: list[PeerId] = []
    for sender, share in shares.items():
        try:
            verify_share(suite, context, share, places[sender], commitments, sender)
        except RemoteError:
            liars.append(sender)
        else:
            good.append(share)
    return tuple(good), tuple(liars)


def _commitment(suite: Suite, context: bytes, share: Share) -> bytes:
    return suite.hash(canonical(["p2pfl/share/1", context, share.index, share.value, share.salt]))


def _evaluate(polynomial: Sequence[int], at: int) -> int:
    """Return the polynomial's value, highest coefficient first (Horner)."""
    value = 0
    for coefficient in polynomial:
        value = (value * at + coefficient) % PRIME
    return value


def _interpolate(points: Sequence[tuple[int, int]], at: int) -> int:
    """Return the value at `at` of the polynomial of least degree through the points (Lagrange)."""
    total = 0
    for place, value in points:
        above, below = value, 1
        for other, _ in points:
            if other != place:
                above = above * (at - other) % PRIME
                below = below * (place - other) % PRIME
        total += above * pow(below, -1, PRIME)
    return total % PRIME


def _drawn(entropy: Entropy, length: int) -> bytes:
    drawn = entropy(length)
    if len(drawn) != length:
        raise LocalError(f"an entropy source gave {len(drawn)} bytes for {length}")
    return drawn


def _integer(entropy: Entropy, length: int) -> int:
    return int.from_bytes(_drawn(entropy, length), "big")
