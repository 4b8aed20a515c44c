"""The fault matrix of masked averaging: what befalls members at each stage, kills between any two effects, and liars.

A failure names its seed with the command that tells it: p2pfl replay --seed S --matrix N.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from p2pfl import cli
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.privacy import Noise
from p2pfl.core.trace import Note, Refused, RoundEnded
from p2pfl.gossip import chunks, secure_sum, session
from p2pfl.gossip.secure_sum import MaskTerms
from p2pfl.simulation import soak
from p2pfl.simulation.absence import PEERS, absence_network, absences, story
from p2pfl.simulation.faults import Crash
from p2pfl.simulation.invariants import Check
from p2pfl.simulation.matrix import (
    LIARS_OUTCOMES,
    STAGES,
    Kill,
    Plan,
    Strike,
    Verdict,
    draw_plan,
    integer_average,
    kills,
    matrix_network,
    plan_of,
    possible_outcomes,
    run_all,
    run_plan,
    votes_needed,
)
from p2pfl.simulation.soak import PATIENCE

MOST_EXCUSED = 0.0
"""The share of rounds that may end by a weakness of today's protocol; see `Judge.weak`."""


def failures(verdicts: list[Verdict]) -> str:
    return "\n".join(str(verdict) for verdict in verdicts if verdict.reason)


def excused(verdicts: list[Verdict]) -> float:
    return sum(verdict.weak for verdict in verdicts) / len(verdicts)


# Stage x stage x role


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("members", "seeds", "outcomes"), [(4, 1000, {"full", "partial", "void"}), (8, 200, {"full", "partial"})]
)
def test_the_matrix(members: int, seeds: int, outcomes: set[str]) -> None:
    """Each stage and each pair of stages at least once: 152 of them, in turn.

    Six of eight are left for a certificate; two of four are not.
    """
    verdicts = run_all([draw_plan(seed, members) for seed in range(seeds)])
    assert not failures(verdicts), failures(verdicts)
    assert excused(verdicts) <= MOST_EXCUSED
    struck = [verdict for verdict in verdicts if verdict.hit]
    assert len(struck) > 0.95 * len(verdicts)
    reached = {outcome for verdict in struck for outcome in verdict.outcome.split(" and ")}
    assert reached - {"skip", "late", "waits"} == outcomes


def test_every_stage_alone() -> None:
    verdicts = [run_plan(draw_plan(seed, 4)) for seed in range(len(STAGES))]
    assert not failures(verdicts), failures(verdicts)
    assert excused(verdicts) <= MOST_EXCUSED


@pytest.mark.parametrize(
    ("seed", "members"),
    [
        (416, 4),  # a dead member's long acknowledgement, and a living one's short one
        (418, 4),
        (52, 8),  # the only copy of a chunk died
        (49, 8),  # members that have measured nothing wait longer than others
        (89, 8),  # a member that came back without its disk makes no sum of the round it forgot
        (116, 8),  # nor one that was killed, and took part in the next round
        (386, 8),  # one that was cut off takes nobody for gone that it has only not heard again
    ],
)
def test_a_death_costs_nobody_a_vote_or_a_chunk(seed: int, members: int) -> None:
    verdict = run_plan(draw_plan(seed, members))
    assert not verdict.reason
    assert not verdict.weak


def test_one_that_is_a_round_ahead_waits_for_the_others_adverts() -> None:
    """With exactly as many left as a sum takes, who skipped at their first word would be ahead again, and so on."""
    network, judge = matrix_network(draw_plan(86, 4))
    judge.run()
    for place in judge.spared:
        ended = [event for _, event in network.peers[place].events if isinstance(event, RoundEnded)]
        assert sum(event.outcome == "skip" for event in ended) <= 1


def test_the_plan_covers_each_stage_and_each_pair() -> None:
    drawn = [tuple(strike.stage for strike in draw_plan(seed, 4).strikes) for seed in range(152)]
    assert Counter(map(len, drawn)) == {1: 16, 2: 136}
    assert len(set(drawn)) == 152
    roles = {strike.role for seed in range(1000) for strike in draw_plan(seed, 4).strikes}
    fates = {strike.fate for seed in range(1000) for strike in draw_plan(seed, 4).strikes}
    assert roles == {"anybody", "enroller", "proposer", "last", "deputy", "charge"}
    assert fates == {"killed", "back", "wiped", "frozen", "cut off", "slow"}


ABSENT, READY, ACKNOWLEDGED, VOTED, REVEALED = range(5)


