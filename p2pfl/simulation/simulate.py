"""Runs a scenario: from settings to curves.

On the dense engine the seeds of a scenario run side by side, each as if it were alone: what a seed gives does not
depend on the others. With real peers' machines (`p2pfl.simulation.peers_engine`) they run one after the other.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from p2pfl import __version__
from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import make_model
from p2pfl.learning.vector import initial, layout
from p2pfl.simulation.asynchronous import run_asynchronous, verify_asynchronous
from p2pfl.simulation.charter_terms import verify_peers
from p2pfl.simulation.curves import Curve, StoppingRule, backdoor_of
from p2pfl.simulation.dense.engine import Engine, Experiment, RoundMetrics
from p2pfl.simulation.dense.evaluation import Evaluation
from p2pfl.simulation.dense.kernels import OwnOptimizer
from p2pfl.simulation.dense.sampling import derived, sampler_of
from p2pfl.simulation.dense.variants import Each
from p2pfl.simulation.exchanges import Relabelled
from p2pfl.simulation.mixed import GROUPED, Mixed
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.peers_engine import run_peers
from p2pfl.simulation.presence import Presence, Present
from p2pfl.simulation.runs import Run, is_complete, less_is_better, open_simulated, save
from p2pfl.simulation.scenario import Scenario

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
    if scenario.engine == "simnet":
        if device != "cpu":
            raise InvalidConfig(f"device {device}: real peers' trainers run on the CPU; take cpu, or the engine dense")
        run = _by_peers(scenario, watch)
    else:
        run = _Running(scenario, usable(device)).finish(watch)
    return run if path is None else save(run, path)


def usable(name: str) -> torch.device:
    """Return a device of torch, once it has computed something.

    Raises:
        InvalidConfig: there is no such device, or none here.
    """
    try:
        device = torch.device(name)
        torch.ones(1).to(device).item()
    except (RuntimeError, AssertionError) as error:  # builds of torch without CUDA assert that they have it
        reason = str(error).splitlines()[0]
        raise InvalidConfig(
            f"device {name}: torch cannot compute there: {reason}; install a build of torch that can, or take cpu"
        ) from error
    return device


def _by_peers(scenario: Scenario, watch: Watch | None) -> Run:
    alone = scenario.training.algorithm == "ad-psgd"
    (verify_asynchronous if alone else verify_peers)(scenario)
    began, parts, rounds = time.perf_counter(), Parts(scenario), scenario.training.rounds
    curves: list[Curve] = []

    def tell(complete: int) -> None:
        if watch is not None:
            watch(len(curves) * rounds + complete, len(scenario.seeds) * rounds)

    for number in scenario.seeds:
        run = run_asynchronous if alone else run_peers
        curves.append(run(scenario, parts, number, _evaluated(scenario), tell))
    size = sum(math.prod(shape) for shape in layout(make_model(parts.task)).shapes)
    engine = {"engine": "simnet", "tier": "pairs" if alone else "peers", "device": "cpu"}
    return _result(scenario, parts, curves, engine, size, time.perf_counter() - began)


def _evaluated(scenario: Scenario) -> set[int]:
    """Return after how many rounds models are evaluated."""
    rounds, times = scenario.training.rounds, scenario.evaluation.times
    return {int(number) for number in np.linspace(0, rounds, min(times, rounds + 1)).round()}


class _Seed:
    """What belongs to one seed: its part of the experiment, its cost, and its curve so far."""

    def __init__(self, scenario: Scenario, number: int, parts: Parts) -> None:
        faults, terms = scenario.faults, scenario.averaging
        self.curve = Curve(number, StoppingRule(scenario.stopping))
        self.presence = Presence(
            scenario.peers, number, participation=scenario.participation, missed=faults.missed, leave=faults.leave,
            rejoin=faults.rejoin, parts=faults.parts, split=faults.split, heal=faults.heal,
        )  # fmt: skip
        grouped = terms.topology in GROUPED
        drawn = parts.schedule(derived(number, "topology", terms.topology_seed) % 2**31)
        column = "column" in (drawn.kind, parts.algorithm.needs)
        placed = Relabelled(drawn, parts.places(number)) if parts.attackers else drawn
        self.schedule = Present(placed, self.presence, grouped, column)
        self.sampler = sampler_of(parts.shares(number), scenario.training.batch_size, derived(number, "minibatches"))


class _Running:
    """A run under way."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self._scenario = scenario
        self._parts = parts = Parts(scenario)
        self._seeds = [_Seed(scenario, number, parts) for number in scenario.seeds]
        rounds = scenario.training.rounds
        self._evaluated = _evaluated(scenario)
        presence = [seed.presence for seed in self._seeds]
        start = torch.from_numpy(np.stack([initial(parts.task, number) for number in scenario.seeds]))
        mixed = Mixed(scenario, parts, [seed.schedule for seed in self._seeds])
        self._exchange = mixed.exchange(start.numpy())
        self._bills = [mixed.bill(seed.schedule) for seed in self._seeds]
        honest = scenario.peers - parts.attackers
        self._engine = Engine(
            Experiment(
                task=parts.task,
                pool=parts.pool,
                test=parts.data.test,
                sampler=Each([seed.sampler for seed in self._seeds]),
                exchange=self._exchange,
                algorithm=parts.algorithm,
                initial=start.repeat_interleave(scenario.peers, dim=0) if len(start) > 1 else start[0],
                peers=scenario.peers * len(self._seeds),
                local_steps=parts.steps,
                lr=lambda _: parts.lr,
                own=OwnOptimizer(parts.task) if parts.own else None,
                rounds=rounds,
                seed=scenario.seeds[0],
                evaluated=lambda number: number + 1 in self._evaluated,
                sampled=min(scenario.evaluation.peers, honest),
                variants=len(self._seeds),
                judged=honest,
                working=None if all(each.complete for each in presence) else lambda number: torch.from_numpy(
                    np.concatenate([each.working(number) for each in presence])
                ),
                device=device,
            )
        )  # fmt: skip
        self._device, self._honest = device, honest
        self._backdoor = backdoor_of(parts, self._engine.space.blocks, self._engine.space.device)

    def finish(self, watch: Watch | None) -> Run:
        began, rounds, engine = time.perf_counter(), self._scenario.training.rounds, self._engine
        nothing = torch.full((engine.space.n,), math.nan)
        self._record(RoundMetrics(-1, nothing, engine.evaluate()))
        while engine.round < rounds and any(not seed.curve.outcome for seed in self._seeds):
            self._record(engine.step())
            if watch is not None:
                watch(engine.round, rounds)
        seconds, space = time.perf_counter() - began, self._engine.space
        told = {"engine": "dense", "tier": self._engine.tier, "device": str(self._device)}
        return _result(self._scenario, self._parts, [seed.curve for seed in self._seeds], told, space.size, seconds)

    def _record(self, metrics: RoundMetrics) -> None:
        """Add a round to each seed's curve that has not ended."""
        n = self._scenario.peers
        losses = metrics.loss.double().cpu().numpy()
        for place, seed in enumerate(self._seeds):
            curve = seed.curve
            if curve.outcome:
                continue
            own, bill = losses[place * n : (place + 1) * n], self._bills[place]
            if metrics.round >= 0:
                bill.add(metrics.round, self._exchange.size)
            known = own[: self._honest][~np.isnan(own[: self._honest])]
            row: dict[str, float] = {
                "seed": curve.number,
                "round": metrics.round + 1,
                "train_loss": float(known.mean()) if len(known) else math.nan,
                "working": int(seed.presence.working(metrics.round).sum()) if metrics.round >= 0 else n,
                "modelled_bytes": bill.bytes,
                "modelled_seconds": bill.seconds,
            }
            if metrics.evaluations:
                evaluation = metrics.evaluations[place]
                row |= {"consensus": evaluation.consensus} | evaluation.mean
                row |= {f"peer_{name}": float(values.mean()) for name, values in evaluation.peers.items()}
                if self._backdoor is not None:
                    row |= self._backdoor.measure(*self._judged(place))
                curve.peers.append(self._each(curve.number, metrics.round + 1, own, evaluation))
            curve.add(row)
            if metrics.round >= 0 and not all(map(math.isfinite, _health(row))):
                curve.outcome = "diverged"

    def _judged(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a seed's mean model, [P], and its evaluated peers' own, [m, P]."""
        engine = self._engine
        space, x, part = engine.space, engine.state["x"], engine.parts[place]
        return space.mean(x, part), space.rows(x, engine.sample + part.start)

    def _each(self, seed: int, round: int, losses: NDArray[np.float64], evaluation: Evaluation) -> pd.DataFrame:
        n = len(losses)
        columns: dict[str, Any] = {
            "seed": np.full(n, seed), "round": np.full(n, round), "peer": np.arange(n), "train_loss": losses,
        }  # fmt: skip
        for name, values in evaluation.peers.items():
            columns[name] = np.full(n, math.nan)
            columns[name][self._engine.sample.numpy()] = values.numpy()
        return pd.DataFrame(columns)


def _result(
    scenario: Scenario, parts: Parts, curves: Sequence[Curve], engine: Mapping[str, str], size: int,
    seconds: float,
) -> Run:  # fmt: skip
    """Sum a run up.

    Args:
        scenario: what was run.
        parts: of it.
        curves: what each seed gave.
        engine: what ran it, for the summary.
        size: of a peer's vector.
        seconds: that it took.
    """
    frame = pd.DataFrame([row for seed in curves for row in seed.rows])
    peers = pd.concat([one for seed in curves for one in seed.peers], ignore_index=True)
    metric = parts.metric
    seeds = [_final(seed, peers, metric) for seed in curves]
    summary = {
        "name": scenario.name,
        "hash": scenario.hash(),
        "version": __version__,
        **engine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": round(seconds, 3),
        "peers": scenario.peers,
        "parameters": size,
        "local_steps": parts.steps,
        "learning_rate": parts.lr if math.isfinite(parts.lr) else None,
        "topology": scenario.averaging.topology,
        "algorithm": scenario.training.algorithm,
        "masks": scenario.averaging.masks,
        "compression": scenario.compression.name,
        "attack": scenario.attackers.attack,
        "attackers": parts.attackers,
        "defence": scenario.defence.rule,
        "metric": metric,
        "final": {key: _spread([seed["final"][key] for seed in seeds]) for key in seeds[0]["final"]},
        "seeds": seeds,
    }
    return Run(scenario, summary, frame, peers)


def _health(row: Mapping[str, float]) -> list[float]:
    """Return what is finite unless the models are not, or their distances are beyond float32."""
    losses = [] if not row["working"] else [row["train_loss"]]
    return [*losses, *(row[key] for key in ("loss", "consensus") if key in row)]


def _final(seed: Curve, peers: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Return how a seed ended: its last row in which models were evaluated, and how its peers differ."""
    last = [row for row in seed.rows if "consensus" in row][-1]
    final = {key: value for key, value in last.items() if key not in ("seed", "round", "working", "train_loss")}
    if metric in peers:
        own = peers[(peers["seed"] == seed.number) & (peers["round"] == last["round"])][metric].dropna()
        if len(own):
            final["worst_peer"] = float(own.max() if less_is_better(metric) else own.min())
    return {
        "seed": seed.number,
        "outcome": seed.outcome or "done",
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
