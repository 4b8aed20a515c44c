"""Coins fall as often as they should, never the same again, and never more often than their rate."""

import os
import time

import numpy as np
import pytest

from p2pfl.core.errors import LocalError
from p2pfl.crypto.coins import Coins
from p2pfl.crypto.suite import suite

SUITE = suite("aes", clock=time.perf_counter)
SEED = bytes(range(32))


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 0.999])
def test_coins_fall_as_often_as_their_rate(rate: float) -> None:
    count = 1_000_000
    fallen = int(Coins(SUITE, SEED, rate).take(count).sum())
    assert abs(fallen - rate * count) < 6 * np.sqrt(rate * (1 - rate) * count)


def test_coins_are_independent_of_each_other() -> None:
    coins = Coins(SUITE, SEED, 0.5).take(1_000_000).astype(float) - 0.5
    for lag in (1, 2, 7, 100):
        assert abs(np.mean(coins[lag:] * coins[:-lag])) < 6 * 0.25 / 1000


@pytest.mark.parametrize("name", ["aes", "sm4"])
def test_the_whole_keystream_is_used_once(name: str) -> None:
    """What is taken in parts is what is taken at once, but for what parts leave of a cipher's block."""
    one, other = (Coins(suite(name, clock=time.perf_counter), SEED, 0.5) for _ in range(2))
    parts = np.concatenate([one.take(2), one.take(100), one.take(10)])
    np.testing.assert_array_equal(parts, other.take(112))
    assert not np.array_equal(one.take(112), other.take(112)[::-1])


def test_certain_and_impossible_coins() -> None:
    assert Coins(SUITE, SEED, 1.0).take(1000).all()
    assert not Coins(SUITE, SEED, 0.0).take(1000).any()


@pytest.mark.parametrize(("seed", "rate"), [(SEED[1:], 0.5), (SEED, 1.1), (SEED, -0.1), (SEED, float("nan"))])
def test_no_coins_from_a_wrong_seed_or_rate(seed: bytes, rate: float) -> None:
    with pytest.raises(LocalError, match="a seed of 32 bytes and a rate from 0 to 1"):
        Coins(SUITE, seed, rate)


def test_a_repr_does_not_tell_the_seed() -> None:
    seed = os.urandom(32)
    assert seed.hex() not in repr(Coins(SUITE, seed, 0.5))
    assert repr(seed) not in repr(Coins(SUITE, seed, 0.5))
