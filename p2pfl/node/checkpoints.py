"""What a peer finds again when it starts: its ledger and its checkpoints, in a folder of its own.

    state/ledger                every `Uploading`, `Stepped` and `Voted`, one by one; and what those that are gone cost
    state/round-12.checkpoint   base, update and trainer as they were before round 12; the last few are kept

**Nothing acknowledged is lost**, and nothing damaged is taken for whole: `Checkpoints.persist` returns when the record
survives a crash of the machine, and `Checkpoints.open` either finds all of it or says in one line which file is wrong.

The ledger is a plain file and no SQLite database, for three reasons. A database's pages carry no checksum, so a
flipped bit in a session or a round number would be believed. Its journal is a second file: who copies the database
without it loses records that were acknowledged, and nothing shows it. And all that the ledger ever does is to append a
hundred bytes, and to be rewritten with each checkpoint. Its frames are

    length (4 bytes, little endian) | CRC-32 of these | body, JSON | SHA-256 of the SHA-256 before, and of all of this

A write that a crash cut short leaves the beginning of a frame, or zeros, at the very end. Those are cut off. Whoever
cut the file itself short leaves the same, so the round that comes next counts as uploaded then: that costs one round,
where a second upload would cost a member's secret. Anything else that does not add up is damage, and no peer starts
over it. Each checkpoint knows how many records there were when it was written, and the ledger which checkpoint is the
newest: neither can be exchanged for an older copy unseen. Where both are, or the ledger is cut exactly between two
records that are younger than every checkpoint, only the other peers know.

A checkpoint is `magic | length (4 bytes) | head, JSON | base | update | results | trainer | SHA-256 of all before`,
with float32 in little endian. Nothing here is unpickled.
"""

import fcntl
import hashlib
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig, OutOfTurn, StoreFailed
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import SESSION_BYTES, Checkpoint, Record, Resume, Stepped, Uploading, Voted, resume
from p2pfl.node.store import make_folder, replace_durably, store_failed, write_all

FORMAT = 2
KEEP = 3
"""Checkpoints kept: one to use, one should that be damaged, one more; a guess."""
LEDGER_FILE = "ledger"
LEDGER_MAGIC, CHECKPOINT_MAGIC = b"p2pfl ledger\n", b"p2pfl checkpoint\n"
LEDGER_BYTES = 16 << 20
"""No ledger is larger: it holds the records of a few rounds, each below a kilobyte for a hundred members."""
HEAD_BYTES = 1 << 12
"""No head of a checkpoint is larger: it holds a handful of numbers and names."""
_PREFIX = len(CHECKPOINT_MAGIC) + 4
_ALIGNMENT = 64
"""Bytes: of a cache line, and more than any vector instruction asks for."""
SLICE = 1 << 20
"""Bytes hashed and written at a time: so many stay in the processor's cache in between, and none is copied."""

_NO_VALUES = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)
"""What reading values raises from JSON that holds others."""

Told = Uploading | Stepped | Voted


class Unusable(Exception):
    """A file that is not what it should be; the message says what is wrong, without the file's name."""


class Foreign(Unusable):
    """A whole file, and not this peer's under this charter."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose state a file holds: nobody goes on from another's, or from one under another charter."""

    charter: str
    peer: str

    @classmethod
    def of(cls, head: dict[str, Any]) -> "Owner":
        """Return whom a file's head names."""
        return cls(str(head["charter"]), str(head["peer"]))

    def verify(self, found: "Owner") -> None:
        """Check that a file belongs to this owner.

        Raises:
            Foreign: it does not.
        """
        if found.charter != self.charter:
            raise Foreign(f"is of the charter {found.charter[:12]}…, this peer runs under {self.charter[:12]}…")
        if found.peer != self.peer:
            raise Foreign(f"is of the peer {found.peer}, this one is {self.peer}")


def _verify_format(head: dict[str, Any]) -> None:
    if head["format"] != FORMAT:
        raise Unusable(f"is of format {head['format']}, this p2pfl reads {FORMAT}; use the version that wrote it")


