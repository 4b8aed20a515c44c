"""Discrete Gaussians from a keystream: their tables exactly, their digits exactly, and draws by their moments."""

import math
from decimal import Context, Decimal
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from p2pfl.core.errors import InvalidConfig, LocalError
from p2pfl.core.privacy import SAMPLING_ERROR
from p2pfl.crypto import gaussian
from p2pfl.crypto.gaussian import _BASE, _MOST, _REST, TAIL, Gaussian, _digits, _table
from p2pfl.crypto.suite import suite

SEED, OTHER = bytes(range(32)), bytes(range(1, 33))


def probabilities(deviation: float) -> dict[int, Fraction]:
    """Return with which probability a table gives each value, exactly."""
    table = _table(deviation)
    columns, found = len(table.alias), dict[int, Fraction]()
    lows = [table.low[at : at + _REST] for at in range(0, len(table.low), _REST)]
    for column, (high, low, alias) in enumerate(zip(table.high, lows, table.alias, strict=True)):
        kept = Fraction(int(high) << 320 | int.from_bytes(low), 1 << 384)
        for value, share in ((column, kept), (int(alias), 1 - kept)):
            at = value - table.tail
            found[at] = found.get(at, Fraction()) + share / columns
    return {value: share for value, share in found.items() if share}


def wanted(deviation: float, tail: int) -> dict[int, Fraction]:
    """Return the discrete Gaussian cut off at +-tail, to 150 digits, each by itself."""
    context = Context(prec=150)
    square = 2 * Fraction(deviation) ** 2
    shares = {}
    for x in range(-tail, tail + 1):
        exponent = Fraction(-x * x) / square
        divided = context.divide(Decimal(exponent.numerator), Decimal(exponent.denominator))
        shares[x] = Fraction(context.exp(divided))
    total = sum(shares.values())
    return {x: share / total for x, share in shares.items()}


@pytest.mark.parametrize("deviation", [1.0, 4.004, 23.7])
def test_a_table_gives_the_discrete_gaussian_within_the_stated_error(deviation: float) -> None:
    found, expected = probabilities(deviation), wanted(deviation, _table(deviation).tail)
    distance = sum(abs(found.get(x, Fraction()) - expected.get(x, Fraction())) for x in {*found, *expected}) / 2
    cut_off = 2 * math.exp(-(TAIL**2) / 2)
    assert float(distance) < 2.0**-380
    assert float(distance) + cut_off < SAMPLING_ERROR / 4, "for each of four tables"


def test_digits_add_up_to_a_discrete_gaussian_but_for_what_poisson_s_formula_leaves() -> None:
    """The same formula with small numbers: two digits to base 4, of deviation 16 and at least 4."""
    low, top, base = 16.0, 4.5, 4
    lower, upper = wanted(low, 160), wanted(top, 50)
    total: dict[int, float] = {}
    for x, p in lower.items():
        for y, q in upper.items():
            total[x + base * y] = total.get(x + base * y, 0.0) + float(p * q)
    deviation = math.hypot(low, base * top)
    expected = {x: math.exp(-(x**2) / (2 * deviation**2)) for x in range(-400, 401)}
    whole = sum(expected.values())
    worst = max(abs(total[x] / (expected[x] / whole) - 1) for x in range(-100, 101))
    assert worst < 1e-12


@pytest.mark.parametrize("deviation", [1.0, _MOST, _MOST * 1.0001, 370_000.0, 371_000.0, 2.0**26])
def test_digits_make_up_the_deviation_and_none_is_too_narrow(deviation: float) -> None:
    digits = _digits(deviation)
    made = math.sqrt(sum((_BASE**place * each) ** 2 for place, each in enumerate(digits)))
    assert made == pytest.approx(deviation, rel=1e-12)
    assert len(digits) <= 4
    assert all(each <= _MOST for each in digits)
    for below, above in pairwise(digits):
        narrowest = 1 / ((_BASE / below) ** 2 + 1 / above**2)
        assert 3 * math.exp(-2 * math.pi**2 * narrowest) < SAMPLING_ERROR


@pytest.mark.parametrize("name", ["aes", "sm4"])
@pytest.mark.parametrize("deviation", [1.5, 300.25, 5000.0, 3e6])
def test_draws_have_the_moments_of_a_gaussian(name: str, deviation: float) -> None:
    count = 200_000
    stream = Gaussian(suite(name), SEED, OTHER, deviation)
    drawn = stream.take(count) / deviation
    assert abs(drawn.mean()) < 5 / math.sqrt(count)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((drawn**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / math.sqrt(count)
    assert np.abs(drawn).max() * deviation <= stream.largest <= 32 * deviation


def test_a_stream_gives_the_same_under_the_same_key_and_nothing_twice() -> None:
    def drawn(seed: bytes = SEED, context: bytes = OTHER, name: str = "aes") -> Gaussian:
        return Gaussian(suite(name), seed, context, 40.0)

    first, second = drawn(), drawn()
    whole = first.take(gaussian._BLOCK + 1000)
    np.testing.assert_array_equal(whole, second.take(gaussian._BLOCK + 1000))
    others = [first, drawn(seed=OTHER), drawn(context=SEED), drawn(name="sm4")]
    for other in others:
        assert not np.array_equal(other.take(1000), whole[:1000])
    assert SEED.hex() not in repr(first) and repr(list(SEED)) not in repr(first)


class Ties:
    """A keystream that draws a column, the first bits of its threshold, and some further bytes."""

    def __init__(self, high: int, column: int, rest: bytes) -> None:
        self.answers = [column.to_bytes(2, "little"), high.to_bytes(8, "little"), rest]

    def expand_into(self, position: int, out: memoryview) -> None:
        out[:] = self.answers.pop(0)


def test_a_tie_of_the_first_bits_is_decided_by_the_others() -> None:
    table = _table(4.004)
    column = next(c for c, alias in enumerate(table.alias) if alias != c)
    low = table.low[column * _REST :][:_REST]
    below = (int.from_bytes(low) - 1).to_bytes(_REST)
    for rest, expected in ((below, column), (low, int(table.alias[column]))):
        stream = Gaussian(suite("aes"), SEED, OTHER, 4.004)
        stream._stream = Ties(int(table.high[column]), column, rest)
        assert stream.take(1).tolist() == [expected - table.tail]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(LocalError, match="32 bytes"):
        Gaussian(suite("aes"), SEED[:16], OTHER, 2.0)
    for deviation in (0.5, math.nan, 2.0**27):
        with pytest.raises(InvalidConfig, match="must lie between 1 and 2\\^26"):
            Gaussian(suite("aes"), SEED, OTHER, deviation)
