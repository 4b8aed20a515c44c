"""Schedules: which sums stay 1, that draws repeat, and what is refused."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round as Number
from p2pfl.gossip.fastest import MOST_OPTIMISED, fastest_weights
from p2pfl.gossip.graphs import GRAPHS
from p2pfl.gossip.grouping import groups, stars
from p2pfl.gossip.mixing import metropolis_hastings, spectral_gap
from p2pfl.gossip.schedule import SCHEDULES, Round, Schedule, dense, describe, from_matrix, of_graph, schedule

NAMES = sorted(set(SCHEDULES) - {"graph"})
WHOLE = {"doubly": (0, 1), "row": (1,), "column": (0,)}
"""Along which axes a matrix of each kind sums to 1."""


def made(name: str, n: int, seed: int, **options: object) -> Schedule:
    """Return the schedule, or let Hypothesis try another n."""
    try:
        return schedule(name, n, seed, **options)
    except InvalidConfig:
        assume(False)
        raise


def is_one(matrix: np.ndarray, axis: int) -> None:
    np.testing.assert_allclose(matrix.sum(axis=axis), 1, rtol=0, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES), n=st.one_of(st.integers(2, 40), st.sampled_from([16, 25, 32])), seed=st.integers(0, 9)
)
def test_every_schedule_keeps_the_sums_that_it_says(name: str, n: int, seed: int) -> None:
    plan = made(name, n, seed)
    for number in range(min(plan.period or 4, 12)):
        round = plan.at(number)
        assert round.indices.dtype == np.int64
        assert round.weights.dtype == np.float64
        assert round.indices.shape == round.weights.shape == (n, round.indices.shape[1])
        matrix = dense(round)
        assert (matrix >= -1e-15).all()
        for axis in WHOLE[plan.kind]:
            is_one(matrix, axis)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(NAMES), n=st.integers(2, 32), seed=st.integers(0, 5))
def test_rows_name_each_peer_once_and_are_padded_with_their_own(name: str, n: int, seed: int) -> None:
    round = made(name, n, seed).at(3)
    own = np.arange(n)[:, None]
    assert (round.indices[round.weights == 0] == np.broadcast_to(own, round.indices.shape)[round.weights == 0]).all()
    for indices, weights in zip(round.indices, round.weights, strict=True):
        used = indices[weights != 0]
        assert (np.diff(used) > 0).all()


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), n=st.integers(3, 32), seed=st.integers(0, 5))
def test_a_round_is_a_function_of_name_seed_and_number(name: str, n: int, seed: int) -> None:
    plan, again = made(name, n, seed), made(name, n, seed)
    later = plan.at(7)
    for number in (0, 7):
        np.testing.assert_array_equal(dense(plan.at(number)), dense(again.at(number)))
    np.testing.assert_array_equal(plan.at(7).indices, later.indices)
    if plan.period is not None:
        np.testing.assert_array_equal(dense(plan.at(7)), dense(plan.at(7 + plan.period)))


@pytest.mark.parametrize(
    "name", ["el-oracle", "el-local", "random-push", "random-matching", "groups", "stars", "one-peer-exponential"]
)
def test_what_is_drawn_differs_between_rounds_and_seeds(name: str) -> None:
    options = {"order": "shuffled"} if name == "one-peer-exponential" else {}
    plan, other = schedule(name, 64, 1, **options), schedule(name, 64, 2, **options)
    assert plan.period is None
    assert len({plan.at(number).indices.tobytes() for number in range(6)}) == 6
    assert any((dense(plan.at(number)) != dense(other.at(number))).any() for number in range(6))


def test_seeds_change_the_cells_of_a_grid_that_is_not_full() -> None:
    first, other = (schedule("moshpit", 20, seed, side=5) for seed in (1, 2))
    assert (dense(first.at(0)) != dense(other.at(0))).any()


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_rows_and_matrix_say_the_same(n: int) -> None:
    matrix = np.random.default_rng(n).normal(size=(n, n)) * (np.random.default_rng(n + 1).random((n, n)) < 0.4)
    matrix[0, 0] = 1.0
    matrix[-1] = 0.0
    np.testing.assert_array_equal(dense(from_matrix(matrix)), matrix)


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_static_graphs_have_the_weights_of_the_mixing_matrix(name: str) -> None:
    plan = schedule(name, 16, 3)
    assert plan.graph is not None
    assert plan.period == 1
    np.testing.assert_allclose(dense(plan.at(5)), metropolis_hastings(GRAPHS[name](16, 3)), rtol=0, atol=1e-15)
    assert describe(name)


@pytest.mark.parametrize("weights", ["metropolis-hastings", "max-degree", "uniform", "optimal"])
@pytest.mark.parametrize("name", ["star", "path", "ring", "barabasi-albert", "complete"])
def test_weights_are_what_they_say(name: str, weights: str) -> None:
    n = 9
    plan = schedule(name, n, 0, weights=weights)
    graph, matrix = plan.graph, dense(plan.at(0))
    assert graph is not None
    for axis in WHOLE[plan.kind]:
        is_one(matrix, axis)
    regular = name in {"ring", "complete"}
    assert plan.kind == ("row" if weights == "uniform" and not regular else "doubly")
    most = max(degree for _, degree in graph.degree)
    for i, j in [*graph.edges, *((j, i) for i, j in graph.edges)]:
        if weights == "max-degree":
            assert matrix[i, j] == pytest.approx(1 / (1 + most))
        elif weights == "uniform":
            assert matrix[i, j] == pytest.approx(1 / (1 + graph.degree[i]))
        elif weights == "metropolis-hastings":
            assert matrix[i, j] == pytest.approx(1 / (1 + max(graph.degree[i], graph.degree[j])))
    off = {(i, j) for i, j in zip(*np.nonzero(np.abs(matrix) > 1e-12), strict=True) if i != j}
    assert off <= {*graph.edges, *((j, i) for i, j in graph.edges)}


@pytest.mark.parametrize(("name", "n"), [("ring", 16), ("star", 20), ("hypercube", 16), ("torus", 25), ("complete", 8)])
def test_optimal_weights_reach_the_known_optimum_of_edge_transitive_graphs(name: str, n: int) -> None:
    """All links are alike, so one weight is best: the spectral norm is (l_n - l_2) / (l_n + l_2) of the Laplacian."""
    graph = GRAPHS[name](n, 0)
    laplacian = np.sort(np.linalg.eigvalsh(nx.laplacian_matrix(graph).toarray().astype(float)))
    matrix = dense(of_graph(graph, "optimal")[0])
    expected = (laplacian[-1] - laplacian[1]) / (laplacian[-1] + laplacian[1])
    assert 1 - spectral_gap(matrix) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["erdos-renyi", "barabasi-albert", "watts-strogatz", "path", "clusters"])
def test_no_small_change_beats_optimal_weights(name: str) -> None:
    """The norm is convex in the weights, so what no step improves is the optimum; better than any rule of thumb too."""
    graph = GRAPHS[name](24, 2)
    ends, best = list(graph.edges), fastest_weights(graph)

    def norm(weights: np.ndarray) -> float:
        laplacian = np.zeros((24, 24))
        for (i, j), weight in zip(ends, weights, strict=True):
            laplacian[[i, j], [i, j]] += weight
            laplacian[[i, j], [j, i]] -= weight
        return float(np.linalg.norm(np.eye(24) - laplacian - 1 / 24, 2))

    least = norm(best)
    for rule in ("metropolis-hastings", "max-degree"):
        assert least < 1 - spectral_gap(dense(of_graph(graph, rule)[0]))
    random = np.random.default_rng(0)
    for scale in (1e-3, 1e-2, 0.1):
        for _ in range(60):
            step = random.normal(size=len(best))
            assert norm(best + scale * step / np.linalg.norm(step)) > least - 1e-4


def test_groups_and_stars_of_a_beacon_are_those_that_members_draw() -> None:
    beacon, n = b"b" * 32, 30
    for number in range(3):
        matrix = dense(schedule("groups", n, 0, size=7, beacon=beacon).at(number))
        for members in groups(beacon, Number(number), range(n), 7):
            assert (np.flatnonzero(matrix[members[0]]) == members).all()
        plan = schedule("stars", n, 0, overlay="exponential", colluders=1, beacon=beacon)
        assert plan.graph is not None
        matrix, placed = dense(plan.at(number)), set()
        for centre, members in stars(beacon, Number(number), plan.graph, 1):
            assert (np.flatnonzero(matrix[centre]) == members).all()
            placed |= set(members)
        assert placed
        for alone in set(range(n)) - placed:
            assert matrix[alone, alone] == 1


@pytest.mark.parametrize(("n", "size"), [(30, 7), (32, 8), (9, 4), (5, 5), (11, 1)])
def test_groups_without_a_beacon_have_the_sizes_of_those_with_one(n: int, size: int) -> None:
    def sizes(plan: Schedule) -> list[int]:
        return sorted(np.count_nonzero(dense(plan.at(4)), axis=1))

    assert sizes(schedule("groups", n, 0, size=size)) == sizes(schedule("groups", n, 0, size=size, beacon=b"x"))


@pytest.mark.parametrize("sends", [1, 3, 9])
def test_pushes_reach_so_many_others(sends: int) -> None:
    n = 10
    for name in ("el-local", "random-push", "el-oracle"):
        matrix = dense(schedule(name, n, 0, sends=sends).at(0))
        others = matrix - np.diag(matrix.diagonal())
        assert (np.count_nonzero(others, axis=0) == sends).all()
        assert (matrix.diagonal() > 0).all()
    heard = np.count_nonzero(dense(schedule("el-oracle", n, 0, sends=sends).at(0)), axis=1)
    assert (heard == sends + 1).all()


def test_a_directed_graph_is_pushed_along_or_averaged_over_those_heard() -> None:
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])  # from, to
    push, mean = schedule("graph", 3, 0, graph=graph), schedule("graph", 3, 0, graph=graph, weights="uniform")
    assert (push.kind, mean.kind) == ("column", "row")
    np.testing.assert_allclose(dense(push.at(0)), [[1 / 3, 0, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 1 / 2, 1 / 2]])
    np.testing.assert_allclose(dense(mean.at(0)), [[1 / 2, 0, 1 / 2], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    cycle = schedule("graph", 3, 0, graph=nx.DiGraph([(0, 1), (1, 2), (2, 0)]))
    assert cycle.kind == "doubly"


@pytest.mark.parametrize("n", [5, 12, 32])
def test_the_overlay_of_the_static_exponential_graph_is_that_of_its_matrix(n: int) -> None:
    plan = schedule("static-exponential", n, 0)
    assert plan.graph is not None
    heard = {(j, i) for i, j in zip(*np.nonzero(dense(plan.at(0))), strict=True) if i != j}
    assert heard == set(plan.graph.edges)


def test_ten_thousand_peers_take_no_more_memory_than_their_links() -> None:
    n = 10_000
    for name in ("ring", "one-peer-exponential", "static-exponential", "base", "el-oracle", "el-local", "groups"):
        round = schedule(name, n, 0).at(1)
        assert round.indices.shape[0] == n
        assert round.indices.shape[1] <= 64
    everybody: Round = schedule("complete", n, 0).at(0)
    assert everybody.indices.base.nbytes + everybody.weights.base.nbytes <= 16 * n


@pytest.mark.parametrize(
    ("name", "options", "links"),
    [
        ("random-regular", {"degree": 6}, 20 * 6 / 2),
        ("erdos-renyi", {"probability": 1}, 20 * 19 / 2),
        ("watts-strogatz", {"degree": 6, "rewired": 0.5}, 20 * 6 / 2),
        ("barabasi-albert", {"links": 3}, 4 * 3 / 2 + 16 * 3),
        ("geometric", {"radius": 1.41421}, 20 * 19 / 2),
        ("clusters", {"count": 5}, 5 * 4 * 3 / 2 + 5 * 4 / 2),
    ],
)
def test_a_drawn_graph_has_as_many_links_as_its_options_say(
    name: str, options: dict[str, object], links: float
) -> None:
    made = schedule(name, 20, 7, **options)
    assert made.graph is not None
    assert nx.is_connected(made.graph)
    assert made.graph.number_of_edges() == links != schedule(name, 20, 7).graph.number_of_edges()  # type: ignore[union-attr]
    matrix = dense(made.at(0))
    np.testing.assert_allclose(matrix.sum(0), 1)
    assert set(zip(*np.nonzero(matrix - np.diag(np.diag(matrix))), strict=True)) == {
        pair for one, other in made.graph.edges for pair in ((one, other), (other, one))
    }


@pytest.mark.parametrize(
    ("name", "n", "options", "line"),
    [
        ("wheel", 5, {}, "averaging.topology: 'wheel' is unknown; there are exponential, ring"),
        ("ring", 1, {}, "ring takes two peers or more"),
        ("ring", 5, {"size": 3}, "ring has no option 'size'; it has weights"),
        ("random-matching", 5, {"size": 3}, "random-matching has no option 'size'; it has none"),
        ("ring", 5, {"weights": "best"}, "averaging.options.weights: 'best' is unknown; there are metropolis-hastings"),
        ("ring", 5, {"weights": "push"}, "push is for links that go one way"),
        ("complete", 5, {"weights": "best"}, "'best' is unknown"),
        ("hypercube", 6, {}, "power of two"),
        ("path", MOST_OPTIMISED + 1, {"weights": "optimal"}, "optimal takes at most"),
        ("star", 10_000, {}, "take fewer peers, or a topology with fewer neighbors"),
        ("base", 5, {"seed": 5}, "base has no option 'seed'; it has degree, simple"),
        ("base", 5, {"degree": 5}, "averaging.options.degree: 1 to 4, not 5"),
        ("el-local", 5, {"sends": 5}, "averaging.options.sends: 1 to 4, not 5"),
        ("el-oracle", 5, {"sends": 0}, "averaging.options.sends: 1 to 4, not 0"),
        ("el-local", 5, {"sends": 2.0}, "averaging.options.sends: 2.0 is no int"),
        ("groups", 5, {"size": True}, "averaging.options.size: True is no int"),
        ("base", 5, {"simple": 1}, "averaging.options.simple: 1 is no bool"),
        ("ring", 5, {"weights": ["a"]}, "averaging.options.weights: .* is no str"),
        ("moshpit", 10, {"side": 10_000, "dimensions": 3}, "cells are too many"),
        ("groups", 5, {"size": 6}, "averaging.options.size: 1 to 5, not 6"),
        ("moshpit", 10, {"side": 3}, r"3\^2 cells are fewer than 10 peers"),
        ("moshpit", 10, {"dimensions": 0}, "averaging.options.dimensions: 1 or more"),
        ("stars", 10, {"overlay": "wheel"}, "averaging.options.overlay: 'wheel' is unknown"),
        ("one-peer-exponential", 8, {"order": "any"}, "neither cyclic nor shuffled"),
        ("random-regular", 5, {"degree": 3}, "no 5 peers have 3 neighbors each; take 1 to 4, an even number"),
        ("random-regular", 6, {"degree": 6}, "no 6 peers have 6 neighbors each; take 1 to 5"),
        ("random-regular", 6, {"degree": 1}, "no connected random-regular graph of 6 peers in 100 draws"),
        ("erdos-renyi", 9, {"probability": 0}, "averaging.options.probability: above 0 and up to 1, not 0"),
        ("erdos-renyi", 99, {"probability": 0.001}, "no connected erdos-renyi of 99 peers in 100 draws; link more"),
        ("watts-strogatz", 9, {"degree": 3}, "takes an even degree of 2 or more"),
        ("watts-strogatz", 9, {"rewired": 1.5}, "moves 0 to 1 of the links"),
        ("watts-strogatz", 8, {"degree": 8}, "watts-strogatz takes 9 peers or more, not 8"),
        ("barabasi-albert", 9, {"links": 0}, "averaging.options.links: at least 1, not 0"),
        ("barabasi-albert", 4, {"links": 4}, "barabasi-albert takes 5 peers or more, not 4"),
        ("geometric", 9, {"radius": 2}, "averaging.options.radius: above 0 and up to 1.41"),
        ("geometric", 9, {"radius": "far"}, "averaging.options.radius: 'far' is no float"),
        ("clusters", 9, {"count": 10}, "averaging.options.count: 1 to 9 clusters, not 10"),
        ("graph", 3, {}, "the topology graph needs a graph"),
        ("graph", 3, {"graph": nx.path_graph(4)}, "the graph has 4 nodes, and there are 3 peers"),
        ("graph", 4, {"graph": nx.Graph([(0, 1), (2, 3)])}, "not connected"),
        ("graph", 2, {"graph": nx.DiGraph([(0, 1)])}, "not connected"),
        ("graph", 2, {"graph": nx.DiGraph([(0, 1), (1, 0)]), "weights": "optimal"}, "links that go both ways"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name: str, n: int, options: dict[str, object], line: str) -> None:
    with pytest.raises(InvalidConfig, match=line):
        schedule(name, n, 0, **options)
