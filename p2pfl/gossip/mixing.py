"""Mixing matrices, and what their spectrum says about the speed of consensus."""

import math
from collections.abc import Collection, Sequence

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from p2pfl.core.machine import Vector
from p2pfl.gossip.topology import gaps

_BLOCK = 1 << 16
"""Values averaged at a time: 256 KiB of float32, which stays in a core's cache."""


def metropolis_hastings(graph: nx.Graph, alphas: Sequence[float] | None = None) -> NDArray[np.float64]:
    """Return the Metropolis-Hastings matrix of `graph`, [n, n]: its rows sum to one, and mixing keeps sum alpha_i x_i.

    w_ij is that of `weight`, the rest of each row on its diagonal. Where all weigh the same it is symmetric, so doubly
    stochastic, and w_ij = 1 / (1 + max(degree_i, degree_j)) (Xiao, Boyd, Kim 2007, "Distributed average consensus with
    least-mean-square deviation", equation 4).

    Args:
        graph: nodes are 0 to n - 1.
        alphas: the nodes' weights; equal ones unless given.
    """
    matrix = np.zeros((len(graph), len(graph)))
    for a, b in graph.edges:
        for i, j in ((a, b), (b, a)):
            matrix[i, j] = weight(graph, i, j) if alphas is None else weight(graph, i, j, alphas[j] / alphas[i])
    np.fill_diagonal(matrix, 1.0 - matrix.sum(axis=1))
    return matrix


def weight(graph: nx.Graph, i: int, j: int, ratio: float = 1.0) -> float:
    """Return with which weight `i` takes in what `j` has: min(1 / (d_i + 1), alpha_j / (alpha_i (d_j + 1))).

    That is Hastings' rule (1970, "Monte Carlo sampling methods using Markov chains and their applications", equation 2)
    for the distribution proportional to alpha, where each proposes itself and its neighbors alike:
    alpha_i w_ij = alpha_j w_ji.

    Args:
        graph: the overlay.
        i: who takes in.
        j: its neighbor.
        ratio: alpha_j / alpha_i.
    """
    return min(1.0 / (1 + int(graph.degree[i])), ratio / (1 + int(graph.degree[j])))


def bypasses(graph: nx.Graph, me: int, dead: Collection[int]) -> dict[int, float]:
    """Return the links by which `me` goes around dead neighbors: to whom, and with which weight.

    The living around each gap (see `p2pfl.gossip.topology.gaps`) form a ring in the order of the roster. A link of it
    weighs half of what the end that lost less has lost to the gap: so it weighs the same at both ends, and no row sums
    to more than before. Where two are left, they are each other's next and previous, and the link counts twice. A
    bypass to somebody who is a neighbor already adds to that link's weight.

    These are for equal weights; for others each is multiplied with min(1, alpha_j / alpha_i), which keeps
    alpha_i w_ij = alpha_j w_ji, and lets no row sum to more.
    """
    links: dict[int, float] = {}
    for part, rim in gaps(graph, me, dead):
        lost = {node: sum(weight(graph, node, gone) for gone in part if gone in graph[node]) for node in rim}
        place = rim.index(me)
        for other in (rim[place - 1], rim[(place + 1) % len(rim)]):
            if other != me:
                links[other] = links.get(other, 0.0) + min(lost[me], lost[other]) / 2
    return links


def spectral_gap(matrix: NDArray[np.float64]) -> float:
    """Return 1 minus the second largest absolute eigenvalue of a mixing matrix [n, n].

    Args:
        matrix: symmetric; or without negative entries and such that p_i w_ij = p_j w_ji for some p, as in plain means
            of neighborhoods: its eigenvalues are those of the symmetric matrix of sqrt(w_ij w_ji).
    """
    if not np.array_equal(matrix, matrix.T):
        matrix = np.sqrt(matrix * matrix.T)
    eigenvalues = np.sort(np.abs(np.linalg.eigvalsh(matrix)))
    return float(1.0 - eigenvalues[-2])


def consensus_rounds(kept: float, to: float = 1e-3) -> int | None:
    """Return after how many rounds of mixing the consensus distance has fallen to the fraction `to` at most.

    Args:
        kept: the largest fraction of the consensus distance that a round leaves: (1 - spectral gap)^2 for a symmetric
            mixing matrix.
        to: the fraction that is wanted, below 1.

    Returns:
        None if a round need not change anything.
    """
    if kept >= 1:
        return None
    # Rounded errors of the eigenvalues leave about 1e-16 where a round averages exactly.
    return 1 if kept <= to else math.ceil(math.log(to) / math.log(kept))


def consensus_distance(vectors: NDArray[np.float32]) -> float:
    """Return the mean squared distance of the rows of `vectors` [peers, parameters] to their mean."""
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)
    return float((centred**2).sum(axis=1).mean())


def squared_distance(left: Vector, right: Vector) -> float:
    """Return the squared L2 distance of two vectors, summed in float64 block by block."""
    total = 0.0
    for start in range(0, len(left), _BLOCK):
        difference = left[start : start + _BLOCK] - right[start : start + _BLOCK]
        # Not a BLAS dot product: its threads would fight for cores with every other peer on the machine.
        total += float(np.square(difference, dtype=np.float64).sum())
    return total


def mix(vectors: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """Return the weighted sum of `vectors` as a fresh vector.

    The sum runs in the given order in float32, in blocks that stay in cache: the same inputs in the same order give
    the same bits on every machine that rounds as IEEE 754 says.
    """
    result = np.empty_like(vectors[0])
    scratch = np.empty(min(_BLOCK, len(result)), np.float32)
    for start in range(0, len(result), _BLOCK):
        block = result[start : start + _BLOCK]
        np.multiply(vectors[0][start : start + _BLOCK], np.float32(weights[0]), out=block)
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            part = scratch[: len(block)]
            np.multiply(vector[start : start + _BLOCK], np.float32(weight), out=part)
            np.add(block, part, out=block)
    return result
