"""What one peer keeps secret in one attempt at a masked sum, and what it does with that.

    advert     two fresh public keys, and a commitment to the seed of the self mask
    deal       to each member, sealed: a share of that seed, and of the private mask key; for all: what shows a lie
    masked     the vector, with noise where the charter says so, under the self mask and one mask for each other member
    reveal     once survivors are certified: the seed of the own self mask, and the pair keys with the dropped
    give_back  for survivors that stay silent: shares of their seeds; of the dropped then: shares of their mask keys
    leftover   the masks that remain in the survivors' sum, once enough of that is here

Of no member both is ever revealed: the self mask's seed of those in the sum, the pair keys of those that are not. So
nobody, aggregators included, learns more than the sum (Bonawitz et al., CCS 2017; Bell et al., CCS 2020), as long as at
most min(2T - n - 1, n - 2) members work together and T = ceil(3n/4) shares are needed.

Everything here lives in memory only and serves one session: the session's id is in every key.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import Malformed, OutOfTurn, RemoteError
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.machine import Bytes, Vector
from p2pfl.core.privacy import Noise
from p2pfl.core.statements import Deal, Returned, Reveal
from p2pfl.crypto.agreement import KeyPair, key_pair, mask_secret
from p2pfl.crypto.envelope import seal, unseal
from p2pfl.crypto.gaussian import Gaussian
from p2pfl.crypto.masks import (
    Mask,
    MaskedVector,
    add_chunk,
    leftover_masks,
    own_masks,
    pair_masks,
    self_key,
    unmask,
)
from p2pfl.crypto.private import private_words
from p2pfl.crypto.ring import WEIGHT_ONE, Layout, Metrics, Ring, read_header, verify_clipped
from p2pfl.crypto.shares import (
    SECRET_BYTES,
    SHARE_BYTES,
    Share,
    commit,
    recover,
    split,
    verified_shares,
    verify_commitment,
    verify_share,
)
from p2pfl.crypto.suite import Suite
from p2pfl.gossip.grouping import threshold

CHANGE_BITS = 16
"""Of the words in which changes are summed."""
Entropy = Callable[[int], bytes]
Words = NDArray[np.int32]
_SEED, _PAIR = "self-mask", "pair"


@dataclass(frozen=True)
class MaskTerms:
    """How vectors are masked.

    Attributes:
        suite: the charter's.
        bits: of the ring's words, 32 or 16.
        clip: the largest |alpha x| that is represented.
        entropy: gives bytes that nobody can foresee, never the same again.
        change_clip: the largest |alpha x| of a change, where members that share a base average what they changed in it,
            in words of 16 bits; None where whole models are averaged throughout.
        audit: whether sums are checked before anybody adopts them.
        noise: what each adds to its update, which is bounded in its L2 norm then; None for nothing.
    """

    suite: Suite
    bits: int
    clip: float
    entropy: Entropy = field(repr=False)
    change_clip: float | None = None
    audit: bool = True
    noise: Noise | None = None

    @property
    def advert_bytes(self) -> int:
        """The length of what an advert carries."""
        return 2 * self.suite.agreement.public_bytes + SECRET_BYTES

    def ring(self, members: int) -> Ring:
        """Return the ring of a session of so many members."""
        return Ring(self.bits, members, self.clip, 0.0 if self.noise is None else self.noise.deviation)

    def of(self, base: bytes) -> "MaskTerms":
        """Return the terms of a session: of changes from the base with this digest, or of whole models if it is empty.

        Raises:
            Malformed: changes are not averaged here.
        """
        if not base:
            return self
        if self.change_clip is None:
            raise Malformed("a session that averages changes, where whole models are averaged")
        return replace(self, bits=CHANGE_BITS, clip=self.change_clip)


@dataclass(frozen=True)
class Advertised:
    """What a member's advert says of its secrets."""

    mask_key: bytes
    wrap_key: bytes
    commitment: bytes

    @classmethod
    def read(cls, terms: MaskTerms, keys: bytes) -> "Advertised":
        """Take an advert's bytes apart.

        Raises:
            Malformed: they have another length.
        """
        if len(keys) != terms.advert_bytes:
            raise Malformed(f"an advert with {len(keys)} bytes of keys; it has {terms.advert_bytes}")
        size = terms.suite.agreement.public_bytes
        return cls(keys[:size], keys[size : 2 * size], keys[2 * size :])


