"""`p2pfl report`: a run's numbers, plots and final table, computed from its folder and written into it."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from p2pfl.node.live import printable, size_text
from p2pfl.node.store import write_atomic
from p2pfl.simulation.baselines import baselines, read_shares
from p2pfl.simulation.plots import accuracy_figure, consensus_figure, exchanges_figure, groups_text, overlay_figure, png
from p2pfl.simulation.results import open_run
from p2pfl.simulation.summary import GroupsSummary, PeerSummary, PrivacySummary, Summary, consensus_curve, summarise

SUMMARY_FILE, TEXT_FILE = "summary.json", "report.txt"
ACCURACY_FILE, CONSENSUS_FILE = "accuracy.png", "consensus.png"
OVERLAY_FILE, EXCHANGES_FILE = "overlay.png", "exchanges.png"
TEXT_WIDTH = 120
NAMED = 3
"""So many peers are named in a line, of more their number is told; a guess at what a line holds."""
UNMASKED_RUN = "UNMASKED: neighbors saw each other's updates"
_STYLES = {"done": "green", "stopped": "yellow"}


@dataclass(frozen=True)
class Report:
    """What a run came to; rich prints it as the final table.

    Attributes:
        path: the folder that was read and written.
        files: what was written.
    """

    path: Path
    summary: Summary
    files: tuple[Path, ...]

    def __rich__(self) -> Group:
        """Give what rich prints: the final table, a line above it and the lines below it."""
        head = f"{self.summary.metric} on held-out examples, each peer alone and together with the others"
        lines = map(Text, final_lines(self.summary))
        warning = [] if self.summary.masked else [Text(UNMASKED_RUN)]
        return Group(*warning, Text(head), Text(), final_table(self.summary), Text(), *lines)


def report(run: Path) -> Report:
    """Compute a run's results and write them into its folder; training the baselines is done once.

    Args:
        run: the folder of a run, or of one member.

    Raises:
        InvalidConfig: it is none, or cannot be written to.
        P2pflError: the task fails on the models that the run left.
    """
    opened = open_run(run)
    shares = read_shares(opened)
    against = baselines(opened, shares)
    summary = summarise(opened, against, shares)
    result = Report(opened.path, summary, ())
    contents = {
        SUMMARY_FILE: summary_json(summary),
        ACCURACY_FILE: png(accuracy_figure(opened, against, summary)),
        CONSENSUS_FILE: png(consensus_figure(consensus_curve(opened.peers), summary)),
        OVERLAY_FILE: png(overlay_figure(opened, summary)),
        EXCHANGES_FILE: png(exchanges_figure(opened)),
        TEXT_FILE: as_text(result).encode(),
    }
    for name, content in contents.items():
        write_atomic(opened.path / name, content)
    return Report(opened.path, summary, tuple(opened.path / name for name in contents))


def summary_json(summary: Summary) -> bytes:
    """Write the numbers as JSON, with each peer's gain."""
    values = asdict(summary)
    for row, peer in zip(values["peers"], summary.peers, strict=True):
        row["gain"] = peer.gain
    return json.dumps(values, indent=2).encode()


