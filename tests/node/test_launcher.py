"""The processes of a federation: how they end, and what the launcher learns of it."""

import base64
import time
from pathlib import Path

import pytest

from p2pfl.crypto.identity import charter_faults
from p2pfl.node.federation import CHARTER_FILE, load_charter
from p2pfl.node.launcher import Failure, Launcher, create_federation, describe

TASK = """
import torch
import p2pfl

class Own(p2pfl.Task):
    def model(self):
        return torch.nn.Linear(3, 2)

    def data(self, settings):
        match settings["do"]:
            case "raise":
                raise ValueError("no such\\n  column")
            case "exit":
                raise SystemExit(0)
        examples = p2pfl.Examples(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
        return p2pfl.Data(train=examples, test=examples)
"""


def launcher(path: Path, *does: str) -> Launcher:
    path.mkdir()
    (path / "own.py").write_text(TASK)
    terms = {"training": {"rounds": 1_000_000}, "averaging": {"topology": "complete"}}
    return Launcher(create_federation(path, "own.py:Own", terms, [{"do": each} for each in does], seed=0))


@pytest.mark.parametrize("suite", ["aes", "sm4", "gm"])
def test_all_members_sign_with_every_key_of_the_suite(tmp_path: Path, suite: str) -> None:
    if suite == "gm":
        for name in ("fastecdsa", "gmssl_pyx"):
            pytest.importorskip(name, reason="the extra [gm] is not installed", exc_type=ImportError)
    made = create_federation(tmp_path / "run", "digits", {"security": {"suite": suite}}, [{}, {}], seed=0)
    charter = load_charter(made.path / CHARTER_FILE)
    assert charter_faults(charter) == []
    for member in charter.members:
        signature = base64.b64decode(charter.signatures[member.name])
        assert (len(signature), member.sm2_public_key is not None) == ((128, True) if suite == "gm" else (64, False))


def test_equal_ends_are_one_part_of_the_line() -> None:
    bad, other = Failure(2, "no such column"), Failure(1, "no memory")
    assert describe({"a": bad, "b": bad}, 2) == "all 2 peers failed: no such column"
    assert describe({"a": bad, "b": other, "c": bad}, 4) == "a, c failed: no such column; b failed: no memory"
    assert describe({"a": Failure(-9)}, 4) == "a killed by SIGKILL"
    assert describe({"a": Failure(255)}, 4) == "a failed: its process ended with 255"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_whatever_a_task_raises_becomes_a_reason_of_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    peers = launcher(tmp_path / "run", "raise", "exit", "raise")
    peers.start()
    for process in peers.processes.values():
        process.join()
    failures = peers.failures()
    assert all(failure.code in (1, 2) for failure in failures.values())
    assert "no such column" in failures["peer-0"].reason
    assert failures["peer-0"] == failures["peer-2"]
    assert "SystemExit" in failures["peer-1"].reason
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_peers_leave_when_asked(tmp_path: Path) -> None:
    peers = launcher(tmp_path / "run", "train", "train", "train")
    peers.start()
    try:
        begun: set[str] = set()
        while len(begun) < 3:
            begun |= {name for name, new in peers.read_new().items() if new}
            time.sleep(0.05)
    finally:
        peers.stop()
    assert not peers.is_running()
    assert peers.failures() == {}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_peers_that_have_only_just_been_started_are_stopped_too(tmp_path: Path) -> None:
    peers = launcher(tmp_path / "run", "train", "train")
    peers.start()
    peers.stop()
    assert not peers.is_running()
    assert "SIGKILL" not in describe(peers.failures(), 2)
