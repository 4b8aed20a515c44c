"""Headers on the wire: what goes out comes back, and whatever else comes costs its sender, never us."""

import math
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pfl.core.errors import Malformed, RemoteError, TooLarge
from p2pfl.core.ids import Round
from p2pfl.core.wire import (
    LENGTH_BYTES,
    MAX_ADDRESS_BYTES,
    MAX_ADDRESSES,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_PEER_ID_BYTES,
    MAX_ROUND,
    MAX_SEQUENCE,
    SIGNATURE_BYTES,
    VERSION,
    Bye,
    Hello,
    Message,
    Ping,
    Update,
    Whereabouts,
    decode_header,
    digest,
    encode_header,
    header_length,
    payload_length,
)

CHARTER = bytes(range(32))
LONGEST = Update(b"\xff" * 32, Round(MAX_ROUND), MAX_PAYLOAD_BYTES, math.nextafter(math.inf, 0), True)

charters = st.binary(min_size=32, max_size=32)
rounds = st.integers(0, MAX_ROUND).map(Round)
spreads = st.floats(0, allow_nan=False, allow_infinity=False)
plain = st.characters(min_codepoint=32, max_codepoint=126)
addresses = st.lists(st.text(plain, min_size=1, max_size=MAX_ADDRESS_BYTES), max_size=MAX_ADDRESSES).map(tuple)
signatures = st.binary(min_size=SIGNATURE_BYTES, max_size=SIGNATURE_BYTES)
peer_ids = st.text(plain, min_size=1, max_size=MAX_PEER_ID_BYTES)
messages = st.one_of(
    st.builds(Whereabouts, charters, rounds, peer_ids, st.integers(0, MAX_SEQUENCE), addresses, signatures),
    st.builds(Hello, charters, rounds),
    st.builds(Ping, charters, rounds),
    st.builds(Bye, charters, rounds),
    st.builds(Update, charters, rounds, st.integers(0, MAX_PAYLOAD_BYTES), spreads, st.booleans()),
)


def header_of(message: Message) -> bytes:
    return encode_header(message)[LENGTH_BYTES:]


def packed(*fields: Any) -> bytes:
    header: bytes = msgpack.packb(list(fields))
    return header


def with_round(encoded: bytes) -> bytes:
    """A Hello whose round is encoded like this."""
    return b"\x94" + packed(VERSION, Hello.kind, CHARTER)[1:] + encoded


@given(messages)
@example(LONGEST)
def test_what_goes_out_comes_back(message: Message) -> None:
    frame = encode_header(message)
    assert header_length(frame[:LENGTH_BYTES]) == len(frame) - LENGTH_BYTES
    for kind in (bytes, bytearray, memoryview):
        assert decode_header(kind(frame[LENGTH_BYTES:])) == message
    assert payload_length(message) == (message.length if isinstance(message, Update) else 0)


@pytest.mark.parametrize("kind", [Hello, Ping, Bye])
def test_every_message_at_its_largest_fits(kind: type[Hello] | type[Ping] | type[Bye]) -> None:
    for message in (kind(LONGEST.charter, LONGEST.round), LONGEST):
        assert len(header_of(message)) <= MAX_HEADER_BYTES
        assert decode_header(header_of(message)) == message


LARGEST_RECORD = Whereabouts(
    b"\xff" * 32,
    Round(MAX_ROUND),
    "p" * MAX_PEER_ID_BYTES,
    MAX_SEQUENCE,
    ("/" * MAX_ADDRESS_BYTES,) * MAX_ADDRESSES,
    b"\xff" * SIGNATURE_BYTES,
)


def test_an_address_record_at_its_largest_fits() -> None:
    assert len(header_of(LARGEST_RECORD)) < MAX_MESSAGE_BYTES
    assert decode_header(header_of(LARGEST_RECORD)) == LARGEST_RECORD


def test_the_bytes_of_a_header_are_pinned() -> None:
    update = Update(CHARTER, Round(7), 4096, 0.5, True)
    assert encode_header(update).hex() == (
        "0038"  # 56 bytes of header
        "98" "04" "02"  # eight fields: version, kind
        f"c420{CHARTER.hex()}"  # the charter's hash
        "07" "cd1000"  # round, length
        "cb3fe0000000000000" "c3" "ce00010000"  # spread, complete, weight
    )  # fmt: skip
    assert digest(b"abc").hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_a_header_has_a_length_within_bounds() -> None:
    assert header_length(b"\x00\x01") == 1
    assert header_length(MAX_MESSAGE_BYTES.to_bytes(2, "big")) == MAX_MESSAGE_BYTES
    with pytest.raises(Malformed):
        header_length(b"\x00\x00")
    for length in (MAX_MESSAGE_BYTES + 1, 0xFFFF):
        with pytest.raises(TooLarge, match=str(length)):
            header_length(length.to_bytes(2, "big"))


