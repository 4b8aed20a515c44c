"""Many peers as processes on one machine: made, started from one preloaded process, watched, stopped.

The launcher is not part of the protocol. It starts peers and reads what they write; a peer neither knows nor needs it.
"""

import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

from p2pfl.core.charter import Charter, TableTerms
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
_ASK_AGAIN_SECONDS = 1.0
"""A peer that has only just been forked, or begins to run, does not hear yet that it should leave."""
_REASON_LENGTH = 500
_LAUNCHERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal, or `timeout`, sends to the launcher and all its processes at once; the launcher decides."""


@dataclass(frozen=True)
class LocalFederation:
    """A federation of peers on this machine: a signed charter, and a folder for each member."""

    path: Path
    homes: tuple[Home, ...]


def create_federation(
    path: Path,
    task: str,
    terms: Mapping[str, Any],
    data: Sequence[Mapping[str, Any]],
    seed: int,
    *,
    addresses: Sequence[tuple[str, str]] | None = None,
    table: TableTerms | None = None,
    salts: Sequence[bytes] | None = None,
) -> LocalFederation:
    """Make folders, draw up a charter and have all members join and sign it, as organisations would one by one.

    Args:
        path: the run's folder.
        task: a built-in task, or `file.py:ClassName` with the path relative to `path`.
        terms: the charter's tables.
        data: each peer's `[data]` table.
        seed: draws the initial model, and with a peer's number the order of its examples.
        addresses: where each peer listens, and where it says that others reach it; by default one on a free port.
        table: what every peer's table holds, for a task that takes one.
        salts: what members give to the beacon. By default it follows from their fresh keys, so that nobody can choose
            it, and no two federations draw the same groups.

    Raises:
        InvalidConfig: the task or a setting cannot be used.
    """
    charter = draft_charter(path, "demo", task, terms, seed, table)
    history_every = _history_every(charter)
    homes = []
    for number, (settings, (listen, announce)) in enumerate(zip(data, addresses or _free(len(data)), strict=True)):
        config = PeerConfig(
            name=f"peer-{number}",
            charter=f"../../{CHARTER_FILE}",
            run=".",
            listen=(listen,),
            announce=(announce,),
            seed=seed * len(data) + number,
            history_every=history_every,
            data=dict(settings),
        )
        homes.append(create_home(path / PEERS_FOLDER / config.name, config)[0])
    given = [None] * len(homes) if salts is None else salts
    for home, salt in zip(homes, given, strict=True):
        charter = join_charter(charter, home.member(charter, salt))
    for home, salt in zip(homes, given, strict=True):
        signer = home.signer(charter.security.suite)
        charter = sign_charter(charter, home.config.name, signer.identity, signer.sm2_key, salt)
    save_charter(path / CHARTER_FILE, charter)
    return LocalFederation(path, tuple(homes))


def _history_every(charter: Charter) -> int:
    """Return how often a peer may copy its model for the plots within `HISTORY_BYTES`."""
    rounds = charter.rounds + charter.averaging.settle_rounds
    return max(1, math.ceil(4 * charter.model.parameters * rounds / HISTORY_BYTES))


def _free(count: int) -> list[tuple[str, str]]:
    places = [f"/ip4/127.0.0.1/tcp/{port}" for port in free_ports(count)]
    return list(zip(places, places, strict=True))


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


@cache
def preload() -> None:
    """Begin to load what peers need in the process they will be forked from; returns at once.

    Once only: for a moment nobody hears Ctrl-C.
    """
    # Peers share this machine's cores: one thread each for linear algebra. Read when numpy and torch are loaded.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with _ignored(_LAUNCHERS_SIGNALS):
        forkserver.ensure_running()


@contextmanager
def _ignored(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Have processes started meanwhile ignore signals from their first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread choose
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Take the first SIGTERM or SIGHUP as Ctrl-C, and ignore more of them; leave alone what `nohup` ignores."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    asked = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    before = {each: handler for each, handler in asked.items() if handler != signal.SIG_IGN}
    for each in before:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@dataclass(frozen=True)
class Failure:
    """How a peer's process ended, where it did not end well.

    Attributes:
        code: its exit code; below 0, the signal that killed it.
        reason: what it says was wrong; empty where it could not say.
    """

    code: int
    reason: str = ""

    @property
    def killed(self) -> bool:
        """Whether somebody else ended it."""
        return self.code < 0

    def __str__(self) -> str:
        """Say it in words."""
        if self.killed:
            return f"killed by {signal.Signals(-self.code).name}"
        return f"failed: {self.reason}" if self.reason else f"failed: its process ended with {self.code}"


class Launcher:
    """The processes of a federation."""

    def __init__(self, federation: LocalFederation, debug: bool = False) -> None:
        preload()
        self.processes: dict[str, ForkServerProcess] = {}
        self._debug = debug
        self._homes = {home.config.name: home for home in federation.homes}
        self._reasons: dict[str, Connection] = {}
        self._tell: list[Connection] = []
        self._frozen: set[str] = set()
        for name in self._homes:
            self._make(name)
        self._readers = {name: TraceReader(home.run_path / TRACE_FILE) for name, home in self._homes.items()}

    def _make(self, name: str) -> None:
        context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._reasons[name], tell = context.Pipe(duplex=False)
        self._tell.append(tell)
        arguments = (str(self._homes[name].path), self._debug, tell)
        self.processes[name] = context.Process(target=run_process, args=arguments, name=name)

    def start(self) -> None:
        """Start all peers."""
        # Until the preloaded process serves, Ctrl-C is heard; then no peer is left without its number known here.
        first = multiprocessing.get_context("forkserver").Process(target=bool)
        first.start()
        first.join()
        self._start(self.processes)

    def _start(self, names: Iterable[str]) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _LAUNCHERS_SIGNALS)
        try:
            for name in names:
                self.processes[name].start()
        finally:
            for tell in self._tell:
                tell.close()
            self._tell.clear()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def pid(self, name: str) -> int | None:
        """Return the number of a peer's process, of its latest life; None before the first."""
        return self.processes[name].pid

    # What may happen to a peer

    def kill(self, name: str) -> None:
        """End a peer's process at once, as a power cut would; on return it is gone."""
        self.processes[name].kill()
        self.processes[name].join()
        self._frozen.discard(name)

    def start_again(self, name: str) -> None:
        """Start a peer whose process has ended, from its folder as that one left it."""
        self._reasons[name].close()
        self._make(name)
        self._start([name])

    def freeze(self, name: str) -> None:
        """Stop a peer's process where it stands; its sockets stay open."""
        if self._signal(name, signal.SIGSTOP):
            self._frozen.add(name)

    def thaw(self, name: str) -> None:
        """Let a frozen peer go on."""
        self._frozen.discard(name)
        self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, number: signal.Signals) -> bool:
        process = self.processes[name]
        if process.pid is None or not process.is_alive():
            return False
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            return False
        return True

    # What becomes of all of them

    def read_new(self) -> dict[str, list[Entry]]:
        """Return what each peer has written to its trace since the last call."""
        return {name: list(reader.read_new()) for name, reader in self._readers.items()}

    def is_running(self) -> bool:
        """Whether any peer still runs."""
        return any(process.is_alive() for process in self.processes.values())

    def failures(self) -> dict[str, Failure]:
        """Return how those peers ended that have not ended well; of a peer's reason, this is the only reading."""
        codes = {name: process.exitcode for name, process in self.processes.items()}
        return {name: Failure(code, _receive(self._reasons[name])) for name, code in codes.items() if code}

    def stop(self) -> None:
        """Ask every peer to leave; kill those that do not within `STOP_SECONDS`, or at once on Ctrl-C. None is left."""
        for name in tuple(self._frozen):
            self.thaw(name)
        started = [process for process in self.processes.values() if process.pid is not None]
        deadline = time.monotonic() + STOP_SECONDS
        try:
            while (left := [each for each in started if each.is_alive()]) and time.monotonic() < deadline:
                for process in left:
                    process.terminate()
                again = min(time.monotonic() + _ASK_AGAIN_SECONDS, deadline)
                while left and (seconds := again - time.monotonic()) > 0:
                    wait([each.sentinel for each in left], seconds)
                    left = [each for each in left if each.is_alive()]
        finally:
            for process in started:
                if process.is_alive():
                    process.kill()
                    process.join()


