"""Who can solve for whose update: small cases by hand, the design's study, and the search against brute force."""

from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round
from p2pfl.gossip.graphs import draw
from p2pfl.gossip.grouping import bearable_colluders, groups, least_masked
from p2pfl.gossip.leakage import (
    Sum,
    best_estimate,
    clear_sums,
    group_sums,
    isolating_set,
    lying_colluders,
    neighborhood_sums,
    rounds_until_isolated,
    worst_cosine,
)
from p2pfl.gossip.mixing import metropolis_hastings


def summed(members: Collection[int], *readers: int) -> Sum:
    """Return a sum of equal weights."""
    return Sum(tuple((member, Fraction(1)) for member in sorted(members)), frozenset(readers))


def rank(rows: Sequence[Sequence[Fraction]]) -> int:
    """Return the rank over the rationals, by elimination."""
    left = [list(row) for row in rows]
    found = 0
    for column in range(len(left[0]) if left else 0):
        pivot = next((place for place in range(found, len(left)) if left[place][column]), None)
        if pivot is None:
            continue
        left[found], left[pivot] = left[pivot], left[found]
        for place in range(found + 1, len(left)):
            factor = left[place][column] / left[found][column]
            left[place] = [a - factor * b for a, b in zip(left[place], left[found], strict=True)]
        found += 1
    return found


def solved(sums: Sequence[Sum], colluders: Collection[int], peers: int) -> set[int]:
    """Return every honest peer whose update these colluders solve for, from the definition."""
    read = [each for each in sums if each.readers is None or set(colluders) & each.readers]
    rows = [[dict(each.weights).get(peer, Fraction(0)) for peer in range(peers)] for each in read]
    rows += [unit(peer, peers) for peer in colluders]
    known = rank(rows)
    return {peer for peer in set(range(peers)) - set(colluders) if rank([*rows, unit(peer, peers)]) == known}


def unit(peer: int, peers: int) -> list[Fraction]:
    return [Fraction(int(place == peer)) for place in range(peers)]


def fewest(sums: Sequence[Sum], peers: int) -> int | None:
    sizes = range(peers)
    return next((k for k in sizes if any(solved(sums, some, peers) for some in combinations(range(peers), k))), None)


# By hand


def test_of_a_path_of_three_an_end_reads_two_updates_and_knows_one() -> None:
    found = isolating_set(neighborhood_sums(nx.path_graph(3)))
    assert found is not None
    assert (found.colluders, found.victim, found.exact) == ({0}, 1, True)


def test_two_that_differ_in_one_neighbor_know_it() -> None:
    # Less their own, 0 reads 2 + 4 + 5 + 6, and 1 reads 3 more.
    sums = [summed({0, 2, 4, 5, 6}, 0), summed({1, 2, 3, 4, 5, 6}, 1)]
    found = isolating_set(sums)
    assert found is not None
    assert (found.colluders, found.victim, found.at_least) == ({0, 1}, 3, 2)


def test_one_group_is_isolated_by_all_but_one_of_it_however_many_groups_there_are() -> None:
    found = isolating_set(group_sums([{0, 1, 2, 3}, {4, 5, 6, 7, 8}, {9, 10, 11, 12}]))
    assert found is not None
    assert (found.colluders, found.victim, found.exact) == ({0, 1, 2}, 3, True)


def test_released_sums_are_known_to_nobody_in_particular() -> None:
    difference = [Sum(summed({0, 1, 2}).weights, None), Sum(summed({0, 1}).weights, None)]
    found = isolating_set(difference)
    assert found is not None
    assert (found.colluders, found.victim, found.exact) == (frozenset(), 2, True)


def test_released_sums_help_somebody_who_reads_no_sum_that_overlaps_with_another_reader() -> None:
    # 0 and 9 read sums that share nothing; a released one joins them.
    sums = [summed({1, 2}, 0), summed({3, 4}, 9), Sum(summed({1, 2, 3, 4, 5}).weights, None)]
    found = isolating_set(sums)
    assert found is not None
    assert (len(found.colluders), found.exact) == (fewest(sums, 10), True)


