"""What a peer makes of vectors of which some are lies: rules in place of the weighted mean.

Owns the rules. Must not know who lies, nor what the vectors are. Each rule works on one neighborhood or on many at
once: all arrays may have further dimensions in front. Weights are those of the mixing matrix and sum to 1 with one's
own; a rule that trims, trims weight. The share of weight that liars may have is called `share` throughout.

Rules that look at single vectors cannot be used under masks, which show sums only: `verify_masks`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig

Floats = NDArray[np.floating[Any]]
Weights = NDArray[np.float64]

NOTHING = 1e-9
"""A weight that is rounding: sums of weights are exact to 1e-15, and no peer's is as small."""


class Rule(ABC):
    """Makes one vector of one's own and those received.

    Attributes:
        name: as scenarios call it.
        source: where it was published.
        needs_individual_updates: whether it looks at single peers' vectors, which masks hide.
        centred: whether one's own vector is more than one of the others; else all who receive the same make the same.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_individual_updates: ClassVar[bool] = True
    centred: ClassVar[bool] = False

    @abstractmethod
    def aggregate(self, own: Floats, received: Floats, weights: Weights) -> Floats:
        """Return what a peer goes on with, [..., P].

        Args:
            own: its own vector, [..., P].
            received: those of others, [..., k, P].
            weights: theirs, [..., k]; the rest up to 1 is one's own.
        """

    def verify(self, count: int) -> None:
        """Check that the rule can do what it is for among so many vectors, one's own among them.

        Raises:
            InvalidConfig: there are too few.
        """
        del count


class Pool(Rule):
    """A rule in which one's own vector is one among all."""

    def aggregate(self, own: Floats, received: Floats, weights: Weights) -> Floats:
        """Return what a peer goes on with; see `Rule`."""
        mine = 1.0 - weights.sum(-1, keepdims=True)
        return self.pool(
            np.concatenate([own[..., None, :], received], axis=-2), np.concatenate([mine, weights], axis=-1)
        )

    @abstractmethod
    def pool(self, vectors: Floats, weights: Weights) -> Floats:
        """Return what comes of vectors, [..., m, P], whose weights, [..., m], sum to 1: [..., P], in their dtype."""


@dataclass(frozen=True)
class Mean(Pool):
    """The weighted mean. A single liar takes it anywhere."""

    name = "none"
    source = "no defence"
    needs_individual_updates = False

    def pool(self, vectors: Floats, weights: Weights) -> Floats:
        """Return the weighted mean."""
        return _weighed(vectors, weights)


@dataclass(frozen=True)
class SelfCentredClipping(Rule):
    """One's own vector, moved by the weighted mean of the differences to others', each cut off at a length.

    A liar of weight w moves the result by w times that length at most, whatever it sends.

    Attributes:
        radius: the length, in the unit of the vectors' norm; 0: each time one's own, the shortest such that no more
            than `share` of the weight is cut. A guess: the paper's choice needs the variance among the honest.
        share: of weight that may lie; 0.2, a guess.
    """

    radius: float = 0.0
    share: float = 0.2

    name = "clipping"
    source = "He, Karimireddy, Jaggi 2022, arXiv 2202.01545 (ClippedGossip)"
    centred = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.radius < float("inf"):
            raise InvalidConfig(f"radius is {self.radius}; it must be 0 or more")
        _verify_share(self.share)

    def aggregate(self, own: Floats, received: Floats, weights: Weights) -> Floats:
        """Return what a peer goes on with; see `Rule`."""
        moves = received - own[..., None, :]
        lengths = _lengths(moves)
        radius = np.full(lengths.shape[:-1], self.radius) if self.radius else self._least(lengths, weights)
        factors = weights * np.minimum(1.0, radius[..., None] / np.where(lengths > 0, lengths, 1.0))
        return own + _weighed(moves, factors)

    def _least(self, lengths: Weights, weights: Weights) -> Weights:
        order = np.argsort(lengths, axis=-1, kind="stable")
        sums = np.take_along_axis(weights, order, -1).cumsum(-1)
        enough = (sums >= sums[..., -1:] - self.share - NOTHING) & (sums > 0)
        first = enough.argmax(-1)[..., None]
        return np.take_along_axis(np.take_along_axis(lengths, order, -1), first, -1)[..., 0]


