"""Who averages with whom in a round, where groups are drawn anew each time. Everybody draws the same, from the charter.

Whether a member answers is no input: views of that differ, the roster does not.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate

from p2pfl.core.canonical import canonical
from p2pfl.core.charter import AveragingTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round
from p2pfl.crypto.ring import WEIGHT_ONE, weight_of

LEAST_MASKED = 3
"""Of two members' sum each learns the other's update."""


def groups(beacon: bytes, round: Round, members: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Cut the members of a round into max(1, floor(n / size)) groups whose sizes differ by at most one.

    They are cut in the order of SHA-256(beacon, round, member), so nobody can foresee or steer them who does not choose
    the beacon.

    Args:
        beacon: fixed for the federation, and unknown to each member before it joined.
        round: the round's number.
        members: places in the roster.
        size: wanted members of a group; at least so many are in each, if there are so many at all.

    Returns:
        the groups, each with its members in ascending order.
    """
    order = sorted(members, key=lambda member: hashlib.sha256(canonical([beacon, round, member])).digest())
    count = max(1, len(order) // size)
    sizes = [len(order) // count + (number < len(order) % count) for number in range(count)]
    ends = list(accumulate(sizes))
    return tuple(tuple(sorted(order[end - width : end])) for end, width in zip(ends, sizes, strict=True))


def averaging_faults(members: int, averaging: AveragingTerms) -> list[str]:
    """Return why so many members cannot average in groups as the charter says, a line each."""
    if averaging.topology != "groups" or averaging.masks == "off":
        return []
    if members < LEAST_MASKED:
        return [
            f"{members} members with averaging.masks = on: from the average each would learn the other's update; "
            f"find {LEAST_MASKED - members} more, or set masks to off"
        ]
    size = min(averaging.group_size, members)
    count = max(1, members // size)
    sizes = {members // count, -(-members // count)}
    borne = min(bearable_colluders(each) for each in sizes)
    if averaging.colluders > borne:
        return [
            f"averaging.colluders is {averaging.colluders}, and groups of {min(sizes)} to {max(sizes)} bear {borne}; "
            "lower it, or make the groups larger"
        ]
    return []


def weight_for(averaging: AveragingTerms, samples: int) -> int:
    """Return the weight of a member who trains on so many samples, in units of 1 / WEIGHT_ONE.

    Raises:
        InvalidConfig: it has more than the charter allows.
    """
    if averaging.weights == "equal" or averaging.samples_max is None:
        return WEIGHT_ONE
    if samples > averaging.samples_max:
        raise InvalidConfig(
            f"this peer trains on {samples} samples, and averaging.samples_max in the charter is "
            f"{averaging.samples_max}; agree on a charter with a larger number, or use fewer samples"
        )
    return weight_of(samples, averaging.samples_max, averaging.alpha_min)


def least_weight(averaging: AveragingTerms) -> int:
    """Return the smallest weight that a member may have, in units of 1 / WEIGHT_ONE."""
    return weight_for(averaging, 0)


def threshold(members: int) -> int:
    """Return T, how many of a session's members must sign the same survivors: three quarters, rounded up.

    Two sets of T members share at least 2T - n, so with fewer colluders than that no two sets of survivors can both be
    certified.
    """
    return -(-3 * members // 4)


def bearable_colluders(members: int) -> int:
    """Return the largest c for which a session of so many members keeps its word: min(2T - n - 1, n - 2)."""
    return max(0, min(2 * threshold(members) - members - 1, members - 2))