class Opened(NamedTuple):
    """What `Checkpoints.open` found.

    Attributes:
        checkpoints: where to persist from now on.
        resume: where the peer stands; None if it never persisted anything.
        trainer: the state of the trainer at that checkpoint; None if there is none.
        notes: what is wrong and was got around, a line each, for the trace.
    """

    checkpoints: "Checkpoints"
    resume: Resume | None
    trainer: bytes | None
    notes: list[str]


class Mapped(NamedTuple):
    """What a checkpoint's file holds: base and update, float32 [parameters], and the results' bytes, uint8."""

    base: NDArray[np.float32]
    results: NDArray[np.uint8]
    update: NDArray[np.float32] | None


class Checkpoints:
    """The state folder of a running peer. Methods may be called from any thread.

    A record of the ledger does not wait for a checkpoint that is being written, unless both end at the same moment.
    """

    def __init__(self, lock: int, ledger: "_Ledger", found: "_Found", parameters: int, keep: int) -> None:
        self._folder = ledger.path.parent
        self._lock = lock
        self._ledger = ledger
        self._rounds = found.rounds
        self._spoiled = found.spoiled
        self._parameters = parameters
        self._keep = keep
        self._writing = threading.Lock()

    @classmethod
    def open(
        cls,
        folder: Path,
        charter: bytes,
        peer: PeerId,
        initial: NDArray[np.float32],
        keep: int = KEEP,
        rho: float = 0.0,
        steps: int = 0,
    ) -> Opened:
        """Open a peer's state, or begin one in an empty folder, and hold it for this process alone.

        Args:
            folder: made if it is not there.
            charter: the charter's hash.
            peer: this peer's id.
            initial: the model before round 0, float32 [parameters]; where a peer stands that uploaded before its first
                checkpoint.
            keep: how many checkpoints to keep, at least 1.
            rho: what an upload costs under this charter, in zCDP: so much counts for a record that is torn.
            steps: with noise for examples, how many are in a round: so many count for it, too.

        Raises:
            InvalidConfig: another process uses the folder; or the ledger, or every checkpoint, is damaged, missing or
                another's. Nothing is changed then.
            StoreFailed: the folder cannot be written.
        """
        if keep < 1:
            raise InvalidConfig(f"{folder}: {keep} checkpoints to keep; keep one at least")
        owner = Owner(charter.hex(), peer)
        make_folder(folder)
        lock = _lock(folder)
        try:
            return cls._open(folder, lock, owner, initial, keep, Uploading(Round(0), bytes(SESSION_BYTES), rho), steps)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def _open(
        cls,
        folder: Path,
        lock: int,
        owner: Owner,
        initial: NDArray[np.float32],
        keep: int,
        lost: Uploading,
        steps: int,
    ) -> Opened:
        told = _read_ledger(folder, owner)
        found = _find(folder, owner, initial.size, told)
        resumed, notes = None, list(found.notes)
        if told.torn:
            told = _mended(told, found.checkpoint, lost, steps)
            notes.append(
                f"{folder / LEDGER_FILE}: its last record was cut short; "
                f"round {told.records[-1].round} counts as uploaded, as it may have been"
            )
        if found.checkpoint is not None or told.records:
            resumed = resume(found.checkpoint or Checkpoint(Round(0), initial, None), told.records)
            resumed = replace(resumed, above=max(resumed.above, told.newest - 1))
        for temporary in folder.glob(".*.tmp"):  # of a life that ended while it wrote
            with suppress(OSError):
                temporary.unlink()
        ledger = _Ledger(folder / LEDGER_FILE, owner, told)
        return Opened(cls(lock, ledger, found, initial.size, keep), resumed, found.trainer, notes)

    @property
    def rho(self) -> float:
        """What all uploads of all lives together may have told of this peer's data, in zCDP."""
        return self._ledger.told.rho

    @property
    def steps(self) -> int:
        """How many local steps of all lives together may have told of this peer's examples."""
        return self._ledger.told.steps

    @property
    def records(self) -> tuple[Told, ...]:
        """What the ledger still holds: all records since the oldest checkpoint, and the last upload and vote at all."""
        return self._ledger.told.records

    def persist(self, record: Record, trainer: bytes | None = None) -> Mapped | None:
        """Write `record`; when this returns, it survives a crash. Blocks: call it in a worker thread.

        Returns:
            A checkpoint's base and results as its file holds them, mapped read-only: they cost no memory that the
            system cannot take back, and stay as long as somebody holds them, also once the file is pruned. Else None.

        Args:
            record: what to write; its vectors are read as they lie, and must not be written to meanwhile.
            trainer: beside a checkpoint, the state of the trainer that goes with it.

        Raises:
            StoreFailed: it cannot be written; what was there before is intact. A ledger that failed once takes no more.
            OutOfTurn: it contradicts an earlier record (a second upload of a round, another vote, an older checkpoint),
                is a checkpoint of another model, or there are too many without one; nothing is written.
        """
        if isinstance(record, Checkpoint):
            with self._writing:
                return self._keep_checkpoint(record, trainer)
        self._ledger.append(record)
        return None

    def _keep_checkpoint(self, checkpoint: Checkpoint, trainer: bytes | None) -> Mapped:
        if self._rounds and checkpoint.round < self._rounds[-1]:
            raise OutOfTurn(f"a checkpoint of round {checkpoint.round} after one of round {self._rounds[-1]}")
        for vector in (checkpoint.base, checkpoint.update):
            if vector is not None and vector.shape != (self._parameters,):
                raise OutOfTurn(f"a checkpoint of shape {list(vector.shape)} for a model of [{self._parameters}]")
        ledger = self._ledger
        parts = _parts(ledger.owner, checkpoint, trainer, ledger.told.total)
        replace_durably(_checkpoint_path(self._folder, checkpoint.round), _sealed(parts))
        rounds = sorted({*self._rounds, checkpoint.round})
        self._rounds = rounds[-self._keep :]
        ledger.prune(self._rounds[0], checkpoint.round)
        # Only now, when the newer one is safe, and the ledger knows of it.
        spoiled = [path for path in self._spoiled if path != _checkpoint_path(self._folder, checkpoint.round)]
        for path in [*spoiled, *(_checkpoint_path(self._folder, old) for old in rounds[: -self._keep])]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise store_failed(path, error) from error
        self._spoiled = []
        return _mapped(_checkpoint_path(self._folder, checkpoint.round), checkpoint)

    def close(self) -> None:
        """Let go of the folder; called again, it does nothing."""
        self._ledger.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _lock(folder: Path) -> int:
    """Hold a folder, until the descriptor that is returned is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise InvalidConfig(f"{folder}: another process uses this peer's state; stop it first") from error
    return descriptor


def _advice(folder: Path) -> str:
    return (
        f"restore {folder} from a backup, or move it away: "
        "the peer then starts anew, and only the others know where it took part"
    )


# What both files tell, put together


@dataclass(frozen=True, slots=True)
class _Found:
    """The newest good checkpoint, and what lies around it."""

    checkpoint: Checkpoint | None
    trainer: bytes | None
    rounds: list[int]
    spoiled: list[Path]
    notes: list[str]


def _find(folder: Path, owner: Owner, parameters: int, told: "_Told") -> _Found:
    """Look for the newest checkpoint that is good.

    Raises:
        InvalidConfig: there should be one and is not, or the ledger is older than it.
    """
    paths = _checkpoint_paths(folder)
    faults, spoiled = [], []
    for position, (number, path) in enumerate(paths):
        try:
            checkpoint, trainer, records = read_checkpoint(path, owner, parameters, number)
        except Unusable as error:
            faults.append(f"{path}: {error}")
            if not isinstance(error, Foreign):  # nobody asked us to delete what is another's
                spoiled.append(path)
            continue
        if records > told.total:
            raise InvalidConfig(
                f"{folder / LEDGER_FILE}: has had {told.total} records, {path.name} knows of {records}: "
                f"it was cut short, or exchanged for an older one; {_advice(folder)}"
            )
        if number < told.newest and not faults:
            faults.append(f"{folder}: the checkpoint of round {told.newest} is missing")
        rounds = sorted(number for number, _ in paths[position:])
        return _Found(checkpoint, trainer, rounds, spoiled, [f"{fault}; {path.name} is used" for fault in faults])
    if told.newest >= 0 and not paths:
        faults.append(f"{folder}: the checkpoint of round {told.newest} is missing")
    if faults:
        raise InvalidConfig(f"{', and '.join(faults[:KEEP])}: no checkpoint can be used; {_advice(folder)}")
    return _Found(None, None, [], [], [])


def _mended(told: "_Told", checkpoint: Checkpoint | None, lost: Uploading, steps: int) -> "_Told":
    """Return a torn ledger with an upload at its end, for the latest round that the lost record can have been of.

    And with so many steps, if there are any: the record may have been of either.
    """
    uploads = [record.round + 1 for record in told.records if isinstance(record, Uploading)]
    latest = max([0 if checkpoint is None else checkpoint.round, told.newest, *uploads])
    stepped = (Stepped(Round(latest), steps),) if steps else ()
    return replace(told, records=(*told.records, *stepped, replace(lost, round=Round(latest))), torn=False)


# The ledger


class Spent(NamedTuple):
    """What a peer's uploads may have told of its data, in zCDP; and how many local steps of its examples."""

    rho: float
    steps: int


