"""The masked sum once more, straight from the formulas of docs/secure-averaging.md, slowly and with other code.

    y_u = q_u + PRG(self key of u) + sum over v > u of PRG(pair key) - sum over v < u of PRG(pair key)   mod 2^32

Where members share a base, q_u is of the change from it, and words have 16 bits: mod 2^16, but for the header.

Nothing of p2pfl is used for it but the peers' secrets, their session's id, and the canonical encoding.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2pfl.core.canonical import canonical
from p2pfl.core.ids import Round
from p2pfl.core.ledger import Checkpoint
from p2pfl.core.machine import Effect, SendBulk, Vector
from p2pfl.core.wire import Chunk, Part
from p2pfl.gossip.session import Outcome
from tests.group_pump import GroupPump, Node

CLIP, CHANGE_CLIP, WORD = 2.0**16, 64.0, 2**32


@dataclass
class Seen:
    """What a member sent, and what it alone knew then."""

    seed: bytes
    private: bytes
    session: bytes
    members: tuple[int, ...]
    vector: list[float]
    bits: int
    chunks: dict[int, bytes] = field(default_factory=dict)


class Watched(GroupPump):
    """Looks into each member's memory when it uploads."""

    masked = True

    def __init__(self, members: int, parameters: int, **charter: object) -> None:
        self.seen: dict[tuple[int, Round], Seen] = {}
        super().__init__(members, parameters, **charter)

    def carry_out(self, place: int, node: Node, effect: Effect) -> None:
        if isinstance(effect, SendBulk) and isinstance(effect.message, Chunk) and effect.message.part is Part.UPLOAD:
            session = node.machine._session
            assert session is not None and session._vector is not None
            secrets = session._work.secrets
            if secrets is not None:
                fresh = Seen(
                    secrets._seed,
                    secrets._mask_key.private,
                    session.id,
                    session.enrolled,
                    [float(value) for value in session._vector],
                    32 if session.changed_from is None else 16,
                )
                seen = self.seen.setdefault((place, effect.message.round), fresh)
                seen.chunks[effect.message.chunk] = effect.payload.tobytes()
        super().carry_out(place, node, effect)


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt, info).derive(secret)


def stream(key: bytes, position: int, words: int, size: int) -> list[int]:
    """AES-256 in counter mode from block 0, read as little endian words of so many bytes from byte `position` on.

    The first four have four bytes in any case.
    """
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    data = cipher.update(bytes(position + 4 * words))[position:]
    head = [data[4 * i : 4 * i + 4] for i in range(4)]
    rest = [data[16 + size * i : 16 + size * (i + 1)] for i in range(words - 4)]
    return [int.from_bytes(word, "little") for word in (*head, *rest)]


def pair_key(one: Seen, public: bytes, session: bytes, names: tuple[str, str]) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    shared = X25519PrivateKey.from_private_bytes(one.private).exchange(X25519PublicKey.from_public_bytes(public))
    return hkdf(shared, session, canonical(["p2pfl/mask-secret/1", "aes", *sorted(names)]))


def public(seen: Seen) -> bytes:
    return X25519PrivateKey.from_private_bytes(seen.private).public_key().public_bytes_raw()


def quantized(value: float, members: int, bits: int = 32) -> int:
    """Round alpha x in units of clip / largest, alpha = 1; float32 as the members compute."""
    clip = CLIP if bits == 32 else CHANGE_CLIP
    exact = (2 ** (bits - 1) - 1) // members
    excess = max(0, exact.bit_length() - 24)
    largest = exact >> excess << excess
    factor = np.float32(largest / clip)
    if float(factor) > largest / clip:
        factor = np.nextafter(factor, np.float32(0))
    rounded = int(np.rint(np.float32(value) * factor))
    return max(-largest, min(largest, rounded))


def header(members: int) -> list[int]:
    """Weight 1; a canary of 1, and that a loss is told; the loss of 0.5 of at most 1024, 2 steps of at most 2^20."""
    largest = (2**31 - 1) // members
    return [2**16, 1 + 2**16, round(0.5 / 1024 * largest), round(2 / 2**20 * largest)]


