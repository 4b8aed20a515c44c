"""Local steps that tell little of any single example: each gets its own gradient, clipped, and the sum gets noise.

That is DP-SGD (Abadi et al. 2016, arXiv 1607.00133), through Opacus (Yousefpour et al. 2021, arXiv 2109.12298), the
extra `opacus`. Every gradient is computed from one example alone (`torch.func`), so nothing in a model or a loss can
mix examples; Opacus' validator refuses layers that would have to. Minibatches are what the accountant counts on: each
example is in one with a probability of its own, by coins that nobody can foresee. What steps cost is
`p2pfl.core.privacy`'s to say, and is paid for by whoever calls `train`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from p2pfl.core.charter import Charter, ExampleTerms
from p2pfl.core.errors import InvalidConfig, LocalError, RoundFailed
from p2pfl.crypto.coins import Coins
from p2pfl.crypto.gaussian import Gaussian
from p2pfl.crypto.masks import SEED_BYTES
from p2pfl.crypto.suite import Suite, suite
from p2pfl.learning.task import Data, Task, blame
from p2pfl.learning.trainer import Trained, Trainer
from p2pfl.learning.vector import Vector

MOST_VALUES = 1 << 23
"""Of gradients of single examples held at once: 32 MiB in float32, and twice that in float64; a guess of what fits
beside everything else."""
_NO_LOSS = 0.0
"""What a round tells whose minibatches were all empty."""


@dataclass(frozen=True)
class Privately:
    """How noise is made.

    Attributes:
        terms: how much.
        suite: whose cipher it is drawn from.
        entropy: gives bytes that nobody can foresee, never the same again.
    """

    terms: ExampleTerms
    suite: Suite
    entropy: Callable[[int], bytes] = field(repr=False)

    @classmethod
    def of(cls, charter: Charter, entropy: Callable[[int], bytes]) -> "Privately | None":
        """Return what a charter says; None where it says nothing of examples."""
        terms = None if charter.privacy is None else charter.privacy.examples
        return None if terms is None else cls(terms, suite(charter.security.suite, clock=time.perf_counter), entropy)


class PrivateTrainer(Trainer):
    """A `Trainer` with noise in each step. Not reproducible: neither noise nor minibatches are drawn from `seed`.

    An example's loss is the task's on this example alone. Gradients are divided by `batch_size`, whatever the number of
    examples in a minibatch.

    Args:
        task: as there; its loss and model take one example, too.
        data: as there.
        privately: the noise.
        local_steps: as there.
        batch_size: how many examples are in a step, in the mean.
        clip_norm: as there.
        seed: of layers that draw random numbers.
        clock: as there.

    Raises:
        InvalidConfig: a number is out of range, there are too few examples, the model has layers that mix them, or
            Opacus is missing.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        *,
        privately: Privately,
        local_steps: int,
        batch_size: int,
        clip_norm: float,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            task,
            data,
            local_steps=local_steps,
            batch_size=batch_size,
            clip_norm=clip_norm,
            seed=seed,
            clock=clock,
        )
        count, terms = len(data.train), privately.terms
        if count < terms.samples_min:
            raise InvalidConfig(
                f"{count} training examples, and privacy.examples.samples_min is {terms.samples_min}: each would be "
                "used more often than its budget bears; take part with more data, or agree on fewer"
            )
        verify_model(self._model, terms, type(task).__name__)
        self._privately = privately
        self._rate, self._expected = min(1.0, batch_size / count), min(batch_size, count)

    def _without_steps(self, number: int, vector: Vector) -> Trained:
        del vector
        raise RoundFailed(
            f"round {number}: {type(self._task).__name__}.measure took numbers from the data that no noise hides; "
            "nothing was sent: with privacy.examples a task measures nothing"
        )

    def _steps(self, number: int, until: float, steer: Callable[[], None] | None = None) -> tuple[float, int]:
        """Make up to `local_steps` steps on the model; return their examples' mean loss, and their number."""
        if steer is not None:
            raise LocalError("gradients with noise are not to be changed by anything computed from the data")
        from p2pfl.learning.private_optimizer import DEVIATION, WholeOptimizer  # noqa: PLC0415 - an extra

        self._model.train()
        suite, entropy, terms = self._privately.suite, self._privately.entropy, self._privately.terms
        coins = Coins(suite, entropy(SEED_BYTES), self._rate)
        noise = Gaussian(suite, entropy(SEED_BYTES), bytes(SEED_BYTES), DEVIATION)
        optimizer = WholeOptimizer(
            self._optimizer,
            noise=terms.noise,
            clip=terms.clip,
            batch_size=self._expected,
            draw=noise.take,
        )
        losses: list[Tensor] = []
        steps = 0
        while steps < self._local_steps and (steps == 0 or self._clock() < until):
            chosen = torch.from_numpy(coins.take(len(self._data.train)).nonzero()[0])
            optimizer.zero_grad(set_to_none=True)
            for part in chosen.split(max(1, MOST_VALUES // self.size)) if len(chosen) else ():
                grads, loss = self._gradients(number, part)
                optimizer.take(grads)
                losses.append(loss)
            with blame(self._task, "optimizer", RoundFailed, f"round {number}: "):
                optimizer.finish()
            steps += 1
        return float(torch.cat(losses).mean()) if losses else _NO_LOSS, steps

    def _gradients(self, number: int, chosen: Tensor) -> tuple[dict[Tensor, Tensor], Tensor]:
        """Return each example's gradient, [examples, ...] by parameter that is trained, and loss, [examples]."""
        model, task, examples = self._model, self._task, self._data.train
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        held = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        held |= dict(model.named_buffers())

        def loss_of(parameters: dict[str, Tensor], input: Tensor, target: Tensor) -> Tensor:
            outputs = torch.func.functional_call(model, parameters | held, (input[None],))
            return task.loss(outputs, target[None])

        each = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0), randomness="different")
        with blame(task, "loss", RoundFailed, f"round {number}: "):
            grads, losses = each(trained, examples.inputs[chosen], examples.targets[chosen])
        for what, values in (("loss", [losses]), ("gradient", list(grads.values()))):
            if not all(bool(torch.isfinite(value).all()) for value in values):
                raise RoundFailed(
                    f"training diverged in round {number}: the {what} of an example is not finite; lower the learning "
                    "rate in the task's optimizer, or bring its inputs to a smaller scale"
                )
        parameters = dict(model.named_parameters())
        return {parameters[name]: grad for name, grad in grads.items()}, losses


