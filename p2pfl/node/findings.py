"""What a doctor finds, as values, and the world it looks at, as parameters."""

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from p2pfl.core.errors import P2pflError
from p2pfl.core.wire import SPOKEN, Versions
from p2pfl.node.consult import RELEASE
from p2pfl.node.status import free_bytes


class Level(StrEnum):
    """How bad it is: a federation can run with `warn`, this member cannot take part with `FAIL`."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of a doctor's report.

    Attributes:
        check: what was looked at, one of `CHECKS`.
        level: how bad it is.
        what: was found.
        todo: about it; empty where there is nothing to do.
        member: the other member it is about; empty for the own side.
    """

    check: str
    level: Level
    what: str
    todo: str = ""
    member: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def line(self) -> str:
        """Return it as a line of text."""
        where = f"{self.check} of {self.member}" if self.member else self.check
        return f"{self.level:<5}{where}: {self.what}{f'; {self.todo}' if self.todo else ''}"


CHECKS = (
    *("settings", "versions", "extras", "keys", "crypto", "charter", "signatures", "disk", "port", "announce"),
    *("data", "training", "reach", "link", "clock", "firewall"),
)
"""Names of checks, in the order of a report; in JSON they stay as they are."""


def failed(check: str, error: P2pflError, member: str = "") -> Finding:
    """Return the finding for one of our errors, whose messages say after a semicolon what to do."""
    what, _, todo = str(error).partition("; ")
    return Finding(check, Level.FAIL, what, todo, member)


def _is_installed(name: str) -> bool:
    # Looking for its file is not enough: a library that it loads may be missing.
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def usable_cores() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Probe:
    """The world that a doctor looks at; tests give another.

    Attributes:
        now: this machine's clock, seconds since 1970.
        stopwatch: seconds that only ever grow.
        free: bytes that are free where a path is.
        can_import: whether a module is installed.
        cores: that this process may use.
        release: this version of p2pfl.
        wire: the versions of its messages.
    """

    now: Callable[[], float] = time.time
    stopwatch: Callable[[], float] = time.perf_counter
    free: Callable[[Path], int] = free_bytes
    can_import: Callable[[str], bool] = _is_installed
    cores: Callable[[], int] = usable_cores
    release: str = RELEASE
    wire: Versions = SPOKEN
