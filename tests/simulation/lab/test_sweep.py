"""Sweeps, and what is made of their runs."""

import importlib.util
import shutil
import socket
import sys

import pandas as pd
import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.simulation import backends
from p2pfl.simulation.compare import compare, draw_run, labels_of, save_comparison, trend_of
from p2pfl.simulation.runs import SUMMARY_FILE, open_simulated
from p2pfl.simulation.scenario import Scenario, points
from p2pfl.simulation.simulate import simulate
from p2pfl.simulation.sweep import sweep

FIGURES = ("comparison.png", "comparison.svg")


def swept(**lists):
    return validate(
        Scenario,
        {
            "name": "small", "peers": 5, "seeds": [0, 1], "training": {"rounds": 3, "batch_size": 8},
            "averaging": {"topology": "ring"}, "evaluation": {"times": 4, "peers": 3},
            "sweep": {key.replace("__", "."): value for key, value in lists.items()},
        },
        "test",
    )  # fmt: skip


def test_a_sweep_goes_on_where_it_was(tmp_path):
    asked = swept(averaging__topology=["ring", "complete"])
    seen = []
    first = sweep(asked, tmp_path, jobs=1, watch=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert (first.found, first.failures) == (0, {})
    assert [run.scenario.averaging.topology for run in first.runs] == ["ring", "complete"]
    kept = first.runs[0].path / SUMMARY_FILE
    before = kept.stat().st_mtime_ns
    shutil.rmtree(first.runs[1].path)
    more = sweep(swept(averaging__topology=["ring", "complete", "path"]), tmp_path, jobs=1)
    assert (more.found, len(more.runs)) == (1, 3)
    assert kept.stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(more.runs[1].frame, first.runs[1].frame, check_exact=True)


def test_a_run_that_fails_costs_no_other(tmp_path):
    found = sweep(swept(averaging__topology=["ring", "hypercube"]), tmp_path, jobs=1)
    assert len(found.runs) == 1
    assert list(found.failures) == ["averaging.topology = hypercube"]
    assert "power of two" in found.failures["averaging.topology = hypercube"]


@pytest.mark.slow
def test_processes_give_the_same(tmp_path):
    asked = swept(averaging__topology=["ring", "hypercube", "groups"])
    one, two = sweep(asked, tmp_path / "one", jobs=1), sweep(asked, tmp_path / "two", jobs=2)
    assert one.failures == two.failures
    for left, right in zip(one.runs, two.runs, strict=True):
        pd.testing.assert_frame_equal(left.frame, right.frame, check_exact=True)
        pd.testing.assert_frame_equal(left.peers, right.peers, check_exact=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # ray's own
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs the extra ray")
def test_ray_gives_the_same_and_goes_on_where_processes_were(tmp_path):
    asked = swept(averaging__topology=["ring", "hypercube", "groups"])
    one, two = sweep(asked, tmp_path / "one", jobs=1), sweep(asked, tmp_path / "two", jobs=2, backend="ray")
    assert (two.found, len(two.runs)) == (0, 2)
    assert one.failures == two.failures
    for left, right in zip(one.runs, two.runs, strict=True):
        assert left.path.name == right.path.name
        pd.testing.assert_frame_equal(left.frame, right.frame, check_exact=True)
        pd.testing.assert_frame_equal(left.peers, right.peers, check_exact=True)
    assert (two.runs[0].path / "curves.png").exists()
    shutil.rmtree(one.runs[0].path)
    more = sweep(asked, tmp_path / "one", jobs=1, backend="ray")
    assert more.found == 1
    pd.testing.assert_frame_equal(more.runs[0].frame, two.runs[0].frame, check_exact=True)


def test_a_backend_that_cannot_be_used_is_told(tmp_path, monkeypatch):
    asked = swept(averaging__topology=["ring"])
    with pytest.raises(InvalidConfig, match="there are processes, ray"):
        sweep(asked, tmp_path, backend="rays")
    with pytest.raises(InvalidConfig, match="only ray has an address"):
        sweep(asked, tmp_path, address="10.0.0.1:6379")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and nobody listens
        if importlib.util.find_spec("ray"):
            with pytest.raises(InvalidConfig, match="no Ray at"):
                sweep(asked, tmp_path, backend="ray", address=f"127.0.0.1:{nobody.getsockname()[1]}")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidConfig, match=r"p2pfl-mesh\[ray\]"):
        sweep(asked, tmp_path, backend="ray")


def test_a_run_of_other_files_is_not_taken_for_the_one_asked_for(tmp_path, monkeypatch):
    other = validate(Scenario, swept(peers=[5]).settings() | {"sweep": {}, "peers": 6}, "test")
    monkeypatch.setattr(backends, "simulate", lambda *_, **__: simulate(other))
    found = sweep(swept(peers=[5]), tmp_path, jobs=1)
    assert found.runs == ()
    assert "has other files" in found.failures["peers = 5"]


def test_runs_are_named_by_what_they_differ_in():
    def labels(**lists):
        return labels_of([simulate(point) for point in points(swept(training__rounds=[0], **lists))])

    assert labels(averaging__topology=["ring", "path"]) == ["ring", "path"]
    assert labels(data__alpha=[0.1, 1.0]) == ["alpha 0.1", "alpha 1"]
    assert labels(data__alpha=[0.1], averaging__topology=["ring"]) == ["small 0"]
    quantise, top = {"name": "quantise", "bits": 4}, {"name": "top-k", "ratio": 0.3, "error_feedback": False}
    assert labels(compression=[{"name": "none"}, quantise, top]) == [
        "none", "quantise, bits 4, error_feedback true", "top-k, ratio 0.3, error_feedback false",
    ]  # fmt: skip
    both = labels(data__alpha=[0.1, 1.0], averaging__topology=["ring", "path"])
    assert sorted(both) == ["alpha 0.1, path", "alpha 0.1, ring", "alpha 1, path", "alpha 1, ring"]


def test_runs_are_compared(tmp_path):
    found = sweep(swept(averaging__topology=["ring", "complete"], data__alpha=[0.1, 1.0, 9.0]), tmp_path, jobs=1)
    made = compare(found.runs)
    assert made.metric == "peer_accuracy"
    assert list(made.table["run"]) == list(made.labels)
    assert (made.table["low"] <= made.table["median"]).all()
    assert (made.table["median"] <= made.table["high"]).all()
    assert made.level == pytest.approx(0.95 * made.table["median"].max())
    reached = made.table[made.table["median"] >= made.level]
    assert reached["rounds_to"].notna().all()
    files = {file.name for file in save_comparison(made, tmp_path / "out")}
    assert files == {*FIGURES, "comparison.csv", "trend.png", "trend.svg"}
    assert len(pd.read_csv(tmp_path / "out" / "comparison.csv")) == 6
    trend = trend_of(found.runs)
    assert trend.key == "data.alpha"
    assert set(trend.groups) == {"ring", "complete"}
    assert compare(found.runs, "loss").table["rounds_to"].isna().all()
    with pytest.raises(InvalidConfig, match="no 'auc' there; it has"):
        compare(found.runs, "auc")
    with pytest.raises(InvalidConfig, match="nothing to compare"):
        compare([])


def test_a_picture_is_the_same_each_time(tmp_path):
    run = simulate(next(iter(points(swept(peers=[5])))), tmp_path)
    pictures = draw_run(run)
    before = [file.read_bytes() for file in pictures]
    assert [file.read_bytes() for file in draw_run(open_simulated(run.path))] == before
    assert before[0].startswith(b"\x89PNG")
