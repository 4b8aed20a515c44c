"""SM2 against the standard's examples and against gmalg, another implementation."""

import base64
import importlib
import subprocess
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import BadSignature, InvalidConfig, Malformed
from p2pfl.crypto import sm2
from p2pfl.crypto.identity import Identity
from p2pfl.crypto.sm2 import (
    PUBLIC_BYTES,
    SIGNATURE_BYTES,
    Side,
    Sm2Agreement,
    Sm2SigningKey,
    exchange,
    kdf,
    private_scalar,
    public_point,
    user_digest,
    verify_bare_signature,
    verify_point,
    verify_sm2_signature,
)
from p2pfl.crypto.suite import Suite, suite
from tests.crypto.cipher_tools import expand, seal, unseal, vectors

EXTRA = "SM2 needs fastecdsa and gmssl-pyx, the extra `gm`, which are not installed"
pytest.importorskip("fastecdsa", reason=EXTRA)
pytest.importorskip("gmssl_pyx", reason=EXTRA)

entropies = st.binary(min_size=32, max_size=32)
[EXCHANGE] = vectors("sm2.json", "exchange")
[SIGNATURE] = vectors("sm2.json", "signature")
GROUP = Sm2Agreement()
PRIME = 0xFFFFFFFE_FFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFF_00000000_FFFFFFFF_FFFFFFFF
ORDER = 0xFFFFFFFE_FFFFFFFF_FFFFFFFF_FFFFFFFF_7203DF6B_21C6052B_53BBF409_39D54123


def number(name: str) -> int:
    return int(EXCHANGE[name], 16)


def data(name: str) -> bytes:
    return bytes.fromhex(EXCHANGE[name])


def test_the_standards_exchange() -> None:
    for side in "ab":
        assert public_point(number(f"static_private_{side}")) == data(f"static_public_{side}")
        assert user_digest(data(f"static_public_{side}"), data(f"user_id_{side}")) == data(f"digest_{side}")
    assert public_point(number("ephemeral_private_b")) == data("ephemeral_public_b")
    a, b = (
        Side(data(f"static_public_{side}"), public_point(number(f"ephemeral_private_{side}")), data(f"user_id_{side}"))
        for side in "ab"
    )
    for side, is_initiator in (("a", True), ("b", False)):
        private = number(f"static_private_{side}"), number(f"ephemeral_private_{side}")
        assert exchange(*private, a, b, is_initiator, 16) == data("key")


def test_the_standards_signature() -> None:
    public, message, user_id, signature = (
        bytes.fromhex(SIGNATURE[name]) for name in ("public", "message", "user_id", "signature")
    )
    assert public_point(int(SIGNATURE["private"], 16)) == public
    assert user_digest(public, user_id).hex() == SIGNATURE["digest"]
    verify_bare_signature(public, message, signature, user_id)
    for wrong in ((message + b"!", user_id), (message, user_id[:-1])):
        with pytest.raises(BadSignature, match="does not verify"):
            verify_bare_signature(public, wrong[0], signature, wrong[1])


@settings(max_examples=15)
@given(one=entropies, other=entropies)
def test_both_sides_agree(one: bytes, other: bytes) -> None:
    public_one, public_other = GROUP.public_key(one), GROUP.public_key(other)
    assert len(public_one) == GROUP.public_bytes == PUBLIC_BYTES
    secret = GROUP.shared_secret(one, public_other)
    assert len(secret) == 32
    assert secret == GROUP.shared_secret(other, public_one)


