"""A private key under a passphrase: scrypt (RFC 7914) derives the key of an AES-256-GCM box around its 32 bytes.

The file is PEM with a label of its own; inside are which key it is, scrypt's cost, the salt, the nonce and the box. All
before the box is authenticated with it, so a lowered cost and a key of the other kind are noticed.
"""

import base64
import binascii
import re
import textwrap

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.identity import SEED_BYTES, Identity
from p2pfl.crypto.sm2 import Sm2SigningKey

LABEL = b"P2PFL PRIVATE KEY UNDER PASSPHRASE"
ED25519, SM2 = 1, 2
"""The first byte: which key it is, in this version of the format."""
LOG2_COST = 17
"""scrypt's N = 2^17 with r = 8 and p = 1: 128 MiB and some tenths of a second, what OWASP recommends for passwords."""
LARGEST_LOG2_COST = 20
"""Reading a file must not cost more than 1 GiB, whoever wrote it."""
SALT_BYTES, NONCE_BYTES, TAG_BYTES = 16, 12, 16
ENTROPY_BYTES = SALT_BYTES + NONCE_BYTES
_HEADER_BYTES = 2 + ENTROPY_BYTES
_BODY = re.compile(rb"\s*-----BEGIN " + LABEL + rb"-----\s+([A-Za-z0-9+/=\s]{1,400})-----END " + LABEL + rb"-----\s*")


def is_sealed(pem: bytes) -> bool:
    """Return whether a key file is one under a passphrase."""
    return b"-----BEGIN " + LABEL in pem


def seal_identity(identity: Identity, passphrase: bytes, entropy: bytes, log2_cost: int = LOG2_COST) -> bytes:
    """Return the key file of `identity` under `passphrase`.

    Args:
        identity: whose seed is sealed.
        passphrase: not empty.
        entropy: `ENTROPY_BYTES`, fresh for each file.
        log2_cost: scrypt's N as a power of two.

    Raises:
        InvalidConfig: the passphrase is empty.
    """
    return _seal(ED25519, identity.seed(), passphrase, entropy, log2_cost)


def seal_sm2_key(key: Sm2SigningKey, passphrase: bytes, entropy: bytes, log2_cost: int = LOG2_COST) -> bytes:
    """Return the key file of an SM2 key under `passphrase`; see `seal_identity`.

    Raises:
        InvalidConfig: the passphrase is empty.
    """
    return _seal(SM2, key.private(), passphrase, entropy, log2_cost)


def _seal(kind: int, secret: bytes, passphrase: bytes, entropy: bytes, log2_cost: int) -> bytes:
    if not passphrase:
        raise InvalidConfig("an empty passphrase protects nothing; give one, or leave the option out")
    header = bytes([kind, log2_cost]) + entropy
    box = AESGCM(_derive(passphrase, header)).encrypt(header[-NONCE_BYTES:], secret, header)
    lines = textwrap.wrap(base64.b64encode(header + box).decode(), 64)
    return b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (LABEL, "\n".join(lines).encode(), LABEL)


def open_identity(pem: bytes, passphrase: bytes, where: str) -> Identity:
    """Read what `seal_identity` wrote; `where` names the file in errors.

    Raises:
        InvalidConfig: the passphrase is wrong, the file damaged, or another key in it.
    """
    return Identity(_open(ED25519, pem, passphrase, where))


def open_sm2_key(pem: bytes, passphrase: bytes, where: str) -> Sm2SigningKey:
    """Read what `seal_sm2_key` wrote; `where` names the file in errors.

    Raises:
        InvalidConfig: the passphrase is wrong, the file damaged, another key in it, or the extra `gm` not installed.
    """
    secret = _open(SM2, pem, passphrase, where)
    try:
        return Sm2SigningKey.from_private(secret)
    except ValueError as error:
        raise InvalidConfig(f"{where}: {error}; restore it from your backup") from error


def _open(kind: int, pem: bytes, passphrase: bytes, where: str) -> bytes:
    match = _BODY.fullmatch(pem)
    try:
        content = base64.b64decode(b"".join(match.group(1).split()), validate=True) if match else b""
    except binascii.Error:
        content = b""
    if len(content) != _HEADER_BYTES + SEED_BYTES + TAG_BYTES or content[0] != kind:
        what = "an SM2 key" if kind == SM2 else "an Ed25519 key"
        raise InvalidConfig(f"{where}: not a key file of this version for {what}; restore it from your backup")
    header, box = content[:_HEADER_BYTES], content[_HEADER_BYTES:]
    if not 1 <= header[1] <= LARGEST_LOG2_COST:
        raise InvalidConfig(f"{where}: asks for more work than a key file of ours does; restore it from your backup")
    try:
        return AESGCM(_derive(passphrase, header)).decrypt(header[-NONCE_BYTES:], box, header)
    except InvalidTag as error:
        raise InvalidConfig(f"{where}: the passphrase is wrong, or the file is damaged") from error


def _derive(passphrase: bytes, header: bytes) -> bytes:
    return Scrypt(salt=header[2 : 2 + SALT_BYTES], length=32, n=1 << header[1], r=8, p=1).derive(passphrase)
