"""What one seed of a run gave, when it ends early, and how models are measured where peers are no stacked tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.mixing import consensus_distance
from p2pfl.learning.space import Block
from p2pfl.learning.task import Examples, make_model
from p2pfl.learning.vector import layout
from p2pfl.simulation.attacks import success, triggered
from p2pfl.simulation.dense.evaluation import Evaluator
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.runs import BACKDOOR, less_is_better
from p2pfl.simulation.scenario import Scenario, Stopping

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


class Backdoor:
    """Measures how often the backdoor's patch is believed.

    Args:
        parts: of the scenario.
        blocks: how vectors are laid out.
        device: on which they are.
    """

    def __init__(self, parts: Parts, blocks: Sequence[Block], device: torch.device) -> None:
        test, brightest = parts.data.test, float(parts.data.train.inputs.max())
        patched = Examples(triggered(test.inputs, brightest).to(device), test.targets)
        self._evaluator, self._targets = Evaluator(parts.task, blocks, patched), test.targets

    def measure(self, mean: Tensor, rows: Tensor) -> dict[str, float]:
        """Return the success with the mean model, [P], and the mean of that with evaluated peers' own, [m, P]."""
        found = [
            success(self._evaluator.outputs(row[None])[0].argmax(1), self._targets)
            for row in torch.cat([mean[None], rows])
        ]
        row = {BACKDOOR: found[0]}
        return row | ({f"peer_{BACKDOOR}": float(np.mean(found[1:]))} if len(found) > 1 else {})


def backdoor_of(parts: Parts, blocks: Sequence[Block], device: torch.device) -> Backdoor | None:
    """Return what measures the backdoor's success; None where nobody has put one in."""
    is_there = parts.attack is not None and parts.attack.name == BACKDOOR
    return Backdoor(parts, blocks, device) if is_there else None


class Judge:
    """Measures the honest peers' models, which are the first ones, where each is a vector.

    Attributes:
        honest: how many there are.
    """

    def __init__(self, scenario: Scenario, parts: Parts) -> None:
        order = layout(make_model(parts.task))
        blocks = [Block(name, shape, shape) for name, shape in zip(order.names, order.shapes, strict=True)]
        self.honest = scenario.peers - parts.attackers
        self._evaluator = Evaluator(parts.task, blocks, parts.data.test)
        self._backdoor = backdoor_of(parts, blocks, torch.device("cpu"))
        self._sample = np.linspace(0, self.honest - 1, min(scenario.evaluation.peers, self.honest)).round().astype(int)

    def measure(
        self, models: NDArray[np.float32], losses: NDArray[np.float64], curve: Curve, complete: int
    ) -> dict[str, float]:
        """Measure models, and add what each is worth to a curve's peers.

        Args:
            models: all peers', [n, P].
            losses: each peer's mean minibatch loss, [n]; nan where it has none.
            curve: takes the peers.
            complete: how many rounds are.

        Returns:
            What is measured of all together, by its column of `Run.frame`.
        """
        n, honest = len(models), models[: self.honest]
        mean = torch.from_numpy(honest.mean(axis=0, dtype=np.float64).astype(np.float32))
        rows = torch.from_numpy(models[self._sample])
        found = {name: values.numpy() for name, values in self._evaluator.rows(rows).items()} if len(rows) else {}
        columns: dict[str, Any] = {"seed": curve.number, "round": complete, "peer": np.arange(n), "train_loss": losses}
        for name, values in found.items():
            columns[name] = np.full(n, math.nan)
            columns[name][self._sample] = values
        curve.peers.append(pd.DataFrame(columns))
        row = {"consensus": consensus_distance(honest)}
        row |= {name: float(values[0]) for name, values in self._evaluator.rows(mean[None]).items()}
        row |= {f"peer_{name}": float(values.mean()) for name, values in found.items()}
        return row | ({} if self._backdoor is None else self._backdoor.measure(mean, rows))
