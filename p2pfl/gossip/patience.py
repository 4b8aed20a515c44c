"""How long to wait for others: measured from these very peers, within bounds."""

import math
from dataclasses import dataclass, replace

GAIN, VARIATION_GAIN, VARIATIONS = 1 / 8, 1 / 4, 4
"""RFC 6298, section 2."""


@dataclass(frozen=True, slots=True)
class Patience:
    """A smoothed measurement of how long others take to answer, in seconds; RFC 6298, section 2.

    Attributes:
        least: never wait less.
        most: never wait more.
        mean: smoothed; None before the first measurement.
        variation: smoothed mean deviation.
        backoff: doubles each time that waiting was in vain; section 5.5.
    """

    least: float
    most: float
    mean: float | None = None
    variation: float = 0.0
    backoff: int = 1

    @property
    def unmeasured(self) -> float:
        """How long to wait before anything was measured: the geometric middle of the bounds, a guess."""
        return math.sqrt(self.least * self.most)

    @property
    def seconds(self) -> float:
        """How long to wait now."""
        wait = self.unmeasured if self.mean is None else self.mean + VARIATIONS * self.variation
        return min(self.most, max(self.least, wait * self.backoff))

    def after(self, measured: float) -> "Patience":
        """Return it after an answer that took `measured` seconds."""
        if self.mean is None:
            return replace(self, mean=measured, variation=measured / 2, backoff=1)
        variation = (1 - VARIATION_GAIN) * self.variation + VARIATION_GAIN * abs(self.mean - measured)
        return replace(self, mean=(1 - GAIN) * self.mean + GAIN * measured, variation=variation, backoff=1)

    def in_vain(self) -> "Patience":
        """Return it after waiting for somebody who did not answer."""
        return replace(self, backoff=min(2 * self.backoff, 64))
