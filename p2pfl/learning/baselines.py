"""What a federation is compared with: each peer alone, one model on everybody's data, and itself without noise.

Owns loops without a network. Central training needs the pooled data, so it exists in scenarios and demonstrations
only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import Data, Examples, Task
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import Vector


@dataclass(frozen=True)
class Training:
    """The settings of local training that a baseline shares with the federation; as `Trainer` takes them."""

    local_steps: int
    batch_size: int
    clip_norm: float = 0.0
    seed: int = 0


def alone(task: Task, data: Data, initial: Vector, rounds: int, training: Training) -> list[dict[str, float]]:
    """Train one peer on its own examples only, from the federation's initial vector, float32 [size].

    Returns:
        After each round the loss and the task's metrics on the held-out examples.

    Raises:
        RoundFailed: if training diverges or the task fails.
        InvalidConfig: if the settings or the vector do not fit.
    """
    trainer = Trainer(
        task, data, local_steps=training.local_steps, batch_size=training.batch_size,
        clip_norm=training.clip_norm, seed=training.seed,
    )  # fmt: skip
    vector, measured = initial, []
    for number in range(rounds):
        vector = trainer.train(vector, number).vector
        measured.append(trainer.evaluate(vector))
    return measured


def central(
    task: Task, shares: Sequence[Data], initial: Vector, rounds: int, training: Training
) -> list[dict[str, float]]:
    """Train one model on all peers' examples, from the federation's initial vector, float32 [size].

    A round makes as many steps as a peer makes in one, each on a batch as large as all peers' batches together: so it
    makes equally many steps, and sees equally many examples, as the federation.

    Returns:
        After each round the loss and the task's metrics on the held-out examples (all peers' where they differ).

    Raises:
        RoundFailed: if training diverges or the task fails.
        InvalidConfig: if there are no shares, or the settings or the vector do not fit.
    """
    if not shares:
        raise InvalidConfig("central training needs the data of one peer at least")
    pooled = Data(_joined([s.train for s in shares]), _joined(_distinct([s.test for s in shares])))
    batch_size = training.batch_size * len(shares)
    return alone(
        task, pooled, initial, rounds, Training(training.local_steps, batch_size, training.clip_norm, training.seed)
    )


def averaged(
    task: Task, shares: Sequence[Data], initial: Vector, rounds: int, trainings: Sequence[Training]
) -> list[dict[str, float]]:
    """Train as a federation of one group without noise does: all peers' updates, clipped, are averaged exactly.

    Returns:
        After each round the loss and the task's metrics on the first peer's held-out examples.

    Raises:
        RoundFailed: if training diverges or the task fails.
        InvalidConfig: if the settings or the vector do not fit.
    """
    trainers = [
        Trainer(
            task, data, local_steps=training.local_steps, batch_size=training.batch_size,
            clip_norm=training.clip_norm, seed=training.seed,
        )
        for data, training in zip(shares, trainings, strict=True)
    ]  # fmt: skip
    vector, measured = initial, []
    for number in range(rounds):
        total = np.zeros(len(vector))
        for trainer in trainers:
            total += trainer.train(vector, number).vector
        vector = (total / len(trainers)).astype(np.float32)
        measured.append(trainers[0].evaluate(vector))
    return measured


def _joined(parts: Sequence[Examples]) -> Examples:
    return Examples(torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts]))


def _distinct(parts: Sequence[Examples]) -> list[Examples]:
    first = parts[0]
    same = all(torch.equal(p.inputs, first.inputs) and torch.equal(p.targets, first.targets) for p in parts)
    return [first] if same else list(parts)
