"""What a peer persists is found again, whatever happened to the disk; or it is said what is wrong."""

import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import InvalidConfig, OutOfTurn, StoreFailed
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Checkpoint, Resume, Stepped, Uploading, Voted
from p2pfl.node import checkpoints as module
from p2pfl.node.checkpoints import (
    LEDGER_FILE,
    Checkpoints,
    Opened,
    Owner,
    Unusable,
    parse_ledger,
    read_checkpoint,
    read_spent,
    render_ledger,
)

CHARTER, PEER = bytes(range(32)), PeerId("12D3KooWone")
OTHER_CHARTER, OTHER_PEER = bytes(32), PeerId("12D3KooWother")
SIZE = 100
INITIAL = np.zeros(SIZE, np.float32)
SESSION = bytes(range(32, 64))
OPEN: list[Checkpoints] = []


def opened(folder: Path, charter: bytes = CHARTER, peer: PeerId = PEER, **changes: Any) -> Opened:
    found = Checkpoints.open(folder, charter, peer, **{"initial": INITIAL} | changes)
    OPEN.append(found.checkpoints)
    return found


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def uploading(number: int) -> Uploading:
    return Uploading(Round(number), SESSION)


def voted(number: int, *survivors: int) -> Voted:
    return Voted(Round(number), SESSION, survivors or (0, 1, 3))


def checkpoint(number: int, update: bool = True) -> Checkpoint:
    base = np.arange(SIZE, dtype=np.float32) + number
    return Checkpoint(Round(number), base, base * 2 if update else None)


def trainer_at(number: int) -> bytes:
    return b"trainer %d" % number * 50


def live(folder: Path, rounds: range, **changes: Any) -> None:
    """Live through some rounds, each with an upload, a vote and a checkpoint."""
    store = opened(folder, **changes).checkpoints
    for number in rounds:
        store.persist(uploading(number))
        store.persist(voted(number))
        store.persist(checkpoint(number + 1), trainer_at(number + 1))
    store.close()


def verify_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert found.round == expected.round
    np.testing.assert_array_equal(found.base, expected.base)
    assert found.base.dtype == np.float32
    assert (found.update is None) == (expected.update is None)
    if found.update is not None and expected.update is not None:
        np.testing.assert_array_equal(found.update, expected.update)


def reopened(folder: Path) -> tuple[Resume, Opened]:
    """Open and close."""
    found = opened(folder)
    found.checkpoints.close()
    assert found.resume is not None
    return found.resume, found


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is persisted is found


def test_an_empty_folder_is_a_fresh_start(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "state"
    for _ in range(2):  # the ledger alone says nothing yet
        found = opened(folder)
        assert found[1:] == (None, None, [])
        assert found.checkpoints.records == ()
        found.checkpoints.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / LEDGER_FILE).stat().st_mode) == 0o600


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    live(tmp_path, range(5))
    resume, found = reopened(tmp_path)
    verify_same(resume.checkpoint, checkpoint(5))
    assert resume.above == 4
    assert found.trainer == trainer_at(5)
    assert found.notes == []
    assert found.checkpoints.records[-2:] == (uploading(4), voted(4))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


@pytest.mark.parametrize("trainer", [None, b"", b"x" * 3_000_000])
@pytest.mark.parametrize("update", [False, True])
def test_a_checkpoint_may_have_no_update_and_no_trainer(tmp_path: Path, update: bool, trainer: bytes | None) -> None:
    store = opened(tmp_path).checkpoints
    store.persist(checkpoint(4, update), trainer)
    store.close()
    resume, found = reopened(tmp_path)
    verify_same(resume.checkpoint, checkpoint(4, update))
    assert found.trainer == trainer
    assert resume.above == 3


def test_vectors_of_any_layout_are_written_as_they_are(tmp_path: Path) -> None:
    store = opened(tmp_path).checkpoints
    base = np.arange(2 * SIZE, dtype=np.float32)[::2]
    update = np.arange(SIZE, dtype=np.float32)
    update.flags.writeable = False
    store.persist(Checkpoint(Round(1), base, update))
    store.close()
    verify_same(reopened(tmp_path)[0].checkpoint, Checkpoint(Round(1), base, update))


