"""The fault matrix of masked averaging: whatever befalls one or two members of a group, at every stage of a round.

A case follows from its seed and the group's size: at which stages, just before, amid or after them, whom it hits by its
role in the round, and what happens to it. What must come of that is derived here from docs/rounds.md and from what was
heard on the wire before somebody was lost, never from what a machine holds; and sums are formed again, in integers,
from what the survivors contributed.

    python -m p2pfl.simulation.matrix --members 4 --seeds 1000    every case; `make matrix` runs both sizes
    p2pfl replay --seed 7 --matrix 4                              one of them, in words
"""

import argparse
import hashlib
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, product

import numpy as np

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round
from p2pfl.core.ledger import Uploading
from p2pfl.core.machine import Effect, Emit, Input, Persist, Received, Send, SendBulk, Vector
from p2pfl.core.statements import Content, Enrolment, Returned, Reveal, Statement, Vote
from p2pfl.core.trace import RoundEnded
from p2pfl.core.wire import Chunk, Part, Told
from p2pfl.crypto.ring import WEIGHT_ONE, Ring
from p2pfl.gossip.chunks import bounds
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.release import session_id
from p2pfl.simulation.faults import Crash, Delay, Fault, Freeze, Lie, Partition, Schedule
from p2pfl.simulation.hosts import Host, stream
from p2pfl.simulation.invariants import Check, InvariantViolated, Standing, Step
from p2pfl.simulation.replay import trace_lines
from p2pfl.simulation.simnet import Network
from p2pfl.simulation.soak import CLIP, Case, plans_of, standard_network, worker_pool

STAGES = (
    "Advert",
    "Enrolment",
    "Deal",
    "Ready",
    "Uploading",
    "Roots",
    "chunk",
    "Acknowledged",
    "Proposal",
    "Voted",
    "Vote",
    "Reveal",
    "Returned",
    "Result",
    "average",
    "Checkpoint",
)
"""What a peer makes in a round, in this order: kinds of statements, records, and the chunks of uploads and averages."""
RECORDS = frozenset({"Uploading", "Voted", "Checkpoint"})
BY_LEADERS = frozenset({"Enrolment", "Proposal"})
"""What only leaders make: others are hit when the first of these is made."""
MOMENTS = ("before", "amid", "after")
"""Before anything of the stage leaves; once the first of its messages has left; once all have."""
ROLES = ("anybody", "enroller", "proposer", "last", "deputy", "charge")
"""enroller, proposer: who leads first, before a session exists and in it. last: whose place in the session is last.
deputy: of the other victim's chunk. charge: whose deputy the other victim is."""
NEED_SESSION = frozenset({"proposer", "last", "deputy", "charge"})
FATES = {"killed": 5, "back": 3, "wiped": 1, "frozen": 2, "cut off": 3, "slow": 2}
"""How often each is drawn, in relation. killed: for good. back, wiped: started again, with its disk and without. cut
off: from everybody. slow: its messages come late. Guesses."""
LEAST_MEMBERS, MOST_MEMBERS = 4, 16
"""With fewer nobody can be spared; more take long."""
ROUNDS = 3
"""With local training; rounds that bring all to one model follow."""
PATIENCE = 400.0
"""Virtual seconds in which a case has to end."""
FEW_WAIT = 60.0
"""Virtual seconds after which those are left alone that are too few to go on."""
MOST_LATE = 0.4
"""Seconds by which a slow member's messages are late at most; with more, answers take longer than any stage waits."""
LIARS_OUTCOMES = {
    "fewer": {"full"},
    "more": {"full"},
    "forge": {"full"},
    "stale": {"full"},
    "replay": {"full"},
    "equivocate": {"full", "void"},
    "two sets": {"full", "void", "partial"},
    "withhold": {"full"},
    "wreck": {"full"},
    "falsify": {"full"},
    "hush": {"partial"},
}
"""How a round may end for honest members beside one that lies so from the beginning."""
TO_HALF = frozenset({"equivocate", "two sets"})
"""Lies that are told to half of the members."""
RESTART = 1.0
"""Seconds from a kill between two effects to the restart."""
LEVELS = ("Ready", "Acknowledged", "Vote", "Reveal")
"""Statements that tell how far a lost member got: whoever says the last of these is lost to no sum any more."""


