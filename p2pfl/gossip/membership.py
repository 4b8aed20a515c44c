"""Who is here: what this peer knows first-hand of the other members, and whom a round waits for.

Nothing here decides who belongs to a round: that is the roster's matter, and equal for all. This is one peer's view,
and only says for whom it is worth waiting.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from p2pfl.core.ids import Round

NO_ROUND = Round(-1)


class Standing(StrEnum):
    """How a member seems from here."""

    HERE = "here"
    LATE = "late"
    UNREACHABLE = "unreachable"
    LEFT = "left"


@dataclass
class Known:
    """What is known of a member.

    Attributes:
        linked: whether a link stands.
        heard_at: when it last gave a sign of life.
        claim: the latest round that it itself said it is in.
        left_after: the last round it takes part in, if it said so.
        in_step: whether it took part in the last round in which it was waited for.
        vain: in how many rounds in a row it was waited for in vain.
        again_at: the first round in which its word that it is there makes others wait for it again.
        spent: how much of its budget of messages is used up, at `spent_at`.
    """

    linked: bool = False
    heard_at: float = -math.inf
    claim: Round = NO_ROUND
    left_after: Round | None = None
    in_step: bool = True
    vain: int = 0
    again_at: Round = NO_ROUND
    spent: float = 0.0
    spent_at: float = 0.0

    def standing(self, round: Round) -> Standing:
        """Return how the member seems in `round`."""
        if self.left_after is not None and self.left_after < round:
            return Standing.LEFT
        if not self.linked:
            return Standing.UNREACHABLE
        is_back = self.claim >= round >= self.again_at
        return Standing.HERE if self.in_step or is_back else Standing.LATE

    def note_round(self, round: Round, took_part: bool) -> None:
        """Note whether the member took part in a round that is over.

        One that only says that it is there is waited for again after 2 rounds, then 4, 8 and so on: else its word would
        cost each round the group's whole patience.
        """
        if took_part:
            self.vain = 0
        elif self.standing(round) is Standing.HERE:
            self.vain = min(self.vain + 1, 20)
            self.again_at = Round(round + 2**self.vain)
        self.in_step = took_part


class Members:
    """All other members, by their place in the roster."""

    def __init__(self, places: Iterable[int]) -> None:
        self._known = {place: Known() for place in places}
        self._told: dict[int, Standing] = {}

    def __getitem__(self, place: int) -> Known:
        return self._known[place]

    def items(self) -> Iterable[tuple[int, Known]]:
        """Return all places with what is known."""
        return self._known.items()

    def fingerprint(self) -> tuple[object, ...]:
        """Return a value that is another one once any member seems otherwise than before."""
        return tuple(
            (known.linked, known.claim, known.left_after, known.in_step, known.again_at)
            for known in self._known.values()
        )

    def linked(self) -> list[int]:
        """Return the members with a link."""
        return [place for place, known in self._known.items() if known.linked]

    def linked_in(self, group: Sequence[int], me: int) -> frozenset[int]:
        """Return who of a group has a link to `me`, and `me`."""
        return frozenset(who for who in group if who == me or self._known[who].linked)

    def standing(self, round: Round) -> dict[int, Standing]:
        """Return how each member seems in `round`."""
        return {place: known.standing(round) for place, known in self._known.items()}

    def changed(self, round: Round) -> dict[int, Standing]:
        """Return how those members seem in `round` that seemed otherwise when this was last asked."""
        changed = {
            place: standing
            for place, known in self._known.items()
            if (standing := known.standing(round)) is not self._told.get(place)
        }
        self._told.update(changed)
        return changed

    def expected(self, group: Sequence[int], round: Round) -> frozenset[int]:
        """Return whom of a group a round waits for: those that are linked and keep step."""
        known = self._known
        return frozenset(who for who in group if who in known and known[who].standing(round) is Standing.HERE)

    def present(self, group: Sequence[int]) -> frozenset[int]:
        """Return who of a group is linked and has not left, whether it keeps step or lags."""
        known = self._known
        return frozenset(who for who in group if who in known and known[who].linked and known[who].left_after is None)

    def front(self, colluders: int) -> Round:
        """Return the (c+1)-th highest round that members claim to be in, so that c liars drag nobody along."""
        claims = sorted((known.claim for known in self._known.values()), reverse=True)
        return claims[colluders] if len(claims) > colluders else NO_ROUND

    def claiming(self, places: Iterable[int], round: Round) -> int:
        """Return how many of these are linked and say that they are in `round` or later."""
        known = self._known
        return sum(who in known and known[who].linked and known[who].claim >= round for who in places)

    def may_send(self, place: int, cost: float, now: float, rate: float, burst: float) -> bool:
        """Count a message against its sender's budget; return whether it is within.

        Args:
            place: the sender.
            cost: of the message; 1 for one whose handling is a signature's check.
            now: the time.
            rate: cost allowed in a second, on and on.
            burst: cost allowed at once.
        """
        known = self._known[place]
        known.spent = max(0.0, known.spent - (now - known.spent_at) * rate) + cost
        known.spent_at = now
        if known.spent > burst:
            known.spent = burst
            return False
        return True