def record(**changed: object) -> bytes:
    """An address record that is right but for this."""
    fields = {"member": "ant", "sequence": 1, "addresses": ["/a"], "signature": bytes(SIGNATURE_BYTES), **changed}
    return packed(VERSION, Whereabouts.kind, CHARTER, 0, *fields.values())


OK = (VERSION, Update.kind, CHARTER, 3, 8, 0.5, False, 1)
WRONG: dict[str, bytes] = {
    "nothing": b"",
    "reserved-byte": b"\xc1",
    "not-a-list": msgpack.packb(7),
    "a-map": msgpack.packb({}),
    "a-string": msgpack.packb("hello"),
    "empty-list": packed(),
    "too-few-fields": packed(VERSION, Hello.kind, CHARTER),
    "too-many-fields": packed(*OK, 1, 2, 3),
    "cut": packed(*OK)[:-1],
    "something-behind": packed(*OK) + b"\x00",
    "twice": packed(*OK) * 2,
    "version-0": packed(0, *OK[1:]),
    "next-version": packed(VERSION + 1, *OK[1:]),
    "version-is-a-bool": packed(True, *OK[1:]),
    "version-is-a-float": packed(1.0, *OK[1:]),
    "version-is-text": packed("1\n\x1b[2J", *OK[1:]),
    "version-is-nothing": packed(None, *OK[1:]),
    "unknown-kind": packed(VERSION, 10, *OK[2:]),
    "negative-kind": packed(VERSION, -1, *OK[2:]),
    "kind-is-true": packed(VERSION, True, CHARTER, 3),
    "kind-is-false": packed(VERSION, False, CHARTER, 3),
    "kind-is-a-float": packed(VERSION, 2.0, *OK[2:]),
    "kind-is-text": packed(VERSION, "\r\n\x07", CHARTER, 3),
    "kind-is-a-list": packed(VERSION, [[[[1]]]], CHARTER, 3),
    "hello-with-more": packed(VERSION, Hello.kind, CHARTER, 3, 8, 9),
    "hello-of-versions-backwards": packed(VERSION, Hello.kind, CHARTER, 3, VERSION - 1),
    "hello-of-one-version-twice": packed(VERSION, Hello.kind, CHARTER, 3, VERSION),
    "hello-of-too-high-a-version": packed(VERSION, Hello.kind, CHARTER, 3, 2**16),
    "hello-of-true": packed(True, Hello.kind, CHARTER, 3),
    "hello-of-a-version-that-is-text": packed("4", Hello.kind, CHARTER, 3),
    "hello-of-a-negative-version": packed(-1, Hello.kind, CHARTER, 3),
    "update-without-spread": packed(*OK[:5]),
    "update-with-more": packed(*OK, 1),
    "update-without-weight": packed(*OK[:-1]),
    "weight-is-zero": packed(*OK[:-1], 0),
    "weight-too-high": packed(*OK[:-1], 2**16 + 1),
    "charter-is-text": packed(VERSION, Hello.kind, "a" * 32, 3),
    "charter-is-short": packed(VERSION, Hello.kind, CHARTER[:31], 3),
    "charter-is-long": packed(VERSION, Hello.kind, CHARTER + b"x", 3),
    "charter-is-nothing": packed(VERSION, Hello.kind, None, 3),
    "record-of-nobody": record(member=""),
    "record-of-a-long-name": record(member="p" * (MAX_PEER_ID_BYTES + 1)),
    "record-of-a-number": record(member=7),
    "record-of-bytes": record(member=b"ant"),
    "record-without-a-number": record(sequence=None),
    "record-with-a-number-too-high": record(sequence=MAX_SEQUENCE + 1),
    "record-with-too-many-addresses": record(addresses=["/a"] * (MAX_ADDRESSES + 1)),
    "record-with-a-long-address": record(addresses=["/" * (MAX_ADDRESS_BYTES + 1)]),
    "record-with-an-empty-address": record(addresses=[""]),
    "record-with-control-codes": record(addresses=["/a\x1b[2J"]),
    "record-in-another-script": record(addresses=["/\xe4nt"]),
    "record-with-bytes": record(addresses=[b"/a"]),
    "record-with-one-address-as-text": record(addresses="/a"),
    "record-with-a-short-signature": record(signature=bytes(SIGNATURE_BYTES - 1)),
    "record-without-a-signature": record(signature=None),
    "record-with-more": record() + b"\x00",
    "negative-round": packed(VERSION, Hello.kind, CHARTER, -1),
    "round-too-high": packed(VERSION, Hello.kind, CHARTER, MAX_ROUND + 1),
    "round-of-64-bits": packed(VERSION, Hello.kind, CHARTER, 2**64 - 1),
    "round-is-a-bool": packed(VERSION, Hello.kind, CHARTER, True),
    "round-is-a-float": packed(VERSION, Hello.kind, CHARTER, 3.0),
    "round-is-text": packed(VERSION, Hello.kind, CHARTER, "3"),
    "negative-length": packed(*OK[:4], -4, 0.5, *OK[6:]),
    "length-too-high": packed(*OK[:4], MAX_PAYLOAD_BYTES + 1, 0.5, *OK[6:]),
    "length-is-a-bool": packed(*OK[:4], True, 0.5, *OK[6:]),
    "spread-is-nan": packed(*OK[:5], math.nan, *OK[6:]),
    "spread-is-infinite": packed(*OK[:5], math.inf, *OK[6:]),
    "negative-spread": packed(*OK[:5], -0.5, *OK[6:]),
    "spread-is-an-int": packed(*OK[:5], 1, *OK[6:]),
    "spread-is-a-bool": packed(*OK[:5], True, *OK[6:]),
    "spread-of-32-bits": packed(*OK[:5]).replace(b"\x95", b"\x96", 1) + b"\xca\x3f\x00\x00\x00",
    "round-in-more-bytes": with_round(b"\xcc\x03"),
    "round-in-eight-bytes": with_round(b"\xcf" + bytes(7) + b"\x03"),
    "signed-round": with_round(b"\xd0\x03"),
    "list-in-more-bytes": b"\xdc\x00\x04" + packed(VERSION, Hello.kind, CHARTER, 3)[1:],
    "charter-in-more-bytes": packed(VERSION, Hello.kind, CHARTER, 3).replace(b"\xc4\x20", b"\xc5\x00\x20", 1),
    "text-that-is-not-utf-8": b"\x94\x01\x00\xa2\xff\xfe\x03",
    "extension": packed(VERSION, Hello.kind, CHARTER, msgpack.ExtType(5, b"abc")),
    "timestamp": packed(VERSION, Hello.kind, CHARTER, msgpack.Timestamp(1, 2)),
    "list-of-4-billion": b"\xdd\xff\xff\xff\xff",
    "bytes-of-4-billion": b"\x94\x01\x00\xc6\xff\xff\xff\xff",
    "map-of-4-billion": b"\xdf\xff\xff\xff\xff",
    "deep": b"\x91" * MAX_HEADER_BYTES,
    "deep-and-whole": b"\x94\x01" + b"\x91" * 150 + b"\x00" + b"\xc4\x20" + CHARTER + b"\x03",
}  # fmt: skip


