"""The report of a run in groups: how its rounds ended, and who was missing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from p2pfl.core.trace import Entry, Evaluated, PeerFinished, PeerStarted, RoundEnded, encode_entry
from p2pfl.node.federation import CHARTER_FILE, load_charter
from p2pfl.node.launcher import create_federation
from p2pfl.node.tracefile import TRACE_FILE
from p2pfl.simulation.plots import ROUNDS_DRAWN, exchanges, exchanges_figure
from p2pfl.simulation.report import report
from p2pfl.simulation.results import open_run

PEERS = 8
FULL, LATE, VOID = "full", "late", "void"
GONE, SLOW = "enroll: no advert; unreachable", "upload: nothing came; here"


def record(number: int, outcome: str, heard: tuple[str, ...], absent: dict[str, str]) -> RoundEnded:
    return RoundEnded(number, 0.4, heard, absent, 1.0, 0.0, False, outcome)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    data = [{"partition": "dirichlet", "alpha": 0.5, "peers": PEERS, "seed": 1, "index": i} for i in range(PEERS)]
    terms = {"training": {"rounds": 3}, "averaging": {"topology": "groups", "group_size": 4}}
    federation = create_federation(tmp_path, "digits", terms, data, seed=0)
    hash = load_charter(tmp_path / CHARTER_FILE).hash().hex()
    for home in federation.homes:
        name = home.config.name
        started = PeerStarted(name, home.identity().peer_id, hash, (), 4810, 180)
        if name == "peer-0":
            records = [record(0, VOID, (), {"peer-1": SLOW}), record(2, LATE, ("peer-1",), {})]
        else:
            # Of those who saw the end of round 1, most say that nothing came of peer-0.
            why = GONE if name == "peer-7" else SLOW
            records = [record(0, FULL, ("peer-3",), {}), record(1, FULL, ("peer-3",), {"peer-0": why})]
        events = [started, *records, Evaluated(3, {"accuracy": 0.5}), PeerFinished("done", 3, agreed=True)]
        lines = [encode_entry(Entry(1000.0 + at, 48100 * at, 48100 * at, each)) for at, each in enumerate(events)]
        (home.run_path / TRACE_FILE).write_text("".join(f"{line}\n" for line in lines))
    return tmp_path


def test_how_rounds_ended_and_who_was_missing_stands_below_the_table(run: Path) -> None:
    report(run)
    groups = json.loads((run / "summary.json").read_text())["groups"]
    assert groups == {
        "size": 4,
        "count": 2,
        "contraction": pytest.approx(1 / 7),
        "outcomes": {"full": 14, "partial": 0, "late": 1, "skip": 0, "void": 1},
        "absences": {"peer-0": {"upload: nothing came": 1}},
    }
    text = (run / "report.txt").read_text()
    assert "2 groups of about 4 drawn anew each round; each round leaves 0.143 of the variance" in text
    assert "14 full, 1 late, 1 void" in text
    assert "absent              peer-0 in 1 round: upload: nothing came 1" in text
    assert "spectral gap" not in text
    assert (run / "overlay.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("topology", "masks", "first", "drawn"),
    [
        ("groups", "on", record(0, FULL, ("peer-1", "peer-2"), {}), {(0, 1), (0, 2), (1, 2)}),
        ("ring", "on", replace(record(0, FULL, ("peer-1", "peer-2"), {}), leader="peer-1"), {(0, 1), (1, 2)}),
        ("ring", "on", record(0, "skip", (), {}), set()),
        ("ring", "off", record(0, "", ("peer-1", "peer-7"), {}), {(0, 1), (0, 7)}),
    ],
)
def test_the_exchanges_of_a_round_are_those_of_the_traces(
    topology: str, masks: str, first: RoundEnded, drawn: set[tuple[int, int]], tmp_path: Path
) -> None:
    data = [{"partition": "dirichlet", "alpha": 0.5, "peers": PEERS, "seed": 1, "index": i} for i in range(PEERS)]
    terms = {"training": {"rounds": 3}, "averaging": {"topology": topology, "masks": masks}}
    federation = create_federation(tmp_path, "digits", terms, data, seed=0)
    home = federation.homes[0]
    hash = load_charter(tmp_path / CHARTER_FILE).hash().hex()
    started = PeerStarted("peer-0", home.identity().peer_id, hash, (), 4810, 180)
    lines = [encode_entry(Entry(1000.0, 0, 0, each)) for each in (started, first)]
    (home.run_path / TRACE_FILE).write_text("".join(f"{line}\n" for line in lines))
    run = open_run(tmp_path)
    assert exchanges(run, 0) == drawn
    assert exchanges(run, 1) == set()
    assert len(exchanges_figure(run).axes) == ROUNDS_DRAWN
