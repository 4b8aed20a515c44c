"""A trainer that goes on where another left off, in another process too; and one whose time is up."""

import math
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import Data, Examples, Task
from p2pfl.learning.trainer import Trainer, _decode, _encode
from p2pfl.learning.vector import initial

ROUNDS = 3


class Dropping(Task):
    """Dropout, and a batch norm whose average counts batches in a whole number that is in no vector."""

    def __init__(self, optimizer="adam"):
        self.make = OPTIMIZERS[optimizer]

    def model(self):
        return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8, momentum=None), nn.Dropout(0.5), nn.Linear(8, 3))

    def data(self, settings):
        return make_data()

    def optimizer(self, parameters):
        return self.make(parameters)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW([{"params": [q], "lr": 0.01 / (i + 1)} for i, q in enumerate(p)]),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
}


def make_data(n=50):
    inputs = torch.randn(n, 10, generator=torch.Generator().manual_seed(5))
    examples = Examples(inputs, inputs[:, :3].argmax(1))
    return Data(examples, Examples(inputs[:20], examples.targets[:20]))


def trainer(task=None, data=None, **changes):
    arguments = {"local_steps": 4, "batch_size": 8, "clip_norm": 0.0, "seed": 1} | changes
    return Trainer(task or Dropping(), data or make_data(), **arguments)


def rounds(one, vector, numbers):
    for number in numbers:
        vector = one.train(vector, number).vector
    return vector


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_restored_goes_on_bit_for_bit(optimizer):
    task = Dropping(optimizer)
    start = initial(task, 0)
    whole = trainer(task)
    expected = rounds(whole, start, range(2 * ROUNDS))
    first = trainer(task)
    halfway = rounds(first, start, range(ROUNDS))
    state = first.state()
    second = trainer(task)
    assert second.restore(state) == []
    assert second.state() == state
    torch.rand(3)  # what others draw from the global generator makes no difference
    np.testing.assert_array_equal(rounds(second, halfway, range(ROUNDS, 2 * ROUNDS)), expected)
    assert second.state() == whole.state()


def test_each_part_of_the_state_is_needed():
    """Else the test above would prove nothing about it."""
    start = initial(Dropping(), 0)
    first = trainer()
    halfway = rounds(first, start, range(ROUNDS))
    state = _decode(first.state())
    expected = rounds(first, halfway, range(ROUNDS, 2 * ROUNDS))
    fresh = _decode(trainer().state())
    for part in ("state", "held", "order", "generator"):
        other = trainer()
        other.restore(_encode({**state, part: fresh[part]}, ""))
        assert not np.array_equal(rounds(other, halfway, range(ROUNDS, 2 * ROUNDS)), expected), part


CHILD = """
import sys
import numpy as np
from pathlib import Path
from tests.learning.test_trainer_state import Dropping, ROUNDS, rounds, trainer
folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    one = trainer(Dropping(name))
    one.restore((folder / f"{name}.state").read_bytes())
    halfway = np.load(folder / f"{name}.npy")
    np.save(folder / f"{name}.npy", rounds(one, halfway, range(ROUNDS, 2 * ROUNDS)))
"""


@pytest.mark.slow
def test_a_new_process_goes_on_bit_for_bit(tmp_path):
    expected = {}
    for name in ("sgd", "adam"):
        start = initial(Dropping(name), 0)
        expected[name] = rounds(trainer(Dropping(name)), start, range(2 * ROUNDS))
        first = trainer(Dropping(name))
        np.save(tmp_path / f"{name}.npy", rounds(first, start, range(ROUNDS)))
        (tmp_path / f"{name}.state").write_bytes(first.state())
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), *expected], check=True, cwd=root)
    for name, vector in expected.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), vector)


def test_a_state_is_a_copy():
    one = trainer()
    vector = rounds(one, initial(Dropping(), 0), range(1))
    state = one.state()
    kept = bytes(bytearray(state))
    rounds(one, vector, range(1, 3))
    assert state == kept


def test_other_data_begins_a_new_epoch_and_says_so():
    one = trainer()
    vector = rounds(one, initial(Dropping(), 0), range(2))
    other = trainer(data=make_data(30))
    told = other.restore(one.state())
    assert told == ["there are 30 training examples now, and were 50: a new epoch begins"]
    assert np.isfinite(rounds(other, vector, range(2, 4))).all()


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    one = trainer()
    vector = rounds(one, initial(Dropping(), 0), range(2))
    state, before = trainer(Dropping("sgd")).state(), one.state()
    with pytest.raises(InvalidConfig, match="of another optimizer or model; was the task changed"):
        one.restore(state)
    values = _decode(before)
    damaged = {
        "of format 2": {"format": 2},
        "other tensors": {"held": {}},
        "order of the examples is none": {"order": torch.tensor([50])},
        "not the state of a trainer": {"order": torch.tensor([0.5])},
        "RNG|generator": {"generator": torch.zeros(3, dtype=torch.uint8)},
        "parameter group": {"state": {"state": {}, "param_groups": []}},
        "'param_groups'": {"state": {}},
    }
    for reason, change in damaged.items():
        with pytest.raises(InvalidConfig, match=reason):
            one.restore(_encode({**values, **change}, ""))
    for size in (0, 3, 4, 100, len(before) - 1):
        with pytest.raises(InvalidConfig, match="not the state of a trainer for this task"):
            one.restore(before[:size])
    with pytest.raises(InvalidConfig, match="1 bytes too many"):
        one.restore(before + b"\0")
    assert one.state() == before
    np.testing.assert_array_equal(
        one.train(vector, 2).vector, rounds(trainer(), initial(Dropping(), 0), range(3))
    )  # fmt: skip


