"""Keys, peer ids and signatures, against the documents that define them."""

import base64
import io
import subprocess
import traceback
from typing import Any

import base58
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x25519
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from p2pfl.core.charter import Charter, Member
from p2pfl.core.errors import BadSignature, InvalidConfig
from p2pfl.core.ids import PeerId
from p2pfl.core.settings import validate
from p2pfl.crypto import sm2
from p2pfl.crypto.identity import (
    SEED_BYTES,
    Identity,
    Signer,
    charter_faults,
    public_key,
    sign_charter,
    statement_bytes,
    verify_signature,
    verify_statement,
)
from p2pfl.crypto.sm2 import Sm2SigningKey
from tests.core.charters import IDENTITIES, charter_values

RFC_8032 = {
    "TEST 1": (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
    ),
    "TEST 2": (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
    ),
    "TEST 3": (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
    ),
}
"""Secret and public keys of RFC 8032, section 7.1. Its signatures are of bare messages; ours always cover a domain."""

LIBP2P_PRIVATE = (
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
LIBP2P_PUBLIC = "080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
"""Both from libp2p specs, peer-ids/peer-ids.md, "Test vectors": keys in their protobuf encoding."""
LIBP2P_PEER_ID = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
"""The peer id of that key, as rust-libp2p's identity/src/keypair.rs has it (keypair_protobuf_roundtrip_ed25519)."""

SEED = bytes(range(SEED_BYTES))
seeds = st.binary(min_size=SEED_BYTES, max_size=SEED_BYTES)
DOMAIN = "p2pfl/test/1"


def raw_public(peer: PeerId) -> str:
    return public_key(peer).public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


@pytest.mark.parametrize(("secret", "public"), RFC_8032.values(), ids=RFC_8032.keys())
def test_the_peer_id_holds_the_public_key_of_rfc_8032(secret: str, public: str) -> None:
    identity = Identity(bytes.fromhex(secret))
    assert raw_public(identity.peer_id) == public
    assert base58.b58decode(identity.peer_id).hex() == "002408011220" + public


def test_the_peer_id_is_that_of_the_libp2p_specification() -> None:
    # Field 1, the type, is Ed25519; field 2 holds 64 bytes: the seed and the public key.
    assert LIBP2P_PRIVATE.startswith("08011240")
    identity = Identity(bytes.fromhex(LIBP2P_PRIVATE)[4:36])
    assert identity.peer_id == LIBP2P_PEER_ID
    assert raw_public(PeerId(LIBP2P_PEER_ID)) == LIBP2P_PUBLIC.removeprefix("08011220")


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_libp2p_derives_the_same_peer_id(seed: bytes) -> None:
    assert str(ID.from_pubkey(create_new_key_pair(seed).public_key)) == Identity(seed).peer_id


@settings(max_examples=50, deadline=None)
@given(seeds, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.binary(max_size=64))
def test_what_was_signed_verifies(seed: bytes, domain: str, message: bytes) -> None:
    identity = Identity(seed)
    signature = identity.sign(domain, message)
    assert len(signature) == 64
    verify_signature(identity.peer_id, domain, message, signature)


def test_the_bytes_that_are_signed_are_pinned() -> None:
    identity = Identity(SEED)
    length = bytes(7)
    covered = (
        b"l" + length + bytes([9 + 12 + 9 + 2])
        + b"s" + length + bytes([12]) + b"p2pfl/test/1"
        + b"b" + length + bytes([2]) + b"hi"
    )  # fmt: skip
    public_key(identity.peer_id).verify(identity.sign(DOMAIN, b"hi"), covered)


def test_a_signature_serves_one_purpose_one_message_and_one_peer() -> None:
    identity, other = Identity(SEED), Identity(bytes(SEED_BYTES))
    signature = identity.sign(DOMAIN, b"message")
    flipped = [signature[:i] + bytes([signature[i] ^ 1]) + signature[i + 1 :] for i in range(64)]
    wrong: list[tuple[PeerId, str, bytes, bytes]] = [
        (identity.peer_id, "p2pfl/test/2", b"message", signature),
        (identity.peer_id, "", b"message", signature),
        # The border between domain and message cannot be moved.
        (identity.peer_id, DOMAIN + "m", b"essage", signature),
        (identity.peer_id, DOMAIN[:-1], b"1message", signature),
        (identity.peer_id, DOMAIN, b"Message", signature),
        (identity.peer_id, DOMAIN, b"message\0", signature),
        (identity.peer_id, DOMAIN, b"", signature),
        (other.peer_id, DOMAIN, b"message", signature),
        *((identity.peer_id, DOMAIN, b"message", changed) for changed in flipped),
        *((identity.peer_id, DOMAIN, b"message", changed) for changed in (b"", signature[:-1], signature + b"\0")),
    ]
    for peer, domain, message, changed in wrong:
        with pytest.raises(BadSignature) as raised:
            verify_signature(peer, domain, message, changed)
        assert raised.value.peer == peer


@pytest.mark.parametrize("seed", [b"", SEED[:-1], SEED + b"\0"], ids=len)
def test_a_seed_of_another_length_is_refused(seed: bytes) -> None:
    with pytest.raises(InvalidConfig, match=f"not {len(seed)}"):
        Identity(seed)


OWN = Identity(SEED).peer_id
NOT_PEER_IDS = {
    "empty": "",
    "not-base58": "0OIl",
    "not-ascii": "12D3ö",
    "short": OWN[:-1],
    "long": OWN + "1",
    "space-behind": OWN + " ",
    "line-behind": OWN + "\n",
    "space-before": " " + OWN,
    "rsa-hash": "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    "secp256k1": base58.b58encode(bytes.fromhex("002508021221") + b"\x02" * 33).decode(),
    "no-such-type": base58.b58encode(bytes.fromhex("002408021220") + bytes(32)).decode(),
    "control-codes": "\x1b[2J\r\n",
}


@pytest.mark.parametrize("peer", NOT_PEER_IDS.values(), ids=NOT_PEER_IDS.keys())
def test_what_is_no_peer_id_of_an_ed25519_key_is_refused(peer: str) -> None:
    with pytest.raises(InvalidConfig) as raised:
        public_key(PeerId(peer))
    assert str(raised.value).isprintable()


@given(st.text(max_size=60) | st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", max_size=60))
def test_whatever_peer_id_comes_raises_nothing_else(peer: str) -> None:
    with pytest.raises(InvalidConfig):
        public_key(PeerId(peer))


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_pem_gives_the_same_key_again(seed: bytes) -> None:
    identity = Identity(seed)
    again = Identity.from_pem(identity.to_pem(), "x.pem")
    assert again.seed() == identity.seed() == seed
    assert again.peer_id == identity.peer_id


def pem(key: Any, password: bytes | None = None) -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    content: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return content


def armored(content: bytes) -> bytes:
    return b"-----BEGIN PRIVATE KEY-----\n" + base64.encodebytes(content) + b"-----END PRIVATE KEY-----\n"


ED25519 = ed25519.Ed25519PrivateKey.from_private_bytes(SEED)
DER = ED25519.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
NOT_KEYS = {
    "empty": b"",
    "text": b"hello",
    "der": DER,
    "bare-seed": SEED,
    "cut": Identity(SEED).to_pem()[:60],
    "not-der": armored(b"hello"),
    "unknown-algorithm": armored(DER.replace(bytes.fromhex("06032b6570"), bytes.fromhex("06032b657f"))),
    "public": ED25519.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ),
    "encrypted": pem(ED25519, b"password"),
    "ed448": pem(ed448.Ed448PrivateKey.generate()),
    "x25519": pem(x25519.X25519PrivateKey.generate()),
    "p256": pem(ec.generate_private_key(ec.SECP256R1())),
    "rsa": pem(rsa.generate_private_key(65537, 2048)),
}


@pytest.mark.parametrize("content", NOT_KEYS.values(), ids=NOT_KEYS.keys())
def test_what_is_no_unencrypted_ed25519_key_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidConfig, match=r"^a/x\.pem: not an .*(backup|p2pfl init)") as raised:
        Identity.from_pem(content, "a/x.pem")
    assert str(raised.value).isprintable()


