"""When peers in groups may say that all members' models agree: once each is known to have left with the same one."""

from types import SimpleNamespace

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.machine import Adopt, Emit
from p2pfl.core.statements import Vote
from p2pfl.core.trace import PeerFinished
from p2pfl.core.wire import Bye, Chunk, Message, Part, Proof, Told
from p2pfl.simulation.invariants import AgreementProven, InvariantViolated, Step
from p2pfl.simulation.soak import Case, standard_network
from tests.group_pump import GroupPump


@pytest.fixture(autouse=True, params=["plain", "masked"])
def masks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupPump, "masked", request.param == "masked")


def claims(pump: GroupPump) -> list[bool]:
    ends = [[event for event in node.events if isinstance(event, PeerFinished)] for node in pump.nodes.values()]
    return [bool(end) and end[-1].agreed for end in ends]


def are_equal(pump: GroupPump) -> bool:
    last = [node.adopted[max(node.adopted)] for node in pump.nodes.values()]
    return all(np.array_equal(each, last[0]) for each in last)


def run_until_left(pump: GroupPump, place: int = 0) -> None:
    """Run until this member has the average of all, and stays only for whoever lags."""
    rounds = pump.charter.rounds
    pump.run(until=lambda: pump.nodes[place].machine.round > rounds)


@pytest.mark.parametrize("members", [4, 8])
@pytest.mark.parametrize("away_from", [1, 2])
@pytest.mark.parametrize("restarts", [False, True])
def test_one_that_takes_the_last_average_over_ends_with_it_and_all_know(
    members: int, away_from: int, restarts: bool
) -> None:
    """Also with steps of its own behind it that no sum has taken in: its model is then the others', too."""
    pump = GroupPump(members, rounds=3)
    away = members - 1
    pump.start()
    pump.run(until=lambda: pump.nodes[away].machine.round >= away_from)
    if restarts:
        pump.kill(away)
    else:
        for other in range(away):
            pump.part(away, other)
    run_until_left(pump)
    if restarts:
        pump.restart(away, pump.nodes[away].resume())
    else:
        for other in range(away):
            pump.join(away, other)
    pump.run()
    assert are_equal(pump)
    assert claims(pump) == [True] * members
    assert max(record.round for node in pump.nodes.values() for record in node.rounds) == 3, "no round is held for it"


def test_one_that_restarts_with_the_last_average_on_its_disk_gets_its_proof_and_all_know() -> None:
    pump = GroupPump(4, rounds=3)
    pump.start()
    # The others hear no goodbye of it before it dies, and stay.
    pump.drop = lambda sender, receiver, message: sender == 3 and isinstance(message, Bye) and pump.nodes[3].alive
    pump.run(until=lambda: Round(3) in pump.nodes[3].adopted)
    pump.kill(3)
    run_until_left(pump)
    pump.drop = lambda sender, receiver, message: False
    pump.restart(3, pump.nodes[3].resume())
    pump.run()
    assert are_equal(pump)
    assert claims(pump) == [True] * 4


def test_nobody_claims_agreement_while_one_in_the_sum_may_never_have_had_it() -> None:
    pump = GroupPump(4, rounds=2)

    def die(sender: int, receiver: int, message: Message) -> bool:
        voted = isinstance(message, Told) and isinstance(message.statement.content, Vote)
        if voted and sender == 3 and message.round == 2 and pump.nodes[3].alive:
            pump.kill(3)
        return not pump.nodes[3].alive and sender == 3

    pump.drop = die
    pump.start()
    pump.run()
    assert pump.nodes[0].rounds[-1].outcome == "full"
    assert len(pump.nodes[0].rounds[-1].heard) == 3, "it is in the sum"
    assert claims(pump) == [False] * 4


def test_nobody_claims_agreement_with_one_that_leaves_without_the_average() -> None:
    """It is in the sum and says goodbye; but neither results nor the average ever came to it."""
    pump = GroupPump(8, rounds=2)
    pump.drop = lambda sender, receiver, message: (
        receiver == 3
        and message.round == 2
        and (isinstance(message, Proof) or (isinstance(message, Chunk) and message.part is not Part.UPLOAD))
    )
    pump.start()
    pump.run()
    assert pump.nodes[0].rounds[-1].outcome == "full"
    assert len(pump.nodes[0].rounds[-1].heard) == 7, "it is in the sum"
    assert not are_equal(pump)
    assert claims(pump) == [False] * 8


def test_nobody_claims_agreement_where_two_parts_ended_with_averages_of_their_own() -> None:
    pump = GroupPump(8, rounds=2)
    pump.start()
    pump.run(until=lambda: any(node.machine.round >= 2 for node in pump.nodes.values()))
    crossing = [(one, other) for one in range(3) for other in range(3, 8)]
    for one, other in crossing:
        pump.part(one, other)
    pump.run(until=lambda: all(node.machine.round >= 3 for node in pump.nodes.values()))
    for one, other in crossing:
        pump.join(one, other)
    pump.run()
    assert not are_equal(pump)
    assert claims(pump) == [False] * 8


@pytest.mark.parametrize("seed", [29, 38])
def test_claims_hold_in_the_simulated_network(seed: int) -> None:
    """Seed 29: one dies in the sum and never comes back. 38: most take the average of three over."""
    network = standard_network(Case(seed, masked=GroupPump.masked, bits=16 if GroupPump.masked else 32))
    network.run(400.0)


def test_the_check_finds_a_claim_that_does_not_hold() -> None:
    one, other = (SimpleNamespace(place=place, name=f"m{place}", lying=False) for place in (0, 1))
    check = AgreementProven()
    check.step(Step(other, None, (Adopt(Round(2), np.zeros(3, np.float32), False),)))  # type: ignore[arg-type]
    check.step(Step(one, None, (Adopt(Round(2), np.ones(3, np.float32), False),)))  # type: ignore[arg-type]
    with pytest.raises(InvariantViolated, match="m0 says that all agree; m1 never had its model"):
        check.step(Step(one, None, (Emit(PeerFinished("done", 3, agreed=True)),)))  # type: ignore[arg-type]
