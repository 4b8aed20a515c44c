"""Many runs of one scenario with other settings, on all processors; a sweep that was stopped goes on where it was.

A run is a pure function of its settings, and its folder is named by their hash: so what is there is not run again.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from p2pfl.core.errors import InvalidConfig
from p2pfl.simulation.backends import BACKENDS
from p2pfl.simulation.runs import Run, is_complete, open_simulated
from p2pfl.simulation.scenario import Scenario, get, points

Watch = Callable[[int, int], None]
"""Is told how many runs of how many are there."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep came to.

    Attributes:
        folder: that the runs' folders are in.
        runs: those that ended, in the order of the scenario's lists.
        failures: why others did not, by what they would have been.
        found: how many were there before.
    """

    folder: Path
    runs: tuple[Run, ...]
    failures: Mapping[str, str]
    found: int


def sweep(
    scenario: Scenario, folder: Path, *, jobs: int | None = None, device: str = "cpu", watch: Watch | None = None,
    backend: str = "processes", address: str | None = None,
) -> Sweep:  # fmt: skip
    """Run every combination of a scenario's lists that is not there yet.

    Each run has one thread, whatever the number of jobs.

    Args:
        scenario: with `sweep`.
        folder: gets a folder of the scenario's name, with one for each run in it.
        jobs: processes at a time; by default as many as there are processors. 1: this process runs them.
        device: of torch.
        watch: is told of each run that is there.
        backend: what runs them, a name in `BACKENDS`; what comes out is the same.
        address: of a Ray cluster, whose machines need p2pfl, and the files that the scenario names, where they are
            here. None: Ray is started on this machine, for as long as the sweep takes.

    Raises:
        InvalidConfig: there is nothing to sweep, a combination does not fit, or there is no such backend.
    """
    if backend not in BACKENDS or (address is not None and backend != "ray"):
        raise InvalidConfig(f"backend {backend!r}: there are {', '.join(BACKENDS)}, and only ray has an address")
    home = folder / scenario.name
    wanted = points(scenario)
    paths = [home / point.folder for point in wanted]
    missing = {place: point for place, point in enumerate(wanted) if not is_complete(paths[place])}
    failures: dict[int, str] = {}
    workers = min(jobs or os.cpu_count() or 1, len(missing))
    ended = len(wanted) - len(missing)
    if watch is not None:
        watch(ended, len(wanted))
    for place, reason in BACKENDS[backend](missing, home, device, workers, address):
        if reason:
            failures[place] = reason
        ended += 1
        if watch is not None:
            watch(ended, len(wanted))
    runs = tuple(open_simulated(path) for place, path in enumerate(paths) if place not in failures)
    told = {
        ", ".join(f"{key} = {get(wanted[place].settings(), key)}" for key in scenario.sweep): failures[place]
        for place in sorted(failures)
    }
    return Sweep(home, runs, told, len(wanted) - len(missing))
