import json
import struct

import numpy as np
import pytest

from p2pfl.learning.baselines import Training, alone, central
from p2pfl.learning.evaluation import evaluate
from p2pfl.learning.task import load_task, make_model, read_data
from p2pfl.learning.vector import assign
from p2pfl.simulation import baselines as baselines_module
from p2pfl.simulation.baselines import spread_out
from p2pfl.simulation.plots import mean_curve
from p2pfl.simulation.report import as_text, report
from p2pfl.simulation.results import open_run
from p2pfl.simulation.summary import PeerSummary, consensus_curve, distance
from tests.simulation.conftest import PARAMETERS, ROUNDS, SECONDS, kill

PLOTS = ("accuracy.png", "consensus.png", "overlay.png", "exchanges.png")


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_the_numbers_are_those_of_the_models_and_traces(run):
    report(run.path)
    summary = summary_of(run.path)
    task = load_task("digits", run.path).task
    for number, peer in enumerate(summary["peers"]):
        model = make_model(task)
        assign(model, run.model(number))
        data = read_data(task, run.home(number).config.data)
        assert peer["together"] == pytest.approx(evaluate(task, model, data.test).accuracy)
        training = Training(2, 32, 0.0, run.home(number).config.seed)
        assert peer["alone"] == pytest.approx(alone(task, data, run.initial, ROUNDS, training)[-1]["accuracy"])
        assert peer["gain"] == pytest.approx(peer["together"] - peer["alone"])
        assert peer["examples"] == len(data.train)
        assert peer["classes"] == len(set(data.train.targets.tolist()))
    shares = [read_data(task, home.config.data) for home in run.federation.homes]
    expected = central(task, shares, run.initial, ROUNDS, Training(2, 32, 0.0, run.home(0).config.seed))
    assert summary["central"] == pytest.approx(expected[-1]["accuracy"])
    assert summary["charter"] == run.charter.hash().hex()
    assert summary["seconds_per_round"] == pytest.approx(SECONDS)
    assert summary["bytes_per_value"] == pytest.approx(4.5)
    assert summary["bytes_sent"] == sum(peer["bytes_out"] for peer in summary["peers"])
    assert summary["overlay"] == {
        "topology": "complete",
        "degree": [2, 2],
        "diameter": 1,
        "spectral_gap": pytest.approx(1),
    }
    assert summary["groups"] is None


def test_the_consensus_distance_equals_a_computation_by_hand(run):
    """Models 0, 1 and 2 steps of s from one another: mean squared distance to the mean is P * 2/3 * s^2."""
    report(run.path)
    assert summary_of(run.path)["consensus"] == pytest.approx(PARAMETERS * 2 / 3 * 0.01**2, rel=1e-4)
    curve = consensus_curve(open_run(run.path).peers)
    assert list(curve) == list(range(7))
    assert curve[0] == 0
    for rounds in range(1, 7):
        assert curve[rounds] == pytest.approx(PARAMETERS * 2 / 3 / (rounds + 1) ** 2, rel=1e-4)


def test_blocks_of_parameters_add_up(monkeypatch):
    from p2pfl.simulation import summary

    vectors = list(np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32))
    whole = distance(vectors)
    monkeypatch.setattr(summary, "BLOCK", 7)
    assert distance(vectors) == pytest.approx(whole)


def test_pictures_and_text_are_written(run):
    result = report(run.path)
    assert sorted(path.name for path in result.files) == sorted([*PLOTS, "report.txt", "summary.json"])
    for name in PLOTS:
        assert png_size(run.path / name) == (1200, 750)
        assert 5_000 < (run.path / name).stat().st_size < 500_000
    text = (run.path / "report.txt").read_text()
    assert text == as_text(result)
    assert text.splitlines()[0] == "UNMASKED: neighbors saw each other's updates"
    assert text.splitlines()[3].split() == [
        "peer", "examples", "classes", "alone", "together", "gain", "rounds", "in", "out",
    ]  # fmt: skip
    assert "every peer finished, and their models agree" in text
    assert "above the tolerance of 1e-06" in text
    assert "masks               off: UNMASKED: neighbors saw each other's updates" in text


def test_a_trace_that_has_forgotten_its_first_rounds_says_so(run):
    assert "figures over rounds" not in as_text(report(run.path))
    for number, first in ((0, 2), (2, 3)):
        path = run.home(number).run_path / "trace.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        begins = next(at for at, line in enumerate(lines) if f'"round":{first},' in line and '"event":"round"' in line)
        path.write_text("".join(lines[begins:]))
    told = "from round 3 on; earlier ones are no longer in the trace of peer-0, peer-2 (logging.trace_bytes)"
    assert f"figures over rounds {told}" in " ".join(as_text(report(run.path)).split())
    assert [peer["first_round"] for peer in summary_of(run.path)["peers"]] == [2, 0, 3]


