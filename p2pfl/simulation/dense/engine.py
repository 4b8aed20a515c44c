"""Runs an experiment round by round: local work of all peers, an exchange, and now and then an evaluation.

A run is a pure function of the experiment and its seed: equal experiments give equal bits on the same machine with the
same number of threads, and a run resumed from a state goes on as the first would have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.seeding import seeded
from p2pfl.learning.space import CPU, Local, Request, Space, Steps
from p2pfl.learning.task import Examples, Task
from p2pfl.simulation.dense.evaluation import Evaluation, Evaluator
from p2pfl.simulation.dense.kernels import Kernel, OwnOptimizer, Pulls, kernel_for
from p2pfl.simulation.dense.mix import Mixer, Rows
from p2pfl.simulation.dense.sampling import Sampler, derived
from p2pfl.simulation.dense.threads import one_thread_each

State = dict[str, Tensor]
"""What outlives a round, by name: flat tensors, and one number of each peer, [n]; "x" are the models."""

KEPT = 64
"""Mixing matrices of a periodic schedule that are kept ready: a guess above log2 of any number of peers."""


class Algorithm(Protocol):
    """What an experiment runs; see `p2pfl.learning.algorithms`."""

    def init(self, x: Tensor, space: Space) -> State:
        """Return the state before the first round."""

    def propose(self, state: State, local: Local, space: Space) -> tuple[State, Request]:
        """Do a round's local work; return the state then, and what to mix.

        Nothing of `state` may be overwritten, but by `local.steps` and what that returns.
        """

    def apply(self, state: State, reply: Request, local: Local, space: Space) -> State:
        """Return the state after the round, from what came of the mixing."""


class Schedule(Protocol):
    """Which matrix mixes in which round; see `p2pfl.gossip.schedule`."""

    @property
    def period(self) -> int | None:
        """After how many rounds the matrices repeat; None if they do not."""

    def at(self, round: int) -> Rows:
        """Return the matrix of a round."""


class Exchange(Protocol):
    """What peers make of each other's requests: mixing, with or without compression, attackers and robust rules."""

    def __call__(self, round: int, request: Request, space: Space, spare: list[Tensor]) -> Request:
        """Return what each peer has after the exchange, in the shapes of the request.

        `spare` are flat tensors that nobody needs: results may be written there. A new tensor of hundreds of megabytes
        costs a fifth of a round, since the system clears its memory page by page.
        """


