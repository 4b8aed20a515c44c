"""Mixing: each peer's vector becomes a weighted sum of its neighbors' vectors.

Owns how a sparse matrix is applied to flat tensors fast. `embedding_bag` over lists of neighbors takes about twice as
long as copying the tensor once for a ring, and 5 times for ten random neighbors; a sparse CSR product takes twice that,
and `index_add_` 10 to 50 times.
"""

from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from p2pfl.learning.space import CPU, Space
from p2pfl.simulation.dense.threads import one_thread_each, share

RANGE = 1 << 20
"""Bytes of results summed at a time: `embedding_bag` makes a tensor of its own, which is copied while still in cache.
Measured for 4096 columns: ranges of 32 to 256 peers are equally fast, one of 4000 peers takes 2.5 times as long (ring),
and panels of 256 columns 1.8 times."""

SMALL = 4 << 20
"""Bytes below which one thread mixes alone: a guess, at which starting more takes a tenth of the time."""

DENSE, WIDE = 0.25, 64
"""A matrix is multiplied as a dense one if more than this share of its entries are not 0, and more than that many in a
row. Measured for n = 1000: a dense product takes 51 ms, neighbor lists 28 ms for 150 entries in a row, 50 ms for 300.
Small matrices stay with the lists, whose bits do not change when variants run side by side."""


class Rows(Protocol):
    """A mixing matrix by rows: `indices`, int64 [n, k], and `weights`, float64 [n, k]; padded by weights of 0."""

    @property
    def indices(self) -> NDArray[np.int64]:
        """Whose vectors enter each row, int64 [n, k]."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """With which weights, float64 [n, k]."""


class Mixer:
    """Applies one mixing matrix to flat tensors and to scalars.

    A row's sum runs in the order of its indices, in the tensor's dtype, whatever the number of threads. A large matrix
    with few zeros is multiplied as a dense one, in an order of BLAS's choice; of one whose rows are all the same, one
    row is computed.
    """

    def __init__(self, matrix: Rows, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> None:
        indices, weights = matrix.indices, matrix.weights
        self.n = len(indices)
        used = weights != 0.0
        counts = used.sum(1)
        ends = np.cumsum(counts)
        columns, values = torch.from_numpy(indices[used]), torch.from_numpy(weights[used]).to(dtype)
        starts = torch.from_numpy(ends - counts)
        self._same = bool((indices == indices[0]).all() and (weights == weights[0]).all())
        self._dense: Tensor | None = None
        if self._same:
            columns, values, starts = columns[: counts[0]], values[: counts[0]], starts[:1]
            ends = ends[:1]
        elif len(columns) > max(DENSE * self.n, WIDE) * self.n:
            dense = torch.zeros(self.n, self.n, dtype=dtype)
            rows = torch.from_numpy(np.repeat(np.arange(self.n), counts))
            self._dense = dense.index_put_((rows, columns), values, accumulate=True).to(device)
        self._columns, self._values, self._starts = columns.to(device), values.to(device), starts.to(device)
        self._ends = ends.tolist()

    def mix(self, flat: Tensor, space: Space, out: Tensor | None = None) -> Tensor:
        """Return a flat tensor: row i is the sum over j of w_ij times the vector of peer j.

        The tensor is `out`, which must not overlap `flat`, or a new one.
        """
        result = torch.empty_like(flat) if out is None else out
        views = zip(space.views(flat), space.views(result), strict=True)
        self._apply([(source.view(self.n, -1), target.view(self.n, -1)) for source, target in views])
        return result

    def mix_scalars(self, scalars: Tensor) -> Tensor:
        """Return the mixed numbers of the peers, [n]."""
        result = torch.empty_like(scalars)
        self._apply([(scalars.view(self.n, 1), result.view(self.n, 1))])
        return result

    @torch.no_grad()
    def _apply(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Write the product with each first tensor, [n, columns], to the second."""
        if self._dense is not None:
            for source, target in pairs:
                torch.mm(self._dense, source, out=target)
            return
        if self._same:
            for source, target in pairs:
                target[:] = self._sum(source, 0, 1)
            return

        def work(_: int, part: tuple[Tensor, Tensor, int, int]) -> None:
            source, target, start, end = part
            target[start:end] = self._sum(source, start, end)

        parts = [
            (source, target, start, min(start + count, self.n))
            for source, target in pairs
            for count in [self._count(source)]
            for start in range(0, self.n, count)
        ]
        small = sum(source.nbytes for source, _ in pairs) < SMALL
        with one_thread_each() if small else nullcontext():
            share(parts, work, 1 if small or not pairs[0][0].is_cpu else torch.get_num_threads())

    def _count(self, source: Tensor) -> int:
        """Return how many rows are summed at a time."""
        return max(1, RANGE // (source.shape[1] * source.element_size())) if source.is_cpu else self.n

    def _sum(self, source: Tensor, start: int, end: int) -> Tensor:
        """Return rows `start` to `end` of the product, as a new tensor."""
        first, last = self._ends[start - 1] if start else 0, self._ends[end - 1]
        return functional.embedding_bag(
            self._columns[first:last], source, self._starts[start:end] - first, mode="sum",
            per_sample_weights=self._values[first:last],
        )  # fmt: skip
