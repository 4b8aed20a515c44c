"""The report of topologies that the lab alone has: figures, a picture of the first rounds, refusals in one line."""

import json
from pathlib import Path

import pytest

from p2pfl.cli import main
from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.graphs import GRAPHS
from p2pfl.gossip.schedule import SCHEDULES, WEIGHTS, options_of
from p2pfl.simulation.plots import png
from p2pfl.simulation.schedule_report import CHANGING, analyse_schedule
from p2pfl.simulation.topology_report import analyse
from tests.simulation.test_topology_report import printed

GUIDE = Path(__file__).parents[2] / "docs" / "simulation.md"


@pytest.mark.parametrize("name", CHANGING)
def test_every_changing_topology_is_told_drawn_and_given_as_json(name: str) -> None:
    report = analyse_schedule(name, 12)
    text = printed(report, 80)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("matrices", "heard", "sent a round", "contraction", "until exact", "who isolates an update"):
        assert word in text
    assert json.loads(report.to_json())["contraction"]["rounds"] == report.contraction.rounds
    assert 1 <= len(report.figure().axes) == len(report.first_rounds) <= 8


def test_the_picture_is_a_png() -> None:
    assert png(analyse_schedule("el-local", 6).figure()).startswith(b"\x89PNG")


def test_the_figures_are_those_of_the_rounds() -> None:
    base = analyse_schedule("base", 25)
    assert (base.period, base.contraction.exact_after, base.heard[::2]) == (9, 9, (0, 1))
    assert "9 rounds leave nothing" in printed(base, 80)
    hop = analyse_schedule("one-peer-exponential", 4)
    assert hop.first_rounds == (((1, 0), (2, 1), (3, 2), (0, 3)), ((2, 0), (3, 1), (0, 2), (1, 3)))
    assert "heard         1 other " in printed(hop, 80)
    assert analyse_schedule("moshpit", 9).sent_mean == pytest.approx(4 / 3), "lines of three add up in parts"
    assert analyse_schedule("static-exponential", 16).heard == (4, 4.0, 4)


def test_options_are_those_of_the_lab() -> None:
    regular = analyse("random-regular", 20, options={"degree": 6})
    assert (regular.name, regular.options, regular.degrees) == ("random-regular", {"degree": 6}, (6, 6.0, 6))
    assert "random-regular, degree = 6" in printed(regular, 80)
    base = analyse_schedule("base", 25, options={"degree": 4})
    assert (base.contraction.exact_after, base.heard) == (2, (4, 4.0, 4)), "25 is a power of 5"
    assert "base, degree = 4" in printed(base, 80)
    assert json.loads(base.to_json())["options"] == {"degree": 4}
    assert "stars of p2pfl topology torus, the overlay" in " ".join(
        printed(analyse_schedule("stars", 16, options={"overlay": "torus"}), 200).split()
    )
    with pytest.raises(InvalidConfig, match="base has no option 'sends'; it has degree, simple"):
        analyse_schedule("base", 25, options={"sends": 4})


def test_an_option_that_a_topology_does_not_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for asked, line in (
        ("ring --set degree=4", "ring has no option 'degree'; it has weights"),
        ("groups --set size=4", "--set: groups has no options here"),
        ("ring --set weights=uniform", "say --weights"),
        ("base --group-size 4", "--group-size: is of masked groups and stars, and base has none here"),
        ("base --set degree", "--set degree: write key=value"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["topology", *asked.split()])
        assert ended.value.code == 2
        assert line in " ".join(capsys.readouterr().err.split())


def test_bytes_take_the_place_of_lengths_where_the_model_is_known() -> None:
    report = analyse_schedule("one-peer-exponential", 8, parameters=1_000_000)
    assert "4.0 MB" in printed(report, 80)
    assert "|x|" not in printed(report, 80)
    assert json.loads(report.to_json())["bytes_mean"] == 4_000_000


@pytest.mark.parametrize(
    ("terms", "line"),
    [
        ({"peers": 1001}, "--peers: 2 to 1000, not 1001"),
        ({"colluders": 19}, "--colluders: 0 to 18"),
        ({"parameters": 0}, "--parameters: at least 1, not 0"),
    ],
)
def test_what_is_wrong_with_a_number_is_one_line(terms: dict[str, int], line: str) -> None:
    with pytest.raises(InvalidConfig, match=line):
        analyse_schedule("stars", **terms)  # type: ignore[arg-type]


def test_no_topology_has_two_reports() -> None:
    assert {*CHANGING, *GRAPHS, "groups", "graph"} == set(SCHEDULES)
    assert not {*CHANGING} & {*GRAPHS, "groups", "graph"}


def test_the_guide_has_a_line_for_every_topology_and_every_weight() -> None:
    section = GUIDE.read_text(encoding="utf-8").partition("\n## Topologies\n")[2].partition("\n## ")[0]
    for name in (*SCHEDULES, *WEIGHTS):
        assert f"\n| `{name}` | " in section, name
    for name in SCHEDULES:
        row = section.partition(f"\n| `{name}` | ")[2].partition("\n")[0]
        known = {"graph": "file"}
        options = {known.get(option, option) for option in options_of(name)} - {"beacon"}
        assert {word.strip("` ") for word in row.split("|")[1].split(",")} - {""} == options, name
