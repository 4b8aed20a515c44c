"""What noise in released sums is worth: differential privacy of one member's whole data, in numbers. No arrays here.

The *release* of a round is the sum over the survivors of a group. A member's contribution to it is a public vector, its
base, and an update of L2 norm `clip` at most. *Neighbors* are two runs that differ in one member's update: it is
what that member's data gave, or zero ("zero-out" adjacency: Ponomareva et al. 2023, "How to DP-fy ML", arXiv
2303.00654). So the sensitivity of a release is `clip`. Two arbitrary updates of one member lie twice as far apart: to
tell any data of a member from any other, rho counts four times.

A release with Gaussian noise of standard deviation z * clip is rho-zCDP with rho = 1 / (2 z^2) (Bun and Steinke 2016,
arXiv 1605.02065, proposition 1.6; for discrete noise Canonne, Kamath and Steinke 2020, arXiv 2004.00030, theorem 4; for
the sum of members' discrete noises Kairouz, Liu and Steinke 2021, arXiv 2102.06387, theorem 1, whose further term is
below 1e-50 here, see `LEAST_DEVIATION`). Over rounds rho adds up, also where each depends on those before (lemma 2.3 of
the first). Nothing is subtracted for sampling: groups are drawn from what all members know.
"""

import math
from dataclasses import dataclass

SAMPLING_ERROR = 2.0**-340
"""The most by which one value of noise differs from a discrete Gaussian, in total variation; what
`p2pfl.crypto.gaussian` keeps."""
LEAST_DEVIATION = 4.0
"""In units of the words, of one member's noise. The sum of m discrete Gaussians of this deviation s is within
10 m exp(-pi^2 s^2) of one, in the exponent (Kairouz et al., theorem 1): 1e-66 for m = 64."""
MOST_ROUNDING = 0.05
"""What rounding to words may take from the clip, as a share: sqrt(values) / 2 units. A guess of what nobody minds."""
MOST_SURVIVORS = 64
"""Of whose noises the sampling error is counted; no group is larger."""
_MOST_ROUNDS = 10_000_000
_HALVINGS = 200


def rho_of(noise: float) -> float:
    """Return the zCDP of a release whose noise has `noise` times the sensitivity as standard deviation."""
    return 1.0 / (2.0 * noise * noise)


def delta_of(rho: float, epsilon: float) -> float:
    """Return a delta for which rho-zCDP implies (epsilon, delta)-differential privacy, the least that is known.

    The minimum over alpha > 1 of exp((alpha - 1)(alpha rho - epsilon)) / (alpha - 1) * (1 - 1 / alpha)^alpha (Canonne,
    Kamath and Steinke 2020, corollary 13). Its logarithm is convex: the root of its derivative is bisected.
    """
    if rho <= 0:
        return 0.0
    low, high = 1.0 + 1e-9, (epsilon + 1.0) / (2.0 * rho) + 2.0
    for _ in range(_HALVINGS):
        alpha = (low + high) / 2
        if (2 * alpha - 1) * rho - epsilon + math.log1p(-1 / alpha) < 0:
            low = alpha
        else:
            high = alpha
    log = (high - 1) * (high * rho - epsilon) + high * math.log1p(-1 / high) - math.log(high - 1)
    return min(1.0, math.exp(min(0.0, log)))


def epsilon_of(rho: float, delta: float) -> float:
    """Return the least epsilon for which `delta_of` is at most `delta`, from above."""
    if rho <= 0:
        return 0.0
    low, high = 0.0, rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))  # Bun and Steinke 2016, proposition 1.3
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if delta_of(rho, middle) <= delta:
            high = middle
        else:
            low = middle
    return high


def noise_for(rounds: int, epsilon: float, delta: float) -> float:
    """Return the least noise, as a multiple of the sensitivity, with which so many releases stay within a budget.

    Rounded up to four digits, so that it can stand in a charter. The sampling error is left to `Budget`.
    """
    low, high = 0.0, 1.0 + 2.0 * epsilon
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if delta_of(middle, epsilon) <= delta:
            low = middle
        else:
            high = middle
    exact = math.sqrt(max(1, rounds) / (2.0 * low))
    digits = 4 - math.ceil(math.log10(exact))
    return math.ceil(exact * 10.0**digits) / 10.0**digits


@dataclass(frozen=True, slots=True)
class Budget:
    """What a member's data may give away in all, and what a round costs.

    Attributes:
        noise: the standard deviation of the noise in a release, as a multiple of the sensitivity.
        epsilon: never exceeded.
        delta: at this.
        values: of the vector.
    """

    noise: float
    epsilon: float
    delta: float
    values: int

    @property
    def rho(self) -> float:
        """Of one round, in zCDP."""
        return rho_of(self.noise)

    def _inexact(self, rounds: int) -> float:
        """Return what samplers that are not exact add to delta: (1 + e^epsilon) times the total variation."""
        return (1.0 + math.exp(self.epsilon)) * rounds * self.values * MOST_SURVIVORS * SAMPLING_ERROR

    def bears(self, rounds: int) -> bool:
        """Return whether so many rounds stay within it."""
        return delta_of(rounds * self.rho, self.epsilon) + self._inexact(rounds) <= self.delta

    @property
    def rounds(self) -> int:
        """The most rounds that it bears."""
        low, high = 0, 1
        while high <= _MOST_ROUNDS and self.bears(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.bears(middle) else (low, middle)
        return low

    def spent(self, rho: float, factor: float = 1.0) -> float:
        """Return the epsilon of releases of `rho` in all, which the budget bears.

        Args:
            rho: in zCDP.
            factor: 4 to tell any data of a member from any other.
        """
        return epsilon_of(factor * rho, self.delta - self._inexact(math.ceil(rho / self.rho)))


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise that each member adds to its update.

    Attributes:
        clip: the largest L2 norm of an update, in the values' unit.
        multiplier: the standard deviation of all honest survivors' noise, as a multiple of `clip`.
        honest: how many honest survivors a released sum has at least; what further ones add is not counted.
    """

    clip: float
    multiplier: float
    honest: int

    @property
    def deviation(self) -> float:
        """Of one member's noise, for each value: multiplier * clip / sqrt(honest), in the values' unit."""
        return self.multiplier * self.clip / math.sqrt(self.honest)

    @property
    def rho(self) -> float:
        """Of one release, in zCDP."""
        return rho_of(self.multiplier)
