"""SM2 over its recommended curve: the key exchange of GB/T 32918.3-2016 and signatures of GB/T 32918.2-2016.

This uses the GM/T algorithms; it is no certified module. The point arithmetic of the exchange is fastecdsa's, on
GMP integers, between Python integers: **neither is constant time**. So a private key of the exchange is for one
masked sum, or for the handshakes of one running process, and never an identity. A key for signatures lives longer:
GmSSL signs with it, and the arithmetic here sees it only when its public half is computed, as it is made or read.

Signatures are verified here, where all is public: GmSSL would write a line to the standard error stream for each that
does not verify, and so could anybody who sends one. Both libraries come with the extra `gm` and are imported when first
needed.
"""

import base64
import binascii
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import BadSignature, InvalidConfig, Malformed

PRIVATE_BYTES = 32
PUBLIC_BYTES = 65
SIGNATURE_BYTES = 64
USER_ID = b"1234567812345678"
"""The user id where none is agreed on (GM/T 0009-2012, section 10)."""

# GB/T 32918.5-2017, section 2: the recommended curve y^2 = x^3 + ax + b over F_p, its base point and prime order.
_P = 0xFFFFFFFE_FFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFF_00000000_FFFFFFFF_FFFFFFFF
_A = _P - 3
_B = 0x28E9FA9E_9D9F5E34_4D5A9E4B_CF6509A7_F39789F5_15AB8F92_DDBCBD41_4D940E93
_N = 0xFFFFFFFE_FFFFFFFF_FFFFFFFF_FFFFFFFF_7203DF6B_21C6052B_53BBF409_39D54123
_G = (
    0x32C4AE2C_1F198119_5F990446_6A39C994_8FE30BBF_F2660BE1_715A4589_334C74C7,
    0xBC3736A2_F4F6779C_59BDCEE3_6B692153_D0A9877C_C62A4740_02DF32E5_2139F0A0,
)
# GB/T 32918.3-2016, section 6.1: w = ceil(ceil(log2 n) / 2) - 1.
_TWO_TO_W = 1 << 127
_UNCOMPRESSED = b"\x04"
_FIELD_BYTES = 32
# As many bits more than the order's as make the reduction's bias 2^-128 (FIPS 186-5, appendix A.2.1, asks for 64).
_SCALAR_BYTES = 48
# PKCS #8 (RFC 5958) around an ECPrivateKey (RFC 5915), of which all but the two keys is fixed: version, the algorithms
# id-ecPublicKey (RFC 5480) and sm2p256v1 (1.2.156.10197.1.301, GM/T 0006-2012); then, inside, version and private key.
_PKCS8_HEAD = bytes.fromhex("308187020100301306072a8648ce3d020106082a811ccf5501822d046d306b0201010420")
_PKCS8_PUBLIC = bytes.fromhex("a144034200")
_PEM = re.compile(rb"\s*-----BEGIN PRIVATE KEY-----\s+([A-Za-z0-9+/=\s]{1,400})-----END PRIVATE KEY-----\s*")


def verify_installed() -> None:
    """Check that the libraries of the extra are there.

    Raises:
        InvalidConfig: one is not.
    """
    for name in ("fastecdsa.curve", "fastecdsa.point", "gmssl_pyx"):
        _library(name)


def private_scalar(entropy: bytes) -> int:
    """Return the private key that 32 bytes of entropy stand for, between 1 and n - 2 as GB/T 32918.1 asks.

    Raises:
        ValueError: the entropy has another length.
    """
    if len(entropy) != PRIVATE_BYTES:
        raise ValueError(f"an SM2 key is made from {PRIVATE_BYTES} bytes, not {len(entropy)}")
    expand = HKDF(algorithm=hashes.SM3(), length=_SCALAR_BYTES, salt=None, info=b"p2pfl/sm2-private-key/1")
    return int.from_bytes(expand.derive(entropy), "big") % (_N - 2) + 1


def public_point(private: int) -> bytes:
    """Return the public key of a private one: the uncompressed point, `PUBLIC_BYTES` long. Not constant time."""
    return _encode(_curve().G * private)


def verify_point(public: bytes) -> None:
    """Check that bytes are an uncompressed point of the curve other than infinity; its order is then n, a prime.

    Raises:
        Malformed: they are not.
    """
    _decode(public)


@dataclass(frozen=True)
class Side:
    """What both sides of an exchange know of one: its public keys, as uncompressed points, and its user id."""

    static: bytes
    ephemeral: bytes
    user_id: bytes = USER_ID


