"""Independent parts of a round on all of torch's threads.

Torch itself shares each operation among its threads, which wait for each other after every one of them: where other
programs want the processors too, rounds then take several times as long as on one thread. Here each part, dozens of
operations, belongs to one thread, and nobody waits before the end.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Part = TypeVar("Part")


def share(parts: Sequence[Part], work: Callable[[int, Part], None], threads: int) -> None:
    """Call `work` with each part, without gradients, on up to `threads` threads of one torch thread each.

    The first argument tells the threads apart, from 0: buffers that belong to it are never used twice at a time. What
    comes of a part must not depend on other parts, nor on who does it; then the result does not either.
    """
    workers = min(threads, len(parts))
    if workers <= 1:
        with torch.no_grad():
            for part in parts:
                work(0, part)
        return
    left = iter(parts)

    def run(worker: int) -> None:
        with torch.no_grad():
            for part in left:  # a list's iterator gives each part to one thread
                work(worker, part)

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(run, worker) for worker in range(workers)]:
            future.result()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread in this thread, and in those that begin meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