def test_in_the_clear_one_neighbor_suffices() -> None:
    found = isolating_set(clear_sums(draw("ring", 6, 0)))
    assert found is not None
    assert (len(found.colluders), found.exact) == (1, True)
    assert found.victim in draw("ring", 6, 0)[min(found.colluders)]


def test_without_sums_nobody_is_isolated_and_nothing_estimated() -> None:
    assert isolating_set([]) is None
    assert best_estimate([], 1) is None
    assert isolating_set([summed({3}, 3)]) is None


def test_twins_are_looked_at_once_so_that_large_equal_groups_are_no_effort() -> None:
    found = isolating_set(neighborhood_sums(nx.complete_graph(60)), sets=200)
    assert found is not None
    assert (len(found.colluders), found.exact) == (59, True)


def test_beyond_its_limit_the_search_gives_bounds_and_says_so() -> None:
    sums = neighborhood_sums(draw("exponential", 20, 0))
    found = isolating_set(sums, sets=2000)
    assert found is not None
    assert not found.exact
    assert 3 <= found.at_least < len(found.colluders) <= 8
    assert found.victim in solved(sums, found.colluders, 20)


# The design's study


@pytest.mark.parametrize("seed", range(5))
def test_three_of_twenty_solve_for_an_update_on_a_four_regular_graph(seed: int) -> None:
    sums = neighborhood_sums(draw("random-regular", 20, seed))
    found = isolating_set(sums)
    assert found is not None
    assert (len(found.colluders), found.exact) == (3, True)
    assert found.victim in solved(sums, found.colluders, 20)


@pytest.mark.parametrize("seed", range(5))
def test_two_of_twenty_do_on_a_scale_free_one(seed: int) -> None:
    sums = neighborhood_sums(draw("barabasi-albert", 20, seed))
    found = isolating_set(sums)
    assert found is not None
    assert (len(found.colluders), found.exact) == (2, True)


def test_all_models_after_averaging_reveal_every_update_where_the_mixing_matrix_is_regular() -> None:
    graph = draw("random-regular", 20, 0)
    assert np.linalg.matrix_rank(metropolis_hastings(graph)) == 20
    published = [Sum(each.weights, None) for each in neighborhood_sums(graph)]
    found = isolating_set(published)
    assert found is not None
    assert found.colluders == frozenset()
    assert solved(published, (), 20) == set(range(20))


def test_neighborhood_sums_are_the_rows_of_the_mixing_matrix() -> None:
    graph = draw("barabasi-albert", 12, 1)
    rows = [[float(dict(each.weights).get(peer, 0)) for peer in graph] for each in neighborhood_sums(graph)]
    np.testing.assert_allclose(rows, metropolis_hastings(graph), atol=1e-15)


# Against brute force


@st.composite
def systems(draw_: st.DrawFn) -> tuple[list[Sum], int]:
    peers = draw_(st.integers(2, 7))
    some = st.sets(st.integers(0, peers - 1), min_size=1)
    readers = st.one_of(st.none(), some.map(frozenset))
    weights = st.fractions(-3, 3, max_denominator=4).filter(bool)
    sums = []
    for _ in range(draw_(st.integers(1, 6))):
        members = sorted(draw_(some))
        equal = draw_(st.booleans())
        sums.append(Sum(tuple((m, Fraction(1) if equal else draw_(weights)) for m in members), draw_(readers)))
    return sums, peers


@settings(max_examples=150, deadline=None)
@given(systems())
def test_the_search_finds_as_few_as_brute_force_over_the_rationals(system: tuple[list[Sum], int]) -> None:
    sums, peers = system
    found = isolating_set(sums)
    expected = fewest(sums, peers)
    assert (None if found is None else len(found.colluders)) == expected
    if found is not None:
        assert found.exact
        assert found.victim in solved(sums, found.colluders, peers)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 7), st.integers(0, 10**6), st.floats(0.3, 0.9))
def test_so_it_does_on_neighborhoods_of_random_graphs(n: int, seed: int, chance: float) -> None:
    sums = neighborhood_sums(nx.gnp_random_graph(n, chance, seed=seed))
    found = isolating_set(sums)
    assert (None if found is None else len(found.colluders)) == fewest(sums, n)


