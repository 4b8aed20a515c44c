"""The ciphers of OpenSSL, through `cryptography`: always there."""

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.backends.openssl import backend
from cryptography.hazmat.primitives.ciphers import Cipher as Construction
from cryptography.hazmat.primitives.ciphers import CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from p2pfl.core.errors import BadTag
from p2pfl.crypto.providers import (
    BLOCK_BYTES,
    NONCE_BYTES,
    TAG_BYTES,
    Aead,
    Buffer,
    Cipher,
    Keystream,
    bytes_of,
    first_counter,
    verify_open,
    verify_seal,
)

# One call's worth of zeros to encrypt, read by all streams: the 256 KiB chunks of a masked sum go in one call.
_ZEROS = memoryview(bytes(1 << 18))
_WRONG_TAG = "a sealed message that does not open"


class OpenSsl:
    """OpenSSL as a provider."""

    name = "openssl"

    @property
    def version(self) -> str:
        """OpenSSL's version without its date."""
        return backend.openssl_version_text().removeprefix("OpenSSL ").split(" ")[0]

    def aead(self, cipher: Cipher, key: bytes) -> Aead:
        """Return the cipher in Galois/counter mode under `key`; see `Provider.aead`."""
        cipher.verify_key(key)
        try:
            return _AesGcm(key) if cipher is Cipher.AES_256 else _Sm4Gcm(key)
        except UnsupportedAlgorithm as error:
            raise LookupError(f"this OpenSSL has no {cipher}-GCM") from error

    def keystream(self, cipher: Cipher, key: bytes) -> Keystream:
        """Return the cipher's stream under `key`; see `Provider.keystream`."""
        cipher.verify_key(key)
        algorithm = algorithms.AES256(key) if cipher is Cipher.AES_256 else algorithms.SM4(key)
        try:
            return _Counter(Construction(algorithm, modes.CTR(bytes(BLOCK_BYTES))).encryptor())
        except UnsupportedAlgorithm as error:
            raise LookupError(f"this OpenSSL has no {cipher}-CTR") from error


class _AesGcm:
    """AES-256-GCM: one call for ciphertext and tag, with the key expanded once."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal_into(self, nonce: bytes, plaintext: Buffer, associated: bytes, out: memoryview) -> None:
        plain, target = bytes_of(plaintext), bytes_of(out)
        verify_seal(nonce, plain, target)
        self._cipher.encrypt_into(nonce, plain, associated, target)

    def open_into(self, nonce: bytes, ciphertext: Buffer, associated: bytes, out: memoryview) -> None:
        sealed, target = bytes_of(ciphertext), bytes_of(out)
        verify_open(nonce, sealed, target)
        try:
            self._cipher.decrypt_into(nonce, sealed, associated, target)
        except InvalidTag:
            target[:] = bytes(len(target))
            raise BadTag(_WRONG_TAG) from None


class _Sm4Gcm:
    """SM4-GCM: `cryptography` has no one-call form of it, so each message expands the key again."""

    def __init__(self, key: bytes) -> None:
        self._algorithm = algorithms.SM4(key)
        Construction(self._algorithm, modes.GCM(bytes(NONCE_BYTES))).encryptor()  # raises now where there is none

    def seal_into(self, nonce: bytes, plaintext: Buffer, associated: bytes, out: memoryview) -> None:
        plain, target = bytes_of(plaintext), bytes_of(out)
        verify_seal(nonce, plain, target)
        context = Construction(self._algorithm, modes.GCM(nonce)).encryptor()
        context.authenticate_additional_data(associated)
        context.update_into(plain, target[: len(plain)])
        context.finalize()
        target[len(plain) :] = context.tag

    def open_into(self, nonce: bytes, ciphertext: Buffer, associated: bytes, out: memoryview) -> None:
        sealed, target = bytes_of(ciphertext), bytes_of(out)
        verify_open(nonce, sealed, target)
        context = Construction(self._algorithm, modes.GCM(nonce)).decryptor()
        context.authenticate_additional_data(associated)
        context.update_into(sealed[:-TAG_BYTES], target)
        try:
            context.finalize_with_tag(bytes(sealed[-TAG_BYTES:]))
        except InvalidTag:
            target[:] = bytes(len(target))
            raise BadTag(_WRONG_TAG) from None


class _Counter:
    """A stream: zeros encrypted in counter mode. The context stays while reads follow each other."""

    def __init__(self, context: CipherContext) -> None:
        self._context = context
        self._next = 0

    def expand_into(self, offset: int, out: memoryview) -> None:
        target = bytes_of(out)
        counter = first_counter(offset)
        if offset != self._next:
            self._context.reset_nonce(counter)
        self._next = -1  # should this read fail, the next one seeks
        for start in range(0, len(target), len(_ZEROS)):
            piece = target[start : start + len(_ZEROS)]
            self._context.update_into(_ZEROS[: len(piece)], piece)
        # After a read that ends inside a block no read can start here, so the next one seeks.
        self._next = offset + len(target)
