"""What sums give away: how many colluders isolate one peer's update, and how well fewer of them estimate it.

Whoever reads a sum of updates has a linear equation in them. Colluders put together the equations that each of them
reads and their own updates, and know the update of an honest peer u exactly if the unit vector e_u lies in the span of
these rows. Nothing else enters: no noise, no knowledge of what updates look like, and no lies (these are bounded by
`p2pfl.gossip.grouping.bearable_colluders`). All modes of averaging differ in their sums only, so one search serves all.

Spans are computed modulo the prime 2^61 - 1. For up to 36 sums of equal weights that is the same as over the rationals:
by Hadamard's bound for matrices of zeros and ones no minor reaches the prime. Beyond, a wrong answer would need a minor
that the prime divides.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import networkx as nx
import numpy as np

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.grouping import bearable_colluders

PRIME = 2**61 - 1
MOST_SETS = 100_000
"""Sets of colluders that an exact search looks at: some seconds. Where there are more, it gives bounds."""
MOST_GUESSES = 2_000
"""Sets that the greedy bound looks at: it need not be the best."""

_Row = dict[int, int]
_Key = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sum:
    """A weighted sum of updates that somebody reads.

    Attributes:
        weights: each summand's peer and weight, in ascending order of peers; no weight is 0.
        readers: who learns it; None: everybody, since it is published.
    """

    weights: tuple[tuple[int, Fraction], ...]
    readers: frozenset[int] | None


@dataclass(frozen=True)
class Isolation:
    """A set of colluders that solves for one peer's update.

    Attributes:
        colluders: the set; empty if published sums suffice.
        victim: whose update it solves for.
        at_least: no set with fewer members than this solves for anybody's.
    """

    colluders: frozenset[int]
    victim: int
    at_least: int

    @property
    def exact(self) -> bool:
        """Whether no smaller set does it: otherwise one may, of `at_least` members or more."""
        return self.at_least == len(self.colluders)


@dataclass(frozen=True)
class Estimate:
    """The best linear estimate that colluders make of one peer's update.

    Attributes:
        colluders: who they are.
        victim: whose update is estimated best.
        cosine: of the estimate and the update, expected for updates that are independent and equally long; 1: isolated.
        exact: whether no other set of as many colluders does better; otherwise one may.
    """

    colluders: frozenset[int]
    victim: int
    cosine: float
    exact: bool


def clear_sums(graph: nx.Graph) -> list[Sum]:
    """Return what neighbors learn without masks: each one's update as it is."""
    return [_plain([peer], frozenset(graph[peer])) for peer in graph]


def neighborhood_sums(graph: nx.Graph) -> list[Sum]:
    """Return the Metropolis-Hastings average of each closed neighborhood, read by the peer in its middle.

    The weights are those of `p2pfl.gossip.mixing.metropolis_hastings`, as fractions.
    """
    sums = []
    for peer in graph:
        weights = {other: Fraction(1, 1 + max(graph.degree[peer], graph.degree[other])) for other in graph[peer]}
        own = 1 - sum(weights.values(), Fraction(0))
        if own:
            weights[peer] = own
        sums.append(Sum(tuple(sorted(weights.items())), frozenset([peer])))
    return sums


def group_sums(groups: Iterable[Collection[int]], *, released: bool = False) -> list[Sum]:
    """Return the sum of each group, or star with its centre, read by its members; if `released`, by everybody."""
    return [_plain(group, None if released else frozenset(group)) for group in groups]


def _plain(members: Collection[int], readers: frozenset[int] | None) -> Sum:
    return Sum(tuple((member, Fraction(1)) for member in sorted(members)), readers)


def isolating_set(sums: Sequence[Sum], sets: int = MOST_SETS) -> Isolation | None:
    """Return the smallest set of colluders that solves for an honest peer's update, or bounds on it.

    Sets are searched by size. Only those are looked at whose sums hang together, since rows that share no summand do
    not help each other; and of peers that can be swapped without changing the sums, the first ones.

    Args:
        sums: what is read in a round. Sums of several rounds belong together only where a peer contributes the same.
        sets: look at no more than so many; beyond, the answer is the best of a greedy search and not exact.

    Returns:
        None if there is no sum to solve.
    """
    known = _Knowledge(sums)
    best = _bound(known)
    if best is None:
        return None
    for size, level in enumerate(_levels(known, len(best.colluders) - 1, sets)):
        if level is None:
            return Isolation(best.colluders, best.victim, size)
        for colluders in level:
            victim = known.isolated(colluders)
            if victim is not None:
                return Isolation(colluders, victim, size)
    return Isolation(best.colluders, best.victim, len(best.colluders))


