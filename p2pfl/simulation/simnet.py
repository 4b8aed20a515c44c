"""The machines that real peers run, on a network with virtual time: no sockets, no threads, no clock, no entropy.

Everything that happens is an event on one heap, in the order of its time and, at equal times, of its making. All that
is left to chance is drawn from streams named after the seed; so equal seeds give equal runs, to the last bit. Links
behave as those of `p2pfl.node.links`: two lanes each way, Hello first, queues that drop their oldest, redials with
growing pauses. Then the faults of `p2pfl.simulation.faults` befall them.

Must not know any protocol: whoever makes a network brings the machines.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from p2pfl.core.errors import Malformed, P2pflError, RemoteError, RoundFailed
from p2pfl.core.ids import Seconds
from p2pfl.core.ledger import Checkpoint
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
    StopRequested,
    TimerFired,
    Train,
    Trained,
    Vector,
    WorkFailed,
)
from p2pfl.core.wire import LENGTH_BYTES, Hello, Message, decode_header, encode_header, header_length, payload_length
from p2pfl.simulation.faults import (
    ClockSkew,
    Crash,
    Cut,
    Delay,
    Duplicate,
    FailWork,
    Fault,
    Freeze,
    Lie,
    Loss,
    Partition,
    Reorder,
    Schedule,
    Slow,
    Stop,
)
from p2pfl.simulation.hosts import (
    FIRST_PAUSE,
    FLUSH_TIMEOUT,
    GRACE,
    LONGEST_PAUSE,
    MAX_BULK,
    PENALTY,
    Conditions,
    Disk,
    Host,
    Link,
    PeerSpec,
    SimulatedKeyring,
    Trainer,
    Way,
    stream,
)
from p2pfl.simulation.invariants import Check, InvariantViolated, Step
from p2pfl.simulation.liars import LyingMachine

__all__ = ["Conditions", "Disk", "Host", "Network", "PeerSpec", "SimulatedKeyring", "Trainer"]

MAX_BACKLOG = 512
"""Messages under way on a control lane; beyond that they are lost, as where nobody reads. A guess."""
NO_ANSWER = 10.0
"""Seconds after which a connection falls on which a Hello was lost: a dial's timeout."""
DUPLICATE_DELAY = 5.0
"""Seconds within which a duplicate arrives."""
MOST_STEPS = 2_000_000
"""Inputs after which a run counts as endless; the standard run takes some thousands."""


class Director(Protocol):
    """Lets faults befall peers at what they do, rather than at a time."""

    def step(
        self, network: "Network", peer: Host, input: Input, effects: Sequence[Effect]
    ) -> Sequence[tuple[int, Fault]]:
        """Look at a step, before its effects are carried out.

        Returns:
            faults, each with the number of effects that are carried out before it begins, ascending. One whose `at` is
            later begins then.
        """


