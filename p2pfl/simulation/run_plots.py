"""Simulated runs in pictures, as a paper could print them: medians over seeds, with quartiles as bands.

Colours are those of Okabe and Ito ("Color Universal Design", 2008); where there are more curves than colours, the kind
of line and the marker tell them apart. Every figure has the width of a page of text.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory
from numpy.typing import NDArray

from p2pfl.simulation.runs import Run, less_is_better, metric_words

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X<>"
WIDTH, HEIGHT, DPI = 10.0, 3.4, 200
LEAST = 1e-12
"""Of a consensus distance on a logarithmic axis: float32 models that agree are as near, and are not drawn."""
MOST_BANDS = 8
"""Curves with bands of quartiles; more of them would hide each other."""
NAME_WIDTH, NAME_LINES = 30, 3
"""Of a run's name beside a figure, characters and lines: more would leave the panels no width."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """A curve over seeds: float64 [points] each; `x` are rounds, or what they are measured in."""

    x: Floats
    low: Floats
    median: Floats
    high: Floats


def spread(run: Run, column: str, x: str = "round") -> Spread:
    """Return a column's median and quartiles over seeds, where at least half of the seeds have a value."""
    rows = run.evaluated[["round", x, column]] if x != "round" else run.evaluated[["round", column]]
    seeds = len(run.scenario.seeds)
    places, found = [], []
    for _, part in rows.groupby("round"):
        values = part[column].to_numpy(np.float64)
        values = values[np.isfinite(values)]
        if 2 * len(values) >= seeds:
            places.append(float(part[x].median()))
            found.append(np.percentile(values, [25, 50, 75]))
    low, median, high = np.array(found).reshape(-1, 3).T
    return Spread(np.array(places), low, median, high)


