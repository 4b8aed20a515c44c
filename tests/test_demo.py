"""`p2pfl demo`, whole: processes, signals, traces and what is left in the run's folder."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from p2pfl.core.errors import InvalidConfig, Malformed
from p2pfl.core.ids import PeerId
from p2pfl.core.trace import Note, PeerFinished, PeerStarted, RoundEnded
from p2pfl.gossip.mixing import consensus_distance
from p2pfl.learning.evaluation import Evaluation
from p2pfl.learning.task import load_task, make_model
from p2pfl.learning.vector import flatten, load_model
from p2pfl.node.checkpoints import Spent, read_spent
from p2pfl.node.federation import load_charter
from p2pfl.node.launcher import LocalFederation
from p2pfl.node.tracefile import TRACE_FILE, read_trace
from p2pfl.simulation import demo as demo_module
from p2pfl.simulation.demo import DemoSettings, prepare_demo, run_demo
from p2pfl.simulation.outcome import evaluate_run
from p2pfl.simulation.results import read_history

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
        self.rest = self.process.stdout.read()
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


@pytest.mark.parametrize("topology", ["groups", pytest.param("exponential", marks=pytest.mark.long)])
def test_every_peer_is_better_together_than_alone_and_equal_seeds_give_equal_models(
    tmp_path: Path, start: Callable[..., Demo], topology: str
) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    peers = [f"peer-{i}" for i in range(4)]
    for run in runs:
        demo = start(run, "--peers", "4", "--rounds", "40", "--seed", "3", "--topology", topology)
        assert demo.end() == 0
        summary = json.loads((run / "summary.json").read_text())
        for peer in summary["peers"]:
            assert peer["together"] > peer["alone"], peer
        assert consensus_distance(models_of(run, peers)) <= 1e-6
        for name in ("accuracy.png", "consensus.png", "overlay.png", "report.txt", "settings.toml"):
            assert (run / name).stat().st_size > 0
    np.testing.assert_array_equal(models_of(runs[0], peers), models_of(runs[1], peers))


def test_noise_is_paid_for_in_every_peer_s_ledger_and_training_ends_with_the_budget(
    tmp_path: Path, start: Callable[..., Demo]
) -> None:
    run = tmp_path / "run"
    demo = start(run, "--peers", "4", "--rounds", "8", "--noise", "2", "--epsilon", "6")
    assert demo.end() == 0
    charter = load_charter(run / "charter.toml")
    budget = charter.budget
    assert budget is not None
    assert 1 < charter.rounds == budget.rounds < 8
    for member in charter.members:
        state = run / "peers" / member.name / "state"
        rho = read_spent(state, charter.hash(), PeerId(member.peer_id)).rho
        assert rho == pytest.approx(budget.rounds * budget.rho, rel=1e-12)
        assert budget.spent(rho) <= 6
        events = [entry.event for entry in read_trace(run / "peers" / member.name / TRACE_FILE)]
        assert any(isinstance(event, Note) and "the privacy budget bears" in event.text for event in events)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["privacy"]["rounds"] == budget.rounds
    assert summary["privacy"]["noiseless"] is not None
    assert "without noise" in (run / "report.txt").read_text()


def watch(condition: Callable[[], bool]) -> None:
    """Look at files that another process writes until something is in them; the test's time limit ends it."""
    while not condition():
        time.sleep(0.005)


def heard(run: Path, name: str) -> set[int]:
    """Return the rounds whose average has something of a peer in it, as the others tell."""
    others = [path.name for path in (run / "peers").iterdir() if path.name != name]
    records = [record for other in others for record in rounds_of(run, other) if not record.settling]
    return {record.round for record in records if name in record.heard}


def spent_by(run: Path, name: str) -> Spent:
    charter = load_charter(run / "charter.toml")
    member = charter.member(name)
    assert member is not None
    return read_spent(run / "peers" / name / "state", charter.hash(), PeerId(member.peer_id))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the peers' processes through /proc")
