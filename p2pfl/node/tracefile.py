"""Traces on disk: one writer, any number of readers that follow it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from p2pfl.core.errors import InvalidConfig, StoreFailed
from p2pfl.core.trace import Entry, Event, decode_entry, encode_entry

TRACE_FILE = "trace.jsonl"


class TraceWriter:
    """Appends events to a trace, each line in one write, so that a reader sees whole lines or none."""

    def __init__(self, path: Path, traffic: Callable[[], tuple[int, int]]) -> None:
        """Open the file; `traffic` tells the bytes (in, out) so far.

        Raises:
            InvalidConfig: it cannot be opened.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise InvalidConfig(f"{path}: the trace cannot be written: {error.strerror}") from error
        self._path = path
        self._traffic = traffic

    def write(self, event: Event) -> None:
        """Append `event`.

        Raises:
            StoreFailed: the file cannot be written any more.
        """
        bytes_in, bytes_out = self._traffic()
        try:
            self._file.write(encode_entry(Entry(time.time(), bytes_in, bytes_out, event)) + "\n")
        except OSError as error:
            raise StoreFailed(
                f"{self._path}: cannot be written: {error.strerror}; make room and start again"
            ) from error

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
        self._offset = path.stat().st_size if skip and path.exists() else 0

    def read_new(self) -> Iterator[Entry]:
        """Give the entries written since the last call; a line still being written waits for the next.

        Raises:
            Malformed: a line is something else; the next call goes on behind it.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                # A byte that is not UTF-8 becomes one that JSON takes nowhere but in a string.
                yield decode_entry(line.decode(errors="replace"))


def read_trace(path: Path) -> list[Entry]:
    """Read a whole trace.

    Raises:
        InvalidConfig: there is none.
        Malformed: a line of it is something else.
    """
    if not path.exists():
        raise InvalidConfig(f"{path}: there is no trace; name the folder of a run")
    return list(TraceReader(path).read_new())
