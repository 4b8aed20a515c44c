"""One peer's protocol: link up, then round by round train, send, wait, average; at the end, average until all agree.

A round waits for the neighbors that are linked and keep step, at most until the charter's deadline. A neighbor that
is gone, has left, or let a deadline pass is not waited for until it is heard in the current round again; its weight
goes to the peer itself, and the round's record names it and the reason. So a dead neighbor costs at most one
deadline, and a stopped network connection nothing. Where it stays away, those around it link to each other in its
place until it is back (see `bypasses` in `p2pfl.gossip.mixing`).

A peer that falls far behind its neighbors goes to their round with the vector it has: neighbors average their models
here anyway.

Updates of the current and the next rounds are kept, one for each neighbor and round; anything else is refused before
a byte of it is allocated.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import networkx as nx
import numpy as np

from p2pfl.core.charter import Charter, Deadlines
from p2pfl.core.errors import (
    Malformed,
    NotAMember,
    OutOfTurn,
    P2pflError,
    RemoteError,
    RoundFailed,
    TooLarge,
    WrongCharter,
)
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
    StopRequested,
    TimerFired,
    Train,
    Trained,
    Vector,
    WorkFailed,
)
from p2pfl.core.trace import (
    LinkChanged,
    MemberChanged,
    Note,
    PeerFinished,
    Refused,
    RoundEnded,
    State,
    StateChanged,
)
from p2pfl.core.wire import Bye, Hello, Message, Ping, Update
from p2pfl.crypto.ring import WEIGHT_ONE
from p2pfl.gossip.average import Average, average
from p2pfl.gossip.grouping import least_weight
from p2pfl.gossip.membership import NO_ROUND, Known, Standing
from p2pfl.gossip.mixing import bypasses, weight
from p2pfl.gossip.settle import Claim, Settling
from p2pfl.gossip.topology import around, diameter, gaps, overlay_of

LOOKAHEAD = 2
"""How many rounds ahead of one's own an update is kept; the design's r to r + 2."""
LIARS = 1
"""How many neighbors may claim a later round than they are in without dragging this peer along."""
PATIENCE = 3
"""Silences (`deadlines.silence`) after which an unreachable neighbor is bypassed. A guess: a restart takes less."""
MOST_SOUGHT = 32
"""Members beside the neighbors to which links are kept up. A guess: more than die around one peer."""
CHECKPOINT_PAUSE = Seconds(1.0)
"""Between the beginnings of two checkpoints. A guess: what a crash costs a peer, which then follows its neighbors."""


@dataclass(frozen=True)
class Plan:
    """What one peer needs to know of the charter to run its rounds.

    Attributes:
        me: this peer.
        charter: the charter's hash.
        names: the members' names, for the trace.
        roster: all members.
        graph: the overlay; node i is the i-th of the roster.
        weights: this peer's row of the mixing matrix where all weigh the same, neighbors only.
        diameter: of the overlay, in hops.
        parameters: length of the vector.
        least_weight: the smallest that a member may have, in units of 1 / WEIGHT_ONE.
    """

    me: PeerId
    charter: bytes
    names: Mapping[PeerId, str]
    roster: tuple[PeerId, ...]
    graph: nx.Graph
    weights: Mapping[PeerId, float]
    diameter: int
    parameters: int
    rounds: int
    tolerance: float
    settle_rounds: int
    deadlines: Deadlines
    least_weight: int = WEIGHT_ONE

    @classmethod
    def for_peer(cls, charter: Charter, me: PeerId) -> "Plan":
        """Derive the plan of `me` from the charter.

        Raises:
            InvalidConfig: the topology does not exist for this many members.
        """
        roster = charter.roster()
        graph = overlay_of(charter)
        node = roster.index(me)
        return cls(
            me=me,
            charter=charter.hash(),
            names={PeerId(member.peer_id): member.name for member in charter.members},
            roster=roster,
            graph=graph,
            weights={roster[other]: weight(graph, node, other) for other in sorted(graph.neighbors(node))},
            diameter=diameter(graph),
            parameters=charter.model.parameters,
            rounds=charter.rounds,
            tolerance=charter.averaging.tolerance,
            settle_rounds=charter.averaging.settle_rounds,
            deadlines=charter.deadlines,
            least_weight=least_weight(charter.averaging),
        )


@dataclass
class _Neighbor(Known):
    """What is known of a member that is a neighbor, or may become one."""

    lost_at: float = 0.0
    """When its link was lost, or first wanted."""
    told: Standing = Standing.UNREACHABLE
    """What the trace says of it."""
    misses: int = 0
    """Deadlines it let pass since it was last heard in time."""
    late: int = 0
    """Late updates of it since the last of those."""
    reached: int = -1
    """The latest round in which an update of it was seen."""
    updates: dict[Round, tuple[Vector, Claim, int]] = field(default_factory=dict)
    """With what they claim, and their sender's weight."""


