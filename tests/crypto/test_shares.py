import hashlib
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import LocalError, Malformed, RemoteError
from p2pfl.core.ids import PeerId
from p2pfl.crypto.shares import (
    MAX_HOLDERS,
    PRIME,
    SHARE_BYTES,
    Dealing,
    Entropy,
    Share,
    commit,
    recover,
    split,
    verified_shares,
    verify_commitment,
    verify_share,
)
from p2pfl.crypto.suite import suite

SUITE = suite("aes")
SECRET = bytes(range(100, 132))
CONTEXT = b"session 1, self-mask, dealt by dealer"
DEALER = PeerId("dealer")
PEERS = [PeerId(f"peer-{i}") for i in range(50)]


def entropy_of(seed: object) -> Entropy:
    """A stream of bytes that differ from call to call: for tests."""
    calls = iter(range(1 << 30))
    return lambda length: hashlib.shake_256(repr((seed, next(calls))).encode()).digest(length)


def dealt(threshold: int = 3, holders: int = 5, secret: bytes = SECRET, seed: object = 0) -> Dealing:
    return split(SUITE, CONTEXT, secret, threshold, holders, entropy_of(seed))


def test_the_modulus_is_the_least_prime_above_every_secret() -> None:
    def is_prime(number: int) -> bool:  # Miller and Rabin, 40 fixed bases
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in range(2, 42):
            power = pow(base, odd, number)
            if power in {1, number - 1}:
                continue
            for _ in range(twos - 1):
                power = power * power % number
                if power == number - 1:
                    break
            else:
                return False
        return True

    assert PRIME == 2**256 + 297
    assert is_prime(PRIME)
    assert not any(is_prime(2**256 + offset) for offset in range(297))


@pytest.mark.parametrize(("threshold", "holders"), [(2, 2), (2, 3), (3, 4), (6, 8), (7, 7)])
def test_any_threshold_of_shares_gives_the_secret(threshold: int, holders: int) -> None:
    dealing = dealt(threshold, holders)
    for count in range(threshold, holders + 1):
        for some in combinations(dealing.shares, count):
            assert recover(some, threshold, DEALER) == SECRET
            assert recover(some[::-1], threshold, DEALER) == SECRET


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(2, 50), st.data())
def test_every_secret_survives(secret: bytes, holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(2, holders))
    dealing = dealt(threshold, holders, secret, data.draw(st.integers()))
    chosen = data.draw(st.permutations(dealing.shares))[:threshold]
    assert recover(chosen, threshold, DEALER) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_least_and_the_largest_secret(secret: bytes) -> None:
    assert recover(dealt(secret=secret).shares[1:4], 3, DEALER) == secret


def test_shares_are_values_of_a_polynomial() -> None:
    """Straight from Shamir's paper: the coefficients are what the entropy source gave."""
    source = entropy_of("x")
    second = int.from_bytes(source(64), "big") % PRIME
    first = int.from_bytes(source(64), "big") % PRIME
    dealing = dealt(3, 5, SECRET, "x")
    secret = int.from_bytes(SECRET, "big")
    for x, share in enumerate(dealing.shares, 1):
        assert (share.index, share.value) == (x, (second * x * x + first * x + secret) % PRIME)


def test_one_share_too_few_fits_every_secret() -> None:
    """Two points and any value at 0 make a parabola: they exclude no secret."""
    shares = dealt(3).shares[:2]
    for guess in (0, 1, 2**256 - 1):
        points = [(0, guess), *((share.index, share.value) for share in shares)]
        third = lagrange(points, 3)
        forged = Share(3, third, bytes(32))
        assert recover([*shares, forged], 3, DEALER) == guess.to_bytes(32, "big")


def lagrange(points: list[tuple[int, int]], at: int) -> int:
    total = 0
    for i, (x, y) in enumerate(points):
        term = y
        for j, (other, _) in enumerate(points):
            if i != j:
                term = term * (at - other) * pow(x - other, -1, PRIME)
        total += term
    return total % PRIME


def test_other_entropy_gives_other_shares_and_the_same_gives_the_same() -> None:
    assert dealt(seed=1) == dealt(seed=1)
    one, two = dealt(seed=1), dealt(seed=2)
    assert not {s.value for s in one.shares} & {s.value for s in two.shares}
    assert not set(one.commitments) & set(two.commitments)
    assert len({share.salt for share in one.shares}) == 5


# Lies


def changed(share: Share, **changes: Any) -> Share:
    return Share(**{"index": share.index, "value": share.value, "salt": share.salt, **changes})


@pytest.mark.parametrize("what", ["value", "salt", "index", "other-holder"])
def test_a_corrupt_share_is_found_and_its_sender_named(what: str) -> None:
    dealing = dealt()
    good = dealing.shares[1]
    verify_share(SUITE, CONTEXT, good, 2, dealing.commitments, PEERS[1])
    bad = {
        "value": changed(good, value=good.value ^ 1),
        "salt": changed(good, salt=bytes(32)),
        "index": changed(good, index=3),
        "other-holder": dealing.shares[2],
    }[what]
    with pytest.raises(RemoteError, match="not the one committed to") as raised:
        verify_share(SUITE, CONTEXT, bad, 2, dealing.commitments, PEERS[1])
    assert raised.value.peer == PEERS[1]


def test_a_share_of_another_session_is_found() -> None:
    dealing = dealt()
    with pytest.raises(RemoteError):
        verify_share(SUITE, b"session 2", dealing.shares[0], 1, dealing.commitments, PEERS[0])


@pytest.mark.parametrize("index", [0, 6, -1])
def test_no_such_holder(index: int) -> None:
    dealing = dealt()
    with pytest.raises(LocalError, match=f"holder {index} of 5"):
        verify_share(SUITE, CONTEXT, dealing.shares[0], index, dealing.commitments, PEERS[0])


