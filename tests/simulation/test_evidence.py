"""The search for known plaintext, and what is read from a capture without a key."""

import math

import numpy as np
import pytest

from p2pfl.node.capture import Piece, Side
from p2pfl.simulation.evidence import (
    SCAN_BYTES,
    WINDOW,
    KnownText,
    bursts,
    clear_lines,
    commonest,
    entropy,
    median_interval,
    random_entropy,
    records,
    times,
)

DRAW = np.random.default_rng(7)
TEXT = DRAW.bytes(10 * WINDOW)


@pytest.mark.parametrize("before", [0, 1, 7, 15, 16, SCAN_BYTES - WINDOW - 3, SCAN_BYTES - 1])
def test_a_text_is_found_whole_at_any_offset(before: int) -> None:
    stream = DRAW.bytes(before) + TEXT + DRAW.bytes(5)
    match = KnownText([TEXT]).search([stream])
    assert (match.windows, match.found, match.offset) == (10, 10, before)


@pytest.mark.parametrize("start", range(WINDOW))
def test_any_31_bytes_in_a_row_are_enough(start: int) -> None:
    part = TEXT[start + WINDOW : start + 3 * WINDOW - 1]
    assert len(part) == 31
    assert KnownText([TEXT]).search([DRAW.bytes(100), DRAW.bytes(33) + part + DRAW.bytes(20)]).found >= 1


def test_what_is_changed_or_not_there_is_not_found() -> None:
    known = KnownText([TEXT])
    assert known.search([DRAW.bytes(3 * SCAN_BYTES)]).found == 0
    assert known.search([bytes(byte ^ 1 for byte in TEXT)]).found == 0
    assert known.search([TEXT[: WINDOW - 1], b"", TEXT[1:WINDOW]]).found == 0
    # Two streams are not one: half a window in each is none.
    assert known.search([TEXT[:8], TEXT[8:16]]).found == 0


def test_windows_that_occur_everywhere_are_not_looked_for() -> None:
    assert KnownText([bytes(160), b"\1\2" * 80]).windows == frozenset()


def test_lines_of_multistream_select_are_read_up_to_the_encryption() -> None:
    head = b"\x13/multistream/1.0.0\n\x07/noise\n"
    text = clear_lines(head + b"\x00\x20" + bytes(32))
    assert text.lines == ("/multistream/1.0.0", "/noise")
    assert text.length == len(head)
    assert clear_lines(DRAW.bytes(100)).lines == ()
    assert clear_lines(head[:10]).lines == ()
    assert clear_lines(b"").length == 0
    long = b"/" + b"a" * 198 + b"\n"
    assert clear_lines(b"\xc8\x01" + long).lines == (long[:-1].decode(),)


@pytest.mark.parametrize("length_bytes", [2, 4])
def test_records_are_read_from_their_lengths(length_bytes: int) -> None:
    sizes = [100, 19_000, 19_000, 40]
    stream = b"head" + b"".join(size.to_bytes(2, "big") + DRAW.bytes(size) for size in (32, 200))
    start = len(stream)
    stream += b"".join(size.to_bytes(length_bytes, "big") + DRAW.bytes(size) for size in sizes)
    found = records(stream, 4, Side.DIALER)
    assert [record.size for record in found] == sizes
    assert found[0].offset == start
    assert records(stream[:-1], 4, Side.DIALER) == ()


def test_times_and_bursts_are_those_of_the_pieces() -> None:
    pieces = [
        Piece(1.0, Side.DIALER, bytes(10)),
        Piece(1.001, Side.LISTENER, bytes(7)),
        Piece(1.001, Side.DIALER, bytes(5)),
        Piece(2.0, Side.DIALER, bytes(3)),
    ]
    assert [(burst.at, burst.size) for burst in bursts(pieces, Side.DIALER)] == [(1.0, 15), (2.0, 3)]
    assert times(pieces, Side.DIALER, [0, 9, 10, 15]) == [1.0, 1.0, 1.001, 2.0]


def test_the_commonest_large_size_is_the_update_s() -> None:
    assert commonest([30, 30, 30, 100, 99, 100, 30]) == (100, 2)
    assert commonest([]) == (0, 0)
    assert median_interval([1.0, 2.0, 4.0, 5.0]) == 1.0
    assert median_interval([1.0]) is None


def test_random_bytes_have_the_entropy_that_random_bytes_have() -> None:
    data = DRAW.bytes(200_000)
    # The spread of the estimate: its chi-squared has 255 degrees of freedom, so sqrt(2 * 255) / (2 n ln 2).
    spread = math.sqrt(2 * 255) / (2 * len(data) * math.log(2))
    assert entropy(data) == pytest.approx(random_entropy(len(data)), abs=6 * spread)
    assert entropy(b"\0" * 100) == entropy(b"") == 0.0
    assert entropy(bytes(range(256))) == 8.0