def run_figure(run: Run) -> Figure:
    """Draw a run: the mean model and peers' own models per round, and how far these are apart."""
    figure = Figure(figsize=(WIDTH * 0.8, HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    metric = str(run.summary["metric"])
    curves = [(metric, "mean model", COLORS[0], "-")]
    if f"peer_{metric}" in run.frame:
        curves.append((f"peer_{metric}", "peers' own models, mean", COLORS[1], "--"))
    for column, words, color, style in curves:
        _band(left, spread(run, column), color, style, words)
    _axes(left, "round", metric)
    left.legend(frameon=False, fontsize=8)
    _band(right, spread(run, "consensus"), COLORS[2], "-", "", floor=LEAST)
    _axes(right, "round", "consensus distance")
    right.set_yscale("log")
    faults = run.scenario.faults
    if faults.parts > 1:
        for axes in (left, right):
            axes.axvspan(faults.split, faults.heal, color="0.93", zorder=0)
        right.set_title(f"shaded: split into {faults.parts}", fontsize=8, loc="right")
    seeds = len(run.scenario.seeds)
    figure.suptitle(f"{run.scenario.name}: {seeds_words(seeds)}", fontsize=9, x=0.01, ha="left")
    return figure


def comparison_figure(runs: Sequence[Run], labels: Sequence[str], metric: str) -> Figure:
    """Draw runs beside each other: a metric and the consensus distance per round, and how they end, the best above.

    The names beside the last panel are the legend of all.
    """
    order = _ranked(runs, metric)
    names = [_name(label) for label in labels]
    lines = max(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(WIDTH, max(HEIGHT, 1.2 + (0.05 + 0.14 * lines) * len(runs))), layout="constrained")
    first, second, last = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    bands = len(runs) <= MOST_BANDS
    # Inches right of the last panel, so that a name's sample of its line is nowhere near the data.
    beside = blended_transform_factory(
        figure.dpi_scale_trans + ScaledTranslation(1, 0, last.transAxes), last.transData
    )  # fmt: skip
    for place, number in enumerate(order):
        color, style, marker = _look(place)
        run, height = runs[number], len(order) - place
        curve = spread(run, metric)
        _band(first, curve, color, style, names[number], band=bands)
        _band(second, spread(run, "consensus"), color, style, "", band=bands, floor=LEAST)
        last.plot(
            [0.08, 0.42], [height] * 2, transform=beside, clip_on=False, color=color, linestyle=style, linewidth=1.3
        )
        if len(curve.x):
            ends = np.abs([[curve.median[-1] - curve.low[-1]], [curve.high[-1] - curve.median[-1]]])
            last.errorbar(curve.median[-1], height, xerr=ends, color=color, marker=marker, markersize=5, linewidth=1.4,
                          linestyle=style, capsize=2, clip_on=False)  # fmt: skip
    _axes(first, "round", metric_words(metric))
    _axes(second, "round", "consensus distance")
    second.set_yscale("log")
    _axes(last, f"{metric_words(metric)},\nat the end", "")
    last.xaxis.set_major_locator(MaxNLocator(4))
    last.set_yticks(range(len(order), 0, -1), [names[number] for number in order], fontsize=8)
    for place, text in enumerate(last.get_yticklabels()):
        text.set_color(_look(place)[0])
    last.yaxis.tick_right()
    last.tick_params(axis="y", length=0, pad=36)
    last.spines["right"].set_visible(True)
    last.spines["left"].set_visible(False)
    last.set_ylim(0.4, len(order) + 0.6)
    figure.suptitle(_seeds_of(runs, bands=bands), fontsize=9, x=0.01, ha="left")
    return figure


def trend_figure(
    runs: Sequence[Run], values: Sequence[float], groups: Sequence[str], key: str, metric: str
) -> Figure:  # fmt: skip
    """Draw how runs end over a setting's values, a curve for each of the other settings' combinations."""
    kinds = dict.fromkeys(groups)
    names = {group: _name(group) for group in kinds}
    lines = sum(name.count("\n") + 1 for name in names.values())
    figure = Figure(figsize=(WIDTH * (0.8 if not any(groups) else 1), max(HEIGHT, 0.6 + 0.18 * lines)),
                    layout="constrained")  # fmt: skip
    left, right = figure.subplots(1, 2)
    for place, group in enumerate(kinds):
        color, style, marker = _look(place)
        chosen = sorted((value, number) for number, value in enumerate(values) if groups[number] == group)
        for axes, column, floor in ((left, metric, -np.inf), (right, "consensus", LEAST)):
            ends = [(value, spread(runs[number], column)) for value, number in chosen]
            known = [(value, curve.low[-1], curve.median[-1], curve.high[-1]) for value, curve in ends if len(curve.x)]
            if known:
                x, low, median, high = np.maximum(np.array(known).T, [[-np.inf], [floor], [floor], [floor]])
                axes.plot(
                    x, median, color=color, linestyle=style, marker=marker, markersize=4, label=names[group] or None
                )
                axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    _axes(left, key, f"{metric_words(metric)}, at the end")
    _axes(right, key, "consensus distance, at the end")
    right.set_yscale("log")
    positive = min(values) > 0 and max(values) / min(values) >= 20
    for axes in (left, right):
        axes.xaxis.set_major_locator(axes.xaxis.get_major_locator() if positive else MaxNLocator(6))
        if positive:
            axes.set_xscale("log")
    if any(groups):
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(_seeds_of(runs, bands=True), fontsize=9, x=0.01, ha="left")
    return figure


def seeds_words(count: int) -> str:
    """Say what the spread is of."""
    return f"median and quartiles over {count} seeds" if count > 1 else "one seed"


def _name(label: str) -> str:
    return textwrap.fill(label, NAME_WIDTH, max_lines=NAME_LINES, placeholder=" ...")


def _seeds_of(runs: Sequence[Run], *, bands: bool) -> str:
    counts = {len(run.scenario.seeds) for run in runs}
    words = seeds_words(counts.pop()) if len(counts) == 1 else "median and quartiles over seeds"
    return words if bands else words.replace("median and quartiles", "median, and quartiles at the end,")


def png(figure: Figure) -> bytes:
    """Draw a figure as PNG."""
    return _saved(figure, "png")


def svg(figure: Figure) -> bytes:
    """Draw a figure as SVG, the same bytes each time."""
    return _saved(figure, "svg")


def _saved(figure: Figure, kind: str) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # Ids in an SVG are drawn, unless they are given a salt; and it has a date, unless that is taken away.
    with rc_context({"svg.hashsalt": "p2pfl"}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _ranked(runs: Sequence[Run], metric: str) -> list[int]:
    """Return the runs' numbers, the best end first; those without an end last."""
    sign = 1.0 if less_is_better(metric) else -1.0
    ends = [spread(run, metric).median for run in runs]
    return sorted(range(len(runs)), key=lambda number: sign * ends[number][-1] if len(ends[number]) else np.inf)


def _look(place: int) -> tuple[str, str, str]:
    return (
        COLORS[place % len(COLORS)],
        STYLES[place // len(COLORS) % len(STYLES)],
        MARKERS[place % len(MARKERS)],
    )


def _band(
    axes: Axes, curve: Spread, color: str, style: str, label: str, *, band: bool = True, floor: float = -np.inf
) -> None:  # fmt: skip
    median = np.where(curve.median > floor, curve.median, np.nan)
    axes.plot(curve.x, median, color=color, linestyle=style, linewidth=1.3, label=label or None)
    if band:
        low, high = np.maximum(curve.low, floor), np.maximum(curve.high, floor)
        # What is at the floor would stretch the axis down to it; but an axis needs something.
        shown = np.isfinite(median) | np.isnan(median).all()
        axes.fill_between(curve.x, low, high, where=shown, color=color, alpha=0.15, linewidth=0)


def _axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    if x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
