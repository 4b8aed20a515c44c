"""Compressed mixing that still converges: peers compress what others do not know of them yet."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.learning.algorithms.algorithm import Algorithm, State, fraction
from p2pfl.learning.space import Local, Request, Space

Compressor = Callable[[NDArray[Any], np.random.Generator], tuple[NDArray[Any], NDArray[np.int64]]]
"""Compresses rows, [n, P], to what their receivers make of them, [n, P], and the bytes that takes, int64 [n]: as
`p2pfl.gossip.compress` has them. Rows have the dtype of the models."""

STREAM = int.from_bytes(b"choco", "big")


@dataclass(frozen=True)
class ChocoSgd(Algorithm):
    """Each peer has a public copy p of its model, the same with all its neighbors, and sends q = C(x - p).

    After the local steps p becomes p + q, and x becomes x + gamma (W p - p): the mean of x is what the local steps made
    it, whatever C leaves out. Only q is sent, and its bytes are the state's "sent"; the request holds the public
    copies, which each receiver has by adding up. So attackers and robust rules meet what a receiver sees, and matrices
    may change from round to round as long as every peer has the copies it needs.

    A missed round: x keeps its local steps, and p stays, since nobody has q; the next q makes up for it. A peer has to
    fetch what it missed of others' q before it mixes again.

    Attributes:
        compress: C: unbiased, or one that keeps a share of the norm, such as top-k.
        gamma: the consensus step size. No default: it has to fall with what C leaves out. The authors' example for sign
            with norm on a ring of 16 (epfml/ChocoSGD, dl_code) takes 0.5.
        seed: of what C draws.
    """

    compress: Compressor
    gamma: float
    seed: int = 0

    name = "choco-sgd"
    source = "Koloskova, Stich and Jaggi 2019, arXiv 1902.00340, algorithm 2; with local steps 1907.09356"
    needs = "doubly"
    divisible = False

    def __post_init__(self) -> None:
        fraction("gamma", self.gamma, zero=False, one=True)

    def init(self, x: Tensor, space: Space) -> State:
        """Start with public copies of 0."""
        counts = torch.zeros(2, space.n, dtype=torch.int64, device=x.device)
        return {"x": x, "public": torch.zeros_like(x), "round": counts[0], "sent": counts[1]}

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Make the local steps; compress what the public copies lack, and ask for their mean."""
        x = local.steps(state["x"], out=state["x"]).x
        rows = space.rows(x - state["public"])
        compressed, sent = self.compress(rows.cpu().numpy(), self._generator(int(state["round"].max())))
        news = space.from_rows(torch.from_numpy(np.ascontiguousarray(compressed)).to(x.device, x.dtype))
        public = news.add_(state["public"])
        after = {
            "x": x,
            "public": public,
            "round": state["round"] + 1,
            "sent": torch.from_numpy(np.asarray(sent, dtype=np.int64)).to(x.device),
        }
        return after, Request((public,))

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Move as the public copies differ."""
        del local, space
        moved = torch.sub(reply.vectors[0], state["public"]).mul_(self.gamma)
        return {**state, "x": moved.add_(state["x"])}

    def missed(self, before: State, state: State, request: Request, local: Local, space: Space) -> State:
        """Keep the local steps, and the public copy that others have."""
        del request, local, space
        return {**state, "public": before["public"]}

    def _generator(self, round: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(STREAM, round))))
