"""A run in numbers: how good each peer's model is, how far apart they are, what it took.

Owns `summary.json`'s content. Everything is computed from what the peers left and from the baselines.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.ids import Round
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.mixing import consensus_distance, metropolis_hastings, spectral_gap
from p2pfl.gossip.session import Outcome
from p2pfl.gossip.topology import diameter, overlay_of
from p2pfl.learning.task import Data
from p2pfl.node.live import main_metric
from p2pfl.simulation.baselines import Baselines, Curve, Share, measure, spread_out
from p2pfl.simulation.results import PeerRun, Run

BLOCK = 1 << 16
"""Parameters of all peers that are in memory at a time: 64 MiB in float64 for 128 peers."""
MOST_COPIES = 600
"""Points of the consensus plot: what 1200 pixels show apart."""


@dataclass(frozen=True)
class PeerSummary:
    """A row of the final table.

    Attributes:
        name: the member's.
        outcome: see `p2pfl.simulation.results.Outcome.kind`.
        rounds: how many rounds it completed.
        agreed: whether its model is known to be within the charter's tolerance of the others.
        reason: why it failed.
        examples: how many it trained on.
        classes: how many classes they are of, where they are of classes.
        alone: the metric of the model it gets without the others.
        together: the metric of its model of the run: the file it left, else its last evaluation.
        bytes_in: bytes received by its sockets.
        bytes_out: bytes sent by them.
        first_round: the first that its trace still has, and all figures over rounds are of; 0 if it is whole.
    """

    name: str
    outcome: str
    rounds: int
    agreed: bool
    reason: str
    examples: int | None
    classes: int | None
    alone: float | None
    together: float | None
    bytes_in: int
    bytes_out: int
    first_round: int = 0

    @property
    def gain(self) -> float | None:
        """What the federation was worth to this peer; None where it did not see the end of it."""
        if self.alone is None or self.together is None or self.outcome != "done":
            return None
        return self.together - self.alone


@dataclass(frozen=True)
class FurtherMetric:
    """What the task measures beside the metric that models are judged by, for those peers where it is known.

    Attributes:
        alone: of the models that peers get without the others.
        together: of the run's models.
        central: of one model trained on all peers' data.
    """

    alone: tuple[float, ...]
    together: tuple[float, ...]
    central: float | None


@dataclass(frozen=True)
class OverlaySummary:
    """The overlay: `degree` is the smallest and the largest number of neighbors, `diameter` in hops."""

    topology: str
    degree: tuple[int, int]
    diameter: int
    spectral_gap: float


@dataclass(frozen=True)
class GroupsSummary:
    """Groups that are drawn anew each round, in numbers; only where there are such.

    Attributes:
        size: members wanted in a group.
        count: groups in a training round.
        contraction: by what factor the variance over peers is expected to shrink in a round in which all take part:
            (k - 1) / (N - 1) for k groups of equal size, as the variance of the means of samples without replacement.
        outcomes: how many records there are of each outcome, over all peers.
        absences: by member, the rounds it was not in the sum of its group, by the reason that most of those who say so
            give.
    """

    size: int
    count: int
    contraction: float
    outcomes: Mapping[str, int]
    absences: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class PrivacySummary:
    """What noise there was, and what it cost.

    Attributes:
        noise: as a multiple of the clip.
        epsilon: spent by the member that took part in most rounds.
        delta: at this.
        rounds: which that is of.
        borne: how many rounds the budget bears.
        noiseless: the metric that the same peers reach without noise, all in one group.
    """

    noise: float
    epsilon: float
    delta: float
    rounds: int
    borne: int
    noiseless: float | None


@dataclass(frozen=True)
class Summary:
    """A run in numbers.

    Attributes:
        federation: its name.
        charter: the charter's hash, in hexadecimal.
        metric: the one that models are judged by.
        rounds: training rounds agreed on.
        parameters: values of the model that are averaged.
        central: the metric of one model trained on all peers' data.
        consensus: the consensus distance at the end, of the models the peers left.
        consensus_peers: how many those are.
        tolerance: the consensus distance that was to be reached.
        seconds_per_round: the median from the start of a training round to the start of the next.
        bytes_sent: by all peers.
        bytes_per_value: received bytes for each parameter of each update that was averaged; 4 is a float32 alone. In
            groups, for each parameter of each round's average: a chunk of everybody's update, and all of the average.
        classes: how many classes all peers' examples are of.
        missing: why there are no baselines.
        masked: whether single updates were hidden.
        further: the task's other metrics, by name; the loss is none.
        privacy: None where no noise was added.
    """

    federation: str
    charter: str
    metric: str
    rounds: int
    parameters: int
    overlay: OverlaySummary
    groups: GroupsSummary | None
    peers: tuple[PeerSummary, ...]
    central: float | None
    consensus: float | None
    consensus_peers: int
    tolerance: float
    seconds_per_round: float | None
    bytes_sent: int
    bytes_per_value: float | None
    classes: int | None
    missing: str
    masked: bool
    further: Mapping[str, FurtherMetric]
    records: dict[str, int]
    privacy: PrivacySummary | None = None


def summarise(run: Run, against: Baselines, shares: Mapping[str, Data] | None) -> Summary:
    """Compute a run's numbers.

    Args:
        run: the run.
        against: its baselines.
        shares: each peer's data, to measure the models on; without it, their last evaluations count.
    """
    charter = run.charter
    metric = metric_of(run, against)
    models = final_models(run.peers)
    together = [_together(run, peer, shares) for peer in run.peers]
    return Summary(
        federation=charter.name,
        charter=charter.hash().hex(),
        metric=metric,
        rounds=charter.rounds,
        parameters=charter.model.parameters,
        overlay=overlay_summary(run),
        groups=groups_summary(run) if run.charter.averaging.topology == "groups" else None,
        peers=tuple(_peer(peer, against, metrics, metric) for peer, metrics in zip(run.peers, together, strict=True)),
        central=last(against.central, metric),
        consensus=distance(models) if len(models) > 1 else None,
        consensus_peers=len(models),
        tolerance=charter.averaging.tolerance,
        seconds_per_round=seconds_per_round(run.peers),
        bytes_sent=sum(peer.traffic()[1] for peer in run.peers),
        bytes_per_value=bytes_per_value(run),
        classes=against.classes,
        masked=run.charter.averaging.masks == "on",
        records=records(run),
        missing=against.missing,
        further=_further(against, together, metric),
        privacy=privacy_summary(run, against, metric),
    )


def metric_of(run: Run, against: Baselines) -> str:
    """Name the metric that models are judged by: accuracy where there is one."""
    curves = [*(peer.evaluations() for peer in run.peers), against.central]
    curves += [share.curve for share in against.shares.values()]
    for curve in curves:
        for metrics in curve.values():
            if (main := main_metric(metrics)) is not None:
                return main[0]
    return "accuracy"


def last(curve: Curve, metric: str) -> float | None:
    """Return the last value of a metric on a curve."""
    return finite(curve[max(curve)].get(metric)) if curve else None


def finite(value: float | None) -> float | None:
    """Return `value` unless it is no number."""
    return value if value is not None and math.isfinite(value) else None


def overlay_summary(run: Run) -> OverlaySummary:
    """Describe the charter's overlay."""
    graph = overlay_of(run.charter)
    degrees = [degree for _, degree in graph.degree]
    gap = spectral_gap(metropolis_hastings(graph))
    return OverlaySummary(run.charter.averaging.topology, (min(degrees), max(degrees)), diameter(graph), gap)


