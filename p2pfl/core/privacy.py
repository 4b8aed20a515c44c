"""What noise is worth, in numbers: differential privacy of a member's whole data, and of one example. No arrays here.

*Members.* The *release* of a round is the sum over the survivors of a group. A member's contribution to it is a public
vector, its base, and an update of L2 norm `clip` at most. *Neighbors* are two runs that differ in one member's update:
it is what that member's data gave, or zero ("zero-out" adjacency: Ponomareva et al. 2023, "How to DP-fy ML", arXiv
2303.00654). So the sensitivity of a release is `clip`. Two arbitrary updates of one member lie twice as far apart: to
tell any data of a member from any other, rho counts four times.

A release with Gaussian noise of standard deviation z * clip is rho-zCDP with rho = 1 / (2 z^2) (Bun and Steinke 2016,
arXiv 1605.02065, proposition 1.6; for discrete noise Canonne, Kamath and Steinke 2020, arXiv 2004.00010, theorem 4; for
the sum of members' discrete noises Kairouz, Liu and Steinke 2021, arXiv 2102.06387, proposition 14, whose further term
is below 1e-50 here, see `LEAST_DEVIATION`). Over rounds rho adds up, also where each depends on those before (lemma 2.3
of the first). Nothing is subtracted for sampling: groups are drawn from what all members know.

*Examples.* The release of a local step is the sum of the gradients of a minibatch, each of L2 norm `clip` at most, with
noise. Neighbors are two runs that differ in one example of one member: it is there, or its gradient is zero in every
step. How many examples there are is public. Each is in a minibatch with probability `rate`, independently of all others
and unknown to everybody (Poisson sampling): `sampled_divergence` has what that is worth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

SAMPLING_ERROR = 2.0**-340
"""The most by which one value of noise differs from a discrete Gaussian, in total variation; what
`p2pfl.crypto.gaussian` keeps."""
LEAST_DEVIATION = 4.0
"""In units of the words, of one member's noise. The sum of m discrete Gaussians of this deviation s is within
10 m exp(-pi^2 s^2) of one, in the exponent (Kairouz et al., proposition 14): 1e-66 for m = 64."""
MOST_ROUNDING = 0.05
"""What rounding to words may take from the clip, as a share: sqrt(values) / 2 units. A guess of what nobody minds."""
MOST_SURVIVORS = 64
"""Of whose noises the sampling error is counted; no group is larger."""
ORDERS = (*range(2, 129), 160, 192, 256, 384, 512, 768, 1024)
"""Of the Renyi divergences of sampled steps. For whole ones the formula is exact. Up to 128 all, as epsilon is
the least over them; beyond, which a small epsilon alone needs, a guess of how many it takes."""
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
        return _most(self.bears)

    def spent(self, rho: float, factor: float = 1.0) -> float:
        """Return the epsilon of releases of `rho` in all, which the budget bears.

        Args:
            rho: in zCDP.
            factor: 4 to tell any data of a member from any other.
        """
        return epsilon_of(factor * rho, self.delta - self._inexact(math.ceil(rho / self.rho)))


@cache
def sampled_divergence(rate: float, noise: float) -> tuple[float, ...]:
    """Return the Renyi divergence of each of `ORDERS` between a step with an example and one where it counts nothing.

    For a whole order a it is log(A) / (a - 1) with

        A = sum over k from 0 to a of  binomial(a, k) (1 - rate)^(a - k) rate^k exp((k^2 - k) / (2 noise^2))

    (Mironov, Talwar and Zhang 2019, arXiv 1908.10530, section 3.3). The exponential is the k-th moment of the
    ratio of a shifted Gaussian to the unshifted. Of the discrete Gaussian it is the same number, as k times a whole
    shift is whole; and the reflection that shows the other direction to be no larger maps whole numbers to whole ones.

    Args:
        rate: with what probability an example is in a step, above 0 and up to 1.
        noise: the standard deviation, as a multiple of the sensitivity.
    """
    return tuple(max(0.0, _log_moment(rate, noise, order)) / (order - 1) for order in ORDERS)


def _log_moment(rate: float, noise: float, order: int) -> float:
    if rate >= 1.0:
        return (order * order - order) / (2.0 * noise * noise)
    chosen, left = math.log(rate), math.log1p(-rate)
    terms: list[float] = [
        math.log(math.comb(order, k)) + k * chosen + (order - k) * left + (k * k - k) / (2.0 * noise * noise)
        for k in range(order + 1)
    ]
    most = max(terms)
    return most + math.log(math.fsum(math.exp(term - most) for term in terms))


@dataclass(frozen=True, slots=True)
class ExampleBudget:
    """What one example of a member may give away in all, and what the member's local steps cost of that.

    Attributes:
        noise: the standard deviation of the noise in a step's sum of gradients, as a multiple of the sensitivity.
        epsilon: never exceeded.
        delta: at this.
        rate: the largest probability with which any member has an example in a step.
        steps: in a round.
        values: of the gradient.
    """

    noise: float
    epsilon: float
    delta: float
    rate: float
    steps: int
    values: int

    def spent(self, steps: int) -> float:
        """Return the epsilon of so many steps; infinite where delta does not cover the error of drawing their noise.

        The minimum over orders a of  steps * divergence - (log(delta) + log(a)) / (a - 1) + log(1 - 1 / a)  (Canonne,
        Kamath and Steinke 2020, proposition 12).
        """
        if steps <= 0:
            return 0.0
        delta = self.delta - (1.0 + math.exp(self.epsilon)) * steps * self.values * SAMPLING_ERROR
        if delta <= 0:
            return math.inf
        divergences = zip(ORDERS, sampled_divergence(self.rate, self.noise), strict=True)
        found: list[float] = [
            steps * divergence - (math.log(delta) + math.log(order)) / (order - 1) + math.log1p(-1 / order)
            for order, divergence in divergences
        ]
        return max(0.0, min(found))

    def bears(self, steps: int) -> bool:
        """Return whether so many steps stay within it."""
        return self.spent(steps) <= self.epsilon

    @property
    def rounds(self) -> int:
        """The most rounds that it bears."""
        return _most(lambda rounds: self.bears(rounds * self.steps))


def _most(bears: Callable[[int], bool]) -> int:
    """Return the largest number that is borne, up to `_MOST_ROUNDS` and somewhat beyond; whatever is below is borne."""
    low, high = 0, 1
    while high <= _MOST_ROUNDS and bears(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bears(middle) else (low, middle)
    return low


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
