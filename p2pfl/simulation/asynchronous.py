"""Runs AD-PSGD in virtual time: peers of different speed, none of which waits for another.

The machines of real peers go from round to round, so this is an engine of its own, on the interface of the algorithms.
A peer's turn is its local steps from a copy of its model, of `cost.step_seconds` each; then an exchange with a neighbor
drawn at random, which takes a latency each way and the time of a vector, and is atomic when it ends; then the next
turn. The neighbor is not held up. What others send at the same time takes nothing of the bandwidth.

A row of the curves stands for as many turns of all peers together as there are peers: for as many gradients as a round
of any other algorithm has. Everything follows from the scenario and its seed, to the last bit.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.algorithms import State
from p2pfl.learning.seeding import seeded
from p2pfl.learning.space import Request, Space
from p2pfl.learning.vector import initial
from p2pfl.simulation.curves import Curve, Judge, StoppingRule
from p2pfl.simulation.dense.engine import Experiment, Mixing, RoundLocal
from p2pfl.simulation.dense.kernels import kernel_for
from p2pfl.simulation.dense.sampling import Sampler, derived, sampler_of
from p2pfl.simulation.hosts import stream
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.scenario import Scenario

ELSEWHERE = ("attackers", "defence", "compression", "faults", "participation", "privacy")
"""What rounds alone have here."""


@dataclass(frozen=True)
class _One:
    """One peer's minibatches.

    Attributes:
        sampler: of all.
        peer: which.
    """

    sampler: Sampler
    peer: int

    def draw(self, round: int, first: int, steps: int) -> Tensor:
        """Draw as `Sampler` says: int64 [1, steps, B]."""
        return self.sampler.draw(round, first, steps)[self.peer : self.peer + 1]


def verify_asynchronous(scenario: Scenario) -> None:
    """Check that AD-PSGD can do what a scenario asks.

    Raises:
        InvalidConfig: it cannot.
    """
    name = scenario.training.algorithm
    for table in ELSEWHERE:
        if getattr(scenario, table) != getattr(Scenario(), table):
            raise InvalidConfig(f"{table} is of rounds, which {name} has not; leave it out")
    if scenario.averaging.masks == "on":
        raise InvalidConfig(f"averaging.masks: in the pairs of {name} each sees the other's model; set masks to off")


def run_asynchronous(
    scenario: Scenario, parts: Parts, number: int, evaluated: set[int], watch: Callable[[int], None] | None = None
) -> Curve:
    """Run one seed; see `p2pfl.simulation.peers_engine.run_peers`.

    Raises:
        InvalidConfig: AD-PSGD cannot do that.
    """
    verify_asynchronous(scenario)
    return _Pairs(scenario, parts, number, evaluated).run(watch)


class _Pairs:
    """A run under way. All peers are one heap of turns that end, by time and then by number."""

    def __init__(self, scenario: Scenario, parts: Parts, number: int, evaluated: set[int]) -> None:
        self._scenario, self._parts, self._number, self._evaluated = scenario, parts, number, evaluated
        peers = scenario.peers
        drawn = parts.schedule(derived(number, "topology", scenario.averaging.topology_seed) % 2**31)
        if drawn.period != 1:
            raise InvalidConfig(
                f"{parts.algorithm.name} draws a neighbor at each turn, and {scenario.averaging.topology} changes by "
                "rounds; take a topology that does not change"
            )
        rows = drawn.at(0)
        self._neighbors = [
            sorted({int(other) for other in rows.indices[peer][rows.weights[peer] != 0]} - {peer})
            for peer in range(peers)
        ]
        if parts.own:
            raise InvalidConfig(
                f"{type(parts.task).__name__}.optimizer is not plain SGD, whose steps {parts.algorithm.name} makes; "
                "set training.learning_rate"
            )
        if not all(self._neighbors):
            raise InvalidConfig(f"{parts.algorithm.name}: a peer without neighbors has nobody to average with")
        self._draws = [stream(number, f"pairs/{peer}") for peer in range(peers)]
        self._kernel = kernel_for(parts.task, parts.pool, None)
        start = torch.from_numpy(initial(parts.task, number))
        dtype = parts.pool.inputs.dtype if parts.pool.inputs.is_floating_point() else torch.float32
        self._space = Space(1, self._kernel.blocks, dtype)
        sampler = sampler_of(parts.shares(number), scenario.training.batch_size, derived(number, "minibatches"))
        base = Experiment(
            task=parts.task, pool=parts.pool, test=parts.data.test, sampler=sampler, exchange=Mixing(drawn),
            algorithm=parts.algorithm, initial=start, peers=1, local_steps=parts.steps, lr=lambda _: parts.lr,
            rounds=scenario.training.rounds,
        )  # fmt: skip
        self._experiments = [replace(base, sampler=_One(sampler, peer)) for peer in range(peers)]
        x = self._space.from_rows(start.to(dtype))
        self._states: list[State] = [parts.algorithm.init(x, self._space) for _ in range(peers)]
        """After the local steps of the turn under way; "x" is what exchanges made of the model meanwhile."""
        self._locals: list[RoundLocal] = []
        self._turns = [0] * peers
        self._losses: list[list[float]] = [[] for _ in range(peers)]
        self._seconds = parts.steps * scenario.cost.step_seconds
        size = 4 * self._space.size
        self._exchange_seconds = 2 * scenario.cost.latency + size / scenario.cost.bandwidth
        self._exchange_bytes, self._exchanges = 2 * size, 0

    def run(self, watch: Callable[[int], None] | None) -> Curve:
        """Run to the end, or until the rule says so."""
        curve = Curve(self._number, StoppingRule(self._scenario.stopping))
        peers, rounds = self._scenario.peers, self._scenario.training.rounds
        judge = Judge(self._scenario, self._parts)
        self._record(curve, 0, 0.0, judge)
        heap: list[tuple[float, int]] = []
        for peer in range(peers):
            self._locals.append(self._begin(peer))
            heapq.heappush(heap, (self._takes(peer), peer))
        for turn in range(1, rounds * peers + 1):
            if curve.outcome:
                break
            now, peer = heapq.heappop(heap)
            self._end(peer)
            if turn % peers == 0:
                self._record(curve, turn // peers, now, judge)
                if watch is not None:
                    watch(turn // peers)
            self._locals[peer] = self._begin(peer)
            heapq.heappush(heap, (now + self._takes(peer), peer))
        return curve

    def _takes(self, peer: int) -> float:
        return self._seconds * self._scenario.slowness_of(peer) + self._exchange_seconds

    def _begin(self, peer: int) -> RoundLocal:
        """Make the local steps of a peer's next turn, from its model as it is now."""
        turn = self._turns[peer]
        local = RoundLocal(self._kernel, self._space, self._experiments[peer], turn, overwrite=False)
        with seeded(derived(self._number, "torch", peer, turn)):
            state, _ = self._parts.algorithm.propose(self._states[peer], local, self._space)
        self._states[peer], self._turns[peer] = state, turn + 1
        return local

    def _end(self, peer: int) -> None:
        """Average a peer with a random neighbor, and end its turn."""
        other = self._draws[peer].choice(self._neighbors[peer])
        mean = (self._states[peer]["x"] + self._states[other]["x"]).mul_(0.5)
        self._states[other] = {**self._states[other], "x": mean}
        state, local = {**self._states[peer], "x": mean}, self._locals[peer]
        self._states[peer] = self._parts.algorithm.apply(state, Request((mean,)), local, self._space)
        self._losses[peer].append(float(local.loss(None)[0]))
        self._exchanges += 1

    def _record(self, curve: Curve, complete: int, seconds: float, judge: Judge) -> None:
        losses = np.array([np.mean(each) if each else math.nan for each in self._losses])
        self._losses = [[] for _ in self._losses]
        known = losses[~np.isnan(losses)]
        row: dict[str, float] = {
            "seed": self._number,
            "round": complete,
            "train_loss": float(known.mean()) if len(known) else math.nan,
            "working": len(known) if complete else self._scenario.peers,
            "modelled_bytes": self._exchanges * self._exchange_bytes / self._scenario.peers,
            "modelled_seconds": seconds,
        }
        if complete in self._evaluated:
            row |= judge.measure(self._models(), losses, curve, complete)
        curve.add(row)

    def _models(self) -> NDArray[np.float32]:
        rows = [self._space.rows(state["x"]) for state in self._states]
        models: NDArray[np.float32] = torch.cat(rows).to(torch.float32).numpy()
        return models
