"""When an average is released: enough members of a session signed the same survivors, and every chunk's result.

Who shows these statements proves it to anybody, whoever it is.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from p2pfl.core.canonical import Value, canonical
from p2pfl.core.errors import Malformed, RemoteError
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.machine import Bytes, Vector
from p2pfl.core.statements import Enrolment, Result, Statement, Vote
from p2pfl.crypto.ring import WEIGHT_ONE
from p2pfl.gossip.chunks import Format, digest, pair
from p2pfl.gossip.grouping import bearable_colluders, threshold
from p2pfl.gossip.secure_sum import MaskTerms


class Keyring(Protocol):
    """Signs this peer's statements, and checks others'."""

    def sign(self, body: bytes) -> bytes:
        """Return this peer's signature of a statement's body."""

    def verify(self, signer: int, body: bytes, signature: bytes) -> None:
        """Check that the member at this place of the roster signed the body.

        Raises:
            BadSignature: it did not.
        """


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session is held to.

    Attributes:
        charter: its hash.
        roster: all members' peer ids; members are named by their place in it.
        me: this peer's place.
        round: the number.
        group: the places of all members of this peer's group in this round, ascending.
        colluders: how many members may work together against the others without learning or forging anything.
        least: fewest members in a sum.
        parameters: length of the vector.
        patience: seconds that a group waits for members that are slow to take part.
        centre: in a star, the member that has a link to each other one and averages alone; None in a group, where each
            averages a chunk.
        least_weight: the smallest that a member may have, in units of 1 / WEIGHT_ONE.
    """

    charter: bytes
    roster: tuple[PeerId, ...]
    me: int
    round: Round
    group: tuple[int, ...]
    colluders: int
    least: int
    parameters: int
    patience: float
    centre: int | None = None
    least_weight: int = WEIGHT_ONE

    def format(self, members: tuple[int, ...], masks: MaskTerms | None, base: bytes) -> Format:
        """Return how the chunks and results of a session of these members are written.

        Args:
            members: who began it.
            masks: how vectors are masked; None in the clear.
            base: the digest of the base that its changes are from; empty for whole models.

        Raises:
            Malformed: changes are not averaged here.
        """
        if masks is None and base:
            raise Malformed("a session that averages changes, where whole models are averaged")
        ring = None if masks is None else masks.of(base).ring(len(members))
        return Format(self.parameters, len(self.aggregators(members)), ring, self.least_weight, base)

    def bears(self, members: Collection[int]) -> bool:
        """Return whether a session of these members is allowed."""
        enough = len(members) >= self.least and bearable_colluders(len(members)) >= self.colluders
        return enough and (self.centre is None or self.centre in members)

    def aggregators(self, members: tuple[int, ...]) -> tuple[int, ...]:
        """Return who averages the chunks of a session of these members, in the chunks' order."""
        return members if self.centre is None or not members else (self.centre,)


def session_id(terms: Terms, enrolment: Enrolment) -> bytes:
    """Return the 32 bytes that every later statement of a session refers to."""
    values: list[Value] = [
        "p2pfl/session/1",
        terms.charter,
        terms.round,
        enrolment.attempt,
        terms.colluders,
        terms.least,
        terms.centre,
    ]
    return hashlib.sha256(
        canonical([*values, terms.parameters, list(enrolment.members), list(enrolment.adverts), enrolment.base])
    ).digest()


def certified(votes: Mapping[int, Vote], members: Sequence[int], least: int) -> tuple[int, ...] | None:
    """Return the survivors that T of the members signed, if there are such."""
    counted = Counter(vote.survivors for who, vote in votes.items() if who in members)
    for survivors, count in counted.items():
        if count >= threshold(len(members)) and len(survivors) >= least and set(survivors) <= set(members):
            return survivors
    return None


@dataclass(frozen=True, slots=True)
class Released:
    """The average of some round's session, as its signed statements describe it.

    Attributes:
        round: the session's.
        session: its 32 bytes.
        members: who began it.
        survivors: who of them is in the sum.
        digests: of the result of each chunk.
        format: of the results.
        proof: the statements that show all this.
    """

    round: Round
    session: bytes
    members: tuple[int, ...]
    survivors: tuple[int, ...]
    digests: tuple[bytes, ...]
    format: Format
    proof: tuple[Statement, ...]

    def is_as(self, other: "Released") -> bool:
        """Return whether the other's average is this one, bit for bit, whoever's signatures show it."""
        return (self.session, self.digests) == (other.session, other.digests)

    def open(self, data: Bytes) -> Vector | None:
        """Return the average, float32 [parameters], from the bytes of `Session.released`; None if they are others."""
        average: Vector = np.empty(self.format.parameters, np.float32)
        end = 4 * self.format.parameters if self.format.base else 0
        base = data[:end].view(np.dtype("<f4")) if end else None
        if base is not None and digest(base) != self.format.base:
            return None
        for chunk, expected in enumerate(self.digests):
            part = data[end : (end := end + self.format.size(chunk))]
            if digest(part) != expected:
                return None
            try:
                self.format.decode_into(average, chunk, self.format.read(part), len(self.survivors), base=base)
            except RemoteError:
                return None
        return average


def verified_release(
    sessions: Sequence[Terms], keyring: Keyring, statements: Sequence[Statement], masks: MaskTerms | None = None
) -> Released:
    """Check that a session of a round released an average; never take a peer's word for it, nor its model.

    Args:
        sessions: what those of each group, or star, are held to in the round that the enrolment among the statements
            names; whose terms they are otherwise does not matter.
        keyring: checks the signatures.
        statements: as `Session.proof` gives them.
        masks: how that round's vectors are masked; None where they are not.

    Raises:
        RemoteError: the statements do not prove it.
    """
    first = statements[0].content if statements else None
    if not isinstance(first, Enrolment):
        raise Malformed("sent an average without its enrolment")
    members = first.members
    terms = next((each for each in sessions if set(members) <= set(each.group) and each.bears(members)), None)
    if terms is None or first.round != terms.round:
        raise Malformed("sent an average of members who are no group of its round")
    aggregators = terms.aggregators(members)
    session = session_id(terms, first)
    votes: dict[int, Vote] = {}
    digests: dict[int, bytes] = {}
    for statement in statements[1:]:
        content = statement.content
        if not isinstance(content, Vote | Result) or content.session != session or statement.signer not in members:
            raise Malformed("sent an average with a statement that does not belong to it")
        keyring.verify(statement.signer, statement.body, statement.signature)
        if isinstance(content, Vote):
            votes[statement.signer] = content
        elif content.chunk < len(aggregators) and statement.signer in pair(aggregators, content.chunk):
            digests[content.chunk] = content.digest
    survivors = certified(votes, members, terms.least)
    if survivors is None or len(digests) != len(aggregators):
        raise Malformed("sent an average that is not certified")
    named = tuple(digests[chunk] for chunk in range(len(aggregators)))
    written = terms.format(members, masks, first.base)
    return Released(first.round, session, members, survivors, named, written, tuple(statements))
