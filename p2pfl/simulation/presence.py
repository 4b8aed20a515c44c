"""Who is there in a round of a simulated run, and for whom, and what a mixing matrix becomes without those who are not.

Everything is a pure function of the seed and the round.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfl.simulation.dense.engine import Schedule
from p2pfl.simulation.dense.mix import Rows
from p2pfl.simulation.dense.sampling import derived
from p2pfl.simulation.dense.variants import Blocks

Bools = NDArray[np.bool_]


class Presence:
    """Draws who trains and who averages.

    Peers leave and come back as a Markov chain with two states; all are there before round 0. Of those who are there,
    `participation` times all peers take part, drawn anew each round; and of those each misses the exchange with a
    probability of its own. After `split` rounds the network falls into `parts`, whose sizes differ by one at most, and
    after `heal` rounds it is whole again.
    """

    def __init__(
        self, peers: int, seed: int, *, participation: float = 1.0, missed: float = 0.0, leave: float = 0.0,
        rejoin: float = 1.0, parts: int = 1, split: int = 0, heal: int = 0,
    ) -> None:  # fmt: skip
        self._peers, self._seed = peers, seed
        self._split = range(split, heal) if parts > 1 else range(0)
        self._sides = np.argsort(self._draw("parts", 0), kind="stable") % parts
        self._participation, self._missed, self._leave, self._rejoin = participation, missed, leave, rejoin
        self._round, self._here = -1, np.ones(peers, bool)

    @property
    def complete(self) -> bool:
        """Whether everybody is always there."""
        return self._participation == 1 and not self._missed and not self._leave

    @property
    def whole(self) -> bool:
        """Whether everybody is always there for everybody."""
        return self.complete and not self._split

    def sides(self, round: int) -> NDArray[np.int64] | None:
        """Return each peer's part of the network in a round, int64 [n]; None while it is whole."""
        return self._sides if round in self._split else None

    def working(self, round: int) -> Bools:
        """Return who takes part in a round, bool [n]; others stay as they are."""
        here = self._chain(round)
        if self._participation < 1:
            wanted = max(1, int(np.rint(self._participation * self._peers)))
            chosen = np.argsort(self._draw("participation", round), kind="stable")[:wanted]
            return here & np.isin(np.arange(self._peers), chosen)
        return here

    def reached(self, round: int) -> Bools:
        """Return who averages with others in a round, bool [n]: a part of those who work."""
        working = self.working(round)
        return working & (self._draw("missed", round) >= self._missed) if self._missed else working

    def _chain(self, round: int) -> Bools:
        """Return who is there, from where the chain was last asked for, or from its start."""
        if not self._leave:
            return self._here
        if round < self._round:
            self._round, self._here = -1, np.ones(self._peers, bool)
        while self._round < round:
            self._round += 1
            draw = self._draw("churn", self._round)
            self._here = np.where(self._here, draw >= self._leave, draw < self._rejoin)
        return self._here

    def _draw(self, name: str, round: int) -> NDArray[np.float64]:
        # RandomState's numbers are the same with every version of numpy (NEP 19).
        return np.random.RandomState(derived(self._seed, name, round) % 2**32).random_sample(self._peers)


@dataclass(frozen=True)
class Present:
    """A schedule among those who are there.

    Attributes:
        schedule: among all.
        presence: who is there.
        grouped: whether all of a group average: then those who are there do among themselves. Elsewhere weight stays
            with the peer.
        column: whether columns sum to one, not rows: then a sender keeps what it could not send.
    """

    schedule: Schedule
    presence: Presence
    grouped: bool
    column: bool

    @property
    def period(self) -> int | None:
        """After how many rounds the matrices repeat; None if they do not."""
        return self.schedule.period if self.presence.whole else None

    def at(self, round: int) -> Rows:
        """Return the matrix of a round."""
        sides = self.presence.sides(round)
        if self.presence.complete and sides is None:
            return self.schedule.at(round)
        there = self.presence.reached(round)
        return among(self.schedule.at(round), there, sides, grouped=self.grouped, column=self.column)


def among(rows: Rows, there: Bools, sides: NDArray[np.int64] | None = None, *, grouped: bool, column: bool) -> Blocks:
    """Return a matrix without those who are not there, bool [n]: their rows become those of the identity.

    With `sides`, int64 [n], those on another side are not there for a peer either.
    """
    own = np.arange(len(there))
    used = there[:, None] & there[rows.indices]
    if sides is not None:
        used &= sides[:, None] == sides[rows.indices]
    weights = np.where(used, rows.weights, 0.0)
    if grouped:
        total = weights.sum(1)
        weights = weights / np.where(total > 0, total, 1.0)[:, None]
        kept = np.where(total > 0, 0.0, 1.0)
    else:
        lost = np.where(used, 0.0, rows.weights)
        kept = np.bincount(rows.indices.ravel(), lost.ravel(), len(own)) if column else lost.sum(1)
    return Blocks(
        np.concatenate([rows.indices, own[:, None]], axis=1), np.concatenate([weights, kept[:, None]], axis=1)
    )