def test_a_killed_peer_has_its_row_and_does_not_touch_the_others(run):
    report(run.path)
    before = summary_of(run.path)["peers"]
    kill(run, 1, rounds=2)
    result = report(run.path)
    after = summary_of(run.path)
    assert [after["peers"][number] for number in (0, 2)] == [before[number] for number in (0, 2)]
    killed = after["peers"][1]
    assert (killed["outcome"], killed["rounds"], killed["gain"]) == ("killed", 2, None)
    assert killed["together"] == pytest.approx(0.21)
    assert "killed at round 2" in as_text(result)
    assert after["consensus_peers"] == 2
    assert after["consensus"] == pytest.approx(PARAMETERS * 0.01**2, rel=1e-4)
    curve = consensus_curve(open_run(run.path).peers)
    assert curve[2] == pytest.approx(PARAMETERS * 2 / 3 / 9, rel=1e-4)
    assert curve[3] == pytest.approx(PARAMETERS / 16, rel=1e-4)


def test_a_peer_that_was_stopped_does_not_count_in_the_consensus_of_those_who_finished(run):
    path = run.home(2).run_path / "trace.jsonl"
    path.write_text(path.read_text().replace('"outcome":"done"', '"outcome":"stopped"'))
    summary = report(run.path).summary
    assert summary.consensus_peers == 2
    assert summary.consensus == pytest.approx(PARAMETERS * 0.01**2 / 4, rel=1e-4)
    assert summary.peers[2].gain is None


def test_without_any_history_the_rest_is_still_there(run):
    for home in run.federation.homes:
        (home.run_path / "history.f32").unlink()
    report(run.path)
    assert png_size(run.path / "consensus.png") == (1200, 750)
    assert summary_of(run.path)["consensus"] is not None


def test_where_all_were_killed_before_the_first_round(run):
    for number in range(3):
        kill(run, number, rounds=0)
    text = as_text(report(run.path))
    assert text.count("killed at round 0") == 3
    summary = summary_of(run.path)
    assert summary["consensus"] is None
    assert summary["seconds_per_round"] is None
    assert summary["bytes_per_value"] is None


def test_a_member_reports_on_itself(run):
    result = report(run.home(2).path)
    assert [peer.name for peer in result.summary.peers] == ["peer-2"]
    assert result.summary.central is None
    assert (run.home(2).run_path / "accuracy.png").exists()
    assert not (run.path / "accuracy.png").exists()


def test_baselines_are_trained_once(run, monkeypatch):
    first = report(run.path).summary
    monkeypatch.setattr(baselines_module, "_train", lambda *_: pytest.fail("trained again"))
    assert report(run.path).summary == first


def test_baselines_of_other_data_are_not_taken(run):
    first = report(run.path).summary
    path = run.home(0).path / "peer.toml"
    path.write_text(path.read_text().replace("index = 0", "index = 1"))
    second = report(run.path).summary
    assert second.peers[0].classes == first.peers[1].classes
    assert second.peers[0].alone != first.peers[0].alone


def test_a_broken_cache_is_made_anew(run):
    first = report(run.path).summary
    (run.path / "baselines.json").write_text('{"key": 3')
    assert report(run.path).summary == first


def test_data_that_is_elsewhere_leaves_the_traces(run):
    for home in run.federation.homes:
        path = home.path / "peer.toml"
        path.write_text(path.read_text().replace("peers = 3", "peers = 100000"))
    result = report(run.path)
    assert [peer.together for peer in result.summary.peers] == [0.55] * 3
    assert [peer.examples for peer in result.summary.peers] == [479] * 3
    assert "none: the peers' data cannot be read here" in as_text(result)


def test_the_gain_is_for_those_who_saw_the_end():
    values = ("x", "done", 3, True, "", 1, None, 0.5, 0.75, 0, 0)
    assert PeerSummary(*values).gain == 0.25
    assert PeerSummary("x", "failed", *values[2:]).gain is None


def test_the_mean_needs_half_of_the_peers():
    curves = [{0: {"m": 1.0}, 1: {"m": 2.0}}, {0: {"m": 3.0}}, {0: {"m": 5.0}, 1: {"other": 0.0}}]
    assert mean_curve(curves, "m") == {0: {"m": 3.0}}


@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 1000])
def test_points_are_spread_from_the_first_to_the_last(count):
    points = spread_out(count, 60)
    assert len(points) == len(set(points)) == min(count, 60)
    if count:
        assert (points[0], points[-1]) == (0, count - 1)
