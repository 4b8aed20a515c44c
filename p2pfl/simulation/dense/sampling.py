"""Which examples each peer's minibatches hold: a pure function of seed, round and step.

A minibatch is drawn uniformly with replacement from the peer's own share. That is the noise which the convergence
proofs assume (Lian et al. 2017, arXiv 1705.09056: each gradient from a fresh sample of the peer's own distribution),
and it leaves nothing to remember between rounds. Real peers shuffle epochs (`p2pfl.learning.trainer`), which is a
little less noise. Where the two must agree, take whole shares.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import InvalidConfig

Indices = NDArray[np.int64]


def derived(seed: int, name: str, *numbers: int) -> int:
    """Derive the seed of a named stream: the first 63 bits of SHA-256 over seed, name and numbers."""
    return int.from_bytes(hashlib.sha256(canonical([seed, name, *numbers])).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Shares:
    """Whose examples are which: peer i has `order[starts[i] : starts[i] + counts[i]]`, numbers of a pool's examples.

    `order` is int64 [total], `starts` and `counts` are int64 [n].
    """

    order: Indices
    starts: Indices
    counts: Indices

    @classmethod
    def of(cls, parts: Sequence[Indices]) -> "Shares":
        """Make shares from each peer's examples; `p2pfl.learning.partition` deals them.

        Raises:
            InvalidConfig: if a peer has none.
        """
        counts = np.array([len(part) for part in parts], np.int64)
        if not counts.all():
            raise InvalidConfig(f"peer {int(np.argmin(counts))} has no examples; give each peer at least one")
        return cls(np.concatenate(parts).astype(np.int64), np.cumsum(counts) - counts, counts)

    def __len__(self) -> int:
        """Count the peers."""
        return len(self.counts)


class Sampler(Protocol):
    """Draws minibatches. Each number of `first` is another draw; equal arguments give equal ones."""

    def draw(self, round: int, first: int, steps: int) -> Tensor:
        """Return the minibatches of `steps` steps of a round, from its step `first` on: int64 [n, steps, B]."""


@dataclass(frozen=True)
class Uniform:
    """Minibatches of `batch_size` examples, drawn uniformly with replacement from each peer's share.

    A peer's minibatches depend on its place and its share, not on how many peers follow it.
    """

    shares: Shares
    batch_size: int
    seed: int

    def draw(self, round: int, first: int, steps: int) -> Tensor:
        """Draw as `Sampler` says."""
        shape = (len(self.shares), steps, self.batch_size)
        # Raw numbers are the same with every version of numpy (NEP 19), and so is what follows.
        bits = np.random.PCG64(derived(self.seed, "minibatches", round, first)).random_raw(shape)
        bits >>= np.uint64(32)
        bits *= self.shares.counts.astype(np.uint64)[:, None, None]
        bits >>= np.uint64(32)
        places = bits.view(np.int64)
        places += self.shares.starts[:, None, None]
        return torch.from_numpy(self.shares.order[places])


@dataclass(frozen=True)
class Whole:
    """Each step takes all examples of each peer: the exact gradient.

    Raises:
        InvalidConfig: if peers have unequally many.
    """

    shares: Shares

    def __post_init__(self) -> None:
        counts = self.shares.counts
        if counts.min() != counts.max():
            raise InvalidConfig(
                f"whole shares of {counts.min()} to {counts.max()} examples; give all peers equally many, "
                "or a batch size"
            )

    def draw(self, round: int, first: int, steps: int) -> Tensor:
        """Draw as `Sampler` says."""
        del round, first
        places = self.shares.starts[:, None] + np.arange(self.shares.counts[0])
        return torch.from_numpy(self.shares.order[places])[:, None].expand(-1, steps, -1)


def sampler_of(shares: Shares, batch_size: int, seed: int) -> Sampler:
    """Return what draws minibatches: whole shares where all are equally large and none is larger than a minibatch."""
    counts = shares.counts
    if counts.min() == counts.max() <= batch_size:
        return Whole(shares)
    return Uniform(shares, batch_size, seed)