@dataclass(frozen=True, slots=True)
class Strike:
    """What befalls somebody at a stage.

    Attributes:
        stage: of STAGES.
        moment: of MOMENTS.
        role: of ROLES; who it hits.
        member: which of those that are left, for the role anybody.
        fate: of FATES.
        delay: seconds from the moment to the fault.
        seconds: until it is back; or by which each of its messages is late.
        silent: whether nobody is told that connections are gone.
    """

    stage: str
    moment: str
    role: str
    member: int
    fate: str
    delay: float
    seconds: float
    silent: bool

    def fault(self, at: float, place: int) -> Fault:
        """Return the fault that befalls the member at `place`."""
        match self.fate:
            case "killed":
                return Crash(at, place, None, silent=self.silent)
            case "back" | "wiped":
                return Crash(at, place, self.seconds, keep_disk=self.fate == "back", silent=self.silent)
            case "frozen":
                return Freeze(at, at + self.seconds, place)
            case "cut off":
                return Partition(at, at + self.seconds, ((place,),), self.silent)
        return Delay(at, at + 10.0, self.seconds, place)


@dataclass(frozen=True, slots=True)
class Kill:
    """Somebody dies between two effects of its machine, and is started again from its disk.

    Attributes:
        place: who.
        effects: how many of a round it carries out; those that no other peer and no disk sees do not count.
        kept: whether what it was just writing is on the disk.
    """

    place: int
    effects: int
    kept: bool

    def __str__(self) -> str:
        return f"{self.place}/{self.effects}/{int(self.kept)}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A case of the matrix.

    Attributes:
        seed: of latencies and everything else left to chance.
        members: of the one group.
        round: in which the strikes come.
        strikes: at most one for each victim.
        kill: somebody dies after an effect, instead.
        lie: one member's, a key of `liars.LIES`; empty for none.
    """

    seed: int
    members: int
    round: int
    strikes: tuple[Strike, ...] = ()
    kill: Kill | None = None
    lie: str = ""

    def command(self) -> str:
        """Return the command that replays it."""
        kill = "" if self.kill is None else f" --kill {self.kill}"
        lie = f" --lie '{self.lie}'" if self.lie else ""
        return f"p2pfl replay --seed {self.seed} --matrix {self.members}{kill}{lie}"


_COMBINATIONS = [*((stage,) for stage in STAGES), *combinations_with_replacement(STAGES, 2)]


def draw_plan(seed: int, members: int) -> Plan:
    """Return the case of a seed: stages and pairs of stages in turn, the rest drawn."""
    draw = stream(seed, f"matrix/{members}")
    strikes: list[Strike] = []
    for stage in _COMBINATIONS[seed % len(_COMBINATIONS)]:
        early = stage in ("Advert", "Enrolment")  # there is no session yet, and so nobody has a role in it
        roles = [
            role
            for role in ROLES
            if not (early and role in NEED_SESSION) and not (not strikes and role in ("deputy", "charge"))
        ]
        fate = draw.choices(list(FATES), list(FATES.values()))[0]
        strikes.append(
            Strike(
                stage,
                draw.choice(MOMENTS),
                draw.choice(roles),
                draw.randrange(members),
                fate,
                draw.choice((0.0, 0.0, draw.expovariate(10.0))),
                draw.uniform(0.1, MOST_LATE) if fate == "slow" else draw.choice((0.3, 3.0, 15.0)),
                silent=draw.random() < 0.3,
            )
        )
    # In round 0 adverts are made while links are: who is lost before all have one to it keeps them from beginning.
    first = 1 if any(strike.stage == "Advert" for strike in strikes) else 0
    return Plan(seed, members, draw.choice((first, 1)), tuple(strikes))


# What is seen on the wire


@dataclass(frozen=True)
class Victim:
    """Who was hit, and when."""

    place: int
    strike: Strike
    at: float


@dataclass
class Witness:
    """What was said, heard and recorded; it knows no machine's memory.

    Attributes:
        heard: (session, signer, kind) -> receiver -> the time at which it first heard that.
        enrolments: by session.
        votes: session -> survivors -> who signed that.
        contributions: (session, place) -> float32 [parameters], what went into the upload.
        records: place -> each round's record, and the base after it.
    """

    case: Case
    heard: dict[tuple[bytes, int, str], dict[int, float]] = field(default_factory=dict)
    enrolments: dict[bytes, Enrolment] = field(default_factory=dict)
    votes: dict[bytes, dict[tuple[int, ...], set[int]]] = field(default_factory=dict)
    contributions: dict[tuple[bytes, int], Vector] = field(default_factory=dict)
    records: dict[int, list[tuple[RoundEnded, Vector]]] = field(default_factory=dict)

    def see(self, now: float, peer: Host, input: Input, effects: Sequence[Effect]) -> None:
        """Note a step."""
        if isinstance(input, Received) and isinstance(input.message, Told):
            statement = input.message.statement
            key = _session_of(statement.content), statement.signer, type(statement.content).__name__
            self.heard.setdefault(key, {}).setdefault(peer.place, now)
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, Told):
                if effect.message.statement.signer == peer.place:
                    self._said(effect.message.statement)
            elif isinstance(effect, Persist) and isinstance(effect.record, Uploading):
                vector = peer.contribution()
                if vector is not None:
                    self.contributions[effect.record.session, peer.place] = vector.copy()
            elif isinstance(effect, Emit) and isinstance(effect.event, RoundEnded) and peer.disk.checkpoint is not None:
                self.records.setdefault(peer.place, []).append((effect.event, peer.disk.checkpoint.base))

    def _said(self, statement: Statement) -> None:
        content = statement.content
        if isinstance(content, Enrolment):
            terms = _plans(self.case)[0].terms(content.round)
            self.enrolments.setdefault(session_id(terms, content), content)
        elif isinstance(content, Vote):
            self.votes.setdefault(content.session, {}).setdefault(content.survivors, set()).add(statement.signer)

    def certificate(self, session: bytes) -> tuple[int, ...] | None:
        """Return the survivors that enough members signed.

        Raises:
            InvariantViolated: there are two such sets.
        """
        members = self.enrolments[session].members if session in self.enrolments else ()
        sets = [
            survivors
            for survivors, signers in self.votes.get(session, {}).items()
            if members and len(signers & set(members)) >= votes_needed(len(members))
        ]
        if len(sets) > 1:
            raise InvariantViolated(f"two sets of survivors are certified in one session: {sets}")
        return sets[0] if sets else None

    def level(self, session: bytes, who: int, by: Iterable[int], until: float) -> int:
        """Return how far a member got in a session, as these have heard: so many of LEVELS."""
        others = set(by)
        for level in range(len(LEVELS), 0, -1):
            heard = self.heard.get((session, who, LEVELS[level - 1]), {})
            if any(at <= until for place, at in heard.items() if place in others):
                return level
        return 0


def _session_of(content: Content) -> bytes:
    return getattr(content, "session", b"")


def _plans(case: Case) -> tuple[GroupPlan, ...]:
    return plans_of(case)[0]


def votes_needed(members: int) -> int:
    """Return T of docs/rounds.md: three quarters of the members, rounded up."""
    return (3 * members + 3) // 4


class MatrixDirector:
    """Lets a plan's strikes befall whoever has their roles, and keeps what is seen; see `p2pfl.simulation.simnet`."""

    def __init__(self, plan: Plan, case: Case) -> None:
        self.plan, self.case = plan, case
        self.witness = Witness(case)
        self.victims: list[Victim] = []
        self.counted = 0
        """Effects of the plan's round that whoever is to be killed has made."""
        self._waiting = list(plan.strikes)

    def step(self, network: Network, peer: Host, input: Input, effects: Sequence[Effect]) -> list[tuple[int, Fault]]:
        """See `simnet.Director`."""
        self.witness.see(network.now, peer, input, effects)
        struck = self._kill(network.now, peer.place, effects)
        for strike in list(self._waiting):
            first, last = _stretch(strike.stage, peer.place, self.plan.round, effects)
            if last == 0:
                continue
            victim = self._victim(strike)
            if victim is None or (strike.stage not in BY_LEADERS and victim != peer.place):
                continue
            self._waiting.remove(strike)
            at = network.now + strike.delay
            self.victims.append(Victim(victim, strike, at))
            index = {"before": first, "amid": first + 1, "after": last}[strike.moment]
            struck.append((index, strike.fault(at, victim)))
        return sorted(struck, key=lambda each: each[0])

    def _kill(self, now: float, place: int, effects: Sequence[Effect]) -> list[tuple[int, Fault]]:
        kill = self.plan.kill
        if kill is None or place != kill.place or self.victims:
            return []
        for index, effect in enumerate(effects):
            stage = stage_of(effect, place)
            if stage is None or stage[1] != self.plan.round:
                continue
            self.counted += 1
            if self.counted == kill.effects:
                strike = Strike(stage[0], "after", "anybody", 0, "back", 0.0, RESTART, silent=False)
                self.victims.append(Victim(place, strike, now))
                return [(index + 1, Crash(now, place, RESTART, kept=int(kill.kept)))]
        return []

    def _victim(self, strike: Strike) -> int | None:
        """Return whom a strike hits; None as long as nobody has the role."""
        hit = [victim.place for victim in self.victims]
        round = Round(self.plan.round)
        sessions = [
            (session, each)
            for session, each in self.witness.enrolments.items()
            if each.round == round and each.attempt == 0
        ]
        left = [place for place in range(self.plan.members) if place not in hit]
        if strike.role == "anybody":
            return left[strike.member % len(left)]
        charter = _plans(self.case)[0].charter
        if strike.role == "enroller":
            return min(left, key=lambda place: _rank(charter, round, 0, place))
        if not sessions:
            return None
        session, members = sessions[0][0], sessions[0][1].members
        present = [place for place in members if place not in hit] or left
        if strike.role == "proposer":
            return min(present, key=lambda place: _rank(charter, round, session, place))
        if strike.role == "last" or not hit or hit[0] not in members:
            return present[-1]
        step = 1 if strike.role == "deputy" else -1
        return members[(members.index(hit[0]) + step) % len(members)]


