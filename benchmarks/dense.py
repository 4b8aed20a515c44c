"""How long a round of the dense engine takes, beside a loop over torch modules and, where it is installed, gossipy.

    python benchmarks/dense.py [--peers 16,100,1000,4000,10000] [--repeats 5] [--threads 1]

The digits network (64-64-10), and a small convolutional network; 2 local steps of 32 examples, then mixing on a ring;
each peer has 64 examples. Times are of the processor, in all threads, and the fastest of many rounds: neighbors on the
machine disturb that least. Ratios are between rounds of the same turn. The loop has a module and an optimiser for each
peer and does the same work; it is timed for up to 1000 peers. `pip install gossipy-dfl torchvision` adds gossipy, in
which each peer trains when a model arrives: as many steps in a round, and one model received in the place of two. The
memory is the most that the process has held after the largest run, torch itself included.
"""

import argparse
import contextlib
import importlib
import io
import json
import logging
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.learning.algorithms import LocalSgd
from p2pfl.learning.task import Task
from p2pfl.learning.tasks.digits import Digits
from p2pfl.learning.vector import assign, initial
from p2pfl.simulation.dense.engine import Engine, Experiment, Mixing
from p2pfl.simulation.dense.sampling import Shares, Uniform

PEERS = (16, 100, 1000, 4000, 10_000)
STEPS, BATCH, SHARE, RATE = 2, 32, 64, 0.1
MOST_LOOPED = 1000
BURST = 0.2
"""Seconds for which one way's rounds are timed before the next has its turn."""
FEWEST_FITTED = 100
"""Peers from which on time is fitted: with fewer, it is mostly overhead, which would flatter the exponent."""
COMPARED = (100, 1000)
LEAST = {"fused": 20.0, "cnn": 6.0, "vmap": 4.0}
MOST_EXPONENT, MOST_MEMORY = 1.05, 2e9

Round = Callable[[], object]
Way = tuple[str, str, int]
"""A network, a way to run it, and how many peers."""