def test_other_tools_read_our_pem() -> None:
    shown = subprocess.run(
        ["openssl", "pkey", "-noout", "-text"],  # noqa: S607 - whichever there is
        input=Identity(SEED).to_pem(),
        capture_output=True,
        check=True,
    )
    digits = "".join(shown.stdout.decode().lower().replace(":", "").split())
    assert SEED.hex() in digits


def secrets_of(identity: Identity) -> list[str]:
    seed = identity.seed()
    return [seed.hex(), base64.b64encode(seed).decode()[:40], repr(seed)[2:-1], base58.b58encode(seed).decode()]


def test_nothing_shows_the_secret() -> None:
    identity = Identity(SEED)
    shown = [repr(identity), str(identity), f"{identity}", repr([identity]), repr(vars(identity))]
    assert repr(identity) == f"Identity({identity.peer_id})"
    calls: list[Any] = [
        lambda: Identity(SEED[:-1]),
        lambda: Identity.from_pem(identity.to_pem()[:-30], "x.pem"),
        lambda: Identity.from_pem(identity.to_pem().replace(b"PRIVATE", b"SECRET"), "x.pem"),
        lambda: Identity.from_pem(SEED, "x.pem"),
        lambda: sign_charter(charter(), "bee", identity),
        lambda: verify_signature(identity.peer_id, DOMAIN, b"", identity.sign(DOMAIN, b"x")),
    ]
    for call in calls:
        with pytest.raises((InvalidConfig, BadSignature)) as raised:
            call()
        text = io.StringIO()
        traceback.print_exception(raised.value, file=text)
        shown += [repr(raised.value), *map(repr, raised.value.args), text.getvalue()]
    body = identity.to_pem().splitlines()[1].decode()
    for text_shown in shown:
        for secret in (*secrets_of(identity), body):
            assert secret not in text_shown


