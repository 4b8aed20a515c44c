"""Fixed point: float32 values as words of Z_2^32 or Z_2^16, with a budget that no honest sum can overflow.

Owns the scale, the budget, the error bound, and how a masked vector is cut into chunks. Knows nothing of keys.

A value x of a peer with weight alpha becomes the integer q = clip(round(alpha * x * scale), -largest, largest). With
`largest = floor((2^(b - 1) - 1) / members)` a sum of at most `members` of them never leaves the b-bit ring (Bonawitz et
al., CCS 2017, section 4). The arithmetic is float32, so `largest` is rounded down to a float32 first: a full clip
would overflow otherwise; and the factor alpha * scale is rounded down, so that no value within the clip is clipped.

Error of a sum of m unclipped values, against the exact sum S of alpha * x with |alpha * x| <= a:

    m * (step / 2 + 2^-22 * a) + 2^-24 * |S| + 2^-149

The first term rounds to the fixed point, the second is float32 (the factor 2^-23, the product 2^-24, and room for
what is smaller), the rest rounds the decoded sum to float32.

Each chunk begins with a header of four 32-bit words, whatever the ring: the weight alpha; a canary of 1, with another 1
in its upper half where the peer has a loss to tell of; alpha times that loss; and alpha times the local steps made. The
last two are in fixed point of their own: a value v of at most V is round(v / V * floor((2^31 - 1) / members)). Their
sums say how much weight is in the sum, that every mask was removed, and how training went on average. 16 bytes are one
cipher block, so the values behind them begin on one too.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig, LocalError, RemoteError, RoundFailed

HEADER_BYTES = 16
HEADER_WORD = np.dtype("<u4")
WEIGHT_ONE = 1 << 16
"""The header's word for alpha = 1. Weights are multiples of its inverse: 65 535 of them fit a word, at 5 digits."""
MOST_LOSS = 1024.0
"""The largest absolute loss that a header tells, in the unit of the task's loss; beyond, this is told. A guess: it is
far above what a model has that learns, and leaves a unit of 4e-6 among 8 members."""
MOST_STEPS = float(1 << 20)
"""The most local steps that a header tells. A guess, as above: a unit of 0.004 steps among 8 members."""
_TOLD = 1 << 16
"""In the canary's word, beside its 1: a loss is told. There are fewer members than this."""
MAX_CLIPPED = 0.001
"""The share of coordinates that may be clipped: a guess; more of them is a clip that does not suit the model."""
NOISE_ROOM = {16: 23, 32: 32}
"""Deviations of noise that a word of so many bits has room for: `p2pfl.crypto.gaussian` stays below that."""
_MIN_CLIP, _MAX_CLIP = 2.0**-64, 2.0**64
_BLOCK = 1 << 16
_ALIGNMENT = 16
"""Bytes of a cipher block: chunks begin at multiples of it in the mask streams."""

