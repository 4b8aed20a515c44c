"""Files: read with errors a person can act on, written whole or not at all, keys for their owner's eyes only."""

import errno
import fcntl
import getpass
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from p2pfl.core.errors import InvalidConfig, StoreFailed
from p2pfl.crypto.identity import SEED_BYTES, Identity
from p2pfl.crypto.keyfile import (
    ENTROPY_BYTES,
    is_sealed,
    open_identity,
    open_sm2_key,
    seal_identity,
    seal_sm2_key,
)
from p2pfl.crypto.sm2 import PRIVATE_BYTES, Sm2SigningKey

KEY_MODE, FOLDER_MODE = 0o600, 0o700
LOCK_FILE = ".lock"
PASSPHRASE_VARIABLE = "P2PFL_PASSPHRASE"  # noqa: S105 - the name of a variable
PASSPHRASE_FILE_VARIABLE = "P2PFL_PASSPHRASE_FILE"  # noqa: S105 - likewise
CREDENTIALS_VARIABLE, CREDENTIAL = "CREDENTIALS_DIRECTORY", "p2pfl-passphrase"
"""Where systemd puts what a unit's LoadCredential names, and which of that is ours (systemd.exec(5))."""
MOST_PASSPHRASE = 4096
"""Bytes of a passphrase's file; more is another file."""


def read_bytes(path: Path, what: str) -> bytes:
    """Read a file that must be there; `what` says in errors what it is.

    Raises:
        InvalidConfig: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path}: {what} cannot be read: {error.strerror}") from error
    except ValueError as error:  # the path holds a NUL, which a file of settings can bring
        raise InvalidConfig(f"{str(path)!r}: {what} cannot be read: no path for a file") from error


def read_text(path: Path, what: str) -> str:
    """Read a text file that must be there.

    Raises:
        InvalidConfig: it cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path, what).decode()
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{path}: {what} is not UTF-8 text") from error