def test_an_upload_spends_the_update_and_is_never_repeated(tmp_path: Path) -> None:
    live(tmp_path, range(2))
    store = opened(tmp_path).checkpoints
    store.persist(uploading(2))
    store.close()
    resume, _ = reopened(tmp_path)
    assert resume.above == 2
    verify_same(resume.checkpoint, Checkpoint(Round(2), checkpoint(2).base, None))


def test_an_upload_before_the_first_checkpoint_is_known(tmp_path: Path) -> None:
    store = opened(tmp_path).checkpoints
    store.persist(uploading(0))
    store.close()
    initial = np.ones(SIZE, np.float32)
    found = opened(tmp_path, initial=initial)
    assert found.resume is not None
    verify_same(found.resume.checkpoint, Checkpoint(Round(0), initial, None))
    assert found.resume.above == 0


def test_disk_use_is_bounded(tmp_path: Path) -> None:
    for keep in (3, 1):
        live(tmp_path, range(10 * (3 - keep), 10 * (3 - keep) + 10), keep=keep)
        last = 10 * (3 - keep) + 10
        kept = [f"round-{number}.checkpoint" for number in range(last - keep + 1, last + 1)]
        assert names(tmp_path) == sorted([LEDGER_FILE, *kept])
        _, found = reopened(tmp_path)
        assert {record.round for record in found.checkpoints.records} == {last - 1, *range(last - keep + 1, last)}


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="0 checkpoints to keep"):
        opened(tmp_path, keep=0)


# What contradicts is refused, and not written


def test_what_contradicts_an_earlier_record_is_refused(tmp_path: Path) -> None:
    live(tmp_path, range(4, 6))
    store = opened(tmp_path).checkpoints
    store.persist(uploading(7))
    store.persist(voted(7, 0, 1))
    before = snapshot(tmp_path)
    store.persist(voted(7, 0, 1))  # the same vote again says nothing new
    wrong: list[tuple[Any, str]] = [
        (uploading(7), "an upload for round 7 after one for round 7"),
        (uploading(6), "an upload for round 6 after one for round 7"),
        (Uploading(Round(7), bytes(32)), "an upload for round 7"),
        (voted(7, 0, 2), "a second vote for round 7, and not the same one"),
        (Voted(Round(7), bytes(32), (0, 1)), "a second vote for round 7"),
        (checkpoint(5), "a checkpoint of round 5 after one of round 6"),
        (Checkpoint(Round(8), INITIAL[1:], None), r"a checkpoint of shape \[99\] for a model of \[100\]"),
        (Checkpoint(Round(8), INITIAL, INITIAL[1:]), r"a checkpoint of shape \[99\] for a model of \[100\]"),
    ]
    for record, reason in wrong:
        with pytest.raises(OutOfTurn, match=reason):
            store.persist(record)
    assert snapshot(tmp_path) == before
    store.persist(checkpoint(8))


def test_the_last_upload_is_remembered_however_old(tmp_path: Path) -> None:
    store = opened(tmp_path).checkpoints
    store.persist(uploading(0))
    for number in range(1, 20):  # no group came together
        store.persist(checkpoint(number))
    assert store.records == (uploading(0),)


def test_a_ledger_grows_no_larger_than_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEDGER_BYTES", 2000)
    store = opened(tmp_path).checkpoints
    number = 0
    with pytest.raises(OutOfTurn, match=r"\d+ records and no checkpoint that lets them go"):
        for number in range(100):
            store.persist(uploading(number))
    store.close()
    resume, _ = reopened(tmp_path)
    assert resume.above == number - 1 > 3
    store = opened(tmp_path).checkpoints
    for later in range(number, number + 3):
        store.persist(checkpoint(later))
    store.persist(uploading(number + 3))


# One process, several threads


def test_the_folder_is_one_processs_alone(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(InvalidConfig, match="another process uses this peer's state; stop it first"):
        opened(tmp_path)
    first.checkpoints.close()
    opened(tmp_path).checkpoints.close()


def test_a_record_does_not_wait_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path).checkpoints
    writing, go_on = threading.Event(), threading.Event()

    def slow(parts: Any) -> Iterator[Any]:
        writing.set()
        assert go_on.wait(10)
        yield from sealed(parts)

    sealed = module._sealed
    monkeypatch.setattr(module, "_sealed", slow)
    thread = threading.Thread(target=store.persist, args=(checkpoint(1),))
    thread.start()
    assert writing.wait(10)
    store.persist(uploading(1))
    assert not (tmp_path / "round-1.checkpoint").exists()
    go_on.set()
    thread.join()
    store.close()
    resume, found = reopened(tmp_path)
    assert (resume.above, resume.checkpoint.round, found.notes) == (1, 1, [])


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path).checkpoints
    kept = [threading.Thread(target=store.persist, args=(checkpoint(1),)) for _ in range(3)]
    votes = [threading.Thread(target=store.persist, args=(voted(number),)) for number in range(1, 30)]
    for thread in kept + votes:
        thread.start()
    for thread in kept + votes:
        thread.join()
    store.close()
    resume, found = reopened(tmp_path)
    assert {record.round for record in found.checkpoints.records} == set(range(1, 30))
    assert resume.above == 29


