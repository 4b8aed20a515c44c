"""A task's own optimizer, for the local steps of many peers at once.

Owns which optimizers do the same to peers' stacked tensors as to each peer's own: those that look at each number alone.
What they remember is stacked as well, and lives on from round to round, as in `p2pfl.learning.trainer`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import Task, blame, make_model
from p2pfl.learning.vector import layout

ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
)
"""Torch's optimizers that move each number by its own gradients alone, and leave one that is always 0 at 0."""


class OwnOptimizer:
    """The optimizers of a task's peers, one for each chunk of them.

    Raises:
        InvalidConfig: the optimizer is none in `ELEMENTWISE`, or treats some parameters otherwise than others.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._held: dict[int, tuple[list[nn.Parameter], torch.optim.Optimizer]] = {}
        model = make_model(task)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._moved = [i for i, name in enumerate(layout(model).names) if name in trainable]
        optimizer = self._made([parameter for parameter in model.parameters() if parameter.requires_grad])
        kind = type(optimizer)
        if kind not in ELEMENTWISE:
            raise InvalidConfig(
                f"{type(task).__name__}.optimizer: {kind.__name__} looks at more than single numbers, and peers are "
                'stacked here; take the engine "simnet", or set training.learning_rate for plain SGD'
            )
        if len(optimizer.param_groups) != 1:
            raise InvalidConfig(
                f"{type(task).__name__}.optimizer has groups of parameters, which stacked peers have not; take the "
                'engine "simnet", or set training.learning_rate for plain SGD'
            )

    def step(self, part: slice, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Make a step of the peers of `part` on `params`, [m, *stored] for each tensor of the model, in place.

        A chunk is the same peers in every round, and belongs to one thread at a time.
        """
        if part.start not in self._held:
            held = [nn.Parameter(params[i].clone()) for i in self._moved]
            self._held[part.start] = held, self._made(held)
        held, optimizer = self._held[part.start]
        for i, own in zip(self._moved, held, strict=True):
            own.data, own.grad = params[i], gradients[i]
        optimizer.step()

    def _made(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        with blame(self._task, "optimizer"):
            return self._task.optimizer(parameters)
