"""Seeds and settings side by side: variants of an experiment as further peers that never exchange anything.

A round of few peers is mostly overhead; eight seeds of 25 peers in one run take little longer than one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.simulation.dense.engine import Schedule
from p2pfl.simulation.dense.mix import Rows
from p2pfl.simulation.dense.sampling import Sampler


@dataclass(frozen=True)
class Blocks:
    """Several mixing matrices as one block-diagonal matrix, by rows: a `p2pfl.simulation.dense.mix.Rows`."""

    indices: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, matrices: Sequence[Rows]) -> "Blocks":
        """Put matrices on the diagonal, in their order; rows are padded to the longest."""
        width = max(matrix.indices.shape[1] for matrix in matrices)
        indices, weights, first = [], [], 0
        for matrix in matrices:
            count, own = matrix.indices.shape
            padding = np.broadcast_to(np.arange(count)[:, None], (count, width - own))
            indices.append(np.concatenate([matrix.indices, padding], axis=1) + first)
            weights.append(np.concatenate([matrix.weights, np.zeros(padding.shape)], axis=1))
            first += count
        return cls(np.concatenate(indices), np.concatenate(weights))


class SideBySide:
    """The schedules of several variants as one."""

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self._schedules = schedules

    @property
    def period(self) -> int | None:
        """After how many rounds all repeat; None if one does not."""
        periods = [schedule.period for schedule in self._schedules]
        known = [period for period in periods if period is not None]
        return math.lcm(*known) if len(known) == len(periods) else None

    def at(self, round: int) -> Rows:
        """Return the block-diagonal matrix of a round."""
        return Blocks.of([schedule.at(round) for schedule in self._schedules])


@dataclass(frozen=True)
class Each:
    """The samplers of several variants as one; all draw minibatches of one size."""

    samplers: Sequence[Sampler]

    def draw(self, round: int, first: int, steps: int) -> Tensor:
        """Draw as `Sampler` says."""
        return torch.cat([sampler.draw(round, first, steps) for sampler in self.samplers])
