"""Mixing along links that go one way: senders divide what they have, and a weight tells how much came together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.learning.algorithms.algorithm import Algorithm, State
from p2pfl.learning.space import Local, Request, Space


@dataclass(frozen=True)
class PushSum(Algorithm):
    """Stochastic gradient push: numerators w x and weights w are mixed alike, and the model is their quotient.

    Columns of the mixing matrices sum to 1: each peer divides its mass among those it sends to, itself among them. So
    the sums of the numerators and of the weights stay what they are, and quotients go to the mean on any strongly
    connected directed graph. Local steps move the numerator as far as they move the model.

    A missed round: the peer keeps its whole mass, which it must not have sent. Mass that was sent and lost is gone from
    the sums: senders have to know what arrived.
    """

    name = "push-sum"
    source = "Assran et al. 2019, arXiv 1811.10792 (SGP); Kempe, Dobra and Gehrke 2003 (push-sum)"
    needs = "column"
    divisible = False

    def init(self, x: Tensor, space: Space) -> State:
        """Start with weights of 1."""
        return {"x": x, "weight": torch.ones(space.n, dtype=x.dtype, device=x.device)}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make the local steps on the models; divide the numerators and the weights."""
        x, weight = state["x"], state["weight"]
        moved = local.steps(x).x - x
        return state, Request((moved.add_(space.scale(x, weight)),), (weight,))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Take the quotients."""
        del state, local
        weight = reply.scalars[0]
        return {"x": space.scale(reply.vectors[0], weight.reciprocal()), "weight": weight}
