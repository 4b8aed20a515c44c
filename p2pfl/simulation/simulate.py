"""Runs a scenario on the dense engine: from settings to curves.

The seeds of a scenario run side by side, each as if it were alone: what a seed gives does not depend on the others.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_type_hints

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl import __version__
from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.crypto.ring import MAX_CLIPPED, WEIGHT_ONE, Ring
from p2pfl.gossip.graphs import parse
from p2pfl.gossip.schedule import Schedule
from p2pfl.gossip.schedule import schedule as make_schedule
from p2pfl.learning.algorithms import ALGORITHMS, Algorithm
from p2pfl.learning.partition import dirichlet, iid
from p2pfl.learning.space import Request, Space
from p2pfl.learning.task import Data, Examples, Task, blame, load_task, make_model, read_data
from p2pfl.learning.vector import initial
from p2pfl.node.store import read_text
from p2pfl.simulation.costs import Bill
from p2pfl.simulation.dense.engine import Engine, Exchange, Experiment, Mixing, RoundMetrics
from p2pfl.simulation.dense.evaluation import Evaluation
from p2pfl.simulation.dense.sampling import Shares, Uniform, derived
from p2pfl.simulation.dense.variants import Each, SideBySide
from p2pfl.simulation.presence import Presence, Present
from p2pfl.simulation.runs import Run, is_complete, less_is_better, open_simulated, save
from p2pfl.simulation.scenario import NO_ALGORITHMS, Averaging, Scenario

GROUPED = frozenset({"groups", "moshpit", "random-matching", "stars"})
"""Topologies whose rounds are groups in which all average with all."""

MASKED_BITS = 32

Watch = Callable[[int, int], None]
"""Is told how many rounds of how many are complete."""


def simulate(
    scenario: Scenario, folder: Path | None = None, *, device: str = "cpu", watch: Watch | None = None,
    again: bool = False,
) -> Run:  # fmt: skip
    """Run a scenario.

    Args:
        scenario: what to run.
        folder: where the folder of the run goes, under a name of the scenario's name and hash; a run that is complete
            there is read, not run again. None: nothing is written.
        device: of torch, such as cuda.
        watch: is told of each round.
        again: run even if there is such a run.

    Raises:
        InvalidConfig: something in the scenario cannot be run.
        RoundFailed: masked values left their range, or the task failed.
    """
    path = None if folder is None else folder / scenario.folder
    if path is not None and is_complete(path) and not again:
        return open_simulated(path)
    run = _Running(scenario, torch.device(device)).finish(watch)
    return run if path is None else save(run, path)


class _Seed:
    """What belongs to one seed: its part of the experiment, its cost, and its curve so far."""

    def __init__(self, scenario: Scenario, number: int, parts: "_Parts") -> None:
        faults, terms = scenario.faults, scenario.averaging
        self.number = number
        self.presence = Presence(
            scenario.peers, number, participation=scenario.participation, missed=faults.missed, leave=faults.leave,
            rejoin=faults.rejoin,
        )  # fmt: skip
        grouped = terms.topology in GROUPED
        drawn = parts.schedule(derived(number, "topology", terms.topology_seed) % 2**31)
        self.schedule = Present(drawn, self.presence, grouped, column="column" in (drawn.kind, parts.algorithm.needs))
        self.sampler = Uniform(parts.shares(number), scenario.training.batch_size, derived(number, "minibatches"))
        self.bill = Bill(scenario.cost, self.schedule, grouped=grouped, steps=parts.steps)
        self.rows: list[dict[str, float]] = []
        self.peers: list[pd.DataFrame] = []
        self.stop = _Stop(scenario)
        self.outcome = ""


class _Running:
    """A run under way."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self._scenario = scenario
        self._parts = parts = _Parts(scenario)
        self._seeds = [_Seed(scenario, number, parts) for number in scenario.seeds]
        rounds, times = scenario.training.rounds, scenario.evaluation.times
        self._evaluated = {int(number) for number in np.linspace(0, rounds, min(times, rounds + 1)).round()}
        presence = [seed.presence for seed in self._seeds]
        self._exchange = _Counted(_exchange(scenario, [seed.schedule for seed in self._seeds]))
        self._sampled = min(scenario.evaluation.peers, scenario.peers)
        start = torch.from_numpy(np.stack([initial(parts.task, number) for number in scenario.seeds]))
        self._engine = Engine(
            Experiment(
                task=parts.task,
                pool=parts.data.train,
                test=parts.data.test,
                sampler=Each([seed.sampler for seed in self._seeds]),
                exchange=self._exchange,
                algorithm=parts.algorithm,
                initial=start.repeat_interleave(scenario.peers, dim=0) if len(start) > 1 else start[0],
                peers=scenario.peers * len(self._seeds),
                local_steps=parts.steps,
                lr=lambda _: parts.lr,
                rounds=rounds,
                seed=scenario.seeds[0],
                evaluated=lambda number: number + 1 in self._evaluated,
                sampled=self._sampled,
                variants=len(self._seeds),
                working=None if all(each.complete for each in presence) else lambda number: torch.from_numpy(
                    np.concatenate([each.working(number) for each in presence])
                ),
                device=device,
            )
        )  # fmt: skip
        self._device = device

    def finish(self, watch: Watch | None) -> Run:
        began, rounds, engine = time.perf_counter(), self._scenario.training.rounds, self._engine
        nothing = torch.full((engine.space.n,), math.nan)
        self._record(RoundMetrics(-1, nothing, engine.evaluate()))
        while engine.round < rounds and any(not seed.outcome for seed in self._seeds):
            self._record(engine.step())
            if watch is not None:
                watch(engine.round, rounds)
        for seed in self._seeds:
            seed.outcome = seed.outcome or "done"
        return self._result(time.perf_counter() - began)

    def _record(self, metrics: RoundMetrics) -> None:
        """Add a round to each seed's curve that has not ended."""
        n = self._scenario.peers
        losses = metrics.loss.double().cpu().numpy()
        for place, seed in enumerate(self._seeds):
            if seed.outcome:
                continue
            own = losses[place * n : (place + 1) * n]
            if metrics.round >= 0:
                seed.bill.add(metrics.round, self._exchange.values)
            known = own[~np.isnan(own)]
            row: dict[str, float] = {
                "seed": seed.number,
                "round": metrics.round + 1,
                "train_loss": float(known.mean()) if len(known) else math.nan,
                "working": int(seed.presence.working(metrics.round).sum()) if metrics.round >= 0 else n,
                "modelled_bytes": seed.bill.bytes,
                "modelled_seconds": seed.bill.seconds,
            }
            if metrics.evaluations:
                evaluation = metrics.evaluations[place]
                row |= {"consensus": evaluation.consensus} | evaluation.mean
                row |= {f"peer_{name}": float(values.mean()) for name, values in evaluation.peers.items()}
                seed.peers.append(self._each(seed.number, metrics.round + 1, own, evaluation))
                seed.outcome = seed.stop.now(row)
            if metrics.round >= 0 and not all(map(math.isfinite, _health(row))):
                seed.outcome = "diverged"
            seed.rows.append(row)

    def _each(self, seed: int, round: int, losses: NDArray[np.float64], evaluation: Evaluation) -> pd.DataFrame:
        n = len(losses)
        columns: dict[str, Any] = {
            "seed": np.full(n, seed), "round": np.full(n, round), "peer": np.arange(n), "train_loss": losses,
        }  # fmt: skip
        for name, values in evaluation.peers.items():
            columns[name] = np.full(n, math.nan)
            columns[name][self._engine.sample.numpy()] = values.numpy()
        return pd.DataFrame(columns)

    def _result(self, seconds: float) -> Run:
        scenario, parts = self._scenario, self._parts
        frame = pd.DataFrame([row for seed in self._seeds for row in seed.rows])
        peers = pd.concat([one for seed in self._seeds for one in seed.peers], ignore_index=True)
        metric = parts.metric
        seeds = [_final(seed, peers, metric) for seed in self._seeds]
        summary = {
            "name": scenario.name,
            "hash": scenario.hash(),
            "version": __version__,
            "engine": "dense",
            "tier": self._engine.tier,
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seconds": round(seconds, 3),
            "peers": scenario.peers,
            "parameters": self._engine.space.size,
            "local_steps": parts.steps,
            "learning_rate": parts.lr,
            "topology": scenario.averaging.topology,
            "algorithm": scenario.training.algorithm,
            "masks": scenario.averaging.masks,
            "metric": metric,
            "final": {key: _spread([seed["final"][key] for seed in seeds]) for key in seeds[0]["final"]},
            "seeds": seeds,
        }
        return Run(scenario, summary, frame, peers)


