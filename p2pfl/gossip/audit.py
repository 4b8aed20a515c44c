"""Whether the results of a masked session are the survivors' sums: every survivor multiplies what it contributed.

Once all results are signed, survivors draw random words together (`Challenge`): for each chunk from the nonces of all
but the two that may sign it. Each signs the random products of its own words (`Products`), hidden by a short pad for
each pair of survivors, which cancels in the sum. So the sum must be the products of the result.

The signer's own product comes from the other of the two, who holds the signer's upload: otherwise it could put right
there what it falsified. That upload is under the masks that the signer shares with the other survivors, so these put
the same on their words instead of a pad: one stream each, and no other stream is made again. Where the other did not
survive, or there is none as in stars, the signer's own word counts, and the verdict is `UNBOUND`.

Pure bookkeeping and arithmetic; `p2pfl.gossip.session` owns messages and deadlines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from p2pfl.core.canonical import Value, canonical
from p2pfl.core.machine import Bytes, Payload
from p2pfl.core.statements import Challenge, Products, Result, SecondChallenge, SecondProducts, Statement
from p2pfl.crypto.masks import Mask, MaskedVector
from p2pfl.crypto.products import PRODUCT_BYTES, Source, add_up, pads, products, unmasked, words_of
from p2pfl.crypto.ring import Layout
from p2pfl.crypto.suite import Suite
from p2pfl.gossip.statement_store import Statements, said_as

CHALLENGES: tuple[type[Challenge], ...] = (Challenge, SecondChallenge)
PRODUCTS_OF: tuple[type[Products], ...] = (Products, SecondProducts)
"""There are two runs: first all results are checked, then those that replace refuted ones."""


class Verdict(StrEnum):
    """What became of a chunk's check.

    PASSED: its result is the sum. UNBOUND: it is, if its signer's own product is true. AGREED: aggregator and deputy
    made the same result, and somebody's product contradicts both. INCOMPLETE: a survivor's word was not here in time;
    the result counts as if there were no check. LOST: nobody's result withstood it; or one was refuted, not by its
    signer's own signatures, and what replaces it could not be checked.
    """

    PASSED = "passed"
    UNBOUND = "unbound"
    AGREED = "agreed"
    INCOMPLETE = "incomplete"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Refuted:
    """A result that does not count.

    Attributes:
        signer: whose it is.
        digest: its own.
        rival: who signed another of the same chunk, which contradicts it; None if products do.
    """

    signer: int
    digest: bytes
    rival: int | None = None

    @property
    def is_proven(self) -> bool:
        """Whether its signer lied, whoever else did."""
        return self.rival == self.signer

    def contradicts(self, content: Result, signer: int) -> bool:
        """Return whether the same member signed another result."""
        return signer == self.signer and content.digest != self.digest

    @property
    def why(self) -> str:
        """How it came out."""
        if self.rival is None:
            return "the survivors' products contradict it"
        return "it signed another, too" if self.is_proven else "the other that may sign it signed another"


@dataclass
class Audit:
    """Where the check of a session's results stands.

    Attributes:
        run: 0, or 1 for the results that replace refuted ones.
        pending: the chunks that this run checks and has no verdict of; None before it begins.
        results: by chunk: what is signed and here, and not adopted before it has a verdict.
        verdicts: by chunk; final.
        refuted: by chunk.
        rivals: by chunk, a result that contradicts the one that is here.
        evidence: by chunk, the results that were refuted, or contradicted; for those that have another.
        products: by chunk of this run: of the own words, of the signer's if this peer vouches for them, and the
            result's.
        signers: of the chunks that are being multiplied, or were in this run: whose results count as signed.
        second: those whose words another run than this peer's was about: it came later, and only watches.
        since: when this peer began to wait for the results of this run.
        rejected: of which chunk whose result does not count: it was refuted; of all, where one cannot be any.
    """

    run: int = 0
    pending: set[int] | None = None
    results: dict[int, Payload] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    refuted: dict[int, Refuted] = field(default_factory=dict)
    rivals: dict[int, Statement] = field(default_factory=dict)
    evidence: dict[int, list[Statement]] = field(default_factory=dict)
    products: dict[int, tuple[bytes, bytes, bytes]] = field(default_factory=dict)
    signers: dict[int, int] = field(default_factory=dict)
    second: set[int] = field(default_factory=set)
    since: float | None = None
    rejected: set[tuple[int, int]] = field(default_factory=set)

    @property
    def challenge(self) -> type[Challenge]:
        """The kind of this run's challenges."""
        return CHALLENGES[self.run]

    @property
    def statement(self) -> type[Products]:
        """The kind of this run's products."""
        return PRODUCTS_OF[self.run]

    def told(self, chunk: int, statements: Statements, session: bytes) -> Mapping[int, Products]:
        """Return what members say of a chunk's products."""
        return statements.of(PRODUCTS_OF[-1] if chunk in self.second else self.statement, session)

    def is_rival(self, content: Result, held: Result | None) -> bool:
        """Return whether a holder's result contradicts the one that is here, while either may be right."""
        chunk = content.chunk
        is_open = self.run == 0 and chunk not in self.verdicts and chunk not in self.refuted
        return is_open and held is not None and held.digest != content.digest

    def has_refuted(self, statement: Statement) -> bool:
        """Return whether this very statement was refuted, or contradicted."""
        return any(each.body == statement.body for evidence in self.evidence.values() for each in evidence)

    def proves(self, content: Result, signer: int) -> bool:
        """Return whether a result shows that the signer of a refuted one signed two."""
        refuted = self.refuted.get(content.chunk)
        return refuted is not None and not refuted.is_proven and refuted.contradicts(content, signer)

    def is_lost(self, chunk: int) -> bool:
        """Return whether nobody's result of a chunk counts any more."""
        return self.verdicts.get(chunk) is Verdict.LOST

    def close(self, chunk: int, verdict: Verdict) -> None:
        """Keep a chunk's verdict."""
        self.verdicts[chunk] = verdict
        if self.pending is not None:
            self.pending.discard(chunk)

    def refute(self, chunk: int, refuted: Refuted, evidence: Sequence[Statement]) -> None:
        """Keep that a result does not count; what replaces it is for the second run, wherever the first one is."""
        self.refuted.setdefault(chunk, refuted)
        self.rejected.add((chunk, refuted.signer))
        self.evidence.setdefault(chunk, []).extend(evidence)
        if self.pending is not None:
            self.pending.discard(chunk)

    def due(self, chunks: int) -> set[int]:
        """Return which of so many chunks this run is about."""
        due = set(range(chunks)) - self.verdicts.keys()
        return due - self.refuted.keys() if self.run == 0 else due

    def unknown_to(self, challenge: Challenge, results: Mapping[int, Statement]) -> list[Statement]:
        """Return what shows whoever signed a challenge of the first run that chunks have other results, too.

        Args:
            challenge: its own.
            results: that are here, by chunk.
        """
        known = [*results.values(), *(each for evidence in self.evidence.values() for each in evidence)]
        return [each for each in known if not _is_named(challenge.digests, said_as(Result, each))]

    def end_run(self) -> None:
        """Go on to the results that replace refuted ones."""
        if self.run + 1 < len(CHALLENGES):
            self.run, self.pending, self.products, self.signers = self.run + 1, None, {}, {}
            self.since = None

    def summary(self, chunks: int) -> str:
        """Return the worst verdict of so many chunks, `refuted` before it if a result was."""
        found = set(self.verdicts.values())
        if len(self.verdicts) < chunks:
            found.add(Verdict.INCOMPLETE)
        worst = next(each for each in reversed(Verdict) if each in found)
        return f"refuted, {worst}" if self.refuted else str(worst)

    def statement_of(self, chunks: int) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Return the own products and those vouched for, as far as they are made, for each of so many chunks."""
        made = [self.products.get(chunk, (b"", b"", b"")) for chunk in range(chunks)]
        return tuple(each[0] for each in made), tuple(each[1] for each in made)


def challenge_key(
    suite: Suite,
    session: bytes,
    run: int,
    result: Result,
    survivors: Sequence[int],
    holders: Sequence[int],
    statements: Statements,
) -> tuple[bytes, int] | None:
    """Return what a chunk is multiplied with: the key of random words, and who counts as the result's signer.

    Where aggregator and deputy signed the same, members hold the one's or the other's word for it; so who is not to
    tell its own products follows from what those say that draw the words: the aggregator, if one has its signature.

    Args:
        suite: the charter's.
        session: its id.
        run: of the audit.
        result: of the chunk.
        survivors: the certified ones.
        holders: the two that may sign the result; their nonces do not count, so that neither can choose its lie by
            the words that will be drawn.
        statements: with the run's challenges.

    Returns:
        None until all that draw the words have challenged.
    """
    said, nonces, chunk = statements.of(CHALLENGES[run], session), list[Value](), result.chunk
    for who in survivors:
        if who in holders:
            continue
        if who not in said or not _is_named(said[who].digests, result):
            return None
        nonces.append([who, said[who].nonce])
    if not nonces:
        return None
    all_by_deputy = all(said[who].by_deputy >> chunk & 1 for who in survivors if who not in holders)
    drawn = suite.hash(canonical([run, chunk, result.digest, list(survivors), nonces]))
    key = suite.hkdf(drawn, session, canonical(["p2pfl/audit/1", suite.name]), suite.key_bytes)
    return key, holders[1 if all_by_deputy else 0]


def _is_named(digests: Sequence[bytes], result: Result) -> bool:
    return digests[result.chunk : result.chunk + 1] == (result.digest,)


@dataclass(frozen=True, slots=True)
class Own:
    """What of a chunk this peer contributed.

    Attributes:
        hidden: all of it.
        streams: the mask that it shares with the result's signer, if another vouches for that one's words.
        pairs: those with all other survivors, to make pads of.
    """

    hidden: MaskedVector
    streams: tuple[Mask, ...] = field(repr=False)
    pairs: tuple[Mask, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Vouched:
    """The upload of the result's signer, uint8 [size of the chunk], and what takes all but pair masks off it."""

    upload: Bytes
    masks: tuple[Mask, ...] = field(repr=False)


