"""The reference tier: any module, through `torch.func`; what other tiers are compared with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.space import Block
from p2pfl.learning.task import Examples, Task, blame, make_model
from p2pfl.learning.vector import layout
from p2pfl.simulation.dense.kernels.base import Kernel

Outputs = Callable[[tuple[Tensor, ...], Tensor], Tensor]


class VmapKernel(Kernel):
    """`vmap(grad(functional_call))` of the task's own model and loss, in training mode.

    A peer draws its own dropout masks, from torch's global generator; they depend on how many peers there are.

    Raises:
        InvalidConfig: if the model tracks running statistics, which no pure function does.
    """

    tier = "vmap"
    threaded = False

    def __init__(self, task: Task, pool: Examples, chunk: int | None = None) -> None:
        super().__init__(pool, chunk)
        model = make_model(task).to(pool.inputs.device).train()
        verify_pure(task, model)
        if pool.inputs.is_floating_point():
            model = model.to(pool.inputs.dtype)
        order = layout(model)
        self.blocks = tuple(
            Block(name, shape, shape) for name, shape in zip(order.names, order.shapes, strict=True)
        )  # fmt: skip
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._moved = [i for i, name in enumerate(order.names) if name in trainable]
        held = [i for i, name in enumerate(order.names) if name not in trainable]

        def loss(moved: tuple[Tensor, ...], fixed: tuple[Tensor, ...], inputs: Tensor, targets: Tensor) -> Tensor:
            tensors = dict(zip([order.names[i] for i in (*self._moved, *held)], (*moved, *fixed), strict=True))
            return task.loss(functional_call(model, tensors, (inputs,)), targets)

        self._held = held
        self._task = task
        self._function = vmap(grad_and_value(loss), randomness="different")

    def _gradients(self, params: Sequence[Tensor], chosen: Tensor, out: Sequence[Tensor]) -> Tensor:
        moved = tuple(params[i] for i in self._moved)
        held = tuple(params[i] for i in self._held)
        with blame(self._task, "model"):
            gradients, losses = self._function(moved, held, self._pool.inputs[chosen], self._pool.targets[chosen])
        for i, gradient in zip(self._moved, gradients, strict=True):
            out[i].copy_(gradient)
        for i in self._held:
            out[i].zero_()
        return losses  # type: ignore[no-any-return]


def verify_pure(task: Task, model: nn.Module) -> None:
    """Refuse a model whose forward pass changes the model.

    Raises:
        InvalidConfig: naming the first module that does.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise InvalidConfig(
                f"{type(task).__name__}.model: {name} tracks running statistics, which stacked peers cannot; "
                "use nn.GroupNorm, or the engine simnet"
            )


def stacked_outputs(model: nn.Module, blocks: Sequence[Block]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of vectors, [m, P], and inputs, [t, ...], that gives the outputs of all, [m, t, ...].

    The model is run in evaluation mode, without gradients.
    """
    model = model.eval()

    def outputs(row: Tensor, inputs: Tensor) -> Tensor:
        parts = torch.split(row, [block.size for block in blocks])
        tensors = {block.name: part.view(block.shape) for block, part in zip(blocks, parts, strict=True)}
        return functional_call(model, tensors, (inputs,))  # type: ignore[no-any-return]

    mapped = vmap(outputs, in_dims=(0, None))

    def run(rows: Tensor, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return mapped(rows, inputs)

    return run
