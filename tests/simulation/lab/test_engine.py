"""Experiments of the dense engine: facts of convergence, and that a run is a pure function of its settings."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.evaluation import forward
from p2pfl.learning.partition import dirichlet
from p2pfl.learning.space import Request
from p2pfl.learning.task import Examples, make_model
from p2pfl.learning.tasks.digits import Digits
from p2pfl.learning.vector import assign, initial
from p2pfl.simulation.dense import mix
from p2pfl.simulation.dense.engine import Engine, Experiment, Mixing, run
from p2pfl.simulation.dense.kernels import TIERS, base
from p2pfl.simulation.dense.sampling import Shares, Uniform, Whole, derived
from p2pfl.simulation.dense.threads import share
from p2pfl.simulation.dense.variants import Each, SideBySide
from tests.simulation.lab.stand_ins import Dpsgd, Fixed, Matrix, Quadratic, ring

N = 10


@dataclass(frozen=True)
class Heavy:
    """Local steps with momentum, which is mixed too; and a number that counts the rounds a peer was there."""

    def init(self, x, space):
        return {"x": x, "m": torch.zeros_like(x), "rounds": torch.zeros(space.n)}

    def propose(self, state, local, space):
        steps = local.steps(state["x"], momentum=state["m"], beta=0.9, out=state["x"])
        return state | {"m": steps.momentum, "rounds": state["rounds"] + 1}, Request((steps.x, steps.momentum))

    def apply(self, state, reply, local, space):
        return state | {"x": reply.vectors[0], "m": reply.vectors[1]}


def digits(peers=N, seed=0, algorithm=None, **changes):
    task = Digits()
    data = task.data({})
    shares = Shares.of(dirichlet(data.train.targets.numpy(), peers, 0.5, 0))
    settings = {
        "task": task, "pool": data.train, "test": data.test, "sampler": Uniform(shares, 16, seed),
        "exchange": Mixing(Fixed((ring(peers),))), "algorithm": algorithm or Dpsgd(),
        "initial": torch.from_numpy(initial(task, seed)), "peers": peers, "local_steps": 2, "lr": lambda _: 0.5,
        "rounds": 4, "seed": seed, "evaluated": lambda round: round == 3, "sampled": 3,
    }  # fmt: skip
    return Experiment(**settings | changes)


def final(experiment):
    engine = Engine(experiment)
    while engine.round < experiment.rounds:
        engine.step()
    return engine.space.rows(engine.state["x"])


def quadratics(targets, schedule, lr, rounds, steps=1):
    """Peer i has f_i(x) = |x - b_i|^2 / 2, in float64."""
    n, size = targets.shape
    pool = Examples(torch.zeros(n, 1, dtype=torch.float64), targets)
    return Experiment(
        Quadratic(size), pool, pool, Whole(Shares.of([np.array([i]) for i in range(n)])), Mixing(schedule), Dpsgd(),
        torch.zeros(size, dtype=torch.float64), n, steps, lambda _: lr, rounds, evaluated=lambda _: False,
    )  # fmt: skip


@pytest.mark.parametrize("lr", [0.1, 0.5])
def test_dpsgd_on_quadratics_has_its_fixed_point(lr):
    """x' = W (x - g (x - b)) ends in [I - (1 - g) W]^-1 g W B: biased for each peer, exact in the mean."""
    n = 8
    targets = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = final(quadratics(targets, Fixed((ring(n),)), lr, 600))
    w = torch.from_numpy(ring(n).dense)
    wanted = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - (1 - lr) * w, lr * w @ targets)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.mean(0), targets.mean(0), rtol=1e-12, atol=1e-12)
    assert float((found - targets.mean(0)).abs().max()) > 0.01


def test_local_steps_on_quadratics_shrink_the_distance():
    targets = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = final(quadratics(targets, Fixed((Matrix.of(np.eye(4)),)), 0.1, 1, steps=5))
    torch.testing.assert_close(found, targets * (1 - 0.9**5), rtol=1e-12, atol=1e-12)


def test_equal_seeds_give_equal_bits():
    assert torch.equal(final(digits()), final(digits()))
    assert not torch.equal(final(digits()), final(digits(seed=1)))


