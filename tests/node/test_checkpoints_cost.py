"""What a record and a checkpoint cost, in time and memory. Figures: `python -m tests.node.test_checkpoints_cost`."""

import statistics
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Checkpoint, Uploading, Voted
from p2pfl.node.checkpoints import SLICE, Checkpoints, Opened

REPEATS = 5
SESSION = bytes(32)


def opened(folder: Path, parameters: int) -> Opened:
    return Checkpoints.open(folder, bytes(32), PeerId("12D3KooWone"), np.zeros(parameters, np.float32))


def vector(parameters: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(3).random(parameters, np.float32)


class Beside:
    """Another thread's work meanwhile, as the event loop's is: how long it was kept from running, at most."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(0.001):
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last), now

    def __enter__(self) -> "Beside":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(folder: Path, parameters: int) -> dict[str, float]:
    """Return medians in milliseconds: of a record, of a checkpoint with base and update, and of opening again.

    `gap`: the longest that a thread beside a checkpoint waited for its turn, which it wants every millisecond.
    """
    store = opened(folder, parameters).checkpoints
    base, update = vector(parameters), vector(parameters)
    record, kept, gaps = [], [], []
    for number in range(REPEATS):
        for told in (Uploading(Round(number), SESSION), Voted(Round(number), SESSION, tuple(range(8)))):
            began = time.perf_counter()
            store.persist(told)
            record.append(time.perf_counter() - began)
        with Beside() as beside:
            began = time.perf_counter()
            store.persist(Checkpoint(Round(number + 1), base, update))
            kept.append(time.perf_counter() - began)
        gaps.append(beside.longest)
    store.close()
    began = time.perf_counter()
    opened(folder, parameters).checkpoints.close()
    times = {"record": record, "checkpoint": kept, "gap": gaps, "open": [time.perf_counter() - began]}
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


@pytest.mark.slow
def test_a_checkpoint_takes_no_memory_to_speak_of(tmp_path: Path) -> None:
    parameters = 5_000_000
    store = opened(tmp_path, parameters).checkpoints
    checkpoint = Checkpoint(Round(1), vector(parameters), vector(parameters))
    trainer = bytes(20_000_000)
    tracemalloc.start()
    try:
        store.persist(checkpoint, trainer)
        _, written = tracemalloc.get_traced_memory()
        store.close()
        tracemalloc.reset_peak()
        found = opened(tmp_path, parameters)
        held, read = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    found.checkpoints.close()
    assert written < 2 * SLICE
    # What is read is held, and nothing of that size beside it but the trainer's state, twice, and an initial model.
    assert held > 4 * 3 * parameters
    assert read < held + 4 * 2 * parameters + 2 * SLICE


@pytest.mark.slow
def test_a_thread_beside_is_not_kept_waiting(tmp_path: Path) -> None:
    """What is hashed and written at a time lets others run; a second would be far above what a loaded machine shows."""
    figures = measure(tmp_path, 5_000_000)
    assert figures["gap"] < 1000


if __name__ == "__main__":
    for size in (1_000_000, 25_000_000):
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as path:
            figures = measure(Path(path), size)
        print(f"{size:>11,} parameters:", ", ".join(f"{name} {ms:.1f} ms" for name, ms in figures.items()))  # noqa: T201
