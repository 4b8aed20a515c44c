"""What every algorithm is: a state, a proposal from local work, and what a reply or its absence makes of it.

Owns the interface and what a round without a reply means. Must not mix, and holds nothing between calls: all that
outlives a round is in the state.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.space import Local, Request, Space

State = dict[str, Tensor]
"""What outlives a round, by name: flat tensors, and one number of each peer, [n]. "x" are the models to evaluate. Where
an algorithm compresses by itself, "sent", int64 [n], is how many bytes a peer's vectors of the last round took."""

Stochastic = Literal["doubly", "row", "column"]
"""What sums to 1 in a mixing matrix W: its rows (a receiver averages), its columns (a sender divides), or both."""


class Algorithm(ABC):
    """What peers do in a round, for all peers at once or for one.

    Attributes:
        name: as scenarios call it.
        source: where it was published.
        needs: what must sum to 1 in the mixing matrices; a doubly stochastic one always will do.
        static: whether it is made for one symmetric matrix in all rounds.
        single_step: whether a round is one gradient; it refuses more local steps.
        divisible: whether a part of the model can be left out of the mixing.
        vectors: how many it asks to have mixed, the model first.
        plain: whether it computes with the learning rate, so that local steps must be those of plain SGD.
        repeats: whether a vector that was sent, and of which nothing came, is part of the next one.
    """

    name: str
    source: str
    needs: Stochastic = "row"
    static: bool = False
    single_step: bool = False
    divisible: bool = True
    vectors: int = 1
    plain: bool = False
    repeats: bool = False

    def accepts(self, kind: Stochastic) -> bool:
        """Return whether matrices of this kind will do."""
        return kind in ("doubly", self.needs)

    @abstractmethod
    def init(self, x: Tensor, space: Space) -> State:
        """Return the state before the first round of models `x`, flat: every name that a later state has."""

    @abstractmethod
    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Do a round's local work; return the state until the reply comes, and what to mix.

        The state may have further names until then. Nothing of `state` is overwritten, but by `local.steps`.

        Raises:
            InvalidConfig: if the algorithm can't work with this learning rate, or so many local steps.
        """

    @abstractmethod
    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Return the state after the round.

        Args:
            state: as `propose` returned it.
            reply: what was mixed, in the shapes of the request.
            local: as `propose` had it.
            space: the layout.
        """

    def missed(self, before: State, state: State, request: Request, local: Local, space: Space) -> State:
        """Return the state after a round in which nothing came, and nothing that was sent counted.

        Unless an algorithm says otherwise, the peer is on its own: its row and its column of the mixing matrix are
        those of the identity, and its request is its reply. So whatever a doubly stochastic matrix keeps is kept.

        Args:
            before: the state before the round, but for what `propose` let `local.steps` overwrite.
            state: as `propose` returned it.
            request: as `propose` returned it.
            local: as `propose` had it.
            space: the layout.
        """
        del before
        return self.apply(state, request, local, space)

    def _verify(self, local: Local, *, divides: bool = False) -> None:
        if self.single_step and local.count != 1:
            raise InvalidConfig(f"{self.name} makes one local step a round, not {local.count}; use k-gt for more")
        if divides and not local.lr > 0.0:
            raise InvalidConfig(f"{self.name} divides by the learning rate, which is {local.lr}; it must be over 0")


def conclude(
    algorithm: Algorithm, before: State, state: State, request: Request, reply: Request, replied: Tensor,
    local: Local, space: Space,
) -> State:  # fmt: skip
    """Return the state after a round in which a reply came for the peers of `replied`, bool [n], and none for others.

    What an algorithm keeps is kept if `reply` was mixed without the others: their rows and columns of the mixing
    matrix are those of the identity.
    """
    applied = algorithm.apply(state, reply, local, space)
    missed = algorithm.missed(before, state, request, local, space)
    return {
        name: torch.where(replied, tensor, missed[name]) if tensor.shape == replied.shape
        else space.where(replied, tensor, missed[name])
        for name, tensor in applied.items()
    }  # fmt: skip


def fraction(name: str, value: float, *, zero: bool = True, one: bool = False) -> None:
    """Refuse an option outside 0 to 1; whether the ends themselves will do is said by `zero` and `one`.

    Raises:
        InvalidConfig: if it lies outside.
    """
    if not (0.0 < value < 1.0 or (zero and value == 0.0) or (one and value == 1.0)):
        low, high = "from 0" if zero else "over 0", "to 1" if one else "to below 1"
        raise InvalidConfig(f"{name} is {value}; it must be {low} {high}")
