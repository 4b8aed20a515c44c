"""What a scenario is made of before it runs: task, data, algorithm and topology, checked against each other."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.compress import Identity, compressor
from p2pfl.gossip.graphs import parse
from p2pfl.gossip.schedule import Schedule
from p2pfl.gossip.schedule import schedule as make_schedule
from p2pfl.learning.algorithms import Algorithm, ChocoSgd, PartialSharing
from p2pfl.learning.algorithms.made import make_algorithm
from p2pfl.learning.chartered import learning_rate
from p2pfl.learning.evaluation import forward
from p2pfl.learning.partition import by_classes, by_quantity, dirichlet, iid
from p2pfl.learning.task import Data, Examples, Task, blame, load_task, make_model, read_data
from p2pfl.learning.vector import layout
from p2pfl.node.store import read_text
from p2pfl.simulation.attacks import ATTACKS, poisoned
from p2pfl.simulation.dense.sampling import Shares, derived
from p2pfl.simulation.exchanges import EachSeed
from p2pfl.simulation.noised import with_noise
from p2pfl.simulation.scenario import Averaging, Scenario


class Parts:
    """What all seeds of a scenario have in common.

    Attributes:
        task: what is trained.
        data: of all peers together.
        pool: the examples that shares lie in: the training part, and behind it what attackers made of theirs.
        lr: the learning rate; nan where the task's own optimizer has more than one.
        own: whether the task's own optimizer makes the local steps: it is not plain SGD, and the scenario sets no rate.
        steps: how many local steps every peer makes in a round.
        metric: what runs are judged by: the first of the task's own.
        algorithm: what peers do.
        shared: the places in a vector of what is shared, int64 [m]; None: all of it is.
        compress: how that is sent.
        attackers: how many peers attack, the last ones.
        attack: what they do; None if nobody attacks.
        strength: of that; nan where it has none.

    Raises:
        InvalidConfig: something in the scenario cannot be run.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self.task: Task = load_task(scenario.data.task, Path()).task
        self.data: Data = _read(self.task, scenario.data.settings)
        order = layout(make_model(self.task))
        terms, training = scenario.compression, scenario.training
        algorithm = make_algorithm(training.algorithm, training.options, ChocoSgd(Identity(), terms.gamma))
        stays = [isinstance(algorithm, PartialSharing) and algorithm.stays(name) for name in order.names]
        shapes = [shape for shape, own in zip(order.shapes, stays, strict=True) if not own]
        self.compress = compressor(terms.name, shapes, **terms.model_dump(exclude={"name"}))
        self.shared: NDArray[np.int64] | None = None
        if any(stays):
            sizes = [math.prod(shape) for shape in order.shapes]
            self.shared = np.flatnonzero(np.repeat(np.logical_not(stays), sizes))
        if isinstance(algorithm, ChocoSgd):
            algorithm = dataclasses.replace(algorithm, compress=EachSeed(self.compress, scenario.seeds))
        rate = training.learning_rate
        self.lr, self.own = (rate, False) if rate else _rate(algorithm, self.task)
        self.algorithm = with_noise(algorithm, scenario)
        self.attackers = scenario.attackers.among(scenario.peers)
        self.attack = ATTACKS[scenario.attackers.attack] if self.attackers else None
        default, given = math.nan if self.attack is None else self.attack.strength, scenario.attackers.strength
        self.strength = default if given is None else given
        self.pool = self.data.train
        self.steps = _steps(scenario, len(self.data.train))
        # Tasks put what they are judged by first.
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

    def places(self, seed: int) -> NDArray[np.int64]:
        """Return each peer's place in the topology, int64 [n]: its number, but drawn where some attack."""
        peers = self._scenario.peers
        if not self.attackers:
            return np.arange(peers)
        return np.random.RandomState(derived(seed, "attackers") % 2**32).permutation(peers)

    def shares(self, seed: int) -> Shares:
        """Deal the examples. What attackers have is poisoned, if they do that, and put into the pool.

        Raises:
            InvalidConfig: there are too few, or they cannot be poisoned.
        """
        dealt = self._dealt(seed)
        if self.attack is None or self.attack.poison is None:
            return dealt
        order, starts, first = dealt.order.copy(), dealt.starts, len(self.pool)
        false = []
        for peer in range(len(dealt) - self.attackers, len(dealt)):
            part = slice(starts[peer], starts[peer] + dealt.counts[peer])
            drawn = derived(seed, "poison", peer)
            false.append(poisoned(self.attack, self.data.train, order[part], drawn))
            order[part] = first + np.arange(dealt.counts[peer])
            first += int(dealt.counts[peer])
        everything = [self.pool, *false]
        self.pool = Examples(
            torch.cat([each.inputs for each in everything]), torch.cat([each.targets for each in everything])
        )
        return Shares(order, starts, dealt.counts)

    def _dealt(self, seed: int) -> Shares:
        data, peers, train = self._scenario.data, self._scenario.peers, self.data.train
        drawn = derived(seed, "partition") % 2**32
        if data.partition in ("dirichlet", "classes") and train.targets.ndim != 1:
            raise InvalidConfig(
                f'data.partition is {data.partition}, and {data.task} has no classes; take "order" or "iid"'
            )
        match data.partition:
            case "iid":
                return Shares.of(iid(len(train), peers, drawn))
            case "dirichlet":
                return Shares.of(dirichlet(train.targets.numpy(), peers, data.alpha, drawn))
            case "classes":
                return Shares.of(by_classes(train.targets.numpy(), peers, data.classes, drawn))
            case "quantity":
                return Shares.of(by_quantity(len(train), peers, data.alpha, drawn))
            case "order":
                return Shares.of(np.array_split(np.arange(len(train)), peers))
            case "replacement":
                chosen = np.random.RandomState(drawn).randint(len(train), size=(peers, data.examples))
                starts = np.arange(peers) * data.examples
                return Shares(chosen.ravel().astype(np.int64), starts, np.full(peers, data.examples))


_SUMS = {"doubly": "rows and columns", "row": "rows", "column": "columns"}


def _read(task: Task, settings: Mapping[str, object]) -> Data:
    """Read a task's data; what a peer.toml has in [data] is elsewhere in a scenario."""
    try:
        return read_data(task, settings)
    except InvalidConfig as error:
        raise InvalidConfig(str(error).replace("[data]", "[data.settings]")) from error


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
        options["graph"] = _graph(Path(file))
    return options


def _graph(path: Path) -> nx.Graph | nx.DiGraph:
    """Read a graph's file; there are as many nodes as peers, which the schedule checks."""
    text = read_text(path, "a graph")
    try:
        graph, _ = parse(text, graphml=path.suffix.lower() == ".graphml", most=None, directed=True)
    except InvalidConfig as error:
        raise InvalidConfig(f"{path}: {error}") from error
    return graph


def _rate(algorithm: Algorithm, task: Task) -> tuple[float, bool]:
    """Return the learning rate of the task's optimizer, and whether that is another than plain SGD.

    Raises:
        InvalidConfig: it is, and the algorithm computes with the learning rate.
    """
    try:
        return learning_rate(task), False
    except InvalidConfig:
        if algorithm.plain:
            raise
    with blame(task, "optimizer"):
        groups = task.optimizer(make_model(task).parameters()).param_groups
    rates = {float(group["lr"]) for group in groups}
    return (rates.pop() if len(rates) == 1 else math.nan), True


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
        return list(task.metrics(forward(make_model(task), test.inputs), test.targets))
