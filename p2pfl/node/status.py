"""Where a member stands: a small file that a running peer rewrites, and what its folder says beside it.

Nothing here asks the network: a running peer's view of the others is in its file, and of a stopped one only the folder
speaks. Of other members the file has names and whether they are there, no figures.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import trio
from pydantic import Field
from safetensors import SafetensorError, safe_open

from p2pfl.core.charter import Charter
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import Settings, validate
from p2pfl.core.trace import (
    Evaluated,
    Event,
    LinkChanged,
    MemberChanged,
    PeerFinished,
    PeerStarted,
    RoundEnded,
    StateChanged,
)
from p2pfl.crypto.identity import charter_faults, member_faults
from p2pfl.node.federation import FINISHED_FILE, MODEL_FILE, STATE_FOLDER, Home, load_charter
from p2pfl.node.spending import Spendings, spendings
from p2pfl.node.store import is_held, read_bytes, write_quickly
from p2pfl.node.tracefile import TRACE_FILE, trace_begins

STATUS_FILE = "status.json"
MOST_BYTES = 1 << 20
"""Of the file: far more than names of all members a sum can have."""
PERIOD, LONGEST_PERIOD = 1.0, 10.0
"""Seconds between two looks whether there is news, and after which the file is written without any; guesses."""
STANDINGS = {"here": "reachable", "late": "late", "unreachable": "away", "left": "left"}
"""What a member's standing in a trace is called here."""


class LastRound(Settings):
    """The record of the last round that ended, without other members' figures.

    Attributes:
        round: its number.
        outcome: how it ended; empty for gossip among neighbors.
        heard: how many others are in the average.
        absent: who is not in it of those that might have been.
        loss: of the own local steps.
        seconds: how long it took.
        reason: why this peer was in no sum, where no single member is the cause.
    """

    round: int
    outcome: str
    heard: int
    absent: tuple[str, ...] = Field(strict=False)
    loss: float | None
    seconds: float
    reason: str = ""


class Progress(Settings):
    """What a running peer says of itself.

    Attributes:
        written_at: seconds since 1970.
        started_at: likewise.
        charter: the hash that it runs under, in hexadecimal.
        listen: the addresses that it has bound.
        state: what it is doing.
        rounds: how many have ended.
        members: how each other member seems: reachable, late, away or left; those it has no word of are not there.
        last: the last round's record.
        metrics: of its own model on its own held-out data.
        outcome: done, stopped or failed; empty before.
        reason: why it failed.
    """

    written_at: float
    started_at: float
    charter: str = ""
    listen: tuple[str, ...] = Field(default=(), strict=False)
    state: str = "starting"
    rounds: int = 0
    members: dict[str, str] = Field(default_factory=dict)
    last: LastRound | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)
    outcome: str = ""
    reason: str = ""


def fold(progress: Progress, event: Event) -> Progress:
    """Return what a peer says of itself once this has happened to it."""
    match event:
        case PeerStarted(charter=charter, resumed_at=round):
            return progress.model_copy(update={"charter": charter, "rounds": round})
        case StateChanged(state, _):
            return progress.model_copy(update={"state": str(state)})
        case MemberChanged(member, standing):
            return _seems(progress, member, STANDINGS.get(standing, standing))
        case LinkChanged(neighbor, up, _) if up or progress.members.get(neighbor) != "left":
            return _seems(progress, neighbor, "reachable" if up else "away")
        case RoundEnded() as ended:
            last = LastRound(
                round=ended.round,
                outcome=ended.outcome,
                heard=len(ended.heard),
                absent=tuple(ended.absent),
                loss=ended.loss,
                seconds=ended.seconds,
                reason=ended.reason,
            )
            return progress.model_copy(update={"last": last, "rounds": ended.round + 1})
        case Evaluated(_, metrics):
            return progress.model_copy(update={"metrics": dict(metrics)})
        case PeerFinished(outcome, _, _, reason):
            last_state = "failed" if outcome == "failed" else "done"
            return progress.model_copy(update={"state": last_state, "outcome": outcome, "reason": reason})
    return progress


def _seems(progress: Progress, member: str, standing: str) -> Progress:
    return progress.model_copy(update={"members": {**progress.members, member: standing}})


