"""The overlay: who is whose neighbor. Nodes are 0 to n-1, in the order of the charter's roster.

Here all links go both ways. Every graph is connected, or it is refused.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import networkx as nx

from p2pfl.core.charter import Charter
from p2pfl.core.errors import InvalidConfig

RANDOM_REGULAR_DEGREE = 4


def ring(n: int, seed: int) -> nx.Graph:
    """Each node linked to the next and the previous."""
    del seed
    return nx.circulant_graph(n, [1])


def complete(n: int, seed: int) -> nx.Graph:
    """Each node linked to all others."""
    del seed
    return nx.complete_graph(n)


def exponential(n: int, seed: int) -> nx.Graph:
    """Each node linked to those 1, 2, 4, ... places away, both ways: the symmetric static exponential graph.

    Degree about 2 log2 n and diameter about half of log2 n (Ying et al. 2021, arXiv 2110.13363, use the directed one).
    """
    del seed
    return nx.circulant_graph(n, [2**k for k in range((n - 1).bit_length()) if 2**k < n])


def random_regular(n: int, seed: int, *, degree: int | None = None) -> nx.Graph:
    """Draw a connected graph in which each node has four neighbors (fewer where n does not allow four), or `degree`."""
    if degree is None:
        degree = min(RANDOM_REGULAR_DEGREE, n - 1)
        degree -= degree * n % 2
    elif not 1 <= degree < n or degree * n % 2:
        raise InvalidConfig(
            f"averaging.options.degree: no {n} peers have {degree} neighbors each; take 1 to {n - 1}"
            + (", an even number" if n % 2 else "")
        )
    for attempt in range(100):
        graph = nx.random_regular_graph(degree, n, seed=seed + 1_000_003 * attempt)
        if nx.is_connected(graph):
            return nx.Graph(graph)
    raise InvalidConfig(
        f"averaging.topology: no connected random-regular graph of {n} peers in 100 draws; use exponential, "
        "or another degree"
    )


def torus(n: int, seed: int) -> nx.Graph:
    """Each node linked to its four neighbors on a grid without borders, as near to a square as n allows.

    Raises:
        InvalidConfig: n has no divisors that give at least three rows and columns.
    """
    del seed
    rows = next((rows for rows in range(math.isqrt(n), 2, -1) if n % rows == 0), None)
    if rows is None:
        raise InvalidConfig(f"averaging.topology: no torus of {n} peers has three rows and columns; use exponential")
    return nx.convert_node_labels_to_integers(nx.grid_2d_graph(rows, n // rows, periodic=True), ordering="sorted")


def hypercube(n: int, seed: int) -> nx.Graph:
    """Each node linked to those whose number differs from its own in one bit.

    Raises:
        InvalidConfig: n is no power of two.
    """
    del seed
    if n.bit_count() != 1:
        raise InvalidConfig(f"averaging.topology: a hypercube has a power of two of peers, not {n}; use exponential")
    return nx.convert_node_labels_to_integers(nx.hypercube_graph(n.bit_length() - 1), ordering="sorted")


def path(n: int, seed: int) -> nx.Graph:
    """Each node linked to the next."""
    del seed
    return nx.path_graph(n)


TOPOLOGIES: Mapping[str, Callable[[int, int], nx.Graph]] = {
    "groups": complete,
    "exponential": exponential,
    "ring": ring,
    "complete": complete,
    "random-regular": random_regular,
    "torus": torus,
    "hypercube": hypercube,
    "path": path,
}


def overlay(name: str, n: int, seed: int) -> nx.Graph:
    """Return the named graph on n nodes.

    Raises:
        InvalidConfig: there is no such topology, or not for this n.
    """
    if name not in TOPOLOGIES:
        raise InvalidConfig(f"averaging.topology: {name!r} is unknown; there are {', '.join(TOPOLOGIES)}")
    if n < 2:
        raise InvalidConfig(f"a federation needs at least two members, not {n}")
    graph = nx.Graph(TOPOLOGIES[name](n, seed))
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    return graph


def named_edges(names: Sequence[str], edges: Sequence[tuple[str, str]]) -> nx.Graph:
    """Return the graph of the members' names that a charter's `averaging.edges` gives; node i is the i-th name.

    Raises:
        InvalidConfig: it names somebody else, leaves a member out, or is not connected.
    """
    places = {name: place for place, name in enumerate(names)}
    for edge in edges:
        for end in edge:
            if end not in places:
                raise InvalidConfig(f"averaging.edges: {end} is not a member; there are {', '.join(names)}")
    if len(names) < 2:
        raise InvalidConfig(f"a federation needs at least two members, not {len(names)}")
    graph = nx.Graph()
    graph.add_nodes_from(range(len(names)))
    graph.add_edges_from((places[one], places[other]) for one, other in edges if one != other)
    if not nx.is_connected(graph):
        apart = min(nx.connected_components(graph), key=len)
        who = ", ".join(names[place] for place in sorted(apart))
        raise InvalidConfig(f"averaging.edges: no path leads from {who} to the others; add an edge")
    return graph


def overlay_of(charter: Charter) -> nx.Graph:
    """Return the overlay of the charter's roster; node i is the i-th of `charter.roster()`.

    Raises:
        InvalidConfig: the topology does not exist for these members.
    """
    averaging = charter.averaging
    if averaging.topology == "edges":
        return named_edges(charter.names(), averaging.edges)
    return overlay(averaging.topology, len(charter.members), averaging.topology_seed)


def diameter(graph: nx.Graph) -> int:
    """Return the largest number of hops between two nodes."""
    return int(nx.diameter(graph))


def gaps(graph: nx.Graph, me: int, dead: Collection[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return what is broken out of the overlay beside `me`: for each gap the dead in it, and the living around it.

    A gap is a connected part of the dead, one of which is a neighbor of `me`. Joining those around each gap keeps the
    living connected: a path between two of them enters a gap from its rim, and leaves it over its rim.
    """
    found = []
    for part in nx.connected_components(graph.subgraph(dead)):
        if not part.isdisjoint(graph[me]):
            rim = {node for gone in part for node in graph[gone]} - part
            found.append((tuple(sorted(part)), tuple(sorted(rim))))
    return sorted(found)


def around(rim: tuple[int, ...], me: int) -> list[int]:
    """Return the others of a ring, those nearest to `me` first."""
    place, size = rim.index(me), len(rim)
    return sorted(
        set(rim) - {me}, key=lambda node: min((rim.index(node) - place) % size, (place - rim.index(node)) % size)
    )