@pytest.mark.parametrize("moment", ["between rounds", "in a round"])
def test_no_kill_makes_a_ledger_show_less_than_what_left(
    tmp_path: Path, start: Callable[..., Demo], moment: str
) -> None:
    """Both kinds of noise. What left is what the others averaged: they tell in their traces."""
    pytest.importorskip("opacus", reason="noise for examples needs it: pip install 'p2pfl-mesh[opacus]'")
    run, name = tmp_path / "run", "peer-1"
    demo = start(run, "--peers", "4", "--rounds", "250", "--noise", "1", "--example-noise", "1")
    demo.wait_for(" of 250, accuracy")
    before = spent_by(run, name), len(rounds_of(run, name))
    if moment == "in a round":
        # Its upload is written down, and about to leave.
        watch(lambda: spent_by(run, name).rho > before[0].rho)
    else:
        watch(lambda: len(rounds_of(run, name)) > before[1])
    os.kill(pid_of(run, name), signal.SIGKILL)
    at_kill = spent_by(run, name)
    again = [sys.executable, "-m", "p2pfl.cli", "peer", "--config", str(run / "peers" / name)]
    ended = subprocess.run(again, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr
    assert demo.end() == 0
    charter = load_charter(run / "charter.toml")
    sums, examples = charter.budget, charter.example_budget
    assert sums is not None
    assert examples is not None
    lives = [entry.event for entry in read_trace(run / "peers" / name / TRACE_FILE)]
    second = [event.resumed_at for event in lives if isinstance(event, PeerStarted)][1]
    left = heard(run, name)
    first = {round for round in left if round < second}
    assert len(first) > 1
    assert len(left) > len(first), "it was back in time"
    for known, rounds in ((at_kill, first), (spent_by(run, name), left)):
        assert known.rho >= len(rounds) * sums.rho * (1 - 1e-12)
        assert known.steps >= len(rounds) * examples.steps
    assert sums.spent(spent_by(run, name).rho) <= sums.epsilon
    assert examples.bears(spent_by(run, name).steps)


def test_noise_in_gradients_is_paid_for_and_nobody_is_told_the_loss(tmp_path: Path, start: Callable[..., Demo]) -> None:
    pytest.importorskip("opacus", reason="noise for examples needs it: pip install 'p2pfl-mesh[opacus]'")
    run = tmp_path / "run"
    assert start(run, "--peers", "4", "--rounds", "6", "--example-noise", "2", "--no-masks").end() == 0
    charter = load_charter(run / "charter.toml")
    budget = charter.example_budget
    assert budget is not None
    assert charter.rounds == 6
    for name in charter.names():
        assert spent_by(run, name) == Spent(0.0, 12)
        assert {(record.loss, record.group_loss, record.group_steps) for record in rounds_of(run, name)} == {
            (None,) * 3
        }
    assert budget.bears(12)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"example_noise": -1.0}, "--example-noise is above 0"),
        (
            {"example_noise": 1.0, "task": "tabular"},
            "--example-noise: the demo's tables are scaled by all members' data",
        ),
        ({"example_noise": 0.01}, "bears no round"),
        ({"noise": 1.0, "masks": False}, "--noise and --epsilon are for masked sums"),
        ({"noise": -1.0}, "--noise is above 0"),
        ({"epsilon": 500.0}, "--epsilon from 0 to 128"),
        ({"noise": 0.001, "epsilon": 1.0}, "bears no round"),
        ({"noise": 1.0, "task": "tabular"}, "set scaling to charter"),
    ],
)
def test_noise_that_a_demo_cannot_add_is_told_in_one_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidConfig, match=told) as raised:
        prepare_demo(tmp_path / "run", DemoSettings(peers=4, **changes))
    assert len(str(raised.value).splitlines()) == 1


def test_tables_of_four_banks_agree_on_the_scaling_and_are_better_together(
    tmp_path: Path, start: Callable[..., Demo]
) -> None:
    """Each peer reads a CSV of its own; on sockets, under masks."""
    run = tmp_path / "run"
    demo = start(run, "--task", "tabular", "--peers", "4", "--rounds", "40", "--seed", "1")
    assert demo.end() == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["metric"], summary["masked"], summary["missing"]) == ("auc", True, "")
    alone = [peer["alone"] for peer in summary["peers"]]
    together = [peer["together"] for peer in summary["peers"]]
    assert min(together) > max(0.6, float(np.mean(alone)))
    assert abs(together[0] - summary["central"]) < 0.04
    assert len(summary["further"]["ks"]["together"]) == 4
    assert "ks " in (run / "report.txt").read_text()
    models = [load_file(run / "peers" / f"peer-{number}" / "model.safetensors") for number in range(4)]
    assert all((models[0]["scaling.mean"] == model["scaling.mean"]).all() for model in models)
    measured = evaluate_run(run, None)
    assert isinstance(measured.evaluation, Evaluation)
    assert measured.classes == ("no", "yes")
    assert measured.evaluation.auc == pytest.approx(together[0], abs=1e-6)
    first = rounds_of(run, "peer-0")[0]
    assert (first.steps, len(first.enrolled)) == (0, 4)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the peers' processes through /proc")
def test_killing_one_peer_leaves_the_rest_finishing_their_rounds(tmp_path: Path, start: Callable[..., Demo]) -> None:
    run = tmp_path / "run"
    demo = start(run, "--peers", "4", "--rounds", "300", "--topology", "ring", "--no-masks")
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


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the peers' processes through /proc")
def test_a_peer_killed_in_a_masked_round_costs_at_most_that_round_in_its_group(
    tmp_path: Path, start: Callable[..., Demo]
) -> None:
    run = tmp_path / "run"
    demo = start(run, "--peers", "8", "--rounds", "60")
    demo.wait_for("round ")
    os.kill(pid_of(run, "peer-1"), signal.SIGKILL)
    assert demo.end() == 0
    told = len(rounds_of(run, "peer-1"))
    assert told < 60
    killed_in = {told, told + 1}  # the disk may have had what it had not told yet
    lost = set()
    for peer in (f"peer-{number}" for number in range(8) if number != 1):
        records = [record for record in rounds_of(run, peer) if not record.settling]
        assert [record.round for record in records] == list(range(60))
        costly = [record for record in records[told:] if record.outcome != "full"]
        assert all("peer-1" in {*record.enrolled, *record.absent} for record in costly)
        lost |= {record.round for record in costly}
        assert all("peer-1" not in record.heard for record in records[max(killed_in) + 1 :])
    assert len(lost) <= 1
    assert lost <= killed_in


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
    demo = start(run, "--peers", "3", "--rounds", "100")
    demo.wait_for("training")
    demo.process.kill()
    assert demo.end() == -signal.SIGKILL
    for peer in ("peer-0", "peer-1", "peer-2"):
        assert len([record for record in rounds_of(run, peer) if not record.settling]) == 100
        finished = read_trace(run / "peers" / peer / TRACE_FILE)[-1].event
        assert isinstance(finished, PeerFinished)
        assert finished.outcome == "done"