class StatusWriter:
    """Keeps a running peer's file: written anew when something happened, once a second at most.

    A file that cannot be written stops nobody: what a peer needs to go on is kept elsewhere, and fails there.

    Args:
        path: the file.
        now: seconds since 1970.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path, self._now = path, now
        self._progress = Progress(written_at=now(), started_at=now())
        self._is_news = True

    @property
    def progress(self) -> Progress:
        """What the peer says of itself now."""
        return self._progress

    def note(self, event: Event) -> None:
        """Take in what happened."""
        after = fold(self._progress, event)
        self._is_news = self._is_news or after is not self._progress
        self._progress = after

    def listens(self, addresses: tuple[str, ...]) -> None:
        """Take in where the peer listens, and write the file: from here on the peer can be asked for."""
        self._progress = self._progress.model_copy(update={"listen": addresses})
        self.write()

    def write(self) -> None:
        """Write the file as things are now."""
        self._progress = self._progress.model_copy(update={"written_at": self._now()})
        self._is_news = False
        write_quickly(self._path, self._progress.model_dump_json(indent=1).encode())

    async def keep(self) -> None:
        """Write the file whenever there is news, and now and then without, until cancelled."""
        while True:
            if self._is_news or self._now() - self._progress.written_at >= LONGEST_PERIOD:
                self.write()
            await trio.sleep(PERIOD)


def read_progress(path: Path) -> Progress | None:
    """Read what a peer said of itself last; None where there is no file.

    Raises:
        InvalidConfig: it is something else.
    """
    if not path.exists():
        return None
    if path.stat().st_size > MOST_BYTES:
        raise InvalidConfig(f"{path}: of over {MOST_BYTES} bytes; remove it, a peer writes it anew")
    try:
        values = json.loads(read_bytes(path, "the peer's status"))
    except ValueError as error:
        raise InvalidConfig(f"{path}: not JSON; remove it, a peer writes it anew") from error
    return validate(Progress, values, str(path))


# What a folder says


@dataclass(frozen=True)
class CharterStatus:
    """How far a charter has come.

    Attributes:
        path: its file.
        federation: its name.
        version: counts charters of one federation.
        hash: in hexadecimal.
        in_force: whether nothing is missing in it.
        signed: who has signed it as it is.
        unsigned: who has not.
        faults: what keeps it from being in force.
    """

    path: str
    federation: str
    version: int
    hash: str
    in_force: bool
    signed: tuple[str, ...]
    unsigned: tuple[str, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class ModelStatus:
    """The model that a peer left: its file, its bytes, and after how many rounds."""

    path: str
    bytes: int
    rounds: int | None


@dataclass(frozen=True)
class DiskStatus:
    """Bytes free where a peer writes, and bytes that its run takes."""

    free_bytes: int
    run_bytes: int


@dataclass(frozen=True)
class Status:
    """Where a member stands.

    Attributes:
        member: its name.
        folder: of its `peer.toml`.
        running: whether its peer runs now.
        finished: whether its peer has trained to the end under this charter.
        charter: how far that has come; None where there is none.
        charter_fault: why not.
        members: how each other member seems; `unknown` where the peer does not run.
        rounds: of the charter.
        peer: what the peer said of itself last; None if it never did under this charter.
        model: None before there is one.
        privacy: what is spent of the charter's privacy budgets; None where it has none, or the ledger cannot be read.
        first_round: the first that the peer's trace still has; 0 if it is whole.
        next: the command that comes next, or what to wait for.
    """

    member: str
    folder: str
    running: bool
    finished: bool
    charter: CharterStatus | None
    charter_fault: str
    members: Mapping[str, str]
    rounds: int | None
    peer: Progress | None
    model: ModelStatus | None
    disk: DiskStatus
    privacy: Spendings | None = None
    first_round: int = 0
    next: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        values = asdict(replace(self, peer=None))
        return values | {"peer": None if self.peer is None else self.peer.model_dump(mode="json")}


def free_bytes(path: Path) -> int:
    """Return how many bytes are free where `path`, or what will hold it, is."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def status_of(home: Home, free: Callable[[Path], int] = free_bytes) -> Status:
    """Return where a member stands.

    Args:
        home: its folder.
        free: tells the bytes that are free where a path is.
    """
    name, run = home.config.name, home.run_path
    charter, fault = None, ""
    try:
        charter = load_charter(home.charter_path)
    except InvalidConfig as error:
        fault = str(error)
    running = is_held(run)
    finished = charter is not None and is_finished(home, charter)
    peer, digest = None, "" if charter is None else charter.hash().hex()
    try:
        peer = read_progress(run / STATUS_FILE)
    except InvalidConfig as error:
        fault = fault or str(error)
    spent = None
    try:
        spent = None if charter is None else spendings(home, charter)
    except InvalidConfig as error:
        fault = fault or str(error)
    if peer is not None and peer.charter != digest:
        peer = None  # of another charter
    others = [] if charter is None else [other for other in charter.names() if other != name]
    seen = {} if peer is None or not running else peer.members
    found = Status(
        member=name,
        folder=str(home.path),
        running=running,
        finished=finished,
        charter=None if charter is None else charter_status(shortest(home.charter_path), charter),
        charter_fault=fault,
        members={other: seen.get(other, "unknown") for other in others},
        rounds=None if charter is None else charter.rounds,
        peer=peer,
        model=_model_status(run / MODEL_FILE),
        disk=DiskStatus(free(run), bytes_in(run)),
        privacy=spent,
        first_round=0 if peer is None else trace_begins(run / TRACE_FILE),
    )
    return replace(found, next=next_step(found))


