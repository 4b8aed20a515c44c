"""A simulated run: its settings, its curves, what it came to, and the folder it is kept in.

A folder has `scenario.toml` (all settings), `rounds.parquet` (a row for each seed and round), `peers.parquet` (a row
for each seed, evaluated round and peer), `summary.json`, and plots. The summary is written last: a folder without one
is of a run that did not end.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from p2pfl.core.errors import InvalidConfig
from p2pfl.node.store import read_text, write_atomic
from p2pfl.simulation.scenario import Scenario, flat, load

SCENARIO_FILE, SUMMARY_FILE = "scenario.toml", "summary.json"
ROUNDS_FILE, PEERS_FILE = "rounds.parquet", "peers.parquet"

BACKDOOR = "backdoor"
"""The attack, and the metric of its success."""


@dataclass(frozen=True)
class Run:
    """A simulated run.

    Attributes:
        scenario: all its settings.
        summary: what it came to, as in `summary.json`.
        frame: curves, a row for each seed and round: `seed`, `round` (how many are complete), `train_loss` (the mean
            of the working peers' minibatch losses), `working` (how many took part), `modelled_bytes` (sent by a peer
            since the start, the mean of all), `modelled_seconds`; and where models were evaluated `consensus`, the mean
            model's `loss` and metrics, and the means of what the evaluated peers' own models have, `peer_loss` and so
            on; else nan.
        peers: a row for each seed, evaluated round and peer: `train_loss` of that round, and `loss` and metrics of the
            peers that are evaluated, else nan.
        path: the folder it is kept in; None if it is kept in none.
    """

    scenario: Scenario
    summary: Mapping[str, Any]
    frame: pd.DataFrame
    peers: pd.DataFrame
    path: Path | None = None

    @property
    def evaluated(self) -> pd.DataFrame:
        """The rows of `frame` in which models were evaluated."""
        return self.frame[self.frame["loss"].notna()]

    @property
    def metric(self) -> str:
        """What figures show: the task's first metric, of peers' own models where these were evaluated."""
        own = f"peer_{self.summary['metric']}"
        return own if own in self.frame else str(self.summary["metric"])


def less_is_better(metric: str) -> bool:
    """Tell whether less of a metric is better."""
    return metric.removeprefix("peer_") in ("loss", "consensus", "train_loss", "distance", BACKDOOR)


def metric_words(metric: str) -> str:
    """Say whose metric it is."""
    own = metric.removeprefix("peer_")
    return f"{own} of peers' models" if own != metric else f"{metric} of the mean model"


def save(run: Run, path: Path) -> Run:
    """Write a run into its folder; return it with the folder's path.

    Raises:
        InvalidConfig: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be made: {error.strerror}") from error
    write_atomic(path / SCENARIO_FILE, run.scenario.to_toml().encode())
    write_atomic(path / ROUNDS_FILE, _parquet(run.frame))
    write_atomic(path / PEERS_FILE, _parquet(run.peers))
    write_atomic(path / SUMMARY_FILE, (json.dumps(run.summary, indent=2) + "\n").encode())
    return replace(run, path=path)


def is_complete(path: Path) -> bool:
    """Tell whether a folder holds a run that has ended."""
    return (path / SUMMARY_FILE).is_file() and (path / ROUNDS_FILE).is_file()


def open_all(paths: Sequence[Path]) -> list[Run]:
    """Read the runs that these folders are or hold; those in one folder in the order of their settings.

    Raises:
        InvalidConfig: one is no run and has none in it, or a run cannot be read.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        inside = [path] if is_complete(path) else [each for each in sorted(path.glob("*")) if is_complete(each)]
        if not inside:
            raise InvalidConfig(f"{path}: neither a simulated run that has ended nor a folder of such")
        runs = [open_simulated(each) for each in inside if each not in found]
        found |= {run.path: run for run in sorted(runs, key=_settings) if run.path is not None}
    return list(found.values())


def _settings(run: Run) -> list[tuple[str, bool, float, str]]:
    """Return what orders runs: their settings, of which numbers count as such."""
    settings = sorted(flat(run.scenario.settings()))
    return [
        (key, True, value, "") if isinstance(value, int | float) else (key, False, 0.0, str(value))
        for key, value in settings
    ]


def open_simulated(path: Path) -> Run:
    """Read a run's folder.

    Raises:
        InvalidConfig: it is none of a simulated run that has ended, or something in it cannot be read.
    """
    if not is_complete(path):
        raise InvalidConfig(f"{path}: not a simulated run that has ended; p2pfl simulate and p2pfl sweep make them")
    try:
        summary = json.loads(read_text(path / SUMMARY_FILE, "a run's summary"))
        frame, peers = (pd.read_parquet(path / name) for name in (ROUNDS_FILE, PEERS_FILE))
    except (ValueError, OSError) as error:
        raise InvalidConfig(f"{path}: cannot be read: {' '.join(str(error).split())}; run it again") from error
    return Run(load(str(path / SCENARIO_FILE)), summary, frame, peers, path)


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()
