"""Files: whole or not at all, and keys for their owner's eyes only."""

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.sm2 import Sm2SigningKey
from p2pfl.node import store
from p2pfl.node.store import (
    CREDENTIAL,
    CREDENTIALS_VARIABLE,
    MOST_PASSPHRASE,
    PASSPHRASE_FILE_VARIABLE,
    PASSPHRASE_VARIABLE,
    ask_passphrase,
    create_identity,
    create_sm2_key,
    is_under_passphrase,
    load_identity,
    load_sm2_key,
    read_bytes,
    read_text,
    sha256_of,
    write_atomic,
)


def unasked() -> bytes:
    raise AssertionError("the passphrase of a key without one was asked")


SEED = bytes(range(32))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_what_is_written_is_there_whole_and_alone(tmp_path: Path, open_umask: None) -> None:
    path = tmp_path / "a"
    for content in (b"first", b"", b"x" * 1_000_000):
        write_atomic(path, content)
        assert path.read_bytes() == content
        assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208 - names are enough
    assert mode_of(path) == 0o644


@pytest.mark.parametrize("fails", ["write", "fsync", "replace", "interrupt"])
def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def raise_it(*_: Any) -> None:
        assert path.read_bytes() == b"old"
        if fails == "interrupt":
            raise KeyboardInterrupt
        raise OSError(28, "No space left on device")

    match fails:
        case "write":
            monkeypatch.setattr(store.os, "fdopen", raise_it)
        case "fsync":
            monkeypatch.setattr(store.os, "fsync", raise_it)
        case _:
            monkeypatch.setattr(Path, "replace", raise_it)
    with pytest.raises(KeyboardInterrupt if fails == "interrupt" else InvalidConfig) as raised:
        write_atomic(path, b"new")
    monkeypatch.undo()
    if fails != "interrupt":
        assert str(raised.value) == f"{path}: cannot be written: No space left on device"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_old_or_new_and_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = {bytes([number]) * 50_000 for number in range(20)}
    write_atomic(path, bytes(50_000))
    seen, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        write_atomic(path, content)
    done.set()
    reader.join()
    assert set(seen) <= contents


@pytest.mark.parametrize("where", ["missing/a", "file/a", "n" * 300])
def test_where_nothing_can_be_written_is_told_in_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidConfig, match="cannot be written: "):
        write_atomic(tmp_path / where, b"x")


def test_what_somebody_left_or_put_in_the_way_is_not_written_through(tmp_path: Path, open_umask: None) -> None:
    path, target = tmp_path / "a", tmp_path / "target"
    temporary = tmp_path / f".a.{os.getpid()}.tmp"
    temporary.write_bytes(b"left over by a process of the same number, for all to read")
    write_atomic(path, b"new", 0o600)
    assert mode_of(path) == 0o600
    temporary.symlink_to(target)
    write_atomic(path, b"newer", 0o600)
    assert path.read_bytes() == b"newer"
    assert not path.is_symlink()
    assert not target.exists()


# Keys


def test_a_key_is_its_owners_from_the_first_moment(
    tmp_path: Path, open_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[int, int]] = []
    real = os.open

    def watched(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        descriptor = real(path, flags, mode, **more)
        if flags & os.O_CREAT:
            opened.append((flags, stat.S_IMODE(os.fstat(descriptor).st_mode)))
        return descriptor

    monkeypatch.setattr(store.os, "open", watched)
    monkeypatch.setattr(Path, "chmod", lambda *_: pytest.fail("a mode set later leaves a moment before it"))
    path = tmp_path / "identity.pem"
    identity = create_identity(path, None, lambda n: SEED[:n])
    ((flags, mode),) = opened
    assert mode == mode_of(path) == 0o600
    assert flags & os.O_EXCL
    assert identity.seed() == load_identity(path, unasked).seed() == SEED


def test_entropy_is_asked_for_once_and_by_default_keys_differ(tmp_path: Path) -> None:
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return bytes(size)

    create_identity(tmp_path / "a.pem", None, entropy)
    assert asked == [32]
    assert create_identity(tmp_path / "b.pem").peer_id != create_identity(tmp_path / "c.pem").peer_id


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(b"precious")
    with pytest.raises(InvalidConfig, match="exists already; a key is never overwritten"):
        create_identity(path)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o777], ids=oct)
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    create_identity(path, None, lambda _: SEED)
    path.chmod(mode)
    with pytest.raises(InvalidConfig) as raised:
        load_identity(path, unasked)
    assert str(raised.value) == f"{path}: others may read this private key; run `chmod 600 {path}`"
    for usable in (0o600, 0o400):
        path.chmod(usable)
        assert load_identity(path, unasked).seed() == SEED


def test_a_key_that_is_none_is_told_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    with pytest.raises(InvalidConfig, match="the private key cannot be read: No such file"):
        load_identity(path, unasked)
    write_atomic(path, b"hello", 0o600)
    with pytest.raises(InvalidConfig, match="not an unencrypted PEM private key") as raised:
        load_identity(path, unasked)
    assert str(path) in str(raised.value)


def test_a_key_written_under_a_strict_umask_can_be_read(tmp_path: Path, strict_umask: None) -> None:
    path = tmp_path / "identity.pem"
    assert create_identity(path).peer_id == load_identity(path, unasked).peer_id
    write_atomic(tmp_path / "b", b"")
    assert mode_of(tmp_path / "b") == 0o600


