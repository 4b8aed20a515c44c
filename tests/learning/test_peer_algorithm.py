"""One peer's part in an algorithm: what it sends, what it makes of what comes, and what it has after a restart."""

import numpy as np
import pytest
import torch
from torch import nn

from p2pfl.core.charter import AveragingTerms, TrainingTerms
from p2pfl.core.errors import InvalidConfig, OutOfTurn
from p2pfl.learning.chartered import algorithm_of, make_trainer
from p2pfl.learning.peer_algorithm import AlgorithmTrainer
from p2pfl.learning.task import Data, Examples, Task
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import initial

AVERAGING = AveragingTerms(masks="off")
SIZE = 10 * 8 + 8 + 8 * 3 + 3
SHARED = 10 * 8 + 8


class Small(Task):
    def __init__(self, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)):
        self.make = optimizer

    def model(self):
        return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))

    def data(self, settings):
        raise NotImplementedError

    def optimizer(self, parameters):
        return self.make(parameters)


class Normed(Small):
    def model(self):
        return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def make_data(seed=5, n=40):
    inputs = torch.randn(n, 10, generator=torch.Generator().manual_seed(seed))
    examples = Examples(inputs, (inputs[:, :3] + 0.1 * seed * inputs[:, 3:6]).argmax(1))
    return Data(examples, Examples(inputs[:20], examples.targets[:20]))


def terms(algorithm, **changes):
    options = changes.pop("options", {})
    steps = 1 if algorithm == "gradient-tracking" or options.get("inner") == "gradient-tracking" else 3
    values = {"local_steps": steps, "batch_size": 8} | changes
    return TrainingTerms(algorithm=algorithm, options=options or None, **values)


def trainer(algorithm, task=None, seed=1, data=5, **changes):
    return make_trainer(task or Small(), make_data(data), terms(algorithm, **changes), AVERAGING, seed)


ALL = [
    ("local-sgd", {}),
    ("local-sgd", {"beta": 0.9}),
    ("local-sgd", {"beta": 0.9, "restart": True, "nesterov": True}),
    ("fedprox", {"mu": 0.1}),
    ("qg-dsgdm", {}),
    ("diloco", {}),
    ("gradient-tracking", {}),
    ("gradient-tracking", {"step_first": False}),
    ("k-gt", {}),
    ("partial-sharing", {"personal": ("2",)}),
    ("partial-sharing", {"personal": ("2",), "inner": "k-gt"}),
]


def mixing(vector, number):
    """Return what stands for a mean with others, and whether it does; sometimes this peer is left alone, or behind."""
    if number % 5 == 3:
        return vector, False
    if number % 5 == 4:
        return vector * np.float32(0.5), False
    return vector * np.float32(0.9) + np.float32(0.001), True


def rounds(one, vector, mixed, numbers):
    sent = []
    for number in numbers:
        sent.append(one.train(vector, number, mixed=mixed).vector)
        vector, mixed = mixing(sent[-1], number)
    return sent, vector, mixed


@pytest.mark.parametrize(("algorithm", "options"), ALL)
@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_trainer_goes_on_where_another_left_off_bit_for_bit(algorithm, options, at):
    start = initial(Small(), 0)
    one, other = (trainer(algorithm, options=options) for _ in range(2))
    begun = one.begin(start)
    _, vector, mixed = rounds(one, begun, False, range(at))
    other.begin(start)
    assert other.restore(one.state()) == []
    np.testing.assert_array_equal(other.model_after(vector, mixed), one.model_after(vector, mixed))
    expected, *_ = rounds(one, vector, mixed, range(at, 8))
    found, *_ = rounds(other, vector, mixed, range(at, 8))
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_local_sgd_without_options_is_d_psgd(optimizer):
    task, start = Small(lambda p: optimizer(p, lr=0.05)), initial(Small(), 0)
    plain, own = trainer("d-psgd", task), trainer("local-sgd", task)
    assert type(plain) is Trainer
    assert isinstance(own, AlgorithmTrainer)
    expected, *_ = rounds(plain, start, False, range(3))
    found, *_ = rounds(own, own.begin(start), False, range(3))
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))


