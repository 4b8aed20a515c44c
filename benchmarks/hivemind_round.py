"""How long hivemind's averager takes for a step among peers on this machine; run by `secure_round.py`.

    python benchmarks/hivemind_round.py [--bytes 100000000] [--peers 4] [--steps 6]

Needs `hivemind` and nothing of p2pfl: it pins other versions of what both use, so it has an environment of its own.
Each peer is a process with its own daemon and one float32 tensor; all begin a step together. Prints one line of JSON.
"""

import argparse
import json
import multiprocessing
import os
import signal
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

WAIT = 120.0


def run_peer(
    number: int,
    options: argparse.Namespace,
    known: list[str],
    told: "Queue[Any]",
    together: Barrier,
    took: "Queue[Any]",
) -> None:
    """Average with the others; report the seconds of each step, None for one without all peers, and a value."""
    import hivemind  # noqa: PLC0415 - in the peer's process: it starts threads
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    dht = hivemind.DHT(initial_peers=known or None, start=True)
    if not known:
        told.put([str(address) for address in dht.get_visible_maddrs()])
    tensor = torch.full((options.bytes // 4,), float(number))
    averager = hivemind.DecentralizedAverager(
        [tensor], dht, prefix="benchmark", target_group_size=options.peers, min_matchmaking_time=3.0, start=True
    )
    seconds: list[float | None] = []
    for _ in range(options.steps):
        together.wait(WAIT)
        began = time.perf_counter()
        gathered = averager.step(timeout=WAIT, allow_retries=False)
        whole = gathered is not None and len(gathered) == options.peers
        seconds.append(time.perf_counter() - began if whole else None)
    with averager.get_tensors() as tensors:
        took.put((seconds, float(tensors[0][0])))
    together.wait(WAIT)
    os.kill(os.getpid(), signal.SIGKILL)  # its own shutdown waits for processes that do not end


def main() -> None:
    """Run the peers, and print what their steps took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=100_000_000)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    told, took, together = context.Queue(), context.Queue(), context.Barrier(options.peers)
    known: list[str] = []
    for number in range(options.peers):
        context.Process(target=run_peer, args=(number, options, known, told, together, took), daemon=False).start()
        if not known:
            known = told.get(timeout=WAIT)
    results = [took.get(timeout=WAIT * options.steps) for _ in range(options.peers)]
    steps = zip(*(seconds for seconds, _ in results), strict=True)
    slowest = [max(step) for step in steps if None not in step]
    print(json.dumps({"seconds": slowest, "values": [value for _, value in results]}), flush=True)


if __name__ == "__main__":
    main()
