"""Overlays and mixing matrices against their closed forms."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import PeerId
from p2pfl.gossip.average import average
from p2pfl.gossip.mixing import consensus_distance, metropolis_hastings, mix, spectral_gap, squared_distance
from p2pfl.gossip.topology import overlay
from tests.pump import ANY_SIZE


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(ANY_SIZE), n=st.integers(2, 40), seed=st.integers(0, 5))
def test_every_overlay_is_connected_and_mixes_without_moving_the_mean(name: str, n: int, seed: int) -> None:
    graph = overlay(name, n, seed)
    assert sorted(graph) == list(range(n))
    assert nx.is_connected(graph)
    assert nx.number_of_selfloops(graph) == 0
    matrix = metropolis_hastings(graph)
    assert (matrix >= -1e-15).all()
    np.testing.assert_allclose(matrix.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    links = {(i, j) for i, j in zip(*np.nonzero(matrix), strict=True) if i != j}
    assert links == {(i, j) for a, b in graph.edges for i, j in ((a, b), (b, a))}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ANY_SIZE), st.lists(st.floats(0.01, 1.0), min_size=2, max_size=24))
def test_unequal_weights_are_kept_by_mixing_and_are_where_it_ends(name: str, alphas: list[float]) -> None:
    graph = overlay(name, len(alphas), 0)
    matrix = metropolis_hastings(graph, alphas)
    assert (matrix >= -1e-15).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    flow = np.array(alphas)[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, atol=1e-12)
    limit = np.linalg.matrix_power(matrix, 1 << 30)
    np.testing.assert_allclose(limit, np.tile(np.array(alphas) / sum(alphas), (len(alphas), 1)), atol=1e-6)


def test_equal_alphas_give_the_symmetric_matrix() -> None:
    graph = overlay("random-regular", 12, 3)
    graph.remove_edge(*next(iter(graph.edges)))
    np.testing.assert_array_equal(metropolis_hastings(graph, [0.7] * 12), metropolis_hastings(graph))


@pytest.mark.parametrize("n", [3, 4, 5, 8, 17])
def test_a_ring_has_the_gap_of_circulant_algebra(n: int) -> None:
    beta = max(abs(1 / 3 + 2 / 3 * np.cos(2 * np.pi * k / n)) for k in range(1, n))
    assert spectral_gap(metropolis_hastings(overlay("ring", n, 0))) == pytest.approx(1 - beta, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 8, 20])
def test_a_complete_graph_averages_at_once(n: int) -> None:
    matrix = metropolis_hastings(overlay("complete", n, 0))
    np.testing.assert_allclose(matrix, 1 / n, atol=1e-15)
    assert spectral_gap(matrix) == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "degree"), [(2, 1), (4, 3), (8, 5), (16, 7), (64, 11)])
def test_the_exponential_graph_links_powers_of_two_both_ways(n: int, degree: int) -> None:
    graph = overlay("exponential", n, 0)
    assert {d for _, d in graph.degree} == {degree}
    offsets = {(j - i) % n for i, j in graph.edges} | {(i - j) % n for i, j in graph.edges}
    assert offsets == {o for k in range(7) if 2**k < n for o in (2**k, n - 2**k)}


def test_equal_seeds_draw_equal_random_graphs() -> None:
    drawn = [sorted(overlay("random-regular", 12, seed).edges) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_no_overlay_can_be_is_refused_in_one_line() -> None:
    with pytest.raises(InvalidConfig, match=r"'star' is unknown; there are groups, exponential, ring"):
        overlay("star", 5, 0)
    with pytest.raises(InvalidConfig, match="at least two members"):
        overlay("ring", 1, 0)


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 200_000])
def test_mixing_in_blocks_is_the_weighted_sum(size: int) -> None:
    draw = np.random.default_rng(1)
    vectors = [draw.standard_normal(size).astype(np.float32) for _ in range(4)]
    before = [vector.copy() for vector in vectors]
    weights = [0.4, 0.3, 0.2, 0.1]
    expected = sum(weight * vector.astype(np.float64) for weight, vector in zip(weights, vectors, strict=True))
    np.testing.assert_allclose(mix(vectors, weights), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(vectors, before)
    exact = float(((vectors[0].astype(np.float64) - vectors[1]) ** 2).sum())
    assert squared_distance(vectors[0], vectors[1]) == pytest.approx(exact, rel=1e-6)


def test_consensus_distance_is_the_mean_squared_distance_to_the_mean() -> None:
    assert consensus_distance(np.array([[0, 0], [2, 0], [4, 0]], np.float32)) == pytest.approx((4 + 0 + 4) / 3)
    assert consensus_distance(np.ones((5, 3), np.float32)) == 0


def test_the_weights_of_who_is_missing_or_not_finite_go_to_oneself() -> None:
    a, b, c = (PeerId(name) for name in "abc")
    own = np.array([1.0, 1.0], np.float32)
    weights = {a: 0.25, b: 0.25, c: 0.25}
    result = average(own, {a: np.array([5.0, 1.0], np.float32), b: np.array([np.inf, 0], np.float32)}, weights)
    assert (result.heard, result.rejected) == ((a,), (b,))
    np.testing.assert_allclose(result.vector, [2.0, 1.0])
    assert result.spread == pytest.approx(16.0)
    alone = average(own, {}, weights)
    np.testing.assert_array_equal(alone.vector, own)
    assert alone.spread == 0


def test_huge_values_are_rejected_before_they_overflow_what_peers_compute_from_them() -> None:
    a, b = PeerId("a"), PeerId("b")
    own = np.zeros(3, np.float32)
    result = average(own, {a: np.full(3, 1e20, np.float32), b: np.full(3, 3e38, np.float32)}, {a: 0.4, b: 0.4})
    assert (result.heard, result.rejected) == ((a,), (b,))
    assert result.spread == pytest.approx(3e40, rel=1e-3)
    assert np.isfinite(result.vector).all()
