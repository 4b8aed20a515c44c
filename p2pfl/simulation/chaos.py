"""`p2pfl demo --chaos`: peers are killed and started again, frozen and cut off while they train.

Owns what happens to whom, drawn from a seed, and when: a fault follows once whoever suffered the one before has taken
over the average of a round that it began itself, and there have been some rounds of calm. So how fast the machine is
changes nothing in the order of things. Has no part in what peers compute, and knows only what their traces say.
"""

import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import cycle
from math import inf
from typing import Protocol

from p2pfl.core.charter import Charter
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round, Seconds
from p2pfl.core.trace import Entry, PeerFinished, RoundEnded
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.grouping import threshold
from p2pfl.gossip.session import Outcome
from p2pfl.node.capture import Endpoint
from p2pfl.node.launcher import Launcher, LocalFederation, free_ports
from p2pfl.node.proxy import Link, Route
from p2pfl.simulation.gates import Gates

LINK = Link(latency=Seconds(0.04))
"""What lies between any two peers of a chaos run: 40 ms one way, as over the Atlantic. On one machine 60 rounds would
else be over before a killed peer's process has started again; so a round takes a third of a second anywhere."""
DOWN_ROUNDS = (3, 6)
"""Rounds that pass without a peer that was killed, before it is started again."""
FROZEN_SECONDS, CUT_SECONDS = (2.0, 4.0), (2.0, 3.0)
"""How long a peer is frozen or cut off: more than `CHAOS_DEADLINES` wait, so that the others go on without it."""
CALM_ROUNDS = (2, 4)
"""Rounds with everybody between two faults: each one's price can be told apart in the records."""
ROOM = 24
"""Rounds before the last one in which no fault begins any more: a peer that is killed is back after a dozen, see
docs/faults.md, and has as many again to spare."""
LEAST_ROUNDS = 50
"""Training rounds in which each kind of fault finds its place."""


class Kind(StrEnum):
    """What happens to a peer; the value is how the view says it."""

    KILL = "killed"
    FREEZE = "frozen"
    CUT = "cut off"


@dataclass(frozen=True)
class Fault:
    """Something that happens to a peer.

    Attributes:
        lasts: how long, in rounds of the others for a kill, else in seconds.
        calm: rounds before it in which nothing happens.
    """

    kind: Kind
    peer: str
    lasts: float
    calm: int

    def __str__(self) -> str:
        """Say it in words, without whom it happens to."""
        return "killed" if self.kind is Kind.KILL else f"{self.kind} for {self.lasts:.1f} s"


def draw_faults(names: Sequence[str], seed: int) -> Iterator[Fault]:
    """Draw what happens, without end: one of each kind in turn, the kills first, and never twice in a row to one peer.

    A peer that was killed takes longest to come back.
    """
    chance = random.Random(seed)  # noqa: S311 - draws a schedule, nothing secret
    last = ""
    for kind in cycle(Kind):
        last = chance.choice([name for name in names if name != last])
        calm = chance.randint(*CALM_ROUNDS)
        match kind:
            case Kind.KILL:
                yield Fault(kind, last, chance.randint(*DOWN_ROUNDS), calm)
            case Kind.FREEZE:
                yield Fault(kind, last, round(chance.uniform(*FROZEN_SECONDS), 1), calm)
            case Kind.CUT:
                yield Fault(kind, last, round(chance.uniform(*CUT_SECONDS), 1), calm)


def most_at_once(charter: Charter) -> int:
    """Return how many peers may suffer at a time: as many as any group's certificate can do without, n - T.

    The rule holds whichever groups are drawn, so it counts as if all of them were in the smallest. What is left of the
    group must still be enough for a session of its own when the next round begins.
    """
    plan = GroupPlan.for_peer(charter, charter.roster()[0])
    drawn = Round(plan.whole_rounds)
    smallest = min(map(len, plan.groups(drawn)))
    spared = smallest - threshold(smallest)
    bears = plan.terms(drawn).bears
    return max((lost for lost in range(1, spared + 1) if bears(range(smallest - lost))), default=0)


def verify_chaos(charter: Charter) -> None:
    """Check that a federation can bear faults, and is long enough for one of each kind.

    Raises:
        InvalidConfig: it is not.
    """
    if charter.averaging.topology != "groups":
        raise InvalidConfig(f"--chaos with --topology {charter.averaging.topology}: only groups take a peer back")
    if charter.training.rounds < LEAST_ROUNDS:
        raise InvalidConfig(f"--chaos with --rounds {charter.training.rounds}: it takes {LEAST_ROUNDS} at least")
    if not most_at_once(charter):
        raise InvalidConfig(
            f"--chaos with --peers {len(charter.members)}: a group of so few cannot do without one; 4 or more can"
        )


class Hands(Protocol):
    """What carries faults out."""

    def begin(self, fault: Fault) -> None:
        """Let it happen."""

    def end(self, fault: Fault) -> None:
        """Undo it; the peer sees for itself how it comes back."""


@dataclass(frozen=True)
class Happened:
    """Something for the view: what befell a peer or how it came back.

    Attributes:
        mark: what is shown beside the peer's state from now on; empty for nothing.
    """

    peer: str
    text: str
    mark: str = ""


@dataclass(frozen=True)
class _Suffering:
    """A fault that has begun.

    Attributes:
        until: its end: a round of the others for a kill, else in seconds of `now`.
        ended_at: when it was undone, in seconds since 1970; None before.
    """

    fault: Fault
    until: float
    ended_at: float | None = None


