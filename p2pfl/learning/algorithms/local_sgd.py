"""Local steps, then mixing: the plain algorithm, and the one that pulls local steps back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.algorithms.algorithm import Algorithm, State, fraction
from p2pfl.learning.space import Local, Request, Space


@dataclass(frozen=True)
class LocalSgd(Algorithm):
    """x becomes W (x after the local steps).

    One step a round is D-PSGD, its step before its mixing; more are local SGD, and with exact averages FedAvg; with
    momentum it is DFedAvgM. On the random graphs of EL-Oracle or EL-Local this is epidemic learning (de Vos et al.
    2023, arXiv 2310.01972), which has no other rule.

    Unequal peers shift where it comes to rest: for f_i = |x - b_i|^2 / 2 and one step a round of learning rate g to
    [I - (1 - g) W]^-1 g W b, whose mean is exact and which differs from it by more the larger g is.

    A missed round: local steps count, and momentum stays.

    Attributes:
        beta: the share of the momentum that a step keeps; 0, plain SGD, as in D-PSGD.
        nesterov: whether the gradient looks ahead; not, as in DFedAvgM.
        restart: whether each round starts without momentum, as in DFedAvgM; otherwise it outlives rounds, as in the
            DSGDm that Lin et al. (2021, arXiv 2102.04761) compare with.
    """

    beta: float = 0.0
    nesterov: bool = False
    restart: bool = False

    name = "local-sgd"
    source = (
        "Lian et al. 2017, arXiv 1705.09056 (D-PSGD); Stich 2018, arXiv 1805.09767 (local SGD); "
        "Sun, Li and Wang 2021, arXiv 2104.11375 (DFedAvgM)"
    )

    def __post_init__(self) -> None:
        fraction("beta", self.beta)
        object.__setattr__(self, "plain", self.beta > 0.0)

    def init(self, x: Tensor, space: Space) -> State:
        """Start without momentum."""
        del space
        return {"x": x, "momentum": torch.zeros_like(x)} if self._keeps else {"x": x}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make the local steps; ask for the mean of the models."""
        del space
        x = state["x"]
        momentum = (state["momentum"] if self._keeps else torch.zeros_like(x)) if self.beta else None
        steps = local.steps(x, momentum=momentum, beta=self.beta, nesterov=self.nesterov, out=x)
        after = {"x": steps.x}
        if self._keeps and steps.momentum is not None:
            after["momentum"] = steps.momentum
        return after, Request((steps.x,))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Take the mean."""
        del local, space
        return {**state, "x": reply.vectors[0]}

    @property
    def _keeps(self) -> bool:
        return self.beta > 0.0 and not self.restart


@dataclass(frozen=True)
class FedProx(Algorithm):
    """Local steps on f_i(x) + mu / 2 |x - x_0|^2, where x_0 is the model that the round began with; then mixing.

    The larger mu, the less local steps drift from x_0, and the less far they come.

    A missed round: local steps count, and the next ones are pulled to where they led.

    Attributes:
        mu: the strength of the pull; 0.01, a guess among the values that the paper tried: 0.001, 0.01, 0.1 and 1.
    """

    mu: float = 0.01

    name = "fedprox"
    source = "Li et al. 2020, arXiv 1812.06127, with mixing in place of the server's average"

    def __post_init__(self) -> None:
        if not 0.0 <= self.mu < float("inf"):
            raise InvalidConfig(f"mu is {self.mu}; it must be 0 or more")

    def init(self, x: Tensor, space: Space) -> State:
        """Start with the models alone."""
        del space
        return {"x": x}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make the local steps; ask for the mean of the models."""
        del space
        x = local.steps(state["x"], prox=self.mu, anchor=state["x"]).x
        return {"x": x}, Request((x,))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Take the mean."""
        del state, local, space
        return {"x": reply.vectors[0]}
