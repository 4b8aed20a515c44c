"""`p2pfl demo`: a whole federation on this machine, from empty folders to one model.

The same steps that organisations take one by one (init, join, sign, run a peer each) are taken here for all; what
runs then are real peers in processes of their own over real sockets, and nothing here has a part in what they
compute.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import tomlkit

from p2pfl import __version__
from p2pfl.core.errors import InvalidConfig, P2pflError, RoundFailed
from p2pfl.core.trace import Entry
from p2pfl.node.launcher import Launcher, LocalFederation, create_federation
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


def prepare_demo(path: Path, settings: DemoSettings) -> LocalFederation:
    """Make the run's folder with a signed charter and a member's folder for each peer.

    Raises:
        InvalidConfig: a setting cannot be used, or the folder is not empty.
    """
    if path.exists() and any(path.iterdir()):
        raise InvalidConfig(f"{path}: is not empty; name another folder for this run")
    if not 2 <= settings.peers <= 128:
        raise InvalidConfig(f"--peers {settings.peers}: this machine can show 2 to 128 peers")
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        return _prepare(path, settings)
    except P2pflError:
        if made:
            shutil.rmtree(path)
        raise


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


def run_demo(federation: LocalFederation, view: View, debug: bool = False) -> None:
    """Run all peers to their end and show what they report.

    Raises:
        RoundFailed: every peer failed.
        KeyboardInterrupt: the user has enough; all peers have been stopped.
    """
    launcher = Launcher(federation, debug)
    try:
        launcher.start()
        while launcher.is_running():
            view.update(launcher.read_new())
            time.sleep(POLL_SECONDS)
        view.update(launcher.read_new())
    finally:
        launcher.stop()
        view.update(launcher.read_new())
    failed = launcher.failed()
    if len(failed) == len(federation.homes):
        raise RoundFailed(f"all {len(failed)} peers failed; their traces in {federation.path / 'peers'} say why")
