"""Noise from a keystream: discrete Gaussian integers of any deviation, with a bounded error.

The discrete Gaussian of parameter s gives the integer x with a probability proportional to exp(-x^2 / (2 s^2))
(Canonne, Kamath and Steinke 2020, arXiv 2004.00010, definition 1). It is drawn here from tables, not by rejection as
there (algorithm 3): a value takes 10 bytes of keystream for each table and no loop, so whole vectors are drawn at once.

*One table*, for s up to `_MOST`: Walker's alias method with 2^k columns. Weights are integers of 576 bits, thresholds
have 384 bits; all but the first 64 of them are looked at only where these leave it open. So a column's threshold is off
by less than 2^-384, and with it the distribution, in total variation. Values beyond 22 s are left out: together they
have less than 2 exp(-22^2 / 2) < 2^-348. So much, as the error counts e^epsilon times.

*Digits*, for larger s: X + 128 Y, with X of deviation 1024 and Y of sqrt(s^2 - 1024^2) / 128, which again may have
digits. Given x = X + 128 Y, the exponents' sum is that of x under s and one of y around a multiple of x, with deviation
t, 1 / t^2 = 128^2 / 1024^2 + 1 / s_Y^2. Summed over all integers y the latter is the same for all x but for a factor
within 1 +- 3 exp(-2 pi^2 t^2), by Poisson's summation formula. As s_Y >= 8, t^2 >= 32: that is 2^-909. (Micciancio and
Walter, CRYPTO 2017, sample so, in the same way.)

With up to four tables a value's total variation from the discrete Gaussian is below 2^-340:
`p2pfl.core.privacy.SAMPLING_ERROR`. Which entries are read follows from the noise: this is not constant-time.
"""

from dataclasses import dataclass, field
from decimal import Context, Decimal
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import InvalidConfig, LocalError
from p2pfl.crypto.masks import SEED_BYTES
from p2pfl.crypto.suite import BLOCK_BYTES, Suite

