"""`examples/four-banks`, whole: four organizations from `p2pfl init` to a model, a crash on the way."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from p2pfl.core.trace import Event, PeerFinished, PeerStarted, RoundEnded
from p2pfl.node.tracefile import TRACE_FILE, read_trace
from tests.test_demo import running_in_group

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "four-banks" / "rehearsal.py"
BANKS = ("bank-a", "bank-b", "bank-c", "bank-d")
KILLED, STOPPED = "bank-c", "bank-b"
ROUNDS = 10


@dataclass(frozen=True)
class Rehearsal:
    """What it printed, and its folder."""

    said: str
    run: Path

    def events(self, bank: str) -> list[Event]:
        return [entry.event for entry in read_trace(self.run / bank / bank / "run" / TRACE_FILE)]

    def rounds(self, bank: str) -> list[RoundEnded]:
        return [event for event in self.events(bank) if isinstance(event, RoundEnded)]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    run = tmp_path_factory.mktemp("rehearsal") / "run"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--run", str(run)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert not running_in_group(process.pid)
        yield Rehearsal(said, run)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_all_four_finish_ten_rounds_with_one_model(rehearsal: Rehearsal) -> None:
    for bank in BANKS:
        last = rehearsal.events(bank)[-1]
        assert isinstance(last, PeerFinished)
        assert last.outcome == "done"
        assert last.round > ROUNDS
        audits = {ended.audit for ended in rehearsal.rounds(bank)}
        assert "passed" in audits
        assert not any("refuted" in audit for audit in audits)
    assert json.loads((rehearsal.run / "report.json").read_text())["apart"] == 0


def test_a_crash_costs_the_others_no_round_and_whoever_was_away_takes_part_again(rehearsal: Rehearsal) -> None:
    starts = [event for event in rehearsal.events(KILLED) if isinstance(event, PeerStarted)]
    assert len(starts) == 2
    crashed = starts[1].resumed_at
    assert 0 < crashed < ROUNDS
    before, now, *after = [ended for ended in rehearsal.rounds("bank-a") if ended.round >= crashed - 1]
    assert KILLED in before.heard
    assert now.outcome == "full"
    assert STOPPED in now.heard
    # Two can hide nothing from each other: nothing is averaged before a third is back.
    assert all(len(ended.heard) >= 2 for ended in after if ended.outcome == "full")
    back = {bank for ended in after for bank in ended.heard}
    assert back & {KILLED, STOPPED}
    assert re.search(r"members +away: .*bank-c", rehearsal.said)


def test_every_bank_is_better_together_than_alone(rehearsal: Rehearsal) -> None:
    banks = json.loads((rehearsal.run / "report.json").read_text())["banks"]
    assert tuple(banks) == BANKS
    for bank, figures in banks.items():
        assert figures["auc_together"] >= figures["auc_alone"], bank
        assert 0 < figures["ks_alone"] < 1
        assert 0 < figures["ks_together"] < 1


def test_doctors_and_officers_are_told_what_is_wrong_and_what_is_not(rehearsal: Rehearsal) -> None:
    said = rehearsal.said
    assert "FAIL signatures: bank-a has not signed" in said
    assert "warn reach of bank-d: does not answer" in said
    assert "ok   reach of bank-d: answers: its doctor waits" in said
    assert "bank-a's signature is not for this charter: it was changed after signing" in said
    assert "verify-wire: passed" in said
    assert "in a network of its own" in said or "loopback" in said
