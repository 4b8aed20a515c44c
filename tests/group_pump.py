"""Group machines joined by queues: no sockets, no threads, no clock but the one a test moves."""

import hashlib
import heapq
import hmac
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from p2pfl.core.charter import PrivacyTerms
from p2pfl.core.errors import BadSignature, P2pflError
from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.ledger import Checkpoint, Record, Resume, resume
from p2pfl.core.machine import (
    AcceptBulk,
    Adopt,
    BulkOffered,
    BulkReceived,
    CancelTimer,
    Compute,
    Computed,
    Disconnect,
    Effect,
    Emit,
    Finish,
    Input,
    LinkDown,
    LinkUp,
    Persist,
    Persisted,
    Received,
    RefuseBulk,
    Send,
    SendBulk,
    SetTimer,
    Started,
    TimerFired,
    Train,
    Trained,
    Vector,
)
from p2pfl.core.trace import Event, RoundEnded
from p2pfl.core.wire import Hello, Message, decode_header, encode_header
from p2pfl.crypto.suite import suite
from p2pfl.gossip.group_machine import GroupMachine, GroupPlan
from p2pfl.gossip.grouping import noise_of, weight_for
from p2pfl.gossip.secure_sum import MaskTerms
from tests.pump import charter_for


class FastKeyring:
    """Signatures as a simulation needs them: nobody but the pump has the keys."""

    def __init__(self, place: int) -> None:
        self.place = place

    def sign(self, body: bytes) -> bytes:
        return hmac.digest(bytes([self.place]) * 32, body, hashlib.sha256)

    def verify(self, signer: int, body: bytes, signature: bytes) -> None:
        if not hmac.compare_digest(signature, hmac.digest(bytes([signer]) * 32, body, hashlib.sha256)):
            raise BadSignature(f"a signature that is not member {signer}'s")


Drop = Callable[[int, int, Message], bool]


@dataclass
class Node:
    machine: GroupMachine
    alive: bool = True
    timers: dict[str, Seconds] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    adopted: dict[Round, Vector] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    asked: list[Train] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    banned: set[PeerId] = field(default_factory=set)
    finished: bool = False
    error: P2pflError | None = None

    @property
    def rounds(self) -> list[RoundEnded]:
        return [event for event in self.events if isinstance(event, RoundEnded)]

    def resume(self) -> Resume | None:
        kept = [record for record in self.records if isinstance(record, Checkpoint)]
        others = [record for record in self.records if not isinstance(record, Checkpoint)]
        initial = Checkpoint(Round(0), np.zeros(0, np.float32), None)
        return resume(kept[-1] if kept else initial, others) if self.records else None


