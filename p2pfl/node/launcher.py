"""Many peers as processes on one machine: made, started from one preloaded process, watched, stopped.

The launcher is not part of the protocol. It starts peers and reads what they write; a peer neither knows nor needs it.
"""

import math
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from p2pfl.core.charter import Charter, Member
from p2pfl.core.config import PeerConfig
from p2pfl.core.errors import P2pflError
from p2pfl.core.trace import Entry
from p2pfl.crypto.identity import sign_charter
from p2pfl.node.federation import CHARTER_FILE, Home, create_home, draft_charter, join_charter, save_charter
from p2pfl.node.tracefile import TRACE_FILE, TraceReader

PEERS_FOLDER = "peers"
PRELOADED = ["p2pfl.node.peer", "p2pfl.node.federation", "sklearn.datasets", "sklearn.metrics", "torch._dynamo"]
"""Imported once, in the process that all peers are forked from. The last, which torch loads with its first optimiser,
and scikit-learn take 1.5 s each, for each peer."""
HISTORY_BYTES = 64 << 20
"""What the copies of one peer's model for the consensus plot may take on disk."""
STOP_SECONDS = 10.0
"""How long a peer may take to leave before it is killed. A round of a demo takes well under a second."""


@dataclass(frozen=True)
class LocalFederation:
    """A federation of peers on this machine: a signed charter, and a folder for each member."""

    path: Path
    homes: tuple[Home, ...]


def create_federation(
    path: Path, task: str, terms: Mapping[str, Any], data: Sequence[Mapping[str, Any]], seed: int
) -> LocalFederation:
    """Make folders, draw up a charter and have all members join and sign it, as organisations would one by one.

    Args:
        path: the run's folder.
        task: a built-in task, or `file.py:ClassName` with the path relative to `path`.
        terms: the charter's tables.
        data: each peer's `[data]` table.
        seed: draws the initial model, and with a peer's number the order of its examples.

    Raises:
        InvalidConfig: the task or a setting cannot be used.
    """
    charter = draft_charter(path, "demo", task, terms, seed)
    history_every = _history_every(charter)
    homes = []
    for number, (port, table) in enumerate(zip(free_ports(len(data)), data, strict=True)):
        address = f"/ip4/127.0.0.1/tcp/{port}"
        config = PeerConfig(
            name=f"peer-{number}",
            charter=f"../../{CHARTER_FILE}",
            run=".",
            listen=(address,),
            announce=(address,),
            seed=seed * len(data) + number,
            history_every=history_every,
            data=dict(table),
        )
        homes.append(create_home(path / PEERS_FOLDER / config.name, config)[0])
    for home in homes:
        member = Member(name=home.config.name, peer_id=home.identity().peer_id, addresses=home.config.announce)
        charter = join_charter(charter, member)
    for home in homes:
        charter = sign_charter(charter, home.config.name, home.identity())
    save_charter(path / CHARTER_FILE, charter)
    return LocalFederation(path, tuple(homes))


def _history_every(charter: Charter) -> int:
    """Return how often a peer may copy its model for the plots within `HISTORY_BYTES`."""
    rounds = charter.training.rounds + charter.averaging.settle_rounds
    return max(1, math.ceil(4 * charter.model.parameters * rounds / HISTORY_BYTES))


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def preload() -> None:
    """Begin to load what peers need in the process they will be forked from; returns at once."""
    # Peers share this machine's cores: one thread each for linear algebra. Read when numpy and torch are loaded.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


class Launcher:
    """The processes of a federation."""

    def __init__(self, federation: LocalFederation, debug: bool = False) -> None:
        preload()
        context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.processes: dict[str, ForkServerProcess] = {
            home.config.name: context.Process(target=run_process, args=(str(home.path), debug), name=home.config.name)
            for home in federation.homes
        }
        self._readers = {home.config.name: TraceReader(home.run_path / TRACE_FILE) for home in federation.homes}

    def start(self) -> None:
        """Start all peers."""
        for process in self.processes.values():
            process.start()

    def read_new(self) -> dict[str, list[Entry]]:
        """Return what each peer has written to its trace since the last call."""
        return {name: list(reader.read_new()) for name, reader in self._readers.items()}

    def is_running(self) -> bool:
        """Whether any peer still runs."""
        return any(process.is_alive() for process in self.processes.values())

    def failed(self) -> dict[str, int]:
        """Return the exit codes, other than 0, of peers that have ended."""
        codes = {name: process.exitcode for name, process in self.processes.items()}
        return {name: code for name, code in codes.items() if code}

    def stop(self) -> None:
        """Ask every peer to leave; kill those that do not within `STOP_SECONDS`. None is left."""
        for process in self.processes.values():
            if process.is_alive():
                process.terminate()
        for process in self.processes.values():
            if process.pid is not None:
                process.join(STOP_SECONDS)
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
                process.join()


def run_process(home: str, debug: bool) -> None:
    """Run one peer in a process of its own; what is wrong goes to stderr in one line, and into the exit code."""
    from p2pfl.node.federation import open_home  # noqa: PLC0415 - after the fork
    from p2pfl.node.peer import Peer  # noqa: PLC0415 - needs torch and libp2p: not for the launcher itself

    # The terminal sends Ctrl-C to everyone at once; the launcher decides, and asks each peer to leave.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Peer.prepare(open_home(Path(home))).run()
    except P2pflError as error:
        if debug:
            raise
        print(f"{Path(home).name}: {error}", file=sys.stderr)  # noqa: T201 - the process's only word
        sys.exit(error.exit_code)
