"""The report of a topology: its figures are those of the closed forms, and every refusal is one line."""

import io
import json
from pathlib import Path

import networkx as nx
import pytest
from rich.console import Console

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.graphs import draw
from p2pfl.gossip.schedule import SCHEDULES, WEIGHTS
from p2pfl.simulation.plots import png
from p2pfl.simulation.schedule_report import ScheduleReport
from p2pfl.simulation.topology_report import Mode, TopologyReport, analyse, topologies


def mode(report: TopologyReport, name: str) -> Mode:
    return next(each for each in report.modes if each.name == name)


def printed(report: TopologyReport | ScheduleReport, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(report)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_the_figures_of_a_ring_are_those_of_the_closed_forms() -> None:
    report = analyse("ring", 8, group_size=4)
    assert (report.degrees, report.diameter, len(report.links)) == ((2, 2.0, 2), 4, 8)
    assert report.spectral_gap == pytest.approx(1 - (1 / 3 + 2 / 3 * 2**-0.5))
    neighborhoods = mode(report, "neighborhoods")
    assert (neighborhoods.isolating, neighborhoods.offered) == (2, False)
    assert neighborhoods.cosine == pytest.approx(2**-0.5), "each reads a sum of two others"
    groups = mode(report, "groups")
    assert (groups.isolating, groups.lying, groups.after_dropouts) == (3, 2, 2)
    assert (groups.cosine, groups.cosine_after_dropouts) == pytest.approx((3**-0.5, 2**-0.5))
    assert groups.sent_mean == pytest.approx(7 / 4)
    stars = mode(report, "stars")
    assert (stars.isolating, stars.cosine, stars.sent_most) == (2, pytest.approx(2**-0.5), 2)


def test_small_weights_are_in_the_cosines_of_masked_sums_only() -> None:
    even, uneven = analyse("complete", 8), analyse("complete", 8, alpha_min=0.5)
    assert mode(uneven, "groups").cosine == pytest.approx((1 + 6 * 0.25) ** -0.5)
    assert mode(uneven, "neighborhoods").cosine == mode(even, "neighborhoods").cosine


def test_what_does_not_bear_the_colluders_is_refused_with_the_number_that_it_bears() -> None:
    report = analyse("ring", 20, colluders=4, group_size=4)
    assert mode(report, "stars").refused == "no star bears 4 colluders: the largest, of 3, bears 1"
    assert mode(report, "groups").refused == "groups of 4 do not bear 4 colluders: they bear 1"
    assert "refused" in printed(report)


def test_two_peers_have_no_masked_sum_and_the_report_says_so() -> None:
    report = analyse("ring", 2, colluders=0)
    assert mode(report, "stars").refused is not None
    assert mode(report, "groups").refused is not None
    assert report.solved_after is None


def test_groups_drawn_anew_are_solved_in_time_and_one_group_never() -> None:
    several, one = analyse("groups", 8, group_size=4), analyse("groups", 8)
    assert several.solved_after is not None
    assert f"can after {several.solved_after} rounds of groups drawn anew" in printed(several)
    assert one.solved_after is None
    assert "cannot in any number of rounds" in printed(one)


def test_bytes_take_the_place_of_lengths_where_the_model_is_known() -> None:
    report = analyse("ring", 8, parameters=1_000_000)
    assert "8.0 MB" in printed(report)
    assert "|x|" not in printed(report)
    modes = {each["name"]: each for each in json.loads(report.to_json())["modes"]}
    assert modes["neighbors"]["bytes_mean"] == 8_000_000
    assert "bytes_mean" not in analyse("ring", 8).to_json()


def test_a_table_fits_a_terminal_of_eighty_columns() -> None:
    assert max(map(len, printed(analyse("random-regular", 20), width=80).splitlines())) <= 80


def test_a_file_names_the_peers(tmp_path: Path) -> None:
    path = tmp_path / "banks.txt"
    path.write_text("north south\nsouth east\neast north\neast west\n")
    report = analyse(str(path))
    assert report.names == ("north", "south", "east", "west")
    found = mode(report, "neighborhoods")
    assert (found.isolating, found.colluders, found.victim) == (1, ("west",), "east")
    other = tmp_path / "ring.graphml"
    nx.write_graphml(nx.cycle_graph(5), other)
    assert analyse(str(other)).degrees == (2, 2.0, 2)


@pytest.mark.parametrize(
    ("terms", "line"),
    [
        ({"peers": 5}, "leave out --peers"),
        ({"text": "a b\nc d\n"}, "banks.txt: not connected"),
        ({"text": "\xff\xfe"}, "banks.txt: no text in UTF-8"),
        ({"colluders": 3}, "--colluders: 0 to 1, all peers but two"),
        ({"colluders": -1}, "--colluders: 0 to 1"),
        ({"group_size": 2}, "--group-size: at least 3, not 2"),
        ({"alpha_min": 0.0}, "alpha-min must be above 0"),
        ({"parameters": 0}, "--parameters: at least 1, not 0"),
    ],
)
def test_what_is_wrong_with_a_file_or_a_number_is_one_line(terms: dict[str, object], line: str, tmp_path: Path) -> None:
    path = tmp_path / "banks.txt"
    path.write_text(str(terms.pop("text", "a b\nb c\n")), encoding="latin-1")
    with pytest.raises(InvalidConfig, match=line):
        analyse(str(path), **terms)  # type: ignore[arg-type]


def test_weights_are_compared_by_their_spectral_gaps() -> None:
    gaps = {name: analyse("barabasi-albert", 16, weights=name).spectral_gap for name in WEIGHTS if name != "push"}
    assert gaps["max-degree"] < gaps["metropolis-hastings"] < gaps["optimal"], "of these each is symmetric"
    # (I + A) / (1 + d) of a star of n: eigenvalues 1, 1/2 and 1/n - 1/2.
    star = analyse("star", 9, weights="uniform")
    assert (star.spectral_gap, star.kind) == (pytest.approx(1 / 2), "row")
    assert "only rows sum to 1" in printed(star)
    assert analyse("ring", 9, weights="uniform").spectral_gap == pytest.approx(analyse("ring", 9).spectral_gap)


@pytest.mark.parametrize(
    ("source", "weights", "line"),
    [
        ("ring", "push", "--weights: push is for links that go one way"),
        ("ring", "heavy", "--weights: 'heavy' is unknown; there are metropolis-hastings"),
        ("groups", "uniform", "--weights: groups makes its own"),
        ("base", "uniform", "--weights: base makes its own"),
    ],
)
def test_weights_that_there_are_not_are_refused(source: str, weights: str, line: str) -> None:
    with pytest.raises(InvalidConfig, match=line):
        analyse(source, 8, weights=weights)


def test_the_picture_of_groups_shows_one_rounds_groups_and_who_isolates_in_one_of_them() -> None:
    report = analyse("groups", 24)
    axes = report.figure().axes[0]
    assert axes.get_title(loc="left") == "groups, those of round 0: 24 peers, 84 links", "3 groups of 8"
    shown = {str(each.get_label()): len(each.get_offsets()) for each in axes.collections if each.get_label()[0] != "_"}
    assert shown == {"other peers": 16, "7 that collude": 7, "whose update they isolate": 1}
    assert mode(report, "groups").isolating == 7
    refused = analyse("groups", 24, group_size=4, colluders=4).figure().axes[0]
    assert [str(each.get_label()) for each in refused.collections][1:] == ["other peers"]


def test_a_geometric_graph_is_drawn_where_its_nodes_are() -> None:
    report = analyse("geometric", 12, seed=3)
    assert report.places is not None
    assert dict(enumerate(report.places)) == {
        node: tuple(place) for node, place in draw("geometric", 12, 3).nodes(data="pos")
    }
    drawn = report.figure().axes[0].collections[1].get_offsets()
    assert {tuple(each) for each in drawn.tolist()} <= set(report.places)
    assert analyse("grid", 12).places is None


@pytest.mark.parametrize("name", ["ring", "barabasi-albert"])
def test_the_picture_is_a_png(name: str) -> None:
    assert png(analyse(name, 12).figure()).startswith(b"\x89PNG")


def test_each_topology_is_listed_with_a_sentence() -> None:
    listed = dict(topologies())
    assert set(listed) == set(SCHEDULES) - {"graph"}, "what the lab takes"
    assert all(what.endswith(".") for what in listed.values())
