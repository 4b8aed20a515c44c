"""Real peers in processes of their own that average ready vectors, and what each of their rounds cost.

A peer here is `p2pfl.node.peer.Peer` as `p2pfl run` starts it: its folder, its checkpoints on the disk, its libp2p
transport. Two things are put in its way. The trainer hands out a vector instead of training. And the machine is
watched: what goes in and out of it says when each stage came, and each `Compute` is timed by its own thread's clock.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from p2pfl.core.charter import AveragingTerms
from p2pfl.core.ids import Seconds
from p2pfl.core.ledger import Checkpoint, Resume
from p2pfl.core.machine import Compute, Effect, Emit, Input, Machine, Persist, Received, Send, SendBulk, Trained
from p2pfl.core.statements import Acknowledged, Statement
from p2pfl.core.trace import RoundEnded
from p2pfl.core.wire import Told
from p2pfl.node.launcher import LocalFederation, create_federation, preload

MEASURED_FILE = "measured.jsonl"
SECURE = ("base", "hide", "cut", "upload", "reduce", "result")
"""Computations that mask and commit, verify commitments, and add up and unmask. Others decode results, as in the clear
too, and check sums."""
VICTIMS = (2, 5)
"""Who is killed, by number; not neighbors in the session, where one would be the deputy of the other."""
KILL_ROUND = 1
SAMPLE_SECONDS = 0.01
GIGABIT = "1gbit"
DEADLINES = {"start": 300.0, "round": 60.0, "heartbeat": 5.0, "silence": 60.0}
"""A peer that shares two cores with seven others is not taken for dead."""
_CLONE_NEWNET = 0x40000000
_TASK = """
import torch
from p2pfl.learning.task import Data, Examples, Task


class Vector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.values = torch.nn.Parameter(torch.linspace(-1, 1, {parameters}))

    def forward(self, inputs):
        return inputs @ self.values[:4].reshape(2, 2)


