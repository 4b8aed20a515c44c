"""A peer's state after every crash there is: kill -9, power loss and a full disk, at every call to the system."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pfl.core.errors import StoreFailed
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Checkpoint, Record, Resume, Uploading, Voted
from p2pfl.node.checkpoints import Checkpoints, Opened

CHARTER, PEER = bytes(32), PeerId("12D3KooWone")
SIZE = 100
RHO = 0.125
"""What an upload costs, in zCDP."""
ROOT = Path(__file__).parents[2]


def opened(folder: Path, size: int = SIZE) -> Opened:
    return Checkpoints.open(folder, CHARTER, PEER, np.zeros(size, np.float32), rho=RHO)


def trainer_at(number: int) -> bytes:
    return b"trainer of round %d" % number


def checkpoint(number: int, size: int = SIZE) -> Checkpoint:
    return Checkpoint(Round(number), np.full(size, number, np.float32), np.full(size, -number, np.float32))


def records(first: int, last: int, size: int = SIZE) -> Iterator[Record]:
    """Give what a peer persists in rounds `first` up to `last`."""
    for number in range(first, last):
        yield Uploading(Round(number), bytes(32), RHO)
        yield Voted(Round(number), bytes(32), (0, 1, 2))
        yield checkpoint(number + 1, size)


def persist(store: Checkpoints, record: Record) -> None:
    store.persist(record, trainer_at(record.round) if isinstance(record, Checkpoint) else None)


def live(folder: Path, first: int, last: int, size: int = SIZE) -> None:
    store = opened(folder, size).checkpoints
    for record in records(first, last, size):
        persist(store, record)
    store.close()


def where(done: list[Record]) -> tuple[int, int]:
    """Return the round of the last checkpoint, and above which the peer may take part, after these records."""
    at = max([record.round for record in done if isinstance(record, Checkpoint)], default=0)
    return at, max([at - 1, *(record.round for record in done if not isinstance(record, Checkpoint))])


def possible(done: list[Record], begun: list[Record], torn: bool) -> list[tuple[int, int]]:
    """Return where a peer may find itself; where a vote was cut in two, it counts as the upload of the next round."""
    at, above = where(done + begun)
    return [(at, above), (at, above + 1)] if torn else [where(done), (at, above)]


def verify(found: Opened, done: list[Record], begun: list[Record], size: int = SIZE) -> None:
    """Check that what is found is what was acknowledged (`done`), or with what was begun then as well."""
    paid, may_have = (sum(isinstance(each, Uploading) for each in part) for part in (done, begun))
    assert paid - 1e-9 <= found.checkpoints.rho / RHO <= paid + may_have + bool(found.notes) + 1e-9
    if found.resume is None:
        assert not done
        return
    resume = found.resume
    assert (resume.checkpoint.round, resume.above) in possible(done, begun, torn=bool(found.notes))
    number = resume.checkpoint.round
    np.testing.assert_array_equal(resume.checkpoint.base, np.full(size, number, np.float32))
    spent = resume.above >= number
    assert (resume.checkpoint.update is None) == (spent or number == 0)
    assert found.trainer == (trainer_at(number) if number else None)


class Crash(BaseException):
    """Nothing runs after it."""


class Disk:
    """Counts the calls that change something, fails at one of them, and knows what a loss of power would leave.

    Of a file that survives what was in it when it was last synced, and a file has the name that it had when the folder
    was.
    """

    CALLS = ("open", "write", "fsync", "replace", "unlink", "ftruncate")

    def __init__(
        self, patch: pytest.MonkeyPatch, folder: Path, fail_at: int, fault: Callable[[], BaseException]
    ) -> None:
        self.folder = folder
        self.calls = 0
        self.fail_at = fail_at
        self.fault = fault
        self.forever = True
        self.synced: dict[int, bytes] = {}
        self.entries: dict[str, int] = {}
        for path in folder.iterdir():
            self.synced[path.stat().st_ino] = path.read_bytes()
        self._sync_entries()
        self.real = {name: getattr(os, name) for name in self.CALLS}
        for name in self.CALLS:
            patch.setattr(os, name, getattr(self, name))

    def _sync_entries(self) -> None:
        self.entries = {path.name: path.stat().st_ino for path in self.folder.iterdir()}

    def _count(self) -> bool:
        """Return whether this call is the first to fail."""
        self.calls += 1
        if self.calls > self.fail_at and self.forever:
            raise self.fault()
        return self.calls == self.fail_at

    def open(self, path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if flags & os.O_CREAT and self._count():
            raise self.fault()
        descriptor: int = self.real["open"](path, flags, *arguments, **more)
        if flags & os.O_CREAT:
            self.synced[os.fstat(descriptor).st_ino] = b""
        return descriptor

    def write(self, descriptor: int, content: Any) -> int:
        if self._count():
            self.real["write"](descriptor, memoryview(content)[: len(content) // 2])
            raise self.fault()
        # A system may always take less than it was given.
        done: int = self.real["write"](descriptor, memoryview(content)[: max(1, len(content) - 1)])
        return done

    def fsync(self, descriptor: int) -> None:
        if self._count():
            raise self.fault()
        status = os.fstat(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").resolve() == self.folder.resolve():
            self._sync_entries()
        else:
            self.synced[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def replace(self, source: Any, target: Any, **more: Any) -> None:
        if self._count():
            raise self.fault()
        self.real["replace"](source, target)

    def unlink(self, path: Any, **more: Any) -> None:
        if Path(path).exists() and self._count():
            raise self.fault()
        self.real["unlink"](path)

    def ftruncate(self, descriptor: int, size: int) -> None:
        if self._count():
            raise self.fault()
        self.real["ftruncate"](descriptor, size)

    def after_power_loss(self, target: Path) -> Path:
        """Write what the disk holds for certain to another folder."""
        target.mkdir()
        for name, number in self.entries.items():
            (target / name).write_bytes(self.synced[number])
        return target


def run(folder: Path, first: int) -> tuple[list[Record], list[Record]]:
    """Live until something fails; return which records were acknowledged, and which one was begun."""
    done: list[Record] = []
    store = opened(folder).checkpoints
    try:
        for record in records(first, first + 2):
            try:
                persist(store, record)
            except (Crash, StoreFailed):
                return done, [record]
            done.append(record)
    finally:
        store.close()
    return done, []


def crash_points(tmp_path: Path, fault: Callable[[], BaseException]) -> Iterator[tuple[Path, Disk, Any]]:
    """Fail at the first call, the second, and so on; the peer had lived through rounds 0 to 3."""
    base = tmp_path / "base"
    live(base, 0, 4)
    for fail_at in range(1, 1000):
        folder = tmp_path / str(fail_at)
        shutil.copytree(base, folder)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, folder, fail_at, fault)
            outcome = None
            with suppress(Crash, StoreFailed):  # before anything was begun
                outcome = run(folder, 4)
        done, begun = outcome or ([], [])
        yield folder, disk, ([*records(0, 4), *done], begun)
        if disk.calls < fail_at:
            assert fail_at > 50, "a run has more calls than these"
            return
    raise AssertionError("it never ran to its end")


def test_kill_at_every_call_loses_nothing_acknowledged(tmp_path: Path) -> None:
    for folder, _, (done, begun) in crash_points(tmp_path, Crash):
        found = opened(folder)
        verify(found, done, begun)
        persist(found.checkpoints, checkpoint(9))
        found.checkpoints.close()
        assert not list(folder.glob(".*"))
        assert len(list(folder.iterdir())) == 4


def test_a_loss_of_power_at_every_call_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Fails if any fsync is left out, of a file or of the folder."""
    for folder, disk, (done, begun) in crash_points(tmp_path, Crash):
        found = opened(disk.after_power_loss(folder.with_suffix(".lost")))
        verify(found, done, begun)
        found.checkpoints.close()


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_any_call_leaves_what_was_there(tmp_path: Path) -> None:
    failed = 0
    for folder, disk, (done, begun) in crash_points(tmp_path, no_space):
        failed += bool(begun)
        found = opened(folder)
        verify(found, done, begun)
        found.checkpoints.close()
        found = opened(disk.after_power_loss(folder.with_suffix(".lost")))
        verify(found, done, begun)
        found.checkpoints.close()
    assert failed > 40


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_one_line_and_a_ledger_that_failed_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    live(tmp_path, 0, 2)
    store = opened(tmp_path).checkpoints
    ledger = (tmp_path / "ledger").read_bytes()

    def full(descriptor: int, *arguments: Any) -> None:
        if call == "write":
            real(descriptor, arguments[0][:10])
        raise no_space()

    real = getattr(os, call)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StoreFailed) as caught:
            persist(store, Uploading(Round(2), bytes(32)))
    line = f"{tmp_path / 'ledger'}: cannot be written: No space left on device; make room, and start again"
    assert str(caught.value) == line
    assert (tmp_path / "ledger").read_bytes() == ledger
    # There is room again, but what the kernel dropped from its cache is not known.
    for record in (Uploading(Round(2), bytes(32)), checkpoint(3)):
        with pytest.raises(StoreFailed, match="cannot be written: No space left"):
            persist(store, record)
    store.close()
    found = opened(tmp_path)
    assert found.notes == []
    # The checkpoint was safe before the ledger was to be told of it.
    verify(found, [*records(0, 2)], [checkpoint(3)])
    found.checkpoints.close()


