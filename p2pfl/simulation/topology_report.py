"""What an overlay costs and what it gives away, for a terminal, as JSON and as a picture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import networkx as nx
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table
from rich.text import Text

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round
from p2pfl.gossip.graphs import GRAPHS, MOST_PEERS, draw, parse
from p2pfl.gossip.grouping import LEAST_MASKED, bearable_colluders, groups, least_masked
from p2pfl.gossip.leakage import (
    Isolation,
    best_estimate,
    group_sums,
    isolating_set,
    lying_colluders,
    neighborhood_sums,
    rounds_until_isolated,
    worst_cosine,
)
from p2pfl.gossip.mixing import consensus_rounds, spectral_gap
from p2pfl.gossip.schedule import WEIGHTS, Kind, dense, describe, of_graph, verify_options
from p2pfl.gossip.topology import diameter
from p2pfl.node.live import size_text
from p2pfl.simulation.plots import group_places, leakage_figure
from p2pfl.simulation.schedule_report import CHANGING, called

MOST_BYTES = 16 << 20
"""Of a graph's file; one of 1000 nodes with all links takes 4 MB as a list of edges."""
MOST_SOLVED = 128
"""Members up to whom rounds of groups are solved: some seconds."""
BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class Mode:
    """What a way of averaging gives away on this overlay, and what it costs.

    Attributes:
        name: neighbors, neighborhoods, stars or groups.
        offered: whether a charter can have it. Masked neighborhoods it cannot have, and the figures say why.
        refused: why it does not exist for so many peers and colluders; the figures below are then None.
        isolating: the fewest colluders known to isolate one update, all peers being there and honest in the protocol.
        at_least: no fewer than these do.
        colluders: an example, by name; empty for groups, where any will do, and where published models suffice.
        victim: whose update they isolate, by name; None for groups.
        lying: as isolating, of colluders that lie to get two sets of survivors certified; None without such votes.
        after_dropouts: as isolating, in a round that only as many as a sum needs at least have survived.
        cosine: of the declared colluders' best estimate of an update and the update, all peers being there.
        cosine_exact: whether no other colluders do better.
        cosine_after_dropouts: the same for the smallest sum that the charter lets pass.
        sent_mean: what a peer sends in a round, in lengths of the model.
        sent_most: the most that one peer sends, in the same unit.
        meaning: one sentence.
    """

    name: str
    offered: bool
    meaning: str
    refused: str | None = None
    isolating: int | None = None
    at_least: int | None = None
    colluders: tuple[str, ...] = ()
    victim: str | None = None
    lying: int | None = None
    after_dropouts: int | None = None
    cosine: float | None = None
    cosine_exact: bool = True
    cosine_after_dropouts: float | None = None
    sent_mean: float | None = None
    sent_most: float | None = None