class Ready(Task):
    def model(self):
        return Vector()

    def data(self, settings):
        one = Examples(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
        return Data(one, one)
"""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        parameters: length of the vector.
        members: peers, all in one group.
        suite: of the channel and the masks.
        masks: whether updates are hidden.
        bits: of the ring's words; None for what the charter says by itself.
        rounds: the first is not counted.
        dropouts: how many of `VICTIMS` are killed in round `KILL_ROUND`, when all others have acknowledged the uploads
            and they have not.
        shaped: whether every peer has a network namespace of its own and 1 Gbit/s each way.
        seconds: after which the measurement is given up.
    """

    parameters: int
    members: int
    suite: str
    masks: bool
    bits: int | None = None
    rounds: int = 4
    dropouts: int = 0
    shaped: bool = False
    seconds: float = 600.0

    @property
    def vector_bytes(self) -> int:
        """|x|, of float32 values."""
        return 4 * self.parameters


def ring_bits() -> tuple[int | None, ...]:
    """Return the word lengths that this version's charter can name; None where it names none."""
    return (32, 16) if "bits" in AveragingTerms.model_fields else (None,)


# In the peer's process


@dataclass
class RoundCost:
    """What one round of one peer took.

    Attributes:
        trained: when its vector was ready, in seconds of the machine's monotonic clock.
        averaged: when it held the average, and was about to write its checkpoint.
        ended: when that was on the disk.
        cpu: CPU seconds of its process from `trained` to `averaged`.
        round_cpu: the same from the end of the round before to the end of this one.
        computed: CPU seconds of the machine's `Compute`s, by what they are.
        handled: CPU seconds of the machine itself, digests and signatures included, in the network loop.
        payload: bytes of chunks handed to the links, by what they are.
        sent: bytes written to sockets from the end of the round before to the end of this one.
        anonymous: the most anonymous memory from `trained` to `averaged`, beyond the process without vectors; bytes.
        resident: the same of all resident memory, pages of mapped files included.
        stages: seconds from `trained` to this peer's first statement of each kind.
    """

    round: int = 0
    outcome: str = ""
    heard: int = 0
    trained: float = 0.0
    averaged: float = 0.0
    ended: float = 0.0
    cpu: float = 0.0
    round_cpu: float = 0.0
    computed: dict[str, float] = field(default_factory=dict)
    handled: float = 0.0
    payload: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    anonymous: int = 0
    resident: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def secure_cpu(self) -> float:
        """CPU seconds of masking, unmasking and commitments: those made, and those of others that are verified."""
        return sum(self.computed.get(kind, 0.0) for kind in SECURE)

    @property
    def check_cpu(self) -> float:
        """CPU seconds of the check of sums."""
        return self.computed.get("multiply", 0.0)


class Memory:
    """Samples this process's memory while a round averages."""

    def __init__(self) -> None:
        self.without = (0, 0)
        """Anonymous and resident bytes that do not count."""
        self.most = 0
        self._sampling = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    @staticmethod
    def now() -> tuple[int, int]:
        """Return anonymous and resident bytes."""
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        page = os.sysconf("SC_PAGESIZE")
        return (resident - shared) * page, resident * page

    def start(self) -> None:
        """Begin to look."""
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self.most = self.now()[0]
        self._sampling.set()

    def stop(self) -> tuple[int, int]:
        """Return the most anonymous and resident bytes since `start`, less what does not count."""
        self._sampling.clear()
        status = Path("/proc/self/status").read_text()
        highest = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        anonymous, resident = self.without
        return max(self.most, self.now()[0]) - anonymous, highest - resident

    def _sample(self) -> None:
        while self._sampling.wait():
            self.most = max(self.most, self.now()[0])
            time.sleep(SAMPLE_SECONDS)


class Watched:
    """A machine, and notes of what its rounds cost.

    Args:
        machine: whose inputs and effects pass unchanged, but for a victim's.
        me: this peer's place in the roster.
        bytes_out: tells the bytes written to sockets.
        file: takes a line of JSON for each round.
        memory: of this process.
        awaited: kills the process in `KILL_ROUND` once so many others have acknowledged the uploads; 0 never.
    """

    def __init__(
        self, machine: Machine, me: int, bytes_out: Callable[[], int], file: Path, memory: Memory, awaited: int
    ) -> None:
        self._machine, self._me, self._bytes_out, self._file = machine, me, bytes_out, file
        self._memory, self._awaited = memory, awaited
        self._acknowledged: set[int] = set()
        self._cost, self._computed, self._payload = (
            RoundCost(),
            defaultdict[str, float](float),
            defaultdict[str, int](int),
        )
        self._cpu_trained, self._cpu_ended, self._sent_ended = 0.0, time.process_time(), bytes_out()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    def handle(self, input: Input, now: Seconds) -> list[Effect]:
        """Hand an input on, and look at what comes back."""
        match input:
            case Trained():
                self._cost.trained, self._cpu_trained = time.monotonic(), time.process_time()
                self._memory.start()
            case Received(_, Told(_, _, statement)) if self._awaited:
                self._note_others(statement)
        began = time.thread_time()
        effects = self._machine.handle(input, now)
        self._cost.handled += time.thread_time() - began
        return [seen for effect in effects if (seen := self._look(effect)) is not None]

    def _note_others(self, statement: Statement) -> None:
        if isinstance(statement.content, Acknowledged) and statement.content.round == KILL_ROUND:
            self._acknowledged.add(statement.signer)
            if len(self._acknowledged) >= self._awaited:
                os.kill(os.getpid(), signal.SIGKILL)

    def _look(self, effect: Effect) -> Effect | None:
        match effect:
            case Compute(key, work, _):
                return replace(effect, work=self._timed(_kind(key), work))
            case SendBulk(peers, message, payload):
                part = getattr(message, "part", None)
                self._payload[getattr(part, "name", type(message).__name__).lower()] += len(peers) * payload.nbytes
            case Send(_, Told(_, _, statement)) if statement.signer == self._me:
                if (
                    self._awaited
                    and statement.content.round == KILL_ROUND
                    and isinstance(statement.content, Acknowledged)
                ):
                    return None
                self._cost.stages.setdefault(type(statement.content).__name__.lower(), time.monotonic())
            case Persist(_, Checkpoint()) if self._cost.trained and not self._cost.averaged:
                self._cost.averaged = time.monotonic()
                self._cost.cpu = time.process_time() - self._cpu_trained
                self._cost.anonymous, self._cost.resident = self._memory.stop()
            case Emit(RoundEnded() as record):
                self._end(record)
        return effect

    def _timed(self, what: str, work: Callable[[], object]) -> Callable[[], object]:
        computed = self._computed  # this round's, whenever the work is done

        def timed() -> object:
            began = time.thread_time()
            try:
                return work()
            finally:
                computed[what] += time.thread_time() - began

        return timed

    def _end(self, record: RoundEnded) -> None:
        cost, cpu, sent = self._cost, time.process_time(), self._bytes_out()
        cost.round, cost.outcome, cost.heard, cost.ended = (
            record.round,
            record.outcome,
            len(record.heard),
            time.monotonic(),
        )
        cost.round_cpu, cost.sent = cpu - self._cpu_ended, sent - self._sent_ended
        cost.computed, cost.payload = dict(self._computed), dict(self._payload)
        cost.stages = {name: at - cost.trained for name, at in cost.stages.items()}
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(cost)) + "\n")
        self._cost, self._computed, self._payload = RoundCost(), defaultdict(float), defaultdict(int)
        self._cpu_ended, self._sent_ended = cpu, sent


