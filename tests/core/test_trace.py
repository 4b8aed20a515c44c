"""Events as lines: each comes back as it was, and a line that is none is told from one."""

import json
from dataclasses import fields
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.core.errors import Malformed
from p2pfl.core.trace import (
    Entry,
    Evaluated,
    Event,
    LinkChanged,
    MemberChanged,
    Note,
    PeerFinished,
    PeerStarted,
    Refused,
    RoundEnded,
    State,
    StateChanged,
    decode_entry,
    encode_entry,
)

texts = st.text(max_size=12)
counts = st.integers(0, 2**60)
numbers = st.floats(allow_nan=False)
names = st.lists(texts, max_size=3).map(tuple)
events = st.one_of(
    st.builds(PeerStarted, texts, texts, texts, names, counts, counts),
    st.builds(StateChanged, st.sampled_from(State), counts),
    st.builds(LinkChanged, texts, st.booleans(), texts),
    st.builds(MemberChanged, texts, texts),
    st.builds(
        RoundEnded, counts, numbers, names, st.dictionaries(texts, texts, max_size=3), st.none() | numbers, numbers,
        st.booleans(),
    ),
    st.builds(Evaluated, counts, st.dictionaries(texts, numbers, max_size=3)),
    st.builds(Refused, texts, texts),
    st.builds(Note, texts),
    st.builds(PeerFinished, texts, counts, st.booleans(), texts),
)  # fmt: skip

EXAMPLES: list[Event] = [
    PeerStarted("ant", "12D3", "00ff", ("bee",), 4810, 100),
    StateChanged(State.TRAINING, 0),
    LinkChanged("bee", up=False, reason="silent"),
    MemberChanged("bee", "unreachable"),
    RoundEnded(3, 0.25, ("bee",), {"cat": "no link"}, None, 0.5, settling=True),
    Evaluated(4, {"accuracy": 0.9}),
    Refused("dog", "not a member"),
    Note("said"),
    PeerFinished("failed", 4, agreed=False, reason="alone"),
]


def line_of(event: Event) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(encode_entry(Entry(1.5, 2, 3, event)))
    return values


@given(st.integers(0, 2**40), counts, counts, events)
def test_every_event_comes_back(at: int, bytes_in: int, bytes_out: int, event: Event) -> None:
    entry = Entry(at / 1024, bytes_in, bytes_out, event)
    line = encode_entry(entry)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    assert decode_entry(line) == Entry(round(at / 1024, 6), bytes_in, bytes_out, event)


def test_the_examples_are_all_there_is() -> None:
    assert {type(event) for event in EXAMPLES} == set(get_args(Event))
    assert len({event.name for event in EXAMPLES}) == len(EXAMPLES)


def test_a_line_is_pinned() -> None:
    assert encode_entry(Entry(1.5, 2, 3, EXAMPLES[4])) == (
        '{"event":"round","at":1.5,"bytes_in":2,"bytes_out":3,"round":3,"seconds":0.25,"heard":["bee"],'
        '"absent":{"cat":"no link"},"loss":null,"spread":0.5,"settling":true,'
        '"outcome":"","enrolled":[],"attempt":0,"leader":"","evidence":"","steps":0,"reason":"",'
        '"group_loss":null,"group_steps":null,"weight":0.0,"clipped":0,"distance":null,"audit":""}'
    )


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.name)
def test_a_field_less_or_more_is_malformed(event: Event) -> None:
    whole = line_of(event)
    assert set(whole) == {"event", "at", "bytes_in", "bytes_out"} | {field.name for field in fields(event)}
    for key in whole:
        with pytest.raises(Malformed):
            decode_entry(json.dumps({other: value for other, value in whole.items() if other != key}))
    with pytest.raises(Malformed):
        decode_entry(json.dumps(whole | {"color": "red"}))
    with pytest.raises(Malformed):
        decode_entry(json.dumps(whole | {"event": "color"}))


def test_a_state_comes_back_as_one_and_an_unknown_one_is_malformed() -> None:
    whole = line_of(StateChanged(State.SETTLING, 5))
    event = decode_entry(json.dumps(whole)).event
    assert isinstance(event, StateChanged)
    assert event.state is State.SETTLING
    with pytest.raises(Malformed):
        decode_entry(json.dumps(whole | {"state": "dancing"}))


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "null", "5", '"event"', "{}", '{"event": []}', '{"event": {}}', "\x00", "a\nb"]
)
def test_what_is_no_event_is_malformed(line: str) -> None:
    with pytest.raises(Malformed) as raised:
        decode_entry(line)
    assert str(raised.value).isprintable()


@given(
    st.text() | st.recursive(st.none() | st.text(), lambda v: st.dictionaries(texts, v) | st.lists(v)).map(json.dumps)
)
def test_whatever_line_comes_raises_nothing_else(line: str) -> None:
    with pytest.raises(Malformed):
        decode_entry(line)
