"""What a topology that changes, or whose links go one way, costs and how fast it mixes; for a terminal and as JSON."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.contraction import DRAWS, Contraction, contraction
from p2pfl.gossip.graphs import GRAPHS, MOST_PEERS
from p2pfl.gossip.schedule import SCHEDULES, Kind, Round, Schedule, describe, schedule
from p2pfl.node.live import size_text
from p2pfl.simulation.costs import load_of
from p2pfl.simulation.mixed import GROUPED
from p2pfl.simulation.plots import ROUNDS_DRAWN, rounds_figure

CHANGING = tuple(name for name in SCHEDULES if name not in {"groups", "graph", *GRAPHS})
"""Topologies of the convergence lab alone. Groups, graphs that stay and files have a report of their own."""
BYTES_PER_PARAMETER = 4
_KINDS: dict[Kind, str] = {
    "doubly": "rows and columns sum to 1: peers agree on the exact mean",
    "row": "only rows sum to 1: peers agree, not quite on the mean",
    "column": "only columns sum to 1: peers agree on the exact mean if the algorithm is push-sum",
}
_LEAKAGE = "not computed: no charter has this topology, and in the lab there is nobody to collude"
_LEAKAGE_OF_STARS = "see the row stars of p2pfl topology {}, the overlay that they are drawn on here"


@dataclass(frozen=True)
class ScheduleReport:
    """A schedule of mixing matrices in figures.

    Attributes:
        name: of the topology.
        options: of the topology, as asked for.
        peers: how many.
        kind: which sums of the matrices are 1.
        period: after how many rounds they repeat; None: they are drawn anew.
        heard: the smallest, the mean and the largest number of others whose vectors enter a peer's, in a round.
        sent_mean: what a peer sends in a round, in lengths of the model, as the lab models it.
        sent_most: the most that one peer sends or hears in a round, in the same unit.
        contraction: how fast consensus is reached.
        parameters: of the model; None: bytes are not given.
        first_rounds: of the first rounds, each (sender, receiver).
    """

    name: str
    options: Mapping[str, Any]
    peers: int
    kind: Kind
    period: int | None
    heard: tuple[int, float, int]
    sent_mean: float
    sent_most: float
    contraction: Contraction
    parameters: int | None
    first_rounds: tuple[tuple[tuple[int, int], ...], ...]

    def figure(self) -> Figure:
        """Draw who hears whom in each of the first rounds."""
        return rounds_figure(f"{called(self.name, self.options)}: {self.peers} peers", self.peers, self.first_rounds)

    def to_json(self) -> str:
        """Return everything as JSON, with `bytes_mean` and `bytes_most` if parameters are known."""
        values = asdict(self)
        if self.parameters is not None:
            scale = BYTES_PER_PARAMETER * self.parameters
            values |= {"bytes_mean": round(self.sent_mean * scale), "bytes_most": round(self.sent_most * scale)}
        return json.dumps(values, indent=2)

    def __rich__(self) -> Group:
        """Return the table for a terminal."""
        facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for title, value in self._facts():
            facts.add_row(title, value)
        overlay = self.options.get("overlay", "exponential")
        leakage = _LEAKAGE_OF_STARS.format(overlay) if self.name == "stars" else _LEAKAGE
        return Group(facts, Text(), Text(describe(self.name)), Text(f"who isolates an update: {leakage}"))

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "topology", called(self.name, self.options)
        yield "peers", f"{self.peers}"
        yield "matrices", _KINDS[self.kind]
        rounds = "drawn anew in each" if self.period is None else f"they repeat after {self.period}"
        yield "rounds", "all are alike" if self.period == 1 else rounds
        low, mean, high = self.heard
        alike = f"{low} other{'s' if low != 1 else ''}"
        yield "heard", alike if low == high else f"{low} to {high} others, {mean:.3g} on average"
        yield "sent a round", self._sent()
        yield "contraction", self._kept()
        yield "until 1/1000", _count(self.contraction.rounds)
        yield "until exact", _count(self.contraction.exact_after)

    def _kept(self) -> str:
        if self.contraction.exact_after is not None:
            return f"{_count(self.contraction.exact_after)} leave nothing of the consensus distance"
        left = f"a round leaves {self.contraction.kept:.4f} of the consensus distance"
        if self.period is None:
            return f"{left}, expected"
        return f"{left} at most" if self.period == 1 else f"{left} at most, as the mean over {self.period}"

    def _sent(self) -> str:
        scale = None if self.parameters is None else BYTES_PER_PARAMETER * self.parameters
        mean, most = (f"{sent:.3g} |x|" if scale is None else size_text(sent * scale)
                      for sent in (self.sent_mean, self.sent_most))  # fmt: skip
        return mean if mean == most else f"{mean} on average; a peer sends or hears {most} at most"


def called(name: str, options: Mapping[str, Any]) -> str:
    """Return what a topology with options is called."""
    return ", ".join([name, *(f"{option} = {value}" for option, value in options.items())])


def _count(rounds: int | None) -> str:
    return "in no number of rounds" if rounds is None else f"{rounds} round{'s' if rounds > 1 else ''}"


def analyse_schedule(
    name: str,
    peers: int | None = None,
    *,
    seed: int = 0,
    colluders: int = 1,
    parameters: int | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> ScheduleReport:
    """Analyse a topology of `CHANGING`.

    Args:
        name: of the topology.
        peers: how many; 20 unless given.
        seed: of what is drawn.
        colluders: how many a star must bear.
        parameters: how many values the model has.
        options: of the topology.

    Raises:
        InvalidConfig: there is no such topology with these options for so many peers, or a number is out of range.
    """
    n = 20 if peers is None else peers
    if not 2 <= n <= MOST_PEERS:
        raise InvalidConfig(f"--peers: 2 to {MOST_PEERS}, not {n}")
    if not 0 <= colluders <= n - 2:
        raise InvalidConfig(f"--colluders: 0 to {n - 2}, all peers but two, not {colluders}")
    if parameters is not None and parameters < 1:
        raise InvalidConfig(f"--parameters: at least 1, not {parameters}")
    asked = {"colluders": colluders, **options} if name == "stars" else options
    plan = schedule(name, n, seed, **asked)
    rounds = [plan.at(number) for number in range(DRAWS if plan.period is None else plan.period)]
    heard = np.concatenate([_others(each).sum(1) for each in rounds])
    loads = [load_of(each, summed=name in GROUPED) for each in rounds]
    return ScheduleReport(
        name=name,
        options=dict(options),
        peers=n,
        kind=plan.kind,
        period=plan.period,
        heard=(int(heard.min()), float(heard.mean()), int(heard.max())),
        sent_mean=sum(load.mean for load in loads) / len(loads),
        sent_most=max(load.most for load in loads),
        contraction=contraction(plan),
        parameters=parameters,
        first_rounds=_first_rounds(plan),
    )


def _first_rounds(plan: Schedule) -> tuple[tuple[tuple[int, int], ...], ...]:
    drawn = []
    for number in range(min(ROUNDS_DRAWN, plan.period or ROUNDS_DRAWN)):
        round = plan.at(number)
        receivers, places = np.nonzero(_others(round))
        senders = round.indices[receivers, places]
        drawn.append(tuple(zip(senders.tolist(), receivers.tolist(), strict=True)))
    return tuple(drawn)


def _others(round: Round) -> NDArray[np.bool_]:
    """Return which entries of the rows are another's vector, bool [n, k]."""
    others: NDArray[np.bool_] = (round.weights != 0) & (round.indices != np.arange(len(round.indices))[:, None])
    return others
