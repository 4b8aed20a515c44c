"""What doctors ask each other: answered whole, bounded, and never more than that."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.core.errors import Malformed, RemoteError, StreamReset, TooLarge, TransportError, Unreachable
from p2pfl.core.ids import PeerId, Seconds
from p2pfl.core.wire import Versions
from p2pfl.node import consult as module
from p2pfl.node.consult import (
    MOST_ANSWER,
    MOST_LOAD,
    MOST_QUESTIONS,
    About,
    Desk,
    DialBack,
    Facts,
    Load,
    Reached,
    consult,
    decode_facts,
    decode_question,
    decode_reached,
    encode_facts,
    encode_reached,
)
from p2pfl.node.transport import Talk
from tests.memory import MemoryLane
from tests.trio_tools import trio_test

ANT, BEE = PeerId("ant"), PeerId("bee")
FACTS = Facts("0.1.0", Versions(4, 5), 1000.0, bytes(32), "peer")
ADDRESS = "/ip4/192.0.2.1/tcp/4001"


class MemoryTalk:
    """One end of a talk over memory."""

    def __init__(self, peer: PeerId, out: MemoryLane, into: MemoryLane) -> None:
        self.peer = peer
        self.write, self.read_into = out.write, into.read_into
        self._out, self._into = out, into

    async def close(self) -> None:
        await self._out.close()

    async def reset(self) -> None:
        await self._out.reset()
        await self._into.reset()


def talks() -> tuple[MemoryTalk, MemoryTalk]:
    """Both ends: the asking one's, the answering one's."""
    there, back = MemoryLane(ANT, BEE), MemoryLane(BEE, ANT)
    return MemoryTalk(BEE, there, back), MemoryTalk(ANT, back, there)


def desk(dial: Callable[[PeerId, str, Seconds], Awaitable[None]] | None = None, **facts: Any) -> Desk:
    async def lead(peer: PeerId, address: str, timeout: Seconds) -> None:
        await trio.lowlevel.checkpoint()

    return Desk(lambda: replace(FACTS, **facts), {ANT: (ADDRESS,)}, dial or lead)


async def asked(frames: bytes, of: Desk | None = None) -> tuple[bytes, Exception | None]:
    """What is answered to these bytes and then the talk's end, and how the talk ended."""
    asking, answering = talks()
    await asking.write(frames)
    await asking.close()
    try:
        await (of or desk()).hold(answering)
    except (RemoteError, TransportError) as error:
        return bytes(asking._into.buffer), error
    return bytes(asking._into.buffer), None


def frame(*fields: object) -> bytes:
    body = msgpack.packb(fields)
    return len(body).to_bytes(2, "big") + body


@trio_test
async def test_a_member_is_asked_everything_in_one_talk() -> None:
    tried = []

    async def dial(peer: PeerId, address: str, timeout: Seconds) -> None:
        await trio.lowlevel.checkpoint()
        tried.append((peer, address))
        raise Unreachable("no answer in 5 s")

    asking, answering = talks()
    answers = desk(dial, clock=5000.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answers.hold, answering)
        found = await consult(asking, lambda: 4000.0)
    assert found.facts == replace(FACTS, clock=5000.0)
    assert found.ahead == pytest.approx(1000, abs=1)
    assert found.dialled_back == (Reached(ADDRESS, "no answer in 5 s"),)
    assert tried == [(ANT, ADDRESS)], "its addresses in the charter, and no others"
    assert found.bytes_per_second > 0
    assert answers.consulted == {ANT}