def test_steps_steered_by_a_momentum_are_those_of_torchs_own():
    theirs = trainer("d-psgd", Small(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)))
    ours = trainer("local-sgd", options={"beta": 0.9, "nesterov": True})
    start = initial(Small(), 0)
    np.testing.assert_allclose(
        np.stack(rounds(ours, ours.begin(start), False, range(3))[0]),
        np.stack(rounds(theirs, start, False, range(3))[0]),
        atol=1e-6,
    )


@pytest.mark.parametrize("algorithm", ["k-gt", "gradient-tracking"])
def test_what_corrections_keep_is_kept_whoever_misses_rounds(algorithm):
    """The sum of the corrections is 0, or that of y is the sum of the gradients, by the last exchange of each."""
    peers = [trainer(algorithm, seed=seed, data=seed) for seed in range(4)]
    start = initial(Small(), 0)
    vectors, mixed = [one.begin(start) for one in peers], [False] * 4
    for number in range(12):
        sent = [one.train(vectors[i], number, mixed=mixed[i]).vector for i, one in enumerate(peers)]
        here = [i for i in range(4) if (number + i) % 4 or number < 2]
        mean = np.mean([sent[i] for i in here], axis=0, dtype=np.float64).astype(np.float32)
        mixed = [i in here for i in range(4)]
        # Whoever missed it goes on from the others' mean, and its own update; the rest of the vector means nothing.
        vectors = [mean if i in here else np.concatenate([(mean + sent[i])[:SIZE] / 2, mean[SIZE:]]) for i in range(4)]
    after = [one._after(vectors[i], mixed[i]) for i, one in enumerate(peers)]
    if algorithm == "k-gt":
        kept = sum(state["correction"] for state in after)
        largest = max(float(state["correction"].abs().max()) for state in after)
    else:
        kept = sum(state["y"] - state["gradient"] for state in after)
        largest = max(float(state["y"].abs().max()) for state in after)
    assert largest > 0.01
    assert float(kept.abs().max()) < 1e-5


def test_a_missed_round_takes_the_model_from_where_the_peer_stands_and_keeps_the_momentum():
    one = trainer("qg-dsgdm")
    _, vector, mixed = rounds(one, one.begin(initial(Small(), 0)), False, range(3))
    momentum = one._after(vector, mixed)["momentum"]
    sent = one.train(vector, 3, mixed=mixed).vector
    elsewhere = sent + np.float32(1)
    np.testing.assert_array_equal(one.model_after(elsewhere, False), elsewhere)
    torch.testing.assert_close(one._after(elsewhere, False)["momentum"], momentum, rtol=0, atol=0)
    assert not torch.equal(one._after(elsewhere, True)["momentum"], momentum)


def test_heads_stay_at_home_and_take_no_place_in_what_is_sent():
    one = trainer("partial-sharing", options={"personal": ("2",)})
    start = initial(Small(), 0)
    begun = one.begin(start)
    np.testing.assert_array_equal(begun, start[:SHARED])
    trained = one.train(begun, 0)
    assert (trained.vector.shape, one.fixed) == ((SHARED,), 0)
    model = one.model_after(np.zeros(SHARED, np.float32), True)
    assert not model[:SHARED].any()
    assert model[SHARED:].any()
    assert (model[SHARED:] != start[SHARED:]).all(), "they were trained"
    assert trainer("partial-sharing", options={"personal": ("2",), "inner": "k-gt"}).begin(start).shape == (2 * SHARED,)


def test_steps_that_a_window_left_out_are_not_counted():
    ticks = iter(range(1000))
    few = trainer("qg-dsgdm", local_steps=3)
    few._clock = lambda: float(next(ticks))
    two = trainer("qg-dsgdm", local_steps=2)
    start = initial(Small(), 0)
    first = few.train(few.begin(start), 0, 1.5)
    assert first.steps == 2
    np.testing.assert_array_equal(first.vector, two.train(two.begin(start), 0).vector)
    mixed = first.vector * np.float32(0.9)
    torch.testing.assert_close(few._after(mixed, True)["momentum"], two._after(mixed, True)["momentum"], rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ["diloco", "gradient-tracking"])
def test_buffers_are_averaged_whatever_becomes_of_parameters(algorithm):
    one = trainer(algorithm, Normed())
    start = initial(Normed(), 0)
    names = [block.name for block in one._space.blocks]
    place = SHARED + 8 + 8
    assert names[4] == "1.running_mean"
    sent = one.train(one.begin(start), 0).vector
    assert sent[place : place + 8].any(), "it was measured"
    sent[place : place + 8] = 7.0
    np.testing.assert_array_equal(one.model_after(sent, True)[place : place + 8], np.full(8, 7.0))


