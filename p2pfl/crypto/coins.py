"""Coins from a keystream: whether something happens that happens with a given probability, many times over."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import LocalError
from p2pfl.crypto.masks import SEED_BYTES
from p2pfl.crypto.suite import BLOCK_BYTES, Suite


@dataclass(slots=True)
class Coins:
    """A stream of coins; each is given once, in order. Its `repr` shows nothing of them.

    A coin falls if 64 uniform bits, as a number, are below `rate` in units of 2^-64, rounded down: so it is$
    likelier than `rate` never, and less likely by a unit at most.

    Args:
        suite: the charter's.
        seed: 32 bytes that nobody can foresee, for this stream alone.
        rate: how often one falls, 0 to 1.

    Raises:
        LocalError: a length is wrong, or the rate is none.
    """

    suite: Suite = field(repr=False)
    seed: bytes = field(repr=False)
    rate: float
    _stream: Any = field(init=False, repr=False)
    _position: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        if len(self.seed) != SEED_BYTES or not 0 <= self.rate <= 1:
            raise LocalError(f"coins have a seed of {SEED_BYTES} bytes and a rate from 0 to 1")
        info = canonical(["p2pfl/coins/1", self.suite.name])
        self._stream = self.suite.keystream(self.suite.hkdf(self.seed, b"", info, self.suite.key_bytes))

    def take(self, count: int) -> NDArray[np.bool_]:
        """Return the next coins, bool [count]."""
        if self.rate == 1:
            return np.ones(count, np.bool_)
        drawn = np.empty(count, "<u8")
        self._stream.expand_into(self._position, drawn.view(np.uint8).data)
        self._position += -(-drawn.nbytes // BLOCK_BYTES) * BLOCK_BYTES
        fallen: NDArray[np.bool_] = drawn < np.uint64(int(self.rate * 2.0**64))
        return fallen
