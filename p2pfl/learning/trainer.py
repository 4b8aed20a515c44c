"""One peer's local steps: a vector in, a trained and clipped vector out.

Owns the model, the optimiser's state and the order of this peer's examples. Must not know rounds' outcomes or peers:
whoever calls it decides which vector comes next.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.learning.evaluation import forward
from p2pfl.learning.seeding import seeded
from p2pfl.learning.task import Data, Examples, Task, blame, make_model
from p2pfl.learning.vector import Vector, assign, flatten, layout


@dataclass(frozen=True)
class Trained:
    """What a round of local steps gave.

    Attributes:
        vector: the model afterwards, float32 [size]; the caller's to keep.
        loss: the mean of the minibatches' losses.
        norm: the L2 norm of the update before clipping.
        clipped: whether the update was scaled down.
    """

    vector: Vector
    loss: float
    norm: float
    clipped: bool


class Trainer:
    """Trains one peer's model on its own examples. One call at a time: `train` and `evaluate` share the model.

    Given equal arguments it does the same on the same machine. Layers that draw random numbers (dropout) draw them
    from torch's global generator, seeded from `seed` and the round and put back afterwards; they are reproducible as
    long as no other thread draws from it meanwhile.

    Args:
        task: whose model, loss, metrics and optimiser to use.
        data: this peer's examples.
        local_steps: optimiser steps in one `train`.
        batch_size: examples in one step; all of them where the peer has fewer.
        clip_norm: the largest L2 norm of an update; 0 for no limit.
        seed: of the order of the examples, at least 0.

    Raises:
        InvalidConfig: if a number is out of range, or the task fails to make its model or optimiser.
    """

    def __init__(
        self, task: Task, data: Data, *, local_steps: int, batch_size: int, clip_norm: float, seed: int
    ) -> None:
        _verify_settings(local_steps, batch_size, clip_norm, seed)
        self._task = task
        self._data = data
        self._local_steps = local_steps
        self._clip_norm = clip_norm
        self._seed = seed
        self._model = make_model(task)
        self._layout = layout(self._model)
        self._optimizer = self._make_optimizer()
        self._batches = _Batches(data.train, batch_size, seed)

    @property
    def size(self) -> int:
        """The length of the vector."""
        return self._layout.size

    @property
    def model(self) -> nn.Module:
        """The model as the last `train` or `evaluate` left it."""
        return self._model

    def train(self, vector: Vector, round: int) -> Trained:
        """Make `local_steps` optimiser steps from `vector`, float32 [size], which is left as it is.

        The update u is scaled to x' = x + u * min(1, clip_norm / |u|), over all of the vector (flat clipping,
        McMahan et al. 2018, arXiv 1710.06963). The optimiser's state lives on in the next round, also where the vector
        was replaced by an average.

        Raises:
            RoundFailed: if the task fails, or the loss or the vector is not finite; the optimiser then starts anew.
            InvalidConfig: if the vector is not one of this model's.
        """
        assign(self._model, vector)
        try:
            with seeded(_mixed(self._seed, round)):
                loss = self._steps(round)
            trained = flatten(self._model)
            norm = _distance(trained, vector)
            _verify_finite(round, "model", norm)
        except Exception:
            self._optimizer = self._make_optimizer()  # its momentum may be as broken as the model
            raise
        if self._clip_norm and norm > self._clip_norm:
            scale = np.float32(self._clip_norm / norm)
            return Trained(vector + (trained - vector) * scale, loss, norm, clipped=True)
        return Trained(trained, loss, norm, clipped=False)

    def evaluate(self, vector: Vector) -> dict[str, float]:
        """Measure a vector, float32 [size], on the held-out examples: the loss and the task's metrics.

        Raises:
            RoundFailed: if the task fails.
            InvalidConfig: if the vector is not one of this model's.
        """
        assign(self._model, vector)
        task, test = self._task, self._data.test
        with blame(task, "model", RoundFailed):
            outputs = forward(self._model, test.inputs)
        with blame(task, "loss", RoundFailed), torch.inference_mode():
            loss = float(task.loss(outputs, test.targets))
        with blame(task, "metrics", RoundFailed), torch.inference_mode():
            return {"loss": loss} | {name: float(value) for name, value in task.metrics(outputs, test.targets).items()}

    def _steps(self, number: int) -> float:
        """Make `local_steps` steps on the model, and return their mean loss."""
        task, model, optimizer = self._task, self._model, self._optimizer
        context = f"round {number}: "
        model.train()
        total = 0.0
        for _ in range(self._local_steps):
            inputs, targets = self._batches.take()
            optimizer.zero_grad(set_to_none=True)
            with blame(task, "model", RoundFailed, context):
                outputs = model(inputs)
            with blame(task, "loss", RoundFailed, context):
                loss = task.loss(outputs, targets)
                value = float(loss.detach())
                _verify_finite(number, "loss", value)
                loss.backward()
            with blame(task, "optimizer", RoundFailed, context):
                optimizer.step()
            total += value
        return total / self._local_steps

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        if not parameters:
            raise InvalidConfig(f"{type(self._task).__name__}.model has no parameters that require a gradient")
        with blame(self._task, "optimizer"):
            optimizer = self._task.optimizer(parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            kind = type(optimizer).__name__
            raise InvalidConfig(
                f"{type(self._task).__name__}.optimizer returned {kind}; return a torch.optim.Optimizer"
            )
        return optimizer


class _Batches:
    """Minibatches of one size from one shuffled epoch after another.

    The last examples of an epoch share a batch with the first of the next: a short batch would weigh its examples more,
    and a batch of one breaks batch norm.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int) -> None:
        self._examples = examples
        self._batch_size = min(batch_size, len(examples))
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)

    def take(self) -> tuple[Tensor, Tensor]:
        """Take the next inputs [batch, ...] and targets [batch]."""
        if len(self._order) < self._batch_size:
            epoch = torch.randperm(len(self._examples), generator=self._generator)
            self._order = torch.cat([self._order, epoch])
        chosen, self._order = self._order[: self._batch_size], self._order[self._batch_size :]
        return self._examples.inputs.index_select(0, chosen), self._examples.targets.index_select(0, chosen)


def _verify_settings(local_steps: int, batch_size: int, clip_norm: float, seed: int) -> None:
    for name, value, least in (("local_steps", local_steps, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise InvalidConfig(f"{name} is {value}; it must be at least {least}")
    if not (math.isfinite(clip_norm) and clip_norm >= 0):
        raise InvalidConfig(f"clip_norm is {clip_norm}; it must be at least 0, where 0 does not clip")


def _mixed(seed: int, number: int) -> int:
    """Mix the peer's seed and the round into a seed for torch: an odd multiplier (Knuth's) keeps peers apart."""
    return (seed * 6364136223846793005 + number) % 2**63


def _distance(new: Vector, old: Vector) -> float:
    # In float64, so that a large update does not look infinite, and a model of many parameters loses no digits.
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported, in our words
        difference = torch.from_numpy(new - old)
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64))


def _verify_finite(number: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise RoundFailed(
            f"training diverged in round {number}: the {what} is {value}; "
            "lower the learning rate in the task's optimizer, or bring its inputs to a smaller scale"
        )
