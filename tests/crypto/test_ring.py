import math
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import InvalidConfig, LocalError, RemoteError, RoundFailed
from p2pfl.crypto.ring import (
    HEADER_BYTES,
    WEIGHT_ONE,
    Layout,
    Ring,
    Totals,
    decode_into,
    header_of,
    read_header,
    verify_clipped,
    weight_of,
)

BITS = st.sampled_from([16, 32])
MEMBERS = st.integers(1, 300)
CLIPS = st.floats(1e-6, 1e6)
WEIGHTS = st.integers(1, WEIGHT_ONE)
RINGS = st.builds(Ring, BITS, MEMBERS, CLIPS)


def float32(value: float) -> float:
    """Round to float32, to nearest and ties to even, without numpy."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def float32_below(exact: Fraction) -> float:
    """Round a positive rational down to float32."""
    exponent = math.floor(math.log2(exact)) - 26
    candidate = float32(float(exact))
    while Fraction(candidate) > exact:
        candidate = float32(candidate - 2.0**exponent * 8)
    return candidate


def word_of(value: float, bits: int, members: int, clip: float, weight: int) -> tuple[int, bool]:
    """Return a value's integer, and whether it was clipped: the formulas of the module's docstring, one at a time."""
    largest = (2 ** (bits - 1) - 1) // members
    while float32(largest) != largest:
        largest -= 1
    factor = float32_below(Fraction(weight, WEIGHT_ONE) * largest / Fraction(clip))
    word = round(float32(value * factor))  # exact in double precision, so rounded once to float32, then to a word
    if abs(word) > largest:
        return int(math.copysign(largest, word)), True
    return word, False


def rounded(ring: Ring, values: list[float], weight: int) -> tuple[list[int], int]:
    array = np.array(values, np.float32)
    out = np.empty_like(array)
    clipped = ring.count_clipped(array, weight)
    ring.round_into(array, weight, out)
    if not clipped:
        unclipped = np.empty_like(array)
        ring.round_into(array, weight, unclipped, clip=False)
        assert np.array_equal(unclipped, out)
    return [int(value) for value in out], clipped


@settings(max_examples=200, deadline=None)
@given(RINGS, WEIGHTS, st.lists(st.floats(-2, 2, width=32), max_size=40))
@example(Ring(16, 1, 1.0), 52429, [1.25])  # just beyond the clip, and rounded to it
def test_words_are_those_of_the_formula(ring: Ring, weight: int, values: list[float]) -> None:
    scaled = [float32(value * ring.clip) for value in values]
    expected = [word_of(value, ring.bits, ring.members, ring.clip, weight) for value in scaled]
    words, clipped = rounded(ring, scaled, weight)
    assert words == [word for word, _ in expected]
    assert clipped == sum(was for _, was in expected)


@pytest.mark.parametrize("bits", [16, 32])
def test_no_number_of_members_can_overflow(bits: int) -> None:
    highest = 2 ** (bits - 1) - 1
    for members in [*range(1, 2000), 4095, 4096, 10_922, 32_767]:
        largest = Ring(bits, members, 1.0).largest
        assert 0 < largest * members <= highest
        assert int(np.float32(largest)) == largest
        exact = highest // members
        assert largest == exact if exact < 2**24 else exact - largest < 128


@settings(max_examples=300, deadline=None)
@given(RINGS, WEIGHTS, st.sampled_from([1, -1]))
def test_a_value_at_the_clip_is_not_clipped_and_the_next_ones_are(ring: Ring, weight: int, sign: int) -> None:
    alpha = weight / WEIGHT_ONE
    at = float32_below(Fraction(ring.clip) / Fraction(alpha))
    words, clipped = rounded(ring, [sign * at], weight)
    assert clipped == 0
    assert ring.largest - 1 - ring.largest * 2**-21 <= sign * words[0] <= ring.largest
    beyond = at * (1 + 2 / ring.largest + 2**-20)
    assert rounded(ring, [sign * beyond] * 3, weight) == ([sign * ring.largest] * 3, 3)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("members", [1, 2, 3, 7, 8, 16, 255, 1000])
@pytest.mark.parametrize("signs", ["+", "-", "+-"])
@pytest.mark.parametrize("scale", [1.0, 1e4, 3e38], ids=["at-clip", "beyond", "far-beyond"])
def test_full_clips_of_all_members_at_full_weight_do_not_overflow(
    bits: int, members: int, signs: str, scale: float
) -> None:
    ring = Ring(bits, members, 1.0)
    total = np.zeros(1, ring.signed)
    exact = 0
    for member in range(members):
        sign = 1 if signs[member % len(signs)] == "+" else -1
        (word,), clipped = rounded(ring, [sign * scale], WEIGHT_ONE)
        assert (word, clipped) == (sign * ring.largest, int(scale > 1))
        exact += word
        total += np.array([word]).astype(ring.signed)
    assert int(total[0]) == exact


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_decoded_sum_is_within_its_bound(data: st.DataObject) -> None:
    bits, members = data.draw(BITS), data.draw(st.integers(1, 12))
    clip = data.draw(CLIPS)
    contributors = data.draw(st.integers(1, members))
    ring = Ring(bits, members, clip)
    total, exact, largest = 0, Fraction(0), 0.0
    for _ in range(contributors):
        weight = data.draw(WEIGHTS)
        value = float32(data.draw(st.floats(-1, 1) | st.sampled_from([1.0, -1.0])) * clip)
        (word,), clipped = rounded(ring, [value], weight)
        if clipped:  # the float32 of a clip may be above it
            return
        total += word
        exact += Fraction(weight, WEIGHT_ONE) * Fraction(value)
        largest = max(largest, abs(value) * weight / WEIGHT_ONE)
    out = np.empty(1, np.float32)
    words = np.array([total]).astype(ring.signed)
    decode_into(ring, bytes(HEADER_BYTES) + words.tobytes(), contributors, 1.0, out)
    error = float(abs(Fraction(float(out[0])) - exact))
    assert error <= ring.error_bound(contributors, largest, float(abs(exact)))
    assert error <= ring.error_bound(contributors, largest) <= ring.error_bound(contributors, 1.0001 * clip)


def test_the_bound_is_mostly_half_a_step_for_each_contributor() -> None:
    ring = Ring(16, 8, 1.0)
    assert ring.error_bound(8) == pytest.approx(8 * ring.step / 2, rel=0.01)
    assert ring.step == pytest.approx(1 / 4095)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 17, 65_536, 65_537, 200_000])
def test_nan_and_infinity_are_refused_wherever_they_are(wrong: float, size: int) -> None:
    ring = Ring(32, 8, 1.0)
    for place in {0, size // 2, size - 1}:
        values = np.zeros(size, np.float32)
        values[place] = wrong
        with pytest.raises(RoundFailed, match="NaN or infinity"):
            ring.count_clipped(values, WEIGHT_ONE)


def test_clipped_coordinates_are_counted_over_blocks() -> None:
    values = np.zeros(200_000, np.float32)
    values[[0, 65_535, 65_536, 199_999]] = [2, -2, 3e38, -3e38]
    ring = Ring(16, 8, 1.0)
    assert ring.count_clipped(values, WEIGHT_ONE) == 4
    assert ring.count_clipped(values[:0], WEIGHT_ONE) == 0
    verify_clipped(200, 200_000)
    verify_clipped(0, 0)
    with pytest.raises(InvalidConfig, match=r"201 of 200000 coordinates exceed the clip, over 0.1%: raise it"):
        verify_clipped(201, 200_000)


def test_values_that_vanish_round_to_zero() -> None:
    assert rounded(Ring(32, 8, 2.0**64), [1e-45, -1e-45, 0.0, -0.0], 1) == ([0, 0, 0, 0], 0)


@pytest.mark.parametrize("weight", [0, -1, WEIGHT_ONE + 1])
def test_a_weight_out_of_range_is_refused(weight: int) -> None:
    with pytest.raises(LocalError, match="a weight is between"):
        Ring(32, 8, 1.0).factor(weight)


@pytest.mark.parametrize(
    ("bits", "members", "clip"),
    [(8, 8, 1.0), (64, 8, 1.0), (32, 0, 1.0), (16, 32_768, 1.0), (32, 65_536, 1.0)]
    + [(32, 8, clip) for clip in (0.0, -1.0, math.nan, math.inf, 1e30, 1e-30)],
)
def test_no_such_ring(bits: int, members: int, clip: float) -> None:
    with pytest.raises(InvalidConfig):
        Ring(bits, members, clip)


# Layout


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 70), BITS)
def test_chunks_cover_the_vector_and_their_streams_do_not_overlap(values: int, count: int, bits: int) -> None:
    layout = Layout(values, count, bits)
    chunks = [layout.chunk(index) for index in range(count)]
    next_value, next_byte = 0, 0
    for chunk in chunks:
        assert chunk.first == next_value
        assert chunk.position >= next_byte
        assert chunk.position % 16 == 0
        assert chunk.size == HEADER_BYTES + chunk.count * bits // 8
        next_value += chunk.count
        next_byte = chunk.position + chunk.size
    assert next_value == values
    assert max(c.count for c in chunks) - min(c.count for c in chunks) <= 1


@pytest.mark.parametrize(("values", "chunks", "bits"), [(-1, 1, 32), (1, 0, 32), (1, 1, 8)])
def test_no_such_layout(values: int, chunks: int, bits: int) -> None:
    with pytest.raises(InvalidConfig):
        Layout(values, chunks, bits)


@pytest.mark.parametrize("index", [-1, 3])
def test_no_such_chunk(index: int) -> None:
    with pytest.raises(LocalError, match=f"chunk {index} of 3"):
        Layout(10, 3, 32).chunk(index)


# Weights and headers


@pytest.mark.parametrize(
    ("samples", "most", "floor", "weight"),
    [
        (10, 10, 0.5, WEIGHT_ONE),
        (0, 10, 0.5, WEIGHT_ONE // 2),
        (0, 0, 1.0, WEIGHT_ONE),
        (75, 100, 0.5, 49_152),
        (0, 1, 1e-9, 1),
        (1, 3, 0.1, 21_845),
    ],
)
def test_weights(samples: int, most: int, floor: float, weight: int) -> None:
    assert weight_of(samples, most, floor) == weight


@pytest.mark.parametrize(("samples", "most", "floor"), [(11, 10, 0.5), (-1, 10, 0.5), (1, 1, 0.0), (1, 1, 1.1)])
def test_no_such_weight(samples: int, most: int, floor: float) -> None:
    with pytest.raises(InvalidConfig):
        weight_of(samples, most, floor)


def summed(*headers: bytes) -> bytes:
    total = np.zeros(4, "<u4")
    for header in headers:
        total += np.frombuffer(header, "<u4")
    return total.tobytes()


def test_the_sum_of_headers_tells_the_weight() -> None:
    assert header_of(WEIGHT_ONE).hex() == "00000100" + "01000000" + "00" * 8
    assert read_header(summed(header_of(1), header_of(WEIGHT_ONE), header_of(500)), 3, 3).weight == WEIGHT_ONE + 501
    # the most members that a ring of 32 bits admits, all of weight one
    most = read_header(struct.pack("<4I", 65_535 * WEIGHT_ONE, 65_535, 0, 0), 65_535, 65_535)
    assert most == Totals(65_535 * WEIGHT_ONE)


WRONG_HEADERS: dict[str, Any] = {
    "canary": (1000, 3, 0, 0),
    "first-zero": (1000, 2, 1, 0),
    "second-zero": (1000, 2, 0, 1 << 31),
    "no-weight": (1, 2, 0, 0),
    "too-much-weight": (2 * WEIGHT_ONE + 1, 2, 0, 0),
}


@pytest.mark.parametrize("words", WRONG_HEADERS.values(), ids=WRONG_HEADERS.keys())
def test_a_wrong_header_is_found(words: tuple[int, ...]) -> None:
    with pytest.raises(RemoteError, match="header of a sum of 2 chunks is wrong"):
        read_header(struct.pack("<4I", *words), 2, 8)


def test_a_sum_without_a_header_is_refused() -> None:
    with pytest.raises(RemoteError, match="15 bytes has no header"):
        read_header(bytes(15), 1, 1)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("sign", [1, -1])
def test_more_than_the_contributors_can_have_summed_to_is_refused(bits: int, sign: int) -> None:
    ring = Ring(bits, 8, 1.0)
    out = np.empty(70_000, np.float32)
    words = np.zeros(70_000, ring.signed)
    words[-1] = sign * 2 * ring.largest
    decode_into(ring, bytes(HEADER_BYTES) + words.tobytes(), 2, 2.0, out)
    assert out[-1] == sign
    assert not out[:-1].any()
    words[-1] += sign
    with pytest.raises(RemoteError, match="beyond what 2 members"):
        decode_into(ring, bytes(HEADER_BYTES) + words.tobytes(), 2, 2.0, out)


def test_a_sum_of_another_length_is_refused() -> None:
    with pytest.raises(LocalError):
        decode_into(Ring(32, 8, 1.0), bytes(HEADER_BYTES + 8), 1, 1.0, np.empty(3, np.float32))
