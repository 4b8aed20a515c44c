"""Tasks whose data are made: quadratics with a known optimum, FedProx's synthetic(alpha, beta), and banks' credits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.learning.evaluation import forward
from p2pfl.learning.task import Examples, load_task, make_model, read_data
from p2pfl.learning.tasks.quadratics import EACH, Quadratics
from p2pfl.learning.tasks.synthetic import CLASSES, SIZE, Synthetic
from p2pfl.simulation.scenario import Scenario, load
from p2pfl.simulation.simulate import simulate

PEERS = 8


def run(task, settings, algorithm="d-psgd", **training):
    return simulate(
        validate(
            Scenario,
            {
                "peers": PEERS, "averaging": {"topology": "ring"}, "evaluation": {"times": 2, "peers": PEERS},
                "data": {"task": task, "partition": "order", "settings": {"peers": PEERS} | settings},
                "training": {"algorithm": algorithm, "local_steps": 1, "batch_size": EACH, "rounds": 2000} | training,
            },
            "test",
        )
    )  # fmt: skip


def final(found, key):
    return found.summary["final"][key]["median"]


def test_the_optimum_is_where_the_gradients_of_all_cancel():
    data = Quadratics().data({"peers": 5, "noise": 0.7, "condition": 100})
    roots, optimum = data.train.inputs, data.test.targets
    gradients = roots * (roots * optimum - data.train.targets)
    torch.testing.assert_close(gradients.sum(0), torch.zeros(10), rtol=0.0, atol=1e-4)
    assert len(data.train) == 5 * EACH
    least = float(roots.square().min())
    assert 0.01 <= least < 0.1 and float(roots.max()) <= 1.0
    assert torch.equal(Quadratics().data({"peers": 5}).train.targets, Quadratics().data({"peers": 5}).train.targets)


def test_unequal_peers_keep_d_psgd_off_the_optimum_and_not_gradient_tracking():
    plain, tracking = run("quadratics", {}), run("quadratics", {}, "gradient-tracking")
    assert final(plain, "peer_distance") > 0.1
    assert final(tracking, "peer_distance") < 1e-4
    assert final(tracking, "distance") < 1e-4
    assert tracking.metric == "peer_distance"


def test_d_psgd_rests_at_its_fixed_point():
    """[I - (1 - g) W]^-1 g W b for curvatures of 1."""
    found = run("quadratics", {"condition": 1}, learning_rate=0.2, rounds=400)
    b = Quadratics().data({"peers": PEERS, "condition": 1}).train.targets[::EACH].double().numpy()
    w = sum(np.roll(np.eye(PEERS), shift, axis=1) for shift in (-1, 0, 1)) / 3
    rest = np.linalg.solve(np.eye(PEERS) - 0.8 * w, 0.2 * w @ b)
    distances = found.peers[found.peers["round"] == 400]["distance"].to_numpy()
    np.testing.assert_allclose(distances, np.linalg.norm(rest - b.mean(0), axis=1), rtol=1e-4)


def test_synthetic_peers_differ_as_alpha_and_beta_say():
    def spread(key, **settings):
        data = Synthetic().data({"peers": 60, "examples": 50} | settings)
        means = data.train.inputs.view(60, 50, SIZE).mean((1, 2))
        assert data.train.targets.max() < CLASSES
        assert len(data.test) == 60 * 10
        return float(means.std())

    none, some, much = (spread("beta", beta=beta) for beta in (0.0, 1.0, 25.0))
    # Of 60 numbers around B_k: the variance of their mean is beta + 1 / 60.
    assert (none, some, much) == pytest.approx((60**-0.5, (1 + 1 / 60) ** 0.5, (25 + 1 / 60) ** 0.5), rel=0.3)
    first = Synthetic().data({"seed": 3}).train
    assert torch.equal(first.inputs, Synthetic().data({"seed": 3}).train.inputs)
    assert not torch.equal(first.inputs, Synthetic().data({"seed": 4}).train.inputs)
    deviations = first.inputs.view(30, 100, SIZE).std(1).mean(0)
    torch.testing.assert_close(deviations, torch.arange(1, SIZE + 1) ** -0.6, rtol=0.1, atol=0.0)


def test_a_peers_labels_are_a_linear_models():
    mine = Synthetic().data({"peers": 1, "examples": 200}).train
    model = torch.nn.Linear(SIZE, CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(mine.inputs), mine.targets)
        loss.backward()
        optimizer.step()
    assert (model(mine.inputs).argmax(1) == mine.targets).float().mean() == 1.0


def test_synthetic_runs():
    assert final(run("synthetic", {"examples": 40}, rounds=60, learning_rate=0.05), "peer_accuracy") > 0.2


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        (Quadratics, {"peer": 3}, "unknown key 'peer'"),
        (Quadratics, {"condition": 0.5}, "condition from 1"),
        (Quadratics, {"noise": "much"}, "noise is 'much'"),
        (Synthetic, {"alpha": -1}, "from 0 on"),
        (Synthetic, {"examples": 2.5}, "whole numbers"),
        (Synthetic, {"beta": True}, "beta is True"),
    ],
)
def test_settings_that_do_not_fit_are_refused(task, settings, words):
    with pytest.raises(InvalidConfig, match=words):
        task().data(settings)


def test_what_has_no_classes_is_not_dealt_by_class():
    asked = {"peers": 4, "data": {"task": "quadratics", "settings": {"peers": 4}}, "training": {"rounds": 1}}
    with pytest.raises(InvalidConfig, match="quadratics has no classes"):
        simulate(validate(Scenario, asked, "test"))


def test_banks_have_customers_of_their_own_and_one_table_of_tests():
    task = load_task("credit", Path()).task
    data = read_data(task, {"banks": 6, "alpha": 0.05, "rows": 200})
    assert (len(data.train), len(data.test)) == (1200, 2000)
    assert set(task.metrics(forward(make_model(task), data.test.inputs), data.test.targets)) == {"auc", "ks"}
    ages = [float(part.inputs[:, 0].mean()) for part in _banks(data.train, 6)]
    alike = [float(part.inputs[:, 0].mean()) for part in _banks(read_data(task, {"banks": 6, "alpha": 1e6}).train, 6)]
    assert np.ptp(ages) > 5 * np.ptp(alike)
    scaled = make_model(task).get_submodule("scaling")(data.test.inputs)[:, :5]
    assert scaled.mean(0).abs().max() < 0.2
    assert (scaled.std(0) - 1).abs().max() < 0.2
    with pytest.raises(InvalidConfig, match="whole numbers of banks"):
        read_data(task, {"banks": 1.5})


def _banks(examples, count):
    return [Examples(*part) for part in zip(examples.inputs.chunk(count), examples.targets.chunk(count), strict=True)]


def test_a_bank_consortium_learns_more_than_its_banks_alone():
    together = load("bank-consortium", ["seeds=[0]", "evaluation.times=3", "stopping.patience=0"])
    alone = load("bank-consortium", [
        "seeds=[0]", "evaluation.times=3", "stopping.patience=0", "faults.parts=12", "faults.split=0", "faults.heal=100"
    ])  # fmt: skip
    ends = [simulate(each).summary["final"] for each in (together, alone)]
    assert ends[0]["peer_auc"]["median"] > ends[1]["peer_auc"]["median"] + 0.02
    assert ends[0]["peer_ks"]["median"] > ends[1]["peer_ks"]["median"] + 0.02


def test_the_example_on_text_runs_on_stacked_peers():
    """Its inputs are places in an alphabet, whole numbers."""
    example = Path(__file__).parents[3] / "examples" / "next_character.py"
    found = simulate(
        validate(
            Scenario,
            {
                "peers": 4, "averaging": {"topology": "ring"}, "evaluation": {"times": 2},
                "data": {"task": f"{example}:NextCharacter", "partition": "order"}, "training": {"rounds": 60},
            },
            "test",
        )
    )  # fmt: skip
    assert found.summary["tier"] == "vmap"
    assert found.frame["loss"].iloc[-1] < found.frame["loss"].iloc[0] - 0.5