def groups_summary(run: Run) -> GroupsSummary:
    """Describe the charter's groups, and how their rounds ended."""
    charter = run.charter
    peers, size = len(charter.members), min(charter.averaging.group_size, len(charter.members))
    count = len(GroupPlan.for_peer(charter, charter.roster()[0]).groups(Round(0)))
    contraction = (count - 1) / max(1, peers - 1)
    return GroupsSummary(size, count, contraction, records(run), _absences(run.peers))


def privacy_summary(run: Run, against: Baselines, metric: str) -> PrivacySummary | None:
    """Say what the run's noise cost; each upload counts, whatever became of it."""
    budget = run.charter.budget
    if budget is None:
        return None
    most = max((_uploads(peer, run.charter.rounds) for peer in run.peers), default=0)
    epsilon = budget.spent(most * budget.rho)
    noiseless = last(against.noiseless, metric)
    return PrivacySummary(budget.noise, epsilon, budget.delta, most, budget.rounds, noiseless)


def _uploads(peer: PeerRun, rounds: int) -> int:
    """Return in how many of so many rounds a peer may have uploaded; who knows of no upload in vain counts it."""
    unspent = sum(event.round < rounds and event.outcome == Outcome.SKIP for _, event in peer.rounds_ended())
    return min(peer.outcome.rounds, rounds) - unspent


def records(run: Run) -> dict[str, int]:
    """Count by outcome how the rounds ended that had one: those in groups, and in stars."""
    counted = Counter(record.outcome for peer in run.peers for _, record in peer.rounds_ended() if record.outcome)
    return {str(outcome): counted[outcome] for outcome in Outcome}