def _kind(key: str) -> str:
    """Return what a computation is, of a key such as `3/upload/0/2`."""
    return next((part for part in key.split("/") if not part.isdigit()), key)


def run_peer(path: str, awaited: int, cable: Connection | None) -> None:
    """Run one peer of a case, in this process.

    Args:
        path: its folder.
        awaited: see `Watched`.
        cable: gives its address, once it stands in a network namespace of its own; None to stay in this one.
    """
    if cable is not None:
        _enter_namespace(cable)
    from p2pfl.learning import chartered  # noqa: PLC0415
    from p2pfl.learning.trainer import Trained as TrainedVector  # noqa: PLC0415 - needs torch: not for the parent
    from p2pfl.learning.trainer import Trainer  # noqa: PLC0415
    from p2pfl.node import peer as peers  # noqa: PLC0415
    from p2pfl.node.federation import open_home  # noqa: PLC0415

    class ReadyTrainer(Trainer):
        def train(self, vector: Any, round: int, seconds: float = 0.0, mixed: bool = True) -> TrainedVector:
            del round, seconds, mixed
            return TrainedVector(vector + vector.dtype.type(1e-3), 0.0, 0.0, clipped=False, steps=1)

        def evaluate(self, vector: Any) -> dict[str, float]:
            del vector
            return {}

    class MeasuredPeer(peers.Peer):
        def machine(self, initial: Any, resume: Resume | None) -> Any:
            file = self.home.run_path / MEASURED_FILE
            out = self.transport
            return Watched(super().machine(initial, resume), self.plan.me, lambda: out.bytes_out, file, memory, awaited)  # type: ignore[union-attr]

    chartered.Trainer = ReadyTrainer  # type: ignore[misc]
    memory = Memory()
    home = open_home(Path(path))
    home = replace(home, config=home.config.model_copy(update={"history_every": 0}))
    peer = MeasuredPeer.prepare(home)
    anonymous, resident = memory.now()
    # The initial model is the first base, and so one of the vectors that count.
    size = 4 * peer.initial.size
    memory.without = (anonymous - size, resident - size)
    peer.run()


# In the parent


class CaseFailed(Exception):
    """A measurement came to no end; says why."""


def run_case(case: Case) -> list[list[RoundCost]]:
    """Run a case; return the rounds of each peer that was not killed.

    Raises:
        CaseFailed: it did not end well, or not in time.
    """
    with tempfile.TemporaryDirectory(prefix="p2pfl-bench-") as folder, _bridge() if case.shaped else nullcontext():
        return _run(_federation(Path(folder) / "run", case), case)


