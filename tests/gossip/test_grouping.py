"""Groups are the same for everybody, of nearly equal size, and drawn anew each round."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.core.charter import AveragingTerms
from p2pfl.core.ids import Round
from p2pfl.gossip.grouping import (
    averaging_faults,
    bearable_colluders,
    cohort_size,
    cohorts,
    group_sizes,
    groups,
    groups_of_cohorts,
    threshold,
)


@given(st.integers(1, 200), st.integers(3, 32), st.integers(0, 10**6))
def test_every_member_is_in_one_group_and_sizes_differ_by_at_most_one(members: int, size: int, round: int) -> None:
    cut = groups(b"beacon", Round(round), range(members), size)
    assert sorted(member for group in cut for member in group) == list(range(members))
    sizes = {len(group) for group in cut}
    assert max(sizes) - min(sizes) <= 1
    assert len(cut) == max(1, members // size)
    assert min(sizes) >= min(size, members)
    assert all(list(group) == sorted(group) for group in cut)


def test_the_draw_is_pinned_and_depends_on_beacon_and_round_only() -> None:
    drawn = groups(b"beacon", Round(3), range(8), 4)
    assert drawn == groups(b"beacon", Round(3), [*reversed(range(8))], 4)
    assert drawn != groups(b"beacon", Round(5), range(8), 4)
    assert drawn != groups(b"other", Round(3), range(8), 4)
    assert drawn == ((0, 3, 6, 7), (1, 2, 4, 5))


def test_over_many_rounds_every_pair_meets_about_as_often() -> None:
    met: Counter[tuple[int, int]] = Counter()
    for number in range(2000):
        for group in groups(b"x", Round(number), range(8), 4):
            met.update((one, other) for one in group for other in group if one < other)
    expected = 2000 * 3 / 7
    assert all(abs(count - expected) < 0.15 * expected for count in met.values())


@pytest.mark.parametrize(("members", "needed", "borne"), [(3, 3, 1), (4, 3, 1), (6, 5, 3), (8, 6, 3), (16, 12, 7)])
def test_thresholds_of_the_design(members: int, needed: int, borne: int) -> None:
    assert threshold(members) == needed
    assert bearable_colluders(members) == borne


@given(st.integers(2, 64))
def test_two_sets_of_votes_share_more_members_than_collude(members: int) -> None:
    overlap = 2 * threshold(members) - members
    assert bearable_colluders(members) < max(1, overlap)


@pytest.mark.parametrize(
    ("members", "terms", "fault"),
    [
        (2, {}, "2 members with averaging.masks = on"),
        (1, {}, "find 2 more"),
        (3, {}, None),
        (8, {"group_size": 4, "colluders": 2}, "averaging.colluders is 2, and groups of 4 to 4 bear 1"),
        (8, {"group_size": 8, "colluders": 3}, None),
        (20, {"group_size": 8, "colluders": 6}, "groups of 10 to 10 bear 5"),
        (2, {"masks": "off"}, None),
    ],
)
def test_what_a_size_cannot_bear_is_refused_with_the_number_that_it_can(
    members: int, terms: dict[str, object], fault: str | None
) -> None:
    averaging = AveragingTerms.model_validate({"topology": "groups", "masks": "on", **terms})
    faults = averaging_faults(members, averaging)
    assert (fault is None and not faults) or (fault is not None and fault in faults[0])


def test_cohorts_and_edges_go_with_their_topologies_only() -> None:
    with pytest.raises(ValueError, match="only groups are drawn anew"):
        AveragingTerms.model_validate({"topology": "ring", "regroup": "never"})
    for values in ({"topology": "edges"}, {"topology": "ring", "edges": [["a", "b"]]}):
        with pytest.raises(ValueError, match="write both or neither"):
            AveragingTerms.model_validate(values)


@given(st.integers(3, 64), st.integers(3, 16), st.integers(0, 3), st.binary(min_size=32, max_size=32))
def test_cohorts_travel_together_in_every_round(members: int, size: int, colluders: int, beacon: bytes) -> None:
    averaging = AveragingTerms.model_validate({"regroup": "never", "group_size": size, "colluders": colluders})
    fixed = cohorts(beacon, range(members), cohort_size(averaging))
    assert sorted(member for cohort in fixed for member in cohort) == list(range(members))
    assert min(map(len, fixed)) >= min(members, max(3, colluders + 2))
    low, high = group_sizes(members, averaging)
    for number in range(5):
        drawn = groups_of_cohorts(beacon, Round(number), fixed, min(size, members))
        assert sorted(member for group in drawn for member in group) == list(range(members))
        assert all(any(set(cohort) <= set(group) for group in drawn) for cohort in fixed)
        assert all(low <= len(group) <= high for group in drawn)


def test_cohorts_are_put_together_anew_each_round() -> None:
    fixed = cohorts(b"x", range(24), 3)
    assert len({groups_of_cohorts(b"x", Round(number), fixed, 8) for number in range(20)}) > 10
