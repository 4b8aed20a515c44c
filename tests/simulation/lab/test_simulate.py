"""Scenarios run on the dense engine: what comes out, what it costs, and what goes wrong on the way."""

import math
from dataclasses import replace

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch

import p2pfl
from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.core.settings import validate
from p2pfl.gossip.schedule import dense, schedule
from p2pfl.simulation.costs import load_of
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.presence import Presence, Present, among
from p2pfl.simulation.runs import ROUNDS_FILE, SUMMARY_FILE, is_complete, open_all, open_simulated, save
from p2pfl.simulation.scenario import Scenario, load
from p2pfl.simulation.simulate import simulate

PEERS, PARAMETERS = 6, 4810


def scenario(**values):
    """A small one, with what is given put into its tables."""
    settings = {
        "peers": PEERS, "training": {"rounds": 6, "batch_size": 8}, "averaging": {"topology": "ring"},
        "evaluation": {"times": 4, "peers": PEERS},
    }  # fmt: skip
    for key, value in values.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return validate(Scenario, settings, "test")


def test_a_run_has_its_curves():
    run = p2pfl.simulate(scenario(seeds=[3, 4]))
    assert list(run.frame["seed"]) == [3] * 7 + [4] * 7
    assert list(run.frame["round"]) == [*range(7)] * 2
    assert sorted(set(run.evaluated["round"])) == [0, 2, 4, 6]
    assert run.frame["train_loss"].isna().sum() == 2  # before the first round
    first, last = run.frame.iloc[0], run.frame.iloc[6]
    assert last["accuracy"] > first["accuracy"]
    assert first["consensus"] == 0.0
    assert last["consensus"] > 0.0
    assert len(run.peers) == 2 * 4 * PEERS
    ended = run.peers[(run.peers["seed"] == 3) & (run.peers["round"] == 6)]
    assert last["peer_accuracy"] == pytest.approx(ended["accuracy"].mean())
    assert run.summary["seeds"][0]["final"]["worst_peer"] == pytest.approx(ended["accuracy"].min())
    assert run.metric == "peer_accuracy"
    assert run.path is None


def test_equal_scenarios_give_equal_bits():
    swept = scenario(faults={"missed": 0.3, "leave": 0.1}, averaging={"topology": "el-local"}, participation=0.7)
    one, other = simulate(swept), simulate(swept)
    pd.testing.assert_frame_equal(one.frame, other.frame, check_exact=True)
    pd.testing.assert_frame_equal(one.peers, other.peers, check_exact=True)


@pytest.mark.parametrize(
    "values",
    [
        {"averaging": {"topology": "groups", "group_size": 3}, "faults": {"missed": 0.2, "leave": 0.2}},
        {"averaging": {"topology": "random-push"}, "training": {"algorithm": "push-sum"}},
    ],
)
def test_a_seed_gives_the_same_alone_and_beside_others(values):
    together = simulate(scenario(seeds=[5, 1], **values))
    for number in (5, 1):
        alone = simulate(scenario(seeds=[number], **values))
        beside = together.frame[together.frame["seed"] == number].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone.frame, beside, rtol=1e-5, atol=1e-6)


def test_seeds_draw_their_own():
    frame = simulate(scenario(seeds=[0, 1])).frame
    one, other = (frame[frame["seed"] == number]["loss"].dropna().to_numpy() for number in (0, 1))
    assert (one != other).all()


def test_a_run_stops_when_it_gets_no_better_or_is_good_enough():
    run = simulate(
        scenario(training={"rounds": 30, "learning_rate": 1e-9}, evaluation={"times": 31},
                 stopping={"metric": "accuracy", "patience": 3})
    )  # fmt: skip
    assert run.summary["seeds"][0]["outcome"] == "stopped"
    assert run.frame["round"].max() == 3
    run = simulate(scenario(training={"rounds": 30}, stopping={"metric": "loss", "target": 1e9}))
    assert (run.summary["seeds"][0]["outcome"], run.frame["round"].max()) == ("reached", 0)


def test_seeds_stop_on_their_own():
    terms = {"training": {"rounds": 12}, "evaluation": {"times": 13}, "stopping": {"metric": "accuracy", "target": 0.5}}
    together = simulate(scenario(seeds=[0, 1, 2], **terms))
    for number in (0, 1, 2):
        alone = simulate(scenario(seeds=[number], **terms)).frame["round"].max()
        assert together.frame[together.frame["seed"] == number]["round"].max() == alone