def _federation(path: Path, case: Case) -> LocalFederation:
    path.mkdir()
    (path / "ready.py").write_text(_TASK.format(parameters=case.parameters))
    averaging = {
        "topology": "groups",
        "group_size": case.members,
        "masks": "on" if case.masks else "off",
        "settle_rounds": 0,
        **({} if case.bits is None or not case.masks else {"bits": case.bits}),
    }
    terms = {
        "training": {"rounds": case.rounds, "local_steps": 1, "batch_size": 1},
        "averaging": averaging,
        "security": {"suite": case.suite},
        "deadlines": DEADLINES,
    }
    places = None
    if case.shaped:
        places = [(place, place) for place in (f"/ip4/{_address(n)}/tcp/4001" for n in range(case.members))]
    return create_federation(path, "ready.py:Ready", terms, [{}] * case.members, 0, addresses=places)


def _run(federation: LocalFederation, case: Case) -> list[list[RoundCost]]:
    preload()
    context = multiprocessing.get_context("forkserver")
    victims = VICTIMS[: case.dropouts]
    processes: list[ForkServerProcess] = []
    files = [home.run_path / MEASURED_FILE for home in federation.homes]
    until = time.monotonic() + case.seconds
    try:
        for number, home in enumerate(federation.homes):
            awaited = case.members - case.dropouts if number in victims else 0
            ours, theirs = context.Pipe() if case.shaped else (None, None)
            processes.append(context.Process(target=run_peer, args=(str(home.path), awaited, theirs)))
            processes[-1].start()
            if ours is not None:
                _plug(number, ours)
        kept = [number for number in range(case.members) if number not in victims]
        while any(_lines(files[number]) < case.rounds for number in kept):
            time.sleep(0.1)
            ended = [n for n in kept if not processes[n].is_alive() and _lines(files[n]) < case.rounds]
            if ended:
                raise CaseFailed(f"peer-{ended[0]} ended with {processes[ended[0]].exitcode}")
            if time.monotonic() > until:
                raise CaseFailed(f"not over after {case.seconds:.0f} s")
        return [[RoundCost(**json.loads(line)) for line in files[n].read_text().splitlines()] for n in kept]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


# Links of 1 Gbit/s


def _address(number: int) -> str:
    return f"10.78.0.{number + 1}"


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CaseFailed(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def _bridge() -> Iterator[None]:
    """Have a bridge in this process's network namespace, which is to be its own."""
    _call("ip", "link", "add", "bridge", "type", "bridge")
    try:
        _call("ip", "link", "set", "bridge", "up")
        yield
    finally:
        _call("ip", "link", "del", "bridge")


def _plug(number: int, cable: Connection) -> None:
    """Join a peer's namespace to the bridge; the bridge's end shapes what comes to it."""
    if not cable.poll(30):
        raise CaseFailed("a peer found no network of its own")
    end = f"peer{number}"
    _call("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", str(cable.recv()))
    _call("ip", "link", "set", end, "master", "bridge", "up")
    _shape(end)
    cable.send(_address(number))


def _enter_namespace(cable: Connection) -> None:
    """Leave this network namespace for one of its own, and shape what leaves that."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise CaseFailed(f"no network of its own: {os.strerror(ctypes.get_errno())}")
    cable.send(os.getpid())
    address = cable.recv()
    _call("ip", "link", "set", "lo", "up")
    _call("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    _call("ip", "link", "set", "eth0", "up")
    _shape("eth0")


def _shape(device: str) -> None:
    _call("tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", GIGABIT, "burst", "256k", "latency", "50ms")


if __name__ == "__main__":
    try:
        print(json.dumps([[asdict(cost) for cost in rounds] for rounds in run_case(Case(**json.loads(sys.argv[1])))]))
    except CaseFailed as error:
        sys.exit(str(error))
