"""Local steps with noise: how much there is, that one example moves no step by more than its bound, what is refused."""

import math
import os
import sys
import time

import pytest
import torch
from torch import Tensor, nn

from p2pfl.core.charter import AveragingTerms, ExampleTerms, TrainingTerms
from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.crypto.suite import suite
from p2pfl.learning import private_trainer
from p2pfl.learning.chartered import make_trainer
from p2pfl.learning.private_trainer import Privately, PrivateTrainer
from p2pfl.learning.task import Data, Examples, Task
from p2pfl.learning.vector import Vector, flatten

pytest.importorskip("opacus", reason="noise for examples needs it: pip install 'p2pfl-mesh[opacus]'")

LITTLE = 0.01
"""The least noise that charters allow; it hides nothing."""
RATE = 0.5
SUITE = suite("aes", clock=time.perf_counter)
GENERATOR = torch.Generator().manual_seed(5)
INPUTS = torch.randn(40, 6, generator=GENERATOR)
EXAMPLES = Examples(INPUTS, INPUTS[:, :3].argmax(1))


class Linear(Task):
    """The task's optimizer is SGD at a rate of `RATE`, so that steps can be computed by hand."""

    def model(self) -> nn.Module:
        return nn.Linear(6, 3)

    def data(self, settings: object) -> Data:
        return Data(EXAMPLES, EXAMPLES)

    def optimizer(self, parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=RATE)  # type: ignore[arg-type]


def trainer(
    task: Task | None = None,
    examples: Examples = EXAMPLES,
    *,
    noise: float = LITTLE,
    clip: float = 1.0,
    samples_min: int = 1,
    **changes: int,
) -> PrivateTrainer:
    terms = ExampleTerms(noise=noise, clip=clip, epsilon=8.0, samples_min=samples_min)
    arguments = {"local_steps": 1, "batch_size": len(examples), "seed": 0} | changes
    privately = Privately(terms, SUITE, os.urandom)
    return PrivateTrainer(
        task or Linear(),
        Data(examples, examples),
        privately=privately,
        clip_norm=0.0,
        **arguments,  # type: ignore[arg-type]
    )


def step_of(one: PrivateTrainer, start: Vector | None = None) -> Tensor:
    """Return the mean gradient, with noise, that one step took."""
    start = flatten(one.model) if start is None else start
    return torch.from_numpy((start - one.train(start, 0).vector) / RATE)


def clipped_mean(one: PrivateTrainer, examples: Examples, clip: float) -> Tensor:
    """Compute by hand what `step_of` is without noise, example by example."""
    total = torch.zeros(one.size)
    for input, target in zip(examples.inputs, examples.targets, strict=True):
        one.model.zero_grad()
        Linear().loss(one.model(input[None]), target[None]).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in one.model.parameters() if p.grad is not None])
        total += gradient * min(1.0, clip / float(gradient.norm()))
    return total / len(examples.inputs)


@pytest.mark.parametrize("clip", [0.1, 0.7, 100.0])
def test_a_step_is_the_mean_of_clipped_gradients(clip: float) -> None:
    one = trainer(clip=clip)
    start = flatten(one.model)
    expected = clipped_mean(one, EXAMPLES, clip)
    noise = LITTLE * clip / len(EXAMPLES)
    assert float((step_of(one, start) - expected).abs().max()) < 6 * noise + 1e-5


def test_gradients_reach_their_own_parameters_in_whatever_order_the_optimizer_has_them() -> None:
    class Reversed(Linear):
        def optimizer(self, parameters: object) -> torch.optim.Optimizer:
            return torch.optim.SGD(reversed(list(parameters)), lr=RATE)  # type: ignore[call-overload]

    one = trainer(Reversed())
    start = flatten(one.model)
    expected = clipped_mean(one, EXAMPLES, 1.0)
    assert float((step_of(one, start) - expected).abs().max()) < 6 * LITTLE / len(EXAMPLES) + 1e-5


def test_a_minibatch_in_parts_is_the_same_minibatch(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer()
    start = flatten(one.model)
    expected = clipped_mean(one, EXAMPLES, 1.0)
    monkeypatch.setattr(private_trainer, "MOST_VALUES", 7 * one.size)
    assert float((step_of(one, start) - expected).abs().max()) < 6 * LITTLE / len(EXAMPLES) + 1e-5


@pytest.mark.parametrize("batch_size", [1, 10, 40])
def test_noise_has_the_stated_size_whatever_the_minibatch(batch_size: int) -> None:
    """Gradients are zero, so steps are noise alone; the step is divided by the expected size of a minibatch."""

    class Wide(Linear):
        def model(self) -> nn.Module:
            return nn.Linear(6, 3000)

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs * 0.0).sum()

    noise, clip = 3.0, 0.25
    step = step_of(trainer(Wide(), noise=noise, clip=clip, batch_size=batch_size))
    expected = noise * clip / batch_size
    assert float(step.std()) == pytest.approx(expected, rel=0.04)
    assert abs(float(step.mean())) < 6 * expected / math.sqrt(step.numel())


def test_one_example_cannot_move_a_step_by_more_than_the_clip() -> None:
    """Its loss is a million times as large, and depends on all others where a task sees more than one at a time."""

    class Coupled(Linear):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs * outputs.detach().abs().sum(), targets)

    loud = EXAMPLES.inputs.clone()
    loud[7] *= 1e6
    one, other = (trainer(Coupled(), Examples(inputs, EXAMPLES.targets)) for inputs in (EXAMPLES.inputs, loud))
    start = flatten(one.model)
    moved = float((step_of(one, start) - step_of(other, start)).norm()) * len(EXAMPLES)
    assert moved <= 2.0 + 12 * LITTLE * math.sqrt(one.size), "from one bounded gradient to another"


