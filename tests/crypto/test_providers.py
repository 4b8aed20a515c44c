"""The cipher libraries: that they agree with one another, keep the contract, and are found out when they do not."""

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.core.errors import BadTag
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
    openssl,
)
from p2pfl.crypto.providers.known_answers import is_right_aead, is_right_keystream
from tests.crypto.cipher_tools import LIBGCRYPT, OPENSSL, both_providers, expand, seal, unseal

ZEROS_AT_ONCE = 1 << 18
NONCE = bytes(range(NONCE_BYTES))
every_cipher = pytest.mark.parametrize("cipher", Cipher)
needs_libgcrypt = pytest.mark.skipif(LIBGCRYPT is None, reason="libgcrypt is not installed on this machine")

ciphers = st.sampled_from(Cipher)
seeds = st.binary(min_size=32, max_size=32)
messages = st.binary(max_size=700)


def key_of(cipher: Cipher, seed: bytes = bytes(range(32))) -> bytes:
    return seed[: cipher.key_bytes]


@needs_libgcrypt
@given(cipher=ciphers, seed=seeds, nonce=st.binary(min_size=12, max_size=12), plaintext=messages, associated=messages)
def test_both_libraries_seal_alike(
    cipher: Cipher, seed: bytes, nonce: bytes, plaintext: bytes, associated: bytes
) -> None:
    assert LIBGCRYPT is not None
    one, other = (library.aead(cipher, key_of(cipher, seed)) for library in (OPENSSL, LIBGCRYPT))
    sealed = seal(one, nonce, plaintext, associated)
    assert seal(other, nonce, plaintext, associated) == sealed
    assert unseal(one, nonce, sealed, associated) == unseal(other, nonce, sealed, associated) == plaintext


@needs_libgcrypt
@given(cipher=ciphers, seed=seeds, block=st.integers(0, 2**128 - 64), length=st.integers(0, 1000))
def test_both_libraries_expand_alike(cipher: Cipher, seed: bytes, block: int, length: int) -> None:
    assert LIBGCRYPT is not None
    one, other = (library.keystream(cipher, key_of(cipher, seed)) for library in (OPENSSL, LIBGCRYPT))
    assert expand(one, block * BLOCK_BYTES, length) == expand(other, block * BLOCK_BYTES, length)


@needs_libgcrypt
@every_cipher
@pytest.mark.parametrize("length", [ZEROS_AT_ONCE - 16, ZEROS_AT_ONCE, ZEROS_AT_ONCE + 5, 2 * ZEROS_AT_ONCE + 16])
def test_both_libraries_agree_on_what_takes_several_calls(cipher: Cipher, length: int) -> None:
    assert LIBGCRYPT is not None
    one, other = (library.keystream(cipher, key_of(cipher)) for library in (OPENSSL, LIBGCRYPT))
    assert expand(one, 48, length) == expand(other, 48, length)
    plaintext = expand(one, 0, length)
    assert seal(OPENSSL.aead(cipher, key_of(cipher)), NONCE, plaintext) == seal(
        LIBGCRYPT.aead(cipher, key_of(cipher)), NONCE, plaintext
    )


@both_providers
@every_cipher
@pytest.mark.parametrize("power", [8, 16, 32, 64, 96])
def test_the_counter_carries_over_all_its_bits(provider: Provider, cipher: Cipher, power: int) -> None:
    stream = provider.keystream(cipher, key_of(cipher))
    start = (2**power - 40) * BLOCK_BYTES
    single = b"".join(expand(stream, start + at, BLOCK_BYTES) for at in range(0, 80 * BLOCK_BYTES, BLOCK_BYTES))
    assert expand(stream, start, 80 * BLOCK_BYTES) == single


@both_providers
@given(cipher=ciphers, cuts=st.lists(st.integers(0, 130), max_size=6), tail=st.integers(0, 15))
def test_a_stream_is_the_same_however_it_is_read(
    provider: Provider, cipher: Cipher, cuts: list[int], tail: int
) -> None:
    length = 130 * BLOCK_BYTES + tail
    whole = expand(provider.keystream(cipher, key_of(cipher)), 0, length)
    bounds = [0, *(cut * BLOCK_BYTES for cut in sorted(cuts)), length]
    stream = provider.keystream(cipher, key_of(cipher))
    in_order = [expand(stream, start, stop - start) for start, stop in pairwise(bounds)]
    backwards = [expand(stream, start, stop - start) for start, stop in reversed(list(pairwise(bounds)))]
    assert b"".join(in_order) == b"".join(reversed(backwards)) == whole