# Checkpoints that are not what they should be


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    live(tmp_path / "whole", range(5))
    newest = tmp_path / "whole" / "round-5.checkpoint"
    content = newest.read_bytes()
    damages: list[tuple[str, bytes]] = [
        ("cut short", b""),
        ("no checkpoint, or damaged at its first byte", b"\0" * len(content)),
        ("is cut short", content[:20]),
        ("is damaged in its head", content.replace(b'"round"', b'"rounx"')),
        ("is damaged: its head would have", content[:19] + b"\xff" + content[20:]),
        ("it was cut short, or is damaged", content[:-1]),
        ("it was cut short, or is damaged", content + b"\0"),
        ("it was cut short, or is damaged", content.replace(b'"parameters": 100', b'"parameters": 900')),
        ("content is not what its SHA-256 says", content[:-1] + bytes([content[-1] ^ 1])),
        ("content is not what its SHA-256 says", content[:700] + bytes([content[700] ^ 16]) + content[701:]),
        ("content is not what its SHA-256 says", content.replace(b'"round": 5', b'"round": 6')),
        ("is of format 9, this p2pfl reads 2", content.replace(b'"format": 2', b'"format": 9')),
        ("is the one of round 4 under another's name", (newest.parent / "round-4.checkpoint").read_bytes()),
    ]
    for number, (reason, damaged) in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / newest.name).write_bytes(damaged)
        resume, found = reopened(folder)
        (note,) = found.notes
        assert reason in note
        assert note.startswith(f"{folder / newest.name}: ")
        assert note.endswith("; round-4.checkpoint is used")
        # Uploads are known up to round 4, so the update of the checkpoint before round 4 is spent.
        verify_same(resume.checkpoint, Checkpoint(Round(4), checkpoint(4).base, None))
        assert (resume.above, found.trainer) == (4, trainer_at(4))


def test_a_damaged_checkpoint_goes_when_a_newer_one_is_safe(tmp_path: Path) -> None:
    live(tmp_path, range(5))
    (tmp_path / "round-5.checkpoint").write_bytes(b"damaged")
    found = opened(tmp_path)
    assert (tmp_path / "round-5.checkpoint").exists()
    found.checkpoints.persist(checkpoint(6))
    assert names(tmp_path) == [LEDGER_FILE, *(f"round-{n}.checkpoint" for n in (3, 4, 6))]
    found.checkpoints.close()
    (tmp_path / "round-6.checkpoint").write_bytes(b"damaged")
    found = opened(tmp_path)
    found.checkpoints.persist(checkpoint(6))  # under the same name
    found.checkpoints.close()
    resume, found = reopened(tmp_path)
    assert (resume.checkpoint.round, found.notes) == (6, [])


@pytest.mark.parametrize(
    ("charter", "peer", "told"),
    [(OTHER_CHARTER, PEER, "of the charter 000000000000…, this peer runs under 000102030405…"),
     (CHARTER, OTHER_PEER, "of the peer 12D3KooWother, this one is 12D3KooWone")],
)  # fmt: skip
def test_a_foreign_checkpoint_is_named_and_left_alone(tmp_path: Path, charter: bytes, peer: PeerId, told: str) -> None:
    live(tmp_path / "other", range(8), charter=charter, peer=peer)
    live(tmp_path / "own", range(5))
    shutil.copy(tmp_path / "other" / "round-8.checkpoint", tmp_path / "own")
    found = opened(tmp_path / "own")
    assert found.resume is not None
    verify_same(found.resume.checkpoint, checkpoint(5))
    (note,) = found.notes
    assert told in note
    assert "round-8.checkpoint: is" in note
    found.checkpoints.persist(checkpoint(6))
    assert (tmp_path / "own" / "round-8.checkpoint").exists()


