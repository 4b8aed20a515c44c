"""The folder of a run, read: what was agreed, what each peer reported, and the models it left.

Owns what a run folder is. Must not change it, and takes nothing for granted about how a peer ended: a killed one leaves
a trace without an end, a short history and no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.charter import Charter
from p2pfl.core.errors import InvalidConfig, Malformed
from p2pfl.core.settings import parse_toml
from p2pfl.core.trace import Entry, Evaluated, PeerFinished, PeerStarted, RoundEnded
from p2pfl.learning.task import make_model
from p2pfl.learning.vector import Vector, flatten, load_model
from p2pfl.node.federation import (
    CHARTER_FILE,
    CONFIG_FILE,
    HISTORY_FILE,
    MODEL_FILE,
    Federation,
    Home,
    open_federation,
    open_home,
)
from p2pfl.node.launcher import HISTORY_BYTES, PEERS_FOLDER
from p2pfl.node.store import read_text
from p2pfl.node.tracefile import TRACE_FILE, first_round, read_trace
from p2pfl.simulation.runs import is_complete

SETTINGS_FILE = "settings.toml"
RUNS_FOLDER = "runs"
CANDIDATES_SHOWN = 5


@dataclass(frozen=True)
class Outcome:
    """How a peer ended.

    Attributes:
        kind: `done`, `stopped`, `failed`; `killed` where its trace has no end (or it runs still); `missing` where there
            is no trace.
        rounds: how many rounds it completed.
        agreed: whether its model is known to be within the charter's tolerance of the others.
        reason: why it failed.
    """

    kind: str
    rounds: int
    agreed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class PeerRun:
    """What one peer left.

    Attributes:
        home: its folder and settings.
        entries: its trace, of the latest run in this folder.
        model: the model after its last round, float32 [parameters]; None where it left none.
        history: copies of the model after 0, k, 2k ... rounds with k `home.config.history_every`, float32
            [copies, parameters].
        outcome: how it ended.
    """

    home: Home
    entries: tuple[Entry, ...]
    model: Vector | None
    history: NDArray[np.float32]
    outcome: Outcome

    @property
    def name(self) -> str:
        """The member's name."""
        return self.home.config.name

    @property
    def started(self) -> PeerStarted | None:
        """The first line of its trace."""
        return next((entry.event for entry in self.entries if isinstance(entry.event, PeerStarted)), None)

    @property
    def first_round(self) -> int:
        """The first round that is in its trace; 0 if all are, since a bounded one forgets the earliest."""
        return first_round(entry.event for entry in self.entries)

    def rounds_ended(self) -> list[tuple[float, RoundEnded]]:
        """Return the records of its rounds, each with the time it was written, in seconds since 1970."""
        return [(entry.at, entry.event) for entry in self.entries if isinstance(entry.event, RoundEnded)]

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Return the metrics it measured, by the number of rounds before."""
        return {e.event.rounds: e.event.metrics for e in self.entries if isinstance(e.event, Evaluated)}

    def traffic(self) -> tuple[int, int]:
        """Return the bytes it received and sent."""
        # Each life of a peer counts from nothing, and its last entry has the most.
        starts = [number for number, entry in enumerate(self.entries) if isinstance(entry.event, PeerStarted)]
        ends = [number - 1 for number in starts[1:]] + [len(self.entries) - 1]
        last = [self.entries[number] for number in ends if number >= 0]
        return sum(entry.bytes_in for entry in last), sum(entry.bytes_out for entry in last)


@dataclass(frozen=True)
class Run:
    """A run: of a whole federation on this machine, or of one member.

    Attributes:
        path: where its results are written.
        settings: what the run was made with; empty for a member's.
        peers: those whose folders are here, in the order of their numbers or names.
    """

    path: Path
    federation: Federation
    settings: Mapping[str, Any]
    peers: tuple[PeerRun, ...]

    @property
    def charter(self) -> Charter:
        """What the members agreed on."""
        return self.federation.charter


def open_run(path: Path) -> Run:
    """Read a run's folder, or one member's.

    Raises:
        InvalidConfig: it is neither, or something in it cannot be used.
    """
    if (path / PEERS_FOLDER).is_dir() and (path / CHARTER_FILE).is_file():
        folders = sorted((file.parent for file in (path / PEERS_FOLDER).glob(f"*/{CONFIG_FILE}")), key=_natural)
        if not folders:
            raise InvalidConfig(f"{path / PEERS_FOLDER}: has no member's folder with a {CONFIG_FILE} in it")
        federation = open_federation(path / CHARTER_FILE)
        peers = tuple(_read_peer(open_home(folder), federation) for folder in folders)
        return Run(path, federation, _read_settings(path / SETTINGS_FILE), peers)
    if (path / CONFIG_FILE).is_file():
        home = open_home(path)
        federation = open_federation(home.charter_path)
        return Run(home.run_path, federation, {}, (_read_peer(home, federation),))
    raise InvalidConfig(_no_run(path))


def _no_run(path: Path) -> str:
    if is_complete(path):
        return f"{path}: a simulated run, which keeps no models; p2pfl report draws it, and p2pfl demo keeps them"
    if any(is_complete(each) for each in path.glob("*")) and not _runs_in(path):
        return f"{path}: a folder of simulated runs; p2pfl compare {path} shows them, p2pfl report one of them"
    what = f"a run has {CHARTER_FILE} and {PEERS_FOLDER}/ in it, a member's folder {CONFIG_FILE}"
    places = (path, path / RUNS_FOLDER, path.parent, Path(RUNS_FOLDER))
    found = list(dict.fromkeys(str(run) for place in places for run in _runs_in(place)))
    # Runs are named by when they began: the last are the latest.
    names = ", ".join(found[-CANDIDATES_SHOWN:])
    state = "is not a run" if path.exists() else "there is no such folder"
    return f"{path}: {state}: {what}; " + (f"there are {names}" if found else "`p2pfl demo` makes one")


def _runs_in(place: Path) -> list[Path]:
    return sorted(file.parent for file in place.glob(f"*/{CHARTER_FILE}") if (file.parent / PEERS_FOLDER).is_dir())


def _natural(path: Path) -> tuple[str, int, str]:
    """Order peer-2 before peer-10."""
    stem = path.name.rstrip("0123456789")
    number = path.name[len(stem) :]
    return stem, int(number or 0), path.name


def _read_settings(path: Path) -> Mapping[str, Any]:
    return parse_toml(read_text(path, "the run's settings"), str(path)) if path.exists() else {}


def _read_peer(home: Home, federation: Federation) -> PeerRun:
    entries = _read_entries(home.run_path / TRACE_FILE, federation.charter)
    outcome = outcome_of(entries)
    model_path = home.run_path / MODEL_FILE
    # A peer that did not end in order has written no model: a file there is an earlier run's.
    left_model = outcome.kind in ("done", "stopped") and model_path.exists()
    return PeerRun(
        home,
        entries,
        _read_model(model_path, federation) if left_model else None,
        read_history(home.run_path / HISTORY_FILE, federation.charter.model.parameters),
        outcome,
    )


def _read_entries(path: Path, charter: Charter) -> tuple[Entry, ...]:
    """Read a trace from its last new start on: a folder may have seen several runs, and a peer several lives in one."""
    if not path.exists():
        return ()
    try:
        entries = read_trace(path)
    except (Malformed, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: {error}; remove that line") from error
    starts = [
        number
        for number, entry in enumerate(entries)
        if isinstance(entry.event, PeerStarted) and not entry.event.resumed_at
    ]
    entries = entries[starts[-1] :] if starts else entries
    for entry in entries:
        if isinstance(entry.event, PeerStarted) and entry.event.charter != charter.hash().hex():
            raise InvalidConfig(
                f"{path}: is of a run under charter {entry.event.charter[:12]}…, "
                f"the charter here is {charter.hash().hex()[:12]}…; name the folder of another run"
            )
    return tuple(entries)


def outcome_of(entries: tuple[Entry, ...]) -> Outcome:
    """Tell how a peer ended, from its trace."""
    if not entries:
        return Outcome("missing", 0)
    rounds = max((entry.event.round + 1 for entry in entries if isinstance(entry.event, RoundEnded)), default=0)
    ends = (entry.event for entry in reversed(entries) if isinstance(entry.event, PeerFinished | PeerStarted))
    end = next(ends, None)
    if not isinstance(end, PeerFinished):
        return Outcome("killed", rounds)
    return Outcome(end.outcome, rounds, end.agreed, end.reason)


def _read_model(path: Path, federation: Federation) -> Vector:
    model = make_model(federation.task.task)
    load_model(path, model)
    return flatten(model)


def read_history(path: Path, parameters: int) -> NDArray[np.float32]:
    """Read a file of copies, little-endian float32 [copies, parameters]; a copy that was being written is left out.

    No more is read than a demo's peers keep. Not mapped: a run that starts anew in this folder empties the file, and
    whoever has it mapped is killed.
    """
    if not path.exists():
        return np.empty((0, parameters), np.float32)
    copies = 1 + HISTORY_BYTES // (4 * parameters)
    values = np.fromfile(path, np.dtype("<f4"), count=copies * parameters)
    return values[: len(values) - len(values) % parameters].reshape(-1, parameters)
