"""Every primitive of the suites against published values; `tests/vectors/README.md` names their sources."""

from typing import Any

import pytest

from p2pfl.core.errors import BadTag, Malformed
from p2pfl.crypto.agreement import X25519
from p2pfl.crypto.providers import BLOCK_BYTES, Cipher, Provider
from p2pfl.crypto.suite import suite
from tests.crypto.cipher_tools import both_providers, expand, seal, unseal, vectors, xor


def unhex(entry: dict[str, Any], *names: str) -> list[bytes]:
    return [bytes.fromhex(entry[name]) for name in names]


def encrypted(provider: Provider, cipher: Cipher, entry: dict[str, Any]) -> bytes:
    """The plaintext of a counter mode entry, encrypted from its counter block with our stream, which starts at 0."""
    key, counter, plaintext = unhex(entry, "key", "iv", "plaintext")
    stream = expand(provider.keystream(cipher, key), int.from_bytes(counter, "big") * BLOCK_BYTES, len(plaintext))
    return xor(stream, plaintext)


@both_providers
@pytest.mark.parametrize("entry", vectors("aes_256_ctr.json"))
def test_aes_256_ctr(provider: Provider, entry: dict[str, Any]) -> None:
    assert encrypted(provider, Cipher.AES_256, entry).hex() == entry["ciphertext"]


@both_providers
@pytest.mark.parametrize("entry", vectors("sm4.json", "ctr"))
def test_sm4_ctr(provider: Provider, entry: dict[str, Any]) -> None:
    assert encrypted(provider, Cipher.SM4, entry).hex() == entry["ciphertext"]


@both_providers
@pytest.mark.parametrize("entry", vectors("sm4.json", "ecb"))
def test_sm4_block_by_block(provider: Provider, entry: dict[str, Any]) -> None:
    """A stream's block is the encryption of its number, so every block cipher vector is one of the stream."""
    key, plaintext = unhex(entry, "key", "plaintext")
    stream = provider.keystream(Cipher.SM4, key)
    blocks = [plaintext[at : at + BLOCK_BYTES] for at in range(0, len(plaintext), BLOCK_BYTES)]
    result = b"".join(expand(stream, int.from_bytes(block, "big") * BLOCK_BYTES, BLOCK_BYTES) for block in blocks)
    assert result.hex() == entry["ciphertext"]


@pytest.mark.slow
@both_providers
def test_sm4_a_million_times(provider: Provider) -> None:
    [entry] = vectors("sm4.json", "million")
    key, plaintext = unhex(entry, "key", "plaintext")
    stream = provider.keystream(Cipher.SM4, key)
    block = bytearray(plaintext)
    view = memoryview(block)
    for _ in range(1_000_000):
        stream.expand_into(int.from_bytes(block, "big") * BLOCK_BYTES, view)
    assert block.hex() == entry["ciphertext"]


def verify_gcm(provider: Provider, cipher: Cipher, entry: dict[str, Any]) -> None:
    key, nonce, associated, plaintext = unhex(entry, "key", "iv", "aad", "plaintext")
    aead = provider.aead(cipher, key)
    sealed = seal(aead, nonce, plaintext, associated)
    assert sealed.hex() == entry["ciphertext"] + entry["tag"]
    assert unseal(aead, nonce, sealed, associated) == plaintext


@both_providers
@pytest.mark.parametrize("entry", vectors("aes_256_gcm.json"))
def test_aes_256_gcm(provider: Provider, entry: dict[str, Any]) -> None:
    verify_gcm(provider, Cipher.AES_256, entry)


@both_providers
@pytest.mark.parametrize("entry", vectors("sm4.json", "gcm"))
def test_sm4_gcm(provider: Provider, entry: dict[str, Any]) -> None:
    verify_gcm(provider, Cipher.SM4, entry)


@both_providers
@pytest.mark.parametrize("entry", vectors("wycheproof_aes_256_gcm.json"), ids=lambda entry: entry["tcId"])
def test_wycheproof_aes_256_gcm(provider: Provider, entry: dict[str, Any]) -> None:
    key, nonce, associated, plaintext, ciphertext, tag = unhex(entry, "key", "iv", "aad", "msg", "ct", "tag")
    aead = provider.aead(Cipher.AES_256, key)
    if entry["result"] == "valid":
        assert seal(aead, nonce, plaintext, associated) == ciphertext + tag
        assert unseal(aead, nonce, ciphertext + tag, associated) == plaintext
        return
    out = bytearray(b"\xff" * len(ciphertext))
    with pytest.raises(BadTag):
        aead.open_into(nonce, ciphertext + tag, associated, memoryview(out))
    assert out == bytes(len(ciphertext))


@pytest.mark.parametrize("entry", vectors("sm3.json"))
def test_sm3(entry: dict[str, Any]) -> None:
    assert suite("sm4").hash(bytes.fromhex(entry["message"])).hex() == entry["digest"]


@pytest.mark.parametrize("entry", vectors("hkdf_sha256.json"))
def test_hkdf_sha256(entry: dict[str, Any]) -> None:
    secret, salt, info = unhex(entry, "ikm", "salt", "info")
    assert suite("aes").hkdf(secret, salt, info, entry["length"]).hex() == entry["okm"]


@pytest.mark.parametrize("entry", vectors("wycheproof_hkdf_sha256.json"), ids=lambda entry: entry["tcId"])
def test_wycheproof_hkdf_sha256(entry: dict[str, Any]) -> None:
    secret, salt, info = unhex(entry, "ikm", "salt", "info")
    if entry["result"] == "valid":
        assert suite("aes").hkdf(secret, salt, info, entry["size"]).hex() == entry["okm"]
        return
    with pytest.raises(ValueError, match=r"larger than|too large"):
        suite("aes").hkdf(secret, salt, info, entry["size"])


@pytest.mark.parametrize("entry", vectors("x25519.json"))
def test_x25519(entry: dict[str, Any]) -> None:
    assert X25519().shared_secret(*unhex(entry, "private", "public")).hex() == entry["shared"]


@pytest.mark.parametrize("entry", vectors("x25519.json", "iterated"), ids=lambda entry: entry["times"])
def test_x25519_iterated(entry: dict[str, Any]) -> None:
    private = public = (9).to_bytes(32, "little")
    for _ in range(entry["times"]):
        private, public = X25519().shared_secret(private, public), private
    assert private.hex() == entry["result"]


@pytest.mark.parametrize("entry", vectors("wycheproof_x25519.json"), ids=lambda entry: entry["tcId"])
def test_wycheproof_x25519(entry: dict[str, Any]) -> None:
    """Our policy on what is acceptable: zero secrets are refused, and all else that RFC 7748 defines is computed."""
    private, public = unhex(entry, "private", "public")
    if "ZeroSharedSecret" in entry["flags"]:
        with pytest.raises(Malformed, match="small order"):
            X25519().shared_secret(private, public)
    else:
        assert X25519().shared_secret(private, public).hex() == entry["shared"]