def sha256_of(path: Path, what: str) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        InvalidConfig: it cannot be read.
    """
    return hashlib.sha256(read_bytes(path, what)).hexdigest()


def write_atomic(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all, and durably: a temporary neighbor, fsync, rename, fsync of the folder.

    Raises:
        InvalidConfig: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A new file, never one that somebody left or put there: only a new one has this mode.
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):  # what went wrong is told already
            temporary.unlink(missing_ok=True)


def write_quickly(path: Path, content: bytes) -> bool:
    """Write a file whole or not at all, for its owner's eyes only, but not durably: after a crash it may be old.

    Returns:
        Whether it was written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, KEY_MODE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(folder: Path, otherwise: str) -> Iterator[None]:
    """Hold a folder for this process alone, while the context lasts; a process that dies holds nothing.

    Raises:
        InvalidConfig: another process holds it, with `otherwise` as the reason; or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise InvalidConfig(f"{folder}: cannot be used: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidConfig(f"{folder}: {otherwise}") from error
        yield


def is_held(folder: Path) -> bool:
    """Return whether a process holds a folder as `exclusive` does.

    Looking takes the lock, shared and for microseconds; a process that begins in these is refused, and begins again.
    """
    try:
        with (folder / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or not for us to read
        return False
    return False


def create_identity(
    path: Path, passphrase: bytes | None = None, entropy: Callable[[int], bytes] = os.urandom
) -> Identity:
    """Make a key and write it for its owner only, under a passphrase if one is given.

    Raises:
        InvalidConfig: there is a file already; keys are never overwritten.
    """
    _verify_free(path)
    identity = Identity(entropy(SEED_BYTES))
    sealed = None if passphrase is None else seal_identity(identity, passphrase, entropy(ENTROPY_BYTES))
    write_atomic(path, identity.to_pem() if sealed is None else sealed, KEY_MODE)
    return identity


def load_identity(path: Path, passphrase: Callable[[], bytes]) -> Identity:
    """Read a key that `create_identity` wrote.

    Args:
        path: the key's file.
        passphrase: asked only if the key is under one.

    Raises:
        InvalidConfig: it is missing, is something else, others may read it, or the passphrase is wrong.
    """
    pem = _read_key(path)
    return open_identity(pem, passphrase(), str(path)) if is_sealed(pem) else Identity.from_pem(pem, str(path))


def create_sm2_key(
    path: Path, passphrase: bytes | None = None, entropy: Callable[[int], bytes] = os.urandom
) -> Sm2SigningKey:
    """Make an SM2 key for signatures, and write it as `create_identity` does.

    Raises:
        InvalidConfig: there is a file already, or the extra `gm` is not installed.
    """
    _verify_free(path)
    key = Sm2SigningKey(entropy(PRIVATE_BYTES))
    sealed = None if passphrase is None else seal_sm2_key(key, passphrase, entropy(ENTROPY_BYTES))
    write_atomic(path, key.to_pem() if sealed is None else sealed, KEY_MODE)
    return key


def load_sm2_key(path: Path, passphrase: Callable[[], bytes]) -> Sm2SigningKey:
    """Read a key that `create_sm2_key` wrote; see `load_identity`.

    Raises:
        InvalidConfig: it is missing, is something else, others may read it, the passphrase is wrong, or the extra `gm`
            is not installed.
    """
    pem = _read_key(path)
    return open_sm2_key(pem, passphrase(), str(path)) if is_sealed(pem) else Sm2SigningKey.from_pem(pem, str(path))


def is_under_passphrase(path: Path) -> bool:
    """Return whether a key's file is one under a passphrase.

    Raises:
        InvalidConfig: it is missing, or others may read it.
    """
    return is_sealed(_read_key(path))


def _verify_free(path: Path) -> None:
    if path.exists():
        raise InvalidConfig(f"{path}: exists already; a key is never overwritten, choose another name")


def _read_key(path: Path) -> bytes:
    pem = read_bytes(path, "the private key")
    if path.stat().st_mode & 0o077:
        raise InvalidConfig(f"{path}: others may read this private key; run `chmod 600 {path}`")
    return pem


def ask_passphrase(file: Path | None, path: Path, environment: Mapping[str, str] = os.environ) -> bytes:
    """Return the passphrase of the key `path`.

    The first of these that is there counts: `file`, the file that P2PFL_PASSPHRASE_FILE names, P2PFL_PASSPHRASE,
    systemd's credential `p2pfl-passphrase`, the terminal.

    Raises:
        InvalidConfig: it is in none of these places, or others may read the file.
    """
    if file is not None:
        return _read_passphrase(file, 0o077)
    if named := environment.get(PASSPHRASE_FILE_VARIABLE):
        return _read_passphrase(Path(named), 0o077)
    if PASSPHRASE_VARIABLE in environment:
        return environment[PASSPHRASE_VARIABLE].encode()
    if (folder := environment.get(CREDENTIALS_VARIABLE)) and (credential := Path(folder) / CREDENTIAL).exists():
        # Readable for the unit's user by an ACL, whose mask shows as the group's bits.
        return _read_passphrase(credential, 0o007)
    if sys.stdin.isatty():
        return getpass.getpass(f"passphrase of {path}: ").encode()
    raise InvalidConfig(
        f"{path}: the key is under a passphrase; name its file as passphrase_file in peer.toml or in "
        f"{PASSPHRASE_FILE_VARIABLE}, or set {PASSPHRASE_VARIABLE}, or run on a terminal"
    )


def _read_passphrase(file: Path, others: int) -> bytes:
    """Read a passphrase's first and only line; `others` are the bits of the file's mode that must not be set."""
    try:
        with file.open("rb") as opened:
            mode, text = os.fstat(opened.fileno()).st_mode, opened.read(MOST_PASSPHRASE + 1)
    except OSError as error:
        raise InvalidConfig(f"{file}: the passphrase cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidConfig(f"{str(file)!r}: the passphrase cannot be read: no path for a file") from error
    if mode & others:
        raise InvalidConfig(f"{file}: others may read this passphrase; run `chmod 600 {file}`")
    if len(text) > MOST_PASSPHRASE:
        raise InvalidConfig(f"{file}: of over {MOST_PASSPHRASE} bytes, which is no passphrase")
    return text.rstrip(b"\r\n")


def store_failed(path: Path, error: OSError) -> StoreFailed:
    """Return the line for a file of a running peer that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "make room" if full else "check the disk, and who may write there"
    return StoreFailed(f"{path}: cannot be written: {error.strerror}; {advice}, and start again")


def make_folder(path: Path) -> None:
    """Make a folder for its owner's eyes only, durably; one that is there stays as it is.

    Raises:
        StoreFailed: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=FOLDER_MODE)
            _sync_folder(path.parent)
    except OSError as error:
        raise store_failed(path, error) from error


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of `content` to an open file, however many calls the system makes of it."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def replace_durably(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file of several parts whole or not at all, for its owner's eyes only; each goes to the system as it is.

    Durable as `write_atomic` is: when this returns, the new file is there after a crash, and until then the old one.

    Raises:
        StoreFailed: it cannot be written; the file is the old one or, whole, the new one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, KEY_MODE)
        try:
            for part in parts:
                write_all(descriptor, part)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # what went wrong is told below
            temporary.unlink(missing_ok=True)
        raise store_failed(path, error) from error