class Mixing:
    """The plain exchange: every vector and scalar is mixed by the round's matrix."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._kept: dict[int, Mixer] = {}

    def __call__(self, round: int, request: Request, space: Space, spare: list[Tensor]) -> Request:
        """Exchange as `Exchange` says."""
        mixer = self._mixer(round, space)
        return replace(
            request,
            vectors=tuple(mixer.mix(vector, space, spare.pop() if spare else None) for vector in request.vectors),
            scalars=tuple(mixer.mix_scalars(scalar) for scalar in request.scalars),
        )

    def _mixer(self, round: int, space: Space) -> Mixer:
        period = self._schedule.period
        if period is None or period > KEPT:
            return Mixer(self._schedule.at(round), space.device, space.dtype)
        if round % period not in self._kept:
            self._kept[round % period] = Mixer(self._schedule.at(round), space.device, space.dtype)
        return self._kept[round % period]


@dataclass(frozen=True)
class Experiment:
    """What is run.

    Attributes:
        task: the model, its loss and its metrics.
        pool: the examples that all peers' shares lie in; float inputs give the models their dtype.
        test: what models are evaluated on.
        sampler: which examples each minibatch holds.
        exchange: what peers make of each other's requests, such as `Mixing(schedule)`.
        algorithm: what peers do in a round.
        initial: the models before the first round, rows [n, P], or the same for all, [P] (then `peers` says how many).
        peers: n.
        local_steps: how many steps `Local.steps` makes.
        lr: the learning rate of each round.
        rounds: how many there are.
        seed: of what models draw themselves, such as dropout, and of the sample of peers that is evaluated.
        evaluated: in which rounds, counted from 0, models are evaluated after the exchange.
        sampled: how many peers' models are evaluated; the same peers in all rounds.
        variants: into how many equal parts, one after another, the peers fall that never exchange anything: seeds or
            settings that run side by side. Each is evaluated on its own.
        judged: how many peers of each variant are evaluated, its first ones; the others are not to be believed. 0 for
            all.
        working: which peers take part in a round, bool [n]; others stay as they are. None stands for all.
        own: the task's own optimizer, for local steps of which the algorithm asks for nothing but gradients; SGD unless
            given. All peers take part in all rounds then, since what it remembers has one count of steps.
        tier: of the local training; the fastest that fits, unless given.
        device: where everything is computed.
    """

    task: Task
    pool: Examples
    test: Examples
    sampler: Sampler
    exchange: Exchange
    algorithm: Algorithm
    initial: Tensor
    peers: int
    local_steps: int
    lr: Callable[[int], float]
    rounds: int
    seed: int = 0
    evaluated: Callable[[int], bool] = lambda _: True
    sampled: int = 0
    variants: int = 1
    judged: int = 0
    working: Callable[[int], Tensor] | None = None
    own: OwnOptimizer | None = None
    tier: str | None = None
    device: torch.device = CPU


@dataclass(frozen=True)
class RoundMetrics:
    """A round's outcome.

    Attributes:
        round: its number, from 0.
        loss: the mean of each peer's minibatch losses, [n]; nan where a peer computed none.
        evaluations: one for each variant; none unless the round was evaluated.
    """

    round: int
    loss: Tensor
    evaluations: tuple[Evaluation, ...]


class Engine:
    """An experiment under way.

    Attributes:
        space: the layout of the flat tensors.
        tier: of the local training.
        state: what outlives a round; with `round` enough to go on from, in the same tier, whose layout it has. Later
            rounds overwrite it: copy what is to be kept.
        round: the number of the next round.
        parts: whose mean model is evaluated, and whose distances to it: peers of each variant.
        sample: whose models are evaluated, int64 [m]: places in each variant.

    Raises:
        InvalidConfig: if the experiment's numbers do not fit each other.
    """

    def __init__(self, experiment: Experiment, state: State | None = None, round: int = 0) -> None:
        self._experiment = experiment
        device = experiment.device
        pool, test = _moved(experiment.pool, device), _moved(experiment.test, device)
        self._kernel = kernel_for(experiment.task, pool, experiment.tier)
        self.tier = self._kernel.tier
        dtype = pool.inputs.dtype if pool.inputs.is_floating_point() else torch.float32
        self.space = Space(experiment.peers, self._kernel.blocks, dtype, device)
        _verify(experiment, self.space)
        self._evaluator = Evaluator(experiment.task, self._kernel.blocks, test)
        each = experiment.peers // experiment.variants
        judged = experiment.judged or each
        self.parts = [slice(first, first + judged) for first in range(0, experiment.peers, each)]
        self.sample = _sample(judged, experiment.sampled, experiment.seed)
        self.round = round
        self._spare: list[Tensor] = []
        if state is None:
            rows = experiment.initial.to(device, dtype)
            state = experiment.algorithm.init(self.space.from_rows(rows), self.space)
        self.state = state

    def step(self) -> RoundMetrics:
        """Run the next round."""
        experiment, space, number = self._experiment, self.space, self.round
        working = None if experiment.working is None else experiment.working(number).to(space.device)
        local = RoundLocal(self._kernel, space, experiment, number, overwrite=working is None)
        before = self.state
        with _seeded(derived(experiment.seed, "torch", number), space.device):
            state, request = experiment.algorithm.propose(before, local, space)
            reply = experiment.exchange(number, request, space, self._spare)
            state = experiment.algorithm.apply(state, reply, local, space)
        self.state = state if working is None else _frozen(before, state, working, space)
        self._spare = _unused(request, self.state, space)
        self.round += 1
        evaluations = self.evaluate() if experiment.evaluated(number) else ()
        return RoundMetrics(number, local.loss(working), evaluations)

    def evaluate(self) -> tuple[Evaluation, ...]:
        """Measure the models as they are, one variant after another."""
        x = self.state["x"]
        # Many small operations: where the processors are busy, sharing them takes 4 times as long as one thread does.
        with one_thread_each():
            return tuple(
                self._evaluator.measure(self.space, x, part, (self.sample + part.start).to(self.space.device))
                for part in self.parts
            )  # fmt: skip


def run(experiment: Experiment) -> Iterator[RoundMetrics]:
    """Run an experiment to its end, a round at a time.

    Raises:
        InvalidConfig: if the experiment's numbers do not fit each other.
    """
    engine = Engine(experiment)
    while engine.round < experiment.rounds:
        yield engine.step()


class RoundLocal:
    """A round's local work; it counts the steps, so that each takes minibatches of its own."""

    def __init__(self, kernel: Kernel, space: Space, experiment: Experiment, round: int, *, overwrite: bool) -> None:
        self.lr = experiment.lr(round)
        self.count = experiment.local_steps
        self._kernel = kernel
        self._space = space
        self._sampler = experiment.sampler
        self._round = round
        self._overwrite = overwrite
        self._own = experiment.own
        self._step = 0
        self._losses = torch.zeros(space.n, dtype=space.dtype, device=space.device)

    def gradient(self, x: Tensor) -> Tensor:
        """Compute as `Local` says."""
        result, losses = self._kernel.gradient(self._space, x, self._draw(1)[:, 0])
        self._losses += losses
        return result

    def steps(
        self, x: Tensor, *, correction: Tensor | None = None, prox: float = 0.0, anchor: Tensor | None = None,
        momentum: Tensor | None = None, beta: float = 0.0, nesterov: bool = False, out: Tensor | None = None,
    ) -> Steps:  # fmt: skip
        """Compute as `Local` says."""
        target = out if self._overwrite else None
        if momentum is not None and not self._overwrite:
            momentum = momentum.clone()
        pulls = Pulls(correction, prox, anchor, momentum, beta, nesterov, self._own)
        steps = self._kernel.steps(self._space, x, self._draw(self.count), self.lr, pulls, target)
        self._losses += steps.loss * self.count
        return steps

    def loss(self, working: Tensor | None) -> Tensor:
        """Return the mean of each peer's losses, [n]."""
        mean = self._losses / self._step if self._step else torch.full_like(self._losses, torch.nan)
        return mean if working is None else torch.where(working, mean, torch.nan)

    def _draw(self, steps: int) -> Tensor:
        chosen = self._sampler.draw(self._round, self._step, steps).to(self._space.device)
        self._step += steps
        return chosen