TAIL = 22
"""Deviations of a table; see above."""
MOST_DEVIATION = 2.0**26
"""In units of the words: more than fits into any ring."""
_BASE, _DIGIT = 128, 1024
_MOST = float(np.sqrt(_DIGIT**2 + (8 * _BASE) ** 2))
_BITS, _DECIMALS = 576, 200
_FIRST, _REST = 64, 40
"""Bits of a threshold that are always compared, and bytes of it that hardly ever are."""
_BLOCK = 1 << 15
"""Values drawn at a time: what they take stays in the second-level cache, as masks do."""

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Walker's tables of one deviation: column c gives c - tail, or alias[c] - tail.

    Attributes:
        tail: the largest absolute value.
        high: uint64 [columns]: the first bits of the threshold below which a column gives itself.
        low: its further bytes, `_REST` of each column, the highest first.
        alias: uint16 [columns].
    """

    tail: int
    high: NDArray[np.uint64]
    low: bytes
    alias: NDArray[np.uint16]


def _weights(deviation: float, tail: int) -> list[int]:
    """Return exp(-x^2 / (2 deviation^2)) for x = 0 to tail, in units of 2^-_BITS.

    Each follows from the one before: what is cut off adds up to less than tail^2 units.
    """
    context = Context(prec=_DECIMALS)
    square = context.multiply(Decimal(deviation), Decimal(deviation))
    one = 1 << _BITS
    ratio, change = (int(context.multiply(context.exp(context.divide(Decimal(x), square)), Decimal(one)))
                     for x in (Decimal("-0.5"), Decimal(-1)))  # fmt: skip
    found = [one]
    for _ in range(tail):
        found.append(found[-1] * ratio >> _BITS)
        ratio = ratio * change >> _BITS
    return found


@cache
def _table(deviation: float) -> _Table:
    """Make the tables of one deviation (Walker 1977; Vose 1991), in whole numbers throughout."""
    tail = int(np.ceil(TAIL * deviation))
    half = _weights(deviation, tail)
    weights = [*reversed(half[1:]), *half]
    columns = 1 << (len(weights) - 1).bit_length()
    total = sum(weights)
    shares = [weight * columns for weight in weights] + [0] * (columns - len(weights))
    bits = _FIRST + 8 * _REST
    thresholds, alias = [(1 << bits) - 1] * columns, list(range(columns))
    small = [column for column, share in enumerate(shares) if share < total]
    large = [column for column, share in enumerate(shares) if share >= total]
    while small and large:
        column, other = small.pop(), large[-1]
        thresholds[column], alias[column] = (shares[column] << bits) // total, other
        shares[other] -= total - shares[column]
        if shares[other] < total:
            small.append(large.pop())
    whole = [threshold.to_bytes(bits // 8) for threshold in thresholds]
    high = np.array([threshold >> 8 * _REST for threshold in thresholds], np.uint64)
    return _Table(tail, high, b"".join(each[-_REST:] for each in whole), np.array(alias, np.uint16))


def _digits(deviation: float) -> list[float]:
    """Return the deviations of the digits to base 128, the lowest first."""
    found = []
    while deviation > _MOST:
        found.append(float(_DIGIT))
        deviation = float(np.sqrt(deviation**2 - _DIGIT**2)) / _BASE
    return [*found, deviation]


@dataclass(slots=True)
class Gaussian:
    """A stream of discrete Gaussian integers; each is given once, in order. Its `repr` shows nothing of them.

    Args:
        suite: the charter's.
        seed: 32 bytes that nobody can foresee, for this stream alone.
        context: what it is for, 32 bytes.
        deviation: in units of the integers, 1 to `MOST_DEVIATION`.

    Raises:
        LocalError: a length is wrong.
        InvalidConfig: no such deviation.
    """

    suite: Suite = field(repr=False)
    seed: bytes = field(repr=False)
    context: bytes = field(repr=False)
    deviation: float
    _stream: Any = field(init=False, repr=False)
    _position: int = field(init=False, repr=False, default=0)
    _tables: list[_Table] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.seed) != SEED_BYTES or len(self.context) != SEED_BYTES:
            raise LocalError(f"a noise's seed and context have {SEED_BYTES} bytes each")
        if not 1 <= self.deviation <= MOST_DEVIATION:
            raise InvalidConfig(f"noise of a deviation of {self.deviation:g} units; it must lie between 1 and 2^26")
        info = canonical(["p2pfl/gaussian/1", self.suite.name])
        key = self.suite.hkdf(self.seed, self.context, info, self.suite.key_bytes)
        self._stream = self.suite.keystream(key)
        self._tables = [_table(each) for each in _digits(self.deviation)]

    @property
    def largest(self) -> int:
        """The largest absolute value that can come: below 32 deviations, whichever tables it is made of."""
        return sum(table.tail * _BASE**place for place, table in enumerate(self._tables))

    def take(self, count: int) -> Integers:
        """Return the next values, int64 [count]."""
        values: Integers = np.empty(count, np.int64)
        for begin in range(0, count, _BLOCK):
            part = values[begin : begin + _BLOCK]
            part[:] = 0
            for table in reversed(self._tables):
                part *= _BASE
                part += self._draw(table, part.size)
        return values

    def _draw(self, table: _Table, count: int) -> NDArray[Any]:
        columns = self._bytes(2 * count).view("<u2") & np.uint16(len(table.alias) - 1)
        tried = self._bytes(8 * count).view("<u8")
        threshold = table.high[columns]
        kept = tried < threshold
        for place in np.flatnonzero(tried == threshold):
            column = int(columns[place])
            kept[place] = self._bytes(_REST).tobytes() < table.low[column * _REST : (column + 1) * _REST]
        return np.where(kept, columns, table.alias[columns]).astype(np.int64) - table.tail

    def _bytes(self, count: int) -> NDArray[np.uint8]:
        """Return the next bytes of the stream, up to a cipher block's end, uint8 [count]."""
        data = np.empty(count, np.uint8)
        self._stream.expand_into(self._position, data.data)
        self._position += -(-count // BLOCK_BYTES) * BLOCK_BYTES
        return data
