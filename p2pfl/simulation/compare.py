"""Simulated runs beside each other: by what their settings differ, how they end, and how fast they get there."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from p2pfl.core.errors import InvalidConfig
from p2pfl.node.live import size_text
from p2pfl.node.store import write_atomic
from p2pfl.simulation.run_plots import comparison_figure, png, run_figure, spread, svg, trend_figure
from p2pfl.simulation.runs import Run, less_is_better, metric_words
from p2pfl.simulation.scenario import flat, unread

NEAR = 0.95
"""Of the best end, which `rounds to` counts to: a guess at what is nearly as good."""

LEAST_TREND = 3
"""Values of a number that make a trend."""

GAP = 2
"""Blanks between columns."""

LEAST_NAME = 24
"""Of a run's name, what is shown in one line before columns go into a table of their own: a guess."""

MOST_SAID = 4
"""Settings in which unlike runs differ that still make a name: a guess."""

UNCOMPARED = ("name", "description", "sweep")


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        labels: what tells each run from the others.
        metric: what they are judged by.
        table: a row for each run: `run`, `seeds`, `rounds`, and medians over seeds of how they end (`low` and `high`
            are quartiles of the metric); `rounds_to` the level, nan where it is not reached.
        level: what `rounds_to` counts to; nan where less is better.
        runs: in the order of the table.
    """

    labels: tuple[str, ...]
    metric: str
    table: pd.DataFrame
    level: float
    runs: tuple[Run, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Give what rich prints, in as many tables beside the runs' names as the width asks for."""
        columns, lone = self._columns(), len(self.runs) == 1
        spread_out = (self.table["seeds"] > 1).any()
        yield Text(f"{metric_words(self.metric)}, at the end{'' if spread_out else ', one seed'}".capitalize())
        widths = {
            name: max(map(cell_len, (*_header(name).splitlines(), *cells))) + GAP for name, cells in columns.items()
        }
        longest = 0 if lone else max(map(cell_len, self.labels))
        # Names that are too long go over several lines; of a number that is cut off nothing is left.
        room = options.max_width - (sum(widths.values()) if longest else 0)
        room = min(longest, max(room - GAP, LEAST_NAME))
        room = min(room, max(1, options.max_width - max(widths.values()) - GAP))
        for part in _parts(widths, options.max_width - (room + GAP if longest else 0)):
            shown = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
            if longest:
                shown.add_column("", overflow="fold", min_width=room, max_width=room)
            for name in part:
                shown.add_column(_header(name), justify="right", no_wrap=True, min_width=widths[name] - GAP)
            for place, label in enumerate(self.labels):
                shown.add_row(*([label] if longest else []), *(columns[name][place] for name in part))
            yield Text()
            yield shown
        yield Text()
        yield Text(cost_words(self.runs))

    def _columns(self) -> dict[str, list[str]]:
        """Return the cells under each name, without columns in which no run has anything."""
        table = self.table
        columns = {"median": [*map(_text, table["median"])]}
        if (table["seeds"] > 1).any():
            rows = zip(table["low"], table["high"], table["seeds"], strict=True)
            columns["quartiles"] = [
                f"{_text(low)} {_text(high)}" if seeds > 1 else "one seed" for low, high, seeds in rows
            ]
        if table["worst_peer"].notna().any():
            columns["worst peer"] = [*map(_text, table["worst_peer"])]
        columns["consensus"] = [f"{value:.2g}" for value in table["consensus"]]
        if not math.isnan(self.level):
            reached = table["rounds_to"]
            columns[f"rounds to {self.level:.3g}"] = ["-" if math.isnan(one) else f"{one:.0f}" for one in reached]
        columns["sent"] = [size_text(round(value)) for value in table["modelled_bytes"]]
        columns["takes"] = [f"{value:.1f} s" for value in table["modelled_seconds"]]
        return columns


