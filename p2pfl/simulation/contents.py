"""What is in files of data, as a hash: a run is known by what it was trained on, not by where that lay."""

import hashlib
from functools import lru_cache
from pathlib import Path

from p2pfl.core.errors import InvalidConfig


def contents(path: Path) -> str:
    """Return a hash, hexadecimal, of what is in a file, or in all files of a folder under their names in it.

    Raises:
        InvalidConfig: there is no such file or folder, or it cannot be read.
    """
    try:
        if not path.is_dir():
            return _file(path)
        files = sorted(each for each in path.rglob("*") if each.is_file())
        told = "".join(f"{_file(each)} {each.relative_to(path).as_posix()}\n" for each in files)
        return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()
    except OSError as error:
        raise InvalidConfig(f"{error.filename or path}: {error.strerror}; correct data.settings") from error


def _file(path: Path) -> str:
    found = path.stat()
    return _read(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=100_000)  # the points of a sweep, and their runs, ask for the same files
def _read(path: Path, changed: int, size: int) -> str:
    del changed, size
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
