"""The suites: what they are made of, which library serves them, and that no key is ever shown."""

import hmac
import io
import traceback
from types import SimpleNamespace

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.core.errors import BadTag, InvalidConfig
from p2pfl.crypto import suite as suite_module
from p2pfl.crypto.agreement import X25519
from p2pfl.crypto.providers import Provider, libgcrypt
from p2pfl.crypto.suite import NONCE_BYTES, SUITES, TAG_BYTES, Suite, available_providers, suite
from tests.crypto.cipher_tools import LIBGCRYPT, OPENSSL, both_providers, expand, seal, unseal
from tests.crypto.test_choice import Clock, Paced
from tests.crypto.test_providers import Altered

WITHOUT_EXTRA = ["aes", "sm4"]
short = st.binary(max_size=80)


@pytest.mark.parametrize(("name", "key_bytes"), [("aes", 32), ("sm4", 16)])
def test_a_suite_keeps_its_contract(name: str, key_bytes: int) -> None:
    chosen: Suite = suite(name)
    assert (chosen.name, chosen.key_bytes) == (name, key_bytes)
    assert isinstance(chosen.agreement, X25519)
    assert len(chosen.hash(memoryview(b"some bytes"))) == 32
    key = chosen.hkdf(b"secret", b"salt", b"info", key_bytes)
    assert len(key) == key_bytes
    assert unseal(chosen.aead(key), bytes(NONCE_BYTES), seal(chosen.aead(key), bytes(NONCE_BYTES), b"text")) == b"text"
    assert len(set(expand(chosen.keystream(key), 0, 4096))) > 200


def test_a_suite_is_made_once() -> None:
    assert suite("aes") is suite("aes")


@pytest.mark.parametrize("name", WITHOUT_EXTRA)
@both_providers
def test_every_library_makes_the_same_suite(name: str, provider: Provider) -> None:
    alone, default = suite(name, providers=[provider]), suite(name)
    key = bytes(range(alone.key_bytes))
    assert alone.aead_provider is alone.keystream_provider is provider
    assert expand(alone.keystream(key), 16, 1000) == expand(default.keystream(key), 16, 1000)
    assert seal(alone.aead(key), bytes(12), b"text", b"more") == seal(default.aead(key), bytes(12), b"text", b"more")


@pytest.mark.skipif(LIBGCRYPT is None, reason="libgcrypt is not installed on this machine")
def test_without_a_clock_the_library_serves_that_was_the_faster_on_our_machine() -> None:
    assert [provider.name for provider in available_providers()] == ["openssl", "libgcrypt"]
    served = {name: (suite(name).aead_provider.name, suite(name).keystream_provider.name) for name in WITHOUT_EXTRA}
    assert served == {"aes": ("openssl", "libgcrypt"), "sm4": ("libgcrypt", "libgcrypt")}


def test_the_library_that_a_clock_shows_to_be_faster_serves_and_is_measured_once() -> None:
    for order in (slice(None), slice(None, None, -1)):
        clock = Clock()
        slow, fast = Paced(clock, "libgcrypt", 0.003), Paced(clock, "openssl", 0.001)
        providers = [slow, fast][order]
        chosen = suite("sm4", providers=providers, clock=clock)
        assert suite("sm4", providers=providers, clock=clock) is chosen
        before = clock.seconds
        assert chosen.keystream_provider is fast
        measured = clock.seconds
        assert measured > before
        assert chosen.keystream_provider is fast
        assert clock.seconds == measured, "once for each primitive"
        assert chosen.aead_provider is fast
        assert clock.seconds > measured, "and only once it is used"
        key = bytes(16)
        assert expand(chosen.keystream(key), 0, 64) == expand(suite("sm4").keystream(key), 0, 64)
    assert suite("sm4", providers=[slow, fast]).aead_provider is slow, "without a clock"


def test_a_faster_library_that_gives_wrong_answers_is_not_measured() -> None:
    clock = Clock()
    wrong = Paced(clock, "libgcrypt", 0.0, alter_stream=lambda _, out: spoil(out), alter_sealed=spoil)
    chosen = suite("sm4", providers=[wrong, OPENSSL], clock=clock)
    assert chosen.aead_provider is chosen.keystream_provider is OPENSSL


def test_openssl_serves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libgcrypt, "load", lambda: None)
    [only] = available_providers.__wrapped__()
    assert only.name == "openssl"


def spoil(view: memoryview) -> None:
    view[0] ^= 1


