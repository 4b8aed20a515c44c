"""Keys under a passphrase."""

import base64

import pytest
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.identity import Identity
from p2pfl.crypto.keyfile import (
    ENTROPY_BYTES,
    LABEL,
    is_sealed,
    open_identity,
    open_sm2_key,
    seal_identity,
    seal_sm2_key,
)
from p2pfl.crypto.sm2 import Sm2SigningKey

IDENTITY = Identity(bytes(range(32)))
ENTROPY = bytes(range(100, 100 + ENTROPY_BYTES))
PASSPHRASE = "correct horse, größer battery".encode()
QUICK = 4
"""A cost for tests of everything but the cost."""


def sealed(log2_cost: int = QUICK) -> bytes:
    return seal_identity(IDENTITY, PASSPHRASE, ENTROPY, log2_cost)


def rewritten(change: dict[int, int]) -> bytes:
    """The sealed key with bytes of its content exchanged."""
    lines = sealed().splitlines()
    content = bytearray(base64.b64decode(b"".join(lines[1:-1])))
    for place, value in change.items():
        content[place] = value
    return b"\n".join([lines[0], base64.b64encode(content), lines[-1]])


def test_scrypt_is_that_of_rfc_7914() -> None:
    """RFC 7914, section 12, third vector."""
    derived = Scrypt(salt=b"SodiumChloride", length=64, n=16384, r=8, p=1).derive(b"pleaseletmein")
    assert derived.hex() == (
        "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"
    )


def test_a_sealed_key_comes_back_with_its_passphrase() -> None:
    pem = seal_identity(IDENTITY, PASSPHRASE, ENTROPY)
    assert is_sealed(pem)
    assert not is_sealed(IDENTITY.to_pem())
    assert open_identity(pem, PASSPHRASE, "key").seed() == IDENTITY.seed()
    assert IDENTITY.seed() not in base64.b64decode(b"".join(pem.splitlines()[1:-1]))


@pytest.mark.parametrize("passphrase", [b"", b"wrong", PASSPHRASE + b"\n", PASSPHRASE[:-1]])
def test_another_passphrase_is_told_in_one_line_without_itself(passphrase: bytes) -> None:
    with pytest.raises(InvalidConfig) as raised:
        open_identity(sealed(), passphrase, "bank-a/identity.pem")
    assert str(raised.value) == "bank-a/identity.pem: the passphrase is wrong, or the file is damaged"


@pytest.mark.parametrize("place", [2, 17, 18, 29, 30, 61, 77])
def test_a_changed_byte_is_noticed(place: int) -> None:
    with pytest.raises(InvalidConfig, match="damaged"):
        open_identity(rewritten({place: 0xEE}), PASSPHRASE, "key")


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"-----BEGIN " + LABEL + b"-----",
        sealed()[:-40],
        sealed().replace(b"-----\n", b"-----\n!", 1),
        rewritten({0: 2}),
        rewritten({1: 0}),
        rewritten({1: 21}),
        rewritten({1: 255}),
    ],
)
def test_what_is_no_key_file_is_refused_before_any_work(pem: bytes) -> None:
    with pytest.raises(InvalidConfig, match="key file of"):
        open_identity(pem, PASSPHRASE, "key")


def test_an_empty_passphrase_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="empty passphrase"):
        seal_identity(IDENTITY, b"", ENTROPY)


def test_an_sm2_key_comes_back_with_its_passphrase_and_neither_key_passes_for_the_other() -> None:
    pytest.importorskip("gmssl_pyx", reason="the extra [gm] is not installed", exc_type=ImportError)
    key = Sm2SigningKey(bytes(range(32)))
    pem = seal_sm2_key(key, PASSPHRASE, ENTROPY, QUICK)
    assert is_sealed(pem)
    assert open_sm2_key(pem, PASSPHRASE, "key").private() == key.private()
    with pytest.raises(InvalidConfig, match="the passphrase is wrong, or the file is damaged"):
        open_sm2_key(pem, b"wrong", "key")
    with pytest.raises(InvalidConfig, match=r"^key: not a key file of this version for an Ed25519 key; restore"):
        open_identity(pem, PASSPHRASE, "key")
    with pytest.raises(InvalidConfig, match=r"^key: not a key file of this version for an SM2 key; restore"):
        open_sm2_key(sealed(), PASSPHRASE, "key")
    # Which key it is, is authenticated.
    with pytest.raises(InvalidConfig, match="damaged"):
        open_sm2_key(rewritten({0: 2}), PASSPHRASE, "key")
    with pytest.raises(InvalidConfig, match="empty passphrase"):
        seal_sm2_key(key, b"", ENTROPY)