@pytest.mark.parametrize("header", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_header_is_malformed(header: bytes) -> None:
    with pytest.raises(Malformed) as raised:
        decode_header(header)
    text = str(raised.value)
    assert text.isprintable(), "a remote writes no lines and no control codes into our log"
    assert len(text) < 200


def test_the_wrong_ones_are_wrong_in_one_place_only() -> None:
    assert decode_header(packed(*OK)) == Update(CHARTER, Round(3), 8, 0.5, False, 1)
    assert decode_header(packed(VERSION, Hello.kind, CHARTER, 3)) == Hello(CHARTER, Round(3))
    assert decode_header(record()) == Whereabouts(CHARTER, Round(0), "ant", 1, ("/a",), bytes(SIGNATURE_BYTES))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | charters,
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)
near_misses = st.tuples(
    st.sampled_from([VERSION, True, 1.0, 2]),
    st.sampled_from([0, 1, 2, 3, 4, 9, True, 2.0]),
    charters,
    rounds | values,
).flatmap(lambda head: st.lists(values, max_size=3).map(lambda rest: packed(*head, *rest)))


@given(st.binary(max_size=MAX_HEADER_BYTES) | near_misses | st.lists(values, max_size=8).map(lambda v: packed(*v)))
def test_whatever_comes_is_a_message_or_costs_its_sender(header: bytes) -> None:
    try:
        message = decode_header(header)
    except RemoteError as error:
        assert str(error).isprintable()
    else:
        assert header_of(message) == header, "a message has one header"


@given(st.binary(min_size=LENGTH_BYTES, max_size=LENGTH_BYTES))
def test_whatever_length_comes_is_bounded_or_costs_its_sender(prefix: bytes) -> None:
    try:
        assert 0 < header_length(prefix) <= MAX_MESSAGE_BYTES
    except RemoteError:
        assert not 0 < int.from_bytes(prefix, "big") <= MAX_MESSAGE_BYTES


def test_no_header_makes_us_allocate() -> None:
    tracemalloc.start()
    try:
        for header in WRONG.values():
            with pytest.raises(Malformed):
                decode_header(header)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