# The charter's signatures


def charter(**changes: Any) -> Charter:
    return validate(Charter, charter_values() | changes, "x")


def signed_by(unsigned: Charter, *names: str) -> Charter:
    for name in names:
        unsigned = sign_charter(unsigned, name, IDENTITIES[name])
    return unsigned


def with_signatures(signed: Charter, **signatures: str) -> Charter:
    return signed.model_copy(update={"signatures": signed.signatures | signatures})


def test_a_charter_that_all_have_signed_is_in_force() -> None:
    signed = signed_by(charter(), "cat", "ant", "bee")
    assert charter_faults(signed) == []
    assert signed.hash() == charter().hash()
    assert charter().signatures == {}, "the draft is as it was"


def test_every_missing_signature_is_named() -> None:
    assert charter_faults(signed_by(charter(), "bee")) == ["ant has not signed", "cat has not signed"]


def test_a_change_after_signing_voids_every_signature() -> None:
    signed = signed_by(charter(), *IDENTITIES)
    changed = signed.model_copy(update={"training": signed.training.model_copy(update={"rounds": 61})})
    faults = charter_faults(changed)
    assert [fault.split("'")[0] for fault in faults] == list(IDENTITIES)
    assert all("changed after signing" in fault for fault in faults)


def test_signatures_cannot_be_swapped() -> None:
    signed = signed_by(charter(), *IDENTITIES)
    swapped = with_signatures(signed, ant=signed.signatures["bee"], bee=signed.signatures["ant"])
    assert [fault.split("'")[0] for fault in charter_faults(swapped)] == ["ant", "bee"]


def test_a_signature_for_another_purpose_is_none() -> None:
    signed = signed_by(charter(), *IDENTITIES)
    other = base64.b64encode(IDENTITIES["ant"].sign(DOMAIN, signed.hash())).decode()
    assert [fault.split("'")[0] for fault in charter_faults(with_signatures(signed, ant=other))] == ["ant"]


@pytest.mark.parametrize("text", ["", "x", "?" * 88, "ä", "\x1b[2J", "A" * 88, "AAAA\nAAAA"], ids=ascii)
def test_what_is_no_signature_at_all_is_named_too(text: str) -> None:
    faults = charter_faults(with_signatures(signed_by(charter(), *IDENTITIES), bee=text))
    assert [fault.split("'")[0] for fault in faults] == ["bee"]
    assert faults[0].isprintable()


def test_a_member_with_a_peer_id_that_is_none_is_named() -> None:
    signed = signed_by(charter(), *IDENTITIES)
    bee = signed.members[1].model_copy(update={"peer_id": "12D3"})
    changed = signed.model_copy(update={"members": (signed.members[0], bee)})
    faults = charter_faults(changed)
    assert len(faults) == 2
    assert faults[1].startswith("bee: '12D3'")


