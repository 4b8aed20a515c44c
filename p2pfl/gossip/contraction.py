"""How fast a schedule's rounds bring peers together."""

from dataclasses import dataclass

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from p2pfl.gossip.mixing import consensus_rounds
from p2pfl.gossip.schedule import Round, Schedule, dense

DRAWS = 200
"""Rounds over which a schedule that is drawn anew is averaged: then that of stars on 20 peers is known to about 0.01
(measured). All others but el-local and random-push keep as much in every round."""
EXACT = 1e-18
"""Rounding leaves far less of the consensus distance than this where a period averages exactly (measured: 1e-30)."""


@dataclass(frozen=True)
class Contraction:
    """What a schedule leaves of the consensus distance.

    Attributes:
        kept: the fraction that a round leaves; see `contraction`.
        exact_after: rounds until all have the exact mean; None: not within a period, nor after one that is drawn anew.
        rounds: until a thousandth is left of the distance, in the worst case if the schedule repeats, expected if it is
            drawn anew; None: in no number of rounds.
    """

    kept: float
    exact_after: int | None
    rounds: int | None


def contraction(schedule: Schedule) -> Contraction:
    """Return how fast a schedule contracts.

    With W a round's matrix, J the matrix of 1/n and C = (I - J) W (I - J), vectors x become W x, and |C x|^2 is what is
    left of |(I - J) x|^2. Of a schedule that repeats, W is the product over the period, the largest fraction is taken,
    and a round's is the geometric mean. Of one that is drawn anew, the fraction is expected: the largest eigenvalue of
    E[C'C] (Boyd et al. 2006, "Randomized gossip algorithms"). Where no peer differs from others that is E|C|_F^2 /
    (n - 1), as all directions are alike; stars on a graph average in groups, so that W'W = W.

    Where only columns sum to 1 the same is the potential by which push-sum's ratios converge (Kempe et al. 2003).
    """
    if schedule.period is None:
        kept = _expected(schedule, schedule.graph)
        exact = 1 if kept < EXACT and schedule.kind == "doubly" else None
        return Contraction(kept, exact, consensus_rounds(kept))
    product = np.eye(schedule.n)
    for round in range(schedule.period):
        product = dense(schedule.at(round)) @ product
        left = _centred(product)
        if schedule.kind == "doubly" and float((left**2).sum()) < EXACT * schedule.n:
            return Contraction(0.0, round + 1, round + 1)
    over_period = float(np.linalg.norm(left, 2)) ** 2
    periods = consensus_rounds(over_period)
    return Contraction(
        over_period ** (1 / schedule.period), None, None if periods is None else periods * schedule.period
    )


def _expected(schedule: Schedule, graph: nx.Graph | None) -> float:
    rounds = (schedule.at(number) for number in range(DRAWS))
    if graph is None:
        return float(np.mean([_squares(round) for round in rounds])) / (schedule.n - 1)
    mean = np.zeros((schedule.n, schedule.n))
    for round in rounds:
        mean += dense(round) / DRAWS
    return float(np.linalg.eigvalsh(_centred(mean))[-1])


def _squares(round: Round) -> float:
    """Return |C|_F^2 of a round, from its rows alone."""
    n = len(round.indices)
    rows = round.weights.sum(1)
    columns = np.bincount(round.indices.ravel(), round.weights.ravel(), minlength=n)
    squares = (round.weights**2).sum() - ((rows**2).sum() + (columns**2).sum()) / n + (rows.sum() / n) ** 2
    return max(0.0, float(squares))


def _centred(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (I - J) W (I - J)."""
    centred: NDArray[np.float64] = matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()
    return centred