def test_every_kind_of_value_comes_back_as_it_was():
    values = {
        "numbers": [0, -1, 2**80, 0.1, -0.0, math.inf, 1e-320],
        "words": {"none": None, "yes": True, "text": "Schlüssel", 7: ("a", ["b"], ()), "empty": {}},
        "odd": OrderedDict(a=1),
        "tensors": [torch.zeros(0, 3), torch.tensor(1.5), torch.arange(6).reshape(2, 3).T, torch.tensor([True])],
        "half": torch.tensor([1.25, -2.5], dtype=torch.bfloat16),
        "gradient": nn.Parameter(torch.ones(2)),
    }
    found = _decode(_encode(values, ""))
    assert found["numbers"] == values["numbers"]
    assert math.copysign(1, found["numbers"][4]) == -1
    assert found["words"] == values["words"]
    assert found["odd"] == {"a": 1}
    for given, restored in zip([*values["tensors"], values["half"]], [*found["tensors"], found["half"]], strict=True):
        assert given.dtype == restored.dtype
        assert given.shape == restored.shape
        assert torch.equal(given, restored)
    assert torch.equal(found["gradient"], torch.ones(2))
    assert math.isnan(_decode(_encode({"nan": math.nan}, ""))["nan"])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.float32(1), r"\['state'\]\[0\]\['mine'\] is float32"),
        ({1.5: 0}, r"\['mine'\] has a key of type float"),
        (torch.eye(2).to_sparse(), r"\['mine'\] is a tensor of torch.float32, torch.sparse_coo"),
        (torch.zeros(1, dtype=torch.complex64), r"\['mine'\] is a tensor of torch.complex64"),
        (torch.return_types.max((1, 2)), r"\['mine'\] is max"),
        ([print], r"\['mine'\]\[0\] is builtin_function_or_method"),
    ],
)
def test_an_optimizer_with_other_state_is_told_what_to_use(value, told):
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                self.state[group["params"][0]]["mine"] = value

    task = Dropping()
    task.make = lambda p: Mine(p, lr=0.1)
    one = trainer(task)
    rounds(one, initial(task, 0), range(1))
    with pytest.raises(InvalidConfig, match=r"^Dropping\.optimizer: its state\['state'\].*" + told + ".*; use "):
        one.state()


class Clock:
    """Moves by so many seconds with each optimiser step."""

    def __init__(self, step):
        self.now, self.step = 1000.0, step

    def __call__(self):
        return self.now

    def optimizer(self, parameters):
        clock = self

        class Timed(torch.optim.SGD):
            def step(self, closure=None):
                clock.now += clock.step
                return super().step(closure)

        return Timed(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(math.inf, 6), (100, 6), (60, 6), (59.9, 6), (50, 5), (45, 5), (10.1, 2), (10, 1), (1, 1), (0, 1), (-5, 1)],
)  # fmt: skip
def test_no_step_begins_after_the_time_and_one_always_does(seconds, steps):
    clock = Clock(10.0)
    task = Dropping()
    task.make = clock.optimizer
    start = initial(task, 0)
    trained = trainer(task, local_steps=6, clock=clock).train(start, 0, seconds)
    assert trained.steps == steps
    assert clock.now == 1000 + 10 * steps
    same = trainer(task, local_steps=steps).train(start, 0)
    assert same.steps == steps
    np.testing.assert_array_equal(trained.vector, same.vector)
    assert trained.loss == same.loss
    clipped = trainer(task, local_steps=6, clock=clock, clip_norm=same.norm / 2).train(start, 0, seconds)
    assert clipped.clipped
    assert clipped.steps == steps
    assert np.linalg.norm(clipped.vector - start) == pytest.approx(same.norm / 2, rel=1e-4)


def test_the_time_must_be_a_number():
    with pytest.raises(InvalidConfig, match="round 4: nan seconds to train"):
        trainer().train(initial(Dropping(), 0), 4, math.nan)


def test_rounds_cut_short_go_on_bit_for_bit_too():
    """The order stands where the last step left it, not where the whole round would have."""
    clock = Clock(1.0)
    task = Dropping()
    task.make = clock.optimizer
    start = initial(task, 0)
    one = trainer(task, clock=clock)
    vector = one.train(start, 0, 3).vector
    other = trainer(task, clock=clock)
    other.restore(one.state())
    np.testing.assert_array_equal(one.train(vector, 1, 2).vector, other.train(vector, 1, 2).vector)