@both_providers
@every_cipher
def test_a_read_that_ends_inside_a_block_leaves_the_stream_readable(provider: Provider, cipher: Cipher) -> None:
    stream = provider.keystream(cipher, key_of(cipher))
    whole = expand(stream, 0, 64)
    assert expand(stream, 0, 21) == whole[:21]
    with pytest.raises(ValueError, match="multiple of 16, not from 21"):
        expand(stream, 21, 3)
    assert expand(stream, 32, 32) == whole[32:]


@both_providers
@every_cipher
@pytest.mark.parametrize("offset", [-16, 8, 17])
def test_a_stream_is_read_from_its_blocks_only(provider: Provider, cipher: Cipher, offset: int) -> None:
    with pytest.raises(ValueError, match="keystream is read from a multiple of 16"):
        expand(provider.keystream(cipher, key_of(cipher)), offset, 16)


@both_providers
@every_cipher
def test_streams_fill_arrays_of_words(provider: Provider, cipher: Cipher) -> None:
    stream = provider.keystream(cipher, key_of(cipher))
    words = np.zeros(100, "<u4")
    stream.expand_into(16, words.data)
    assert words.tobytes() == expand(stream, 16, 400)
    stream.expand_into(16, words[:0].data)
    stream.expand_into(16, words[:4].data)
    assert words[:4].tobytes() == expand(stream, 16, 16)


@both_providers
@every_cipher
def test_a_read_that_fails_leaves_the_stream_right(provider: Provider, cipher: Cipher) -> None:
    stream = provider.keystream(cipher, key_of(cipher))
    whole = expand(stream, 0, 64)
    expand(stream, 0, 16)
    with pytest.raises((TypeError, ValueError, BufferError)):
        stream.expand_into(16, memoryview(bytes(16)))
    assert expand(stream, 16, 48) == whole[16:]


@both_providers
@every_cipher
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))[:]])
def test_every_kind_of_buffer_is_sealed_and_opened(
    provider: Provider, cipher: Cipher, kind: Callable[[bytes], Buffer]
) -> None:
    aead = provider.aead(cipher, key_of(cipher))
    plaintext = bytes(range(100))
    sealed = bytearray(len(plaintext) + TAG_BYTES + 8)
    aead.seal_into(NONCE, kind(plaintext), b"header", memoryview(sealed)[8:])
    assert sealed[:8] == bytes(8)
    assert bytes(sealed[8:]) == seal(aead, NONCE, plaintext, b"header")
    out = np.zeros(len(plaintext), np.uint8)
    aead.open_into(NONCE, kind(bytes(sealed[8:])), b"header", out.data)
    assert out.tobytes() == plaintext


@both_providers
@given(
    cipher=ciphers,
    plaintext=st.binary(min_size=0, max_size=100),
    associated=st.binary(max_size=20),
    where=st.integers(0, 1 << 30),
    bit=st.integers(0, 7),
)
def test_one_changed_bit_is_refused_and_nothing_is_released(
    provider: Provider, cipher: Cipher, plaintext: bytes, associated: bytes, where: int, bit: int
) -> None:
    aead = provider.aead(cipher, key_of(cipher))
    # Nonce, associated data and sealed bytes in one, so that any of them may change.
    whole = bytearray(NONCE + associated + seal(aead, NONCE, plaintext, associated))
    whole[where % len(whole)] ^= 1 << bit
    ends = NONCE_BYTES, NONCE_BYTES + len(associated)
    out = bytearray(b"\xaa" * len(plaintext))
    with pytest.raises(BadTag, match="does not open"):
        aead.open_into(
            bytes(whole[: ends[0]]), bytes(whole[ends[1] :]), bytes(whole[ends[0] : ends[1]]), memoryview(out)
        )
    assert out == bytes(len(plaintext))
    assert unseal(aead, NONCE, seal(aead, NONCE, plaintext, associated), associated) == plaintext


@both_providers
@every_cipher
@pytest.mark.parametrize("length", [0, 1, 15])
def test_what_is_shorter_than_a_tag_is_refused(provider: Provider, cipher: Cipher, length: int) -> None:
    with pytest.raises(BadTag, match=f"{length} bytes, shorter than its tag"):
        unseal(provider.aead(cipher, key_of(cipher)), NONCE, bytes(length))


