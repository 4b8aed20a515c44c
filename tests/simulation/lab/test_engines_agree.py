"""One small federation thrice: as stacked tensors, as peers of the simulated network, and as processes over TCP."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from p2pfl import cli
from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.core.settings import validate
from p2pfl.core.trace import PeerStarted, RoundEnded
from p2pfl.crypto.suite import suite
from p2pfl.gossip.group_machine import GroupMachine, GroupPlan
from p2pfl.gossip.secure_sum import MaskTerms
from p2pfl.node.federation import load_charter
from p2pfl.node.launcher import Launcher, create_federation
from p2pfl.node.peer import Peer
from p2pfl.simulation.hosts import PeerSpec, SimulatedKeyring, stream
from p2pfl.simulation.results import open_run
from p2pfl.simulation.scenario import Scenario, load
from p2pfl.simulation.simnet import Network
from p2pfl.simulation.simulate import simulate

ROUNDS = 6


def scenario(**values):
    settings = {
        "peers": 6, "seeds": [3, 4], "training": {"rounds": ROUNDS, "local_steps": 2, "batch_size": 40},
        "data": {"partition": "replacement", "examples": 40}, "averaging": {"topology": "ring"},
        "evaluation": {"times": 4, "peers": 6},
    }  # fmt: skip
    for key, value in values.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return validate(Scenario, settings, "test")


@pytest.mark.parametrize("topology", ["ring", "exponential", "complete"])
def test_stacked_tensors_and_peers_have_the_same_curves(topology):
    """With whole shares: what is left is float32's rounding, in another order."""
    dense = simulate(scenario(averaging={"topology": topology}))
    peers = simulate(scenario(averaging={"topology": topology}, engine="simnet"))
    assert list(dense.frame["round"]) == list(peers.frame["round"])
    assert list(dense.frame["working"]) == list(peers.frame["working"]) == [6] * 14
    for column in ("train_loss", "consensus", "loss", "peer_loss"):
        np.testing.assert_allclose(peers.frame[column], dense.frame[column], rtol=2e-3, atol=1e-6, err_msg=column)
    np.testing.assert_allclose(peers.frame["peer_accuracy"], dense.frame["peer_accuracy"], atol=0.003)
    assert peers.summary["seeds"][0]["final"].keys() == dense.summary["seeds"][0]["final"].keys()


MIXING = {
    "momentum": ("local-sgd", {"beta": 0.9}, {}),
    "restarted": ("local-sgd", {"beta": 0.9, "nesterov": True, "restart": True}, {}),
    "fedprox": ("fedprox", {"mu": 0.5}, {}),
    "qg-dsgdm": ("qg-dsgdm", {}, {"learning_rate": 0.02}),
    "diloco": ("diloco", {}, {}),
    "k-gt": ("k-gt", {}, {}),
    "gradient-tracking": ("gradient-tracking", {}, {"local_steps": 1}),
    "diging": ("gradient-tracking", {"step_first": False}, {"local_steps": 1, "learning_rate": 0.03}),
    "heads": ("partial-sharing", {"personal": ["2"]}, {}),
    "heads and momentum": ("partial-sharing", {"personal": ["2"], "inner": "qg-dsgdm"}, {"learning_rate": 0.02}),
}


@pytest.mark.parametrize(
    ("name", "averaging"),
    [
        *((name, {"topology": "ring"}) for name in MIXING),
        *((name, {"topology": "groups", "group_size": 6, "masks": "on"}) for name in ("diloco", "k-gt", "heads")),
    ],
)
def test_algorithms_are_the_same_on_stacked_tensors_and_on_peers(name, averaging):
    algorithm, options, more = MIXING[name]
    training = {"algorithm": algorithm, "options": options, **more}
    dense = simulate(scenario(training=training, averaging=averaging))
    peers = simulate(scenario(training=training, averaging=averaging, engine="simnet"))
    for column in ("train_loss", "consensus", "loss", "peer_loss"):
        np.testing.assert_allclose(peers.frame[column], dense.frame[column], rtol=4e-3, atol=1e-6, err_msg=column)
    assert peers.frame["train_loss"].iloc[ROUNDS] < peers.frame["train_loss"].iloc[1]