def compare(runs: Sequence[Run], metric: str | None = None) -> Comparison:
    """Compare runs.

    Args:
        runs: two or more, or one.
        metric: a column of their frames; by default the task's first metric, of peers' own models.

    Raises:
        InvalidConfig: there are none, or a run has no such metric.
    """
    if not runs:
        raise InvalidConfig("nothing to compare; name runs, or folders of sweeps")
    chosen = metric or runs[0].metric
    for run in runs:
        if chosen not in run.frame:
            known = [name for name in run.frame.columns if name not in ("seed", "round")]
            raise InvalidConfig(f"{run.path or run.scenario.name}: no {chosen!r} there; it has {', '.join(known)}")
    labels = labels_of(runs)
    ends = [spread(run, chosen).median for run in runs]
    best = max((float(end[-1]) for end in ends if len(end)), default=math.nan)
    level = math.nan if less_is_better(chosen) else NEAR * best
    rows = [_row(run, label, chosen, level) for run, label in zip(runs, labels, strict=True)]
    return Comparison(tuple(labels), chosen, pd.DataFrame(rows), level, tuple(runs))


def cost_words(runs: Sequence[Run]) -> str:
    """Say whether what runs sent, and how long they took, is counted or modelled."""
    counted = [run.scenario.engine == "simnet" and run.scenario.training.algorithm != "ad-psgd" for run in runs]
    modelled = "are modelled: p2pfl scenario explain, [cost]."
    network = "are counted, and seconds are the simulated network's, of its latency and bandwidth."
    if not any(counted):
        return f"Bytes that a peer sends, and seconds, {modelled}"
    if all(counted):
        return f"Bytes that a peer sends {network}"
    return f"Of the engine simnet bytes that a peer sends {network} Others {modelled}"


def save_comparison(comparison: Comparison, folder: Path) -> tuple[Path, ...]:
    """Write a comparison's table and figures; return the files.

    Raises:
        InvalidConfig: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfig(f"{folder}: cannot be made: {error.strerror}") from error
    contents = {"comparison.csv": comparison.table.to_csv(index=False, lineterminator="\n").encode()}
    figures = {"comparison": comparison_figure(comparison.runs, comparison.labels, comparison.metric)}
    trend = trend_of(comparison.runs)
    if trend is not None:
        figures["trend"] = trend_figure(comparison.runs, trend.values, trend.groups, trend.key, comparison.metric)
    for name, figure in figures.items():
        contents |= {f"{name}.png": png(figure), f"{name}.svg": svg(figure)}
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return tuple(folder / name for name in contents)


def draw_run(run: Run) -> tuple[Path, ...]:
    """Draw a run's curves into its folder; return the files.

    Raises:
        InvalidConfig: it has no folder, or they cannot be written.
    """
    if run.path is None:
        raise InvalidConfig(f"{run.scenario.name}: this run is in no folder; save it first")
    figure = run_figure(run)
    files = {"curves.png": png(figure), "curves.svg": svg(figure)}
    for name, content in files.items():
        write_atomic(run.path / name, content)
    return tuple(run.path / name for name in files)


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return for each run the settings, by dotted key, in which they differ; None where a run reads none such."""
    each = [
        {key: value for key, value in flat(run.scenario.settings()) if key.partition(".")[0] not in UNCOMPARED}
        for run in runs
    ]
    keys = dict.fromkeys(key for one in each for key in one)
    differing = [key for key in keys if any(one.get(key) != each[0].get(key) for one in each)]
    return [
        {key: None if key in unread(run.scenario) else one.get(key) for key in differing}
        for run, one in zip(runs, each, strict=True)
    ]


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Name runs by what tells them apart; by their folders where nothing does.

    Runs of several scenarios that differ in much have their scenarios' names, and what tells runs of one apart.
    """
    found = differences(runs)
    if not found[0]:
        return [run.path.name if run.path else f"{run.scenario.name} {place}" for place, run in enumerate(runs)]
    names = [run.scenario.name for run in runs]
    if len(set(names)) == 1 or max(sum(value is not None for value in one.values()) for one in found) <= MOST_SAID:
        return _said(found)
    labels = list(names)
    for name in set(names):
        places = [place for place, other in enumerate(names) if other == name]
        if len(places) > 1:
            for place, label in zip(places, labels_of([runs[place] for place in places]), strict=True):
                labels[place] = f"{name}: {label}"
    return labels


@dataclass(frozen=True)
class Trend:
    """A number that runs differ in.

    Attributes:
        key: of the setting.
        values: each run's.
        groups: what tells runs of equal values apart, in words.
    """

    key: str
    values: tuple[float, ...]
    groups: tuple[str, ...]


def trend_of(runs: Sequence[Run]) -> Trend | None:
    """Return the first number that runs differ in, if it has enough values for a curve among runs alike in all else."""
    found = differences(runs)
    for key in found[0]:
        values = [one[key] for one in found]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if not numbers:
            continue
        groups = _said([{name: value for name, value in one.items() if name != key} for one in found])
        pairs = set(zip(groups, values, strict=True))
        if max(Counter(group for group, _ in pairs).values()) >= LEAST_TREND:
            return Trend(key, tuple(map(float, values)), tuple(groups))
    return None


def _said(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say each run's settings, with as much of their keys as tells them apart; those that are None are left out."""
    keys = list(found[0])
    lasts = [key.rpartition(".")[2] for key in keys]
    names = {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}

    def of(key: str) -> list[Any]:
        return [one[key] for one in found if one[key] is not None]

    def speaks(key: str, value: Any) -> bool:
        """Words speak for themselves, numbers do not; nor does a word beside nothing, or that another key has, too."""
        others = any(value in of(other) for other in keys if other != key)
        return isinstance(value, str) and value not in ("on", "off") and all(of(key)) and not others

    def said(key: str, value: Any) -> str:
        if value in ("", (), [], {}):
            return f"no {names[key]}"
        word = (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )
        return word if speaks(key, value) else f"{names[key]} {word}"

    return [", ".join(said(key, value) for key, value in one.items() if value is not None) for one in found]


