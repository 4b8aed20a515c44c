"""The terminal view of a run while it goes on: a table on a terminal, plain lines elsewhere.

Knows only what the peers' traces say. `fold` keeps what is shown of a peer as a value; rendering reads it. Text that
came from elsewhere is never taken for markup or for a terminal's control codes.
"""

import math
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from p2pfl.core.trace import (
    Entry,
    Evaluated,
    LinkChanged,
    Note,
    PeerFinished,
    PeerStarted,
    Refused,
    RoundEnded,
    State,
    StateChanged,
)
from p2pfl.node.tracefile import TraceReader

UNMASKED = "UNMASKED: neighbors see each other's updates"
MASKED = "masked: only sums are revealed"
REMARKS_SHOWN = 4
"""Lines of the footer: what still leaves room for eight peers on 24 lines."""
QUIET_SECONDS = 10.0
"""Without an entry for so long, a peer's row says so: a trace cannot tell a slow round from a killed peer. A guess"""
REDRAW_SECONDS = 0.1
"""At most so often a terminal is redrawn; who watches a single peer calls `update` for each of its entries."""
_FRAME_LINES = 5
"""Lines that are not a peer's: the header, the columns' two, the line of those left out, the cursor's."""
_POLL_SECONDS, _JOIN_SECONDS = 0.2, 5.0
_STYLES: Mapping[State, str] = {
    State.STARTING: "dim",
    State.LINKING: "yellow",
    State.SYNCING: "yellow",
    State.TRAINING: "cyan",
    State.AVERAGING: "cyan",
    State.SETTLING: "blue",
    State.LEAVING: "magenta",
    State.DONE: "green",
    State.FAILED: "bold red",
}
GROUP_LOSS, APART = "group\nloss", "apart"
"""Columns: the mean loss over the last sum, and how far this peer's contribution was from what came of it."""
_PEER_ID = re.compile(r"^12D3KooW\w+: ")
"""What a link's reason begins with; its neighbor is named already."""
_IN_ROUNDS = (State.TRAINING, State.AVERAGING, State.SETTLING)


@dataclass(frozen=True)
class PeerView:
    """What is shown of a peer.

    Attributes:
        rounds: how many rounds have ended.
        settling: how many of them only averaged.
        metric: the name and the latest value of the task's main metric.
        heard: how many neighbors were in the last average.
        sought: how many there might have been: its neighbors, or the others of its group.
        absent: those that were not, with the stage at which each was lost, if the record tells.
        group_loss: of the local steps of all in the last average.
        distance: of the own contribution to that average, the root mean square over parameters.
        mark: what somebody says has befallen it, beside its state.
        at: when its trace last grew, in seconds since 1970.
    """

    name: str
    state: State = State.STARTING
    rounds: int = 0
    settling: int = 0
    loss: float | None = None
    metric: tuple[str, float] | None = None
    neighbors: tuple[str, ...] = ()
    heard: int = 0
    sought: int = 0
    mark: str = ""
    absent: tuple[tuple[str, str], ...] = ()
    group_loss: float | None = None
    distance: float | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    at: float | None = None
    finished: PeerFinished | None = None


def fold(view: PeerView, entry: Entry) -> PeerView:
    """Return what is shown of a peer once its trace has one more entry."""
    view = replace(view, bytes_in=entry.bytes_in, bytes_out=entry.bytes_out, at=entry.at)
    match entry.event:
        case PeerStarted() as event:
            return replace(
                PeerView(view.name, at=entry.at, bytes_in=entry.bytes_in, bytes_out=entry.bytes_out, mark=view.mark),
                neighbors=event.neighbors,
                rounds=event.resumed_at,
            )
        case StateChanged(state, _):
            return replace(view, state=State(state))
        case RoundEnded() as event:
            return replace(
                view,
                rounds=event.round + 1,
                settling=view.settling + event.settling,
                loss=view.loss if event.loss is None else event.loss,
                heard=len(event.heard),
                sought=len(event.heard) + len(event.absent) if event.outcome else len(view.neighbors),
                absent=tuple((name, why.partition(":")[0] if ":" in why else "") for name, why in event.absent.items()),
                group_loss=event.group_loss,
                distance=event.distance,
            )
        case Evaluated(_, metrics):
            return replace(view, metric=main_metric(metrics))
        case PeerFinished() as event:
            return replace(view, finished=event, state=State.FAILED if event.outcome == "failed" else State.DONE)
    return view