@pytest.mark.parametrize(
    ("group", "levels", "outcomes"),
    [
        (4, {}, {"full"}),
        (4, {3: ABSENT}, {"full"}),
        (4, {3: ABSENT, 2: ABSENT}, {"waits", "skip"}),
        (4, {3: ABSENT, 2: READY}, {"void"}),
        (4, {3: READY}, {"full"}),
        (4, {3: VOTED}, {"full"}),
        (4, {3: READY, 2: ACKNOWLEDGED}, {"void"}),
        (4, {3: VOTED, 2: VOTED}, {"void"}),
        (8, {7: ABSENT, 6: ABSENT}, {"full"}),
        (8, {7: ABSENT, 6: ABSENT, 5: READY}, {"full"}),
        (8, {7: ABSENT, 6: ABSENT, 5: READY, 4: READY}, {"void"}),
        (8, {7: VOTED, 5: VOTED}, {"full", "partial"}),
        (8, {7: REVEALED, 6: REVEALED}, {"full", "partial"}),
        (8, {7: READY, 6: READY, 5: READY}, {"void"}),
    ],
)
def test_the_walks(group: int, levels: dict[int, int], outcomes: set[str]) -> None:
    """Those of docs/rounds.md and of the design: three quarters must vote, and give shares for whoever is silent."""
    members = [place for place in range(group) if levels.get(place) != ABSENT]
    survivors = [place for place in members if levels.get(place) != READY]
    assert possible_outcomes(members, survivors, 3, group, levels) == outcomes


def test_three_quarters_vote() -> None:
    assert [votes_needed(members) for members in (3, 4, 5, 6, 7, 8)] == [3, 3, 4, 5, 6, 6]


def test_the_sum_is_one_of_integers() -> None:
    vectors = [np.array([1.0, -2.5, 1e-7], np.float32), np.array([3.0, 0.5, 1e-7], np.float32)]
    assert np.abs(integer_average(vectors, 4) - [2.0, -1.0, 1e-7]).max() < 64 / 2**28


# Faults planted in the protocol are found


def test_an_average_that_is_off_by_one_unit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunks.decode_into

    def off(ring, total, contributors, divisor, out, *others):  # type: ignore[no-untyped-def]
        squared = right(ring, total, contributors, divisor, out, *others)
        out += np.float32(ring.step)
        return squared

    monkeypatch.setattr(chunks, "decode_into", off)
    assert "nobody computed" in run_plan(Plan(1, 4, 0)).reason


def test_a_second_reveal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = secure_sum.Secrets.reveal

    def other(self: secure_sum.Secrets, survivors: tuple[int, ...]) -> object:
        return right(self, survivors[1:])

    monkeypatch.setattr(secure_sum.Secrets, "reveal", other)
    assert "reveals both kinds" in run_plan(Plan(1, 4, 0)).reason


def test_a_vote_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "threshold", lambda members: members)
    monkeypatch.setattr("p2pfl.gossip.release.threshold", lambda members: members)
    dies = Strike("Vote", "before", "anybody", 1, "killed", 0.0, 0.0, silent=False)
    assert "void, and not full" in run_plan(Plan(1, 4, 0, (dies,))).reason


# Killed at any instruction


@pytest.mark.parametrize("place", [0, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 2, 3))])
def test_a_peer_that_is_killed_between_any_two_effects_never_uploads_votes_or_reveals_twice(place: int) -> None:
    """`SpentOnce` and `RevealedOnce` hold at each step, over all lives; and the other three's sum is exact."""
    plans = kills(1, 4, place)
    assert len(plans) > 40
    verdicts = [run_plan(plan) for plan in plans]
    assert not failures(verdicts), failures(verdicts)
    assert all(verdict.hit == 1 for verdict in verdicts)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_kills_between_effects_in_a_group_of_eight() -> None:
    verdicts = run_all([plan for seed in (2, 3) for plan in kills(seed, 8, seed)[:: 3 + seed]])
    assert not failures(verdicts), failures(verdicts)


def test_a_record_that_was_being_written_is_on_the_disk_or_not() -> None:
    plans = kills(1, 4, 0)
    twice = [plan.kill for plan in plans if plan.kill is not None and plan.kill.kept]
    assert len(twice) == 3, "uploading, voted, checkpoint"


@pytest.mark.parametrize("stage", ["Challenge", "Products"])
def test_whatever_befalls_somebody_while_sums_are_checked(stage: str) -> None:
    """All that a seed draws for one victim, at the stages of the check."""
    drawn = [draw_plan(seed, 4) for seed in range(16, 26)]
    plans = [replace(plan, strikes=(replace(plan.strikes[0], stage=stage),)) for plan in drawn]
    verdicts = run_all(plans)
    assert not failures(verdicts), failures(verdicts)
    assert {verdict.hit for verdict in verdicts} == {1}


# Liars


