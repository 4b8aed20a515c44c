"""A peer's signing key, its peer id, and signatures that say what they are for.

The key is Ed25519 (RFC 8032), as libp2p uses it; the peer id is the identity multihash of the key's protobuf encoding
(libp2p specs, peer-ids), so a signature is checked against the peer id alone. Every signature covers a domain, so that
none made for one purpose serves another.
"""

import base64

import base58
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pfl.core.canonical import canonical
from p2pfl.core.charter import Charter
from p2pfl.core.errors import BadSignature, InvalidConfig
from p2pfl.core.ids import PeerId

SEED_BYTES = 32
# Multihash "identity" of 36 bytes: protobuf field 1 (key type) = 1 (Ed25519), field 2 (data) = 32 bytes.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_CHARTER_DOMAIN = "p2pfl/charter-signature/1"


class Identity:
    """A private signing key. Its `repr` shows the peer id only."""

    def __init__(self, seed: bytes) -> None:
        """Take the 32-byte Ed25519 seed.

        Raises:
            InvalidConfig: it has another length.
        """
        if len(seed) != SEED_BYTES:
            raise InvalidConfig(f"an identity has {SEED_BYTES} bytes of seed, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @property
    def peer_id(self) -> PeerId:
        """The peer id of this key."""
        public = self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return PeerId(base58.b58encode(_PEER_ID_PREFIX + public).decode())

    def seed(self) -> bytes:
        """Return the secret, for the transport that needs it."""
        return self._key.private_bytes_raw()

    def to_pem(self) -> bytes:
        """Return the key as unencrypted PKCS #8 PEM."""
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @classmethod
    def from_pem(cls, pem: bytes, where: str) -> "Identity":
        """Read a key as `to_pem` writes it; `where` names its file in errors.

        Raises:
            InvalidConfig: it is something else.
        """
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise InvalidConfig(f"{where}: not an unencrypted PEM private key; restore it from your backup") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidConfig(f"{where}: not an Ed25519 key; make one with `p2pfl init`")
        return cls(key.private_bytes_raw())

    def sign(self, domain: str, message: bytes) -> bytes:
        """Return the 64-byte signature of `message` for the purpose `domain`."""
        return self._key.sign(canonical([domain, message]))


def public_key(peer: PeerId) -> Ed25519PublicKey:
    """Return the key inside a peer id.

    Raises:
        InvalidConfig: it is not the peer id of an Ed25519 key.
    """
    try:
        raw = base58.b58decode(peer)
    except ValueError as error:
        raise InvalidConfig(f"{peer[:60]!r} is not a peer id") from error
    # The library forgives space at the end: as another string it would be another peer with the same key.
    if len(raw) != len(_PEER_ID_PREFIX) + 32 or not raw.startswith(_PEER_ID_PREFIX) or peer != peer.strip():
        raise InvalidConfig(f"{peer[:60]!r} is not the peer id of an Ed25519 key")
    return Ed25519PublicKey.from_public_bytes(raw[len(_PEER_ID_PREFIX) :])


def verify_signature(peer: PeerId, domain: str, message: bytes, signature: bytes) -> None:
    """Check that `peer` signed `message` for the purpose `domain`.

    Raises:
        BadSignature: it did not.
        InvalidConfig: `peer` is not a peer id.
    """
    try:
        public_key(peer).verify(signature, canonical([domain, message]))
    except InvalidSignature as error:
        raise BadSignature("a signature that does not verify", peer) from error


def sign_charter(charter: Charter, name: str, identity: Identity) -> Charter:
    """Return the charter with the signature of the member `name` added.

    Raises:
        InvalidConfig: there is no such member, or its peer id belongs to another key.
    """
    member = charter.member(name)
    if member is None:
        raise InvalidConfig(f"{name} is not a member of {charter.name}; run `p2pfl charter join` first")
    if member.peer_id != identity.peer_id:
        raise InvalidConfig(
            f"{name} stands in the charter with peer id {member.peer_id}, but this key is {identity.peer_id}"
        )
    signature = base64.b64encode(identity.sign(_CHARTER_DOMAIN, charter.hash())).decode()
    return charter.model_copy(update={"signatures": {**charter.signatures, name: signature}})


def charter_faults(charter: Charter) -> list[str]:
    """Return what keeps the charter from being in force, one line each, naming the member; empty if nothing does."""
    faults = [] if len(charter.members) > 1 else ["a federation needs at least two members"]
    digest = charter.hash()
    for member in charter.members:
        text = charter.signatures.get(member.name)
        if text is None:
            faults.append(f"{member.name} has not signed")
            continue
        try:
            signature = base64.b64decode(text, validate=True)
            verify_signature(PeerId(member.peer_id), _CHARTER_DOMAIN, digest, signature)
        except (ValueError, BadSignature):  # base64 raises a plain one for what is not ASCII
            faults.append(
                f"{member.name}'s signature is not for this charter: it was changed after signing; sign again"
            )
        except InvalidConfig as error:
            faults.append(f"{member.name}: {error}")
    return faults
