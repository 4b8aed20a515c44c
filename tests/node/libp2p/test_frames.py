"""The yamux wire format and its arithmetic. Layout and numbers are those of hashicorp/yamux `spec.md`."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.node.libp2p.frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    INITIAL_WINDOW,
    LARGEST,
    MAX_SKIPPED,
    PING,
    RST,
    SYN,
    WINDOW,
    Deframer,
    Frame,
    Pulse,
    ReceiveWindow,
    SendWindow,
    StreamNumbers,
    Violation,
    decode,
    encode,
)

NUMBERS = st.integers(1, LARGEST)
VALID = st.one_of(
    st.builds(
        Frame,
        st.sampled_from([DATA, WINDOW]),
        st.sampled_from([0, SYN, ACK, FIN, RST, SYN | FIN, ACK | RST]),
        NUMBERS,
        st.integers(0, 40),
    ),
    st.builds(Frame, st.just(PING), st.sampled_from([SYN, ACK]), st.just(0), st.integers(0, LARGEST)),
    st.builds(Frame, st.just(GO_AWAY), st.just(0), st.just(0), st.integers(0, 2)),
)


@pytest.mark.parametrize(
    ("text", "frame"),
    [
        ("00 01 0001 00000001 003c0000", Frame(WINDOW, SYN, 1, 4 * 2**20 - 256 * 1024)),
        ("00 00 0000 00000002 00040000", Frame(DATA, 0, 2, 256 * 1024)),
        ("00 01 0004 00000003 00000000", Frame(WINDOW, FIN, 3, 0)),
        ("00 02 0002 00000000 deadbeef", Frame(PING, ACK, 0, 0xDEADBEEF)),
        ("00 03 0000 00000000 00000001", Frame(GO_AWAY, 0, 0, 1)),
    ],
)
def test_headers_have_the_layout_of_the_specification(text: str, frame: Frame) -> None:
    assert encode(*frame) == bytes.fromhex(text)
    assert decode(bytes.fromhex(text)) == frame


@pytest.mark.parametrize(
    "fields",
    [
        (1, DATA, 0, 1, 0),
        (0, 4, 0, 1, 0),
        (0, DATA, 16, 1, 0),
        (0, DATA, SYN | ACK, 1, 0),
        (0, DATA, 0, 0, 5),
        (0, WINDOW, 0, 0, 5),
        (0, PING, SYN, 1, 0),
        (0, PING, 0, 0, 0),
        (0, PING, SYN | FIN, 0, 0),
        (0, GO_AWAY, 0, 1, 0),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(fields: tuple[int, ...]) -> None:
    with pytest.raises(Violation):
        decode(struct.pack("!BBHII", *fields))


@given(st.binary(min_size=12, max_size=12))
def test_any_twelve_bytes_are_a_frame_or_a_violation(header: bytes) -> None:
    try:
        frame = decode(header)
    except Violation:
        return
    assert encode(*frame) == header


def parts(stream: bytes, cuts: list[int]) -> list[Any]:
    """What a deframer makes of `stream` cut at `cuts`, with the pieces of each body joined."""
    deframer, found = Deframer(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        for part in deframer.feed(memoryview(stream)[start:end]):
            if isinstance(part, memoryview) and isinstance(found[-1], bytes):
                found[-1] += part
            else:
                found.append(bytes(part) if isinstance(part, memoryview) else part)
    return found


@given(st.lists(VALID, max_size=6), st.data())
def test_frames_come_out_the_same_however_the_stream_is_cut(frames: list[Frame], data: st.DataObject) -> None:
    expected: list[Any] = []
    stream = b""
    for position, frame in enumerate(frames):
        stream += encode(*frame)
        expected.append(frame)
        if frame.kind == DATA and frame.length:
            body = bytes([position]) * frame.length
            stream += body
            expected.append(body)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    assert parts(stream, cuts) == expected


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_no_bytes_make_the_deframer_hold_more_than_a_header(pieces: list[bytes]) -> None:
    deframer = Deframer()
    try:
        for piece in pieces:
            for _ in deframer.feed(memoryview(piece)):
                assert len(deframer._header) < 12
    except Violation:
        pass


def test_a_send_window_gives_what_it_has() -> None:
    window = SendWindow()
    assert window.take(100_000) == 100_000
    assert window.take(200_000) == INITIAL_WINDOW - 100_000
    assert window.take(1) == 0
    window.grant(5)
    assert window.take(9) == 5


def test_a_send_window_holds_32_bits() -> None:
    window = SendWindow()
    window.grant(LARGEST - INITIAL_WINDOW)
    with pytest.raises(Violation):
        window.grant(1)
    assert window.left == LARGEST


def test_credit_comes_back_in_halves() -> None:
    window = ReceiveWindow(100)
    window.take(100)
    assert [window.release(size) for size in (49, 1, 20, 30)] == [0, 50, 0, 50]
    window.take(100)
    with pytest.raises(Violation):
        window.take(1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 600)), max_size=60))
def test_what_is_credited_and_what_is_held_never_exceed_the_window(steps: list[tuple[bool, int]]) -> None:
    window, held, credit = ReceiveWindow(1000), 0, 1000
    for is_sent, size in steps:
        if is_sent and size > credit:
            with pytest.raises(Violation):
                window.take(size)
        elif is_sent:
            window.take(size)
            held, credit = held + size, credit - size
        else:
            read = min(size, held)
            held -= read
            credit += window.release(read)
        assert held + credit <= 1000
        assert held or credit > 500  # a reader that keeps up never stalls its writer


def test_either_end_has_its_own_numbers() -> None:
    dialler, listener = StreamNumbers(True), StreamNumbers(False)
    assert [dialler.allot() for _ in range(3)] == [1, 3, 5]
    assert [listener.allot() for _ in range(3)] == [2, 4, 6]
    for number in (1, 3):
        listener.admit(number)
    for number in (2, 4):
        dialler.admit(number)
    for numbers, other in ((dialler, 1), (listener, 2)):
        with pytest.raises(Violation):
            numbers.admit(other)


def test_numbers_may_come_out_of_order_but_once() -> None:
    numbers = StreamNumbers(False)
    for number in (7, 3, 1):
        assert not numbers.is_used(number)
        numbers.admit(number)
        assert numbers.is_used(number)
        with pytest.raises(Violation):
            numbers.admit(number)
    assert not numbers.is_used(5)
    assert not numbers.is_used(9)
    assert not numbers.is_used(2)


@given(st.lists(st.integers(0, LARGEST), max_size=40), st.booleans())
def test_any_numbers_are_admitted_once_or_refused_and_cost_little(order: list[int], is_initiator: bool) -> None:
    numbers, admitted = StreamNumbers(is_initiator), set()
    for number in order:
        try:
            numbers.admit(number)
        except Violation:
            continue
        assert number not in admitted
        assert number % 2 != is_initiator
        assert number != 0
        admitted.add(number)
        assert len(numbers._skipped) <= MAX_SKIPPED


def test_numbers_run_out() -> None:
    numbers = StreamNumbers(True)
    numbers._next = LARGEST
    assert numbers.allot() == LARGEST
    with pytest.raises(OverflowError):
        numbers.allot()


def test_a_silent_peer_is_asked_once_and_then_given_up() -> None:
    pulse = Pulse(idle=15, answer=30, heard=100)
    assert (pulse.deadline, pulse.is_due(114), pulse.is_due(115)) == (115, False, True)
    pulse.asked = 115
    assert (pulse.deadline, pulse.is_due(144), pulse.is_dead(144), pulse.is_dead(145)) == (145, False, False, True)
    pulse.hear(144)
    assert (pulse.deadline, pulse.is_dead(158)) == (159, False)