def _rank(charter: bytes, round: Round, context: bytes | int, place: int) -> bytes:
    """Return a member's place in the order of leaders: by round and attempt, or by session."""
    return hashlib.sha256(canonical([charter, round, context, place])).digest()


def _stretch(stage: str, place: int, round: int, effects: Sequence[Effect]) -> tuple[int, int]:
    """Return the index of the first effect of the stage among these, and the first after its last; 0, 0 for none."""
    indices = [index for index, effect in enumerate(effects) if stage_of(effect, place) == (stage, round)]
    return (indices[0], indices[-1] + 1) if indices else (0, 0)


def stage_of(effect: Effect, place: int) -> tuple[str, int] | None:
    """Return at which stage of which round a peer makes an effect; None for none."""
    if isinstance(effect, Persist):
        record = effect.record
        ended = type(record).__name__ == "Checkpoint"
        return type(record).__name__, record.round - ended
    if isinstance(effect, SendBulk) and isinstance(effect.message, Chunk):
        return {Part.UPLOAD: "chunk", Part.RESULT: "average"}.get(effect.message.part, ""), effect.message.round
    if isinstance(effect, Send) and isinstance(effect.message, Told):
        statement = effect.message.statement
        if statement.signer == place:
            return type(statement.content).__name__, statement.content.round
    return None


