"""Scenarios with compression, attackers and defences: what they show, what they cost, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.gossip.compress import Quantise, RandK, TopK
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.scenario import Scenario, load, points
from p2pfl.simulation.simulate import simulate

PEERS, PARAMETERS, HEAD = 10, 4810, 650


def scenario(**values):
    settings = {
        "peers": PEERS, "training": {"rounds": 6, "batch_size": 8}, "averaging": {"topology": "ring"},
        "evaluation": {"times": 3, "peers": PEERS},
    }  # fmt: skip
    for key, value in values.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return validate(Scenario, settings, "test")


def final(run, key):
    return run.summary["final"][key]["median"]


def test_sign_flips_of_a_fifth_break_the_mean_and_defences_bear_them():
    def accuracy(rule, attack="sign-flip"):
        run = simulate(
            scenario(
                averaging={"topology": "complete"}, data={"alpha": 1.0},
                training={"rounds": 40, "batch_size": 16, "learning_rate": 0.3},
                attackers={"attack": attack, "fraction": 0.2, "strength": 6.0}, defence={"rule": rule, "share": 0.25},
            )
        )  # fmt: skip
        return final(run, "peer_accuracy")

    assert accuracy("none", "none") > 0.9
    assert accuracy("none") < 0.3
    for rule in ("trimmed-mean", "clipping", "median", "multi-krum", "geometric-median"):
        assert accuracy(rule) > (0.6 if rule == "median" else 0.7), rule


def test_a_backdoor_is_measured_and_the_median_closes_it():
    def run(rule, attack="backdoor"):
        return simulate(
            scenario(
                averaging={"topology": "complete"}, data={"alpha": 1.0}, defence={"rule": rule},
                training={"rounds": 30, "batch_size": 16}, attackers={"attack": attack, "count": 2, "strength": 4.0},
            )
        )  # fmt: skip

    open_, closed = run("none"), run("median")
    assert final(open_, "backdoor") > 0.5
    assert final(open_, "peer_backdoor") > 0.5
    assert final(open_, "accuracy") > 0.85
    assert final(closed, "backdoor") < 0.2
    assert "backdoor" not in run("none", "scaling").frame


def test_the_honest_alone_are_judged():
    run = simulate(scenario(attackers={"attack": "gaussian", "count": 3, "strength": 9.0}, seeds=[0, 1]))
    assert (run.summary["attackers"], run.summary["attack"]) == (3, "gaussian")
    judged = run.peers[run.peers["round"] == 6].groupby("peer")["accuracy"].count()
    assert judged.tolist() == [2] * 7 + [0] * 3
    one = simulate(scenario(attackers={"attack": "label-flip", "count": 3}))
    known = one.peers[(one.peers["round"] == 6) & (one.peers["peer"] < 7)]["train_loss"]
    assert one.frame["train_loss"].iloc[-1] == pytest.approx(known.mean())


def test_only_attackers_have_false_labels():
    asked = scenario(attackers={"attack": "label-flip", "count": 2}, seeds=[3, 4])
    parts = Parts(asked)
    for number in (3, 4):
        shares, train = parts.shares(number), parts.data.train
        for peer in range(PEERS):
            mine = shares.order[shares.starts[peer] : shares.starts[peer] + shares.counts[peer]]
            assert (mine >= len(train)).all() == (peer >= PEERS - 2)
            assert (mine >= len(train)).any() == (peer >= PEERS - 2)
    assert len(parts.pool) == pytest.approx(len(parts.data.train) * (1 + 2 * 2 / PEERS), abs=4)


@pytest.mark.parametrize(
    "values",
    [
        {"compression": {"name": "quantise", "bits": 4}, "faults": {"missed": 0.2, "leave": 0.1}},
        {"compression": {"name": "top-k", "gamma": 0.3}, "training": {"algorithm": "choco-sgd"}},
        {"attackers": {"attack": "gaussian", "count": 2}, "defence": {"rule": "geometric-median"}},
        {"attackers": {"attack": "backdoor", "count": 2}, "defence": {"rule": "clipping", "share": 0.4}},
        {"attackers": {"attack": "a-little-is-enough", "count": 4}, "compression": {"name": "sign"}},
    ],
)
def test_a_seed_gives_the_same_alone_and_beside_others(values):
    together = simulate(scenario(seeds=[5, 1], **values))
    for number in (5, 1):
        alone = simulate(scenario(seeds=[number], **values))
        beside = together.frame[together.frame["seed"] == number].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone.frame, beside, rtol=1e-4, atol=1e-5)


def test_eight_bits_with_feedback_cost_a_quarter_and_change_little():
    terms = {"training": {"rounds": 30, "batch_size": 16, "learning_rate": 0.3}, "seeds": [0, 1]}
    plain = simulate(scenario(**terms))
    eight = simulate(scenario(compression={"name": "quantise", "bits": 8}, **terms))
    assert final(eight, "modelled_bytes") == 30 * 2 * Quantise(8).size(PARAMETERS)
    assert final(eight, "modelled_bytes") / final(plain, "modelled_bytes") == pytest.approx(0.25, abs=0.005)
    one, other = (run.evaluated["loss"].to_numpy() for run in (plain, eight))
    np.testing.assert_allclose(one, other, rtol=0.01)
    assert (one != other).any()


def test_feedback_sends_later_what_the_rest_loses():
    def loss(**terms):
        run = simulate(
            scenario(compression={"name": "top-k", "ratio": 0.02, "gamma": 0.1} | terms,
                     training={"rounds": 60, "batch_size": 16, "learning_rate": 0.1})
        )  # fmt: skip
        return final(run, "loss")

    assert loss() < 0.8 * loss(error_feedback=False)


def test_bytes_are_those_of_the_encoders():
    def sent(**values):
        return final(simulate(scenario(training={"rounds": 1}, **values)), "modelled_bytes")

    ratio, groups = {"ratio": 0.1}, {"averaging": {"topology": "groups", "group_size": 5}}
    whole = 4 * PARAMETERS
    assert sent(compression={"name": "top-k"} | ratio) == 2 * TopK(0.1).size(PARAMETERS)
    # Sums of what is sent in the same places: as without compression, 2 (m - 1) / m.
    assert sent(compression={"name": "rand-k"} | ratio, **groups) == pytest.approx(8 / 5 * RandK(0.1).size(PARAMETERS))
    # A rule that compares single updates needs all of them at each member.
    assert sent(defence={"rule": "median"}, **groups) == 4 * whole
    three = {"averaging": {"topology": "groups", "group_size": 3}, "peers": 9}
    assert sent(defence={"rule": "group-median"}, **three) == pytest.approx((4 / 3 + 2) * whole)
    tracking = {"algorithm": "gradient-tracking", "local_steps": 1, "rounds": 1}
    run = simulate(scenario(training=tracking, compression={"name": "sign"}))
    assert final(run, "modelled_bytes") == 2 * 2 * (4 + -(-PARAMETERS // 8))
    partial = {"algorithm": "partial-sharing", "options": {"personal": ["2"]}, "rounds": 1}
    assert final(simulate(scenario(training=partial)), "modelled_bytes") == 2 * 4 * (PARAMETERS - HEAD)


def test_choco_sgd_is_compression_with_feedback():
    plain = simulate(scenario())
    whole = simulate(scenario(training={"algorithm": "choco-sgd"}))
    np.testing.assert_allclose(plain.frame["loss"].dropna(), whole.frame["loss"].dropna(), rtol=1e-4)
    # They differ in where copies start: at 0, or at the common initial model.
    terms = {"compression": {"name": "quantise", "bits": 6, "gamma": 0.5}}
    one, other = simulate(scenario(training={"algorithm": "choco-sgd"}, **terms)), simulate(scenario(**terms))
    assert final(one, "modelled_bytes") == final(other, "modelled_bytes") == 6 * 2 * Quantise(6).size(PARAMETERS)
    assert final(one, "loss") == pytest.approx(final(other, "loss"), rel=0.05)


def test_personal_heads_stay_and_the_rest_is_shared():
    options = {"personal": ["2"], "inner": "fedprox", "mu": 0.1}
    terms = {"training": {"algorithm": "partial-sharing", "options": options}, "averaging": {"topology": "complete"}}
    for compression in ({}, {"name": "quantise"}, {"name": "low-rank"}, {"name": "rand-k"}):
        run = simulate(scenario(compression=compression, **terms))
        assert run.summary["seeds"][0]["outcome"] == "done"
        assert final(run, "consensus") > 0


def test_masks_go_with_drawn_places_and_with_medians_of_groups():
    groups = {"averaging": {"topology": "groups", "group_size": 3, "masks": "on"}, "peers": 9}
    for values in (
        {"compression": {"name": "rand-k"}},
        {"defence": {"rule": "group-median"}, "attackers": {"attack": "scaling", "count": 1, "strength": 1e6}},
    ):
        run = simulate(scenario(**groups, **values))
        assert run.summary["masks"] == "on"
        assert run.summary["seeds"][0]["outcome"] == "done"
    assert final(run, "accuracy") > 0.3


@pytest.mark.parametrize("clip", [8.0, 42.25])
def test_liars_behind_masks_are_not_refused_for_their_clip(clip):
    groups = {"topology": "groups", "group_size": 3, "masks": "on", "clip": clip}
    attackers = {"attack": "scaling", "count": 3, "strength": 1e9}
    run = simulate(scenario(averaging=groups, peers=9, attackers=attackers, training={"rounds": 1}))
    assert len(run.frame) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"compression": {"name": "zip"}}, "compression.name: 'zip' is unknown; there are none, rand-k"),
        ({"attackers": {"attack": "noise", "count": 1}}, "'noise' is unknown"),
        ({"defence": {"rule": "vote"}}, "'vote' is unknown"),
        ({"attackers": {"attack": "scaling"}}, "nobody is to attack"),
        ({"attackers": {"attack": "scaling", "count": 1, "fraction": 0.1}}, "leave one out"),
        ({"attackers": {"attack": "scaling", "count": PEERS}}, "leave one honest"),
        ({"compression": {"name": "top-k"}, "averaging": {"topology": "groups"}}, "needs a copy of each neighbor"),
        ({"training": {"algorithm": "choco-sgd"}, "averaging": {"topology": "groups"}}, "needs a copy of each"),
        (
            {"averaging": {"topology": "groups", "masks": "on"}, "compression": {"name": "top-k"}},
            "masks are on and the compression is top-k",
        ),
        (
            {"averaging": {"topology": "groups", "masks": "on"}, "defence": {"rule": "krum"}},
            "krum compares single updates, which masks hide; take group-median",
        ),
        (
            {"averaging": {"topology": "groups", "masks": "on"}, "training": {"algorithm": "choco-sgd"}},
            "choco-sgd shows neighbors",
        ),
        ({"defence": {"rule": "krum"}}, "krum with a share of 0.2 needs 5 vectors where there are 3"),
        ({"defence": {"rule": "group-median"}}, "is of groups' averages"),
        (
            {"defence": {"rule": "group-median"}, "averaging": {"topology": "groups", "group_size": 5}},
            "needs 3 groups, not 2",
        ),
        (
            {
                "defence": {"rule": "median"}, "averaging": {"topology": "random-push"},
                "training": {"algorithm": "push-sum"},
            },
            "rows sum to 1",
        ),
        ({"attackers": {"attack": "backdoor", "count": 1}, "data": {"task": "{numbers}"}}, "attack on classes"),
        ({"training": {"algorithm": "partial-sharing"}}, "needs personal"),
        (
            {"training": {"algorithm": "partial-sharing", "options": {"personal": ["2"], "inner": "choco-sgd"}}},
            "mixes whole models",
        ),
        ({"training": {"algorithm": "partial-sharing", "options": {"personal": ["9"]}}}, "no tensor '9'"),
        ({"training": {"algorithm": "choco-sgd", "options": {"gamma": 0.1}}}, "choco-sgd has no 'gamma'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(values, words, tmp_path):
    if values.get("data"):
        (tmp_path / "numbers.py").write_text(NUMBERS)
        values = values | {"data": {"task": f"{tmp_path / 'numbers.py'}:Numbers", "partition": "iid"}}
    with pytest.raises(InvalidConfig, match=words) as raised:
        simulate(scenario(**values))
    assert "\n" not in str(raised.value)


NUMBERS = """
import torch
from p2pfl import Task
from p2pfl.learning.task import Data, Examples


class Numbers(Task):
    def model(self):
        return torch.nn.Linear(3, 1)

    def data(self, settings):
        examples = Examples(torch.rand(40, 3), torch.rand(40))
        return Data(examples, examples)

    def loss(self, outputs, targets):
        return (outputs[:, 0] - targets).square().mean()

    def metrics(self, outputs, targets):
        return {"error": float((outputs[:, 0] - targets).abs().mean())}
"""


@pytest.mark.parametrize("name", ["compression", "byzantine-masked", "byzantine"])
def test_what_ships_runs(name):
    small = load(name, ["seeds=[0]", "training.rounds=1", "evaluation.peers=2"])
    for point in points(small):
        if name == "byzantine" and point.attackers.attack != "sign-flip" and point.defence.rule != "none":
            continue
        assert simulate(point).frame["loss"].iloc[-1] > 0
