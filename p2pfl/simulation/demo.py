"""`p2pfl demo`: a whole federation on this machine, from empty folders to one model.

The same steps that organisations take one by one (init, join, sign, run a peer each) are taken here for all; what
runs then are real peers in processes of their own over real sockets, and nothing here has a part in what they
compute.
"""

import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import tomlkit

from p2pfl import __version__
from p2pfl.core.charter import MOST_EPSILON, AveragingTerms, TableTerms
from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.core.privacy import ExampleBudget, epsilon_of, noise_for, rho_of
from p2pfl.core.trace import Entry
from p2pfl.gossip.grouping import LEAST_MASKED, averaging_faults
from p2pfl.gossip.topology import overlay
from p2pfl.learning.credit import TABLE
from p2pfl.learning.task import load_task, read_data
from p2pfl.node.federation import CHARTER_FILE, load_charter
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
from p2pfl.simulation.chaos import Chaos, LocalHands, draw_faults, gated_addresses, gates_of, most_at_once, verify_chaos
from p2pfl.simulation.credit import write_credits

DATA_FOLDER = "data"
"""In the run's folder: the tables of the task `tabular`, made up."""
POLL_SECONDS = 0.2
"""How often the traces are read for the view; nothing waits for it."""
CLIP_NORM = 0.5
"""Where there is noise. The median norm of an update of `digits` is 0.9 in its first rounds, 0.5 in the last; clipped
to this, eight peers lose two points in 60 rounds without noise, and half of it costs fifteen."""
EXAMPLE_CLIP = 1.0
"""Of one example's gradient, where there is noise in gradients; a guess."""
DELTA = 1e-5
DEADLINES = {"start": 60.0, "round": 5.0}
"""In seconds. Nobody but a peer that hangs lets the second pass, and it does so once: then no round waits for it. Far
above what a machine that is busy with other work takes for a round, so that equal seeds give equal models."""
CHAOS_DEADLINES = {"start": 60.0, "round": 4.0, "heartbeat": 2.0, "silence": 6.0}
"""Shorter where peers are frozen on purpose: one that hangs costs its group the second once, and one that dies in the
middle of a sum some stages of at most a second each."""


@dataclass(frozen=True)
class DemoSettings:
    """What `p2pfl demo` can be told.

    Attributes:
        group_size: members wanted in a group. Half of the demo's peers, so that there is something to draw: the
            charter's default, 8, would put all of them into one group.
        masks: whether single updates are hidden.
        bits: 16 to average changes in words of 16 bits where members share a base.
        alpha: the Dirichlet concentration of the peers' shares of data; smaller is less alike.
        noise: in sums, as a multiple of the clip; 0 for none, or where epsilon is given, for what that takes.
        epsilon: the budget at a delta of 1e-5; 0 for what all rounds cost.
        example_noise: in gradients, as a multiple of `EXAMPLE_CLIP`; 0 for none.
        chaos: whether peers are killed, frozen and cut off meanwhile.
        data: a file or folder that all peers read, and take shares of; empty: the task has its own.
    """

    peers: int = 8
    topology: str = "groups"
    group_size: int = 4
    rounds: int = 60
    task: str = "digits"
    alpha: float = 0.5
    seed: int = 0
    local_steps: int = 2
    batch_size: int = 32
    tolerance: float = 1e-6
    suite: str = "aes"
    masks: bool = True
    bits: int = 32
    noise: float = 0.0
    epsilon: float = 0.0
    example_noise: float = 0.0
    chaos: bool = False
    data: str = ""


class View(Protocol):
    """Who is shown what happens."""

    def update(self, new: Mapping[str, Sequence[Entry]]) -> None:
        """Take what is new in the traces."""

    def tell(self, name: str, text: str, mark: str) -> None:
        """Take what happened to a peer, and what is shown beside its state from now on."""


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
    if settings.masks and settings.peers < LEAST_MASKED:
        raise InvalidConfig(
            f"--peers {settings.peers}: from the average each would learn the other's update; "
            f"take {LEAST_MASKED} or more, or add --no-masks"
        )
    if settings.bits not in {16, 32} or (settings.bits == 16 and not settings.masks):
        raise InvalidConfig(f"--bits {settings.bits}: masked sums have words of 32 or 16 bits")
    _verify_data(settings)
    _verify_noise(settings)
    if settings.topology != "groups":
        graph = overlay(settings.topology, settings.peers, settings.seed)
        averaging = AveragingTerms.model_validate(_averaging(settings))
        for fault in averaging_faults(settings.peers, averaging, graph):
            raise InvalidConfig(fault)
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