def remark(view: PeerView, entry: Entry) -> str | None:
    """Return the line that an entry after `view` is worth, if any: notes, refusals, lost links."""
    match entry.event:
        case Note(text):
            return printable(text)
        case Refused(who, reason):
            return printable(f"refused {who}: {reason}")
        case LinkChanged(neighbor, False, reason) if view.state not in (State.LEAVING, State.DONE, State.FAILED):
            why = _PEER_ID.sub("", reason)
            return printable(f"lost the link to {neighbor}" + (f": {why}" if why else ""))
        case LinkChanged(neighbor, True, _) if view.state in _IN_ROUNDS:
            return printable(f"linked to {neighbor} again")
    return None


def main_metric(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """Return the metric by which a model is judged: accuracy, else the task's first, else the loss."""
    names = [name for name in metrics if name != "loss"]
    name = "accuracy" if "accuracy" in names else next(iter([*names, *metrics]), None)
    return None if name is None else (name, metrics[name])


def size_text(count: float) -> str:
    """Write a number of bytes for people: 999 B, 6.4 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def printable(text: str) -> str:
    """Return `text` on one line, without anything a terminal might act on."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


class LiveView:
    """Shows the peers of a run; a context manager. Redraws, or prints what is new, at each `update`.

    Args:
        names: the peers', in the order they are shown.
        rounds: how many training rounds there are.
        console: where to draw; not a terminal: plain lines.
        title: what the header calls the run, such as its folder.
        masked: whether single updates are hidden.
    """

    def __init__(
        self, names: Sequence[str], rounds: int, console: Console, title: str = "", *, masked: bool = False
    ) -> None:
        self._masked = masked
        self._views = {name: PeerView(name) for name in names}
        self._rounds = rounds
        self._console = console
        self._title = title
        self._began = time.monotonic()
        self._drawn = -REDRAW_SECONDS
        self._remarks: list[str] = []
        self._shown_tenths = 0
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is None:
            self._print(f"{MASKED if self._masked else UNMASKED} ({self._title or 'this run'})")
        else:
            self._live.start()
            self._draw(self._live)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._draw(self._live)
            self._live.stop()

    def update(self, new: Mapping[str, Sequence[Entry]]) -> None:
        """Take what is new in each peer's trace."""
        changes: list[tuple[str, str]] = []
        remarks: list[tuple[str, str]] = []
        for name, entries in new.items():
            for entry in entries:
                before = self._views[name]
                self._views[name] = fold(before, entry)
                remarks += [(name, line)] if (line := remark(before, entry)) else []
                changes += [(name, line)] if (line := change(before, entry)) else []
        lines = together(remarks, len(self._views))
        if self._live is None:
            for line in [*self._progress(), *together(changes, len(self._views)), *lines]:
                self._print(line)
        else:
            self._remarks = [*self._remarks, *lines][-REMARKS_SHOWN:]
            if time.monotonic() - self._drawn >= REDRAW_SECONDS:
                self._draw(self._live)

    def tell(self, name: str, text: str, mark: str) -> None:
        """Take what happened to a peer, and what is shown beside its state from now on."""
        self._views[name] = replace(self._views[name], mark=mark)
        line = f"{name}: {text}"
        if self._live is None:
            self._print(line)
        else:
            self._remarks = [*self._remarks, line][-REMARKS_SHOWN:]
            self._draw(self._live)

    def _draw(self, live: Live) -> None:
        self._drawn = time.monotonic()
        elapsed = self._drawn - self._began
        views = list(self._views.values())
        header = header_line(self._title, elapsed, masked=self._masked)
        rows = max(1, self._console.height - _FRAME_LINES - REMARKS_SHOWN)
        table = peers_table(views, self._rounds, time.time(), rows)
        footer = [Text(line, style="yellow", no_wrap=True, overflow="ellipsis") for line in self._remarks]
        live.update(Group(header, table, *footer), refresh=True)

    def _progress(self) -> list[str]:
        """Return the line of progress, once for each tenth of the training rounds that half of the peers passed."""
        step = max(1, math.ceil(self._rounds / 10))
        tenths = int(statistics.median_low([view.rounds for view in self._views.values()])) // step
        if tenths <= self._shown_tenths:
            return []
        self._shown_tenths = tenths
        return [progress_line(list(self._views.values()), self._rounds)]

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)
        self._console.file.flush()


