"""What comes early waits until this peer has done its rounds; what does not fit is refused."""

import numpy as np
import pytest

from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.machine import (
    AcceptBulk,
    BulkOffered,
    BulkReceived,
    Effect,
    LinkUp,
    RefuseBulk,
    SendBulk,
    Started,
)
from p2pfl.core.wire import Update
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.peer_machine import Plan
from p2pfl.gossip.star_machine import EARLY_ROUNDS, SETTLING, StarMachine
from tests.group_pump import FastKeyring
from tests.pump import charter_for

NOW = Seconds(1.0)
ROUNDS = 2


def machine(rounds: int = ROUNDS) -> tuple[StarMachine, Plan, tuple[PeerId, ...]]:
    charter = charter_for(5, 4, rounds=rounds)
    me = charter.roster()[0]
    settling = Plan.for_peer(charter, me)
    made = StarMachine(GroupPlan.for_peer(charter, me), settling, FastKeyring(0), np.zeros(4, np.float32))
    return made, settling, tuple(settling.weights)


def update(plan: Plan, round: int, length: int = 16, charter: bytes | None = None) -> Update:
    return Update(plan.charter if charter is None else charter, Round(round), length, 0.0, complete=False)


def payload(value: float) -> bytearray:
    return bytearray(np.full(4, value, "<f4").tobytes())


def test_early_updates_of_neighbors_are_taken_up_to_a_bound() -> None:
    made, plan, (near, _) = machine()
    made.handle(Started(), NOW)
    made.handle(LinkUp(near), NOW)
    far = next(peer for peer in plan.roster[1:] if peer not in plan.weights)
    refused = [
        (near, update(plan, ROUNDS - 1)),
        (near, update(plan, ROUNDS + EARLY_ROUNDS)),
        (near, update(plan, ROUNDS, length=20)),
        (near, update(plan, ROUNDS, charter=bytes(32))),
        (far, update(plan, ROUNDS)),
    ]
    for peer, message in refused:
        (answer,) = made.handle(BulkOffered(peer, message), NOW)
        assert isinstance(answer, RefuseBulk)
    before = made.held
    for round in range(ROUNDS, ROUNDS + EARLY_ROUNDS):
        assert made.handle(BulkOffered(near, update(plan, round)), NOW) == [AcceptBulk()]
        assert made.handle(BulkReceived(near, update(plan, round), payload(1.0)), NOW) == []
        (answer,) = made.handle(BulkOffered(near, update(plan, round)), NOW)
        assert isinstance(answer, RefuseBulk), "it is here already"
    assert made.held == before + EARLY_ROUNDS


def test_without_rounds_it_settles_at_once_with_what_came_early() -> None:
    made, plan, neighbors = machine(rounds=0)
    made.handle(Started(), NOW)
    effects: list[Effect] = made.handle(LinkUp(neighbors[0]), NOW)
    made.handle(BulkOffered(neighbors[0], update(plan, 0)), NOW)
    made.handle(BulkReceived(neighbors[0], update(plan, 0), payload(3.0)), NOW)
    effects += made.handle(LinkUp(neighbors[1]), NOW)
    (sent,) = [effect for effect in effects if isinstance(effect, SendBulk)]
    assert set(sent.peers) == set(neighbors)
    assert isinstance(sent.message, Update)
    # Both neighbors' updates, one early and one now, complete the round.
    assert made.handle(BulkOffered(neighbors[1], update(plan, 0)), NOW) == [AcceptBulk()]
    computed = made.handle(BulkReceived(neighbors[1], update(plan, 0), payload(6.0)), NOW)
    (average,) = [effect for effect in computed if hasattr(effect, "work")]
    np.testing.assert_allclose(average.work().vector, 3.0)
    assert average.key.startswith(SETTLING)


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_machine_that_has_not_begun_holds_nothing(rounds: int) -> None:
    made, _, _ = machine(rounds)
    assert made.held == 0
    assert made.round == 0
    assert made.contribution is None