# What must come of it


def possible_outcomes(
    members: Sequence[int], survivors: Sequence[int], least: int, group: int, levels: Mapping[int, int]
) -> set[str]:
    """Return how a round may end for those that nothing befell; the walks of docs/rounds.md.

    Args:
        members: of the session that began.
        survivors: those certified in it; empty for none.
        least: members that a sum takes.
        group: how many members there are.
        levels: of each that was lost for good, how far it got, in LEVELS.

    Returns:
        names of outcomes; "waits" where the rest is too few to go on.
    """
    absent = [who for who, level in levels.items() if level == 0]
    if group - len(absent) < least:
        return {"waits", "skip"}
    began = group - len(absent)
    needed = votes_needed(began)
    voted = began - sum(0 < level < LEVELS.index("Vote") + 1 for level in levels.values())
    if voted < needed:
        return {"void"}
    lost = {who for who, level in levels.items() if level > 0}
    silent = {who for who in lost if levels[who] < len(LEVELS) and who in survivors}
    if silent and began - len(lost) < max(2, needed):
        # Too few shares for the masks, and so for any chunk. But whoever revealed may have given back its own, too, and
        # have sent what it made of the others', before it was lost.
        may_have_given = sum(level == len(LEVELS) for level in levels.values())
        return {"void", "partial", "full"} if began - len(lost) + may_have_given >= max(2, needed) else {"void"}
    for chunk in range(len(members)):
        if chunk_may_be_lost(members, survivors, chunk, lost):
            return {"full", "partial"}
    return {"full"}