def test_noise_and_minibatches_are_never_the_same_again() -> None:
    one, other = trainer(noise=1.0, batch_size=20), trainer(noise=1.0, batch_size=20)
    start = flatten(one.model)
    first = one.train(start, 0)
    assert (first.vector != other.train(start, 0).vector).all(), "equal seeds"
    restored = trainer(noise=1.0, batch_size=20)
    state = one.state()
    again = one.train(start, 1)
    restored.restore(state)
    assert (restored.train(start, 1).vector != again.vector).all(), "and after a restart"


def test_minibatches_are_drawn_by_a_coin_for_each_example(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    exact = PrivateTrainer._gradients

    def noted(self: PrivateTrainer, number: int, chosen: Tensor) -> tuple[dict[Tensor, Tensor], Tensor]:
        drawn.append(chosen)
        return exact(self, number, chosen)

    monkeypatch.setattr(PrivateTrainer, "_gradients", noted)
    steps, batch = 300, 4
    one = trainer(batch_size=batch, local_steps=steps)
    assert one.train(flatten(one.model), 0).steps == steps
    sizes = torch.tensor([float(len(each)) for each in drawn] + [0.0] * (steps - len(drawn)))
    assert len(drawn) < steps, "some are empty: 300 (1 - 1/10)^40 = 4.4 in the mean"
    assert float(sizes.mean()) == pytest.approx(batch, abs=6 * math.sqrt(batch / steps))
    assert float(sizes.var()) == pytest.approx(batch * 0.9, rel=0.5)
    counts = torch.cat(drawn).bincount(minlength=len(EXAMPLES)).double()
    assert counts.min() > 5
    assert counts.max() < 70


def test_private_steps_learn_something() -> None:
    one = trainer(noise=1.0, batch_size=40, local_steps=60)
    start = flatten(one.model)
    trained = one.train(start, 0)
    assert one.evaluate(trained.vector)["accuracy"] > one.evaluate(start)["accuracy"] + 0.2
    assert trained.steps == 60


def test_what_is_frozen_stays_and_dropout_is_drawn_for_each_example() -> None:
    class Partly(Linear):
        def model(self) -> nn.Module:
            model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.GroupNorm(2, 8), nn.Linear(8, 3))
            model[0].requires_grad_(False)
            return model

    one = trainer(Partly(), noise=1.0)
    before = one.model[0].weight.clone()
    one.train(flatten(one.model), 0)
    assert torch.equal(one.model[0].weight, before)


# What is refused


def refused(fault: type[Exception], *, task: Task | None = None, **settings: object) -> str:
    with pytest.raises(fault) as raised:
        one = trainer(task, **settings)  # type: ignore[arg-type]
        one.train(flatten(one.model), 0)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_layers_that_mix_examples_are_refused_by_name() -> None:
    class Normed(Linear):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    told = refused(InvalidConfig, task=Normed())
    assert told.startswith("Normed.model: privacy.examples cannot train 1: BatchNorm cannot support training with")
    assert told.endswith("exchange it, batch norm for nn.GroupNorm")


def test_a_peer_with_too_few_examples_does_not_start() -> None:
    assert "40 training examples, and privacy.examples.samples_min is 41" in refused(InvalidConfig, samples_min=41)


def test_a_task_that_measures_its_data_is_refused() -> None:
    class Measuring(Linear):
        def measure(self, model: nn.Module, train: Examples) -> bool:
            return True

    assert "Measuring.measure took numbers from the data that no noise hides" in refused(RoundFailed, task=Measuring())


def test_more_noise_than_rounding_bears_is_refused() -> None:
    class Vast(Linear):
        def model(self) -> nn.Module:
            return nn.Linear(6, 600_000, bias=False)

    assert "rounding would take 6% of the clip; lower noise" in refused(InvalidConfig, task=Vast(), noise=1000.0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_ends_the_round(value: float) -> None:
    broken = EXAMPLES.inputs.clone()
    broken[3, 0] = value
    told = refused(RoundFailed, examples=Examples(broken, EXAMPLES.targets))
    assert told.startswith("training diverged in round 0: the loss of an example is not finite")


def test_a_model_that_keeps_something_of_its_inputs_is_refused() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, inputs: Tensor) -> Tensor:
            self.seen.add_(inputs[0])
            return self.linear(inputs)  # type: ignore[no-any-return]

    class Task(Linear):
        def model(self) -> nn.Module:
            return Keeping()

    assert "in-place" in refused(RoundFailed, task=Task())


def test_without_the_extra_one_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.validators", None)
    assert (
        refused(InvalidConfig)
        == "privacy.examples needs Opacus, which is not installed; pip install 'p2pfl-mesh[opacus]'"
    )


def test_other_algorithms_are_refused() -> None:
    privately = Privately(ExampleTerms(noise=1.0, clip=1.0, epsilon=8.0, samples_min=1), SUITE, os.urandom)
    terms = TrainingTerms(algorithm="local-sgd")
    with pytest.raises(InvalidConfig, match=r"privacy\.examples: not with local-sgd, only with d-psgd"):
        make_trainer(Linear(), Data(EXAMPLES, EXAMPLES), terms, AveragingTerms(), 0, privately)
