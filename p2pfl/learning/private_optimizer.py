"""Opacus' optimizer, but in whole numbers and with noise of a keystream. Needs the extra `opacus`.

Opacus adds up float32, whose errors depend on whatever else is in the minibatch, and draws its noise from torch's
generator, which one can compute backwards. Here each example's clipped gradient is rounded to whole numbers, sums are
exact, and the noise is a discrete Gaussian: so one example changes a sum by no more than the bound says, and the low
bits of floating point tell nothing (Mironov 2012, "On significance of the least significant bits for differential
privacy").
"""

import math
from collections.abc import Callable, Mapping

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from p2pfl.core.errors import InvalidConfig, LocalError
from p2pfl.core.privacy import MOST_ROUNDING
from p2pfl.crypto.gaussian import Integers

DEVIATION = 2.0**24
"""Of the noise, in units: fine enough that rounding takes less than a thousandth of the clip up to 10^9 values."""
_FLOAT_MARGIN = 1e-9
"""Norms in float64 are off by less."""


class WholeOptimizer(DPOptimizer):
    """Clips each example's gradient, adds them up with noise, divides by `batch_size`, and hands that to `optimizer`.

    An example's gradient g becomes round(f g) with f <= 1 / unit so that its norm is `clip` / unit at most, checked
    after rounding.

    Args:
        optimizer: the task's.
        noise: the standard deviation, as a multiple of `clip`.
        clip: the largest L2 norm of an example's gradient.
        batch_size: how many examples a minibatch is expected to have.
        draw: gives so many values of a discrete Gaussian of deviation `DEVIATION`, int64.

    Raises:
        InvalidConfig: rounding would take too much of the clip.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise: float,
        clip: float,
        batch_size: int,
        draw: Callable[[int], Integers],
    ) -> None:
        super().__init__(optimizer, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=batch_size)
        self._draw = draw
        self._size = sum(parameter.numel() for parameter in self.params)
        self._sum = torch.zeros(self._size, dtype=torch.int64)
        verify_rounding(noise, clip, self._size)
        self._unit = noise * clip / DEVIATION

    def clip_and_accumulate(self) -> None:
        """Add the examples' gradients, `grad_sample` of each parameter, to the sum; see Opacus."""
        pairs = zip(self.params, self.grad_samples, strict=True)
        flat = torch.cat([each.reshape(len(each), p.numel()).double() for p, each in pairs], dim=1)
        most = self.max_grad_norm / self._unit
        aim = self.max_grad_norm * (1.0 - _FLOAT_MARGIN) - self._unit * math.sqrt(self._size) / 2
        norms = torch.linalg.vector_norm(flat, dim=1)
        factors = (aim / norms.clamp_min(aim)) / self._unit
        flat.mul_(factors[:, None]).round_()
        if bool((torch.linalg.vector_norm(flat, dim=1) > most).any()):
            raise LocalError("an example's gradient is longer than its bound after rounding; no step was made")
        self._sum += flat.to(torch.int64).sum(0)

    def add_noise(self) -> None:
        """Put the sum with noise into `grad` of each parameter; see Opacus."""
        noised = (self._sum + torch.from_numpy(self._draw(self._size))).double() * self._unit
        self._sum = torch.zeros_like(self._sum)
        for parameter, part in zip(self.params, noised.split([p.numel() for p in self.params]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def take(self, grads: Mapping[Tensor, Tensor]) -> None:
        """Take some examples of the minibatch: a gradient of each of them, [examples, ...], by parameter."""
        for parameter in self.params:
            parameter.grad_sample = grads[parameter]
        self.signal_skip_step(True)
        self.step()

    def finish(self) -> None:
        """Make the step with what was taken; with noise alone where that is nothing."""
        for parameter in self.params:
            parameter.grad_sample = torch.zeros((0, *parameter.shape))
        self.step()


def verify_rounding(noise: float, clip: float, size: int) -> None:
    """Check that a gradient of so many values loses little when it is rounded.

    Raises:
        InvalidConfig: it loses too much.
    """
    share = noise / DEVIATION * math.sqrt(size) / 2
    if share > MOST_ROUNDING:
        raise InvalidConfig(
            f"privacy.examples: noise of {noise:g} times the clip of {clip:g} is too much for {size} values: rounding "
            f"would take {share:.0%} of the clip; lower noise"
        )
