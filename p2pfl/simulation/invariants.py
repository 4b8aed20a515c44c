"""What must hold whatever goes wrong, checked at every step of a simulated network and at its end.

Only honest peers are held to it. A violation is one line: who, when, and which rule.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import P2pflError
from p2pfl.core.ids import Round
from p2pfl.core.ledger import Checkpoint, Record, Uploading, Voted
from p2pfl.core.machine import (
    AcceptBulk,
    Adopt,
    BulkOffered,
    Disconnect,
    Effect,
    Emit,
    Input,
    Payload,
    Persist,
    RefuseBulk,
    Send,
    SendBulk,
    Vector,
)
from p2pfl.core.statements import Deal, Roots, Statement, Vote
from p2pfl.core.trace import PeerFinished
from p2pfl.core.wire import Chunk, Part, Proof, Told

HEADER = 4
"""Values in front of a chunk in the clear, the weight first."""
Words = NDArray[np.int64]
_Upload = Vector | tuple[int, Words] | None


class InvariantViolated(P2pflError):
    """Something happened that must not, whatever goes wrong; `reason` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Standing(Protocol):
    """What a check may ask of a peer in the network."""

    place: int
    name: str
    lying: bool

    def timer_count(self) -> int:
        """Return how many timers it has set."""

    def held(self) -> int:
        """Return how many statements, chunks and the like its machine stores; 0 where the machine does not tell."""

    def contribution(self) -> Vector | None:
        """Return what it averages in its round, which masks hide on the wire; None where its machine does not tell."""

    def changed_from(self) -> Vector | None:
        """Return the base that its contribution is the change from; None if that is a whole model."""

    def weight(self) -> int:
        """Return its weight in an average, in units of 2^-16."""

    def undelivered(self) -> int:
        """Return how many messages of it are under way or queued on its fullest link."""


class Step(NamedTuple):
    """An input to an honest peer's machine, and what it answered."""

    peer: Standing
    input: Input
    effects: Sequence[Effect]


class Check:
    """One rule; does nothing by default."""

    watches_liars = False
    """Whether it is shown what lying peers do, too."""

    def step(self, step: Step) -> None:
        """Check a step before its effects are carried out.

        Raises:
            InvariantViolated: it must not have.
        """

    def durable(self, peer: Standing, record: Record) -> None:
        """Note that `record` survives a crash from now on."""

    def disk_lost(self, peer: Standing) -> None:
        """Note that nothing that the peer wrote is there any more."""


@dataclass
class _Spent:
    """What one peer uploaded and voted for, and has on its disk, over all its lives."""

    uploads: dict[Round, bytes] = field(default_factory=dict)
    chunks: dict[tuple[Round, bytes, int], bytes] = field(default_factory=dict)
    votes: dict[tuple[Round, bytes], tuple[int, ...]] = field(default_factory=dict)
    uploading: set[tuple[Round, bytes]] = field(default_factory=set)
    voted: set[tuple[Round, bytes, tuple[int, ...]]] = field(default_factory=set)