def _verify_data(settings: DemoSettings) -> None:
    if settings.data and settings.task == "tabular":
        raise InvalidConfig("--data: the demo's tables are made up; leave it out, or give each member its own file")
    if settings.data and not Path(settings.data).exists():
        raise InvalidConfig(f"--data {settings.data}: there is no such file or folder")


def _verify_noise(settings: DemoSettings) -> None:
    if (settings.noise or settings.epsilon) and not settings.masks:
        raise InvalidConfig("--noise and --epsilon are for masked sums; leave --no-masks out")
    if settings.example_noise < 0:
        raise InvalidConfig(f"--example-noise is above 0, not {settings.example_noise:g}")
    if settings.example_noise and settings.task == "tabular":
        raise InvalidConfig("--example-noise: the demo's tables are scaled by all members' data; take another task")
    if settings.noise < 0 or not 0 <= settings.epsilon <= MOST_EPSILON:
        raise InvalidConfig(f"--noise is above 0, and --epsilon from 0 to {MOST_EPSILON:g}")


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
            "clip_norm": CLIP_NORM if settings.noise or settings.epsilon else 0.0,
        },
        "averaging": _averaging(settings),
        "security": {"suite": settings.suite},
        "deadlines": CHAOS_DEADLINES if settings.chaos else DEADLINES,
    }
    table, data = _table_and_data(path, settings)
    terms |= _privacy(settings, partial(_fewest_examples, source, path, data))
    addresses = gated_addresses(settings.peers) if settings.chaos else None
    # Drawn from the seed, so that equal seeds draw equal groups: here nobody distrusts anybody.
    salts = [hashlib.sha256(f"p2pfl/demo/{settings.seed}/{index}".encode()).digest() for index in range(settings.peers)]
    federation = create_federation(
        path, source, terms, data, settings.seed, addresses=addresses, table=table, salts=salts
    )
    if settings.chaos:
        verify_chaos(load_charter(path / CHARTER_FILE))
    write_atomic(path / "settings.toml", tomlkit.dumps({"p2pfl": __version__, **asdict(settings)}).encode())
    return federation


def _table_and_data(path: Path, settings: DemoSettings) -> tuple[TableTerms | None, list[dict[str, Any]]]:
    """Return what the peers' tables hold, for a task that takes some, and each peer's `[data]`."""
    if settings.task != "tabular":
        shared = {"partition": "dirichlet", "alpha": settings.alpha, "peers": settings.peers, "seed": settings.seed}
        given = {"path": str(Path(settings.data).absolute())} if settings.data else {}
        return None, [{**given, **shared, "index": index} for index in range(settings.peers)]
    files = write_credits(path / DATA_FOLDER, settings.peers, settings.alpha, settings.seed)
    above = Path("../..")  # from a peer's folder
    test = str(above / files.test.relative_to(path))
    return TABLE, [{"path": str(above / file.relative_to(path)), "test_path": test} for file in files.banks]


def _privacy(settings: DemoSettings, fewest: Callable[[], int]) -> dict[str, Any]:
    """Return the charter's table of that name; none without noise. `fewest`: tells how few examples a peer has."""
    terms = _noise_in_sums(settings)
    if settings.example_noise:
        terms["examples"] = _noise_in_gradients(settings, fewest())
    return {"privacy": terms} if terms else {}


def _noise_in_gradients(settings: DemoSettings, fewest: int) -> dict[str, Any]:
    rate, steps = min(1.0, settings.batch_size / fewest), settings.rounds * settings.local_steps
    # The error of drawing noise is nothing, however many values the model has: one will do.
    spent = ExampleBudget(settings.example_noise, MOST_EPSILON, DELTA, rate, settings.local_steps, 1).spent(steps)
    epsilon = min(MOST_EPSILON, math.ceil(100 * spent + 1) / 100)
    terms = {"noise": settings.example_noise, "clip": EXAMPLE_CLIP, "epsilon": epsilon, "delta": DELTA}
    return terms | {"samples_min": fewest}


def _fewest_examples(source: str, path: Path, data: Sequence[Mapping[str, Any]]) -> int:
    task = load_task(source, path).task
    return min(len(read_data(task, each).train) for each in data)