def exchange(static: int, ephemeral: int, initiator: Side, responder: Side, is_initiator: bool, length: int) -> bytes:
    """Return the `length` bytes both sides agree on: GB/T 32918.3-2016, section 6.1, without its optional confirmation.

    Not constant time: see the module.

    Args:
        static: our private key d.
        ephemeral: our private key r.
        initiator: side A.
        responder: side B.
        is_initiator: whether we are A.
        length: of the key, in bytes.

    Raises:
        Malformed: a key of the other side is no point of the curve, or its keys lead to the point at infinity.
    """
    ours, theirs = (initiator, responder) if is_initiator else (responder, initiator)
    t = (static + _reduced(ours.ephemeral) * ephemeral) % _N
    # Step A7: U = [h t](P + [x] R), where the cofactor h is 1.
    point = _decode(theirs.static) + _decode(theirs.ephemeral) * _reduced(theirs.ephemeral)
    if t == 0 or point == point.IDENTITY_ELEMENT:
        raise Malformed("SM2 keys whose exchange ends at infinity")
    digests = [user_digest(side.static, side.user_id) for side in (initiator, responder)]
    return kdf(_coordinates(point * t) + b"".join(digests), length)


def user_digest(public: bytes, user_id: bytes) -> bytes:
    """Return Z: the hash of who and of which key and curve (GB/T 32918.2-2016, section 5.5)."""
    curve = b"".join(number.to_bytes(_FIELD_BYTES, "big") for number in (_A, _B, *_G))
    return _sm3((len(user_id) * 8).to_bytes(2, "big") + user_id + curve + public[1:])


