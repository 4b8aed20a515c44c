"""Words of an update with noise: what its norm is, what a neighbor's differ by, and that the ring bears them."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig, LocalError, RoundFailed
from p2pfl.core.privacy import Noise
from p2pfl.crypto.gaussian import Gaussian
from p2pfl.crypto.private import private_words, verify_room
from p2pfl.crypto.ring import Ring
from p2pfl.crypto.suite import suite

SEED, CONTEXT, SIZE = bytes(range(32)), bytes(32), 1000
NOISE = Noise(clip=1.0, multiplier=1.0, honest=4)
RNG = np.random.default_rng(5)
BASE = RNG.normal(size=SIZE).astype(np.float32)
DIRECTION = RNG.normal(size=SIZE)
DIRECTION /= np.linalg.norm(DIRECTION)


def ring_of(bits: int = 32, clip: float = 8.0, members: int = 8, noise: Noise = NOISE) -> Ring:
    return Ring(bits, members, clip, noise.deviation)


def stream_of(ring: Ring, noise: Noise = NOISE) -> Gaussian:
    return Gaussian(suite("aes"), SEED, CONTEXT, noise.deviation / ring.step)


def words_of(length: float, ring: Ring, with_base: bool = True, noise: Noise = NOISE) -> NDArray[np.int64]:
    """Return the words of an update of this norm, less their noise."""
    values = (BASE + length * DIRECTION).astype(np.float32)
    words = private_words(ring, values, BASE, noise, stream_of(ring, noise), with_base=with_base)
    return words.astype(np.int64) - stream_of(ring, noise).take(SIZE)


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("length", [0.0, 0.3, 0.999, 1.0, 1.0001, 7.0, 1e6])
def test_an_update_is_no_longer_than_its_bound_in_whole_numbers(bits: int, length: float) -> None:
    noise = NOISE if bits == 32 else Noise(clip=1.0, multiplier=0.1, honest=4)
    ring = ring_of(bits, 8.0 if bits == 32 else 0.5, noise=noise)
    words, bound = words_of(length, ring, with_base=False, noise=noise), noise.clip / ring.step
    norm = math.sqrt(sum(int(word) ** 2 for word in words.tolist()))
    assert norm <= bound
    expected = min(length, noise.clip) * DIRECTION / ring.step
    assert np.abs(words - expected).max() <= 1 + 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("clip", [8.0, 1.5])
def test_a_neighbor_s_words_differ_by_no_more_than_the_bound_whatever_the_base(clip: float) -> None:
    """With a clip of 1.5 many values of base and update are cut off, which must not draw words apart."""
    ring = ring_of(clip=clip)
    with_update, without = words_of(40.0, ring), words_of(0.0, ring)
    distance = math.sqrt(sum(int(word) ** 2 for word in (with_update - without).tolist()))
    assert 0 < distance <= NOISE.clip / ring.step
    assert np.abs(with_update).max() <= ring.largest


def test_noise_is_that_of_the_stream_and_of_the_deviation() -> None:
    ring = ring_of()
    values = BASE.copy()
    values.flags.writeable = False
    words = private_words(ring, values, BASE, NOISE, stream_of(ring), with_base=False)
    np.testing.assert_array_equal(words, stream_of(ring).take(SIZE))
    assert (words * ring.step).std() == pytest.approx(0.5, rel=0.1)
    np.testing.assert_array_equal(values, BASE)


def test_words_are_written_where_the_model_was_if_it_may_be_overwritten() -> None:
    ring, values = ring_of(), BASE.copy()
    words = private_words(ring, values, BASE, NOISE, stream_of(ring), with_base=True)
    assert np.shares_memory(words, values)


@pytest.mark.parametrize("members", [3, 8, 64])
@pytest.mark.parametrize("bits", [32, 16])
def test_no_sum_of_words_with_the_most_noise_leaves_the_ring(members: int, bits: int) -> None:
    noise = NOISE if bits == 32 else Noise(clip=1.0, multiplier=0.05, honest=4)
    ring = ring_of(bits, 1.0, members, noise)
    assert members * (ring.largest + stream_of(ring, noise).largest) <= members * ring.most < 2 ** (bits - 1)
    assert ring.largest < Ring(bits, members, 1.0).largest


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_sent(value: float) -> None:
    ring, values = ring_of(), BASE.copy()
    values[17] = value
    with pytest.raises(RoundFailed, match="nothing of it was sent"):
        private_words(ring, values, BASE, NOISE, stream_of(ring), with_base=True)


def test_words_that_are_too_coarse_or_of_another_noise_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="words of 16 bits are too coarse for updates of norm 1 in 25000000 values"):
        verify_room(ring_of(16, 0.5), NOISE, 25_000_000)
    with pytest.raises(InvalidConfig, match="too coarse"):
        verify_room(Ring(16, 8, 0.5, 1e-5), Noise(1.0, 2e-5, 4), 10)
    with pytest.raises(InvalidConfig, match="leaves no room for values in 16 bits"):
        Ring(16, 8, 0.5, 1e4)
    ring = ring_of()
    other = Gaussian(suite("aes"), SEED, CONTEXT, 2 * NOISE.deviation / ring.step)
    with pytest.raises(LocalError, match="noise of another deviation"):
        private_words(ring, BASE.copy(), BASE, NOISE, other, with_base=True)
