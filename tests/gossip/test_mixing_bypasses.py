"""The overlay with dead peers in it: what is left of it holds together, and still averages without a bias."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.gossip.mixing import bypasses, metropolis_hastings, spectral_gap, weight
from p2pfl.gossip.topology import around, gaps, overlay


@st.composite
def broken(draw: st.DrawFn) -> tuple[nx.Graph, frozenset[int]]:
    """A connected graph, and who of it is dead; at least one lives."""
    n = draw(st.integers(2, 24))
    kind = draw(st.sampled_from(["ring", "exponential", "complete", "random-regular", "path", "star", "tree"]))
    seed = draw(st.integers(0, 1000))
    match kind:
        case "path":
            graph = nx.path_graph(n)
        case "star":
            graph = nx.star_graph(n - 1)
        case "tree":
            graph = nx.random_labeled_tree(n, seed=seed)
        case _:
            graph = overlay(kind, n, seed)
    dead = draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    return graph, frozenset(dead)


def repaired(graph: nx.Graph, dead: frozenset[int]) -> np.ndarray:
    """The mixing matrix of the living, in their order."""
    living = [node for node in graph if node not in dead]
    matrix = np.zeros((len(living), len(living)))
    for i, node in enumerate(living):
        links = {other: weight(graph, node, other) for other in graph[node] if other not in dead}
        for other, added in bypasses(graph, node, dead).items():
            links[other] = links.get(other, 0.0) + added
        for other, value in links.items():
            matrix[i, living.index(other)] = value
        matrix[i, i] = 1.0 - sum(links.values())
    return matrix


@settings(deadline=None)
@given(broken())
def test_the_living_are_connected_and_weigh_each_other_alike(case: tuple[nx.Graph, frozenset[int]]) -> None:
    graph, dead = case
    matrix = repaired(graph, dead)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0, atol=1e-12)
    assert matrix.min() >= -1e-12
    assert matrix.diagonal().min() > 0
    assert nx.is_connected(nx.from_numpy_array(matrix > 1e-9))
    if len(matrix) > 1:
        assert spectral_gap(matrix) > 0


@settings(deadline=None)
@given(broken())
def test_nobody_dead_is_anybodys_neighbor_and_without_the_dead_nothing_changes(
    case: tuple[nx.Graph, frozenset[int]],
) -> None:
    graph, dead = case
    for node in set(graph) - dead:
        links = bypasses(graph, node, dead)
        assert not dead & set(links)
        assert node not in links
        assert not bypasses(graph, node, frozenset())
        lost = sum(weight(graph, node, gone) for gone in graph[node] if gone in dead)
        assert sum(links.values()) <= lost + 1e-12
    np.testing.assert_allclose(repaired(graph, frozenset()), metropolis_hastings(graph), atol=1e-15)


@pytest.mark.parametrize("dead", [{1}, {1, 5}, {1, 2, 3}])
def test_a_ring_with_dead_peers_is_a_smaller_ring(dead: set[int]) -> None:
    graph = overlay("ring", 8, 0)
    matrix = repaired(graph, frozenset(dead))
    links = nx.from_numpy_array((matrix - np.diag(matrix.diagonal())) > 0)
    assert sorted(degree for _, degree in links.degree) == [2] * (8 - len(dead))
    np.testing.assert_allclose(matrix[matrix > 0], 1 / 3)


def test_a_gap_is_the_dead_in_a_row_and_those_around_it() -> None:
    ring = overlay("ring", 10, 0)
    assert gaps(ring, 0, {1, 2, 6}) == [((1, 2), (0, 3))]
    assert gaps(ring, 5, {1, 2, 6}) == [((6,), (5, 7))]
    assert gaps(ring, 9, {1, 2, 6}) == []
    assert around((0, 3, 4, 7, 9), 7) == [9, 4, 0, 3]
