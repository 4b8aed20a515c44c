"""Which matrix mixes in which round: every topology, static or changing, as sparse rows.

A `Schedule` is a pure function of its name, number of peers, options and seed. Row i of a round says from whom peer i
receives and with which weights; nobody's weight is lost or made up in the way that `Schedule.kind` says. The first line
of a builder's docstring describes the topology to users.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal, Protocol

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round as Number
from p2pfl.gossip.base_graph import Links, base_graph, simple_base_graph
from p2pfl.gossip.fastest import fastest_weights
from p2pfl.gossip.graphs import GRAPHS
from p2pfl.gossip.grouping import groups, stars

Kind = Literal["doubly", "row", "column"]
"""Which sums of a matrix are 1: of rows, so that equal vectors stay equal; of columns, so that the sum over all peers
stays; or both."""

WEIGHTS: Mapping[str, str] = {
    "metropolis-hastings": "1 / (1 + the larger degree of a link's two ends) (Xiao, Boyd, Kim 2007)",
    "max-degree": "1 / (1 + the largest degree of all) (Xiao, Boyd 2004; without the 1 even rings swing)",
    "uniform": "the plain mean of itself and its neighbors; keeps the mean only where all degrees are equal",
    "optimal": "the symmetric ones that mix fastest, which may be negative (Xiao, Boyd 2004); for up to 512 peers",
    "push": "equal shares to itself and to those it sends to; links that go one way, with push-sum (Kempe et al. 2003)",
}
"""Weights of a graph's links, and a line on each for users; `of_graph` has the formulas."""

MOST_ENTRIES = 1 << 26
"""A round's entries, padding included: 1 GiB. A guess at what a user's machine has to spare."""


@dataclass(frozen=True, eq=False)
class Round:
    """A mixing matrix by rows; rows are padded with weights of 0 and their own index.

    Attributes:
        indices: whose vectors enter each row, int64 [n, k]; ascending, padding aside.
        weights: with which weights, float64 [n, k].
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float64]


class Schedule(Protocol):
    """Mixing matrices over time."""

    @property
    def name(self) -> str:
        """The topology's name."""

    @property
    def n(self) -> int:
        """How many peers there are."""

    @property
    def kind(self) -> Kind:
        """Which sums are 1 in every round."""

    @property
    def period(self) -> int | None:
        """After how many rounds the matrices repeat; None if they do not."""

    @property
    def graph(self) -> nx.Graph | None:
        """The overlay on which messages travel, a `DiGraph` where links go one way; None if it changes."""

    def at(self, round: int) -> Round:
        """Return the matrix of a round, counted from 0; the same each time."""


@dataclass(frozen=True, eq=False)
class Periodic:
    """A schedule that repeats: rounds are made when first asked for, and kept."""

    name: str
    n: int
    kind: Kind
    period: int
    make: Callable[[int], Round]
    overlay: Callable[[], nx.Graph] | None = None
    _made: dict[int, Round] = field(default_factory=dict, repr=False)
    _drawn: list[nx.Graph] = field(default_factory=list, repr=False)

    @property
    def graph(self) -> nx.Graph | None:
        """The overlay; see `Schedule`."""
        if self.overlay is not None and not self._drawn:
            self._drawn.append(self.overlay())
        return self._drawn[0] if self._drawn else None

    def at(self, round: int) -> Round:
        """Return the matrix of a round."""
        place = round % self.period
        if place not in self._made:
            self._made[place] = self.make(place)
        return self._made[place]


@dataclass(frozen=True, eq=False)
class Drawn:
    """A schedule that is drawn anew in each round."""

    name: str
    n: int
    kind: Kind
    make: Callable[[int], Round]
    graph: nx.Graph | None = None
    period: None = None

    def at(self, round: int) -> Round:
        """Return the matrix of a round."""
        return self.make(round)


def schedule(name: str, n: int, seed: int, /, **options: object) -> Schedule:
    """Return the named schedule for n peers.

    Args:
        name: a key of `SCHEDULES`.
        n: how many peers, two or more.
        seed: of all that is drawn.
        options: see `options_of`; the docstrings of the builders tell what they are.

    Raises:
        InvalidConfig: there is no such schedule, not for this n, or not with these options.
    """
    if name not in SCHEDULES:
        raise InvalidConfig(f"averaging.topology: {name!r} is unknown; there are {', '.join(SCHEDULES)}")
    if n < 2:
        raise InvalidConfig(f"averaging.topology: {name} takes two peers or more, not {n}")
    verify_options(name, options)
    if name == "graph" and "graph" not in options:
        raise InvalidConfig("averaging.options: the topology graph needs a graph")
    return SCHEDULES[name](n, seed, **options)


