"""The Noise handshake against published vectors, and the promises of its machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import BadTag, InvalidConfig, Malformed, OutOfTurn
from p2pfl.crypto import noise
from p2pfl.crypto.noise import MAX_NONCE, CipherState, Handshake, Session
from p2pfl.crypto.suite import TAG_BYTES, suite

VECTORS = Path(__file__).parents[1] / "vectors"
OURS = ["aes", "sm4"]


class ChaCha:
    """A suite of the tests: `aes` with the AEAD of the second published vector."""

    name = "chacha"
    key_bytes = 32
    agreement = suite("aes").agreement
    hash = suite("aes").hash
    hkdf = suite("aes").hkdf

    def aead(self, key: bytes) -> Any:
        return ChaChaAead(key)

    def keystream(self, key: bytes) -> Any:
        raise NotImplementedError


class ChaChaAead:
    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)

    def seal_into(self, nonce: bytes, plaintext: Any, associated: bytes, out: memoryview) -> None:
        out[:] = self._cipher.encrypt(_little_endian(nonce), bytes(plaintext), associated)

    def open_into(self, nonce: bytes, ciphertext: Any, associated: bytes, out: memoryview) -> None:
        out[:] = self._cipher.decrypt(_little_endian(nonce), bytes(ciphertext), associated)


def _little_endian(nonce: bytes) -> bytes:
    return nonce[:4] + nonce[:3:-1]


def vectors() -> list[Any]:
    return [
        pytest.param(vector, id=f"{path.stem}-{vector['name']}")
        for path in sorted(VECTORS.glob("noise_*.json"))
        for vector in json.loads(path.read_text())["vectors"]
    ]


@pytest.mark.parametrize("vector", vectors())
def test_vectors(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(noise.NAMES, "chacha", "Noise_XX_25519_ChaChaPoly_SHA256")
    chosen = {
        "Noise_XX_25519_AESGCM_SHA256": lambda: suite("aes"),
        "Noise_XX_25519_ChaChaPoly_SHA256": ChaCha,
        "Noise_XX_25519_SM4GCM_SM3": lambda: suite("sm4"),
    }[vector["name"]]()
    ends = [
        Handshake(
            chosen,
            is_initiator=end == "init",
            static=bytes.fromhex(vector[f"{end}_static"]),
            ephemeral=bytes.fromhex(vector[f"{end}_ephemeral"]),
            prologue=bytes.fromhex(vector[f"{end}_prologue"]),
        )
        for end in ("init", "resp")
    ]
    messages = [(bytes.fromhex(m["payload"]), bytes.fromhex(m["ciphertext"])) for m in vector["messages"]]
    for i, (payload, message) in enumerate(messages[:3]):
        assert ends[i % 2].write(payload) == message
        assert ends[1 - i % 2].read(message) == payload
    sessions = [end.finish() for end in ends]
    # The vectors go on taking turns: after the initiator's third message it is the responder's.
    for i, (payload, message) in enumerate(messages[3:], 3):
        assert seal(sessions[i % 2].sending, payload) == message
        assert unseal(sessions[1 - i % 2].receiving, message) == payload


def seal(state: CipherState, plaintext: bytes, associated: bytes = b"") -> bytes:
    out = bytearray(len(plaintext) + TAG_BYTES)
    state.seal_into(plaintext, associated, memoryview(out))
    return bytes(out)


def unseal(state: CipherState, ciphertext: bytes, associated: bytes = b"") -> bytes:
    out = bytearray(len(ciphertext) - TAG_BYTES)
    state.open_into(ciphertext, associated, memoryview(out))
    return bytes(out)


def pair(name: str = "aes", prologues: tuple[bytes, bytes] = (b"", b"")) -> tuple[Handshake, Handshake]:
    initiator, responder = (
        Handshake(
            suite(name),
            is_initiator=i == 0,
            static=bytes([i + 1]) * 32,
            ephemeral=bytes([i + 11]) * 32,
            prologue=prologues[i],
        )
        for i in range(2)
    )
    return initiator, responder


def complete(initiator: Handshake, responder: Handshake) -> tuple[Session, Session]:
    for i in range(3):
        writer, reader = (initiator, responder) if i % 2 == 0 else (responder, initiator)
        assert reader.read(writer.write(b"payload %d" % i)) == b"payload %d" % i
    return initiator.finish(), responder.finish()


@pytest.mark.parametrize("name", OURS)
def test_both_ends_know_each_other_and_share_two_directions(name: str) -> None:
    a, b = complete(*pair(name))
    assert a.remote_static == suite(name).agreement.public_key(b"\2" * 32)
    assert b.remote_static == suite(name).agreement.public_key(b"\1" * 32)
    for sender, reader in ((a, b), (b, a)):
        for text in (b"", b"one", bytes(1000)):
            assert unseal(reader.receiving, seal(sender.sending, text, b"x"), b"x") == text


def test_the_gm_suite_uses_sm2() -> None:
    try:
        suite("gm")
    except InvalidConfig as error:
        pytest.skip(str(error))
    a, b = complete(*pair("gm"))
    assert len(a.remote_static) == suite("gm").agreement.public_bytes
    assert unseal(b.receiving, seal(a.sending, b"text")) == b"text"


def test_a_difference_in_the_prologue_stops_the_second_message() -> None:
    initiator, responder = pair(prologues=(b"one", b"two"))
    responder.read(initiator.write())
    with pytest.raises(Malformed):
        initiator.read(responder.write(b"secret"))


def test_suites_do_not_mix() -> None:
    initiator, responder = pair("aes")[0], pair("sm4")[1]
    responder.read(initiator.write())
    with pytest.raises(Malformed):
        initiator.read(responder.write(b"secret"))


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_a_key_of_small_order_is_refused(point: bytes) -> None:
    _, responder = pair()
    responder.read(point)
    with pytest.raises(Malformed):
        responder.write()
    with pytest.raises(OutOfTurn):
        responder.write()


def test_the_turns() -> None:
    initiator, responder = pair()
    for wrong in (
        lambda: initiator.read(bytes(200)),
        responder.write,
        initiator.finish,
        lambda: initiator.remote_static,
    ):
        with pytest.raises(OutOfTurn):
            wrong()
    initiator, responder = pair()
    complete(initiator, responder)
    for wrong in (initiator.write, responder.write, lambda: initiator.read(bytes(200))):
        with pytest.raises(OutOfTurn):
            wrong()


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", OURS)
def test_a_message_cut_anywhere_is_malformed(name: str, number: int) -> None:
    for size in range(0, 200, 7):
        reader, message = before(name, number)
        if size < len(message) - (9 if number == 0 else 0):
            with pytest.raises(Malformed):
                reader.read(message[:size])
                reader.write()  # a first message is not authentic yet: nobody can open the answer


def before(name: str, number: int) -> tuple[Handshake, bytes]:
    """The end whose turn it is to read message `number`, and that message."""
    initiator, responder = pair(name)
    message, reader, writer = initiator.write(b"payload"), responder, initiator
    for _ in range(number):
        reader.read(message)
        message, reader, writer = reader.write(b"payload"), writer, reader
    return reader, message


@settings(deadline=None)
@given(st.sampled_from(OURS), st.integers(1, 2), st.data())
def test_any_changed_bit_of_the_later_messages_is_malformed(name: str, number: int, data: st.DataObject) -> None:
    reader, message = before(name, number)
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    changed = bytearray(message)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Malformed):
        reader.read(bytes(changed))
    with pytest.raises(OutOfTurn):
        reader.read(message)  # failed for good


@settings(deadline=None)
@given(st.integers(0, 2), st.binary(max_size=300))
def test_noise_is_no_handshake(number: int, garbage: bytes) -> None:
    reader, _ = before("aes", number)
    try:
        payload = reader.read(garbage)
    except Malformed:
        return
    assert number == 0
    assert payload == garbage[32:]


@pytest.mark.parametrize("name", OURS)
def test_rekeying_follows_the_specification(name: str) -> None:
    a, b = complete(*pair(name))
    seal(a.sending, b"one")
    with pytest.raises(BadTag):
        unseal(b.receiving, bytes(20))
    twin = CipherState(suite(name), bytes(range(32)))
    twin.rekey()
    expected = bytearray(48)
    nonce = bytes(4) + b"\xff" * 8
    suite(name).aead(bytes(range(32))[: suite(name).key_bytes]).seal_into(nonce, bytes(32), b"", memoryview(expected))
    assert seal(twin, b"text") == seal(CipherState(suite(name), bytes(expected[:32])), b"text")


def test_rekeying_of_aes_is_its_encryption_of_zeros() -> None:
    state = CipherState(suite("aes"), bytes(32))
    state.rekey()
    key = AESGCM(bytes(32)).encrypt(bytes(4) + b"\xff" * 8, bytes(32), None)[:32]
    assert seal(state, b"text") == AESGCM(key).encrypt(bytes(12), b"text", None)


def test_no_nonce_comes_twice_through_many_keys() -> None:
    seen: set[bytes] = set()
    recording = Recording(seen)
    state = CipherState(recording, bytes(32))
    for i in range(300):
        seal(state, b"text")
        if i % 7 == 0:
            state.rekey()
    assert len(seen) == 300
    assert recording.keys == 1 + 43


class Recording:
    """The suite `aes`, noting nonces but those of rekeying."""

    name = "aes"
    key_bytes = 32

    def __init__(self, seen: set[bytes]) -> None:
        self._seen = seen
        self.keys = 0

    def aead(self, key: bytes) -> Any:
        self.keys += 1
        inner, seen = suite("aes").aead(key), self._seen

        class Noting:
            def seal_into(self, nonce: bytes, plaintext: Any, associated: bytes, out: memoryview) -> None:
                assert nonce not in seen
                if nonce[4:] != b"\xff" * 8:
                    seen.add(nonce)
                inner.seal_into(nonce, plaintext, associated, out)

        return Noting()

    def __getattr__(self, name: str) -> Any:
        return getattr(suite("aes"), name)


@pytest.mark.parametrize("use", [seal, lambda state, _: unseal(state, bytes(20))])
def test_the_nonces_end_before_the_one_of_rekeying(use: Callable[[CipherState, bytes], bytes]) -> None:
    state = CipherState(suite("aes"), bytes(32))
    state._nonce = MAX_NONCE - 1
    seal(state, b"last")
    with pytest.raises(OutOfTurn):
        use(state, b"text")


def test_a_record_that_does_not_open_leaves_the_state_as_it_was() -> None:
    a, b = complete(*pair())
    first, second = seal(a.sending, b"first"), seal(a.sending, b"second")
    for wrong in (second, first[:-1] + bytes([first[-1] ^ 1])):
        with pytest.raises(BadTag):
            unseal(b.receiving, wrong)
    assert unseal(b.receiving, first) == b"first"
    with pytest.raises(BadTag):
        unseal(b.receiving, first)
    assert unseal(b.receiving, second) == b"second"


def test_use_is_counted_in_blocks() -> None:
    a, _ = complete(*pair())
    assert a.sending.used == 0
    seal(a.sending, b"x")
    assert a.sending.used == 48  # a block of text, one of tag, one for the tag's mask
    a.sending.rekey()
    assert a.sending.used == 0


def test_nothing_secret_is_shown() -> None:
    initiator, responder = pair()
    session, _ = complete(initiator, responder)
    shown = repr(initiator) + repr(session.sending) + repr(session)
    for secret in (b"\1" * 32, b"\x0b" * 32, session.sending._key, session.receiving._key):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