class Convolutions(Digits):
    """Digits by two convolutions and two linear layers, 5970 parameters."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        )


@dataclass(frozen=True)
class Ring:
    """Each peer averages with its next and its previous, in every round."""

    indices: np.ndarray[Any, np.dtype[np.int64]]
    weights: np.ndarray[Any, np.dtype[np.float64]]
    period = 1

    def at(self, round: int) -> "Ring":
        del round
        return self


def ring(n: int) -> Ring:
    indices = (np.arange(n)[:, None] + np.array([-1, 0, 1])) % n
    return Ring(indices, np.full(indices.shape, 1 / 3))


def shares(task: Task, n: int) -> Shares:
    """Give each peer examples drawn with replacement, so that any number of peers has enough."""
    count = len(task.data({}).train)
    return Shares.of(list(np.random.default_rng(0).integers(0, count, (n, SHARE))))


def dense(task: Task, n: int, tier: str) -> Round:
    """Return a function that runs a round of the dense engine."""
    data = task.data({})
    experiment = Experiment(
        task, data.train, data.test, Uniform(shares(task, n), BATCH, 0), Mixing(ring(n)), LocalSgd(),
        torch.from_numpy(initial(task, 0)), n, STEPS, lambda _: RATE, 1, evaluated=lambda _: False, tier=tier,
    )  # fmt: skip
    return Engine(experiment).step


def loop(task: Task, n: int) -> Round:
    """Return a function that runs the same round over a module and an optimiser for each peer."""
    train, start, neighbors = task.data({}).train, initial(task, 0), ring(n).indices.tolist()
    sampler = Uniform(shares(task, n), BATCH, 0)
    models = [task.model() for _ in range(n)]
    for model in models:
        assign(model, start)
    optimizers = [torch.optim.SGD(model.parameters(), lr=RATE) for model in models]

    def round() -> None:
        for model, optimizer, batches in zip(models, optimizers, sampler.draw(0, 0, STEPS), strict=True):
            for batch in batches:
                optimizer.zero_grad()
                task.loss(model(train.inputs[batch]), train.targets[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            sent = [[parameter.clone() for parameter in model.parameters()] for model in models]
            for model, nearby in zip(models, neighbors, strict=True):
                for i, parameter in enumerate(model.parameters()):
                    parameter.copy_(sum(sent[other][i] for other in nearby) / len(nearby))

    return round


def gossipy(task: Task, n: int) -> Round:
    """Return a function that runs a round of gossipy, of ten of its time steps."""
    from gossipy.core import AntiEntropyProtocol, CreateModelMode, StaticP2PNetwork  # noqa: PLC0415 - optional
    from gossipy.data import DataDispatcher  # noqa: PLC0415
    from gossipy.data.handler import ClassificationDataHandler  # noqa: PLC0415
    from gossipy.model import TorchModel  # noqa: PLC0415
    from gossipy.model.handler import TorchModelHandler  # noqa: PLC0415
    from gossipy.node import GossipNode  # noqa: PLC0415
    from gossipy.simul import GossipSimulator  # noqa: PLC0415

    logging.getLogger("rich").setLevel(logging.ERROR)

    class Net(TorchModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = task.model()

        def init_weights(self, *arguments: object, **named: object) -> None:
            """Keep them as they are."""

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)  # type: ignore[no-any-return]

        def __repr__(self) -> str:
            return "Net"

    train = task.data({}).train
    chosen = shares(task, n).order
    handler = ClassificationDataHandler(train.inputs[chosen], train.targets[chosen], test_size=0)
    dispatcher = DataDispatcher(handler, n=n, eval_on_user=False, auto_assign=False)
    dispatcher.set_assignments([range(i * SHARE, (i + 1) * SHARE) for i in range(n)], [[] for _ in range(n)])
    links = np.zeros((n, n))
    for i, row in enumerate(ring(n).indices):
        links[i, row] = 1
    np.fill_diagonal(links, 0)
    model = TorchModelHandler(
        Net(), torch.optim.SGD, {"lr": RATE}, nn.CrossEntropyLoss(), local_epochs=1, batch_size=BATCH,
        create_model_mode=CreateModelMode.MERGE_UPDATE,
    )  # fmt: skip
    nodes = GossipNode.generate(dispatcher, StaticP2PNetwork(n, links), model, round_len=10, sync=True)
    simulator = GossipSimulator(nodes, dispatcher, 10, AntiEntropyProtocol.PUSH)
    simulator.init_nodes(0)

    def round() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it draws a progress bar
            simulator.start(1)

    return round


def measure(ways: Mapping[Way, Round], repeats: int) -> dict[Way, list[float]]:
    """Time the ways in turn: the fastest round of each turn, in seconds."""
    times: dict[Way, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, round in ways.items():
            round()  # brings its numbers back into the caches
            found, until = [], time.process_time() + BURST
            while not found or time.process_time() < until:
                began = time.process_time()
                round()
                found.append(time.process_time() - began)
            times[way].append(min(found))
    return times


def times_faster(times: Mapping[Way, list[float]], way: Way, other: Way) -> float:
    """Return how many times as long the other way takes: the median over the turns, nan if one was not measured.

    Within a turn the two are seconds apart, between turns a shared machine may have become twice as slow.
    """
    pairs = zip(times.get(way, []), times.get(other, []), strict=False)
    return statistics.median([slow / fast for fast, slow in pairs] or [math.nan])


def exponent(times: Mapping[Way, list[float]]) -> float:
    """Fit log(seconds) over log(peers), 1 is linear: the median over the turns, nan for a single number of peers."""
    fitted = [way for way in times if way[:2] == ("mlp", "fused") and way[2] >= FEWEST_FITTED]
    if len(fitted) < 2:
        return math.nan
    peers = np.log([way[2] for way in fitted])
    turns = zip(*(times[way] for way in fitted), strict=True)
    return statistics.median(float(np.polyfit(peers, np.log(turn), 1)[0]) for turn in turns)


def most_memory() -> int:
    """Return the most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def judged(value: float, target: float, met: bool) -> dict[str, float | bool | None]:
    """Return a figure beside its target; one that was not measured is null, and not met."""
    return {"value": None if math.isnan(value) else round(value, 3), "target": target, "met": met}


