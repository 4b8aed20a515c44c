"""Averaging in pairs whenever one is ready, while the other's local steps go on."""

from dataclasses import dataclass

from torch import Tensor

from p2pfl.learning.algorithms.algorithm import Algorithm, State
from p2pfl.learning.space import Local, Request, Space


@dataclass(frozen=True)
class AdPsgd(Algorithm):
    """Local steps from a copy of x; then x is averaged with one random neighbor's, and moves as far as the copy did.

    There are no rounds: both of a pair take their mean at once, and the neighbor's own steps, which go on from the copy
    that they began with, are late by as many averagings as befell it meanwhile. The paper makes one step at a time.

    A missed round: nobody to average with; local steps count.
    """

    name = "ad-psgd"
    source = "Lian et al. 2018, arXiv 1710.06952, algorithm 1"
    needs = "doubly"
    divisible = False

    def init(self, x: Tensor, space: Space) -> State:
        """Start with the models alone."""
        del space
        return {"x": x}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make the local steps on a copy; ask for the mean of the models without them."""
        del space
        moved = local.steps(state["x"]).x.sub_(state["x"])
        return {**state, "moved": moved}, Request((state["x"],))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Take the mean, and move as the copy did."""
        del local, space
        return {"x": reply.vectors[0] + state["moved"]}