def test_divergence_is_an_outcome():
    run = simulate(scenario(training={"rounds": 12, "learning_rate": 1e30}))
    assert run.summary["seeds"][0]["outcome"] == "diverged"
    assert run.frame["round"].max() < 12


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stopping": {"metric": "auc", "patience": 1}}, "'auc' is not measured; there are"),
        ({"training": {"algorithm": "nothing"}}, "'nothing' is unknown; there are d-psgd"),
        ({"training": {"options": {"beta": 0.9}}}, "local-sgd is the same"),
        ({"training": {"algorithm": "fedprox", "options": {"nu": 1.0}}}, "no 'nu'; it has mu"),
        ({"training": {"algorithm": "fedprox", "options": {"mu": "much"}}}, "mu is a float, not 'much'"),
        ({"averaging": {"topology": "nothing"}}, "'nothing' is unknown"),
        ({"averaging": {"topology": "random-push"}}, "needs mixing whose rows sum to 1"),
        ({"averaging": {"topology": "graph"}}, "needs file"),
        ({"training": {"algorithm": "d2", "local_steps": 1}, "averaging": {"topology": "groups"}}, "changes"),
        ({"data": {"task": "nothing"}}, "unknown task"),
        ({"data": {"task": "cifar10"}}, r"^\[data.settings\] path is None; name the folder"),
        (
            {"defence": {"rule": "group-median"}, "faults": {"parts": 2}, "averaging": {"topology": "groups"}},
            "a split network has no all",
        ),
        ({"data": {"settings": {"nothing": 1}}}, "nothing"),
        ({"peers": 2000}, "cannot give each of 2000 peers"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(values, words):
    with pytest.raises(InvalidConfig, match=words) as raised:
        simulate(scenario(**values))
    assert "\n" not in str(raised.value)


def test_a_graph_of_your_own_may_be_directed_and_larger_than_what_is_analysed(tmp_path):
    file = tmp_path / "graph.graphml"
    nx.write_graphml(nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)]), file)
    graph = {"topology": "graph", "options": {"file": str(file)}}
    pushed = scenario(peers=3, averaging=graph, training={"algorithm": "push-sum", "rounds": 2})
    assert len(simulate(pushed).frame) == 3
    with pytest.raises(InvalidConfig, match="needs mixing whose"):
        simulate(scenario(peers=3, averaging=graph))
    mixing = dense(Parts(pushed).schedule(0).at(0))
    assert np.array_equal(mixing > 0, [[1, 0, 1], [1, 1, 0], [1, 1, 1]])
    ring = tmp_path / "ring.txt"
    ring.write_text("".join(f"{node} {(node + 1) % 1500}\n" for node in range(1500)))
    large = scenario(peers=1500, averaging={"topology": "graph", "options": {"file": str(ring)}})
    assert Parts(large).schedule(0).n == 1500


def test_a_graph_that_cannot_be_used_is_told_with_its_file(tmp_path):
    file = tmp_path / "graph.txt"
    file.write_text("a b\nc d\n")
    with pytest.raises(InvalidConfig, match=r"graph\.txt: not connected: no path leads from a to all others"):
        simulate(scenario(peers=4, averaging={"topology": "graph", "options": {"file": str(file)}}))


def test_local_work_is_steps_passes_or_seconds():
    def steps(**training):
        return simulate(scenario(training={"rounds": 1} | training)).summary["local_steps"]

    assert steps(local_steps=3) == 3
    assert steps(epochs=0.5) == math.ceil(0.5 * 1437 / PEERS / 8)
    assert steps(local_steps=9, window=0.035) == 4  # steps of 0.01 s begin at 0, 0.01, 0.02 and 0.03
    assert steps(epochs=0.5, window=0.035) == 4
    assert steps(local_steps=3, window=1.0) == 3  # a window adds none


def test_shares_drawn_with_replacement_suffice_for_any_number():
    run = simulate(scenario(peers=2000, data={"partition": "replacement", "examples": 4}, training={"rounds": 1}))
    assert run.frame["working"].tolist() == [2000, 2000]


@pytest.mark.parametrize("data", [{"partition": "classes", "classes": 2}, {"partition": "quantity", "alpha": 0.3}])
def test_data_can_be_dealt_by_classes_and_by_quantity(data):
    parts = Parts(scenario(data=data))
    shares = parts.shares(0)
    assert shares.counts.sum() == len(parts.data.train)
    seen = [
        len(parts.data.train.targets[shares.order[start : start + count]].unique())
        for start, count in zip(shares.starts, shares.counts, strict=True)
    ]
    assert (seen == [2] * PEERS) == (data["partition"] == "classes")
    assert (shares.counts.max() > 3 * shares.counts.min()) == (data["partition"] == "quantity")
    assert simulate(scenario(data=data)).summary["seeds"][0]["outcome"] == "done"


def test_masks_change_what_fixed_points_change():
    terms = {"averaging": {"topology": "groups", "group_size": 3}}
    plain = simulate(scenario(**terms))
    masked = simulate(scenario(averaging=terms["averaging"] | {"masks": "on"}))
    assert masked.summary["masks"] == "on"
    difference = (plain.frame["loss"] - masked.frame["loss"]).abs().max()
    assert 0 < difference < 1e-3
    with pytest.raises(RoundFailed, match=r"beyond averaging\.clip"):
        simulate(scenario(averaging=terms["averaging"] | {"masks": "on", "clip": 0.01}))


