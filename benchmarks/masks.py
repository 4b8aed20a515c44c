"""How fast a vector is masked, beside what its keystreams and additions alone take, and how much memory it needs.

    python benchmarks/masks.py [--parameters 25000000] [--repeats 3]

Masks one vector for 10 and 50 pairs (and the self mask) with every suite, library and one or two threads. Beside each
run, in turn with it, the same streams are expanded and added to the same output without anything else: that is the
floor. Looking through the values once, for NaN and for what is clipped, is timed on its own. SM4 is slow, so it gets
a part of the vector, unless --parameters is given.
"""

import argparse
import json
import os
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from p2pfl.core.ids import PeerId
from p2pfl.crypto.masks import PIECE_BYTES, Mask, MaskedVector, own_masks
from p2pfl.crypto.ring import WEIGHT_ONE, Floats, Layout, Ring
from p2pfl.crypto.suite import CipherSuite, available_providers, suite

PARAMETERS = 25_000_000
PAIRS = (10, 50)
SHORTER = {("sm4", "libgcrypt"): 5, ("sm4", "openssl"): 25}
"""What the vector is divided by for slow ciphers."""
PARTS_PER_THREAD = 4
"""So that a thread that is held up does not keep the other waiting for long."""
LEAST_OF_FLOOR, MOST_MEMORY = 0.9, 10e6


@dataclass
class Row:
    """One line of the table."""

    suite: str
    library: str
    bits: int
    pairs: int
    threads: int
    parameters: int
    seconds: float
    cpu: float
    floor_cpu: float
    memcpy: float

    @property
    def speed(self) -> float:
        """Mask bytes per second."""
        return (self.pairs + 1) * self.parameters * self.bits / 8 / self.seconds

    @property
    def of_floor(self) -> float:
        """Speed over that of keystreams and additions alone, in processor time: neighbors disturb that least."""
        return self.floor_cpu / self.cpu

    @property
    def name(self) -> str:
        """Its name among the figures."""
        threads = "thread" if self.threads == 1 else "threads"
        return f"{self.suite}_{self.library}_{self.bits}_bits_{self.pairs}_pairs_{self.threads}_{threads}"


def some_masks(chosen: CipherSuite, pairs: int) -> tuple[Mask, ...]:
    """Return a self mask and pair masks of both signs, with keys that serve nothing else."""
    keys = [i.to_bytes(chosen.key_bytes, "big") for i in range(1, pairs + 2)]
    others = [PeerId(f"peer-{i}") for i in range(pairs)]
    return own_masks(PeerId(f"peer-{pairs // 2}!"), keys[0], dict(zip(others, keys[1:], strict=True)))


def masked(chosen: CipherSuite, bits: int, pairs: int, values: Floats) -> MaskedVector:
    """Return a masked vector of one chunk."""
    ring = Ring(bits, pairs + 1, 8.0)
    return MaskedVector(chosen, ring, Layout(values.size, 1, bits), values, WEIGHT_ONE, some_masks(chosen, pairs))


