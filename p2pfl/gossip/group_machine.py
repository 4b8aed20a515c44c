"""One peer's protocol where sums are drawn anew each round: train, average in the group, keep what was released.

A group is cut from the roster, or is a star of the overlay: a centre and all its neighbors. There statements among the
leaves go through the centre, and whoever is in no star sits the round out.

`base` is the last adopted average, and the model is base plus what local training added that no sum has taken in: the
update. A round's outcome says what becomes of them (`Outcome` in `p2pfl.gossip.session`). From its first byte on the
wire an update is spent: it never enters a second sum, whatever became of the first.

A peer that falls behind goes where more than the colluders are, with a base that a session verifiably released, never
with somebody's current model. One that is cut off waits: it passes no round without the others, so nobody runs ahead
alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

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
    Bytes,
    CancelTimer,
    Compute,
    Computed,
    Disconnect,
    DropLink,
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
    StopRequested,
    TimerFired,
    Train,
    Trained,
    Vector,
    WorkFailed,
)
from p2pfl.core.statements import MAX_GROUP, Advert, Enrolment, Statement
from p2pfl.core.trace import LinkChanged, MemberChanged, Note, PeerFinished, Refused, RoundEnded, State, StateChanged
from p2pfl.core.wire import Bye, Chunk, Have, Hello, Message, Part, Ping, Proof, Told, Want
from p2pfl.crypto.beacon import beacon_of
from p2pfl.crypto.ring import HEADER_BYTES, WEIGHT_ONE, Metrics
from p2pfl.gossip.grouping import (
    bearable_colluders,
    cohort_size,
    cohorts,
    groups,
    groups_of_cohorts,
    least_survivors,
    least_weight,
    star_colluders,
    stars,
)
from p2pfl.gossip.membership import NO_ROUND, Known, Members
from p2pfl.gossip.patience import Patience
from p2pfl.gossip.release import Keyring, Released, Terms, verified_release
from p2pfl.gossip.secure_sum import MaskTerms
from p2pfl.gossip.session import LONGEST_SUM, NO_SESSION, REPEATS, Outcome, Session
from p2pfl.gossip.topology import overlay_of
from p2pfl.gossip.traffic import LEAST_RATE

LOOKAHEAD = 2
"""How many rounds ahead of one's own statements are kept."""
REMEMBERED = 2
"""How many past rounds can still be asked about."""
MOST_EARLY = 8
"""Statements of later rounds that are kept of one member."""
RATE, BURST = 500.0, 3000.0
"""Statements a second, and at once, that are taken from one neighbor; the check of a signature takes 0.1 ms. A round
of a group of 16 has 160, and each can come from anybody; twice that in a burst for two rounds."""
HAVE_COST = 10.0
"""Of an answer to what a member lacks: up to some hundred statements, which are sent as they are."""
SLACK = 2.0
"""How much longer than the last round's a round's steps may take before the others wait no more; a guess."""
LEAST_WAIT = 0.25
"""Seconds that a stage waits at least before it takes somebody for gone; a guess for links between continents."""


@dataclass(frozen=True)
class GroupPlan:
    """What one peer needs to know of the charter to run its rounds in groups.

    Attributes:
        me: this peer's place in the roster.
        charter: the charter's hash.
        roster: all members' peer ids.
        names: theirs, in the same order, for the trace.
        beacon: what the groups are drawn from.
        group_size: members wanted in a group.
        colluders: how many members may work together.
        least: fewest members in a sum.
        parameters: length of the vector.
        rounds: with local training; fewer than the charter's if the privacy budget bears no more.
        settle_rounds: at most so many tries after that to bring all members to one average.
        window: seconds that a round's training may take; infinite for no limit.
        whole_rounds: in how many first rounds all members are in one group, as after training.
        cohorts: who travels together; none if single members do.
        graph: the overlay whose stars average; None where groups do.
        least_weight: the smallest that a member may have in a sum, in units of 1 / WEIGHT_ONE.
        agreed: how many rounds with local training the charter asks for; 0 for as many as there are.
        fixed: how many values at the vector's end are no model's: they do not move with the base when steps that began
            in one round count in another.
    """

    me: int
    charter: bytes
    roster: tuple[PeerId, ...]
    names: tuple[str, ...]
    beacon: bytes
    group_size: int
    colluders: int
    least: int
    parameters: int
    rounds: int
    settle_rounds: int
    window: float
    deadlines: Deadlines
    whole_rounds: int = 0
    cohorts: tuple[tuple[int, ...], ...] = ()
    graph: nx.Graph | None = None
    least_weight: int = WEIGHT_ONE
    agreed: int = 0
    fixed: int = 0

    @classmethod
    def for_peer(cls, charter: Charter, me: PeerId) -> "GroupPlan":
        """Derive the plan of `me` from the charter.

        Raises:
            InvalidConfig: the topology does not exist for this many members.
        """
        roster = charter.roster()
        names = {PeerId(member.peer_id): member.name for member in charter.members}
        averaging = charter.averaging
        size = min(averaging.group_size, len(roster))
        graph = None if averaging.topology == "groups" else overlay_of(charter)
        colluders = min(averaging.colluders, bearable_colluders(size) if graph is None else star_colluders(graph) or 0)
        beacon = beacon_of(charter)
        together = cohorts(beacon, range(len(roster)), cohort_size(averaging)) if averaging.regroup == "never" else ()
        return cls(
            me=roster.index(me),
            charter=charter.hash(),
            roster=roster,
            names=tuple(names[peer] for peer in roster),
            beacon=beacon,
            group_size=size,
            colluders=colluders,
            least=least_survivors(charter) if averaging.masks == "on" else min(colluders + 2, len(roster)),
            parameters=charter.model.parameters,
            rounds=charter.rounds,
            agreed=charter.training.rounds,
            settle_rounds=charter.averaging.settle_rounds,
            window=charter.training.window or float("inf"),
            deadlines=charter.deadlines,
            whole_rounds=charter.task.whole_rounds,
            cohorts=together,
            graph=graph,
            least_weight=least_weight(averaging),
        )

    @cached_property
    def neighbors(self) -> tuple[int, ...]:
        """The members that this peer has links to: all others, or its neighbors in the overlay."""
        return self.neighbors_of(self.me)

    def neighbors_of(self, place: int) -> tuple[int, ...]:
        """Return the members that the one at this place has links to."""
        if self.graph is None:
            return tuple(other for other in range(len(self.roster)) if other != place)
        return tuple(sorted(self.graph[place]))

    def groups(self, round: Round) -> tuple[tuple[int, ...], ...]:
        """Return the groups of a round: before and after training, all members in one, if a group can be so large.

        On an overlay, those of the round's stars; a member may be in none.
        """
        if self.graph is not None:
            return tuple(star for _, star in stars(self.beacon, round, self.graph, self.colluders))
        if self.cohorts and self.whole_rounds <= round < self.rounds:
            return groups_of_cohorts(self.beacon, round, self.cohorts, self.group_size)
        # A group has up to twice as many members, less one, as are wanted.
        most = MAX_GROUP if len(self.roster) <= MAX_GROUP else MAX_GROUP // 2
        size = self.group_size if self.whole_rounds <= round < self.rounds else most
        return groups(self.beacon, round, range(len(self.roster)), size)

    def terms(self, round: Round) -> Terms:
        """Return what this peer's session of a round is held to; of itself alone if it is in no star."""
        alone = self._terms(round, (self.me,), None)
        return next((terms for terms in self.all_terms(round) if self.me in terms.group), alone)

    def all_terms(self, round: Round) -> tuple[Terms, ...]:
        """Return what the sessions of all groups or stars of a round are held to."""
        if self.graph is None:
            return tuple(self._terms(round, group, None) for group in self.groups(round))
        drawn = stars(self.beacon, round, self.graph, self.colluders)
        return tuple(self._terms(round, star, centre) for centre, star in drawn)

    def _terms(self, round: Round, group: tuple[int, ...], centre: int | None) -> Terms:
        return Terms(
            charter=self.charter,
            roster=self.roster,
            me=self.me,
            round=round,
            group=group,
            colluders=self.colluders,
            least=self.least,
            parameters=self.parameters,
            patience=self.deadlines.round,
            centre=centre,
            least_weight=self.least_weight,
        )