class SpentOnce(Check):
    """At most one upload for a round number, one content of each of its chunks, and one vote for a session.

    Over all lives of a peer whose disk survives; and each only once its record is durable.
    A peer that lost its disk begins anew here: that it stays out of what it took part in is for other peers to tell it.
    """

    def __init__(self) -> None:
        self._peers: dict[int, _Spent] = {}

    def step(self, step: Step) -> None:
        """See `Check`."""
        peer = step.peer
        for effect in step.effects:
            if isinstance(effect, SendBulk):
                if isinstance(effect.message, Chunk) and effect.message.part is Part.UPLOAD:
                    self._upload(peer, effect.message, effect.payload)
            elif isinstance(effect, Send):
                message = effect.message
                if isinstance(message, Told):
                    self._statement(peer, message.statement.signer, message.statement.content)
                elif isinstance(message, Proof):
                    for statement in message.statements:
                        self._statement(peer, statement.signer, statement.content)

    def durable(self, peer: Standing, record: Record) -> None:
        """See `Check`."""
        if isinstance(record, Uploading):
            self._of(peer).uploading.add((record.round, record.session))
        elif isinstance(record, Voted):
            self._of(peer).voted.add((record.round, record.session, record.survivors))

    def disk_lost(self, peer: Standing) -> None:
        """See `Check`."""
        self._peers.pop(peer.place, None)

    def _of(self, peer: Standing) -> _Spent:
        return self._peers.setdefault(peer.place, _Spent())

    def _upload(self, peer: Standing, chunk: Chunk, payload: Payload) -> None:
        spent = self._of(peer)
        if (chunk.round, chunk.session) not in spent.uploading:
            raise InvariantViolated(f"{peer.name} uploads in round {chunk.round} before its record of that is durable")
        if spent.uploads.setdefault(chunk.round, chunk.session) != chunk.session:
            raise InvariantViolated(f"{peer.name} uploads in two sessions of round {chunk.round}")
        content = payload.tobytes()
        if spent.chunks.setdefault((chunk.round, chunk.session, chunk.chunk), content) != content:
            raise InvariantViolated(f"{peer.name} uploads two contents of chunk {chunk.chunk} in round {chunk.round}")

    def _statement(self, peer: Standing, signer: int, content: object) -> None:
        if signer != peer.place or not isinstance(content, Vote):
            return
        spent = self._of(peer)
        if spent.votes.setdefault((content.round, content.session), content.survivors) != content.survivors:
            raise InvariantViolated(
                f"{peer.name} votes for two sets of survivors in a session of round {content.round}"
            )
        if (content.round, content.session, content.survivors) not in spent.voted:
            raise InvariantViolated(f"{peer.name} votes in round {content.round} before its record of that is durable")


class OffersAnswered(Check):
    """An offer is answered exactly once, and nothing else is answered so."""

    def step(self, step: Step) -> None:
        """See `Check`."""
        peer, input, effects = step
        offered = isinstance(input, BulkOffered)
        answers = 0
        for effect in effects:
            kind = type(effect)
            if kind is AcceptBulk or kind is RefuseBulk or (offered and kind is Disconnect):
                answers += 1
        if answers != offered:
            raise InvariantViolated(f"{peer.name} answers {type(input).__name__} with {answers} verdicts on a payload")


class Bounds(Check):
    """What a peer holds is bounded.

    Args:
        timers: that a machine may have set.
        held: what `held()` of a machine may return.
        undelivered: messages on one link that were sent and have not arrived.
    """

    def __init__(self, timers: int = 100, held: int = 5000, undelivered: int = 300) -> None:
        self._timers, self._held, self._undelivered = timers, held, undelivered
        self._steps = 0

    def step(self, step: Step) -> None:
        """See `Check`."""
        peer = step.peer
        if peer.timer_count() > self._timers:
            raise InvariantViolated(f"{peer.name} has {peer.timer_count()} timers; {self._timers} are allowed")
        self._steps += 1
        if self._steps % 8:
            return  # To count takes time, and what has grown too large is so a few steps later, too.
        if (held := peer.held()) > self._held:
            raise InvariantViolated(f"{peer.name} holds {held} things; {self._held} are allowed")
        if (queued := peer.undelivered()) > self._undelivered:
            raise InvariantViolated(f"{peer.name} has {queued} messages under way on one link")


class AgreementProven(Check):
    """Who says that the members' models agree ends with a model that every other member stood with, bit for bit."""

    def __init__(self) -> None:
        self._stood: dict[int, set[bytes]] = {}
        self._last: dict[int, bytes] = {}

    def step(self, step: Step) -> None:
        """See `Check`."""
        place = step.peer.place
        stood = self._stood.setdefault(place, set())
        for effect in step.effects:
            if isinstance(effect, Adopt):
                self._last[place] = model = hashlib.sha256(effect.vector.tobytes()).digest()
                stood.add(model)
            elif isinstance(effect, Emit) and isinstance(effect.event, PeerFinished) and effect.event.agreed:
                others = [who for who, models in self._stood.items() if self._last.get(place) not in models]
                if others:
                    raise InvariantViolated(f"{step.peer.name} says that all agree; m{min(others)} never had its model")


