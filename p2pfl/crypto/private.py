"""A member's update as ring words that nobody can tell from another's by more than the noise allows.

    q = round(f * update / step)            f <= 1 so that |q| <= clip / step: bounded in what is really summed
    w = clip_to_ring(round(base / step) + q) + noise

The base is known to all who see the sum, or follows from sums that they saw; it is rounded by itself, so whatever the
update is, w differs by no more than q from what it would be without one: cutting off at the ring's range moves no two
words apart. Rounding adds at most sqrt(values) / 2 to the norm, so f aims that much lower; a norm that is beyond all
the same raises, and nothing leaves. (Kairouz, Liu and Steinke 2021, arXiv 2102.06387, round at random instead, which is
for words as coarse as an update, and repeat it until the norm fits.)
"""

import math

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig, LocalError, RoundFailed
from p2pfl.core.privacy import LEAST_DEVIATION, MOST_ROUNDING, Noise
from p2pfl.crypto.gaussian import Gaussian
from p2pfl.crypto.ring import WEIGHT_ONE, Floats, Ring

_BLOCK = 1 << 16
_FLOAT_MARGIN = 1e-9
"""Sums of squares in float64, in blocks, are off by less."""


def verify_room(ring: Ring, noise: Noise, values: int) -> None:
    """Check that words are fine enough for an update of so many values, and its noise.

    Raises:
        InvalidConfig: they are not.
    """
    units, deviation = noise.clip / ring.step, noise.deviation / ring.step
    if math.sqrt(values) / 2 > MOST_ROUNDING * units or deviation < LEAST_DEVIATION:
        raise InvalidConfig(
            f"words of {ring.bits} bits are too coarse for updates of norm {noise.clip:g} in {values} values, "
            f"with noise of {noise.deviation:.3g} each: one unit is {ring.step:.3g}"
        )


def private_words(
    ring: Ring, values: Floats, base: Floats, noise: Noise, stream: Gaussian, *, with_base: bool
) -> NDArray[np.int32]:
    """Return the words of a model, or of what changed in it, with noise; written in the place of `values` if it can be.

    Args:
        ring: of the sum, with room for the noise.
        values: the model, float32 [n].
        base: what it is the change from, float32 [n]; known to all who see the sum.
        noise: how much, and how long an update may be.
        stream: what noise is drawn from; never used before.
        with_base: whether the base is part of what is summed.

    Returns:
        int32 [n].

    Raises:
        RoundFailed: a value is NaN or infinite.
        InvalidConfig: see `verify_room`.
        LocalError: the stream is another noise's, or the bound does not hold; nothing may be sent then.
    """
    verify_room(ring, noise, values.size)
    if not math.isclose(stream.deviation, noise.deviation / ring.step, rel_tol=_FLOAT_MARGIN):
        raise LocalError("noise of another deviation than the ring's")
    if ring.largest + stream.largest > ring.most:
        raise LocalError("more noise than the ring has room for")
    bound = noise.clip / ring.step
    norm = _norm(values, base)
    if not math.isfinite(norm):
        raise RoundFailed("NaN or infinity in a vector to be averaged: training diverged; nothing of it was sent")
    aim = bound * (1.0 - _FLOAT_MARGIN) - math.sqrt(values.size) / 2
    factor = min(1.0 / ring.step, aim / norm if norm > 0 else math.inf)
    words = values.view(np.int32) if values.flags.writeable else np.empty(values.size, np.int32)
    under, squares = np.zeros(min(_BLOCK, values.size), np.float32), 0.0
    for begin in range(0, values.size, _BLOCK):
        part = slice(begin, begin + _BLOCK)
        update = np.subtract(values[part], base[part], dtype=np.float64)
        update *= factor
        np.rint(update, out=update)
        squares += float(np.square(update).sum())
        if with_base:
            ring.round_into(base[part], WEIGHT_ONE, under[: update.size])
            update += under[: update.size]
        np.clip(update, -ring.largest, ring.largest, out=update)
        words[part] = update.astype(np.int64) + stream.take(update.size)
    if squares > bound * bound:
        raise LocalError("an update is longer than its bound after rounding; nothing of it was sent")
    return words


def _norm(values: Floats, base: Floats) -> float:
    """Return the L2 norm of values - base."""
    blocks = range(0, values.size, _BLOCK)
    parts = (np.subtract(values[at : at + _BLOCK], base[at : at + _BLOCK], dtype=np.float64) for at in blocks)
    with np.errstate(invalid="ignore"):
        return math.sqrt(sum(float(np.square(part).sum()) for part in parts))
