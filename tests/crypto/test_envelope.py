from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import BadTag, LocalError, Malformed, RemoteError
from p2pfl.core.ids import PeerId
from p2pfl.crypto.agreement import wrap_secret
from p2pfl.crypto.envelope import OVERHEAD_BYTES, seal, unseal
from p2pfl.crypto.suite import CipherSuite, suite

ANT, BEE, CAT = PeerId("ant"), PeerId("bee"), PeerId("cat")
SHARED, SID = bytes(range(32)), bytes(range(64, 96))
MESSAGE = b"two shares of the dealer's secrets"
suites = pytest.mark.parametrize("chosen", [suite("aes"), suite("sm4")], ids=["aes", "sm4"])


@suites
@settings(max_examples=50, deadline=None)
@given(message=st.binary(max_size=300))
def test_what_was_sealed_opens(chosen: CipherSuite, message: bytes) -> None:
    sealed = seal(chosen, SHARED, SID, ANT, BEE, message)
    assert len(sealed) == len(message) + OVERHEAD_BYTES
    assert unseal(chosen, SHARED, SID, ANT, BEE, sealed) == message


@suites
def test_only_the_same_pair_direction_and_session_opens_it(chosen: CipherSuite) -> None:
    sealed = seal(chosen, SHARED, SID, ANT, BEE, MESSAGE)
    others = [
        (SHARED, SID, BEE, ANT),
        (SHARED, SID, ANT, CAT),
        (SHARED, SID, CAT, BEE),
        (SHARED, SHARED, ANT, BEE),
        (SID, SID, ANT, BEE),
    ]
    for shared, sid, sender, recipient in others:
        with pytest.raises(BadTag) as raised:
            unseal(chosen, shared, sid, sender, recipient, sealed)
        assert raised.value.peer == sender


@suites
def test_no_changed_byte_opens(chosen: CipherSuite) -> None:
    sealed = seal(chosen, SHARED, SID, ANT, BEE, MESSAGE)
    for place in range(len(sealed)):
        forged = bytearray(sealed)
        forged[place] ^= 1
        with pytest.raises(BadTag):
            unseal(chosen, SHARED, SID, ANT, BEE, bytes(forged))


@suites
@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=100))
def test_whatever_comes_raises_nothing_else(chosen: CipherSuite, data: bytes) -> None:
    with pytest.raises(Malformed if len(data) < OVERHEAD_BYTES else BadTag) as raised:
        unseal(chosen, SHARED, SID, ANT, BEE, data)
    assert raised.value.peer == ANT


@suites
def test_the_session_is_authenticated_with_the_message(chosen: CipherSuite) -> None:
    sealed = seal(chosen, SHARED, SID, ANT, BEE, MESSAGE)
    cipher = chosen.aead(wrap_secret(chosen, SHARED, SID, ANT, BEE))
    out = memoryview(bytearray(len(MESSAGE)))
    with pytest.raises(BadTag):
        cipher.open_into(sealed[:12], sealed[12:], b"", out)
    cipher.open_into(sealed[:12], sealed[12:], SID, out)
    assert out == MESSAGE


@suites
def test_sealing_again_gives_the_same_bytes_and_another_message_another_nonce(chosen: CipherSuite) -> None:
    sealed = seal(chosen, SHARED, SID, ANT, BEE, MESSAGE)
    assert seal(chosen, SHARED, SID, ANT, BEE, MESSAGE) == sealed
    nonces = {seal(chosen, SHARED, SID, ANT, BEE, MESSAGE + bytes([i]))[:12] for i in range(100)}
    assert len(nonces | {sealed[:12]}) == 101


def test_another_suite_with_the_same_cipher_gives_other_bytes() -> None:
    sm4 = suite("sm4")
    other = replace(sm4, name="gm")
    sealed = seal(sm4, SHARED, SID, ANT, BEE, MESSAGE)
    assert sealed[:12] != seal(other, SHARED, SID, ANT, BEE, MESSAGE)[:12]
    with pytest.raises(BadTag):
        unseal(other, SHARED, SID, ANT, BEE, sealed)


def test_a_session_id_of_another_length_is_the_callers_fault() -> None:
    for call in (seal, unseal):
        with pytest.raises(LocalError, match="a session's id has 32 bytes, not 31"):
            call(suite("aes"), SHARED, SID[1:], ANT, BEE, bytes(OVERHEAD_BYTES))


@suites
def test_errors_name_nothing_secret(chosen: CipherSuite) -> None:
    sealed = bytearray(seal(chosen, SHARED, SID, ANT, BEE, MESSAGE))
    sealed[-1] ^= 1
    with pytest.raises(RemoteError) as raised:
        unseal(chosen, SHARED, SID, ANT, BEE, bytes(sealed))
    assert str(raised.value) == "ant: a sealed message that does not open for this session and pair"
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