def weighted_average(chunks: Sequence[Vector]) -> Vector:
    """Return what an aggregator makes of uploaded chunks, each float32 [weight, ...]: the same, of all.

    A second way to what `p2pfl.gossip.chunks.reduce` computes, to compare with.
    """
    stacked = np.stack(chunks).astype(np.float64)
    total = stacked[:, 0].sum()
    values = (stacked[:, :1] * stacked[:, 1:]).sum(axis=0) / total
    return np.concatenate(([total], values)).astype(np.float32)


@dataclass(frozen=True)
class FixedPoint:
    """The words of masked sums, a second way to what `p2pfl.crypto.ring` computes, to compare with.

    Attributes:
        clip: the largest |alpha x| that a word represents.
        bits: of a word.
    """

    clip: float
    bits: int = 32

    def largest(self, members: int) -> int:
        """Return the largest word of one member: a float32 holds it, and the sum of all fits into the ring."""
        largest: int = (2 ** (self.bits - 1) - 1) // members
        while int(np.float32(largest)) > largest or largest % 2 ** max(0, largest.bit_length() - 24):
            largest -= 1
        return largest

    def words(self, values: Vector, weight: int, members: int) -> Words:
        """Return what a member adds to a sum: int64, as many as values, float32."""
        largest = self.largest(members)
        exact = weight / 2**16 * largest / self.clip
        factor = np.float32(exact)
        if float(factor) > exact:
            factor = np.nextafter(factor, np.float32(0))
        words: Words = np.clip(np.rint(values * factor), -largest, largest).astype(np.int64)
        return words

    def average(self, words: Words, weight: int, members: int) -> Vector:
        """Return what a sum of words means: float32, as many."""
        return self.exact(words, weight, members).astype(np.float32)

    def exact(self, words: Words, weight: int, members: int) -> NDArray[np.float64]:
        """Return the same in float64."""
        return words.astype(np.float64) * (self.clip / self.largest(members) / (weight / 2**16))

    def read(self, result: Payload) -> tuple[int, int, Words]:
        """Return a result's weight, its contributors, and its words."""
        data = result.tobytes()
        weight, canary = np.frombuffer(data, "<u4", 2).tolist()
        return weight, canary % 2**16, np.frombuffer(data, f"<i{self.bits // 8}", offset=16).astype(np.int64)


@dataclass
class _Sums:
    """What is known of one session.

    Attributes:
        members: how many; 0 while unknown.
        chunks: how many there are, one for each member that averages; 0 while unknown.
        uploads: by chunk and uploader, all contents that it sent: a weight and words under masks, else a chunk in the
            clear; None where a liar hides what it sends.
        survivors: every set that somebody voted for.
        results: by chunk, once it was seen to be the average of the survivors' uploads, with the average in it.
        base: that its uploads are the changes from, of every honest member the same; None of whole models, or unknown.
    """

    round: Round
    members: int = 0
    chunks: int = 0
    uploads: dict[tuple[int, int], dict[bytes, _Upload]] = field(default_factory=dict)
    survivors: set[tuple[int, ...]] = field(default_factory=set)
    results: dict[int, tuple[bytes, Vector]] = field(default_factory=dict)
    base: Vector | None = None


