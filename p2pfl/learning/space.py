"""The vectors of many peers as one flat tensor, and what an algorithm and an engine say to each other about them.

Owns where a peer's numbers lie (`Space`), and the values that pass between an algorithm and whoever does its local work
and its exchange (`Local`, `Steps`, `Request`). Must not train or mix.

A flat tensor is 1-D: one block after another, each contiguous, [peers, *stored shape]. So a layer of all peers is one
operand of a batched product, and an optimiser's update of everything is one operation. What is elementwise and maps 0
to 0 is written on flat tensors as they are; what weighs or measures peers goes through `Space`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")

ROWS = 256
"""Peers whose numbers are copied or multiplied at a time: a guess that keeps temporaries in the megabytes."""


@dataclass(frozen=True)
class Block:
    """A tensor of the model, and how each peer's is stored.

    What is stored beyond the model's own numbers is 0 and stays 0: no model reads it, and no row holds it.

    Attributes:
        name: as the model's `state_dict` has it.
        shape: as the model has it.
        stored: the shape it is stored in, at least as large as `shape`, after its two sides were swapped, if they are.
        swapped: whether a matrix is stored transposed.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    swapped: bool = False

    def __post_init__(self) -> None:
        if self.swapped and len(self.shape) != 2:
            raise ValueError(f"{self.name}: only matrices are transposed, not {list(self.shape)}")
        shape = self.shape[::-1] if self.swapped else self.shape
        if len(self.stored) != len(shape) or any(s < n for s, n in zip(self.stored, shape, strict=True)):
            raise ValueError(f"{self.name}: {list(shape)} does not fit into {list(self.stored)}")

    @property
    def size(self) -> int:
        """How many numbers of a peer's vector are in it."""
        return math.prod(self.shape)

    def own(self, stored: Tensor) -> Tensor:
        """View the model's own numbers, [..., *shape], in what is stored, [..., *stored]."""
        tensor = stored.transpose(-1, -2) if self.swapped else stored
        for axis, side in enumerate(self.shape, tensor.ndim - len(self.shape)):
            tensor = tensor.narrow(axis, 0, side)
        return tensor


