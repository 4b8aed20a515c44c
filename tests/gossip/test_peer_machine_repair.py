"""Neighbors that die, stay away and come back: whole networks of machines without sockets."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import OutOfTurn
from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.ledger import Checkpoint, Resume
from p2pfl.core.machine import (
    BulkOffered,
    Effect,
    LinkUp,
    Persist,
    Persisted,
    Received,
    RefuseBulk,
    Seek,
    SendBulk,
    Started,
    TimerFired,
    Train,
    Vector,
)
from p2pfl.core.trace import MemberChanged, Note, PeerFinished
from p2pfl.core.wire import Hello, Ping, Update
from p2pfl.gossip.mixing import consensus_distance
from p2pfl.gossip.peer_machine import LOOKAHEAD, MOST_SOUGHT, PeerMachine, Plan
from p2pfl.gossip.settle import Claim, Settling, Verdict
from tests.gossip.test_peer_machine import SIZE, initial_vectors, keep, records
from tests.pump import Pump, charter_for


def pump_of(n: int, topology: str, rounds: int, seconds: float = 5.0, **terms: object) -> Pump:
    charter = charter_for(n, SIZE, rounds=rounds, topology=topology, **terms)  # type: ignore[arg-type]
    return Pump(charter, initial_vectors(charter.roster()), keep, seconds)


def in_round(pump: Pump, round: int, then: Callable[[], None]) -> None:
    """Do something once, when the first peer trains this round."""
    done: list[bool] = []

    def step(peer: PeerId, at: Round, vector: Vector) -> Vector:
        if at == round and not done:
            done.append(True)
            then()
        return vector.copy()

    inner = pump.step

    def both(peer: PeerId, at: Round, vector: Vector) -> Vector:
        return inner(peer, at, step(peer, at, vector))

    pump.step = both


def finals(pump: Pump) -> list[PeerFinished]:
    ended = [node.events[-1] for node in pump.nodes.values() if node.alive]
    assert all(isinstance(event, PeerFinished) for event in ended)
    return ended  # type: ignore[return-value]


def distance(pump: Pump) -> float:
    return consensus_distance(np.stack([node.adopted[-1] for node in pump.nodes.values() if node.alive]))


@pytest.mark.parametrize("dead", [(0, 4), (1, 5), (1, 2), (2, 3, 6)])
def test_a_ring_that_fell_in_two_agrees_at_the_end_and_claims_nothing(dead: tuple[int, ...]) -> None:
    pump = pump_of(8, "ring", 60, tolerance=1e-9)
    in_round(pump, 3, lambda: [pump.kill(pump.roster[each]) for each in dead] and None)
    pump.start()
    pump.run()
    assert all((event.outcome, event.agreed) == ("done", False) for event in finals(pump))
    assert distance(pump) <= 1e-9
    # The mean of the living, as it was when the others died, is where they meet: the weights were symmetric.
    around_gap = pump.roster[dead[-1] + 1 - len(pump.roster)]
    assert any(isinstance(event, Note) and "unreachable" in event.text for event in pump.nodes[around_gap].events)


def test_without_repair_such_a_ring_stays_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pfl.gossip.peer_machine.PATIENCE", 1e9)
    pump = pump_of(8, "ring", 60, tolerance=1e-9)
    in_round(pump, 3, lambda: [pump.kill(pump.roster[each]) for each in (0, 4)] and None)
    pump.start()
    pump.run()
    assert distance(pump) > 0.1
    assert not any(event.agreed for event in finals(pump))


def test_a_bypass_ends_when_the_dead_one_is_back() -> None:
    pump = pump_of(8, "ring", 80, tolerance=1e-9)
    gone, left, right = pump.roster[2], pump.roster[1], pump.roster[3]
    in_round(pump, 3, lambda: pump.kill(gone))
    in_round(pump, 40, lambda: pump.restart(gone, None))
    pump.start()
    pump.run()
    for peer, other in ((left, "m3"), (right, "m1")):
        notes = [event.text for event in pump.nodes[peer].events if isinstance(event, Note)]
        assert notes == [
            f"m2 unreachable for long: averaging with {other} in place of it",
            "back to the overlay of the charter",
        ]
        together = [record.round for record in records(pump, peer) if other in record.heard]
        assert together, "the bypass carried models"
        assert 12 < min(together) < 40
        assert max(together) <= 42
        assert "m2" in records(pump, peer)[-1].heard
    assert all(event.agreed for event in finals(pump)), "all links carry updates again, so agreement is proven"
    assert distance(pump) <= 1e-9


@pytest.mark.parametrize("topology", ["ring", "exponential", "complete"])
@pytest.mark.parametrize("disk", [True, False], ids=["with-disk", "without-disk"])
def test_a_restarted_peer_is_in_the_last_round(topology: str, disk: bool) -> None:
    pump = pump_of(6, topology, 40, tolerance=1e-9)
    victim = pump.roster[2]

    def restart() -> None:
        kept = pump.nodes[victim].kept
        assert kept, "a peer that ran some rounds has written checkpoints"
        pump.restart(victim, kept[-1] if disk else None)

    in_round(pump, 5, lambda: pump.kill(victim))
    in_round(pump, 20, restart)
    pump.start()
    pump.run()
    last = {peer: records(pump, peer)[-1].round for peer in pump.roster}
    assert len(set(last.values())) == 1
    assert all(event.agreed for event in finals(pump))
    assert distance(pump) <= 1e-9
    rejoined = records(pump, victim)
    assert rejoined[0].round >= 19, "it did not run the missed rounds by itself"
    assert len([record for record in rejoined if record.absent]) <= 3, "and was soon heard by all"


@pytest.mark.parametrize("back_in", [12, 13, 14, 15, 16, 30, 60, 85, 86])
def test_a_peer_that_returns_while_the_others_settle_settles_with_them(back_in: int) -> None:
    pump = pump_of(6, "ring", 10, tolerance=1e-9)
    victim = pump.roster[2]
    in_round(pump, 5, lambda: pump.kill(victim))

    def restart(sender: PeerId, receiver: PeerId, effect: Effect) -> bool:
        if isinstance(effect, SendBulk) and effect.message.round == back_in and not pump.nodes[victim].alive:
            pump.restart(victim, None)
        return False

    pump.drop = restart
    pump.start()
    pump.run()
    assert records(pump, victim)[0].round in (back_in - 1, back_in)
    assert len({records(pump, peer)[-1].round for peer in pump.roster}) == 1
    assert all(event.agreed for event in finals(pump))
    assert distance(pump) <= 1e-9


@pytest.fixture
def alone() -> tuple[Pump, PeerId, tuple[PeerId, PeerId]]:
    """A peer of a ring of five that has started, and its two neighbors."""
    pump = pump_of(5, "ring", 100)
    me = pump.roster[0]
    pump.feed(me, Started())
    pump.queue.clear()
    return pump, me, (pump.roster[1], pump.roster[4])


def trained_rounds(effects: list[Effect]) -> list[int]:
    return [effect.round for effect in effects if isinstance(effect, Train)]


def test_one_liar_drags_nobody_along(alone: tuple[Pump, PeerId, tuple[PeerId, PeerId]]) -> None:
    pump, me, (liar, honest) = alone
    ours = pump.charter.hash()
    pump.feed(me, Received(liar, Hello(ours, Round(90))))
    assert trained_rounds(pump.feed(me, LinkUp(liar))) == []
    pump.feed(me, Received(honest, Hello(ours, Round(7))))
    assert trained_rounds(pump.feed(me, LinkUp(honest))) == [7]


def test_a_federation_that_runs_is_not_kept_waiting_for_a_neighbor_that_is_away(
    alone: tuple[Pump, PeerId, tuple[PeerId, PeerId]],
) -> None:
    pump, me, (here, _) = alone
    pump.feed(me, LinkUp(here))
    pump.feed(me, Received(here, Ping(pump.charter.hash(), Round(9))))
    node = pump.nodes[me]
    assert node.timers["start"] == pump.charter.deadlines.heartbeat
    while "start" in node.timers:
        pump.pass_time()
    assert any(isinstance(event, Note) and "round 0 to 9" in event.text for event in node.events)
    assert node.machine._round == 9


def test_a_claim_beyond_the_end_leads_to_the_end_only(alone: tuple[Pump, PeerId, tuple[PeerId, PeerId]]) -> None:
    pump, me, neighbors = alone
    for peer in neighbors:
        pump.feed(me, Received(peer, Hello(pump.charter.hash(), Round(2**48))))
        pump.feed(me, LinkUp(peer))
    assert pump.nodes[me].machine._round == 100 + 500 - 1
    assert not any(isinstance(event, PeerFinished) and event.agreed for event in pump.nodes[me].events)


def test_small_leads_are_caught_up_with_and_not_jumped(alone: tuple[Pump, PeerId, tuple[PeerId, PeerId]]) -> None:
    pump, me, neighbors = alone
    begun = []
    for peer in neighbors:
        pump.feed(me, Received(peer, Hello(pump.charter.hash(), Round(LOOKAHEAD))))
        begun += trained_rounds(pump.feed(me, LinkUp(peer)))
    assert begun == [0]


def test_one_checkpoint_at_a_time_is_written_and_no_round_waits_for_it() -> None:
    pump = pump_of(3, "complete", 50, seconds=0.6)
    me = pump.roster[0]
    pending: list[Checkpoint] = []
    machine = pump.nodes[me].machine
    handle = machine.handle

    def without_disk(input: object, now: Seconds) -> list[Effect]:
        effects = handle(input, now)  # type: ignore[arg-type]
        pending.extend(effect.record for effect in effects if isinstance(effect, Persist))  # type: ignore[misc]
        return [effect for effect in effects if not isinstance(effect, Persist)]

    machine.handle = without_disk  # type: ignore[method-assign]
    pump.start()
    pump.run(limit=10_000)
    assert len(pending) == 1, "the disk never answered"
    adopted = pump.nodes[me].adopted
    assert pending[0] == Checkpoint(Round(1), adopted[0], None)
    other = pump.nodes[pump.roster[1]]
    assert 20 < len(other.kept) < 50
    for kept in other.kept:
        np.testing.assert_array_equal(kept.base, other.adopted[kept.round - 1])


def test_an_answer_of_the_disk_that_nobody_asked_for_is_out_of_turn(
    alone: tuple[Pump, PeerId, tuple[PeerId, PeerId]],
) -> None:
    pump, me, _ = alone
    with pytest.raises(OutOfTurn):
        pump.feed(me, Persisted("checkpoint"))


def test_a_link_that_only_the_other_end_wants_is_no_fault(alone: tuple[Pump, PeerId, tuple[PeerId, PeerId]]) -> None:
    pump, me, _ = alone
    other = pump.roster[2]
    pump.feed(me, LinkUp(other))
    update = Update(pump.charter.hash(), Round(0), 4 * SIZE, 0.0, False)
    (verdict,) = pump.feed(me, BulkOffered(other, update))
    assert isinstance(verdict, RefuseBulk)
    assert not pump.nodes[me].banned


def test_links_beside_the_overlay_are_bounded() -> None:
    """The hub of a star is dead: all others are around the gap."""
    charter = charter_for(100, 4, rounds=1000, topology="ring")
    plan = Plan.for_peer(charter, charter.roster()[1])
    graph = plan.graph.copy()
    graph.clear_edges()
    graph.add_edges_from((0, node) for node in range(1, 100))
    star = Plan(**{**plan.__dict__, "graph": graph, "weights": {plan.roster[0]: 0.01, plan.roster[2]: 0.0}})
    machine = PeerMachine(star, np.zeros(4, np.float32), Resume(Checkpoint(Round(3), np.zeros(4, np.float32), None), 2))
    machine.handle(Started(), Seconds(0.0))
    machine.handle(LinkUp(plan.roster[2]), Seconds(0.0))
    machine.handle(TimerFired("start"), Seconds(30.0))
    effects = machine.handle(TimerFired("heartbeat"), Seconds(1000.0))
    assert len([effect for effect in effects if isinstance(effect, Seek)]) == MOST_SOUGHT


def test_the_trace_tells_how_members_seem() -> None:
    pump = pump_of(4, "ring", 30, tolerance=1e-9)
    victim, witness = pump.roster[1], pump.roster[0]
    in_round(pump, 5, lambda: pump.kill(victim))
    in_round(pump, 10, lambda: pump.restart(victim, None))
    pump.start()
    pump.run()
    told = [e.standing for e in pump.nodes[witness].events if isinstance(e, MemberChanged) and e.member == "m1"]
    assert told[:3] == ["here", "unreachable", "late"]
    assert "here" in told[3:]


def test_one_that_comes_in_while_others_settle_says_nothing_for_certain_before_a_whole_window() -> None:
    settling = Settling(diameter=2, members=5, step=4, joined=4)
    assert not settling.claim.complete
    verdicts = []
    for _ in range(6):
        settling = settling.after_round(9.0, [Claim(1.0, True)], complete=True)
        verdicts.append(settling.verdict())
        if settling.step == 5:
            assert settling.claim == Claim(9.0, False), "what it measured keeps the others from stopping"
    assert verdicts == [None, None, None, None, Verdict(4 * 9.0, True), None]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whoever_dies_and_returns_all_end_and_none_claims_agreement_wrongly(data: st.DataObject) -> None:
    topology = data.draw(st.sampled_from(["ring", "exponential", "random-regular", "complete"]))
    n = data.draw(st.integers(3, 8))
    pump = pump_of(n, topology, 30, tolerance=1e-6, settle_rounds=200)
    for place in data.draw(st.sets(st.integers(0, n - 1), max_size=3)):
        peer, dies = pump.roster[place], data.draw(st.integers(0, 40))
        kill_or_restart(pump, peer, dies, data.draw(st.none() | st.integers(1, 40)), data.draw(st.booleans()))
    pump.start()
    pump.run()
    living = [node for node in pump.nodes.values() if node.alive]
    if any(isinstance(node.events[-1], PeerFinished) and node.events[-1].agreed for node in living):
        assert distance(pump) <= 1e-6


def kill_or_restart(pump: Pump, peer: PeerId, dies: int, away: int | None, disk: bool) -> None:
    """Kill a peer when the first update of this round is sent, and start it again some rounds later."""
    former, done = pump.drop, []

    def drop(sender: PeerId, receiver: PeerId, effect: Effect) -> bool:
        if isinstance(effect, SendBulk):
            node = pump.nodes[peer]
            if not done and effect.message.round >= dies and not node.finished:
                done.append("killed")
                pump.kill(peer)
            elif done == ["killed"] and away is not None and effect.message.round >= dies + away:
                done.append("back")
                pump.restart(peer, node.kept[-1] if disk and node.kept else None)
        return former(sender, receiver, effect)

    pump.drop = drop