def options_of(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the options of a schedule: the keyword arguments of its builder and, if it has one, of its graph's."""
    builders = [*([GRAPHS[name]] if name in GRAPHS else []), SCHEDULES[name]]
    found = (each for builder in builders for each in inspect.signature(builder).parameters.values())
    return {each.name: each for each in found if each.kind == each.KEYWORD_ONLY}


def verify_options(name: str, options: Mapping[str, object]) -> None:
    """Refuse options that a schedule does not have, and values of another type.

    Raises:
        InvalidConfig: there is one.
    """
    known = {option: parameter.annotation for option, parameter in options_of(name).items()}
    for option, value in options.items():
        if option not in known:
            has = ", ".join(known) or "none"
            raise InvalidConfig(f"averaging.options: {name} has no option {option!r}; it has {has}")
        kind = known[option]
        is_whole = isinstance(value, int) and not isinstance(value, bool) and isinstance(1.0, kind)
        if not (isinstance(value, kind) or is_whole) or (isinstance(value, bool) and kind is not bool):
            raise InvalidConfig(f"averaging.options.{option}: {value!r} is no {getattr(kind, '__name__', str(kind))}")


def dense(round: Round) -> NDArray[np.float64]:
    """Return the matrix of a round, [n, n]."""
    n = len(round.indices)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], round.indices), round.weights)
    return matrix


def from_matrix(matrix: NDArray[np.float64]) -> Round:
    """Return a matrix [n, n] by rows."""
    receivers, senders = np.nonzero(matrix)
    return from_links(len(matrix), [Links(receivers, senders, matrix[receivers, senders])])


def from_links(n: int, parts: list[Links]) -> Round:
    """Put entries together to rows; no entry comes twice.

    Raises:
        InvalidConfig: one row is so long that all rows, padded to it, exceed `MOST_ENTRIES`.
    """
    receivers = np.concatenate([part.receivers for part in parts])
    senders = np.concatenate([part.senders for part in parts])
    values = np.concatenate([part.weights for part in parts])
    counts = np.bincount(receivers, minlength=n)
    width = int(counts.max())
    _bearable(n, width)
    order = np.argsort(_short(senders, n), kind="stable")
    order = order[np.argsort(_short(receivers, n)[order], kind="stable")]
    used = np.arange(width) < counts[:, None]
    indices = np.repeat(np.arange(n, dtype=np.int64)[:, None], width, axis=1)
    weights = np.zeros((n, width))
    indices[used], weights[used] = senders[order], values[order]
    return Round(indices, weights)


def _short(nodes: NDArray[np.int64], n: int) -> NDArray[np.int64] | NDArray[np.uint16]:
    """Return numbers of nodes in 16 bits where they fit: numpy sorts these by radix, in a fifth of the time."""
    return nodes.astype(np.uint16) if n <= 1 << 16 else nodes


def of_groups(labels: NDArray[np.int64]) -> Round:
    """Return the round in which those with equal labels, int64 [n], take the plain mean of each other's vectors."""
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    width = int(sizes.max())
    _bearable(len(labels), width)
    members = np.argsort(labels, kind="stable")
    starts = np.cumsum(sizes) - sizes
    places = np.arange(width)
    used = places < sizes[labels][:, None]
    mates = members[np.minimum(starts[labels][:, None] + places, len(labels) - 1)]
    own = np.arange(len(labels), dtype=np.int64)[:, None]
    return Round(np.where(used, mates, own), np.where(used, 1.0 / sizes[labels][:, None], 0.0))


