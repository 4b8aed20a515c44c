"""Traces on disk: one writer, any number of readers that follow it.

A trace is the file and, once that has grown to its bound, the one before it beside it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from p2pfl.core.config import LoggingConfig
from p2pfl.core.errors import InvalidConfig, Malformed, StoreFailed
from p2pfl.core.trace import Entry, Event, PeerStarted, RoundEnded, decode_entry, encode_entry

TRACE_FILE = "trace.jsonl"
STARTED, ROUND = (f'{{"event":"{kind.name}",'.encode() for kind in (PeerStarted, RoundEnded))
"""How `encode_entry` begins the lines of these."""
MOST_BYTES = LoggingConfig().trace_bytes


def older_of(path: Path) -> Path:
    """Return where a trace's file goes when it has grown to its bound."""
    return path.with_name(f"{path.name}.1")


class TraceWriter:
    """Appends events to a trace, each line in one write, so that a reader sees whole lines or none."""

    def __init__(self, path: Path, traffic: Callable[[], tuple[int, int]], most: int = MOST_BYTES) -> None:
        """Open the file; `traffic` tells the bytes (in, out) so far, `most` is the file's bound in bytes.

        Raises:
            InvalidConfig: it cannot be opened.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(path)
        except OSError as error:
            raise InvalidConfig(f"{path}: the trace cannot be written: {error.strerror}") from error
        self._path = path
        self._traffic = traffic
        self._most = most

    def _open(self, path: Path) -> None:
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._size = path.stat().st_size

    def write(self, event: Event) -> None:
        """Append `event`.

        Raises:
            StoreFailed: the file cannot be written any more.
        """
        bytes_in, bytes_out = self._traffic()
        line = encode_entry(Entry(time.time(), bytes_in, bytes_out, event)) + "\n"
        try:
            if self._size and self._size + len(line) > self._most:
                self._file.close()
                self._path.replace(older_of(self._path))
                self._open(self._path)
            self._file.write(line)
        except OSError as error:
            raise StoreFailed(
                f"{self._path}: cannot be written: {error.strerror}; make room and start again"
            ) from error
        self._size += len(line)  # of ASCII

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TraceReader:
    """Follows a trace that may not exist yet.

    Args:
        path: the trace.
        skip: whether what is there already, from an earlier run, is left out.
    """

    def __init__(self, path: Path, skip: bool = False) -> None:
        self._path = path
        self._offset = 0
        self._number: int | None = None
        """The file's that was read last; it stays the same when the file is put aside."""
        self._is_first = not skip
        if skip and path.exists():
            found = path.stat()
            self._offset, self._number = found.st_size, found.st_ino

    def read_new(self) -> Iterator[Entry]:
        """Give the entries written since the last call; a line still being written waits for the next.

        Raises:
            Malformed: a line is something else; the next call goes on behind it.
        """
        older, current = _number(older_of(self._path)), _number(self._path)
        if self._is_first and older is not None:
            self._number = older
        self._is_first = False
        if older is not None and older == self._number:
            yield from self._read(older_of(self._path))  # what was written before it was put aside
        if current is None:
            return
        if current != self._number:
            self._offset, self._number = 0, current
        yield from self._read(self._path)

    def _read(self, path: Path) -> Iterator[Entry]:
        with path.open("rb") as file:
            file.seek(self._offset)
            yield from self._entries(file)

    def _entries(self, file: BinaryIO) -> Iterator[Entry]:
        for line in file:
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            # A byte that is not UTF-8 becomes one that JSON takes nowhere but in a string.
            yield decode_entry(line.decode(errors="replace"))


def _number(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def read_trace(path: Path) -> list[Entry]:
    """Read a whole trace.

    Raises:
        InvalidConfig: there is none.
        Malformed: a line of it is something else.
    """
    if not path.exists() and not older_of(path).exists():
        raise InvalidConfig(f"{path}: there is no trace; name the folder of a run")
    return list(TraceReader(path).read_new())


def first_round(events: Iterable[Event]) -> int:
    """Return the first round of a run that is in these of its events; 0 if its beginning is."""
    first = None
    for event in events:
        if isinstance(event, PeerStarted) and not event.resumed_at:
            first = 0
        elif first is None and isinstance(event, PeerStarted | RoundEnded):
            first = event.resumed_at if isinstance(event, PeerStarted) else event.round
    return first or 0


def trace_begins(path: Path) -> int:
    """Return the first round that is still in a trace; 0 if its beginning is, or if there is no trace."""
    return first_round(_beginnings(path))


def _beginnings(path: Path) -> Iterator[Event]:
    """Give each start in a trace, and its first round: of two times 64 MB no more is decoded."""
    wanted: tuple[bytes, ...] = (STARTED, ROUND)
    for file in (older_of(path), path):
        with suppress(OSError), file.open("rb") as lines:
            for line in lines:
                if line.startswith(wanted):
                    with suppress(Malformed):
                        yield (event := decode_entry(line.decode(errors="replace")).event)
                        wanted = (STARTED,) if isinstance(event, RoundEnded) else wanted