class PeerMachine:
    """The machine of one peer; see the module.

    Args:
        plan: from the charter.
        initial: the common initial model, float32 [parameters].
        resume: what is known of this peer's former lives, if it had any.
        weight: this peer's, in units of 1 / WEIGHT_ONE.
    """

    def __init__(self, plan: Plan, initial: Vector, resume: Resume | None = None, weight: int = WEIGHT_ONE) -> None:
        self._plan = plan
        self._weight = weight
        self._vector, self._round, self._mixed = initial, Round(0), False
        if resume is not None:
            checkpoint = resume.checkpoint
            self._vector, self._round, self._mixed = checkpoint.base, checkpoint.round, checkpoint.mixed
        self._round_began = Seconds(0.0)
        self._heartbeat_due = Seconds(0.0)
        self._state = State.STARTING
        self._waiting = False
        self._averaging = False
        self._loss: float | None = None
        self._settling = self._settling_from(self._round)
        self._agreed = False
        self._stop_asked = False
        self._start_at = Seconds(0.0)
        self._persisting = False
        self._persist_from = Seconds(0.0)
        self._members = {peer: _Neighbor() for peer in plan.roster if peer != plan.me}
        self._weights = plan.weights
        self._dead: frozenset[PeerId] = frozenset()
        self._sought: frozenset[PeerId] = frozenset()

    def handle(self, input: Input, now: Seconds) -> list[Effect]:  # noqa: PLR0912 - a case for each input
        """Take one input; see `p2pfl.core.machine.Machine`."""
        if self._state in (State.DONE, State.FAILED):
            return [RefuseBulk("this peer has finished")] if isinstance(input, BulkOffered) else []
        match input:
            case Started():
                return self._on_started(now)
            case LinkUp(peer):
                return self._on_link_up(peer, now)
            case LinkDown(peer, reason):
                return self._on_link_down(peer, reason, now)
            case Received(peer, message):
                return self._guarded(peer, message, now) or self._on_message(peer, message, now)
            case BulkOffered(peer, message):
                return self._guarded(peer, message, now) or self._on_offer(peer, message, now)
            case BulkReceived(peer, message, payload):
                return self._on_update(peer, message, payload, now)
            case TimerFired(key):
                return self._on_timer(key, now)
            case Trained(round, vector, loss):
                return self._on_trained(round, vector, loss, now)
            case Computed(_, result):
                return self._on_averaged(result, now)
            case WorkFailed(error):
                return self._finish(error)
            case StopRequested():
                return self._on_stop(now)
            case Persisted():
                if not self._persisting:
                    raise OutOfTurn("a record was kept that nobody asked for")
                self._persisting = False
                return []

    # Links

    def _neighbors(self) -> Iterator[tuple[PeerId, _Neighbor]]:
        """Return whom this peer averages with: its neighbors, and those in the place of dead ones."""
        return ((peer, self._members[peer]) for peer in self._weights)

    def _on_started(self, now: Seconds) -> list[Effect]:
        if self._state is not State.STARTING:
            raise OutOfTurn("started twice")
        effects = self._enter(State.LINKING)
        self._start_at = Seconds(now + self._plan.deadlines.start)
        effects.append(SetTimer("start", self._start_at))
        return effects + self._set_heartbeat(now)

    def _on_link_up(self, peer: PeerId, now: Seconds) -> list[Effect]:
        neighbor = self._members.get(peer)
        if neighbor is None:
            return [Disconnect(peer, NotAMember("is not a member", peer))]
        neighbor.linked, neighbor.heard_at, neighbor.left_after, neighbor.reached = True, now, None, -1
        ping = Send(peer, Ping(self._plan.charter, self._round))
        effects: list[Effect] = [Emit(LinkChanged(self._name(peer), up=True)), ping]
        if self._state is State.LINKING:
            return effects + self._tell_standings() + self._start_if_linked(now)
        # Whether it keeps step is known once an update of the current round arrives.
        neighbor.in_step = False
        effects += self._repair(now)
        if peer in self._weights and (self._waiting or self._averaging):
            effects.append(self._update_for((peer,)))
        if self._state is State.LEAVING:
            effects.append(Send(peer, Bye(self._plan.charter, Round(self._round - 1))))
        return effects + self._tell_standings()

    def _on_link_down(self, peer: PeerId, reason: str, now: Seconds) -> list[Effect]:
        neighbor = self._members.get(peer)
        if neighbor is None or not neighbor.linked:
            return []
        neighbor.linked, neighbor.lost_at, neighbor.claim = False, now, NO_ROUND
        down = Emit(LinkChanged(self._name(peer), up=False, reason=reason))
        return [down, *self._tell_standings(), *self._proceed()]

    def _start_if_linked(self, now: Seconds) -> list[Effect]:
        """Begin once all neighbors are linked, or soon where those that are say that the federation runs."""
        linked = [neighbor for _, neighbor in self._neighbors() if neighbor.linked]
        ahead = sum(neighbor.claim > self._round for neighbor in linked)
        if len(linked) == len(self._weights) or ahead > LIARS:
            return self._begin(now)
        soon = Seconds(now + self._plan.deadlines.heartbeat)
        if not ahead or self._start_at <= soon:
            return []
        self._start_at = soon
        return [SetTimer("start", soon)]

    def _on_start_deadline(self, now: Seconds) -> list[Effect]:
        if any(neighbor.linked for _, neighbor in self._neighbors()):
            return self._begin(now)
        names = ", ".join(self._name(peer) for peer in self._weights)
        waited = f"no neighbor answered within {self._plan.deadlines.start:g} s"
        return self._finish(RoundFailed(f"{waited}: {names}; check their addresses, and that they run"))

    def begin(self, now: Seconds) -> list[Effect]:
        """Begin with the neighbors that are linked, unless this peer has begun already."""
        return self._begin(now) if self._state is State.LINKING else []

    def _begin(self, now: Seconds) -> list[Effect]:
        for neighbor in self._members.values():
            neighbor.lost_at = now
        return [CancelTimer("start"), *self._catch_up(), *self._begin_round(now)]

    def _repair(self, now: Seconds) -> list[Effect]:
        """Go around neighbors that stay unreachable, and back to those that do not."""
        limit = now - PATIENCE * self._plan.deadlines.silence
        watched = self._sought.union(self._plan.weights)
        dead = frozenset(
            peer for peer in watched if not self._members[peer].linked and self._members[peer].lost_at < limit
        )
        if dead == self._dead:
            return []
        self._dead = dead
        roster, graph = self._plan.roster, self._plan.graph
        me, nodes = roster.index(self._plan.me), frozenset(map(roster.index, dead))
        weights = dict(self._plan.weights)
        for node, added in sorted(bypasses(graph, me, nodes).items()):
            weights[roster[node]] = weights.get(roster[node], 0.0) + added
        # Not only those of the ring: who else is dead around the gap decides who is next in it.
        near = [node for part, rim in gaps(graph, me, nodes) for node in (*around(rim, me), *part)]
        sought = frozenset([peer for node in near if (peer := roster[node]) not in self._plan.weights][:MOST_SOUGHT])
        effects: list[Effect] = [Forsake(peer) for peer in sorted(self._sought - sought)]
        for peer in sorted(sought - self._sought):
            self._members[peer].lost_at = now
            effects.append(Seek(peer))
        if weights != self._weights:
            effects.append(Emit(Note(self._way_around(weights))))
        self._sought, self._weights = sought, weights
        return effects + self._proceed()

    def _way_around(self, weights: Mapping[PeerId, float]) -> str:
        gone = ", ".join(self._name(peer) for peer in sorted(self._dead))
        added = [peer for peer in weights if weights[peer] != self._plan.weights.get(peer)]
        if not added:
            return "back to the overlay of the charter"
        return f"{gone} unreachable for long: averaging with {', '.join(map(self._name, added))} in place of it"

    def _tell_standings(self) -> list[Effect]:
        effects: list[Effect] = []
        for peer, neighbor in self._neighbors():
            standing = neighbor.standing(self._round)
            if standing is not neighbor.told:
                neighbor.told = standing
                effects.append(Emit(MemberChanged(self._name(peer), standing)))
        return effects

    # Messages

    def _guarded(self, peer: PeerId, message: Message, now: Seconds) -> list[Effect]:
        """Return what a message costs its sender that must not have been sent; nothing if it may be handled."""
        neighbor = self._members.get(peer)
        if neighbor is None:
            return self._drop(peer, NotAMember("is not a member", peer))
        if message.charter != self._plan.charter:
            theirs, ours = message.charter.hex()[:12], self._plan.charter.hex()[:12]
            return self._drop(peer, WrongCharter(f"sent a message under charter {theirs}, ours is {ours}", peer))
        neighbor.heard_at = now
        return []

    def _on_message(self, peer: PeerId, message: Message, now: Seconds) -> list[Effect]:
        neighbor = self._members[peer]
        match message:
            case Hello(_, round):
                neighbor.claim = round
            case Ping(_, round):
                neighbor.claim = max(neighbor.claim, round)
            case Bye(_, round):
                neighbor.left_after = round
                return [*self._tell_standings(), *self._proceed()]
            case _:
                return []
        return self._on_claim(now)

    def _on_claim(self, now: Seconds) -> list[Effect]:
        if self._state is State.LINKING:
            return self._start_if_linked(now)
        return self._proceed() if self._is_behind() else []

    def _on_offer(self, peer: PeerId, message: Message, now: Seconds) -> list[Effect]:
        if not isinstance(message, Update):
            return self._drop(peer, Malformed("announced a payload with a message that has none", peer))
        wanted = 4 * self._plan.parameters
        if message.length != wanted:
            kind = TooLarge if message.length > wanted else Malformed
            return self._drop(
                peer,
                kind(f"sent a model of {message.length / 4:g} values, the charter's has {self._plan.parameters}", peer),
            )
        if message.weight < self._plan.least_weight:
            return self._drop(peer, Malformed("weighs less in an average than the charter allows", peer))
        neighbor = self._members[peer]
        neighbor.claim = max(neighbor.claim, message.round)
        if peer not in self._weights:
            return [RefuseBulk("this peer does not average with it now")]
        neighbor.reached = max(neighbor.reached, message.round)
        if message.round < self._round or (message.round == self._round and self._averaging):
            self._note_late(neighbor)
            return [RefuseBulk(f"late: round {message.round}, this peer is in {self._round}")]
        if message.round > self._round + LOOKAHEAD:
            early = RefuseBulk(f"early: round {message.round}, this peer is in {self._round}")
            return [early, *self._on_claim(now)]
        if message.round in neighbor.updates:
            return [RefuseBulk(f"round {message.round} is here already")]
        return [AcceptBulk()]

    @staticmethod
    def _note_late(neighbor: _Neighbor) -> None:
        """Wait again for a neighbor that lives and lags: it does not wait for us, and so catches up while we do.

        Two peers that stalled behind the same third may else miss each other for ever, some rounds apart. One that is
        always late costs a deadline ever more rarely: after 2, 4, 8, ... late updates.
        """
        neighbor.late += 1
        if not neighbor.in_step and neighbor.late >= 2 ** min(neighbor.misses, 20):
            neighbor.in_step, neighbor.late = True, 0

    def _on_update(self, peer: PeerId, message: Message, payload: bytearray, now: Seconds) -> list[Effect]:
        if not isinstance(message, Update):
            raise OutOfTurn("a payload was received that was never accepted")
        neighbor = self._members[peer]
        neighbor.heard_at = now
        if message.round < self._round or message.round in neighbor.updates:
            return []
        neighbor.updates[message.round] = (
            np.frombuffer(payload, np.dtype("<f4")),
            Claim(message.spread, message.complete),
            message.weight,
        )
        if message.round == self._round:
            neighbor.misses = 0
        neighbor.in_step = True
        return self._proceed()

    def _drop(self, peer: PeerId, error: RemoteError) -> list[Effect]:
        return [Emit(Refused(self._name(peer), error.reason)), Disconnect(peer, error)]

    # Rounds

    @property
    def _is_settling(self) -> bool:
        return self._round >= self._plan.rounds

    def _settling_from(self, round: Round) -> Settling:
        step = max(0, round - self._plan.rounds)
        return Settling(self._plan.diameter, members=len(self._plan.names), step=step, joined=step)

    def _front(self) -> Round:
        """Return where the neighbors are: the highest round that more of them than `LIARS` say they have reached.

        Where no more than `LIARS` are linked, the one furthest behind is believed.
        """
        linked = (neighbor.claim for _, neighbor in self._neighbors() if neighbor.linked)
        claims = sorted(linked, reverse=True)[: LIARS + 1]
        last = self._plan.rounds + max(0, self._plan.settle_rounds - 1)
        return Round(min(claims[-1], last)) if claims else NO_ROUND

    def _is_behind(self) -> bool:
        return self._front() > self._round + LOOKAHEAD

    def _catch_up(self) -> list[Effect]:
        """Go to the neighbors' round if it is far ahead."""
        if not self._is_behind():
            return []
        before, self._round = self._round, self._front()
        self._settling = self._settling_from(self._round)
        for neighbor in self._members.values():
            neighbor.updates = {round: kept for round, kept in neighbor.updates.items() if round >= self._round}
        told = f"went from round {before} to {self._round}, where the neighbors are"
        return [Emit(Note(told)), Adopt(Round(self._round - 1), self._vector, self._mixed)]

    def _begin_round(self, now: Seconds) -> list[Effect]:
        self._round_began = now
        if not self._is_settling:
            return [*self._enter(State.TRAINING), Train(self._round, self._vector, mixed=self._mixed)]
        return [*self._enter(State.SETTLING), *self._exchange(now)]

    def _on_trained(self, round: Round, vector: Vector, loss: float | None, now: Seconds) -> list[Effect]:
        if self._state is State.LEAVING:
            return []
        if self._state is not State.TRAINING or round != self._round or self._waiting or self._averaging:
            raise OutOfTurn(f"trained round {round} in round {self._round}")
        self._vector, self._loss = vector, loss
        return self._exchange(now)

    def _exchange(self, now: Seconds) -> list[Effect]:
        self._waiting = True
        linked = tuple(peer for peer, neighbor in self._neighbors() if neighbor.linked)
        deadline = Seconds(now + self._plan.deadlines.round)
        return [self._update_for(linked), SetTimer("round", deadline), *self._proceed()]

    def _update_for(self, peers: tuple[PeerId, ...]) -> Effect:
        claim, size = self._settling.claim, self._vector.nbytes
        message = Update(self._plan.charter, self._round, size, claim.spread, claim.complete, self._weight)
        return SendBulk(peers, message, self._vector)

    def _is_awaited(self, neighbor: _Neighbor) -> bool:
        gone = not neighbor.linked or (neighbor.left_after is not None and neighbor.left_after < self._round)
        here = self._round in neighbor.updates
        # Whoever is seen in a later round will not send this one any more.
        return not gone and not here and neighbor.in_step and neighbor.reached <= self._round

    def _proceed(self) -> list[Effect]:
        """Do whatever is waiting for neighbors, if none is to be waited for any more."""
        if self._state is State.LEAVING:
            return self._leave_if_alone()
        if not self._waiting:
            return []
        awaited = any(self._is_awaited(neighbor) for _, neighbor in self._neighbors())
        return [] if awaited and not self._is_behind() else self._average()

    def _average(self) -> list[Effect]:
        self._waiting, self._averaging = False, True
        own = self._vector
        contributions = {
            peer: neighbor.updates[self._round][0]
            for peer, neighbor in self._neighbors()
            if self._round in neighbor.updates
        }
        weights = {peer: self._mixing_weight(peer) for peer in self._weights if peer in contributions}
        size = own.nbytes * (1 + len(contributions))
        return [CancelTimer("round"), Compute("average", lambda: average(own, contributions, weights), size)]

    def _mixing_weight(self, peer: PeerId) -> float:
        """Return with which weight the update of this round is taken in that is here from a neighbor."""
        among_equals = self._weights[peer]
        ratio = self._members[peer].updates[self._round][2] / self._weight
        if ratio == 1.0:
            return among_equals
        graph, roster = self._plan.graph, self._plan.roster
        me, other = roster.index(self._plan.me), roster.index(peer)
        direct = self._plan.weights.get(peer, 0.0)
        hastings = weight(graph, me, other, ratio) if direct else 0.0
        return hastings + (among_equals - direct) * min(1.0, ratio)

    def _on_averaged(self, result: object, now: Seconds) -> list[Effect]:
        if self._state is State.LEAVING:
            return []
        if not self._averaging or not isinstance(result, Average):
            raise OutOfTurn(f"an average came that round {self._round} did not ask for")
        self._averaging = False
        effects: list[Effect] = []
        for peer in result.rejected:
            effects += self._drop(peer, Malformed("sent NaN, infinity or values over 1e30 in an update", peer))
        effects.append(Emit(self._record(result, now)))
        self._vector, self._mixed = result.vector, bool(result.heard) and not self._is_settling
        effects.append(Adopt(self._round, self._vector, self._mixed))
        if self._is_settling:
            heard = [self._members[peer].updates[self._round][1] for peer in result.heard]
            # Of the charter's overlay: who is bypassed may live elsewhere, with another model.
            complete = set(self._plan.weights) <= set(result.heard)
            self._settling = self._settling.after_round(result.spread, heard, complete)
        for neighbor in self._members.values():
            neighbor.updates.pop(self._round, None)
        return effects + self._persist(now) + self._next_round(now)

    def _persist(self, now: Seconds) -> list[Effect]:
        """Have the vector kept beside the next rounds, which do not wait for the disk."""
        if self._persisting or now < self._persist_from:
            return []
        self._persisting, self._persist_from = True, Seconds(now + CHECKPOINT_PAUSE)
        return [Persist("checkpoint", Checkpoint(Round(self._round + 1), self._vector, None, mixed=self._mixed))]

    def _record(self, result: Average, now: Seconds) -> RoundEnded:
        absent = {self._name(peer): self._absence(peer, result) for peer in self._weights if peer not in result.heard}
        return RoundEnded(
            round=self._round,
            seconds=round(now - self._round_began, 6),
            heard=tuple(map(self._name, result.heard)),
            absent=absent,
            loss=self._loss,
            spread=result.spread,
            settling=self._is_settling,
        )

    def _absence(self, peer: PeerId, result: Average) -> str:
        neighbor = self._members[peer]
        if peer in result.rejected:
            return "rejected: not finite"
        if neighbor.left_after is not None and neighbor.left_after < self._round:
            return f"left after round {neighbor.left_after}"
        if not neighbor.linked:
            return "no link"
        if neighbor.reached > self._round:
            return f"ahead, in round {neighbor.reached}"
        return "late"

    def _next_round(self, now: Seconds) -> list[Effect]:
        self._round = Round(self._round + 1)
        self._loss = None
        if self._stop_asked:
            return self._leave(now)
        effects = self._catch_up() + self._tell_standings()
        if self._is_settling and self._is_settled():
            return effects + self._leave(now)
        return effects + self._begin_round(now)

    def _is_settled(self) -> bool:
        verdict = self._settling.verdict()
        if verdict is not None and verdict.bound <= self._plan.tolerance:
            self._agreed = verdict.proven
            return True
        alone = all(
            not neighbor.linked or (neighbor.left_after is not None and neighbor.left_after < self._round)
            for _, neighbor in self._neighbors()
        )
        return alone or self._settling.step >= self._plan.settle_rounds

    # Leaving

    def _on_stop(self, now: Seconds) -> list[Effect]:
        again, self._stop_asked = self._stop_asked, True
        if again or self._state in (State.STARTING, State.LINKING, State.LEAVING):
            return self._finish(None)
        return self._leave(now) if self._waiting else []

    def _leave(self, now: Seconds) -> list[Effect]:
        """Say goodbye, and stay until the neighbors have what they need: their own goodbye says so."""
        self._waiting = False
        last = Round(self._round - 1)
        linked = [peer for peer, neighbor in self._members.items() if neighbor.linked]
        return [
            CancelTimer("round"),
            *self._enter(State.LEAVING),
            *(Send(peer, Bye(self._plan.charter, last)) for peer in linked),
            SetTimer("leave", Seconds(now + self._plan.deadlines.round)),
            *self._leave_if_alone(),
        ]

    def _leave_if_alone(self) -> list[Effect]:
        here = any(neighbor.linked and neighbor.left_after is None for _, neighbor in self._neighbors())
        return [] if here and not self._stop_asked else self._finish(None)

    def _finish(self, error: P2pflError | None) -> list[Effect]:
        outcome = "failed" if error is not None else "stopped" if self._stop_asked else "done"
        reason = "" if error is None else str(error)
        return [
            *self._enter(State.FAILED if error is not None else State.DONE),
            Emit(PeerFinished(outcome, self._round, self._agreed, reason)),
            Finish(error),
        ]

    # Time

    def _on_timer(self, key: str, now: Seconds) -> list[Effect]:
        match key:
            case "start" if self._state is State.LINKING:
                return self._on_start_deadline(now)
            case "heartbeat":
                return self._on_heartbeat(now)
            case "round" if self._waiting:
                for _, neighbor in self._neighbors():
                    if self._is_awaited(neighbor):
                        neighbor.in_step, neighbor.late = False, 0
                        neighbor.misses += 1
                return self._average()
            case "leave" if self._state is State.LEAVING:
                return self._finish(None)
        return []

    def _on_heartbeat(self, now: Seconds) -> list[Effect]:
        # A timer that comes late says that this peer slept, not its neighbors: what they sent is still to be read.
        slept = now - self._heartbeat_due > self._plan.deadlines.heartbeat
        effects = self._set_heartbeat(now)
        if self._state not in (State.LINKING, State.LEAVING):
            effects += self._repair(now)
        for peer, neighbor in self._members.items():
            if not neighbor.linked:
                continue
            if slept:
                neighbor.heard_at = now
            silent = now - neighbor.heard_at
            if silent > self._plan.deadlines.silence:
                effects.append(DropLink(peer, f"no sign of life for {silent:.0f} s"))
            else:
                effects.append(Send(peer, Ping(self._plan.charter, self._round)))
        return effects

    def _set_heartbeat(self, now: Seconds) -> list[Effect]:
        self._heartbeat_due = Seconds(now + self._plan.deadlines.heartbeat)
        return [SetTimer("heartbeat", self._heartbeat_due)]

    def _enter(self, state: State) -> list[Effect]:
        if state is self._state:
            return []
        self._state = state
        return [Emit(StateChanged(state, self._round))]

    def _name(self, peer: PeerId) -> str:
        return self._plan.names.get(peer, peer)