class AveragesComputed(Check):
    """Nobody adopts an average that nobody computed.

    A result that an honest peer sends is the average of what the survivors uploaded, for survivors that somebody voted
    for, and there is one result of each chunk of a session. The base of a checkpoint is the one before, or the results
    of one session; or the one before, or a released average, with some chunks replaced by results of one session.

    Args:
        initial: the common initial model, float32 [parameters].
        bounds: the first index of a chunk and the first after it, from (parameters, members, chunk).
        words: of sums under masks, which must be right to the last bit.
        changes: the same, of sums of what members changed in a base that all of them have.
        rounds: after which bases are no averages of sessions any more, but what neighbors make of them.
    """

    watches_liars = True

    def __init__(
        self,
        initial: Vector,
        bounds: Callable[[int, int, int], tuple[int, int]],
        words: FixedPoint = FixedPoint(1.0),
        rounds: float = math.inf,
        changes: FixedPoint = FixedPoint(1.0, 16),
    ) -> None:
        self._rounds = rounds
        self._changes = changes
        self._bounds, self._initial, self._words = bounds, initial, words
        self._sessions: dict[bytes, _Sums] = {}
        self._bases: dict[int, Vector] = {}
        self._released = {initial.tobytes()}

    def step(self, step: Step) -> None:
        """See `Check`."""
        for effect in step.effects:
            if isinstance(effect, SendBulk):
                if isinstance(effect.message, Chunk) and effect.message.part is not Part.AVERAGE:
                    self._chunk(step.peer, effect.message, effect.payload)
            elif isinstance(effect, Send):
                if isinstance(effect.message, Told):
                    self._told(step.peer, effect.message.statement)
            elif isinstance(effect, Persist) and isinstance(effect.record, Checkpoint) and not step.peer.lying:
                self._checkpoint(step.peer, effect.record)

    def disk_lost(self, peer: Standing) -> None:
        """See `Check`."""
        self._bases.pop(peer.place, None)

    def _of(self, round: Round, session: bytes) -> _Sums:
        return self._sessions.setdefault(session, _Sums(round))

    def _told(self, peer: Standing, statement: Statement) -> None:
        content = statement.content
        if isinstance(content, Vote):
            self._of(content.round, content.session).survivors.add(content.survivors)
        elif isinstance(content, Deal):  # under masks, where the members have to be known with the first chunk
            self._of(content.round, content.session).members = len(content.sealed)
        elif isinstance(content, Roots):
            sums = self._of(content.round, content.session)
            sums.chunks = len(content.digests)
            if sums.chunks == 1 and statement.signer == peer.place:  # a star's centre sends its own to nobody
                sums.uploads.setdefault((0, peer.place), {})[b""] = self._hidden(peer, 0, True, sums)

    def _chunk(self, peer: Standing, chunk: Chunk, payload: Payload) -> None:
        sums = self._of(chunk.round, chunk.session)
        if chunk.part is Part.UPLOAD:
            sent = sums.uploads.setdefault((chunk.chunk, peer.place), {})
            bits = 32 if peer.changed_from() is None else self._changes.bits
            whole = payload.nbytes >= self._initial.nbytes * bits // 32  # a star's only chunk
            plain = np.asarray(payload, np.float32) if payload.dtype == np.float32 else None
            sent[payload.tobytes()] = self._hidden(peer, chunk.chunk, whole, sums) if plain is None else plain
            return
        if chunk.chunk in sums.results:
            if payload.tobytes() != sums.results[chunk.chunk][0] and not peer.lying:
                raise InvariantViolated(f"{peer.name} sends a second result of a chunk in round {chunk.round}")
        elif self._is_average(sums, chunk.chunk, payload):
            sums.results[chunk.chunk] = payload.tobytes(), self._average(payload, chunk.chunk, sums)
        elif not peer.lying:
            raise InvariantViolated(f"{peer.name} sends a result in round {chunk.round} that no uploads give")

    def _hidden(self, peer: Standing, chunk: int, whole: bool, sums: _Sums) -> _Upload:
        """Return what a peer adds to a sum under masks, of a chunk or the whole; None where a liar hides it."""
        vector = None if peer.lying else peer.contribution()
        if vector is None:
            return None
        base = peer.changed_from()
        if base is not None and sums.base is not None and base.tobytes() != sums.base.tobytes():
            raise InvariantViolated(
                f"{peer.name} uploads in round {sums.round} the change from another base than others"
            )
        sums.base = base if sums.base is None else sums.base
        first, end = self._bounds(len(vector), 1 if whole else sums.members, chunk)
        return peer.weight(), self._words_of(sums).words(vector[first:end], peer.weight(), sums.members)

    def _words_of(self, sums: _Sums) -> FixedPoint:
        return self._words if sums.base is None else self._changes

    def _average(self, result: Payload, chunk: int, sums: _Sums) -> Vector:
        if result.dtype == np.float32:
            return np.asarray(result[HEADER:], np.float32)
        weight, _, words = self._words_of(sums).read(result)
        if sums.base is None:
            return self._words.average(words, weight, sums.members)
        first, end = self._bounds(len(sums.base), sums.chunks, chunk)
        change = self._changes.exact(words, weight, sums.members)
        return (sums.base[first:end].astype(np.float64) + change).astype(np.float32)

    def _is_average(self, sums: _Sums, chunk: int, result: Payload) -> bool:
        for survivors in sorted(sums.survivors):
            contents = [sums.uploads.get((chunk, place), {}) for place in survivors]
            for uploads in product(*(each.values() for each in contents)):
                if any(upload is None for upload in uploads) or self._is_sum(uploads, result, self._words_of(sums)):
                    return True
        return False

    def _is_sum(self, uploads: Sequence[_Upload], result: Payload, form: FixedPoint) -> bool:
        masked = [upload for upload in uploads if isinstance(upload, tuple)]
        plain = [upload for upload in uploads if isinstance(upload, np.ndarray)]
        if result.dtype == np.float32:
            return not masked and np.allclose(weighted_average(plain), result, rtol=1e-6, atol=1e-30)
        weight, contributors, words = form.read(result)
        weighs = weight == sum(alpha for alpha, _ in masked) and contributors == len(uploads)
        return not plain and weighs and np.array_equal(sum(each for _, each in masked), words)

    def _checkpoint(self, peer: Standing, checkpoint: Checkpoint) -> None:
        if checkpoint.round > self._rounds:
            return
        before = self._bases.get(peer.place, self._initial)
        self._bases[peer.place] = base = checkpoint.base
        if base is before or base.tobytes() in self._released or base.tobytes() == before.tobytes():
            return
        sessions = self._sessions.values()
        if any(self._replaced(base, None, sums) for sums in sessions):
            self._released.add(base.tobytes())
            return
        # It may have caught up with a released average since its last checkpoint.
        others = [np.frombuffer(released, np.float32) for released in sorted(self._whole())]
        if not any(self._replaced(base, each, sums) for each in (before, *others) for sums in sessions):
            raise InvariantViolated(f"{peer.name} adopts a base in round {checkpoint.round - 1} that nobody computed")

    def _whole(self) -> set[bytes]:
        """Return the averages of all sessions whose results are all known, and the initial model."""
        whole = {self._initial.tobytes()}
        for sums in self._sessions.values():
            if sums.chunks and len(sums.results) == sums.chunks:
                whole.add(np.concatenate([sums.results[chunk][1] for chunk in range(sums.chunks)]).tobytes())
        return whole

    def _replaced(self, base: Vector, before: Vector | None, sums: _Sums) -> bool:
        """Return whether each chunk of `base` is a result of the session, or, where there is one, that of `before`."""
        for chunk in range(sums.chunks):
            part = slice(*self._bounds(len(base), sums.chunks, chunk))
            result = sums.results.get(chunk)
            computed = result is not None and base[part].tobytes() == result[1].tobytes()
            kept = before is not None and base[part].tobytes() == before[part].tobytes()
            if not (computed or kept):
                return False
        return sums.chunks > 0
