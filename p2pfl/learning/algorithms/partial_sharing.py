"""Some of a model's tensors are mixed, and the others are each peer's own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.algorithms.algorithm import Algorithm, State
from p2pfl.learning.space import Local, Request, Space


@dataclass(frozen=True)
class PartialSharing(Algorithm):
    """Any algorithm whose personal tensors never leave their peer: a common backbone, personal heads.

    Personal numbers are 0 in requests. In replies each peer's own stand in for them: to the inner algorithm, the peer
    was on its own there. All tensors are trained together in the local steps, as in FedPer and FedSim.

    A missed round: what the inner algorithm makes of it.

    Attributes:
        inner: any divisible algorithm: not push-sum, whose weight belongs to all of the model, nor choco-sgd, which
            compresses all of it, nor ad-psgd, whose engine averages all of it.
        personal: which tensors of the model stay: names as its `state_dict` has them, or what a name begins with up to
            a dot ("head" stands for "head.weight" and "head.bias").

    Raises:
        InvalidConfig: if the inner algorithm is not divisible.
    """

    inner: Algorithm
    personal: tuple[str, ...]

    name = "partial-sharing"
    source = "Arivazhagan et al. 2019, arXiv 1912.00818 (FedPer); Pillutla et al. 2022, arXiv 2204.03809 (FedSim)"
    divisible = False

    def __post_init__(self) -> None:
        if not self.inner.divisible:
            raise InvalidConfig(f"{self.inner.name} mixes whole models; take another algorithm to share a part of one")
        for trait in ("needs", "static", "single_step", "vectors", "plain", "repeats"):
            object.__setattr__(self, trait, getattr(self.inner, trait))

    def init(self, x: Tensor, space: Space) -> State:
        """Start as the inner algorithm does.

        Raises:
            InvalidConfig: if a personal tensor is not in the model, or none is left to share.
        """
        for name in self.personal:
            if not any(_within(block.name, name) for block in space.blocks):
                names = ", ".join(block.name for block in space.blocks)
                raise InvalidConfig(f"personal: the model has no tensor {name!r}; it has {names}")
        if all(self._stays(space)):
            raise InvalidConfig("personal: all of the model stays; leave something to share")
        return self.inner.init(x, space)

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Do the inner algorithm's work; ask for the mean of what is shared."""
        state, request = self.inner.propose(state, local, space)
        own = {f"own.{place}": vector for place, vector in enumerate(request.vectors)}
        shared = tuple(self._joined(vector, torch.zeros_like(vector), space) for vector in request.vectors)
        return {**state, **own}, Request(shared, request.scalars)

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Let the inner algorithm have the means of what is shared, and one's own numbers elsewhere."""
        inner, own = _parted(state)
        vectors = [self._joined(vector, mine, space) for vector, mine in zip(reply.vectors, own, strict=True)]
        return self.inner.apply(inner, Request(tuple(vectors), reply.scalars), local, space)

    def missed(self, before: State, state: State, request: Request, local: Local, space: Space) -> State:
        """Let the inner algorithm say."""
        inner, own = _parted(state)
        return self.inner.missed(before, inner, Request(own, request.scalars), local, space)

    def stays(self, tensor: str) -> bool:
        """Return whether a tensor of the model is personal."""
        return any(_within(tensor, name) for name in self.personal)

    def _stays(self, space: Space) -> list[bool]:
        return [self.stays(block.name) for block in space.blocks]

    def _joined(self, shared: Tensor, own: Tensor, space: Space) -> Tensor:
        """Return a new flat tensor: personal blocks from `own`, the others from `shared`."""
        result = torch.empty_like(own)
        views = zip(self._stays(space), space.views(shared), space.views(own), space.views(result), strict=True)
        for stays, theirs, mine, target in views:
            target.copy_(mine if stays else theirs)
        return result


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _parted(state: State) -> tuple[State, tuple[Tensor, ...]]:
    """Return the inner algorithm's state, and the vectors it asked to have mixed."""
    own = tuple(tensor for name, tensor in state.items() if name.startswith("own."))
    return {name: tensor for name, tensor in state.items() if not name.startswith("own.")}, own