def read_spent(folder: Path, charter: bytes, peer: PeerId) -> Spent:
    """Return what a peer has spent under a charter; also while it runs.

    Raises:
        InvalidConfig: its ledger is damaged, missing or another's.
    """
    told = _read_ledger(folder, Owner(charter.hex(), peer))
    return Spent(told.rho, told.steps)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a ledger says.

    Attributes:
        records: those that are still in it.
        before: how many it had before them, all pruned.
        newest: the round of the newest checkpoint that it knows of; -1 for none.
        torn: whether the last write was cut short.
        pruned: what the pruned uploads cost, in zCDP.
        pruned_steps: how many local steps the pruned records are of.
    """

    records: tuple[Told, ...] = ()
    before: int = 0
    newest: int = -1
    torn: bool = False
    pruned: float = 0.0
    pruned_steps: int = 0

    @property
    def rho(self) -> float:
        """What all uploads together cost, in zCDP."""
        return math.fsum([self.pruned, *map(_cost, self.records)])

    @property
    def steps(self) -> int:
        """How many local steps there were in all."""
        return self.pruned_steps + sum(map(_steps, self.records))

    @property
    def total(self) -> int:
        """How many records there ever were."""
        return self.before + len(self.records)


def _read_ledger(folder: Path, owner: Owner) -> _Told:
    """Read a folder's ledger; one without records if the folder is empty.

    Raises:
        InvalidConfig: it is damaged, missing or another's.
    """
    path = folder / LEDGER_FILE
    try:
        with path.open("rb") as file:
            content = file.read(LEDGER_BYTES + 1)
        return parse_ledger(content, owner)
    except FileNotFoundError as error:
        if not _checkpoint_paths(folder):
            return _Told()
        raise InvalidConfig(f"{path}: is missing, and there are checkpoints; {_advice(folder)}") from error
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be read: {error.strerror}; {_advice(folder)}") from error
    except Unusable as error:
        raise InvalidConfig(f"{path}: {error}; {_advice(folder)}") from error


def parse_ledger(content: bytes, owner: Owner) -> _Told:
    """Read a ledger's bytes.

    Raises:
        Unusable: they are damaged anywhere but at a torn end, or another's.
    """
    bodies, torn = _bodies(content)
    if not bodies:
        raise Unusable(f"is cut short to {len(content)} bytes, which is less than its head")
    try:
        head = json.loads(bodies[0])
        _verify_format(head)
        owner.verify(Owner.of(head))
        before, newest, pruned = int(head["before"]), int(head["newest"]), float(head.get("rho", 0.0))
        return _Told(tuple(map(_decode, bodies[1:])), before, newest, torn, pruned, int(head.get("steps", 0)))
    except _NO_VALUES as error:
        raise Unusable("has whole frames, which say what no ledger says") from error


def _bodies(content: bytes) -> tuple[list[bytes], bool]:
    """Return the frames' bodies, and whether what follows the last one is the beginning of another."""
    if len(content) > LEDGER_BYTES:
        raise Unusable(f"is no ledger: it has more than {LEDGER_BYTES} bytes")
    if not content.startswith(LEDGER_MAGIC[: len(content)]):
        raise Unusable("is no ledger, or damaged at its first byte")
    bodies: list[bytes] = []
    at, digest = len(LEDGER_MAGIC), hashlib.sha256(LEDGER_MAGIC).digest()
    while at < len(content):
        head = content[at : at + 8]
        if len(head) < 8 or not any(content[at:]):
            return bodies, True
        length, check = struct.unpack("<II", head)
        if zlib.crc32(head[:4]) != check:
            raise Unusable(f"is damaged at byte {at}, in the head of record {len(bodies)}")
        body_at = at + 8
        if len(content) < body_at + length + len(digest):
            return bodies, True
        body, at = content[body_at : body_at + length], body_at + length + len(digest)
        digest = _chained(digest, head, body)
        if content[at - len(digest) : at] != digest:
            raise Unusable(f"is damaged between bytes {body_at} and {at}, in record {len(bodies)}")
        bodies.append(body)
    return bodies, False