def test_bytes_are_counted_as_they_are_modelled():
    """The model leaves headers and signs of life out."""
    dense, peers = simulate(scenario()), simulate(scenario(engine="simnet"))
    counted = peers.frame["modelled_bytes"].iloc[-1] / dense.frame["modelled_bytes"].iloc[-1]
    assert 1.0 < counted < 1.01


def test_one_group_of_all_averages_as_the_complete_graph_does_masked_or_not():
    every = {"topology": "groups", "group_size": 6}
    plain = simulate(scenario(averaging=every, engine="simnet"))
    masked = simulate(scenario(averaging=every | {"masks": "on"}, engine="simnet"))
    dense = simulate(scenario(averaging={"topology": "complete"}))
    for run in (plain, masked):
        np.testing.assert_allclose(run.frame["train_loss"], dense.frame["train_loss"], rtol=2e-3)
        assert (run.frame["consensus"].dropna() < 1e-9).all()


ONE_GROUP = {"topology": "groups", "group_size": 6}
COMPLETE, MASKED = {"topology": "complete"}, ONE_GROUP | {"masks": "on"}


@pytest.mark.parametrize(
    ("attack", "averaging", "algorithm"),
    [
        ({"attack": "sign-flip", "count": 2, "strength": 1.0}, COMPLETE, "d-psgd"),
        ({"attack": "sign-flip", "count": 2, "strength": 1.0}, MASKED, "d-psgd"),
        ({"attack": "sign-flip", "count": 2, "strength": 0.5}, MASKED, "k-gt"),
        ({"attack": "scaling", "count": 1, "strength": 3.0}, ONE_GROUP, "d-psgd"),
        ({"attack": "free-rider", "count": 2}, MASKED, "d-psgd"),
        ({"attack": "label-flip", "count": 2}, {"topology": "ring"}, "d-psgd"),
        ({"attack": "label-flip", "count": 2}, MASKED, "d-psgd"),
        ({"attack": "backdoor", "count": 2, "strength": 2.0}, MASKED, "d-psgd"),
    ],
)
def test_attackers_do_the_same_in_both_engines(attack, averaging, algorithm):
    """Liars where all adopt one average, themselves too: elsewhere those of stacked tensors forget their lies."""
    terms = {"attackers": attack, "averaging": averaging, "training": {"algorithm": algorithm}}
    dense, peers = simulate(scenario(**terms)), simulate(scenario(engine="simnet", **terms))
    backdoor = ["backdoor", "peer_backdoor"] if attack["attack"] == "backdoor" else []
    for column in ("train_loss", "consensus", "loss", "peer_loss", *backdoor):
        np.testing.assert_allclose(peers.frame[column], dense.frame[column], rtol=4e-3, atol=1e-6, err_msg=column)
    for run in (dense, peers):
        judged = run.peers.groupby("peer")["loss"].count()
        assert (judged > 0).tolist() == [True] * (6 - attack["count"]) + [False] * attack["count"]
    assert peers.frame.columns.tolist() == dense.frame.columns.tolist()
    assert peers.summary["attackers"] == attack["count"]
    honest = simulate(scenario(averaging=averaging, training={"algorithm": algorithm}, engine="simnet"))
    assert peers.frame["loss"].iloc[ROUNDS] != pytest.approx(honest.frame["loss"].iloc[ROUNDS], rel=0.005)


def test_equal_seeds_give_equal_lies():
    noisy = scenario(attackers={"attack": "gaussian", "count": 2, "strength": 0.1}, engine="simnet")
    one, other = simulate(noisy), simulate(noisy)
    pd.testing.assert_frame_equal(one.frame, other.frame, check_exact=True)