def kdf(secret: bytes, length: int) -> bytes:
    """Return `length` bytes by the key derivation function of GB/T 32918.3-2016, section 5.4.3, over SM3."""
    blocks = -(-length // 32)
    return b"".join(_sm3(secret + counter.to_bytes(4, "big")) for counter in range(1, blocks + 1))[:length]


class Sm2Agreement:
    """The exchange as a Diffie-Hellman group: a side's one key stands as both its static and its ephemeral key.

    The standard's two keys serve to authenticate the fresh one; here every key is fresh and signed by its peer's
    identity. With d = r and P = R the agreed point is [(1 + x1)(1 + x2) d1 d2]G, with x1 and x2 public and the factors
    never 0: as hard to find as the Diffie-Hellman point. A is the side with the smaller encoded key. A private key
    is 32 bytes of entropy, as X25519's is; `private_scalar` says which number they stand for.
    """

    public_bytes = PUBLIC_BYTES

    def public_key(self, private: bytes) -> bytes:
        """Return the public key of a private one; see `Agreement.public_key`. Not constant time."""
        return public_point(private_scalar(private))

    def shared_secret(self, private: bytes, public: bytes) -> bytes:
        """Return the shared secret; see `Agreement.shared_secret`. Not constant time.

        Raises:
            Malformed: `public` is no uncompressed point of the curve.
        """
        verify_point(public)
        scalar = private_scalar(private)
        ours = public_point(scalar)
        initiator, responder = (Side(key, key) for key in sorted((ours, public)))
        return exchange(scalar, scalar, initiator, responder, ours <= public, 32)


class Sm2SigningKey:
    """A private key for SM2 signatures over SM3. Its `repr` shows the public key only."""

    def __init__(self, entropy: bytes) -> None:
        """Make the key from 32 bytes of entropy.

        Raises:
            InvalidConfig: the extra `gm` is not installed.
            ValueError: the entropy has another length.
        """
        verify_installed()
        self._take(private_scalar(entropy))

    def _take(self, scalar: int) -> None:
        self._private = scalar.to_bytes(PRIVATE_BYTES, "big")
        self.public = public_point(scalar)

    @classmethod
    def from_private(cls, private: bytes) -> "Sm2SigningKey":
        """Take a private key as `private` returns it.

        Raises:
            InvalidConfig: the extra `gm` is not installed.
            ValueError: it is no number between 1 and n - 2 in 32 bytes.
        """
        verify_installed()
        scalar = int.from_bytes(private, "big")
        if len(private) != PRIVATE_BYTES or not 1 <= scalar <= _N - 2:
            raise ValueError("an SM2 private key is a number between 1 and n - 2")
        key = cls.__new__(cls)
        key._take(scalar)
        return key

    def private(self) -> bytes:
        """Return the secret, for its file."""
        return self._private

    def to_pem(self) -> bytes:
        """Return the key as unencrypted PKCS #8 PEM."""
        der = _PKCS8_HEAD + self._private + _PKCS8_PUBLIC + self.public
        lines = textwrap.wrap(base64.b64encode(der).decode(), 64)
        return b"-----BEGIN PRIVATE KEY-----\n%b\n-----END PRIVATE KEY-----\n" % "\n".join(lines).encode()

    @classmethod
    def from_pem(cls, pem: bytes, where: str) -> "Sm2SigningKey":
        """Read a key as `to_pem` writes it; `where` names its file in errors.

        Raises:
            InvalidConfig: it is something else, or the extra `gm` is not installed.
        """
        match = _PEM.fullmatch(pem)
        try:
            der = base64.b64decode(b"".join(match.group(1).split()), validate=True) if match else b""
            key = cls.from_private(der[len(_PKCS8_HEAD) : len(_PKCS8_HEAD) + PRIVATE_BYTES])
        except (binascii.Error, ValueError):
            key = None
        if key is None or der != _PKCS8_HEAD + key.private() + _PKCS8_PUBLIC + key.public:
            raise InvalidConfig(f"{where}: not an unencrypted PEM private key for SM2; restore it from your backup")
        return key

    def __repr__(self) -> str:
        return f"Sm2SigningKey({self.public.hex()})"

    def sign(self, domain: str, message: bytes) -> bytes:
        """Return the signature of `message` for the purpose `domain`: r and s, 32 bytes each.

        Two signatures of one message differ: GmSSL draws the nonce itself, from the operating system, since a nonce
        handled outside constant-time code would give the key away.
        """
        library = _library("gmssl_pyx")
        der = library.sm2_sign(self._private, self.public[1:], canonical([domain, message]), USER_ID)
        return b"".join(number.to_bytes(_FIELD_BYTES, "big") for number in decode_dss_signature(der))


def verify_sm2_signature(public: bytes, domain: str, message: bytes, signature: bytes) -> None:
    """Check that the key `public` signed `message` for the purpose `domain`.

    Raises:
        BadSignature: it did not.
        Malformed: `public` is no key.
    """
    verify_bare_signature(public, canonical([domain, message]), signature)


def verify_bare_signature(public: bytes, message: bytes, signature: bytes, user_id: bytes = USER_ID) -> None:
    """Check a signature of the bytes `message` alone, as the standard's example has it; ours always cover a domain.

    Raises:
        BadSignature: it was not made so.
        Malformed: `public` is no key.
    """
    key = _decode(public)
    r, s = (int.from_bytes(signature[at : at + _FIELD_BYTES], "big") for at in (0, _FIELD_BYTES))
    if len(signature) != SIGNATURE_BYTES or not (0 < r < _N and 0 < s < _N):
        raise BadSignature("an SM2 signature that is not two numbers below the order")
    # GB/T 32918.2-2016, section 7.1: e = H(Z || M), t = r + s, (x, y) = [s]G + [t]P, and r must be e + x modulo n.
    t = (r + s) % _N
    point = _curve().G * s + key * t
    digest = int.from_bytes(_sm3(user_digest(public, user_id) + message), "big")
    if t == 0 or point == point.IDENTITY_ELEMENT or (digest + point.x) % _N != r:
        raise BadSignature("an SM2 signature that does not verify")


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise InvalidConfig(
            f"SM2 needs {name.partition('.')[0]}, which is not installed: pip install 'p2pfl-mesh[gm]'"
        ) from error


@cache
def _curve() -> Any:
    return _library("fastecdsa.curve").Curve("sm2p256v1", _P, _A, _B, _N, *_G)


def _decode(public: bytes) -> Any:
    """Return the point. fastecdsa reduces coordinates modulo p, so that other bytes would name the same point."""
    if len(public) != PUBLIC_BYTES or public[:1] != _UNCOMPRESSED:
        raise Malformed(f"an SM2 key that is not {PUBLIC_BYTES} bytes from 04 on")
    x, y = (int.from_bytes(public[at : at + _FIELD_BYTES], "big") for at in (1, 1 + _FIELD_BYTES))
    if x >= _P or y >= _P or not _curve().is_point_on_curve((x, y)):
        raise Malformed("an SM2 key that is no point of the curve")
    return _library("fastecdsa.point").Point(x, y, _curve())


def _coordinates(point: Any) -> bytes:
    return b"".join(number.to_bytes(_FIELD_BYTES, "big") for number in (point.x, point.y))


def _encode(point: Any) -> bytes:
    return _UNCOMPRESSED + _coordinates(point)


def _reduced(public: bytes) -> int:
    """Return 2^w + (x mod 2^w) of a point's x, steps A4 and A6."""
    x = int.from_bytes(public[1 : 1 + _FIELD_BYTES], "big")
    return _TWO_TO_W + (x & (_TWO_TO_W - 1))


def _sm3(data: bytes) -> bytes:
    digest = hashes.Hash(hashes.SM3())
    digest.update(data)
    return digest.finalize()