class Secrets:
    """A peer's secrets of one attempt. Its `repr` shows none."""

    def __init__(self, terms: MaskTerms, roster: Sequence[PeerId], me: int, round: Round, context: bytes) -> None:
        """Draw them.

        Args:
            terms: how vectors are masked.
            roster: all members' peer ids, by place.
            me: this peer's place.
            round: the number.
            context: of which round and attempt; nothing committed to in another counts here.
        """
        self._terms = terms
        self._roster = roster
        self._me = me
        self._round = round
        self._context = context
        agreement = terms.suite.agreement
        self._mask_key: KeyPair = key_pair(agreement, terms.entropy(SECRET_BYTES))
        self._wrap_key: KeyPair = key_pair(agreement, terms.entropy(SECRET_BYTES))
        self._seed = terms.entropy(SECRET_BYTES)
        self._noise_seed = b"" if terms.noise is None else terms.entropy(SECRET_BYTES)
        self._session = b""
        self._members: tuple[int, ...] = ()
        self._others: dict[int, Advertised] = {}
        self._pairs: dict[int, bytes] = {}
        self._wraps: dict[int, bytes] = {}
        self._deals: dict[int, Deal] = {}
        self._held: dict[int, tuple[Share, Share]] = {}

    def __repr__(self) -> str:
        return f"Secrets(member {self._me})"

    def advert(self) -> bytes:
        """Return what the advert carries: the public keys, and a commitment to the self mask's seed."""
        commitment = commit(self._terms.suite, _SEED, self._about(self._me), self._seed)
        return self._mask_key.public + self._wrap_key.public + commitment

    # Set-up

    def begin(self, session: bytes, members: tuple[int, ...], adverts: Mapping[int, bytes]) -> Deal:
        """Take the session that all are to begin, and return this peer's deal.

        Raises:
            RemoteError: an advert's keys are no keys; names the member.
        """
        suite, agreement = self._terms.suite, self._terms.suite.agreement
        self._session, self._members = session, members
        for member in members:
            self._others[member] = Advertised.read(self._terms, adverts[member])
            if member == self._me:
                continue
            other, peer = self._others[member], self._roster[member]
            try:
                shared = agreement.shared_secret(self._mask_key.private, other.mask_key)
                self._wraps[member] = agreement.shared_secret(self._wrap_key.private, other.wrap_key)
            except Malformed as error:
                raise Malformed(error.reason, peer) from error
            self._pairs[member] = mask_secret(suite, shared, session, self._roster[self._me], peer)
        return self._deal()

    def _deal(self) -> Deal:
        terms, members = self._terms, self._members
        holders, needed = len(members), max(2, threshold(len(members)))
        about = self._about(self._me)
        seeds = split(terms.suite, about + b"seed", self._seed, needed, holders, terms.entropy)
        keys = split(terms.suite, about + b"key", self._mask_key.private, needed, holders, terms.entropy)
        sealed = []
        for index, member in enumerate(members):
            message = seeds.shares[index].to_bytes() + keys.shares[index].to_bytes()
            if member == self._me:
                self._held[member] = (seeds.shares[index], keys.shares[index])
                sealed.append(b"")
            else:
                me, peer = self._roster[self._me], self._roster[member]
                sealed.append(seal(terms.suite, self._wraps[member], self._session, me, peer, message))
        pairs = tuple(b"" if who == self._me else self._pair_commitment(who, self._pairs[who]) for who in members)
        return Deal(self._round, self._session, seeds.commitments, keys.commitments, pairs, tuple(sealed))

    def accept(self, dealer: int, deal: Deal) -> None:
        """Check another member's deal, and keep this peer's shares of it.

        Raises:
            RemoteError: it is not what that member must deal; names it.
        """
        members, peer = self._members, self._roster[dealer]
        if any(len(part) != len(members) for part in (deal.of_seed, deal.of_key, deal.pairs, deal.sealed)):
            raise Malformed("dealt to another number of members", peer)
        place = members.index(self._me)
        if deal.pairs[place] != self._pair_commitment(dealer, self._pairs[dealer]):
            raise RemoteError("committed to another pair key than ours", peer)
        sealed = deal.sealed[place]
        opened = unseal(self._terms.suite, self._wraps[dealer], self._session, peer, self._roster[self._me], sealed)
        if len(opened) != 2 * SHARE_BYTES:
            raise Malformed(f"dealt {len(opened)} bytes; two shares have {2 * SHARE_BYTES}", peer)
        seed = Share.from_bytes(opened[:SHARE_BYTES], peer)
        key = Share.from_bytes(opened[SHARE_BYTES:], peer)
        suite, about = self._terms.suite, self._about(dealer)
        verify_share(suite, about + b"seed", seed, place + 1, deal.of_seed, peer)
        verify_share(suite, about + b"key", key, place + 1, deal.of_key, peer)
        self._held[dealer] = (seed, key)
        self._deals[dealer] = deal

    def took(self, deal: Deal) -> None:
        """Keep this peer's own deal, as it was sent."""
        self._deals[self._me] = deal

    @property
    def accepted(self) -> frozenset[int]:
        """Whose deals are here and right."""
        return frozenset(self._deals)

    # The vector

    def hidden(
        self, vector: Vector, weight: int, metrics: Metrics, count: int, named: bytes = b"", base: Vector | None = None
    ) -> MaskedVector:
        """Return the vector, float32 [n], under this peer's masks, which are computed where it is read.

        With noise only once: of a second vector under the same noise the difference would be plain.

        Args:
            vector: nobody writes to it until all that is sent of it was read; with noise its words are in its place.
            weight: in units of 1 / WEIGHT_ONE.
            metrics: what else the header tells; nothing of it with noise.
            count: how many chunks it is cut into.
            named: the digest of the base, if what changed in it is to be summed; empty if whole models are.
            base: float32 [n]; there if changes are summed, or noise is added to what changed.

        Raises:
            RoundFailed: a value is NaN or infinite.
            InvalidConfig: too many values of a whole model are beyond the clip. Of a change, error feedback carries on
                what is cut off. With noise too many of the base, which says nothing of this peer's data; or words are
                too coarse for it.
            OutOfTurn: a second vector with noise.
        """
        terms, suite, members = self._terms.of(named), self._terms.suite, self._members
        ring, layout = terms.ring(len(members)), Layout(len(vector), count, terms.bits)
        pairs = {self._roster[who]: key for who, key in self._pairs.items()}
        masks = own_masks(self._roster[self._me], self_key(suite, self._seed, self._session), pairs)
        if terms.noise is not None:
            words = self._noised(ring, vector, base, terms.noise, with_base=not named)
            return MaskedVector(suite, ring, layout, words, weight, masks)
        values = vector if not named or base is None else _less(vector, base)
        hidden = MaskedVector(suite, ring, layout, values, weight, masks, metrics)
        if not named:
            verify_clipped(hidden.clipped, len(vector))
        return hidden

    def _noised(self, ring: Ring, vector: Vector, base: Vector | None, noise: Noise, *, with_base: bool) -> Words:
        seed, self._noise_seed = self._noise_seed, b""
        if not seed or base is None:
            raise OutOfTurn("noise for a second vector, or for one without a base")
        if with_base:
            verify_clipped(ring.count_clipped(base, WEIGHT_ONE), len(base))
        stream = Gaussian(self._terms.suite, seed, self._session, noise.deviation / ring.step)
        return private_words(ring, vector, base, noise, stream, with_base=with_base)

    def shared(self, others: Sequence[int]) -> tuple[Mask, ...]:
        """Return the masks that this peer shares with these members; its own place among them has none."""
        pairs = {self._roster[who]: self._pairs[who] for who in others if who != self._me}
        return pair_masks(self._roster[self._me], pairs)

    # Unmasking

    def reveal(self, survivors: Sequence[int]) -> Reveal:
        """Return what this peer may say once these survivors are certified: never more, whoever asks."""
        kept = self._me in survivors
        dropped = [who for who in self._members if who not in survivors]
        pairs = tuple(self._pairs[who] for who in dropped) if kept else ()
        return Reveal(self._round, self._session, self._seed if kept else b"", pairs)

    def give_back(self, survivors: Sequence[int], silent: Sequence[int]) -> Returned:
        """Return this peer's shares for survivors that say nothing: of their seeds, and of the dropped ones' keys.

        Args:
            survivors: the certified ones.
            silent: those of them that revealed nothing.
        """
        dropped = [who for who in self._members if who not in survivors]
        seeds = [(who, self._held[who][0].to_bytes()) for who in silent if who in self._held and who in survivors]
        keys = [(who, self._held[who][1].to_bytes()) for who in dropped if who in self._held]
        given = sorted([*seeds, *(keys if silent else [])])
        return Returned(self._round, self._session, tuple(who for who, _ in given), tuple(each for _, each in given))

    def silent(self, survivors: Sequence[int], reveals: Mapping[int, Reveal]) -> list[int]:
        """Return the survivors that revealed nothing, or something else than they committed to."""
        dropped = [who for who in self._members if who not in survivors]
        return [who for who in survivors if self._told(who, dropped, reveals.get(who)) is None]

    def leftover(
        self,
        survivors: Sequence[int],
        reveals: Mapping[int, Reveal],
        returned: Mapping[int, Returned],
        of: int | None = None,
    ) -> tuple[Mask, ...] | None:
        """Return what has to be added to the survivors' sum, or None while too little is here for that.

        Whoever reveals something else than it committed to counts as silent: shares replace it.

        Args:
            survivors: the certified ones.
            reveals: by member.
            returned: by member.
            of: to get what has to be added to this survivor's vector alone, which leaves its masks with the others.
        """
        suite = self._terms.suite
        dropped = [who for who in self._members if who not in survivors]
        seeds: dict[PeerId, bytes] = {}
        pairs: dict[tuple[PeerId, PeerId], bytes] = {}
        private: dict[int, bytes | None] = {}
        for who in survivors if of is None else (of,):
            told = self._told(who, dropped, reveals.get(who))
            seed = told.seed if told is not None else self._recovered(who, 0, returned)
            if seed is None:
                return None
            seeds[self._roster[who]] = self_key(suite, seed, self._session)
            for place, gone in enumerate(dropped):
                if told is not None:
                    key: bytes | None = told.pairs[place]
                else:
                    if gone not in private:
                        private[gone] = self._recovered(gone, 1, returned)
                    key = self._pair_key(who, gone, private[gone])
                if key is None:
                    return None
                pairs[self._roster[who], self._roster[gone]] = key
        return leftover_masks(seeds, [self._roster[who] for who in dropped], pairs)

    def _told(self, who: int, dropped: Sequence[int], reveal: Reveal | None) -> Reveal | None:
        """Return what a survivor revealed, if it is what it committed to."""
        suite = self._terms.suite
        if who == self._me:
            return self.reveal([each for each in self._members if each not in dropped])
        if reveal is None or len(reveal.pairs) != len(dropped) or len(reveal.seed) != SECRET_BYTES:
            return None
        try:
            verify_commitment(
                suite, _SEED, self._about(who), reveal.seed, self._others[who].commitment, self._roster[who]
            )
        except RemoteError:
            return None
        deal = self._deals[who]
        for gone, key in zip(dropped, reveal.pairs, strict=True):
            if deal.pairs[self._members.index(gone)] != self._committed(who, gone, key):
                return None
        return reveal

    def _recovered(self, who: int, part: int, returned: Mapping[int, Returned]) -> bytes | None:
        """Put together a member's seed (part 0) or private mask key (part 1) from the shares that came back."""
        shares: dict[PeerId, Share] = {}
        for holder, given in returned.items():
            if holder in self._members and who in given.owners:
                try:
                    data = given.shares[given.owners.index(who)]
                    shares[self._roster[holder]] = Share.from_bytes(data, self._roster[holder])
                except Malformed:
                    continue
        if who in self._held:
            shares[self._roster[self._me]] = self._held[who][part]
        deal = self._deals.get(who)
        needed = max(2, threshold(len(self._members)))
        if deal is None or len(shares) < needed:
            return None
        places = {self._roster[member]: index + 1 for index, member in enumerate(self._members)}
        about = self._about(who) + (b"key" if part else b"seed")
        commitments = deal.of_key if part else deal.of_seed
        good, _ = verified_shares(self._terms.suite, about, shares, places, commitments)
        if len(good) < needed:
            return None
        try:
            secret = recover(good, needed, self._roster[who])
            return self._checked(who, part, secret)
        except RemoteError:
            return None

    def _checked(self, who: int, part: int, secret: bytes) -> bytes | None:
        """Return a recovered secret if it is the one that the member's advert committed to."""
        suite, advertised = self._terms.suite, self._others[who]
        if part == 0:
            verify_commitment(suite, _SEED, self._about(who), secret, advertised.commitment, self._roster[who])
            return secret
        return secret if suite.agreement.public_key(secret) == advertised.mask_key else None

    def _pair_key(self, who: int, gone: int, private: bytes | None) -> bytes | None:
        """Return the pair key of a silent survivor and a dropped member, from the latter's private key."""
        if who == self._me:
            return self._pairs[gone]
        if private is None:
            return None
        shared = self._terms.suite.agreement.shared_secret(private, self._others[who].mask_key)
        return mask_secret(self._terms.suite, shared, self._session, self._roster[who], self._roster[gone])

    # What commitments are about

    def _about(self, who: int) -> bytes:
        return canonical([self._context, self._roster[who]])

    def _pair_commitment(self, other: int, key: bytes) -> bytes:
        return self._committed(self._me, other, key)

    def _committed(self, one: int, other: int, key: bytes) -> bytes:
        low, high = sorted((self._roster[one], self._roster[other]))
        digest = self._terms.suite.hash(key)  # a key of SM4 is shorter than what `commit` takes
        return commit(self._terms.suite, _PAIR, canonical([self._session, low, high]), digest)


