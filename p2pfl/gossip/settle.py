"""When peers that only average may stop: a maximum that floods with the updates.

No peer sees the consensus distance. Each sees how far its neighbors' vectors are from its own. Every `diameter + 1` rounds each
peer starts from the largest squared distance it just saw, and in the rounds between takes the maximum of what its neighbors
announce; after `diameter` hops every peer holds the same number, the largest squared distance d over any link of the overlay at the
window's start. Two peers are at most `diameter` links apart, so at that moment every two vectors were within
`diameter * sqrt(d)` of each other, and the consensus distance at most `diameter^2 * d`. Averaging only shrinks it. All peers reach the
same verdict in the same round, and stop together.

With a peer missing, the flood may reach some late: they go on, at most to the charter's limit, or until all neighbors have left.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Settling:
    """A peer's view of the flood.

    Attributes:
        diameter: of the overlay, in hops.
        step: settling rounds done.
        announced: what this peer's next update says, a squared distance.
    """

    diameter: int
    step: int = 0
    announced: float = 0.0

    def after_round(self, spread: float, heard: list[float]) -> "Settling":
        """Return the view after a round.

        Args:
            spread: the largest squared distance from a neighbor's vector to this peer's own in the round.
            heard: what the neighbors' updates of the round announced.
        """
        opens = self.step % (self.diameter + 1) == 0
        known = spread if opens else max([self.announced, *heard])
        return replace(self, step=self.step + 1, announced=known)

    def bound(self) -> float | None:
        """Return the proven bound on the consensus distance, at the end of a window; otherwise None."""
        if self.step == 0 or self.step % (self.diameter + 1) != 0:
            return None
        return self.diameter**2 * self.announced
