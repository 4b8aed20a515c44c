"""One peer's part in an algorithm: the local steps that it asks for, and what of its state outlives a round.

Owns how an algorithm's vectors travel: those that it wants mixed, without what stays with the peer, one behind the
other as one vector, the model first. A peer that stands at such a vector has a model: what the algorithm makes of it.
Must not know what the vectors are mixed with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.core.errors import OutOfTurn
from p2pfl.learning.algorithms import Algorithm, PartialSharing, State
from p2pfl.learning.seeding import seeded
from p2pfl.learning.space import Block, Request, Space, Steps
from p2pfl.learning.task import Data, Task, make_model
from p2pfl.learning.trainer import Trained, Trainer, _mixed, _verify_finite
from p2pfl.learning.vector import Vector, assign, flatten, layout


@dataclass(frozen=True)
class _Proposed:
    """What a round of local work left behind, until it is known what came of the mixing.

    Attributes:
        state: the algorithm's, after its proposal.
        vectors: that it asked to have mixed, all of the model; none after a round without steps.
        lr: the learning rate of the steps; nan where they were not those of plain SGD.
        count: how many steps were made.
    """

    state: State
    vectors: tuple[Tensor, ...]
    lr: float
    count: int


class AlgorithmTrainer(Trainer):
    """A trainer that does what an algorithm asks for in place of plain local steps.

    Local steps are those of the task's optimizer, with the algorithm's corrections in the gradients. Buffers of the
    model are averaged, whatever the algorithm does with the parameters.

    Args:
        algorithm: what peers do.
        task: see `Trainer`.
        data: see `Trainer`.
        terms: see `Trainer`; `clip_norm` bounds how far what is mixed of the model is from where the steps began.

    Raises:
        InvalidConfig: as `Trainer` does, and if the algorithm does not fit the model.
    """

    def __init__(self, algorithm: Algorithm, task: Task, data: Data, **terms: Any) -> None:
        super().__init__(task, data, **terms)
        self._algorithm = algorithm
        self._space = _space(self._model)
        self._initial = torch.from_numpy(flatten(self._model))
        algorithm.init(self._initial, self._space)
        self._shared = _shared(algorithm, self._space)
        self._moved = _moved(self._model, self._space)
        held = torch.ones(self._space.size, dtype=torch.bool)
        for _, place in self._moved:
            held[place] = False
        if self._shared is not None:
            held &= torch.zeros_like(held).index_fill_(0, self._shared, True)
        self._held = held if bool(held.any()) else None
        self._proposed: _Proposed | None = None

    @staticmethod
    def verify(algorithm: Algorithm, task: Task) -> None:
        """Check that an algorithm fits a task's model.

        Raises:
            InvalidConfig: it does not.
        """
        model = make_model(task)
        algorithm.init(torch.from_numpy(flatten(model)), _space(model))

    @property
    def fixed(self) -> int:
        """How many values at the end of what is mixed are no model's."""
        return (self._algorithm.vectors - 1) * self._width

    @property
    def _width(self) -> int:
        return self._space.size if self._shared is None else len(self._shared)

    def begin(self, initial: Vector) -> Vector:
        """Return the vector of a peer before its first round: what is shared of `initial`, and zeros beside it."""
        self._initial = _tensor(initial)
        return self._joined((self._initial,))

    def model_after(self, vector: Vector, mixed: bool) -> Vector:
        """Return the model of a peer that stands at `vector`, float32 [size]."""
        return _array(self._after(vector, mixed)["x"])

    def train(self, vector: Vector, round: int, seconds: float = math.inf, mixed: bool = True) -> Trained:
        """Take over what came of the last round; do this one's local work, and return what is to be mixed of it.

        Args:
            vector: where the peer stands, float32; it is left as it is.
            round: which.
            seconds: as `Trainer.train` has it.
            mixed: whether `vector` came of mixing what this returned last. Otherwise that round was missed, and the
                model is taken from `vector`, what else there is from what the algorithm says of a missed round.

        Raises:
            RoundFailed: as `Trainer.train` does.
            InvalidConfig: as `Trainer.train` does.
        """
        until = self._until(round, seconds)
        state = self._after(vector, mixed)
        begun = state["x"].clone()  # an algorithm may have its steps overwrite it
        assign(self._model, _array(begun))
        try:
            if self._measures(round):
                measured = self._without_steps(round, _array(begun))
                state = {**state, "x": _tensor(measured.vector)}
                self._proposed = _Proposed(state, (), math.nan, 0)
                return replace(measured, vector=self._joined((state["x"],)))
            local = _Local(self, round, until, self._rate, self._local_steps)
            with seeded(_mixed(self._seed, round)):
                state, request = self._algorithm.propose(state, local, self._space)
            vectors = self._with_buffers(request.vectors)
            norm = float(torch.linalg.vector_norm(vectors[0] - self._as_shared(begun), dtype=torch.float64))
            _verify_finite(round, "model", norm)
            for other in vectors[1:]:
                _verify_finite(round, "mean step", float(torch.linalg.vector_norm(other, dtype=torch.float64)))
        except Exception:
            self._optimizer = self._make_optimizer()  # its momentum may be as broken as the model
            raise
        clipped = bool(self._clip_norm) and norm > self._clip_norm
        if clipped:
            start = self._as_shared(begun)
            vectors = (start + (vectors[0] - start) * (self._clip_norm / norm), *vectors[1:])
        # In one assignment: another thread may ask for the model.
        self._proposed = _Proposed(state, vectors, local.lr, local.count)
        return Trained(self._joined(vectors), local.loss, norm, clipped=clipped, steps=local.count)

    def _after(self, vector: Vector, mixed: bool) -> State:
        """Return the algorithm's state at `vector`."""
        parts, proposed = self._parts(vector), self._proposed
        if proposed is None:
            return self._algorithm.init(self._placed(self._initial, parts[0]), self._space)
        if not proposed.vectors:
            return {**proposed.state, "x": self._placed(proposed.state["x"], parts[0])}
        local = _Local(self, 0, 0.0, proposed.lr, proposed.count)
        if mixed:
            state = self._algorithm.apply(proposed.state, Request(parts), local, self._space)
            x = state["x"] if self._held is None else torch.where(self._held, parts[0], state["x"])
            return {**state, "x": x}
        # No algorithm that peers run looks at the state before its proposal.
        request = Request(proposed.vectors)
        state = self._algorithm.missed(proposed.state, proposed.state, request, local, self._space)
        return {**state, "x": self._placed(state["x"], parts[0])}

    # How vectors travel

    def _joined(self, vectors: tuple[Tensor, ...]) -> Vector:
        """Put what is shared of the vectors into one, with zeros in place of those that are not there."""
        width, joined = self._width, np.zeros(self._algorithm.vectors * self._width, np.float32)
        for number, each in enumerate(vectors):
            joined[number * width : (number + 1) * width] = _array(each if self._shared is None else each[self._shared])
        return joined

    def _parts(self, vector: Vector) -> tuple[Tensor, ...]:
        """Return the vectors that were put into one, all of the model each, with zeros where nothing is shared."""
        if vector.dtype != np.float32 or vector.shape != (self._algorithm.vectors * self._width,):
            raise OutOfTurn(f"a vector of {vector.dtype} {list(vector.shape)} for {self._algorithm.name}")
        parts = _tensor(vector).split(self._width)
        if self._shared is None:
            return tuple(parts)
        return tuple(torch.zeros(self._space.size).index_copy_(0, self._shared, part) for part in parts)

    def _placed(self, own: Tensor, shared: Tensor) -> Tensor:
        """Return a new vector: `shared` where the model is shared, and `own` elsewhere."""
        if self._shared is None:
            return shared.clone()
        return own.clone().index_copy_(0, self._shared, shared[self._shared])

    def _as_shared(self, x: Tensor) -> Tensor:
        """Return a vector as requests have it: 0 where nothing is shared."""
        return self._placed(torch.zeros_like(x), x)

    def _with_buffers(self, vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Put into the model that is to be mixed what its buffers are by now."""
        if self._held is None:
            return vectors
        return (torch.where(self._held, torch.from_numpy(flatten(self._model)), vectors[0]), *vectors[1:])

    # What outlives the process

    def _more(self) -> dict[str, object]:
        proposed = self._proposed
        if proposed is None:
            return {"proposed": None}
        return {"proposed": [proposed.state, list(proposed.vectors), proposed.lr, proposed.count]}

    def _take_more(self, values: dict[str, Any]) -> None:
        if values["proposed"] is None:
            self._proposed = None
            return
        state, vectors, lr, count = values["proposed"]
        known = self._algorithm.init(self._initial, self._space)
        for name, tensor in known.items():
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise ValueError(f"its {name} is of another model")
        if any(each.shape != self._initial.shape for each in vectors):
            raise ValueError("its vectors are of another model")
        self._proposed = _Proposed(state, tuple(vectors), float(lr), int(count))

    # Local work, for `_Local`

    @property
    def _rate(self) -> float:
        """The learning rate, where the optimizer has one for all."""
        rates = {float(group["lr"]) for group in self._optimizer.param_groups if "lr" in group}
        return rates.pop() if len(rates) == 1 else math.nan

    def _gradient(self, x: Tensor, number: int) -> tuple[Tensor, float]:
        """Return the gradient at `x` over the next minibatch, and the loss."""
        assign(self._model, _array(x))
        self._model.train()
        loss = self._backward(number)
        gradient = torch.zeros_like(x)
        for parameter, place in self._moved:
            if parameter.grad is not None:
                gradient[place] = parameter.grad.reshape(-1).to(torch.float32)
        return gradient, loss

    def _steered(self, x: Tensor, number: int, until: float, steer: Callable[[], None]) -> tuple[Tensor, float, int]:
        """Make local steps from `x`; return where they led, their mean loss, and how many they are."""
        assign(self._model, _array(x))
        loss, steps = self._steps(number, until, steer)
        return torch.from_numpy(flatten(self._model)), loss, steps


class _Local:
    """A round's local work, as `p2pfl.learning.space.Local` has it.

    Attributes:
        lr: the learning rate.
        count: how many steps are to be made; once some were made, how many they are.
        loss: their mean loss; nan before.
    """

    def __init__(self, trainer: AlgorithmTrainer, number: int, until: float, lr: float, count: int) -> None:
        self.lr, self.count, self.loss = lr, count, math.nan
        self._trainer, self._number, self._until = trainer, number, until

    def gradient(self, x: Tensor) -> Tensor:
        """Compute as `Local` says."""
        gradient, self.loss = self._trainer._gradient(x, self._number)
        self.count = 1
        return gradient

    def steps(
        self, x: Tensor, *, correction: Tensor | None = None, prox: float = 0.0, anchor: Tensor | None = None,
        momentum: Tensor | None = None, beta: float = 0.0, nesterov: bool = False, out: Tensor | None = None,
    ) -> Steps:  # fmt: skip
        """Compute as `Local` says; `out` is not written to."""
        del out
        if prox and anchor is None:
            raise ValueError("prox has no anchor")
        pull = anchor if prox else None

        def steer() -> None:
            if correction is None and pull is None and momentum is None:
                return
            for parameter, place in self._trainer._moved:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                if correction is not None:
                    gradient = gradient + _like(correction[place], parameter)
                if pull is not None:
                    gradient = gradient + prox * (parameter.detach() - _like(pull[place], parameter))
                if momentum is not None:
                    kept = momentum[place].mul_(beta).add_(gradient.reshape(-1).to(torch.float32))
                    gradient = gradient + beta * _like(kept, parameter) if nesterov else _like(kept, parameter).clone()
                parameter.grad = gradient

        moved, self.loss, self.count = self._trainer._steered(x, self._number, self._until, steer)
        return Steps(moved, torch.tensor([self.loss]), momentum)


def _space(model: nn.Module) -> Space:
    order = layout(model)
    return Space(1, tuple(Block(name, shape, shape) for name, shape in zip(order.names, order.shapes, strict=True)))


def _places(space: Space) -> dict[str, slice]:
    ends = np.cumsum([0, *(block.size for block in space.blocks)]).tolist()
    return {block.name: slice(start, start + block.size) for block, start in zip(space.blocks, ends, strict=False)}


def _shared(algorithm: Algorithm, space: Space) -> Tensor | None:
    """Return the places in a model's vector of what is mixed, int64 [m]; None for all."""
    if not isinstance(algorithm, PartialSharing):
        return None
    kept = [
        torch.arange(place.start, place.stop) for name, place in _places(space).items() if not algorithm.stays(name)
    ]
    return torch.cat(kept)


def _moved(model: nn.Module, space: Space) -> list[tuple[nn.Parameter, slice]]:
    """Return what training moves, and where in the vector it lies."""
    places = _places(space)
    return [(p, places[name]) for name, p in model.named_parameters() if p.requires_grad]


def _like(flat: Tensor, parameter: Tensor) -> Tensor:
    return flat.view(parameter.shape).to(parameter.dtype)


def _tensor(vector: Vector) -> Tensor:
    """Copy a vector into a tensor: it may be read-only, and a state outlives it."""
    return torch.from_numpy(vector.copy())


def _array(tensor: Tensor) -> Vector:
    vector: Vector = tensor.detach().numpy()
    return vector