def _receive(reasons: Connection) -> str:
    try:
        return reasons.recv_bytes().decode(errors="replace") if reasons.poll() else ""
    except (EOFError, OSError):
        return ""


def describe(failures: Mapping[str, Failure], peers: int) -> str:
    """Write in one line how peers ended, those with the same end together."""
    names: dict[str, list[str]] = {}
    for name, failure in failures.items():
        names.setdefault(str(failure), []).append(name)
    return "; ".join(
        f"{f'all {peers} peers' if len(those) == peers > 1 else ', '.join(those)} {end}" for end, those in names.items()
    )


def run_process(home: str, debug: bool, tell: Connection) -> None:
    """Run one peer in a process of its own; what is wrong goes to the launcher in one line, and into the exit code."""
    # What the terminal sends to everyone at once is the launcher's, which asks each peer to leave with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from p2pfl.node.federation import open_home  # noqa: PLC0415 - after the fork
    from p2pfl.node.peer import Peer  # noqa: PLC0415 - needs torch and libp2p: not for the launcher itself

    try:
        peer = Peer.prepare(open_home(Path(home)))
        # From here on the peer hears it itself, and is not to be ended by a second one while it saves its model.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        peer.run()
    except BaseException as raised:  # noqa: BLE001 - a member's own task may raise anything
        if debug:
            traceback.print_exc()
        error = _cause(raised)
        reason = _reason(error)
        try:
            tell.send_bytes(reason.encode(errors="replace"))
        except OSError:
            print(f"{Path(home).name}: {reason}", file=sys.stderr)  # noqa: T201 - the launcher is gone
        sys.exit(error.exit_code if isinstance(error, P2pflError) else 1)


def _cause(error: BaseException) -> BaseException:
    """Return the first of what concurrent tasks raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _reason(error: BaseException) -> str:
    text = str(error) if isinstance(error, P2pflError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:_REASON_LENGTH]