@both_providers
@every_cipher
def test_wrong_lengths_are_the_callers_fault(provider: Provider, cipher: Cipher) -> None:
    aead = provider.aead(cipher, key_of(cipher))
    with pytest.raises(ValueError, match="a nonce has 12 bytes, not 13"):
        seal(aead, bytes(13), b"")
    with pytest.raises(ValueError, match="a nonce has 12 bytes, not 0"):
        unseal(aead, b"", bytes(16))
    with pytest.raises(ValueError, match="3 bytes seal into 19, not 18"):
        aead.seal_into(NONCE, b"abc", b"", memoryview(bytearray(18)))
    with pytest.raises(ValueError, match="19 bytes open into 3, not 4"):
        aead.open_into(NONCE, bytes(19), b"", memoryview(bytearray(4)))
    for make in (provider.aead, provider.keystream):
        with pytest.raises(ValueError, match=f"{cipher} takes a key of {cipher.key_bytes} bytes, not 24"):
            make(cipher, bytes(24))


@both_providers
@every_cipher
def test_streams_of_different_keys_run_in_threads(provider: Provider, cipher: Cipher) -> None:
    keys = [bytes([number]) * cipher.key_bytes for number in range(8)]

    def run(key: bytes) -> bytes:
        return expand(provider.keystream(cipher, key), 0, 100_000)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, keys)) == [run(key) for key in keys]


@both_providers
def test_versions_are_numbers(provider: Provider) -> None:
    assert provider.version.replace(".", "").isdigit()


@both_providers
@every_cipher
def test_the_libraries_here_give_the_known_answers(provider: Provider, cipher: Cipher) -> None:
    assert is_right_aead(provider, cipher)
    assert is_right_keystream(provider, cipher)


class Altered:
    """OpenSSL, except for what a test puts in its place."""

    name = "altered"
    version = "0"

    def __init__(
        self,
        alter_stream: Callable[[int, memoryview], None] | None = None,
        alter_sealed: Callable[[memoryview], None] | None = None,
        opens: bool | None = None,
    ) -> None:
        self._alter_stream, self._alter_sealed, self._opens = alter_stream, alter_sealed, opens

    def aead(self, cipher: Cipher, key: bytes) -> Aead:
        inner = OPENSSL.aead(cipher, key)

        def seal_into(nonce: bytes, plaintext: Buffer, associated: bytes, out: memoryview) -> None:
            inner.seal_into(nonce, plaintext, associated, out)
            if self._alter_sealed is not None:
                self._alter_sealed(out)

        def open_into(nonce: bytes, ciphertext: Buffer, associated: bytes, out: memoryview) -> None:
            if self._opens is False:
                raise BadTag("refused")
            try:
                inner.open_into(nonce, ciphertext, associated, out)
            except BadTag:
                if not self._opens:
                    raise

        return SimpleNamespace(seal_into=seal_into, open_into=open_into)

    def keystream(self, cipher: Cipher, key: bytes) -> Keystream:
        inner = OPENSSL.keystream(cipher, key)

        def expand_into(offset: int, out: memoryview) -> None:
            inner.expand_into(offset, out)
            if self._alter_stream is not None:
                self._alter_stream(offset, out)

        return SimpleNamespace(expand_into=expand_into)


def flip_last(view: memoryview, least: int) -> None:
    if len(view) >= least:
        view[-1] ^= 1


@every_cipher
def test_a_library_with_a_wrong_stream_is_found_out(cipher: Cipher) -> None:
    assert is_right_keystream(Altered(), cipher)
    assert not is_right_keystream(Altered(alter_stream=lambda _, out: flip_last(out, 1)), cipher)
    # Right for few blocks, wrong for many at once.
    assert not is_right_keystream(Altered(alter_stream=lambda _, out: flip_last(out, 1024)), cipher)


@every_cipher
def test_a_library_with_wrong_seals_is_found_out(cipher: Cipher) -> None:
    assert is_right_aead(Altered(), cipher)
    assert not is_right_aead(Altered(alter_sealed=lambda out: flip_last(out, 1)), cipher)
    assert not is_right_aead(Altered(alter_sealed=lambda out: flip_last(out, 1024)), cipher)
    assert not is_right_aead(Altered(opens=False), cipher)
    assert not is_right_aead(Altered(opens=True), cipher)


