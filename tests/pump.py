"""Machines joined by queues: no sockets, no threads, no clock but the one a test moves."""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from p2pfl.core.charter import AveragingTerms, Charter, Deadlines, Member, ModelTerms, TaskTerms, TrainingTerms
from p2pfl.core.errors import P2pflError
from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.ledger import Checkpoint, Resume
from p2pfl.core.machine import (
    AcceptBulk,
    Adopt,
    BulkOffered,
    BulkReceived,
    CancelTimer,
    Compute,
    Computed,
    Disconnect,
    DropLink,
    Effect,
    Emit,
    Finish,
    Forsake,
    Input,
    LinkDown,
    LinkUp,
    Persist,
    Persisted,
    Received,
    RefuseBulk,
    Seek,
    Send,
    SendBulk,
    SetTimer,
    Started,
    TimerFired,
    Train,
    Trained,
    Vector,
)
from p2pfl.core.trace import Event
from p2pfl.core.wire import Hello, Ping
from p2pfl.crypto.identity import Identity
from p2pfl.gossip.grouping import weight_for
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.gossip.topology import TOPOLOGIES

ANY_SIZE = sorted(set(TOPOLOGIES) - {"torus", "hypercube"})
"""Topologies that exist for any number of members."""
Step = Callable[[PeerId, Round, Vector], Vector]


def identities(n: int) -> list[Identity]:
    """Return n identities in the order of their peer ids."""
    return sorted((Identity(bytes([i + 1]) * 32) for i in range(n)), key=lambda identity: identity.peer_id)


def charter_for(
    n: int,
    parameters: int,
    *,
    rounds: int = 3,
    topology: str = "ring",
    tolerance: float = 1e-9,
    settle_rounds: int = 500,
    start: float = 30.0,
    silence: float = 20.0,
    patience: float = 10.0,
) -> Charter:
    """Return an unsigned charter of n members named m0, m1, ... in the order of their peer ids."""
    members = tuple(
        Member(name=f"m{i}", peer_id=identity.peer_id, addresses=("/ip4/127.0.0.1/tcp/4001",))
        for i, identity in enumerate(identities(n))
    )
    return Charter(
        name="test",
        task=TaskTerms(source="digits", sha256="0" * 64),
        model=ModelTerms(file="m.safetensors", sha256="0" * 64, parameters=parameters),
        training=TrainingTerms(rounds=rounds),
        averaging=AveragingTerms(topology=topology, tolerance=tolerance, settle_rounds=settle_rounds),  # type: ignore[arg-type]
        deadlines=Deadlines(start=start, round=patience, heartbeat=silence / 4, silence=silence),
        members=members,
    )


@dataclass(eq=False)
class Node:
    machine: PeerMachine
    alive: bool = True
    timers: dict[str, Seconds] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    adopted: list[Vector] = field(default_factory=list)
    finished: bool = False
    error: P2pflError | None = None
    banned: set[PeerId] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)
    kept: list[Checkpoint] = field(default_factory=list)
    asked: list[Train] = field(default_factory=list)
    round: Round = field(default_factory=lambda: Round(0))
    """What its next Hello says."""