def test_a_checkpoint_that_did_not_fit_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live(tmp_path, 0, 2)
    store = opened(tmp_path).checkpoints
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int, content: Any) -> int:
        raise no_space()

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(
            StoreFailed, match=r"round-3\.checkpoint: cannot be written: No space left on device; make room"
        ):
            persist(store, checkpoint(3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    persist(store, checkpoint(3))
    store.close()
    found = opened(tmp_path)
    verify(found, [*records(0, 2), checkpoint(3)], [])
    found.checkpoints.close()


@contextmanager
def tiny_disk(path: Path, size: str) -> Iterator[None]:
    """Mount a file system of that size, in memory."""
    path.mkdir()
    mounted = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["/bin/umount", str(path)], check=True)


def fill_up(folder: Path, size: int) -> None:
    """Live until the disk is full, make room, and live on."""
    done: list[Record] = []
    store = opened(folder, size).checkpoints
    begun: Record | None = None
    with pytest.raises(StoreFailed, match=r"cannot be written: .*; make room, and start again"):
        for begun in records(0, 50, size):
            persist(store, begun)
            done.append(begun)
    assert begun is not None
    assert done
    store.close()
    found = opened(folder, size)
    verify(found, done, [begun], size)
    found.checkpoints.close()


@pytest.mark.skipif(not Path("/bin/mount").exists(), reason="there is no /bin/mount")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    size = 10_000
    with tiny_disk(tmp_path / "disk", "256k"):  # room for three checkpoints of 80 kB, and no fourth
        fill_up(tmp_path / "disk" / "state", size)
        ballast = tmp_path / "disk" / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(StoreFailed, match="ledger: cannot be written: No space left on device; make room"):
            opened(tmp_path / "disk" / "state", size)
        ballast.unlink()
        opened(tmp_path / "disk" / "state", size).checkpoints.close()


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    live(tmp_path, 0, 2, size=500_000)
    store = opened(tmp_path, 500_000).checkpoints
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))
    try:
        with pytest.raises(StoreFailed, match=r"round-3\.checkpoint: cannot be written: File too large; make room"):
            persist(store, checkpoint(3, 500_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.close()
    found = opened(tmp_path, 500_000)
    verify(found, [*records(0, 2)], [], 500_000)
    found.checkpoints.close()


CHILD_SIZE = 100_000
CHILD = f"""
import os, sys
from pathlib import Path
from tests.node.test_checkpoints_crashes import opened, persist, records
found = opened(Path(sys.argv[1]), {CHILD_SIZE})
first = 0 if found.resume is None else found.resume.above + 1
os.write(1, b"%d 0\\n" % first)
for number, record in enumerate(records(first, first + 10**6, {CHILD_SIZE})):
    persist(found.checkpoints, record)
    os.write(1, b"%d %d\\n" % (first, number + 1))
"""
"""Tells after each record how many are acknowledged."""


def one_life(folder: Path, lines: int) -> tuple[int, int]:
    """Start a peer that persists in a loop, and kill it when it has told so much.

    Returns:
        The round that it began with, and how many records it told of.
    """
    with subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(lines)]
        child.kill()
        told += child.stdout.readlines()
        first, done = map(int, [line for line in told if line.endswith(b"\n")][-1].split())
    assert child.returncode == -9
    return first, done


@pytest.mark.slow
def test_kill_9_thirty_times(tmp_path: Path) -> None:
    draw = random.Random(7)  # noqa: S311 - no secret
    at: list[Record] = []
    stages = set()
    for _ in range(30):
        first, done = one_life(tmp_path, draw.randint(1, 12))
        lived = list(records(first, first + done // 3 + 2, CHILD_SIZE))
        at = [*at, *lived[:done]]
        found = opened(tmp_path, CHILD_SIZE)
        assert found.notes == []
        verify(found, at, lived[done : done + 1], CHILD_SIZE)
        stages.add(done % 3)
        # A child that is killed between the disk and its word may have done one more.
        if found.resume is not None and where(at) != (found.resume.checkpoint.round, found.resume.above):
            at.append(lived[done])
        found.checkpoints.close()
        assert len(list(tmp_path.iterdir())) <= 5
    assert stages == {0, 1, 2}


def test_resuming_after_a_kill_takes_part_in_no_round_twice(tmp_path: Path) -> None:
    """The floor rises with every life, though none of them comes to a checkpoint."""
    seen: list[Resume | None] = []
    for _ in range(3):
        found = opened(tmp_path)
        above = -1 if found.resume is None else found.resume.above
        seen.append(found.resume)
        persist(found.checkpoints, Uploading(Round(above + 1), bytes(32)))
        found.checkpoints.close()
    assert [resume and resume.above for resume in seen] == [None, 0, 1]
