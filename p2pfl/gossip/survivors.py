"""Who survives in a session: what follows from the aggregators' acknowledgements, and what is best proposed.

An acknowledgement lists whose chunks an aggregator holds. Pure functions of these lists.
"""

from collections.abc import Mapping, Sequence

from p2pfl.gossip.chunks import pair
from p2pfl.gossip.grouping import threshold


def shared(lists: Mapping[int, set[int]], members: Sequence[int], aggregators: Sequence[int]) -> tuple[int, ...]:
    """Return the survivors that follow from these acknowledgements: whom all of them name.

    Where two aggregators or more are gone, none of them survives: each may hold the only copy of another's chunk.
    """
    alone = len(lists) < len(aggregators) - 1
    return tuple(who for who in members if all(who in each for each in lists.values()) and (who in lists or not alone))


def largest(
    lists: Mapping[int, set[int]], members: Sequence[int], aggregators: Sequence[int], here: frozenset[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose whose acknowledgements count, at least three quarters of the aggregators'.

    So that first as few chunks as can be are lost, should those that are not here be gone; then as many of those that
    are here survive, and as many of all. One aggregator that received little, or says so, would else cost everybody
    the round; its deputy takes its chunk.

    Returns:
        whose count, and who survives.
    """

    def value(live: Sequence[int]) -> tuple[int, int, int]:
        survivors = shared({who: lists[who] for who in live}, members, aggregators)
        chunks = range(len(aggregators))
        kept = sum(is_summable(chunk, survivors, lists, aggregators, here) for chunk in chunks)
        return kept, len(here.intersection(survivors)), len(survivors)

    live = [who for who in aggregators if who in lists]
    best = value(live)
    while len(live) > threshold(len(aggregators)):
        fewer = [[who for who in live if who != left] for left in sorted(live, key=lambda who: (len(lists[who]), who))]
        values = [value(each) for each in fewer]
        if max(values) <= best:
            break
        best = max(values)
        live = fewer[values.index(best)]
    return tuple(live), shared({who: lists[who] for who in live}, members, aggregators)


def is_summable(
    chunk: int,
    survivors: Sequence[int],
    lists: Mapping[int, set[int]],
    aggregators: Sequence[int],
    here: frozenset[int],
) -> bool:
    """Return whether a chunk can be averaged by those that are here, with what they acknowledged or send again."""
    aggregator, deputy = pair(aggregators, chunk)
    gone = {who for who in survivors if who not in here}
    by_aggregator = aggregator in here and gone <= lists.get(aggregator, set())
    return by_aggregator or (deputy in here and gone <= {aggregator} & lists.get(deputy, set()))
