"""What a run is compared with, kept in its folder: each peer alone, one model on everybody's data, one without noise.

Owns `baselines.json`. It is computed once for a charter, the peers' data tables and their seeds.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.learning.baselines import Training, alone, averaged, central
from p2pfl.learning.task import Data, make_model, read_data
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import Vector, flatten, load_model
from p2pfl.node.store import write_atomic
from p2pfl.simulation.results import PeerRun, Run

BASELINES_FILE = "baselines.json"
MOST_POINTS = 60
"""Points of a curve that are kept: what a plot 1200 pixels wide shows apart."""

Curve = dict[int, dict[str, float]]
"""Metrics by the number of rounds before; empty where training failed."""


@dataclass(frozen=True)
class Share:
    """What one peer's data is, and how far it gets alone.

    Attributes:
        examples: how many it trains on.
        classes: how many classes they are of; None where targets are no class numbers.
        curve: its metrics when it trains alone.
    """

    examples: int
    classes: int | None
    curve: Curve


@dataclass(frozen=True)
class Baselines:
    """What a federation is compared with.

    Attributes:
        shares: by peer.
        central: the curve of one model on all data; empty for a single member.
        classes: how many classes all data is of, if it is of classes.
        missing: why there are none, in one line.
        noiseless: the curve of the same federation, all in one group, without noise; empty where there is none.
    """

    shares: Mapping[str, Share]
    central: Curve
    classes: int | None = None
    missing: str = ""
    noiseless: Curve = field(default_factory=dict)


def read_shares(run: Run) -> dict[str, Data] | None:
    """Have the task read each peer's data; None where it is elsewhere: a copied run can still be drawn."""
    try:
        return {peer.name: read_data(run.federation.task.task, peer.home.data) for peer in run.peers}
    except InvalidConfig:
        return None


def baselines(run: Run, shares: Mapping[str, Data] | None) -> Baselines:
    """Return what the run is compared with: from its folder, or trained now and kept there.

    Args:
        run: the run.
        shares: each peer's data; None where it cannot be read here.

    Raises:
        InvalidConfig: they cannot be written.
    """
    path, key = run.path / BASELINES_FILE, _key(run)
    kept = _load(path, key)
    if kept is not None or shares is None:
        return kept or Baselines({}, {}, missing="the peers' data cannot be read here")
    fresh = _train(run, shares)
    write_atomic(path, json.dumps({"key": key, **asdict(fresh)}).encode())
    return fresh


def _key(run: Run) -> str:
    """Name what the baselines depend on."""
    configs = [[peer.name, peer.home.config.seed, peer.home.config.data] for peer in run.peers]
    text = json.dumps([run.charter.hash().hex(), MOST_POINTS, configs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _load(path: Path, key: str) -> Baselines | None:
    try:
        values = json.loads(path.read_bytes())
        if values["key"] != key:
            return None
        shares = {
            name: Share(share["examples"], share["classes"], _curve(share["curve"]))
            for name, share in values["shares"].items()
        }
        return Baselines(shares, _curve(values["central"]), values["classes"], noiseless=_curve(values["noiseless"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none yet, or of another version: it is made anew


def _curve(values: Mapping[str, dict[str, float]]) -> Curve:
    return {int(rounds): metrics for rounds, metrics in values.items()}


def _train(run: Run, shares: Mapping[str, Data]) -> Baselines:
    task, rounds = run.federation.task.task, run.charter.rounds
    model = make_model(task)
    load_model(run.federation.model_path, model)
    initial = flatten(model)
    alone_curves = {
        peer.name: _attempt(
            partial(alone, task, shares[peer.name], initial, rounds, _training(run, peer)),
            measure(run, shares[peer.name], initial),
        )
        for peer in run.peers
    }
    data = list(shares.values())
    together: Curve = {}
    if len(data) > 1:
        train = partial(central, task, data, initial, rounds, _training(run, run.peers[0]))
        together = _attempt(train, measure(run, data[0], initial))
    noiseless: Curve = {}
    if run.charter.privacy is not None:
        trainings = [_training(run, peer) for peer in run.peers]
        train = partial(averaged, task, data, initial, rounds, trainings)
        noiseless = _attempt(train, measure(run, data[0], initial))
    counts = {name: _classes(share) for name, share in shares.items()}
    table = {
        name: Share(len(share.train), len(counts[name]) or None, alone_curves[name]) for name, share in shares.items()
    }
    return Baselines(table, together, len(set().union(*counts.values())) or None, noiseless=noiseless)


def _training(run: Run, peer: PeerRun) -> Training:
    terms = run.charter.training
    return Training(terms.local_steps, terms.batch_size, terms.clip_norm, peer.home.config.seed)


def _attempt(train: Callable[[], list[dict[str, float]]], before: dict[str, float]) -> Curve:
    """Return the curve that training gives, from the initial model's metrics on; none if it diverges."""
    try:
        measured = [before, *train()]
    except RoundFailed:
        return {}
    return {rounds: measured[rounds] for rounds in spread_out(len(measured), MOST_POINTS)}


def spread_out(count: int, most: int) -> list[int]:
    """Return at most `most` of 0 to count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(step * (count - 1) / (most - 1)) for step in range(most)]


def _classes(share: Data) -> set[int]:
    targets = share.train.targets
    return set() if targets.is_floating_point() or targets.ndim != 1 else set(targets.tolist())


def measure(run: Run, data: Data, vector: Vector) -> dict[str, float]:
    """Return a model's metrics, float32 [parameters], on a peer's held-out examples.

    Raises:
        RoundFailed: the task fails.
    """
    trainer = Trainer(run.federation.task.task, data, local_steps=1, batch_size=1, clip_norm=0.0, seed=0)
    return trainer.evaluate(vector)
