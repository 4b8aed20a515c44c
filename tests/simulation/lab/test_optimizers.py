"""A task's own optimizer makes the local steps of stacked peers, as one for each peer would."""

import pandas as pd
import pytest
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.space import Space
from p2pfl.learning.vector import assign, flatten
from p2pfl.simulation.dense.kernels import TIERS, OwnOptimizer, Pulls
from p2pfl.simulation.dense.kernels.optimizers import ELEMENTWISE
from p2pfl.simulation.simulate import simulate
from tests.simulation.lab.stand_ins import Classes, mlp
from tests.simulation.lab.test_kernels import BATCH, STEPS, N, chosen, starts
from tests.simulation.lab.test_simulate import scenario

SETTINGS = {
    torch.optim.SGD: {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    torch.optim.AdamW: {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    torch.optim.RMSprop: {"lr": 0.01, "momentum": 0.5, "centered": True},
}
TASK = """
import torch

from p2pfl.learning.tasks.digits import Digits


class Mine(Digits):
    def optimizer(self, parameters):
        parameters = list(parameters)
        return {made}
"""


class Own(Classes):
    def __init__(self, make, kind):
        super().__init__(make)
        self.kind = kind

    def optimizer(self, parameters):
        return self.kind(parameters, **SETTINGS.get(self.kind, {"lr": 0.01}))


def looped(task, rows, rounds):
    """Make each peer's steps by an optimizer of its own, which lives on while its model is replaced."""
    pool, found = task.data({}).train, []
    for peer, start in enumerate(rows):
        model, row = task.model(), start
        optimizer = task.optimizer([each for each in model.parameters() if each.requires_grad])
        for batches in rounds:
            assign(model, row.numpy())
            for batch in batches[peer]:
                optimizer.zero_grad()
                task.loss(model(pool.inputs[batch]), pool.targets[batch]).backward()
                optimizer.step()
            row = torch.from_numpy(flatten(model)) / 2
        found.append(row)
    return torch.stack(found)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_each_peer_has_an_optimizer_of_its_own(kind, tier):
    task = Own(mlp(12, 16, 5), kind)
    pool, rows = task.data({}).train, starts(task)
    kernel, own = TIERS[tier](task, pool, 2), OwnOptimizer(task)
    space, rounds = Space(N, kernel.blocks), chosen(len(pool), steps=3 * STEPS, batch=BATCH).split(STEPS, dim=1)
    flat = space.from_rows(rows)
    for batches in rounds:
        flat = kernel.steps(space, flat, batches, 7.0, Pulls(own=own), None).x / 2  # somewhere else in memory
    found = space.rows(flat)
    torch.testing.assert_close(found, looped(task, rows, rounds), rtol=1e-3, atol=1e-5)
    assert torch.equal(flat, space.from_rows(found)), "what is stored beyond the model stays 0"


def test_what_is_not_trained_stays():
    class Frozen(Own):
        def model(self):
            model = super().model()
            model[0].weight.requires_grad_(False)
            return model

    task = Frozen(mlp(12, 16, 5), torch.optim.AdamW)
    pool, rows = task.data({}).train, starts(task)
    kernel = TIERS["vmap"](task, pool)
    space, batches = Space(N, kernel.blocks), chosen(len(pool))
    found = kernel.steps(space, space.from_rows(rows), batches, 7.0, Pulls(own=OwnOptimizer(task)), None).x
    torch.testing.assert_close(space.rows(found) / 2, looped(task, rows, [batches]), rtol=1e-4, atol=1e-6)
    assert torch.equal(space.rows(found)[:, : 12 * 16], rows[:, : 12 * 16])


def of(tmp_path, made, **values):
    (tmp_path / "mine.py").write_text(TASK.format(made=made))
    return scenario(data={"task": f"{tmp_path / 'mine.py'}:Mine"}, **values)


ADAM = "torch.optim.Adam(parameters, lr=0.003)"


@pytest.mark.parametrize("algorithm", ["d-psgd", "fedprox", "diloco", "push-sum"])
def test_scenarios_take_it(tmp_path, algorithm):
    run = simulate(of(tmp_path, ADAM, training={"algorithm": algorithm, "rounds": 20, "local_steps": 4}))
    assert run.summary["learning_rate"] == 0.003
    accuracy = run.frame["accuracy"].dropna().to_list()
    assert accuracy[-1] > max(0.5, accuracy[0])


def test_the_dense_engine_and_real_peers_agree_on_it(tmp_path, monkeypatch):
    of(tmp_path, ADAM)
    monkeypatch.chdir(tmp_path)  # a charter's task lies beside it
    values = {
        "training": {"batch_size": 1000, "rounds": 4}, "data": {"partition": "iid", "task": "mine.py:Mine"},
        "averaging": {"topology": "ring"}, "peers": 3, "evaluation": {"peers": 3},
    }  # fmt: skip
    dense, simnet = (simulate(scenario(engine=engine, **values)).frame for engine in ("dense", "simnet"))
    columns = ["round", "train_loss", "loss", "accuracy", "consensus"]
    pd.testing.assert_frame_equal(dense[columns], simnet[columns], rtol=2e-3)


def test_a_learning_rate_is_that_of_plain_sgd(tmp_path):
    run = simulate(of(tmp_path, ADAM, training={"learning_rate": 0.1}))
    assert run.summary["learning_rate"] == 0.1
    pd.testing.assert_frame_equal(run.frame, simulate(scenario(training={"learning_rate": 0.1})).frame)


GROUPS = "torch.optim.SGD([{'params': parameters[:1], 'lr': 0.1}, {'params': parameters[1:], 'lr': 0.2}], lr=0.1)"


@pytest.mark.parametrize(
    ("made", "values", "words"),
    [
        ("torch.optim.LBFGS(parameters)", {}, "LBFGS looks at more than single numbers"),
        (GROUPS, {}, "has groups of parameters"),
        (ADAM, {"training": {"algorithm": "k-gt"}}, "not plain SGD"),
        (ADAM, {"training": {"algorithm": "ad-psgd"}, "engine": "simnet"}, "not plain SGD"),
        (ADAM, {"participation": 0.5}, "peers are away now and then"),
    ],
)
def test_what_stacked_peers_cannot_do_is_refused_in_one_line(tmp_path, made, values, words):
    with pytest.raises(InvalidConfig, match=words) as raised:
        simulate(of(tmp_path, made, **values))
    assert "\n" not in str(raised.value)
