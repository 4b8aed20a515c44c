"""A peer in groups or stars that is asked to stop: it ends the round that others count on it in, and no other."""

import pytest

from p2pfl.core.machine import StopRequested
from p2pfl.core.statements import Advert, Roots
from p2pfl.core.trace import PeerFinished
from p2pfl.core.wire import Bye, Message, Told
from p2pfl.gossip.session import Outcome
from tests.group_pump import GroupPump, Node


@pytest.fixture(autouse=True, params=["plain", "masked"])
def masks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupPump, "masked", request.param == "masked")


def end_of(node: Node) -> str:
    return node.events[-1].outcome if isinstance(node.events[-1], PeerFinished) else ""


def has_adverted(pump: GroupPump, place: int, round: int) -> list[bool]:
    """Return a list that gets an entry once a member's advert of a round goes out."""
    seen: list[bool] = []

    def note(sender: int, receiver: int, message: Message) -> bool:
        told = isinstance(message, Told) and message.statement.signer == place == sender
        if told and message.round == round and isinstance(message.statement.content, Advert):
            seen.append(True)
        return False

    pump.drop = note
    return seen


@pytest.mark.parametrize("trained", [False, True])
def test_one_that_has_adverted_ends_its_round_and_saves_it_when_another_dies_too(trained: bool) -> None:
    """A group of four bears one death: with the leave at once of another, its round would be void for the rest."""
    pump = GroupPump(4, rounds=8)
    seen = has_adverted(pump, 3, 2)
    pump.start()
    pump.run(until=lambda: bool(seen) and (not trained or pump.nodes[3].machine.contribution is not None))
    pump.feed(3, StopRequested())

    def die(sender: int, receiver: int, message: Message) -> bool:
        told = isinstance(message, Told) and message.statement.signer == sender == 2
        if told and isinstance(message.statement.content, Roots) and pump.nodes[2].alive:
            pump.kill(2)
        return not pump.nodes[2].alive and sender == 2

    pump.drop = die
    pump.run(until=lambda: pump.nodes[3].finished and all(len(pump.nodes[who].rounds) >= 3 for who in (0, 1)))
    assert end_of(pump.nodes[3]) == "stopped"
    assert [pump.nodes[who].rounds[2].outcome for who in (0, 1, 3)] == [Outcome.FULL] * 3
    assert all("m3" in pump.nodes[who].rounds[2].heard for who in (0, 1))


def test_one_that_has_not_adverted_leaves_at_once_and_says_so() -> None:
    pump = GroupPump(4, rounds=8)
    pump.slow.add(3)
    byes: list[int] = []
    pump.drop = lambda sender, receiver, message: (
        byes.append(receiver) is not None if isinstance(message, Bye) else False
    )
    pump.start()
    pump.run(until=lambda: bool(pump.nodes[3].asked))
    pump.feed(3, StopRequested())
    began = pump.now
    pump.run(until=lambda: pump.nodes[3].finished)
    assert (end_of(pump.nodes[3]), pump.now - began) == ("stopped", 0.0)
    assert sorted(byes) == [0, 1, 2]
    pump.run(until=lambda: pump.nodes[0].machine.round >= 2)
    assert [record.outcome for record in pump.nodes[0].rounds[:2]] == [Outcome.FULL] * 2


def test_one_whose_round_cannot_come_about_does_not_wait_for_it() -> None:
    pump = GroupPump(4, rounds=8)
    pump.start()
    for other in (1, 2):
        pump.kill(other)
    pump.run(until=lambda: any("waits" in getattr(event, "text", "") for event in pump.nodes[0].events))
    assert not pump.nodes[0].finished
    pump.feed(0, StopRequested())
    began = pump.now
    pump.run(until=lambda: pump.nodes[0].finished)
    assert (end_of(pump.nodes[0]), pump.now - began) == ("stopped", 0.0)


def test_all_that_are_stopped_at_once_are_gone_at_once_though_some_have_adverted() -> None:
    pump = GroupPump(4, rounds=8)
    pump.slow.update((2, 3))
    pump.start()
    pump.run(until=lambda: all(pump.nodes[who].machine.contribution is not None for who in (0, 1)))
    began = pump.now
    for place in range(4):
        pump.feed(place, StopRequested())
    for place in (2, 3):
        pump.run(until=lambda place=place: pump.nodes[place].finished)  # type: ignore[misc]
        pump.kill(place)  # its links fall with it
    pump.run()
    assert [end_of(node) for node in pump.nodes.values()] == ["stopped"] * 4
    assert pump.now == began


def test_a_second_request_ends_it_in_the_middle_of_its_round() -> None:
    pump = GroupPump(4, rounds=8)
    seen = has_adverted(pump, 3, 1)
    pump.start()
    pump.run(until=lambda: bool(seen))
    pump.feed(3, StopRequested())
    assert not pump.nodes[3].finished
    pump.feed(3, StopRequested())
    assert end_of(pump.nodes[3]) == "stopped"