@dataclass(frozen=True)
class TopologyReport:
    """An overlay in figures.

    Attributes:
        name: of the topology, or the file.
        options: of the topology, as asked for.
        names: the peers', in the order of the graph's nodes.
        links: pairs of nodes.
        degrees: the smallest, the mean and the largest number of neighbors.
        diameter: the largest number of hops between two peers.
        weights: of the links, a key of `p2pfl.gossip.schedule.WEIGHTS`.
        kind: which sums of the mixing matrix are 1.
        spectral_gap: of the mixing matrix.
        consensus_rounds: rounds of neighbors' averaging until the consensus distance is a thousandth of what it was;
            where only rows sum to 1, of a distance that weighs each peer by 1 + its neighbors.
        group_consensus_rounds: the same with groups, on average over the draws.
        group_size: members wanted in a group.
        declared: how many colluders the charter declares.
        alpha_min: the smallest weight of a contribution, relative to the largest.
        parameters: of the model; None: bytes are not given.
        solved_after: rounds of groups drawn anew, all averages known, after which the declared colluders solve for a
            contribution that never changes; None: never, or not computed.
        modes: the ways of averaging.
        seed: of what is drawn.
        places: the nodes' positions in the unit square; None: the topology has none.
    """

    name: str
    options: Mapping[str, Any]
    names: tuple[str, ...]
    links: tuple[tuple[int, int], ...]
    degrees: tuple[int, float, int]
    diameter: int
    weights: str
    kind: Kind
    spectral_gap: float
    consensus_rounds: int | None
    group_consensus_rounds: int | None
    group_size: int
    declared: int
    alpha_min: float
    parameters: int | None
    solved_after: int | None
    modes: tuple[Mode, ...]
    seed: int
    places: tuple[tuple[float, float], ...] | None

    def figure(self) -> Figure:
        """Draw the overlay, and who isolates whose update if neighborhoods were summed; or the groups of a round."""
        if self.name == "groups":
            return self._groups_figure()
        graph = nx.Graph()
        graph.add_nodes_from(range(len(self.names)))
        graph.add_edges_from(self.links)
        shown = next(mode for mode in self.modes if mode.name == "neighborhoods")
        return leakage_figure(
            graph, self.names, called(self.name, self.options), shown.colluders, shown.victim, self.places
        )

    def _groups_figure(self) -> Figure:
        """Draw the groups of the first round, and who isolates an update of the smallest, if it may be averaged."""
        drawn = groups(_beacon(self.seed), Round(0), range(len(self.names)), self.group_size)
        graph = nx.Graph()
        graph.add_nodes_from(range(len(self.names)))
        for group in drawn:
            graph.add_edges_from(combinations(group, 2))
        *others, victim = (self.names[peer] for peer in min(drawn, key=len))
        refused = any(mode.name == "groups" and mode.refused for mode in self.modes)
        title = "groups, those of round 0"
        places = group_places(drawn)
        return leakage_figure(graph, self.names, title, () if refused else others, None if refused else victim, places)

    def to_json(self) -> str:
        """Return everything as JSON, with `bytes_mean` and `bytes_most` of each mode if parameters are known."""
        values = asdict(self)
        if self.parameters is not None:
            for mode in values["modes"]:
                for which in ("mean", "most"):
                    sent = mode[f"sent_{which}"]
                    count = None if sent is None else round(sent * BYTES_PER_PARAMETER * self.parameters)
                    mode[f"bytes_{which}"] = count
        return json.dumps(values, indent=2)

    def __rich__(self) -> Group:
        """Return the tables for a terminal."""
        facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for title, value in self._facts():
            facts.add_row(title, value)
        modes = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for title in ("averaging", "isolated by", "for example", f"cosine, c = {self.declared}", "sent a round"):
            modes.add_column(title)
        for mode in self.modes:
            modes.add_row(*self._row(mode))
        notes = [Text(f"{mode.name}: {mode.meaning}") for mode in self.modes]
        return Group(facts, Text(), modes, Text(), *notes, Text(f"again and again: {self._again()}"))

    def _facts(self) -> Iterator[tuple[str, str]]:
        low, mean, high = self.degrees
        yield "topology", called(self.name, self.options)
        yield "peers, links", f"{len(self.names)}, {len(self.links)}"
        yield "neighbors", f"{low}" if low == high else f"{low} to {high}, {mean:.1f} on average"
        yield "diameter", f"{self.diameter} hop{'s' if self.diameter > 1 else ''}"
        if self.name != "groups":
            agreed = "" if self.kind == "doubly" else "; only rows sum to 1: peers agree, not quite on the mean"
            yield "weights", f"{self.weights}{agreed}"
        rounds = "no number of rounds" if self.consensus_rounds is None else f"rounds: {self.consensus_rounds}"
        yield "spectral gap", f"{self.spectral_gap:.4f}; until the consensus distance is 1/1000, {rounds}"
        if self.group_consensus_rounds is not None:
            yield "in groups", f"of about {self.group_size}, drawn anew: {self.group_consensus_rounds}"

    def _row(self, mode: Mode) -> tuple[str, str, str, str, str]:
        if mode.refused is not None:
            return mode.name, "refused", "", "", ""
        example = "any of one group" if mode.victim is None else f"{_listed(mode.colluders)} -> {mode.victim}"
        cosine = "" if mode.cosine is None else f"{'' if mode.cosine_exact else '>= '}{mode.cosine:.3f}"
        if mode.cosine_after_dropouts is not None and mode.cosine is not None:
            cosine += f" to {mode.cosine_after_dropouts:.3f}"
        return mode.name, _isolated_by(mode), example, cosine, self._sent(mode)

    def _sent(self, mode: Mode) -> str:
        if mode.sent_mean is None or mode.sent_most is None:
            return ""
        scale = None if self.parameters is None else BYTES_PER_PARAMETER * self.parameters
        mean, most = (f"{sent:.3g} |x|" if scale is None else size_text(sent * scale)
                      for sent in (mode.sent_mean, mode.sent_most))  # fmt: skip
        return mean if mean == most else f"{mean}, most {most}"

    def _again(self) -> str:
        if len(self.names) > MOST_SOLVED:
            return f"not computed for more than {MOST_SOLVED} peers"
        who = "1 peer that has" if self.declared == 1 else f"{self.declared} peers that have"
        after = (
            "cannot in any number of rounds"
            if self.solved_after is None
            else f"can after {self.solved_after} rounds of groups drawn anew"
        )
        return (
            f"to solve for a contribution that never changes, {who} all averages {after}; "
            "with groups that stay the same, or of cohorts that do, never for less than a cohort's sum"
        )


