"""A run in pictures. Each function returns a figure; nothing here computes results or touches global plot settings.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which people with any colour vision tell apart;
what a colour says, a line's style or a marker says too.
"""

import io
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from p2pfl.core.ids import Round
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.topology import overlay_of
from p2pfl.simulation.baselines import Baselines, Curve
from p2pfl.simulation.results import Run
from p2pfl.simulation.summary import GroupsSummary, Summary

BLACK, ORANGE, SKY, BLUE, VERMILION, GREY = "#000000", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#8C8C8C"
GROUP_COLORS, GROUP_STYLES = (BLUE, ORANGE, SKY, VERMILION, BLACK), ("-", "--", "-.", ":")
INCHES, DPI = (8.0, 5.0), 150
ROUNDS_DRAWN = 8
"""Small pictures that fit into one figure and can still be read."""
ENDED_WELL = ("done", "stopped")
MOST_NAMES = 64
"""Names around the overlay that can still be read; with more peers only those that did not end well are named."""


def png(figure: Figure) -> bytes:
    """Draw a figure as PNG."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def accuracy_figure(run: Run, against: Baselines, summary: Summary) -> Figure:
    """Draw the metric per round: each peer, their mean, each peer alone, and all data in one place."""
    metric = summary.metric
    figure, axes = _figure(f"{_title(metric)} on held-out examples")
    curves = [peer.evaluations() for peer in run.peers]
    ended = [peer.together for peer in summary.peers if peer.outcome in ENDED_WELL]
    _lines(axes, [share.curve for share in against.shares.values()], metric,
           f"each peer alone{_range([peer.alone for peer in summary.peers], metric)}",
           color=ORANGE, linestyle="--", linewidth=1.0, alpha=0.65, zorder=2)  # fmt: skip
    _lines(axes, curves, metric, f"each peer in the federation{_range(ended, metric)}",
           color=SKY, linewidth=1.0, alpha=0.8, zorder=3)  # fmt: skip
    if len(curves) > 1:
        _lines(axes, [mean_curve(curves, metric)], metric, "their mean", color=BLUE, linewidth=2.6, zorder=5)
    _lines(axes, [against.central], metric, f"all data in one place{_range([summary.central], metric)}",
           color=BLACK, linewidth=1.6, zorder=4)  # fmt: skip
    _mark_ends(axes, run, metric)
    _rounds_axis(axes, summary.rounds, max((max(curve) for curve in curves if curve), default=summary.rounds))
    axes.set_ylabel(metric, fontsize=12)
    if metric == "accuracy":
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("accuracy, % of examples", fontsize=12)
    _legend_below(figure)
    return figure


def mean_curve(curves: Sequence[Curve], metric: str) -> Curve:
    """Return the mean of a metric wherever at least half of the curves have it."""
    values: dict[int, list[float]] = {}
    for curve in curves:
        for rounds, metrics in curve.items():
            if metric in metrics:
                values.setdefault(rounds, []).append(metrics[metric])
    enough = len(curves) / 2
    return {
        rounds: {metric: statistics.fmean(values[rounds])} for rounds in sorted(values) if len(values[rounds]) >= enough
    }


def consensus_figure(curve: Mapping[int, float], summary: Summary) -> Figure:
    """Draw the consensus distance per round on a logarithmic axis, with the settling part and the tolerance."""
    figure, axes = _figure("How far the peers' models are apart")
    points = {rounds: value for rounds, value in curve.items() if value > 0}
    axes.set_yscale("log")
    if points:
        axes.plot(list(points), list(points.values()), color=BLUE, linewidth=2.0, zorder=4, label="consensus distance")
    else:
        axes.text(0.5, 0.5, "needs copies of two models", transform=axes.transAxes, ha="center", fontsize=12)
    axes.axhline(summary.tolerance, color=VERMILION, linestyle="--", linewidth=1.4, zorder=3,
                 label=f"tolerance {summary.tolerance:g}")  # fmt: skip
    _rounds_axis(axes, summary.rounds, max(curve, default=summary.rounds))
    axes.set_ylabel("consensus distance, squared L2", fontsize=12)
    _legend(axes, "lower left")
    return figure


def overlay_figure(run: Run, summary: Summary) -> Figure:
    """Draw the overlay with the members' names on a circle in the roster's order, and how each peer ended.

    Of groups, those of round 0, each in its own colour and kind of line.
    """
    overlay = summary.overlay
    what = f"the {overlay.topology} overlay" if summary.groups is None else "the groups of round 0"
    figure, axes = _figure(f"Who averages with whom: {what}")
    axes.set_axis_off()
    axes.set_aspect("equal")
    graph = overlay_of(run.charter)
    places = _circle(len(graph))
    if summary.groups is None:
        _draw_links(axes, places, graph.edges, GREY, _width(graph))
    else:
        drawn = GroupPlan.for_peer(run.charter, run.charter.roster()[0]).groups(Round(0))
        _draw_groups(axes, places, drawn)
    names = {member.peer_id: member.name for member in run.charter.members}
    ends = {peer.name: peer.outcome for peer in run.peers}
    labelled = set()
    for place, peer_id in zip(places, run.charter.roster(), strict=True):
        end = ends.get(names[peer_id])
        color, marker, kind = _look(None if end is None else end.kind)
        label = None if kind in labelled else kind
        labelled.add(kind)
        axes.scatter(place[0], place[1], s=_dot(len(graph)), c=color, marker=marker, edgecolors="white", zorder=3,
                     label=label)  # fmt: skip
        failed = end is not None and end.kind not in ENDED_WELL
        if len(graph) <= MOST_NAMES or failed:
            note = f"\n{end.kind}, round {end.rounds}" if failed and end is not None else ""
            _name(axes, place, names[peer_id] + note, len(graph), VERMILION if failed else BLACK)
    axes.set_xlim(-2.2, 2.2)
    axes.set_ylim(-1.35, 1.35)
    axes.text(0.5, -0.02, _caption(len(graph), summary), transform=axes.transAxes, ha="center", va="top", fontsize=12)
    _legend(axes, "upper left")
    return figure


def leakage_figure(
    graph: nx.Graph,
    names: Sequence[str],
    title: str,
    colluders: Collection[str],
    victim: str | None,
    at: Sequence[tuple[float, float]] | None = None,
) -> Figure:
    """Draw a graph, and the peers that isolate a victim's update.

    Args:
        graph: on nodes 0 to n-1.
        names: of the nodes.
        title: what the graph is.
        colluders: names of those who work together.
        victim: whose update they isolate; None: nobody's.
        at: the nodes' positions; None: nodes that form a ring in their order are put on a circle, others where springs
            pull.
    """
    figure, axes = _figure(f"{title}: {len(graph)} peers, {graph.number_of_edges()} links")
    axes.set_axis_off()
    axes.set_aspect("equal")
    if at is not None:
        places = np.array(at)
    elif all(graph.has_edge(node, (node + 1) % len(graph)) for node in graph):
        places = _circle(len(graph))
    else:
        places = np.array([*nx.spring_layout(graph, seed=0).values()])
    axes.add_collection(LineCollection([places[[i, j]] for i, j in graph.edges], colors=GREY, linewidths=_width(graph)))
    kinds = (
        ("other peers", BLUE, "o", [name not in colluders and name != victim for name in names]),
        (f"{len(colluders)} that collude", VERMILION, "s", [name in colluders for name in names]),
        ("whose update they isolate", ORANGE, "*", [name == victim for name in names]),
    )
    for label, color, marker, chosen in kinds:
        if any(chosen):
            x, y = places[np.array(chosen)].T
            axes.scatter(x, y, s=_dot(len(graph)) * (2 if marker == "*" else 1), c=color, marker=marker,
                         edgecolors="white", zorder=3, label=label)  # fmt: skip
    if len(graph) <= MOST_NAMES:
        for place, name in zip(places, names, strict=True):
            axes.annotate(name, place, (0, 10), textcoords="offset points", ha="center", fontsize=9)
    _legend_below(figure)
    return figure


def group_places(groups: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Return positions by node, so that each group lies on a circle of its own, and these in rows."""
    across = math.isqrt(len(groups) - 1) + 1
    places = {}
    for number, group in enumerate(groups):
        row, column = divmod(number, across)
        for node, (x, y) in zip(group, _circle(len(group)), strict=True):
            places[node] = (float(x) + 2.8 * column, float(y) - 2.8 * row)
    return [places[node] for node in sorted(places)]