def test_a_checkpoint_of_another_model_is_not_used(tmp_path: Path) -> None:
    live(tmp_path, range(5))
    with pytest.raises(InvalidConfig, match="is of a model of 100 parameters, this one has 7"):
        opened(tmp_path, initial=np.zeros(7, np.float32))


def test_nobody_starts_over_where_no_checkpoint_is_good(tmp_path: Path) -> None:
    live(tmp_path, range(5))
    for path in tmp_path.glob("*.checkpoint"):
        path.write_bytes(path.read_bytes()[:-5])
    before = snapshot(tmp_path)
    with pytest.raises(InvalidConfig) as caught:
        opened(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for number in (5, 4, 3):
        assert f"round-{number}.checkpoint: has " in message
    assert "no checkpoint can be used; restore " in message
    assert snapshot(tmp_path) == before
    for path in tmp_path.glob("*.checkpoint"):
        path.unlink()
    with pytest.raises(
        InvalidConfig, match=r"the checkpoint of round 5 is missing: no checkpoint can be used; restore"
    ):
        opened(tmp_path)


def test_a_failed_start_lets_go_of_the_folder(tmp_path: Path) -> None:
    live(tmp_path, range(5))
    whole = (tmp_path / LEDGER_FILE).read_bytes()
    (tmp_path / LEDGER_FILE).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InvalidConfig, match="cut short to 0 bytes"):
            opened(tmp_path)
    (tmp_path / LEDGER_FILE).write_bytes(whole)
    opened(tmp_path)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_checkpoint_goes_unseen(flips: Path, position: int, bit: int) -> None:
    content = bytearray((flips / "round-3.checkpoint").read_bytes())
    content[position % len(content)] ^= 1 << bit
    path = flips / "flipped"
    path.write_bytes(content)
    with pytest.raises(Unusable):
        read_checkpoint(path, Owner(CHARTER.hex(), PEER), SIZE, 3)


@pytest.fixture(scope="module")
def flips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips")
    live(folder, range(3))
    return folder


# Backups


def restore_old(folder: Path, old: Path, which: Callable[[str], bool]) -> None:
    """Put the files of an old backup in the place of those that are there."""
    for path in folder.iterdir():
        if which(path.name):
            path.unlink()
    for path in old.iterdir():
        if which(path.name):
            shutil.copy(path, folder)


@pytest.fixture
def backup(tmp_path: Path) -> tuple[Path, Path]:
    """Give the folder of a peer that has ended round 19, and one with what it had after round 4."""
    folder, old = tmp_path / "now", tmp_path / "old"
    live(folder, range(5))
    shutil.copytree(folder, old)
    live(folder, range(5, 20))
    return folder, old


def test_old_checkpoints_under_a_newer_ledger_upload_nothing_twice(backup: tuple[Path, Path]) -> None:
    folder, old = backup
    restore_old(folder, old, lambda name: name != LEDGER_FILE)
    resume, found = reopened(folder)
    assert resume.above == 19
    verify_same(resume.checkpoint, Checkpoint(Round(5), checkpoint(5).base, None))  # that update was spent long ago
    assert found.notes == [f"{folder}: the checkpoint of round 20 is missing; round-5.checkpoint is used"]


def test_an_old_update_is_kept_where_nothing_was_uploaded_since(tmp_path: Path) -> None:
    store = opened(tmp_path).checkpoints
    store.persist(uploading(0))
    for number in range(1, 9):
        store.persist(checkpoint(number))
    store.close()
    for number in (7, 8):
        (tmp_path / f"round-{number}.checkpoint").unlink()
    resume, _ = reopened(tmp_path)
    verify_same(resume.checkpoint, checkpoint(6))
    assert resume.above == 7  # rounds below 8 are over


def test_an_old_ledger_under_newer_checkpoints_is_seen(backup: tuple[Path, Path]) -> None:
    folder, old = backup
    restore_old(folder, old, lambda name: name == LEDGER_FILE)
    with pytest.raises(
        InvalidConfig, match=r"has had 10 records, round-20\.checkpoint knows of 40: it was cut short, or"
    ):
        opened(folder)


def test_an_old_backup_of_everything_is_as_far_as_it_goes(backup: tuple[Path, Path]) -> None:
    """What only the others know, they say: that is the machine's business."""
    folder, old = backup
    restore_old(folder, old, lambda name: True)
    resume, found = reopened(folder)
    assert (resume.above, resume.checkpoint.round, found.notes) == (4, 5, [])