def test_nobody_signs_for_another_or_for_a_stranger() -> None:
    with pytest.raises(InvalidConfig, match=r"bee stands in the charter with peer id .*, but this key is"):
        sign_charter(charter(), "bee", IDENTITIES["ant"])
    with pytest.raises(InvalidConfig, match="dog is not a member of meadow; run `p2pfl charter join`"):
        sign_charter(charter(), "dog", IDENTITIES["ant"])


@pytest.mark.parametrize("count", [0, 1])
def test_one_member_makes_no_federation(count: int) -> None:
    alone = charter(members=charter_values()["members"][:count])
    assert charter_faults(signed_by(alone, *list(IDENTITIES)[:count])) == ["a federation needs at least two members"]


# Statements and charters under a suite with SM2 signatures


@pytest.fixture(scope="module")
def sm2_keys() -> dict[str, Sm2SigningKey]:
    for name in ("fastecdsa", "gmssl_pyx"):
        pytest.importorskip(name, reason="the extra [gm] is not installed", exc_type=ImportError)
    return {name: Sm2SigningKey(name.encode().ljust(32)) for name in IDENTITIES}


def gm_charter(keys: dict[str, Sm2SigningKey], suite: str = "gm") -> Charter:
    members = charter_values()["members"]
    with_keys = [member | {"sm2_public_key": keys[member["name"]].public.hex()} for member in members]
    return charter(members=with_keys, security={"suite": suite})


def gm_signed(keys: dict[str, Sm2SigningKey]) -> Charter:
    unsigned = gm_charter(keys)
    for name, identity in IDENTITIES.items():
        unsigned = sign_charter(unsigned, name, identity, keys[name])
    return unsigned


def halves(signed: Charter, name: str) -> tuple[bytes, bytes]:
    signature = base64.b64decode(signed.signatures[name])
    return signature[:64], signature[64:]


def text_of(signature: bytes) -> str:
    return base64.b64encode(signature).decode()


def test_a_gm_charter_is_in_force_once_all_have_signed_with_both_keys(sm2_keys: dict[str, Sm2SigningKey]) -> None:
    signed = gm_signed(sm2_keys)
    assert charter_faults(signed) == []
    for name, key in sm2_keys.items():
        own, other = halves(signed, name)
        # Both over the same bytes.
        verify_signature(IDENTITIES[name].peer_id, "p2pfl/charter-signature/1", signed.hash(), own)
        sm2.verify_sm2_signature(key.public, "p2pfl/charter-signature/1", signed.hash(), other)
    assert charter_faults(gm_charter(sm2_keys)) == [f"{name} has not signed" for name in IDENTITIES]


def test_a_gm_charter_needs_both_signatures_of_every_member(sm2_keys: dict[str, Sm2SigningKey]) -> None:
    signed = gm_signed(sm2_keys)
    (own, sm2_half), (_, ants) = halves(signed, "bee"), halves(signed, "ant")
    flipped = bytes([sm2_half[0] ^ 1]) + sm2_half[1:]
    wrong = {
        own: "a signature of 64 bytes; under the suite gm it has 128",
        sm2_half + own: "a signature that does not verify",
        own + ants: "an SM2 signature that does not verify",
        own + flipped: "an SM2 signature that does not verify",
        own + bytes(64): "an SM2 signature that is not two numbers below the order",
        b"": "a signature of 0 bytes; under the suite gm it has 128",
        own + sm2_half + b"!": "a signature of 129 bytes; under the suite gm it has 128",
    }
    for signature, reason in wrong.items():
        assert charter_faults(with_signatures(signed, bee=text_of(signature))) == [
            f"bee's signature is not for this charter: it was changed after signing; sign again ({reason})"
        ]


def test_an_sm2_key_cannot_be_exchanged_after_signing(sm2_keys: dict[str, Sm2SigningKey]) -> None:
    """The hash covers it: the Ed25519 signatures of all are void."""
    signed = gm_signed(sm2_keys)
    bee = signed.members[1].model_copy(update={"sm2_public_key": Sm2SigningKey(bytes(32)).public.hex()})
    changed = signed.model_copy(update={"members": (signed.members[0], bee, signed.members[2])})
    assert changed.hash() != signed.hash()
    assert [fault.split("'")[0] for fault in charter_faults(changed)] == list(IDENTITIES)


