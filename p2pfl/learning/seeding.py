"""Torch's global generator, borrowed and given back.

Owns the seeding of what draws without a generator of its own: initial weights, dropout. Must not be used where a
generator can be passed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's global generator, and put its state back afterwards.

    `torch.manual_seed` would also queue a call, with the stack it came from, for every accelerator that is not in use
    yet: 120 microseconds each time, and a list that grows with every round.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