def best_estimate(sums: Sequence[Sum], colluders: int, sets: int = MOST_SETS) -> Estimate | None:
    """Return the best linear estimate of an honest peer's update that up to so many colluders can make.

    With updates that are independent, of zero mean and equally long, the best linear estimate of x_u from rows A has a
    cosine of sqrt(e_u' P e_u) with it, P the projector on the rows' span: for one sum of 1 + h honest peers with equal
    weights 1 / sqrt(1 + h), as `worst_cosine` says.

    Args:
        sums: what is read in a round.
        colluders: how many work together at most.
        sets: look at no more than so many sets; beyond, the answer is the best of those, and not exact.

    Returns:
        None if there is no honest peer whose update is in a sum.
    """
    known = _Knowledge(sums)
    best: Estimate | None = None
    for level in _levels(known, colluders, sets):
        if level is None:
            return None if best is None else Estimate(best.colluders, best.victim, best.cosine, exact=False)
        for together in level:
            victim, cosine = known.sharpest(together)
            if victim is not None and (best is None or cosine > best.cosine + 1e-12):
                best = Estimate(together, victim, cosine, exact=True)
    return best


def worst_cosine(least: int, colluders: int, alpha_min: float = 1.0) -> float:
    """Return how well colluders estimate an update from the one sum it is in: 1 / sqrt(1 + h alpha_min^2).

    Worst is that the update weighs 1 and each of the h = least - colluders - 1 other honest ones alpha_min.

    Args:
        least: fewest contributors of a sum.
        colluders: how many of them work together.
        alpha_min: the smallest weight of a contributor, relative to the largest; 1: all weigh the same.

    Raises:
        InvalidConfig: alpha_min is not above 0 and at most 1.
    """
    if not 0 < alpha_min <= 1:
        raise InvalidConfig(f"alpha-min must be above 0 and at most 1, not {alpha_min:g}")
    honest = max(0, least - colluders - 1)
    return float(1 / np.sqrt(1 + honest * alpha_min**2))


def lying_colluders(members: int) -> int:
    """Return how many liars of a group may get two sets of survivors certified, the difference of which isolates.

    One more than the group bears, and never more than all but one of the members, for whom an honest run suffices.
    """
    return max(1, min(bearable_colluders(members) + 1, members - 1))


def rounds_until_isolated(
    drawn: Iterable[Sequence[Sum]], colluders: Collection[int] = frozenset()
) -> tuple[int, int] | None:
    """Return after how many rounds an unchanging contribution is solved for, and whose.

    The unknowns are the same in every round: the worst case of contributions that are alike from round to round.

    Args:
        drawn: the sums of each round. The search ends with them.
        colluders: who puts together what each of them reads, and their own updates.

    Returns:
        the number of rounds and the victim, or None if these rounds do not suffice.
    """
    together = frozenset(colluders)
    basis: dict[int, _Row] = {}
    for count, sums in enumerate(drawn, 1):
        for each in sums:
            if each.readers is None or not together.isdisjoint(each.readers):
                _add(basis, _without(_row(each), together))
        victim = _unit(basis)
        if victim is not None:
            return count, victim
    return None


