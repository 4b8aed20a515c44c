"""The tiers of local training: from any module (the reference) to a perceptron written out by hand.

All tiers compute the same steps up to rounding; a figure is worth little without the name of its tier.
"""

from collections.abc import Callable, Mapping

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import Examples, Task, make_model
from p2pfl.simulation.dense.kernels.base import Kernel, Pulls
from p2pfl.simulation.dense.kernels.fused import FusedKernel, fits
from p2pfl.simulation.dense.kernels.optimizers import OwnOptimizer
from p2pfl.simulation.dense.kernels.stacked import StackedKernel, layers
from p2pfl.simulation.dense.kernels.vmap import VmapKernel

__all__ = ["TIERS", "Kernel", "OwnOptimizer", "Pulls", "kernel_for"]

TIERS: Mapping[str, Callable[[Task, Examples], Kernel]] = {
    "fused": FusedKernel,
    "stacked": StackedKernel,
    "vmap": VmapKernel,
}
"""The fastest first."""


def kernel_for(task: Task, pool: Examples, tier: str | None = None) -> Kernel:
    """Make a kernel of the named tier, or of the fastest that takes this task and these examples.

    Raises:
        InvalidConfig: if there is no such tier, or it does not take them.
    """
    if tier is None:
        model = make_model(task)
        tier = "fused" if fits(task, model, pool) else "stacked" if layers(model, pool.inputs) else "vmap"
    if tier not in TIERS:
        raise InvalidConfig(f"there is no tier {tier!r}; use one of {', '.join(TIERS)}")
    return TIERS[tier](task, pool)