# The ledger


def ledger_of(*records: Uploading | Voted, **values: Any) -> bytes:
    return render_ledger(Owner(CHARTER.hex(), PEER), module._Told(records, **values))[0]


OWNER = Owner(CHARTER.hex(), PEER)
RECORDS = (uploading(3), voted(3), uploading(4), voted(4, *range(40)))
LEDGER = ledger_of(*RECORDS, before=7, newest=3)


def test_a_ledger_reads_what_was_written() -> None:
    assert parse_ledger(LEDGER, OWNER) == module._Told(RECORDS, 7, 3)


def test_a_ledger_cut_anywhere_is_torn_or_shorter_and_never_something_else() -> None:
    shorter = [ledger_of(*RECORDS[:n], before=7, newest=3) for n in range(len(RECORDS) + 1)]
    for size in range(len(LEDGER)):
        if size < len(shorter[0]):
            with pytest.raises(Unusable, match=f"cut short to {size} bytes"):
                parse_ledger(LEDGER[:size], OWNER)
            continue
        whole = max(n for n, content in enumerate(shorter) if len(content) <= size)
        told = parse_ledger(LEDGER[:size], OWNER)
        assert told == module._Told(RECORDS[:whole], 7, 3, torn=size > len(shorter[whole]))


@pytest.mark.parametrize("zeros", [1, 8, 100, 5000])
def test_zeros_at_the_end_are_a_torn_write(zeros: int) -> None:
    assert parse_ledger(LEDGER + bytes(zeros), OWNER) == module._Told(RECORDS, 7, 3, torn=True)


def test_no_flipped_bit_of_a_ledger_goes_unseen() -> None:
    for position in range(len(LEDGER)):
        for bit in range(8):
            content = bytearray(LEDGER)
            content[position] ^= 1 << bit
            with pytest.raises(Unusable, match="damaged"):
                parse_ledger(bytes(content), OWNER)


def test_frames_taken_out_or_exchanged_are_seen() -> None:
    ends = [len(ledger_of(*RECORDS[:n], before=7, newest=3)) for n in range(len(RECORDS) + 1)]
    frames = [LEDGER[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    for order in ([0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4], [0, 2, 1, 3, 4], [0, 1, 1, 2], [0, 1, 2, 3, 4, 4]):
        with pytest.raises(Unusable, match="damaged"):
            parse_ledger(b"".join(frames[place] for place in order), OWNER)


@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_no_ledger(content: bytes) -> None:
    for candidate in (content, module.LEDGER_MAGIC + content):
        with pytest.raises(Unusable):
            parse_ledger(candidate, OWNER)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"7", b"\xff", b'["uploading", 1]', b'["uploading", 1, "zz"]', b'["voted", 1, "00"]',
             b'["voted", 1, "00", 3]', b'["other", 1, "00"]', b'["uploading", 1, "00", []]', b"[" * 5000,
             b'["uploading", Infinity, "00"]'],
)  # fmt: skip
def test_whole_frames_that_say_nothing_known_are_refused(body: bytes) -> None:
    _, digest = render_ledger(OWNER, module._Told(RECORDS, 7, 3))
    with pytest.raises(Unusable, match="has whole frames, which say what no ledger says"):
        parse_ledger(LEDGER + module._frame(digest, body)[0], OWNER)


