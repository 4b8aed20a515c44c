"""Algorithms that come to rest at the optimum of all peers' losses together, however unequal the peers are.

Each keeps a correction of its gradients whose sum over the peers is 0 (or a tracker whose sum is that of the
gradients), as long as the mixing matrices are doubly stochastic. A peer that began anew by itself would leave the
others' sum off for good; so a missed round keeps it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.learning.algorithms.algorithm import Algorithm, State
from p2pfl.learning.space import Local, Request, Space


@dataclass(frozen=True)
class GradientTracking(Algorithm):
    """Steps along y, which tracks the mean of all peers' gradients: y becomes W y + (new gradient - last gradient).

    The mean of y is that of the gradients in every round. Two vectors are mixed.

    A missed round: a step along one's own y, and y stays as it is.

    Attributes:
        step_first: whether x becomes W (x - lr y), as in DSGT, or W x - lr y, as in DIGing; the former, a guess: it
            bears larger learning rates.
    """

    step_first: bool = True

    name = "gradient-tracking"
    source = "Pu and Nedić 2018, arXiv 1805.11454 (DSGT); Nedić, Olshevsky and Shi 2017, arXiv 1607.03218 (DIGing)"
    needs = "doubly"
    single_step = True
    vectors = 2
    plain = True
    repeats = True

    def init(self, x: Tensor, space: Space) -> State:
        """Start with y = 0 and a last gradient of 0, so that the first y is the first gradient."""
        del space
        return {"x": x, "y": torch.zeros_like(x), "gradient": torch.zeros_like(x)}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Renew y by the gradient at x; ask for the means of x and y."""
        del space
        self._verify(local)
        x = state["x"]
        gradient = local.gradient(x)
        y = (state["y"] + gradient).sub_(state["gradient"])
        moved = torch.sub(x, y, alpha=local.lr) if self.step_first else x
        return {"x": x, "y": y, "gradient": gradient}, Request((moved, y))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Take the means."""
        del space
        x, y = reply.vectors
        if not self.step_first:
            x = torch.sub(x, state["y"], alpha=local.lr)
        return {**state, "x": x, "y": y}


@dataclass(frozen=True)
class KGradientTracking(Algorithm):
    """K-GT: SCAFFOLD for graphs without a server. Local steps along gradient + c, and c is renewed once a round.

    With z = (x before - x after the local steps) / (lr K), the mean step, x becomes W (x after the local steps) and c
    becomes c - z + W z; c sums to 0 over the peers. Two vectors are mixed. If W averages exactly, this is SCAFFOLD with
    all clients in every round, its option II and a server's learning rate of 1 (Karimireddy et al. 2020, arXiv
    1910.06378), where c is the difference of the server's control variate and the client's.

    A missed round: local steps count, and c stays.
    """

    name = "k-gt"
    source = "Liu, Lin, Koloskova and Stich 2023, arXiv 2301.01313, algorithm 1 with a communication step size of 1"
    needs = "doubly"
    vectors = 2
    plain = True

    def init(self, x: Tensor, space: Space) -> State:
        """Start with c = 0: the paper's difference from the mean gradient would take a round of its own."""
        del space
        return {"x": x, "correction": torch.zeros_like(x)}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make the local steps; ask for the means of the models and of the steps."""
        del space
        self._verify(local, divides=True)
        x = local.steps(state["x"], correction=state["correction"]).x
        step = (state["x"] - x).div_(local.lr * local.count)
        return {**state, "step": step}, Request((x, step))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Take the mean of the models; correct by how the mean step differs from one's own."""
        del local, space
        x, step = reply.vectors
        return {"x": x, "correction": (state["correction"] - state["step"]).add_(step)}


@dataclass(frozen=True)
class D2(Algorithm):
    """D2: x becomes W (x - lr g + c), where c is how the last round's mixing differed from the last plain step.

    That is W (2 x_t - x_{t-1} - lr g_t + lr g_{t-1}), in a form that also holds when the learning rate changes; c sums
    to 0 over the peers. W is symmetric and the same in all rounds, and its least eigenvalue is to be at least -1/3, or
    differences between peers grow without bound; exact diffusion averages W with the identity, and takes any W.

    In float32, c gathers the rounding of every mixing, and the models stray as it grows: by 7e-4 in 4000 rounds at a
    learning rate of 0.02 on a ring of 16, where k-gt and gradient tracking stayed within 1e-6. k-gt with one local step
    does without it.

    A missed round: local steps count, and c stays. To begin anew with c = 0, as in the first round, is sound only where
    all peers do at once.

    Attributes:
        lazy: whether (W + I) / 2 mixes, as in exact diffusion; not, as in D2, which mixes faster where it can be used.
    """

    lazy: bool = False

    name = "d2"
    source = "Tang et al. 2018, arXiv 1803.07068 (D2); Yuan et al. 2017, arXiv 1702.05122 (exact diffusion)"
    needs = "doubly"
    static = True
    single_step = True
    plain = True

    def init(self, x: Tensor, space: Space) -> State:
        """Start with c = 0: the first round is one of D-PSGD."""
        del space
        return {"x": x, "correction": torch.zeros_like(x)}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make a step, and correct it; ask for the mean."""
        del space
        self._verify(local)
        stepped = torch.sub(state["x"], local.gradient(state["x"]), alpha=local.lr)
        return {**state, "stepped": stepped}, Request((stepped + state["correction"],))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Take the mean, and keep how it differs from the step."""
        del local, space
        x, stepped = reply.vectors[0], state["stepped"]
        if self.lazy:
            x = torch.lerp(stepped + state["correction"], x, 0.5)
        return {"x": x, "correction": x - stepped}
