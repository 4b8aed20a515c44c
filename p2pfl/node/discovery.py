"""Where members can be reached: by the charter, by what they signed since, by what the LAN says.

A member whose address is not the charter's any more signs an address record and tells its links; they pass it on. So
one member that is still reached is enough to be found by all. A record is believed because its member signed it, and
the newest counts. What mDNS says anybody on the LAN may have made up: it is tried last. No address is trusted in any
case: the channel proves who is at the other end.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import BadSignature, NotAMember, WrongCharter
from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.wire import MAX_ADDRESSES, Whereabouts
from p2pfl.crypto.identity import Identity, verify_signature

DOMAIN = "p2pfl/whereabouts/1"
MOST_HINTS = 4
"""Addresses from the LAN that are tried for one member."""
LEAST_INTERVAL = Seconds(5.0)
"""Between two new records of a member; what comes sooner is dropped, or one member could have all others gossip."""
MOST_TOLD = 64
"""Records that a new link is told; a quarter of its queue. Members that move are few."""


def sign_whereabouts(identity: Identity, charter: bytes, sequence: int, addresses: Sequence[str]) -> Whereabouts:
    """Return the record by which a member says where it is.

    Args:
        identity: the member's.
        charter: the charter's hash.
        sequence: higher than in any earlier record of the member, such as the seconds since 1970.
        addresses: multiaddresses, at most `MAX_ADDRESSES`.
    """
    told = tuple(addresses[:MAX_ADDRESSES])
    signature = identity.sign(DOMAIN, _signed(charter, sequence, told))
    return Whereabouts(charter, Round(0), identity.peer_id, sequence, told, signature)


def verify_whereabouts(record: Whereabouts) -> None:
    """Check that the member it is about signed a record.

    Raises:
        BadSignature: it did not.
    """
    signed = _signed(record.charter, record.sequence, record.addresses)
    verify_signature(PeerId(record.member), DOMAIN, signed, record.signature)


def _signed(charter: bytes, sequence: int, addresses: Sequence[str]) -> bytes:
    return canonical([charter, sequence, list(addresses)])


class Directory:
    """Addresses of the other members: the charter's, and what was learned since.

    Args:
        me: this peer.
        charter: the charter's hash.
        addresses: of each other member, by the charter.
        sign: makes this peer's own record with a sequence number; None where the charter's addresses hold.
        sequence: that the first such record gets.
    """

    def __init__(
        self,
        me: PeerId,
        charter: bytes,
        addresses: Mapping[PeerId, Sequence[str]],
        sign: Callable[[int], Whereabouts] | None = None,
        sequence: int = 1,
    ) -> None:
        self._me = me
        self._charter = charter
        self._known = addresses
        self._sign = sign
        self._records: dict[PeerId, Whereabouts] = {}
        self._learned_at: dict[PeerId, Seconds] = {}
        self._hints: dict[PeerId, tuple[str, ...]] = {}
        if sign is not None:
            self._records[me] = sign(sequence)

    @property
    def members(self) -> Iterable[PeerId]:
        """The other members."""
        return self._known

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Return where to look for a member, the likeliest place first."""
        record = self._records.get(peer)
        told = () if record is None else record.addresses
        return tuple(dict.fromkeys((*told, *self._known[peer], *self._hints.get(peer, ()))))

    def records(self) -> list[Whereabouts]:
        """Return what to tell a new link: this peer's own record first, then the newest of others."""
        newest = sorted(self._records.values(), key=lambda each: (each.member != self._me, -each.sequence))
        return newest[:MOST_TOLD]

    def learn(self, record: Whereabouts, sender: PeerId, now: Seconds) -> Whereabouts | None:
        """Take a record in, and return what to tell the other links; None where it is no news.

        Raises:
            RemoteError: what the sender must not have sent.
        """
        member = PeerId(record.member)
        if record.charter != self._charter:
            raise WrongCharter("sent an address record under another charter", sender)
        if member != self._me and member not in self._known:
            raise NotAMember("sent the address record of somebody who is no member", sender)
        if not self._is_newer(record) or self._is_too_soon(member, now):
            return None
        try:
            verify_whereabouts(record)
        except BadSignature as error:
            raise BadSignature("sent an address record that its member did not sign", sender) from error
        if member == self._me:
            # Of a former life, whose clock was ahead of ours.
            return self._outbid(record)
        self._records[member], self._learned_at[member] = record, now
        return record

    def hint(self, peer: PeerId, address: str) -> bool:
        """Note what the LAN says of a member; return whether that is news."""
        held = self._hints.get(peer, ())
        if peer not in self._known or address in self.addresses(peer):
            return False
        self._hints[peer] = (address, *held)[:MOST_HINTS]
        return True

    def _is_newer(self, record: Whereabouts) -> bool:
        held = self._records.get(PeerId(record.member))
        return held is None or record.sequence > held.sequence

    def _is_too_soon(self, member: PeerId, now: Seconds) -> bool:
        return member in self._learned_at and now - self._learned_at[member] < LEAST_INTERVAL

    def _outbid(self, record: Whereabouts) -> Whereabouts | None:
        if self._sign is None:
            return None
        own = self._records[self._me] = self._sign(record.sequence + 1)
        return own