@dataclass(frozen=True)
class CoordinateMedian(Pool):
    """In each coordinate the value that half of the weight lies on either side of. Bears less than half of the weight.

    Where it is any value between two, their mean.
    """

    name = "median"
    source = "Yin, Chen, Ramchandran, Bartlett 2018, arXiv 1803.01498"

    def pool(self, vectors: Floats, weights: Weights) -> Floats:
        """Return the weighted median of each coordinate."""
        values, each = _sorted(vectors, weights)
        sums = each.cumsum(-2)
        half = sums[..., -1:, :] / 2
        low = np.take_along_axis(values, (sums >= half - NOTHING).argmax(-2)[..., None, :], -2)
        high = np.take_along_axis(values, (sums > half + NOTHING).argmax(-2)[..., None, :], -2)
        # Not their sum halved: that of two of the largest numbers is infinite.
        return (low + (high - low) / 2)[..., 0, :]


@dataclass(frozen=True)
class TrimmedMean(Pool):
    """In each coordinate the mean without the lowest and the highest values. Bears `share` of the weight.

    Attributes:
        share: of weight that is left out on each side, of a value only in part where that is what the share takes;
            0.2, a guess.
    """

    share: float = 0.2

    name = "trimmed-mean"
    source = "Yin, Chen, Ramchandran, Bartlett 2018, arXiv 1803.01498, with weights"

    def __post_init__(self) -> None:
        _verify_share(self.share)

    def pool(self, vectors: Floats, weights: Weights) -> Floats:
        """Return the trimmed mean of each coordinate."""
        values, each = _sorted(vectors, weights)
        sums = each.cumsum(-2)
        kept = np.minimum(sums, 1.0 - self.share) - np.maximum(sums - each, self.share)
        # Where the share ends between two values, a rest by rounding must not let a huge one in.
        kept = np.where(kept > NOTHING, kept, 0.0)
        kept /= kept.sum(-2, keepdims=True)
        mean: Floats = np.einsum("...mp,...mp->...p", kept.astype(vectors.dtype), np.where(kept > 0, values, 0))
        return mean


@dataclass(frozen=True)
class Krum(Pool):
    """The vector with the least sum of squared distances to its nearest others, m - f - 2 of them among m.

    f is `share` of m, rounded up. Weights do not count.

    Attributes:
        share: of the vectors that may lie; 0.2, a guess. 2 f + 3 must be no more than m.
    """

    share: float = 0.2

    name = "krum"
    source = "Blanchard, El Mhamdi, Guerraoui, Stainer 2017, arXiv 1703.02757"

    def __post_init__(self) -> None:
        _verify_share(self.share)

    def liars(self, count: int) -> int:
        """Return f among so many vectors."""
        return int(np.ceil(self.share * count - NOTHING))

    def verify(self, count: int) -> None:
        """Check that there are 2 f + 3.

        Raises:
            InvalidConfig: there are fewer.
        """
        needed = 2 * self.liars(count) + 3
        if count < needed:
            raise InvalidConfig(
                f"{self.name} with a share of {self.share:g} needs {needed} vectors where there are {count}; lower the "
                "share, or let peers average with more others"
            )

    def pool(self, vectors: Floats, weights: Weights) -> Floats:
        """Return the chosen vector; see the class."""
        del weights
        best = self._order(vectors)[..., :1, None]
        return np.take_along_axis(vectors, best, -2)[..., 0, :]

    def _order(self, vectors: Floats) -> NDArray[np.int64]:
        """Return the vectors' numbers from the least score to the largest, [..., m]."""
        count = vectors.shape[-2]
        squared = np.empty((*vectors.shape[:-1], count))
        for other in range(count):
            moves = vectors - vectors[..., other : other + 1, :]
            squared[..., other] = _lengths(moves) ** 2
        nearest = np.sort(squared, axis=-1)[..., 1 : 1 + max(1, count - self.liars(count) - 2)]
        return np.argsort(nearest.sum(-1), axis=-1, kind="stable")


@dataclass(frozen=True)
class MultiKrum(Krum):
    """The weighted mean of the m - f - 2 vectors that Krum would choose first."""

    name = "multi-krum"

    def pool(self, vectors: Floats, weights: Weights) -> Floats:
        """Return the mean of the chosen vectors; see the class."""
        count = vectors.shape[-2]
        chosen = self._order(vectors)[..., : max(1, count - self.liars(count) - 2)]
        each = np.take_along_axis(weights, chosen, -1)
        each = each / each.sum(-1, keepdims=True)
        return _weighed(np.take_along_axis(vectors, chosen[..., None], -2), each)