def _row(run: Run, label: str, metric: str, level: float) -> dict[str, Any]:
    curve, final = spread(run, metric), run.summary["final"]

    def end(key: str) -> float:
        value = final.get(key, {}).get("median")
        return math.nan if value is None else float(value)

    reached = curve.x[curve.median >= level] if not math.isnan(level) else curve.x[:0]
    low, median, high = (float(part[-1]) if len(part) else math.nan for part in (curve.low, curve.median, curve.high))
    return {
        "run": label, "seeds": len(run.scenario.seeds), "rounds": max(seed["rounds"] for seed in run.summary["seeds"]),
        "median": median, "low": low, "high": high, "worst_peer": _worst(run, metric), "consensus": end("consensus"),
        "rounds_to": float(reached[0]) if len(reached) else math.nan, "modelled_bytes": end("modelled_bytes"),
        "modelled_seconds": end("modelled_seconds"), "path": str(run.path or ""),
    }  # fmt: skip


def _worst(run: Run, metric: str) -> float:
    """Return the worst evaluated peer's value at the end, the median over seeds; nan where none has such."""
    own = metric.removeprefix("peer_")
    if own not in run.peers:
        return math.nan
    ends = run.evaluated.groupby("seed")["round"].max()
    last = run.peers[run.peers["round"] == run.peers["seed"].map(ends)].groupby("seed")[own]
    return float((last.max() if less_is_better(own) else last.min()).median())


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _header(name: str) -> str:
    """Write a column's name over two lines, if it has two words: its numbers are short."""
    first, _, second = name.rpartition(" ")
    return f"{first}\n{second}"


def _parts(widths: Mapping[str, int], room: int) -> Iterator[list[str]]:
    """Part columns, in order, into as few tables of that width as they fit into."""
    part: list[str] = []
    for name, width in widths.items():
        # The last column's gap is beyond the edge.
        if part and sum(widths[each] for each in part) + width - GAP > room:
            yield part
            part = []
        part.append(name)
    yield part