class GroupPump:
    """Everything arrives at once; time passes only when nothing is under way."""

    train_seconds = 1.0
    masked = False
    change_clip: float | None = None
    """Of changes in words of 16 bits, if they are averaged."""
    privacy: PrivacyTerms | None = None
    """Noise, with updates of norm 1 at most."""
    samples: tuple[int, ...] = ()
    """Of each member, if they weigh by them."""

    def __init__(self, members: int, parameters: int = 10, **charter: object) -> None:
        size = int(charter.pop("group_size", 4))  # type: ignore[call-overload]
        colluders = int(charter.pop("colluders", 1))  # type: ignore[call-overload]
        made = charter_for(members, parameters, topology="groups", settle_rounds=5, **charter)  # type: ignore[arg-type]
        averaging = made.averaging.model_copy(
            update={"group_size": size, "colluders": colluders, "masks": "on" if self.masked else "off"}
        )
        if self.samples:
            averaging = averaging.model_copy(update={"weights": "samples", "samples_max": max(self.samples)})
        training = made.training.model_copy(update={"clip_norm": 1.0 if self.privacy is not None else 0.0})
        self.charter = made.model_copy(update={"averaging": averaging, "training": training, "privacy": self.privacy})
        self.roster = self.charter.roster()
        self.numbers = itertools.count()
        self.initial = np.zeros(parameters, np.float32)
        self.now = Seconds(0.0)
        self.queue: deque[tuple[int, Input]] = deque()
        self.links: set[frozenset[int]] = set()
        self.drop: Drop = lambda sender, receiver, message: False
        self.slow: set[int] = set()
        self.later: list[tuple[float, int, int, Node, Input]] = []
        self.nodes = {place: Node(self.build(place, None)) for place in range(members)}

    def build(self, place: int, known: Resume | None) -> GroupMachine:
        plan = GroupPlan.for_peer(self.charter, self.roster[place])
        # No two lives of a member may draw the same.
        draw = random.Random(f"{place}/{next(self.numbers)}")
        noise = noise_of(self.charter)
        clip = 2.0**16 if noise is None else 64.0
        masks = (
            MaskTerms(suite("aes"), 32, clip, draw.randbytes, self.change_clip, noise=noise) if self.masked else None
        )
        weight = weight_for(self.charter.averaging, self.samples[place] if self.samples else 0)
        return GroupMachine(plan, FastKeyring(place), self.initial, known, masks, weight)

    def report(self, place: int) -> tuple[float, int]:
        """Return a member's loss and steps in every round."""
        return 0.5, 2

    def step(self, place: int, round: Round, vector: Vector) -> Vector:
        return vector + np.float32(place + 1) * np.arange(1, len(vector) + 1, dtype=np.float32)

    def start(self) -> None:
        for place in self.nodes:
            self.feed(place, Started())
        for left in self.nodes:
            for right in range(left):
                self.join(left, right)

    def join(self, left: int, right: int) -> None:
        self.links.add(frozenset((left, right)))
        for one, other in ((left, right), (right, left)):
            hello = Hello(self.charter.hash(), self.nodes[other].machine.round)
            self.queue += [(one, Received(self.roster[other], hello)), (one, LinkUp(self.roster[other]))]

    def part(self, left: int, right: int, reason: str = "cut") -> None:
        if frozenset((left, right)) in self.links:
            self.links.discard(frozenset((left, right)))
            down = [(left, LinkDown(self.roster[right], reason)), (right, LinkDown(self.roster[left], reason))]
            self.queue += down

    def kill(self, place: int) -> None:
        self.nodes[place].alive = False
        for other in self.nodes:
            self.part(place, other, "killed")

    def restart(self, place: int, known: Resume | None) -> None:
        old = self.nodes[place]
        self.nodes[place] = Node(self.build(place, known), events=old.events, records=old.records)
        self.feed(place, Started())
        for other, node in self.nodes.items():
            if other != place and node.alive and not node.finished:
                self.join(place, other)

    def feed(self, place: int, input: Input) -> list[Effect]:
        node = self.nodes[place]
        if not node.alive:
            return []
        effects = node.machine.handle(input, self.now)
        for effect in effects:
            self.carry_out(place, node, effect)
        return effects

    def carry_out(self, place: int, node: Node, effect: Effect) -> None:  # noqa: PLR0912 - a case for each effect
        match effect:
            case Send(peer, message):
                self.transmit(place, self.roster.index(peer), message, None)
            case SendBulk(peers, message, payload):
                for peer in peers:
                    self.transmit(place, self.roster.index(peer), message, payload)
            case SetTimer(key, at):
                node.timers[key] = at
            case CancelTimer(key):
                node.timers.pop(key, None)
            case Disconnect(peer, error):
                node.banned.add(peer)
                self.part(place, self.roster.index(peer), error.reason)
            case Train(round, vector):
                node.asked.append(effect)
                if place not in self.slow:
                    trained = Trained(round, self.step(place, round, vector), *self.report(place))
                    heapq.heappush(
                        self.later, (self.now + self.train_seconds, next(self.numbers), place, node, trained)
                    )
            case Compute(key, work):
                self.queue.append((place, Computed(key, work())))
            case Persist(key, record):
                node.records.append(record)
                self.queue.append((place, self.keep(key, record)))
            case Emit(event):
                node.events.append(event)
            case Adopt(round, vector):
                node.adopted[round] = vector
            case Finish(error):
                node.finished, node.error = True, error
            case RefuseBulk(reason):
                node.refusals.append(reason)
            case AcceptBulk():
                pass

    def keep(self, key: str, record: Record) -> Persisted:
        """Keep a record; return what its machine is told then."""
        return Persisted(key)

    def transmit(self, sender: int, receiver: int, message: Message, payload: Vector | None) -> None:
        assert sender != receiver
        if frozenset((sender, receiver)) not in self.links or self.drop(sender, receiver, message):
            return
        assert decode_header(encode_header(message)[2:]) == message
        peer = self.roster[sender]
        if payload is None:
            self.queue.append((receiver, Received(peer, message)))
        else:
            self.queue.append((receiver, BulkReceived(peer, message, bytearray(payload.tobytes()))))

    def deliver(self, most: int = 1_000_000) -> None:
        """Deliver all that is under way, without letting time pass."""
        while self.queue and most:
            most -= 1
            place, input = self.queue.popleft()
            if isinstance(input, BulkReceived):
                answers = self.feed(place, BulkOffered(input.peer, input.message))
                verdicts = [each for each in answers if isinstance(each, AcceptBulk | RefuseBulk | Disconnect)]
                assert len(verdicts) == 1 or not self.nodes[place].alive, verdicts
                if not verdicts or not isinstance(verdicts[0], AcceptBulk):
                    continue
            self.feed(place, input)

    def pass_time(self) -> bool:
        """Move to the next timer and let it fire; False if there is none."""
        due = [
            (at, place, key)
            for place, node in self.nodes.items()
            if node.alive and not node.finished
            for key, at in node.timers.items()
        ]
        if self.later and (not due or self.later[0][0] <= min(due)[0]):
            at, _, place, node, input = heapq.heappop(self.later)
            self.now = Seconds(max(self.now, at))
            if self.nodes[place] is node:
                self.feed(place, input)
            return True
        if not due:
            return False
        at, place, key = min(due)
        self.now = max(self.now, at)
        del self.nodes[place].timers[key]
        self.feed(place, TimerFired(key))
        return True

    def run(self, limit: float = 10_000.0, until: Callable[[], bool] = lambda: False) -> None:
        """Run until every living peer has finished."""
        while any(node.alive and not node.finished for node in self.nodes.values()) and not until():
            if self.queue:
                self.deliver(1)
                continue
            assert self.pass_time(), "nobody waits for anything, and not all have finished"
            assert self.now < limit, "the network does not come to an end"