def test_what_a_ring_and_groups_send():
    run = simulate(scenario(cost={"step_seconds": 1.0, "latency": 0.5, "bandwidth": 8.0 * PARAMETERS}))
    last = run.frame.iloc[-1]
    assert last["modelled_bytes"] == 6 * 2 * 4 * PARAMETERS
    assert last["modelled_seconds"] == pytest.approx(6 * (2 * 1.0 + 0.5 + 1.0))
    run = simulate(scenario(averaging={"topology": "groups", "group_size": 3}))
    assert run.frame.iloc[-1]["modelled_bytes"] == pytest.approx(6 * 4 / 3 * 4 * PARAMETERS)
    tracking = {"algorithm": "gradient-tracking", "local_steps": 1}
    run = simulate(scenario(training=tracking))
    assert run.frame.iloc[-1]["modelled_bytes"] == 6 * 2 * 2 * 4 * PARAMETERS


def test_the_centre_of_a_star_is_the_busiest():
    found = load_of(schedule("star", 5, 0).at(0), summed=False)
    assert (found.mean, found.most) == (8 / 5, 4)


def test_who_leaves_comes_back():
    presence = Presence(200, 0, leave=0.2, rejoin=0.3)
    here = np.array([presence.working(round) for round in range(60)])
    assert here[20:].mean() == pytest.approx(0.3 / 0.5, abs=0.05)
    assert here[:-1][~here[:-1] & here[1:]].size > 0
    assert np.array_equal(here[7], presence.working(7))  # asked for again, backwards
    assert np.array_equal(here, [Presence(200, 0, leave=0.2, rejoin=0.3).working(round) for round in range(60)])


def test_a_fraction_takes_part():
    presence = Presence(10, 0, participation=0.3)
    drawn = [presence.working(round) for round in range(40)]
    assert {int(each.sum()) for each in drawn} == {3}
    assert np.sum(drawn, axis=0).min() > 0
    assert not Presence(10, 0, participation=0.01).complete
    assert Presence(10, 0, participation=0.01).working(0).sum() == 1


def test_whoever_misses_a_round_has_trained():
    presence = Presence(100, 0, missed=0.5)
    assert presence.working(3).all()
    assert 20 < presence.reached(3).sum() < 80


def test_nobody_hears_those_who_are_away():
    there = np.array([True, False, True, True, True, False])
    for name, grouped, column in (("ring", False, False), ("moshpit", True, False), ("random-push", False, True)):
        rows = schedule(name, PEERS, 0).at(0)
        matrix = dense(among(rows, there, grouped=grouped, column=column))
        for away in np.flatnonzero(~there):
            identity = np.eye(PEERS)[away]
            assert np.array_equal(matrix[away], identity)
            assert np.array_equal(matrix[:, away], identity)
        np.testing.assert_allclose(matrix.sum(0 if column else 1), 1.0)
        if name != "random-push":
            np.testing.assert_allclose(matrix.sum(0), 1.0)


def test_groups_average_among_those_who_are_there():
    there = np.array([True, True, True, False])
    matrix = dense(among(schedule("groups", 4, 0, size=4).at(0), there, grouped=True, column=False))
    np.testing.assert_allclose(matrix[:3, :3], 1 / 3)


def test_a_network_is_split_and_heals():
    presence = Presence(PEERS, 0, parts=2, split=2, heal=4)
    assert presence.complete
    assert not presence.whole
    assert [presence.sides(round) is None for round in range(6)] == [True, True, False, False, True, True]
    sides = presence.sides(3)
    assert np.bincount(sides).tolist() == [3, 3]
    assert sides.tolist() != Presence(PEERS, 1, parts=2, split=2, heal=4).sides(3).tolist()
    for name, grouped, column in (("complete", False, False), ("moshpit", True, False), ("random-push", False, True)):
        plain = schedule(name, PEERS, 0)
        present = Present(plain, presence, grouped=grouped, column=column)
        assert present.period is None
        assert np.array_equal(dense(present.at(1)), dense(plain.at(1)))
        matrix = dense(present.at(2))
        assert not matrix[sides[:, None] != sides].any()
        np.testing.assert_allclose(matrix.sum(0 if column else 1), 1.0)
    one_side = dense(Present(schedule("groups", PEERS, 0, size=PEERS), presence, grouped=True, column=False).at(2))
    np.testing.assert_allclose(one_side[sides == 0][:, sides == 0], 1 / 3)