class _Knowledge:
    """The equations of a round, by who reads them."""

    def __init__(self, sums: Sequence[Sum]) -> None:
        merged: dict[tuple[tuple[int, Fraction], ...], frozenset[int] | None] = {}
        for each in sums:
            before = merged.get(each.weights, frozenset())
            merged[each.weights] = None if before is None or each.readers is None else before | each.readers
        self.sums = [Sum(weights, readers) for weights, readers in merged.items() if weights]
        self._rows = [_row(each) for each in self.sums]
        self._public = {number for number, each in enumerate(self.sums) if each.readers is None}
        self._read: dict[int, set[int]] = {}
        for number, each in enumerate(self.sums):
            for reader in each.readers or ():
                self._read.setdefault(reader, set()).add(number)
        columns = {peer for each in self.sums for peer, _ in each.weights}
        self.peers = sorted(columns | set(self._read))
        self._twins = self._find_twins()
        self._reach = self._find_reach()

    def visible(self, colluders: frozenset[int]) -> list[int]:
        """Return the places of the sums that these peers read, each once."""
        return sorted(self._public.union(*(self._read.get(peer, ()) for peer in colluders)))

    def basis(self, colluders: frozenset[int]) -> dict[int, _Row]:
        """Return the reduced rows that these peers have in the honest peers' updates, by pivot."""
        basis: dict[int, _Row] = {}
        for number in self.visible(colluders):
            _add(basis, _without(self._rows[number], colluders))
        return basis

    def isolated(self, colluders: frozenset[int]) -> int | None:
        """Return an honest peer whose update these peers solve for."""
        return _unit(self.basis(colluders))

    def sharpest(self, colluders: frozenset[int]) -> tuple[int | None, float]:
        """Return the honest peer whose update these peers estimate best, and the cosine."""
        rows = [
            {peer: float(weight) for peer, weight in self.sums[number].weights} for number in self.visible(colluders)
        ]
        columns = sorted({peer for row in rows for peer in row} - colluders)
        if not columns:
            return None, 0.0
        matrix = np.array([[row.get(peer, 0.0) for peer in columns] for row in rows])
        _, scales, directions = np.linalg.svd(matrix, full_matrices=False)
        kept = directions[scales > 1e-9 * max(1.0, scales[0])]
        squares = np.square(kept).sum(axis=0)
        place = int(np.argmax(squares.round(12)))
        return columns[place], float(np.sqrt(min(1.0, squares[place])))

    def grown(self, colluders: frozenset[int]) -> list[frozenset[int]]:
        """Return these colluders with one more who reads a sum that shares a summand with one of theirs.

        Of a class of twins the first ones come first: so each way to choose among twins is looked at once.
        """
        counts: dict[int, int] = {}
        for peer in colluders:
            counts[self._twins[peer][0]] = counts.get(self._twins[peer][0], 0) + 1
        nobody: set[int] = set()
        within = nobody.union(*(self._reach[first] for first in counts)) if colluders else set(self._reach)
        free = [self._twins[first] for first in sorted(within) if counts.get(first, 0) < len(self._twins[first])]
        return [colluders | {group[counts.get(group[0], 0)]} for group in free]

    def _find_twins(self) -> dict[int, list[int]]:
        """Return for each peer the class of those that can be swapped with it: the sums stay what they are.

        Such swaps compose, so that it suffices to compare with the first of each class.
        """
        rows = [tuple(row.items()) for row in self._rows]
        table = {row: each.readers for row, each in zip(rows, self.sums, strict=True)}
        touching: dict[int, set[_Key]] = {peer: set() for peer in self.peers}
        for row, readers in table.items():
            for peer in {peer for peer, _ in row} | (readers or frozenset()):
                touching[peer].add(row)
        classes: dict[int, list[list[int]]] = {}
        twins: dict[int, list[int]] = {}
        for peer in self.peers:
            alike = classes.setdefault(len(touching[peer]), [])
            for group in alike:
                if _swappable(group[0], peer, touching[peer] | touching[group[0]], table):
                    group.append(peer)
                    twins[peer] = group
                    break
            else:
                twins[peer] = [peer]
                alike.append(twins[peer])
        return twins

    def _find_reach(self) -> dict[int, set[int]]:
        """Return for each class of twins, by its first, those whom its rows touch.

        They touch in a common summand, or over published sums.
        """
        joined = nx.Graph()
        joined.add_nodes_from(self.peers)
        for number in self._public:
            nx.add_path(joined, list(self._rows[number]))
        part = {peer: number for number, found in enumerate(nx.connected_components(joined)) for peer in found}
        touched = {
            peer: {part[peer], *(part[column] for number in self._read.get(peer, ()) for column in self._rows[number])}
            for peer in self.peers
        }
        touching: dict[int, set[int]] = {}
        for peer, parts in touched.items():
            for each_part in parts:
                touching.setdefault(each_part, set()).add(self._twins[peer][0])
        reach: dict[int, set[int]] = {group[0]: set() for group in self._twins.values()}
        for peer, parts in touched.items():
            reach[self._twins[peer][0]].update(*(touching[each_part] for each_part in parts))
        return reach


