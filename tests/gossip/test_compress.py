"""Compressors keep what they promise, and are as long as they say."""

import math

import numpy as np
import pytest

from p2pfl.core.errors import InvalidConfig, Malformed
from p2pfl.gossip.compress import (
    COMPRESSORS,
    Identity,
    LowRank,
    Quantise,
    RandK,
    SignNorm,
    TopK,
    compressor,
)

SHAPES = ((12, 9), (12,), (4, 3, 3, 3), (4,), (2, 2))
VALUES = sum(math.prod(shape) for shape in SHAPES)
EVERY = [
    *(Identity(), RandK(0.1), RandK(1.0), TopK(0.02), TopK(0.5), TopK(1.0), Quantise(8), Quantise(4), Quantise(4, 50)),
    *(Quantise(2, 3), SignNorm(), LowRank(SHAPES, 1), LowRank(SHAPES, 3)),
]


def generator(seed=0):
    return np.random.default_rng(seed)


def rows_of(n, values=VALUES, seed=1):
    """Rows whose values have many magnitudes."""
    random = generator(seed)
    return (random.standard_normal((n, values)) * np.exp(2 * random.standard_normal((n, values)))).astype(np.float32)


def test_every_compressor_is_tried():
    assert {type(each) for each in EVERY} == set(COMPRESSORS.values())


@pytest.mark.parametrize("compress", EVERY, ids=repr)
def test_what_is_sent_is_what_receivers_make_of_it(compress):
    for seed, row in enumerate([*rows_of(3), np.zeros(VALUES, np.float32), np.full(VALUES, -2.5, np.float32)]):
        made, sizes = compress(row[None], generator(seed))
        payload = compress.encode(row, generator(seed))
        assert len(payload) == sizes[0] == compress.size(VALUES)
        np.testing.assert_array_equal(compress.decode(payload, VALUES, generator(seed)), made[0])
        assert made.dtype == np.float32


@pytest.mark.parametrize("values", [1, 2, 7, 8, 9, 255, 257])
def test_lengths_are_exact_for_any_number_of_values(values):
    row = rows_of(1, values)[0]
    for compress in (*EVERY[:-2], LowRank(((values,),), 1)):
        payload = compress.encode(row, generator())
        assert len(payload) == compress.size(values), compress
        np.testing.assert_array_equal(
            compress.decode(payload, values, generator()), compress(row[None], generator())[0][0]
        )


def test_bytes_that_can_be_counted_by_hand():
    assert Identity().size(1000) == 4000
    assert RandK(0.1).size(1000) == 400
    assert TopK(0.01).size(1000) == 40 + 13  # ten places of ten bits
    assert TopK(0.5).size(1000) == 2000 + 125  # a bit for each value
    assert Quantise(8, 250).size(1000) == 1000 + 16
    assert Quantise(4, 1000).size(1001) == 501 + 8
    assert SignNorm().size(1000) == 125 + 4
    assert LowRank(((40, 20), (40,)), 2).size(840) == 4 * (2 * 60 + 40)
    assert LowRank(((2, 2), (4,)), 1).size(8) == 4 * 8  # products would be as long


@pytest.mark.parametrize("compress", EVERY, ids=repr)
def test_a_share_of_the_norm_is_kept(compress):
    delta = compress.keeps(VALUES)
    assert 0 < delta <= 1
    rows = rows_of(6)
    left = np.zeros(len(rows))
    draws = 300
    random = generator()
    for _ in range(draws):
        left += np.square(rows - compress(rows, random)[0], dtype=np.float64).sum(1) / draws
    share = left / np.square(rows, dtype=np.float64).sum(1)
    # Places drawn at random keep exactly their share on average; heavy tails make that average a noisy one.
    assert (share <= (1 - delta) * (1.15 if isinstance(compress, RandK) else 1.0) + 1e-6).all()


def test_promises_are_tight_where_the_worst_vector_is_known():
    sign = np.zeros((1, 64), np.float32)
    sign[0, 3] = 2.0
    assert np.square(sign - SignNorm()(sign, generator())[0]).sum() / 4 == pytest.approx(1 - SignNorm().keeps(64))
    top = np.ones((1, 50), np.float32)
    assert np.square(top - TopK(0.2)(top, generator())[0]).sum() / 50 == pytest.approx(1 - TopK(0.2).keeps(50))
    # 4 bits, a bucket of 256: one value at the top, the others where rounding costs most of their norm.
    coarse, c = Quantise(4, 256), 49 / 256
    worst = (math.sqrt(1 + 1 / c) - 1) / 2
    rows = np.full((400, 256), 1 / (2 * (1 + worst)) / 7, np.float32)
    rows[:, 0] = 1.0
    error = np.square(rows - coarse(rows, generator())[0]).sum(1).mean() / np.square(rows[0]).sum()
    assert error == pytest.approx(1 - coarse.keeps(256), rel=0.02)


@pytest.mark.parametrize("compress", [each for each in EVERY if each.unbiased], ids=repr)
def test_the_mean_of_unbiased_compressors_is_right(compress):
    rows, draws = rows_of(1), 2000
    made = compress(np.repeat(rows, draws, axis=0), generator())[0].mean(0, dtype=np.float64)
    step = np.abs(rows).max() / compress.levels if isinstance(compress, Quantise) else 0.0
    # Rounding at random has a deviation of half a step at most.
    np.testing.assert_allclose(made, rows[0], rtol=1e-5, atol=5 * step / 2 / math.sqrt(draws))