def masked(pump: Watched, who: int, round: Round, chunk: int) -> bytes:
    """Return what member `who` must have sent of a chunk."""
    mine = pump.seen[who, round]
    members, values = mine.members, len(mine.vector)
    first, end = chunk * values // len(members), (chunk + 1) * values // len(members)
    size = mine.bits // 8
    values_words = (quantized(value, len(members), mine.bits) for value in mine.vector[first:end])
    words = [*header(len(members)), *values_words]
    longest = 16 + size * -(-values // len(members))
    position = chunk * (-(-longest // 16) * 16)
    keys = [(hkdf(mine.seed, mine.session, canonical(["p2pfl/self-mask/1", "aes"])), 1)]
    for other in members:
        if other != who:
            names = (pump.roster[who], pump.roster[other])
            key = pair_key(mine, public(pump.seen[other, round]), mine.session, names)
            keys.append((key, 1 if names[1] > names[0] else -1))
    for key, sign in keys:
        masks = stream(key, position, len(words), size)
        words = [word + sign * mask for word, mask in zip(words, masks, strict=True)]
    head = b"".join((word % WORD).to_bytes(4, "little") for word in words[:4])
    return head + b"".join((word % 2**mine.bits).to_bytes(size, "little") for word in words[4:])


@pytest.mark.parametrize("members", [3, 4, 5, 8])
@pytest.mark.parametrize("bits", [32, 16])
def test_every_byte_that_is_uploaded_is_what_the_formulas_say(
    members: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bits == 16:
        monkeypatch.setattr(Watched, "change_clip", CHANGE_CLIP)
    pump = Watched(members, 37, rounds=2, group_size=members)
    pump.start()
    pump.run()
    assert len(pump.seen) == 2 * members
    for (who, round), seen in pump.seen.items():
        assert seen.bits == bits
        assert set(seen.chunks) == set(range(members))
        for chunk, sent in seen.chunks.items():
            assert sent == masked(pump, who, round, chunk), f"member {who}, round {round}, chunk {chunk}"


@pytest.mark.parametrize("dropped", range(5))
def test_what_is_adopted_is_exactly_the_integer_sum_of_the_survivors(dropped: int) -> None:
    pump = Watched(5, 23, rounds=1, group_size=5)
    pump.drop = lambda sender, receiver, message: (
        isinstance(message, Chunk) and message.part is Part.UPLOAD and sender == dropped
    )
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()))
    survivors = [place for place in range(5) if place != dropped]
    exact = (2**31 - 1) // 5
    largest = exact >> 5 << 5
    sums = [sum(quantized(pump.seen[who, Round(0)].vector[i], 5) for who in survivors) for i in range(23)]
    expected: Vector = np.array([total * (CLIP / largest / 4) for total in sums], np.float32)
    for place in survivors:
        assert pump.nodes[place].rounds[0].outcome == Outcome.FULL
        assert np.array_equal(pump.nodes[place].adopted[Round(0)], expected)


@pytest.mark.parametrize("dropped", range(3, 5))
def test_what_is_adopted_is_the_base_with_the_integer_sum_of_the_survivors_changes(
    dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watched, "change_clip", CHANGE_CLIP)
    pump = Watched(5, 23, rounds=1, group_size=5)
    base = pump.initial[:] = np.arange(23, dtype=np.float32) / 7
    pump.drop = lambda sender, receiver, message: (
        isinstance(message, Chunk) and message.part is Part.UPLOAD and sender == dropped
    )
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()))
    survivors = [place for place in range(5) if place != dropped]
    largest = (2**15 - 1) // 5
    unit = CHANGE_CLIP / largest
    words = {who: [quantized(value, 5, 16) for value in pump.seen[who, Round(0)].vector] for who in survivors}
    average = [sum(words[who][i] for who in survivors) * (unit / 4) for i in range(23)]
    expected = np.array([float(base[i]) + average[i] for i in range(23)], np.float32)
    for place in survivors:
        kept = next(each for each in pump.nodes[place].records if isinstance(each, Checkpoint))
        assert np.array_equal(kept.base, expected)
        left = [pump.seen[place, Round(0)].vector[i] - words[place][i] * unit for i in range(23)]
        assert kept.update is not None
        assert np.array_equal(kept.update, np.array(left, np.float32))


def test_no_word_on_the_wire_says_anything_about_the_value_under_it() -> None:
    """Equal vectors, masked by different members in different rounds, share no word; and all bits are balanced."""
    pump = Watched(4, 4096, rounds=2)
    pump.step = lambda place, round, vector: vector + np.float32(1)  # type: ignore[method-assign]
    pump.start()
    pump.run()
    words = [
        np.frombuffer(sent, "<u4")
        for seen in pump.seen.values()
        for sent in seen.chunks.values()
    ]  # fmt: skip
    together = np.concatenate(words)
    assert len(np.unique(together)) > 0.999 * len(together)
    balance = np.unpackbits(together.view(np.uint8)).mean()
    assert abs(balance - 0.5) < 5 * 0.5 / np.sqrt(32 * len(together))


def test_secrets_do_not_show() -> None:
    pump = Watched(4, 16, rounds=1)
    pump.start()
    pump.run(until=lambda: bool(pump.seen))
    session = pump.nodes[0].machine._session
    assert session is not None
    secrets = session._work.secrets
    assert secrets is not None
    for told in (repr(secrets), repr(session._work), repr(secrets._terms)):
        for secret in (secrets._seed, secrets._mask_key.private, secrets._wrap_key.private):
            assert secret.hex() not in told
            assert repr(secret) not in told
            assert hashlib.sha256(secret).hexdigest() not in told


def test_a_retired_session_keeps_no_secret() -> None:
    pump = Watched(4, 16, rounds=2)
    pump.start()
    pump.run()
    for node in pump.nodes.values():
        for past in node.machine._past.values():
            assert past._work.secrets is None
            assert past._work.masks is None
