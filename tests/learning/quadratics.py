"""Peers with quadratic losses, whose optimum is known, and rounds of any algorithm over them; float64."""

from dataclasses import dataclass

import numpy as np
import torch

from p2pfl.learning.algorithms import conclude
from p2pfl.learning.space import Block, Request, Space, Steps

BLOCKS = (Block("body.weight", (2, 2), (3, 4), swapped=True), Block("head.weight", (1, 2), (1, 2)))
"""Six numbers of a peer; the first block is stored transposed and padded."""
SIZE = 6


def space_of(n):
    return Space(n, BLOCKS, torch.float64)


@dataclass(frozen=True)
class Quadratics:
    """f_i(x) = sum_k a_ik (x_k - b_ik)^2 / 2, with a and b float64 [n, 6]."""

    a: torch.Tensor
    b: torch.Tensor

    @classmethod
    def drawn(cls, n, seed=0, least=1.0, most=1.0):
        """Optima from a normal distribution, curvatures from `least` to `most`."""
        generator = torch.Generator().manual_seed(seed)
        a = least + (most - least) * torch.rand(n, SIZE, generator=generator, dtype=torch.float64)
        return cls(a, torch.randn(n, SIZE, generator=generator, dtype=torch.float64))

    @property
    def optimum(self):
        return (self.a * self.b).sum(0) / self.a.sum(0)

    def gradients(self, rows):
        return self.a * (rows - self.b)


class Local:
    """Local work with exact gradients; `out` is not used, so that nothing is overwritten but momentum."""

    def __init__(self, problem, space, lr, count=1):
        self.space, self.lr, self.count = space, lr, count
        self.a, self.b = space.from_rows(problem.a), space.from_rows(problem.b)

    def gradient(self, x):
        return self.a * (x - self.b)

    def steps(
        self, x, *, correction=None, prox=0.0, anchor=None, momentum=None, beta=0.0, nesterov=False, out=None
    ):  # fmt: skip
        for _ in range(self.count):
            g = self.gradient(x)
            if correction is not None:
                g = g + correction
            if prox:
                g = g + prox * (x - anchor)
            if momentum is not None:
                momentum.mul_(beta).add_(g)
                g = g + beta * momentum if nesterov else momentum
            x = x - self.lr * g
        return Steps(x, torch.zeros(self.space.n, dtype=torch.float64), momentum)


def mixed(request, matrix, space):
    """What a doubly, row or column stochastic matrix makes of a request."""

    def mix(flat):
        return torch.cat([(matrix @ view.reshape(space.n, -1)).reshape(-1) for view in space.views(flat)])

    return Request(tuple(map(mix, request.vectors)), tuple(matrix @ scalar for scalar in request.scalars))


def play(algorithm, problem, matrix, rounds, lr, count=1, state=None, replied=None, watch=None):
    """Run rounds; return the models, rows [n, 6], and the last state.

    Args:
        matrix: float64 [n, n], or from a round to one.
        state: to go on from; otherwise models of 0.
        replied: from a round to who gets a reply, bool [n]; the matrix then leaves the others out.
        watch: called each round with the state before, the state until the reply, the request and the state after.
    """
    space = space_of(len(problem.a))
    local = Local(problem, space, lr, count)
    if state is None:
        state = algorithm.init(space.zeros(), space)
    for round in range(rounds):
        before = state
        proposed, request = algorithm.propose(before, local, space)
        now = matrix(round) if callable(matrix) else matrix
        if replied is None:
            state = algorithm.apply(proposed, mixed(request, now, space), local, space)
        else:
            there = replied(round)
            reply = mixed(request, without(now, there), space)
            state = conclude(algorithm, before, proposed, request, reply, there, local, space)
        if watch is not None:
            watch(before, proposed, request, state)
    return space.rows(state["x"]), state


def circulant(n, own, side):
    eye = torch.eye(n, dtype=torch.float64)
    return own * eye + side * (eye.roll(1, 0) + eye.roll(-1, 0))


def ring(n):
    """Weights of 1/3; the least eigenvalue is -1/3 for even n."""
    return circulant(n, 1 / 3, 1 / 3)


def complete(n):
    return torch.full((n, n), 1 / n, dtype=torch.float64)


def without(matrix, there):
    """Leave peers out of a symmetric matrix: what their neighbors gave them, those keep."""
    kept = matrix * (there[:, None] & there[None, :])
    return kept + torch.diag(1.0 - kept.sum(1))


def seldom(n, share, seed=0):
    """In each round, each peer misses with probability `share`."""
    return lambda round: torch.from_numpy(np.random.default_rng([seed, round]).random(n) >= share)