def _chained(digest: bytes, head: bytes, body: bytes) -> bytes:
    return hashlib.sha256(digest + head + body).digest()


def _frame(digest: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Return a frame that follows the one with `digest`, and its own."""
    length = struct.pack("<I", len(body))
    head = length + struct.pack("<I", zlib.crc32(length))
    digest = _chained(digest, head, body)
    return head + body + digest, digest


def _encode(record: Told) -> bytes:
    if isinstance(record, Stepped):
        return json.dumps(["stepped", record.round, record.steps]).encode()
    values: list[Any] = ["uploading", record.round, record.session.hex()]
    if isinstance(record, Voted):
        values = ["voted", *values[1:], list(record.survivors)]
    elif record.rho:
        values.append(record.rho)
    return json.dumps(values).encode()


def _decode(body: bytes) -> Told:
    kind, number, session, *further = json.loads(body)
    if kind == "stepped" and not further:
        return Stepped(Round(int(number)), int(session))
    if kind == "voted":
        (places,) = further
        return Voted(Round(int(number)), bytes.fromhex(session), tuple(map(int, places)))
    if kind != "uploading" or len(further) > 1:
        raise ValueError(kind)
    return Uploading(Round(int(number)), bytes.fromhex(session), *map(float, further))


def _cost(record: Told) -> float:
    return record.rho if isinstance(record, Uploading) else 0.0


def _steps(record: Told) -> int:
    return record.steps if isinstance(record, Stepped) else 0


def render_ledger(owner: Owner, told: _Told) -> tuple[bytes, bytes]:
    """Return a ledger's bytes, and the SHA-256 of its last frame."""
    head = {"format": FORMAT, "charter": owner.charter, "peer": owner.peer}
    head |= {"before": told.before, "newest": told.newest}
    if told.pruned:
        head["rho"] = told.pruned
    if told.pruned_steps:
        head["steps"] = told.pruned_steps
    content, digest = LEDGER_MAGIC, hashlib.sha256(LEDGER_MAGIC).digest()
    for body in [json.dumps(head).encode(), *map(_encode, told.records)]:
        frame, digest = _frame(digest, body)
        content += frame
    return content, digest


class _Ledger:
    """The ledger of a running peer."""

    def __init__(self, path: Path, owner: Owner, told: _Told) -> None:
        """Take over what was read, and write it anew: a torn end goes, and a ledger that is not there is made."""
        self.path = path
        self.owner = owner
        self._guard = threading.Lock()
        self._failed: StoreFailed | None = None
        self._file, self._size, self._digest = -1, 0, b""
        self.told = told
        self._rewrite(told)

    def append(self, record: Told) -> None:
        """Write one record behind the others; see `Checkpoints.persist`."""
        with self._guard:
            if _is_known(record, self.told.records):
                return
            frame, digest = _frame(self._digest, _encode(record))
            if self._size + len(frame) > LEDGER_BYTES:
                raise OutOfTurn(f"{len(self.told.records)} records and no checkpoint that lets them go")
            with self._trusted():
                try:
                    write_all(self._file, frame)
                    os.fsync(self._file)
                except OSError as error:
                    with suppress(OSError):
                        os.ftruncate(self._file, self._size)
                    raise store_failed(self.path, error) from error
            self._size, self._digest = self._size + len(frame), digest
            self.told = replace(self.told, records=(*self.told.records, record))

    def prune(self, oldest: int, newest: int) -> None:
        """Note the newest checkpoint, and leave out the records below the oldest, but for the last of each kind.

        The last upload alone tells whether an update that somebody restores was spent since.
        """
        with self._guard:
            last: dict[type, Told] = {}
            for record in sorted(self.told.records, key=lambda record: record.round):
                last[type(record)] = record
            kept = tuple(r for r in self.told.records if r.round >= oldest or r is last[type(r)])
            gone = [r for r in self.told.records if not any(r is each for each in kept)]
            rho, steps = (
                math.fsum([self.told.pruned, *map(_cost, gone)]),
                self.told.pruned_steps + sum(map(_steps, gone)),
            )
            newest = max(newest, self.told.newest)
            self._rewrite(_Told(kept, self.told.total - len(kept), newest, pruned=rho, pruned_steps=steps))

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _rewrite(self, told: _Told) -> None:
        content, digest = render_ledger(self.owner, told)
        with self._trusted():
            replace_durably(self.path, [content])
            try:
                file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            except OSError as error:
                raise store_failed(self.path, error) from error
        self.close()
        self._file, self._size, self._digest, self.told = file, len(content), digest, told

    @contextmanager
    def _trusted(self) -> Iterator[None]:
        """Let nobody write to a file of which, after a write or an fsync that failed, nobody knows what is on the disk.

        The next life reads it and sees.
        """
        if self._failed is not None:
            raise StoreFailed(str(self._failed))
        try:
            yield
        except StoreFailed as error:
            self._failed = error
            raise


def _is_known(record: Told, records: Sequence[Told]) -> bool:
    """Return whether a vote is among the records already.

    Raises:
        OutOfTurn: one of them contradicts it.
    """
    for known in records:
        if isinstance(record, Uploading) and isinstance(known, Uploading) and record.round <= known.round:
            raise OutOfTurn(f"an upload for round {record.round} after one for round {known.round}")
        if isinstance(record, Voted) and isinstance(known, Voted) and record.round == known.round:
            if record != known:
                raise OutOfTurn(f"a second vote for round {record.round}, and not the same one")
            return True
    return False


# Checkpoints


def _checkpoint_path(folder: Path, number: int) -> Path:
    return folder / f"round-{number}.checkpoint"


def _checkpoint_paths(folder: Path) -> list[tuple[int, Path]]:
    """Return a folder's checkpoints by round, the newest first."""
    numbers = [path.stem.removeprefix("round-") for path in folder.glob("round-*.checkpoint")]
    return [
        (number, _checkpoint_path(folder, number))
        for number in sorted((int(text) for text in numbers if text.isdecimal()), reverse=True)
    ]


def _parts(owner: Owner, checkpoint: Checkpoint, trainer: bytes | None, records: int) -> Iterator[bytes | memoryview]:
    """Give the parts of a checkpoint's file up to its hash; `records`: of the ledger, so far."""
    head = {
        "format": FORMAT,
        "charter": owner.charter,
        "peer": owner.peer,
        "round": checkpoint.round,
        "records": records,
        "parameters": checkpoint.base.size,
        "update": checkpoint.update is not None,
        "released": checkpoint.released,
        "results": sum(result.nbytes for result in checkpoint.results),
        "mixed": checkpoint.mixed,
        "trainer": None if trainer is None else len(trainer),
    }
    encoded = json.dumps(head).encode()
    # So that the base lies where it can be read as numbers without being copied.
    encoded += b" " * (-(_PREFIX + len(encoded)) % _ALIGNMENT)
    yield CHECKPOINT_MAGIC
    yield struct.pack("<I", len(encoded))
    yield encoded
    yield _memory(checkpoint.base)
    if checkpoint.update is not None:
        yield _memory(checkpoint.update)
    yield from (result.data.cast("B") for result in checkpoint.results)
    if trainer is not None:
        yield trainer


def _mapped(path: Path, checkpoint: Checkpoint) -> Mapped:
    """Return base, results and update of the checkpoint in a file, read-only, without reading them."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<I", file.read(_PREFIX)[-4:])
            whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise store_failed(path, error) from error
    base, update = checkpoint.base, checkpoint.update
    end = _PREFIX + length + base.nbytes
    begin = end + (0 if update is None else update.nbytes)
    results = whole[begin : begin + sum(result.nbytes for result in checkpoint.results)]
    values = whole[_PREFIX + length : begin].view("<f4")
    return Mapped(values[: base.size], results, None if update is None else values[base.size :])


def _memory(vector: NDArray[np.float32]) -> memoryview:
    """Return the bytes of a vector, float32 [n], where they lie if it is contiguous and the machine little endian."""
    return np.ascontiguousarray(vector, "<f4").view(np.uint8).data


def _slices(content: bytes | memoryview) -> Iterator[memoryview]:
    view = memoryview(content)
    return (view[start : start + SLICE] for start in range(0, len(view), SLICE))


def _sealed(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Give the parts in slices, and behind them the SHA-256 of them all."""
    digest = hashlib.sha256()
    for part in parts:
        for piece in _slices(part):
            digest.update(piece)
            yield piece
    yield digest.digest()


def read_checkpoint(path: Path, owner: Owner, parameters: int, number: int) -> tuple[Checkpoint, bytes | None, int]:
    """Read the checkpoint of round `number`, of a model with so many parameters.

    Returns:
        The checkpoint, the state of the trainer, and how many records the ledger had.

    Raises:
        Unusable: it is damaged, another's, or of another model.
    """
    try:
        with path.open("rb", buffering=0) as file:
            found = _read(_Hashed(file), os.fstat(file.fileno()).st_size, owner, parameters)
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from error
    if found[0].round != number:
        raise Unusable(f"is the one of round {found[0].round} under another's name")
    return found


class _Hashed:
    """Reads a file, and hashes what it reads."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def fill(self, target: memoryview) -> None:
        """Read as many bytes as `target` has."""
        for piece in _slices(target):
            got = 0
            while got < len(piece):
                count = self._file.readinto(piece[got:])
                if not count:
                    raise Unusable("is cut short")
                got += count
            self.digest.update(piece)

    def read(self, size: int) -> bytes:
        """Read so many bytes."""
        content = bytearray(size)
        self.fill(memoryview(content))
        return bytes(content)

    def skip(self, size: int) -> None:
        """Read so many bytes for their hash only."""
        piece = memoryview(bytearray(min(size, SLICE)))
        for begin in range(0, size, SLICE):
            self.fill(piece[: min(SLICE, size - begin)])

    def vector(self, size: int) -> NDArray[np.float32]:
        """Read so many numbers."""
        vector = np.empty(size, "<f4")
        self.fill(vector.view(np.uint8).data)
        return vector.astype(np.float32, copy=False)


def _read(file: _Hashed, size: int, owner: Owner, parameters: int) -> tuple[Checkpoint, bytes | None, int]:
    if file.read(len(CHECKPOINT_MAGIC)) != CHECKPOINT_MAGIC:
        raise Unusable("is no checkpoint, or damaged at its first byte")
    (length,) = struct.unpack("<I", file.read(4))
    if length > HEAD_BYTES:
        raise Unusable(f"is damaged: its head would have {length} bytes")
    try:
        head = json.loads(file.read(length))
        _verify_format(head)
        values = int(head["parameters"])
        trainer_bytes = None if head["trainer"] is None else int(head["trainer"])
        results_bytes = int(head["results"])
        number, records, has_update = int(head["round"]), int(head["records"]), bool(head["update"])
        released, mixed = int(head["released"]), bool(head.get("mixed", True))
        found_owner = Owner.of(head)
    except _NO_VALUES as error:
        raise Unusable("is damaged in its head") from error
    # Before anything is allocated for what a damaged head may say.
    told = len(CHECKPOINT_MAGIC) + 4 + length + 4 * values * (1 + has_update) + (trainer_bytes or 0) + 32
    told += results_bytes
    if told != size or min(values, results_bytes, trainer_bytes or 0) < 0:
        raise Unusable(f"has {size} bytes and should have {told}: it was cut short, or is damaged")
    base = file.vector(values)
    update = file.vector(values) if has_update else None
    file.skip(results_bytes)  # without the statements that a round ended with, which nobody keeps, they prove nothing
    trainer = None if trainer_bytes is None else file.read(trainer_bytes)
    found = file.digest.digest()
    if file.read(len(found)) != found:
        raise Unusable("is damaged: its content is not what its SHA-256 says")
    owner.verify(found_owner)
    if values != parameters:
        raise Foreign(f"is of a model of {values} parameters, this one has {parameters}")
    return Checkpoint(Round(number), base, update, released, mixed=mixed), trainer, records