Floats = NDArray[np.float32]
Words = NDArray[np.uint32] | NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Ring:
    """The words of one sum, the same at every member.

    Attributes:
        bits: 32 or 16.
        members: the most peers that can be in the sum.
        clip: the largest |alpha * x| that is represented, in the values' unit.
        noise: the standard deviation of the noise that each member adds to a word, in the values' unit; 0 for none.
            `largest` leaves room for the most that ever comes (`p2pfl.crypto.gaussian`).

    Raises:
        InvalidConfig: no such ring, or no room in it for that many members and their noise.
    """

    bits: int
    members: int
    clip: float
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in {16, 32}:
            raise InvalidConfig(f"a ring has 16 or 32 bits, not {self.bits}")
        most = min((1 << (self.bits - 1)) - 1, (2**32 - 1) // WEIGHT_ONE)
        if not 1 <= self.members <= most:
            raise InvalidConfig(f"a ring of {self.bits} bits sums 1 to {most} members, not {self.members}")
        if not _MIN_CLIP <= self.clip <= _MAX_CLIP:
            raise InvalidConfig(f"clip is {self.clip}; it must lie between 2^-64 and 2^64")
        if not (0 <= self.noise < math.inf and self.largest):
            raise InvalidConfig(f"noise of {self.noise:g} leaves no room for values in {self.bits} bits")

    @property
    def word(self) -> np.dtype[np.uint32] | np.dtype[np.uint16]:
        """The type of a word, unsigned, little endian."""
        return np.dtype("<u4") if self.bits == 32 else np.dtype("<u2")

    @property
    def signed(self) -> np.dtype[np.int32] | np.dtype[np.int16]:
        """The type of a word read as a signed integer."""
        return np.dtype("<i4") if self.bits == 32 else np.dtype("<i2")

    @property
    def largest(self) -> int:
        """The largest absolute word of one member before noise, rounded down to a float32.

        floor((2^(b - 1) - 1) / members), times clip / (clip + NOISE_ROOM noise) where there is noise.
        """
        exact = self.most
        if self.noise:
            exact = int(exact * (self.clip / (self.clip + NOISE_ROOM[self.bits] * self.noise)))
        excess = max(0, exact.bit_length() - 24)
        return exact >> excess << excess

    @property
    def most(self) -> int:
        """The largest absolute word of one member, with its noise: floor((2^(b - 1) - 1) / members)."""
        return ((1 << (self.bits - 1)) - 1) // self.members

    @property
    def step(self) -> float:
        """What one unit of a word is worth, in the values' unit: clip / largest."""
        return self.clip / self.largest

    def factor(self, weight: int) -> np.float32:
        """Return alpha / step rounded down to float32, for alpha = weight / WEIGHT_ONE.

        Raises:
            LocalError: the weight is not within 1 to WEIGHT_ONE.
        """
        if not 1 <= weight <= WEIGHT_ONE:
            raise LocalError(f"a weight is between 1 and {WEIGHT_ONE}, not {weight}")
        # A weight has 17 bits and `largest` 24, so their product is exact.
        exact = weight * self.largest / (WEIGHT_ONE * self.clip)
        nearest = np.float32(exact)
        return nearest if float(nearest) <= exact else np.nextafter(nearest, np.float32(0))

    def count_clipped(self, values: Floats, weight: int) -> int:
        """Return how many of `values`, float32 [n], `round_into` clips. Needed before the first byte is sent.

        Raises:
            RoundFailed: a value is NaN or infinite.
            LocalError: as `factor` does.
        """
        factor = self.factor(weight)
        blocks = (values[begin : begin + _BLOCK] for begin in range(0, values.size, _BLOCK))
        with np.errstate(over="ignore"):
            return sum(self._clipped(block, factor) for block in blocks)

    def _clipped(self, block: Floats, factor: np.float32) -> int:
        largest = np.float32(self.largest)
        # Rounding keeps the order, so the extremes speak for all; neither comparison holds for NaN.
        if np.rint(block.max() * factor) <= largest and np.rint(block.min() * factor) >= -largest:
            return 0
        if not np.isfinite(block).all():
            raise RoundFailed("NaN or infinity in a vector to be averaged: training diverged; nothing of it was sent")
        return int(np.count_nonzero(np.abs(np.rint(block * factor)) > largest))

    def round_into(self, values: Floats, weight: int, out: Floats, clip: bool = True) -> None:
        """Scale, round and clip `values` to whole numbers within +-largest, each exact in float32.

        Args:
            values: float32 [n], for which `count_clipped` raised nothing.
            weight: alpha in units of 1 / WEIGHT_ONE.
            out: float32 [n], overwritten.
            clip: False only where `count_clipped` gave 0.

        Raises:
            LocalError: as `factor` does.
        """
        with np.errstate(over="ignore"):
            np.multiply(values, self.factor(weight), out=out)
        np.rint(out, out=out)
        if clip:
            largest = np.float32(self.largest)
            np.clip(out, -largest, largest, out=out)

    def leave_residual(self, values: Floats, weight: int) -> None:
        """Leave in `values`, float32 [n], what rounding and clipping keep out of the sum: x less word * step / alpha.

        For error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019): what is left is added to
        what is summed next, so that nothing is lost for good.

        Args:
            values: as `round_into` took them; overwritten.
            weight: likewise.

        Raises:
            LocalError: as `factor` does.
        """
        unit = self.step * WEIGHT_ONE / weight
        words = np.empty(min(_BLOCK, values.size), np.float32)
        for begin in range(0, values.size, _BLOCK):
            block = values[begin : begin + _BLOCK]
            self.round_into(block, weight, words[: block.size])
            block -= words[: block.size].astype(np.float64) * unit

    def error_bound(self, contributors: int, largest: float | None = None, total: float | None = None) -> float:
        """Return the bound on the error of a decoded sum, in the values' unit; this module says where it comes from.

        Args:
            contributors: how many values were summed.
            largest: the largest |alpha * x| among them; the clip, unless given.
            total: the absolute value of the exact sum; contributors * largest, unless given.
        """
        most = self.clip if largest is None else largest
        total = contributors * most if total is None else total
        return contributors * (self.step / 2 + 2.0**-22 * most) + 2.0**-24 * total + 2.0**-149


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a vector, as it is masked and sent.

    Attributes:
        first: its first value's index in the vector.
        count: how many values it has.
        position: where it begins in every mask stream, bytes; a multiple of 16.
        size: its bytes, header included.
    """

    first: int
    count: int
    position: int
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a vector is cut: chunk p goes to member p.

    Chunk p holds the values from floor(p * values / chunks) on. Chunks begin at equal distances in the mask streams,
    each at the beginning of a cipher block; what a chunk does not need of the streams is never used.

    Attributes:
        values: the vector's length.
        chunks: how many parts it has; some are empty if there are more of them than values.
        bits: of a word.

    Raises:
        InvalidConfig: there is no such layout.
    """

    values: int
    chunks: int
    bits: int

    def __post_init__(self) -> None:
        if self.values < 0 or self.chunks < 1 or self.bits not in {16, 32}:
            raise InvalidConfig(
                f"{self.values} values cannot be cut into {self.chunks} chunks of {self.bits}-bit words"
            )

    def chunk(self, index: int) -> Chunk:
        """Return one chunk.

        Raises:
            LocalError: there is none with this index.
        """
        if not 0 <= index < self.chunks:
            raise LocalError(f"chunk {index} of {self.chunks}")
        first = index * self.values // self.chunks
        count = (index + 1) * self.values // self.chunks - first
        size = HEADER_BYTES + count * self.bits // 8
        return Chunk(first, count, index * self._stride, size)

    @property
    def _stride(self) -> int:
        longest = HEADER_BYTES + -(-self.values // self.chunks) * self.bits // 8
        return -(-longest // _ALIGNMENT) * _ALIGNMENT


def weight_of(samples: int, most: int, floor: float) -> int:
    """Return a peer's weight: samples / most, at least `floor`, in units of 1 / WEIGHT_ONE, to the nearest.

    Args:
        samples: what this peer trains on.
        most: the largest such number among the members.
        floor: the charter's least weight, above 0 and at most 1: with tiny weights a sum is nearly one peer's vector.

    Raises:
        InvalidConfig: the numbers contradict each other.
    """
    if not (0 <= samples <= most and 0 < floor <= 1):
        raise InvalidConfig(f"no weight for {samples} of at most {most} samples with a floor of {floor}")
    alpha = max(floor, samples / most if most else 0.0)
    return max(1, round(alpha * WEIGHT_ONE))


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one peer's local steps of a round came to; under masks nobody sees it but in a sum.

    Attributes:
        loss: the mean of the minibatches', in the unit of the task's loss; None where no step was made.
        steps: how many were made; 0 without a loss.
    """

    loss: float | None = None
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Totals:
    """What the header of a sum says.

    Attributes:
        weight: of all contributors together, in units of 1 / WEIGHT_ONE.
        loss: their mean by weight; None unless each of them told one.
        steps: likewise.
    """

    weight: int
    loss: float | None = None
    steps: float | None = None


def bounded(value: float, most: float) -> float:
    """Return `value` within +-most."""
    return max(-most, min(most, value))


def header_of(weight: int, metrics: Metrics = Metrics(), members: int = 1) -> bytes:
    """Return the header of one member's chunks, before masking, in a ring for so many members."""
    if metrics.loss is None:
        return np.array([weight, 1, 0, 0], HEADER_WORD).tobytes()
    told = ((metrics.loss, MOST_LOSS), (float(metrics.steps), MOST_STEPS))
    largest = _largest(members) * weight / WEIGHT_ONE
    words = [round(bounded(value, most) / most * largest) % 2**32 for value, most in told]
    return np.array([weight, 1 + _TOLD, *words], HEADER_WORD).tobytes()


def _largest(members: int) -> int:
    return ((1 << 31) - 1) // members


def verify_clipped(clipped: int, values: int) -> None:
    """Check that few enough of the coordinates are clipped.

    Raises:
        InvalidConfig: more than MAX_CLIPPED of them are.
    """
    if clipped > MAX_CLIPPED * values:
        raise InvalidConfig(
            f"{clipped} of {values} coordinates exceed the clip, over {MAX_CLIPPED:.1%}: "
            "raise it in the charter, or average changes instead of models"
        )


def read_header(total: bytes | bytearray | memoryview, contributors: int, members: int, least: int = 1) -> Totals:
    """Return what the header of a chunk's sum says, after unmasking.

    Args:
        total: the sum's bytes.
        contributors: how many members' chunks are in it.
        members: of the ring.
        least: the smallest weight that a member may have, in units of 1 / WEIGHT_ONE.

    Raises:
        RemoteError: it is not that of a sum of so many chunks: a mask is left, or somebody lied.
    """
    if len(total) < HEADER_BYTES:
        raise RemoteError(f"a sum of {len(total)} bytes has no header")
    weight, canary = np.frombuffer(total, HEADER_WORD, 2).tolist()
    loss, steps = np.frombuffer(total, "<i4", 2, offset=8).tolist()
    told, one = divmod(canary, _TOLD)
    most = contributors * _largest(members) if told else 0
    in_range = -most <= loss <= most and 0 <= steps <= most and told <= contributors
    if one != contributors or not in_range or not contributors * least <= weight <= contributors * WEIGHT_ONE:
        raise RemoteError(
            f"the header of a sum of {contributors} chunks is wrong: a mask is left in it, or a chunk lied"
        )
    if told < contributors:
        return Totals(weight)
    unit = WEIGHT_ONE / (weight * _largest(members))
    return Totals(weight, loss * MOST_LOSS * unit, steps * MOST_STEPS * unit)


def decode_into(
    ring: Ring,
    total: bytes | bytearray | memoryview,
    contributors: int,
    divisor: float,
    out: Floats,
    own: Floats | None = None,
    base: Floats | None = None,
) -> float:
    """Turn a chunk's sum, after unmasking, into values.

    Args:
        ring: the words' ring.
        total: the sum's bytes, header included.
        contributors: how many members' words are in it.
        divisor: 1 for the weighted sum; the sum of the weights alpha for the average.
        out: float32 [count], overwritten with sum * step / divisor.
        own: float32 [count], may be `out`: what the values are compared with before they are written.
        base: float32 [count]: what they are the change from, and are added to before they are written.

    Returns:
        The squared L2 distance from `own` to the values, both without the base; 0 without it.

    Raises:
        LocalError: `out` has another length than the sum.
        RemoteError: a word is larger than so many members can have summed to; nothing is written then.
    """
    if len(total) != HEADER_BYTES + out.size * ring.word.itemsize:
        raise LocalError(f"a sum of {len(total)} bytes for {out.size} values of {ring.bits} bits")
    words = np.frombuffer(total, ring.signed, offset=HEADER_BYTES)
    most = contributors * (ring.most if ring.noise else ring.largest)
    if words.size and (int(words.max()) > most or int(words.min()) < -most):
        raise RemoteError(f"a coordinate beyond what {contributors} members can have summed to")
    distance, scratch = 0.0, np.empty(min(_BLOCK, words.size), np.float64)
    for begin in range(0, words.size, _BLOCK):
        block = words[begin : begin + _BLOCK]
        decoded = np.multiply(block, ring.step / divisor, out=scratch[: block.size])
        if own is not None:
            distance += float(np.square(decoded - own[begin : begin + block.size]).sum())
        if base is not None:
            decoded += base[begin : begin + block.size]
        out[begin : begin + block.size] = decoded
    return distance