def test_a_damaged_ledger_stops_the_start_and_is_left_as_it_is(tmp_path: Path) -> None:
    live(tmp_path, range(5))
    path = tmp_path / LEDGER_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(
        InvalidConfig, match=r"ledger: is damaged between bytes \d+ and \d+, in record \d; restore .* or"
    ):
        opened(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda path: path.unlink(), "ledger: is missing, and there are checkpoints; restore"),
        (lambda path: path.write_bytes(b""), "ledger: is cut short to 0 bytes"),
        (lambda path: (path.unlink(), path.mkdir()), "ledger: cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"x" * (module.LEDGER_BYTES + 1)), "is no ledger: it has more than"),
        (lambda path: path.write_bytes(render_ledger(Owner("00" * 32, PEER), module._Told())[0]),
         "ledger: is of the charter 000000000000…, this peer"),
        (lambda path: path.write_bytes(render_ledger(Owner(CHARTER.hex(), "other"), module._Told())[0]),
         "ledger: is of the peer other, this one is 12D3KooWone"),
    ],
)  # fmt: skip
def test_a_ledger_that_cannot_be_used_stops_the_start(
    tmp_path: Path, prepare: Callable[[Path], Any], told: str
) -> None:
    live(tmp_path, range(5))
    prepare(tmp_path / LEDGER_FILE)
    with pytest.raises(InvalidConfig, match=told) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_base_and_results_are_handed_back_as_the_file_holds_them_and_outlive_it(tmp_path: Path) -> None:
    store = opened(tmp_path).checkpoints
    results = (np.arange(20, dtype=np.uint8), np.arange(24, dtype=np.uint8))
    kept = checkpoint(1)
    mapped = store.persist(replace(kept, results=results))
    assert mapped is not None
    assert store.persist(uploading(1)) is None
    for number in range(2, 9):  # pruned by now
        store.persist(checkpoint(number))
    assert not (tmp_path / "round-1.checkpoint").exists()
    np.testing.assert_array_equal(mapped.base, kept.base)
    assert mapped.results.tobytes() == b"".join(each.tobytes() for each in results)
    assert mapped.base.dtype == np.float32
    assert mapped.base.ctypes.data % 64 == 0
    assert not (mapped.base.flags.writeable or mapped.base.flags.owndata or mapped.results.flags.writeable)
    store.close()


def test_a_checkpoint_with_results_comes_back_without_them(tmp_path: Path) -> None:
    store = opened(tmp_path).checkpoints
    kept = checkpoint(3)
    store.persist(replace(kept, results=(np.ones(3 << 20, np.uint8),)), trainer_at(3))
    store.close()
    found = opened(tmp_path)
    assert found.resume is not None
    verify_same(found.resume.checkpoint, kept)
    assert found.trainer == trainer_at(3)
    found.checkpoints.close()


def test_another_format_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", 3)
    live(tmp_path, range(2))
    monkeypatch.undo()
    with pytest.raises(InvalidConfig, match="is of format 3, this p2pfl reads 2; use the version that wrote it"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("rounds", "last", "assumed"),
    [
        (5, [], 5),  # after a checkpoint: at most the upload of its round
        (5, [uploading(5)], 6),  # its vote, or where the checkpoint after it did not get done, the next upload
        (5, [uploading(5), voted(5)], 6),
        (0, [], 0),
    ],
)
def test_a_torn_record_counts_as_the_next_upload(
    tmp_path: Path, rounds: int, last: list[Any], assumed: int
) -> None:  # fmt: skip
    live(tmp_path, range(rounds))
    store = opened(tmp_path).checkpoints
    for record in last:
        store.persist(record)
    whole = (tmp_path / LEDGER_FILE).stat().st_size
    store.persist(uploading(assumed) if not last else voted(assumed))
    store.close()
    os.truncate(tmp_path / LEDGER_FILE, whole + 30)
    for notes in (1, 0):  # and is remembered
        resume, found = reopened(tmp_path)
        assert resume.above == assumed
        assert resume.checkpoint.update is None
        assert len(found.notes) == notes
        if notes:
            assert f"its last record was cut short; round {assumed} counts as uploaded" in found.notes[0]


def test_a_ledger_cut_between_records_is_seen_by_the_checkpoint(tmp_path: Path) -> None:
    live(tmp_path, range(5))
    told = parse_ledger((tmp_path / LEDGER_FILE).read_bytes(), OWNER)
    shorter = render_ledger(OWNER, module._Told(told.records[:-1], told.before, told.newest))[0]
    assert (tmp_path / LEDGER_FILE).read_bytes().startswith(shorter)
    (tmp_path / LEDGER_FILE).write_bytes(shorter)
    with pytest.raises(InvalidConfig, match=r"has had 9 records, round-5\.checkpoint knows of 10"):
        opened(tmp_path)


def test_what_lies_beside_is_left_alone_and_what_a_dead_process_left_is_cleared(tmp_path: Path) -> None:
    live(tmp_path, range(2))
    for name in ("notes.txt", "round-x.checkpoint", ".round-9.checkpoint.tmp", ".ledger.tmp"):
        (tmp_path / name).write_text("x")
    _, found = reopened(tmp_path)
    assert found.notes == []
    assert names(tmp_path) == sorted(
        [LEDGER_FILE, "notes.txt", "round-1.checkpoint", "round-2.checkpoint", "round-x.checkpoint"]
    )


