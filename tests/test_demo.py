"""`p2pfl demo`, whole: processes, signals, traces and what is left in the run's folder."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from p2pfl.core.trace import PeerFinished, RoundEnded
from p2pfl.gossip.mixing import consensus_distance
from p2pfl.learning.task import load_task, make_model
from p2pfl.learning.vector import flatten, load_model
from p2pfl.node.tracefile import TRACE_FILE, read_trace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Demo:
    """A demo in processes of its own. Its output ends when the last of them has: nothing else must be waited for."""

    def __init__(self, run: Path, *arguments: str) -> None:
        self.run = run
        command = [sys.executable, "-m", "p2pfl.cli", "demo", "--run", str(run), *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} never came: {''.join(seen)}")

    def end(self) -> int:
        """Wait for every process of the demo; return the command's exit code."""
        assert self.process.stdout is not None
        self.process.stdout.read()
        self.process.stdout.close()
        code = self.process.wait()
        assert not running_in_group(self.process.pid)
        return code


def running_in_group(group: int) -> list[str]:
    """Processes of a group, without those that have ended and wait for init to notice."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # pid (command) state parent group ...; the command may hold spaces and brackets.
            state, _, of = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state != "Z":
                found.append((process / "cmdline").read_text())
    return found


@pytest.fixture
def start() -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []

    def start(run: Path, *arguments: str) -> Demo:
        demos.append(Demo(run, *arguments))
        return demos[-1]

    yield start
    for demo in demos:
        # A test that failed half-way leaves nothing behind either.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.process.pid, signal.SIGKILL)
        demo.process.wait()
        if demo.process.stdout is not None:
            demo.process.stdout.close()


def rounds_of(run: Path, peer: str) -> list[RoundEnded]:
    entries = read_trace(run / "peers" / peer / TRACE_FILE)
    return [entry.event for entry in entries if isinstance(entry.event, RoundEnded)]


def models_of(run: Path, peers: list[str]) -> np.ndarray:
    vectors = []
    for peer in peers:
        model = make_model(load_task("digits", run).task)
        load_model(run / "peers" / peer / "model.safetensors", model)
        vectors.append(flatten(model))
    return np.stack(vectors)


def pid_of(run: Path, peer: str) -> int:
    """The process that has a peer's trace open."""
    trace = (run / "peers" / peer / TRACE_FILE).resolve()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if any(link.resolve() == trace for link in (process / "fd").iterdir()):
                    return int(process.name)
            except OSError:
                continue
    raise AssertionError(f"no process writes {trace}")


def test_every_peer_is_better_together_than_alone_and_equal_seeds_give_equal_models(
    tmp_path: Path, start: Callable[..., Demo]
) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    peers = [f"peer-{i}" for i in range(4)]
    for run in runs:
        demo = start(run, "--peers", "4", "--rounds", "40", "--seed", "3")
        assert demo.end() == 0
        summary = json.loads((run / "summary.json").read_text())
        for peer in summary["peers"]:
            assert peer["together"] > peer["alone"], peer
        assert consensus_distance(models_of(run, peers)) <= 1e-6
        for name in ("accuracy.png", "consensus.png", "overlay.png", "report.txt", "settings.toml"):
            assert (run / name).stat().st_size > 0
    np.testing.assert_array_equal(models_of(runs[0], peers), models_of(runs[1], peers))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the peers' processes through /proc")
def test_killing_one_peer_leaves_the_rest_finishing_their_rounds(tmp_path: Path, start: Callable[..., Demo]) -> None:
    run = tmp_path / "run"
    demo = start(run, "--peers", "4", "--rounds", "300", "--topology", "ring")
    demo.wait_for("round ")
    os.kill(pid_of(run, "peer-1"), signal.SIGKILL)
    assert demo.end() == 0
    killed_in = len(rounds_of(run, "peer-1"))
    assert killed_in < 300
    for peer in ("peer-0", "peer-2", "peer-3"):
        records = [record for record in rounds_of(run, peer) if not record.settling]
        assert [record.round for record in records] == list(range(300))
        lost = [record.absent for record in records if record.absent]
        assert all(set(absent) == {"peer-1"} for absent in lost)
        assert bool(lost) == (peer != "peer-3"), "peer-3 is no neighbor of peer-1 on this ring"
        finished = read_trace(run / "peers" / peer / TRACE_FILE)[-1].event
        assert isinstance(finished, PeerFinished)
        assert finished.outcome == "done"
    report = (run / "report.txt").read_text()
    assert "killed" in report


def test_ctrl_c_stops_every_peer_and_leaves_no_process(tmp_path: Path, start: Callable[..., Demo]) -> None:
    run = tmp_path / "run"
    demo = start(run, "--peers", "3", "--rounds", "1000000")
    demo.wait_for("training")
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == 130
    for peer in ("peer-0", "peer-1", "peer-2"):
        finished = read_trace(run / "peers" / peer / TRACE_FILE)[-1].event
        assert isinstance(finished, PeerFinished)
        assert finished.outcome == "stopped"


def test_peers_finish_without_their_launcher(tmp_path: Path, start: Callable[..., Demo]) -> None:
    run = tmp_path / "run"
    demo = start(run, "--peers", "3", "--rounds", "300")
    demo.wait_for("training")
    demo.process.kill()
    assert demo.end() == -signal.SIGKILL
    for peer in ("peer-0", "peer-1", "peer-2"):
        assert len([record for record in rounds_of(run, peer) if not record.settling]) == 300
        finished = read_trace(run / "peers" / peer / TRACE_FILE)[-1].event
        assert isinstance(finished, PeerFinished)
        assert finished.outcome == "done"
