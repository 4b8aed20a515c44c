"""The interface of the tiers of local training, and what they share: chunks of peers, and the update of a step.

Owns the order of work: a chunk of peers makes all its steps before the next chunk begins, so that its numbers stay in a
core's cache. A tier owns the gradient, and may fuse a plain step into it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.learning.space import Block, Space, Steps
from p2pfl.learning.task import Examples
from p2pfl.simulation.dense.kernels.optimizers import OwnOptimizer
from p2pfl.simulation.dense.threads import share

CHUNK = 64
"""Peers that make all their steps before the next begin. Measured for a small convolutional network: 64 take 6 %
less time than 128 and 15 % less than 32."""

ACCELERATED = 8192
"""The same on an accelerator, where few large operations are fast: a guess, for want of one to measure on."""

LEAST = 16
"""Peers below which a chunk is not divided among threads: a guess, at which a thread's start is a tenth of its work."""


@dataclass(frozen=True)
class Pulls:
    """What moves a step beside the minibatch's gradient, as `p2pfl.learning.space.Local.steps` says; flat tensors."""

    correction: Tensor | None = None
    prox: float = 0.0
    anchor: Tensor | None = None
    momentum: Tensor | None = None
    beta: float = 0.0
    nesterov: bool = False
    own: OwnOptimizer | None = None
    """What makes the steps of these gradients in place of SGD; then there is no momentum."""

    @property
    def plain(self) -> bool:
        """Whether there are none: a step is x - lr * gradient."""
        return self.correction is None and self.prox == 0.0 and self.momentum is None and self.own is None


