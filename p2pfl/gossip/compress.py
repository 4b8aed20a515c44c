"""Vectors in fewer bytes: what each compressor sends, what its receivers make of it, and exactly how long it is.

Owns the encodings, and for each compressor the share delta of a vector's squared norm that it keeps:
E|x - C(x)|^2 <= (1 - delta) |x|^2. Must not know what is compressed, nor keep anything from one vector to the next: the
residual of error feedback is the caller's.

All peers' vectors are compressed at once, as rows; one peer's bytes are those of its row alone. A value that does not
arrive is 0. What a decoder gets is checked: its length, and that all of it is in range and finite.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig, Malformed

Floats = NDArray[np.float32]
Parts = tuple[NDArray[Any], ...]
"""What is sent, for all rows: arrays [n, ...]."""

FLOAT = np.dtype("<f4")


class Compressor(ABC):
    """Makes vectors shorter. Rows that are not finite give nonsense, but no error.

    Attributes:
        name: as scenarios call it.
        source: where it was published.
        linear: whether C(x) + C(y) = C(x + y) where both draw from generators of equal states: then sums of what is
            sent are worth having, and masks can hide the summands.
        unbiased: whether E C(x) = x.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    linear: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False

    @abstractmethod
    def size(self, values: int) -> int:
        """Return how many bytes a vector of so many values takes: the length of what `encode` returns."""

    @abstractmethod
    def keeps(self, values: int) -> float:
        """Return delta, as above, for the worst of all vectors of so many values; below 0: none is promised."""

    def __call__(self, rows: NDArray[Any], random: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
        """Compress rows, [n, P]; return what their receivers make of them, float32 [n, P], and bytes, int64 [n]."""
        values = rows.shape[1]
        with np.errstate(over="ignore", invalid="ignore"):
            made = self._expand(self._parts(np.asarray(rows, np.float32), random), values)
        return made, np.full(len(rows), self.size(values), np.int64)

    def encode(self, vector: NDArray[Any], random: np.random.Generator) -> bytes:
        """Return what is sent of a vector, [P], all finite."""
        return self._pack(self._parts(np.asarray(vector, np.float32)[None], random), len(vector))

    def decode(self, payload: bytes, values: int, random: np.random.Generator) -> Floats:
        """Return what a receiver makes of what was sent, float32 [P].

        Args:
            payload: from another peer.
            values: P, as we know it; memory is taken for so many.
            random: in the state in which the sender's was, where all peers draw alike; not used elsewhere.

        Raises:
            Malformed: nobody who keeps to the encoding sends this.
        """
        if len(payload) != self.size(values):
            raise Malformed(f"{len(payload)} bytes for {values} values by {self.name}, which takes {self.size(values)}")
        with np.errstate(over="ignore", invalid="ignore"):
            vector: Floats = self._expand(self._unpack(payload, values, random), values)[0]
        if not np.isfinite(vector).all():
            raise Malformed(f"values by {self.name} that are not finite")
        return vector

    @abstractmethod
    def _parts(self, rows: Floats, random: np.random.Generator) -> Parts:
        """Return what is sent of rows, [n, P]."""

    @abstractmethod
    def _expand(self, parts: Parts, values: int) -> Floats:
        """Return what receivers make of it, a new array [n, P]."""

    @abstractmethod
    def _pack(self, parts: Parts, values: int) -> bytes:
        """Return the bytes of the parts of a single row."""

    @abstractmethod
    def _unpack(self, payload: bytes, values: int, random: np.random.Generator) -> Parts:
        """Return the parts of a single row from as many bytes as there have to be.

        Raises:
            Malformed: what they hold is out of range.
        """


@dataclass(frozen=True)
class Identity(Compressor):
    """All values, as float32."""

    name = "none"
    source = "no compression"
    linear = True
    unbiased = True

    def size(self, values: int) -> int:
        """Return 4 bytes for each value."""
        return FLOAT.itemsize * values

    def keeps(self, values: int) -> float:
        """Return 1: all of it."""
        del values
        return 1.0

    def _parts(self, rows: Floats, random: np.random.Generator) -> Parts:
        del random
        return (rows,)

    def _expand(self, parts: Parts, values: int) -> Floats:
        del values
        return np.array(parts[0])

    def _pack(self, parts: Parts, values: int) -> bytes:
        del values
        return parts[0].astype(FLOAT).tobytes()

    def _unpack(self, payload: bytes, values: int, random: np.random.Generator) -> Parts:
        del values, random
        return (np.frombuffer(payload, FLOAT)[None],)


@dataclass(frozen=True)
class _Some(Compressor):
    """A share of the values, at least one; a tenth, a guess, unless `ratio` says otherwise."""

    ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise InvalidConfig(f"ratio is {self.ratio}; it must be over 0, to 1")

    def count(self, values: int) -> int:
        """Return how many of so many values are sent."""
        return max(1, round(self.ratio * values))

    def keeps(self, values: int) -> float:
        """Return the share that is sent."""
        return self.count(values) / values


@dataclass(frozen=True)
class RandK(_Some):
    """The values in places that all peers draw alike from a common seed, so that no place is sent."""

    name = "rand-k"
    source = "Stich, Cordonnier, Jaggi 2018, arXiv 1809.07599; places drawn alike: Tang et al. 2020, arXiv 2002.09692"
    linear = True

    def size(self, values: int) -> int:
        """Return 4 bytes for each value that is sent."""
        return FLOAT.itemsize * self.count(values)

    def places(self, values: int, random: np.random.Generator) -> NDArray[np.int64]:
        """Draw the places of what is sent, ascending, int64 [count]."""
        return np.sort(random.permutation(values)[: self.count(values)])

    def _parts(self, rows: Floats, random: np.random.Generator) -> Parts:
        places = self.places(rows.shape[1], random)
        return rows[:, places], np.broadcast_to(places, (len(rows), len(places)))

    def _expand(self, parts: Parts, values: int) -> Floats:
        return _placed(parts[0], parts[1], values)

    def _pack(self, parts: Parts, values: int) -> bytes:
        del values
        return parts[0].astype(FLOAT).tobytes()

    def _unpack(self, payload: bytes, values: int, random: np.random.Generator) -> Parts:
        return np.frombuffer(payload, FLOAT)[None], self.places(values, random)[None]


@dataclass(frozen=True)
class TopK(_Some):
    """The values of largest magnitude, and where they are.

    Places are numbers of as few bits as will do, or one bit for each of all values, whichever is shorter.
    """

    name = "top-k"
    source = "Stich, Cordonnier, Jaggi 2018, arXiv 1809.07599; Aji, Heafield 2017, arXiv 1704.05021"

    def size(self, values: int) -> int:
        """Return the bytes of the values and of their places."""
        count = self.count(values)
        return FLOAT.itemsize * count + _bytes(min(count * _width(values), values))

    def _parts(self, rows: Floats, random: np.random.Generator) -> Parts:
        del random
        values = rows.shape[1]
        first = values - self.count(values)
        places = np.sort(np.argpartition(np.abs(rows), max(0, first - 1), axis=1)[:, first:], axis=1)
        return np.take_along_axis(rows, places, axis=1), places

    def _expand(self, parts: Parts, values: int) -> Floats:
        return _placed(parts[0], parts[1], values)

    def _pack(self, parts: Parts, values: int) -> bytes:
        kept, places = parts[0], parts[1][0]
        width = _width(values)
        if len(places) * width < values:
            return kept.astype(FLOAT).tobytes() + _packed(places, width)
        chosen = np.zeros(values, np.int64)
        chosen[places] = 1
        return kept.astype(FLOAT).tobytes() + _packed(chosen, 1)

    def _unpack(self, payload: bytes, values: int, random: np.random.Generator) -> Parts:
        del random
        count, width = self.count(values), _width(values)
        split = FLOAT.itemsize * count
        kept = np.frombuffer(payload[:split], FLOAT)
        if count * width < values:
            places = _unpacked(payload[split:], count, width)
        else:
            places = np.flatnonzero(_unpacked(payload[split:], values, 1))
        if len(places) != count or (np.diff(places) <= 0).any() or places[-1] >= values:
            raise Malformed(f"places by {self.name} that are not {count} ascending ones below {values}")
        return kept[None], places[None]


@dataclass(frozen=True)
class Quantise(Compressor):
    """Signed whole multiples of a step, rounded up or down at random, so that the mean is right.

    Each bucket of values has a step of its own, its largest magnitude / (2^(bits - 1) - 1).

    Attributes:
        bits: of a value: 2 to 8.
        bucket: values that share a step; 256, a guess: beside 8 bits the steps add 1/64 to the bytes, and 4 bits keep a
            share of the norm, as they do up to 391.
    """

    bits: int = 8
    bucket: int = 256

    name = "quantise"
    source = "Alistarh et al. 2017, arXiv 1610.02132 (QSGD), with the largest magnitude in place of the norm"
    unbiased = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InvalidConfig(f"bits is {self.bits}; it must be from 2 to 8")
        if self.bucket < 1:
            raise InvalidConfig(f"bucket is {self.bucket}; it must be at least 1")

    @property
    def levels(self) -> int:
        """The largest multiple."""
        return (1 << (self.bits - 1)) - 1

    def size(self, values: int) -> int:
        """Return the bytes of the steps and of the multiples."""
        return FLOAT.itemsize * self._buckets(values) + _bytes(self.bits * values)

    def keeps(self, values: int) -> float:
        """Return delta: where all but the largest value of a bucket lie where rounding at random hurts them most.

        With L levels and steps u a value f u costs f (1 - f) u^2 and adds f^2 u^2 to the norm, to which the largest
        adds L^2 u^2: at worst, over f, the quotient is (sqrt(1 + B / L^2) - 1) / 2 in a bucket of B.
        """
        return 1.0 - (math.sqrt(1.0 + min(self.bucket, values) / self.levels**2) - 1.0) / 2.0

    def _buckets(self, values: int) -> int:
        return -(-values // self.bucket)

    def _parts(self, rows: Floats, random: np.random.Generator) -> Parts:
        n, values = rows.shape
        count = self._buckets(values)
        padded = np.zeros((n, count * self.bucket), np.float32)
        padded[:, :values] = rows
        bucketed = padded.reshape(n, count, self.bucket)
        steps = np.abs(bucketed).max(2) / np.float32(self.levels)
        # float64, so that a largest value divided by its step is not above the levels by a rounding.
        scaled = bucketed / np.where(steps > 0, steps, 1.0).astype(np.float64)[:, :, None]
        drawn = random.random((n, values), np.float32)
        multiples = np.floor(scaled.reshape(n, -1)[:, :values] + drawn)
        return steps, np.clip(multiples, -self.levels, self.levels).astype(np.int64)

    def _expand(self, parts: Parts, values: int) -> Floats:
        steps, multiples = parts
        each = np.repeat(steps, self.bucket, axis=1)[:, :values]
        return cast(Floats, multiples.astype(np.float32) * each)

    def _pack(self, parts: Parts, values: int) -> bytes:
        del values
        steps, multiples = parts
        return steps.astype(FLOAT).tobytes() + _packed(multiples[0] + self.levels, self.bits)

    def _unpack(self, payload: bytes, values: int, random: np.random.Generator) -> Parts:
        del random
        split = FLOAT.itemsize * self._buckets(values)
        steps = np.frombuffer(payload[:split], FLOAT)
        multiples = _unpacked(payload[split:], values, self.bits) - self.levels
        if not (steps >= 0).all() or multiples.max() > self.levels:
            raise Malformed(f"steps below 0, or multiples above {self.levels}")
        return steps[None], multiples[None]


@dataclass(frozen=True)
class SignNorm(Compressor):
    """One bit for each value, its sign, and the mean magnitude of all."""

    name = "sign"
    source = "Karimireddy et al. 2019, arXiv 1901.09847; Bernstein et al. 2018, arXiv 1802.04434 (signs alone)"

    def size(self, values: int) -> int:
        """Return the bytes of the signs and of a float32."""
        return FLOAT.itemsize + _bytes(values)

    def keeps(self, values: int) -> float:
        """Return delta: |x|_1^2 / (P |x|^2), where a single value is not 0."""
        return 1.0 / values

    def _parts(self, rows: Floats, random: np.random.Generator) -> Parts:
        del random
        return np.abs(rows).mean(1, dtype=np.float64, keepdims=True).astype(np.float32), rows >= 0

    def _expand(self, parts: Parts, values: int) -> Floats:
        del values
        return np.where(parts[1], parts[0], -parts[0])

    def _pack(self, parts: Parts, values: int) -> bytes:
        del values
        return parts[0].astype(FLOAT).tobytes() + _packed(parts[1][0].astype(np.int64), 1)

    def _unpack(self, payload: bytes, values: int, random: np.random.Generator) -> Parts:
        del random
        norm = np.frombuffer(payload[: FLOAT.itemsize], FLOAT)
        if not norm[0] >= 0:
            raise Malformed("a mean magnitude below 0")
        return norm[None], _unpacked(payload[FLOAT.itemsize :], values, 1)[None] == 1


@dataclass(frozen=True)
class LowRank(Compressor):
    """Each matrix M as the product of two thin ones: M Q, made orthonormal, for a random Q, and what M has along it.

    One step of power iteration from a Q that is drawn anew each time; the paper goes on from the last Q, which takes a
    state. Tensors of more than two dimensions are matrices of their first by all others. What is no shorter as a
    product, and what is no matrix, is sent as it is.

    Attributes:
        shapes: of the tensors that a vector holds one after another.
        rank: of the products; 2, as in most of the paper's tables.
    """

    shapes: tuple[tuple[int, ...], ...]
    rank: int = 2

    name = "low-rank"
    source = "Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727 (PowerSGD)"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidConfig(f"rank is {self.rank}; it must be at least 1")

    def size(self, values: int) -> int:
        """Return 4 bytes for each number of the thin matrices, and for each value of the rest."""
        self._verify(values)
        sent = (
            self.rank * (sides[0] + sides[1]) if sides else part.stop - part.start for part, sides in self._tensors()
        )
        return FLOAT.itemsize * sum(sent)

    def keeps(self, values: int) -> float:
        """Return delta: the least rank over shorter side of all matrices; at worst all directions are alike."""
        self._verify(values)
        return min([1.0, *(self.rank / min(sides) for _, sides in self._tensors() if sides)])

    def _tensors(self) -> Iterator[tuple[slice, tuple[int, int] | None]]:
        """Give where each tensor is in a vector, and the sides of its matrix, or None if it is sent as it is."""
        ends = np.cumsum([0, *(math.prod(shape) for shape in self.shapes)]).tolist()
        for shape, (start, end) in zip(self.shapes, pairwise(ends), strict=True):
            high, wide = (shape[0], (end - start) // shape[0]) if len(shape) > 1 else (0, 0)
            yield slice(start, end), (high, wide) if self.rank * (high + wide) < high * wide else None

    def _verify(self, values: int) -> None:
        if values != sum(math.prod(shape) for shape in self.shapes):
            raise InvalidConfig(f"{self.name}: {values} values are not those of the tensors {list(self.shapes)}")

    def _parts(self, rows: Floats, random: np.random.Generator) -> Parts:
        self._verify(rows.shape[1])
        parts: list[NDArray[Any]] = []
        for place, sides in self._tensors():
            if sides is None:
                parts.append(rows[:, place])
                continue
            matrices = rows[:, place].reshape(-1, *sides)
            sketch = matrices @ random.standard_normal((sides[1], self.rank), np.float32)
            left = np.linalg.qr(sketch)[0]
            parts += [left, matrices.transpose(0, 2, 1) @ left]
        return tuple(parts)

    def _expand(self, parts: Parts, values: int) -> Floats:
        made = np.empty((len(parts[0]), values), np.float32)
        left = iter(parts)
        for place, sides in self._tensors():
            first = next(left)
            made[:, place] = (first @ next(left).transpose(0, 2, 1)).reshape(len(made), -1) if sides else first
        return made

    def _pack(self, parts: Parts, values: int) -> bytes:
        del values
        return b"".join(part.astype(FLOAT).tobytes() for part in parts)

    def _unpack(self, payload: bytes, values: int, random: np.random.Generator) -> Parts:
        del values, random
        numbers, start, parts = np.frombuffer(payload, FLOAT), 0, []
        for place, sides in self._tensors():
            shapes = [(side, self.rank) for side in sides] if sides else [(place.stop - place.start,)]
            for shape in shapes:
                end = start + math.prod(shape)
                parts.append(numbers[start:end].reshape(1, *shape))
                start = end
        return tuple(parts)


COMPRESSORS: Mapping[str, type[Compressor]] = MappingProxyType(
    {kind.name: kind for kind in (Identity, RandK, TopK, Quantise, SignNorm, LowRank)}
)
"""By the name that scenarios use; the options are the dataclass's fields, but for `shapes`."""


def compressor(name: str, shapes: Sequence[tuple[int, ...]], **options: object) -> Compressor:
    """Make a compressor of vectors that hold tensors of these shapes one after another.

    Options that it does not have are left out.

    Raises:
        InvalidConfig: there is none of this name, or an option is out of range.
    """
    if name not in COMPRESSORS:
        raise InvalidConfig(f"there is no compressor {name!r}; there are {', '.join(COMPRESSORS)}")
    fields = [field.name for field in dataclasses.fields(cast(Any, COMPRESSORS[name]))]
    return COMPRESSORS[name](
        **{key: value for key, value in (options | {"shapes": tuple(shapes)}).items() if key in fields}
    )


def _placed(kept: NDArray[Any], places: NDArray[Any], values: int) -> Floats:
    made = np.zeros((len(kept), values), np.float32)
    np.put_along_axis(made, places, kept, axis=1)
    return made


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _width(values: int) -> int:
    """Return how many bits tell so many places apart, at least 1."""
    return max(1, (values - 1).bit_length())


def _packed(numbers: NDArray[np.int64], width: int) -> bytes:
    """Write numbers of so many bits each, the lowest bit first; the last byte is filled with zeros."""
    bits = (numbers[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8).ravel(), bitorder="little").tobytes()


def _unpacked(payload: bytes, count: int, width: int) -> NDArray[np.int64]:
    """Read so many numbers from exactly the bytes that they take.

    Raises:
        Malformed: what fills the last byte is not zeros.
    """
    bits = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")
    if bits[count * width :].any():
        raise Malformed("bits behind the last number")
    each = bits[: count * width].reshape(count, width).astype(np.int64)
    return cast(NDArray[np.int64], each @ (np.int64(1) << np.arange(width)))
