"""Pairwise masks and self masks, and the pipeline that hides a vector under them.

Member u of a masked sum sends, in the ring of its words (Bonawitz et al., CCS 2017, section 4; Bell et al., CCS 2020):

    y_u = q_u + PRG(self key of u) + sum over v > u of PRG(pair key of u, v) - sum over v < u of PRG(pair key of u, v)

Summed over all members the pairwise masks cancel. Over survivors, their self masks and the pairwise masks between a
survivor and a dropped member are left, and are removed with the keys that the survivors reveal.

PRG(key) is the suite's block cipher in counter mode from block 0, read as little endian words; keys are used for one
session only, which the session's id as salt of every key ensures. A masked vector is a function of position, so any
block of it can be computed again; none of it is stored here. Owns no threads: callers may bring them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import LocalError
from p2pfl.core.ids import PeerId
from p2pfl.crypto.ring import HEADER_BYTES, HEADER_WORD, Chunk, Floats, Layout, Metrics, Ring, header_of
from p2pfl.crypto.suite import BLOCK_BYTES, Suite

SEED_BYTES = 32
PIECE_BYTES = 1 << 18
"""What is worked on at a time: it stays in the second-level cache through all masks. Measured: 64 KiB is 7% slower."""

Run = Callable[[Sequence[Callable[[], None]]], None]
"""Calls every function, in any order or at once, waits for all, and raises what one of them raised."""


def serially(tasks: Sequence[Callable[[], None]]) -> None:
    """Call every function in turn: the default `Run`."""
    for task in tasks:
        task()


@dataclass(frozen=True, slots=True)
class Mask:
    """One mask stream and its sign. Its `repr` does not show the key.

    Attributes:
        key: the stream's cipher key.
        sign: +1 or -1.
    """

    key: bytes = field(repr=False)
    sign: int


def self_key(suite: Suite, seed: bytes, sid: bytes) -> bytes:
    """Return the key of a member's self mask.

    Args:
        suite: the charter's.
        seed: the member's 32-byte seed of this attempt.
        sid: the session's id, 32 bytes.

    Raises:
        LocalError: a length is wrong.
    """
    _verify_length("a self mask's seed", seed)
    _verify_length("a session's id", sid)
    return suite.hkdf(seed, sid, canonical(["p2pfl/self-mask/1", suite.name]), suite.key_bytes)


def own_masks(own: PeerId, self_mask: bytes, pairs: Mapping[PeerId, bytes]) -> tuple[Mask, ...]:
    """Return what a member adds to its vector.

    Args:
        own: the member.
        self_mask: its `self_key`.
        pairs: its `mask_secret` (`p2pfl.crypto.agreement`) with every other member.

    Raises:
        LocalError: it is paired with itself, or two keys are the same.
    """
    if own in pairs:
        raise LocalError("a member has no pairwise mask with itself")
    return _distinct([Mask(self_mask, 1), *pair_masks(own, pairs)])


def pair_masks(own: PeerId, pairs: Mapping[PeerId, bytes]) -> tuple[Mask, ...]:
    """Return the masks that a member shares with others, with its sign.

    Args:
        own: the member.
        pairs: its `mask_secret` with each of them.

    Raises:
        LocalError: two keys are the same.
    """
    return _distinct([Mask(key, _sign(own, peer)) for peer, key in pairs.items()])


def leftover_masks(
    self_masks: Mapping[PeerId, bytes], dropped: Collection[PeerId], pairs: Mapping[tuple[PeerId, PeerId], bytes]
) -> tuple[Mask, ...]:
    """Return what is to be added to the sum of the survivors' masked vectors to leave the sum of their vectors.

    Args:
        self_masks: every survivor's `self_key`.
        dropped: the members that are not in the sum.
        pairs: the `mask_secret` of every (survivor, dropped member).

    Raises:
        LocalError: somebody survived and dropped, a key is missing or one too many, or two keys are the same.
    """
    if not self_masks.keys().isdisjoint(dropped):
        raise LocalError("a member cannot both survive and drop")
    if pairs.keys() != {(survivor, gone) for survivor in self_masks for gone in dropped}:
        raise LocalError("unmasking needs exactly one pair key for each survivor and each dropped member")
    return _distinct(
        [
            *(Mask(key, -1) for key in self_masks.values()),
            *(Mask(key, -_sign(survivor, gone)) for (survivor, gone), key in pairs.items()),
        ]
    )


@dataclass(frozen=True, slots=True, eq=False)
class MaskedVector:
    """A member's masked vector, computed where it is read. Its `repr` shows neither the values nor the keys.

    The values are looked through once, when it is made. From then on they must stay as they are: a block that is read
    before and after a change shows the change, since its masks are the same.

    Attributes:
        suite: the charter's.
        ring: of this sum.
        layout: of this sum.
        values: float32 [layout.values]; or int32, the words themselves, within what the ring has room for. Nobody
            writes to it any more.
        weight: the member's, in units of 1 / WEIGHT_ONE.
        masks: of `own_masks`.
        metrics: what the header tells beside the weight.
        clipped: how many values are clipped, for `verify_clipped`; 0 of words.

    Raises:
        LocalError: the parts do not fit each other.
        RoundFailed: a value is NaN or infinite.
    """

    suite: Suite = field(repr=False)
    ring: Ring
    layout: Layout
    values: Floats | NDArray[np.int32] = field(repr=False)
    weight: int = field(repr=False)
    masks: tuple[Mask, ...] = field(repr=False)
    metrics: Metrics = field(repr=False, default=Metrics())
    clipped: int = field(init=False)

    def __post_init__(self) -> None:
        if self.values.dtype not in (np.float32, np.int32) or self.values.shape != (self.layout.values,):
            raise LocalError(f"a {self.values.dtype} {list(self.values.shape)} for float32 [{self.layout.values}]")
        if (self.values.dtype == np.int32) != (self.ring.noise > 0):
            raise LocalError(
                "noise is in the words already, and nothing goes without it into a ring that has room for it"
            )
        if self.ring.bits != self.layout.bits:
            raise LocalError(f"a ring of {self.ring.bits} bits and a layout of {self.layout.bits}")
        if not 0 < len(self.masks) <= self.ring.members:
            raise LocalError(
                f"{len(self.masks)} masks in a ring for {self.ring.members} members, who have one for each"
            )
        values: Any = self.values
        clipped = self.ring.count_clipped(values, self.weight) if values.dtype == np.float32 else 0
        object.__setattr__(self, "clipped", clipped)

    def block_into(
        self,
        index: int,
        offset: int,
        out: memoryview,
        run: Run = serially,
        parts: int = 1,
        masks: Sequence[Mask] | None = None,
    ) -> None:
        """Write the bytes of chunk `index` from `offset` on into `out`.

        Blocks of a mebibyte and more are the fastest: setting up every cipher costs a few microseconds a block.
        Besides `out`, each part needs at most three quarters of a mebibyte.

        Args:
            index: which chunk.
            offset: where in it, bytes; a multiple of 16.
            out: writable bytes; a multiple of 16 of them, or up to the chunk's end.
            run: how to call the parts, for example in a thread pool; the ciphers release the interpreter lock.
            parts: how many of them to make.
            masks: these instead of all; what is written then must not leave this peer.

        Raises:
            LocalError: there is no such block.
        """
        chunk, used = self.layout.chunk(index), self.masks if masks is None else masks
        _verify_block(chunk, offset, out)
        run([partial(self._part, chunk, offset + a, out[a:b], used) for a, b in _split(len(out), parts)])

    def _part(self, chunk: Chunk, offset: int, out: memoryview, masks: Sequence[Mask]) -> None:
        masker = Masker(self.suite, masks)
        data = np.frombuffer(out, np.uint8)
        rounded = np.empty(min(PIECE_BYTES, data.size) // self.ring.word.itemsize, np.float32)
        for begin, end in _pieces(offset, data.size):
            piece = data[begin:end]
            if offset + begin == 0:
                piece[:] = np.frombuffer(header_of(self.weight, self.metrics, self.ring.members), np.uint8)
                words: NDArray[Any] = piece.view(HEADER_WORD)
            else:
                words = piece.view(self.ring.word)
                first = chunk.first + (offset + begin - HEADER_BYTES) // words.itemsize
                values: Any = self.values[first : first + words.size]
                whole = values
                if values.dtype == np.float32:
                    whole = rounded[: words.size]
                    self.ring.round_into(values, self.weight, whole, clip=self.clipped > 0)
                np.copyto(words.view(self.ring.signed), whole, casting="unsafe")
            masker.add(words, chunk.position + offset + begin)


def add_chunk(ring: Ring, total: memoryview, chunk: bytes | bytearray | memoryview) -> None:
    """Add a masked chunk to the sum of others, in place.

    Args:
        ring: the words' ring.
        total: writable bytes, header included; zeros at first.
        chunk: as many bytes.

    Raises:
        LocalError: the lengths differ, or are those of no chunk.
    """
    if len(total) != len(chunk) or len(total) < HEADER_BYTES or len(total) % ring.word.itemsize:
        raise LocalError(f"a chunk of {len(chunk)} bytes for a sum of {len(total)}")
    for word, begin, end in ((HEADER_WORD, 0, HEADER_BYTES), (ring.word, HEADER_BYTES, len(total))):
        words: NDArray[Any] = np.frombuffer(total[begin:end], word)
        np.add(words, np.frombuffer(memoryview(chunk)[begin:end], word), out=words)


def unmask(
    suite: Suite,
    layout: Layout,
    index: int,
    total: memoryview,
    masks: Sequence[Mask],
    run: Run = serially,
    parts: int = 1,
) -> None:
    """Remove what masks are left in the sum of a chunk, in place.

    Args:
        suite: the charter's.
        layout: of this sum.
        index: which chunk.
        total: its whole sum, writable bytes.
        masks: of `leftover_masks`.
        run: as for `MaskedVector.block_into`.
        parts: as there.

    Raises:
        LocalError: `total` has another length than the chunk.
    """
    chunk = layout.chunk(index)
    if len(total) != chunk.size:
        raise LocalError(f"a sum of {len(total)} bytes for a chunk of {chunk.size}")
    word = np.dtype(f"<u{layout.bits // 8}")

    def part(begin: int, end: int) -> None:
        masker = Masker(suite, masks)
        data = np.frombuffer(total[begin:end], np.uint8)
        for low, high in _pieces(begin, data.size):
            masker.add(data[low:high].view(word if begin + low else HEADER_WORD), chunk.position + begin + low)

    run([partial(part, begin, end) for begin, end in _split(len(total), parts)])


class Masker:
    """Mask streams with a scratch buffer; for one thread."""

    def __init__(self, suite: Suite, masks: Sequence[Mask]) -> None:
        self._streams = [(suite.keystream(mask.key), np.add if mask.sign > 0 else np.subtract) for mask in masks]
        self._scratch = np.empty(PIECE_BYTES, np.uint8)

    def add(self, words: NDArray[Any], position: int) -> None:
        """Add every stream from `position` to `words`, in place."""
        stream_bytes = self._scratch[: words.nbytes]
        out, stream_words = stream_bytes.data, stream_bytes.view(words.dtype)
        for stream, operation in self._streams:
            stream.expand_into(position, out)
            operation(words, stream_words, out=words)


def _pieces(offset: int, size: int) -> list[tuple[int, int]]:
    """Cut `size` bytes of a chunk that begin at `offset` in it; the header is a piece of its own."""
    begins = list(range(0 if offset else HEADER_BYTES, size, PIECE_BYTES))
    pieces = [(begin, min(begin + PIECE_BYTES, size)) for begin in begins]
    return pieces if offset else [(0, HEADER_BYTES), *pieces]


def _split(size: int, parts: int) -> list[tuple[int, int]]:
    """Cut `size` bytes into at most `parts` ranges that begin at multiples of a cipher block."""
    if parts < 1:
        raise LocalError(f"work cannot be cut into {parts} parts")
    stride = max(1, -(-size // (parts * BLOCK_BYTES))) * BLOCK_BYTES
    return [(begin, min(begin + stride, size)) for begin in range(0, size, stride)]


def _verify_block(chunk: Chunk, offset: int, out: memoryview) -> None:
    end = offset + len(out)
    if out.itemsize != 1 or out.readonly or not out.contiguous:
        raise LocalError("a block is written into writable bytes")
    if offset < 0 or offset % BLOCK_BYTES or end > chunk.size or (end % BLOCK_BYTES and end != chunk.size):
        raise LocalError(f"no block from byte {offset} to {end} in a chunk of {chunk.size}")


def _sign(own: PeerId, other: PeerId) -> int:
    return 1 if other > own else -1


def _distinct(masks: list[Mask]) -> tuple[Mask, ...]:
    if len({mask.key for mask in masks}) != len(masks):
        raise LocalError("two masks have the same key, and would cancel or double")
    return tuple(masks)


def _verify_length(what: str, secret: bytes) -> None:
    if len(secret) != SEED_BYTES:
        raise LocalError(f"{what} has {SEED_BYTES} bytes, not {len(secret)}")