def test_liars_are_sorted_out_and_the_rest_recovers() -> None:
    dealing = dealt(3, 5)
    places = {peer: i for i, peer in enumerate(PEERS[:5], 1)}
    returned = dict(zip(PEERS[:5], dealing.shares, strict=True))
    returned[PEERS[0]] = changed(dealing.shares[0], value=7)
    returned[PEERS[3]] = dealing.shares[4]
    good, liars = verified_shares(SUITE, CONTEXT, returned, places, dealing.commitments)
    assert liars == (PEERS[0], PEERS[3])
    assert recover(good, 3, DEALER) == SECRET


def test_without_the_check_interpolation_gives_another_secret_silently() -> None:
    one, two, three, *_ = dealt().shares
    assert recover([one, two, changed(three, value=three.value - 1)], 3, DEALER) != SECRET


def test_contradictory_shares_name_the_dealer() -> None:
    one, two, three, four, _ = dealt().shares
    with pytest.raises(RemoteError, match="contradict") as raised:
        recover([one, two, three, changed(four, value=four.value ^ 1)], 3, DEALER)
    assert raised.value.peer == DEALER


@pytest.mark.parametrize("beyond", [2**256, PRIME - 1])
def test_a_polynomial_without_a_secret_names_the_dealer(beyond: int) -> None:
    shares = [Share(x, (beyond + 5 * x) % PRIME, bytes(32)) for x in (1, 2)]
    with pytest.raises(RemoteError, match="contradict"):
        recover(shares, 2, DEALER)


def test_a_secret_is_compared_with_its_commitment() -> None:
    commitment = commit(SUITE, "self-mask", CONTEXT, SECRET)
    verify_commitment(SUITE, "self-mask", CONTEXT, SECRET, commitment, DEALER)
    others: list[tuple[str, bytes, bytes]] = [
        ("pair-mask", CONTEXT, SECRET),
        ("self-mask", CONTEXT + b"2", SECRET),
        ("self-mask", CONTEXT, SECRET[::-1]),
    ]
    for purpose, context, secret in others:
        with pytest.raises(RemoteError, match="not the one committed to") as raised:
            verify_commitment(SUITE, purpose, context, secret, commitment, DEALER)
        assert raised.value.peer == DEALER


def test_commitments_of_suites_differ() -> None:
    assert commit(suite("sm4"), "self-mask", CONTEXT, SECRET) != commit(SUITE, "self-mask", CONTEXT, SECRET)


# Encoding and refusals


def test_a_share_survives_its_encoding() -> None:
    for share in dealt(2, 40).shares:
        assert len(share.to_bytes()) == SHARE_BYTES == 67
        assert Share.from_bytes(share.to_bytes(), PEERS[0]) == share
    largest = Share(MAX_HOLDERS, PRIME - 1, b"\xff" * 32)
    assert Share.from_bytes(largest.to_bytes(), PEERS[0]) == largest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(SHARE_BYTES),
        b"\0\1" + bytes(SHARE_BYTES),
        b"\0\1" + bytes(SHARE_BYTES - 3),
        b"\xff\xff" + bytes(SHARE_BYTES - 2),
        b"\0\1" + PRIME.to_bytes(33, "big") + bytes(32),
    ],
)
def test_bytes_that_are_no_share(data: bytes) -> None:
    with pytest.raises(Malformed) as raised:
        Share.from_bytes(data, PEERS[4])
    assert raised.value.peer == PEERS[4]


@settings(deadline=None)
@given(st.binary(max_size=80) | st.binary(min_size=SHARE_BYTES, max_size=SHARE_BYTES))
def test_whatever_bytes_come_raise_nothing_else(data: bytes) -> None:
    with suppress(Malformed):
        assert Share.from_bytes(data, PEERS[0]).to_bytes() == data


def test_wrong_calls_are_refused() -> None:
    shares = dealt().shares
    calls: list[Callable[[], object]] = [
        lambda: dealt(secret=SECRET[:-1]),
        lambda: dealt(secret=SECRET + b"\0"),
        lambda: dealt(1, 3),
        lambda: dealt(4, 3),
        lambda: dealt(2, MAX_HOLDERS + 1),
        lambda: split(SUITE, CONTEXT, SECRET, 2, 2, lambda length: bytes(length - 1)),
        lambda: recover(shares[:2], 3, DEALER),
        lambda: recover([*shares[:2], shares[1]], 3, DEALER),
        lambda: recover(shares, 0, DEALER),
        lambda: recover([], 1, DEALER),
    ]
    for call in calls:
        with pytest.raises(LocalError) as raised:
            call()
        assert SECRET.hex() not in str(raised.value)


def test_nothing_shows_a_secret() -> None:
    dealing = dealt()
    shown = [repr(dealing), str(dealing.shares), repr(dealing.shares[0])]
    bad = changed(dealing.shares[0], value=dealing.shares[0].value ^ 1)
    with pytest.raises(RemoteError) as raised:
        verify_share(SUITE, CONTEXT, bad, 1, dealing.commitments, PEERS[0])
    shown += [str(raised.value), repr(raised.value)]
    with pytest.raises(RemoteError) as raised:
        verify_commitment(SUITE, "self-mask", CONTEXT, SECRET, bytes(32), DEALER)
    shown += [str(raised.value), repr(raised.value)]
    assert repr(dealing.shares[0]) == "Share(index=1)"
    for text in shown:
        for share in (*dealing.shares, bad):
            for hidden in (str(share.value), hex(share.value)[2:], share.salt.hex(), repr(share.salt)[2:20]):
                assert hidden not in text
        assert SECRET.hex() not in text