# Plain lines


def change(view: PeerView, entry: Entry) -> str | None:
    """Return the line for a peer that passed to another state after `view`, or finished, if it did.

    In groups a peer trains and averages in turns, which is no news.
    """
    match entry.event:
        case StateChanged(State.AVERAGING, _):
            return None
        case StateChanged(State.TRAINING, _) if view.state in _IN_ROUNDS:
            return None
        case StateChanged(State.DONE | State.FAILED, _):
            return None  # the line for the end says more, and comes once the model is on disk
        case StateChanged(state, round):
            return f"{state}" + (f" from round {round}" if state == State.SETTLING else "")
        case PeerFinished(outcome, round, agreed, reason):
            why = f": {printable(reason)}" if reason else ""
            return f"{outcome} after {round} rounds{', models agree' if agreed else ''}{why}"
    return None


def together(lines: Iterable[tuple[str, str]], peers: int) -> list[str]:
    """Write (peer, line) pairs as one line for all peers that say the same, in the order of the first."""
    says: dict[str, list[str]] = {}
    for name, line in lines:
        says.setdefault(line, []).append(name)
    return [f"{_named(names, peers)}: {line}" for line, names in says.items()]


def _named(names: Sequence[str], peers: int) -> str:
    return f"all {peers} peers" if peers > 1 and len(set(names)) == peers else ", ".join(dict.fromkeys(names))


