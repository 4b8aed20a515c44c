"""The standard network under drawn faults: many seeds, the cases that once failed, and how a failure is made small."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl import cli
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Seconds
from p2pfl.core.ledger import Uploading, Voted
from p2pfl.core.machine import Effect, Input, Persist, Persisted, Vector
from p2pfl.core.trace import Entry, Evaluated, RoundEnded, encode_entry
from p2pfl.gossip import session
from p2pfl.gossip.group_machine import GroupMachine
from p2pfl.simulation import soak
from p2pfl.simulation.faults import (
    MIXES,
    Crash,
    Cut,
    Freeze,
    Lie,
    Loss,
    Partition,
    Schedule,
    Slow,
    decode_schedule,
    encode_schedule,
    shrink,
    standard_mix,
)
from p2pfl.simulation.replay import run_mix, run_traced, tell
from p2pfl.simulation.soak import (
    HORIZON,
    Case,
    Failure,
    decode_case,
    encode_case,
    run_case,
    run_seeds,
    shrink_case,
    standard_network,
)

REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*.json"))
SEEDS = 1000


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_what_once_failed_does_not(path: Path) -> None:
    assert run_case(decode_case(path.read_text())) == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_seeds_of_the_standard_mix() -> None:
    failures = run_seeds(range(SEEDS))
    assert not failures, "\n".join(f"{failure.reason}: {failure.command()}" for failure in failures)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("group", "seeds"),
    [(4, 60), (8, 20), pytest.param(4, 400, marks=pytest.mark.long), pytest.param(8, 100, marks=pytest.mark.long)],
)
def test_masked_sums_under_the_standard_mix(group: int, seeds: int) -> None:
    failures = run_seeds(range(20_000, 20_000 + seeds), group=group, masked=True)
    assert not failures, "\n".join(f"{failure.reason}: {failure.command()}" for failure in failures)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seeds", [20, pytest.param(120, marks=pytest.mark.long)])
def test_changes_in_16_bits_under_the_standard_mix(seeds: int) -> None:
    failures = run_seeds(range(seeds), group=8, masked=True, bits=16)
    assert not failures, "\n".join(f"{failure.reason}: {failure.command()}" for failure in failures)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("topology", "peers", "mix", "seeds"),
    [("torus", 12, "standard", 25), ("exponential", 13, "hostile", 20), ("ring", 8, "standard", 15)],
)
def test_masked_stars(topology: str, peers: int, mix: str, seeds: int) -> None:
    failures = run_seeds(range(40_000, 40_000 + seeds), mix, topology=topology, peers=peers, masked=True)
    assert not failures, "\n".join(f"{failure.reason}: {failure.command()}" for failure in failures)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_seeds_of_a_network_worse_than_any_tcp() -> None:
    failures = run_seeds(range(100), "hostile")
    assert not failures, "\n".join(f"{failure.reason}: {failure.command()}" for failure in failures)


def test_without_faults_all_agree() -> None:
    for seed in range(5):
        net = standard_network(Case(seed, "none"))
        net.run(100)
        models = {peer.adopted[-1][1].tobytes() for peer in net.peers}
        assert len(models) == 1
        assert not any(peer.error for peer in net.peers)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_members_that_weigh_by_samples_get_through_faults_and_adopt_what_follows_from_the_uploads(
    seed: int, masked: bool
) -> None:
    assert run_case(Case(seed, masked=masked, weighted=True)) == ""


# Faults planted in the protocol are found


def test_a_wrong_sum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = session.reduce
    monkeypatch.setattr(session, "reduce", lambda chunks: right(chunks) * np.float32(1.001))
    assert "sends a result in round 0 that no uploads give" in run_case(Case(1, "none"))


def test_an_average_that_nobody_computed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = session.Session.average

    def wrong(self: session.Session) -> Vector | None:
        vector = right(self)
        return None if vector is None else vector * np.float32(1.001)

    monkeypatch.setattr(session.Session, "average", wrong)
    assert "adopts a base in round 0 that nobody computed" in run_case(Case(1, "none"))


@pytest.mark.parametrize(("record", "what"), [(Uploading, "uploads in round 0"), (Voted, "votes in round 0")])
def test_what_is_sent_before_its_record_is_durable_is_found(
    record: type, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = GroupMachine.handle

    def hasty(self: GroupMachine, input: Input, now: Seconds) -> list[Effect]:
        effects: list[Effect] = []
        for effect in right(self, input, now):
            waits = isinstance(effect, Persist) and isinstance(effect.record, record)
            effects += right(self, Persisted(effect.key), now) if waits and isinstance(effect, Persist) else [effect]
        return effects

    monkeypatch.setattr(GroupMachine, "handle", hasty)
    assert f"{what} before its record of that is durable" in run_case(Case(1, "none"))


# Drawing


@given(st.integers(0, 2**40), st.sampled_from(sorted(MIXES)))
@settings(max_examples=200)
def test_drawn_schedules_can_be_kept_and_end(seed: int, mix: str) -> None:
    drawn = MIXES[mix](seed, 8, HORIZON)
    assert decode_schedule(json.loads(json.dumps(encode_schedule(drawn)))) == drawn
    assert drawn == MIXES[mix](seed, 8, HORIZON)
    assert drawn.healed_at <= 4 * HORIZON
    gone = {fault.peer for fault in drawn.faults if isinstance(fault, Crash) and fault.restart_after is None}
    assert len(gone | drawn.liars) <= 2


def test_every_fault_is_drawn() -> None:
    kinds = {type(fault).__name__ for seed in range(300) for fault in standard_mix(seed, 8, HORIZON).faults}
    names = "Crash Freeze Slow Cut Partition Loss Delay Duplicate Reorder ClockSkew Lie"
    assert kinds == set(names.split())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"case": 2}', '{"case": 1, "seed": 1, "faults": [{"fault": "No"}]}'])
def test_files_that_are_no_cases_are_refused(text: str) -> None:
    with pytest.raises(InvalidConfig):
        decode_case(text)


def test_a_case_is_what_its_file_says() -> None:
    faults = Schedule((Partition(1.0, 2.0, ((1, 2), (3,)), silent=True), Crash(0.5, 1, None)))
    for case in (Case(7), Case(8, "hostile", faults, peers=5, says="why")):
        assert decode_case(encode_case(case)) == case


# Shrinking


def test_shrinking_leaves_what_it_takes() -> None:
    culprit = Crash(3.14159, 2, 8.0, keep_disk=False, silent=True)
    others = (Freeze(1.0, 4.0, 1), Loss(0.0, 9.0, 0.1), Slow(2.0, 3.0, 4, 20.0), Lie(1.0, 5, "nan"))
    cut = Cut(1.0, 17.0, 3, 4, one_way=False)
    tried = 0

    def fails(schedule: Schedule) -> bool:
        nonlocal tried
        tried += 1
        crashed = any(isinstance(fault, Crash) and fault.peer == 2 and not fault.keep_disk for fault in schedule.faults)
        return crashed and any(isinstance(fault, Cut) and fault.until - fault.at > 3 for fault in schedule.faults)

    small = shrink(Schedule((*others, culprit, cut)), fails)
    crash, short = small.faults
    assert crash == Crash(3.1, 2, 1.0, keep_disk=False, silent=False)
    assert isinstance(short, Cut)
    assert short.one_way
    assert 3 < short.until - short.at <= 6
    assert tried < 100


def test_shrinking_stops_when_its_tries_are_used_up() -> None:
    tried: list[Schedule] = []

    def fails(schedule: Schedule) -> bool:
        tried.append(schedule)
        return True

    shrink(standard_mix(3, 8, HORIZON), fails, tries=2)
    assert len(tried) <= 2


def broken(case: Case) -> str:
    """Stand for a protocol that breaks whenever peer 3 freezes."""
    frozen = [fault for fault in case.schedule().faults if isinstance(fault, Freeze) and fault.peer == 3]
    return f"m3 has not finished {case.seed} s after the last fault" if frozen else ""


def test_a_failure_is_shrunk_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "run_case", broken)
    seed = next(seed for seed in range(1000) if broken(Case(seed)) and len(Case(seed).schedule().faults) > 3)
    (failure,) = soak.run_cases([Case(seed), Case(0, "none")])
    lines: list[str] = []
    soak.keep(failure, tmp_path, lines.append)
    assert failure.command() == f"p2pfl replay --seed {seed} --mix standard"
    assert failure.command() in lines[1]
    (path,) = tmp_path.iterdir()
    assert str(path) in lines[2]
    kept = decode_case(path.read_text())
    assert [type(fault) for fault in kept.schedule().faults] == [Freeze]
    assert kept.says == failure.reason


def test_only_the_same_failure_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(case: Case) -> str:
        kinds = {type(fault) for fault in case.schedule().faults}
        return "m1, m2 have not finished 9 s" if {Freeze, Slow} <= kinds else "m1 raised" if Freeze in kinds else ""

    monkeypatch.setattr(soak, "run_case", two)
    case = Case(1, "standard", Schedule((Freeze(1.0, 1.5, 1), Slow(1.0, 1.5, 2, 2.0), Crash(1.0, 1, None))))
    small = shrink_case(case, "m7 has not finished 400 s")
    assert {type(fault) for fault in small.schedule().faults} == {Freeze, Slow}


@pytest.mark.slow
def test_soak_runs_on_all_cores_until_its_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--seconds", "1", "--seed", "5", "--mix", "none", "--keep", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("from seed 5 on, under none\n")
    assert " runs, 0 failed" in out
    assert not list(tmp_path.iterdir())


# Replaying


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["replay", *arguments])
    return int(ended.value.code or 0)


def test_a_case_s_command_runs_that_case(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(5, peers=6, group=3, masked=True, weighted=True, bits=16)
    command = Failure(case, "").command()
    assert command == "p2pfl replay --seed 5 --mix standard --group 3 --peers 6 --bits 16 --masks --weighted"
    assert run_cli(*command.split()[2:]) == 0
    told = capsys.readouterr().out
    assert told == "".join(f"{line}\n" for line in tell(run_traced(case)[0]))


def test_replay_tells_a_seed_and_a_saved_trace_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.jsonl"
    assert run_cli("--seed", "3", "--mix", "none", "--save", str(file)) == 0
    assert file.read_text().splitlines() == run_mix(3, "none")[0]
    capsys.readouterr()
    assert run_cli("--seed", "3", "--mix", "none") == 0
    told = capsys.readouterr().out
    assert run_cli(str(file)) == 0
    assert capsys.readouterr().out == told
    assert "trains in round 0" in told
    assert run_cli(str(file), "--peer", "m2", "--round", "1") == 0
    part = capsys.readouterr().out.splitlines()[1:]
    assert 20 < len(part) < len(told.splitlines()) / 10
    assert all(line.split()[1] in ("m2", "to", "writes", "reports", "Adopt(round=1,") or "->" in line for line in part)


def test_replay_runs_a_case_s_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "case.json"
    file.write_text(encode_case(Case(4, faults=Schedule((Crash(1.5, 2, 1.0),)))))
    assert run_cli(str(file)) == 0
    assert "FAULT Crash(at=1.5, peer=2, restart_after=1" in capsys.readouterr().out


def test_replay_says_what_went_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("p2pfl.simulation.replay.PATIENCE", 0.5)
    assert run_cli("--seed", "4", "--mix", "none") == 1
    assert "an invariant was violated: m0, m1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes a file or --seed"),
        (["--seed", "1", "--mix", "worst"], "no mix of faults is named worst"),
        (["pyproject.toml"], "no case of the simulated network"),
    ],
)
def test_replay_teaches(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_real_peer_s_trace_is_told_too() -> None:
    events = [Evaluated(0, {"loss": 2.0}), RoundEnded(1, 0.5, ("b",), {"c": "late"}, 0.25, 0.0, settling=False)]
    lines = [encode_entry(Entry(1000.0 + number, 0, 0, event)) for number, event in enumerate(events)]
    assert list(tell(lines)) == [
        "1000.000  evaluated(rounds=0, metrics={loss: 2})",
        "1001.000  round(round=1, seconds=0.5, heard=[b], absent={c: late}, loss=0.25, spread=0, settling=False, "
        "attempt=0, steps=0, weight=0, clipped=0)",
    ]
    assert len(list(tell(lines, round=1))) == 1


def test_a_trace_that_is_cut_short_says_where() -> None:
    lines, reason = run_traced(Case(2, "none"))
    assert reason == ""
    with pytest.raises(InvalidConfig, match="line 100 is no line"):
        list(tell([*lines[:99], lines[99][:20]]))


def test_what_is_lost_is_told() -> None:
    lines, _ = run_traced(Case(2, faults=Schedule((Loss(0.5, 2.0, 0.3),))))
    assert any("lost from m" in line for line in tell(lines))
    assert any("healed Loss" in line for line in tell(lines))
    quiet, all_ = (len(list(tell(lines, everything=everything))) for everything in (False, True))
    assert quiet < all_
