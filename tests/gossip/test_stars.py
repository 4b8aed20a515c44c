"""Stars are disjoint, so no update is in two sums; everybody draws the same; everybody's turn comes."""

from itertools import combinations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.charter import AveragingTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.grouping import averaging_faults, bearable_colluders, star_colluders, stars
from p2pfl.gossip.topology import named_edges, overlay
from tests.pump import ANY_SIZE, charter_for


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(ANY_SIZE),
    n=st.integers(3, 40),
    colluders=st.integers(0, 3),
    round=st.integers(0, 1000),
)
def test_stars_are_closed_neighborhoods_three_hops_apart_that_bear_the_colluders(
    name: str, n: int, colluders: int, round: int
) -> None:
    graph = overlay(name, n, 0)
    drawn = stars(b"beacon", Round(round), graph, colluders)
    assert drawn == stars(b"beacon", Round(round), graph, colluders)
    for centre, members in drawn:
        assert members == tuple(sorted({centre, *graph[centre]}))
        assert len(members) >= max(3, colluders + 2)
        assert bearable_colluders(len(members)) >= colluders
    for (one, ours), (other, theirs) in combinations(drawn, 2):
        assert nx.shortest_path_length(graph, one, other) >= 3
        assert set(ours).isdisjoint(theirs)
    taken = {member for _, members in drawn for member in members}
    for node in graph:  # no further star would fit in
        around = {node, *graph[node]}
        fits = len(around) >= max(3, colluders + 2) and bearable_colluders(len(around)) >= colluders
        assert not (fits and around.isdisjoint(taken))


@pytest.mark.parametrize(("name", "n"), [("torus", 12), ("torus", 25), ("exponential", 13), ("random-regular", 20)])
def test_everybody_is_in_a_star_in_at_least_half_of_the_rounds(name: str, n: int) -> None:
    rounds = 300
    counts = dict.fromkeys(range(n), 0)
    centres = dict.fromkeys(range(n), 0)
    for number in range(rounds):
        for centre, members in stars(b"fair", Round(number), overlay(name, n, 0), 1):
            centres[centre] += 1
            for member in members:
                counts[member] += 1
    assert min(counts.values()) >= rounds / 2
    assert min(centres.values()) >= rounds / n / 3


@pytest.mark.parametrize(
    ("name", "n", "borne"), [("ring", 8, 1), ("torus", 12, 2), ("path", 5, 1), ("path", 2, None), ("complete", 8, 3)]
)
def test_what_an_overlay_s_stars_bear_follows_from_its_degrees(name: str, n: int, borne: int | None) -> None:
    assert star_colluders(overlay(name, n, 0)) == borne


def test_an_overlay_that_cannot_bear_the_colluders_is_refused_with_the_number_that_it_can() -> None:
    averaging = AveragingTerms(topology="ring", colluders=2)
    (fault,) = averaging_faults(8, averaging, overlay("ring", 8, 0))
    assert "averaging.colluders is 2, and the stars of the overlay ring, of 3 members or more, bear 1" in fault
    assert not averaging_faults(8, AveragingTerms(topology="ring"), overlay("ring", 8, 0))
    (fault,) = averaging_faults(4, AveragingTerms(topology="edges", edges=(("a", "b"),)), nx.Graph([(0, 1), (2, 3)]))
    assert "no star of three takes their updates in" in fault


def test_stars_larger_than_a_sum_are_refused() -> None:
    assert not averaging_faults(64, AveragingTerms(topology="complete"), overlay("complete", 64, 0))
    (fault,) = averaging_faults(65, AveragingTerms(topology="complete"), overlay("complete", 65, 0))
    assert "stars of 65 members, and at most 64 can sum" in fault


def test_whoever_is_in_no_star_has_terms_of_its_own_and_all_others_those_of_their_centre() -> None:
    charter = charter_for(12, 4, topology="torus")
    plans = [GroupPlan.for_peer(charter, peer) for peer in charter.roster()]
    for number in map(Round, range(3)):
        centres = dict(stars(plans[0].beacon, number, plans[0].graph, 1))
        for plan in plans:
            terms = plan.terms(number)
            if terms.centre is None:
                assert terms.group == (plan.me,)
                assert not any(plan.me in members for members in centres.values())
            else:
                assert terms.group == centres[terms.centre]
                assert terms.aggregators(terms.group) == (terms.centre,)
                assert not terms.bears([member for member in terms.group if member != terms.centre])


def test_named_edges_are_checked_against_the_members() -> None:
    names = ("ant", "bee", "cat", "dog")
    graph = named_edges(names, (("bee", "ant"), ("bee", "cat"), ("cat", "dog")))
    assert sorted(map(sorted, graph.edges)) == [[0, 1], [1, 2], [2, 3]]
    with pytest.raises(InvalidConfig, match=r"averaging.edges: eel is not a member; there are ant, bee, cat, dog"):
        named_edges(names, (("ant", "eel"),))
    with pytest.raises(InvalidConfig, match=r"averaging.edges: no path leads from dog to the others"):
        named_edges(names, (("ant", "bee"), ("bee", "cat")))


@pytest.mark.parametrize(("name", "n", "degree"), [("torus", 9, 4), ("torus", 12, 4), ("hypercube", 8, 3)])
def test_grids_and_cubes_have_the_degree_that_they_should(name: str, n: int, degree: int) -> None:
    graph = overlay(name, n, 0)
    assert {each for _, each in graph.degree} == {degree}
    assert sorted(graph) == list(range(n))
    assert nx.is_connected(graph)


@pytest.mark.parametrize(("name", "n"), [("torus", 7), ("torus", 8), ("hypercube", 12)])
def test_numbers_that_no_grid_or_cube_has_are_refused(name: str, n: int) -> None:
    with pytest.raises(InvalidConfig, match="use exponential"):
        overlay(name, n, 0)
