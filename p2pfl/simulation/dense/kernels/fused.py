"""The fastest tier: multilayer perceptrons with rectifiers and cross entropy, written out by hand.

Forward and backward passes run in place in buffers of one chunk of peers, and a plain step is part of the product that
computes the gradient. Weights before the last layer are stored as [in, out], with which the forward product takes a
third less time. The classes are stored in multiples of 16: the softmax of 16 is vectorised, that of 10 is not, and
takes 8 times as long (5.55 against 0.66 microseconds for 32 examples). A class that does not exist has weights and
bias 0 in the flat tensor, and a bias of -1e30 in the forward pass: its probability and its gradient are 0 exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.space import Block
from p2pfl.learning.task import Examples, Task, make_model
from p2pfl.learning.vector import layout
from p2pfl.simulation.dense.kernels.base import Kernel

LANES = 16
"""Numbers of float32 in a register of AVX-512: what the classes are padded to."""

NEVER = -1e30
"""The logit of a class that does not exist; its exponential is 0 whatever the others are."""

TINY = torch.finfo(torch.float32).tiny
"""The least probability of which the loss is taken: it reads 87.3 at most."""


def fits(task: Task, model: nn.Module, pool: Examples) -> bool:
    """Tell whether this tier takes a task: a perceptron, its loss the mean cross entropy, float32 inputs, classes."""
    if type(task).loss is not Task.loss or pool.inputs.dtype != torch.float32:
        return False
    found, targets = _widths(model), pool.targets
    classes = targets.dtype == torch.int64 and targets.ndim == 1
    return bool(found) and classes and int(targets.min()) >= 0 and int(targets.max()) < found[-1]


class FusedKernel(Kernel):
    """SGD of a perceptron on the mean cross entropy, in float32.

    Raises:
        InvalidConfig: if the model is no such perceptron, or the inputs are not float32.
    """

    tier = "fused"
    usual = (
        128  # measured for 1000 peers of 64-64-10: a tenth less time than 64, a seventh less than 48, as much as 200
    )

    def __init__(self, task: Task, pool: Examples, chunk: int | None = None) -> None:
        super().__init__(pool, chunk)
        model = make_model(task)
        if not fits(task, model, pool):
            raise InvalidConfig(
                f"{type(task).__name__}: the tier fused takes nn.Sequential of Linear and ReLU, cross entropy, "
                "float32 inputs and existing classes; use the tier stacked or vmap"
            )
        found, order = _widths(model), layout(model)
        classes = found[-1]
        self._classes = -(-classes // LANES) * LANES
        self.blocks = tuple(
            self._head(name, shape) if i >= len(order.names) - 2 else Block(name, shape, shape[::-1], len(shape) == 2)
            for i, (name, shape) in enumerate(zip(order.names, order.shapes, strict=True))
        )
        self._widths = [*found[:-1], self._classes]
        self._inputs = pool.inputs.reshape(len(pool), -1).contiguous()
        self._never = torch.zeros(self._classes, device=pool.inputs.device)
        self._never[classes:] = NEVER
        self._rooms: dict[tuple[int, int], _Room] = {}

    def _head(self, name: str, shape: tuple[int, ...]) -> Block:
        return Block(name, shape, (self._classes, *shape[1:]))

    def _twin(self) -> Kernel:
        twin = super()._twin()
        assert isinstance(twin, FusedKernel)  # noqa: S101 - for mypy
        twin._rooms = {}
        return twin

    def _gradients(self, params: Sequence[Tensor], chosen: Tensor, out: Sequence[Tensor]) -> Tensor:
        return self._passes(params, chosen.unsqueeze(1), out, 0.0, 1.0 / chosen.shape[1])

    def _descend(self, params: Sequence[Tensor], chosen: Tensor, lr: float, scratch: Sequence[Tensor]) -> Tensor:
        del scratch
        return self._passes(params, chosen, params, 1.0, -lr / chosen.shape[2])

    def _passes(
        self, params: Sequence[Tensor], chosen: Tensor, out: Sequence[Tensor], keep: float, rate: float
    ) -> Tensor:
        """Run forward and back for each minibatch of `chosen`, int64 [m, H, B]; return the sum of the losses, [m].

        `out` becomes keep * out + rate * the gradient of the minibatch's summed loss. It may be `params`: in each pass
        a layer's weights are read for the last time before they are written.
        """
        peers, steps, batch = chosen.shape
        room = self._room(peers, batch)
        values, deltas, line = room.values, room.deltas, room.line
        last = len(deltas) - 1
        # A view costs as much time as a small product, so all are made once for all steps.
        by_step = chosen.transpose(0, 1).reshape(steps, -1)
        targets = self._pool.targets[by_step].add_(room.offsets)
        probabilities = torch.empty_like(by_step, dtype=torch.float32)
        biases = [bias.unsqueeze(1) for bias in params[1::2]]
        forward = list(zip(biases[:-1], values, params[:-2:2], values[1:], strict=False))
        head, logits = params[-2].transpose(1, 2), deltas[last]
        backward = [self._layer(i, params, out, room) for i in range(last, -1, -1)]
        for step in range(steps):
            torch.index_select(self._inputs, 0, by_step[step], out=room.inputs)
            for bias, entering, weight, leaving in forward:
                torch.baddbmm(bias, entering, weight, out=leaving).relu_()
            torch.baddbmm(biases[-1] + self._never, values[last], head, out=logits)
            torch.softmax(logits, -1, out=logits)
            torch.index_select(line, 0, targets[step], out=probabilities[step])
            line.index_add_(0, targets[step], room.minus)
            for layer in backward:
                if layer.before is not None:
                    torch.bmm(layer.delta, layer.weight, out=layer.before)
                    torch.ops.aten.threshold_backward.grad_input(
                        layer.before, layer.entering, 0, grad_input=layer.before
                    )
                layer.weight_out.baddbmm_(layer.left, layer.right, beta=keep, alpha=rate)
                layer.bias_out.baddbmm_(room.ones, layer.delta, beta=keep, alpha=rate)
        return probabilities.clamp_min_(TINY).log_().view(steps, peers, batch).sum((0, 2)).div_(-batch)

    def _layer(self, i: int, params: Sequence[Tensor], out: Sequence[Tensor], room: "_Room") -> "_Layer":
        head = i == len(room.deltas) - 1
        delta, entering = room.deltas[i], room.values[i]
        left, right = (delta, entering) if head else (entering, delta)
        return _Layer(
            delta=delta,
            before=room.deltas[i - 1] if i else None,
            entering=entering,
            weight=params[2 * i] if head else params[2 * i].transpose(1, 2),
            left=left.transpose(1, 2),
            right=right,
            weight_out=out[2 * i],
            bias_out=out[2 * i + 1].unsqueeze(1),
        )

    def _room(self, peers: int, batch: int) -> "_Room":
        if (peers, batch) not in self._rooms:
            device = self._inputs.device
            values = [torch.empty(peers, batch, width, device=device) for width in self._widths[:-1]]
            deltas = [torch.empty(peers, batch, width, device=device) for width in self._widths[1:]]
            self._rooms[peers, batch] = _Room(
                values,
                deltas,
                values[0].view(peers * batch, -1),
                deltas[-1].view(-1),
                torch.arange(peers * batch, device=device) * self._classes,
                torch.full((peers * batch,), -1.0, device=device),
                torch.ones(peers, 1, batch, device=device),
            )
        return self._rooms[peers, batch]


@dataclass(frozen=True)
class _Room:
    """Buffers of a chunk of m peers with minibatches of B.

    Attributes:
        values: what enters each layer, [m, B, in].
        deltas: the gradient of the summed loss by what leaves each layer, [m, B, out].
        inputs: a view of what enters the first layer, [m * B, in].
        line: a view of the last of the deltas, [m * B * classes].
        offsets: where each example begins in `line`, [m * B].
        minus: -1 for each example, [m * B].
        ones: 1 for each example, [m, 1, B].
    """

    values: list[Tensor]
    deltas: list[Tensor]
    inputs: Tensor
    line: Tensor
    offsets: Tensor
    minus: Tensor
    ones: Tensor


@dataclass(frozen=True)
class _Layer:
    """What the backward pass of a layer reads and writes.

    Attributes:
        delta: the gradient by what leaves it, [m, B, out].
        before: takes the gradient by what leaves the layer before, [m, B, in]; None in the first.
        entering: what enters it, [m, B, in].
        weight: its weights, [m, out, in].
        left: the left side of the product that is the gradient by the weights as they are stored.
        right: its right side.
        weight_out: takes that gradient.
        bias_out: takes the gradient by the bias, [m, 1, out].
    """

    delta: Tensor
    before: Tensor | None
    entering: Tensor
    weight: Tensor
    left: Tensor
    right: Tensor
    weight_out: Tensor
    bias_out: Tensor


def _widths(model: nn.Module) -> list[int]:
    """Return the widths of a perceptron's layers, inputs first; none if the model is anything else."""
    modules = list(model) if type(model) is nn.Sequential else []
    if modules and type(modules[0]) is nn.Flatten:
        modules = modules[1:]
    linear = [module for module in modules[::2] if type(module) is nn.Linear and module.bias is not None]
    if len(modules) != 2 * len(linear) - 1 or any(type(module) is not nn.ReLU for module in modules[1::2]):
        return []
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if len(trainable) != 2 * len(linear):
        return []
    return [linear[0].in_features, *(module.out_features for module in linear)]
