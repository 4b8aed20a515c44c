"""What a simulated round would have cost: modelled, not measured. `p2pfl.simulation.scenario.Cost` says how."""

from dataclasses import dataclass

import numpy as np

from p2pfl.simulation.dense.engine import Schedule
from p2pfl.simulation.dense.mix import Rows
from p2pfl.simulation.scenario import Cost

BYTES_PER_VALUE = 4
"""Of float32, and of a masked word of 32 bits."""


@dataclass(frozen=True)
class Load:
    """What peers send in a round, in lengths of what each mixes: the mean of all peers, and the most of one.

    What a peer receives counts for `most` as well.
    """

    mean: float
    most: float


def load_of(rows: Rows, *, grouped: bool) -> Load:
    """Return the load of a round's matrix; see `Cost` for groups."""
    n = len(rows.indices)
    sent = (rows.weights != 0) & (rows.indices != np.arange(n)[:, None])
    received = sent.sum(1)
    if grouped:
        each = 2 * received / (received + 1)
        return Load(float(each.mean()), float(each.max()))
    out = np.bincount(rows.indices[sent], minlength=n)
    return Load(float(out.mean()), float(max(out.max(), received.max())))


class Bill:
    """Adds a run's bytes and seconds up, round by round.

    Attributes:
        bytes: that a peer has sent, the mean of all peers.
        seconds: that the rounds have taken.
    """

    def __init__(self, cost: Cost, schedule: Schedule, *, grouped: bool, steps: int) -> None:
        self._cost, self._schedule, self._grouped, self._steps = cost, schedule, grouped, steps
        self._loads: dict[int, Load] = {}
        self.bytes, self.seconds = 0.0, 0.0

    def add(self, round: int, values: int) -> None:
        """Add a round in which each peer mixes so many values."""
        load, size = self._load(round), BYTES_PER_VALUE * values
        self.bytes += load.mean * size
        self.seconds += self._steps * self._cost.step_seconds
        if load.most:
            self.seconds += self._cost.latency + load.most * size / self._cost.bandwidth

    def _load(self, round: int) -> Load:
        period = self._schedule.period
        if period is None:
            return load_of(self._schedule.at(round), grouped=self._grouped)
        if round % period not in self._loads:
            self._loads[round % period] = load_of(self._schedule.at(round), grouped=self._grouped)
        return self._loads[round % period]