def _noise_in_sums(settings: DemoSettings) -> dict[str, Any]:
    """Return what noise in sums takes; one member of a group may be absent, and the others' is sized for that."""
    if not settings.noise and not settings.epsilon:
        return {}
    noise, epsilon = settings.noise, settings.epsilon
    noise = noise or noise_for(settings.rounds, epsilon, DELTA)
    epsilon = epsilon or min(MOST_EPSILON, math.ceil(100 * epsilon_of(settings.rounds * rho_of(noise), DELTA)) / 100)
    fewest = settings.peers // max(1, settings.peers // min(settings.group_size, settings.peers))
    survivors = {"survivors": fewest - 1} if settings.topology == "groups" and fewest > LEAST_MASKED else {}
    return {"noise": noise, "epsilon": epsilon, "delta": DELTA, **survivors}


def _averaging(settings: DemoSettings) -> dict[str, Any]:
    return {
        "topology": settings.topology,
        "group_size": settings.group_size,
        "masks": "on" if settings.masks else "off",
        "bits": settings.bits,
        "topology_seed": settings.seed,
        "tolerance": settings.tolerance,
    }


def _bring_task(path: Path, source: str) -> str:
    """Copy a user's task file beside the charter, as each member would have it; return its source from there."""
    file, colon, name = source.rpartition(":")
    if not colon:
        return source
    if not Path(file).is_file():
        raise InvalidConfig(f"--task {source}: there is no file {file}")
    shutil.copyfile(file, path / Path(file).name)
    return f"{Path(file).name}:{name}"


def run_demo(federation: LocalFederation, view: View, debug: bool = False, chaos: bool = False) -> dict[str, Failure]:
    """Run all peers to their end and show what they report; return how those ended that did not end well.

    Args:
        federation: whose peers are run.
        view: is shown what happens.
        debug: whether tracebacks are printed.
        chaos: whether peers are killed, frozen and cut off meanwhile; the federation was prepared for that.

    Raises:
        RoundFailed: no peer ended well.
        KeyboardInterrupt: the user has enough, or the terminal was closed; all peers have been stopped.
    """
    launcher = Launcher(federation, debug)
    with interrupted_by_signals(), _faults(federation, launcher) if chaos else nullcontext() as faults:
        watch = _Watch(launcher, view, faults)
        try:
            launcher.start()
            while launcher.is_running():
                watch.look()
                time.sleep(POLL_SECONDS)
        finally:
            launcher.stop()
            watch.show()
    failures = launcher.failures()
    if len(failures) == len(federation.homes):
        traces = federation.path / PEERS_FOLDER
        raise RoundFailed(f"{describe(failures, len(failures))}; traces are in {traces}")
    return failures


@contextmanager
def _faults(federation: LocalFederation, launcher: Launcher) -> Iterator[Chaos]:
    """Give what happens to the peers meanwhile, and the gates before them."""
    charter = load_charter(federation.path / CHARTER_FILE)
    names = [home.config.name for home in federation.homes]
    with gates_of(federation) as gates:
        faults = draw_faults(names, charter.averaging.topology_seed)
        yield Chaos(names, charter.rounds, faults, most_at_once(charter), LocalHands(launcher, gates))


class _Watch:
    """Reads the traces for those who want to know; the peers train on, watched or not."""

    def __init__(self, launcher: Launcher, view: View, chaos: Chaos | None) -> None:
        self._launcher = launcher
        self._view = view
        self._chaos = chaos
        self._shown = True

    def look(self) -> None:
        """Show what is new, and let faults begin and end."""
        new = self.show()
        if self._chaos is not None:
            for each in self._chaos.step(new, time.monotonic()):
                self._try(partial(self._view.tell, each.peer, each.text, each.mark))

    def show(self) -> Mapping[str, Sequence[Entry]]:
        """Show and return what is new."""
        new: dict[str, list[Entry]] = {}
        self._try(lambda: new.update(self._launcher.read_new()), always=self._chaos is not None)
        self._try(lambda: self._view.update(new))
        return new

    def _try(self, show: Callable[[], None], *, always: bool = False) -> None:
        """Do what may fail; after that, nothing more is shown."""
        if not (self._shown or always):
            return
        try:
            show()
        except BrokenPipeError:
            self._shown = False
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the latter is how rich says that nobody reads
            told, self._shown = not self._shown, False
            if isinstance(error, Exception) and not told:
                with suppress(OSError):
                    sys.stderr.write(f"no longer shown: {type(error).__name__}: {error}; the peers go on\n")