def of_graph(graph: nx.Graph, weights: str) -> tuple[Round, Kind]:
    """Return the mixing matrix of a graph on nodes 0 to n-1, and which of its sums are 1.

    With d_i neighbors of node i, a link between i and j weighs, and the rest of each row stays on its diagonal:

    * metropolis-hastings: 1 / (1 + max(d_i, d_j)) (Xiao, Boyd, Kim 2007, equation 4);
    * max-degree: 1 / (1 + max over all d). Xiao and Boyd 2004 leave the 1 out, and then a ring of even length swings;
    * uniform: 1 / (1 + d_i) in the row of i, the plain mean of a neighborhood. Rows sum to 1, columns only where all
      degrees are equal; in a directed graph the neighbors are those that send to i;
    * optimal: `p2pfl.gossip.fastest.fastest_weights`, which may be negative;
    * push (directed graphs only): 1 / (1 + what j sends to) in the column of j. Columns sum to 1 (Kempe et al. 2003).

    Raises:
        InvalidConfig: there are no such weights, or not for this graph.
    """
    if weights not in WEIGHTS:
        raise InvalidConfig(f"averaging.options.weights: {weights!r} is unknown; there are {', '.join(WEIGHTS)}")
    n = len(graph)
    ends = np.fromiter(chain.from_iterable(graph.edges), np.int64).reshape(-1, 2)
    if graph.is_directed():
        return _directed(n, ends, weights)
    degrees = np.bincount(ends.ravel(), minlength=n)
    _bearable(n, int(degrees.max()) + 1)
    receivers, senders = np.concatenate([ends, ends[:, ::-1]]).T
    kind: Kind = "doubly"
    values: NDArray[np.float64]
    if weights == "metropolis-hastings":
        values = 1.0 / (1 + np.maximum(degrees[receivers], degrees[senders]))
    elif weights == "max-degree":
        values = np.full(len(receivers), 1.0 / (1 + degrees.max()))
    elif weights == "uniform":
        values = 1.0 / (1 + degrees[receivers])
        kind = "doubly" if (degrees == degrees[0]).all() else "row"
    elif weights == "optimal":
        values = np.tile(fastest_weights(graph), 2)
    else:
        raise InvalidConfig("averaging.options.weights: push is for links that go one way; take metropolis-hastings")
    return _with_rest(n, receivers, senders, values), kind


def _directed(n: int, ends: NDArray[np.int64], weights: str) -> tuple[Round, Kind]:
    """Return the matrix of links [links, (sender, receiver)], and which of its sums are 1."""
    senders, receivers = ends.T
    sent, received = (np.bincount(side, minlength=n) for side in (senders, receivers))
    everybody = np.arange(n, dtype=np.int64)
    kind: Kind
    if weights == "push":
        share, kind = 1.0 / (1 + sent), "column"
        links = [Links(receivers, senders, share[senders]), Links(everybody, everybody, share)]
    elif weights == "uniform":
        share, kind = 1.0 / (1 + received), "row"
        links = [Links(receivers, senders, share[receivers]), Links(everybody, everybody, share)]
    else:
        raise InvalidConfig(
            f"averaging.options.weights: {weights} is for links that go both ways; take push or uniform"
        )
    balanced = (sent == sent[0]).all() and (received == sent[0]).all()
    return from_links(n, links), "doubly" if balanced else kind


def _with_rest(n: int, receivers: NDArray[np.int64], senders: NDArray[np.int64], values: NDArray[np.float64]) -> Round:
    """Return the matrix of links, with what is missing to 1 in each row on its diagonal."""
    everybody = np.arange(n, dtype=np.int64)
    rest = 1.0 - np.bincount(receivers, values, minlength=n).astype(np.float64)
    return from_links(n, [Links(receivers, senders, values), Links(everybody, everybody, rest)])


def _bearable(n: int, width: int) -> None:
    """Refuse rounds that do not fit into memory."""
    if n * width > MOST_ENTRIES:
        raise InvalidConfig(
            f"averaging.topology: a peer that hears {width - 1} others makes {n} rows of {width} entries, more than "
            f"{MOST_ENTRIES}; take fewer peers, or a topology with fewer neighbors"
        )


def _everybody(n: int) -> Round:
    """Return the round in which all take the mean of all, in memory for one row."""
    return Round(np.broadcast_to(np.arange(n, dtype=np.int64), (n, n)), np.broadcast_to(1.0 / n, (n, n)))


def _circulant(n: int, offsets: list[int]) -> Round:
    """Return the round in which each takes the mean of itself and those so many places after it."""
    indices = (np.arange(n, dtype=np.int64)[:, None] + np.array([0, *offsets])) % n
    return Round(np.sort(indices, axis=1), np.full(indices.shape, 1.0 / indices.shape[1]))


