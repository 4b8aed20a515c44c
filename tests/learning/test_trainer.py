from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.learning.baselines import Training, alone, central
from p2pfl.learning.task import Data, Examples, Task, load_task, read_data
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import assign, flatten, initial


class Small(Task):
    """Ten features, three classes; each behaviour below overrides what it needs."""

    lr = 0.1
    momentum = 0.0

    def model(self):
        return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))

    def data(self, settings):
        return DATA

    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)


def make_data(n=50):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(n, 10, generator=generator)
    examples = Examples(inputs, inputs[:, :3].argmax(1))
    return Data(examples, Examples(inputs[:20], examples.targets[:20]))


DATA = make_data()


def trainer(task, **changes):
    arguments = {"local_steps": 3, "batch_size": 8, "clip_norm": 0.0, "seed": 1} | changes
    return Trainer(task, changes.pop("data", DATA), **{k: v for k, v in arguments.items() if k != "data"})


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_a_plain_loop(momentum):
    """Whole batches make the order irrelevant up to rounding; momentum must live on over the rounds."""
    task = Small()
    task.momentum = momentum
    ours = trainer(task, batch_size=50, local_steps=2)
    vector = initial(task, 0)
    model = task.model()
    assign(model, vector)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    for number in range(4):
        trained = ours.train(vector, number)
        losses = []
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(DATA.train.inputs), DATA.train.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        np.testing.assert_allclose(trained.vector, flatten(model), atol=1e-6)
        assert trained.loss == pytest.approx(np.mean(losses), abs=1e-6)
        assert trained.norm == pytest.approx(np.linalg.norm(trained.vector - vector), rel=1e-5)
        vector = trained.vector


def test_an_epoch_sees_every_example_once():
    seen = []

    class Watching(Small):
        def loss(self, outputs, targets):
            seen.extend(targets.tolist())
            return super().loss(outputs, targets)

    data = Data(Examples(torch.randn(30, 10), torch.arange(30) % 3), DATA.test)
    watched = Watching()
    data = Data(Examples(data.train.inputs, torch.arange(30)), DATA.test)
    watched.model = lambda: nn.Linear(10, 30)
    two = trainer(watched, data=data, batch_size=12, local_steps=5)
    two.train(initial(watched, 0), 0)
    assert len(seen) == 60
    assert sorted(seen[:30]) == sorted(seen[30:]) == list(range(30))
    assert seen[:30] != seen[30:]


def test_a_batch_is_never_larger_than_the_data():
    assert np.isfinite(trainer(Small(), data=make_data(5), batch_size=64).train(initial(Small(), 0), 0).loss)


