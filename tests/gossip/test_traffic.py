"""What a group sends: each chunk and each result once, however long it takes, and nothing for whoever is gone."""

import heapq
from collections import Counter, deque

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.machine import AcceptBulk, BulkOffered, BulkReceived, Effect, Input, Vector
from p2pfl.core.wire import Chunk, Message, Part
from p2pfl.gossip.survivors import is_summable, largest
from p2pfl.gossip.traffic import LEAST_RATE
from tests.group_pump import GroupPump

MEMBERS, PARAMETERS = 4, 200_000
SECONDS = 0.5 * 4 * PARAMETERS / MEMBERS / LEAST_RATE
"""That a chunk takes on its way: several times as long as a peer waits before it asks for what it lacks."""


class SlowLanes(GroupPump):
    """Payloads from one member to another come one after the other, and each takes its time."""

    def __init__(self, members: int, parameters: int, **charter: object) -> None:
        super().__init__(members, parameters, **charter)
        self.lanes: dict[tuple[int, int], deque[tuple[Chunk, Vector]]] = {}
        self.sent: Counter[tuple[int, Part]] = Counter()

    def step(self, place: int, round: Round, vector: Vector) -> Vector:
        return vector + np.float32(place + 1)

    def transmit(self, sender: int, receiver: int, message: Message, payload: Vector | None) -> None:
        if payload is None or not isinstance(message, Chunk):
            super().transmit(sender, receiver, message, payload)
            return
        self.sent[int(message.round), message.part] += 1
        lane = self.lanes.setdefault((sender, receiver), deque())
        lane.append((message, payload))
        if len(lane) == 1:
            self.offer(sender, receiver)

    def offer(self, sender: int, receiver: int) -> None:
        lane = self.lanes[sender, receiver]
        while lane:
            message, payload = lane[0]
            peer, node = self.roster[sender], self.nodes[receiver]
            if any(isinstance(each, AcceptBulk) for each in self.feed(receiver, BulkOffered(peer, message))):
                comes = BulkReceived(peer, message, bytearray(payload.tobytes()))
                heapq.heappush(self.later, (self.now + SECONDS, next(self.numbers), receiver, node, comes))
                return
            lane.popleft()

    def feed(self, place: int, input: Input) -> list[Effect]:
        effects = super().feed(place, input)
        if isinstance(input, BulkReceived):
            sender = self.roster.index(input.peer)
            self.lanes[sender, place].popleft()
            self.offer(sender, place)
        return effects


class SlowMaskedLanes(SlowLanes):
    masked = True


@pytest.mark.parametrize("kind", [SlowLanes, SlowMaskedLanes])
def test_nothing_is_sent_twice_that_is_still_on_its_way(kind: type[SlowLanes]) -> None:
    pump = kind(MEMBERS, PARAMETERS, rounds=1)
    pump.start()
    pump.run()
    assert all(record.outcome == "full" for node in pump.nodes.values() for record in node.rounds)
    for round in range(2):
        assert pump.sent[round, Part.UPLOAD] == MEMBERS * MEMBERS  # its own chunk also goes to a deputy
        assert pump.sent[round, Part.RESULT] == MEMBERS * (MEMBERS - 1)


def test_a_chunk_is_sent_again_when_the_link_it_came_by_fell() -> None:
    pump = SlowLanes(MEMBERS, PARAMETERS, rounds=1)
    pump.start()
    pump.run(until=lambda: bool(pump.lanes.get((0, 1))))
    pump.part(0, 1)
    lost = {id(each[0]) for each in pump.lanes[0, 1]}
    assert lost
    pump.later = [each for each in pump.later if not isinstance(each[4], BulkReceived) or each[2] != 1]
    heapq.heapify(pump.later)
    for lane in [lane for lane in pump.lanes if lane[1] == 1]:
        pump.lanes[lane].clear()
    for other in (2, 3):
        pump.part(other, 1)
    pump.deliver()
    for other in (0, 2, 3):
        pump.join(other, 1)
    pump.run()
    assert all(record.outcome == "full" for node in pump.nodes.values() for record in node.rounds)
    assert max(node.rounds[0].seconds for node in pump.nodes.values()) < 8 * PARAMETERS / LEAST_RATE


def test_nobody_waits_for_a_dead_member_as_long_as_its_vector_may_take() -> None:
    """The round ends within stages, though at the least rate the vector takes two minutes."""
    pump = GroupPump(MEMBERS, 1_000_000, rounds=1)
    pump.start()
    pump.run(until=lambda: pump.nodes[3].machine.contribution is not None)
    pump.kill(3)
    pump.run()
    living = [node for node in pump.nodes.values() if node.alive]
    assert [node.rounds[0].outcome for node in living] == ["full"] * 3
    assert max(node.rounds[0].seconds for node in living) < 0.25 * 8 * 1_000_000 / LEAST_RATE


ALL = frozenset(range(4))


def test_a_living_members_short_acknowledgement_counts_before_a_dead_ones_long_one() -> None:
    """Member 3 died before its chunk came to member 0: with 3 in the sum, chunk 0 would be lost."""
    lists = {0: {0, 1, 2}, 1: set(ALL), 2: set(ALL), 3: set(ALL)}
    live, survivors = largest(lists, range(4), range(4), ALL - {3})
    assert 0 in live
    assert survivors == (0, 1, 2)


def test_one_that_says_that_it_received_little_costs_nobody_the_round() -> None:
    lists = {0: {0}, 1: set(ALL), 2: set(ALL), 3: set(ALL)}
    assert largest(lists, range(4), range(4), ALL) == ((1, 2, 3), (0, 1, 2, 3))


def test_a_chunk_is_lost_with_its_only_copy() -> None:
    lists = {who: set(ALL) for who in ALL}
    assert is_summable(0, range(4), lists, range(4), ALL - {1})  # the aggregator has all
    assert is_summable(0, range(4), lists, range(4), ALL - {0})  # its deputy has what it sent, and asks the others
    assert not is_summable(0, range(4), lists, range(4), ALL - {0, 2})
    assert not is_summable(0, range(4), lists, range(4), ALL - {0, 1})