def _absences(peers: Sequence[PeerRun]) -> dict[str, dict[str, int]]:
    """Count by member and reason the rounds whose sums were made without it."""
    said: dict[tuple[str, int], Counter[str]] = {}
    for peer in peers:
        for _, record in peer.rounds_ended():
            # Whose round gave no average knows of nobody that was not in it.
            if record.outcome and record.heard:
                for name, why in record.absent.items():
                    said.setdefault((name, record.round), Counter())[why.partition(";")[0]] += 1
    absences: dict[str, Counter[str]] = {}
    for (name, _), reasons in sorted(said.items()):
        absences.setdefault(name, Counter())[min(reasons, key=lambda why: (-reasons[why], why))] += 1
    return {name: dict(reasons.most_common()) for name, reasons in absences.items()}


def _together(run: Run, peer: PeerRun, shares: Mapping[str, Data] | None) -> Mapping[str, float]:
    """Return the metrics of a peer's model of the run; empty where nothing is known of it."""
    if shares is not None and peer.model is not None:
        return measure(run, shares[peer.name], peer.model)
    curve = peer.evaluations()
    return curve[max(curve)] if curve else {}


def _further(against: Baselines, together: Sequence[Mapping[str, float]], metric: str) -> dict[str, FurtherMetric]:
    names = dict.fromkeys(name for metrics in together for name in metrics if name not in (metric, "loss"))
    alone = [share.curve for share in against.shares.values()]

    def known(values: Iterable[float | None]) -> tuple[float, ...]:
        return tuple(value for value in values if value is not None)

    return {
        name: FurtherMetric(
            known(last(curve, name) for curve in alone),
            known(finite(metrics.get(name)) for metrics in together),
            last(against.central, name),
        )
        for name in names
    }


def _peer(peer: PeerRun, against: Baselines, together: Mapping[str, float], metric: str) -> PeerSummary:
    started = peer.started
    share = against.shares.get(peer.name, Share(started.examples, None, {}) if started is not None else None)
    bytes_in, bytes_out = peer.traffic()
    return PeerSummary(
        name=peer.name,
        outcome=peer.outcome.kind,
        rounds=peer.outcome.rounds,
        agreed=peer.outcome.agreed,
        reason=peer.outcome.reason,
        examples=share.examples if share is not None else None,
        classes=share.classes if share is not None else None,
        alone=last(share.curve, metric) if share is not None else None,
        together=finite(together.get(metric)),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        first_round=peer.first_round,
    )


# Consensus


def final_models(peers: Sequence[PeerRun]) -> list[NDArray[np.float32]]:
    """Return the models to compare at the end: of those who saw it, or where fewer than two did, all there are."""
    done = [peer.model for peer in peers if peer.model is not None and peer.outcome.kind == "done"]
    return done if len(done) > 1 else [peer.model for peer in peers if peer.model is not None]


def distance(vectors: Sequence[NDArray[np.float32]]) -> float:
    """Return the consensus distance of vectors, each float32 [parameters], a block of parameters at a time."""
    # The mean over peers of a sum over parameters: blocks of parameters add up.
    starts = range(0, len(vectors[0]), BLOCK)
    return sum(consensus_distance(np.stack([vector[start : start + BLOCK] for vector in vectors])) for start in starts)


def consensus_curve(peers: Sequence[PeerRun]) -> dict[int, float]:
    """Return the consensus distance by the number of rounds, each over the peers that have that copy: two at least."""
    copies: dict[int, list[NDArray[np.float32]]] = {}
    for peer in peers:
        for number in range(len(peer.history)):
            copies.setdefault(number * peer.home.config.history_every, []).append(peer.history[number])
    shared = sorted(rounds for rounds, vectors in copies.items() if len(vectors) > 1)
    return {shared[number]: distance(copies[shared[number]]) for number in spread_out(len(shared), MOST_COPIES)}


# What it took


def seconds_per_round(peers: Sequence[PeerRun]) -> float | None:
    """Return the median time from a training round's start to the next round's, over all peers, in seconds."""
    times = []
    for peer in peers:
        starts = {event.round: (at - event.seconds, event.settling) for at, event in peer.rounds_ended()}
        times += [
            starts[later][0] - starts[earlier][0]
            for earlier, later in pairwise(sorted(starts))
            if later == earlier + 1 and not starts[earlier][1]
        ]
    return statistics.median(times) if times else None


def bytes_per_value(run: Run) -> float | None:
    """Return the received bytes for each parameter of each update that was averaged; in groups, of each average.

    None for stars, whose few sums the settling after them outweighs.
    """
    if run.charter.averaging.masks == "on" and run.charter.averaging.topology != "groups":
        return None
    in_groups = run.charter.averaging.topology == "groups"
    records = [event for peer in run.peers for _, event in peer.rounds_ended()]
    updates = sum(bool(event.heard) if in_groups else len(event.heard) for event in records)
    received = sum(peer.traffic()[0] for peer in run.peers)
    return received / (updates * run.charter.model.parameters) if updates else None