def test_it_repeats_itself_with_dropout_and_leaves_the_global_generator():
    class Dropping(Small):
        def model(self):
            return nn.Sequential(nn.Linear(10, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def run(seed):
        one, vector = trainer(Dropping(), seed=seed), initial(Dropping(), 0)
        for number in range(3):
            vector = one.train(vector, number).vector
        return vector

    torch.manual_seed(1)
    first = run(1)
    torch.manual_seed(2)
    np.testing.assert_array_equal(run(1), first)
    assert not np.array_equal(run(2), first)
    one, vector = trainer(Dropping()), initial(Dropping(), 0)
    state = torch.get_rng_state()
    one.train(vector, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_vector_given_is_neither_changed_nor_kept():
    one = trainer(Small())
    vector = initial(Small(), 0)
    vector.flags.writeable = False
    trained = one.train(vector, 0)
    kept = trained.vector.copy()
    one.train(vector, 1)
    np.testing.assert_array_equal(trained.vector, kept)
    assert trained.vector.flags.writeable


def test_clipping_scales_the_update_and_nothing_else():
    vector = initial(Small(), 0)
    free = trainer(Small()).train(vector, 0)
    bound = free.norm / 4
    clipped = trainer(Small(), clip_norm=bound).train(vector, 0)
    assert clipped.clipped
    assert not free.clipped
    assert clipped.norm == free.norm
    np.testing.assert_allclose(clipped.vector - vector, (free.vector - vector) / 4, atol=1e-6)
    assert np.linalg.norm(clipped.vector - vector) == pytest.approx(bound, rel=1e-4)
    loose = trainer(Small(), clip_norm=free.norm * 2).train(vector, 0)
    assert not loose.clipped
    np.testing.assert_array_equal(loose.vector, free.vector)


def test_divergence_is_one_line_and_leaves_a_trainer_that_works():
    task = Small()
    task.momentum = 0.9
    one = trainer(task)
    start = initial(task, 0)
    with pytest.raises(RoundFailed, match="training diverged in round 7: the loss is nan; lower the learning rate"):
        one.train(np.full_like(start, np.nan), 7)
    assert np.isfinite(one.train(start, 8).vector).all()
    task.lr = 1e38
    with pytest.raises(RoundFailed, match=r"training diverged in round 9: the (loss|model) is (nan|inf)"):
        trainer(task).train(start, 9)
    task.lr = 0.1
    assert np.isfinite(one.train(start, 10).vector).all()


def test_an_optimizer_must_be_one():
    task = Small()
    task.optimizer = lambda parameters: None
    with pytest.raises(InvalidConfig, match=r"Small\.optimizer returned NoneType"):
        trainer(task)


def test_a_model_that_breaks_in_the_last_step_is_caught():
    task = Small()
    task.lr = float("inf")
    with pytest.raises(RoundFailed, match="round 2: the model is inf"):
        trainer(task, local_steps=1).train(initial(task, 0), 2)


def test_what_the_task_raises_in_a_round_says_where(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from p2pfl.learning.tasks.digits import Digits\n"
        "class Bad(Digits):\n"
        "    def loss(self, outputs, targets):\n"
        "        return outputs[:, 11].mean()\n"
        "class Wide(Digits):\n"
        "    def model(self):\n"
        "        return torch.nn.Linear(65, 10)\n"
        "class Each(Digits):\n"
        "    def loss(self, outputs, targets):\n"
        "        return outputs[:, 0]\n"
        "class Blind(Digits):\n"
        "    def metrics(self, outputs, targets):\n"
        "        return {'x': 1 / 0}\n"
        "class Stuck(Digits):\n"
        "    def optimizer(self, parameters):\n"
        "        return torch.optim.SGD(list(parameters), lr=-1)\n"
    )

    def make(name):
        task = load_task(f"mine.py:{name}", tmp_path).task
        return initial(task, 0), trainer(task, data=read_data(task, {}))

    vector, one = make("Bad")
    with pytest.raises(RoundFailed, match=r"^round 3: mine\.py:5: Bad\.loss raised IndexError: .*; correct") as caught:
        one.train(vector, 3)
    assert isinstance(caught.value.__cause__, IndexError)
    vector, one = make("Wide")
    with pytest.raises(RoundFailed, match=r"^round 0: mine\.py: Wide\.model raised RuntimeError: mat1 and mat2"):
        one.train(vector, 0)
    vector, one = make("Each")
    with pytest.raises(RoundFailed, match=r"Each\.loss raised"):
        one.train(vector, 0)
    vector, one = make("Blind")
    with pytest.raises(RoundFailed, match=r"^mine\.py:14: Blind\.metrics raised ZeroDivisionError"):
        one.evaluate(vector)
    with pytest.raises(InvalidConfig, match=r"^mine\.py:17: Stuck\.optimizer raised ValueError: Invalid learning rate"):
        make("Stuck")


@pytest.mark.parametrize("change", [{"local_steps": 0}, {"batch_size": 0}, {"seed": -1}, {"clip_norm": -1.0},
                                    {"clip_norm": float("nan")}])  # fmt: skip
def test_numbers_out_of_range_are_refused(change):
    with pytest.raises(InvalidConfig, match=next(iter(change))):
        trainer(Small(), **change)


def test_a_frozen_model_cannot_be_trained():
    class Frozen(Small):
        def model(self):
            return super().model().requires_grad_(False)

    with pytest.raises(InvalidConfig, match=r"Frozen\.model has no parameters that require a gradient"):
        trainer(Frozen())


def test_evaluating_changes_nothing_and_drops_nothing_out():
    class Normed(Small):
        def model(self):
            return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    one, vector = trainer(Normed()), initial(Normed(), 0)
    first = one.evaluate(vector)
    assert first == one.evaluate(vector)
    assert set(first) == {"loss", "accuracy"}
    np.testing.assert_array_equal(flatten(one.model), vector)
    trained = one.train(vector, 0).vector
    assert one.size == len(trained)
    assert not np.array_equal(trained, vector)


def test_baselines_start_and_step_alike():
    task, vector = Small(), initial(Small(), 0)
    settings = Training(local_steps=2, batch_size=10, seed=4)
    measured = alone(task, DATA, vector, 30, settings)
    assert len(measured) == 30
    assert measured[-1]["accuracy"] > measured[0]["accuracy"]
    assert measured == alone(task, DATA, vector, 30, settings)
    assert central(task, [DATA], vector, 30, settings) == measured


def test_central_training_sees_all_peers_examples():
    task = load_task("digits", Path()).task
    shares = [
        read_data(task, {"peers": 4, "index": i, "partition": "dirichlet", "alpha": 0.5}) for i in range(4)
    ]  # fmt: skip
    start, settings = initial(task, 0), Training(local_steps=2, batch_size=32)
    pooled = central(task, shares, start, 25, settings)[-1]["accuracy"]
    assert pooled > max(alone(task, s, start, 25, settings)[-1]["accuracy"] for s in shares) + 0.1
    with pytest.raises(InvalidConfig, match="one peer at least"):
        central(task, [], start, 1, settings)


def test_central_training_is_measured_on_all_held_out_examples():
    sizes = []

    class Counting(Small):
        def metrics(self, outputs, targets):
            sizes.append(len(targets))
            return {}

    other = Data(DATA.train, Examples(DATA.test.inputs + 1, DATA.test.targets))
    central(Counting(), [DATA, other], initial(Small(), 0), 1, Training(1, 8))
    central(Counting(), [DATA, DATA], initial(Small(), 0), 1, Training(1, 8))
    assert sizes == [40, 20]
