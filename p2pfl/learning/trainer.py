"""One peer's local steps: a vector in, a trained and clipped vector out.

Owns the model, the optimiser's state and the order of this peer's examples, and how they outlive the process. Must not
know rounds' outcomes or peers: whoever calls it decides which vector comes next. Nothing here unpickles.
"""

import json
import math
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.learning.evaluation import forward
from p2pfl.learning.seeding import seeded
from p2pfl.learning.task import Data, Examples, Task, blame, make_model
from p2pfl.learning.vector import Vector, assign, flatten, layout

STATE_FORMAT = 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}


@dataclass(frozen=True)
class Trained:
    """What a round of local steps gave.

    Attributes:
        vector: the model afterwards, float32 [size]; the caller's to keep.
        loss: the mean of the minibatches' losses.
        steps: how many optimiser steps were made; fewer than asked for where the time was up.
        norm: the L2 norm of the update before clipping.
        clipped: whether the update was scaled down.
    """

    vector: Vector
    loss: float
    norm: float
    clipped: bool
    steps: int


class Trainer:
    """Trains one peer's model on its own examples. One call at a time: `train` and `evaluate` share the model.

    Given equal arguments it does the same on the same machine. Layers that draw random numbers (dropout) draw them
    from torch's global generator, seeded from `seed` and the round and put back afterwards; they are reproducible as
    long as no other thread draws from it meanwhile.

    Args:
        task: whose model, loss, metrics and optimiser to use.
        data: this peer's examples.
        local_steps: optimiser steps in one `train`, unless its time is up before.
        batch_size: examples in one step; all of them where the peer has fewer.
        clip_norm: the largest L2 norm of an update; 0 for no limit.
        seed: of the order of the examples, at least 0.
        clock: tells the time in seconds, and never goes back.

    Raises:
        InvalidConfig: if a number is out of range, or the task fails to make its model or optimiser.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        *,
        local_steps: int,
        batch_size: int,
        clip_norm: float,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _verify_settings(local_steps, batch_size, clip_norm, seed)
        self._task = task
        self._data = data
        self._local_steps = local_steps
        self._clip_norm = clip_norm
        self._seed = seed
        self._clock = clock
        self._model = make_model(task)
        self._layout = layout(self._model)
        self._optimizer = self._make_optimizer()
        self._batches = _Batches(data.train, batch_size, seed)

    @property
    def size(self) -> int:
        """The length of a model's vector."""
        return self._layout.size

    @property
    def fixed(self) -> int:
        """How many values at the end of what is mixed are no model's."""
        return 0

    def begin(self, initial: Vector) -> Vector:
        """Return where a peer stands before its first round, in the form that `train` takes: here the model itself."""
        return initial

    def model_after(self, vector: Vector, mixed: bool) -> Vector:
        """Return the model of a peer that stands at `vector`, as `p2pfl.core.machine.Adopt` has it."""
        del mixed
        return vector

    @property
    def model(self) -> nn.Module:
        """The model as the last `train` or `evaluate` left it."""
        return self._model

    def train(self, vector: Vector, round: int, seconds: float = math.inf, mixed: bool = True) -> Trained:
        """Make `local_steps` optimiser steps from `vector`, float32 [size], which is left as it is.

        After `seconds` no further step begins; the first always does. The last one runs to its end, so the time taken
        may be longer by one step.

        The update u is scaled to x' = x + u * min(1, clip_norm / |u|), over all of the vector (flat clipping,
        McMahan et al. 2018, arXiv 1710.06963). The optimiser's state lives on in the next round, also where the vector
        was replaced by an average: it makes no difference here whether `vector` came of one, which `mixed` says.

        Where the task measures what all must agree on first, no step is made and nothing is clipped: the loss is then
        that of the model as it is, on all of this peer's examples.

        Raises:
            RoundFailed: if the task fails, or the loss or the vector is not finite; the optimiser then starts anew.
            InvalidConfig: if the vector is not one of this model's, or `seconds` is not a number.
        """
        del mixed
        until = self._until(round, seconds)
        assign(self._model, vector)
        try:
            if self._measures(round):
                return self._without_steps(round, vector)
            with seeded(_mixed(self._seed, round)):
                loss, steps = self._steps(round, until)
            trained = flatten(self._model)
            norm = _distance(trained, vector)
            _verify_finite(round, "model", norm)
        except Exception:
            self._optimizer = self._make_optimizer()  # its momentum may be as broken as the model
            raise
        if self._clip_norm and norm > self._clip_norm:
            scale = np.float32(self._clip_norm / norm)
            return Trained(vector + (trained - vector) * scale, loss, norm, clipped=True, steps=steps)
        return Trained(trained, loss, norm, clipped=False, steps=steps)

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

    def state(self) -> bytes:
        """Copy what a trainer needs beside the vector and the round to go on as this one would, bit for bit.

        That is the optimiser's state, the tensors of the model that are in no vector, what is left of this epoch's
        order, and the generator that draws the next. Not among them is what draws from torch's global generator: it is
        seeded anew with every round. Not to be called while another thread trains.

        Raises:
            InvalidConfig: if the optimiser's state holds something else than tensors, numbers, strings, None, lists,
                tuples and dicts.
        """
        batches = self._batches
        with blame(self._task, "optimizer"):
            moved = self._optimizer.state_dict()
        return _encode(self._more() | {
            "format": STATE_FORMAT,
            "optimizer": self._kind(),
            "state": moved,
            "held": _held_tensors(self._model),
            "examples": batches.count,
            "order": batches.order,
            "generator": batches.generator.get_state(),
        }, f"{type(self._task).__name__}.optimizer: its state")  # fmt: skip

    def restore(self, state: bytes) -> list[str]:
        """Go on where the trainer was whose `state` this is; the next `train` then gives what its next would have.

        Returns:
            What could not be taken over, a line each, for people to read.

        Raises:
            InvalidConfig: if the state is of another task or settings, or is none; this trainer is then as it was.
        """
        try:
            values = _decode(state)
            if values["format"] != STATE_FORMAT:
                raise InvalidConfig(f"a trainer's state of format {values['format']}; this p2pfl reads {STATE_FORMAT}")
            if values["optimizer"] != self._kind():
                raise InvalidConfig("a trainer's state of another optimizer or model; was the task changed?")
            optimizer = self._make_optimizer()
            optimizer.load_state_dict(values["state"])
            batches, notes = self._batches.resumed(values["examples"], values["order"], values["generator"])
            held = _matching(values["held"], _held_tensors(self._model))
            self._take_more(values)
        except _NO_STATE as error:
            raise InvalidConfig(f"not the state of a trainer for this task: {' '.join(str(error).split())}") from error
        self._optimizer, self._batches = optimizer, batches
        with torch.no_grad():
            for tensor, restored in held:
                tensor.copy_(restored)
        return notes

    def _until(self, number: int, seconds: float) -> float:
        """Return after what time no further step begins."""
        if math.isnan(seconds):
            raise InvalidConfig(f"round {number}: {seconds} seconds to train; give a number")
        return self._clock() + seconds

    def _measures(self, number: int) -> bool:
        """Let the task put into the model what all must agree on; return whether it did."""
        with blame(self._task, "measure", RoundFailed, f"round {number}: "), torch.no_grad():
            return self._task.measure(self._model, self._data.train)

    def _without_steps(self, number: int, vector: Vector) -> Trained:
        """Return the model with what the task measured in its buffers."""
        train, context = self._data.train, f"round {number}: "
        with blame(self._task, "model", RoundFailed, context):
            outputs = forward(self._model, train.inputs)
        with blame(self._task, "loss", RoundFailed, context), torch.inference_mode():
            loss = float(self._task.loss(outputs, train.targets))
        measured = flatten(self._model)
        norm = _distance(measured, vector)
        _verify_finite(number, "loss", loss)
        _verify_finite(number, "model", norm)
        return Trained(measured, loss, norm, clipped=False, steps=0)

    def _kind(self) -> list[Any]:
        """Return the optimiser's class, and the shapes of what it moves: state fits no other."""
        kind = type(self._optimizer)
        shapes = [list(p.shape) for group in self._optimizer.param_groups for p in group["params"]]
        return [kind.__name__, shapes]

    def _more(self) -> dict[str, object]:
        """Return what a kind of trainer keeps beside."""
        return {}

    def _take_more(self, values: dict[str, Any]) -> None:
        """Go on with what `_more` returned, or change nothing and raise."""

    def _steps(self, number: int, until: float, steer: Callable[[], None] = lambda: None) -> tuple[float, int]:
        """Make up to `local_steps` steps on the model; return their mean loss, and how many they are.

        `steer` may change the gradients before each.
        """
        self._model.train()
        total, steps = 0.0, 0
        while steps < self._local_steps and (steps == 0 or self._clock() < until):
            total += self._backward(number)
            steer()
            with blame(self._task, "optimizer", RoundFailed, f"round {number}: "):
                self._optimizer.step()
            steps += 1
        return total / steps, steps

    def _backward(self, number: int) -> float:
        """Compute the gradient over the next minibatch; return the loss."""
        task, context = self._task, f"round {number}: "
        inputs, targets = self._batches.take()
        self._optimizer.zero_grad(set_to_none=True)
        with blame(task, "model", RoundFailed, context):
            outputs = self._model(inputs)
        with blame(task, "loss", RoundFailed, context):
            loss = task.loss(outputs, targets)
            value = float(loss.detach())
            _verify_finite(number, "loss", value)
            loss.backward()
        return value

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
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self._examples)

    def take(self) -> tuple[Tensor, Tensor]:
        """Take the next inputs [batch, ...] and targets [batch]."""
        if len(self.order) < self._batch_size:
            epoch = torch.randperm(self.count, generator=self.generator)
            self.order = torch.cat([self.order, epoch])
        chosen, self.order = self.order[: self._batch_size], self.order[self._batch_size :]
        return self._examples.inputs.index_select(0, chosen), self._examples.targets.index_select(0, chosen)

    def resumed(self, count: int, order: Tensor, generator: Tensor) -> tuple["_Batches", list[str]]:
        """Return minibatches that go on with an epoch, int64 [left], of `count` examples; and what to tell of it."""
        batches, notes = _Batches(self._examples, self._batch_size, 0), []
        batches.generator.set_state(generator)
        if count != self.count:
            notes.append(f"there are {self.count} training examples now, and were {count}: a new epoch begins")
        elif order.dtype != torch.int64 or order.ndim != 1 or not bool(((order >= 0) & (order < count)).all()):
            raise ValueError("the order of the examples is none")
        else:
            batches.order = order
        return batches, notes


