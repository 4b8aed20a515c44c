"""What one seed of a run gave, when it ends early, and how models are measured where peers are no stacked tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.mixing import consensus_distance
from p2pfl.learning.space import Block
from p2pfl.learning.task import make_model
from p2pfl.learning.vector import layout
from p2pfl.simulation.dense.evaluation import Evaluator
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.runs import less_is_better
from p2pfl.simulation.scenario import Stopping

_NO_METRICS = ("seed", "round", "train_loss", "working", "modelled_bytes", "modelled_seconds")


class StoppingRule:
    """Decides when a seed's run ends early."""

    def __init__(self, terms: Stopping) -> None:
        self._terms = terms
        self._sign = -1.0 if less_is_better(terms.metric) else 1.0
        self._best, self._since = -math.inf, 0

    def now(self, row: Mapping[str, float]) -> str:
        """Return why to stop after an evaluation; nothing to go on.

        Raises:
            InvalidConfig: the metric is none of the task's.
        """
        terms = self._terms
        if not terms.metric:
            return ""
        if terms.metric not in row:
            known = [key for key in row if key not in _NO_METRICS]
            raise InvalidConfig(f"stopping.metric: {terms.metric!r} is not measured; there are {', '.join(known)}")
        value = self._sign * row[terms.metric]
        if terms.target is not None and value >= self._sign * terms.target:
            return "reached"
        if value > self._best + terms.improvement:
            self._best, self._since = value, 0
        else:
            self._since += 1
        return "stopped" if terms.patience and self._since >= terms.patience else ""


@dataclass
class Curve:
    """What one seed gave: its rows of `Run.frame`, its part of `Run.peers`, and how it ended.

    Attributes:
        number: the seed.
        rule: says when it ends before its last round.
        rows: one after the other, by `add`.
        peers: of each evaluated round.
        outcome: why it ended early; empty if it did not.
    """

    number: int
    rule: StoppingRule
    rows: list[dict[str, float]] = field(default_factory=list)
    peers: list[pd.DataFrame] = field(default_factory=list)
    outcome: str = ""

    def add(self, row: dict[str, float]) -> None:
        """Add a row; after an evaluation, ask the rule.

        Raises:
            InvalidConfig: the rule's metric is none of the task's.
        """
        self.rows.append(row)
        if "consensus" in row:
            self.outcome = self.rule.now(row)


def evaluator_of(parts: Parts) -> Evaluator:
    """Return what measures vectors as models have them."""
    order = layout(make_model(parts.task))
    blocks = [Block(name, shape, shape) for name, shape in zip(order.names, order.shapes, strict=True)]
    return Evaluator(parts.task, blocks, parts.data.test)


def evaluated_row(
    models: NDArray[np.float32], evaluator: Evaluator, sampled: int, losses: NDArray[np.float64], curve: Curve,
    complete: int,
) -> dict[str, float]:  # fmt: skip
    """Measure models, and add what each is worth to a curve's peers.

    Args:
        models: all peers', [n, P].
        evaluator: measures them.
        sampled: how many peers' own models are measured beside the mean.
        losses: each peer's mean minibatch loss, [n]; nan where it has none.
        curve: takes the peers.
        complete: how many rounds are.

    Returns:
        What is measured of all together, by its column of `Run.frame`.
    """
    n = len(models)
    mean = torch.from_numpy(models.mean(axis=0, dtype=np.float64).astype(np.float32))
    sample = np.linspace(0, n - 1, sampled).round().astype(int)
    found = {name: values.numpy() for name, values in evaluator.rows(torch.from_numpy(models[sample])).items()}
    columns: dict[str, Any] = {"seed": curve.number, "round": complete, "peer": np.arange(n), "train_loss": losses}
    for name, values in found.items():
        columns[name] = np.full(n, math.nan)
        columns[name][sample] = values
    curve.peers.append(pd.DataFrame(columns))
    row = {"consensus": consensus_distance(models)}
    row |= {name: float(values[0]) for name, values in evaluator.rows(mean[None]).items()}
    return row | {f"peer_{name}": float(values.mean()) for name, values in found.items()}