@dataclass(frozen=True)
class GeometricMedian(Pool):
    """The point whose weighted sum of distances to the vectors is least. Bears less than half of the weight.

    By Weiszfeld's iteration from the mean, with distances of at least `LEAST`, until it moves by less than a
    ten-thousandth of them.
    """

    name = "geometric-median"
    source = "Pillutla, Kakade, Harchaoui 2022, arXiv 1912.13445 (RFA: smoothed Weiszfeld)"

    LEAST: ClassVar[float] = 1e-6
    """As in the paper."""
    STEPS: ClassVar[int] = 60
    """The paper takes 3. From the mean, vectors that are 10^k times as far as the others take about 2 k to get away
    from; the rest is a guess."""

    def pool(self, vectors: Floats, weights: Weights) -> Floats:
        """Return the geometric median, nearly."""
        point = np.einsum("...m,...mp->...p", weights, vectors)
        moving = np.ones(point.shape[:-1], bool)
        for _ in range(self.STEPS):
            moves = vectors - point[..., None, :]
            lengths = _lengths(moves)
            each = weights / np.maximum(lengths, self.LEAST)
            each /= each.sum(-1, keepdims=True)
            step = np.where(moving[..., None], np.einsum("...m,...mp->...p", each, moves), 0.0)
            point = point + step
            # Each point stops on its own, so that none depends on what else is computed at once.
            moving &= _lengths(step) > 1e-4 * lengths.min(-1) + self.LEAST
            if not moving.any():
                break
        made: Floats = point.astype(vectors.dtype)
        return made


@dataclass(frozen=True)
class MedianOfGroups(CoordinateMedian):
    """In each coordinate the median of the groups' averages, each of them a masked sum; one's own group's is one.

    Every group announces its average, so it is known to all. Bears liars in less than half of the groups.
    """

    name = "group-median"
    source = "Chen, Su, Xu 2017, arXiv 1705.05491 (medians of means), by coordinate"
    needs_individual_updates = False


RULES: Mapping[str, type[Rule]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            *(Mean, SelfCentredClipping, CoordinateMedian, TrimmedMean, Krum, MultiKrum, GeometricMedian),
            MedianOfGroups,
        )
    }
)
"""By the name that scenarios use; the options are the dataclass's fields."""


def rule(name: str, **options: object) -> Rule:
    """Make a rule. Options that it does not have are left out.

    Raises:
        InvalidConfig: there is none of this name, or an option is out of range.
    """
    if name not in RULES:
        raise InvalidConfig(f"there is no rule {name!r}; there are {', '.join(RULES)}")
    fields = [field.name for field in dataclasses.fields(cast(Any, RULES[name]))]
    return RULES[name](**{key: value for key, value in options.items() if key in fields})


def verify_masks(chosen: Rule, *, masks: bool) -> None:
    """Refuse what would have to look behind masks.

    Raises:
        InvalidConfig: the rule compares single updates, and masks hide them.
    """
    if masks and chosen.needs_individual_updates:
        raise InvalidConfig(
            f"{chosen.name} compares single updates, which masks hide; take {MedianOfGroups.name}, or set masks to off"
        )


def _weighed(vectors: Floats, weights: Weights) -> Floats:
    """Return the weighted sum of vectors, [..., m, P], in their dtype: [..., P]."""
    made: Floats = np.einsum("...m,...mp->...p", weights.astype(vectors.dtype), vectors)
    return made


def _lengths(vectors: Floats) -> Weights:
    """Return the norms of vectors, [..., P]: float64 [...]."""
    lengths: Weights = np.sqrt(np.einsum("...p,...p->...", vectors, vectors, dtype=np.float64))
    return lengths


def _sorted(vectors: Floats, weights: Weights) -> tuple[Floats, Weights]:
    """Return each coordinate's values in ascending order, and the weights they came with: [..., m, P] each."""
    order = np.argsort(vectors, axis=-2, kind="stable")
    each = np.broadcast_to(weights[..., None], vectors.shape)
    return np.take_along_axis(vectors, order, -2), np.take_along_axis(each, order, -2)


def _verify_share(share: float) -> None:
    if not 0.0 <= share < 0.5:
        raise InvalidConfig(f"share is {share}; it must be from 0 to below 0.5")