class Network:
    """A simulated network; `run` runs it.

    Args:
        peers: a peer's place is its index; as in the roster, if liars or checks are to know who is who.
        faults: what goes wrong.
        seed: of everything left to chance.
        charter: its hash, for the Hellos.
        conditions: what the network is like.
        checks: rules that honest peers are held to at every step.
        strict: whether every message is encoded and decoded on its way.
        log: whether what happens is kept, for a trace.
        quorum: how many can still do something together; fewer that are left when all others have ended may wait on.
        director: adds faults to the schedule's, at what peers do.
    """

    def __init__(
        self,
        peers: Sequence[PeerSpec],
        faults: Schedule = Schedule(),  # noqa: B008 - frozen
        seed: int = 0,
        *,
        charter: bytes = bytes(32),
        conditions: Conditions = Conditions(),  # noqa: B008 - frozen
        checks: Sequence[Check] = (),
        strict: bool = False,
        log: bool = False,
        quorum: int = 1,
        director: Director | None = None,
    ) -> None:
        self.now = 0.0
        self.steps = 0
        self.faults, self.seed = faults, seed
        self.log: list[tuple[Any, ...]] | None = [] if log else None
        """(time, place, input, effects) of each step; (time, fault, whether it begins); (time, sender's place,
        receiver's, message) of each message lost."""
        self._director = director
        self._charter, self._conditions, self._checks, self._strict = charter, conditions, tuple(checks), strict
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._active: list[Fault] = []
        self._latency, self._fsync = math.log(conditions.latency), math.log(conditions.fsync)
        self.peers = [Host(place, spec, seed) for place, spec in enumerate(peers)]
        self._links = self._make_links()
        self.quorum = quorum
        self._unfinished, self._halted = 0, False
        self._effects = self._carriers()
        for peer in self.peers:
            peer.lying = peer.place in faults.liars
            self._at(peer.draw.uniform(0.0, conditions.start), self._start, peer)
        for fault in faults.faults:
            self._at(fault.at, self._begin, fault)
        self._count()

    def _carriers(self) -> dict[type[Effect], Callable[[Host, Any], object]]:
        return {
            Send: self._send,
            SendBulk: self._send_bulk,
            AcceptBulk: _nothing,
            RefuseBulk: _nothing,
            SetTimer: self._set_timer,
            CancelTimer: lambda peer, effect: peer.timers.pop(effect.key, None),
            Disconnect: self._ban,
            DropLink: self._drop_link,
            Train: self._train,
            Compute: self._compute,
            Persist: self._persist,
            Emit: lambda peer, effect: peer.events.append((self.now, effect.event)),
            Adopt: self._adopt,
            Finish: self._finish,
            # Whom a peer may link to is given with the network, and those links are kept up all the time.
            Seek: _nothing,
            Forsake: _nothing,
        }

    def _make_links(self) -> list[Link]:
        places = {peer.peer: peer.place for peer in self.peers}
        pairs = {
            (min(peer.place, places[other]), max(peer.place, places[other]))
            for peer in self.peers
            for other in peer.spec.neighbors
        }
        return [Link(self.peers[first], self.peers[second], self.seed) for first, second in sorted(pairs)]

    def run(self, patience: float) -> None:
        """Run until every honest peer that lives has finished, or somebody halts the network.

        Args:
            patience: virtual seconds after the last fault's end within which that must be.

        Raises:
            InvariantViolated: it is not, or a check failed.
        """
        limit = self.faults.healed_at + patience
        heap = self._heap
        while self._unfinished and not self._halted:
            if not heap:
                raise InvariantViolated(f"nothing will ever happen, and {self._missing()} not finished")
            at, _, happen, arguments = heapq.heappop(heap)
            if at > limit:
                if self._unfinished < self.quorum:
                    return
                raise InvariantViolated(f"{self._missing()} not finished {patience:g} s after the last fault")
            if self.steps > MOST_STEPS:
                raise InvariantViolated(f"{self._missing()} not finished after {self.steps} inputs")
            self.now = at
            happen(*arguments)

    def halt(self) -> None:
        """Let `run` return after what happens now, whoever has not finished."""
        self._halted = True

    def _count(self) -> None:
        self._unfinished = sum(not (peer.finished or peer.gone or peer.lying) for peer in self.peers)

    def _missing(self) -> str:
        names = [peer.name for peer in self.peers if not (peer.finished or peer.gone or peer.lying)]
        return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}"

    def _at(self, at: float, happen: Callable[..., None], *arguments: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (at if at > self.now else self.now, self._sequence, happen, arguments))

    # Machines

    def _start(self, peer: Host) -> None:
        machine = peer.spec.build(peer.disk)
        for number, fault in enumerate(self.faults.faults):
            if isinstance(fault, Lie) and fault.peer == peer.place:
                against = frozenset(self.peers[place].peer for place in fault.against)
                draw = stream(self.seed, f"lie/{peer.place}/{peer.life}/{number}")
                machine = LyingMachine(machine, fault, against, peer.spec.sign, lambda: self.now, draw)
        peer.begin_life(machine, self.now)
        self._feed(peer, Started())
        for link in peer.links.values():
            link.pause = FIRST_PAUSE
            self._dial_after(link, link.pause)

    def _feed(self, peer: Host, input: Input, least: float = -math.inf) -> Sequence[Effect]:
        """Hand `input` to a peer's machine, carry out what it answers, and return that."""
        machine = peer.machine
        if machine is None or peer.finished:
            return ()
        try:
            effects = machine.handle(input, Seconds(peer.clock(self.now, least)))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise InvariantViolated(f"{peer.name} raised at {type(input).__name__}: {what}") from error
        self.steps += 1
        if self.log is not None:
            self.log.append((self.now, peer.place, input, effects))
        struck = () if self._director is None else self._director.step(self, peer, input, effects)
        if effects or type(input) is BulkOffered:  # else nothing was done that a rule could mind
            self._check(peer, input, effects)
        self._carry_out(peer, peer.life, effects, struck)
        return effects

    def _carry_out(
        self, peer: Host, life: int, effects: Sequence[Effect], struck: Sequence[tuple[int, Fault]] = ()
    ) -> None:
        """Carry out the effects of a peer's step, and let faults begin in their midst."""
        if peer.life != life:
            return
        done = 0
        for number, fault in struck:
            self._carry_out(peer, life, effects[done:number])
            done = number
            self._begin_directed(fault)
        if peer.frozen and done < len(effects):
            peer.backlog.append((self._carry_out, (peer, life, effects[done:])))
        elif peer.life == life:
            for effect in effects[done:]:
                self._effects[type(effect)](peer, effect)

    def _begin_directed(self, fault: Fault) -> None:
        if fault.at > self.now:
            self._at(fault.at, self._begin, fault)
        else:
            self._begin(fault)

    def _check(self, peer: Host, input: Input, effects: Sequence[Effect]) -> None:
        if isinstance(peer.machine, LyingMachine):
            effects = [*peer.machine.truth, *effects]
        step = Step(peer, input, effects)
        for check in self._checks:
            if check.watches_liars or not peer.lying:
                check.step(step)

    def _deliver(self, peer: Host, life: int, input: Input) -> None:
        """Hand over what no link brings."""
        if peer.life != life:
            return
        if peer.frozen:
            peer.backlog.append((self._deliver, (peer, life, input)))
        else:
            self._feed(peer, input)

    def _finish(self, peer: Host, effect: Finish) -> None:
        peer.finished, peer.error = True, effect.error
        peer.timers.clear()
        self._count()
        for way in peer.ways.values():
            way.link.up[way.side] = False
            if way.link.standing:
                self._flush(way, way.link.epoch, self.now + FLUSH_TIMEOUT)

    def _flush(self, way: Way, epoch: int, latest: float) -> None:
        """Let the link of a peer that finished fall once what it sent has arrived."""
        if way.is_quiet() or self.now >= latest:
            self._fall(way.link, epoch, "closed by the neighbor")
        else:
            self._at(self.now + GRACE / 4, self._flush, way, epoch, latest)

    def _adopt(self, peer: Host, effect: Adopt) -> None:
        peer.adopted.append((effect.round, peer.spec.model(effect.vector, effect.mixed)))

    # Time

    def _set_timer(self, peer: Host, effect: SetTimer) -> None:
        self._arm(peer, effect.key, float(effect.at))

    def _arm(self, peer: Host, key: str, due: float) -> None:
        number = self._sequence + 1
        peer.timers[key] = (due, number)
        self._at(peer.virtual(due), self._fire, peer, key, number)

    def _fire(self, peer: Host, key: str, number: int) -> None:
        due, current = peer.timers.get(key, (0.0, 0))
        if current == number and not peer.frozen:
            del peer.timers[key]
            self._feed(peer, TimerFired(key), least=due)

    def _rearm(self, peer: Host) -> None:
        for key, (due, _) in sorted(peer.timers.items(), key=lambda item: item[1]):
            self._arm(peer, key, due)

    # Work and disk

    def _train(self, peer: Host, effect: Train) -> None:
        begins = max(self.now, peer.worker_free_at)
        answer: Input
        steps = 1
        try:
            if peer.fails:
                raise RoundFailed("local training failed, as a fault of the simulation says")
            vector, loss, steps = peer.spec.train(
                peer.peer, effect.round, effect.vector, effect.seconds / peer.slowness, effect.mixed
            )
            answer = Trained(effect.round, vector, loss, steps)
        except P2pflError as error:
            answer, peer.fails = WorkFailed(error), False
        peer.worker_free_at = begins + steps * peer.spec.step_seconds * peer.slowness
        self._at(peer.worker_free_at, self._deliver, peer, peer.life, answer)

    def _compute(self, peer: Host, effect: Compute) -> None:
        answer: Input
        try:
            answer = Computed(effect.key, effect.work())
        except P2pflError as error:
            answer = WorkFailed(error)
        seconds = effect.size / self._conditions.compute * peer.slowness
        self._at(self.now + seconds, self._deliver, peer, peer.life, answer)

    def _persist(self, peer: Host, effect: Persist) -> None:
        begins = max(self.now, peer.disk_free_at)
        peer.disk_free_at = begins + peer.draw.lognormvariate(self._fsync, self._conditions.spread)
        peer.writing.append(effect.record)
        self._at(peer.disk_free_at, self._written, peer, peer.life, effect)

    def _written(self, peer: Host, life: int, effect: Persist) -> None:
        if peer.life == life:
            record = peer.writing.popleft()
            self._keep(peer, record)
            base = peer.disk.checkpoint.base if isinstance(record, Checkpoint) and peer.disk.checkpoint else None
            self._deliver(peer, life, Persisted(effect.key, base))

    def _keep(self, peer: Host, record: Any) -> None:
        peer.disk.write(record)
        for check in self._checks:
            check.durable(peer, record)

    # Messages

    def _send(self, peer: Host, effect: Send) -> None:
        way = peer.ways.get(effect.peer)
        if way is None or not way.link.up[way.side]:
            return
        message = self._through_wire(way, effect.message, 0) if self._strict else effect.message
        if message is None:
            return
        if self._is_lost(way) or way.control >= MAX_BACKLOG:
            self._note_lost(way, message)
            return
        at = self.now + self._takes(way)
        if not way.reorder:
            at = way.control_at = max(at, way.control_at)
        way.control += 1
        self._at(at, self._arrive, way, way.link.epoch, message)
        if way.duplicate and way.draw.random() < way.duplicate:
            self._at(at + way.draw.uniform(0.0, DUPLICATE_DELAY), self._arrive_again, way, message)

    def _takes(self, way: Way) -> float:
        seconds = way.draw.lognormvariate(self._latency, self._conditions.spread) + way.delay
        return seconds + way.draw.uniform(0.0, way.reorder) if way.reorder else seconds

    @staticmethod
    def _is_lost(way: Way) -> bool:
        return way.blocked or not way.link.standing or (way.loss > 0 and way.draw.random() < way.loss)

    def _note_lost(self, way: Way, message: Message) -> None:
        if self.log is not None:
            self.log.append((self.now, way.sender.place, way.receiver.place, message))

    def _arrive(self, way: Way, epoch: int, message: Message) -> None:
        receiver, link = way.receiver, way.link
        if receiver.frozen:
            receiver.backlog.append((self._arrive, (way, epoch, message)))
            return
        if epoch != link.epoch:
            return
        way.control -= 1
        if way.blocked:
            self._note_lost(way, message)
        elif link.up[1 - way.side]:
            self._feed(receiver, Received(way.sender.peer, message))

    def _arrive_again(self, way: Way, message: Message) -> None:
        if way.link.up[1 - way.side] and not way.blocked and not way.receiver.frozen:
            self._feed(way.receiver, Received(way.sender.peer, message))

    def _send_bulk(self, peer: Host, effect: SendBulk) -> None:
        peer.round = effect.message.round
        for other in effect.peers:
            way = peer.ways.get(other)
            if way is not None and way.link.up[way.side]:
                self._queue_bulk(way, effect)

    def _queue_bulk(self, way: Way, effect: SendBulk) -> None:
        message: Message | None = effect.message
        if self._strict:
            message = self._through_wire(way, effect.message, effect.payload.nbytes)
        if message is None:
            return
        copies = 2 if way.duplicate and way.draw.random() < way.duplicate else 1
        for _ in range(copies):
            if self._is_lost(way):
                self._note_lost(way, message)
                continue
            if len(way.queue) == MAX_BULK:
                self._note_lost(way, way.queue[0][0])
            way.queue.append((message, effect.payload))
        self._next_bulk(way)

    def _next_bulk(self, way: Way) -> None:
        if way.queue and not way.busy:
            way.busy = True
            self._at(self.now + self._takes(way), self._offer, way, way.link.epoch, *way.queue.popleft())

    def _offer(self, way: Way, epoch: int, message: Message, payload: Vector) -> None:
        receiver = way.receiver
        if receiver.frozen:
            receiver.backlog.append((self._offer, (way, epoch, message, payload)))
            return
        if not self._carries(way, epoch):
            return
        wanted = False
        if way.blocked:
            self._note_lost(way, message)
        else:
            answers = self._feed(receiver, BulkOffered(way.sender.peer, message))
            wanted = any(type(answer) is AcceptBulk for answer in answers)
        # A payload that nobody wants is sent and skipped all the same.
        seconds = payload.nbytes / self._conditions.bandwidth
        self._at(self.now + seconds, self._payload, way, epoch, message, payload if wanted else None)

    def _payload(self, way: Way, epoch: int, message: Message, payload: Vector | None) -> None:
        receiver = way.receiver
        if receiver.frozen:
            receiver.backlog.append((self._payload, (way, epoch, message, payload)))
            return
        if not self._carries(way, epoch):
            return
        if payload is not None and way.blocked:
            self._note_lost(way, message)
        elif payload is not None:
            self._feed(receiver, BulkReceived(way.sender.peer, message, bytearray(payload.tobytes())))
        if self._carries(way, epoch):
            way.busy = False
            self._next_bulk(way)

    def _carries(self, way: Way, epoch: int) -> bool:
        link = way.link
        return epoch == link.epoch and link.standing and link.banned_until[1 - way.side] <= self.now

    def _through_wire(self, way: Way, message: Message, payload: int) -> Message | None:
        """Return what the receiver decodes; None where a liar sent what is no message."""
        try:
            header = encode_header(message)
            header_length(header[:LENGTH_BYTES])
            decoded = decode_header(header[LENGTH_BYTES:])
            if decoded != message or payload_length(decoded) != payload:
                raise Malformed(f"{type(message).__name__} with {payload} bytes of payload is another once decoded")
        except (RemoteError, OverflowError) as error:
            if not way.sender.lying:
                raise InvariantViolated(f"{way.sender.name} sends what does not fit the wire: {error}") from error
            self._at(self.now + self._takes(way), self._fault, way, way.link.epoch)
            return None
        return decoded

    def _fault(self, way: Way, epoch: int) -> None:
        if self._carries(way, epoch):
            self._ban(way.receiver, Disconnect(way.sender.peer, Malformed("sent what is no message", way.sender.peer)))

    # Links

    def _dial_after(self, link: Link, pause: float) -> None:
        link.dial = self._sequence + 1
        self._at(self.now + pause * link.draw.uniform(0.5, 1.0), self._dial, link, link.dial)

    def _dial(self, link: Link, number: int) -> None:
        first, second = link.ends
        if number != link.dial or link.standing or not (first.running and second.running):
            return  # Who is started later dials then.
        if first.frozen or second.frozen or link.ways[0].blocked or link.ways[1].blocked:
            link.pause = min(2 * link.pause, LONGEST_PAUSE)
            self._dial_after(link, link.pause)
        elif max(link.banned_until) > self.now:
            self._dial_after(link, 2 * (max(link.banned_until) - self.now))
        else:
            self._connect(link)

    def _connect(self, link: Link) -> None:
        link.epoch += 1
        link.standing, link.pause = True, FIRST_PAUSE
        for way in link.ways:
            way.empty()
        for way in link.ways:
            way.control_at = self.now + 2 * self._takes(way)
            self._at(way.control_at, self._hello, way, link.epoch, Hello(self._charter, way.sender.round))

    def _hello(self, way: Way, epoch: int, hello: Hello) -> None:
        link, side, receiver = way.link, 1 - way.side, way.receiver
        if receiver.frozen:
            receiver.backlog.append((self._hello, (way, epoch, hello)))
            return
        if not self._carries(way, epoch):
            return
        if way.blocked:
            self._at(self.now + NO_ANSWER, self._fall, link, epoch, "no answer")
            return
        self._down(link, epoch, side, "replaced by a newer connection")
        self._feed(receiver, Received(way.sender.peer, hello))
        if self._carries(way, epoch) and receiver.running:
            link.up[side] = True
            self._feed(receiver, LinkUp(way.sender.peer))

    def _down(self, link: Link, epoch: int, side: int, reason: str) -> None:
        """Tell one side that the link is gone, if it thinks that it stands."""
        peer, other = link.ends[side], link.ends[1 - side]
        if peer.frozen:
            peer.backlog.append((self._down, (link, epoch, side, reason)))
        elif epoch == link.epoch and link.up[side]:
            link.up[side] = False
            self._feed(peer, LinkDown(other.peer, reason))

    def _fall(self, link: Link, epoch: int, reason: str) -> None:
        """End the connection; both sides learn it, each in its time, and dial again."""
        if epoch == link.epoch and link.standing:
            link.standing = False
            for way in link.ways:
                self._at(self.now + self._takes(way), self._down, link, epoch, 1 - way.side, reason)
            self._dial_after(link, link.pause)

    def _end(self, way: Way, reason: str, tell: bool) -> None:
        """End the connection as the sender of `way` sees fit; the receiver learns it if `tell` and if it can."""
        link = way.link
        link.up[way.side] = False
        if link.standing:
            link.standing = False
            if tell and not way.blocked:
                self._at(self.now + self._takes(way), self._down, link, link.epoch, 1 - way.side, reason)

    def _ban(self, peer: Host, effect: Disconnect) -> None:
        way = peer.ways.get(effect.peer)
        if way is None or way.link.banned_until[way.side] > self.now:
            return
        link = way.link
        link.banned_until[way.side] = self.now + PENALTY
        if link.up[way.side]:
            link.up[way.side] = False
            self._at(self.now, self._deliver, peer, peer.life, LinkDown(effect.peer, effect.error.reason))
        self._at(self.now + GRACE, self._fall, link, link.epoch, "closed by the neighbor")

    def _drop_link(self, peer: Host, effect: DropLink) -> None:
        way = peer.ways.get(effect.peer)
        if way is None:
            return
        if way.link.up[way.side]:
            self._at(self.now, self._deliver, peer, peer.life, LinkDown(effect.peer, effect.reason))
        self._end(way, "closed by the neighbor", tell=True)
        self._dial_after(way.link, way.link.pause)

    # Faults

    def _begin(self, fault: Fault) -> None:
        if self.log is not None:
            self.log.append((self.now, fault, True))
        match fault:
            case Crash():
                self._crash(fault)
            case Freeze(peer=place):
                self.peers[place].frozen = self.peers[place].running
                self._at(fault.until, self._thaw, self.peers[place], self.peers[place].life)
            case ClockSkew(_, place, rate, jump):
                self.peers[place].skew(self.now, rate, jump)
                self._rearm(self.peers[place])
            case FailWork(_, place):
                self.peers[place].fails = True
            case Stop(_, place):
                self._deliver(self.peers[place], self.peers[place].life, StopRequested())
            case Slow() | Cut() | Partition() | Loss() | Delay() | Duplicate() | Reorder():
                self._active.append(fault)
                self._apply()
                self._break_links(fault)
                self._at(fault.until, self._heal, fault)

    def heal(self, fault: Fault) -> None:
        """End a window before its time, after what happens now."""
        self._at(self.now, self._heal, fault)

    def restart(self, place: int) -> None:
        """Start a peer again that had crashed for good, after what happens now."""
        self._at(self.now, self._revive, self.peers[place])

    def _revive(self, peer: Host) -> None:
        if peer.gone:
            peer.gone = False
            self._count()
            self._start(peer)

    def _heal(self, fault: Fault) -> None:
        if fault not in self._active:
            return
        if self.log is not None:
            self.log.append((self.now, fault, False))
        self._active.remove(fault)
        self._apply()

    def _apply(self) -> None:
        """Set what the windows that are open say."""
        for peer in self.peers:
            factors = [each.factor for each in self._active if isinstance(each, Slow) and each.peer == peer.place]
            peer.slowness = math.prod(factors)
        for link in self._links:
            for way in link.ways:
                way.loss = way.delay = way.duplicate = way.reorder = 0.0
                way.blocked = False
                for fault in self._active:
                    _impose(fault, way)

    def _break_links(self, fault: Fault) -> None:
        if (isinstance(fault, Cut) and not fault.one_way) or (isinstance(fault, Partition) and not fault.silent):
            for link in self._links:
                if any(_blocks(fault, way) for way in link.ways):
                    self._fall(link, link.epoch, "connection reset")

    def _crash(self, fault: Crash) -> None:
        peer = self.peers[fault.peer]
        if not peer.running:
            return
        self._die(peer, fault)
        if fault.restart_after is not None:
            self._at(self.now + fault.restart_after, self._restart, peer, fault.keep_disk)

    def _die(self, peer: Host, fault: Crash) -> None:
        writing = peer.end_life()
        # One after the other: a crash leaves the first few of them on the disk.
        for record in writing[: peer.draw.randint(0, len(writing)) if fault.kept is None else fault.kept]:
            self._keep(peer, record)
        for way in peer.ways.values():
            self._end(way, "connection reset", tell=not fault.silent)
        peer.gone = fault.restart_after is None
        self._count()

    def _restart(self, peer: Host, keep_disk: bool) -> None:
        if not keep_disk:
            peer.disk = Disk()
            for check in self._checks:
                check.disk_lost(peer)
        self._start(peer)

    def _thaw(self, peer: Host, life: int) -> None:
        if peer.life != life or not peer.frozen:
            return
        peer.frozen = False
        timers_first = peer.draw.random() < 0.5
        if timers_first:
            self._rearm(peer)
        for happen, arguments in peer.backlog:
            self._at(self.now, happen, *arguments)
        peer.backlog.clear()
        if not timers_first:
            self._rearm(peer)


def _nothing(peer: Host, effect: object) -> None:
    """Carry out an effect that its caller looks at."""


def _concerns(peer: int | None, way: Way) -> bool:
    return peer is None or peer in (way.sender.place, way.receiver.place)


def _impose(fault: Fault, way: Way) -> None:
    match fault:
        case Cut() | Partition():
            way.blocked = way.blocked or _blocks(fault, way)
        case Loss() if _concerns(fault.peer, way):
            way.loss = 1 - (1 - way.loss) * (1 - fault.rate)
        case Delay() if _concerns(fault.peer, way):
            way.delay += fault.seconds
        case Duplicate() if _concerns(fault.peer, way):
            way.duplicate = max(way.duplicate, fault.rate)
        case Reorder() if _concerns(fault.peer, way):
            way.reorder = max(way.reorder, fault.seconds)


def _blocks(fault: Fault, way: Way) -> bool:
    sender, receiver = way.sender.place, way.receiver.place
    match fault:
        case Cut(_, _, first, second, one_way):
            return (sender, receiver) == (first, second) or (not one_way and (receiver, sender) == (first, second))
        case Partition(_, _, groups, _):
            return any((sender in group) != (receiver in group) for group in groups)
    return False
