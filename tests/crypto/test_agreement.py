"""X25519 and the secrets derived from an agreement; published values are in `test_vectors`."""

import hmac
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import LocalError, Malformed
from p2pfl.core.ids import PeerId
from p2pfl.crypto.agreement import X25519, KeyPair, key_pair, mask_secret, wrap_secret
from p2pfl.crypto.suite import CipherSuite, suite

entropies = st.binary(min_size=32, max_size=32)
ANT, BEE, CAT = PeerId("ant"), PeerId("bee"), PeerId("cat")
SESSION = bytes(range(32))


@given(one=entropies, other=entropies)
def test_both_sides_agree(one: bytes, other: bytes) -> None:
    group = X25519()
    ours, theirs = key_pair(group, one), key_pair(group, other)
    assert group.shared_secret(ours.private, theirs.public) == group.shared_secret(theirs.private, ours.public)


@pytest.mark.parametrize("length", [0, 31, 33, 65])
def test_keys_of_other_lengths_are_refused(length: int) -> None:
    group = X25519()
    with pytest.raises(Malformed, match=f"an X25519 key of {length} bytes, not 32"):
        group.shared_secret(bytes(32), bytes(length))
    with pytest.raises(ValueError, match=f"a private key has 32 bytes, not {length}"):
        key_pair(group, bytes(length))
    with pytest.raises(ValueError, match="a private key has 32 bytes"):
        group.shared_secret(bytes(length), bytes(32))


def test_a_key_pair_shows_its_public_half_only() -> None:
    pair = key_pair(X25519(), b"S" * 32)
    assert repr(pair) == f"KeyPair(public={pair.public!r})"
    assert pair == KeyPair(pair.public, b"S" * 32)


@pytest.mark.parametrize("name", ["aes", "sm4"])
def test_every_purpose_has_its_own_secret(name: str) -> None:
    chosen, shared = suite(name), b"D" * 32
    assert mask_secret(chosen, shared, SESSION, ANT, BEE) == mask_secret(chosen, shared, SESSION, BEE, ANT)
    secrets = [wrap_secret(chosen, shared, SESSION, *pair) for pair in permutations((ANT, BEE, CAT), 2)]
    secrets += [mask_secret(chosen, shared, SESSION, *pair) for pair in ((ANT, BEE), (ANT, CAT), (BEE, CAT))]
    secrets += [mask_secret(chosen, shared, bytes(32), ANT, BEE), mask_secret(chosen, bytes(32), SESSION, ANT, BEE)]
    assert len(set(secrets)) == len(secrets)
    assert {len(secret) for secret in secrets} == {chosen.key_bytes}


def alike(name: str) -> CipherSuite:
    """Return a suite with SM3 and SM4 under a name, as `sm4` and `gm` are."""
    return replace(suite("sm4"), name=name)


def test_no_two_suites_have_a_secret_in_common() -> None:
    shared = b"D" * 32
    for derive in (mask_secret, wrap_secret):
        assert derive(alike("sm4"), shared, SESSION, ANT, BEE) == derive(suite("sm4"), shared, SESSION, ANT, BEE)
        assert derive(alike("sm4"), shared, SESSION, ANT, BEE) != derive(alike("gm"), shared, SESSION, ANT, BEE)


def test_the_secrets_are_hkdf_over_purpose_suite_and_peers() -> None:
    """RFC 5869 with one block, by hand: the session is the salt, and what the secret is for the info."""
    shared = b"D" * 32
    for purpose, derive in (("p2pfl/mask-secret/1", mask_secret), ("p2pfl/wrap-secret/1", wrap_secret)):
        info = canonical([purpose, "aes", "ant", "bee"])
        extracted = hmac.digest(SESSION, shared, "sha256")
        assert derive(suite("aes"), shared, SESSION, ANT, BEE) == hmac.digest(extracted, info + b"\1", "sha256")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_session_id_of_another_length_is_the_callers_fault(length: int) -> None:
    for derive in (mask_secret, wrap_secret):
        with pytest.raises(LocalError, match=f"a session's id has 32 bytes, not {length}"):
            derive(suite("aes"), b"D" * 32, bytes(length), ANT, BEE)


def test_names_do_not_run_into_one_another() -> None:
    chosen, shared = suite("aes"), b"D" * 32
    one = wrap_secret(chosen, shared, SESSION, PeerId("ab"), PeerId("c"))
    assert one != wrap_secret(chosen, shared, SESSION, PeerId("a"), PeerId("bc"))