def test_peers_refuse_lies_that_are_no_models_and_go_on():
    """Stacked tensors take them in."""
    terms = {"seeds": [3], "averaging": COMPLETE, "attackers": {"attack": "gaussian", "count": 1, "strength": 1e34}}
    assert simulate(scenario(**terms)).summary["seeds"][0]["outcome"] == "diverged"
    run = simulate(scenario(engine="simnet", **terms))
    assert run.summary["seeds"][0]["outcome"] == "done"
    assert run.frame["train_loss"].iloc[-1] < run.frame["train_loss"].iloc[1]
    assert run.frame["working"].iloc[-1] == 5, "the attacker took its own lie in, and trains no more"


def test_behind_masks_a_lie_ends_at_the_clip():
    lies = {"attack": "gaussian", "count": 1, "strength": 1e34}
    averaging = MASKED | {"clip": 8.0}
    run = simulate(scenario(seeds=[3], averaging=averaging, attackers=lies, training={"rounds": 1}, engine="simnet"))
    assert run.frame["working"].tolist() == [6, 6]
    assert 10 < run.frame["loss"].iloc[-1] < 1e4


def test_what_lies_make_of_models_can_end_honest_peers():
    """The average has values near the clip; local steps lead beyond, and a machine does not send that."""
    lies = {"attack": "scaling", "count": 1, "strength": 1e6}
    with pytest.raises(RoundFailed, match=r"peer-[0-4]: .* exceed the clip"):
        simulate(scenario(seeds=[3], averaging=MASKED, attackers=lies, engine="simnet"))


EACH_ROUND = {"times": ROUNDS + 1, "peers": 6}


def test_a_run_ends_at_the_same_evaluation_in_both_engines():
    """Rows until then are those of a run that goes on."""
    whole = simulate(scenario(evaluation=EACH_ROUND, engine="simnet"))
    losses = whole.frame[whole.frame["seed"] == 3]["loss"].to_numpy()
    rules = {
        "reached": {"metric": "loss", "target": float(losses[2:4].mean())},
        "stopped": {"metric": "peer_loss", "patience": 2, "improvement": 10.0},
    }
    for outcome, rule in rules.items():
        dense, peers = (
            simulate(scenario(evaluation=EACH_ROUND, stopping=rule, engine=each)) for each in ("dense", "simnet")
        )
        assert list(peers.frame["round"]) == list(dense.frame["round"])
        assert [seed["outcome"] for seed in peers.summary["seeds"]] == [outcome] * 2
        for seed, rows in peers.frame.groupby("seed"):
            before = whole.frame[whole.frame["seed"] == seed].head(len(rows))
            pd.testing.assert_frame_equal(rows, before.set_index(rows.index), check_exact=True)
            assert peers.peers[peers.peers["seed"] == seed]["round"].max() == rows["round"].max()
    assert simulate(scenario(stopping={"metric": "loss", "target": 1e9}, engine="simnet")).frame["round"].max() == 0


def test_a_network_stops_when_its_run_has_ended():
    steps = []
    rule = {"metric": "loss", "patience": 1, "improvement": 10.0}
    training = {"rounds": 200, "local_steps": 1, "batch_size": 40}
    terms = scenario(seeds=[3], training=training, evaluation={"times": 201}, stopping=rule, engine="simnet")
    run = simulate(terms, watch=lambda complete, _: steps.append(complete))
    assert run.frame["round"].max() == 1
    assert steps[-1] <= 3


def test_a_run_among_peers_that_leave_ends_where_the_rule_says():
    faults = {"faults": {"leave": 0.1, "rejoin": 0.3}, "evaluation": EACH_ROUND, "engine": "simnet"}
    whole = simulate(scenario(**faults))
    for seed, rows in whole.frame.groupby("seed"):
        target = {"metric": "loss", "target": rows["loss"].iloc[3]}
        run = simulate(scenario(seeds=[seed], stopping=target, **faults))
        assert run.frame["round"].max() == np.flatnonzero(rows["loss"] <= target["target"])[0]
        pd.testing.assert_frame_equal(run.frame, rows.head(len(run.frame)).reset_index(drop=True), check_exact=True)


