"""What a running peer counts, in Prometheus' text format: docs/metrics.md has the list.

Of other members there are names and whether they seem to be there, no figures: no loss, no sum, nothing of their data.
The library writes the format; nothing is registered globally, and nothing here asks the network.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from p2pfl.core.privacy import Budget
from p2pfl.core.trace import Event, LinkChanged, RoundEnded, State
from p2pfl.node.health import Page, Remembered, text_page
from p2pfl.node.status import STANDINGS, Progress

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
IN_ROUNDS = (State.TRAINING, State.AVERAGING, State.SETTLING)
"""What a peer does that takes part."""
UNKNOWN = "unknown"
GOSSIP = "gossip"
"""The outcome of a round among neighbors, whose record names none."""
OUTCOMES = ("full", "partial", "late", "skip", "void", GOSSIP)
OTHER = "other"
REASONS: Mapping[str, tuple[str, ...]] = {
    "charter": ("is under charter", "holds our charter", "sent a message under charter"),
    "roster": ("is not on the roster", "has us not on its roster"),
    "identity": ("answers where", "expected another peer", "has our own identity", "says that we have its identity"),
    "version": ("speaks wire version",),
    "suite": ("proposed ", "offers ", "speaks another security protocol"),
    "crowded": ("holds too many connections",),
}
"""How the reason of a refusal begins, in the words of whoever refuses; the first that fits."""


@dataclass(frozen=True)
class Sources:
    """What a peer's metrics are made of beside its events; all of it is asked anew for each scrape.

    Attributes:
        member: its name in the charter.
        release: of p2pfl.
        wire: the highest version of its messages.
        charter: the hash, in hexadecimal.
        others: the other members' names.
        rounds: how many it trains under this charter.
        parameters: of the model.
        progress: what it says of itself.
        traffic: bytes (in, out) since it started.
        disk: bytes (free, of its run).
        budget: what its own data may give away; None in a charter without noise.
        rho: what its uploads have cost of that, over all its lives, in zCDP.
    """

    member: str
    release: str
    wire: int
    charter: str
    others: tuple[str, ...]
    rounds: int
    parameters: int
    progress: Callable[[], Progress]
    traffic: Callable[[], tuple[int, int]]
    disk: Callable[[], tuple[int, int]]
    budget: Budget | None
    rho: Callable[[], float]


class Metrics(Collector):
    """Counts what happens to a peer since its process began, and writes it down when asked."""

    def __init__(self, facts: Sources) -> None:
        self._facts = facts
        self._outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        self._reasons = Counter(dict.fromkeys((*REASONS, OTHER), 0))
        self._seconds = 0.0
        self._ended_at: float | None = None
        self._clipped: int | None = None
        self._unlinked = 0
        self._spent = 0.0, 0.0
        """In zCDP, and the epsilon of that."""
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def note(self, event: Event, at: float) -> None:
        """Take in what happened at `at`, in seconds since 1970."""
        match event:
            case RoundEnded() as ended:
                self._outcomes[ended.outcome if ended.outcome in OUTCOMES else GOSSIP] += 1
                self._seconds += ended.seconds
                self._ended_at = at
                self._clipped = ended.clipped
            case LinkChanged(_, False, _):
                self._unlinked += 1

    def refused(self, reason: str) -> None:
        """Count something of a remote's that was refused."""
        self._reasons[reason_of(reason)] += 1

    @property
    def progress(self) -> Progress:
        """What the peer says of itself now."""
        return self._facts.progress()

    def render(self) -> bytes:
        """Return everything as text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Give each metric; the library calls this."""
        yield from self._of_peer()
        yield from self._of_rounds()
        yield from self._of_members()
        yield from self._of_world()

    def _of_peer(self) -> Iterator[Metric]:
        facts, progress = self._facts, self._facts.progress()
        about = {
            "member": facts.member,
            "release": facts.release,
            "wire": str(facts.wire),
            "charter": facts.charter[:12],
        }
        yield _labelled("p2pfl_info", "Who this is, and under which charter.", about, 1.0)
        yield _gauge("p2pfl_started_timestamp_seconds", "When the process began.", progress.started_at)
        state = GaugeMetricFamily("p2pfl_state", "1 for what the peer is doing.", labels=["state"])
        for each in State:
            state.add_metric([each.value], float(progress.state == each.value))
        yield state
        yield _gauge("p2pfl_ready", "Whether the peer takes part in rounds.", float(is_ready(progress)))

    def _of_rounds(self) -> Iterator[Metric]:
        facts, progress = self._facts, self._facts.progress()
        yield _gauge("p2pfl_round", "Rounds that have ended, by the federation's count.", progress.rounds)
        yield _gauge("p2pfl_rounds_agreed", "Rounds in which members train.", facts.rounds)
        rounds = CounterMetricFamily(
            "p2pfl_rounds", "Rounds that ended in this process, by outcome.", labels=["outcome"]
        )
        for outcome, count in self._outcomes.items():
            rounds.add_metric([outcome], count)
        yield rounds
        yield SummaryMetricFamily(
            "p2pfl_round_seconds",
            "How long these rounds took.",
            count_value=self._outcomes.total(),
            sum_value=self._seconds,
        )
        if self._ended_at is not None:
            yield _gauge("p2pfl_last_round_timestamp_seconds", "When the last of them ended.", self._ended_at)
        if progress.last is not None:
            last = progress.last
            yield _gauge("p2pfl_last_round_seconds", "How long the last round took.", last.seconds)
            yield _gauge("p2pfl_last_round_heard", "Other members in the last average.", last.heard)
            yield _gauge("p2pfl_last_round_absent", "Members that are not in it and might have been.", len(last.absent))
            if last.loss is not None:
                yield _gauge("p2pfl_loss", "Of this member's own local steps in the last round.", last.loss)
        if self._clipped is not None:
            share = self._clipped / max(1, facts.parameters)
            yield _gauge("p2pfl_clipped_ratio", "Share of the own values beyond what masks represent.", share)
        own = GaugeMetricFamily("p2pfl_metric", "Of the own model on the own held-out data.", labels=["metric"])
        for name, value in progress.metrics.items():
            own.add_metric([name], float("nan") if value is None else value)
        yield own

    def _of_members(self) -> Iterator[Metric]:
        facts, members = self._facts, self._facts.progress().members
        standings = Counter(dict.fromkeys((*STANDINGS.values(), UNKNOWN), 0))
        standings.update(members.get(name, UNKNOWN) for name in facts.others)
        count = GaugeMetricFamily("p2pfl_members", "Other members, by how they seem.", labels=["standing"])
        for standing, number in standings.items():
            count.add_metric([standing], number)
        yield count
        reachable = GaugeMetricFamily("p2pfl_member_reachable", "1 for members that are here.", labels=["member"])
        for name in facts.others:
            reachable.add_metric([name], float(members.get(name) == "reachable"))
        yield reachable

    def _of_world(self) -> Iterator[Metric]:
        facts = self._facts
        received, sent = facts.traffic()
        yield _counter("p2pfl_received_bytes", "Bytes that came in, everything above TCP included.", received)
        yield _counter("p2pfl_sent_bytes", "Bytes that went out, likewise.", sent)
        yield _counter("p2pfl_links_lost", "Links to members that went down.", self._unlinked)
        refusals = CounterMetricFamily("p2pfl_refusals", "What remotes did and was refused.", labels=["reason"])
        for reason, number in self._reasons.items():
            refusals.add_metric([reason], number)
        yield refusals
        free, used = facts.disk()
        yield _gauge("p2pfl_disk_free_bytes", "Free where the peer writes.", free)
        yield _gauge("p2pfl_run_bytes", "What its run folder takes.", used)
        if facts.budget is not None:
            spent = self._epsilon(facts.budget, facts.rho())
            yield _gauge("p2pfl_epsilon_spent", "Of this member's own privacy budget, over all its lives.", spent)
            yield _gauge("p2pfl_epsilon_budget", "The charter's.", facts.budget.epsilon)

    def _epsilon(self, budget: Budget, rho: float) -> float:
        """Return the epsilon of `rho`; it takes 10 ms to find, and changes once a round."""
        if rho != self._spent[0]:
            self._spent = rho, budget.spent(rho)
        return self._spent[1]


def pages(metrics: Metrics) -> Mapping[str, Callable[[], Page]]:
    """Return what the endpoint answers with, by path.

    `/healthz` says that the peer's loop runs and no more: that other members are away is nothing a restart would mend.
    """
    return {
        "/metrics": Remembered(lambda: Page(200, CONTENT_TYPE, metrics.render())),
        "/healthz": lambda: text_page(200, "ok"),
        "/readyz": lambda: _readiness(metrics.progress),
    }


def _readiness(progress: Progress) -> Page:
    return text_page(200 if is_ready(progress) else 503, f"{progress.state}, {progress.rounds} rounds ended")


def is_ready(progress: Progress) -> bool:
    """Return whether a peer takes part in rounds."""
    return progress.state in IN_ROUNDS


def reason_of(text: str) -> str:
    """Return which of `REASONS` a refusal's reason is, or `OTHER`: few labels, whatever remotes do."""
    return next((label for label, starts in REASONS.items() if text.startswith(starts)), OTHER)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(name, what, value=value)


def _labelled(name: str, what: str, labels: Mapping[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, what, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
