"""Momentum from what a round of everyone did, rather than from one's own gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.algorithms.algorithm import Algorithm, State, fraction
from p2pfl.learning.space import Local, Request, Space


@dataclass(frozen=True)
class QuasiGlobalMomentum(Algorithm):
    """QG-DSGDm: local steps along g + beta m, where m is a running mean of how far each round, mixing included, moved.

    With K local steps of learning rate lr and d = (x before - x after the mixing) / (lr K), m becomes
    mu m + (1 - mu) d. It is the same in all of a round's steps, as in the authors' code.

    A missed round: local steps count, and m stays: it is to hold no peer's steps alone.

    Attributes:
        beta: how much of m enters a step; 0.9, as in the paper.
        mu: the share of m that a round keeps; 0.9, as in the paper, which sets it to beta.
    """

    beta: float = 0.9
    mu: float = 0.9

    name = "qg-dsgdm"
    source = "Lin et al. 2021, arXiv 2102.04761, algorithm 1, without Nesterov's variant"
    plain = True

    def __post_init__(self) -> None:
        fraction("beta", self.beta)
        fraction("mu", self.mu)

    def init(self, x: Tensor, space: Space) -> State:
        """Start without momentum."""
        del space
        return {"x": x, "momentum": torch.zeros_like(x)}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make the local steps; ask for the mean of the models."""
        del space
        self._verify(local, divides=True)
        x = local.steps(state["x"], correction=state["momentum"] * self.beta).x
        return state, Request((x,))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Take the mean, and learn from how far it is."""
        del space
        x = reply.vectors[0]
        share = (1.0 - self.mu) / (local.lr * local.count)
        return {"x": x, "momentum": torch.add(state["momentum"] * self.mu, state["x"] - x, alpha=share)}

    def missed(self, before: State, state: State, request: Request, local: Local, space: Space) -> State:
        """Keep the local steps and the momentum."""
        del before, local, space
        return {"x": request.vectors[0], "momentum": state["momentum"]}


@dataclass(frozen=True)
class DiLoCo(Algorithm):
    """Each round is one step of an outer optimiser: SGD with Nesterov's momentum along d = x - W (x after local steps).

    m becomes beta m + d, and x becomes x - lr (d + beta m). With an outer learning rate of 1 and without momentum x
    becomes the mean of the models: FedAvg. The paper's average is exact, and its inner optimiser AdamW; here d is what
    a peer's neighbors give, each peer has an m of its own, and the inner optimiser is SGD.

    A missed round: no outer step is made, m stays, and the peer goes on from where its local steps led, as in the
    paper's experiment on dropped communication.

    Attributes:
        lr: the outer learning rate; 0.7, as in the paper.
        beta: the share of m that a round keeps; 0.9, as in the paper.
    """

    lr: float = 0.7
    beta: float = 0.9

    name = "diloco"
    source = "Douillard et al. 2023, arXiv 2311.08105"

    def __post_init__(self) -> None:
        fraction("beta", self.beta)
        if not 0.0 < self.lr < float("inf"):
            raise InvalidConfig(f"the outer lr is {self.lr}; it must be over 0")

    def init(self, x: Tensor, space: Space) -> State:
        """Start without momentum."""
        del space
        return {"x": x, "momentum": torch.zeros_like(x)}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make the local steps; ask for the mean of the models."""
        del space
        return state, Request((local.steps(state["x"]).x,))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Make the outer step."""
        del local, space
        x = state["x"]
        outer = x - reply.vectors[0]
        momentum = torch.add(outer, state["momentum"], alpha=self.beta)
        return {"x": torch.sub(x, outer.add_(momentum, alpha=self.beta), alpha=self.lr), "momentum": momentum}

    def missed(self, before: State, state: State, request: Request, local: Local, space: Space) -> State:
        """Keep the local steps and the momentum."""
        del before, local, space
        return {"x": request.vectors[0], "momentum": state["momentum"]}