def test_the_head_of_a_checkpoint_can_be_read_by_a_person(tmp_path: Path) -> None:
    live(tmp_path, range(2))
    content = (tmp_path / "round-2.checkpoint").read_bytes()
    head = json.JSONDecoder().raw_decode(content[content.index(b"{") :].decode("latin-1"))[0]
    assert head == {
        "format": 2, "charter": CHARTER.hex(), "peer": PEER, "round": 2, "records": 4, "parameters": SIZE,
        "update": True, "released": -1, "results": 0, "mixed": True, "trainer": len(trainer_at(2)),
    }  # fmt: skip


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StoreFailed, match=r"file/state: cannot be written: (Not a directory|File exists); check the disk"
    ):
        opened(tmp_path / "file" / "state")


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    found = opened(tmp_path)
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    found.checkpoints.close()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


# What uploads cost


def paid(number: int) -> Uploading:
    return Uploading(Round(number), SESSION, 0.1)


def test_what_uploads_cost_is_never_forgotten_though_their_records_are(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    store = opened(folder, keep=1, rho=0.1).checkpoints
    for number in range(30):
        store.persist(paid(number))
        assert store.rho == pytest.approx(0.1 * (number + 1)), "before anything leaves"
        assert read_spent(folder, CHARTER, PEER).rho == store.rho, "also for those who look on"
        store.persist(checkpoint(number + 1))
    store.persist(uploading(30))
    assert len(store.records) < 5
    store.close()
    assert reopened(folder)[1].checkpoints.rho == pytest.approx(3.0, rel=1e-12)


def test_a_torn_record_counts_as_an_upload_that_was_paid_for(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    store = opened(folder, rho=0.1).checkpoints
    store.persist(paid(0))
    whole = (folder / LEDGER_FILE).stat().st_size
    store.persist(paid(1))
    store.close()
    for length in (whole + 1, whole + 40):
        content = (folder / LEDGER_FILE).read_bytes()
        torn = tmp_path / f"torn-{length}"
        torn.mkdir(mode=0o700)
        (torn / LEDGER_FILE).write_bytes(content[:length])
        assert opened(torn, rho=0.1).checkpoints.rho == pytest.approx(0.2)


def test_what_steps_tell_of_examples_is_never_forgotten(tmp_path: Path) -> None:
    """Also where a round was repeated; and steps alone keep no peer from a round."""
    folder = tmp_path / "state"
    store = opened(folder, keep=1, steps=3).checkpoints
    for number in range(30):
        store.persist(Stepped(Round(number), 3))
        store.persist(Stepped(Round(number), 3))
        assert store.steps == 6 * (number + 1) == read_spent(folder, CHARTER, PEER).steps
        store.persist(checkpoint(number + 1))
    store.persist(Stepped(Round(30), 3))
    assert len(store.records) < 5
    store.close()
    resumed, found = reopened(folder)
    assert found.checkpoints.steps == 183
    assert resumed.above == 29


def test_a_torn_record_counts_as_steps_too(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    store = opened(folder, rho=0.1, steps=2).checkpoints
    store.persist(Stepped(Round(0), 2))
    whole = (folder / LEDGER_FILE).stat().st_size
    store.persist(paid(0))
    store.close()
    content = (folder / LEDGER_FILE).read_bytes()
    torn = tmp_path / "torn"
    torn.mkdir(mode=0o700)
    (torn / LEDGER_FILE).write_bytes(content[: whole + 20])
    found = opened(torn, rho=0.1, steps=2).checkpoints
    assert (found.rho, found.steps) == (pytest.approx(0.1), 4), "it may have been of either"


def test_a_ledger_without_noise_is_as_it_was(tmp_path: Path) -> None:
    live(tmp_path / "plain", range(5), keep=1)
    assert b"rho" not in (tmp_path / "plain" / LEDGER_FILE).read_bytes()
    assert reopened(tmp_path / "plain")[1].checkpoints.rho == 0.0


def test_who_asks_what_is_spent_is_told_what_is_wrong_with_a_ledger(tmp_path: Path) -> None:
    live(tmp_path / "state", range(2))
    with pytest.raises(InvalidConfig, match="is of the charter"):
        read_spent(tmp_path / "state", bytes(32), PEER)
