"""A peer's signing key, its peer id, and signatures that say what they are for.

The key is Ed25519 (RFC 8032), as libp2p uses it; the peer id is the identity multihash of the key's protobuf encoding
(libp2p specs, peer-ids), so a signature is checked against the peer id alone. Every signature covers a domain, so that
none made for one purpose serves another.

What a member states to others, such as that it agrees to a charter, it signs with every key that the suite asks for:
under `gm` its SM2 key signs the same bytes after its identity. Both signatures are one string of bytes, and count only
together. A charter's hash covers every member's SM2 key, so that signing a charter binds the two keys to each other.
"""

import base64
from dataclasses import dataclass

import base58
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2pfl.core.canonical import canonical
from p2pfl.core.charter import Charter, Member
from p2pfl.core.errors import BadSignature, InvalidConfig, Malformed
from p2pfl.core.ids import PeerId
from p2pfl.crypto import sm2
from p2pfl.crypto.beacon import commitment_to
from p2pfl.crypto.sm2 import Sm2SigningKey, verify_sm2_signature
from p2pfl.crypto.suite import SUITES

SEED_BYTES = 32
SIGNATURE_BYTES = 64
SALT_BYTES = 32
# Multihash "identity" of 36 bytes: protobuf field 1 (key type) = 1 (Ed25519), field 2 (data) = 32 bytes.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_CHARTER_DOMAIN = "p2pfl/charter-signature/1"
_SALT_DOMAIN = "p2pfl/salt/1"


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


# Statements of members


@dataclass(frozen=True)
class Signer:
    """What a member signs its statements with: its identity, and its SM2 key where the suite asks for one."""

    identity: Identity
    sm2_key: Sm2SigningKey | None = None

    def sign(self, domain: str, message: bytes) -> bytes:
        """Return the signature of `message` for the purpose `domain`: of the identity, then of the SM2 key if any.

        The message must hold what the statement is about, and the charter's hash if it is made under one.
        """
        own = self.identity.sign(domain, message)
        return own if self.sm2_key is None else own + self.sm2_key.sign(domain, message)


def statement_bytes(suite: str) -> int:
    """Return how long a signature of `Signer.sign` is under a suite."""
    return SIGNATURE_BYTES + (sm2.SIGNATURE_BYTES if SUITES[suite].sm2_signatures else 0)


def verify_statement(suite: str, member: Member, domain: str, message: bytes, signature: bytes) -> None:
    """Check that `member` signed `message` for the purpose `domain` with every key that the suite asks for.

    Raises:
        BadSignature: it did not; names the peer.
        InvalidConfig: the member's record has not the keys that the suite asks for, or the extra `gm` is not installed.
    """
    _verify_keys(suite, member)
    peer, length = PeerId(member.peer_id), statement_bytes(suite)
    if len(signature) != length:
        raise BadSignature(f"a signature of {len(signature)} bytes; under the suite {suite} it has {length}", peer)
    verify_signature(peer, domain, message, signature[:SIGNATURE_BYTES])
    if member.sm2_public_key is None:
        return
    try:
        verify_sm2_signature(bytes.fromhex(member.sm2_public_key), domain, message, signature[SIGNATURE_BYTES:])
    except BadSignature as error:
        raise BadSignature(error.reason, peer) from error
    except Malformed as error:
        raise InvalidConfig(f"sm2_public_key: {error.reason}") from error


def _verify_keys(suite: str, member: Member) -> None:
    wanted = SUITES[suite].sm2_signatures
    if wanted and member.sm2_public_key is None:
        raise InvalidConfig(
            f"has no SM2 key, with which members sign under the suite {suite}; join again with `p2pfl charter join`"
        )
    if not wanted and member.sm2_public_key is not None:
        raise InvalidConfig(
            f"has an SM2 key, which the suite {suite} does not use; join again with `p2pfl charter join`"
        )


# The charter's signatures


def salt_of(identity: Identity, federation: str, version: int) -> bytes:
    """Return the salt that a member gives to the beacon of one version of a charter, 32 bytes.

    It follows from the key, so that nobody has to keep it, and says nothing of it: it is HKDF (RFC 5869, with SHA-256)
    over an Ed25519 signature that is made for nothing else and shown to nobody, and such signatures are deterministic.
    """
    signature = identity.sign(_SALT_DOMAIN, canonical([federation, version]))
    return HKDF(hashes.SHA256(), SALT_BYTES, salt=None, info=_SALT_DOMAIN.encode()).derive(signature)


