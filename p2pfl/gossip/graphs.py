"""Static graphs for analysis, by name or from a file's text. Charters' overlays are in `p2pfl.gossip.topology`.

All are connected, on nodes 0 to n-1, and undirected but for files'; those that are drawn follow from a seed. The
first line of a function's docstring is what `p2pfl topology` says of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import networkx as nx

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.topology import TOPOLOGIES

MOST_PEERS = 1000
"""A guess: eigenvalues of the mixing matrix of so many take a second, of ten times as many a quarter of an hour."""
DRAWS = 100
"""A guess: with the parameters below one draw in two or more is connected."""
SMALL_WORLD_DEGREE, SMALL_WORLD_REWIRED = 4, 0.1
"""Watts and Strogatz 1998 ("Collective dynamics of small-world networks"): small worlds begin at about 0.01."""
SCALE_FREE_LINKS = 2
"""The fewest that leave no node with one link; Barabasi and Albert 1999 show 1 to 7."""


def star(n: int, seed: int) -> nx.Graph:
    """Node 0 linked to all others, which have no other link: what a server would be."""
    del seed
    return nx.star_graph(n - 1)


def grid(n: int, seed: int) -> nx.Graph:
    """Each node linked to its two to four neighbors on a grid, as near to a square as n allows."""
    del seed
    rows = next(rows for rows in range(math.isqrt(n), 0, -1) if n % rows == 0)
    if rows == 1 and n > 3:
        raise InvalidConfig(f"topology: a grid of {n} peers has only one row; take {n - 1} or {n + 1}, or path")
    return nx.convert_node_labels_to_integers(nx.grid_2d_graph(rows, n // rows), ordering="sorted")


def erdos_renyi(n: int, seed: int, *, probability: float | None = None) -> nx.Graph:
    """Each pair linked with `probability`, or 2 ln n / n: twice what connects almost all graphs (Erdos, Renyi 1960)."""
    chance = min(1.0, 2 * math.log(n) / n) if probability is None else probability
    if not 0 < chance <= 1:
        raise InvalidConfig(f"averaging.options.probability: above 0 and up to 1, not {probability}")
    return _connected("erdos-renyi", n, lambda attempt: nx.gnp_random_graph(n, chance, seed=attempt), seed)


def watts_strogatz(
    n: int, seed: int, *, degree: int = SMALL_WORLD_DEGREE, rewired: float = SMALL_WORLD_REWIRED
) -> nx.Graph:
    """Each of a ring linked to its four nearest, or `degree`; a tenth of links moved, or `rewired`: a small world."""
    if degree < 2 or degree % 2 or not 0 <= rewired <= 1:
        raise InvalidConfig(
            "averaging.options: watts-strogatz takes an even degree of 2 or more, and moves 0 to 1 of the links "
            f"(rewired); not {degree} and {rewired}"
        )
    if n <= degree:
        raise InvalidConfig(f"topology: watts-strogatz takes {degree + 1} peers or more, not {n}")
    return _connected(
        "watts-strogatz", n, lambda attempt: nx.watts_strogatz_graph(n, degree, rewired, seed=attempt), seed
    )


def barabasi_albert(n: int, seed: int, *, links: int = SCALE_FREE_LINKS) -> nx.Graph:
    """Each node linked to two that came before it, or `links`, rather to those with many links: scale-free."""
    if links < 1:
        raise InvalidConfig(f"averaging.options.links: at least 1, not {links}")
    if n <= links:
        raise InvalidConfig(f"topology: barabasi-albert takes {links + 1} peers or more, not {n}")
    return nx.barabasi_albert_graph(n, links, seed=seed, initial_graph=nx.complete_graph(links + 1))


def geometric(n: int, seed: int, *, radius: float | None = None) -> nx.Graph:
    """Nodes at random in a unit square, linked where closer than `radius`, or sqrt(2 ln n / (pi n)): radio range.

    Twice the area of a circle that connects almost all large graphs (Gupta, Kumar 1999). A node's `pos` is where it is.
    """
    reach = math.sqrt(2 * math.log(n) / (math.pi * n)) if radius is None else radius
    if not 0 < reach <= math.sqrt(2):
        raise InvalidConfig(f"averaging.options.radius: above 0 and up to 1.41, the square's diagonal, not {radius}")
    return _connected("geometric", n, lambda attempt: nx.random_geometric_graph(n, reach, seed=attempt), seed)


def clusters(n: int, seed: int, *, count: int | None = None) -> nx.Graph:
    """`count` clusters in which all are linked, about sqrt(n) unless said; their first members are linked, too."""
    del seed
    count = max(1, math.isqrt(n)) if count is None else count
    if not 1 <= count <= n:
        raise InvalidConfig(f"averaging.options.count: 1 to {n} clusters, not {count}")
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    parts = [range(number, n, count) for number in range(count)]
    for part in parts:
        graph.add_edges_from(nx.complete_graph(part).edges)
    graph.add_edges_from(nx.complete_graph(count).edges)
    return graph


def _connected(name: str, n: int, draw: Callable[[int], nx.Graph], seed: int) -> nx.Graph:
    """Return the first connected graph of a sequence of draws."""
    for attempt in range(DRAWS):
        graph = nx.Graph(draw(seed + 1_000_003 * attempt))
        if nx.is_connected(graph):
            return graph
    raise InvalidConfig(f"topology: no connected {name} of {n} peers in {DRAWS} draws; link more, or take another seed")


GRAPHS: Mapping[str, Callable[..., nx.Graph]] = {
    **{name: draw for name, draw in TOPOLOGIES.items() if name != "groups"},
    "star": star,
    "grid": grid,
    "erdos-renyi": erdos_renyi,
    "watts-strogatz": watts_strogatz,
    "barabasi-albert": barabasi_albert,
    "geometric": geometric,
    "clusters": clusters,
}
"""Builders by name; each takes n, a seed, and its options by keyword."""


def draw(name: str, n: int, seed: int, /, **options: Any) -> nx.Graph:
    """Return the named graph on n nodes; `groups` gives the complete one, as any two may meet in a group.

    Raises:
        InvalidConfig: there is no such graph, or not for this n.
    """
    if not 2 <= n <= MOST_PEERS:
        raise InvalidConfig(f"--peers: 2 to {MOST_PEERS}, not {n}")
    if name != "groups" and name not in GRAPHS:
        raise InvalidConfig(f"topology: {name!r} is neither a file nor one of groups, {', '.join(GRAPHS)}")
    return _plain(GRAPHS["complete" if name == "groups" else name](n, seed, **options))


def parse(
    text: str, *, graphml: bool, most: int | None = MOST_PEERS, directed: bool = False
) -> tuple[nx.Graph, tuple[str, ...]]:
    """Read a graph from GraphML, or from lines `a b` or `a,b`, one link each; `#` begins a comment.

    Weights and other attributes are not read. Nodes that are numbers are ordered as numbers, others as in the file.

    Args:
        text: what the file says.
        graphml: whether it is GraphML.
        most: of nodes; None for any number, where nothing is computed of their matrix.
        directed: whether GraphML whose links go one way is taken: the source sends to the target.

    Returns:
        the graph on nodes 0 to n-1, a `DiGraph` where links go one way, and what the file calls them.

    Raises:
        InvalidConfig: it is not such a text, has links that go one way and may not, is not connected (a `DiGraph`:
            strongly), or too large.
    """
    read = _graphml(text) if graphml else _edges(text)
    if read.is_directed() and not directed:
        raise InvalidConfig("links go one way; here all go both ways: save the graph as undirected")
    names = [str(name) for name in read]
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    if len(names) < 2 or (most is not None and len(names) > most):
        sizes = "2 nodes or more" if most is None else f"2 to {most} nodes"
        raise InvalidConfig(f"a graph here has {sizes}, not {len(names)}")
    places = {name: place for place, name in enumerate(names)}
    graph = nx.DiGraph() if read.is_directed() else nx.Graph()
    graph.add_nodes_from(range(len(names)))
    graph.add_edges_from((places[str(one)], places[str(other)]) for one, other in read.edges())
    apart = min((nx.strongly_connected_components if read.is_directed() else nx.connected_components)(graph), key=len)
    if len(apart) < len(names):
        back = " and back" if read.is_directed() else ""
        raise InvalidConfig(f"not connected: no path leads from {names[min(apart)]} to all others{back}; add a link")
    return _plain(graph), tuple(names)


def _graphml(text: str) -> nx.Graph:
    try:
        return nx.parse_graphml(text)
    except Exception as error:
        # Whatever the parser meets: XML that is none, keys without types, values that are none of their type.
        raise InvalidConfig(f"not GraphML: {error}") from error


def _edges(text: str) -> nx.Graph:
    graph = nx.Graph()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if len(words) == 1:
            raise InvalidConfig(f"line {number}: {words[0]!r} is no link; write two names")
        if words:
            graph.add_edge(words[0], words[1])
    return graph


def _plain(graph: nx.Graph) -> nx.Graph:
    """Return the graph with nodes in order, and without links from a node to itself; nodes keep what they have."""
    plain = nx.DiGraph() if graph.is_directed() else nx.Graph()
    plain.add_nodes_from((node, graph.nodes[node]) for node in sorted(graph))
    plain.add_edges_from((one, other) for one, other in graph.edges if one != other)
    return plain