def test_keys_that_the_suite_does_not_ask_for_are_refused_and_missing_ones_too(
    sm2_keys: dict[str, Sm2SigningKey],
) -> None:
    without = charter(security={"suite": "gm"})
    lacking = "has no SM2 key, with which members sign under the suite gm; join again with `p2pfl charter join`"
    assert charter_faults(without) == [f"{name}: {lacking}" for name in IDENTITIES]
    with pytest.raises(InvalidConfig, match=r"^bee: has no SM2 key"):
        sign_charter(without, "bee", IDENTITIES["bee"], sm2_keys["bee"])
    for suite in ("aes", "sm4"):
        needless = f"has an SM2 key, which the suite {suite} does not use; join again with `p2pfl charter join`"
        assert charter_faults(gm_charter(sm2_keys, suite)) == [f"{name}: {needless}" for name in IDENTITIES]
        with pytest.raises(InvalidConfig, match=r"^bee: has an SM2 key"):
            sign_charter(gm_charter(sm2_keys, suite), "bee", IDENTITIES["bee"])


def test_nobody_signs_with_another_sm2_key_than_joined(sm2_keys: dict[str, Sm2SigningKey]) -> None:
    for key in (None, sm2_keys["ant"]):
        with pytest.raises(InvalidConfig, match="bee stands in the charter with another SM2 key than this one"):
            sign_charter(gm_charter(sm2_keys), "bee", IDENTITIES["bee"], key)


def test_an_sm2_key_that_is_no_point_is_named(sm2_keys: dict[str, Sm2SigningKey]) -> None:
    members = [
        member | {"sm2_public_key": f"04{number:0128x}"} for number, member in enumerate(charter_values()["members"])
    ]
    unsigned = charter(members=members, security={"suite": "gm"})
    signature = IDENTITIES["bee"].sign("p2pfl/charter-signature/1", unsigned.hash()) + bytes(64)
    faults = charter_faults(with_signatures(unsigned, bee=text_of(signature)))
    assert faults[1] == "bee: sm2_public_key: an SM2 key that is no point of the curve"


def test_without_the_extra_a_gm_charter_says_once_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(sm2, "import_module", absent)
    missing = "SM2 needs fastecdsa, which is not installed: pip install 'p2pfl-mesh[gm]'"
    assert charter_faults(charter(security={"suite": "gm"})) == [missing]
    assert charter_faults(signed_by(charter(), *IDENTITIES)) == [], "which nobody else needs"


def test_a_statement_is_signed_with_every_key_that_the_suite_asks_for(sm2_keys: dict[str, Sm2SigningKey]) -> None:
    for suite, key, length in (("aes", None, 64), ("sm4", None, 64), ("gm", sm2_keys["ant"], 128)):
        public = None if key is None else key.public.hex()
        member = Member(
            name="ant", peer_id=IDENTITIES["ant"].peer_id, addresses=("/ip4/192.0.2.1/tcp/1",), sm2_public_key=public
        )
        signature = Signer(IDENTITIES["ant"], key).sign(DOMAIN, b"message")
        assert len(signature) == statement_bytes(suite) == length
        verify_statement(suite, member, DOMAIN, b"message", signature)
        for wrong in (
            (DOMAIN, b"messages", signature),
            ("p2pfl/test/2", b"message", signature),
            (DOMAIN, b"message", signature[:-1]),
            (DOMAIN, b"message", signature + b"!"),
            (DOMAIN, b"message", signature[:-1] + bytes([signature[-1] ^ 1])),
            (DOMAIN, b"message", bytes([signature[0] ^ 1]) + signature[1:]),
        ):
            with pytest.raises(BadSignature) as raised:
                verify_statement(suite, member, *wrong)
            assert raised.value.peer == IDENTITIES["ant"].peer_id
    gm = Signer(IDENTITIES["ant"], sm2_keys["ant"])
    for secret in (*secrets_of(IDENTITIES["ant"]), sm2_keys["ant"].private().hex()):
        assert secret not in repr(gm)