def chunk_may_be_lost(members: Sequence[int], survivors: Sequence[int], chunk: int, lost: set[int]) -> bool:
    """Return whether the members that were lost may have held the only copies of what a chunk's sum takes.

    The aggregator has everybody's; its deputy has the aggregator's own, and asks the others again.
    """
    aggregator, deputy = members[chunk], members[(chunk + 1) % len(members)]
    return aggregator in lost and (deputy in lost or any(who in lost for who in survivors if who != aggregator))


def integer_average(contributions: Sequence[Vector], members: int) -> Vector:
    """Return the average that the ring's words of these vectors give, float32 [parameters].

    Each is rounded to words (Bonawitz et al., CCS 2017; p2pfl.crypto.ring); their sum is formed in int64 and divided.
    """
    ring = Ring(32, members, CLIP)
    total = np.zeros(len(contributions[0]), np.int64)
    for vector in contributions:
        words = np.empty(len(vector), np.float32)
        ring.round_into(vector, WEIGHT_ONE, words)
        total += words.astype(np.int64)
    return (total * (ring.step / len(contributions))).astype(np.float32)


class RevealedOnce(Check):
    """Nobody says two things that unmask in one session: one reveal, and of each member one share.

    Over all lives of a peer whose disk survives; and nothing before enough members signed the survivors.
    """

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._said: dict[tuple[int, bytes, type], Content] = {}

    def step(self, step: Step) -> None:
        """See `Check`."""
        for effect in step.effects:
            if not isinstance(effect, Send) or not isinstance(effect.message, Told):
                continue
            statement = effect.message.statement
            content = statement.content
            if statement.signer != step.peer.place or not isinstance(content, Reveal | Returned):
                continue
            key = statement.signer, content.session, type(content)
            if self._said.setdefault(key, content) != content:
                raise InvariantViolated(f"{step.peer.name} unmasks twice in a session of round {content.round}")
            survivors = self._witness.certificate(content.session)
            if survivors is None:
                raise InvariantViolated(f"{step.peer.name} unmasks in round {content.round} before a certificate")
            members = self._witness.enrolments[content.session].members
            dropped = len(members) - len(survivors)
            if isinstance(content, Reveal) and (
                bool(content.seed) != (statement.signer in survivors) or len(content.pairs) not in (0, dropped)
            ):
                raise InvariantViolated(f"{step.peer.name} reveals both kinds, or of another sum, in {content.round}")

    def disk_lost(self, peer: Standing) -> None:
        """See `Check`."""
        self._said = {key: content for key, content in self._said.items() if key[0] != peer.place}


