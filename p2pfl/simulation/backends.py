"""What runs the missing runs of a sweep: processes of this machine, or Ray, here or on a cluster.

A run is a pure function of its settings and has one thread, so it does not matter who runs it. Owns where runs happen
and what becomes of those whose process dies. Must not choose what is run.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from p2pfl.core.errors import InvalidConfig, P2pflError
from p2pfl.core.settings import validate
from p2pfl.node.memory import keep_freed_blocks
from p2pfl.simulation.compare import draw_run
from p2pfl.simulation.dense.threads import one_thread_each
from p2pfl.simulation.runs import Run, save
from p2pfl.simulation.scenario import Scenario
from p2pfl.simulation.simulate import simulate, usable

Ended = Iterator[tuple[int, str]]
"""The number of each run once it has ended, with why it failed, or nothing."""


def on_processes(missing: Mapping[int, Scenario], home: Path, device: str, workers: int, address: str | None) -> Ended:
    """Run scenarios in processes, or in this one if one is enough; they write their folders themselves.

    Raises:
        InvalidConfig: there is no such device here.
    """
    del address
    usable(device)
    if workers <= 1:
        for place, point in missing.items():
            yield place, _run_and_write(point.settings(), home, device)
        return
    # Not forked: torch's threads do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=keep_freed_blocks) as pool:
        futures: dict[Future[str], int] = {
            pool.submit(_run_and_write, point.settings(), home, device): place for place, point in missing.items()
        }
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenProcessPool:
                    yield futures[future], DIED
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def on_ray(missing: Mapping[int, Scenario], home: Path, device: str, workers: int, address: str | None) -> Ended:
    """Run scenarios as tasks of Ray; runs come back, and their folders are written here.

    Raises:
        InvalidConfig: Ray is not installed, or there is no cluster at the address.
    """
    if not missing:
        return
    with _ray(workers, address) as ray:
        run = ray.remote(_run_on_ray).options(num_cpus=1, num_gpus=int(device != "cpu"), max_retries=0)
        left = {run.remote(point.settings(), device): place for place, point in missing.items()}
        while left:
            (ended,), _ = ray.wait(list(left), num_returns=1)
            place = left.pop(ended)
            try:
                found: Run | str = ray.get(ended)
            except ray.exceptions.RayError as error:
                found = f"{DIED} ({type(error).__name__})"
            yield place, found if isinstance(found, str) else _write(found, missing[place], home)


BACKENDS: Mapping[str, Callable[[Mapping[int, Scenario], Path, str, int, str | None], Ended]] = {
    "processes": on_processes,
    "ray": on_ray,
}
"""By the name that `p2pfl sweep --backend` takes."""

DIED = "its process died, or another one did; run the sweep again"


RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
"""Unless the environment or whoever loaded Ray before says otherwise: no reports of who uses Ray for what, and a
cluster that knows its users, since it runs whatever it is sent."""

CONNECT_SECONDS = 10.0
"""A guess."""


@contextmanager
def _ray(workers: int, address: str | None) -> Iterator[Any]:
    """Give Ray, connected to a cluster or started here for a while; one that this process has already is left on."""
    if "ray" not in sys.modules:  # it reads them when it is loaded, and its processes whenever they begin
        for key, value in RAY_SETTINGS.items():
            os.environ.setdefault(key, value)
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InvalidConfig("the backend ray is not installed; pip install 'p2pfl-mesh[ray]'") from error
    if ray.is_initialized() and address is None:
        yield ray
        return
    _verify_reachable(address)
    here: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address or "local", log_to_driver=False, configure_logging=False, **({} if address else here))
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidConfig(f"no Ray at {address or 'this machine'}: {reason}; correct --address") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _verify_reachable(address: str | None) -> None:
    """Look whether anybody is there: Ray itself waits for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdecimal():
        return  # Ray's other words, such as auto
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InvalidConfig(f"no Ray at {address}: {error}; correct --address, or ray start --head there") from error


def _run_apart(settings: dict[str, Any], device: str) -> Run | str:
    """Run a scenario on one thread; return it, or why that failed."""
    try:
        with one_thread_each():
            return simulate(validate(Scenario, settings, "a sweep's run"), device=device)
    except P2pflError as error:
        return str(error)


def _run_on_ray(settings: dict[str, Any], device: str) -> Run | str:
    """Run a scenario in a process of Ray's, as `_run_apart` does."""
    keep_freed_blocks()
    return _run_apart(settings, device)


def _run_and_write(settings: dict[str, Any], home: Path, device: str) -> str:
    """Run a scenario on one thread, and write it into its folder; return why that failed, if it did."""
    found = _run_apart(settings, device)
    return found if isinstance(found, str) else _write(found, validate(Scenario, settings, "a sweep's run"), home)


def _write(run: Run, point: Scenario, home: Path) -> str:
    """Write a run into the folder of the scenario that was asked for; return why that failed, if it did."""
    if run.summary["hash"] != point.hash():
        return "the machine that ran it has other files of task, graph or data; give all machines the same"
    try:
        draw_run(save(run, home / point.folder))
    except P2pflError as error:
        return str(error)
    return ""
