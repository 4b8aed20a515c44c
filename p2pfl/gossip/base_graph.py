"""The Base-(k+1) graph: a sequence of sparse rounds after which every peer has the exact average, for every n.

Takezawa et al. 2023, "Beyond Exponential Graph" (arXiv 2305.11420), algorithms 1 to 3. A round is a list of links, each
with a receiver, a sender and a weight; peers without a link keep what they have.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Nodes = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Links:
    """Entries of a mixing matrix, one a place in each array: receivers and senders, int64, and weights, float64."""

    receivers: Nodes
    senders: Nodes
    weights: NDArray[np.float64]


def base_graph(n: int, degree: int) -> list[list[Links]]:
    """Return the rounds of the Base-(degree+1) graph on nodes 0 to n-1 (algorithm 3), [rounds][parts].

    n is cut into p subsets of q, where no factor of q is at most degree + 1: a simple base graph in each subset, then a
    hyper-hypercube across the subsets; or a simple base graph of all nodes where that is shorter.
    """
    nodes = np.arange(n, dtype=np.int64)
    simple = simple_base_graph(nodes, degree)
    rest = n
    for factor in range(2, degree + 2):
        while rest % factor == 0:
            rest //= factor
    if rest in {1, n}:
        return simple
    starts = rest * np.arange(n // rest)[:, None]
    rounds = [
        [
            Links((starts + part.receivers).ravel(), (starts + part.senders).ravel(), np.tile(part.weights, n // rest))
            for part in parts
        ]
        for parts in simple_base_graph(np.arange(rest, dtype=np.int64), degree)
    ]
    rounds += [[average(groups)] for groups in _hypercube(nodes.reshape(n // rest, rest).T, degree)]
    return min(simple, rounds, key=len)


def simple_base_graph(nodes: Nodes, degree: int) -> list[list[Links]]:
    """Return the rounds of the simple Base-(degree+1) graph on `nodes` (algorithm 2).

    Parts of a_l (degree+1)^p_l nodes, as the digits of n say, first average within themselves. Then, part by part, all
    nodes of later parts meet one node in each of this part's a_l blocks, with weights that give the later parts, and
    each block, the mean of all. Last, each block averages within itself.
    """
    if len(nodes) == 1 or _factors(len(nodes), degree + 1) is not None:
        return [[average(groups)] for groups in _hypercube(nodes[None], degree)]
    parts = _parts(nodes, degree + 1)
    first = len(_hypercube(parts[0].reshape(1, -1), degree))
    rounds: list[list[Links]] = [[] for _ in range(first + 1 + len(_hypercube(parts[0], degree)))]
    for part in parts:
        _repeat(rounds, 0, first, part.reshape(1, -1), degree)
    for number, part in enumerate(parts[:-1]):
        rest = np.concatenate([later.ravel() for later in parts[number + 1 :]])
        rounds[first + number] += _exchange(part, rest, degree)
        _repeat(rounds, first + number + 1, len(rounds), part, degree)
    last = parts[-1].reshape(1, -1) if parts[-1].shape[1] == 1 else parts[-1]
    _repeat(rounds, first + len(parts) - 1, len(rounds), last, degree)
    return rounds


def average(groups: Nodes) -> Links:
    """Return the links by which each row of `groups`, [count, size], takes its plain mean."""
    count, size = groups.shape
    receivers = np.repeat(groups, size, axis=1).ravel()
    senders = np.tile(groups, (1, size)).ravel()
    return Links(receivers, senders, np.full(count * size * size, 1.0 / size))


def _exchange(part: Nodes, rest: Nodes, degree: int) -> list[Links]:
    """Link each node of `rest` to one in each block of `part`, [blocks, size]; others of the part average together.

    Those others have all the same value if all is static; the authors let them meet since in training they have not.
    """
    blocks = len(part)
    share = part.size / (part.size + len(rest))
    met = part[:, : len(rest)].ravel()
    meeting = np.tile(rest, blocks)
    weights = np.full(len(met), share / blocks)
    links = [
        Links(met, meeting, weights),
        Links(meeting, met, weights),
        Links(met, met, 1.0 - weights),
        Links(rest, rest, np.full(len(rest), 1.0 - share)),
    ]
    idle = part[:, len(rest) :].ravel()
    full = len(idle) - len(idle) % (degree + 1)
    groups = (idle[:full].reshape(-1, degree + 1), idle[None, full:])
    return links + [average(each) for each in groups if each.size]


def _repeat(rounds: list[list[Links]], start: int, stop: int, blocks: Nodes, degree: int) -> None:
    """Let each row of `blocks` run through its hyper-hypercube, over and over, from round `start` to `stop`."""
    cube = _hypercube(blocks, degree)
    for number in range(start, stop):
        if cube:
            rounds[number].append(average(cube[(number - start) % len(cube)]))


def _hypercube(blocks: Nodes, degree: int) -> list[Nodes]:
    """Return the groups of each round of the hyper-hypercube of each row of `blocks` (algorithm 1), [groups, size].

    Nodes are numbered by digits of mixed radix; in a round those average that differ in one digit only.
    """
    factors = _factors(blocks.shape[1], degree + 1)
    if factors is None:
        raise ValueError(f"{blocks.shape[1]} has a prime factor above {degree + 1}")
    grid = blocks.reshape(len(blocks), *factors)
    return [np.moveaxis(grid, axis, -1).reshape(-1, size) for axis, size in enumerate(factors, 1)]


def _parts(nodes: Nodes, base: int) -> list[Nodes]:
    """Cut nodes by the digits of their number in a base; digit a at place p gives a part [a, base^p], largest first."""
    parts, start = [], 0
    for place in range(_places(len(nodes), base) - 1, -1, -1):
        digit = len(nodes) // base**place % base
        if digit:
            size = digit * base**place
            parts.append(nodes[start : start + size].reshape(digit, -1))
            start += size
    return parts


def _places(number: int, base: int) -> int:
    """Return with how many digits a number is written in a base."""
    places = 0
    while number:
        number, places = number // base, places + 1
    return places


@cache
def _factors(number: int, most: int) -> tuple[int, ...] | None:
    """Return the fewest factors from 2 to `most` whose product is `number`; None if there are none."""
    if number == 1:
        return ()
    found: tuple[int, ...] | None = None
    for factor in range(min(most, number), 1, -1):
        if number % factor == 0:
            rest = _factors(number // factor, most)
            if rest is not None and (found is None or len(rest) + 1 < len(found)):
                found = (factor, *rest)
    return found
