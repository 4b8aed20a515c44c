"""The weights of a graph's links that make plain averaging fastest."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.mixing import metropolis_hastings, spectral_gap

MOST_OPTIMISED = 512
"""For so many nodes of degree 4 the fastest weights take 100 s (measured on one core), for 200 nodes 7 s."""


def fastest_weights(graph: nx.Graph, tolerance: float = 1e-4) -> NDArray[np.float64]:
    """Return the symmetric weights of the links, in the order of `graph.edges`, that mix fastest.

    They minimise the spectral norm of W - 11'/n, where W is I less the weighted Laplacian (Xiao and Boyd 2004, "Fast
    linear iterations for distributed averaging", section 5.1), and may be negative. In place of their semidefinite
    program, m times the logarithm of the sum of exp(+-eigenvalue / m) is minimised, m falling to
    tolerance / (4 log 2n): there it exceeds the norm by at most tolerance / 4 (Nesterov 2007, "Smoothing technique and
    its applications in semidefinite optimization").

    Args:
        graph: undirected, connected, on nodes 0 to n-1, n at most `MOST_OPTIMISED`.
        tolerance: how far above the least norm the result may be. What smoothing adds is below it; that the descent
            ends within the rest is measured, on graphs whose optimum is known, and not proven.

    Raises:
        InvalidConfig: there are too many nodes.
    """
    n = len(graph)
    if n > MOST_OPTIMISED:
        raise InvalidConfig(
            f"topology.weights: optimal takes at most {MOST_OPTIMISED} peers, not {n}; take metropolis-hastings"
        )
    ends = np.array(graph.edges, dtype=np.int64)
    matrix = metropolis_hastings(graph)
    weights = matrix[ends[:, 0], ends[:, 1]]
    best, least = weights, 1.0 - spectral_gap(matrix)
    smoothing = last = tolerance / (4 * np.log(2 * n))
    while smoothing < 0.05:
        smoothing *= 4
    while smoothing >= last:
        weights = _descend(_Smoothed(n, ends, smoothing), weights, tolerance / 100)
        norm = _Smoothed(n, ends, last).norm(weights)
        if norm < least:
            best, least = weights, norm
        smoothing /= 4
    return best


@dataclass(frozen=True)
class _Smoothed:
    """A smooth upper bound of the spectral norm of W - 11'/n as a function of the weights of links [links, 2]."""

    n: int
    ends: NDArray[np.int64]
    smoothing: float

    def matrix(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return W - 11'/n, [n, n]."""
        one, other = self.ends.T
        matrix = np.full((self.n, self.n), -1.0 / self.n)
        matrix[one, other] += weights
        matrix[other, one] += weights
        lost = np.bincount(self.ends.ravel(), np.repeat(weights, 2), minlength=self.n)
        matrix[np.diag_indices(self.n)] += 1.0 - lost
        return matrix

    def norm(self, weights: NDArray[np.float64]) -> float:
        """Return the spectral norm itself."""
        return float(np.abs(np.linalg.eigvalsh(self.matrix(weights))).max())

    def __call__(self, weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return the bound, and its gradient [links]."""
        values, vectors = np.linalg.eigh(self.matrix(weights))
        top = float(np.abs(values).max())
        up, down = np.exp((values - top) / self.smoothing), np.exp((-values - top) / self.smoothing)
        total = float(up.sum() + down.sum())
        one, other = self.ends.T
        gradient = -((vectors[one] - vectors[other]) ** 2) @ ((up - down) / total)
        return top + self.smoothing * float(np.log(total)), gradient


def _descend(
    function: Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]],
    start: NDArray[np.float64],
    least_gain: float,
) -> NDArray[np.float64]:
    """Minimise a smooth convex function by L-BFGS (Nocedal and Wright 2006, algorithm 7.4).

    It ends where ten steps together gain less than `least_gain`, or no step gains anything.
    """
    here = start
    value, gradient = function(here)
    pairs: deque[tuple[NDArray[np.float64], NDArray[np.float64]]] = deque(maxlen=20)
    before = deque([np.inf] * 9 + [value], maxlen=10)
    for _ in range(1000):
        direction = -_inverse_hessian(pairs, gradient)
        slope = float(gradient @ direction)
        step = 1.0 if pairs else 0.1 / max(float(np.abs(gradient).max()), 1e-12)
        while step > 1e-10:
            there = here + step * direction
            new, new_gradient = function(there)
            if new <= value + 1e-4 * step * slope:
                break
            step /= 2
        else:
            return here
        moved, turned = there - here, new_gradient - gradient
        if float(moved @ turned) > 1e-12 * float(turned @ turned):
            pairs.append((moved, turned))
        here, value, gradient = there, new, new_gradient
        if before[0] - value < least_gain:
            return here
        before.append(value)
    return here


def _inverse_hessian(
    pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], gradient: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Multiply a gradient by the inverse Hessian that past moves and turns of the gradient make likely."""
    result = gradient.copy()
    factors = []
    for moved, turned in reversed(pairs):
        factor = float(moved @ result) / float(moved @ turned)
        result -= factor * turned
        factors.append(factor)
    if pairs:
        moved, turned = pairs[-1]
        result *= float(moved @ turned) / float(turned @ turned)
    for (moved, turned), factor in zip(pairs, reversed(factors), strict=True):
        result += moved * (factor - float(turned @ result) / float(moved @ turned))
    return result