def test_a_library_that_gives_wrong_answers_is_passed_over() -> None:
    wrong = Altered(alter_stream=lambda _, out: spoil(out), alter_sealed=spoil)
    wrong.name = "libgcrypt"
    chosen = suite("sm4", providers=[wrong, OPENSSL])
    assert chosen.aead_provider is chosen.keystream_provider is OPENSSL
    with pytest.raises(InvalidConfig, match="the suite sm4 needs SM4-GCM, which no library here gives correctly"):
        suite("sm4", providers=[wrong])
    half = Altered(alter_stream=lambda _, out: spoil(out))
    half.name = "libgcrypt"
    with pytest.raises(InvalidConfig, match="the suite aes needs AES-256-CTR"):
        suite("aes", providers=[half])


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="there is no suite 'rot13'; there are aes, sm4, gm"):
        suite("rot13")


def test_an_openssl_without_sm3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise UnsupportedAlgorithm("no")

    monkeypatch.setattr(suite_module, "hashes", SimpleNamespace(Hash=refuse))
    with pytest.raises(InvalidConfig, match="the suite sm4 needs SM3"):
        suite_module._suite.__wrapped__("sm4", (OPENSSL,), None)


def hmac_sm3(key: bytes, message: bytes) -> bytes:
    code = HMAC(key, hashes.SM3())
    code.update(message)
    return code.finalize()


def hmac_sm3_by_hand(key: bytes, message: bytes) -> bytes:
    """RFC 2104 with SM3's block of 64 bytes."""
    sm3 = suite("sm4").hash
    padded = (sm3(key) if len(key) > 64 else key).ljust(64, b"\0")
    inner = sm3(bytes(byte ^ 0x36 for byte in padded) + message)
    return sm3(bytes(byte ^ 0x5C for byte in padded) + inner)


@given(key=st.binary(max_size=100), message=st.binary(max_size=100))
def test_hmac_sm3_is_as_rfc_2104_defines_it(key: bytes, message: bytes) -> None:
    assert hmac.compare_digest(hmac_sm3(key, message), hmac_sm3_by_hand(key, message))


@given(
    secret=st.binary(max_size=80), salt=st.binary(max_size=80), info=st.binary(max_size=80), length=st.integers(1, 99)
)
def test_hkdf_sm3_is_as_rfc_5869_defines_it(secret: bytes, salt: bytes, info: bytes, length: int) -> None:
    pseudo_random_key = hmac_sm3_by_hand(salt, secret)
    blocks = [b""]
    for counter in range(1, 5):
        blocks.append(hmac_sm3_by_hand(pseudo_random_key, blocks[-1] + info + bytes([counter])))
    assert suite("sm4").hkdf(secret, salt, info, length) == b"".join(blocks)[:length]


@pytest.mark.parametrize("name", WITHOUT_EXTRA)
def test_hkdf_is_bounded(name: str) -> None:
    assert len(suite(name).hkdf(b"s", b"", b"", 255 * 32)) == 255 * 32
    with pytest.raises(ValueError, match=r"larger than|too large"):
        suite(name).hkdf(b"s", b"", b"", 255 * 32 + 1)


@pytest.mark.parametrize("name", WITHOUT_EXTRA)
@both_providers
def test_no_key_is_shown(name: str, provider: Provider) -> None:
    """Neither by a repr, nor by an error's text, nor by a traceback as it is printed."""
    chosen = suite(name, providers=[provider])
    key = bytes(range(0x41, 0x41 + chosen.key_bytes))
    aead, stream = chosen.aead(key), chosen.keystream(key)
    shown = [repr(chosen), repr(aead), repr(stream), str(aead), f"{SUITES}"]
    calls = (
        lambda: aead.open_into(bytes(12), bytes(20), b"", memoryview(bytearray(4))),
        lambda: aead.seal_into(bytes(11), b"", b"", memoryview(bytearray(TAG_BYTES))),
        lambda: stream.expand_into(3, memoryview(bytearray(16))),
        lambda: chosen.aead(key + b"!"),
        lambda: chosen.keystream(key[1:]),
        lambda: chosen.hkdf(key, b"", b"", 1 << 20),
        lambda: chosen.agreement.public_key(key + b"!"),
    )
    for call in calls:
        with pytest.raises((BadTag, ValueError)) as caught:
            call()
        text = io.StringIO()
        traceback.print_exception(caught.value, file=text)
        shown += [text.getvalue(), repr(caught.value.args)]
    for text_shown in shown:
        for secret in (key[:8].decode(), key[:8].hex(), repr(list(key[:8]))[1:-1], str(int.from_bytes(key, "big"))):
            assert secret not in text_shown
