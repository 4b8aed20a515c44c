"""The middle tier: `nn.Sequential` models on stacked parameters, one call of autograd for a chunk of peers.

Linear layers are batched products. The images of all peers lie side by side as the channels of one batch, so that
convolutions become one grouped convolution, with channels last: pooling is 4 times as fast as with channels first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.space import Block
from p2pfl.learning.task import Examples, Task, blame, make_model
from p2pfl.learning.vector import layout
from p2pfl.simulation.dense.kernels.base import Kernel

ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Identity)
"""Modules that treat every number alike, and so do not mind how peers are stacked."""

POOLING = (nn.MaxPool2d, nn.AvgPool2d)
"""Modules that treat every channel alike."""

Forward = Callable[[Tensor, Sequence[Tensor], int], Tensor]
"""Takes values, a layer's own tensors, [m, *shape] each, and m, the number of peers; gives values. Values are rows,
[m, B, features], or planes, [B, m * channels, height, width]."""


@dataclass(frozen=True)
class Layer:
    """A step of the forward pass, and how many of the model's tensors it takes."""

    forward: Forward
    tensors: int


def layers(model: nn.Module, inputs: Tensor) -> list[Layer] | None:
    """Return a model's layers, as they apply to inputs [n, ...] of this shape; None if a module is of another kind."""
    if inputs.ndim not in (2, 4) or not inputs.is_floating_point():
        return None
    planes, found = inputs.ndim == 4, []
    for module in _leaves(model):
        step = _on_planes(module) if planes else _on_rows(module)
        if step is None:
            return None
        planes = (planes or isinstance(module, nn.Unflatten)) and not isinstance(module, nn.Flatten)
        found.append(step)
    tensors = layout(model).names if any(True for _ in model.parameters()) else ()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if planes or list(tensors) != trainable or sum(layer.tensors for layer in found) != len(trainable):
        return None
    return found


class StackedKernel(Kernel):
    """SGD of a sequence of linear, convolution, pooling, norm and elementwise layers, with the task's own loss.

    Raises:
        InvalidConfig: if the model has another module, or tensors that are shared or fixed.
    """

    tier = "stacked"

    def __init__(self, task: Task, pool: Examples, chunk: int | None = None) -> None:
        super().__init__(pool, chunk)
        model = make_model(task)
        found = layers(model, pool.inputs)
        if found is None:
            raise InvalidConfig(
                f"{type(task).__name__}: the tier stacked takes nn.Sequential of Linear, Conv2d, pooling, GroupNorm "
                "and elementwise layers that all train; use the tier vmap"
            )
        order = layout(model)
        self.blocks = tuple(
            Block(name, shape, shape) for name, shape in zip(order.names, order.shapes, strict=True)
        )  # fmt: skip
        self._task = task
        self._layers = found
        self._ends = list(pairwise(accumulate((layer.tensors for layer in found), initial=0)))
        self._losses = _cross_entropies if type(task).loss is Task.loss else torch.vmap(task.loss)

    def _gradients(self, params: Sequence[Tensor], chosen: Tensor, out: Sequence[Tensor]) -> Tensor:
        gradients, losses = self._differentiate(params, chosen)
        torch._foreach_copy_(list(out), gradients)
        return losses

    def _descend(self, params: Sequence[Tensor], chosen: Tensor, lr: float, scratch: Sequence[Tensor]) -> Tensor:
        del scratch
        total = torch.zeros(len(chosen), dtype=params[0].dtype, device=chosen.device)
        for step in range(chosen.shape[1]):
            gradients, losses = self._differentiate(params, chosen[:, step])
            torch._foreach_add_(list(params), gradients, alpha=-lr)
            total += losses
        return total

    def _differentiate(self, params: Sequence[Tensor], chosen: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        with torch.enable_grad(), blame(self._task, "loss"):
            # Not detach(): it would share the count of writes to the flat tensor, where other threads write as well.
            leaves = [param.data.requires_grad_() for param in params]
            losses = self._losses(self._outputs(leaves, chosen), self._pool.targets[chosen])
            return torch.autograd.grad(losses.sum(), leaves), losses.detach()

    def _outputs(self, params: Sequence[Tensor], chosen: Tensor) -> Tensor:
        if self._pool.inputs.ndim == 2:
            values = self._pool.inputs[chosen]
        else:
            images = self._pool.inputs[chosen.t()]
            values = _last(images.flatten(1, 2))
        for layer, (start, end) in zip(self._layers, self._ends, strict=True):
            values = layer.forward(values, params[start:end], len(chosen))
        return values


def _cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of each peer, [m], of logits [m, B, classes]."""
    each = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return each.view(targets.shape).mean(1)


def _leaves(model: nn.Module) -> list[nn.Module]:
    if type(model) is nn.Sequential:
        return [leaf for module in model for leaf in _leaves(module)]
    return [model]


def _on_rows(module: nn.Module) -> Layer | None:
    match module:
        case nn.Linear() if type(module) is nn.Linear:
            return Layer(_linear, 1 if module.bias is None else 2)
        case nn.Flatten(start_dim=1, end_dim=-1):
            return Layer(_same, 0)
        case nn.Unflatten(dim=1) if len(module.unflattened_size) == 3:
            sides = tuple(int(side) for side in module.unflattened_size)
            return Layer(lambda values, _, peers: _to_planes(values, sides, peers), 0)
    return Layer(lambda values, _, __: module(values), 0) if type(module) in ELEMENTWISE else None


def _on_planes(module: nn.Module) -> Layer | None:
    match module:
        case nn.Conv2d(padding_mode="zeros") if type(module) is nn.Conv2d:
            return Layer(_convolution(module), 1 if module.bias is None else 2)
        case nn.GroupNorm(affine=True):
            return Layer(_norm(module), 2)
        case nn.Flatten(start_dim=1, end_dim=-1):
            return Layer(_to_rows, 0)
    return Layer(lambda values, _, __: module(values), 0) if type(module) in (*ELEMENTWISE, *POOLING) else None


def _same(values: Tensor, own: Sequence[Tensor], peers: int) -> Tensor:
    del own, peers
    return values


def _linear(values: Tensor, own: Sequence[Tensor], peers: int) -> Tensor:
    del peers
    weight = own[0].transpose(1, 2)
    return torch.bmm(values, weight) if len(own) == 1 else torch.baddbmm(own[1].unsqueeze(1), values, weight)


def _convolution(module: nn.Conv2d) -> Forward:
    def forward(values: Tensor, own: Sequence[Tensor], peers: int) -> Tensor:
        bias = own[1].reshape(-1) if len(own) == 2 else None
        return functional.conv2d(
            values, _last(own[0].flatten(0, 1)), bias, module.stride, module.padding, module.dilation,
            peers * module.groups,
        )  # fmt: skip

    return forward


def _norm(module: nn.GroupNorm) -> Forward:
    def forward(values: Tensor, own: Sequence[Tensor], peers: int) -> Tensor:
        weight, bias = (tensor.reshape(-1) for tensor in own)
        return functional.group_norm(values, peers * module.num_groups, weight, bias, module.eps)

    return forward


def _to_planes(values: Tensor, sides: tuple[int, ...], peers: int) -> Tensor:
    return _last(values.transpose(0, 1).reshape(values.shape[1], peers * sides[0], *sides[1:]))


def _to_rows(values: Tensor, own: Sequence[Tensor], peers: int) -> Tensor:
    del own
    return values.reshape(len(values), peers, -1).transpose(0, 1)


def _last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
