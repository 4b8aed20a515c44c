"""Small experiments for the dense engine: matrices, an algorithm, and tasks whose outcome is known."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from p2pfl.learning.space import Request
from p2pfl.learning.task import Data, Examples, Task


@dataclass(frozen=True)
class Matrix:
    """A mixing matrix by rows."""

    indices: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, dense):
        """Take all entries of a dense matrix that are not 0, each row padded by itself with weight 0."""
        n, k = len(dense), int((dense != 0).sum(1).max())
        indices, weights = np.repeat(np.arange(n)[:, None], k, 1), np.zeros((n, k))
        for i, row in enumerate(dense):
            columns = np.flatnonzero(row)
            indices[i, : len(columns)], weights[i, : len(columns)] = columns, row[columns]
        return cls(indices, weights)

    @property
    def dense(self):
        dense = np.zeros((len(self.indices), len(self.indices)))
        np.add.at(dense, (np.arange(len(dense))[:, None], self.indices), self.weights)
        return dense


@dataclass(frozen=True)
class Fixed:
    """A schedule of matrices that repeat."""

    matrices: tuple

    @property
    def period(self):
        return len(self.matrices)

    def at(self, round):
        return self.matrices[round % len(self.matrices)]


def ring(n):
    """Each peer averages with its next and its previous."""
    indices = (np.arange(n)[:, None] + np.array([-1, 0, 1])) % n
    return Matrix(indices, np.full(indices.shape, 1 / 3))


class Dpsgd:
    """Local steps, then mixing (Lian et al. 2017, arXiv 1705.09056, with the steps before the mixing)."""

    def init(self, x, space):
        return {"x": x}

    def propose(self, state, local, space):
        return state, Request((local.steps(state["x"], out=state["x"]).x,))

    def apply(self, state, reply, local, space):
        return {"x": reply.vectors[0]}


class Quadratic(Task):
    """f(x) = |x - b|^2 / 2, where b is the example: its gradient is x - b."""

    def __init__(self, size=3):
        self.size = size

    def model(self):
        class Point(nn.Module):
            def __init__(self, size):
                super().__init__()
                self.x = nn.Parameter(torch.zeros(size))

            def forward(self, inputs):
                return self.x.expand(len(inputs), -1)

        return Point(self.size)

    def data(self, settings):
        examples = Examples(torch.zeros(1, 1), torch.zeros(1, self.size))
        return Data(examples, examples)

    def loss(self, outputs, targets):
        return 0.5 * (outputs - targets).square().sum(1).mean()

    def metrics(self, outputs, targets):
        return {"distance": float((outputs - targets).norm(dim=1).mean())}


class Classes(Task):
    """A classifier of 12 features or of 1 by 6 by 6 images into 5 classes, its data random; the model is given."""

    def __init__(self, make, images=False):
        self.make, self.images = make, images

    def model(self):
        return self.make()

    def data(self, settings):
        generator = torch.Generator().manual_seed(4)
        shape = (1, 6, 6) if self.images else (12,)
        inputs = torch.rand((150, *shape), generator=generator)
        targets = torch.randint(0, 5, (150,), generator=generator)
        return Data(Examples(inputs[:100], targets[:100]), Examples(inputs[100:], targets[100:]))


def mlp(*widths):
    """Make a maker of perceptrons."""
    sides = list(pairwise(widths))

    def make():
        modules = [m for a, b in sides for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*modules[:-1])

    return make


def cnn():
    """A small convolutional network for 1 by 6 by 6 images, with every kind of layer that the stacked tier knows."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False),
        nn.Tanh(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