def _random(seed: int, name: str, round: int) -> np.random.RandomState:
    """Return the generator of a round's draws: streams of different names or rounds are independent.

    Unlike those of `default_rng`, its numbers are the same with every version of numpy (NEP 19).
    """
    digest = hashlib.sha256(canonical([seed, name, round])).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


def _beacon(seed: int) -> bytes:
    return hashlib.sha256(canonical(["beacon", seed])).digest()


def _static(name: str, n: int, seed: int, *, weights: str = "metropolis-hastings", **options: Any) -> Schedule:
    """Return the schedule of a graph that stays."""
    if name == "complete":
        # No list of its links: of 10 000 peers these are 50 million.
        if weights not in WEIGHTS or weights == "push":
            of_graph(nx.complete_graph(2), weights)
        return Periodic(name, n, "doubly", 1, lambda _: _everybody(n), lambda: nx.complete_graph(n))
    drawn = GRAPHS[name](n, seed, **options)
    drawn.remove_edges_from(list(nx.selfloop_edges(drawn)))
    return _of(name, drawn, weights)


def _given(n: int, seed: int, *, graph: nx.Graph, weights: str | None = None) -> Schedule:
    """Return a graph of your own, from a list of links or GraphML, in which links may go one way: the source sends.

    Options: `graph` on nodes 0 to n-1, connected (a `DiGraph`: strongly); `weights`, by default metropolis-hastings,
    and push where links go one way.
    """
    del seed
    if sorted(graph) != list(range(n)):
        raise InvalidConfig(f"averaging.topology: the graph has {len(graph)} nodes, and there are {n} peers")
    own = nx.DiGraph(graph) if graph.is_directed() else nx.Graph(graph)
    own.remove_edges_from(list(nx.selfloop_edges(own)))
    if not (nx.is_strongly_connected if own.is_directed() else nx.is_connected)(own):
        raise InvalidConfig("averaging.topology: the graph is not connected; add a link")
    return _of("graph", own, weights or ("push" if own.is_directed() else "metropolis-hastings"))


def _of(name: str, graph: nx.Graph, weights: str) -> Schedule:
    mixing, kind = of_graph(graph, weights)
    return Periodic(name, len(graph), kind, 1, lambda _: mixing, lambda: graph)


def _static_exponential(n: int, seed: int) -> Schedule:
    """Each peer hears those 1, 2, 4, ... places after it, with equal weights (Ying et al. 2021, arXiv 2110.13363)."""
    del seed
    offsets = [2**k for k in range((n - 1).bit_length())]

    def overlay() -> nx.DiGraph:
        return nx.DiGraph([((peer + offset) % n, peer) for peer in range(n) for offset in offsets])

    return Periodic("static-exponential", n, "doubly", 1, lambda _: _circulant(n, offsets), overlay)