@dataclass(frozen=True)
class Space:
    """The layout of `n` peers' vectors of `size` numbers each in a flat tensor.

    A row is a peer's vector in the order of the blocks, each in row-major order: where the blocks are a model's tensors
    in the order of its `state_dict`, a row is what `p2pfl.learning.vector.flatten` gives.
    """

    n: int
    blocks: tuple[Block, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    @property
    def size(self) -> int:
        """The length P of a peer's vector."""
        return sum(block.size for block in self.blocks)

    @property
    def stored(self) -> int:
        """How many numbers are stored for each peer: at least `size`."""
        return sum(math.prod(block.stored) for block in self.blocks)

    def zeros(self) -> Tensor:
        """Make a flat tensor of zeros."""
        return torch.zeros(self.n * self.stored, dtype=self.dtype, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """View a flat tensor block by block, [n, *stored] each; writing to a view writes to `flat`."""
        ends = [0]
        for block in self.blocks:
            ends.append(ends[-1] + self.n * math.prod(block.stored))
        return [
            flat[start:end].view(self.n, *block.stored)
            for block, (start, end) in zip(self.blocks, pairwise(ends), strict=True)
        ]

    def scale(self, flat: Tensor, per_peer: Tensor) -> Tensor:
        """Return a new flat tensor in which each peer's numbers are multiplied by its own of `per_peer`, [n]."""
        result = torch.empty_like(flat)
        for source, target in zip(self.views(flat), self.views(result), strict=True):
            torch.mul(source, _column(per_peer, source), out=target)
        return result

    def where(self, chosen: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        """Return a new flat tensor: `yes` for the peers of `chosen`, bool [n], and `no` for all others."""
        result = torch.empty_like(yes)
        for a, b, target in zip(self.views(yes), self.views(no), self.views(result), strict=True):
            torch.where(_column(chosen, a), a, b, out=target)
        return result

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """Return each peer's inner product of two flat tensors, [n], in their dtype."""
        result = torch.zeros(self.n, dtype=a.dtype, device=a.device)
        for left, right in zip(self.views(a), self.views(b), strict=True):
            for start, end in self.parts():
                product = left[start:end].reshape(end - start, -1) * right[start:end].reshape(end - start, -1)
                result[start:end] += product.sum(1)
        return result

    def rows(self, flat: Tensor, peers: Tensor | slice | None = None) -> Tensor:
        """Copy the vectors of all peers, or of those given as int64 [m] or a slice: [m, P]."""
        chosen = slice(None) if peers is None else peers
        columns = [
            block.own(view[chosen]).reshape(-1, block.size)
            for block, view in zip(self.blocks, self.views(flat), strict=True)
        ]
        return torch.cat(columns, dim=1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Lay vectors out, [n, P] or the same for all, [P]: a new flat tensor."""
        flat = torch.zeros(self.n * self.stored, dtype=rows.dtype, device=rows.device)
        self.put_rows(flat, slice(None), rows.expand(self.n, self.size))
        return flat

    def put_rows(self, flat: Tensor, peers: Tensor | slice, rows: Tensor) -> None:
        """Overwrite in `flat` the vectors of the given peers, int64 [m] or a slice, by `rows`, [m, P]."""
        start = 0
        for block, view in zip(self.blocks, self.views(flat), strict=True):
            block.own(view)[peers] = rows[:, start : start + block.size].reshape(-1, *block.shape)
            start += block.size

    def mean(self, flat: Tensor, peers: slice = slice(None)) -> Tensor:
        """Return the mean vector of all peers, or of those of a slice: [P], summed in float64."""
        means = [
            block.own(_mean(view[peers])).reshape(-1) for block, view in zip(self.blocks, self.views(flat), strict=True)
        ]
        return torch.cat(means).to(flat.dtype)

    def consensus_distance(self, flat: Tensor, peers: slice = slice(None)) -> float:
        """Return the mean squared distance of the peers' vectors, all or those of a slice, to their mean."""
        total, count = 0.0, len(range(self.n)[peers])
        for view in self.views(flat):
            mean = _mean(view[peers]).to(flat.dtype)
            for rows in torch.split(view[peers], ROWS):
                # Row by row first: a sum over all at once has an order that depends on the number of threads.
                squared = (rows - mean).square_().flatten(1)
                total += float(squared.sum(1, dtype=torch.float64).sum())
        return total / count

    def parts(self, size: int = ROWS) -> Iterator[tuple[int, int]]:
        """Cut the peers into as few ranges of at most `size` as can be, about equal: first, and one past the last."""
        even = -(-self.n // -(-self.n // size))
        return ((start, min(start + even, self.n)) for start in range(0, self.n, even))

    def of(self, n: int) -> "Space":
        """Return the same layout for another number of peers."""
        return replace(self, n=n)


@dataclass(frozen=True)
class Steps:
    """What local steps gave.

    Attributes:
        x: the models afterwards, flat.
        loss: each peer's mean minibatch loss, [n].
        momentum: that which was passed in, updated in place, flat; None without momentum.
    """

    x: Tensor
    loss: Tensor
    momentum: Tensor | None


@dataclass(frozen=True)
class Request:
    """What an algorithm wants mixed in a round, or what came of it: flat tensors, and one number of each peer, [n]."""

    vectors: tuple[Tensor, ...]
    scalars: tuple[Tensor, ...] = ()


class Local(Protocol):
    """What an engine offers for a round's local work of all peers; each minibatch is used once.

    Attributes:
        lr: this round's learning rate.
        count: how many steps `steps` makes.
    """

    @property
    def lr(self) -> float:
        """The learning rate of this round."""

    @property
    def count(self) -> int:
        """How many steps `steps` makes."""

    def gradient(self, x: Tensor) -> Tensor:
        """Return a new flat tensor: each peer's gradient at `x`, flat, over its next minibatch."""

    def steps(
        self,
        x: Tensor,
        *,
        correction: Tensor | None = None,
        prox: float = 0.0,
        anchor: Tensor | None = None,
        momentum: Tensor | None = None,
        beta: float = 0.0,
        nesterov: bool = False,
        out: Tensor | None = None,
    ) -> Steps:
        """Make `count` SGD steps from `x`, which is left as it is unless `out` is `x`.

        Each step computes g = gradient(x) + correction + prox * (x - anchor). Without momentum x becomes x - lr * g.
        With it, m becomes beta * m + g and x becomes x - lr * m, or x - lr * (g + beta * m) with Nesterov's: as torch's
        SGD without dampening, but for a first m that the caller chooses.

        Args:
            x: the models, flat.
            correction: added to every gradient, flat.
            prox: the strength of the pull towards `anchor`.
            anchor: where `prox` pulls to, flat; needed where that is not 0, and not to be `out`.
            momentum: m, flat; it is updated in place.
            beta: the share of m that is kept.
            nesterov: whether the gradient looks ahead.
            out: takes the result, flat; it may be `x` where that is not needed any more. A new tensor, unless given.

        Raises:
            ValueError: if `prox` has no anchor, or one that would be overwritten.
        """


def _column(per_peer: Tensor, like: Tensor) -> Tensor:
    return per_peer.view(-1, *[1] * (like.ndim - 1))


def _mean(view: Tensor) -> Tensor:
    """Return the mean over the first dimension, in float64; to convert more than `ROWS` at a time is slow."""
    total = torch.zeros(view.shape[1:], dtype=torch.float64, device=view.device)
    for rows in torch.split(view, ROWS):
        total += rows.double().sum(0)
    return total / len(view)