def _health(row: Mapping[str, float]) -> list[float]:
    """Return what is finite unless the models are not, or their distances are beyond float32."""
    losses = [] if not row["working"] else [row["train_loss"]]
    return [*losses, *(row[key] for key in ("loss", "consensus") if key in row)]


def _final(seed: _Seed, peers: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Return how a seed ended: its last row in which models were evaluated, and how its peers differ."""
    last = [row for row in seed.rows if "consensus" in row][-1]
    final = {key: value for key, value in last.items() if key not in ("seed", "round", "working", "train_loss")}
    if metric in peers:
        own = peers[(peers["seed"] == seed.number) & (peers["round"] == last["round"])][metric].dropna()
        if len(own):
            final["worst_peer"] = float(own.max() if less_is_better(metric) else own.min())
    return {
        "seed": seed.number,
        "outcome": seed.outcome,
        "rounds": seed.rows[-1]["round"],
        "final": {key: value if math.isfinite(value) else None for key, value in final.items()},
    }


def _spread(values: list[float | None]) -> dict[str, float | None]:
    """Return median and quartiles; of nothing, nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return {"median": None, "low": None, "high": None}
    low, median, high = np.percentile(known, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


class _Stop:
    """Decides when a seed's run ends early."""

    def __init__(self, scenario: Scenario) -> None:
        self._terms = scenario.stopping
        self._sign = -1.0 if less_is_better(self._terms.metric) else 1.0
        self._best, self._since = -math.inf, 0

    def now(self, row: Mapping[str, float]) -> str:
        """Return why to stop after an evaluation; nothing to go on.

        Raises:
            InvalidConfig: the metric is none of the task's.
        """
        terms = self._terms
        if not terms.metric:
            return ""
        if terms.metric not in row:
            known = [key for key in row if key not in _NO_METRICS]
            raise InvalidConfig(f"stopping.metric: {terms.metric!r} is not measured; there are {', '.join(known)}")
        value = self._sign * row[terms.metric]
        if terms.target is not None and value >= self._sign * terms.target:
            return "reached"
        if value > self._best + terms.improvement:
            self._best, self._since = value, 0
        else:
            self._since += 1
        return "stopped" if terms.patience and self._since >= terms.patience else ""


_NO_METRICS = ("seed", "round", "train_loss", "working", "modelled_bytes", "modelled_seconds")


class _Parts:
    """What all seeds of a scenario have in common.

    Raises:
        InvalidConfig: something in the scenario cannot be run.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self.task: Task = load_task(scenario.data.task, Path()).task
        self.data: Data = read_data(self.task, scenario.data.settings)
        self.lr = scenario.training.learning_rate or _learning_rate(self.task)
        self.algorithm = _algorithm(scenario)
        self.steps = _steps(scenario, len(self.data.train))
        # The first of the task's own: tasks put what they are judged by there.
        self.metric = next((name for name in _measured(self.task, self.data.test) if name != "loss"), "loss")

    def schedule(self, seed: int) -> Schedule:
        """Draw the topology.

        Raises:
            InvalidConfig: there is no such one for these peers or this algorithm.
        """
        terms, algorithm = self._scenario.averaging, self.algorithm
        drawn = make_schedule(terms.topology, self._scenario.peers, seed, **_options(terms, self._scenario.peers))
        if not algorithm.accepts(drawn.kind):
            raise InvalidConfig(
                f"{algorithm.name} needs mixing whose {_SUMS[algorithm.needs]} sum to 1, and {terms.topology} has "
                f"{_SUMS[drawn.kind]} that do; take another algorithm or topology"
            )
        if algorithm.static and drawn.period != 1:
            raise InvalidConfig(f"{algorithm.name} is for one matrix in all rounds, and {terms.topology} changes")
        return drawn

    def shares(self, seed: int) -> Shares:
        """Deal the examples.

        Raises:
            InvalidConfig: there are too few.
        """
        data, peers, train = self._scenario.data, self._scenario.peers, self.data.train
        drawn = derived(seed, "partition") % 2**32
        match data.partition:
            case "iid":
                return Shares.of(iid(len(train), peers, drawn))
            case "dirichlet":
                return Shares.of(dirichlet(train.targets.numpy(), peers, data.alpha, drawn))
            case "replacement":
                chosen = np.random.RandomState(drawn).randint(len(train), size=(peers, data.examples))
                starts = np.arange(peers) * data.examples
                return Shares(chosen.ravel().astype(np.int64), starts, np.full(peers, data.examples))


_SUMS = {"doubly": "rows and columns", "row": "rows", "column": "columns"}


def _options(terms: Averaging, peers: int) -> dict[str, object]:
    """Return what a topology is made with."""
    options = dict(terms.options)
    if terms.topology == "groups":
        options.setdefault("size", min(terms.group_size, peers))
    if terms.topology == "stars":
        options.setdefault("colluders", terms.colluders)
    if terms.topology == "graph":
        file = options.pop("file", None)
        if not isinstance(file, str):
            raise InvalidConfig("averaging.options: the topology graph needs file, a GraphML file or a list of links")
        options["graph"], _ = parse(read_text(Path(file), "a graph"), graphml=file.endswith(".graphml"))
    return options


def _algorithm(scenario: Scenario) -> Algorithm:
    """Make the algorithm with its options."""
    name, options = scenario.training.algorithm, scenario.training.options
    known = {key: kind for key, kind in ALGORITHMS.items() if key not in NO_ALGORITHMS}
    if name == "d-psgd":
        if options:
            raise InvalidConfig("training.options: d-psgd has none; local-sgd is the same and has some")
        name = "local-sgd"
    if name not in known:
        raise InvalidConfig(f"training.algorithm: {name!r} is unknown; there are d-psgd, {', '.join(known)}")
    kinds = get_type_hints(known[name])
    fields = [field.name for field in dataclasses.fields(cast(Any, known[name]))]
    for option, value in options.items():
        if option not in fields:
            raise InvalidConfig(f"training.options: {name} has no {option!r}; it has {', '.join(fields) or 'none'}")
        allowed = (int, float) if kinds[option] is float else kinds[option]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kinds[option] is not bool):
            raise InvalidConfig(f"training.options: {option} is a {kinds[option].__name__}, not {value!r}")
    return known[name](**options)


def _learning_rate(task: Task) -> float:
    """Return the learning rate of a task's own optimiser, which must be plain SGD."""
    with blame(task, "optimizer"):
        optimizer = task.optimizer(make_model(task).parameters())
    groups = optimizer.param_groups
    plain = type(optimizer) is torch.optim.SGD and len(groups) == 1
    if not plain or any(groups[0][key] for key in ("momentum", "weight_decay", "nesterov", "maximize")):
        raise InvalidConfig(
            f"{type(task).__name__}.optimizer is not plain SGD, which is what is simulated; "
            "set training.learning_rate, and momentum by training.algorithm"
        )
    return float(groups[0]["lr"])


def _steps(scenario: Scenario, examples: int) -> int:
    """Return how many local steps every peer makes in a round."""
    terms, data = scenario.training, scenario.data
    steps = terms.local_steps
    if terms.epochs:
        share = data.examples if data.partition == "replacement" else examples / scenario.peers
        steps = max(1, math.ceil(terms.epochs * share / terms.batch_size))
    if terms.window:
        steps = min(steps, math.ceil(terms.window / scenario.cost.step_seconds))
    return steps


def _measured(task: Task, test: Examples) -> list[str]:
    """Return what a task measures, by name."""
    with blame(task, "metrics"), torch.no_grad():
        return list(task.metrics(make_model(task).eval()(test.inputs), test.targets))


def _exchange(scenario: Scenario, schedules: list[Present]) -> Exchange:
    mixing = Mixing(SideBySide(schedules))
    if scenario.averaging.masks == "off":
        return mixing
    groups = max(1, scenario.peers // scenario.averaging.group_size)
    return Masked(mixing, Ring(MASKED_BITS, -(-scenario.peers // groups), scenario.averaging.clip))


class Masked:
    """An exchange of what masked sums represent: values rounded to the ring's fixed point, and cut off at its clip.

    Sums are computed in float32, whose 24 bits round more than the ring's 31 where values are not small.
    """

    def __init__(self, mixing: Exchange, ring: Ring) -> None:
        self._mixing, self._ring = mixing, ring

    def __call__(self, round: int, request: Request, space: Space, spare: list[Tensor]) -> Request:
        """Exchange as `Exchange` says.

        Raises:
            RoundFailed: more values are clipped than real peers bear.
        """
        vectors = tuple(self._rounded(vector) for vector in request.vectors)
        return self._mixing(round, dataclasses.replace(request, vectors=vectors), space, spare)

    def _rounded(self, vector: Tensor) -> Tensor:
        factor, largest = float(self._ring.factor(WEIGHT_ONE)), float(self._ring.largest)
        words = torch.round(vector * factor)
        clipped = int((words.abs() > largest).sum())
        if clipped > MAX_CLIPPED * len(vector):
            raise RoundFailed(
                f"{clipped} of {len(vector)} values are beyond averaging.clip = {self._ring.clip:g}; raise it"
            )
        return words.clamp_(-largest, largest).div_(factor)


class _Counted:
    """An exchange that counts what each peer mixes.

    Attributes:
        values: numbers of one peer in the latest round.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.values = 0

    def __call__(self, round: int, request: Request, space: Space, spare: list[Tensor]) -> Request:
        """Exchange as `Exchange` says."""
        self.values = len(request.vectors) * space.size + len(request.scalars)
        return self._exchange(round, request, space, spare)
