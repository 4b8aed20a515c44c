"""A scenario's faults, in the simulated network: peers that leave and come back, lost messages, a split network.

Who leaves before a round and who is back is drawn as for stacked tensors (`p2pfl.simulation.presence`). Here a peer
that leaves is killed at the end of its last round. It is started again, and goes on from its last checkpoint, when the
first of the others has reached the round in which it is to be back: so it is some rounds late, as real peers are. While
those who are left are too few to get on, each round that they could have had brings it nearer all the same.
"""

import math
from collections.abc import Sequence

import numpy as np

from p2pfl.core.machine import Effect, Emit, Input
from p2pfl.core.trace import RoundEnded
from p2pfl.simulation.faults import Crash, Fault, Loss, Partition, Schedule
from p2pfl.simulation.hosts import Host
from p2pfl.simulation.presence import Presence
from p2pfl.simulation.scenario import Scenario
from p2pfl.simulation.simnet import Network

ALL_WRITTEN = 1 << 30
"""Records under way to the disk that are on it after a peer has left: all, since it left in order."""


class Churn:
    """Lets peers leave and come back, and splits the network; a `p2pfl.simulation.simnet.Director`.

    The first peer in a round says which one it is: what is on its way to a later one then may be lost.

    Args:
        scenario: whose faults.
        number: the seed.
        longest: virtual seconds that a round may take: a split network heals by itself after so many for each round of
            the split, and where no peer gets on, whoever is away comes back as if rounds had passed.

    Attributes:
        schedule: what goes wrong from the start.
        left: places of those who were ever away.
    """

    def __init__(self, scenario: Scenario, number: int, longest: float) -> None:
        faults, peers = scenario.faults, scenario.peers
        self._rounds, self._heal = scenario.training.rounds, faults.heal
        self._presence = Presence(
            peers, number, leave=faults.leave, rejoin=faults.rejoin, parts=faults.parts, split=faults.split,
            heal=faults.heal,
        )  # fmt: skip
        self._longest = longest
        self._front = 0
        """The round that the first peer is in."""
        self._idle, self._moved = 0, 0.0
        """How many rounds' time has passed since the first peer came into its round, and when the last of them did."""
        self._away: set[int] = set()
        self._split: Partition | None = None
        lost = (Loss(0.0, math.inf, faults.loss),) if faults.loss else ()
        self.schedule = Schedule((*lost, *self._splits(0.0)))
        self.left: set[int] = set()

    def step(
        self, network: Network, peer: Host, input: Input, effects: Sequence[Effect]
    ) -> Sequence[tuple[int, Fault]]:
        """Look at a step, as `Director` says."""
        del input
        struck: list[tuple[int, Fault]] = []
        if self._away and network.now >= self._moved + self._longest:
            self._idle, self._moved = self._idle + 1, network.now
            self._bring_back(network)
        for effect in effects:
            if not isinstance(effect, Emit) or not isinstance(effect.event, RoundEnded):
                continue
            entered = effect.event.round + 1
            while self._front < min(entered, self._rounds):
                self._front += 1
                self._idle, self._moved = 0, network.now
                struck += [(len(effects), fault) for fault in self._advance(network)]
            if entered < self._rounds and self._leaves(network, peer.place, entered):
                self._away.add(peer.place)
                self.left.add(peer.place)
                struck.append((len(effects), Crash(network.now, peer.place, None, kept=ALL_WRITTEN)))
        return struck

    def _leaves(self, network: Network, place: int, round: int) -> bool:
        """Return whether a peer leaves before a round: never the last one, nor one that is to be back by now."""
        if self._presence.working(round)[place] or self._presence.working(self._front)[place]:
            return False
        return len(network.peers) - len(self._away) > 1

    def _advance(self, network: Network) -> Sequence[Fault]:
        """Do what is due when the first peer enters a round; after training everybody is where it is."""
        is_over = self._front == self._rounds
        if self._split is not None and (is_over or self._front == self._heal):
            network.heal(self._split)
            self._split = None
        if is_over:
            return ()
        self._bring_back(network)
        return self._splits(network.now)

    def _bring_back(self, network: Network) -> None:
        here = self._presence.working(self._front + self._idle)
        for place in sorted(place for place in self._away if here[place]):
            self._away.discard(place)
            network.restart(place)

    def _splits(self, now: float) -> Sequence[Fault]:
        """Return the partition that begins now, if the network is to be split and is whole."""
        sides = self._presence.sides(self._front)
        if sides is None or self._split is not None:
            return ()
        groups = tuple(tuple(np.flatnonzero(sides == side).tolist()) for side in np.unique(sides))
        lasts = self._longest * (self._heal - self._front)
        self._split = Partition(now, now + lasts, groups, silent=False)
        return (self._split,)
