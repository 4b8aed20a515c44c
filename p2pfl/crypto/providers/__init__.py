"""What a cipher library must offer, so that the suites can take each cipher from the library that is fastest at it.

Nothing here knows a library; `openssl` is always there, `libgcrypt` where the system has it.
"""

from enum import StrEnum
from typing import Protocol

from p2pfl.core.errors import BadTag

TAG_BYTES = 16
NONCE_BYTES = 12
BLOCK_BYTES = 16
Buffer = bytes | bytearray | memoryview


class Cipher(StrEnum):
    """A block cipher of 16-byte blocks."""

    AES_256 = "AES-256"
    SM4 = "SM4"

    @property
    def key_bytes(self) -> int:
        """Length of its key."""
        return 32 if self is Cipher.AES_256 else 16

    def verify_key(self, key: bytes) -> None:
        """Check the length of a key.

        Raises:
            ValueError: it is another; the message has the length only.
        """
        if len(key) != self.key_bytes:
            raise ValueError(f"{self} takes a key of {self.key_bytes} bytes, not {len(key)}")


class Aead(Protocol):
    """Authenticated encryption under one key. Not for several threads at once."""

    def seal_into(self, nonce: bytes, plaintext: Buffer, associated: bytes, out: memoryview) -> None:
        """Write ciphertext and tag, `len(plaintext) + TAG_BYTES` bytes, into `out`, which may not overlap `plaintext`.

        Args:
            nonce: `NONCE_BYTES`, never twice under one key.
            plaintext: what to protect.
            associated: what is authenticated with it and sent otherwise.
            out: writable bytes of exactly that length.

        Raises:
            ValueError: a length is wrong.
        """

    def open_into(self, nonce: bytes, ciphertext: Buffer, associated: bytes, out: memoryview) -> None:
        """Write the plaintext of `ciphertext` (with its tag) into `out`, `len(ciphertext) - TAG_BYTES` bytes.

        The libraries decrypt while they compute the tag, so `out` is nobody else's until this returns.

        Raises:
            BadTag: it was not sealed so; nothing of the plaintext is in `out`.
            ValueError: a length is wrong.
        """


class Keystream(Protocol):
    """A pseudo-random stream under one key: the block cipher in counter mode from block 0, seekable.

    Byte `i` belongs to the encryption of block number `i // BLOCK_BYTES`, a big-endian number of 128 bits.
    Not for several threads at once.
    """

    def expand_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` (writable bytes) with the stream's bytes from `offset`, a multiple of `BLOCK_BYTES`.

        Releases the interpreter lock for large buffers, so that several threads expand different keys at once.

        Raises:
            ValueError: `offset` is no such multiple.
        """


class Provider(Protocol):
    """A cipher library."""

    @property
    def name(self) -> str:
        """Its name: `openssl` or `libgcrypt`."""

    @property
    def version(self) -> str:
        """Its version, as it says itself."""

    def aead(self, cipher: Cipher, key: bytes) -> Aead:
        """Return the cipher in Galois/counter mode (NIST SP 800-38D) under `key`.

        Raises:
            LookupError: the library has it not.
            ValueError: `key` has another length.
        """

    def keystream(self, cipher: Cipher, key: bytes) -> Keystream:
        """Return the cipher's stream under `key`.

        Raises:
            LookupError: the library has it not.
            ValueError: `key` has another length.
        """


def bytes_of(buffer: Buffer) -> memoryview:
    """Return a view of a buffer's bytes, whatever its items are; an array of none cannot be cast."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def verify_seal(nonce: bytes, plaintext: memoryview, out: memoryview) -> None:
    """Check the lengths that `Aead.seal_into` was given, all views of bytes.

    Raises:
        ValueError: one is wrong.
    """
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
    if len(out) != len(plaintext) + TAG_BYTES:
        raise ValueError(f"{len(plaintext)} bytes seal into {len(plaintext) + TAG_BYTES}, not {len(out)}")


def verify_open(nonce: bytes, ciphertext: memoryview, out: memoryview) -> None:
    """Check the lengths that `Aead.open_into` was given, all views of bytes.

    Raises:
        BadTag: `ciphertext` is shorter than a tag.
        ValueError: another length is wrong.
    """
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
    if len(ciphertext) < TAG_BYTES:
        raise BadTag(f"a sealed message of {len(ciphertext)} bytes, shorter than its tag")
    if len(out) != len(ciphertext) - TAG_BYTES:
        raise ValueError(f"{len(ciphertext)} bytes open into {len(ciphertext) - TAG_BYTES}, not {len(out)}")


def first_counter(offset: int) -> bytes:
    """Return the counter block at `offset` of a stream.

    Raises:
        ValueError: `offset` is no multiple of `BLOCK_BYTES` from 0 on.
    """
    block, rest = divmod(offset, BLOCK_BYTES)
    if rest or block < 0:
        raise ValueError(f"a keystream is read from a multiple of {BLOCK_BYTES}, not from {offset}")
    return block.to_bytes(BLOCK_BYTES, "big")