@pytest.mark.parametrize("lie", sorted(LIARS_OUTCOMES))
@pytest.mark.parametrize("members", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_liar_costs_at_most_the_round(lie: str, members: int) -> None:
    """Never a second set of survivors, never another sum than the survivors'; `LIARS_OUTCOMES` says what it may cost.

    A result that is none is noticed, and its chunk's deputy replaces it.
    """
    verdicts = [run_plan(Plan(seed, members, 0, lie=lie)) for seed in range(3)]
    assert not failures(verdicts), failures(verdicts)


@pytest.mark.parametrize("members", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_falsified_sum_is_found_out(members: int) -> None:
    """An aggregator signs a sum that is off in one value: within the range, its canary whole."""
    for seed in range(3):
        network, judge = matrix_network(Plan(seed, members, 0, lie="falsify"))
        network.run(PATIENCE)
        judge.verify()
        (liar,) = network.faults.liars
        told = f"that {network.peers[liar].name} signed was refuted"
        notes = [event.text for peer in network.peers for _, event in peer.events if isinstance(event, Note)]
        assert sum(told in note for note in notes) >= members - 1


def test_a_falsified_sum_with_noise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise hides no lie: what is checked is what was contributed, noise and all."""
    noise = Noise(clip=1.0, multiplier=2.0, honest=2)
    monkeypatch.setattr(soak, "MaskTerms", partial(MaskTerms, noise=noise))
    monkeypatch.setattr(soak, "AveragesComputed", lambda *_: Check())  # no average is that of the updates
    for seed in range(3):
        network, _ = matrix_network(Plan(seed, 4, 0, lie="falsify"))  # its judge knows exact averages alone
        network.run(PATIENCE)
        (liar,) = network.faults.liars
        told = f"that {network.peers[liar].name} signed was refuted"
        for peer in network.peers:
            if peer.place == liar:
                continue
            events = [event for _, event in peer.events]
            assert any(isinstance(event, Note) and told in event.text for event in events)
            first = next(event for event in events if isinstance(event, RoundEnded))
            assert (first.outcome, len(first.heard)) == ("full", 3), "the chunk's deputy replaces it"
            assert peer.finished


def test_a_forged_advert_costs_its_sender_its_links() -> None:
    network, judge = matrix_network(Plan(1, 4, 0, lie="forge"))
    network.run(PATIENCE)
    judge.verify()
    (liar,) = network.faults.liars
    honest = [peer for peer in network.peers if peer.place != liar]
    refused = {event.who for peer in honest for _, event in peer.events if isinstance(event, Refused)}
    assert refused == {network.peers[liar].name}


# Absence


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lasting", [False, pytest.param(True, marks=pytest.mark.long)])
def test_with_three_in_ten_away_the_others_go_on(lasting: bool) -> None:
    """Seven of 24, over 50 rounds: in turn, coming back with their disks; or the same ones, to the end."""
    network = absence_network(1, lasting=lasting)
    network.run(PATIENCE)
    told = story(network)
    assert told.passed >= 50
    assert told.waiting == 0
    assert told.models == 1, "all that are left end with one model, whoever was away included"
    assert told.share("full", "late") >= (0.9 if lasting else 0.5)
    assert told.share("void", "partial") <= 0.05


def test_absences_overlap_as_asked() -> None:
    schedule = absences(1, PEERS, 7, 100.0, 10.0)
    spans = [(fault.at, fault.at + fault.restart_after, fault.peer) for fault in schedule.faults if _is_back(fault)]
    for moment in np.arange(3.5, 102.5, 0.5):
        assert len({place for begin, end, place in spans if begin <= moment < end}) == 7
    assert len({place for _, _, place in spans}) > 15


def _is_back(fault: object) -> bool:
    return isinstance(fault, Crash) and fault.restart_after is not None


# Replaying


@pytest.mark.parametrize(
    "plan", [draw_plan(3, 4), Plan(3, 4, 0, kill=Kill(1, 7, kept=True)), Plan(3, 4, 0, lie="two sets")]
)
def test_a_case_s_command_names_it(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"kill": str(plan.kill or ""), "lie": plan.lie}
    assert plan_of(plan.seed, plan.members, **options) == plan
    command = ["replay", "--seed", "3", "--matrix", "4"]
    command += [part for name, value in options.items() if value for part in (f"--{name}", value)]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert not ended.value.code
    assert "trains in round 0" in capsys.readouterr().out
    assert " ".join(command) == plan.command().removeprefix("p2pfl ").replace("'", "")


@pytest.mark.parametrize(("members", "kill", "lie"), [(3, "", ""), (4, "1/2", ""), (4, "", "truth")])
def test_cases_that_are_none_are_refused(members: int, kill: str, lie: str) -> None:
    with pytest.raises(InvalidConfig):
        plan_of(1, members, kill, lie)