def _swappable(one: int, other: int, rows: Iterable[_Key], table: Mapping[_Key, frozenset[int] | None]) -> bool:
    """Return whether swapping two peers turns these rows into rows of the table with the same readers."""
    swap = {one: other, other: one}
    for row in rows:
        swapped = tuple(sorted((swap.get(peer, peer), value) for peer, value in row))
        before = table[row]
        readers = None if before is None else frozenset(swap.get(peer, peer) for peer in before)
        if table.get(swapped, frozenset()) != readers:
            return False
    return True


def _levels(known: _Knowledge, most: int, sets: int) -> Iterator[list[frozenset[int]] | None]:
    """Yield the sets of 0, 1, ... up to `most` colluders worth looking at; None once there are too many, and end."""
    level = {frozenset[int]()}
    left = sets
    for _ in range(most + 1):
        yield sorted(level, key=sorted)
        left -= len(level)
        larger: set[frozenset[int]] = set()
        for colluders in level:
            larger.update(known.grown(colluders))
            if len(larger) > left:
                yield None
                return
        level = larger


def _bound(known: _Knowledge) -> Isolation | None:
    """Return some set that isolates: the best of the obvious ones, or a smaller one that a greedy search meets."""
    obvious = [found for each in known.sums if (found := _obvious(each)) is not None]
    if not obvious:
        return None
    best = min(obvious, key=lambda found: (len(found.colluders), sorted(found.colluders)))
    guesses = MOST_GUESSES
    for start in sorted(known.grown(frozenset()), key=lambda some: (_shortest(known, some), sorted(some))):
        colluders = start
        while guesses > 0 and len(colluders) < len(best.colluders):
            victim = known.isolated(colluders)
            if victim is not None:
                best = Isolation(colluders, victim, 0)
                break
            larger = known.grown(colluders)
            guesses -= len(larger)
            if not larger:
                break
            colluders = min(larger, key=lambda some: (_shortest(known, some), sorted(some)))
    return best


def _obvious(each: Sum) -> Isolation | None:
    """Return a reader of a sum with all other summands but one; of a published sum all summands but one."""
    summands = frozenset(peer for peer, _ in each.weights)
    if each.readers is None:
        return Isolation(summands - {max(summands)}, max(summands), 0)
    for reader in sorted(each.readers, key=lambda peer: (peer not in summands, peer)):
        others = summands - {reader}
        if others:
            return Isolation(others - {max(others)} | {reader}, max(others), 0)
    return None


def _shortest(known: _Knowledge, colluders: frozenset[int]) -> int:
    """Return the fewest honest summands of a row that these colluders have."""
    return min((len(row) for row in known.basis(colluders).values()), default=len(known.peers))


def _row(each: Sum) -> _Row:
    """Return a sum's weights modulo the prime."""
    return {peer: weight.numerator * pow(weight.denominator, -1, PRIME) % PRIME for peer, weight in each.weights}


def _without(row: _Row, colluders: frozenset[int]) -> _Row:
    """Return what is left of a row once these take their own updates off."""
    return {peer: value for peer, value in row.items() if peer not in colluders}


def _add(basis: dict[int, _Row], row: _Row) -> None:
    """Add a row to a reduced basis: no row of it has a value in another's pivot column, and 1 in its own."""
    for pivot in [column for column in row if column in basis]:
        _subtract(row, row[pivot], basis[pivot])
    if not row:
        return
    pivot = min(row)
    inverse = pow(row[pivot], -1, PRIME)
    scaled = {column: value * inverse % PRIME for column, value in row.items()}
    for other in basis.values():
        if pivot in other:
            _subtract(other, other[pivot], scaled)
    basis[pivot] = scaled


def _subtract(row: _Row, factor: int, other: _Row) -> None:
    for column, value in other.items():
        left = (row.get(column, 0) - factor * value) % PRIME
        if left:
            row[column] = left
        else:
            row.pop(column, None)


def _unit(basis: dict[int, _Row]) -> int | None:
    """Return the first peer whose unit vector is in the span: in a reduced basis it is then one of the rows."""
    return min((pivot for pivot, row in basis.items() if len(row) == 1), default=None)