def verify_model(model: nn.Module, terms: ExampleTerms, task: str) -> None:
    """Check that a model can be trained example by example.

    Args:
        model: any state.
        terms: the noise.
        task: its name, for the message.

    Raises:
        InvalidConfig: it has layers that mix examples, or Opacus is missing.
    """
    validator = _validator()
    errors = validator.validate(model.train(), strict=False)
    if errors:
        names = ", ".join(sorted({name for name, part in model.named_modules() if _is_refused(validator, part)}))
        reason = str(errors[0]).split(". ")[0]
        raise InvalidConfig(
            f"{task}.model: privacy.examples cannot train {names}: {reason}; exchange it, batch norm for nn.GroupNorm"
        )
    from p2pfl.learning.private_optimizer import verify_rounding  # noqa: PLC0415 - an extra

    verify_rounding(terms.noise, terms.clip, sum(p.numel() for p in model.parameters() if p.requires_grad))


def _is_refused(validator: Any, part: nn.Module) -> bool:
    return type(part) in validator.VALIDATORS and bool(validator.VALIDATORS[type(part)](part))


def _validator() -> Any:
    try:
        from opacus.validators import ModuleValidator  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InvalidConfig(
            "privacy.examples needs Opacus, which is not installed; pip install 'p2pfl-mesh[opacus]'"
        ) from error
    return ModuleValidator
