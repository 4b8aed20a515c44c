"""One round of one group: from adverts to a released average, without a coordinator, masked or in the clear.

    enroll    each member adverts; a leader proposes who begins; under masks each deals shares of its secrets; when all
              say that they are ready, it begins
    upload    each sends chunk i of its vector to the i-th member, and its own chunk to that one's deputy, the next;
              and signs what that was
    agree     each aggregator acknowledges whose chunks it holds; a leader proposes who is in the sum; votes certify it
    reduce    under masks all reveal what takes the masks off this sum and no other; each aggregator averages its chunk
              over the survivors, signs the result and sends it to all
    check     under masks all show by random products that the results are the sums (`p2pfl.gossip.audit`)

What a peer does next follows from what it holds: signed statements, chunks, and deadlines. `advance` looks at all of
that and does whatever can be done; so the order in which things arrive does not matter, and whatever is repeated does
no harm. What got lost is pulled: now and then a peer tells the others what it holds, and they send what is missing,
whoever signed it. A leader or an aggregator can waste time, never learn or forge.

Owns the stages of one round. Must not know training, models or other rounds: that is `p2pfl.gossip.group_machine`.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np

from p2pfl.core.canonical import Value, canonical
from p2pfl.core.errors import Malformed, RemoteError, TooLarge
from p2pfl.core.ledger import SESSION_BYTES, Uploading, Voted
from p2pfl.core.machine import Bytes, Compute, Effect, Payload, Persist, Send, SendBulk, Vector
from p2pfl.core.privacy import Noise
from p2pfl.core.statements import (
    DIGEST_BYTES,
    KINDS,
    MAX_ATTEMPTS,
    Acknowledged,
    Advert,
    Content,
    Deal,
    Enrolment,
    Proposal,
    Ready,
    Result,
    Returned,
    Reveal,
    Roots,
    Statement,
    Vote,
    decode_statement,
    encode_body,
)
from p2pfl.core.wire import Chunk, Have, Part, Told, Want
from p2pfl.crypto.masks import Mask, MaskedVector
from p2pfl.crypto.ring import WEIGHT_ONE, Layout, Metrics, Totals
from p2pfl.gossip.audit import (
    CHALLENGES,
    Audit,
    Own,
    Refuted,
    Verdict,
    Vouched,
    challenge_key,
    is_bound,
    multiply,
    verdict_of,
)
from p2pfl.gossip.chunks import Format, bounds, cut, digest, pair, reduce, sane_digest
from p2pfl.gossip.grouping import threshold
from p2pfl.gossip.patience import Patience
from p2pfl.gossip.release import Keyring, Released, Terms, certified, session_id
from p2pfl.gossip.secure_sum import MaskTerms, Secrets, masked_chunk, sum_chunk
from p2pfl.gossip.statement_store import Statements, said_as
from p2pfl.gossip.survivors import is_summable, largest, shared
from p2pfl.gossip.traffic import LEAST_RATE, Traffic, Transfer, usual_seconds

NO_SESSION = bytes(SESSION_BYTES)
LEAST_WORK = 2.0**22
"""Words a second that a member masks, cuts or sums at least; a guess, a hundredth of what one core does."""
REPEATS = 4
"""How often a peer asks for what it lacks before it takes somebody for gone; a guess: where every second message is
lost, one in sixteen stays so."""
LONGEST_SUM = 4
"""Stages that a group may take longer than the patience, if one of its members dies in the middle; where stages are a
second and the patience five, three were measured."""
ANSWER_PAUSE = 0.05
"""Seconds in which a member gets one answer to the same request; a guess: below any timer of an honest one."""


class Outcome(StrEnum):
    """How a round ended for this peer.

    FULL: its update is in the average that it adopted. PARTIAL: a chunk of that average is lost. LATE: it adopted the
    others' average, and its update is not in it. SKIP: nothing was averaged, and nothing of it left this peer. VOID:
    its update left, and whether its sum was released is unknown.
    """

    FULL = "full"
    PARTIAL = "partial"
    LATE = "late"
    SKIP = "skip"
    VOID = "void"


@dataclass
class _Work:
    """Where this peer stands in the round."""

    attempt: int = 0
    session: bytes = NO_SESSION
    members: tuple[int, ...] = ()
    base: bytes = b""
    """The digest of the base that changes are averaged from; empty where whole models are."""
    awaited: frozenset[int] = frozenset()
    """Whose advert is waited for when the patience is over: who was late into this round, with its group."""
    enrolled: bool = False
    """Whether this peer is one of the session's members and said that it is ready; else it watches."""
    began: bool = False
    uploading: bool = False
    uploaded: bool = False
    hidden: MaskedVector | None = field(default=None, repr=False)
    """The own vector under its masks, until all of it is masked; where sums are checked, until they are."""
    roots: dict[int, bytes] = field(default_factory=dict)
    """Of the own chunks, as far as they are cut."""
    voting: tuple[int, ...] | None = None
    secrets: Secrets | None = field(default=None, repr=False)
    masks: tuple[Mask, ...] | None = field(default=None, repr=False)
    """What is left in the survivors' sum, once enough was revealed; nothing without masks."""
    told_of: tuple[int, int] = (0, 0)
    returned: bool = False
    deputizes: bool = False
    acknowledged: bool = False
    """Whether this peer has said whose chunks it holds; a leaf of a star, which holds none, once it has uploaded."""
    reducing: set[int] = field(default_factory=set)
    again: dict[int, set[int]] = field(default_factory=dict)
    """The own chunks that are being masked once more, and who wants each; nobody where only this peer does."""


@dataclass
class _Known:
    """What was computed before: places in the order of leaders, sessions' ids, and what follows from the members."""

    orders: dict[tuple[bytes | int, int], bytes] = field(default_factory=dict)
    ids: dict[Enrolment, bytes] = field(default_factory=dict)
    format: tuple[tuple[tuple[int, ...], bytes], Format] | None = None
    """Of which members and base, and how their chunks are written."""
    mine: tuple[tuple[tuple[int, ...], bool], list[tuple[int, int]]] | None = None
    """Of which members, and whether as a deputy, the uploads that this peer is to hold."""


