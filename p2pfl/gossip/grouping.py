"""Who averages with whom in a round, in groups or in stars of an overlay. Everybody draws the same, from the charter.

Whether a member answers is no input: views of that differ, the roster does not.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import networkx as nx

from p2pfl.core.canonical import Value, canonical
from p2pfl.core.charter import AveragingTerms, Charter
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round
from p2pfl.core.privacy import Noise
from p2pfl.core.statements import MAX_GROUP
from p2pfl.crypto.private import verify_room
from p2pfl.crypto.ring import WEIGHT_ONE, Ring, weight_of

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
    order = _drawn(beacon, round, members)
    parts = _cut(order, max(1, len(order) // size))
    return tuple(tuple(sorted(part)) for part in parts)


def cohorts(beacon: bytes, members: Sequence[int], least: int) -> tuple[tuple[int, ...], ...]:
    """Cut the members, once for all rounds, into as many cohorts of at least `least` as there can be."""
    order = _drawn(beacon, "cohorts", members)
    return tuple(tuple(sorted(part)) for part in _cut(order, max(1, len(order) // least)))


def groups_of_cohorts(
    beacon: bytes, round: Round, fixed: Sequence[tuple[int, ...]], size: int
) -> tuple[tuple[int, ...], ...]:
    """Put the cohorts of a round together to groups of about `size`; no cohort is ever split.

    A group is a union of cohorts in every round, so no linear combination of many rounds' sums gives less than the sum
    over a cohort, as long as its members are all in each of them.
    """
    order = _drawn(beacon, round, range(len(fixed)))
    parts = _cut(order, _unions(sum(map(len, fixed)), len(fixed), size))
    return tuple(tuple(sorted(member for number in part for member in fixed[number])) for part in parts)


def _unions(members: int, cohorts: int, size: int) -> int:
    """Return how many groups so many cohorts make."""
    return max(1, min(members // size, cohorts))


def _drawn(beacon: bytes, what: Value, members: Sequence[int]) -> list[int]:
    return sorted(members, key=lambda member: hashlib.sha256(canonical([beacon, what, member])).digest())


def _cut(order: Sequence[int], count: int) -> list[Sequence[int]]:
    """Cut a sequence into so many parts whose sizes differ by at most one."""
    sizes = [len(order) // count + (number < len(order) % count) for number in range(count)]
    ends = list(accumulate(sizes))
    return [order[end - width : end] for end, width in zip(ends, sizes, strict=True)]


def stars(beacon: bytes, round: Round, graph: nx.Graph, colluders: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Draw the stars of a round: disjoint closed neighborhoods, so that no peer is in two sums.

    Peers become centres in the order of SHA-256(beacon, round, place), each that is at least three hops from all
    centres before it; so no further star would fit in.

    Args:
        beacon: fixed for the federation, and unknown to each member before it joined.
        round: the round's number.
        graph: the overlay.
        colluders: how many members may work together; a neighborhood that does not bear them makes no star.

    Returns:
        each star's centre, and its members with the centre, ascending.
    """
    taken: set[int] = set()
    drawn = []
    for centre in _drawn(beacon, round, list(graph)):
        around = {centre, *graph[centre]}
        if bears(len(around), colluders) and taken.isdisjoint(around):
            taken |= around
            drawn.append((centre, tuple(sorted(around))))
    return tuple(drawn)


def bears(members: int, colluders: int) -> bool:
    """Return whether a masked sum of so many members keeps its word against so many that work together."""
    return members >= least_masked(colluders) and bearable_colluders(members) >= colluders


def least_masked(colluders: int) -> int:
    """Return c_min = max(3, c + 2), the fewest in a masked sum: of two each would learn the other's; two are honest."""
    return max(colluders + 2, LEAST_MASKED)


def least_survivors(charter: Charter) -> int:
    """Return the fewest members that a masked sum has under a charter."""
    least = least_masked(charter.averaging.colluders)
    return least if charter.privacy is None else max(least, charter.privacy.survivors or 0)


def noise_of(charter: Charter) -> Noise | None:
    """Return the noise that each member adds; None if none does. Colluders know theirs, so it does not count."""
    privacy = charter.privacy
    if privacy is None or privacy.noise is None:
        return None
    return Noise(charter.training.clip_norm, privacy.noise, least_survivors(charter) - charter.averaging.colluders)