def test_an_openssl_without_sm4_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedAlgorithm("no")

    monkeypatch.setattr(openssl, "Construction", lambda *_: SimpleNamespace(encryptor=refuse))
    with pytest.raises(LookupError, match="this OpenSSL has no SM4-GCM"):
        OPENSSL.aead(Cipher.SM4, bytes(16))
    with pytest.raises(LookupError, match="this OpenSSL has no SM4-CTR"):
        OPENSSL.keystream(Cipher.SM4, bytes(16))
    assert not is_right_aead(OPENSSL, Cipher.SM4)
    assert not is_right_keystream(OPENSSL, Cipher.SM4)


@needs_libgcrypt
def test_a_libgcrypt_without_a_cipher_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before version 1.9, or in FIPS mode."""
    assert LIBGCRYPT is not None
    monkeypatch.setitem(libgcrypt._ALGORITHMS, Cipher.SM4, 9999)
    with pytest.raises(LookupError, match="this libgcrypt has no SM4"):
        LIBGCRYPT.keystream(Cipher.SM4, bytes(16))
    assert not is_right_aead(LIBGCRYPT, Cipher.SM4)
    assert is_right_aead(LIBGCRYPT, Cipher.AES_256)
    gc.collect()  # a context that was never opened is not closed: it would end the process


@needs_libgcrypt
def test_a_failing_call_is_no_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBGCRYPT is not None
    monkeypatch.setattr(LIBGCRYPT._library, "gcry_cipher_encrypt", lambda *_: (1 << 24) | 5)
    with pytest.raises(RuntimeError, match="libgcrypt failed with error 5"):
        expand(LIBGCRYPT.keystream(Cipher.SM4, bytes(16)), 0, 16)
    monkeypatch.setattr(LIBGCRYPT._library, "gcry_cipher_checktag", lambda *_: (1 << 24) | 6)
    out = bytearray(b"\xaa" * 4)
    with pytest.raises(RuntimeError, match="libgcrypt failed with error 6"):
        LIBGCRYPT.aead(Cipher.SM4, bytes(16)).open_into(NONCE, bytes(20), b"", memoryview(out))
    assert out == bytes(4)


@needs_libgcrypt
def test_every_context_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing is what wipes the key."""
    assert LIBGCRYPT is not None
    closed: list[object] = []
    close = LIBGCRYPT._library.gcry_cipher_close

    def counted(handle: ctypes.c_void_p) -> None:
        closed.append(handle.value)
        close(handle)

    monkeypatch.setattr(LIBGCRYPT._library, "gcry_cipher_close", counted)
    aead, stream = LIBGCRYPT.aead(Cipher.SM4, bytes(16)), LIBGCRYPT.keystream(Cipher.SM4, bytes(16))
    assert not closed
    del aead, stream
    gc.collect()
    assert len(set(closed)) == len(closed) == 2


class Failing:
    """A part of a library whose second call to one function fails."""

    def __init__(self, inner: object, function: str) -> None:
        self._inner, self._function, self._calls = inner, function, 0

    def __getattr__(self, name: str) -> object:
        if name == self._function:
            self._calls += 1
            if self._calls == 2:
                raise MemoryError
        return getattr(self._inner, name)


@both_providers
@every_cipher
def test_a_read_that_fails_half_way_leaves_the_stream_right(provider: Provider, cipher: Cipher) -> None:
    whole = expand(provider.keystream(cipher, key_of(cipher)), 0, 2 * ZEROS_AT_ONCE)
    stream: Any = provider.keystream(cipher, key_of(cipher))
    expand(stream, 0, 16)
    if provider.name == "openssl":
        stream._context = Failing(stream._context, "update_into")
    else:
        stream._context.library = Failing(stream._context.library, "gcry_cipher_encrypt")
    with pytest.raises(MemoryError):
        expand(stream, 16, 2 * ZEROS_AT_ONCE - 16)
    assert expand(stream, 16, 2 * ZEROS_AT_ONCE - 16) == whole[16:]


def test_libgcrypt_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libgcrypt, "_LIBRARY_NAMES", ("libgcrypt.so.0",))
    assert libgcrypt.load.__wrapped__() is None


def test_another_library_under_its_name_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert libgcrypt.load.__wrapped__() is None