@dataclass(frozen=True, slots=True)
class _Sight:
    """How the members of a session's group seem.

    Attributes:
        linked: who has a link to this peer, and this peer.
        expected: whom the session waits for.
        lagging: who of these is in an earlier round, together with its group: that may be getting over a death.
        may_skip: whether enough others are in this round or beyond, so that it may be passed without a sum.
        is_behind: whether so many are further on that this round is over for them.
        is_together: whether others of the group are in this round, and hardly any further on.
    """

    linked: frozenset[int]
    expected: frozenset[int]
    lagging: frozenset[int]
    may_skip: bool
    is_behind: bool
    is_together: bool


@dataclass
class _Training:
    """The local steps.

    Attributes:
        usual: seconds that a round's are expected to take: as long as the last round's, unless a window bounds them.
        began: when those under way did.
        base: what those under way started from.
    """

    usual: float
    began: float = 0.0
    base: Vector | None = None


@dataclass
class _End:
    """What is known of the members' common end.

    Attributes:
        tries: rounds after training that are over.
        common: the average of all after training, once this peer has taken it over: with it it ends.
        shown: which such average others have shown that they hold; None for one that was not looked at.
    """

    tries: int = 0
    common: Released | None = None
    shown: dict[int, Released | None] = field(default_factory=dict)

    def is_shared(self, members: Iterable[tuple[int, Known]]) -> bool:
        """Return whether each of the other members is known to have left with the average that this peer holds."""
        return self.common is not None and all(self._holds(*each, self.common) for each in members)

    def _holds(self, place: int, known: Known, common: Released) -> bool:
        if known.left_after is None or known.left_after < common.round:
            return False
        if place not in self.shown:
            return place in common.survivors
        shown = self.shown[place]
        return shown is not None and shown.is_as(common)