@dataclass(frozen=True)
class Judge:
    """Compares what came of a case with what must."""

    network: Network
    plan: Plan
    case: Case
    witness: Witness
    victims: list[Victim]

    @property
    def spared(self) -> list[int]:
        """Those that nothing befell, and that do not lie."""
        hit = {victim.place for victim in self.victims} | self.network.faults.liars
        return [place for place in range(self.plan.members) if place not in hit]

    @property
    def least(self) -> int:
        """How many members a sum takes."""
        return _plans(self.case)[0].least

    def run(self) -> None:
        """Run the network, and check everything.

        Raises:
            InvariantViolated: something is not as it must be.
        """
        killed = sum(strike.fate == "killed" for strike in self.plan.strikes)
        self.network.run(FEW_WAIT if self.plan.members - killed < self.least else PATIENCE)
        self.verify()

    def verify(self) -> None:
        """Check everything.

        Raises:
            InvariantViolated: something is not as it must be.
        """
        for session in self.witness.votes:
            self.witness.certificate(session)
        for place in range(self.plan.members):
            if place not in self.network.faults.liars:
                for record, base in self.witness.records.get(place, []):
                    self._verify_average(place, record, base)
        for place in self.spared:
            self._verify_outcomes(place)
        self._verify_end()

    def _name(self, place: int) -> str:
        return self.network.peers[place].name

    def _places(self, names: Iterable[str]) -> list[int]:
        places = {peer.name: peer.place for peer in self.network.peers}
        return sorted(places[name] for name in names)

    def _verify_average(self, place: int, record: RoundEnded, base: Vector) -> None:
        """Check that what a peer took over is the survivors' sum, to the last bit, and that nobody is left unnamed."""
        if record.outcome not in ("full", "partial", "late"):
            return
        session = bytes.fromhex(record.evidence)
        survivors = self.witness.certificate(session)
        who = f"{self._name(place)} in round {record.round}"
        if survivors is None:
            raise InvariantViolated(f"{who}: {record.outcome} without a certificate")
        if self._places(record.heard) != [each for each in survivors if each != place]:
            raise InvariantViolated(f"{who}: the record names other survivors than were certified")
        unnamed = set(range(self.plan.members)) - {place} - set(survivors) - set(self._places(record.absent))
        if unnamed:
            raise InvariantViolated(f"{who}: nothing is said of {sorted(unnamed)}")
        if record.round >= ROUNDS:
            return  # of averages that were released before; `AveragesComputed` is for them
        members = self.witness.enrolments[session].members
        right = integer_average([self.witness.contributions[session, each] for each in survivors], len(members))
        lost = {victim.place for victim in self.victims} | self.network.faults.liars
        beyond = (
            place in lost
            or self.plan.lie in TO_HALF
            or len(members) - len(lost & set(members)) < votes_needed(len(members))
        )
        for chunk in range(len(members)):
            part = slice(*bounds(len(base), len(members), chunk))
            if base[part].tobytes() == right[part].tobytes():
                continue
            # A dead aggregator's deputy may be too late, and nobody replaces a result that is signed and wrong.
            if record.outcome != "partial" or not (beyond or members[chunk] in lost):
                raise InvariantViolated(f"{who}: chunk {chunk} is not the survivors' sum")

    def _verify_outcomes(self, place: int) -> None:
        records = {record.round: record for record, _ in self.witness.records.get(place, [])}
        for round in range(self.plan.round):
            if round not in records or records[round].outcome != "full":
                raise InvariantViolated(f"{self._name(place)}: round {round} is not full, and nothing was wrong yet")
        record = records.get(self.plan.round)
        outcome = "waits" if record is None else record.outcome
        session = b"" if record is None else bytes.fromhex(record.evidence)
        expected = self.expected(session) | self.weak()
        if outcome not in expected:
            raise InvariantViolated(
                f"{self._name(place)}: round {self.plan.round} is {outcome}, and not {' or '.join(sorted(expected))}"
            )
        if record is not None and outcome in ("full", "partial"):
            self._verify_named(place, record, session)

    def _ends(self) -> Iterator[RoundEnded]:
        """Yield the records of the round of the strikes, of those that were spared."""
        for place in self.spared:
            yield from (record for record, _ in self.witness.records.get(place, []) if record.round == self.plan.round)

    def is_weak(self) -> bool:
        """Return whether the round ended as it should not, and is excused; see `weak`."""
        return any(record.outcome not in self.expected(bytes.fromhex(record.evidence)) for record in self._ends())

    def outcome(self) -> str:
        """Return how the round of the strikes ended for those that were spared."""
        return " and ".join(sorted({record.outcome for record in self._ends()})) or "waits"

    def expected(self, session: bytes) -> set[str]:
        """Return how the round of the strikes may end for those that were spared, in this session."""
        if self.plan.lie:
            return set(LIARS_OUTCOMES[self.plan.lie])
        enrolment = self.witness.enrolments.get(session)
        members = enrolment.members if enrolment is not None else ()
        survivors = self.witness.certificate(session) or ()
        places = [victim.place for victim in self.victims]
        outcomes: set[str] = set()
        for levels in product(*(self._levels(session, victim) for victim in self.victims)):
            lost = {who: level for who, level in zip(places, levels, strict=True) if level is not None}
            outcomes |= possible_outcomes(members, survivors, self.least, self.plan.members, lost)
        return outcomes

    def weak(self) -> set[str]:
        """Return how else a session may end by what is weak in today's protocol.

        Where the members enroll anew, one that is late with that misses the session.
        """
        return {"skip", "late"} if self._was_retried() else set()

    def _was_retried(self) -> bool:
        """Return whether the members of the round of the strikes enrolled anew."""
        return any(each.round == self.plan.round and each.attempt for each in self.witness.enrolments.values())

    def _levels(self, session: bytes, victim: Victim) -> list[int | None]:
        """Return how far a victim may have got for the others' purposes; None where it may not be lost to them."""
        everybody = range(self.plan.members)
        least = self.witness.level(session, victim.place, self.spared, victim.at)
        if victim.strike.fate != "killed":
            return [*range(least, len(LEVELS) + 1), None]
        most = self.witness.level(session, victim.place, everybody, math.inf)
        return list(range(least, most + 1))

    def _verify_named(self, place: int, record: RoundEnded, session: bytes) -> None:
        """Check that whoever is not in the sum is named with the stage at which it was lost."""
        for victim in self.victims:
            reason = record.absent.get(self._name(victim.place))
            if reason is None or victim.strike.fate != "killed":
                continue
            stage = "upload" if self.witness.level(session, victim.place, self.spared, math.inf) else "enroll"
            if not reason.startswith(stage):
                raise InvariantViolated(f"{self._name(place)}: {reason}, though it was lost in {stage}")
        strangers = set(self._places(record.absent)) & set(self.spared)
        if strangers and self.plan.lie not in TO_HALF and not self._was_retried():
            raise InvariantViolated(f"{self._name(place)}: {sorted(strangers)} absent, whom nothing befell")

    def _verify_end(self) -> None:
        """Check that whoever is left goes on together and ends with one model."""
        peers = self.network.peers
        waiting = [peer for peer in peers if not (peer.gone or peer.finished or peer.lying)]
        if len(waiting) >= self.least:
            raise InvariantViolated(f"{len(waiting)} wait, though {self.least} are enough")
        for peer in peers:
            if peer.error is not None and not peer.lying:
                raise InvariantViolated(f"{peer.name} failed: {peer.error}")
        if len(self.spared) < self.least:
            return
        may_drift = self.plan.lie in TO_HALF or self.is_weak()
        for place in self.spared:
            after = [record for record, _ in self.witness.records[place] if record.round > self.plan.round]
            if not any(record.outcome == "full" for record in after) and not may_drift:
                raise InvariantViolated(f"{peers[place].name}: no round after {self.plan.round} is full")
            if not peers[place].finished:
                raise InvariantViolated(f"{peers[place].name} has not finished, with enough others")
        if len({peers[place].adopted[-1][1].tobytes() for place in self.spared}) > 1:
            raise InvariantViolated("those that nothing befell end with different models")