def _unused(request: Request, state: State, space: Space) -> list[Tensor]:
    """Return the flat tensors of a request, now mixed, that are not part of the state."""
    used = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    found = {}
    for vector in request.vectors:
        place = vector.untyped_storage().data_ptr()
        if place not in used and vector.numel() == space.n * space.stored and vector.dtype == space.dtype:
            found[place] = vector
    return list(found.values())


def _frozen(before: State, after: State, working: Tensor, space: Space) -> State:
    """Return the state after the round for the peers that took part, and before it for all others."""
    frozen = {}
    for name, tensor in after.items():
        if tensor.shape == working.shape:
            frozen[name] = torch.where(working, tensor, before[name])
        else:
            frozen[name] = space.where(working, tensor, before[name])
    return frozen


def _moved(examples: Examples, device: torch.device) -> Examples:
    return Examples(examples.inputs.to(device), examples.targets.to(device))


def _sample(peers: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived(seed, "evaluated peers"))
    return torch.randperm(peers, generator=generator)[:count].sort().values


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed what modules draw from without a generator of their own, on the CPU and on the device."""
    with seeded(seed), torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def _verify(experiment: Experiment, space: Space) -> None:
    if experiment.peers < 1 or experiment.variants < 1 or experiment.peers % experiment.variants:
        raise InvalidConfig(f"{experiment.peers} peers do not fall into {experiment.variants} equal variants")
    shape = list(experiment.initial.shape)
    if shape not in ([space.size], [space.n, space.size]):
        raise InvalidConfig(
            f"initial models of shape {shape} for {space.n} peers with {space.size} parameters; give [P] or [n, P]"
        )
    if not 0 <= experiment.judged <= experiment.peers // experiment.variants:
        raise InvalidConfig(f"{experiment.judged} peers of each variant are to be evaluated, more than there are")
    if experiment.own is not None and experiment.working is not None:
        raise InvalidConfig(
            "peers are away now and then, and the task's optimizer remembers how many steps it made; set "
            'training.learning_rate for plain SGD, or take the engine "simnet"'
        )
    if experiment.local_steps < 1:
        raise InvalidConfig(f"local_steps is {experiment.local_steps}; it must be at least 1")
