"""What one seed of a run gave, where peers are not stacked tensors, and how their models are measured."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from p2pfl.gossip.mixing import consensus_distance
from p2pfl.learning.space import Block
from p2pfl.learning.task import make_model
from p2pfl.learning.vector import layout
from p2pfl.simulation.dense.evaluation import Evaluator
from p2pfl.simulation.parts import Parts


@dataclass
class Curve:
    """What one seed gave: its rows of `Run.frame`, its part of `Run.peers`, and how it ended."""

    number: int
    rows: list[dict[str, float]] = field(default_factory=list)
    peers: list[pd.DataFrame] = field(default_factory=list)
    outcome: str = "done"


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