class GroupMachine:
    """The machine of one peer; see the module.

    Args:
        plan: from the charter.
        keyring: signs and checks statements.
        initial: the common initial model, float32 [parameters].
        resume: what is known of this peer's former lives, if it had any.
        masks: how updates are hidden; None to average them in the clear.
        weight: this peer's in a sum, in units of 1 / WEIGHT_ONE.
    """

    def __init__(
        self,
        plan: GroupPlan,
        keyring: Keyring,
        initial: Vector,
        resume: Resume | None = None,
        masks: MaskTerms | None = None,
        weight: int = WEIGHT_ONE,
    ) -> None:
        self._masks, self.weight = masks, weight
        self._plan, self._keyring = plan, keyring
        self._places = {peer: place for place, peer in enumerate(plan.roster)}
        self._members = Members(place for place in range(len(plan.roster)) if place != plan.me)
        self._base, self._round = _read_only(initial), Round(0)
        self._update: Vector | None = None
        """What local training added to the base, unless it lies in the session's contribution."""
        self._sum: tuple[Vector, Vector, Vector] | None = None
        """Of which base and update, and what `model` is: whoever adopts it and whoever trains it hold the same."""
        self._mixed = False
        """Whether base and update are what came of mixing the last contribution."""
        self._above = -1
        self._synced: Round = Round(-1)
        """The latest round whose released average this peer took over."""
        if resume is not None:
            self._base, self._update = _read_only(resume.checkpoint.base), resume.checkpoint.update
            self._round, self._above = resume.checkpoint.round, resume.above
            self._synced, self._mixed = Round(resume.checkpoint.released), resume.checkpoint.mixed
        self._state = State.STARTING
        self._session: Session | None = None
        self._past: dict[Round, Session] = {}
        self._early: dict[int, list[Statement]] = {}
        self._latest: dict[int, Statement] = {}
        self._patience = Patience(LEAST_WAIT, max(LEAST_WAIT, plan.deadlines.round / 8))
        self._round_began = self._heartbeat_due = 0.0
        self._wake: float | None = None
        self._training = _Training(plan.window)
        self._loss: float | None = None
        self._steps = 0
        self._behind_at: float | None = None
        self._sync: dict[int, Released | None] = {}
        self._sync_again: float | None = None
        """When those that do not answer are asked again, or others in their place."""
        self._sync_until = 0.0
        self._sync_is_last = False
        self._advert_at: float | None = None
        self._cut_off_at: float | None = None
        """When the last of all links fell."""
        self._closing: RoundEnded | None = None
        self._kept = False
        """Whether the checkpoint of the round that ended is on the disk."""
        self._go_on_at = 0.0
        """Until when neighbors are waited for at a round's end."""
        self._hopeless_at: float | None = None
        """Since when this round's star has been without its centre, or with too few leaves."""
        self._end = _End()
        self._sight: tuple[object, _Sight] | None = None
        """Of which fingerprint, round and group, and how these members seem."""
        self._is_noted = self._is_over_told = False
        self._stop_asked = False

    @property
    def _stage(self) -> float:
        return REPEATS * self._patience.seconds

    # What others may ask about

    @property
    def held(self) -> int:
        """How many statements and chunks are in memory; bounded, whatever others send."""
        sessions = [*self._past.values(), *([self._session] if self._session is not None else [])]
        early = sum(map(len, self._early.values()))
        proven = len(self._sync) + len(self._end.shown)
        return sum(session.held for session in sessions) + early + len(self._latest) + proven

    @property
    def round(self) -> Round:
        """The round this peer is in."""
        return self._round

    @property
    def released_base(self) -> Vector | None:
        """The last average that this peer took over, once all training rounds on an overlay are done."""
        is_over = self._plan.graph is not None and self._state is State.SETTLING
        return self._base if is_over else None

    @property
    def contribution(self) -> Vector | None:
        """What this peer averages in its round, float32 [parameters]; None before it has trained."""
        return None if self._session is None else self._session.contribution

    @property
    def changed_from(self) -> Vector | None:
        """The base that `contribution` is the change from; None if it is a whole model."""
        return None if self._session is None else self._session.changed_from

    @property
    def model(self) -> Vector:
        """Base and update, float32 [parameters]."""
        base, update = self._base, self._update
        if update is None:
            return base
        if self._sum is None or self._sum[0] is not base or self._sum[1] is not update:
            self._sum = base, update, _read_only(base + update)
        return self._sum[2]

    # Inputs

    def handle(self, input: Input, now: Seconds) -> list[Effect]:
        """Take one input; see `p2pfl.core.machine.Machine`."""
        if self._state in (State.DONE, State.FAILED):
            return [RefuseBulk("this peer has finished")] if isinstance(input, BulkOffered) else []
        effects = self._take(input, now)
        if self._state not in (State.DONE, State.FAILED):
            effects += self._advance(now)
        return effects + self._set_wake(now)

    def _take(self, input: Input, now: Seconds) -> list[Effect]:
        match input:
            case Started():
                return self._on_started(now)
            case LinkUp(peer):
                return self._on_link_up(peer, now)
            case LinkDown(peer, reason):
                return self._on_link_down(peer, reason, now)
            case Received(peer, message):
                return self._guarded(peer, message, now) or self._on_message(self._places[peer], message, now)
            case BulkOffered(peer, message):
                return self._guarded(peer, message, now) or self._on_offer(self._places[peer], message, now)
            case BulkReceived(peer, message, payload):
                return self._on_bulk(self._places[peer], message, payload, now)
            case TimerFired(key):
                return self._on_timer(key, now)
            case Trained():
                return self._on_trained(input, now)
            case Computed(key, result):
                return self._on_computed(key, result)
            case Persisted():
                return self._on_persisted(input, now)
            case WorkFailed(error):
                return self._finish(error)
            case StopRequested():
                return self._on_stop()

    # Links

    def _on_started(self, now: Seconds) -> list[Effect]:
        if self._state is not State.STARTING:
            raise OutOfTurn("started twice")
        effects = self._enter(State.LINKING)
        effects.append(SetTimer("start", Seconds(now + self._plan.deadlines.start)))
        return effects + self._set_heartbeat(now)

    def _on_link_up(self, peer: PeerId, now: Seconds) -> list[Effect]:
        place = self._places.get(peer)
        if place is None or place == self._plan.me:
            return [Disconnect(peer, NotAMember("is not a member", peer))]
        known = self._members[place]
        known.linked, known.heard_at, known.left_after = True, now, None
        self._cut_off_at = None
        effects: list[Effect] = [Emit(LinkChanged(self._plan.names[place], up=True)), self._ping(place)]
        if place in self._latest:
            # A member whose disk was restored from an old copy learns here what it has signed since.
            effects.append(self._tell(place, self._latest[place]))
        if self._state is State.LEAVING:
            effects += self._goodbye(place)
        return effects

    def _on_link_down(self, peer: PeerId, reason: str, now: Seconds) -> list[Effect]:
        place = self._places.get(peer)
        if place is None or place == self._plan.me or not self._members[place].linked:
            return []
        self._members[place].linked = False
        self._sync.pop(place, None)
        if self._session is not None:
            self._session.link_down(place)
        if not self._members.linked():
            self._cut_off_at = now
        return [Emit(LinkChanged(self._plan.names[place], up=False, reason=reason))]

    def _guarded(self, peer: PeerId, message: Message, now: Seconds) -> list[Effect]:
        """Return what a message costs its sender that must not have been sent; nothing if it may be handled."""
        place = self._places.get(peer)
        if place is None or place == self._plan.me:
            return self._drop(peer, NotAMember("is not a member", peer))
        if message.charter != self._plan.charter:
            theirs, ours = message.charter.hex()[:12], self._plan.charter.hex()[:12]
            return self._drop(peer, WrongCharter(f"sent a message under charter {theirs}, ours is {ours}", peer))
        self._members[place].heard_at = now
        return []

    # Messages

    def _on_message(self, place: int, message: Message, now: Seconds) -> list[Effect]:
        peer, known = self._plan.roster[place], self._members[place]
        try:
            match message:
                case Hello() | Ping():
                    known.claim = max(known.claim, message.round)
                case Bye():
                    known.left_after = message.round
                case Told(_, round, statement):
                    if not self._members.may_send(place, 1.0, now, RATE, BURST):
                        return []
                    if statement.content.round != round:
                        raise Malformed("sent a statement under another round's number")
                    return self._on_statement(place, statement, now)
                case Have():
                    known.claim = max(known.claim, message.round)
                    return self._on_have(place, message, now)
                case Want():
                    return self._on_want(place, message, now)
                case Proof():
                    return self._on_proof(place, message, now)
        except RemoteError as error:
            return self._drop(peer, replace_peer(error, peer))
        return []

    def _on_statement(self, place: int, statement: Statement, now: Seconds) -> list[Effect]:
        round, signer = statement.content.round, statement.signer
        if signer >= len(self._plan.roster):
            raise Malformed(f"passed on a statement of member {signer}; there are {len(self._plan.roster)}")
        if signer == self._plan.me:
            self._on_own_statement(statement)
            return []
        if signer == place:
            self._members[place].claim = max(self._members[place].claim, round)
        session = self._session
        if session is not None and round == self._round:
            if session.outcome is None and session.told(statement, now):
                self._latest[signer] = statement
                return self._pass_on(session, statement)
        elif self._round < round <= self._round + LOOKAHEAD or (session is None and round == self._round):
            early = self._early.setdefault(place, [])
            is_first = isinstance(statement.content, Advert | Enrolment)  # the rest means nothing before these
            if is_first and len(early) < MOST_EARLY * LOOKAHEAD and statement not in early:
                early.append(statement)
        return []

    def _pass_on(self, session: Session, statement: Statement) -> list[Effect]:
        """As a star's centre, tell a leaf's statement to those that have no link with it."""
        if session.terms.centre != self._plan.me:
            return []
        near = (self._plan.me, statement.signer, *self._plan.neighbors_of(statement.signer))
        return [self._tell(who, statement) for who in session.terms.group if who not in near]

    def _on_own_statement(self, statement: Statement) -> None:
        """Heed what this peer signed in a life that its disk knows nothing of."""
        round = statement.content.round
        if round < self._round or (self._session is not None and self._session.holds(statement)):
            return
        self._keyring.verify(self._plan.me, statement.body, statement.signature)
        self._above = max(self._above, round)
        if self._session is not None:
            self._session.give_up()

    def _on_have(self, place: int, have: Have, now: Seconds) -> list[Effect]:
        session = self._session_of(have.round)
        if session is not None:
            return session.answer_have(place, have, now) if self._spend(place, now, HAVE_COST) else []
        return [self._ping(place)] if have.round < self._round and self._spend(place, now) else []

    def _on_want(self, place: int, want: Want, now: Seconds) -> list[Effect]:
        if want.part is not Part.AVERAGE:
            session = self._session_of(want.round)
            return [] if session is None else self._of_session(session.answer_want(place, want, now))
        peer, charter = self._plan.roster[place], self._plan.charter
        if want.session == NO_SESSION:
            newest = max((round for round, past in self._past.items() if past.is_released), default=Round(-1))
            if newest < want.round or not self._spend(place, now, BURST / 8):
                return []
            return [Send(peer, Proof(charter, newest, self._past[newest].proof()))]
        past = self._past.get(want.round)
        if past is None or past.id != want.session or not self._spend(place, now, BURST / 4):
            return []
        if not past.is_released:
            return []
        values = past.released()
        message = Chunk(charter, want.round, want.session, Part.AVERAGE, 0, values.nbytes)
        return [SendBulk((peer,), message, values)]

    def _spend(self, place: int, now: Seconds, cost: float = 1.0) -> bool:
        return self._members.may_send(place, cost, now, RATE, BURST)

    def _session_of(self, round: Round) -> Session | None:
        return self._session if round == self._round else self._past.get(round)

    def _on_offer(self, place: int, message: Message, now: Seconds) -> list[Effect]:
        peer = self._plan.roster[place]
        if not isinstance(message, Chunk):
            return self._drop(peer, Malformed("announced a payload that no group sends", peer))
        # An average that is a change goes with its base, and has half the bytes of one.
        changes = self._masks is not None and self._masks.change_clip is not None
        most = (6 if changes else 4) * self._plan.parameters + HEADER_BYTES * MAX_GROUP
        if message.length > most:
            return self._drop(
                peer, TooLarge(f"announced {message.length} bytes; no payload has more than {most}", peer)
            )
        try:
            refusal = self._refusal(place, message)
        except RemoteError as error:
            return self._drop(peer, replace_peer(error, peer))
        if refusal is not None:
            return [RefuseBulk(refusal)]
        if self._session is not None and message.part is not Part.AVERAGE:
            self._session.accepted(place, message, now)
        return [AcceptBulk()]

    def _refusal(self, place: int, chunk: Chunk) -> str | None:
        if chunk.part is Part.AVERAGE:
            released = self._sync.get(place)
            if self._state is not State.SYNCING or released is None or released.session != chunk.session:
                return "an average that nobody asked for"
            if chunk.length != released.format.length:
                raise Malformed("offered an average of another length than the proof's")
            return None
        if chunk.round == self._round and self._session is not None and self._session.outcome is None:
            return self._session.wants_chunk(place, chunk)
        return f"of round {chunk.round}, this peer is in {self._round}"

    def _on_bulk(self, place: int, message: Message, payload: bytearray, now: Seconds) -> list[Effect]:
        if not isinstance(message, Chunk):
            raise OutOfTurn("a payload was received that was never accepted")
        self._members[place].heard_at = now
        if self._refusal(place, message) is not None:
            return []
        if message.part is not Part.AVERAGE and self._session is not None:
            return self._of_session(self._session.received(place, message, payload))
        released = self._sync[place]
        if released is None:
            return []
        data: Bytes = np.frombuffer(payload, np.uint8)
        return [Compute(f"sync/{place}", lambda: (released, released.open(data)), data.nbytes)]

    # Training

    def _begin_training(self, now: Seconds) -> list[Effect]:
        if self._training.base is not None:
            return []  # the steps of an earlier round are still being made; they will count in this one
        self._training.base = self._base
        self._training.began = now
        return [Train(self._round, self.model, self._plan.window, self._mixed)]

    def _on_trained(self, trained: Trained, now: Seconds) -> list[Effect]:
        if self._training.base is None:
            raise OutOfTurn("local steps that nobody asked for")
        vector, base, self._training.base = trained.vector, self._training.base, None
        if self._plan.window == math.inf:
            self._training.usual = now - self._training.began
        self._loss, self._steps = trained.loss, trained.steps
        session = self._session
        if session is None or session.is_trained or session.outcome is not None:
            self._update = vector - base
            return []
        self._update = self._sum = None
        if base is not self._base:  # the steps began in an earlier round
            moved = self._base - base
            moved[self._plan.parameters - self._plan.fixed :] = 0.0
            vector = vector + moved
        session.trained(vector, now, Metrics(trained.loss, trained.steps))
        return self._enter(State.AVERAGING) if self._state is State.TRAINING else []

    # Rounds

    def _begin_round(self, now: Seconds) -> list[Effect]:
        self._round = Round(max(self._round, self._above + 1))
        self._above = self._round - 1
        notes = self._note_budget()
        if self._plan.graph is not None and self._round >= self._plan.rounds:
            return [*notes, *self._rest()]
        self._round_began, self._loss, self._steps = now, None, 0
        self._hopeless_at = None
        self._behind_at = self._advert_at = None
        self._is_noted = False
        # After training only averages meet that were released before; and what a mask hid must not come out there.
        masks, terms = self._masks_of(self._round), self._plan.terms(self._round)
        session = Session(terms, self._keyring, self._patience, now, masks, self.weight, self._base)
        session.heard_at = self._heard_in_round_at
        self._session = session
        effects: list[Effect] = [*notes, *(self._ping(place) for place in self._members.linked())]
        if self._round < self._plan.rounds:
            effects += [*self._enter(State.TRAINING), *self._begin_training(now)]
            self._advert_at = max(now, now + min(self._plan.window, self._training.usual) - self._stage)
        else:
            effects += self._enter(State.SETTLING)
            if self._masks is not None:
                session.trained(self._base, now)
            elif self._training.base is None:
                session.trained(self.model, now)
        early, self._early = self._early, {}
        for place, statements in early.items():
            for statement in statements:
                if statement.content.round >= self._round:
                    effects += self._replay(place, statement, now)
        return effects

    def _note_budget(self) -> list[Effect]:
        """Tell, once, that training ends before the round that the charter says, since the privacy budget is spent."""
        plan = self._plan
        if self._is_over_told or self._round < plan.rounds or plan.agreed <= plan.rounds:
            return []
        self._is_over_told = True
        bears = f"bears {plan.rounds} rounds of the {plan.agreed} that training.rounds says"
        return [Emit(Note(f"the privacy budget {bears}: training ends here"))]

    def _rest(self) -> list[Effect]:
        """Be done with stars: from now on only answer those that lag."""
        self._session, self._early = None, {}
        return [*self._enter(State.SETTLING), CancelTimer("heartbeat")]

    def _masks_of(self, round: Round) -> MaskTerms | None:
        """Return how vectors are masked in a round: not after training; and what all first agree on is no change."""
        masks = self._masks if round < self._plan.rounds else None
        return replace(masks, change_clip=None) if masks is not None and round < self._plan.whole_rounds else masks

    def _heard_in_round_at(self, who: int) -> float:
        """Return when a member last gave a sign of life; never of one that is further on."""
        known = self._members[who]
        return -math.inf if known.claim > self._round else known.heard_at

    def _replay(self, place: int, statement: Statement, now: Seconds) -> list[Effect]:
        try:
            return self._on_statement(place, statement, now)
        except RemoteError as error:
            peer = self._plan.roster[place]
            return self._drop(peer, replace_peer(error, peer))

    def _of_session(self, effects: Sequence[Effect]) -> list[Effect]:
        """Give keys the round's number, so that an answer that comes late meets the session that asked."""
        marked: list[Effect] = []
        for effect in effects:
            if isinstance(effect, Compute | Persist):
                marked.append(replace(effect, key=f"{self._round}/{effect.key}"))
            else:
                marked.append(effect)
        return marked

    def _on_computed(self, key: str, result: object) -> list[Effect]:
        number, _, rest = key.partition("/")
        if number == "sync":
            return self._on_synced(rest, result)
        if int(number) != self._round or self._session is None or self._session.outcome is not None:
            return []
        return self._of_session(self._session.computed(rest, result))

    def _on_persisted(self, kept: Persisted, now: Seconds) -> list[Effect]:
        number, _, rest = kept.key.partition("/")
        if number == "checkpoint":
            if kept.base is not None:
                self._base = _read_only(kept.base)
            if kept.update is not None:
                self._update = _read_only(kept.update)
            if kept.results is not None and self._session is not None and self._session.is_released:
                self._session.keep_results(kept.results)
            self._kept = True
            return self._next_round(now) if self._may_go_on(now) else []
        if int(number) != self._round or self._session is None or self._session.outcome is not None:
            return []
        return self._of_session(self._session.persisted(rest))

    def _advance(self, now: Seconds) -> list[Effect]:
        """Do whatever can be done, whatever came in."""
        state = self._state
        if state in (State.LINKING, State.SYNCING):
            effects = self._start_if_linked(now) if state is State.LINKING else self._go_on_syncing(now)
            return effects if self._state is state else effects + self._advance(now)
        if self._state is State.LEAVING:
            return self._leave_if_alone(now)
        session = self._session
        if self._closing is not None and self._kept and self._may_go_on(now):
            effects = self._next_round(now)
            return effects + self._advance(now)
        if session is None or self._closing is not None:
            return []
        sight, is_new = self._look(session)
        session.may_skip, session.linked = sight.may_skip, sight.linked
        effects = []
        if self._sits_out(session, now) and session.is_trained:
            session.give_up()
        if not session.spent and (self._is_deserted(now) or self._is_group_short(session) or self._may_stop(session)):
            session.give_up()
        if self._advert_at is not None and now >= self._advert_at and session.training_ends is None:
            # A round's steps take now longer, now shorter: whoever waits for them gets a bound, not the mean.
            session.training_ends = self._round_began + min(self._plan.window, SLACK * self._training.usual)
        if len(session.terms.group) > 1 or self._plan.graph is None:
            effects += self._of_session(session.advance(now, sight.expected, sight.lagging))
        effects += self._note_waiting(session)
        if is_new:
            effects += self._note_standings()
        self._give_up_if_behind(session, sight, now)
        if session.outcome is not None:
            effects += self._close(session, now)
        return effects

    def _look(self, session: Session) -> tuple[_Sight, bool]:
        """Return how the members seem just now, and whether that is news: most of what comes in changes none of it."""
        of = (self._members.fingerprint(), self._round, session.terms.group)
        if self._sight is not None and self._sight[0] == of:
            return self._sight[1], False
        terms, members, further = session.terms, self._members, Round(self._round + 1)
        gone_on = members.claiming(terms.group, further)
        if self._round < self._plan.rounds:
            expected = members.expected(terms.group, self._round)
        else:  # the last average is everybody's: also whoever lags is waited for, as long as it is here
            expected = members.present(terms.group)
        if terms.centre in (None, terms.me):
            is_behind = gone_on > self._plan.colluders
        else:  # without the centre nothing more will happen
            is_behind = members.claiming((terms.centre,), further) > 0
        is_behind = is_behind or members.front(self._plan.colluders) >= self._round + 2
        linked = members.linked_in(terms.group, self._plan.me)
        here = members.claiming(terms.group, self._round) - gone_on
        is_together = self._plan.graph is None and here > 0 and gone_on <= self._plan.colluders
        sight = _Sight(linked, expected, self._lagging(expected), self._are_enough_here(), is_behind, is_together)
        self._sight = of, sight
        return sight, True

    def _lagging(self, expected: frozenset[int]) -> frozenset[int]:
        """Return who of these is in an earlier round together with its group, not behind it."""
        members, round, me = self._members, self._round, self._plan.me
        late = {who for who in expected if members[who].claim < round}
        if self._plan.graph is not None or not late or round == 0:
            return frozenset()
        return frozenset(
            who
            for group in self._plan.groups(Round(round - 1))
            if members.claiming(group, round) + (me in group) <= self._plan.colluders
            for who in late.intersection(group)
        )

    def _are_enough_here(self) -> bool:
        """Return whether so many others are in this round or beyond that this peer may pass it without a sum.

        In groups as many as a sum takes. An overlay may have fewer around a peer: there half of its neighbors do.
        """
        neighbors, enough = self._plan.neighbors, self._plan.least - 1
        if self._plan.graph is not None:
            enough = min(enough, (len(neighbors) + 1) // 2)
        return self._members.claiming(neighbors, self._round) >= enough

    def _is_group_short(self, session: Session) -> bool:
        return self._plan.graph is None and len(session.terms.group) < self._plan.least

    def _sits_out(self, session: Session, now: Seconds) -> bool:
        """Return whether this peer is in no star of this round, or in one that has not come about."""
        terms = session.terms
        if self._plan.graph is None or session.spent or session.is_member or session.outcome is not None:
            return False
        if terms.centre is None:
            return True
        if self._are_enough_for_sum(terms):
            self._hopeless_at = None
            return False
        self._hopeless_at = now + self._stage if self._hopeless_at is None else self._hopeless_at
        return now >= self._hopeless_at and self._are_enough_here()

    def _are_enough_for_sum(self, terms: Terms) -> bool:
        """Return whether those that are here and keep step are as many as a sum takes, or a star's centre is one."""
        here = self._members.expected(terms.group, self._round)
        return 1 + len(here) >= self._plan.least if terms.centre in (None, terms.me) else terms.centre in here

    def _may_go_on(self, now: Seconds) -> bool:
        """Return whether the next round may begin: on an overlay, once the neighbors that keep step are in this one.

        So nobody runs ahead of its neighbors, though not all take part in each round.
        """
        if self._plan.graph is None or self._stop_asked:
            return True
        if self._members.front(self._plan.colluders) >= self._round + 2:
            return True
        awaited = self._awaited()
        if awaited and now >= self._go_on_at:
            for place in awaited:
                self._members[place].note_round(self._round, took_part=False)
            awaited = self._awaited()
        summed = self._session is not None and self._session.is_released
        return not awaited and (summed or self._are_enough_here())

    def _awaited(self) -> list[int]:
        """Return the neighbors that keep step and have not entered this round yet."""
        expected = self._members.expected(self._plan.neighbors, self._round)
        return [place for place in sorted(expected) if self._members[place].claim < self._round]

    def _note_waiting(self, session: Session) -> list[Effect]:
        """Tell, once a round, an operator whose peer waits for others that it does."""
        if self._is_noted or not session.is_short:
            return []
        self._is_noted = True
        absent = [self._plan.names[who] for who in session.absent() if who != self._plan.me]
        waits = f"round {self._round} waits: a sum takes {self._plan.least} members, and of this group's"
        return [Emit(Note(f"{waits} {', '.join(absent)} did not take part so far"))]

    def _note_standings(self) -> list[Effect]:
        """Tell which members seem otherwise than before."""
        changed = self._members.changed(self._round)
        return [Emit(MemberChanged(self._plan.names[who], standing)) for who, standing in changed.items()]

    def _give_up_if_behind(self, session: Session, sight: _Sight, now: Seconds) -> None:
        """Leave a round that the others are through with; first give them time to tell how it ended."""
        if session.outcome is not None or (session.survivors is not None and session.is_member):
            return
        if not sight.is_behind:
            self._behind_at = None
            return
        if self._behind_at is None:
            session.pull()
        # A group that is here together may be getting over a death.
        until = now + (LONGEST_SUM if sight.is_together else 1) * self._stage
        self._behind_at = until if self._behind_at is None else min(self._behind_at, until)
        if now >= self._behind_at and not (session.spent and session.wakes_at is not None):
            session.give_up()

    def _close(self, session: Session, now: Seconds) -> list[Effect]:
        """Let the outcome take effect, and keep it, before anything follows from it."""
        outcome, average = session.outcome, session.average()
        base, mine = self._base, session.contribution
        is_idle, is_training = self._training.base is None, self._round < self._plan.rounds
        self._mixed = outcome is Outcome.FULL and is_idle and is_training
        if not is_idle:
            pass  # what the steps under way started from keeps its meaning: they end in an update
        elif session.spent and outcome is not Outcome.SKIP:
            self._update = session.residual()
        elif is_training and mine is not None:
            self._update = mine - base
        if average is not None:
            self._base, self._synced = _read_only(average), self._round
            if not is_training:
                self._update = None  # what is left of it is nobody else's: all end with one model
        elif outcome is Outcome.PARTIAL:
            self._base = _read_only(session.patch(base))
        for who in session.terms.group:
            if who != self._plan.me:
                took_part = session.took_part(who)
                self._members[who].note_round(self._round, took_part)
        self._patience = session.patience
        self._closing, self._kept = self._record(session, now), False
        self._go_on_at = now + self._plan.deadlines.round
        results = session.results()
        kept = Checkpoint(Round(self._round + 1), self._base, self._update, self._synced, results, self._mixed)
        return [Persist("checkpoint/", kept)]

    def _record(self, session: Session, now: Seconds) -> RoundEnded:
        names, me = self._plan.names, self._plan.me
        leader = session.leader()
        standing = self._members.standing(self._round)
        absent, totals = session.absent(), session.totals
        return RoundEnded(
            round=self._round,
            seconds=round(now - self._round_began, 6),
            heard=tuple(names[who] for who in session.survivors or () if who != me),
            absent={names[who]: f"{why}; {standing[who]}" for who, why in absent.items() if who != me},
            loss=self._loss,
            spread=0.0,
            settling=self._round >= self._plan.rounds,
            outcome=str(session.outcome),
            enrolled=tuple(names[who] for who in session.enrolled),
            attempt=session.attempt,
            leader="" if leader is None else names[leader],
            evidence="" if session.id == NO_SESSION else session.id.hex(),
            steps=self._steps,
            reason="" if len(session.terms.group) > 1 or self._plan.graph is None else "in no star this round",
            group_loss=None if totals is None else totals.loss,
            group_steps=None if totals is None else totals.steps,
            weight=0.0 if totals is None else totals.weight / WEIGHT_ONE,
            clipped=session.clipped,
            distance=session.distance,
            audit=session.audit,
        )

    def _refutations(self, session: Session) -> list[str]:
        """Tell whose results were refuted."""
        told = []
        for chunk, refuted, agreed in session.refutations:
            same = "; its deputy made the same, so one that signed products lied" if agreed else ""
            what = f"the sum of chunk {chunk} that {self._plan.names[refuted.signer]} signed was refuted"
            told.append(f"round {self._round}: {what}: {refuted.why}{same}")
        return told

    def _next_round(self, now: Seconds) -> list[Effect]:
        session, record = self._session, self._closing
        if session is None or record is None:
            raise OutOfTurn("a checkpoint that nobody asked for")
        ended = self._round
        session.retire()
        self._past[ended] = session
        kept = sorted(self._past)[-REMEMBERED:]
        newest = max((round for round, past in self._past.items() if past.is_released), default=ended)
        self._past = {round: past for round, past in self._past.items() if round in (*kept, newest)}
        self._session, self._closing = None, None
        notes: list[Effect] = [Emit(Note(text)) for text in self._refutations(session)]
        effects: list[Effect] = [*notes, Emit(record), Adopt(ended, self.model, self._mixed)]
        self._round = Round(ended + 1)
        if ended >= self._plan.rounds:
            self._end.tries += 1
            together = record.outcome in (Outcome.FULL, Outcome.LATE) and self._is_of_all(ended)
            self._end.common = session.release() if together else None
            over = self._stop_asked or self._end.tries >= self._plan.settle_rounds or self._is_deserted(now)
            if not together and not self._stop_asked and self._have_others_left():
                return effects + self._begin_sync(now, last=True)
            if together or over:
                return effects + self._leave(now)
        if self._stop_asked:
            return effects + self._leave(now)
        return effects + self._go_on(now)

    def _is_of_all(self, round: Round) -> bool:
        """Return whether all members are in one group of this round, after training."""
        return self._plan.graph is None and round >= self._plan.rounds and len(self._plan.roster) <= MAX_GROUP

    def _have_others_left(self) -> bool:
        left = sum(known.linked and known.left_after is not None for _, known in self._members.items())
        return left > self._plan.colluders

    def _is_deserted(self, now: Seconds) -> bool:
        """Return whether others have ended the run or are long gone, and too few are left to bring models together."""
        members = [known for _, known in self._members.items()]
        here = sum(known.linked and known.left_after is None for known in members)
        gone_at = self._gone_at
        over = any(known.left_after is not None for known in members) or (gone_at is not None and now >= gone_at)
        return self._round >= self._plan.rounds and over and 1 + here < self._plan.least

    @property
    def _gone_at(self) -> float | None:
        """When all others count as gone, if no link stands: links also fall for a moment."""
        return None if self._cut_off_at is None else self._cut_off_at + self._plan.deadlines.round

    # Falling behind, and catching up

    def _go_on(self, now: Seconds) -> list[Effect]:
        """Begin the next round here, or go where the others are."""
        front = Round(min(self._members.front(self._plan.colluders), self._last_round()))
        self._round = Round(max(self._round, self._above + 1))
        if front < self._round + 2:
            return self._begin_round(now)
        self._round = front
        return self._begin_sync(now, last=False)

    def _begin_sync(self, now: Seconds, *, last: bool) -> list[Effect]:
        """Ask those that are furthest for a released average; after it, go on or leave."""
        self._sync_is_last = last
        wait = self._stage + 4 * self._plan.parameters / LEAST_RATE
        self._sync, self._sync_again, self._sync_until = {}, now + wait, now + 2 * wait
        return [*self._enter(State.SYNCING), *self._ask_for_average()]

    def _ask_for_average(self) -> list[Effect]:
        """Ask those that are furthest; last those that have proved an average and did not send it."""
        order = {
            place: (self._sync.get(place) is not None, -known.claim, place)
            for place, known in self._members.items()
            if known.linked
        }
        asked = sorted(order, key=order.__getitem__)[: self._plan.colluders + 2]
        self._sync = dict.fromkeys(asked) | {place: each for place, each in self._sync.items() if each is not None}
        want = Want(self._plan.charter, self._newest_base(), NO_SESSION, Part.AVERAGE, 0)
        return [Send(self._plan.roster[place], want) for place in asked]

    def _go_on_syncing(self, now: Seconds) -> list[Effect]:
        if self._is_synced(now):
            return self._end_sync(now)
        if self._sync_again is None or now < self._sync_again:
            return []
        self._sync_again = None
        return self._ask_for_average()

    def _last_round(self) -> Round:
        if self._plan.graph is not None:
            return Round(self._plan.rounds)
        return Round(self._plan.rounds + max(0, self._plan.settle_rounds - 1))

    def _newest_base(self) -> Round:
        """Return the first round whose average would be newer than what this peer has.

        Or the same again after a restart at the end: the disk tells nothing of who else holds it.
        """
        is_unproven = self._end.common is None and self._is_of_all(self._synced)
        return Round(self._synced if is_unproven else self._synced + 1)

    def _on_proof(self, place: int, proof: Proof, now: Seconds) -> list[Effect]:
        """Check a proof; ask its sender for the average, unless another is asked for it, and still has time."""
        is_asked = self._state is State.SYNCING and place in self._sync
        is_last = self._is_of_all(proof.round)
        if is_last:
            self._end.shown[place] = None
        if not (is_asked or is_last) or not self._spend(place, now, BURST / 8):
            return []
        sessions, masks = self._plan.all_terms(proof.round), self._masks_of(proof.round)
        released = verified_release(sessions, self._keyring, proof.statements, masks)
        if is_last:
            self._end.shown[place] = released
        if not is_asked:
            return []
        others = [each.round for each in self._sync.values() if each is not None]
        newer = 0 if self._sync_again is None else 1
        if released.round < max([self._newest_base(), *(number + newer for number in others)]):
            return []
        self._sync[place] = released
        want = Want(self._plan.charter, released.round, released.session, Part.AVERAGE, 0)
        return [Send(self._plan.roster[place], want)]

    def _on_synced(self, key: str, result: object) -> list[Effect]:
        place = int(key)
        peer = self._plan.roster[place]
        match result:
            case Released() as released, np.ndarray() as average:
                return self._catch_up(released, average, self._plan.names[place])
        self._sync.pop(place, None)
        return self._drop(peer, Malformed("sent another average than it proved", peer))

    def _catch_up(self, released: Released, average: Vector, name: str) -> list[Effect]:
        if self._state is not State.SYNCING or released.round < self._newest_base():
            return []
        self._base, self._synced, self._mixed = _read_only(average), released.round, False
        self._end.common = released if self._is_of_all(released.round) else None
        return [Emit(Note(f"caught up with the average that round {released.round} released, from {name}"))]

    def _is_synced(self, now: Seconds) -> bool:
        proven = max((released.round for released in self._sync.values() if released is not None), default=-1)
        return now >= self._sync_until or 0 <= proven < self._newest_base()

    def _end_sync(self, now: Seconds) -> list[Effect]:
        """Begin where the others are by now; leave with what all end with."""
        self._sync = {}
        if self._end.common is not None:  # as at the end of that round
            self._round, self._update = Round(max(self._round, self._end.common.round + 1)), None
        if self._sync_is_last or self._end.common is not None:
            return [Adopt(Round(self._round - 1), self.model, self._mixed), *self._leave(now)]
        front = min(self._members.front(self._plan.colluders), self._last_round())
        self._round = Round(max(self._round, front))
        return [Adopt(Round(self._round - 1), self.model, self._mixed), *self._begin_round(now)]

    def _start_if_linked(self, now: Seconds) -> list[Effect]:
        linked = sum(self._members[place].linked for place in self._plan.neighbors)
        # More than c members that are under way, here or further on, say that the federation runs.
        running = self._members.front(self._plan.colluders) >= max(1, self._round)
        if linked < len(self._plan.neighbors) and not running:
            return []
        return [CancelTimer("start"), *self._go_on(now)]

    def _on_start_deadline(self, now: Seconds) -> list[Effect]:
        if self._members.linked() or len(self._plan.roster) == 1:
            return self._go_on(now)
        if any(known.claim > NO_ROUND for _, known in self._members.items()):
            # Somebody did answer: all links fell, for a moment perhaps.
            return [SetTimer("start", Seconds(now + self._plan.deadlines.heartbeat))]
        names = ", ".join(self._plan.names[place] for place in self._plan.neighbors)
        waited = f"no member answered within {self._plan.deadlines.start:g} s"
        return self._finish(RoundFailed(f"{waited}: {names}; check their addresses, and that they run"))

    # Leaving

    def _on_stop(self) -> list[Effect]:
        again, self._stop_asked = self._stop_asked, True
        if again or self._state in (State.STARTING, State.LINKING, State.SYNCING, State.LEAVING):
            return self._finish(None)
        return []

    def _may_stop(self, session: Session) -> bool:
        """Return whether a stop was asked for that need not wait for this round's end: nobody counts on this peer."""
        counts = session.took_part(self._plan.me) and self._are_enough_for_sum(session.terms)
        return self._stop_asked and not (counts and not session.is_short)

    def _leave(self, now: Seconds) -> list[Effect]:
        """Say goodbye, and stay until the others have what they may still ask for: their own goodbye says so."""
        byes = [effect for place in self._members.linked() for effect in self._goodbye(place)]
        return [*self._enter(State.LEAVING), *byes, SetTimer("leave", Seconds(now + self._linger))]

    def _goodbye(self, place: int) -> list[Effect]:
        """Say goodbye, and whether this peer holds an average that was released after training.

        Whoever is in its sum says so by the round that it names, a later one than those with training. Whoever took it
        over from others shows its proof before.
        """
        peer, charter, common = self._plan.roster[place], self._plan.charter, self._end.common
        last = self._round - 1 if self._synced >= self._plan.rounds else min(self._round, self._plan.rounds) - 1
        bye: list[Effect] = [Send(peer, Bye(charter, Round(max(0, last))))]
        if common is None or self._plan.me in common.survivors:
            return bye
        return [Send(peer, Proof(charter, common.round, common.proof)), *bye]

    @property
    def _linger(self) -> float:
        """Seconds that a peer with the last average stays for members that do not have it yet."""
        return 2 * self._plan.deadlines.round

    def _leave_if_alone(self, now: Seconds) -> list[Effect]:
        """Go once all have said goodbye; whoever was here a moment ago and is cut off may come back for the average."""
        members = [known for _, known in self._members.items()]
        awaited = (known.linked or now < known.heard_at + self._linger for known in members if known.left_after is None)
        return self._finish(None) if self._stop_asked or not any(awaited) else []

    def _finish(self, error: P2pflError | None) -> list[Effect]:
        outcome = "failed" if error is not None else "stopped" if self._stop_asked else "done"
        reason = "" if error is None else str(error)
        return [
            *self._enter(State.FAILED if error is not None else State.DONE),
            Emit(PeerFinished(outcome, self._round, self._end.is_shared(self._members.items()), reason)),
            Finish(error),
        ]

    # Time

    def _on_timer(self, key: str, now: Seconds) -> list[Effect]:
        match key:
            case "start" if self._state is State.LINKING:
                return self._on_start_deadline(now)
            case "heartbeat":
                return self._on_heartbeat(now)
            case "leave" if self._state is State.LEAVING:
                return self._finish(None)
            case "wake":
                self._wake = None
        return []

    def _on_heartbeat(self, now: Seconds) -> list[Effect]:
        # A timer that comes late says that this peer slept, not its neighbors: what they sent is still to be read.
        slept = now - self._heartbeat_due > self._plan.deadlines.heartbeat
        effects = self._set_heartbeat(now)
        for place in self._members.linked():
            known = self._members[place]
            if slept:
                known.heard_at = now
            silent = now - known.heard_at
            if silent > self._plan.deadlines.silence:
                effects.append(DropLink(self._plan.roster[place], f"no sign of life for {silent:.0f} s"))
            else:
                effects.append(self._ping(place))
        return effects

    def _set_heartbeat(self, now: Seconds) -> list[Effect]:
        self._heartbeat_due = Seconds(now + self._plan.deadlines.heartbeat)
        return [SetTimer("heartbeat", self._heartbeat_due)]

    def _set_wake(self, now: Seconds) -> list[Effect]:
        """Have this machine called when the next deadline of the round comes."""
        times = [self._sync_again or self._sync_until] if self._state is State.SYNCING else []
        if self._state is State.LEAVING:
            times = [known.heard_at + self._linger for _, known in self._members.items() if not known.linked]
            times = [at for at in times if at > now]
        if self._closing is not None and self._kept and now < self._go_on_at:
            times.append(self._go_on_at)
        if self._session is not None and self._closing is None:
            own = (self._session.wakes_at, self._behind_at, self._advert_at, self._gone_at, self._hopeless_at)
            times += [at for at in own if at is not None and now < at < float("inf")]
        wake = min(times, default=None)
        if wake == self._wake:
            return []
        self._wake = wake
        return [CancelTimer("wake")] if wake is None else [SetTimer("wake", Seconds(wake))]

    # Sending

    def _ping(self, place: int) -> Effect:
        return Send(self._plan.roster[place], Ping(self._plan.charter, self._round))

    def _tell(self, place: int, statement: Statement) -> Effect:
        return Send(self._plan.roster[place], Told(self._plan.charter, statement.content.round, statement))

    def _drop(self, peer: PeerId, error: RemoteError) -> list[Effect]:
        names: Mapping[PeerId, str] = dict(zip(self._plan.roster, self._plan.names, strict=True))
        return [Emit(Refused(names.get(peer, peer), error.reason)), Disconnect(peer, error)]

    def _enter(self, state: State) -> list[Effect]:
        if state is self._state:
            return []
        self._state = state
        return [Emit(StateChanged(state, self._round))]


def _read_only(vector: Vector) -> Vector:
    """Return the vector so that nothing can be written to it by mistake."""
    view = vector.view()
    view.flags.writeable = False
    return view


def replace_peer(error: RemoteError, peer: PeerId) -> RemoteError:
    """Return the error with who is to blame."""
    return error if error.peer is not None else type(error)(error.reason, peer)
