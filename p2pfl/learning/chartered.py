"""What a charter says of training, as an algorithm and the trainer of one peer; and what of it peers cannot bear."""

import torch

from p2pfl.core.charter import NOT_FOR_PEERS, AveragingTerms, TrainingTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.algorithms import Algorithm, PartialSharing
from p2pfl.learning.algorithms.made import make_algorithm
from p2pfl.learning.peer_algorithm import AlgorithmTrainer
from p2pfl.learning.private_trainer import Privately, PrivateTrainer
from p2pfl.learning.task import Data, Task, blame, make_model
from p2pfl.learning.trainer import Trainer


def algorithm_of(training: TrainingTerms, averaging: AveragingTerms) -> Algorithm | None:
    """Return the algorithm that peers run; None for plain `d-psgd`, for which a `Trainer` is enough.

    Mixing matrices of charters are doubly stochastic, or keep the mean by samples; they change from round to round, and
    with who is there.

    Raises:
        InvalidConfig: its options are wrong, or it does not go with the other terms.
    """
    algorithm = make_algorithm(training.algorithm, training.options or {})
    if training.algorithm == "d-psgd":
        return None
    name = algorithm.name
    if isinstance(algorithm, PartialSharing):
        name = f"{name} of {algorithm.inner.name}"
        if algorithm.inner.name in NOT_FOR_PEERS:
            raise InvalidConfig(f"training.options: {NOT_FOR_PEERS[algorithm.inner.name]}")
    if algorithm.single_step and training.local_steps != 1:
        raise InvalidConfig(
            f"training.local_steps: {name} makes one step a round, not {training.local_steps}; set 1, or take k-gt"
        )
    if algorithm.repeats and averaging.masks == "on":
        raise InvalidConfig(
            f"averaging.masks: after a sum that was lost {name} would put what went into it into the next, and the two "
            "could be subtracted; take k-gt, or set masks to off"
        )
    if algorithm.vectors > 1 and training.clip_norm:
        raise InvalidConfig(f"training.clip_norm: {name} mixes steps beside models, which it would not clip; set 0")
    if algorithm.vectors > 1 and averaging.bits == 16:
        raise InvalidConfig(
            f"averaging.bits: {name} mixes steps beside models, and they are no changes of a common base; set 32"
        )
    return algorithm


def vectors_of(training: TrainingTerms, averaging: AveragingTerms) -> int:
    """Return how many vectors of the model's size are averaged in a round, as far as the terms can be understood."""
    try:
        algorithm = algorithm_of(training, averaging)
    except InvalidConfig:
        return 1
    return 1 if algorithm is None else algorithm.vectors


def verify_task(algorithm: Algorithm | None, task: Task) -> None:
    """Check that an algorithm can train a task.

    Raises:
        InvalidConfig: it computes with the learning rate, and the task's optimizer is not plain SGD; or the model has
            no tensor of a name that it has to have.
    """
    if algorithm is not None:
        AlgorithmTrainer.verify(algorithm, task)
        if algorithm.plain:
            learning_rate(task)


def make_trainer(
    task: Task,
    data: Data,
    training: TrainingTerms,
    averaging: AveragingTerms,
    seed: int,
    privately: Privately | None = None,
) -> Trainer:
    """Make the trainer of one peer.

    Args:
        task: what is trained.
        data: this peer's.
        training: a charter's.
        averaging: the same charter's.
        seed: of the order of the examples.
        privately: how noise hides single examples; None for exact steps.

    Raises:
        InvalidConfig: the terms do not go with each other, the task or the data.
    """
    algorithm = algorithm_of(training, averaging)
    verify_task(algorithm, task)
    steps, clip = training.local_steps, training.clip_norm
    if privately is not None:
        if algorithm is not None:
            raise InvalidConfig(f"privacy.examples: not with {algorithm.name}, only with d-psgd")
        return PrivateTrainer(
            task,
            data,
            privately=privately,
            local_steps=steps,
            batch_size=training.batch_size,
            clip_norm=clip,
            seed=seed,
        )
    if algorithm is None:
        return Trainer(task, data, local_steps=steps, batch_size=training.batch_size, clip_norm=clip, seed=seed)
    return AlgorithmTrainer(
        algorithm, task, data, local_steps=steps, batch_size=training.batch_size, clip_norm=clip, seed=seed
    )


def learning_rate(task: Task) -> float:
    """Return the learning rate of a task's own optimizer, which must be plain SGD.

    Raises:
        InvalidConfig: it is not.
    """
    with blame(task, "optimizer"):
        optimizer = task.optimizer(make_model(task).parameters())
    groups = optimizer.param_groups
    plain = type(optimizer) is torch.optim.SGD and len(groups) == 1
    if not plain or any(groups[0][key] for key in ("momentum", "weight_decay", "nesterov", "maximize")):
        raise InvalidConfig(
            f"{type(task).__name__}.optimizer is not plain SGD, which is what this computes with; "
            "in a scenario set training.learning_rate, and momentum by training.algorithm"
        )
    return float(groups[0]["lr"])
