"""What a peer holds while it averages: at most three vectors, whatever a group does with them."""

import gc
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.ledger import Checkpoint, Record
from p2pfl.core.machine import Compute, Effect, Input, Persisted, Vector
from p2pfl.gossip.session import Outcome
from tests.group_pump import GroupPump, Node

PARAMETERS = 2_000_000
SMALL = 1 << 20
"""Beside vectors: mask streams in 256 KiB, a sum's scratch, and what the test itself takes."""


def held(*roots: object) -> int:
    """Return the bytes of all arrays that these hold, each memory once; what a file holds does not count."""
    seen: set[int] = set()
    memory: dict[int, int] = {}

    def walk(found: object) -> Iterator[object]:
        if id(found) in seen:
            return
        seen.add(id(found))
        if isinstance(found, np.ndarray):
            while isinstance(found.base, np.ndarray) and not isinstance(found, np.memmap):
                found = found.base
            if not isinstance(found, np.memmap):
                owner = found.base.obj if isinstance(found.base, memoryview) else found.base
                memory[id(found if owner is None else owner)] = found.nbytes
            return
        if isinstance(found, bytes | bytearray):
            memory[id(found)] = len(found)
            return
        if isinstance(found, FunctionType):
            yield from (cell.cell_contents for cell in found.__closure__ or ())
        elif isinstance(found, partial):
            yield from found.args
        elif isinstance(found, dict | list | tuple | set) or type(found).__module__.startswith("p2pfl."):
            yield from gc.get_referents(found)

    waiting = list(roots)
    while waiting:
        waiting.extend(walk(waiting.pop()))
    return sum(memory.values())


def on_disk(path: Path, content: bytes) -> np.memmap:
    """Return an array that lies in a new file."""
    path.write_bytes(content)
    return np.memmap(path, np.uint8, "r")


class Weighed(GroupPump):
    """Members whose store is a file; notes the most that the first one holds, with what its work takes meanwhile."""

    masked = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.most = 0
        super().__init__(4, PARAMETERS, rounds=3)
        for node in self.nodes.values():  # the base lies in a file, as after each checkpoint
            node.machine._base = np.memmap(folder / "initial", "<f4", "w+", shape=(PARAMETERS,))

    def step(self, place: int, round: Round, vector: Vector) -> Vector:
        return vector + np.float32(place + 1)

    def keep(self, key: str, record: Record) -> Persisted:
        self.nodes[0].records.clear()
        if not isinstance(record, Checkpoint):
            return Persisted(key)
        stem = self.folder / f"{key.replace('/', '-')}-{record.round}-{id(record)}"
        results = b"".join(each.tobytes() for each in record.results)
        base = on_disk(Path(f"{stem}-base"), record.base.tobytes()).view("<f4")
        update = None if record.update is None else on_disk(Path(f"{stem}-update"), record.update.tobytes()).view("<f4")
        return Persisted(key, base, on_disk(Path(f"{stem}-results"), results) if results else None, update)

    def feed(self, place: int, input: Input) -> list[Effect]:
        if place:
            return super().feed(place, input)
        effects = super().feed(place, input)
        self.most = max(self.most, held(self.nodes[0].machine))
        return effects

    def carry_out(self, place: int, node: Node, effect: Effect) -> None:
        if place or not isinstance(effect, Compute):
            super().carry_out(place, node, effect)
            return
        tracemalloc.reset_peak()
        start, _ = tracemalloc.get_traced_memory()
        super().carry_out(place, node, effect)
        _, peak = tracemalloc.get_traced_memory()
        self.most = max(self.most, held(node.machine, effect) + peak - start)


@pytest.mark.slow
@pytest.mark.parametrize("change_clip", [None, 64.0])
def test_while_a_peer_averages_it_holds_at_most_three_vectors(
    change_clip: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weighed, "change_clip", change_clip)
    tracemalloc.start()
    try:
        pump = Weighed(tmp_path)
        pump.start()
        pump.run(until=lambda: len(pump.nodes[0].rounds) == 3)
    finally:
        tracemalloc.stop()
    assert [record.outcome for record in pump.nodes[0].rounds] == [Outcome.FULL] * 3
    assert pump.most <= 3 * 4 * PARAMETERS + SMALL, f"{pump.most / 4 / PARAMETERS:.2f} vectors"