@trio_test
async def test_who_is_no_member_gets_no_answer() -> None:
    answers = Desk(lambda: FACTS, {BEE: ()}, desk()._dial)
    assert await asked(frame(1, 0), answers) == (b"", None)


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        (b"\xff\xff", TooLarge),
        (b"\x00\x00", TooLarge),
        (b"\x00\x05\x00", StreamReset),
        (b"\x00", StreamReset),
        (b"\x00\x01\xc1", Malformed),
        (frame(2, 0), Malformed),
        (frame(1), Malformed),
        (frame(1, 3), Malformed),
        (frame(1, 0, 0), Malformed),
        (frame(1, 1), Malformed),
        (frame(1, 1, -1), Malformed),
        (frame(1, 1, True), Malformed),
        (frame(1, 1, "4"), Malformed),
        (frame(1, 1, MOST_LOAD + 1), TooLarge),
        (frame(1, 1, 100) + bytes(99), StreamReset),
        (frame(1, 2, ADDRESS), Malformed),
    ],
)
def test_what_is_no_question_costs_the_talk_and_gets_no_answer(frames: bytes, kind: type[Exception]) -> None:
    @trio_test
    async def run() -> None:
        answered, error = await asked(frames)
        assert (answered, type(error)) == (b"", kind)

    run()


@trio_test
async def test_a_talk_has_so_many_questions() -> None:
    answered, error = await asked(frame(1, 1, 0) * (MOST_QUESTIONS + 5))
    assert (answered, error) == (frame(1, 1, 0) * MOST_QUESTIONS, None)


def test_who_asks_too_much_waits_and_others_do_not() -> None:
    async def run() -> tuple[float, float]:
        answers, began = desk(), trio.current_time()
        for _ in range(20):
            await asked(frame(1, 2), answers)
        patient = trio.current_time() - began
        answers._addresses = {BEE: ()}
        began = trio.current_time()
        there, back = MemoryLane(BEE, ANT), MemoryLane(ANT, BEE)
        talk = MemoryTalk(BEE, back, there)
        await there.write(frame(1, 0))
        await there.close()
        await answers.hold(talk)
        return patient, trio.current_time() - began

    import trio.testing

    patient, other = trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    assert patient >= 20 * module.DIAL_COST / module.RATE - module.BURST - 2 * module.DIAL_COST
    assert patient > 0
    assert other == 0


def test_a_member_that_says_nothing_is_given_up() -> None:
    async def run() -> None:
        asking, _ = talks()
        with pytest.raises(TransportError, match="did not answer all questions in 60 s"):
            await consult(asking, lambda: 0.0)

    import trio.testing

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@trio_test
async def test_an_answer_to_another_question_is_refused() -> None:
    asking, answering = talks()
    await answering.write(frame(1, 1, 7))
    with pytest.raises(Malformed, match="answered another question"):
        await consult(asking, lambda: 0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"release": ""},
        {"release": "x" * 201},
        {"release": "0.1\x1b"},
        {"wire": Versions(-1, 4)},
        {"wire": Versions(5, 4)},
        {"wire": Versions(4, 2**16)},
        {"clock": float("nan")},
        {"clock": -1.0},
        {"charter": b"short"},
        {"serves": "nobody"},
    ],
    ids=str,
)
def test_facts_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        decode_facts(encode_facts(replace(FACTS, **fields)), BEE)


def test_what_is_encoded_is_decoded() -> None:
    assert decode_facts(encode_facts(FACTS), BEE) == FACTS
    tried = [Reached(ADDRESS), Reached("/" * 300, "a\x1b" + "\N{REPLACEMENT CHARACTER}" * 300)] * 8
    told = encode_reached(tried)
    assert len(told) <= MOST_ANSWER
    decoded = decode_reached(told, BEE)
    assert len(decoded) == 8
    assert decoded[0] == Reached(ADDRESS)
    assert decoded[1].reason == "a" + "\N{REPLACEMENT CHARACTER}" * 199
    for question in (About(), Load(5), DialBack()):
        fields = [5] if isinstance(question, Load) else []
        assert decode_question(msgpack.packb([1, question.kind, *fields]), ANT) == question


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    for decode in (decode_question, decode_facts, decode_reached):
        try:
            decode(body, BEE)  # type: ignore[operator]
        except RemoteError:
            continue


def test_both_ends_are_talks() -> None:
    def takes(talk: Talk) -> Talk:
        return talk

    assert takes(talks()[0]).peer == BEE