def privacy_faults(charter: Charter, graph: nx.Graph | None = None) -> list[str]:
    """Return why a charter's members cannot add the noise that it speaks of, a line each.

    Args:
        charter: with at least two members.
        graph: the overlay; None in groups.
    """
    noise, averaging = noise_of(charter), charter.averaging
    if noise is None:
        return []
    if graph is None:
        fewest, most = group_sizes(len(charter.members), averaging)
    else:
        degrees = [degree for _, degree in graph.degree]
        fewest, most = 1 + min(degrees), 1 + max(degrees)
    least = least_survivors(charter)
    if least > fewest:
        return [
            f"privacy.survivors is {least}, and there are groups or stars of {fewest}, which never are so many; "
            "lower it, or make them larger"
        ]
    sizes = [(32, averaging.clip)] + ([] if averaging.most_change is None else [(16, averaging.most_change)])
    try:
        for bits, clip in sizes:
            verify_room(Ring(bits, most, clip, noise.deviation), noise, charter.model.parameters)
    except InvalidConfig as error:
        return [f"privacy: {error}; change privacy.noise or training.clip_norm, or take averaging.bits = 32"]
    return []


def star_colluders(graph: nx.Graph) -> int | None:
    """Return the largest number of colluders that an overlay's stars bear; None if not every peer can be in one.

    Each peer has to be in the neighborhood of one that can be a centre, or no sum would ever take its update in.
    """
    sizes = {node: 1 + degree for node, degree in graph.degree}

    def covers(colluders: int) -> bool:
        fit = {node for node, size in sizes.items() if bears(size, colluders)}
        return all(node in fit or not fit.isdisjoint(graph[node]) for node in graph)

    return max(filter(covers, range(max(sizes.values()))), default=None)


def averaging_faults(members: int, averaging: AveragingTerms, graph: nx.Graph | None = None) -> list[str]:
    """Return why so many members cannot average under masks as the charter says, a line each.

    Args:
        members: how many.
        averaging: how.
        graph: the overlay; None in groups.
    """
    if averaging.masks == "off":
        return []
    if members < LEAST_MASKED:
        return [
            f"{members} members with averaging.masks = on: from the average each would learn the other's update; "
            f"find {LEAST_MASKED - members} more, or set masks to off"
        ]
    if graph is not None:
        return _star_faults(averaging, graph)
    low, high = group_sizes(members, averaging)
    sizes = {low, high} if averaging.regroup == "each-round" else range(low, high + 1)
    borne = min(bearable_colluders(each) for each in sizes)
    if averaging.colluders > borne:
        return [
            f"averaging.colluders is {averaging.colluders}, and groups of {min(sizes)} to {max(sizes)} bear {borne}; "
            "lower it, or make the groups larger"
        ]
    return []


def scaling_faults(members: int, whole_rounds: int) -> list[str]:
    """Return why so many members cannot agree on the scaling in the first rounds, a line each."""
    if whole_rounds and members > MAX_GROUP:
        return [
            f"{members} members with task.table.scaling = session: at most {MAX_GROUP} can be in one sum; set scaling "
            "to charter, with each number's mean and deviation"
        ]
    return []


def _star_faults(averaging: AveragingTerms, graph: nx.Graph) -> list[str]:
    borne, most = star_colluders(graph), 1 + max(degree for _, degree in graph.degree)
    if most > MAX_GROUP:
        return [
            f"the overlay {averaging.topology} has stars of {most} members, and at most {MAX_GROUP} can sum; use groups"
        ]
    if borne is None:
        return [
            f"masks on the overlay {averaging.topology}: some members have no neighbor with two neighbors, so no star "
            "of three takes their updates in; add links, or set masks to off"
        ]
    if averaging.colluders > borne:
        lowest = 1 + min(degree for _, degree in graph.degree)
        return [
            f"averaging.colluders is {averaging.colluders}, and the stars of the overlay {averaging.topology}, of "
            f"{lowest} members or more, bear {borne}; lower it, or take an overlay with more neighbors"
        ]
    return []


def group_sizes(members: int, averaging: AveragingTerms) -> tuple[int, int]:
    """Return the fewest and the most members that a group may have."""
    size = min(averaging.group_size, members)
    if averaging.regroup == "each-round":
        count = max(1, members // size)
        return members // count, -(-members // count)
    cohort = cohort_size(averaging)
    fixed = max(1, members // cohort)
    count = _unions(members, fixed, size)
    return fixed // count * (members // fixed), min(members, -(-fixed // count) * -(-members // fixed))


def cohort_size(averaging: AveragingTerms) -> int:
    """Return how many members travel together at least."""
    return least_masked(averaging.colluders)


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