def rounds_figure(title: str, peers: int, rounds: Sequence[Sequence[tuple[int, int]]]) -> Figure:
    """Draw who hears whom in some rounds, a small picture each.

    Args:
        title: what they are.
        peers: how many; put on a circle, clockwise from the top.
        rounds: at most `ROUNDS_DRAWN`, each of pairs (sender, receiver).
    """
    figure = Figure(figsize=INCHES, layout="constrained")
    figure.suptitle(title, fontsize=14, x=0.01, ha="left")
    places = _circle(peers)
    across = len(rounds) if len(rounds) < 4 else -(-len(rounds) // 2)
    for number, pairs in enumerate(rounds):
        axes = figure.add_subplot(-(-len(rounds) // across), across, number + 1)
        axes.set_axis_off()
        axes.set_aspect("equal")
        axes.set_xlim(-1.25, 1.25)
        axes.set_ylim(-1.25, 1.25)
        axes.set_title(f"round {number}", fontsize=11)
        links = set(pairs)
        mutual = [(one, other) for one, other in links if one < other and (other, one) in links]
        _draw_links(axes, places, mutual, BLUE, max(0.3, min(1.4, 60.0 / max(1, len(links)))))
        single = np.array([pair for pair in pairs if pair[::-1] not in links], dtype=np.int64).reshape(-1, 2)
        if len(single):
            start, way = places[single[:, 0]], places[single[:, 1]] - places[single[:, 0]]
            axes.quiver(*start.T, *way.T, angles="xy", scale_units="xy", scale=1, color=ORANGE,
                        width=0.004 if len(single) > 2 * peers else 0.008)  # fmt: skip
        met = np.isin(np.arange(peers), np.array(list(links), dtype=np.int64))
        axes.scatter(places[:, 0], places[:, 1], s=_dot(peers) / 6, c=np.where(met, BLACK, "white"),
                     edgecolors=BLACK, linewidths=0.6, zorder=3)  # fmt: skip
    legend = "lines: both hear each other; arrows point to the one that hears; white: in no exchange"
    figure.text(0.01, 0.005, legend, fontsize=11)
    return figure


def exchanges(run: Run, round: int) -> set[tuple[int, int]]:
    """Return between whom a round carried a sum or an update, as the traces tell it: pairs of places, ascending.

    In a group all members are linked; in a star each with its centre; among neighbors whoever heard the other.
    """
    places = {name: place for place, name in enumerate(run.charter.names())}
    in_groups = run.charter.averaging.topology == "groups"
    found: set[tuple[int, int]] = set()
    for peer in run.peers:
        for _, record in peer.rounds_ended():
            if record.round != round or not record.heard:
                continue
            together = {peer.name, *record.heard}
            if in_groups:
                pairs: Iterable[tuple[str, str]] = combinations(sorted(together), 2)
            else:
                centre = record.leader if record.outcome else peer.name
                pairs = ((centre, other) for other in together - {centre})
            for one, other in pairs:
                if one in places and other in places:
                    low, high = sorted((places[one], places[other]))
                    found.add((low, high))
    return found


def exchanges_figure(run: Run) -> Figure:
    """Draw who really averaged with whom in each of the first rounds, a small picture each, as the traces tell it."""
    figure = Figure(figsize=INCHES, layout="constrained")
    figure.suptitle("Who averaged with whom, round after round", fontsize=14, x=0.01, ha="left")
    count = len(run.charter.members)
    places = _circle(count)
    overlay = [] if run.charter.averaging.topology == "groups" else list(overlay_of(run.charter).edges)
    for number in range(ROUNDS_DRAWN):
        axes = figure.add_subplot(2, ROUNDS_DRAWN // 2, number + 1)
        axes.set_axis_off()
        axes.set_aspect("equal")
        axes.set_xlim(-1.25, 1.25)
        axes.set_ylim(-1.25, 1.25)
        if not any(record.round == number for peer in run.peers for _, record in peer.rounds_ended()):
            continue
        axes.set_title(f"round {number}", fontsize=11)
        _draw_links(axes, places, overlay, "#E5E5E5", 0.6)
        graph = nx.Graph(sorted(exchanges(run, number)))
        graph.add_nodes_from(range(count))
        parts = [part for part in nx.connected_components(graph) if len(part) > 1]
        for index, part in enumerate(sorted(parts, key=min)):
            color, style = GROUP_COLORS[index % len(GROUP_COLORS)], GROUP_STYLES[index % len(GROUP_STYLES)]
            _draw_links(axes, places, graph.subgraph(part).edges, color, 1.4, style)
        alone = [graph.degree[node] == 0 for node in range(count)]
        colors = ["white" if each else BLACK for each in alone]
        axes.scatter(places[:, 0], places[:, 1], s=_dot(count) / 6, c=colors, edgecolors=BLACK, zorder=3)
    figure.text(0.01, 0.005, "white: in no sum of that round", fontsize=11)
    return figure


def _draw_links(
    axes: Axes,
    places: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    edges: Iterable[tuple[int, int]],
    color: str,
    width: float,
    style: str = "-",
) -> None:
    links = [places[[i, j]] for i, j in edges]
    axes.add_collection(LineCollection(links, colors=color, linewidths=width, linestyles=style))


def _draw_groups(
    axes: Axes, places: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", drawn: Sequence[Sequence[int]]
) -> None:
    """Link the members of each group with each other."""
    for number, group in enumerate(drawn):
        color, style = GROUP_COLORS[number % len(GROUP_COLORS)], GROUP_STYLES[number % len(GROUP_STYLES)]
        _draw_links(axes, places, combinations(group, 2), color, 1.4, style)


def groups_text(groups: GroupsSummary) -> str:
    """Say in words what groups there are."""
    return (
        f"{groups.count} groups of about {groups.size} drawn anew each round"
        if groups.count > 1
        else "one group of all"
    )


def _caption(peers: int, summary: Summary) -> str:
    if summary.groups is not None:
        return f"{peers} peers, {groups_text(summary.groups)}"
    (low, high), hops = summary.overlay.degree, summary.overlay.diameter
    degree = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"{peers} peers, {degree} neighbors each, diameter {hops} "
        f"hop{'s' if hops != 1 else ''}, spectral gap {summary.overlay.spectral_gap:.3f}"
    )


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=14, loc="left", pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=11)
    axes.grid(visible=True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _lines(axes: Axes, curves: Sequence[Curve], metric: str, label: str, **style: Any) -> None:
    """Draw curves alike, with one entry in the legend for all."""
    points = [
        {rounds: curve[rounds][metric] for rounds in sorted(curve) if metric in curve[rounds]} for curve in curves
    ]
    for number, line in enumerate(filter(None, points)):
        axes.plot(list(line), list(line.values()), label=label if number == 0 else None, **style)


def _mark_ends(axes: Axes, run: Run, metric: str) -> None:
    """Mark where the curves of peers end that did not end well."""
    for peer in run.peers:
        curve = {rounds: values[metric] for rounds, values in peer.evaluations().items() if metric in values}
        if peer.outcome.kind not in ENDED_WELL and curve:
            end = max(curve)
            axes.plot(end, curve[end], marker="X", markersize=10, color=VERMILION, markeredgecolor="white", zorder=6)
            axes.annotate(f"{peer.name} {peer.outcome.kind}", (end, curve[end]), (8, -16), textcoords="offset points",
                          color=VERMILION, fontsize=11, zorder=6,
                          bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})  # fmt: skip


def _rounds_axis(axes: Axes, rounds: int, end: int) -> None:
    """Label the axis of rounds, and shade those that only average."""
    if end > rounds:
        axes.axvspan(rounds, end, color="#EFEFEF", zorder=0, label=f"settling: {end - rounds} rounds without training")
    axes.set_xlim(0, max(end, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round", fontsize=12)


def _legend(axes: Axes, place: Literal["lower left", "upper left"]) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place, fontsize=11, framealpha=0.92, edgecolor="none")


def _legend_below(figure: Figure) -> None:
    """Put the legend under the axes, where it hides no curve."""
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=2, fontsize=11, frameon=False)


def _title(metric: str) -> str:
    return metric[:1].upper() + metric[1:]


def _range(values: Sequence[float | None], metric: str) -> str:
    """Write the final values for a legend: 95.6%, or 41.2% to 88.0%."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    ends = [f"{100 * v:.1f}%" if metric == "accuracy" else f"{v:.4g}" for v in (min(known), max(known))]
    return f": {ends[0]}" if ends[0] == ends[1] else f": {ends[0]} to {ends[1]}"


def _circle(count: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Return `count` places on the unit circle, float64 [count, 2], clockwise from the top."""
    angles = np.pi / 2 - 2 * np.pi * np.arange(count) / count
    places: np.ndarray[tuple[int, int], np.dtype[np.float64]] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return places


def _look(kind: str | None) -> tuple[str, str, str]:
    """Return the colour, the marker and the legend's words for how a peer ended; None: its folder is not here."""
    if kind is None:
        return GREY, "o", "not in this folder"
    return (BLUE, "o", "finished") if kind in ENDED_WELL else (VERMILION, "X", "ended early")


def _dot(count: int) -> float:
    """Return a node's area, in square points."""
    return max(25.0, min(260.0, 4000.0 / count))


def _width(graph: nx.Graph) -> float:
    links: int = graph.number_of_edges()
    return max(0.3, min(1.4, 60.0 / max(1, links)))


def _name(axes: Axes, place: "np.ndarray[tuple[int], np.dtype[np.float64]]", text: str, count: int, color: str) -> None:
    """Write a name outside the circle: upright for a few peers, along the radius for many."""
    x, y = place * 1.13
    side = "center" if abs(place[0]) < 0.1 else "left" if place[0] > 0 else "right"
    if count <= 20:
        height = "center" if abs(place[0]) >= 0.1 else "bottom" if y > 0 else "top"
        axes.text(x, y, text, ha=side, va=height, fontsize=11, color=color)
        return
    angle = math.degrees(math.atan2(float(y), float(x)))
    left = abs(angle) > 90.5
    axes.text(x, y, text.partition("\n")[0], ha="right" if left else "left", va="center", fontsize=8, color=color,
              rotation=angle + 180 if left else angle, rotation_mode="anchor")  # fmt: skip