class Kernel(ABC):
    """Computes stochastic gradients of many peers at once, and makes their SGD steps.

    Minibatches are given by their indices in one pool of examples that all peers' shares lie in.

    Attributes:
        tier: the name to print beside every figure.
        blocks: the model's tensors in the order of its `state_dict`, as this tier stores them.
        chunk: how many peers, at most, make all their steps before the next begin.
        usual: what `chunk` is on a CPU, unless given.
        threaded: whether chunks may run at the same time: not if they draw from torch's global generator.
    """

    tier: str
    blocks: tuple[Block, ...]
    usual = CHUNK
    threaded = True

    def __init__(self, pool: Examples, chunk: int | None = None) -> None:
        self._pool = pool
        self._on_cpu = pool.inputs.device.type == "cpu"
        self.chunk = chunk or (self.usual if self._on_cpu else ACCELERATED)
        self._scratch: list[Tensor] | None = None
        self._workers: list[Kernel] = [self]

    @abstractmethod
    def _gradients(self, params: Sequence[Tensor], chosen: Tensor, out: Sequence[Tensor]) -> Tensor:
        """Write each peer's gradient over the minibatch `chosen`, int64 [m, B], to `out`; return the losses, [m].

        `params` and `out` are [m, *stored] for each block.
        """

    def _descend(self, params: Sequence[Tensor], chosen: Tensor, lr: float, scratch: Sequence[Tensor]) -> Tensor:
        """Make a plain SGD step on `params`, in place, for each minibatch of `chosen`, int64 [m, H, B].

        Returns:
            The sum of the losses, each before its step, [m].
        """
        losses = torch.zeros(len(chosen), dtype=params[0].dtype, device=chosen.device)
        for step in range(chosen.shape[1]):
            losses += self._gradients(params, chosen[:, step], scratch)
            torch._foreach_add_(list(params), list(scratch), alpha=-lr)
        return losses

    def _twin(self) -> "Kernel":
        """Return a kernel that shares nothing with this one that it writes to."""
        twin = copy(self)
        twin._scratch = None
        return twin

    def gradient(self, space: Space, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return each peer's gradient at `x` over the minibatch `chosen`, int64 [n, B]: flat, and the losses, [n]."""
        result = space.zeros()
        losses = torch.empty(space.n, dtype=space.dtype, device=space.device)

        def work(worker: int, part: slice) -> None:
            kernel = self._workers[worker]
            losses[part] = kernel._gradients(_cut(space, x, part), chosen[part], _cut(space, result, part))

        self._share(space, work)
        return result, losses

    def steps(self, space: Space, x: Tensor, chosen: Tensor, lr: float, pulls: Pulls, out: Tensor | None) -> Steps:
        """Make a step for each minibatch of `chosen`, int64 [n, H, B], as `p2pfl.learning.space.Local.steps` says.

        Raises:
            ValueError: as said there.
        """
        if pulls.prox and (pulls.anchor is None or pulls.anchor is out):
            raise ValueError("a proximal pull needs an anchor that is not where the result goes")
        result = torch.empty_like(x) if out is None else out
        losses = torch.empty(space.n, dtype=space.dtype, device=space.device)

        def work(worker: int, part: slice) -> None:
            params = _cut(space, result, part)
            if result is not x:
                torch._foreach_copy_(params, _cut(space, x, part))
            losses[part] = self._workers[worker]._chunk(space, params, chosen[part], lr, pulls, part)

        self._share(space, work)
        return Steps(result, losses / max(1, chosen.shape[1]), pulls.momentum)

    def _chunk(
        self, space: Space, params: list[Tensor], chosen: Tensor, lr: float, pulls: Pulls, part: slice
    ) -> Tensor:
        """Make all steps of the peers of `part` on `params`, in place; return the sum of their losses, [m]."""
        room = self._scratch_for(space, part.stop - part.start)
        if pulls.plain:
            return self._descend(params, chosen, lr, room)
        correction, anchor, momentum = (
            None if flat is None else _cut(space, flat, part)
            for flat in (pulls.correction, pulls.anchor, pulls.momentum)
        )
        losses = torch.zeros(len(chosen), dtype=space.dtype, device=space.device)
        for step in range(chosen.shape[1]):
            losses += self._gradients(params, chosen[:, step], room)
            _pull(params, room, correction, pulls.prox, anchor)
            if pulls.own is None:
                _move(params, room, lr, momentum, pulls.beta, pulls.nesterov)
            else:
                pulls.own.step(part, params, room)
        return losses

    def _share(self, space: Space, work: Callable[[int, slice], None]) -> None:
        threads = torch.get_num_threads() if self.threaded and self._on_cpu else 1
        size = min(self.chunk, max(LEAST, -(-space.n // threads)))
        while len(self._workers) < threads:
            self._workers.append(self._twin())
        share([slice(start, end) for start, end in space.parts(size)], work, threads)

    def _scratch_for(self, space: Space, peers: int) -> list[Tensor]:
        """Return room for the gradients of a chunk, [m, *stored] for each block."""
        if self._scratch is None or len(self._scratch[0]) < peers:
            own = space.of(peers)
            self._scratch = own.views(own.zeros())
        return [view[:peers] for view in self._scratch]


def _cut(space: Space, flat: Tensor, part: slice) -> list[Tensor]:
    return [view[part] for view in space.views(flat)]


def _pull(
    params: list[Tensor], gradients: list[Tensor], correction: list[Tensor] | None, prox: float,
    anchor: list[Tensor] | None,
) -> None:  # fmt: skip
    """Add the correction and the proximal pull to the gradients, in place."""
    if correction is not None:
        torch._foreach_add_(gradients, correction)
    if anchor is not None and prox:
        torch._foreach_add_(gradients, params, alpha=prox)
        torch._foreach_sub_(gradients, anchor, alpha=prox)


def _move(
    params: list[Tensor], gradients: list[Tensor], lr: float, momentum: list[Tensor] | None, beta: float, nesterov: bool
) -> None:
    """Make the step, in place; the gradients are overwritten."""
    if momentum is None:
        torch._foreach_add_(params, gradients, alpha=-lr)
        return
    torch._foreach_mul_(momentum, beta)
    torch._foreach_add_(momentum, gradients)
    if nesterov:
        torch._foreach_add_(gradients, momentum, alpha=beta)
    torch._foreach_add_(params, gradients if nesterov else momentum, alpha=-lr)