def test_reading_tells_what_and_where(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes("Größe".encode())
    assert read_bytes(path, "it").decode() == read_text(path, "it") == "Größe"
    assert sha256_of(path, "it") == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match="the note is not UTF-8 text"):
        read_text(path, "the note")
    for missing in (tmp_path / "b", tmp_path):
        with pytest.raises(InvalidConfig, match="the note cannot be read: "):
            sha256_of(missing, "the note")
    with pytest.raises(InvalidConfig, match="the note cannot be read: ") as raised:
        read_bytes(tmp_path / "a\0b", "the note")
    assert str(raised.value).isprintable()


def test_a_key_under_a_passphrase_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    identity = create_identity(path, b"open sesame")
    assert mode_of(path) == 0o600
    assert load_identity(path, lambda: b"open sesame").seed() == identity.seed()
    with pytest.raises(InvalidConfig, match="passphrase is wrong"):
        load_identity(path, lambda: b"open barley")


def test_a_passphrase_comes_from_its_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, key = tmp_path / "secret", tmp_path / "identity.pem"
    file.write_text("from the file\n")
    file.chmod(0o644)
    with pytest.raises(InvalidConfig, match=r"others may read this passphrase; run `chmod 600 .*secret`"):
        ask_passphrase(file, key)
    file.chmod(0o600)
    assert ask_passphrase(file, key) == b"from the file"
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "from outside")
    assert ask_passphrase(None, key) == b"from outside"
    monkeypatch.delenv(PASSPHRASE_VARIABLE)
    monkeypatch.setattr(store.sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(InvalidConfig, match=r"passphrase_file in peer\.toml"):
        ask_passphrase(None, key)


def secret(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_first_place_that_has_a_passphrase_counts(tmp_path: Path) -> None:
    key = tmp_path / "identity.pem"
    environment = {CREDENTIALS_VARIABLE: str(tmp_path / "credentials")}
    secret(tmp_path / "credentials" / CREDENTIAL, "by systemd\n", 0o440)
    assert ask_passphrase(None, key, environment) == b"by systemd"
    environment[PASSPHRASE_VARIABLE] = "by value"
    assert ask_passphrase(None, key, environment) == b"by value"
    environment[PASSPHRASE_FILE_VARIABLE] = str(secret(tmp_path / "named", "by file\r\n", 0o400))
    assert ask_passphrase(None, key, environment) == b"by file"
    assert ask_passphrase(secret(tmp_path / "configured", "by peer.toml"), key, environment) == b"by peer.toml"


@pytest.mark.parametrize(
    ("variable", "name", "mode"),
    [(PASSPHRASE_FILE_VARIABLE, "secret", 0o640), (CREDENTIALS_VARIABLE, CREDENTIAL, 0o444)],
)
def test_a_passphrase_that_others_may_read_is_refused_without_saying_it(
    tmp_path: Path, variable: str, name: str, mode: int
) -> None:
    file = secret(tmp_path / name, "open sesame", mode)
    environment = {variable: str(file if variable == PASSPHRASE_FILE_VARIABLE else tmp_path)}
    with pytest.raises(InvalidConfig) as raised:
        ask_passphrase(None, tmp_path / "identity.pem", environment)
    assert str(raised.value) == f"{file}: others may read this passphrase; run `chmod 600 {file}`"


@pytest.mark.parametrize(
    ("named", "told"),
    [("gone", "gone: the passphrase cannot be read: No such file"), ("a\0b", "no path for a file"), ("large", "over")],
)
def test_a_file_that_is_no_passphrase_is_told_in_one_line(tmp_path: Path, named: str, told: str) -> None:
    secret(tmp_path / "large", "x" * (MOST_PASSPHRASE + 1))
    with pytest.raises(InvalidConfig, match=told) as raised:
        ask_passphrase(None, tmp_path / "key", {PASSPHRASE_FILE_VARIABLE: str(tmp_path / named)})
    assert str(raised.value).isprintable()


def test_an_sm2_key_is_kept_as_an_identity_is(tmp_path: Path, open_umask: None) -> None:
    pytest.importorskip("gmssl_pyx", reason="the extra [gm] is not installed", exc_type=ImportError)
    plain, sealed = tmp_path / "identity-sm2.pem", tmp_path / "sealed.pem"
    key = create_sm2_key(plain, None, lambda n: SEED[:n])
    other = create_sm2_key(sealed, b"open sesame")
    assert mode_of(plain) == mode_of(sealed) == 0o600
    assert (is_under_passphrase(plain), is_under_passphrase(sealed)) == (False, True)
    assert key.public == Sm2SigningKey(SEED).public == load_sm2_key(plain, unasked).public
    assert other.public == load_sm2_key(sealed, lambda: b"open sesame").public != key.public
    with pytest.raises(InvalidConfig, match="passphrase is wrong"):
        load_sm2_key(sealed, lambda: b"open barley")
    with pytest.raises(InvalidConfig, match="exists already; a key is never overwritten"):
        create_sm2_key(plain)
    plain.chmod(0o640)
    with pytest.raises(InvalidConfig, match="others may read this private key; run `chmod 600 "):
        load_sm2_key(plain, unasked)
    create_identity(tmp_path / "identity.pem")
    with pytest.raises(InvalidConfig, match="not an unencrypted PEM private key for SM2"):
        load_sm2_key(tmp_path / "identity.pem", unasked)
