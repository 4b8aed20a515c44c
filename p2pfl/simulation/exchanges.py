"""What simulated peers make of each other's vectors beside plain mixing: masks, compression, lies, and robust rules.

Each is a `p2pfl.simulation.dense.engine.Exchange`, and most are around another one. Seeds that run side by side are
`n` peers each, one after another; each draws from a generator of its own, so that what a seed gives does not depend on
the others.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.crypto.ring import MAX_CLIPPED, WEIGHT_ONE, Ring
from p2pfl.gossip.compress import Compressor, RandK
from p2pfl.gossip.robust import MedianOfGroups, Pool, Rule
from p2pfl.learning.space import Request, Space
from p2pfl.simulation.attacks import Lie, Scene
from p2pfl.simulation.dense.engine import Exchange, Schedule
from p2pfl.simulation.dense.mix import Mixer, Rows
from p2pfl.simulation.dense.sampling import derived
from p2pfl.simulation.dense.variants import Blocks

AT_ONCE = 1 << 22
"""Numbers of neighborhoods that a rule looks at a time, 16 MiB of float32: a guess that keeps temporaries small."""

Floats = NDArray[np.floating[Any]]


class Counted:
    """An exchange that counts what each peer sends to one that takes it in.

    Attributes:
        size: bytes of the latest round.
    """

    def __init__(self, exchange: Exchange, compress: Compressor, values: int) -> None:
        self._exchange, self._compress, self._values = exchange, compress, values
        self.size = 0

    def __call__(self, round: int, request: Request, space: Space, spare: list[Tensor]) -> Request:
        """Exchange as `Exchange` says."""
        each = self._compress.size(self._values)
        self.size = len(request.vectors) * each + BYTES_PER_SCALAR * len(request.scalars)
        return self._exchange(round, request, space, spare)


BYTES_PER_SCALAR = 4


class Masked:
    """An exchange of what masked sums represent: values rounded to the ring's fixed point, and cut off at its clip.

    Sums are computed in float32, whose 24 bits round more than the ring's 31 where values are not small.
    """

    def __init__(self, mixing: Exchange, ring: Ring) -> None:
        self._mixing, self._ring = mixing, ring

    def __call__(self, round: int, request: Request, space: Space, spare: list[Tensor]) -> Request:
        """Exchange as `Exchange` says.

        Raises:
            RoundFailed: more values are clipped than real peers bear.
        """
        vectors = tuple(self._rounded(vector) for vector in request.vectors)
        return self._mixing(round, dataclasses.replace(request, vectors=vectors), space, spare)

    def _rounded(self, vector: Tensor) -> Tensor:
        factor, largest = float(self._ring.factor(WEIGHT_ONE)), float(self._ring.largest)
        words = torch.round(vector * factor)
        clipped = int((words.abs() > largest).sum())
        if clipped > MAX_CLIPPED * len(vector):
            raise RoundFailed(
                f"{clipped} of {len(vector)} values are beyond averaging.clip = {self._ring.clip:g}; raise it"
            )
        return words.clamp_(-largest, largest).div_(factor)


class Robust:
    """Mixing by a rule in place of the weighted mean, whose weights are the round's matrix. Scalars are mixed by it."""

    def __init__(self, schedule: Schedule, rule: Rule, n: int) -> None:
        self._schedule, self._rule, self._n = schedule, rule, n

    def __call__(self, round: int, request: Request, space: Space, spare: list[Tensor]) -> Request:
        """Exchange as `Exchange` says."""
        del spare
        matrix = self._schedule.at(round)
        blocks = list(diagonal(matrix, self._n))
        vectors = []
        for vector in request.vectors:
            rows = _rows(space, vector)
            with np.errstate(over="ignore", invalid="ignore"):
                made = np.concatenate([self._made(rows[part], weights) for part, weights in blocks])
            vectors.append(_flat(space, made))
        mixer = Mixer(matrix, space.device, space.dtype) if request.scalars else None
        scalars = tuple(mixer.mix_scalars(scalar) for scalar in request.scalars) if mixer else ()
        return Request(tuple(vectors), scalars)

    def _made(self, rows: Floats, weights: NDArray[np.float64]) -> Floats:
        if isinstance(self._rule, MedianOfGroups):
            return _median_of_groups(self._rule, rows, weights)
        made = rows.copy()
        # Whoever has the same neighborhood and weights makes the same, unless the rule is about one's own vector.
        chosen, places = np.arange(len(rows)), np.arange(len(rows))
        if isinstance(self._rule, Pool):
            _, chosen, places = np.unique(weights, axis=0, return_index=True, return_inverse=True)
            places = places.reshape(-1)
            made = rows[chosen]
        degrees = (weights[chosen] != 0).sum(1)
        for degree in np.unique(degrees[degrees > 1]):
            these = np.flatnonzero(degrees == degree)
            step = max(1, AT_ONCE // (int(degree) * rows.shape[1]))
            for start in range(0, len(these), step):
                part = these[start : start + step]
                made[part] = self._neighborhoods(rows, weights, chosen[part], int(degree))
        return made[places]

    def _neighborhoods(
        self, rows: Floats, weights: NDArray[np.float64], peers: NDArray[np.int64], degree: int
    ) -> Floats:
        """Return what peers with `degree` vectors each make of them."""
        members = np.nonzero(weights[peers])[1].reshape(len(peers), degree)
        each = np.take_along_axis(weights[peers], members, 1)
        if isinstance(self._rule, Pool):
            return self._rule.pool(rows[members], each)
        others = np.where(members == peers[:, None], 0.0, each)
        return self._rule.aggregate(rows[peers], rows[members], others)


def _median_of_groups(rule: MedianOfGroups, rows: Floats, weights: NDArray[np.float64]) -> Floats:
    """Return the median of the groups' averages for all who are in a group; whoever is alone keeps its own."""
    labels = groups_of(weights)
    averages = [rows[labels == label].mean(0) for label in np.unique(labels[labels >= 0])]
    made = rows.copy()
    if averages:
        made[labels >= 0] = rule.pool(np.stack(averages), np.full(len(averages), 1 / len(averages)))
    return made


def groups_of(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each peer's group, the least number of its members, from a matrix of groups, [n, n]; -1: it is alone."""
    used = weights != 0
    return np.where(used.sum(1) > 1, used.argmax(1), -1)


class Compressed:
    """An exchange of vectors of which only what a compressor makes is sent.

    What rand-k sends is mixed where all peers send it, and the rest stays as it is: nothing is lost. Otherwise all who
    receive a peer's vectors keep a copy p of what they know of it, and the peer sends C(x - p) for them to add. With
    error feedback x becomes x + gamma (W p - p): what is not sent stays in x, and goes into the next message
    (Koloskova, Stich, Jaggi 2019, arXiv 1902.00340). Without it x becomes W p, and what is not sent is lost (DCD-PSGD:
    Tang et al. 2018, arXiv 1803.06443). Where W is another rule than the mean, it works on the copies.

    Copies of models begin with the common initial model of each seed, `initial`, [seeds, P], those of other vectors
    with 0.
    """

    def __init__(
        self, exchange: Exchange, compress: Compressor, schedule: Schedule, seeds: Sequence[int], initial: Floats, *,
        feedback: bool, gamma: float, columns: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        self._exchange, self._compress, self._schedule, self._seeds = exchange, compress, schedule, seeds
        self._feedback, self._gamma = feedback, gamma
        # Of vectors of which only a part is shared, the places that are; None: all.
        self._columns = slice(None) if columns is None else columns
        self._initial, self._known = initial[:, self._columns], list[Floats]()

    def __call__(self, round: int, request: Request, space: Space, spare: list[Tensor]) -> Request:
        """Exchange as `Exchange` says."""
        if isinstance(self._compress, RandK):
            return self._in_places(self._compress, round, request, space, spare)
        whole = [_rows(space, vector) for vector in request.vectors]
        if not self._known:
            self._known = [np.zeros_like(rows[:, self._columns]) for rows in whole]
            for first, part in zip(self._initial, _parts(len(whole[0]), len(self._seeds)), strict=True):
                self._known[0][part] = first
        talks = senders(self._schedule.at(round))
        for place, rows in enumerate(whole):
            self._tell(round, place, rows[:, self._columns], talks)
        copies = [self._put(np.zeros_like(rows), known) for rows, known in zip(whole, self._known, strict=True)]
        told = dataclasses.replace(request, vectors=tuple(_flat(space, each) for each in copies))
        reply = self._exchange(round, told, space, spare)
        vectors = []
        for rows, copy, vector in zip(whole, copies, reply.vectors, strict=True):
            mixed = _rows(space, vector)
            kept = rows + self._gamma * (mixed - copy) if self._feedback else np.where(talks[:, None], mixed, rows)
            vectors.append(_flat(space, self._put(rows.copy(), kept[:, self._columns])))
        return dataclasses.replace(reply, vectors=tuple(vectors))

    def _tell(self, round: int, place: int, rows: Floats, talks: NDArray[np.bool_]) -> None:
        """Send what the copies of a vector lack, and let all who send have it added to theirs."""
        known = self._known[place]
        for seed, part in zip(self._seeds, _parts(len(rows), len(self._seeds)), strict=True):
            random = np.random.Generator(np.random.PCG64(derived(seed, "compression", round, place)))
            sent, _ = self._compress(rows[part] - known[part], random)
            known[part] += np.where(talks[part, None], sent, 0.0)

    def _in_places(
        self, compress: RandK, round: int, request: Request, space: Space, spare: list[Tensor]
    ) -> Request:  # fmt: skip
        reply = self._exchange(round, request, space, spare)
        vectors = []
        for place, (mine, vector) in enumerate(zip(request.vectors, reply.vectors, strict=True)):
            rows, mixed = _rows(space, mine), _rows(space, vector)
            shared = np.arange(rows.shape[1])[self._columns]
            for seed, part in zip(self._seeds, _parts(len(rows), len(self._seeds)), strict=True):
                random = np.random.Generator(np.random.PCG64(derived(seed, "compression", round, place)))
                drawn = shared[compress.places(len(shared), random)]
                rows[part, drawn] = mixed[part, drawn]
            vectors.append(_flat(space, rows))
        return dataclasses.replace(reply, vectors=tuple(vectors))

    def _put(self, rows: Floats, shared: Floats) -> Floats:
        rows[:, self._columns] = shared
        return rows


@dataclass(frozen=True)
class EachSeed:
    """A compressor of the rows of several seeds side by side, each with a generator of its own."""

    compress: Compressor
    seeds: Sequence[int]

    def __call__(self, rows: NDArray[Any], random: np.random.Generator) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Compress as `Compressor` says."""
        first = int(random.integers(2**62))
        made = [
            self.compress(rows[part], np.random.Generator(np.random.PCG64(derived(seed, "compression", first))))
            for seed, part in zip(self.seeds, _parts(len(rows), len(self.seeds)), strict=True)
        ]
        return np.concatenate([each for each, _ in made]), np.concatenate([sizes for _, sizes in made])


class Attacked:
    """An exchange in which the last peers of each seed lie.

    They are together and know everything: after the round each goes on with the mean of what the honest have. What they
    know of the round's beginning is that mean, too; at first `initial`, [seeds, P]. Of vectors that are not models
    changes are told from 0.
    """

    def __init__(
        self, exchange: Exchange, lie: Lie, strength: float, seeds: Sequence[int], attackers: int, initial: Floats, *,
        limit: float | None = None,
    ) -> None:  # fmt: skip
        self._exchange, self._lie, self._strength, self._seeds = exchange, lie, strength, seeds
        self._attackers, self._limit = attackers, limit
        self._before = list(initial)

    def __call__(self, round: int, request: Request, space: Space, spare: list[Tensor]) -> Request:
        """Exchange as `Exchange` says."""
        told = []
        for place, vector in enumerate(request.vectors):
            rows = _rows(space, vector)
            for number, (honest, attackers) in enumerate(self._each(len(rows))):
                before = self._before[number] if place == 0 else np.zeros_like(rows[0])
                random = np.random.Generator(np.random.PCG64(derived(self._seeds[number], "lies", round, place)))
                own_before = np.broadcast_to(before, rows[attackers].shape)
                with np.errstate(over="ignore", invalid="ignore"):
                    lies = self._lie(Scene(rows[honest], rows[attackers], before, own_before), self._strength, random)
                # No word of a ring is beyond its clip, whoever writes it.
                rows[attackers] = lies if self._limit is None else np.clip(lies, -self._limit, self._limit)
            told.append(_flat(space, rows))
        reply = self._exchange(round, dataclasses.replace(request, vectors=tuple(told)), space, spare)
        vectors = []
        for place, vector in enumerate(reply.vectors):
            rows = _rows(space, vector)
            for number, (honest, attackers) in enumerate(self._each(len(rows))):
                mean = rows[honest].mean(0, dtype=np.float64).astype(rows.dtype)
                rows[attackers] = mean
                if place == 0:
                    self._before[number] = mean
            vectors.append(_flat(space, rows))
        return dataclasses.replace(reply, vectors=tuple(vectors))

    def _each(self, count: int) -> Iterator[tuple[slice, slice]]:
        """Give each seed's honest peers and its attackers."""
        for part in _parts(count, len(self._seeds)):
            yield slice(part.start, part.stop - self._attackers), slice(part.stop - self._attackers, part.stop)


@dataclass(frozen=True)
class Relabelled:
    """A schedule whose peers have changed places: peer i has the place `places[i]`, int64 [n]."""

    schedule: Schedule
    places: NDArray[np.int64]

    @property
    def period(self) -> int | None:
        """After how many rounds the matrices repeat; None if they do not."""
        return self.schedule.period

    def at(self, round: int) -> Rows:
        """Return the matrix of a round."""
        matrix = self.schedule.at(round)
        return Blocks(np.argsort(self.places)[matrix.indices[self.places]], matrix.weights[self.places])


def diagonal(matrix: Rows, n: int) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Give the blocks of a block-diagonal matrix of blocks of `n` peers: where each is, and it as a dense one, [n, n].

    Raises:
        InvalidConfig: a weight is below 0, which no rule knows what to make of.
    """
    for part in _parts(len(matrix.indices), len(matrix.indices) // n):
        indices, weights = matrix.indices[part] - part.start, matrix.weights[part]
        if (weights < 0).any():
            raise InvalidConfig("a defence needs weights that are not below 0; take other averaging.options.weights")
        dense = np.zeros((n, n))
        np.add.at(dense, (np.arange(n)[:, None], indices), weights)
        yield part, dense


def senders(matrix: Rows) -> NDArray[np.bool_]:
    """Return whose vectors somebody else takes in, bool [n]."""
    own = np.arange(len(matrix.indices))
    taken = matrix.indices[(matrix.weights != 0) & (matrix.indices != own[:, None])]
    return np.bincount(taken, minlength=len(own)) > 0


def _parts(count: int, seeds: int) -> list[slice]:
    n = count // seeds
    return [slice(first, first + n) for first in range(0, count, n)]


def _rows(space: Space, vector: Tensor) -> Floats:
    """Copy a flat tensor's vectors, [n, P]."""
    rows: Floats = space.rows(vector).cpu().numpy()
    return rows


def _flat(space: Space, rows: Floats) -> Tensor:
    return space.from_rows(torch.from_numpy(np.ascontiguousarray(rows)).to(space.device, space.dtype))
