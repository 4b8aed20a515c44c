"""The cipher suites, behind one interface. The charter chooses one; every transcript is bound to it; none are mixed.

| suite | agreement | hash, HKDF | messages | keystream | signatures |
|---|---|---|---|---|---|
| `aes` | X25519 | SHA-256 | AES-256-GCM | AES-256-CTR | Ed25519 |
| `sm4` | X25519 | SM3 | SM4-GCM | SM4-CTR | Ed25519 |
| `gm` | SM2 | SM3 | SM4-GCM | SM4-CTR | Ed25519 and SM2 |

The suites with SM algorithms use the GM/T algorithms; nothing here is a certified module. Each cipher comes from the
fastest of the libraries that are there and give the known answers; all give the same bytes. Constant time is theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.agreement import X25519, Agreement
from p2pfl.crypto.providers import (
    BLOCK_BYTES,
    NONCE_BYTES,
    TAG_BYTES,
    Aead,
    Buffer,
    Cipher,
    Keystream,
    Provider,
    libgcrypt,
)
from p2pfl.crypto.providers.choice import Clock, fastest_aead, fastest_keystream
from p2pfl.crypto.providers.known_answers import is_right_aead, is_right_keystream
from p2pfl.crypto.providers.openssl import OpenSsl
from p2pfl.crypto.sm2 import Sm2Agreement, verify_installed

__all__ = [
    "BLOCK_BYTES",
    "NONCE_BYTES",
    "SUITES",
    "TAG_BYTES",
    "Aead",
    "Agreement",
    "Buffer",
    "CipherSuite",
    "Keystream",
    "Suite",
    "available_providers",
    "suite",
]

_LIBRARIES = ("libgcrypt", "openssl")
# Where nobody brings a clock, the first serves. The faster on one x86 core with AVX-512 and GFNI, in pieces of 256 KiB.
_AEAD_ORDER = {Cipher.AES_256: ("openssl", "libgcrypt"), Cipher.SM4: _LIBRARIES}
_KEYSTREAM_ORDER = {Cipher.AES_256: _LIBRARIES, Cipher.SM4: _LIBRARIES}


class Suite(Protocol):
    """One row of the table above."""

    @property
    def name(self) -> str:
        """`aes`, `sm4` or `gm`."""

    @property
    def key_bytes(self) -> int:
        """Bytes of a cipher key: 32 for AES-256, 16 for SM4."""

    @property
    def agreement(self) -> Agreement:
        """Its Diffie-Hellman group."""

    def hash(self, data: Buffer) -> bytes:
        """Return the 32-byte hash."""

    def hkdf(self, secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
        """Return `length` bytes, at most 255 hashes, by HKDF (RFC 5869) over the suite's hash.

        Raises:
            ValueError: `length` is more.
        """

    def aead(self, key: bytes) -> Aead:
        """Return the AEAD under `key` (`key_bytes`).

        Raises:
            ValueError: `key` has another length.
        """

    def keystream(self, key: bytes) -> Keystream:
        """Return the stream under `key` (`key_bytes`).

        Raises:
            ValueError: `key` has another length.
        """


@dataclass(frozen=True)
class Terms:
    """What a suite is made of.

    Attributes:
        sm2_signatures: whether members sign their statements with SM2 too, beside Ed25519.
    """

    agreement: Agreement
    agreement_name: str
    hash_name: str
    hash_algorithm: hashes.HashAlgorithm
    cipher: Cipher
    sm2_signatures: bool = False


_X25519 = X25519()
SUITES: Mapping[str, Terms] = {
    "aes": Terms(_X25519, "X25519", "SHA-256", hashes.SHA256(), Cipher.AES_256),
    "sm4": Terms(_X25519, "X25519", "SM3", hashes.SM3(), Cipher.SM4),
    "gm": Terms(Sm2Agreement(), "SM2", "SM3", hashes.SM3(), Cipher.SM4, sm2_signatures=True),
}


@dataclass(frozen=True)
class CipherSuite:
    """A suite, and the libraries that can serve it, all of which gave the known answers.

    Attributes:
        clock: measures which of them does, for each primitive when it is first used; None: the first.
    """

    name: str
    terms: Terms
    aead_providers: tuple[Provider, ...]
    keystream_providers: tuple[Provider, ...]
    clock: Clock | None = field(default=None, repr=False)

    @property
    def aead_provider(self) -> Provider:
        """The library that serves messages."""
        return _serving(fastest_aead, self.aead_providers, self.terms.cipher, self.clock)

    @property
    def keystream_provider(self) -> Provider:
        """The library that serves masks."""
        return _serving(fastest_keystream, self.keystream_providers, self.terms.cipher, self.clock)

    @property
    def key_bytes(self) -> int:
        """Bytes of a cipher key."""
        return self.terms.cipher.key_bytes

    @property
    def agreement(self) -> Agreement:
        """The suite's Diffie-Hellman group."""
        return self.terms.agreement

    def hash(self, data: Buffer) -> bytes:
        """Return the 32-byte hash; see `Suite.hash`."""
        digest = hashes.Hash(self.terms.hash_algorithm)
        digest.update(data)
        return digest.finalize()

    def hkdf(self, secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
        """Return bytes by HKDF; see `Suite.hkdf`."""
        return HKDF(algorithm=self.terms.hash_algorithm, length=length, salt=salt, info=info).derive(secret)

    def aead(self, key: bytes) -> Aead:
        """Return the AEAD under `key`; see `Suite.aead`."""
        return self.aead_provider.aead(self.terms.cipher, key)

    def keystream(self, key: bytes) -> Keystream:
        """Return the stream under `key`; see `Suite.keystream`."""
        return self.keystream_provider.keystream(self.terms.cipher, key)


@cache
def available_providers() -> tuple[Provider, ...]:
    """Return the cipher libraries that are there."""
    found = libgcrypt.load()
    return (OpenSsl(),) if found is None else (OpenSsl(), found)


def suite(name: str, providers: Sequence[Provider] | None = None, clock: Clock | None = None) -> CipherSuite:
    """Return the suite of this name, the same one each time.

    The first call tries the libraries' answers.

    Args:
        name: `aes`, `sm4` or `gm`.
        providers: to choose from; by default all that are there.
        clock: gives seconds, to have the fastest library serve; without one, those serve that were the fastest where
            this was written. See `p2pfl.crypto.providers.choice` for what it costs.

    Raises:
        InvalidConfig: there is no such suite, or what it needs is not installed.
    """
    return _suite(name, available_providers() if providers is None else tuple(providers), clock)


@cache
def _suite(name: str, providers: tuple[Provider, ...], clock: Clock | None) -> CipherSuite:
    terms = SUITES.get(name)
    if terms is None:
        raise InvalidConfig(f"there is no suite {name[:20]!r}; there are {', '.join(SUITES)}")
    if name == "gm":
        verify_installed()
    try:
        hashes.Hash(terms.hash_algorithm)
    except UnsupportedAlgorithm as error:
        raise _lacking(name, terms.hash_name) from error
    cipher = terms.cipher
    aead = _all_right(is_right_aead, cipher, _AEAD_ORDER[cipher], providers)
    keystream = _all_right(is_right_keystream, cipher, _KEYSTREAM_ORDER[cipher], providers)
    if not aead or not keystream:
        raise _lacking(name, f"{cipher}-{'CTR' if aead else 'GCM'}")
    return CipherSuite(name, terms, aead, keystream, clock)


def _all_right(
    is_right: Callable[[Provider, Cipher], bool], cipher: Cipher, order: Sequence[str], providers: Sequence[Provider]
) -> tuple[Provider, ...]:
    named = (provider for name in order for provider in providers if provider.name == name)
    return tuple(provider for provider in named if is_right(provider, cipher))


@cache
def _serving(
    fastest: Callable[[Sequence[Provider], Cipher, Clock], Provider],
    providers: tuple[Provider, ...],
    cipher: Cipher,
    clock: Clock | None,
) -> Provider:
    """Measure once in a process. Threads that ask at once may each measure, and get different libraries: no harm."""
    return providers[0] if clock is None else fastest(providers, cipher, clock)


def _lacking(name: str, algorithm: str) -> InvalidConfig:
    return InvalidConfig(
        f"the suite {name} needs {algorithm}, which no library here gives correctly; "
        "install cryptography from its wheel, or libgcrypt 1.9 or later"
    )