def test_sums_of_what_is_sent_are_what_is_sent_of_the_sum():
    rows = rows_of(4).astype(np.float64).round(2)
    for compress in (Identity(), RandK(0.3)):
        assert compress.linear
        one = compress(rows, generator(5))[0].sum(0)
        np.testing.assert_allclose(one, compress(rows.sum(0)[None], generator(5))[0][0], rtol=1e-4, atol=1e-4)
    places = [np.flatnonzero(RandK(0.3)(rows, generator(seed))[0][0]) for seed in (1, 1, 2)]
    assert np.array_equal(places[0], places[1]) and not np.array_equal(places[0], places[2])


def test_a_matrix_of_low_rank_arrives_whole():
    random = generator()
    matrix = (random.standard_normal((30, 2)) @ random.standard_normal((2, 20))).astype(np.float32)
    compress = LowRank(((30, 20),), 2)
    np.testing.assert_allclose(compress(matrix.reshape(1, -1), random)[0].reshape(30, 20), matrix, atol=1e-4)


@pytest.mark.parametrize("compress", [TopK(0.1), SignNorm(), Quantise(4, 100), LowRank(SHAPES, 1)], ids=repr)
def test_with_feedback_nothing_is_lost_for_good(compress):
    rows, random = rows_of(3), generator()
    residual, received = np.zeros_like(rows), np.zeros_like(rows)
    lost = []
    for round_ in range(1, 121):
        wanted = rows + residual
        sent, sizes = compress(wanted, random)
        residual = wanted - sent
        received += sent
        # What has not arrived is the residual, and it stays bounded: the mean of what arrives goes to the rows.
        lost.append(np.linalg.norm(received / round_ - rows, axis=1) / np.linalg.norm(rows, axis=1))
    np.testing.assert_allclose(received + residual, 120 * rows, rtol=1e-3, atol=1e-2)
    assert (sizes == compress.size(VALUES)).all()
    assert (lost[-1] < 0.7 * lost[11]).all()


@pytest.mark.parametrize("compress", EVERY, ids=repr)
def test_what_nobody_sends_is_refused(compress):
    payload = compress.encode(rows_of(1)[0], generator())
    for wrong in (b"", payload[:-1], payload + b"\0"):
        with pytest.raises(Malformed, match="bytes for"):
            compress.decode(wrong, VALUES, generator())
    infinite = np.float32(np.inf).tobytes() + payload[4:]
    with pytest.raises(Malformed, match="not finite"):
        compress.decode(infinite, VALUES, generator())


def test_what_is_out_of_range_is_refused():
    def refused(compress, values, payload, words):
        with pytest.raises(Malformed, match=words):
            compress.decode(bytes(payload), values, generator())

    four = np.ones(1, np.float32).tobytes()
    refused(TopK(0.01), 100, four + bytes([101]), "ascending")  # one place of seven bits: 101 is not below 100
    refused(TopK(0.01), 100, four + bytes([0x80]), "behind the last")
    refused(TopK(0.02), 100, 2 * four + bytes([0x85, 0x02]), "ascending")  # 5 and 5
    refused(TopK(0.5), 8, 4 * four + bytes([0b10101]), "ascending")  # three places, not four
    refused(Quantise(4), 2, four + bytes([0xF0]), "multiples above")
    refused(Quantise(4), 3, four + bytes([0x77, 0x17]), "behind the last")
    refused(Quantise(8), 1, np.float32(-1).tobytes() + bytes([127]), "below 0")
    refused(SignNorm(), 3, np.float32(-1).tobytes() + bytes([1]), "below 0")
    refused(SignNorm(), 3, np.float32(np.nan).tobytes() + bytes([1]), "below 0")
    refused(SignNorm(), 3, four + bytes([8]), "behind the last")
    largest = np.full(6, 3e38, np.float32)
    refused(LowRank(((3, 3),), 1), 9, largest.tobytes(), "not finite")


def test_what_does_not_fit_is_refused_in_one_line():
    for make in (
        *(lambda: RandK(0.0), lambda: TopK(1.5), lambda: Quantise(9), lambda: Quantise(8, 0), lambda: LowRank((), 0)),
        *(lambda: LowRank(((3, 3),), 1).size(8), lambda: compressor("zip", SHAPES)),
    ):
        with pytest.raises(InvalidConfig) as raised:
            make()
        assert "\n" not in str(raised.value)


def test_compressors_are_made_by_name_from_the_options_they_have():
    given = {"ratio": 0.3, "bits": 4, "rank": 1}
    assert compressor("top-k", SHAPES, **given) == TopK(0.3)
    assert compressor("quantise", SHAPES, **given) == Quantise(4)
    assert compressor("low-rank", SHAPES, **given) == LowRank(SHAPES, 1)
    assert compressor("none", SHAPES, **given) == Identity()


def test_nonsense_gives_nonsense_and_no_error():
    rows = np.array([[np.nan, 1.0] * (VALUES // 2), [np.inf, -1.0] * (VALUES // 2)], np.float32)
    rows = np.concatenate([rows, np.zeros((2, VALUES - rows.shape[1]), np.float32)], axis=1)
    for compress in EVERY:
        assert compress(rows, generator())[0].shape == rows.shape