def _one_peer_exponential(n: int, seed: int, *, order: str = "cyclic") -> Schedule:
    """Each peer hears one other, 1, 2, 4, ... places after it in turn: exact after log2 n rounds if n is a power of 2.

    Option: `order`, `cyclic` (as in Ying et al. 2021) or `shuffled`: anew in each period.
    """
    hops = (n - 1).bit_length()
    if order == "cyclic":
        return Periodic("one-peer-exponential", n, "doubly", hops, lambda place: _circulant(n, [2**place]))
    if order != "shuffled":
        raise InvalidConfig(f"averaging.options.order: {order!r} is neither cyclic nor shuffled")

    def draw(round: int) -> Round:
        places = _random(seed, "one-peer-exponential", round // hops).permutation(hops)
        return _circulant(n, [2 ** int(places[round % hops])])

    return Drawn("one-peer-exponential", n, "doubly", draw)


def _base(n: int, seed: int, *, degree: int = 1, simple: bool = False) -> Schedule:
    """Exact after at most 2 log n + 2 rounds for every n, to base degree + 1: Base-(k+1) (Takezawa et al. 2023).

    Options: `degree`, how many others a peer meets in a round at most (the paper's k; its main comparison has 1);
    `simple`, to take the simple base graph (algorithm 2 of arXiv 2305.11420) even if it is longer.
    """
    del seed
    if not 1 <= degree < n:
        raise InvalidConfig(f"averaging.options.degree: 1 to {n - 1}, not {degree}")
    rounds = simple_base_graph(np.arange(n, dtype=np.int64), degree) if simple else base_graph(n, degree)

    def make(place: int) -> Round:
        idle = np.setdiff1d(np.arange(n), np.concatenate([part.receivers for part in rounds[place]]))
        return from_links(n, [*rounds[place], Links(idle, idle, np.ones(len(idle)))])

    return Periodic("base", n, "doubly", len(rounds), make)


def _el_oracle(n: int, seed: int, *, sends: int | None = None) -> Schedule:
    """Each peer sends to `sends` others and hears as many, drawn anew in each round (EL-Oracle, de Vos et al. 2023).

    Option: `sends`, by default log2 n, rounded up, the order that arXiv 2310.01972 recommends. The peers are shuffled
    onto a ring on which each hears those at `sends` random offsets. So those whom a peer hears are a uniform subset, on
    which alone the contraction depends; not every regular graph can be drawn.
    """
    count = _sends(n, sends)

    def draw(round: int) -> Round:
        random = _random(seed, "el-oracle", round)
        ring = random.permutation(n)
        offsets = 1 + random.choice(n - 1, count, replace=False)
        heard = np.empty((n, count + 1), np.int64)
        heard[ring] = ring[(np.arange(n)[:, None] + np.append(0, offsets)) % n]
        return Round(np.sort(heard, axis=1), np.full(heard.shape, 1.0 / (count + 1)))

    return Drawn("el-oracle", n, "doubly", draw)


def _el_local(n: int, seed: int, *, sends: int | None = None) -> Schedule:
    """Each peer sends to `sends` random others, and takes the mean of what it hears (EL-Local, de Vos et al. 2023).

    Option: `sends`, by default log2 n, rounded up, the order that arXiv 2310.01972 recommends.
    """
    count = _sends(n, sends)

    def draw(round: int) -> Round:
        recipients, senders = _pushes(_random(seed, "el-local", round), n, count)
        shares = 1.0 / (1 + np.bincount(recipients, minlength=n))
        everybody = np.arange(n, dtype=np.int64)
        return from_links(n, [Links(recipients, senders, shares[recipients]), Links(everybody, everybody, shares)])

    return Drawn("el-local", n, "row", draw)


def _random_push(n: int, seed: int, *, sends: int = 1) -> Schedule:
    """Each peer keeps an equal share of its vector and sends one to each of `sends` random others (push-sum).

    Option: `sends`, by default 1 as in Kempe et al. 2003. Only columns sum to 1, so the algorithm must weigh its sums.
    """
    count = _sends(n, sends)

    def draw(round: int) -> Round:
        recipients, senders = _pushes(_random(seed, "random-push", round), n, count)
        share = 1.0 / (count + 1)
        everybody = np.arange(n, dtype=np.int64)
        return from_links(
            n,
            [Links(recipients, senders, np.full(n * count, share)), Links(everybody, everybody, np.full(n, share))],
        )

    return Drawn("random-push", n, "column", draw)


def _sends(n: int, sends: int | None) -> int:
    count = (n - 1).bit_length() if sends is None else sends
    if not 1 <= count < n:
        raise InvalidConfig(f"averaging.options.sends: 1 to {n - 1}, not {count}")
    return count


def _pushes(random: np.random.RandomState, n: int, sends: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw for each peer a uniform set of others, and return recipients and senders, int64 [n * sends] each.

    Floyd's algorithm for all peers at once (Bentley and Floyd 1987, "A sample of brilliance").
    """
    chosen = np.empty((n, sends), np.int64)
    for place, last in enumerate(range(n - 1 - sends, n - 1)):
        pick = random.randint(0, last + 1, n)
        taken = (chosen[:, :place] == pick[:, None]).any(axis=1)
        chosen[:, place] = np.where(taken, last, pick)
    chosen += chosen >= np.arange(n)[:, None]
    return chosen.ravel(), np.repeat(np.arange(n, dtype=np.int64), sends)


def _random_matching(n: int, seed: int) -> Schedule:
    """Pairs drawn anew in each round take their mean; of an odd number one stays alone (Boyd et al. 2006)."""

    def draw(round: int) -> Round:
        labels = np.empty(n, np.int64)
        labels[_random(seed, "random-matching", round).permutation(n)] = np.arange(n) // 2
        return of_groups(labels)

    return Drawn("random-matching", n, "doubly", draw)


def _groups(n: int, seed: int, *, size: int = 8, beacon: bytes | None = None) -> Schedule:
    """Random groups, drawn anew in each round, take their mean: what federations do by default.

    Options: `size` wanted, by default the charter's; `beacon`: with a federation's beacon the groups are those that its
    members draw, in the order of the roster. Without, they are of the same sizes, and drawn 50 times faster.
    """
    if not 1 <= size <= n:
        raise InvalidConfig(f"averaging.options.size: 1 to {n}, not {size}")

    def draw(round: int) -> Round:
        labels = np.empty(n, np.int64)
        if beacon is None:
            count = n // size
            labels[_random(seed, "groups", round).permutation(n)] = np.arange(n) % count
        else:
            for label, members in enumerate(groups(beacon, Number(round), range(n), size)):
                labels[list(members)] = label
        return of_groups(labels)

    return Drawn("groups", n, "doubly", draw)


def _moshpit(n: int, seed: int, *, dimensions: int = 2, side: int | None = None) -> Schedule:
    """Peers in cells of a grid; a round's groups are lines along one axis, then the next (Ryabinin et al. 2021).

    Options: `dimensions`, by default 2 as in the paper's largest experiments; `side`, by default the least that gives
    each peer a cell. Exact after one round for each dimension if every cell is taken; otherwise the peers' cells are
    drawn once, as in the authors' simulations of arXiv 2103.03239.
    """
    if dimensions < 1:
        raise InvalidConfig(f"averaging.options.dimensions: 1 or more, not {dimensions}")
    if side is None:
        side = next(side for side in range(max(2, int(n ** (1 / dimensions)) - 1), n + 2) if side**dimensions >= n)
    cells = side**dimensions
    if cells < n:
        raise InvalidConfig(
            f"averaging.options.side: {side}^{dimensions} cells are fewer than {n} peers; take a longer side"
        )
    if cells > MOST_ENTRIES:
        raise InvalidConfig(f"averaging.options.side: {side}^{dimensions} cells are too many; take a shorter side")
    places = np.arange(n) if cells == n else _random(seed, "moshpit", 0).choice(cells, n, replace=False)

    def lines(axis: int) -> Round:
        step = side**axis
        return of_groups((places // (step * side) * step + places % step).astype(np.int64))

    return Periodic("moshpit", n, "doubly", dimensions, lines)


def _stars(
    n: int, seed: int, *, overlay: str = "exponential", colluders: int = 1, beacon: bytes | None = None
) -> Schedule:
    """Disjoint neighborhoods of a fixed overlay, drawn anew in each round, take their mean; others keep what they have.

    Options: the `overlay`'s name; `colluders`, by default the charter's, whom a neighborhood must bear to take part;
    `beacon`, a federation's, by default one that follows from the seed.
    """
    if overlay not in GRAPHS:
        raise InvalidConfig(f"averaging.options.overlay: {overlay!r} is unknown; there are {', '.join(GRAPHS)}")
    graph = nx.Graph(GRAPHS[overlay](n, seed))
    light = beacon if beacon is not None else _beacon(seed)

    def draw(round: int) -> Round:
        labels = np.arange(n, dtype=np.int64)
        for centre, members in stars(light, Number(round), graph, colluders):
            labels[list(members)] = centre
        return of_groups(labels)

    return Drawn("stars", n, "doubly", draw, graph)


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    **{name: partial(_static, name) for name in GRAPHS},
    "static-exponential": _static_exponential,
    "one-peer-exponential": _one_peer_exponential,
    "base": _base,
    "el-oracle": _el_oracle,
    "el-local": _el_local,
    "random-push": _random_push,
    "random-matching": _random_matching,
    "groups": _groups,
    "moshpit": _moshpit,
    "stars": _stars,
    "graph": _given,
}
"""Builders by name; those of graphs that stay have the option `weights`, see `of_graph`, and those of their graphs."""


def describe(name: str) -> str:
    """Return a line that says what a schedule of this name is."""
    told = GRAPHS[name] if name in GRAPHS else SCHEDULES[name]
    return (told.__doc__ or "").partition("\n")[0]
