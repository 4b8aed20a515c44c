"""Named graphs against what is known of them, and graphs read from text."""

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.graphs import GRAPHS, MOST_PEERS, draw, parse
from p2pfl.gossip.mixing import consensus_rounds


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted({*GRAPHS, "groups"})), st.integers(2, 40), st.integers(0, 3))
def test_every_graph_is_plain_and_connected_or_refused_in_a_line(name: str, n: int, seed: int) -> None:
    try:
        graph = draw(name, n, seed)
    except InvalidConfig as error:
        assert name in {"grid", "torus", "hypercube", "watts-strogatz", "barabasi-albert"}
        assert "\n" not in str(error)
        return
    assert list(graph) == list(range(n))
    assert nx.is_connected(graph)
    assert nx.number_of_selfloops(graph) == 0
    assert sorted(graph.edges) == sorted(draw(name, n, seed).edges)


@pytest.mark.parametrize(
    ("name", "n", "degrees", "diameter"),
    [
        ("path", 6, {1, 2}, 5),
        ("star", 6, {1, 5}, 2),
        ("grid", 12, {2, 3, 4}, 5),
        ("torus", 12, {4}, 3),
        ("torus", 9, {4}, 2),
        ("hypercube", 16, {4}, 4),
        ("watts-strogatz", 20, None, None),
        ("clusters", 16, {3, 6}, 3),
    ],
)
def test_degrees_and_diameters_are_the_known_ones(
    name: str, n: int, degrees: set[int] | None, diameter: int | None
) -> None:
    graph = draw(name, n, 0)
    if degrees is not None:
        assert {degree for _, degree in graph.degree} == degrees
        assert nx.diameter(graph) == diameter
    else:
        assert graph.number_of_edges() == 2 * n


def test_no_node_of_a_scale_free_graph_hangs_on_one_link() -> None:
    assert all(min(d for _, d in draw("barabasi-albert", 30, seed).degree) == 2 for seed in range(10))


@pytest.mark.parametrize(
    ("name", "n", "line"),
    [
        ("moebius", 8, "'moebius' is neither a file nor one of groups, exponential, ring"),
        ("ring", 1, "--peers: 2 to 1000, not 1"),
        ("ring", MOST_PEERS + 1, "--peers: 2 to 1000, not 1001"),
        ("grid", 7, "only one row; take 6 or 8"),
        ("torus", 8, "no torus of 8 peers"),
        ("hypercube", 20, "power of two of peers, not 20"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name: str, n: int, line: str) -> None:
    with pytest.raises(InvalidConfig, match=line):
        draw(name, n, 0)


# From text


def test_an_edge_list_gives_names_in_their_order_and_numbers_in_theirs() -> None:
    graph, names = parse("# banks\nnorth south\nsouth,east  # by cable\n\neast north 3.5\neast east\n", graphml=False)
    assert names == ("north", "south", "east")
    assert sorted(graph.edges) == [(0, 1), (0, 2), (1, 2)]
    graph, names = parse("10 9\n9 2\n", graphml=False)
    assert names == ("2", "9", "10")
    assert sorted(graph.edges) == [(0, 1), (1, 2)]


@given(st.integers(2, 12), st.integers(0, 100))
def test_graphml_of_networkx_comes_back(n: int, seed: int) -> None:
    drawn = nx.connected_watts_strogatz_graph(n, 2, 0.3, seed=seed)
    graph, names = parse("\n".join(nx.generate_graphml(drawn)), graphml=True)
    assert names == tuple(map(str, range(n)))
    assert {frozenset(edge) for edge in graph.edges} == {frozenset(edge) for edge in drawn.edges}


@pytest.mark.parametrize(
    ("text", "graphml", "line"),
    [
        ("a b\nc\n", False, "line 2: 'c' is no link; write two names"),
        ("a b\nc d\n", False, "no path leads from a to all others"),
        ("", False, "a graph here has 2 to 1000 nodes, not 0"),
        ("\n".join(f"a b{i}" for i in range(MOST_PEERS)), False, "2 to 1000 nodes, not 1001"),
        ("a b", True, "not GraphML"),
        ("<html/>", True, "not GraphML"),
        ("\n".join(nx.generate_graphml(nx.DiGraph([(0, 1)]))), True, "links go one way"),
    ],
)
def test_text_that_is_no_such_graph_is_refused(text: str, graphml: bool, line: str) -> None:
    with pytest.raises(InvalidConfig, match=line):
        parse(text, graphml=graphml)


def test_a_graph_may_be_directed_and_large_where_no_matrix_is_analysed() -> None:
    """The source of a link sends to its target; whoever is only heard, or only hears, is not connected."""
    circle = [(0, 1), (1, 2), (2, 0)]
    text = "\n".join(nx.generate_graphml(nx.DiGraph([*circle, (1, 1)])))
    graph, names = parse(text, graphml=True, directed=True)
    assert (sorted(graph.edges), graph.is_directed(), names) == (circle, True, ("0", "1", "2"))
    dead_end = "\n".join(nx.generate_graphml(nx.DiGraph([*circle, (0, 3)])))
    with pytest.raises(InvalidConfig, match="no path leads from 3 to all others and back"):
        parse(dead_end, graphml=True, directed=True)
    star = "\n".join(f"0 {i}" for i in range(1, MOST_PEERS + 1))
    assert len(parse(star, graphml=False, most=None)[0]) == MOST_PEERS + 1
    with pytest.raises(InvalidConfig, match="2 nodes or more, not 0"):
        parse("", graphml=False, most=None)


@pytest.mark.parametrize(("kept", "rounds"), [(0.0, 1), (1e-3, 1), (0.1, 3), (0.5, 10), (1.0, None)])
def test_rounds_until_consensus(kept: float, rounds: int | None) -> None:
    assert consensus_rounds(kept) == rounds
