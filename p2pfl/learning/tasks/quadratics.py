"""Quadratics whose common optimum is known: what an algorithm comes to rest at can be compared with it exactly.

Peer i has f_i(x) = 1/2 sum_j c_ij (x_j - b_ij)^2, with curvatures c_i and an optimum b_i of its own; the optimum of all
is x_j = sum_i c_ij b_ij / sum_i c_ij. For scenarios: deal with `partition = "order"` to as many peers as `peers` says.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.made import numbers
from p2pfl.learning.task import Data, Examples, Task

SIZE = 10
"""Of x: a guess that is enough for several curvatures."""
EACH = 16
"""A peer's examples, the same optimum with noise: a guess, as many as a usual minibatch."""
SETTINGS = {"peers": 16.0, "spread": 1.0, "condition": 10.0, "noise": 0.0, "seed": 0.0}
"""How many peers; the standard deviation of their optima; the largest curvature, which is 1, over the least, drawn
log-uniformly; the standard deviation of the examples' optima; and what all is drawn from. The defaults are guesses."""


class Scaled(nn.Module):
    """x, times inputs of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(SIZE))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [n, SIZE]."""
        return inputs * self.x


class Quadratics(Task):
    """Where the sum of all peers' quadratics is least: inputs are sqrt(c), targets sqrt(c) b."""

    def model(self) -> nn.Module:
        """Make x = 0."""
        return Scaled()

    def data(self, settings: Mapping[str, object]) -> Data:
        """Give all peers' examples, one peer's after another's, and the optimum as the held-out example.

        Raises:
            InvalidConfig: a setting is unknown or out of range.
        """
        peers, spread, condition, noise, seed = numbers(settings, SETTINGS)
        if peers < 1 or peers != int(peers) or min(spread, noise, seed) < 0 or condition < 1:
            raise InvalidConfig("[data] needs peers and condition from 1 on, and spread, noise and seed from 0 on")
        random, shape = np.random.RandomState(int(seed)), (int(peers), 1, SIZE)
        b = spread * random.standard_normal(shape)
        c = condition ** -random.random_sample(shape)
        drawn = noise * random.standard_normal((int(peers), EACH, SIZE))
        # Centred, so that noise moves nobody's optimum.
        each = b + drawn - drawn.mean(1, keepdims=True)
        roots = np.broadcast_to(np.sqrt(c), each.shape).reshape(-1, SIZE)
        optimum = (c * b).sum(0) / c.sum(0)
        return Data(
            Examples(_tensor(roots), _tensor(roots * each.reshape(-1, SIZE))),
            Examples(torch.ones(1, SIZE), _tensor(optimum)),
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give the mean of the quadratics."""
        return 0.5 * (outputs - targets).square().sum(1).mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Measure the distance to the optimum of all."""
        return {"distance": float((outputs - targets).norm(dim=1).mean())}

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make SGD at 0.1, a guess: with curvatures of 1 at most, it has to be below 2."""
        return torch.optim.SGD(parameters, lr=0.1)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)