def as_text(result: Report) -> str:
    """Return what a terminal of `TEXT_WIDTH` columns shows, without colours."""
    console = Console(
        file=io.StringIO(), width=TEXT_WIDTH, color_system=None, force_terminal=False, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(result)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def final_table(summary: Summary) -> Table:
    """Return the final table, a row for each peer: within 80 columns while every peer ended well."""
    classes = any(peer.classes is not None for peer in summary.peers)
    outcomes = not all(peer.outcome == "done" and peer.agreed for peer in summary.peers)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("peer", no_wrap=True)
    for title in ("examples", *(["classes"] if classes else []), "alone", "together", "gain"):
        table.add_column(title, justify="right", no_wrap=True)
    if outcomes:
        table.add_column("outcome")
    for title in ("rounds", "in", "out"):
        table.add_column(title, justify="right", no_wrap=True)
    for peer in summary.peers:
        table.add_row(*_cells(peer, summary, classes, outcomes))
    return table


def _cells(peer: PeerSummary, summary: Summary, classes: bool, outcomes: bool) -> list[Text]:
    metric = summary.metric
    return [
        Text(peer.name),
        Text(_or_dash(peer.examples)),
        *([Text(f"{peer.classes}/{summary.classes}")] if classes else []),
        Text(value_text(peer.alone, metric)),
        Text(value_text(peer.together, metric)),
        Text(gain_text(peer.gain, metric), _gain_style(peer.gain)),
        *([Text(outcome_text(peer), _STYLES.get(peer.outcome, "bold red"))] if outcomes else []),
        Text(str(peer.rounds)),
        Text(size_text(peer.bytes_in)),
        Text(size_text(peer.bytes_out)),
    ]


def outcome_text(peer: PeerSummary) -> str:
    """Say how a peer ended."""
    match peer.outcome:
        case "done":
            return "done, agreed" if peer.agreed else "done"
        case "missing":
            return "left no trace"
        case "killed":
            return f"killed at round {peer.rounds}"
        case "failed":
            return f"failed at round {peer.rounds}: {printable(peer.reason)}"
    return f"{peer.outcome} at round {peer.rounds}"


def value_text(value: float | None, metric: str) -> str:
    """Write a metric: accuracy in percent, others as they are."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if metric == "accuracy" else f"{value:.4g}"


def _span_text(values: Sequence[float], metric: str) -> str:
    low, high = value_text(min(values), metric), value_text(max(values), metric)
    return low if low == high else f"{low} to {high}"


def gain_text(value: float | None, metric: str) -> str:
    """Write a difference of a metric: of accuracies in percentage points."""
    if value is None:
        return "-"
    return f"{100 * value:+.1f}" if metric == "accuracy" else f"{value:+.4g}"


def _gain_style(value: float | None) -> str:
    return "" if value is None else "green" if value > 0 else "red" if value < 0 else ""


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def final_lines(summary: Summary) -> list[str]:
    """Return the lines below the table."""
    return [f"{title:<20}{value}" for title, value in _facts(summary)]


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    if summary.central is not None:
        yield "reference", f"{value_text(summary.central, summary.metric)} {summary.metric} with all data in one place"
    if summary.privacy is not None:
        yield from _privacy_facts(summary.privacy, summary.metric)
    for name, further in summary.further.items():
        found = {
            "together": further.together,
            "alone": further.alone,
            "with all data in one place": () if further.central is None else (further.central,),
        }
        yield name, ", ".join(f"{_span_text(values, name)} {where}" for where, values in found.items() if values)
    if summary.missing:
        yield "reference", f"none: {summary.missing}"
    if all(peer.outcome == "done" and peer.agreed for peer in summary.peers):
        yield "outcome", "every peer finished, and their models agree"
    if summary.consensus is not None:
        within = "within" if summary.consensus <= summary.tolerance else "above"
        yield (
            "consensus distance",
            f"{summary.consensus:.2g} over {summary.consensus_peers} models, "
            f"{within} the tolerance of {summary.tolerance:g}",
        )
    if first := max((peer.first_round for peer in summary.peers), default=0):
        short = [peer.name for peer in summary.peers if peer.first_round]
        whose = ", ".join(map(printable, short)) if len(short) <= NAMED else f"{len(short)} peers"
        lost = f"from round {first} on; earlier ones are no longer in the trace of {whose} (logging.trace_bytes)"
        yield "figures over rounds", lost
    if summary.seconds_per_round is not None:
        yield "time per round", f"{time_text(summary.seconds_per_round)} (median of the training rounds)"
    yield "traffic", f"{size_text(summary.bytes_sent)} sent by all peers"
    if summary.bytes_per_value is not None:
        what = "link; 4 is the float32 itself" if summary.groups is None else "peer; an update and an average are 8"
        yield "bytes per parameter", f"{summary.bytes_per_value:.3f} for each round and {what}"
    if summary.groups is None:
        overlay, (low, high) = summary.overlay, summary.overlay.degree
        yield (
            "overlay",
            f"{overlay.topology}, degree {low if low == high else f'{low} to {high}'}, diameter {overlay.diameter}, "
            f"spectral gap {overlay.spectral_gap:.3f}",
        )
        if summary.masked:
            yield "records", _records(summary.records)
    else:
        yield from _group_facts(summary.groups)
    yield "masks", "on: only sums were revealed" if summary.masked else f"off: {UNMASKED_RUN}"


def _privacy_facts(privacy: PrivacySummary, metric: str) -> Iterator[tuple[str, str]]:
    yield (
        "noise",
        f"{privacy.noise:g} times the clip; epsilon {privacy.epsilon:.4g} at delta {privacy.delta:g} in "
        f"{privacy.rounds} rounds, the budget bears {privacy.borne}",
    )
    if privacy.noiseless is not None:
        yield "without noise", f"{value_text(privacy.noiseless, metric)} {metric}, with the same clip, all in one group"


def _group_facts(groups: GroupsSummary) -> Iterator[tuple[str, str]]:
    yield "overlay", f"{groups_text(groups)}; each round leaves {groups.contraction:.3f} of the variance"
    yield "records", _records(groups.outcomes)
    for name, reasons in groups.absences.items():
        whys = ", ".join(f"{printable(why)} {count}" for why, count in reasons.items())
        rounds = sum(reasons.values())
        yield "absent", f"{printable(name)} in {rounds} round{'s' if rounds > 1 else ''}: {whys}"


def _records(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count) or "none"


def time_text(seconds: float) -> str:
    """Write a short time for people: 23.1 ms, 4.20 s."""
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
