import numpy as np
import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.trace import PeerFinished
from p2pfl.node.tracefile import TRACE_FILE
from p2pfl.simulation.results import Outcome, open_run, outcome_of
from tests.simulation.conftest import PARAMETERS, kill, write_trace


def test_a_run_is_read_whole(run):
    opened = open_run(run.path)
    assert opened.charter == run.charter
    assert opened.settings == {"task": "digits", "peers": 3}
    assert [peer.name for peer in opened.peers] == ["peer-0", "peer-1", "peer-2"]
    for number, peer in enumerate(opened.peers):
        assert peer.outcome == Outcome("done", 6, agreed=True)
        np.testing.assert_array_equal(peer.model, run.model(number))
        np.testing.assert_array_equal(peer.history, run.copies(number))
        assert peer.evaluations()[3]["accuracy"] == pytest.approx(0.4 + number / 100)
        assert peer.traffic() == (peer.entries[-1].bytes_in, peer.entries[-1].bytes_out)


def test_a_killed_peer_leaves_what_it_has(run):
    kill(run, 1, rounds=2)
    opened = open_run(run.path)
    killed = opened.peers[1]
    assert killed.outcome == Outcome("killed", 2)
    assert killed.model is None
    assert killed.history.shape == (3, PARAMETERS)
    assert opened.peers[0].outcome.kind == "done"


def test_a_peer_that_never_ran(run):
    for file in (TRACE_FILE, "history.f32", "model.safetensors"):
        (run.home(2).run_path / file).unlink()
    peer = open_run(run.path).peers[2]
    assert peer.outcome == Outcome("missing", 0)
    assert peer.history.shape == (0, PARAMETERS)
    assert peer.started is None
    assert peer.traffic() == (0, 0)


def test_a_model_of_an_earlier_run_is_not_this_runs(run):
    write_trace(run, 0, end=False)
    assert open_run(run.path).peers[0].model is None


def test_only_the_latest_run_in_a_trace_counts(run):
    path = run.home(0).run_path / TRACE_FILE
    earlier = path.read_text()
    write_trace(run, 0, end=False, rounds=1)
    path.write_text(earlier + path.read_text())
    peer = open_run(run.path).peers[0]
    assert peer.outcome == Outcome("killed", 1)
    assert sorted(peer.evaluations()) == [0]


def test_a_failure_keeps_its_reason(run):
    entries = open_run(run.path).peers[0].entries
    failed = type(entries[0])(1.0, 0, 0, PeerFinished("failed", 2, agreed=False, reason="diverged"))
    assert outcome_of((*entries[:-1], failed)) == Outcome("failed", 6, reason="diverged")


def test_one_members_folder_is_a_run_of_one(run):
    opened = open_run(run.home(1).path)
    assert [peer.name for peer in opened.peers] == ["peer-1"]
    assert opened.path.resolve() == run.home(1).run_path.resolve()
    assert opened.charter == run.charter


def test_peers_come_in_the_order_of_their_numbers(run):
    (run.path / "peers" / "peer-2").rename(run.path / "peers" / "peer-10")
    assert [peer.home.path.name for peer in open_run(run.path).peers] == ["peer-0", "peer-1", "peer-10"]


def test_no_run_names_those_there_are(run):
    # Beside the folder of folders other tests leave runs of theirs, that may be more than are named.
    for path in (run.path.parent, run.path.parent / "other"):
        with pytest.raises(InvalidConfig) as caught:
            open_run(path)
        assert str(run.path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "there is no such folder" in str(caught.value)


def test_no_run_and_none_around(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidConfig, match=r"is not a run: a run has charter\.toml and peers/ in it.*p2pfl demo"):
        open_run(tmp_path / "empty")


def test_a_trace_under_another_charter_is_refused(run):
    path = run.home(0).run_path / TRACE_FILE
    path.write_text(path.read_text().replace(run.charter.hash().hex(), "ab" * 32))
    with pytest.raises(InvalidConfig, match="under charter abababababab"):
        open_run(run.path)


def test_a_line_that_is_no_event_is_named(run):
    path = run.home(0).run_path / TRACE_FILE
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(InvalidConfig, match="not a line of a trace: 'nonsense"):
        open_run(run.path)