# Running


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    Attributes:
        reason: what went wrong in one line; empty for nothing.
        outcome: of the round of the strikes, for those that were spared.
        hit: how many were.
        weak: whether that is excused by a weakness; see `Judge.weak`.
    """

    plan: Plan
    reason: str
    outcome: str
    hit: int
    weak: bool

    def __str__(self) -> str:
        return f"{self.reason}: {self.plan.command()}"


def matrix_network(plan: Plan, *, strict: bool | None = None, log: bool = False) -> tuple[Network, Judge]:
    """Return a case's network, and who is to judge what came of it once it has run."""
    lies = Schedule()
    if plan.lie:
        draw = stream(plan.seed, "liar")
        liar, *others = draw.sample(range(plan.members), plan.members)
        against = tuple(sorted(others[: plan.members // 2])) if plan.lie in TO_HALF else ()
        lies = Schedule((Lie(0.0, liar, plan.lie, against),))
    case = Case(plan.seed, "none", lies, peers=plan.members, group=plan.members, rounds=ROUNDS, masked=True)
    director = MatrixDirector(plan, case)
    checks = [RevealedOnce(director.witness)]
    network = standard_network(case, strict=strict, log=log, director=director, checks=checks)
    return network, Judge(network, plan, case, director.witness, director.victims)


def plan_of(seed: int, members: int, kill: str = "", lie: str = "") -> Plan:
    """Return the case that `Plan.command` names.

    Raises:
        InvalidConfig: there is none such.
    """
    if not LEAST_MEMBERS <= members <= MOST_MEMBERS:
        raise InvalidConfig(f"the matrix has groups of {LEAST_MEMBERS} to {MOST_MEMBERS} members, not {members}")
    if lie:
        if lie not in LIARS_OUTCOMES:
            raise InvalidConfig(f"no member of the matrix lies so: {lie}; there are {', '.join(LIARS_OUTCOMES)}")
        return Plan(seed, members, 0, lie=lie)
    if kill:
        try:
            place, effects, kept = map(int, kill.split("/"))
        except ValueError as error:
            raise InvalidConfig(f"a kill is place/effects/0 or 1, not {kill}") from error
        return Plan(seed, members, 0, kill=Kill(place, effects, bool(kept)))
    return draw_plan(seed, members)


def run_plan(plan: Plan) -> Verdict:
    """Run a case, and judge it."""
    _, judge = matrix_network(plan)
    reason = ""
    try:
        judge.run()
    except InvariantViolated as violated:
        reason = violated.reason
    outcome = judge.outcome()
    weak = not reason and judge.is_weak()
    return Verdict(plan, reason, outcome, len(judge.victims), weak)


def run_matrix(plan: Plan) -> tuple[list[str], str]:
    """Run a case; return its trace's lines, for `p2pfl.simulation.replay.tell`, and what went wrong."""
    network, judge = matrix_network(plan, log=True)
    reason = ""
    try:
        judge.run()
    except InvariantViolated as violated:
        reason = violated.reason
    return list(trace_lines(network)), reason


def run_all(plans: Sequence[Plan], processes: int | None = None) -> list[Verdict]:
    """Run cases on all cores."""
    with worker_pool(processes) as pool:
        return list(pool.map(run_plan, plans, chunksize=8))


def kills(seed: int, members: int, place: int) -> list[Plan]:
    """Return a case for each effect of a member's first round, and two for each record that it writes."""
    network, _ = matrix_network(Plan(seed, members, 0), log=True)
    network.run(PATIENCE)
    stages = [
        stage
        for _, *entry in network.log or ()
        if len(entry) == 3 and entry[0] == place and not isinstance(entry[1], int)
        for effect in entry[2]
        if (stage := stage_of(effect, place)) is not None and stage[1] == 0
    ]
    return [
        Plan(seed, members, 0, kill=Kill(place, number, kept))
        for number, (stage, _) in enumerate(stages, 1)
        for kept in ((False, True) if stage in RECORDS else (False,))
    ]


def table(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """Yield how many cases of each stage, or pair of stages, ended how; lines of a table."""
    for hit in sorted({verdict.hit for verdict in verdicts}):
        counted = Counter(verdict.outcome for verdict in verdicts if verdict.hit == hit)
        yield f"{hit} hit: {', '.join(f'{count} {outcome}' for outcome, count in counted.most_common())}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix from the command line; see the Makefile."""
    parser = argparse.ArgumentParser(description="Run the fault matrix of masked averaging.")
    parser.add_argument("--members", type=int, default=4, help="of the one group")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args(arguments)
    plans = [draw_plan(seed, options.members) for seed in range(options.first, options.first + options.seeds)]
    began = time.monotonic()
    verdicts = run_all(plans)
    failures = [verdict for verdict in verdicts if verdict.reason]
    weak = sum(verdict.weak for verdict in verdicts)
    lines = [
        *table(verdicts),
        f"{len(verdicts)} cases of {options.members} members in {time.monotonic() - began:.0f} s: "
        f"{len(failures)} wrong, {weak} excused by a weakness",
        *map(str, failures),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