class Session:
    """One round of this peer's group; see the module.

    The methods return effects; `outcome` is set once the round is over. `patience` is measured on, and handed to the
    next round's session.
    """

    def __init__(
        self,
        terms: Terms,
        keyring: Keyring,
        patience: Patience,
        now: float,
        masks: MaskTerms | None = None,
        weight: int = WEIGHT_ONE,
        base: Vector | None = None,
    ) -> None:
        self.terms = terms
        self._masks = masks
        self._weight = weight
        self._base = None if masks is None or masks.change_clip is None else base
        """What this peer would average the change from; None where whole models are averaged in any case."""
        # What all know who see this peer's average, or can find out: so noise need not hide it.
        self._public_base = None if self._noise is None else base
        self._base_digest: bytes | None = b"" if self._base is None else None
        """None until it is computed."""
        self._is_digesting = self._is_change = False
        """Whether that is being computed; and whether the own vector is the change from the base."""
        self.patience = patience
        self.outcome: Outcome | None = None
        self.survivors: tuple[int, ...] | None = None
        self.training_ends: float | None = None
        """When this peer expects to have trained, once that is near enough to advert it."""
        self.may_skip = False
        """Whether others go on without this group's sum, so that this peer may too."""
        self.linked = frozenset(terms.group)
        """Members of the group that a link stands to, and this peer."""
        self.heard_at: Callable[[int], float] = dict.fromkeys(terms.group, math.inf).__getitem__
        """When a member last gave a sign of life in this round; minus infinity if it is in a later one."""
        self.clipped = 0
        """How many of the own values were beyond the clip."""
        self._keyring = keyring
        self._statements = Statements()
        self._now = now
        self._at: dict[str, float] = {"late": now + terms.patience}
        self._work = _Work()
        self._vector: Vector | None = None
        self._metrics = Metrics()
        self._chunks: dict[int, Payload] = {}
        """The own ones as they were sent, until their results are here; those that can be masked again only where this
        peer is to sum them."""
        self._uploads: dict[tuple[int, int], tuple[Any, bytes]] = {}
        """By chunk and uploader: uint8 under masks, else float32; and the digest."""
        self._results: dict[int, Payload] = {}
        """Those that are signed, right, checked, and decoded."""
        self._decoded: dict[int, tuple[Totals, float]] = {}
        """What the results' headers say, and the squared distances of the own contribution to them."""
        self._unsigned: dict[int, tuple[Payload, bytes]] = {}
        self._decoding: set[int] = set()
        self._place: Vector | None = None
        """Where the average is written."""
        self._hashing: set[tuple[Part, int, int]] = set()
        self._traffic = Traffic(now)
        self._ready_at: float | None = None
        self._suspects: set[int] = set()
        self._check, self._known = Audit(), _Known()
        self._seen: tuple[object, ...] | None = None
        """What `advance` last looked at beside its own memory; None if that has changed since."""

    @property
    def _noise(self) -> Noise | None:
        return None if self._masks is None else self._masks.noise

    # What others may ask about

    @property
    def id(self) -> bytes:
        """The session this peer takes part in or watches; zeros for none."""
        return self._work.session

    @property
    def is_member(self) -> bool:
        """Whether this peer is one of the session's members, and does not only watch it."""
        return self._work.enrolled

    @property
    def attempt(self) -> int:
        """How many enrolments were given up."""
        return self._work.attempt

    @property
    def enrolled(self) -> tuple[int, ...]:
        """The session's members."""
        return self._work.members

    @property
    def spent(self) -> bool:
        """Whether this peer's update may have left it."""
        return self._work.uploading

    @property
    def wakes_at(self) -> float | None:
        """When `advance` is to be called, if nothing comes before."""
        waiting = [at for at in self._at.values() if at > self._now]
        return min(waiting, default=None)

    @property
    def is_short(self) -> bool:
        """Whether too few members took part for a sum, though the group's patience is over."""
        waited = self._is_closed or self._is_due("alone")
        return not self._work.members and waited and not self._bears_adverts()

    @property
    def held(self) -> int:
        """How many statements and chunks are in memory."""
        return len(self._statements) + len(self._uploads) + len(self._results) + len(self._check.results)

    @property
    def is_released(self) -> bool:
        """Whether all chunks of the average are here."""
        return self.survivors is not None and len(self._results) == self._format.chunks

    @property
    def audit(self) -> str:
        """How the check of the results ended: see `Audit.summary`; empty where there is none."""
        is_over = self._is_audited and self.survivors is not None
        return self._check.summary(self._format.chunks) if is_over else ""

    @property
    def refutations(self) -> tuple[tuple[int, Refuted, bool], ...]:
        """Each chunk whose result was refuted, and whether its deputy made the same."""
        verdicts = self._check.verdicts
        refuted = sorted(self._check.refuted.items())
        return tuple((chunk, each, verdicts.get(chunk) is Verdict.AGREED) for chunk, each in refuted)

    def average(self) -> Vector | None:
        """Return the released average, float32 [parameters], once all its chunks are here."""
        return self._place if self.is_released else None

    @property
    def changed_from(self) -> Vector | None:
        """The base that what this peer averages is the change from; None if it is a whole model."""
        return self._base if self._is_change else None

    def residual(self) -> Vector | None:
        """Return what of a spent change did not fit into the words that were summed, float32 [parameters].

        None if nothing is left: of whole models, of a change that is not in the sum, of parts whose average is lost.
        With noise too: what the bound keeps out is to stay out, and noise that is taken back later would hide nothing.
        """
        own, survivors = self._vector, self.survivors or ()
        is_kept = self._is_change and self._noise is None and self._work.uploaded and self.terms.me in survivors
        if own is None or not is_kept:
            return None
        if self.is_released:
            return own
        kept: Vector = np.zeros_like(own)  # not in place: another part may be decoded meanwhile
        for chunk in self._results:
            part = slice(*bounds(self.terms.parameters, self._format.chunks, chunk))
            kept[part] = own[part]
        return kept

    def patch(self, base: Vector) -> Vector:
        """Return `base` with those chunks of the average in it that are here."""
        patched, average = base.copy(), self._take_place()
        for chunk in self._results:
            part = slice(*bounds(self.terms.parameters, self._format.chunks, chunk))
            patched[part] = average[part]
        return patched

    @property
    def totals(self) -> Totals | None:
        """What the sum says of all survivors together, as the first result that is here has it."""
        return self._decoded[min(self._decoded)][0] if self._decoded else None

    @property
    def distance(self) -> float | None:
        """The root mean square, over the parameters, of the own contribution less the average; None without both.

        None also for one that has a whole model where the others averaged changes, and where noise is on it.
        """
        is_known = self._vector is not None and self._noise is None
        if not self.is_released or not is_known or self._is_change != bool(self._work.base):
            return None
        return float(np.sqrt(sum(squared for _, squared in self._decoded.values()) / self.terms.parameters))

    def proof(self) -> tuple[Statement, ...]:
        """Return the statements that show the average to be released, no more than it takes: see `verified_release`."""
        session = self._work.session
        enrolments = self._statements.signed(Enrolment, self._work.attempt).values()
        named = [each for each in enrolments if session_id(self.terms, said_as(Enrolment, each)) == session]
        members, votes = self._work.members, self._statements.signed(Vote, session)
        voted = [
            votes[who] for who in members if who in votes and said_as(Vote, votes[who]).survivors == self.survivors
        ]
        return (*named[:1], *voted[: threshold(len(members))], *self._statements.signed(Result, session).values())

    def release(self) -> Released | None:
        """Return what the statements say of the average, once all its chunks are here."""
        if self.survivors is None or not self.is_released:
            return None
        work, digests = self._work, tuple(map(self._digest, range(self._format.chunks)))
        return Released(
            self.terms.round, work.session, work.members, self.survivors, digests, self._format, self.proof()
        )

    def leader(self) -> int | None:
        """Return whose proposal was certified."""
        for who, proposal in sorted(self._statements.of(Proposal, self._work.session).items(), key=self._order):
            if proposal.survivors == self.survivors:
                return who
        return None

    def absent(self) -> dict[int, str]:
        """Return the members of the group that are not in the sum, with the stage each was lost at."""
        work, session = self._work, self._work.session
        kept = self.survivors if self.survivors is not None else ()
        reasons = {}
        for who in self.terms.group:
            if who in kept:
                continue
            if who not in self._statements.signed(Advert, work.attempt):
                reasons[who] = "enroll: no advert"
            elif work.members and who not in work.members:
                reasons[who] = "enroll: not proposed"
            elif not work.members or who not in self._statements.signed(Ready, session):
                reasons[who] = "enroll: not ready"
            elif who not in self._statements.signed(Roots, session):
                reasons[who] = "upload: nothing came"
            else:
                reasons[who] = "upload: not acknowledged by all"
        return reasons

    # What happens

    @property
    def is_trained(self) -> bool:
        """Whether this peer's vector of the round is here."""
        return self._vector is not None

    @property
    def contribution(self) -> Vector | None:
        """The own vector of the round.

        Once its upload has begun, parts of it become those of the average; or, where changes are averaged, it becomes
        the change from the base, and then what of that did not fit into the words.
        """
        return self._vector

    def trained(self, vector: Vector, now: float, metrics: Metrics = Metrics()) -> None:  # noqa: B008 - frozen
        """Take this peer's vector of the round, float32 [parameters], and what its local steps came to.

        A vector that is not read-only is the session's own from now on: once it is spent, the average is written into
        its place.
        """
        self._vector, self._metrics, self.training_ends, self._seen = vector, metrics, now, None

    def computed(self, key: str, result: object) -> list[Effect]:
        """Take the answer to a `Compute`."""
        self._seen = None
        what, *numbers = key.split("/")
        if what == "base" and isinstance(result, bytes):
            self._base_digest = result
        if what == "hide" and isinstance(result, MaskedVector) and self._work.began:
            self._work.hidden, self.clipped = result, result.clipped
            self._vector = result.values.view(np.float32)
            return [self._spend()]
        if what == "cut" and isinstance(result, tuple) and self._work.began:
            return self._send_chunk(int(numbers[0]), *result)
        if what == "upload" and isinstance(result, tuple):
            chunk, uploader = map(int, numbers)
            vector, found = result
            self._hashing.discard((Part.UPLOAD, chunk, uploader))
            if found is None:
                self._suspects.add(uploader)
            elif (chunk, uploader) not in self._uploads:
                self._uploads[chunk, uploader] = (vector, found)
        if what == "result" and isinstance(result, tuple):
            chunk = int(numbers[0])
            vector, found = result
            self._hashing.discard((Part.RESULT, chunk, 0))
            if found is not None:
                self._unsigned[chunk] = (vector, found)
        if what == "reduce" and isinstance(result, tuple):
            return self._release(int(numbers[0]), *result)
        if what == "multiply" and isinstance(result, tuple):
            self._multiplied(int(numbers[0]), int(numbers[1]), result)
        if what == "again" and isinstance(result, tuple):
            return self._masked_again(int(numbers[0]), *result)
        if what == "decode":
            self._decoded_result(int(numbers[0]), result)
        return []

    def persisted(self, key: str) -> list[Effect]:
        """Take the word that a record is safe: now what it says may happen."""
        self._seen = None
        if key == "uploading" and self._work.began:  # else this peer has gone over to watching another session
            return self._cut_next()
        if key == "voted" and self._work.voting is not None:
            return self._state(Vote(self.terms.round, self._work.session, self._work.voting))
        return []

    def told(self, statement: Statement, now: float) -> bool:
        """Take a statement of this round; return whether it is new.

        Raises:
            BadSignature: it is not its signer's.
            Malformed: it contradicts another of the same signer, or cannot be of this round.
        """
        content, signer = statement.content, statement.signer
        if signer not in self.terms.group:
            raise Malformed(f"passed on a statement of member {signer}, who is not in this round's group")
        if isinstance(content, Result) and self._is_rival(content, signer):
            self._keyring.verify(signer, statement.body, statement.signature)
            self._check.rivals[content.chunk], self._seen = statement, None
            return False
        if (
            isinstance(content, Result)
            and content.session == self._work.session
            and self._check.proves(content, signer)
        ):
            self._keyring.verify(signer, statement.body, statement.signature)
            refuted = self._check.refuted[content.chunk]
            self._check.refuted[content.chunk] = replace(refuted, rival=signer)
            return False
        if self._statements.contradicts(statement):
            if signer in self._suspects:
                return False
            self._keyring.verify(signer, statement.body, statement.signature)
            self._suspects.add(signer)
            return False
        if isinstance(content, Enrolment) and not set(content.members) <= set(self.terms.group):
            raise Malformed("proposed members who are not in this round's group")
        if isinstance(content, Enrolment) and content.base and self._base is None:
            raise Malformed("proposed to average changes, where whole models are averaged")
        # What would not be kept is not worth a signature's check.
        if not self._statements_allow(statement) or not self._statements.takes(statement):
            return False
        self._keyring.verify(signer, statement.body, statement.signature)
        added = self._statements.add(statement)
        if added:
            self._seen = None
        if added and isinstance(content, Ready) and self._ready_at is not None:
            self.patience = self.patience.after(now - self._ready_at)
        return added

    def _statements_allow(self, statement: Statement) -> bool:
        content = statement.content
        if isinstance(content, Result):
            # Anybody may sign anything; only the aggregator's word counts, and its deputy's when that is overdue.
            if content.session != self._work.session or not content.chunk < len(self._aggregators):
                return False
            if (content.chunk, statement.signer) in self._check.rejected or self._check.is_lost(content.chunk):
                return False
            aggregator, deputy = self._holders(content.chunk)
            if statement.signer == deputy != aggregator and self._work.enrolled:
                overdue = self._now >= self._at.get("deputy", 0.0) - self._stage
                return overdue or aggregator not in self.linked
            return statement.signer in (aggregator, deputy)
        return True

    def wants_chunk(self, sender: int, chunk: Chunk) -> str | None:
        """Return why an offered chunk is refused; None to take it.

        Raises:
            TooLarge: it is longer than such a chunk can be.
            Malformed: it is of another length, or none that this sender may send.
        """
        work = self._work
        if chunk.session != work.session or not work.members:
            return "not of this peer's session"
        if chunk.chunk >= self._format.chunks:
            raise Malformed(f"offered chunk {chunk.chunk} of {self._format.chunks}")
        size = self._format.size(chunk.chunk)
        if chunk.length != size:
            kind = TooLarge if chunk.length > size else Malformed
            raise kind(f"offered a chunk of {chunk.length} bytes, it has {size}")
        if chunk.part is Part.RESULT:
            on_the_way = (Part.RESULT, chunk.chunk, 0) in self._hashing or chunk.chunk in self._decoding
            if on_the_way or self._has_result(chunk.chunk):
                return "here already"
            # Its signature comes another way, and may come later.
            signed = chunk.chunk in self._statements.signed(Result, work.session)
            return None if signed or sender in self._holders(chunk.chunk) else "its result is not signed yet"
        if sender not in work.members:
            raise Malformed("uploaded to a session that it is no member of")
        if not work.enrolled:
            return "this peer only watches the session"
        if self._is_summed(chunk.chunk):
            return "summed already"
        if (chunk.chunk, sender) in self._uploads or (Part.UPLOAD, chunk.chunk, sender) in self._hashing:
            return "here already"
        if work.acknowledged and not self._is_missing(chunk.chunk, sender):
            return "this peer's acknowledgement is signed already"
        return None if self._is_mine(chunk.chunk, sender) else "for another aggregator"

    @property
    def _format(self) -> Format:
        of, known = (self._work.members, self._work.base), self._known
        if known.format is None or known.format[0] != of:
            known.format = of, self.terms.format(self._work.members, self._masks, self._work.base)
        return known.format[1]

    @property
    def _lacks_base(self) -> bool:
        """Whether the others average changes from a base that this peer does not have; then it cannot read them."""
        return self._work.base not in (b"", self._base_digest)

    def accepted(self, sender: int, chunk: Chunk, now: float) -> None:
        """Note that a chunk that was wanted is coming in."""
        until = now + self.patience.seconds + chunk.length / LEAST_RATE
        self._traffic.coming[sender] = Transfer(chunk.part, chunk.chunk, until)
        self._traffic.is_fed, self._seen = True, None

    def link_down(self, who: int) -> None:
        """Forget what was under way from and to a member."""
        traffic = self._traffic
        traffic.coming.pop(who, None)
        traffic.answered = {request: at for request, at in traffic.answered.items() if request[0] != who}

    def received(self, sender: int, chunk: Chunk, payload: bytearray) -> list[Effect]:
        """Take a chunk that was wanted."""
        self._traffic.coming.pop(sender, None)
        self._traffic.is_fed, self._seen = True, None
        if self.wants_chunk(sender, chunk) is not None:
            return []  # something changed on its way
        data, masked, least = self._format.read(payload), self._masks is not None, self.terms.least_weight
        if chunk.part is Part.RESULT:
            self._hashing.add((Part.RESULT, chunk.chunk, 0))
            return [Compute(f"result/{chunk.chunk}", lambda: (data, digest(data)), data.nbytes)]
        self._hashing.add((Part.UPLOAD, chunk.chunk, sender))

        def work() -> tuple[Payload, bytes | None]:
            return data, digest(data) if masked else sane_digest(np.asarray(data, np.float32), least)

        return [Compute(f"upload/{chunk.chunk}/{sender}", work, data.nbytes)]

    def answer_have(self, sender: int, have: Have, now: float) -> list[Effect]:
        """Send a member of the group what it lacks of this round's statements."""
        if sender not in self.terms.group or not self._may_answer((sender, "have"), now):
            return []
        attempt, session = self._work.attempt, self._work.session
        effects: list[Effect] = []
        for kind, mask in zip(KINDS, have.held, strict=True):
            per_attempt = kind in (Advert, Enrolment)
            same = have.attempt == attempt if per_attempt else have.session == session
            for who, statement in self._statements.signed(kind, attempt if per_attempt else session).items():
                bit = who if kind is Result else self.terms.group.index(who)
                if not (same and mask >> bit & 1):
                    effects.append(self._tell(sender, statement))
        return effects

    def answer_want(self, sender: int, want: Want, now: float) -> list[Effect]:
        """Send a chunk again to a member of the group that may have it, unless it may still be on its way."""
        work, chunk = self._work, want.chunk
        if want.session != work.session or chunk >= len(self._aggregators) or sender not in self.terms.group:
            return []
        payload: Payload | None
        if want.part is Part.RESULT and self._has_result(chunk):
            payload = self._results[chunk] if chunk in self._results else self._check.results[chunk]
        elif want.part is Part.UPLOAD and chunk in work.roots and sender in self._holders(chunk):
            if chunk not in self._chunks and not self._can_mask_again(chunk):
                return []
            payload = self._chunks.get(chunk)
        else:
            return []
        pause = self.patience.least / 2 + usual_seconds(self._format.size(chunk))
        if not self._may_answer((sender, want.part, chunk), now, pause):
            return []
        return self._mask_again(chunk, sender) if payload is None else self._bulk(sender, want.part, chunk, payload)

    def _may_answer(self, request: tuple[object, ...], now: float, pause: float = ANSWER_PAUSE) -> bool:
        if now < self._traffic.answered.get(request, -1.0) + pause:
            return False
        self._traffic.answered[request] = now
        return True

    # What follows

    def advance(self, now: float, expected: frozenset[int], lagging: frozenset[int] = frozenset()) -> list[Effect]:
        """Do whatever can be done now.

        Args:
            now: the time.
            expected: members of the group that are linked and keep step.
            lagging: who of these is in an earlier round, together with its group.
        """
        due, self._now = self.wakes_at, now
        self._note_transfers()
        seen = (expected, lagging, self.linked, self.may_skip, self.training_ends)
        if self.outcome is not None or (seen == self._seen and (due is None or now < due)):
            return []
        work = self._work
        effects = [*self._digest_base(), *self._advertise()]
        for stage in (
            partial(self._enroll, expected, lagging),
            self._watch,
            self._get_ready,
            self._upload,
            self._acknowledge,
            self._propose,
            self._vote,
            self._reduce,
            self._audit,
            self._repeat,
        ):
            effects += stage()
        self.outcome = self._conclusion()
        self._seen = seen
        if self._work is not work:  # another attempt, or another session: what is held may do for its first steps
            self._seen = None
            effects += self.advance(now, expected, lagging)
        return effects

    @property
    def _stage(self) -> float:
        """Seconds that a stage takes at most: what was lost is asked for again some times in it."""
        return REPEATS * self.patience.seconds

    @property
    def _longest_stage(self) -> float:
        """Seconds that no member waits longer in a stage, whatever it has measured."""
        return REPEATS * self.patience.most

    @property
    def _transfer(self) -> float:
        """Seconds in which a whole vector comes or goes at the least rate."""
        return 8 * self.terms.parameters / LEAST_RATE

    @property
    def _working(self) -> float:
        """Seconds in which the slowest member has masked and cut its vector, or summed its chunk."""
        return len(self._work.members) * self.terms.parameters / LEAST_WORK

    def _note_transfers(self) -> None:
        traffic = self._traffic
        traffic.answered.update(dict.fromkeys(traffic.sent, self._now))
        traffic.sent.clear()
        traffic.coming = {who: each for who, each in traffic.coming.items() if self._now < each.until}
        if traffic.coming or traffic.is_fed:
            traffic.quiet_at, traffic.is_fed = self._now, False

    def _allow(self, name: str, seconds: float, transfer: float) -> None:
        """Set how long to wait for what comes in: beside what is under way, and at most.

        Args:
            name: of the deadline.
            seconds: within which it begins to come in.
            transfer: that it may take at the least rate.
        """
        self._set(name, seconds + self._working)
        self._set(f"{name} at most", seconds + self._working + transfer)

    def _is_over(self, name: str) -> bool:
        """Return whether a deadline that `_allow` set is over; none passes while something is coming in."""
        is_quiet = self._now >= self._traffic.quiet_at + self._stage
        return (self._is_due(name) and is_quiet) or self._is_due(f"{name} at most")

    def _lasts(self, name: str, holds: bool, seconds: float) -> bool:
        """Return whether something has held so long without a break, as far as this peer saw."""
        if not holds:
            self._at.pop(name, None)
            return False
        self._set(name, seconds)
        return self._is_due(name)

    def _is_here(self, who: int) -> bool:
        """Return whether a member has given a sign of life just now: each asks for what it lacks, now and then."""
        lately = REPEATS * self.patience.unmeasured
        return who == self.terms.me or (who in self.linked and self._now <= self.heard_at(who) + lately)

    @property
    def _reached(self) -> frozenset[int]:
        """The members of the group that statements come from: in a star through the centre."""
        return frozenset(self.terms.group) if self.terms.centre in self.linked else self.linked

    def _is_due(self, name: str) -> bool:
        return self._now >= self._at.get(name, float("inf"))

    def _set(self, name: str, seconds: float) -> None:
        """Set a deadline, once."""
        self._at.setdefault(name, self._now + seconds)

    def _order(self, who: int | tuple[int, object]) -> bytes:
        """Return the place in the order of leaders: before a session exists by round and attempt, then by session."""
        place = who[0] if isinstance(who, tuple) else who
        if place == self.terms.centre:
            return b""  # before all others: what they say, it passes on
        work = self._work
        context = work.session if work.members else work.attempt
        if (context, place) not in self._known.orders:
            values: list[Value] = [self.terms.charter, self.terms.round, context, place]
            self._known.orders[context, place] = hashlib.sha256(canonical(values)).digest()
        return self._known.orders[context, place]

    # Enroll

    def _digest_base(self) -> list[Effect]:
        base = self._base
        if base is None or self._is_digesting:
            return []
        self._is_digesting = True
        return [Compute("base", lambda: digest(base), base.nbytes)]

    def _advertise(self) -> list[Effect]:
        work, base = self._work, self._base_digest
        if self.training_ends is None or base is None or self.terms.me in self._statements.signed(Advert, work.attempt):
            return []
        seconds = min(max(0.0, self.training_ends - self._now), self.terms.patience)
        keys = b""
        if self._masks is not None:
            context = canonical([self.terms.charter, self.terms.round, work.attempt])
            work.secrets = Secrets(self._masks, self.terms.roster, self.terms.me, self.terms.round, context)
            keys = work.secrets.advert()
        effects = self._state(Advert(self.terms.round, work.attempt, float(seconds), keys, base))
        self._set("repeat", self.patience.seconds)
        patience = self.terms.patience
        alone = max(2 * patience, patience + LONGEST_SUM * self._stage)
        self._set("alone", alone if work.attempt == 0 else 4 * self._stage)
        return effects

    def _bears_adverts(self) -> bool:
        return self.terms.bears(self._statements.signed(Advert, self._work.attempt))

    def _enroll(self, expected: frozenset[int], lagging: frozenset[int]) -> list[Effect]:
        work = self._work
        if work.attempt == 0:
            # Whoever was not late into this round is waited for as long as its steps take, and not longer.
            work.awaited = work.awaited & expected if self._is_due("late") else lagging
        if work.members or self._is_ahead_in_attempts():
            return []
        adverts = self._statements.signed(Advert, work.attempt)
        if self.terms.me not in adverts or len(adverts) <= self.terms.colluders:
            return []
        if work.attempt == 0:
            self._set("close", self.terms.patience)
            self._set("close at most", self.terms.patience + LONGEST_SUM * self._stage)
        else:
            self._set("close", 2 * self._stage)
        # A star's centre knows best whom to wait for.
        complete = expected <= set(adverts) and self.terms.centre in (None, self.terms.me)
        if not (complete or self._is_closed) or not self._bears_adverts():
            return []
        rank = sorted(adverts, key=self._order).index(self.terms.me)
        self._set("lead", rank * self._stage)
        self._set("enrolled", (len(adverts) + 1) * self._stage)
        if self._is_due("enrolled"):
            return self._try_again()
        proposed = self._statements.of(Enrolment, work.attempt).values()
        if not self._is_due("lead") or any(map(self._is_trusted, proposed)):
            return []
        members = tuple(sorted(set(adverts) - self._suspects))
        if not self.terms.bears(members):
            return []
        named = tuple(adverts[member].digest() for member in members)
        return self._state(Enrolment(self.terms.round, work.attempt, members, named, self._common_base(members)))

    @property
    def _is_closed(self) -> bool:
        """Whether the patience for adverts is over: longer for those whose last round may have lost somebody."""
        awaited = self._work.awaited.difference(self._statements.signed(Advert, 0))
        return self._is_due("close") and (not awaited or self._is_due("close at most"))

    def _common_base(self, members: Sequence[int]) -> bytes:
        """Return the base that the adverts of all these members name; empty if they name several, or none."""
        adverts = self._statements.of(Advert, self._work.attempt)
        named = {adverts[member].base for member in members}
        return named.pop() if len(named) == 1 else b""

    def _is_trusted(self, enrolment: Enrolment) -> bool:
        """Return whether none of the proposed members did something wrong; one that leads would propose itself."""
        return self._suspects.isdisjoint(enrolment.members)

    def _is_ahead_in_attempts(self) -> bool:
        """Go to the attempt that more than the colluders are in; return whether this changed anything."""
        for attempt in range(MAX_ATTEMPTS - 1, self._work.attempt, -1):
            if len(self._statements.signed(Advert, attempt)) > self.terms.colluders:
                self._go_to(attempt)
                return True
        return False

    def _go_to(self, attempt: int) -> None:
        self._work = _Work(attempt=attempt)
        self._at = {name: at for name, at in self._at.items() if name == "skip"}
        self._ready_at = None

    def _try_again(self) -> list[Effect]:
        """Give up this attempt to enroll; nothing of any vector has left."""
        self.patience = self.patience.in_vain()
        if self._work.attempt + 1 == MAX_ATTEMPTS:
            self._at["failed"] = self._now
            return []
        self._go_to(self._work.attempt + 1)
        return self._advertise()

    def _get_ready(self) -> list[Effect]:
        work = self._work
        if work.members:
            return self._await_ready() if work.enrolled and not work.began else []
        adverts = self._statements.signed(Advert, work.attempt)
        if self.terms.me not in adverts:
            return []
        for leader, enrolment in sorted(self._statements.of(Enrolment, work.attempt).items(), key=self._order):
            known = len(enrolment.members) == len(enrolment.adverts) and all(
                member in adverts and adverts[member].digest() == named
                for member, named in zip(enrolment.members, enrolment.adverts, strict=True)
            )
            if known and enrolment.base != self._common_base(enrolment.members):
                self._suspects.add(leader)
                continue
            mine = self.terms.me in enrolment.members and self._is_trusted(enrolment)
            if known and mine and self.terms.bears(enrolment.members):
                return self._begin(enrolment)
        return []

    def _begin(self, enrolment: Enrolment) -> list[Effect]:
        """Take part in the session of an enrolment."""
        work, session = self._work, self._id_of(enrolment)
        effects: list[Effect] = []
        if self._masks is not None:
            adverts = self._statements.of(Advert, work.attempt)
            keys = {member: adverts[member].keys for member in enrolment.members}
            if work.secrets is None:
                return []
            try:
                deal = work.secrets.begin(session, enrolment.members, keys)
            except RemoteError as error:
                self._suspect(error)
                return []
            work.secrets.took(deal)
            effects += self._state(deal)
        work.session, work.members, work.base = session, enrolment.members, enrolment.base
        work.enrolled, self._ready_at = True, self._now
        self._set("ready", 3 * self._stage)
        self._set("ready at most", (3 if self._masks is None else 5) * self._stage)
        return [*effects, *self._await_ready()]

    def _suspect(self, error: RemoteError) -> None:
        if error.peer in self.terms.roster:
            self._suspects.add(self.terms.roster.index(error.peer))

    def _take_deals(self) -> bytes | None:
        """Check the deals that came; return the digest over all of them once they are here, zeros without masks."""
        work = self._work
        if work.secrets is None:
            return bytes(32) if self._masks is None else None
        deals = self._statements.signed(Deal, work.session)
        for dealer in work.members:
            if dealer in deals and dealer not in work.secrets.accepted and dealer not in self._suspects:
                try:
                    work.secrets.accept(dealer, said_as(Deal, deals[dealer]))
                except RemoteError as error:
                    self._suspect(error)
        if not work.secrets.accepted >= set(work.members):
            return None
        return hashlib.sha256(b"".join(deals[dealer].digest() for dealer in work.members)).digest()

    def _id_of(self, enrolment: Enrolment) -> bytes:
        if enrolment not in self._known.ids:
            self._known.ids[enrolment] = session_id(self.terms, enrolment)
        return self._known.ids[enrolment]

    def _await_ready(self) -> list[Effect]:
        work = self._work
        began = bool(self._statements.signed(Roots, work.session))
        said = self._statements.of(Ready, work.session)
        deals = said[self.terms.me].deals if self.terms.me in said else self._take_deals()
        if deals is not None and self.terms.me not in said:
            effects = self._state(Ready(self.terms.round, work.session, deals))
            return [*effects, *self._await_ready()]
        if all(member in said and said[member].deals == deals for member in work.members):
            work.began = True
            adverts = self._statements.of(Advert, work.attempt)
            training = max(min(adverts[member].seconds, self.terms.patience) for member in work.members)
            self._allow("collect", training + 2 * self._stage, self._transfer)
            return []
        # Whoever has uploaded has seen everybody's word; it will show it to us.
        if not began and self._is_ahead_in_attempts():
            return []
        # What the dead said others pass on. Waiting on for it would take longer than those that are through with their
        # round wait for the living members in the next.
        silent = set(work.members) - set(said) - {self.terms.me}
        gone = any(who not in self._reached or self.heard_at(who) == -math.inf for who in silent)
        is_gone = self._lasts("silent gone", gone, self._stage)
        is_over = self._is_due("ready at most") or (self._is_due("ready") and is_gone)
        if is_over and (not began or self._is_due("began")):
            return self._try_again()
        if began:
            self._set("began", 3 * self._stage)
        return []

    def _watch(self) -> list[Effect]:
        """Follow a certified session of the group that this peer is not in, for its average."""
        work = self._work
        if work.uploading and self.survivors is None and not self._is_due("certify"):
            return []
        for attempt in range(MAX_ATTEMPTS):
            for enrolment in self._statements.of(Enrolment, attempt).values():
                session = self._id_of(enrolment)
                if session == work.session or self.survivors is not None:
                    continue
                if self._certified(session, enrolment.members) is not None:
                    self._work = _Work(attempt, session, enrolment.members, enrolment.base, uploading=work.uploading)
                    self._at = {"repeat": self._now}
                    self._unsigned, self._chunks, self._uploads, self._check = {}, {}, {}, Audit()
                    return []
        return []

    # Upload

    def _upload(self) -> list[Effect]:
        work = self._work
        is_late = self._is_over("collect") or self.survivors is not None
        if not work.began or work.uploading or self._vector is None or is_late:
            return []
        work.uploading = True
        vector, weight, metrics, secrets = self._vector, self._weight, self._metrics, work.secrets
        count = self._format.chunks
        named, base = work.base, self._base if work.base else self._public_base
        self._is_change = bool(named)
        if secrets is None:
            return [self._spend()]
        return [Compute("hide", partial(secrets.hidden, vector, weight, metrics, count, named, base), vector.nbytes)]

    def _spend(self) -> Effect:
        """Have it kept that the update is spent, and what that costs, before anything of it leaves."""
        rho = 0.0 if self._noise is None else self._noise.rho
        return Persist("uploading", Uploading(self.terms.round, self._work.session, rho))

    def _cut_next(self) -> list[Effect]:
        """Cut the next chunk, beginning behind the own place, so that not all begin with the same aggregator."""
        work, vector = self._work, self._vector
        if vector is None or (self.survivors is not None and self.terms.me not in self.survivors):
            return []  # nobody waits for the rest
        chunks = self._format.chunks
        chunk = (work.members.index(self.terms.me) + 1 + len(work.roots)) % chunks
        hidden, weight, metrics = work.hidden, self._weight, self._metrics

        def cut_one() -> tuple[Payload, bytes]:
            if hidden is None:
                part: Payload = cut(vector, chunks, chunk, weight, metrics)
            else:
                part = masked_chunk(hidden, chunk)
            return part, digest(part)

        return [Compute(f"cut/{chunk}", cut_one, vector.nbytes // chunks)]

    def _send_chunk(self, chunk: int, payload: Payload, root: bytes) -> list[Effect]:
        """Send a chunk that was cut, and cut the next; sign what all of them are once the last is cut."""
        work = self._work
        work.roots[chunk] = root
        if not self._is_audited or work.hidden is None:
            self._chunks[chunk] = payload
        aggregator, deputy = self._holders(chunk)
        if aggregator == self.terms.me:
            self._uploads[chunk, aggregator] = (payload, root)
        effects = self._bulk(deputy if aggregator == self.terms.me else aggregator, Part.UPLOAD, chunk, payload)
        if len(work.roots) < self._format.chunks:
            return effects + self._cut_next()
        work.hidden, work.uploaded = work.hidden if self._is_audited else None, True
        roots = tuple(work.roots[chunk] for chunk in range(self._format.chunks))
        return effects + self._state(Roots(self.terms.round, work.session, roots))

    @property
    def _aggregators(self) -> tuple[int, ...]:
        return self.terms.aggregators(self._work.members)

    def _holders(self, chunk: int) -> tuple[int, int]:
        return pair(self._aggregators, chunk)

    def _is_mine(self, chunk: int, uploader: int) -> bool:
        """Return whether this peer is to hold that uploader's chunk."""
        aggregator, deputy = self._holders(chunk)
        if aggregator == self.terms.me:
            return True
        return deputy == self.terms.me and (uploader == aggregator or self._work.deputizes)

    def _mine(self) -> list[tuple[int, int]]:
        """Return every (chunk, uploader) this peer is to hold."""
        work, known = self._work, self._known
        of = (work.members, work.deputizes)
        if known.mine is None or known.mine[0] != of:
            mine = [(chunk, who) for chunk in self._own_chunks() for who in work.members if self._is_mine(chunk, who)]
            known.mine = of, mine
        return known.mine[1]

    def _own_chunks(self) -> tuple[int, ...]:
        """Return the chunk that this peer averages and the one it is deputy for, if others may have to be averaged."""
        aggregators = self._aggregators
        if self.terms.me not in aggregators:
            return ()
        place = aggregators.index(self.terms.me)
        return (place, (place - 1) % len(aggregators))[: len(aggregators)]

    def _is_whole(self, chunk: int, uploader: int) -> bool:
        """Return whether an upload is here and is what its uploader committed to."""
        held = self._uploads.get((chunk, uploader))
        roots = self._statements.of(Roots, self._work.session).get(uploader)
        if held is None or roots is None or len(roots.digests) != self._format.chunks:
            return False
        if roots.digests[chunk] != held[1]:
            self._suspects.add(uploader)
            return False
        return True

    def _is_summed(self, chunk: int) -> bool:
        """Return whether no upload of a chunk is needed any more."""
        done = self._has_result(chunk) or chunk in self._work.reducing
        return done or (chunk, self.terms.me) in self._check.rejected

    def _has_result(self, chunk: int) -> bool:
        """Return whether a chunk's result is here, adopted or still to be checked."""
        return chunk in self._results or chunk in self._check.results

    def _is_missing(self, chunk: int, uploader: int) -> bool:
        """Return whether an upload is lacking for a sum that this peer is to make."""
        if self.survivors is None or self._is_summed(chunk):
            return False
        return uploader in self.survivors and (chunk, uploader) not in self._uploads

    # Agree

    def _acknowledge(self) -> list[Effect]:
        work = self._work
        if not work.began or work.acknowledged:
            return []
        missing, is_over = set[int](), self._is_over("collect")
        for chunk, who in self._mine():
            if not self._is_whole(chunk, who):
                if not is_over:
                    return []
                missing.add(who)
        work.acknowledged = True
        # Not before all others can have acknowledged, whatever they measured: who gives up early is a vote less.
        others = max(0.0, self._at["collect at most"] - self._now)
        self._set("propose at most", others + 2 * self._longest_stage)
        self._set("certify", others + (min(len(work.members), 4) + 3) * self._longest_stage)
        if self.terms.me not in self._aggregators:
            return []
        return self._state(Acknowledged(self.terms.round, work.session, tuple(sorted(set(work.members) - missing))))

    def _propose(self) -> list[Effect]:
        work = self._work
        if not work.acknowledged or self.survivors is not None:
            return []
        proposals = self._statements.of(Proposal, work.session)
        lists = {who: set(each.uploaders) for who, each in self._acknowledgements.items()}
        if self.terms.me in proposals or not self._may_propose(lists):
            return []
        voted = {vote.survivors for vote in self._statements.of(Vote, work.session).values()}
        for proposal in proposals.values():
            if proposal.survivors in voted and self._is_founded(proposal):
                return self._state(proposal)
        here = frozenset(filter(self._is_here, work.members))
        live, survivors = largest(lists, work.members, self._aggregators, here)
        if len(survivors) < self.terms.least:
            return []
        return self._state(Proposal(self.terms.round, work.session, live, survivors))

    def _may_propose(self, lists: Mapping[int, set[int]]) -> bool:
        """Return whether it is this peer's turn: enough acknowledgements are here, and those that lack will not come.

        One that has everything early must not leave out whoever waits, and with too few nobody would heed it. Nor must
        one that was cut off take those for gone that it has only not heard again.
        """
        aggregators = self._aggregators
        rank = sorted(self._work.members, key=self._order).index(self.terms.me)
        enough = len(lists) >= threshold(len(aggregators))
        complete = len(lists) == len(aggregators)
        awaited = not complete and any(self._is_here(who) for who in aggregators if who not in lists)
        certain = complete and all(map(self._is_here, self._work.members))
        in_turn = self._lasts("propose", enough and not awaited, (rank + (not certain)) * self._stage)
        return in_turn or (enough and self._is_due("propose at most"))

    @property
    def _acknowledgements(self) -> Mapping[int, Acknowledged]:
        return self._statements.of(Acknowledged, self._work.session)

    def _is_founded(self, proposal: Proposal) -> bool:
        """Return whether the acknowledgements say what a proposal does, and enough members sign them."""
        members, aggregators = self._work.members, self._aggregators
        lists = {who: set(each.uploaders) for who, each in self._statements.of(Acknowledged, proposal.session).items()}
        if not set(proposal.live) <= set(lists) & set(aggregators) or len(proposal.live) < threshold(len(aggregators)):
            return False
        return proposal.survivors == shared({who: lists[who] for who in proposal.live}, members, aggregators)

    def _vote(self) -> list[Effect]:
        work = self._work
        if work.voting is not None or not work.acknowledged or self._is_due("certify"):
            return []
        for _, proposal in sorted(self._statements.of(Proposal, work.session).items(), key=self._order):
            enough = len(proposal.survivors) >= self.terms.least
            if enough and self._is_founded(proposal):
                work.voting = proposal.survivors
                return [Persist("voted", Voted(self.terms.round, work.session, proposal.survivors))]
        return []

    def _certified(self, session: bytes, members: Sequence[int]) -> tuple[int, ...] | None:
        if not self.terms.bears(members):
            return None
        return certified(self._statements.of(Vote, session), members, self.terms.least)

    # Reduce

    def _reduce(self) -> list[Effect]:
        work = self._work
        if not work.members:
            return []
        if self.survivors is None:
            self.survivors = self._certified(work.session, work.members)
            if self.survivors is None:
                return []
            self._at.pop("certify", None)
            unmasking = 0 if self._masks is None else 2 * self._stage
            self._set("silent", self._stage)
            self._allow("deputy", unmasking + 2 * self._stage, self._transfer / 2)
            self._await_results()
        effects = self._decode()
        if not work.enrolled:
            return effects
        effects += self._reveal()
        chunks = self._own_chunks()
        effects += self._sum(chunks[0]) if chunks else []
        if len(chunks) < 2:
            return effects
        before = chunks[1]
        # Also one that signed its result and sends it to nobody.
        gone = self._lasts("orphaned", self._holders(before)[0] not in self.linked, self._stage)
        orphaned = not self._has_result(before) and (gone or self._is_over("deputy"))
        if orphaned and not work.deputizes:
            work.deputizes = True
            self._at["repeat"] = self._now
        if work.deputizes and (before, self.terms.me) not in self._uploads and not self._is_summed(before):
            if before in self._chunks:
                self._uploads[before, self.terms.me] = self._chunks[before], work.roots[before]
            else:
                effects += self._mask_again(before)
        return effects + (self._sum(before) if work.deputizes else [])

    def _await_results(self) -> None:
        self._allow("reduce", (2 + 8) * self._longest_stage, 2 * self._transfer)

    def _reveal(self) -> list[Effect]:
        """Say, once, what takes this peer's masks off the certified sum; later what stands in for the silent."""
        work, survivors = self._work, self.survivors or ()
        secrets = work.secrets
        if secrets is None or not work.began or work.voting not in (None, survivors):
            return []
        effects: list[Effect] = []
        reveals = self._statements.of(Reveal, work.session)
        if self.terms.me not in reveals:
            effects += self._state(secrets.reveal(survivors))
        if not work.returned and self._is_due("silent") and (silent := secrets.silent(survivors, reveals)):
            work.returned = True
            effects += self._state(secrets.give_back(survivors, silent))
        returned = self._statements.of(Returned, work.session)
        if work.masks is None and work.told_of != (len(reveals), len(returned)):
            work.told_of = (len(reveals), len(returned))
            work.masks = secrets.leftover(survivors, reveals, returned)
        return effects

    def _sum(self, chunk: int) -> list[Effect]:
        """Average a chunk, if this peer has not yet and holds all it takes."""
        survivors = self.survivors or ()
        if self._is_summed(chunk) or not all(self._is_whole(chunk, who) for who in survivors):
            return []
        masks = self._work.masks
        terms = None if self._masks is None else self._masks.of(self._work.base)
        if terms is not None and masks is None:
            return []
        self._work.reducing.add(chunk)
        # Under masks the sum is made in the place of the first: not of what this peer may need again.
        kept = (self.terms.me, self._other_of(chunk, self.terms.me) if self._is_audited else None)
        order = survivors if terms is None else sorted(survivors, key=kept.__contains__)
        parts = [self._uploads[chunk, who][0] for who in order]
        self._forget_uploads(chunk)
        layout = None if terms is None else Layout(self.terms.parameters, self._format.chunks, terms.bits)
        members = len(self._work.members)

        def work() -> tuple[Payload, bytes] | None:
            if terms is None or layout is None or masks is None:
                average = reduce(parts)
                return average, digest(average)
            try:
                result = sum_chunk(terms, terms.ring(members), layout, chunk, parts, masks)
            except RemoteError:
                return None
            return result, digest(result)

        return [Compute(f"reduce/{chunk}", work, sum(part.nbytes for part in parts))]

    def _decode(self) -> list[Effect]:
        """Decode the results that are here and are what was signed."""
        work, survivors = self._work, self.survivors or ()
        effects: list[Effect] = []
        if self._base_digest is None or self._lacks_base:
            return []
        # What the masks carried of the own change leaves it; of one that is not in the sum nothing is kept.
        mine = self._is_change and work.uploaded and self.terms.me in survivors and self._noise is None
        weight = self._weight if mine else None
        is_like = self._noise is None and self._is_change == bool(work.base)
        base, own = self._base if work.base else None, self._vector if is_like else None
        for chunk, result in self._statements.of(Result, work.session).items():
            if chunk not in self._unsigned or chunk in self._decoding or chunk in self._results:
                continue
            payload, found = self._unsigned.pop(chunk)
            if found == result.digest and not self._hold(chunk, payload, found):
                self._decoding.add(chunk)
                place = self._take_place()
                task = partial(_decoded, self._format, place, chunk, payload, len(survivors), own, base, weight)
                effects.append(Compute(f"decode/{chunk}", task, payload.nbytes))
        return effects

    def _take_place(self) -> Vector:
        """Return where the average is written: in the place of the own model, if all of that has left this peer."""
        if self._place is None:
            own = self._vector if self._work.uploaded and not self._is_change else None
            fits = own is not None and own.flags.writeable
            self._place = own if own is not None and fits else np.empty(self.terms.parameters, np.float32)
        return self._place

    def _decoded_result(self, chunk: int, decoded: object) -> None:
        """Keep a result; what is held only to make it can go. One that its signer made up counts as not received."""
        self._decoding.discard(chunk)
        if isinstance(decoded, tuple):
            result, *told = decoded
            self._results[chunk], self._decoded[chunk] = result, (told[0], told[1])
            self._chunks.pop(chunk, None)
            self._forget_uploads(chunk)
            return
        signed = self._statements.signed(Result, self._work.session).get(chunk)
        if signed is not None:
            self._check.rejected |= {(each, signed.signer) for each in range(self._format.chunks)}
            self._statements.forget(Result, self._work.session, chunk)

    def _forget_uploads(self, chunk: int) -> None:
        """Forget a chunk's uploads; but while it is to be checked not the one that this peer vouches for."""
        is_open = self._is_audited and chunk not in self._check.verdicts
        kept = (chunk, self._other_of(chunk, self.terms.me)) if is_open else None
        self._uploads = {key: each for key, each in self._uploads.items() if key[0] != chunk or key == kept}

    def _release(self, chunk: int, result: Payload, found: bytes) -> list[Effect]:
        signed = self._statements.of(Result, self._work.session).get(chunk)
        if signed is not None and signed.digest != found:
            return []  # its aggregator says something else; who is right is for an audit to find out
        self._unsigned[chunk] = (result, found)
        effects: list[Effect] = []
        if signed is None:
            effects += self._state(Result(self.terms.round, self._work.session, chunk, found))
        for who in self.terms.group:
            if who != self.terms.me:
                effects += self._bulk(who, Part.RESULT, chunk, result)
        return effects

    # Check

    @property
    def _is_audited(self) -> bool:
        return self._masks is not None and self._masks.audit

    @property
    def _vouches(self) -> bool:
        """Whether the check takes this peer's word; whoever watches only looks on."""
        work = self._work
        return work.hidden is not None and work.uploaded and self.terms.me in (self.survivors or ())

    @property
    def _bits(self) -> int:
        return 32 if self._format.ring is None else self._format.ring.bits

    def _other_of(self, chunk: int, who: int) -> int | None:
        """Return the other of the two that may sign a chunk's result; None if `who` is neither, or the only one."""
        holders = self._holders(chunk)
        if who not in holders or holders[0] == holders[1]:
            return None
        return holders[1] if who == holders[0] else holders[0]

    def _digest(self, chunk: int) -> bytes:
        result = self._statements.of(Result, self._work.session).get(chunk)
        return bytes(DIGEST_BYTES) if result is None else result.digest

    def _hold(self, chunk: int, result: Payload, found: bytes) -> bool:
        """Keep a result that is to be checked before it is adopted; return whether it must not be, or not yet."""
        check = self._check
        if not self._is_audited or chunk in check.verdicts:
            return check.is_lost(chunk)
        if chunk in check.refuted and check.refuted[chunk] == Refuted(self._holders(chunk)[0], found):
            check.close(chunk, Verdict.AGREED)
            return False
        check.results[chunk] = result
        self._chunks.pop(chunk, None)
        self._forget_uploads(chunk)
        return True

    def _audit(self) -> list[Effect]:
        """Check the results that are here, once all are; then those that replace refuted ones."""
        check, chunks = self._check, len(self._aggregators)
        if not self._is_audited or self.survivors is None or len(check.verdicts) == chunks:
            return []
        check.since = self._now if check.since is None else check.since
        effects = [*self._heed_rivals(), *self._show_rivals()]
        if check.pending is None:
            due = check.due(chunks)
            if not due <= check.results.keys() and not self._is_over("reduce") and not self._is_hopeless():
                return effects
            if not due & check.results.keys():
                check.end_run()
                return effects
            check.pending = due & check.results.keys()
            # Others may get the results as much later as these took to come here.
            others = self._now - check.since
            self._allow(f"multiply{check.run}", others + 6 * self._stage, self._transfer / 2)
            self._allow(f"audit{check.run}", others + 9 * self._stage, self._transfer / 2)
        effects += [*self._challenge(), *self._multiply(), *self._tell_products(), *self._judge()]
        if not check.pending:
            check.end_run()
        if len(check.verdicts) == chunks:
            self._work.hidden = None
        return effects + self._decode()

    def _challenge(self) -> list[Effect]:
        """Add to what random words are drawn from."""
        session, kind, terms = self._work.session, self._check.challenge, self._masks
        if terms is None or not self._vouches or self.terms.me in self._statements.signed(kind, session):
            return []
        digests = tuple(map(self._digest, range(self._format.chunks)))
        signed = self._statements.signed(Result, session)
        by_deputy = sum(1 << chunk for chunk, each in signed.items() if each.signer != self._holders(chunk)[0])
        return self._state(kind(self.terms.round, session, digests, terms.entropy(DIGEST_BYTES), by_deputy))

    def _is_rival(self, content: Result, signer: int) -> bool:
        if not self._is_audited or content.session != self._work.session or content.chunk >= len(self._aggregators):
            return False
        held = self._statements.of(Result, content.session).get(content.chunk)
        return signer in self._holders(content.chunk) and self._check.is_rival(content, held)

    def _heed_rivals(self) -> list[Effect]:
        """Give up aggregators' results that are contradicted: who is right shows once the deputy's is checked."""
        check, session = self._check, self._work.session
        effects: list[Effect] = []
        for chunk, rival in check.rivals.items():
            said, held = said_as(Result, rival), self._statements.signed(Result, session).get(chunk)
            if held is None or not check.is_rival(said, said_as(Result, held)):
                continue
            if held.signer != rival.signer == self._holders(chunk)[0]:
                check.refute(chunk, Refuted(rival.signer, said.digest, held.signer), [rival])
                continue
            effects += self._refute(chunk, rival.signer)
            check.evidence[chunk].append(rival)
            if check.refuted[chunk].is_proven:
                shown = [who for who in self.terms.group if who not in (self.terms.me, rival.signer)]
                effects += [self._tell(who, statement) for who in shown for statement in (held, rival)]
            if rival.signer != held.signer:
                self._statements.add(rival)
        check.rivals = {}
        return effects

    def _show_rivals(self) -> list[Effect]:
        """Show results to whoever names others in its challenge: so all know of both, or of none."""
        results = self._statements.signed(Result, self._work.session)
        named = tuple(map(self._digest, range(self._format.chunks)))
        effects: list[Effect] = []
        for who, challenge in self._statements.of(CHALLENGES[0], self._work.session).items():
            if challenge.digests == named and not self._check.evidence:
                continue
            rivals = self._check.unknown_to(challenge, results)
            if who != self.terms.me and rivals and self._may_answer((who, "rivals"), self._now, self._stage):
                effects += [self._tell(who, statement) for statement in rivals]
        return effects

    def _drawn(self, chunk: int, run: int) -> tuple[bytes, int] | None:
        """Return the key of a chunk's random words, and who counts as its signer; None until they are known."""
        result = self._statements.of(Result, self._work.session).get(chunk)
        if result is None or self._masks is None:
            return None
        suite, session, survivors = self._masks.suite, self._work.session, self.survivors or ()
        return challenge_key(suite, session, run, result, survivors, self._holders(chunk), self._statements)

    def _multiply(self) -> list[Effect]:
        """Multiply chunks with their random words: what this peer contributed, the result, and what it vouches for."""
        check, masks = self._check, self._masks
        effects: list[Effect] = []
        if masks is None:
            return []
        layout = Layout(self.terms.parameters, self._format.chunks, self._bits)
        for chunk in sorted((check.pending or set()) - check.signers.keys()):
            drawn = self._drawn(chunk, check.run)
            if drawn is None and not self._vouches and (drawn := self._drawn(chunk, len(CHALLENGES) - 1)) is not None:
                check.second.add(chunk)
            if drawn is None:
                continue
            (key, signer), result = drawn, check.results[chunk]
            check.signers[chunk] = signer
            own, vouched = self._own_part(chunk, signer), self._vouched(chunk, signer)
            task = partial(multiply, masks.suite, layout, chunk, key, np.asarray(result, np.uint8), own, vouched)
            effects.append(Compute(f"multiply/{check.run}/{chunk}", task, 2 * result.nbytes))
        return effects

    def _own_part(self, chunk: int, signer: int) -> Own | None:
        """Return what of a chunk this peer tells the products of: not if it signed, and another vouches for it."""
        work, me, survivors = self._work, self.terms.me, self.survivors or ()
        bound = is_bound(survivors, self._other_of(chunk, signer))
        if not self._vouches or work.hidden is None or work.secrets is None or (bound and me == signer):
            return None
        streams = work.secrets.shared([signer] if bound else [])
        return Own(
            work.hidden, streams, work.secrets.shared([who for who in survivors if not (bound and who == signer)])
        )

    def _vouched(self, chunk: int, signer: int) -> Vouched | None:
        """Return the upload of a result's signer, if this peer is the one that vouches for it."""
        work, survivors = self._work, self.survivors or ()
        mine = self._other_of(chunk, signer) == self.terms.me and signer in survivors and self._vouches
        if not mine or work.secrets is None or not self._is_whole(chunk, signer):
            return None
        reveals = self._statements.of(Reveal, work.session)
        masks = work.secrets.leftover(survivors, reveals, self._statements.of(Returned, work.session), of=signer)
        return None if masks is None else Vouched(self._uploads[chunk, signer][0], masks)

    def _multiplied(self, run: int, chunk: int, found: tuple[bytes, bytes, bytes]) -> None:
        if run == self._check.run and chunk in (self._check.pending or ()):
            self._check.products[chunk] = found

    def _tell_products(self) -> list[Effect]:
        """Sign the products once all are known, or those that are when the time is over."""
        work, check = self._work, self._check
        if not self._vouches or self.terms.me in self._statements.signed(check.statement, work.session):
            return []
        late = self._is_over(f"multiply{check.run}") or self._are_silent_gone(check.challenge)
        if not check.products.keys() >= (check.pending or set()) and not late:
            return []
        told = check.statement_of(self._format.chunks)
        return self._state(check.statement(self.terms.round, work.session, *told))

    def _are_silent_gone(self, kind: type[Content]) -> bool:
        """Return whether survivors that have not said this have been gone for a while, or further on."""
        said = self._statements.signed(kind, self._work.session)
        silent = [who for who in self.survivors or () if who not in said and who != self.terms.me]
        centre = self.terms.centre
        # What leaves of a star say comes from its centre.
        via = [who if who in self.linked or centre in (None, self.terms.me) else centre for who in silent]
        return self._lasts(f"gone {kind.kind}", bool(silent) and not any(map(self._is_here, via)), self._stage)

    def _judge(self) -> list[Effect]:
        """Compare what all say, and close or refute what can be; all that is left once the time is over."""
        check, survivors = self._check, self.survivors or ()
        spoke = not self._vouches or self.terms.me in self._statements.signed(check.statement, self._work.session)
        over = self._is_over(f"audit{check.run}") or (spoke and self._are_silent_gone(check.statement))
        results = self._statements.signed(Result, self._work.session)
        effects: list[Effect] = []
        for chunk in sorted(check.pending or ()):
            signer = check.signers.get(chunk, results[chunk].signer)
            said = check.told(chunk, self._statements, self._work.session)
            made = check.products[chunk][2] if chunk in check.products else None
            judged = verdict_of(self._bits, chunk, signer, self._other_of(chunk, signer), survivors, said, made)
            if judged == (Verdict.INCOMPLETE, True):
                effects += self._leave_open(chunk)
            elif judged is not None and judged[1]:
                self._close(chunk, judged[0])
            elif judged is not None:
                effects += self._refute(chunk)
            elif over:
                effects += self._leave_open(chunk)
        return effects

    def _leave_open(self, chunk: int) -> list[Effect]:
        """Close a check that cannot be completed.

        What replaces a refuted result does not count without it: perhaps it was refuted by a lie, for that to come in.
        """
        refuted = self._check.refuted.get(chunk)
        if refuted is not None and not refuted.is_proven:
            return self._refute(chunk)
        self._close(chunk, Verdict.INCOMPLETE)
        return []

    def _close(self, chunk: int, verdict: Verdict) -> None:
        """Keep a verdict, and let the result be decoded; what is held only for the check can go."""
        self._check.close(chunk, verdict)
        self._chunks.pop(chunk, None)
        self._forget_uploads(chunk)
        if chunk in self._check.results:
            self._unsigned[chunk] = (self._check.results.pop(chunk), self._digest(chunk))

    def _refute(self, chunk: int, rival: int | None = None) -> list[Effect]:
        """Give up a result that does not count; its deputy takes the chunk over, as an orphaned one.

        Args:
            chunk: which.
            rival: who signed another, which contradicts it; None if products do.
        """
        work, check = self._work, self._check
        signed = self._statements.signed(Result, work.session)[chunk]
        signer = signed.signer if rival is not None else check.signers.get(chunk, signed.signer)
        aggregator, deputy = self._holders(chunk)
        check.refute(chunk, Refuted(signer, self._digest(chunk), rival), [signed])
        self._statements.forget(Result, work.session, chunk)
        self._unsigned.pop(chunk, None)
        self._traffic.signed_at.pop(chunk, None)
        check.results.pop(chunk, None)
        work.reducing.discard(chunk)
        if check.run > 0 or signer != aggregator or aggregator == deputy:
            self._close(chunk, Verdict.LOST)
            return []
        self._at["deputy"] = self._at["deputy at most"] = self._at["repeat"] = self._now
        for name in ("reduce", "reduce at most", "hopeless"):
            self._at.pop(name, None)
        self._await_results()
        return []

    def _can_mask_again(self, chunk: int) -> bool:
        """Return whether the own vector is as it was when this chunk of it was sent."""
        work = self._work
        settled = self._has_result(chunk) or chunk in self._decoding or chunk in self._check.verdicts
        return self._is_audited and work.hidden is not None and chunk in work.roots and not settled

    def _mask_again(self, chunk: int, wanted_by: int | None = None) -> list[Effect]:
        """Mask an own chunk as before, for whoever wants it, or for this peer to sum."""
        work, hidden = self._work, self._work.hidden
        if hidden is None or not self._can_mask_again(chunk):
            return []
        is_begun = chunk in work.again
        work.again.setdefault(chunk, set()).update(() if wanted_by is None else (wanted_by,))

        def mask() -> tuple[Payload, bytes]:
            part = masked_chunk(hidden, chunk)
            return part, digest(part)

        return [] if is_begun else [Compute(f"again/{chunk}", mask, self._format.size(chunk))]

    def _masked_again(self, chunk: int, part: Payload, found: bytes) -> list[Effect]:
        """Send or keep an own chunk, if it is what was sent before: nothing else goes under its masks."""
        wanted_by = self._work.again.pop(chunk, None)
        if wanted_by is None or found != self._work.roots.get(chunk) or self._has_result(chunk):
            return []
        if chunk in self._own_chunks():
            self._chunks[chunk] = part
        return [effect for who in sorted(wanted_by) for effect in self._bulk(who, Part.UPLOAD, chunk, part)]

    # What got lost

    def _repeat(self) -> list[Effect]:
        """Now and then tell the group what this peer holds, and ask for the chunks it lacks."""
        if not self._is_due("repeat"):
            return []
        self._at["repeat"] = self._now + self.patience.seconds
        work = self._work
        held = tuple(self._mask(kind) for kind in KINDS)
        have = Have(self.terms.charter, self.terms.round, work.attempt, work.session, held)
        others = [who for who in self.terms.group if who != self.terms.me]
        effects: list[Effect] = [Send(self.terms.roster[who], have) for who in others]
        return effects + [self._want(who, part, chunk) for who, part, chunk in self._lacking()]

    def _mask(self, kind: type[Content]) -> int:
        key = self._work.attempt if kind in (Advert, Enrolment) else self._work.session
        held = self._statements.signed(kind, key)
        return sum(1 << (who if kind is Result else self.terms.group.index(who)) for who in held)

    def _lacking(self) -> Iterable[tuple[int, Part, int]]:
        """Yield (whom to ask, what) for each chunk that should be here, and is not known to be under way."""
        work = self._work
        results = self._statements.signed(Result, work.session)
        coming = {each.chunk for each in self._traffic.coming.values() if each.part is Part.RESULT}
        for chunk in results:
            here = self._has_result(chunk) or chunk in self._decoding or (Part.RESULT, chunk, 0) in self._hashing
            if not here and chunk not in coming and not self._lacks_base:
                holder = self._holder(chunk, results[chunk].signer)
                if holder is not None:
                    yield holder, Part.RESULT, chunk
        if work.enrolled and work.began:
            committed = self._statements.signed(Roots, work.session)
            for chunk, who in self._mine():
                # Who has not committed to its chunks yet is still cutting them; and one comes after the other.
                idle = who in self.linked and who in committed and who not in self._traffic.coming
                held = (chunk, who) in self._uploads or (Part.UPLOAD, chunk, who) in self._hashing
                wanted = not held and (not work.acknowledged or self._is_missing(chunk, who))
                if who != self.terms.me and idle and wanted:
                    yield who, Part.UPLOAD, chunk

    def _holder(self, chunk: int, signer: int) -> int | None:
        """Return whom to ask for a result: its signer; when that was in vain, whoever else may have it by now."""
        since = self._traffic.signed_at.setdefault(chunk, self._now)
        usual = 2 * self.patience.seconds + usual_seconds(self._format.size(chunk))
        if signer in self.linked and self._now < since + usual:
            return signer if signer not in self._traffic.coming else None
        others = self._work.members if self.terms.centre is None else self._aggregators
        holders = [who for who in (signer, *others) if who != self.terms.me and who in self.linked]
        self._traffic.asked += 1
        return holders[self._traffic.asked % len(holders)] if holders else None

    # The end

    def _conclusion(self) -> Outcome | None:
        work = self._work
        if self.survivors is not None:
            if self.is_released:
                return Outcome.FULL if self.terms.me in self.survivors and work.uploaded else Outcome.LATE
            lacking = self._base_digest is not None and self._lacks_base
            if self._is_audited and (self._check.pending or self._decoding) and not lacking:
                return None
            lost = all(chunk in self._results or self._check.is_lost(chunk) for chunk in range(self._format.chunks))
            if not lost and not self._is_over("reduce") and not self._is_hopeless() and not lacking:
                return None
            if self._results:
                return Outcome.PARTIAL
            return Outcome.VOID if work.uploading else Outcome.SKIP
        if self._is_due("certify") or self._are_votes_lacking():
            return Outcome.VOID if work.uploading else Outcome.SKIP
        # Who has only just come here is still to say that it takes part.
        may_skip = self._lasts("skip", self.may_skip, self.terms.patience)
        if self._is_due("failed") or (self.is_short and may_skip):
            return Outcome.SKIP
        return None

    def _are_votes_lacking(self) -> bool:
        """Return whether too few members are left for a certificate, and have been for long."""
        work = self._work
        voters = self._reached.union(self._statements.signed(Vote, work.session))
        few = work.acknowledged and len(voters.intersection(work.members)) < threshold(len(work.members))
        return self._lasts("voters", few, (min(len(work.members), 4) + 3) * self._stage)

    def _is_hopeless(self) -> bool:
        """Return whether nobody is left who could make the results that lack, and nobody has been for long."""
        if self._now < self._traffic.quiet_at + self._stage:
            return self._lasts("hopeless", False, 0.0)
        members, survivors = self._work.members, self.survivors or ()
        lists = {who: set(each.uploaders) for who, each in self._acknowledgements.items()}
        results = self._statements.signed(Result, self._work.session)
        # Who is further on gives what was summed, and sums nothing any more.
        able = frozenset(who for who in self._reached if who == self.terms.me or self.heard_at(who) > -math.inf)
        lost = not any(
            is_summable(chunk, survivors, lists, self._aggregators, self._reached if chunk in results else able)
            for chunk in range(self._format.chunks)
            if not self._has_result(chunk) and not self._check.is_lost(chunk)
        )
        if self._masks is not None:
            reveals = self._statements.signed(Reveal, self._work.session)
            givers = able.union(self._statements.signed(Returned, self._work.session)).intersection(members)
            lost = lost or (not reveals.keys() >= set(survivors) and len(givers) < threshold(len(members)))
        return self._lasts("hopeless", lost, (2 + 8) * self._stage)

    def holds(self, statement: Statement) -> bool:
        """Return whether this very statement is here, or was before it was refuted."""
        return self._statements.holds(statement) or self._check.has_refuted(statement)

    def took_part(self, who: int) -> bool:
        """Return whether a member gave a sign of taking part in this round, in an attempt that there was."""
        adverts = (self._statements.signed(Advert, attempt) for attempt in range(self._work.attempt + 1))
        return who in self._work.members or any(who in each for each in adverts)

    def pull(self) -> None:
        """Ask for what the others hold at the next `advance`, though this peer has no part in it yet."""
        self._set("repeat", 0.0)
        self._seen = None

    def retire(self) -> None:
        """Forget what only the round itself needed; its average and statements can still be asked for."""
        self._work.secrets = self._work.masks = self._work.hidden = None
        self._uploads, self._chunks, self._vector, self._unsigned = {}, {}, None, {}
        self._check.results = {}
        self._place = self._public_base = None
        if not self._work.base:
            self._base = None

    def results(self) -> tuple[Payload, ...]:
        """Return the results of all chunks, once all are here: of models, or of changes."""
        return tuple(self._results[chunk] for chunk in range(self._format.chunks)) if self.is_released else ()

    def keep_results(self, data: Bytes) -> None:
        """Hold these bytes instead of `results`, which they are, one after the other."""
        end = 0
        for chunk in range(self._format.chunks):
            part = data[end : (end := end + self._format.size(chunk))]
            self._results[chunk] = self._format.read(part)

    def released(self) -> Payload:
        """Return what `Released.open` reads: `results`, one after the other, behind the base if they are changes."""
        parts = [result.data.cast("B") for result in self.results()]
        if self._base is not None and self._work.base:
            parts = [self._base.data.cast("B"), *parts]
        return self._format.read(b"".join(parts))

    def give_up(self) -> None:
        """End the round without its average: the others are in a later one."""
        if self.outcome is None:
            self.outcome = Outcome.VOID if self._work.uploading else Outcome.SKIP

    # Sending

    def _state(self, content: Content) -> list[Effect]:
        """Sign a statement, keep it, and tell it to the group."""
        body = encode_body(content)
        statement = decode_statement(self.terms.me, body, self._keyring.sign(body))
        self._statements.add(statement)
        return [self._tell(who, statement) for who in self.terms.group if who != self.terms.me]

    def _tell(self, who: int, statement: Statement) -> Effect:
        return Send(self.terms.roster[who], Told(self.terms.charter, self.terms.round, statement))

    def _want(self, who: int, part: Part, chunk: int) -> Effect:
        return Send(self.terms.roster[who], Want(self.terms.charter, self.terms.round, self._work.session, part, chunk))

    def _bulk(self, who: int, part: Part, chunk: int, payload: Payload) -> list[Effect]:
        if who == self.terms.me:  # its own deputy, in a group of one
            return []
        self._traffic.sent.add((who, part, chunk))
        message = Chunk(self.terms.charter, self.terms.round, self._work.session, part, chunk, payload.nbytes)
        return [SendBulk((self.terms.roster[who],), message, payload)]


def _decoded(
    layout: Format,
    place: Vector,
    chunk: int,
    result: Payload,
    survivors: int,
    own: Vector | None,
    base: Vector | None,
    weight: int | None,
) -> tuple[Payload, Totals, float] | None:
    """Decode a result into its place, and return it with what was found; None if it cannot be one.

    Args:
        layout: of the session.
        place: where the average is written.
        chunk: which.
        result: of this chunk.
        survivors: how many.
        own: what this peer contributed; None if that cannot be compared with the average.
        base: what the changes are from; None of whole models.
        weight: this peer's, if its change is in the sum: then what did not fit into the words is left in `own`.
    """
    try:
        found = layout.decode_into(place, chunk, result, survivors, own, base)
    except RemoteError:
        return None
    if weight is not None and own is not None and layout.ring is not None:
        layout.ring.leave_residual(own[slice(*bounds(layout.parameters, layout.chunks, chunk))], weight)
    return result, *found