@pytest.mark.parametrize("engine", ["dense", "simnet"])
def test_a_rule_of_what_is_not_measured_is_refused(engine):
    with pytest.raises(InvalidConfig, match="'auc' is not measured; there are"):
        simulate(scenario(stopping={"metric": "auc", "patience": 1}, engine=engine))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"training": {"algorithm": "gradient-tracking"}}, "gradient-tracking makes one step a round"),
        ({"training": {"algorithm": "push-sum"}}, "push-sum is for links that go one way"),
        ({"training": {"algorithm": "d2", "local_steps": 1}}, "d2 is for one mixing matrix in all rounds"),
        ({"averaging": {"topology": "base"}}, "averaging.topology: base is of the lab alone: take one of groups, exp"),
        ({"faults": {"missed": 0.1}}, "faults.missed: among real peers no exchange fails alone"),
        ({"participation": 0.5}, "participation: real members all take part in every round"),
        ({"attackers": {"attack": "inner-product", "count": 1}}, "a real peer has sent its own before it sees that"),
        ({"attackers": {"attack": "a-little-is-enough", "count": 1}}, "from what all others send in the round"),
        ({"defence": {"rule": "median"}}, "real peers have no defence yet"),
        ({"peers": 1000}, "takes 256 at most"),
    ],
)
def test_what_real_peers_do_not_do_is_refused_in_one_line(values, reason):
    with pytest.raises(InvalidConfig, match=reason):
        simulate(scenario(engine="simnet", **values))


def charter_from(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["charter", "from", *arguments])
    return int(ended.value.code or 0)


