"""Every algorithm runs in the dense engine, where local steps may write over the models and some peers stay away."""

import numpy as np
import pytest
import torch

from p2pfl.learning.algorithms import (
    D2,
    ChocoSgd,
    DiLoCo,
    FedProx,
    GradientTracking,
    KGradientTracking,
    LocalSgd,
    PartialSharing,
    PushSum,
    QuasiGlobalMomentum,
)
from p2pfl.learning.task import Examples
from p2pfl.learning.vector import flatten
from p2pfl.simulation.dense.engine import Engine, Experiment, Mixing
from p2pfl.simulation.dense.sampling import Shares, Uniform, Whole
from tests.learning.naming import named
from tests.simulation.lab.stand_ins import Classes, Fixed, Matrix, Quadratic, mlp, ring

PEERS, SIZE = 6, 3


def whole(rows, random):
    del random
    return rows, np.full(len(rows), 4 * rows.shape[1])


ALGORITHMS = [
    *(LocalSgd(), LocalSgd(beta=0.5), LocalSgd(beta=0.5, restart=True), FedProx(0.1), QuasiGlobalMomentum()),
    *(DiLoCo(), GradientTracking(), KGradientTracking(), D2(lazy=True), PushSum(), ChocoSgd(whole, gamma=1.0)),
]


def engine(algorithm, working=None):
    targets = torch.randn(PEERS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    examples = Examples(torch.zeros(PEERS, 1, dtype=torch.float64), targets)
    shares = Shares.of([np.array([peer]) for peer in range(PEERS)])
    experiment = Experiment(
        task=Quadratic(SIZE), pool=examples, test=examples, sampler=Whole(shares), algorithm=algorithm, peers=PEERS,
        exchange=Mixing(Fixed((ring(PEERS),))), initial=torch.zeros(SIZE, dtype=torch.float64), local_steps=1,
        lr=lambda _: 0.05, rounds=400, evaluated=lambda _: False, working=working,
    )  # fmt: skip
    return Engine(experiment), targets.mean(0)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
def test_the_mean_of_the_models_goes_to_the_optimum(algorithm):
    run, optimum = engine(algorithm)
    for _ in range(400):
        run.step()
    torch.testing.assert_close(run.space.mean(run.state["x"]), optimum, rtol=0.0, atol=0.03)
    if isinstance(algorithm, GradientTracking | KGradientTracking | D2):
        torch.testing.assert_close(run.space.rows(run.state["x"]), optimum.expand(PEERS, SIZE), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
def test_who_stays_away_stays_as_it_was(algorithm):
    run, _ = engine(algorithm, working=lambda _: torch.arange(PEERS) != 2)
    before = {name: tensor.clone() for name, tensor in run.state.items()}
    run.step()
    assert set(run.state) == set(before)
    rows = [run.space.rows(state["x"]) for state in (before, run.state)]
    assert torch.equal(rows[0][2], rows[1][2])
    assert not torch.equal(rows[0][0], rows[1][0])


@pytest.mark.parametrize("tier", ["vmap", "stacked", "fused"])
def test_a_head_stays_personal_whatever_the_tier_stores(tier):
    task = Classes(mlp(12, 8, 5))
    data = task.data(None)
    shares = Shares.of(np.array_split(np.arange(100), PEERS))
    everyone = Matrix.of(np.full((PEERS, PEERS), 1 / PEERS))
    experiment = Experiment(
        task=task, pool=data.train, test=data.test, sampler=Uniform(shares, 4, 0), peers=PEERS, local_steps=3,
        exchange=Mixing(Fixed((everyone,))), algorithm=PartialSharing(KGradientTracking(), ("2",)),
        initial=torch.from_numpy(flatten(task.model())), lr=lambda _: 0.1, rounds=5, evaluated=lambda _: False,
        tier=tier,
    )  # fmt: skip
    run = Engine(experiment)
    assert [block.name for block in run.space.blocks] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for _ in range(5):
        run.step()
    rows, head = run.space.rows(run.state["x"]), 8 * 5 + 5
    assert torch.equal(rows[1:, :-head], rows[:1, :-head].expand(PEERS - 1, -1))
    assert all((rows[i, -head:] - rows[j, -head:]).abs().max() > 1e-3 for i in range(PEERS) for j in range(i))