def analyse(
    source: str,
    peers: int | None = None,
    *,
    seed: int = 0,
    group_size: int = 8,
    colluders: int = 1,
    alpha_min: float = 1.0,
    parameters: int | None = None,
    weights: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> TopologyReport:
    """Analyse a named topology, or a graph's file.

    Args:
        source: a name, or a file's path: GraphML if it ends in .graphml, else a line with two names for each link.
        peers: how many; None with a file.
        seed: draws random graphs, and groups.
        group_size: members wanted in a group.
        colluders: how many members may work together.
        alpha_min: the smallest weight of a contribution, relative to the largest.
        parameters: how many values the model has.
        weights: of the links, a key of `p2pfl.gossip.schedule.WEIGHTS` but push; metropolis-hastings unless given.
        options: of a named graph, see `p2pfl.gossip.schedule.options_of`; weights have an argument of their own.

    Raises:
        InvalidConfig: there is no such graph, not with weights or options, or a number is out of range.
    """
    if weights is not None:
        verify_weights(source, weights)
    weights = weights or "metropolis-hastings"
    graph, names = _load(source, peers, seed, options)
    if group_size < LEAST_MASKED:
        raise InvalidConfig(f"--group-size: at least {LEAST_MASKED}, not {group_size}")
    if not 0 <= colluders <= len(graph) - 2:
        raise InvalidConfig(f"--colluders: 0 to {len(graph) - 2}, all peers but two, not {colluders}")
    if parameters is not None and parameters < 1:
        raise InvalidConfig(f"--parameters: at least 1, not {parameters}")
    degrees = [int(degree) for _, degree in graph.degree]
    mixing, kind = of_graph(graph, weights)
    gap = spectral_gap(dense(mixing))
    positions = nx.get_node_attributes(graph, "pos")
    size = min(group_size, len(graph))
    count = max(1, len(graph) // size)
    return TopologyReport(
        name=source,
        options=dict(options),
        names=names,
        links=tuple((int(one), int(other)) for one, other in graph.edges),
        degrees=(min(degrees), sum(degrees) / len(degrees), max(degrees)),
        diameter=diameter(graph),
        weights=weights,
        kind=kind,
        spectral_gap=gap,
        consensus_rounds=consensus_rounds((1 - gap) ** 2),
        group_consensus_rounds=consensus_rounds((count - 1) / (len(graph) - 1)),
        group_size=size,
        declared=colluders,
        alpha_min=alpha_min,
        parameters=parameters,
        solved_after=_solved_after(len(graph), size, colluders, seed),
        modes=(
            _neighbors(graph, names),
            _neighborhoods(graph, names, colluders),
            _stars(graph, names, colluders, alpha_min),
            _groups(len(graph), size, colluders, alpha_min),
        ),
        seed=seed,
        places=tuple((float(x), float(y)) for x, y in positions.values()) or None,
    )


def verify_weights(source: str, weights: str) -> None:
    """Refuse weights that there are not, or not for links that go both ways, or a topology that has none.

    Raises:
        InvalidConfig: says which.
    """
    known = [name for name in WEIGHTS if name != "push"]
    if weights == "push":
        raise InvalidConfig(f"--weights: push is for links that go one way; here are {', '.join(known)}")
    if weights not in known:
        raise InvalidConfig(f"--weights: {weights!r} is unknown; there are {', '.join(known)}")
    if source in {"groups", *CHANGING}:
        raise InvalidConfig(f"--weights: {source} makes its own; leave it out, or take one of {', '.join(GRAPHS)}")


def _load(source: str, peers: int | None, seed: int, options: Mapping[str, Any]) -> tuple[nx.Graph, tuple[str, ...]]:
    path = Path(source)
    if options and source not in GRAPHS:
        raise InvalidConfig(f"--set: {source} has no options here; a named graph may have, see p2pfl scenario explain")
    if source not in {"groups", *GRAPHS} and path.is_file():
        if peers is not None:
            raise InvalidConfig(f"{source}: a file says itself how many peers there are; leave out --peers")
        if path.stat().st_size > MOST_BYTES:
            raise InvalidConfig(f"{source}: larger than {size_text(MOST_BYTES)}, and a graph has {MOST_PEERS} nodes")
        try:
            return parse(path.read_text(encoding="utf-8"), graphml=path.suffix.lower() == ".graphml")
        except InvalidConfig as error:
            raise InvalidConfig(f"{source}: {error}") from error
        except UnicodeDecodeError as error:
            raise InvalidConfig(f"{source}: no text in UTF-8; save it as such") from error
    if source != "groups" and source not in GRAPHS:
        raise InvalidConfig(
            f"topology: {source!r} is neither a file nor one of {', '.join(name for name, _ in topologies())}"
        )
    if "weights" in options:
        raise InvalidConfig("--set weights: say --weights")
    verify_options(source, options)
    graph = draw(source, 20 if peers is None else peers, seed, **options)
    return graph, tuple(str(node) for node in graph)


def _neighbors(graph: nx.Graph, names: Sequence[str]) -> Mode:
    degrees = [degree for _, degree in graph.degree]
    found = Isolation(frozenset([0]), min(graph[0]), at_least=1)
    return Mode(
        name="neighbors",
        offered=True,
        meaning="UNMASKED: each neighbor reads the update as it is; if models are published, everybody does",
        cosine=1.0,
        sent_mean=sum(degrees) / len(degrees),
        sent_most=max(degrees),
        **_isolation(found, names),
    )


def _neighborhoods(graph: nx.Graph, names: Sequence[str], colluders: int) -> Mode:
    degrees = [degree for _, degree in graph.degree]
    sums = neighborhood_sums(graph)
    found, estimate = isolating_set(sums), best_estimate(sums, colluders)
    count = 0 if found is None else len(found.colluders)
    return Mode(
        name="neighborhoods",
        offered=False,
        meaning="not offered: sums of overlapping neighborhoods are equations, and in one round "
        f"{count} peer{' solves' if count == 1 else 's solve'} them for somebody's update, masks or not",
        cosine=None if estimate is None else estimate.cosine,
        cosine_exact=estimate is None or estimate.exact,
        sent_mean=sum(degrees) / len(degrees),
        sent_most=max(degrees),
        **_isolation(found, names),
    )


def _stars(graph: nx.Graph, names: Sequence[str], colluders: int, alpha_min: float) -> Mode:
    least = least_masked(colluders)
    sizes = {node: 1 + int(degree) for node, degree in graph.degree}
    centres = [node for node, size in sizes.items() if size >= least and bearable_colluders(size) >= colluders]
    if not centres:
        bears = max(bearable_colluders(size) for size in sizes.values())
        text = f"no star bears {colluders} colluders: the largest, of {max(sizes.values())}, bears {bears}"
        return Mode(name="stars", offered=True, meaning=text, refused=text)
    smallest = min(centres, key=lambda node: (sizes[node], node))
    members = sizes[smallest]
    others = frozenset(graph[smallest])
    found = Isolation(others - {max(others)} | {smallest}, max(others), at_least=members - 1)
    return Mode(
        name="stars",
        offered=True,
        meaning=_one_sum("the smallest star that bears the declared colluders", members, least),
        lying=lying_colluders(members),
        after_dropouts=least - 1,
        cosine=worst_cosine(members, colluders, alpha_min),
        cosine_after_dropouts=worst_cosine(least, colluders, alpha_min),
        sent_mean=2 * (members - 1) / members,
        sent_most=max(sizes[node] for node in centres) - 1,
        **_isolation(found, names),
    )


def _groups(peers: int, size: int, colluders: int, alpha_min: float) -> Mode:
    least = least_masked(colluders)
    count = max(1, peers // size)
    members = peers // count
    borne = bearable_colluders(members)
    if members < least or borne < colluders:
        text = f"groups of {members} do not bear {colluders} colluders: they bear {borne if members >= 3 else 0}"
        return Mode(name="groups", offered=True, meaning=text, refused=text)
    largest = -(-peers // count)
    return Mode(
        name="groups",
        offered=True,
        meaning=_one_sum("a group", members, least),
        isolating=members - 1,
        at_least=members - 1,
        lying=lying_colluders(members),
        after_dropouts=least - 1,
        cosine=worst_cosine(members, colluders, alpha_min),
        cosine_after_dropouts=worst_cosine(least, colluders, alpha_min),
        sent_mean=(2 * members - 1) / members,
        sent_most=(2 * largest - 1) / largest,
    )


def _one_sum(what: str, members: int, least: int) -> str:
    return (
        f"each update is in one sum only; of {what}, with {members} members, all others but the victim must collude, "
        f"{lying_colluders(members)} if they lie and split the votes, {least - 1} in a round that only {least} survive"
    )


def _isolation(found: Isolation | None, names: Sequence[str]) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "isolating": len(found.colluders),
        "at_least": found.at_least,
        "colluders": tuple(names[peer] for peer in sorted(found.colluders)),
        "victim": names[found.victim],
    }


def _solved_after(peers: int, size: int, colluders: int, seed: int) -> int | None:
    """Return after how many rounds of groups the first peers solve for an unchanging contribution, if ever.

    Of a round's k equations all but one can be new, as their total always is the same; with one group none is.
    """
    if peers > MOST_SOLVED or peers // size < 2:
        return None
    beacon = _beacon(seed)
    rounds = range(10 * peers)
    drawn = (group_sums(groups(beacon, Round(number), range(peers), size), released=True) for number in rounds)
    found = rounds_until_isolated(drawn, range(colluders))
    return None if found is None else found[0]


def _beacon(seed: int) -> bytes:
    return f"p2pfl topology {seed}".encode()


def _isolated_by(mode: Mode) -> str:
    if mode.isolating is None:
        return "nobody"
    count = f"{mode.isolating}" if mode.isolating == mode.at_least else f"{mode.at_least} to {mode.isolating}"
    return count if mode.lying is None else f"{count}, lying {mode.lying}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])}, ... ({len(names)})"


def topologies() -> Iterator[tuple[str, str]]:
    """Yield the name of each topology, and what it is."""
    yield "groups", "Drawn anew each round; any two peers may meet."
    for name in (*GRAPHS, *CHANGING):
        yield name, describe(name)