def test_a_rehearsal_becomes_a_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert charter_from("hospital-consortium", str(tmp_path), "--set", "averaging.group_size=5") == 0
    said = capsys.readouterr().out
    assert "left out: faults: not of a charter" in said
    draft = load_charter(tmp_path / "charter.toml")
    asked = load("hospital-consortium")
    assert (draft.name, draft.task.source) == (asked.name, asked.data.task)
    assert draft.training.rounds == asked.training.rounds
    assert (draft.averaging.group_size, draft.averaging.masks) == (5, "on")
    assert charter_from("hospital-consortium", str(tmp_path)) == 2
    assert "exists already" in capsys.readouterr().err
    assert charter_from("topologies", str(tmp_path / "other"), "--set", "compression.name=sign") == 2
    assert "real peers have no compression yet" in capsys.readouterr().err
    assert charter_from("ten-thousand", str(tmp_path / "other")) == 2
    assert "one-peer-exponential is of the lab alone" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_draft_of_a_sweep_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rule `none` is no defence, whatever the other keys of [defence] say."""
    assert charter_from("byzantine", str(tmp_path), "--set", "attackers.attack=none") == 0
    said = capsys.readouterr().out
    assert "left out: sweep of defence.rule: a charter has one value of each" in said
    assert "left out: attackers: not of a charter" in said
    assert load_charter(tmp_path / "charter.toml").averaging.topology == "complete"


def test_a_draft_has_the_rehearsals_algorithm_and_none_that_peers_cannot_bear(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drafted(name: str, *more: str) -> int:
        changes = [f"training.algorithm={name}", *more]
        return charter_from(
            "hospital-consortium", str(tmp_path / name), *(each for change in changes for each in ("--set", change))
        )

    assert drafted("diloco", "training.options.beta=0.5") == 0
    training = load_charter(tmp_path / "diloco" / "charter.toml").training
    assert (training.algorithm, training.options) == ("diloco", {"beta": 0.5})
    capsys.readouterr()
    for name, more, reason in (
        ("gradient-tracking", ["training.local_steps=1"], "averaging.masks: after a sum that was lost"),
        ("push-sum", [], "push-sum is for links that go one way"),
        ("partial-sharing", ['training.options.personal=["head"]'], "no tensor 'head'"),
    ):
        assert drafted(name, *more) == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / name).exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", ["d-psgd", "k-gt", "diloco"])
def test_masked_rounds_of_processes_and_of_the_simulated_network_give_the_same_bits(
    tmp_path: Path, algorithm: str
) -> None:
    terms = {
        "training": {"rounds": ROUNDS, "local_steps": 3, "batch_size": 32, "algorithm": algorithm},
        "averaging": {"topology": "groups", "group_size": 4, "settle_rounds": 0},
        "deadlines": {"start": 120.0, "round": 60.0},
    }
    dealt = {"partition": "dirichlet", "alpha": 0.5, "peers": 4, "seed": 5}
    made = create_federation(tmp_path / "run", "digits", terms, [{**dealt, "index": index} for index in range(4)], 5)
    peers = {each.plan.me: each for each in map(Peer.prepare, made.homes) if isinstance(each.plan, GroupPlan)}
    network = Network([_spec(peers[place]) for place in range(4)], charter=peers[0].plan.charter)
    network.run(1e6)
    launcher = Launcher(made)
    launcher.start()
    for process in launcher.processes.values():
        process.join(200)
    assert launcher.failures() == {}
    run = open_run(tmp_path / "run")
    for peer in run.peers:
        assert all(event.outcome == "full" for _, event in peer.rounds_ended() if not event.settling)
    assert len(run.peers) == 4
    for place, peer in enumerate(network.peers):
        adopted = {int(round): vector for round, vector in peer.adopted}
        real = next(each for each in run.peers if each.home.config.name == peer.name)
        for number in range(ROUNDS):
            assert np.array_equal(adopted[number], real.history[number + 1]), (place, number)
        assert not np.array_equal(adopted[0], adopted[ROUNDS - 1])


def _spec(prepared: Peer) -> PeerSpec:
    plan = prepared.plan
    assert isinstance(plan, GroupPlan)
    keyring = SimulatedKeyring(b"test", plan.me, len(plan.roster))

    def build(_: object) -> GroupMachine:
        masks = MaskTerms(suite("aes"), 32, 64.0, stream(plan.me, "entropy").randbytes)
        return GroupMachine(plan, keyring, prepared.initial.take(), None, masks, prepared.weight)

    def train(_: object, round: int, vector: np.ndarray, __: float, mixed: bool) -> tuple[np.ndarray, float, int]:
        trained = prepared.trainer.train(vector, round, mixed=mixed)
        return trained.vector, trained.loss, trained.steps

    return PeerSpec(
        plan.roster[plan.me],
        plan.names[plan.me],
        build,
        train,
        tuple(plan.roster[other] for other in plan.neighbors),
        model=prepared.trainer.model_after,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_process_goes_on_with_its_algorithms_state(tmp_path: Path) -> None:
    terms = {
        "training": {"rounds": 120, "local_steps": 1, "batch_size": 16, "algorithm": "k-gt"},
        "averaging": {"topology": "groups", "group_size": 4},
        "deadlines": {"start": 120.0, "round": 20.0},
    }
    dealt = {"partition": "iid", "peers": 4, "seed": 5}
    made = create_federation(tmp_path / "run", "digits", terms, [{**dealt, "index": index} for index in range(4)], 5)
    launcher = Launcher(made)
    launcher.start()
    name = next(iter(launcher.processes))
    try:
        ended = 0
        while ended < 20:
            assert launcher.is_running()
            entries = launcher.read_new()[name]
            ended += sum(isinstance(entry.event, RoundEnded) for entry in entries)
            launcher.processes[name].join(0.05)
        launcher.kill(name)
        launcher.start_again(name)
        for process in launcher.processes.values():
            process.join(200)
        assert launcher.failures() == {}
    finally:
        launcher.stop()
    run = open_run(tmp_path / "run")
    again = next(peer for peer in run.peers if peer.home.config.name == name)
    began = [entry.event for entry in again.entries if isinstance(entry.event, PeerStarted)]
    assert len(began) == 2
    assert began[1].resumed_at >= 15
    after = [record for _, record in again.rounds_ended() if record.round >= began[1].resumed_at]
    assert sum(record.outcome == "full" for record in after) > 20
    losses = [record.loss for record in after if record.loss is not None]
    assert np.mean(losses[-20:]) < 0.5, "what it has of the corrections did not lead it astray"