@pytest.mark.parametrize("algorithm", [Dpsgd(), Heavy()], ids=["plain", "momentum"])
def test_the_tiers_agree(algorithm):
    found = [final(digits(tier=tier, algorithm=algorithm)) for tier in TIERS]
    for other in found[:-1]:
        torch.testing.assert_close(other, found[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tier", ["fused", "stacked"])
@pytest.mark.parametrize("algorithm", [Dpsgd(), Heavy()], ids=["plain", "momentum"])
def test_the_bits_do_not_depend_on_threads(tier, algorithm, monkeypatch):
    monkeypatch.setattr(base, "LEAST", 1)
    monkeypatch.setattr(mix, "SMALL", 0)
    monkeypatch.setattr(mix, "RANGE", 1)
    experiment = digits(40, tier=tier, algorithm=algorithm)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append(final(experiment))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_what_goes_wrong_in_a_thread_is_raised():
    def work(worker, part):
        raise ValueError(part)

    with pytest.raises(ValueError, match="1"):
        share([1, 1, 1], work, 2)


def test_a_run_goes_on_from_its_state():
    experiment = digits(algorithm=Heavy())
    first = Engine(experiment)
    first.step()
    first.step()
    kept = {name: tensor.clone() for name, tensor in first.state.items()}
    second = Engine(experiment, kept, first.round)
    second.step()
    second.step()
    assert torch.equal(second.space.rows(second.state["x"]), final(experiment))


def test_memory_is_used_again_where_nobody_needs_it():
    class Keeper(Dpsgd):
        """Keeps what it sent, as algorithms with a memory do."""

        def init(self, x, space):
            return {"x": x, "sent": x.clone()}

        def propose(self, state, local, space):
            moved = local.steps(state["x"]).x
            return state | {"sent": moved}, Request((moved,))

        def apply(self, state, reply, local, space):
            return state | {"x": reply.vectors[0]}

    keeper = Engine(digits(algorithm=Keeper()))
    for _ in range(3):
        keeper.step()
        sent = keeper.space.rows(keeper.state["sent"])
        mixed = torch.from_numpy(ring(N).dense).float() @ sent
        torch.testing.assert_close(keeper.space.rows(keeper.state["x"]), mixed, rtol=1e-5, atol=1e-6)
    plain = Engine(digits())
    places = set()
    for _ in range(4):
        plain.step()
        places.add(plain.state["x"].data_ptr())
    assert len(places) == 2
    assert torch.equal(keeper.space.rows(keeper.state["x"]), final(digits(rounds=3)))


def test_all_rounds_are_run_and_told():
    metrics = list(run(digits()))
    assert [each.round for each in metrics] == [0, 1, 2, 3]
    assert [len(each.evaluations) for each in metrics] == [0, 0, 0, 1]
    assert all(each.loss.shape == (N,) for each in metrics)
    assert float(metrics[-1].loss.mean()) < float(metrics[0].loss.mean())


def test_an_evaluation_is_that_of_the_models():
    experiment = digits()
    engine = Engine(experiment)
    for _ in range(3):
        engine.step()
    rows = engine.space.rows(engine.state["x"])
    (found,) = engine.evaluate()
    task, test = experiment.task, experiment.test
    model = make_model(task)
    assign(model, rows.mean(0).numpy())
    outputs = forward(model, test.inputs)
    assert found.mean["accuracy"] == pytest.approx(task.metrics(outputs, test.targets)["accuracy"], abs=1e-3)
    assert found.mean["loss"] == pytest.approx(float(task.loss(outputs, test.targets)), rel=1e-4)
    assert found.consensus == pytest.approx(float((rows - rows.mean(0)).square().sum(1).mean()), rel=1e-4)
    assert found.peers["accuracy"].shape == (3,)
    every = Engine(replace(experiment, sampled=N), engine.state, 3).evaluate()[0].peers["accuracy"]
    for row, accuracy in zip(rows, every, strict=True):
        assign(model, row.numpy())
        wanted = task.metrics(forward(model, test.inputs), test.targets)["accuracy"]
        assert float(accuracy) == pytest.approx(wanted, abs=1e-3)


def test_who_does_not_take_part_stays_as_it_is():
    away = torch.arange(N) == 4
    dense = ring(N).dense
    dense[4], dense[:, 4] = 0, 0
    dense[4, 4] = 1
    experiment = digits(
        algorithm=Heavy(),
        exchange=Mixing(Fixed((Matrix.of(dense),))),
        working=lambda _: ~away,
        evaluated=lambda _: False,
    )
    engine = Engine(experiment)
    start = {name: tensor.clone() for name, tensor in engine.state.items()}
    metrics = engine.step()
    space = engine.space
    for name in ("x", "m"):
        assert torch.equal(space.rows(engine.state[name])[4], space.rows(start[name])[4])
        assert not torch.equal(space.rows(engine.state[name])[3], space.rows(start[name])[3])
    assert engine.state["rounds"].tolist() == (~away).float().tolist()
    assert torch.equal(torch.isnan(metrics.loss), away)


def test_seeds_side_by_side_are_the_runs_one_by_one():
    parts = [digits(seed=seed) for seed in (0, 1)]
    together = replace(
        parts[0],
        sampler=Each([part.sampler for part in parts]),
        exchange=Mixing(SideBySide([Fixed((ring(N),))] * 2)),
        initial=torch.cat([part.initial.expand(N, -1) for part in parts]),
        peers=2 * N,
        variants=2,
    )
    assert torch.equal(final(together), torch.cat([final(part) for part in parts]))
    last = list(run(together))[-1]
    for found, part in zip(last.evaluations, parts, strict=True):
        alone = list(run(part))[-1].evaluations[0]
        assert found.mean == alone.mean
        assert found.consensus == alone.consensus


def test_more_peers_leave_a_peer_its_minibatches():
    order = np.arange(60)
    some, more = Shares.of(np.split(order, 3)), Shares.of(np.split(np.arange(100), 5))
    few, many = Uniform(some, 4, 7).draw(2, 0, 3), Uniform(more, 4, 7).draw(2, 0, 3)
    assert few.shape == (3, 3, 4)
    assert torch.equal(many[:3], few)


def test_minibatches_are_drawn_uniformly_from_the_own_share():
    parts = [np.array([5]), np.arange(10, 13), np.arange(20, 60)]
    drawn = Uniform(Shares.of(parts), 600, 1).draw(0, 0, 4)
    for part, own in zip(parts, drawn, strict=True):
        counts = np.bincount(own.flatten().numpy(), minlength=60)
        assert counts.sum() == counts[part].sum() == 2400
        expected = 2400 / len(part)
        assert (np.abs(counts[part] - expected) <= 5 * np.sqrt(expected)).all()


def test_every_round_and_step_draws_anew():
    sampler = Uniform(Shares.of([np.arange(1000)]), 8, 1)
    draws = [
        sampler.draw(0, 0, 2),
        sampler.draw(0, 2, 2),
        sampler.draw(1, 0, 2),
        replace(sampler, seed=2).draw(0, 0, 2),
    ]
    assert torch.equal(draws[0], sampler.draw(0, 0, 2))
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert derived(1, "a", 2) != derived(1, "b", 2)


def test_whole_shares_need_equal_ones():
    whole = Whole(Shares.of([np.array([3, 1]), np.array([0, 2])]))
    assert whole.draw(5, 0, 2).tolist() == [[[3, 1], [3, 1]], [[0, 2], [0, 2]]]
    with pytest.raises(InvalidConfig, match="equally many"):
        Whole(Shares.of([np.array([3, 1]), np.array([0])]))
    with pytest.raises(InvalidConfig, match="peer 1"):
        Shares.of([np.array([3]), np.array([], np.int64)])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"variants": 3}, "variants"),
        ({"local_steps": 0}, "local_steps"),
        ({"initial": torch.zeros(7)}, "initial"),
        ({"tier": "magic"}, "tier"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, complaint):
    with pytest.raises(InvalidConfig, match=complaint):
        Engine(digits(**changes))