class Pump:
    """A network of peer machines; `step(peer, round, vector)` stands for local training, of `train_seconds`."""

    def __init__(
        self,
        charter: Charter,
        initial: dict[PeerId, Vector] | Vector,
        step: Step,
        train_seconds: float = 0.0,
        samples: Mapping[PeerId, int] | None = None,
    ) -> None:
        self.charter = charter
        self.roster = charter.roster()
        self.step = step
        self.train_seconds = train_seconds
        self.at_work: list[tuple[float, PeerId, Node, Trained]] = []
        self.wanted: set[tuple[PeerId, PeerId]] = set()
        self.now = Seconds(0.0)
        self.queue: list[tuple[PeerId, Input]] = []
        self.drop: Callable[[PeerId, PeerId, Effect], bool] = lambda sender, receiver, effect: False
        self.links: set[frozenset[PeerId]] = set()
        self.nodes = {
            peer: Node(
                PeerMachine(
                    Plan.for_peer(charter, peer),
                    initial if isinstance(initial, np.ndarray) else initial[peer],
                    weight=weight_for(charter.averaging, 0 if samples is None else samples[peer]),
                )
            )
            for peer in self.roster
        }
        self.plans = {peer: Plan.for_peer(charter, peer) for peer in self.roster}

    def start(self) -> None:
        for peer in self.roster:
            self.feed(peer, Started())
        for peer in self.roster:
            for other in self.plans[peer].weights:
                if peer < other:
                    self.join(peer, other)
                self.wanted.add((peer, other))

    def join(self, left: PeerId, right: PeerId) -> None:
        """Link two peers; as over real links, each hears first in which round the other is."""
        self.links.add(frozenset((left, right)))
        for peer, other in ((left, right), (right, left)):
            hello = Hello(self.charter.hash(), self.nodes[other].round)
            self.queue += [(peer, Received(other, hello)), (peer, LinkUp(other))]

    def seek(self, peer: PeerId) -> None:
        """Set up the links that somebody wants, as far as both ends live."""
        for left, right in sorted(self.wanted):
            pair = frozenset((left, right))
            alive = self.nodes[left].alive and self.nodes[right].alive
            if alive and peer in pair and pair not in self.links:
                self.join(left, right)

    def part(self, left: PeerId, right: PeerId, reason: str = "cut") -> None:
        if frozenset((left, right)) in self.links:
            self.links.discard(frozenset((left, right)))
            self.queue += [(left, LinkDown(right, reason)), (right, LinkDown(left, reason))]

    def kill(self, peer: PeerId) -> None:
        self.nodes[peer].alive = False
        for other in self.roster:
            self.part(peer, other, "killed")

    def restart(self, peer: PeerId, checkpoint: Checkpoint | None) -> None:
        """Start a killed peer again, with what its disk holds, or None for a disk that is lost."""
        initial = np.zeros(self.charter.model.parameters, np.float32)
        resume = None if checkpoint is None else Resume(checkpoint, checkpoint.round - 1)
        self.queue = [(to, input) for to, input in self.queue if to != peer]
        self.nodes[peer] = Node(PeerMachine(self.plans[peer], initial, resume))
        self.wanted = {pair for pair in self.wanted if pair[0] != peer}
        self.wanted |= {(peer, other) for other in self.plans[peer].weights}
        self.feed(peer, Started())
        self.seek(peer)

    def feed(self, peer: PeerId, input: Input) -> list[Effect]:
        node = self.nodes[peer]
        if not node.alive:
            return []
        effects = node.machine.handle(input, self.now)
        for effect in effects:
            self.carry_out(peer, node, effect)
        return effects

    def carry_out(self, peer: PeerId, node: Node, effect: Effect) -> None:  # noqa: PLR0912 - a case for each effect
        if isinstance(effect, Train):
            node.asked.append(effect)
        match effect:
            case Send(other, message):
                if isinstance(message, Ping):
                    node.round = message.round
                self.transmit(peer, other, effect, Received(peer, message))
            case SendBulk(others, message, payload):
                node.round = message.round
                for other in others:
                    self.transmit(peer, other, effect, BulkReceived(peer, message, bytearray(payload.tobytes())))
            case SetTimer(key, at):
                node.timers[key] = at
            case CancelTimer(key):
                node.timers.pop(key, None)
            case Disconnect(other, error):
                node.banned.add(other)
                self.part(peer, other, error.reason)
            case DropLink(other, reason):
                self.part(peer, other, reason)
            case Seek(other):
                self.wanted.add((peer, other))
                self.seek(peer)
            case Forsake(other):
                self.wanted.discard((peer, other))
                self.part(peer, other, "forsaken")
                self.seek(peer)
            case Persist(key, record):
                assert isinstance(record, Checkpoint)
                node.kept.append(record)
                self.queue.append((peer, Persisted(key)))
            case Train(round, vector) if self.train_seconds:
                trained = Trained(round, self.step(peer, round, vector), 0.5)
                heapq.heappush(self.at_work, (self.now + self.train_seconds, peer, node, trained))
            case Train(round, vector):
                self.queue.append((peer, Trained(round, self.step(peer, round, vector), 0.5)))
            case Compute(key, work):
                self.queue.append((peer, Computed(key, work())))
            case Emit(event):
                node.events.append(event)
            case Adopt(_, vector):
                node.adopted.append(vector)
            case Finish(error):
                node.finished, node.error = True, error
            case RefuseBulk(reason):
                node.refusals.append(reason)
            case AcceptBulk():
                pass

    def transmit(self, sender: PeerId, receiver: PeerId, effect: Effect, input: Input) -> None:
        if frozenset((sender, receiver)) in self.links and not self.drop(sender, receiver, effect):
            self.queue.append((receiver, input))

    def deliver(self) -> None:
        """Deliver all that is under way, without letting time pass."""
        while self.queue:
            peer, input = self.queue.pop(0)
            if not self.nodes[peer].alive:
                continue
            if isinstance(input, BulkReceived):
                answers = self.feed(peer, BulkOffered(input.peer, input.message))
                verdicts = [answer for answer in answers if isinstance(answer, AcceptBulk | RefuseBulk | Disconnect)]
                assert len(verdicts) == 1, verdicts
                if not isinstance(verdicts[0], AcceptBulk):
                    continue
            self.feed(peer, input)

    def pass_time(self) -> bool:
        """Move to the next timer and let it fire; False if there is none."""
        due = [
            (at, peer, key)
            for peer, node in self.nodes.items()
            if node.alive and not node.finished
            for key, at in node.timers.items()
        ]
        due.sort()
        if self.at_work and (not due or self.at_work[0][0] <= due[0][0]):
            ready, worker, node, trained = heapq.heappop(self.at_work)
            self.now = Seconds(ready)
            if self.nodes[worker] is node:
                self.feed(worker, trained)
            return True
        if not due:
            return False
        at, peer, key = due[0]
        self.now = at
        del self.nodes[peer].timers[key]
        self.feed(peer, TimerFired(key))
        return True

    def run(self, limit: float = 100_000.0) -> None:
        """Run until every living peer has finished."""
        self.deliver()
        while any(node.alive and not node.finished for node in self.nodes.values()):
            assert self.pass_time(), "nobody waits for anything, and not all have finished"
            assert self.now < limit, "the network does not come to an end"
            self.deliver()