def test_parts_agree_among_themselves_and_drift_apart_until_the_network_heals():
    every = {"topology": "groups", "group_size": PEERS}
    terms = {"training": {"rounds": 9}, "evaluation": {"times": 10}, "averaging": every}
    whole = simulate(scenario(**terms)).frame
    run = simulate(scenario(faults={"parts": 2, "split": 3, "heal": 6}, **terms))
    frame = run.frame
    apart = frame["consensus"].to_numpy() > 1e-6
    assert apart.tolist() == [False] * 4 + [True] * 3 + [False] * 3
    assert (frame["working"] == PEERS).all()
    assert frame["loss"][:4].tolist() == pytest.approx(whole["loss"][:4].tolist())
    assert frame["loss"][5] != whole["loss"][5]
    ended = run.peers[run.peers["round"] == 6]
    assert ended["loss"].round(5).nunique() == 2
    sent = [2 * (size - 1) / size * 4 * PARAMETERS for size in (6, 6, 6, 3, 3, 3, 6, 6, 6)]
    np.testing.assert_allclose(np.diff(frame["modelled_bytes"]), sent)


def test_the_scenario_partition_shows_a_network_that_heals():
    changes = ["sweep={}", "seeds=[0, 1]", "averaging.topology=groups", "evaluation.times=13"]
    split, whole = (load("partition", [*changes, f"faults.parts={parts}"]) for parts in (4, 1))
    curves = [
        simulate(each).evaluated.groupby("round")[["consensus", "peer_accuracy"]].median() for each in (split, whole)
    ]
    assert curves[0].loc[80, "consensus"] > 2 * curves[1].loc[80, "consensus"]
    assert curves[0].loc[80, "peer_accuracy"] < curves[1].loc[80, "peer_accuracy"] - 0.05
    assert curves[0].loc[120, "consensus"] < 1.5 * curves[1].loc[120, "consensus"]


def test_a_schedule_without_faults_is_the_schedule():
    plain = schedule("ring", PEERS, 0)
    found = Present(plain, Presence(PEERS, 0), grouped=False, column=False)
    assert found.period == 1
    assert found.at(0) is plain.at(0)
    assert Present(plain, Presence(PEERS, 0, missed=0.1), grouped=False, column=False).period is None


def test_those_who_are_away_stay_as_they_are():
    run = simulate(scenario(faults={"leave": 0.5, "rejoin": 0.0}, training={"rounds": 30}, evaluation={"times": 31}))
    assert run.frame["working"].iloc[-1] == 0
    ended = run.frame.tail(2)
    assert ended["loss"].nunique() == 1
    assert ended["train_loss"].isna().all()
    assert ended["modelled_bytes"].nunique() == 1


def test_a_run_is_kept_and_read(tmp_path):
    asked = scenario(seeds=[0, 1])
    seen = []
    run = simulate(asked, tmp_path, watch=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]
    assert run.path == tmp_path / asked.folder
    opened = open_simulated(run.path)
    assert opened.scenario == asked
    assert opened.summary == run.summary
    pd.testing.assert_frame_equal(opened.frame, run.frame)
    pd.testing.assert_frame_equal(opened.peers, run.peers)
    assert [each.path for each in open_all([tmp_path])] == [run.path]

    before = (run.path / SUMMARY_FILE).stat().st_mtime_ns
    again = simulate(asked, tmp_path, watch=lambda *_: pytest.fail("it was run again"))
    assert again.summary == run.summary
    simulate(asked, tmp_path, again=True)
    assert (run.path / SUMMARY_FILE).stat().st_mtime_ns > before


def test_the_runs_of_a_folder_are_in_the_order_of_their_settings(tmp_path):
    run = simulate(scenario(training={"rounds": 1}))
    rounds = (10, 9, 100)
    for place, each in enumerate(rounds):
        save(replace(run, scenario=scenario(training={"rounds": each})), tmp_path / str(place))
    assert [each.scenario.training.rounds for each in open_all([tmp_path])] == [9, 10, 100]
    asked = [tmp_path / "2", tmp_path, tmp_path / "0"]
    assert [each.scenario.training.rounds for each in open_all(asked)] == [100, 9, 10], "each once, as asked for"


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(InvalidConfig, match="not a simulated run"):
        open_simulated(tmp_path)
    with pytest.raises(InvalidConfig, match="nor a folder of such"):
        open_all([tmp_path])
    run = simulate(scenario(training={"rounds": 1}), tmp_path)
    (run.path / ROUNDS_FILE).write_bytes(b"nonsense")
    with pytest.raises(InvalidConfig, match="cannot be read"):
        open_simulated(run.path)
    (run.path / SUMMARY_FILE).unlink()
    assert not is_complete(run.path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_computes_the_same():
    one, other = simulate(scenario()), simulate(scenario(), device="cuda")
    pd.testing.assert_frame_equal(one.frame, other.frame, rtol=1e-2)