@pytest.mark.parametrize(("seen", "sent"), [("training", signal.SIGTERM), ("masked", signal.SIGINT)])
def test_what_a_terminal_sends_to_all_processes_stops_them_in_order(
    tmp_path: Path, start: Callable[..., Demo], seen: str, sent: signal.Signals
) -> None:
    run = tmp_path / "run"
    demo = start(run, "--peers", "3", "--rounds", "1000000")
    demo.wait_for(seen)
    os.killpg(demo.process.pid, sent)
    assert demo.end() == 130
    assert demo.rest.endswith("stopped\n")
    assert "Traceback" not in demo.rest
    if seen == "training":
        for peer in ("peer-0", "peer-1", "peer-2"):
            finished = read_trace(run / "peers" / peer / TRACE_FILE)[-1].event
            assert isinstance(finished, PeerFinished)
            assert finished.outcome == "stopped"


class FakeLauncher:
    """Peers that end after a few looks at them."""

    looks = 3
    stopped_after = -1

    def __init__(self, federation: LocalFederation, debug: bool) -> None:
        del federation, debug
        FakeLauncher.looks, FakeLauncher.stopped_after = 3, -1

    def start(self) -> None: ...

    def is_running(self) -> bool:
        FakeLauncher.looks -= 1
        return FakeLauncher.looks >= 0

    def read_new(self) -> dict[str, list[object]]:
        return {}

    def failures(self) -> dict[str, object]:
        return {}

    def stop(self) -> None:
        FakeLauncher.stopped_after = FakeLauncher.looks


class RaisingView:
    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.updates = 0

    def update(self, new: object) -> None:
        del new
        self.updates += 1
        raise self.error

    def tell(self, name: str, text: str, mark: str) -> None: ...


@pytest.mark.parametrize("error", [BrokenPipeError(), SystemExit(1), Malformed("line 3")])
def test_a_view_that_cannot_be_drawn_stops_no_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    monkeypatch.setattr(demo_module, "Launcher", FakeLauncher)
    view = RaisingView(error)
    # One member: a federation without any has none that ended well.
    assert run_demo(LocalFederation(tmp_path, (None,)), view) == {}  # type: ignore[arg-type]
    assert FakeLauncher.stopped_after == -1
    assert view.updates == 1
    assert ("line 3" in capsys.readouterr().err) == isinstance(error, Malformed)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals) -> None:
    monkeypatch.setattr(demo_module, "Launcher", FakeLauncher)
    before = signal.getsignal(sent)

    class View:
        def update(self, new: object) -> None:
            del new
            if FakeLauncher.looks == 2:
                signal.raise_signal(sent)

        def tell(self, name: str, text: str, mark: str) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        run_demo(LocalFederation(tmp_path, ()), View())
    assert FakeLauncher.stopped_after == 2
    assert signal.getsignal(sent) is before


def test_a_run_takes_no_other_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, settings = tmp_path / "runs" / "demo", DemoSettings(peers=3)
    assert [prepare_demo(path, settings, numbered=True).path.name for _ in range(3)] == ["demo", "demo-2", "demo-3"]
    with pytest.raises(InvalidConfig, match="is not empty"):
        prepare_demo(path, settings)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "_prepare", interrupted)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for folder in (tmp_path / "new", theirs):
        with pytest.raises(KeyboardInterrupt):
            prepare_demo(folder, settings)
    assert theirs.exists()
    assert not (tmp_path / "new").exists()


def test_peers_are_told_where_the_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    federation = prepare_demo(tmp_path / "run", DemoSettings(peers=3, task="cifar10", data="images"))
    assert [home.config.data["path"] for home in federation.homes] == [str(tmp_path / "images")] * 3
    with pytest.raises(InvalidConfig, match="no such file or folder"):
        prepare_demo(tmp_path / "other", DemoSettings(data="image"))
    with pytest.raises(InvalidConfig, match="made up"):
        prepare_demo(tmp_path / "other", DemoSettings(task="tabular", data="images"))


def test_a_history_is_read_in_whole_copies(tmp_path: Path) -> None:
    path = tmp_path / "history.f32"
    assert read_history(path, 3).shape == (0, 3)
    path.write_bytes(np.arange(7, dtype="<f4").tobytes() + b"x")
    np.testing.assert_array_equal(read_history(path, 3), np.arange(6, dtype=np.float32).reshape(2, 3))