def sign_charter(
    charter: Charter,
    name: str,
    identity: Identity,
    sm2_key: Sm2SigningKey | None = None,
    salt: bytes | None = None,
) -> Charter:
    """Return the charter with the signature of the member `name` added, and its salt revealed.

    Args:
        charter: the draft.
        name: who signs.
        identity: the member's.
        sm2_key: the member's, under a suite with SM2 signatures.
        salt: what its entry commits to; by default `salt_of` its identity.

    Raises:
        InvalidConfig: there is no such member, or its record has other keys than these or than the suite asks for, or
            commits to another salt.
    """
    member = charter.member(name)
    if member is None:
        raise InvalidConfig(f"{name} is not a member of {charter.name}; run `p2pfl charter join` first")
    if member.peer_id != identity.peer_id:
        raise InvalidConfig(
            f"{name} stands in the charter with peer id {member.peer_id}, but this key is {identity.peer_id}"
        )
    try:
        _verify_keys(charter.security.suite, member)
    except InvalidConfig as error:
        raise InvalidConfig(f"{name}: {error}") from error
    if member.sm2_public_key != (None if sm2_key is None else sm2_key.public.hex()):
        raise InvalidConfig(
            f"{name} stands in the charter with another SM2 key than this one; restore that, or join again"
        )
    salt = salt_of(identity, charter.name, charter.version) if salt is None else salt
    if member.salt_commitment != commitment_to(salt, charter.name, charter.version, member.peer_id):
        raise InvalidConfig(
            f"{name} has not committed to a salt for version {charter.version} of {charter.name}; each version takes "
            "new ones: run `p2pfl charter join` again"
        )
    signature = Signer(identity, sm2_key).sign(_CHARTER_DOMAIN, charter.hash())
    text = base64.b64encode(signature).decode()
    added = {"signatures": {**charter.signatures, name: text}, "salts": {**charter.salts, name: salt.hex()}}
    return charter.model_copy(update=added)


def charter_faults(charter: Charter) -> list[str]:
    """Return what keeps the charter from being in force, one line each, naming the member; empty if nothing does."""
    faults = [] if len(charter.members) > 1 else ["a federation needs at least two members"]
    if SUITES[charter.security.suite].sm2_signatures:
        try:
            sm2.verify_installed()
        except InvalidConfig as error:  # of every member the same
            return [*faults, str(error)]
    return [*faults, *member_faults(charter).values()]


def member_faults(charter: Charter) -> dict[str, str]:
    """Return what is wrong or missing of each member's signature and salt, by name; not of those who signed well."""
    digest, faults = charter.hash(), {}
    for member in charter.members:
        fault = _signature_fault(charter.security.suite, member, digest, charter.signatures.get(member.name))
        fault = fault or ("" if has_revealed(charter, member) else _salt_fault(charter, member))
        if fault:
            faults[member.name] = fault
    return faults


def has_revealed(charter: Charter, member: Member) -> bool:
    """Return whether a member's salt is in the charter, and is the one that its entry commits to for this version."""
    salt = charter.salts.get(member.name)
    commitment = None
    if salt is not None:
        commitment = commitment_to(bytes.fromhex(salt), charter.name, charter.version, member.peer_id)
    return commitment is not None and commitment == member.salt_commitment


def _salt_fault(charter: Charter, member: Member) -> str:
    if member.salt_commitment is None:
        return f"{member.name} has committed to no salt; join again with `p2pfl charter join`"
    if member.name not in charter.salts:
        return f"{member.name} has not revealed its salt; sign again"
    return f"{member.name}'s salt is not the one that it committed to for version {charter.version}; sign again"


def _signature_fault(suite: str, member: Member, digest: bytes, text: str | None) -> str:
    try:
        _verify_keys(suite, member)
        if text is None:
            return f"{member.name} has not signed"
        verify_statement(suite, member, _CHARTER_DOMAIN, digest, base64.b64decode(text, validate=True))
    except InvalidConfig as error:
        return f"{member.name}: {error}"
    except BadSignature as error:
        reason = error.reason
    except ValueError:  # base64 raises a plain one for what is not ASCII
        reason = "no base64"
    else:
        return ""
    return f"{member.name}'s signature is not for this charter: it was changed after signing; sign again ({reason})"