class Chaos:
    """Decides when which fault begins and ends, from what the traces say.

    Args:
        names: the peers'.
        rounds: training rounds.
        faults: what is to happen, in this order.
        most: how many peers may suffer at a time.
        hands: carries it out.
    """

    def __init__(self, names: Sequence[str], rounds: int, faults: Iterator[Fault], most: int, hands: Hands) -> None:
        self._rounds = dict.fromkeys(names, 0)
        self._last = rounds - ROOM
        self._faults = faults
        self._next = next(faults)
        self._most = most
        self._hands = hands
        self._suffering: dict[str, _Suffering] = {}
        self._calm_since = 0
        self._over = False

    def step(self, new: Mapping[str, Sequence[Entry]], now: float) -> list[Happened]:
        """Take what is new in the traces; begin and end what is due.

        Args:
            new: by peer.
            now: seconds of a clock that only goes forward.
        """
        happened = [each for name, entries in new.items() for entry in entries if (each := self._note(name, entry))]
        for suffering in list(self._suffering.values()):
            if suffering.ended_at is None and self._is_due(suffering, now):
                happened.append(self._end(suffering))
        while self._may_begin():
            happened.append(self._begin(now))
        return happened

    @property
    def _round(self) -> int:
        """The round that most of those who do not suffer have reached."""
        well = [rounds for name, rounds in self._rounds.items() if name not in self._suffering]
        return int(statistics.median_low(well or self._rounds.values()))

    def _note(self, name: str, entry: Entry) -> Happened | None:
        match entry.event:
            case PeerFinished():
                self._over = True
            case RoundEnded(round=round, outcome=outcome, settling=settling):
                self._rounds[name] = round + 1
                self._over = self._over or settling
                # A round that was under way when the fault ended proves nothing.
                adopted = outcome in (Outcome.FULL, Outcome.LATE)
                if adopted and self._ended_at(name) < entry.at - entry.event.seconds:
                    del self._suffering[name]
                    self._calm_since = max(self._calm_since, round + 1)
                    return Happened(name, f"back, with the average of round {round}")
        return None

    def _ended_at(self, name: str) -> float:
        """Return when what a peer suffered was undone; never for one that still does, or does not."""
        suffering = self._suffering.get(name)
        return inf if suffering is None or suffering.ended_at is None else suffering.ended_at

    def _is_due(self, suffering: _Suffering, now: float) -> bool:
        return (self._round if suffering.fault.kind is Kind.KILL else now) >= suffering.until

    def _may_begin(self) -> bool:
        calm = self._round >= self._calm_since + self._next.calm and min(self._rounds.values()) > 0
        free = len(self._suffering) < self._most and self._next.peer not in self._suffering
        return calm and free and self._round <= self._last and not self._over

    def _begin(self, now: float) -> Happened:
        fault, self._next = self._next, next(self._faults)
        start = self._round if fault.kind is Kind.KILL else now
        self._hands.begin(fault)
        self._suffering[fault.peer] = _Suffering(fault, start + fault.lasts)
        self._calm_since = self._round
        return Happened(fault.peer, str(fault), fault.kind)

    def _end(self, suffering: _Suffering) -> Happened:
        fault = suffering.fault
        if fault.kind is Kind.KILL and self._over:
            del self._suffering[fault.peer]
            return Happened(fault.peer, "not started again: the others are through")
        # Noted first: nothing that the peer does from here on may seem to have come before.
        self._suffering[fault.peer] = replace(suffering, ended_at=time.time())
        self._hands.end(fault)
        says = {Kind.KILL: "started again", Kind.FREEZE: "thawed", Kind.CUT: "connected again"}
        return Happened(fault.peer, says[fault.kind])


class LocalHands:
    """Carries faults out on this machine: signals for the processes, gates for the connections."""

    def __init__(self, launcher: Launcher, gates: Gates) -> None:
        self._launcher = launcher
        self._gates = gates

    def begin(self, fault: Fault) -> None:
        """See `Hands`."""
        match fault.kind:
            case Kind.KILL:
                self._launcher.kill(fault.peer)
            case Kind.FREEZE:
                self._launcher.freeze(fault.peer)
            case Kind.CUT:
                self._gates.cut(fault.peer, self._launcher.pid(fault.peer))

    def end(self, fault: Fault) -> None:
        """See `Hands`."""
        match fault.kind:
            case Kind.KILL:
                self._launcher.start_again(fault.peer)
            case Kind.FREEZE:
                self._launcher.thaw(fault.peer)
            case Kind.CUT:
                self._gates.connect(fault.peer)


def gated_addresses(peers: int) -> list[tuple[str, str]]:
    """Return where each peer listens, and the gate that it announces."""
    ports = [f"/ip4/127.0.0.1/tcp/{port}" for port in free_ports(2 * peers)]
    return list(zip(ports[:peers], ports[peers:], strict=True))


def gates_of(federation: LocalFederation) -> Gates:
    """Return the gates of a federation whose peers announce other addresses than they listen on."""
    routes = {
        home.config.name: Route(listen=_endpoint(home.config.announce[0]), target=_endpoint(home.config.listen[0]))
        for home in federation.homes
    }
    return Gates(routes, LINK)


def _endpoint(address: str) -> Endpoint:
    _, _, host, _, port = address.split("/")
    return Endpoint(host, int(port))
