"""What a simulated round would have cost: modelled, not measured. `p2pfl.simulation.scenario.Cost` says how."""

from dataclasses import dataclass

import numpy as np

from p2pfl.simulation.dense.engine import Schedule
from p2pfl.simulation.dense.mix import Rows
from p2pfl.simulation.scenario import Cost


@dataclass(frozen=True)
class Load:
    """What peers send in a round, in lengths of what each sends to another: the mean of all peers, and the most of one.

    What a peer receives counts for `most` as well.
    """

    mean: float
    most: float


def load_of(rows: Rows, *, summed: bool, announced: bool = False) -> Load:
    """Return the load of a round's matrix.

    Args:
        rows: the matrix.
        summed: whether it is one of groups, which add up what they send as `Cost` says.
        announced: whether each group's average is then sent to all who are in another group.
    """
    n = len(rows.indices)
    sent = (rows.weights != 0) & (rows.indices != np.arange(n)[:, None])
    received = sent.sum(1)
    if summed:
        each = 2 * received / (received + 1)
        groups = (1 / (received[received > 0] + 1)).sum() if announced else 1.0
        each = each + np.where(received > 0, groups - 1, 0.0)
        return Load(float(each.mean()), float(each.max()))
    out = np.bincount(rows.indices[sent], minlength=n)
    return Load(float(out.mean()), float(max(out.max(), received.max())))


class Bill:
    """Adds a run's bytes and seconds up, round by round.

    Attributes:
        bytes: that a peer has sent, the mean of all peers.
        seconds: that the rounds have taken.
    """

    def __init__(self, cost: Cost, schedule: Schedule, *, summed: bool, announced: bool, steps: int) -> None:
        self._cost, self._schedule, self._steps = cost, schedule, steps
        self._summed, self._announced = summed, announced
        self._loads: dict[int, Load] = {}
        self.bytes, self.seconds = 0.0, 0.0

    def add(self, round: int, size: int) -> None:
        """Add a round in which each peer sends so many bytes to another."""
        load = self._load(round)
        self.bytes += load.mean * size
        self.seconds += self._steps * self._cost.step_seconds * (self._cost.slowness if self._cost.slow else 1.0)
        if load.most:
            self.seconds += self._cost.latency + load.most * size / self._cost.bandwidth

    def _load(self, round: int) -> Load:
        period = self._schedule.period
        if period is None:
            return self._load_of(round)
        if round % period not in self._loads:
            self._loads[round % period] = self._load_of(round)
        return self._loads[round % period]

    def _load_of(self, round: int) -> Load:
        return load_of(self._schedule.at(round), summed=self._summed, announced=self._announced)
