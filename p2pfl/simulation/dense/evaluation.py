"""What an experiment's models are worth: the mean model, some peers' models, and how far the peers are apart.

Evaluating every peer takes longer than a round, so it is done for a sample, in chunks, and not in every round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.core.errors import RoundFailed
from p2pfl.learning.space import Block, Space
from p2pfl.learning.task import Examples, Task, blame, make_model
from p2pfl.simulation.dense.kernels.vmap import stacked_outputs

NUMBERS = 1 << 22
"""Inputs of all evaluated peers at a time, 16 MiB of float32: a guess that keeps temporaries in the megabytes."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured after a round.

    Attributes:
        mean: loss and metrics of the mean model, by name.
        peers: loss and metrics of the sampled peers' models, by name, float64 [m] each.
        consensus: the mean squared distance of all models to their mean.
    """

    mean: dict[str, float]
    peers: dict[str, Tensor]
    consensus: float


class Evaluator:
    """Measures vectors on examples with the task's own loss and metrics, the model in evaluation mode."""

    def __init__(self, task: Task, blocks: Sequence[Block], examples: Examples) -> None:
        self._task = task
        self._examples = examples
        model = make_model(task).to(examples.inputs.device)
        if examples.inputs.is_floating_point():
            model = model.to(examples.inputs.dtype)
        self._outputs = stacked_outputs(model, blocks)
        inputs = examples.inputs
        self._peers = max(1, NUMBERS // max(1, inputs.numel()))
        self._pieces = torch.split(inputs, max(1, NUMBERS * len(inputs) // max(1, inputs.numel())))

    def measure(self, space: Space, x: Tensor, part: slice, sample: Tensor) -> Evaluation:
        """Measure the peers of the slice `part`; their sample, int64 [m], are numbers of peers in it."""
        mean = space.mean(x, part)
        return Evaluation(
            {name: float(values[0]) for name, values in self.rows(mean[None]).items()},
            self.rows(space.rows(x, sample)) if len(sample) else {},
            space.consensus_distance(x, part),
        )

    def outputs(self, rows: Tensor) -> Tensor:
        """Run the models of vectors, [m, P], on all examples, piece by piece: [m, t, ...] on the CPU, as tasks expect.

        Raises:
            RoundFailed: if the task fails.
        """
        with blame(self._task, "model", RoundFailed):
            return torch.cat([self._outputs(rows, piece) for piece in self._pieces], dim=1).cpu()

    def rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Measure vectors, [m, P]: loss and metrics by name, float64 [m] each.

        Raises:
            RoundFailed: if the task fails.
        """
        found: list[dict[str, float]] = []
        targets = self._examples.targets.cpu()
        for chunk in torch.split(rows, self._peers):
            for each in self.outputs(chunk):
                with blame(self._task, "loss", RoundFailed), torch.no_grad():
                    loss = float(self._task.loss(each, targets))
                with blame(self._task, "metrics", RoundFailed), torch.no_grad():
                    found.append({"loss": loss} | {k: float(v) for k, v in self._task.metrics(each, targets).items()})
        return {name: torch.tensor([one[name] for one in found], dtype=torch.float64) for name in found[0]}
