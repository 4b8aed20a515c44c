"""Many runs of one scenario with other settings, on all processors; a sweep that was stopped goes on where it was.

A run is a pure function of its settings, and its folder is named by their hash: so what is there is not run again.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pfl.core.errors import P2pflError
from p2pfl.core.settings import validate
from p2pfl.simulation.compare import draw_run
from p2pfl.simulation.dense.threads import one_thread_each
from p2pfl.simulation.runs import Run, is_complete, open_simulated
from p2pfl.simulation.scenario import Scenario, get, points
from p2pfl.simulation.simulate import simulate

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
    scenario: Scenario, folder: Path, *, jobs: int | None = None, device: str = "cpu", watch: Watch | None = None
) -> Sweep:
    """Run every combination of a scenario's lists that is not there yet.

    Each run has one thread, whatever the number of jobs.

    Args:
        scenario: with `sweep`.
        folder: gets a folder of the scenario's name, with one for each run in it.
        jobs: processes at a time; by default as many as there are processors. 1: this process runs them.
        device: of torch.
        watch: is told of each run that is there.

    Raises:
        InvalidConfig: there is nothing to sweep, or a combination does not fit.
    """
    home = folder / scenario.name
    wanted = points(scenario)
    paths = [home / point.folder for point in wanted]
    missing = {place: point for place, point in enumerate(wanted) if not is_complete(paths[place])}
    failures: dict[int, str] = {}
    workers = min(jobs or os.cpu_count() or 1, len(missing))
    ended = len(wanted) - len(missing)
    if watch is not None:
        watch(ended, len(wanted))
    for place, reason in _run_all(missing, home, device, workers):
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


def _run_all(
    missing: Mapping[int, Scenario], home: Path, device: str, workers: int
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Run scenarios, and give the number of each when it has ended, with why it failed, if it did."""
    if workers <= 1:
        for place, point in missing.items():
            yield place, _run_one(point.settings(), home, device)
        return
    # Not forked: torch's threads do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures: dict[Future[str], int] = {
            pool.submit(_run_one, point.settings(), home, device): place for place, point in missing.items()
        }
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenProcessPool:
                    yield futures[future], "its process died, or another one did; run the sweep again"
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run_one(settings: dict[str, Any], home: Path, device: str) -> str:
    """Run a scenario on one thread, and write it into its folder; return why that failed, if it did."""
    try:
        with one_thread_each():
            draw_run(simulate(validate(Scenario, settings, "a sweep's run"), home, device=device))
    except P2pflError as error:
        return str(error)
    return ""