def joined(parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(part.rjust(32, b"\0") for part in parts)


def oracle(scalar: int, nonce: int | None = None) -> Any:
    """Another implementation's key, with every random number it draws the one given."""
    gmalg = pytest.importorskip("gmalg", reason="gmalg, the oracle for SM2, is not installed")
    draw = None if nonce is None else lambda _: nonce
    return gmalg.SM2(scalar.to_bytes(32, "big"), sm2.USER_ID, public_point(scalar), rnd_fn=draw)


@settings(max_examples=4, deadline=None)
@given(one=entropies, other=entropies)
def test_the_agreement_is_the_exchange_as_another_implementation_has_it(one: bytes, other: bytes) -> None:
    ours, theirs = private_scalar(one), private_scalar(other)
    library = oracle(ours, nonce=ours)
    ephemeral, t = library.begin_key_exchange()
    public, their_public = GROUP.public_key(one), GROUP.public_key(other)
    assert ephemeral == public
    modes = importlib.import_module("gmalg").KEYXCHG_MODE
    mode = modes.INITIATOR if public <= their_public else modes.RESPONDER
    expected = library.end_key_exchange(32, t, their_public, sm2.USER_ID, public_point(theirs), mode)
    assert GROUP.shared_secret(one, their_public) == expected


@settings(max_examples=4, deadline=None)
@given(entropy=entropies, message=st.binary(max_size=50))
def test_signatures_are_those_of_another_implementation(entropy: bytes, message: bytes) -> None:
    key, library = Sm2SigningKey(entropy), oracle(private_scalar(entropy))
    verify_bare_signature(key.public, message, joined(library.sign(message)))
    signature = key.sign("p2pfl/test/1", message)
    assert library.verify(canonical(["p2pfl/test/1", message]), signature[:32], signature[32:])


def test_the_nonce_of_the_standards_signature_gives_it_in_another_implementation() -> None:
    library = oracle(
        int(SIGNATURE["private"], 16), nonce=int("59276E27D506861A16680F3AD9C02DCCEF3CC1FA3CDBE4CE6D54B80DEAC1BC21", 16)
    )
    assert b"".join(library.sign(bytes.fromhex(SIGNATURE["message"]))).hex() == SIGNATURE["signature"]


@given(entropy=entropies)
def test_private_keys_are_in_their_range(entropy: bytes) -> None:
    assert 1 <= private_scalar(entropy) <= ORDER - 2


@pytest.mark.parametrize("length", [0, 31, 33])
def test_entropy_of_another_length_is_refused(length: int) -> None:
    for make in (private_scalar, GROUP.public_key, Sm2SigningKey):
        with pytest.raises(ValueError, match=f"an SM2 key is made from 32 bytes, not {length}"):
            make(bytes(length))


def altered(public: bytes, change: str) -> bytes:
    x, y = public[1:33], public[33:]
    # The point's x plus p, where that still fits 32 bytes: the same point in another encoding.
    small = next(value for value in range(1, 50) if pow(value**3 - 3 * value + sm2._B, (PRIME - 1) // 2, PRIME) == 1)
    small_y = pow(small**3 - 3 * small + sm2._B, (PRIME + 1) // 4, PRIME).to_bytes(32, "big")
    return {
        "empty": b"",
        "infinity": b"\0",
        "compressed": bytes([2 + (y[-1] & 1)]) + x,
        "without its prefix": x + y,
        "hybrid": bytes([6 + (y[-1] & 1)]) + x + y,
        "too long": public + b"\0",
        "zeros": b"\4" + bytes(64),
        "off the curve": public[:-1] + bytes([public[-1] ^ 1]),
        "x from p on": b"\4" + (small + PRIME).to_bytes(32, "big") + small_y,
        "all ones": b"\4" + b"\xff" * 64,
    }[change]


@pytest.mark.parametrize(
    "change",
    [
        "empty",
        "infinity",
        "compressed",
        "without its prefix",
        "hybrid",
        "too long",
        "zeros",
        "off the curve",
        "x from p on",
        "all ones",
    ],
)
def test_what_is_no_uncompressed_point_is_refused(change: str) -> None:
    wrong = altered(GROUP.public_key(bytes(32)), change)
    for use in (
        verify_point,
        lambda public: GROUP.shared_secret(bytes(32), public),
        lambda public: verify_sm2_signature(public, "p2pfl/test/1", b"", bytes(SIGNATURE_BYTES)),
    ):
        with pytest.raises(Malformed, match="an SM2 key that is"):
            use(wrong)


def test_keys_that_lead_to_infinity_are_refused() -> None:
    """A peer that knows r may choose P = -[x]R."""
    r = 12345
    ephemeral = public_point(r)
    factor = (1 << 127) + (int.from_bytes(ephemeral[1:33], "big") & ((1 << 127) - 1))
    wrong = Side(public_point(-factor * r % ORDER), ephemeral)
    ours = Side(public_point(2), public_point(3))
    with pytest.raises(Malformed, match="ends at infinity"):
        exchange(2, 3, ours, wrong, True, 32)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 65])
def test_the_derivation_function_gives_any_length(length: int) -> None:
    assert kdf(b"Z", length) == kdf(b"Z", 96)[:length]
    library = pytest.importorskip("gmssl_pyx")
    assert not length or kdf(b"Z", length) == library.sm3_kdf(b"Z", length)


def test_a_signature_is_for_one_key_purpose_and_message() -> None:
    key, other = Sm2SigningKey(bytes(32)), Sm2SigningKey(b"o" * 32)
    signature = key.sign("p2pfl/test/1", b"message")
    assert len(signature) == SIGNATURE_BYTES
    verify_sm2_signature(key.public, "p2pfl/test/1", b"message", signature)
    for arguments in (
        (other.public, "p2pfl/test/1", b"message", signature),
        (key.public, "p2pfl/test/2", b"message", signature),
        (key.public, "p2pfl/test/1", b"messages", signature),
        (key.public, "p2pfl/test/1", b"message", signature[32:] + signature[:32]),
    ):
        with pytest.raises(BadSignature, match="does not verify"):
            verify_sm2_signature(*arguments)


@pytest.mark.parametrize(
    "signature", [b"", bytes(64), b"\xff" * 64, bytes(31) + b"\1" + ORDER.to_bytes(32, "big"), bytes(63), b"\1" * 65]
)
def test_what_is_no_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(BadSignature, match="not two numbers below the order"):
        verify_sm2_signature(Sm2SigningKey(bytes(32)).public, "p2pfl/test/1", b"", signature)


def test_signatures_verify_in_the_library_that_made_them_too() -> None:
    """Ours are verified by other code than makes them."""
    key = Sm2SigningKey(bytes(32))
    signature = key.sign("p2pfl/test/1", b"message")
    der = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    library = importlib.import_module("gmssl_pyx")
    assert library.sm2_verify(key.public[1:], canonical(["p2pfl/test/1", b"message"]), der, sm2.USER_ID)


def test_a_signature_that_does_not_verify_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    key = Sm2SigningKey(bytes(32))
    with pytest.raises(BadSignature):
        verify_sm2_signature(key.public, "p2pfl/test/1", b"other", key.sign("p2pfl/test/1", b"message"))
    with pytest.raises(BadSignature):
        verify_sm2_signature(key.public, "p2pfl/test/1", b"", b"\1" * 64)
    assert capfd.readouterr() == ("", "")


def with_hash(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    """Have every hash be this number: no message leads to what the tests below look at."""
    monkeypatch.setattr(sm2, "_sm3", lambda _: (value % ORDER).to_bytes(32, "big"))


def encoded(r: int, s: int) -> bytes:
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def test_a_sum_that_ends_at_infinity_is_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the private key d may choose s = -t d."""
    d, t = 7, 12345
    s = -t * d % ORDER
    r = (t - s) % ORDER
    with_hash(monkeypatch, r)  # so that r = e + x with the x of 0 that infinity has in the library
    with pytest.raises(BadSignature, match="does not verify"):
        verify_bare_signature(public_point(d), b"", encoded(r, s))


def test_numbers_whose_sum_is_zero_are_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would verify under every key."""
    s = 12345
    r = ORDER - s
    with_hash(monkeypatch, r - int.from_bytes(public_point(s)[1:33], "big"))
    with pytest.raises(BadSignature, match="does not verify"):
        verify_bare_signature(public_point(7), b"", encoded(r, s))


def test_the_two_halves_of_the_sum_may_be_one_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """As [s]G = [t]P, where the hash is such that the signature is right."""
    d, t = 7, 12345
    s = t * d % ORDER
    r = (t - s) % ORDER
    with_hash(monkeypatch, r - int.from_bytes(public_point(2 * s % ORDER)[1:33], "big"))
    verify_bare_signature(public_point(d), b"", encoded(r, s))


# The key's file


@given(entropy=entropies)
@settings(max_examples=10, deadline=None)
def test_pem_gives_the_same_key_again(entropy: bytes) -> None:
    key = Sm2SigningKey(entropy)
    for again in (Sm2SigningKey.from_pem(key.to_pem(), "x.pem"), Sm2SigningKey.from_private(key.private())):
        assert (again.private(), again.public) == (key.private(), key.public)


def test_openssl_reads_our_pem_and_writes_the_same() -> None:
    key = Sm2SigningKey(bytes(32))
    openssl = ["openssl", "pkey"]
    written = subprocess.run(openssl, input=key.to_pem(), capture_output=True, check=True)
    assert written.stdout == key.to_pem()
    shown = subprocess.run([*openssl, "-noout", "-text"], input=key.to_pem(), capture_output=True, check=True)
    digits = "".join(shown.stdout.decode().lower().replace(":", "").split())
    assert key.private().hex() in digits
    assert key.public.hex() in digits
    assert "sm2" in digits


def rearmored(der: bytes) -> bytes:
    return b"-----BEGIN PRIVATE KEY-----\n" + base64.encodebytes(der) + b"-----END PRIVATE KEY-----\n"


def test_what_is_no_pem_of_an_sm2_key_is_refused() -> None:
    key, other = Sm2SigningKey(bytes(32)), Sm2SigningKey(b"o" * 32)
    der = base64.b64decode(b"".join(key.to_pem().splitlines()[1:-1]))
    assert Sm2SigningKey.from_pem(rearmored(der), "x").public == key.public
    wrong = [
        b"",
        b"hello",
        der,
        key.private(),
        key.to_pem()[:80],
        Identity(bytes(32)).to_pem(),
        rearmored(der[:-1]),
        rearmored(der + b"\0"),
        rearmored(der[:-65] + other.public),
        rearmored(der.replace(key.private(), bytes(32))),
        rearmored(der.replace(key.private(), b"\xff" * 32)),
        rearmored(der.replace(bytes.fromhex("822d"), bytes.fromhex("822e"))),
        key.to_pem().replace(b"-----\n", b"-----\n!", 1),
    ]
    for pem in wrong:
        with pytest.raises(InvalidConfig, match=r"^a/x\.pem: not an .*SM2; restore it from your backup$") as raised:
            Sm2SigningKey.from_pem(pem, "a/x.pem")
        assert key.private().hex() not in str(raised.value)


@pytest.mark.parametrize(
    "private", [b"", bytes(32), b"\xff" * 32, (ORDER - 1).to_bytes(32, "big"), b"\1" * 31, b"\1" * 33]
)
def test_a_number_out_of_range_is_no_private_key(private: bytes) -> None:
    with pytest.raises(ValueError, match="between 1 and n - 2"):
        Sm2SigningKey.from_private(private)


def test_no_key_is_shown() -> None:
    key = Sm2SigningKey(b"S" * 32)
    assert repr(key) == f"Sm2SigningKey({key.public.hex()})"
    scalar = private_scalar(b"S" * 32)
    for secret in ("S" * 32, f"{scalar:x}", str(scalar)):
        assert secret not in repr(key)
        assert secret not in repr(GROUP)


def test_the_suite() -> None:
    chosen: Suite = suite("gm")
    assert (chosen.name, chosen.key_bytes, chosen.agreement.public_bytes) == ("gm", 16, 65)
    assert chosen.hash(b"abc") == suite("sm4").hash(b"abc")
    assert unseal(chosen.aead(bytes(16)), bytes(12), seal(chosen.aead(bytes(16)), bytes(12), b"text")) == b"text"
    assert expand(chosen.keystream(bytes(16)), 0, 64) == expand(suite("sm4").keystream(bytes(16)), 0, 64)


@pytest.mark.parametrize("missing", ["fastecdsa.curve", "gmssl_pyx"])
def test_without_the_extra_the_user_is_told_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        if name == missing:
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(sm2, "import_module", absent)
    message = rf"SM2 needs {missing.split('.', maxsplit=1)[0]}, which is not installed: pip install 'p2pfl-mesh\[gm\]'"
    for ask in (lambda: suite("gm", providers=[]), lambda: Sm2SigningKey(bytes(32)), sm2.verify_installed):
        with pytest.raises(InvalidConfig, match=message):
            ask()