def expand_and_add(vector: MaskedVector, out: memoryview) -> None:
    """Expand the masks of `vector` from the beginning of the streams on, and add them to `out`: the floor."""
    streams = [(vector.suite.keystream(mask.key), mask.sign) for mask in vector.masks]
    scratch = np.empty(PIECE_BYTES, np.uint8)
    data = np.frombuffer(out, np.uint8)
    for begin in range(0, data.size, PIECE_BYTES):
        words = data[begin : begin + PIECE_BYTES].view(vector.ring.word)
        stream_words = scratch[: words.nbytes].view(vector.ring.word)
        for stream, sign in streams:
            stream.expand_into(begin, scratch[: words.nbytes].data)
            (np.add if sign > 0 else np.subtract)(words, stream_words, out=words)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds on the clock and of the processors."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def measure(
    chosen: CipherSuite, vector: MaskedVector, out: memoryview, threads: int, repeats: int, memcpy: float
) -> Row:
    """Time masking and its floor in turn; the fastest of each is reported."""
    size = vector.layout.chunk(0).size
    parts = 1 if threads == 1 else threads * PARTS_PER_THREAD
    stride = -(-size // parts // 16) * 16
    with ThreadPoolExecutor(threads) as pool:

        def run(tasks: Sequence[Callable[[], None]]) -> None:
            for future in [pool.submit(task) for task in tasks]:
                future.result()

        floor_tasks = [
            partial(expand_and_add, vector, out[at : min(at + stride, size)]) for at in range(0, size, stride)
        ]
        floors, times = [], []
        for _ in range(repeats):
            floors.append(timed(lambda: run(floor_tasks)))
            times.append(timed(lambda: vector.block_into(0, 0, out[:size], run, parts)))
    seconds, cpu = (min(column) for column in zip(*times, strict=True))
    floor_cpu = min(cpu for _, cpu in floors)
    bits, pairs, library = vector.ring.bits, vector.ring.members - 1, chosen.keystream_provider.name
    return Row(chosen.name, library, bits, pairs, threads, vector.values.size, seconds, cpu, floor_cpu, memcpy)


def most_memory() -> int:
    """Return the most bytes that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def extra_memory(vector: MaskedVector, out: memoryview) -> float:
    """Return the bytes that masking takes beside its input and its output, by the larger of two ways to measure."""
    vector.block_into(0, 0, out[: 2 * PIECE_BYTES])  # loads what is loaded once
    before = most_memory()
    vector.block_into(0, 0, out)
    resident = most_memory() - before
    tracemalloc.start()
    vector.block_into(0, 0, out)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return float(max(resident, traced))


def copy_speed(values: Floats, out: memoryview) -> float:
    """Return the bytes that one thread copies in a second."""
    target = np.frombuffer(out[: values.nbytes], np.float32)
    return values.nbytes / min(timed(lambda: np.copyto(target, values))[0] for _ in range(8))


def suites() -> list[CipherSuite]:
    """Return each suite with each library's keystream; that which peers would use comes first."""
    chosen = []
    for name in ("aes", "sm4"):
        default = suite(name)
        chosen.append(default)
        for provider in available_providers():
            if provider.name != default.keystream_provider.name:
                chosen.append(suite(name, [provider]))
    return chosen


def show(row: Row) -> None:
    """Print a line of the table."""
    cells = [
        f"{row.suite:<5} {row.library:<10} {row.bits:>4} {row.pairs:>6} {row.threads:>8}",
        f"{row.parameters / 1e6:>7.1f} M {row.seconds:>8.3f} {row.cpu:>8.3f} {row.speed / 1e9:>7.2f}",
        f"{row.speed / row.memcpy:>9.2f} {row.of_floor:>14.3f}",
    ]
    print(" ".join(cells), flush=True)


def main() -> None:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, help=f"the vector's length; {PARAMETERS} by default")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, of which the fastest counts")
    arguments = parser.parse_args()
    full = arguments.parameters or PARAMETERS
    values = np.empty(full, np.float32)
    for begin in range(0, full, 1 << 16):  # in blocks, so that no temporary array hides what masking needs
        block = values[begin : begin + (1 << 16)]
        block[:] = np.arange(block.size, dtype=np.float32) % 1013 / 1013 - 0.5
    out = memoryview(bytearray(Layout(full, 1, 32).chunk(0).size))
    np.frombuffer(out, np.uint8)[:] = 1

    memory = extra_memory(masked(suite("aes"), 32, 10, values), out)
    memcpy = copy_speed(values, out)
    look = min(timed(lambda: Ring(32, 11, 8.0).count_clipped(values, WEIGHT_ONE))[0] for _ in range(3))
    print(f"{os.cpu_count()} cores; memcpy {memcpy / 1e9:.1f} GB/s; {memory / 1e6:.1f} MB beside input and output")
    print(f"looking through {full / 1e6:.1f} M values before masking, not in the rows: {1e3 * look:.1f} ms")
    print("\nsuite library    bits  pairs  threads parameters seconds  CPU s     GB/s  x memcpy  x keystream+add")
    rows = []
    targets = {"extra_bytes": {"value": memory, "target": MOST_MEMORY, "met": memory < MOST_MEMORY}}
    for chosen in suites():
        served = (chosen.name, chosen.keystream_provider.name)
        used = values if arguments.parameters else values[: full // SHORTER.get(served, 1)]
        default = chosen is suite(chosen.name)
        for bits, pairs in [(bits, pairs) for bits in (32, 16) for pairs in PAIRS]:
            if bits == 16 and not (default and chosen.name == "aes"):
                continue
            for threads in (1, 2):
                row = measure(chosen, masked(chosen, bits, pairs, used), out, threads, arguments.repeats, memcpy)
                show(row)
                rows.append(row)
                if default and (bits, threads) == (32, 1):
                    value = round(row.of_floor, 4)
                    targets[f"{chosen.name}_{pairs}_pairs_of_keystream_plus_add"] = {
                        "value": value,
                        "target": LEAST_OF_FLOOR,
                        "met": value >= LEAST_OF_FLOOR,
                    }
    if not arguments.parameters:
        print("sm4 masked shorter vectors because it is slow; its time grows with the length")

    figures = {"memcpy_bytes_per_second": round(memcpy), "extra_bytes": memory, "look_through_seconds": round(look, 4)}
    for row in rows:
        figures[f"{row.name}_seconds"] = round(row.seconds, 4)
        figures[f"{row.name}_parameters"] = row.parameters
        figures[f"{row.name}_of_keystream_plus_add"] = round(row.of_floor, 4)
    print()
    print(json.dumps({"benchmark": "masks", "figures": figures, "targets": targets}))


if __name__ == "__main__":
    main()