@settings(max_examples=60, deadline=None)
@given(systems(), st.integers(0, 3))
def test_no_set_of_colluders_estimates_better_than_the_best_estimate(
    system: tuple[list[Sum], int], colluders: int
) -> None:
    sums, peers = system
    found = best_estimate(sums, colluders)
    best = 0.0
    for some in (some for size in range(colluders + 1) for some in combinations(range(peers), size)):
        honest = sorted(set(range(peers)) - set(some))
        read = [each for each in sums if each.readers is None or set(some) & each.readers]
        if honest and read:
            rows = np.array([[float(dict(each.weights).get(peer, 0)) for peer in honest] for each in read])
            squares = np.diag(np.linalg.pinv(rows, rcond=1e-9) @ rows)
            best = max(best, float(np.sqrt(max(squares.max(), 0.0))))
    assert (0.0 if found is None else found.cosine) == pytest.approx(best, abs=1e-6)


# One sum, and many rounds


@pytest.mark.parametrize(("members", "colluders"), [(3, 1), (5, 1), (8, 3), (8, 0)])
def test_the_estimate_from_one_sum_is_the_formulas(members: int, colluders: int) -> None:
    found = best_estimate([*group_sums([range(members)], released=True)], colluders)
    assert found is not None
    assert found.cosine == pytest.approx(worst_cosine(members, colluders))


def test_small_weights_of_the_others_make_a_sum_nearly_one_peers_vector() -> None:
    # The design's figure: weights of 1 and 0.01.
    assert worst_cosine(3, 1, 0.01) == pytest.approx(0.99995, abs=1e-6)
    assert worst_cosine(3, 1, 0.5) == pytest.approx(1 / np.sqrt(1.25))
    assert worst_cosine(4, 3) == worst_cosine(3, 3) == 1.0
    for alpha in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(InvalidConfig, match="alpha-min must be above 0"):
            worst_cosine(4, 1, alpha)


@given(st.integers(3, 64))
def test_liars_need_to_be_more_than_a_group_bears_and_no_more_than_its_readers(members: int) -> None:
    assert bearable_colluders(members) < lying_colluders(members) <= members - 1
    assert least_masked(bearable_colluders(members)) <= members


def reshuffled(n: int, size: int, rounds: int) -> Iterator[list[Sum]]:
    for number in range(rounds):
        yield group_sums(groups(b"x", Round(number), range(n), size), released=True)


@pytest.mark.parametrize(("n", "size"), [(8, 4), (12, 3), (12, 5)])
def test_groups_drawn_anew_give_an_unchanging_contribution_away(n: int, size: int) -> None:
    found = rounds_until_isolated(reshuffled(n, size, 200), {0})
    assert found is not None
    rounds, victim = found
    assert victim != 0
    read = [each for sums in reshuffled(n, size, rounds) for each in sums]
    assert victim in solved(read, {0}, n)
    assert not solved([each for sums in reshuffled(n, size, rounds - 1) for each in sums], {0}, n)


def test_who_reads_only_the_sums_it_is_in_needs_more_rounds() -> None:
    def own(rounds: int) -> Iterator[list[Sum]]:
        for number in range(rounds):
            yield group_sums(groups(b"x", Round(number), range(12), 4))

    released, private = rounds_until_isolated(reshuffled(12, 4, 200), {0}), rounds_until_isolated(own(200), {0})
    assert released is not None
    assert private is not None
    assert released[0] < private[0]


def test_groups_and_cohorts_that_stay_the_same_never_do() -> None:
    same = group_sums(groups(b"x", Round(0), range(12), 4), released=True)
    assert rounds_until_isolated([same] * 100, {0, 1}) is None

    cohorts = [range(4), range(4, 8), range(8, 12), range(12, 16)]

    def unions() -> Iterator[list[Sum]]:
        for number in range(100):
            drawn = groups(b"x", Round(number), range(4), 2)
            yield group_sums([{peer for each in part for peer in cohorts[each]} for part in drawn], released=True)

    assert rounds_until_isolated(unions(), {0, 1}) is None
    together = [each for sums in unions() for each in sums]
    found = best_estimate(together, 0)
    assert found is not None
    assert found.cosine == pytest.approx(0.5), "the sum over a cohort of four"


def test_one_group_of_all_never_does() -> None:
    assert rounds_until_isolated([group_sums([range(6)], released=True)] * 50, {0}) is None
