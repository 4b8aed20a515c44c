"""The peer's protocol, by whole networks of machines without sockets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import Malformed, NotAMember, OutOfTurn, RoundFailed, TooLarge, WrongCharter
from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.machine import (
    AcceptBulk,
    BulkOffered,
    BulkReceived,
    Computed,
    Disconnect,
    DropLink,
    Effect,
    LinkDown,
    LinkUp,
    Received,
    RefuseBulk,
    SendBulk,
    Started,
    StopRequested,
    TimerFired,
    Trained,
    Vector,
)
from p2pfl.core.trace import LinkChanged, PeerFinished, Refused, RoundEnded
from p2pfl.core.wire import Bye, Hello, Ping, Update
from p2pfl.gossip.mixing import consensus_distance, metropolis_hastings
from p2pfl.gossip.topology import overlay_of
from tests.pump import Pump, charter_for

SIZE = 33


def initial_vectors(roster: tuple[PeerId, ...], size: int = SIZE) -> dict[PeerId, Vector]:
    draw = np.random.default_rng(7)
    return {peer: draw.standard_normal(size).astype(np.float32) for peer in roster}


def add_round(peer: PeerId, round: Round, vector: Vector) -> Vector:
    return vector + np.float32(1 + round)


def keep(peer: PeerId, round: Round, vector: Vector) -> Vector:
    return vector.copy()


def records(pump: Pump, peer: PeerId) -> list[RoundEnded]:
    return [event for event in pump.nodes[peer].events if isinstance(event, RoundEnded)]


@pytest.mark.parametrize("topology", ["ring", "exponential", "complete", "random-regular"])
def test_the_network_computes_what_the_mixing_matrix_predicts(topology: str) -> None:
    charter = charter_for(8, SIZE, rounds=4, topology=topology, settle_rounds=3, tolerance=1e-30)
    start = initial_vectors(charter.roster())
    pump = Pump(charter, start, add_round)
    pump.start()
    pump.run()

    matrix = metropolis_hastings(overlay_of(charter))
    expected = np.stack([start[peer] for peer in pump.roster]).astype(np.float64)
    done = len(pump.nodes[pump.roster[0]].adopted)
    assert done >= 6
    for round in range(done):
        expected = matrix @ (expected + (1 + round if round < 4 else 0))
        actual = np.stack([pump.nodes[peer].adopted[round] for peer in pump.roster])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_equal_inputs_give_equal_bits() -> None:
    charter = charter_for(6, SIZE, topology="exponential")
    runs = []
    for _ in range(2):
        pump = Pump(charter, initial_vectors(charter.roster()), add_round)
        pump.start()
        pump.run()
        runs.append([pump.nodes[peer].adopted[-1].tobytes() for peer in pump.roster])
    assert runs[0] == runs[1]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 9),
    topology=st.sampled_from(["ring", "exponential", "complete", "random-regular"]),
    exponent=st.integers(-8, 0),
)
def test_all_stop_in_the_same_round_within_the_tolerance(n: int, topology: str, exponent: int) -> None:
    charter = charter_for(n, SIZE, rounds=1, topology=topology, tolerance=10.0**exponent)
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    pump.start()
    pump.run()
    assert len({len(node.adopted) for node in pump.nodes.values()}) == 1
    final = np.stack([node.adopted[-1] for node in pump.nodes.values()])
    assert consensus_distance(final) <= 10.0**exponent
    for node in pump.nodes.values():
        assert node.events[-1] == PeerFinished("done", len(node.adopted), agreed=True)


def test_killing_one_peer_leaves_the_rest_finishing_their_rounds() -> None:
    charter = charter_for(6, SIZE, rounds=5, topology="exponential")
    pump = Pump(charter, initial_vectors(charter.roster()), add_round)
    victim = pump.roster[2]

    def step(peer: PeerId, round: Round, vector: Vector) -> Vector:
        if round == 2 and peer == victim:
            pump.kill(victim)
        return add_round(peer, round, vector)

    pump.step = step
    pump.start()
    pump.run()
    for peer in pump.roster:
        if peer == victim:
            continue
        ended = records(pump, peer)
        assert pump.nodes[peer].error is None
        assert len([record for record in ended if not record.settling]) == 5
        for record in ended:
            missed = {"m2": "no link"} if record.round >= 2 and victim in pump.plans[peer].weights else {}
            assert record.absent == missed
    assert pump.now < charter.deadlines.round, "a dead link must not cost a deadline"


def test_who_cannot_hear_all_members_stops_but_claims_no_agreement() -> None:
    """A ring of six in two parts: each settles for itself, far from the other."""
    charter = charter_for(6, SIZE, rounds=1, topology="ring")
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    roster = pump.roster
    cut = ({roster[1], roster[2]}, {roster[4], roster[5]})
    pump.drop = lambda sender, receiver, effect: {sender, receiver} in cut and isinstance(effect, SendBulk)
    pump.start()
    pump.run()
    assert consensus_distance(np.stack([node.adopted[-1] for node in pump.nodes.values()])) > 0.1
    for node in pump.nodes.values():
        finished = node.events[-1]
        assert isinstance(finished, PeerFinished)
        assert (finished.outcome, finished.agreed) == ("done", False)
        assert finished.round < 100, "it does not go on to the limit of settling rounds"


def test_a_silent_neighbor_costs_one_deadline_and_its_weight_goes_to_oneself() -> None:
    charter = charter_for(4, SIZE, rounds=3, topology="ring", settle_rounds=0)
    start = initial_vectors(charter.roster())
    pump = Pump(charter, start, keep)
    mute, listener = pump.roster[0], pump.roster[1]
    pump.drop = lambda sender, receiver, effect: (sender, receiver) == (mute, listener) and isinstance(effect, SendBulk)
    pump.start()
    pump.deliver()
    assert not records(pump, listener)
    pump.run()
    assert [record.absent for record in records(pump, listener)] == [{"m0": "late"}] * 3
    assert charter.deadlines.round <= pump.now < 2 * charter.deadlines.round
    expected = start[listener] * 2 / 3 + start[pump.roster[2]] / 3
    np.testing.assert_allclose(pump.nodes[listener].adopted[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("lost", "reason"),
    [({1}, "ahead, in round 2"), ({1, 2}, "ahead, in round 3")],
    ids=["seen-ahead", "after-a-deadline"],
)
def test_a_neighbor_is_waited_for_again_once_it_keeps_step(lost: set[int], reason: str) -> None:
    charter = charter_for(3, SIZE, rounds=6, topology="complete", settle_rounds=0)
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    slow, other = pump.roster[0], pump.roster[1]
    pump.drop = lambda sender, receiver, effect: (
        sender == slow and receiver == other and isinstance(effect, SendBulk) and effect.message.round in lost
    )
    pump.start()
    pump.run()
    absent = [record.absent for record in records(pump, other)]
    assert absent[1] == {"m0": reason}
    assert absent[-1] == {}, "a neighbor heard in the current round is in step again"


@pytest.mark.parametrize("topology", ["ring", "exponential"])
def test_one_that_falls_silent_parts_nobody_else(topology: str) -> None:
    """Its neighbors wait, then theirs, and all deadlines end at once: healthy peers must find each other again."""
    charter = charter_for(8, SIZE, rounds=60, topology=topology, settle_rounds=0)
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    silent = pump.roster[3]
    from_round = Round(5)
    pump.drop = lambda sender, receiver, effect: (
        sender == silent and isinstance(effect, SendBulk) and effect.message.round >= from_round
    )
    pump.start()
    pump.run()
    for peer in pump.roster:
        if peer == silent:
            continue
        late = [record for record in records(pump, peer) if record.round >= 45]
        assert {name for record in late for name in record.absent} <= {"m3"}


def test_silence_takes_the_link_down_and_is_no_crime(waiting: tuple[Pump, PeerId, PeerId]) -> None:
    pump, me, other = waiting
    beat, silence = pump.charter.deadlines.heartbeat, pump.charter.deadlines.silence
    third = pump.roster[2]
    while pump.now <= silence + beat:
        pump.now = Seconds(pump.now + beat)
        pump.feed(me, Received(third, Ping(pump.charter.hash(), Round(0))))
        effects = pump.feed(me, TimerFired("heartbeat"))
        dropped = [effect.peer for effect in effects if isinstance(effect, DropLink)]
        if dropped:
            break
    assert dropped == [other]
    assert pump.now > silence
    assert not pump.nodes[me].banned
    pump.feed(me, LinkDown(other, "silent"))
    pump.feed(me, LinkUp(other))
    assert [event.up for event in pump.nodes[me].events if isinstance(event, LinkChanged)][-2:] == [False, True]


def test_a_peer_that_slept_blames_nobody(waiting: tuple[Pump, PeerId, PeerId]) -> None:
    pump, me, _ = waiting
    pump.now = Seconds(1000.0)
    assert not any(isinstance(effect, DropLink) for effect in pump.feed(me, TimerFired("heartbeat")))


def test_asked_twice_a_peer_leaves_at_once() -> None:
    charter = charter_for(2, SIZE)
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    me = pump.roster[0]
    pump.feed(me, Started())
    pump.feed(me, LinkUp(pump.roster[1]))
    assert pump.feed(me, StopRequested()) == []
    pump.feed(me, StopRequested())
    assert pump.nodes[me].finished


def test_without_neighbors_the_run_fails_with_their_names() -> None:
    charter = charter_for(3, SIZE)
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    lonely = pump.roster[0]
    pump.feed(lonely, Started())
    for other in pump.roster[1:]:
        pump.nodes[other].alive = False
    pump.run()
    error = pump.nodes[lonely].error
    assert isinstance(error, RoundFailed)
    assert "m1, m2" in str(error)
    assert pump.nodes[lonely].events[-1] == PeerFinished("failed", 0, agreed=False, reason=str(error))


def test_some_neighbors_are_enough_to_start() -> None:
    charter = charter_for(4, SIZE, topology="complete", rounds=2)
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    missing = pump.roster[3]
    pump.nodes[missing].alive = False
    for peer in pump.roster[:3]:
        pump.feed(peer, Started())
    for left in pump.roster[:3]:
        for right in pump.roster[:3]:
            if left < right:
                pump.join(left, right)
    pump.run()
    assert all(record.absent == {"m3": "no link"} for record in records(pump, pump.roster[0]))


def offer(pump: Pump, peer: PeerId, sender: PeerId, message: object) -> Effect:
    effects = pump.feed(peer, BulkOffered(sender, message))  # type: ignore[arg-type]
    (verdict,) = [effect for effect in effects if isinstance(effect, AcceptBulk | RefuseBulk | Disconnect)]
    return verdict


@pytest.fixture
def waiting() -> tuple[Pump, PeerId, PeerId]:
    """A network of three whose first peer waits in round 0 for both others."""
    charter = charter_for(3, SIZE, topology="complete")
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    pump.drop = lambda sender, receiver, effect: True
    pump.start()
    pump.deliver()
    return pump, pump.roster[0], pump.roster[1]


def test_a_model_of_another_shape_is_refused_before_it_is_allocated(waiting: tuple[Pump, PeerId, PeerId]) -> None:
    pump, me, other = waiting
    verdict = offer(pump, me, other, Update(pump.charter.hash(), Round(0), 4 * SIZE + 4, 0.0, False))
    assert isinstance(verdict, Disconnect)
    assert isinstance(verdict.error, TooLarge)
    refused = [event for event in pump.nodes[me].events if isinstance(event, Refused)]
    assert refused == [Refused("m1", "sent a model of 34 values, the charter's has 33")]


def test_a_wrong_charter_a_stranger_and_a_payload_out_of_place_are_dropped(
    waiting: tuple[Pump, PeerId, PeerId],
) -> None:
    pump, me, other = waiting
    ours, length = pump.charter.hash(), 4 * SIZE
    wrong = offer(pump, me, other, Update(bytes(32), Round(0), length, 0.0, False))
    stranger = offer(pump, me, PeerId("12D3"), Update(ours, Round(0), length, 0.0, False))
    misplaced = offer(pump, me, other, Ping(ours, Round(0)))
    assert [type(verdict.error) for verdict in (wrong, stranger, misplaced) if isinstance(verdict, Disconnect)] == [
        WrongCharter,
        NotAMember,
        Malformed,
    ]
    greeting = pump.feed(me, Received(other, Hello(bytes(32), Round(0))))
    assert any(isinstance(effect, Disconnect) and isinstance(effect.error, WrongCharter) for effect in greeting)


def test_updates_out_of_time_are_skipped_and_kept_ones_are_bounded(waiting: tuple[Pump, PeerId, PeerId]) -> None:
    pump, me, other = waiting
    ours, payload = pump.charter.hash(), bytearray(4 * SIZE)
    updates = [Update(ours, Round(r), 4 * SIZE, 0.0, False) for r in range(5)]
    # Rounds 1 and 2 are kept for later, 3 and above are too early; the same twice is refused.
    for update in updates[1:3]:
        assert offer(pump, me, other, update) == AcceptBulk()
        pump.feed(me, BulkReceived(other, update, payload))
        assert isinstance(offer(pump, me, other, update), RefuseBulk)
    for update in updates[3:]:
        assert isinstance(offer(pump, me, other, update), RefuseBulk)


def test_infinite_values_are_kept_out_of_the_average(waiting: tuple[Pump, PeerId, PeerId]) -> None:
    pump, me, other = waiting
    third = pump.roster[2]
    own = pump.nodes[me].machine._vector
    good = np.full(SIZE, 2.0, np.float32)
    for sender, vector in ((other, np.full(SIZE, np.nan, np.float32)), (third, good)):
        update = Update(pump.charter.hash(), Round(0), 4 * SIZE, 0.0, False)
        assert offer(pump, me, sender, update) == AcceptBulk()
        pump.feed(me, BulkReceived(sender, update, bytearray(vector.tobytes())))
    pump.deliver()
    (record,) = records(pump, me)
    assert record.absent == {"m1": "rejected: not finite"}
    assert other in pump.nodes[me].banned
    np.testing.assert_allclose(pump.nodes[me].adopted[0], own * 2 / 3 + good / 3, atol=1e-6)


def test_a_neighbor_that_left_is_not_waited_for(waiting: tuple[Pump, PeerId, PeerId]) -> None:
    pump, me, other = waiting
    third = pump.roster[2]
    for leaver in (other, third):
        pump.feed(me, Received(leaver, Bye(pump.charter.hash(), Round(5))))
    assert not records(pump, me), "both still owe round 0"
    for sender in (other, third):
        update = Update(pump.charter.hash(), Round(0), 4 * SIZE, 0.0, False)
        pump.feed(me, BulkReceived(sender, update, bytearray(4 * SIZE)))
    pump.deliver()
    assert len(records(pump, me)) == 1


def test_asked_to_stop_a_peer_leaves_and_the_others_go_on() -> None:
    charter = charter_for(4, SIZE, rounds=6, topology="complete", settle_rounds=5)
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    leaver = pump.roster[1]

    def step(peer: PeerId, round: Round, vector: Vector) -> Vector:
        if round == 2 and peer == leaver:
            pump.queue.append((leaver, StopRequested()))
        return vector.copy()

    pump.step = step
    pump.start()
    pump.run()
    finished = {peer: node.events[-1] for peer, node in pump.nodes.items()}
    assert isinstance(finished[leaver], PeerFinished)
    assert finished[leaver].outcome == "stopped"
    assert all(event.outcome == "done" for peer, event in finished.items() if peer != leaver)  # type: ignore[union-attr]
    assert pump.now < charter.deadlines.round


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_input_from_a_peer_ever_raises(data: st.DataObject) -> None:
    charter = charter_for(4, 2, rounds=2, topology="ring")
    pump = Pump(charter, initial_vectors(charter.roster(), 2), keep)
    pump.start()
    peers = st.sampled_from([*pump.roster, PeerId("stranger")])
    hashes = st.sampled_from([charter.hash(), bytes(32)])
    rounds = st.integers(0, 6).map(Round)
    messages = st.one_of(
        st.builds(Hello, hashes, rounds),
        st.builds(Ping, hashes, rounds),
        st.builds(Bye, hashes, rounds),
        st.builds(Update, hashes, rounds, st.sampled_from([0, 4, 8, 12]), st.floats(0, 1e300), st.booleans()),
    )
    for _ in range(data.draw(st.integers(1, 40))):
        target = data.draw(st.sampled_from(pump.roster))
        match data.draw(st.sampled_from(["message", "bulk", "part", "join", "time", "deliver", "stop"])):
            case "message":
                pump.feed(target, Received(data.draw(peers), data.draw(messages)))
            case "bulk":
                sender, message = data.draw(peers), data.draw(messages)
                if isinstance(offer(pump, target, sender, message), AcceptBulk):
                    pump.feed(
                        target, BulkReceived(sender, message, bytearray(data.draw(st.binary(min_size=8, max_size=8))))
                    )
            case "part":
                pump.part(target, data.draw(peers))
            case "join":
                pump.feed(target, LinkUp(data.draw(peers)))
            case "time":
                pump.pass_time()
            case "deliver" if pump.queue:
                pump.queue, rest = pump.queue[:1], pump.queue[1:]
                pump.deliver()
                pump.queue += rest
            case "stop" if data.draw(st.booleans()):
                pump.feed(target, StopRequested())


def test_a_driver_that_answers_what_was_not_asked_is_told() -> None:
    charter = charter_for(3, SIZE)
    pump = Pump(charter, initial_vectors(charter.roster()), keep)
    me = pump.roster[0]
    pump.feed(me, Started())
    for wrong in (Started(), Trained(Round(0), np.zeros(SIZE, np.float32), 0.0), Computed("average", None)):
        with pytest.raises(OutOfTurn):
            pump.feed(me, wrong)
