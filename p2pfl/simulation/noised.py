"""Noise in masked sums, for stacked peers: updates clipped in L2, and Gaussian noise of a charter's deviation added.

The noise is float32 and continuous, drawn by the seed, where real peers' is discrete and nobody's to foresee
(`p2pfl.crypto.private`): its size is the same, and nothing here hides anything.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.privacy import Noise, noise_for
from p2pfl.gossip.grouping import least_masked
from p2pfl.learning.algorithms import Algorithm, LocalSgd, State
from p2pfl.learning.space import Local, Request, Space
from p2pfl.simulation.scenario import Scenario


@dataclass(frozen=True)
class Noised(Algorithm):
    """Another algorithm, whose models go out as the last average and an update that is clipped and noised.

    Attributes:
        inner: what makes the update; its models before local steps are the averages that it took in.
        noise: of each peer's update.
    """

    inner: LocalSgd
    noise: Noise

    name = "noised"
    source = "Kairouz, Liu and Steinke 2021, arXiv 2102.06387"

    def init(self, x: Tensor, space: Space) -> State:
        """Start as the inner one does."""
        return self.inner.init(x, space)

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make the local steps; ask for the mean of clipped and noised models."""
        before = state["x"].clone()
        after, request = self.inner.propose(state, local, space)
        update = request.vectors[0] - before
        norms = space.dots(update, update).sqrt()
        update = space.scale(update, (self.noise.clip / norms.clamp_min(self.noise.clip)))
        # By rows: what a layout stores beyond the models' own numbers stays 0.
        drawn = space.from_rows(torch.randn(space.n, space.size, dtype=space.dtype, device=space.device))
        return after, Request((before + update + self.noise.deviation * drawn,), request.scalars)

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Take the mean."""
        return self.inner.apply(state, reply, local, space)


def noise_of_scenario(scenario: Scenario) -> Noise | None:
    """Return what each peer adds, so that all rounds cost what the scenario says; None if nobody adds any.

    Raises:
        InvalidConfig: survivors are too few to hide one.
    """
    terms, colluders = scenario.privacy, scenario.averaging.colluders
    if not terms.epsilon:
        return None
    survivors = terms.survivors or least_masked(colluders)
    if survivors < least_masked(colluders):
        raise InvalidConfig(f"privacy.survivors is {survivors}; with averaging.colluders = {colluders} at least "
                            f"{least_masked(colluders)} are in a sum")  # fmt: skip
    multiplier = noise_for(scenario.training.rounds, terms.epsilon, terms.delta)
    return Noise(scenario.training.clip_norm, multiplier, survivors - colluders)


def with_noise(algorithm: Algorithm, scenario: Scenario) -> Algorithm:
    """Return the algorithm with a scenario's clip and noise, if it has them.

    Raises:
        InvalidConfig: only d-psgd and local-sgd release nothing but models.
    """
    clip = scenario.training.clip_norm
    if not clip:
        return algorithm
    if not isinstance(algorithm, LocalSgd):
        raise InvalidConfig(
            f"training.clip_norm: updates are clipped for d-psgd and local-sgd, not for {algorithm.name}; leave it out"
        )
    return Noised(algorithm, noise_of_scenario(scenario) or Noise(clip, 0.0, 1))
