"""Whether a peer's machine tells its training truly that what it gave last was mixed."""

import random
from dataclasses import replace

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.ledger import Checkpoint
from p2pfl.core.machine import Trained
from p2pfl.core.wire import Chunk, Part
from p2pfl.gossip.group_machine import GroupMachine
from p2pfl.gossip.session import Outcome
from tests.group_pump import FastKeyring, GroupPump, Node
from tests.pump import Pump, charter_for


def told(node: Node) -> dict[int, bool]:
    return {asked.round: asked.mixed for asked in node.asked}


def checkpoints(node: Node) -> dict[int, bool]:
    return {each.round: each.mixed for each in node.records if isinstance(each, Checkpoint)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_in_groups_only_a_full_round_mixed_what_a_member_gave(seed: int, masked: bool) -> None:
    draw = random.Random(seed)
    pump = GroupPump(6, rounds=6)
    pump.masked = masked
    pump.nodes = {place: Node(pump.build(place, None)) for place in range(6)}
    lost = {(round, draw.randrange(6)) for round in (1, 3, 4)}
    pump.drop = lambda sender, _, message: (
        isinstance(message, Chunk) and message.part is Part.UPLOAD and (message.round, sender) in lost
    )
    pump.start()
    pump.run()
    outcomes = set()
    for node in pump.nodes.values():
        ended = {record.round: str(record.outcome) for record in node.rounds if not record.settling}
        outcomes |= set(ended.values())
        for round, mixed in told(node).items():
            assert mixed == (ended.get(Round(round - 1)) == Outcome.FULL), (round, ended)
        for round, mixed in checkpoints(node).items():
            assert mixed == (round <= 6 and ended[Round(round - 1)] == Outcome.FULL)
    assert outcomes >= {Outcome.FULL, Outcome.LATE}


def test_a_vector_that_a_round_outlasts_is_not_mixed_and_only_its_model_moves_with_the_base() -> None:
    pump = GroupPump(4, rounds=3)

    def build(place: int) -> GroupMachine:
        plan = replace(pump.nodes[place].machine._plan, fixed=4)
        return GroupMachine(plan, FastKeyring(place), pump.initial)

    pump.nodes = {place: Node(build(place)) for place in range(4)}
    pump.slow = {3}
    pump.start()
    late = pump.nodes[3]
    pump.run(until=lambda: len(late.rounds) == 1 and late.machine.round == 1)
    assert late.rounds[0].outcome == Outcome.LATE
    pump.slow = set()
    given = pump.step(3, Round(0), pump.initial)
    moved = late.adopted[Round(0)]
    pump.feed(3, Trained(Round(0), given, 0.5, 1))
    contribution = late.machine.contribution
    assert contribution is not None
    np.testing.assert_array_equal(contribution, given + np.where(np.arange(10) < 6, moved, np.float32(0)))
    pump.run()
    assert told(late)[2] == (late.rounds[1].outcome == Outcome.FULL)


def test_on_a_graph_a_round_is_mixed_if_anybody_was_heard() -> None:
    charter = charter_for(3, 4, rounds=4)
    pump = Pump(charter, np.zeros(4, np.float32), lambda peer, round, vector: vector + np.float32(1))
    alone = pump.roster[0]

    def step(peer, round, vector):  # type: ignore[no-untyped-def]
        if peer == alone and round == 2:
            for other in pump.roster[1:]:
                pump.part(alone, other)
        return vector + np.float32(1)

    pump.step = step
    pump.start()
    pump.run()
    assert [asked.mixed for asked in pump.nodes[alone].asked] == [False, True, True, False]
    assert [asked.mixed for asked in pump.nodes[pump.roster[1]].asked] == [False, True, True, True]
    assert [each.mixed for each in pump.nodes[alone].kept][:1] == [True]
