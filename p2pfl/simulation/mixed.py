"""How a scenario's vectors come together: its topology, compression, attackers, defence and masks as one exchange."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.ring import WEIGHT_ONE, Ring
from p2pfl.gossip.robust import MedianOfGroups, rule
from p2pfl.learning.algorithms import ChocoSgd
from p2pfl.simulation.costs import Bill
from p2pfl.simulation.dense.engine import Exchange, Mixing
from p2pfl.simulation.dense.variants import SideBySide
from p2pfl.simulation.exchanges import Attacked, Compressed, Counted, Masked, Robust, diagonal, groups_of
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.presence import Present
from p2pfl.simulation.scenario import Scenario

GROUPED = frozenset({"groups", "moshpit", "random-matching", "stars"})
"""Topologies whose rounds are groups in which all average with all."""

MASKED_BITS = 32


class Mixed:
    """How the vectors of a scenario's peers come together, in all its seeds.

    Raises:
        InvalidConfig: compression, attackers, defence and topology do not go together.
    """

    def __init__(self, scenario: Scenario, parts: Parts, schedules: Sequence[Present]) -> None:
        self._scenario, self._parts = scenario, parts
        self._schedule = SideBySide(schedules)
        self._rule = rule(scenario.defence.rule, **scenario.defence.model_dump(exclude={"rule"}))
        for schedule in schedules:
            self._verify(schedule)

    def exchange(self, start: NDArray[np.float32]) -> Counted:
        """Return the exchange, from the initial models of the seeds, [seeds, P]."""
        scenario, parts, schedule = self._scenario, self._parts, self._schedule
        terms, compression = scenario.averaging, scenario.compression
        numbers = scenario.seeds
        plain = self._rule.name == "none"
        made: Exchange = Mixing(schedule) if plain else Robust(schedule, self._rule, scenario.peers)
        limit = None
        if terms.masks == "on":
            groups = max(1, scenario.peers // terms.group_size)
            ring = Ring(MASKED_BITS, -(-scenario.peers // groups), terms.clip)
            # What attackers send is within the clip once rounded to float32, too: only the honest can clip too much.
            made, limit = Masked(made, ring), ring.largest / float(ring.factor(WEIGHT_ONE)) * (1 - 2**-20)
        if compression.name != "none" and not isinstance(parts.algorithm, ChocoSgd):
            made = Compressed(
                made, parts.compress, schedule, numbers, start, feedback=compression.error_feedback,
                gamma=compression.gamma, columns=parts.shared,
            )  # fmt: skip
        if parts.attack is not None and parts.attack.lie is not None:
            made = Attacked(made, parts.attack.lie, parts.strength, numbers, parts.attackers, start, limit=limit)
        return Counted(made, parts.compress, start.shape[1] if parts.shared is None else len(parts.shared))

    def bill(self, schedule: Present) -> Bill:
        """Return what adds up a seed's bytes and seconds."""
        summed = self._parts.compress.linear and not isinstance(self._parts.algorithm, ChocoSgd)
        return Bill(
            self._scenario.cost, schedule, steps=self._parts.steps, announced=self._rule.name == GROUP_MEDIAN,
            summed=self._grouped and summed and not self._rule.needs_individual_updates,
        )  # fmt: skip

    @property
    def _grouped(self) -> bool:
        return self._scenario.averaging.topology in GROUPED

    def _verify(self, schedule: Present) -> None:
        topology, compression, chosen = self._scenario.averaging.topology, self._scenario.compression, self._rule
        copies = isinstance(self._parts.algorithm, ChocoSgd) or not self._parts.compress.linear
        if copies and schedule.schedule.period != 1:
            raise InvalidConfig(
                f"compression by {compression.name} needs a copy of each neighbor's vectors, and with {topology} "
                "neighbors change; take a topology that does not, or rand-k"
            )
        if chosen.name == "none":
            return
        if schedule.column:
            raise InvalidConfig(f"a defence needs weights whose rows sum to 1, and those of {topology} do not")
        ((_, weights),) = diagonal(schedule.schedule.at(0), self._scenario.peers)
        if chosen.name != GROUP_MEDIAN:
            chosen.verify(int((weights != 0).sum(1).min()))
        elif self._scenario.faults.parts > 1:
            raise InvalidConfig(
                f"{GROUP_MEDIAN} announces averages to all, and a split network has no all; take another"
            )
        elif not self._grouped:
            raise InvalidConfig(f"{GROUP_MEDIAN} is of groups' averages; take {', '.join(sorted(GROUPED))}")
        elif (count := len(np.unique(groups_of(weights)))) < LEAST_GROUPS:
            raise InvalidConfig(f"{GROUP_MEDIAN} needs {LEAST_GROUPS} groups, not {count}; make them smaller")


GROUP_MEDIAN = MedianOfGroups.name

LEAST_GROUPS = 3
"""Of which one is outvoted."""