def shortest(path: Path) -> Path:
    """Return a path for people to read and type: from where they are, without detours."""
    return Path(os.path.relpath(path.resolve())) if not path.is_absolute() else path.resolve()


def charter_status(path: Path, charter: Charter) -> CharterStatus:
    """Return how far a charter has come."""
    faults, without = tuple(charter_faults(charter)), member_faults(charter)
    signed = tuple(name for name in charter.names() if name not in without)
    unsigned = tuple(sorted(without))
    digest = charter.hash().hex()
    return CharterStatus(str(path), charter.name, charter.version, digest, not faults, signed, unsigned, faults)


def next_step(status: Status) -> str:
    """Return the command that comes next, or what to wait for."""
    charter, folder = status.charter, status.folder
    if charter is None:
        return f"p2pfl charter join CHARTER --config {folder}, with the draft you were sent"
    if status.running:
        return "nothing to do: the peer runs"
    if status.finished:
        return f"p2pfl evaluate {folder}"
    if status.member not in (*charter.signed, *charter.unsigned):
        return f"p2pfl charter join {charter.path} --config {folder}"
    if len(charter.signed) + len(charter.unsigned) == 1:
        return "pass the charter's folder on: the other members run p2pfl charter join"
    if status.member in charter.unsigned:
        return f"p2pfl charter sign {charter.path} --config {folder}, once you have read p2pfl charter show"
    if charter.unsigned:
        return f"wait until {', '.join(charter.unsigned)} signed, and take a copy of the signed folder"
    if not charter.in_force:
        return f"p2pfl charter check {charter.path}"
    return f"p2pfl doctor {folder}, then p2pfl peer --config {folder}"


def is_finished(home: Home, charter: Charter) -> bool:
    """Return whether a member's peer has trained to the end under this charter."""
    try:
        return (home.run_path / FINISHED_FILE).read_text().strip() == charter.hash().hex()
    except (OSError, UnicodeDecodeError):
        return False


def _model_status(path: Path) -> ModelStatus | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            rounds = (file.metadata() or {}).get("rounds", "")
    except (OSError, SafetensorError):
        rounds = ""
    return ModelStatus(str(path), path.stat().st_size, int(rounds) if rounds.isdecimal() else None)


def bytes_in(run: Path) -> int:
    """Return the bytes of the run's files; it has no folders but that of its state."""
    files = [*run.glob("*"), *(run / STATE_FOLDER).glob("*")]
    total = 0
    for file in files:
        with suppress(OSError):  # replaced meanwhile
            total += file.lstat().st_size if file.is_file() else 0
    return total