def not_importable(module: str) -> str:
    """Return why a module cannot be imported; nothing if it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return ""


def ways_for(n: int, with_gossipy: bool) -> dict[Way, Round]:
    """Return what is measured with so many peers."""
    mlp, cnn = Digits(), Convolutions()
    ways: dict[Way, Round] = {("mlp", "fused", n): dense(mlp, n, "fused")}
    if n in COMPARED:
        ways |= {("mlp", tier, n): dense(mlp, n, tier) for tier in ("stacked", "vmap")}
    if n <= MOST_LOOPED:
        ways["mlp", "loop", n] = loop(mlp, n)
        if with_gossipy:
            ways["mlp", "gossipy", n] = gossipy(mlp, n)
    if n == COMPARED[0]:
        ways |= {("cnn", tier, n): dense(cnn, n, tier) for tier in ("stacked", "vmap")}
        ways["cnn", "loop", n] = loop(cnn, n)
    return ways


def show(times: Mapping[Way, list[float]]) -> None:
    """Print the table."""
    print("\nnetwork way       peers   ms a round   us a peer-step   x loop")
    for way, turns in times.items():
        network, name, n = way
        best, faster = min(turns), times_faster(times, way, (network, "loop", n))
        print(
            f"{network:<7} {name:<8} {n:>6} {1e3 * best:>12.2f} {1e6 * best / (n * STEPS):>16.1f}"
            f" {'' if math.isnan(faster) else f'{faster:.1f}':>8}"
        )


def main() -> None:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(map(str, PEERS)), help="numbers of peers")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each kind")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = sorted({int(n) for n in arguments.peers.split(",")})
    missing = not_importable("gossipy.simul")
    print(f"{os.cpu_count()} cores, {arguments.threads} threads, torch {torch.__version__}, processor time")
    if missing:
        print(f"gossipy is left out ({missing}): pip install gossipy-dfl torchvision adds it")

    largest = dense(Digits(), sizes[-1], "fused")
    for _ in range(2):
        largest()
    memory = most_memory()
    del largest
    ways: dict[Way, Round] = {}
    for n in sizes:
        ways |= ways_for(n, not missing)
    times = measure(ways, arguments.repeats)
    show(times)

    def least(network: str, way: str) -> float:
        ratios = [times_faster(times, (network, way, n), (network, "loop", n)) for n in COMPARED]
        return min((ratio for ratio in ratios if not math.isnan(ratio)), default=math.nan)

    power = exponent(times)
    speeds = {"fused": least("mlp", "fused"), "cnn": least("cnn", "stacked"), "vmap": least("mlp", "vmap")}
    targets = {f"{name}_times_loop": judged(value, LEAST[name], value >= LEAST[name]) for name, value in speeds.items()}
    targets["exponent"] = judged(power, MOST_EXPONENT, power <= MOST_EXPONENT)
    targets["bytes"] = judged(memory, MOST_MEMORY, memory < MOST_MEMORY)
    print(f"\ntime grows with peers to the power {power:.3f}; {memory / 1e9:.2f} GB at most with {sizes[-1]} peers")
    figures = {f"{network}_{way}_{n}_seconds": round(min(times[network, way, n]), 5) for network, way, n in times}
    print(json.dumps({"benchmark": "dense", "figures": figures | {"bytes": memory}, "targets": targets}))


if __name__ == "__main__":
    main()
