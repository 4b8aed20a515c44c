"""When peers that only average may stop: a maximum, and whether it is complete, that flood with the updates.

No peer sees the consensus distance. Each sees how far its neighbors' vectors are from its own. Every D + 1 rounds, D
the overlay's diameter, each peer starts from the largest squared distance it just saw, and in the rounds between
takes the maximum of what its neighbors announce. After D hops every peer holds the same number d, the largest squared
distance over any link at the window's start. Two peers are at most D links apart, so by the triangle inequality any
two vectors were within D sqrt(d) of each other, and the consensus distance was at most D^2 d. Averaging only shrinks
it. All peers reach the same verdict in the same round, and stop together.

That proves something only if every link carried its update in every round of the window. So each update also says
whether its sender, and everyone that it has heard of in this window, heard all neighbors. If any link on a shortest
path failed, its near end knows, and is fewer than D intact hops away: a peer that holds "complete" at the end has the
proof for all members. Without it, peers that hear each other still stop, by the longest path there could be, n - 1
links; but none of them says that the members agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Claim:
    """What an update says of its window.

    Attributes:
        spread: the largest squared distance over a link that the sender knows of.
        complete: whether everyone that the sender has heard of heard all neighbors.
    """

    spread: float = 0.0
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a peer knows at a window's end.

    Attributes:
        bound: on the consensus distance; of all members if `proven`, else of those that hear each other.
        proven: whether every link of the overlay carried its updates.
    """

    bound: float
    proven: bool


@dataclass(frozen=True, slots=True)
class Settling:
    """A peer's view of the flood.

    Attributes:
        diameter: of the overlay, in hops.
        members: of the federation.
        step: settling rounds done.
        claim: what this peer's next update says.
        joined: the step at which this peer came in; more than 0 for one that was away when settling began. It can say
            nothing for certain until the end of the first window that it saw from its start.
    """

    diameter: int
    members: int
    step: int = 0
    claim: Claim = Claim()
    joined: int = 0

    def after_round(self, spread: float, heard: Sequence[Claim], complete: bool) -> "Settling":
        """Return the view after a round.

        Args:
            spread: the largest squared distance from a neighbor's vector to this peer's own in the round.
            heard: what the neighbors' updates of the round said.
            complete: whether all neighbors were heard.
        """
        if self.step % (self.diameter + 1) == 0:
            claim = Claim(spread, complete)
        else:
            known = [self.claim, *heard]
            if self.step == self.joined:
                # Its vector may be far from all that this window has measured so far.
                known.append(Claim(spread, complete=False))
            claim = Claim(max(each.spread for each in known), complete and all(each.complete for each in known))
        return replace(self, step=self.step + 1, claim=claim)

    def verdict(self) -> Verdict | None:
        """Return what is known at the end of a window; None within one."""
        window = self.diameter + 1
        if self.step == 0 or self.step % window != 0 or self.step - window < self.joined:
            return None
        hops = self.diameter if self.claim.complete else self.members - 1
        return Verdict(hops**2 * self.claim.spread, self.claim.complete)
