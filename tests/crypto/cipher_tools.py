"""Published vectors, and the cipher libraries that a test runs once for each."""

import json
from pathlib import Path
from typing import Any

import pytest

from p2pfl.crypto.providers import TAG_BYTES, Aead, Keystream, libgcrypt
from p2pfl.crypto.providers.openssl import OpenSsl

OPENSSL = OpenSsl()
LIBGCRYPT = libgcrypt.load()

both_providers = pytest.mark.parametrize(
    "provider",
    [
        pytest.param(OPENSSL, id="openssl"),
        pytest.param(
            LIBGCRYPT,
            id="libgcrypt",
            marks=pytest.mark.skipif(LIBGCRYPT is None, reason="libgcrypt is not installed on this machine"),
        ),
    ],
)


def vectors(file: str, part: str = "vectors") -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "vectors" / file).read_text())[part]
    return entries


def seal(aead: Aead, nonce: bytes, plaintext: bytes, associated: bytes = b"") -> bytes:
    out = bytearray(len(plaintext) + TAG_BYTES)
    aead.seal_into(nonce, plaintext, associated, memoryview(out))
    return bytes(out)


def unseal(aead: Aead, nonce: bytes, sealed: bytes, associated: bytes = b"") -> bytes:
    out = bytearray(max(0, len(sealed) - TAG_BYTES))
    aead.open_into(nonce, sealed, associated, memoryview(out))
    return bytes(out)


def expand(stream: Keystream, offset: int, length: int) -> bytes:
    out = bytearray(length)
    stream.expand_into(offset, memoryview(out))
    return bytes(out)


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