def progress_line(views: Sequence[PeerView], rounds: int) -> str:
    """Sum up progress in one line: means over the peers that are at most a tenth of the rounds behind the median."""
    median = int(statistics.median_low([view.rounds for view in views]))
    abreast = [view for view in views if view.rounds + max(1, math.ceil(rounds / 10)) >= median]
    parts = [f"round {min(median, rounds)} of {rounds}" + (f" + {median - rounds} settling" if median > rounds else "")]
    losses = [view.loss for view in abreast if view.loss is not None]
    if losses:
        parts.append(f"loss {statistics.fmean(losses):.4f}")
    metrics = [view.metric for view in abreast if view.metric is not None]
    if metrics:
        values = [value for _, value in metrics]
        parts.append(f"{metrics[0][0]} {statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    behind = [view.name for view in views if view not in abreast]
    if behind:
        parts.append(f"far behind: {', '.join(behind)}")
    absent = sorted({lost for view in abreast for lost in view.absent})
    if absent:
        parts.append(f"absent: {', '.join(map(_lost, absent))}")
    parts.append(f"{size_text(sum(view.bytes_out for view in views))} sent")
    return ", ".join(parts)


# The table


def header_line(title: str, elapsed: float, *, masked: bool = False) -> Text:
    """Return the line above the table; it says first whether anything is masked."""
    what = (f" {MASKED} ", "bold black on green") if masked else (f" {UNMASKED} ", "bold black on yellow")
    line = Text.assemble(what, no_wrap=True, overflow="ellipsis")
    return line.append(f"  {printable(title)}" if title else "").append(f"  {duration_text(elapsed)}", "dim")


def duration_text(seconds: float) -> str:
    """Write a time for people: 0:07, 12:34, 1:00:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def peers_table(views: Sequence[PeerView], rounds: int, now: float, most: int) -> Table:
    """Return a row for each peer, at most `most`: where there are more, those in trouble and the first of the others.

    Args:
        views: in the order they are shown.
        rounds: how many training rounds there are.
        now: seconds since 1970.
        most: rows that fit.
    """
    metric = next((view.metric[0] for view in views if view.metric is not None), "metric")
    further = _further(views)
    table = Table(expand=False, pad_edge=False, box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("peer", no_wrap=True)
    table.add_column("state")  # this and the neighbors shrink where a terminal is narrow, never the numbers
    table.add_column("round\n+settling", no_wrap=True)
    for title in ("loss", metric, *further):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("heard", overflow="ellipsis")
    for title in ("in", "out"):
        table.add_column(title, justify="right", no_wrap=True)
    shown = _shown(views, now, most)
    for view in shown:
        table.add_row(*_row(view, rounds, now, further))
    hidden = Counter(view.state.value for view in views if view not in shown)
    if hidden:
        table.add_row(Text("…", "dim"), Text(", ".join(f"{n} {state}" for state, n in hidden.items()), "dim"))
    return table


def _shown(views: Sequence[PeerView], now: float, most: int) -> list[PeerView]:
    if len(views) <= most:
        return list(views)
    chosen = {view.name for view in sorted(views, key=lambda view: not _is_troubled(view, now))[:most]}
    return [view for view in views if view.name in chosen]


def _is_troubled(view: PeerView, now: float) -> bool:
    return view.state is State.FAILED or bool(view.absent) or _quiet(view, now) > QUIET_SECONDS


def _quiet(view: PeerView, now: float) -> float:
    return 0.0 if view.at is None or view.finished is not None else now - view.at


def _further(views: Sequence[PeerView]) -> list[str]:
    """Return the columns of what only records of sums tell; the group's loss where there is room, beside one peer."""
    columns = [GROUP_LOSS] if len(views) == 1 and views[0].group_loss is not None else []
    return [*columns, APART] if any(view.distance is not None for view in views) else columns


def _row(view: PeerView, rounds: int, now: float, further: Sequence[str]) -> list[Text]:
    told = {
        GROUP_LOSS: "" if view.group_loss is None else f"{view.group_loss:.4f}",
        APART: "" if view.distance is None else f"{view.distance:.1g}",
    }
    return [
        Text(view.name),
        _state(view, now),
        Text(f"{view.rounds - view.settling}/{rounds}" + (f" +{view.settling}" if view.settling else "")),
        Text("" if view.loss is None else f"{view.loss:.4f}"),
        Text("" if view.metric is None else f"{view.metric[1]:.3f}"),
        *(Text(told[column]) for column in further),
        _heard(view),
        Text(size_text(view.bytes_in)),
        Text(size_text(view.bytes_out)),
    ]


def _state(view: PeerView, now: float) -> Text:
    text = Text(view.state.value, _STYLES[view.state])
    if view.finished is not None and view.finished.outcome == "stopped":
        text = Text("stopped", "yellow")
    if view.mark:
        return text.append(f" ({view.mark})", "bold yellow")
    quiet = _quiet(view, now)
    return text.append(f" (quiet {duration_text(quiet)})", "yellow") if quiet > QUIET_SECONDS else text


def _heard(view: PeerView) -> Text:
    if not view.rounds:
        return Text("")
    text = Text(f"{view.heard}/{view.sought}", no_wrap=True)
    return text.append(f" without {', '.join(map(_lost, view.absent))}", "yellow") if view.absent else text


def _lost(absent: tuple[str, str]) -> str:
    name, stage = absent
    return f"{name} ({stage})" if stage else name


@contextmanager
def following(trace: TraceReader, name: str, view: "LiveView") -> Iterator[None]:
    """Show what comes into one peer's trace, from a thread: a terminal that stalls must not hold up the peer."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_POLL_SECONDS):
            view.update({name: list(trace.read_new())})
        view.update({name: list(trace.read_new())})

    thread = threading.Thread(target=follow, name="live view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_JOIN_SECONDS)