def multiply(
    suite: Suite, layout: Layout, chunk: int, key: bytes, result: Bytes, own: Own | None, vouched: Vouched | None
) -> tuple[bytes, bytes, bytes]:
    """Return the products of the own words under their pads, of those vouched for, and of the result; empty for none.

    Raises:
        LocalError: a length is wrong.
    """
    sources: dict[int, Source] = {2: words_of(result)}
    if own is not None:
        sources[0] = partial(own.hidden.block_into, chunk, masks=own.streams)
    if vouched is not None:
        sources[1] = unmasked(suite, layout, chunk, vouched.upload, vouched.masks)
    found = dict(zip(sources, products(suite, layout, chunk, key, tuple(sources.values())), strict=True))
    if own is not None:
        found[0] = add_up(layout.bits, [found[0], pads(suite, key, own.pairs)])
    return found.get(0, b""), found.get(1, b""), found[2]


def is_bound(survivors: Sequence[int], other: int | None) -> bool:
    """Return whether somebody else than a result's signer tells the signer's products.

    Args:
        survivors: the certified ones.
        other: who could have signed it instead, and holds the signer's upload; None if there is no such.
    """
    return other is not None and other in survivors


def verdict_of(
    bits: int,
    chunk: int,
    signer: int,
    other: int | None,
    survivors: Sequence[int],
    said: Mapping[int, Products],
    result: bytes | None,
) -> tuple[Verdict, bool] | None:
    """Compare the survivors' products with the result's.

    Args:
        bits: of the ring.
        chunk: which.
        signer: of the result.
        other: as for `is_bound`.
        survivors: the certified ones.
        said: the run's products.
        result: the result's own; None until they are made.

    Returns:
        What the verdict is if they are equal, and whether they are; `INCOMPLETE` if a survivor could not tell its own;
        None while one is missing.
    """
    bound, summands = is_bound(survivors, other), []
    for who in survivors:
        teller = other if who == signer and bound and other is not None else who
        if teller not in said:
            continue
        told = said[teller].witnessed if who == signer and bound else said[teller].products
        summand = told[chunk] if chunk < len(told) else b""
        if len(summand) != PRODUCT_BYTES:
            return Verdict.INCOMPLETE, True
        summands.append(summand)
    if len(summands) < len(survivors) or result is None:
        return None
    return Verdict.PASSED if bound else Verdict.UNBOUND, add_up(bits, summands) == result
