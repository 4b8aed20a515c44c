"""Diffie-Hellman keys, and the secrets two peers derive from them for one purpose each.

X25519 (RFC 7748) is here; SM2, for the suite `gm`, is in `p2pfl.crypto.sm2`. A private key is 32 bytes of entropy
that the caller draws; every 32 bytes are one.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import LocalError, Malformed
from p2pfl.core.ids import PeerId

if TYPE_CHECKING:  # suites have an agreement in them
    from p2pfl.crypto.suite import Suite

PRIVATE_BYTES = 32
SESSION_BYTES = 32


class Agreement(Protocol):
    """A Diffie-Hellman group."""

    public_bytes: int
    """Length of an encoded public key."""

    def public_key(self, private: bytes) -> bytes:
        """Return the public key of a 32-byte private key.

        Raises:
            ValueError: the private key has another length.
        """

    def shared_secret(self, private: bytes, public: bytes) -> bytes:
        """Return the 32-byte shared secret of our private and their public key.

        Raises:
            Malformed: `public` is no point of the group, or one of small order.
            ValueError: the private key has another length.
        """


class X25519:
    """X25519 (RFC 7748) as a Diffie-Hellman group.

    Points on the twist and numbers from p on are accepted, as RFC 7748 asks; a secret of zeros, to which every point
    of small order leads, is refused as its section 6.1 allows. OpenSSL checks for it.
    """

    public_bytes = 32

    def public_key(self, private: bytes) -> bytes:
        """Return the public key of a private one; see `Agreement.public_key`."""
        return _x25519_private(private).public_key().public_bytes_raw()

    def shared_secret(self, private: bytes, public: bytes) -> bytes:
        """Return the shared secret; see `Agreement.shared_secret`."""
        ours = _x25519_private(private)
        if len(public) != self.public_bytes:
            raise Malformed(f"an X25519 key of {len(public)} bytes, not {self.public_bytes}")
        try:
            return ours.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise Malformed("an X25519 key of small order") from None


def _x25519_private(private: bytes) -> X25519PrivateKey:
    if len(private) != PRIVATE_BYTES:
        raise ValueError(f"a private key has {PRIVATE_BYTES} bytes, not {len(private)}")
    return X25519PrivateKey.from_private_bytes(private)


@dataclass(frozen=True)
class KeyPair:
    """A key of an agreement. Its `repr` shows the public half only."""

    public: bytes
    private: bytes = field(repr=False)


def key_pair(agreement: Agreement, entropy: bytes) -> KeyPair:
    """Return the key that 32 bytes of entropy make.

    Raises:
        ValueError: the entropy has another length.
    """
    return KeyPair(agreement.public_key(entropy), entropy)


def mask_secret(suite: "Suite", shared: bytes, session: bytes, one: PeerId, other: PeerId) -> bytes:
    """Return the key of the mask between two peers, the same on both sides.

    Args:
        suite: the charter's.
        shared: what `Agreement.shared_secret` gave for their mask keys.
        session: the session's id, 32 bytes, which every key of it depends on.
        one: either peer.
        other: the other.

    Raises:
        LocalError: the session's id has another length.
    """
    return _derived(suite, shared, session, "p2pfl/mask-secret/1", *sorted((one, other)))


def wrap_secret(suite: "Suite", shared: bytes, session: bytes, sender: PeerId, recipient: PeerId) -> bytes:
    """Return the key under which `sender` seals its one message of this session to `recipient`, and no other.

    Args:
        suite: the charter's.
        shared: what `Agreement.shared_secret` gave for their wrap keys.
        session: the session's id, 32 bytes.
        sender: who seals.
        recipient: who opens.

    Raises:
        LocalError: the session's id has another length.
    """
    return _derived(suite, shared, session, "p2pfl/wrap-secret/1", sender, recipient)


def _derived(suite: "Suite", shared: bytes, session: bytes, purpose: str, *peers: PeerId) -> bytes:
    """Return a cipher key by HKDF, with the session as its salt, and purpose, suite and peers as its info.

    The suite's name is there since `sm4` and `gm` have one hash: a shared secret of one is no key of the other.
    """
    if len(session) != SESSION_BYTES:
        raise LocalError(f"a session's id has {SESSION_BYTES} bytes, not {len(session)}")
    info = canonical([purpose, suite.name, *peers])
    return suite.hkdf(shared, salt=session, info=info, length=suite.key_bytes)