def _less(vector: Vector, base: Vector) -> Vector:
    """Return the change from the base, in the place of the vector if it can be written to."""
    return np.subtract(vector, base, out=vector if vector.flags.writeable else None)


def masked_chunk(hidden: MaskedVector, index: int) -> Bytes:
    """Return a chunk as it is sent, uint8 [its size]."""
    chunk: Bytes = np.empty(hidden.layout.chunk(index).size, np.uint8)
    hidden.block_into(index, 0, chunk.data)
    return chunk


def sum_chunk(
    terms: MaskTerms, ring: Ring, layout: Layout, index: int, chunks: Sequence[Bytes], masks: Sequence[Mask]
) -> Bytes:
    """Sum the survivors' masked chunks, and take off what masks are left.

    Args:
        terms: how vectors are masked.
        ring: of the session's members.
        layout: how they are cut.
        index: which chunk.
        chunks: one of each survivor, uint8 [its size]; the first becomes the sum if it can be written to.
        masks: of `Secrets.leftover`.

    Returns:
        The integer sum, uint8 [size of the chunk]: header and words, little endian.

    Raises:
        RemoteError: a mask is left, or somebody's chunk lied.
    """
    total = chunks[0] if chunks[0].flags.writeable else chunks[0].copy()
    view = total.data
    for chunk in chunks[1:]:
        add_chunk(ring, view, chunk.data)
    unmask(terms.suite, layout, index, view, masks)
    read_header(view, len(chunks), ring.members)
    return total
