"""Published answers that a library must give before a suite uses its ciphers.

A long message is tried too, since libraries have other code for many blocks at once: there a stream must be what the
library gives block by block, and a tag the one on which two libraries agree. The tests know many more answers.
"""

from p2pfl.core.errors import BadTag
from p2pfl.crypto.providers import BLOCK_BYTES, TAG_BYTES, Aead, Cipher, Keystream, Provider

# A whole number of blocks, more than any library takes at once, and one number for which counters carry.
_LONG_BYTES = 4096 + 48
_CARRY_OFFSET = ((1 << 32) - 8) * BLOCK_BYTES

# NIST SP 800-38A, F.5.5, and draft-ribose-cfrg-sm4-10, A.2.5.1: key, first counter block, plaintext, ciphertext.
_STREAMS = {
    Cipher.AES_256: (
        "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
        "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51",
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5",
    ),
    Cipher.SM4: (
        "0123456789abcdeffedcba9876543210",
        "000102030405060708090a0b0c0d0e0f",
        "aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccccccccccdddddddddddddddd",
        "ac3236cb970cc20791364c395a1342d1a3cbc1878c6f30cd074cce385cdd70c7",
    ),
}
# McGrew and Viega, The Galois/Counter Mode of Operation, test case 16, and RFC 8998, A.1: key, nonce, associated data,
# plaintext, ciphertext and tag.
_SEALED = {
    Cipher.AES_256: (
        "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
        "cafebabefacedbaddecaf888",
        "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525"
        "b16aedf5aa0de657ba637b39",
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838"
        "c5f61e6393ba7a0abcc9f66276fc6ece0f4e1768cddf8853bb2d551b",
    ),
    Cipher.SM4: (
        "0123456789abcdeffedcba9876543210",
        "00001234567800000000abcd",
        "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        "aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccccccccccdddddddddddddddd"
        "eeeeeeeeeeeeeeeeffffffffffffffffeeeeeeeeeeeeeeeeaaaaaaaaaaaaaaaa",
        "17f399f08c67d5ee19d0dc9969c4bb7d5fd46fd3756489069157b282bb200735"
        "d82710ca5c22f0ccfa7cbf93d496ac15a56834cbcf98c397b4024a2691233b8d"
        "83de3541e4c2b58177e065a9bf7b62ec",
    ),
}


# The tag of `_LONG_BYTES` zeros under the same key, nonce and associated data: published nowhere, but OpenSSL 4.0.3 and
# libgcrypt 1.10.1 agree on it.
_LONG_TAGS = {Cipher.AES_256: "97e882161be36da19b8a7bd9a0ab541c", Cipher.SM4: "be1574cbe06d0d148efbb4bf235eb07a"}


def is_right_keystream(provider: Provider, cipher: Cipher) -> bool:
    """Return whether the provider has the cipher's counter mode, and it gives the known answers."""
    try:
        return _is_right_keystream(provider, cipher)
    except RuntimeError:  # a library that fails on the way is not to be used either
        return False


def _is_right_keystream(provider: Provider, cipher: Cipher) -> bool:
    key, counter, plaintext, ciphertext = map(bytes.fromhex, _STREAMS[cipher])
    try:
        stream = provider.keystream(cipher, key)
    except LookupError:
        return False
    expected = bytes(one ^ other for one, other in zip(plaintext, ciphertext, strict=True))
    if _expanded(stream, int.from_bytes(counter, "big") * BLOCK_BYTES, len(expected)) != expected:
        return False
    at_once = _expanded(stream, _CARRY_OFFSET, _LONG_BYTES)
    return at_once == b"".join(
        _expanded(stream, _CARRY_OFFSET + start, BLOCK_BYTES) for start in range(0, _LONG_BYTES, BLOCK_BYTES)
    )


def is_right_aead(provider: Provider, cipher: Cipher) -> bool:
    """Return whether the provider has the cipher's Galois/counter mode, and it gives the known answers."""
    try:
        return _is_right_aead(provider, cipher)
    except RuntimeError:
        return False


def _is_right_aead(provider: Provider, cipher: Cipher) -> bool:
    key, nonce, associated, plaintext, sealed = map(bytes.fromhex, _SEALED[cipher])
    try:
        aead = provider.aead(cipher, key)
    except LookupError:
        return False
    if _sealed(aead, nonce, plaintext, associated) != sealed or not _opens(aead, nonce, sealed, associated, plaintext):
        return False
    long = bytes(_LONG_BYTES)
    resealed = _sealed(aead, nonce, long, associated)
    forged = bytes([resealed[0] ^ 1]) + resealed[1:]
    return (
        resealed[-TAG_BYTES:].hex() == _LONG_TAGS[cipher]
        and _opens(aead, nonce, resealed, associated, long)
        and not _opens(aead, nonce, forged, associated, long)
    )


def _expanded(stream: Keystream, offset: int, length: int) -> bytes:
    out = bytearray(length)
    stream.expand_into(offset, memoryview(out))
    return bytes(out)


def _sealed(aead: Aead, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
    out = bytearray(len(plaintext) + TAG_BYTES)
    aead.seal_into(nonce, plaintext, associated, memoryview(out))
    return bytes(out)


def _opens(aead: Aead, nonce: bytes, sealed: bytes, associated: bytes, plaintext: bytes) -> bool:
    out = bytearray(len(sealed) - TAG_BYTES)
    try:
        aead.open_into(nonce, sealed, associated, memoryview(out))
    except BadTag:
        return False
    return out == plaintext