# A trainer's state as bytes: length of the head (4 bytes) | head, JSON | the tensors' bytes, one after another.
#
# In the head, what JSON has no word for is a list with a word in front. Numbers come back as they were: Python writes
# a float with as many digits as it takes.

_NO_STATE = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError),
    struct.error,
)
"""What taking bytes apart raises, and torch handing them on, where they are something else."""


def _held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's state that are in no vector, by name: counters and other whole numbers."""
    found = model.state_dict(keep_vars=True).items()
    return {name: t for name, t in found if isinstance(t, Tensor) and not t.is_floating_point()}


def _matching(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    described = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (given, wanted)]
    if described[0] != described[1]:
        raise ValueError("it is of a model with other tensors")
    return [(tensor, given[name]) for name, tensor in wanted.items()]


def _encode(values: dict[str, object], what: str) -> bytes:
    tensors: list[Tensor] = []
    head = json.dumps(_packed(values, tensors, what)).encode()
    return b"".join([struct.pack("<I", len(head)), head, *map(_memory, tensors)])


def _memory(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _packed(value: object, tensors: list[Tensor], where: str) -> object:
    """Return `value` in words of JSON; its tensors go to `tensors`."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor() if value.layout == torch.strided and value.dtype in _DTYPES.values():
            tensors.append(value)
            return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape)]
        case list() | tuple() if type(value) in (list, tuple):  # one with names would come back without
            word = "list" if isinstance(value, list) else "tuple"
            return [word, *(_packed(item, tensors, f"{where}[{i}]") for i, item in enumerate(value))]
        case dict():
            items = [(_key(key, where), _packed(item, tensors, f"{where}[{key!r}]")) for key, item in value.items()]
            return ["dict", *items]
    kind = f"a tensor of {value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
    raise InvalidConfig(
        f"{where} is {kind}, which no checkpoint holds; use tensors, numbers, strings, None, lists, tuples and dicts"
    )


def _key(key: object, where: str) -> object:
    if isinstance(key, int | str):
        return key
    raise InvalidConfig(f"{where} has a key of type {type(key).__name__}, which no checkpoint holds; use int or str")


def _decode(state: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<I", state)
    rest = memoryview(state)[4 + length :]
    head = json.loads(state[4 : 4 + length])
    values, left = _unpacked(head, rest)
    if left or not isinstance(values, dict):
        raise ValueError(f"{len(left)} bytes too many")
    return values


def _unpacked(value: Any, rest: memoryview) -> tuple[Any, memoryview]:
    """Return what `_packed` was given, with tensors from the front of `rest`; and what is left of that."""
    if not isinstance(value, list):
        return value, rest
    word, *items = value
    if word == "tensor":
        dtype, shape = _DTYPES[items[0]], [int(side) for side in items[1]]
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size > len(rest):
            raise ValueError("a tensor is cut short")
        tensor = torch.empty(shape, dtype=dtype)
        if size:  # torch views no bytes as nothing but bytes
            _memory(tensor)[:] = rest[:size]
        return tensor, rest[size:]
    found = []
    for item in items:
        inner, rest = _unpacked(item[1] if word == "dict" else item, rest)
        found.append((item[0], inner) if word == "dict" else inner)
    return {"list": list, "tuple": tuple, "dict": dict}[word](found), rest


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