def test_updates_are_clipped():
    start = initial(Small(), 0)
    free = trainer("local-sgd", options={"beta": 0.5})
    moved = free.train(free.begin(start), 0)
    bound = trainer("local-sgd", options={"beta": 0.5}, clip_norm=moved.norm / 2)
    trained = bound.train(bound.begin(start), 0)
    assert (trained.clipped, trained.norm) == (True, moved.norm)
    np.testing.assert_allclose(trained.vector - start, (moved.vector - start) / 2, atol=1e-6)


class Measuring(Small):
    """Agrees on something in round 0."""

    def model(self):
        model = super().model()
        model.register_buffer("scale", torch.zeros(1))
        return model

    def measure(self, model, train):
        if float(model.scale):
            return False
        model.scale.fill_(3.0)
        return True


@pytest.mark.parametrize("algorithm", ["diloco", "k-gt", "qg-dsgdm"])
def test_a_round_that_measures_makes_no_step_and_leaves_no_trace_in_momentum(algorithm):
    one = trainer(algorithm, Measuring())
    start = initial(Measuring(), 0)
    begun = one.begin(start)
    trained = one.train(begun, 0)
    assert trained.steps == 0
    changed = trained.vector != begun
    assert changed.sum() == 1
    agreed = np.where(changed, np.float32(2), begun)
    model = one.model_after(agreed, True)
    assert (2.0 in model, (model != start).sum()) == (True, 1)
    assert one.train(agreed, 1).steps == 3


def test_a_vector_of_another_size_is_refused():
    with pytest.raises(OutOfTurn, match="for k-gt"):
        trainer("k-gt").train(np.zeros(SIZE, np.float32), 0)


@pytest.mark.parametrize(
    ("training", "averaging", "reason"),
    [
        ({"algorithm": "d-psgd", "options": {"beta": 0.9}}, {}, "d-psgd has none"),
        ({"algorithm": "diloco", "options": {"mu": 0.9}}, {}, "diloco has no 'mu'; it has lr, beta"),
        ({"algorithm": "gradient-tracking", "local_steps": 2}, {}, "one step a round"),
        ({"algorithm": "gradient-tracking", "local_steps": 1}, {}, "averaging.masks: after a sum that was lost"),
        ({"algorithm": "k-gt", "clip_norm": 1.0}, {}, "training.clip_norm: k-gt mixes steps"),
        ({"algorithm": "k-gt"}, {"bits": 16}, "averaging.bits: k-gt mixes steps"),
        ({"algorithm": "partial-sharing"}, {}, "needs personal"),
        (
            {"algorithm": "partial-sharing", "options": {"personal": ("2",), "inner": "d2"}, "local_steps": 1},
            {},
            "d2 is for one mixing matrix",
        ),
        ({"algorithm": "partial-sharing", "options": {"personal": ("2",), "inner": "push-sum"}}, {}, "whole models"),
    ],
)
def test_terms_that_do_not_go_together_are_refused(training, averaging, reason):
    with pytest.raises(InvalidConfig, match=reason):
        algorithm_of(TrainingTerms(**training), AveragingTerms(**averaging))


@pytest.mark.parametrize(("algorithm", "options"), ALL[:1] + ALL[3:4] + ALL[5:6])
def test_any_optimizer_makes_the_steps_of_algorithms_that_do_not_compute_with_its_rate(algorithm, options):
    one = trainer(algorithm, Small(lambda p: torch.optim.AdamW(p, lr=0.01)), options=options)
    assert np.isfinite(rounds(one, one.begin(initial(Small(), 0)), False, range(3))[0]).all()


@pytest.mark.parametrize(("algorithm", "options"), [ALL[1], ALL[4], ALL[6], ALL[8], ALL[10]])
def test_those_that_do_need_plain_sgd(algorithm, options):
    with pytest.raises(InvalidConfig, match=r"Small.optimizer is not plain SGD"):
        trainer(algorithm, Small(lambda p: torch.optim.AdamW(p, lr=0.01)), options=options)


def test_heads_that_the_model_has_not_are_refused():
    with pytest.raises(InvalidConfig, match="no tensor 'head'"):
        trainer("partial-sharing", options={"personal": ("head",)})
