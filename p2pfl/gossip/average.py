"""One plain averaging round among neighbors, as a pure function: what a peer computes once it stops waiting."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from p2pfl.core.ids import PeerId
from p2pfl.core.machine import Vector
from p2pfl.gossip.mixing import mix, squared_distance

LARGEST = np.float32(1e30)
"""No weight of a model is near this, and the average of such values, and their squared distances, stay finite."""


@dataclass(frozen=True, slots=True)
class Average:
    """The outcome of a round.

    Attributes:
        vector: the weighted average, float32 [parameters].
        spread: largest squared distance from a contribution to the peer's own vector.
        heard: whose vectors are in it.
        rejected: who sent a vector that `is_sane` refuses.
    """

    vector: Vector
    spread: float
    heard: tuple[PeerId, ...]
    rejected: tuple[PeerId, ...]


def is_sane(vector: Vector) -> bool:
    """Return whether no value is NaN, infinite, or so large that sums of such values may overflow float32."""
    return bool((np.abs(vector) <= LARGEST).all())


def average(own: Vector, contributions: Mapping[PeerId, Vector], weights: Mapping[PeerId, float]) -> Average:
    """Average a peer's own vector with its neighbors'.

    Args:
        own: this peer's vector, float32 [parameters].
        contributions: the neighbors' vectors that arrived, each of the same length.
        weights: this peer's row of the mixing matrix without the diagonal. The weight of a neighbor that is missing or
            rejected goes to the peer itself, so the row always sums to one. Its order is the order of the sum.
    """
    arrived = [peer for peer in weights if peer in contributions]
    rejected = tuple(peer for peer in arrived if not is_sane(contributions[peer]))
    heard = tuple(peer for peer in arrived if peer not in rejected)
    others = [weights[peer] for peer in heard]
    vectors = [contributions[peer] for peer in heard]
    vector = mix([own, *vectors], [1.0 - sum(others), *others])
    spread = max((squared_distance(own, other) for other in vectors), default=0.0)
    return Average(vector, spread, heard, rejected)
