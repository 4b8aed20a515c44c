"""`p2pfl demo`: a whole federation on this machine, from empty folders to one model.

The same steps that organisations take one by one (init, join, sign, run a peer each) are taken here for all; what
runs then are real peers in processes of their own over real sockets, and nothing here has a part in what they
compute.
"""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

import tomlkit

from p2pfl import __version__
from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.core.trace import Entry
from p2pfl.node.launcher import (
    PEERS_FOLDER,
    Failure,
    Launcher,
    LocalFederation,
    create_federation,
    describe,
    interrupted_by_signals,
)
from p2pfl.node.store import write_atomic

POLL_SECONDS = 0.2
"""How often the traces are read for the view; nothing waits for it."""


@dataclass(frozen=True)
class DemoSettings:
    """What `p2pfl demo` can be told; `alpha` is the Dirichlet concentration, smaller is less alike."""

    peers: int = 8
    topology: str = "exponential"
    rounds: int = 60
    task: str = "digits"
    alpha: float = 0.5
    seed: int = 0
    local_steps: int = 2
    batch_size: int = 32
    tolerance: float = 1e-6
    suite: str = "aes"


class View(Protocol):
    """Who is shown what happens."""

    def update(self, new: Mapping[str, Sequence[Entry]]) -> None:
        """Take what is new in the traces."""


def prepare_demo(path: Path, settings: DemoSettings, numbered: bool = False) -> LocalFederation:
    """Make the run's folder with a signed charter and a member's folder for each peer.

    Args:
        path: the run's folder: a new one, or an empty one.
        settings: what the user chose.
        numbered: whether to take the next free of `path`-2, `path`-3 ... where there is such a folder already.

    Raises:
        InvalidConfig: a setting cannot be used, or the folder is not empty.
    """
    if not 2 <= settings.peers <= 128:
        raise InvalidConfig(f"--peers {settings.peers}: this machine can show 2 to 128 peers")
    path.parent.mkdir(parents=True, exist_ok=True)
    if numbered:
        path = _first_free(path)
        made = True
    else:
        made = _make(path)
        if not made and any(path.iterdir()):
            raise InvalidConfig(f"{path}: is not empty; name another folder for this run")
    # Of two demos that find the same empty folder, one gets here first.
    if not _make(path / PEERS_FOLDER):
        raise InvalidConfig(f"{path}: another run has just begun there; name another folder for this run")
    try:
        return _prepare(path, settings)
    except BaseException:
        if made:
            shutil.rmtree(path)
        raise


def _first_free(path: Path) -> Path:
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in count(1))
    return next(name for name in names if _make(name))


def _make(path: Path) -> bool:
    """Make a folder; return whether it was not there."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _prepare(path: Path, settings: DemoSettings) -> LocalFederation:
    source = _bring_task(path, settings.task)
    terms = {
        "training": {
            "rounds": settings.rounds,
            "local_steps": settings.local_steps,
            "batch_size": settings.batch_size,
        },
        "averaging": {
            "topology": settings.topology,
            "topology_seed": settings.seed,
            "tolerance": settings.tolerance,
        },
        "security": {"suite": settings.suite},
        "deadlines": {"start": 60.0, "round": 20.0},
    }
    shared = {"partition": "dirichlet", "alpha": settings.alpha, "peers": settings.peers, "seed": settings.seed}
    data = [{**shared, "index": index} for index in range(settings.peers)]
    federation = create_federation(path, source, terms, data, settings.seed)
    write_atomic(path / "settings.toml", tomlkit.dumps({"p2pfl": __version__, **asdict(settings)}).encode())
    return federation


def _bring_task(path: Path, source: str) -> str:
    """Copy a user's task file beside the charter, as each member would have it; return its source from there."""
    file, colon, name = source.rpartition(":")
    if not colon:
        return source
    if not Path(file).is_file():
        raise InvalidConfig(f"--task {source}: there is no file {file}")
    shutil.copyfile(file, path / Path(file).name)
    return f"{Path(file).name}:{name}"


def run_demo(federation: LocalFederation, view: View, debug: bool = False) -> dict[str, Failure]:
    """Run all peers to their end and show what they report; return how those ended that did not end well.

    Raises:
        RoundFailed: no peer ended well.
        KeyboardInterrupt: the user has enough, or the terminal was closed; all peers have been stopped.
    """
    launcher = Launcher(federation, debug)
    shown = True
    with interrupted_by_signals():
        try:
            launcher.start()
            while launcher.is_running():
                shown = shown and _show(launcher, view)
                time.sleep(POLL_SECONDS)
        finally:
            launcher.stop()
            if shown:
                _show(launcher, view)
    failures = launcher.failures()
    if len(failures) == len(federation.homes):
        traces = federation.path / PEERS_FOLDER
        raise RoundFailed(f"{describe(failures, len(failures))}; traces are in {traces}")
    return failures


def _show(launcher: Launcher, view: View) -> bool:
    """Show what is new; return whether that went well: the peers train on, watched or not."""
    try:
        view.update(launcher.read_new())
    except BrokenPipeError:
        return False
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the latter is how rich says that nobody reads
        if isinstance(error, Exception):
            with suppress(OSError):
                sys.stderr.write(f"no longer shown: {type(error).__name__}: {error}; the peers go on\n")
        return False
    return True
