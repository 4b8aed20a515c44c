"""The life of a round in groups: the walks of docs/rounds.md, over queues."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.ledger import Checkpoint, Resume, Uploading, Voted
from p2pfl.core.machine import Trained, Vector
from p2pfl.core.statements import Acknowledged, Ready, Result, Roots, Vote
from p2pfl.core.wire import Chunk, Message, Part, Told
from p2pfl.gossip import secure_sum
from p2pfl.gossip.session import Outcome
from tests.group_pump import GroupPump, Node


@pytest.fixture(autouse=True, params=["plain", "masked", "changes"])
def masks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test of this file thrice: nothing of a round's life depends on whether its sums are masked, or changes.

    Changes have words of 32 bits here, so that the same averages come out, as near.
    """
    monkeypatch.setattr(GroupPump, "masked", request.param != "plain")
    if request.param == "changes":
        monkeypatch.setattr(secure_sum, "CHANGE_BITS", 32)
        monkeypatch.setattr(GroupPump, "change_clip", 2.0**16)


def outcomes(node: Node) -> list[str]:
    return [record.outcome for record in node.rounds]


def uploads(node: Node) -> list[Round]:
    return [record.round for record in node.records if isinstance(record, Uploading)]


def says(message: Message, kind: type) -> bool:
    return isinstance(message, Told) and isinstance(message.statement.content, kind)


def die_at(pump: GroupPump, place: int, kind: type, round: int = 0) -> None:
    """Kill a member the moment its first statement of a kind would reach anybody."""

    def drop(sender: int, receiver: int, message: Message) -> bool:
        mine = isinstance(message, Told) and message.statement.signer == place
        if pump.nodes[place].alive and sender == place and mine and says(message, kind) and message.round == round:
            pump.kill(place)
        return not pump.nodes[place].alive and sender == place

    chain(pump, drop)


def same(one: Vector, other: Vector) -> bool:
    """Return whether two members' models after a round are one; of changes, each keeps what did not fit into words."""
    if GroupPump.change_clip is None:
        return np.array_equal(one, other)
    return np.allclose(one, other, rtol=1e-4)


def chain(pump: GroupPump, drop: Callable[[int, int, Message], bool]) -> None:
    before = pump.drop
    pump.drop = lambda sender, receiver, message: before(sender, receiver, message) or drop(sender, receiver, message)


def mean(pump: GroupPump, places: tuple[int, ...], start: Vector, round: int = 0) -> Vector:
    stepped = [pump.step(place, Round(round), start).astype(np.float64) for place in places]
    return (sum(stepped) / len(stepped)).astype(np.float32)  # type: ignore[union-attr]


def test_two_members_average_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under masks they cannot: the charter's check refuses them, and no session of two is begun."""
    monkeypatch.setattr(GroupPump, "masked", False)
    pump = GroupPump(2)
    pump.start()
    pump.run()
    assert [outcomes(node) for node in pump.nodes.values()] == [[Outcome.FULL] * 4] * 2
    assert np.array_equal(pump.nodes[0].adopted[Round(3)], pump.nodes[1].adopted[Round(3)])


@pytest.mark.parametrize("members", [3, 4, 5, 8, 13])
def test_undisturbed_every_round_is_full_and_all_end_with_one_model(members: int) -> None:
    pump = GroupPump(members)
    pump.start()
    pump.run()
    for node in pump.nodes.values():
        assert node.error is None
        assert outcomes(node) == [Outcome.FULL] * 4
        assert not node.refusals
        assert not node.banned
    last = [node.adopted[Round(3)] for node in pump.nodes.values()]
    assert all(np.array_equal(each, last[0]) for each in last)
    assert pump.now == 3.0, "nothing but training took time"


def test_a_group_adopts_the_mean_of_its_members_and_nothing_else() -> None:
    pump = GroupPump(8, rounds=1)
    pump.start()
    pump.run()
    for place, node in pump.nodes.items():
        group = next(group for group in node.machine._plan.groups(Round(0)) if place in group)
        np.testing.assert_allclose(node.adopted[Round(0)], mean(pump, group, pump.initial), rtol=1e-4)


def test_who_is_absent_from_the_start_costs_nobody_a_round() -> None:
    pump = GroupPump(4, rounds=2)
    pump.nodes[2].alive = False
    pump.start()
    for other in (0, 1, 3):
        pump.part(2, other)
    pump.run()
    for place in (0, 1, 3):
        records = pump.nodes[place].rounds
        assert [record.outcome for record in records[:2]] == [Outcome.FULL] * 2
        assert records[0].absent == {"m2": "enroll: no advert; unreachable"}
        np.testing.assert_allclose(pump.nodes[place].adopted[Round(0)], mean(pump, (0, 1, 3), pump.initial), rtol=1e-4)


@pytest.mark.parametrize("kind", [Ready, Roots, Acknowledged, Vote, Result])
@pytest.mark.parametrize("place", range(4))
def test_in_a_group_of_four_one_that_dies_at_any_stage_costs_nobody_the_round(kind: type, place: int) -> None:
    pump = GroupPump(4, rounds=2)
    die_at(pump, place, kind)
    pump.start()
    pump.run()
    living = [node for node in pump.nodes.values() if node.alive]
    assert len(living) == 3
    for node in living:
        assert node.rounds[0].outcome == Outcome.FULL, node.rounds
        assert node.rounds[1].outcome == Outcome.FULL
        assert same(node.adopted[Round(0)], living[0].adopted[Round(0)])


@pytest.mark.parametrize(
    ("kind", "seconds"), [(Ready, 1.0), (Roots, 1.0), (Roots, 6.0), (Acknowledged, 1.0), (Vote, 1.0), (Result, 1.0)]
)
@pytest.mark.parametrize("place", [0, 3, 5])
def test_one_that_dies_at_any_stage_costs_no_other_group_a_round_either(kind: type, place: int, seconds: float) -> None:
    """Its group takes longer than the patience, while those of another group wait for its members in the next round."""
    pump = GroupPump(8, rounds=5, patience=5.0)
    pump.train_seconds = seconds
    die_at(pump, place, kind, round=2)
    pump.start()
    pump.run()
    assert not pump.nodes[place].alive
    for node in pump.nodes.values():
        if node.alive:
            assert outcomes(node)[:5] == [Outcome.FULL] * 5


@pytest.mark.parametrize("place", range(4))
def test_one_that_dies_before_all_are_ready_is_not_waited_for_as_one_that_lives(place: int) -> None:
    pump = GroupPump(4, rounds=3)
    die_at(pump, place, Ready, round=1)
    pump.start()
    pump.run()
    for node in pump.nodes.values():
        if node.alive:
            assert node.rounds[1].attempt == 1
            assert node.rounds[1].seconds < 4.0, "three stages of a second, in the first of which all train"


def test_who_hangs_alone_in_the_round_before_is_waited_for_no_longer_than_others() -> None:
    """Its group has gone on without it, so it is not getting over a death."""
    pump = GroupPump(8, rounds=6, patience=5.0)
    hangs = False

    def hang(sender: int, _: int, message: Message) -> bool:
        nonlocal hangs
        hangs = hangs or (sender == 5 and getattr(message, "round", 0) == 3)
        return hangs and sender == 5

    chain(pump, hang)
    pump.start()
    pump.run(until=lambda: all(node.machine.round == 6 for place, node in pump.nodes.items() if place != 5))
    for place, node in pump.nodes.items():
        if place != 5:
            assert outcomes(node)[:6] == [Outcome.FULL] * 6
            assert max(record.seconds for record in node.rounds[3:]) <= 1.0 + 5.0


def test_in_a_group_of_four_two_that_die_after_uploading_leave_too_few_votes() -> None:
    pump = GroupPump(4, rounds=1)
    die_at(pump, 1, Vote)
    die_at(pump, 2, Vote)
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values() if node.alive), limit=1000)
    for place in (0, 3):
        assert outcomes(pump.nodes[place])[:1] == [Outcome.VOID]
        assert np.array_equal(pump.nodes[place].adopted[Round(0)], pump.initial), "back to base: the update is spent"


@pytest.mark.parametrize("kind", [Ready, Roots, Acknowledged, Vote, Result])
def test_in_a_group_of_eight_two_that_die_at_any_stage_cost_nobody_the_round(kind: type) -> None:
    pump = GroupPump(8, rounds=1, group_size=8, colluders=3)
    die_at(pump, 1, kind)
    die_at(pump, 4, kind)
    pump.start()
    pump.run()
    living = [node for node in pump.nodes.values() if node.alive]
    assert len(living) == 6
    first = {node.rounds[0].outcome for node in living}
    # After the votes nobody can be left out any more; then each held the only copy of the other's chunk.
    assert first == {Outcome.PARTIAL if kind in (Vote, Result) else Outcome.FULL}


def test_a_slow_member_takes_over_the_average_and_contributes_later() -> None:
    pump = GroupPump(4, rounds=3)
    pump.slow = {3}
    pump.start()
    pump.run(until=lambda: bool(pump.nodes[3].rounds))
    assert outcomes(pump.nodes[3]) == [Outcome.LATE]
    assert same(pump.nodes[3].adopted[Round(0)], pump.nodes[0].adopted[Round(0)])
    pump.slow = set()
    pump.feed(3, Trained(Round(0), pump.step(3, Round(0), pump.initial), 0.5, 1))
    pump.run()
    assert uploads(pump.nodes[3])
    last = [node.adopted[max(node.adopted)] for node in pump.nodes.values()]
    assert all(np.array_equal(each, last[0]) for each in last)


@pytest.mark.parametrize("seed", range(20))
def test_lost_messages_cost_time_but_no_round(seed: int) -> None:
    draw = random.Random(seed)
    pump = GroupPump(4, rounds=3)
    pump.drop = lambda sender, receiver, message: draw.random() < 0.2
    pump.start()
    pump.run()
    for node in pump.nodes.values():
        assert node.error is None
        assert set(outcomes(node)) <= {Outcome.FULL, Outcome.LATE}, outcomes(node)
        assert len(uploads(node)) == len(set(uploads(node)))
    last = [node.adopted[max(node.adopted)] for node in pump.nodes.values()]
    assert all(np.array_equal(each, last[0]) for each in last)


def test_one_that_is_cut_off_waits_and_comes_back_with_a_released_average() -> None:
    pump = GroupPump(8, rounds=12)
    pump.start()
    pump.run(until=lambda: pump.nodes[0].machine.round >= 2)
    for other in range(1, 8):
        pump.part(0, other)
    pump.run(until=lambda: pump.nodes[1].machine.round >= 8)
    assert pump.nodes[0].machine.round <= 3
    for other in range(1, 8):
        pump.join(0, other)
    pump.run()
    assert any("caught up" in getattr(event, "text", "") for event in pump.nodes[0].events)
    assert pump.nodes[0].rounds[-1].outcome == Outcome.FULL
    last = [node.adopted[max(node.adopted)] for node in pump.nodes.values()]
    assert all(np.array_equal(each, last[0]) for each in last)


@pytest.mark.parametrize("has_disk", [True, False])
def test_one_that_restarts_uploads_once_a_round_and_is_in_the_last_one(has_disk: bool) -> None:
    pump = GroupPump(8, rounds=12)
    pump.start()
    pump.run(until=lambda: pump.nodes[5].machine.round >= 4)
    pump.kill(5)
    pump.run(until=lambda: pump.nodes[1].machine.round >= 7)
    pump.restart(5, pump.nodes[5].resume() if has_disk else None)
    pump.run()
    assert len(uploads(pump.nodes[5])) == len(set(uploads(pump.nodes[5])))
    assert pump.nodes[5].rounds[-1].outcome == Outcome.FULL
    last = [node.adopted[max(node.adopted)] for node in pump.nodes.values()]
    assert all(np.array_equal(each, last[0]) for each in last)


def test_one_whose_disk_is_an_old_copy_learns_what_it_has_signed_since() -> None:
    pump = GroupPump(4, rounds=6)
    pump.start()
    pump.run(until=lambda: bool(pump.nodes[2].rounds))
    old = pump.nodes[2].resume()
    # It has uploaded in round 3, which its old disk does not know, when it dies.
    pump.run(until=lambda: Round(3) in uploads(pump.nodes[2]))
    before = len(uploads(pump.nodes[2]))
    pump.kill(2)
    pump.restart(2, old)
    pump.run()
    assert before >= 4
    assert len(uploads(pump.nodes[2])) == len(set(uploads(pump.nodes[2])))


def test_nobody_goes_on_alone() -> None:
    pump = GroupPump(4, rounds=5)
    pump.start()
    for other in (1, 2, 3):
        pump.kill(other)
    pump.run(until=lambda: pump.now > 500)
    assert pump.nodes[0].machine.round == 0


@pytest.mark.parametrize("place", range(4))
def test_an_update_that_left_and_was_not_summed_never_enters_another_sum(place: int) -> None:
    """A member whose chunks are acknowledged by nobody is not in the sum; its update is gone, not tried again."""
    pump = GroupPump(4, rounds=1)
    chain(pump, lambda s, r, m: isinstance(m, Chunk) and m.part is Part.UPLOAD and s == place)
    pump.start()
    pump.run(until=lambda: all(len(node.rounds) >= 1 for node in pump.nodes.values()))
    node = pump.nodes[place]
    assert node.rounds[0].outcome == Outcome.LATE
    assert same(node.adopted[Round(0)], pump.nodes[(place + 1) % 4].adopted[Round(0)])
    checkpoint = next(record for record in node.records if isinstance(record, Checkpoint))
    assert checkpoint.update is None


def test_one_aggregator_to_which_nothing_comes_costs_the_others_nothing() -> None:
    pump = GroupPump(4, rounds=1)
    chain(pump, lambda s, r, m: isinstance(m, Chunk) and m.part is Part.UPLOAD and r == 1)
    pump.start()
    pump.run(until=lambda: all(len(node.rounds) >= 1 for node in pump.nodes.values()))
    for place in (0, 2, 3):
        assert pump.nodes[place].rounds[0].outcome == Outcome.FULL
        assert len(pump.nodes[place].rounds[0].heard) == 3


def test_an_aggregator_that_signs_its_result_and_sends_it_to_nobody_is_replaced() -> None:
    pump = GroupPump(4, rounds=1)
    chain(pump, lambda s, r, m: isinstance(m, Chunk) and m.part is Part.RESULT and s == 2 and m.chunk == 2)
    pump.start()
    pump.run(until=lambda: all(len(node.rounds) >= 1 for node in pump.nodes.values()))
    assert [node.rounds[0].outcome for node in pump.nodes.values()] == [Outcome.FULL] * 4


def test_votes_and_uploads_are_durable_before_they_leave() -> None:
    pump = GroupPump(4, rounds=2)
    seen: list[str] = []

    def drop(sender: int, receiver: int, message: Message) -> bool:
        kinds = {Roots: Uploading, Vote: Voted}
        for said, kept in kinds.items():
            if says(message, said) and isinstance(message, Told) and message.statement.signer == sender:
                records = [each for each in pump.nodes[sender].records if isinstance(each, kept)]
                assert any(each.round == message.round for each in records)
                seen.append(said.__name__)
        if isinstance(message, Chunk) and message.part is Part.UPLOAD:
            assert message.round in uploads(pump.nodes[sender])
        return False

    pump.drop = drop
    pump.start()
    pump.run()
    assert set(seen) == {"Roots", "Vote"}


def test_what_is_in_memory_is_bounded_over_many_rounds() -> None:
    pump = GroupPump(8, rounds=30)
    pump.start()
    most = 0

    def watch() -> bool:
        nonlocal most
        most = max(most, *(node.machine.held for node in pump.nodes.values()))
        return False

    pump.run(until=watch)
    assert most < 400


def test_a_peer_with_a_checkpoint_of_a_later_round_waits_for_the_others() -> None:
    pump = GroupPump(4, rounds=4)
    known = Resume(Checkpoint(Round(2), pump.initial, None), 1)
    pump.nodes[0] = Node(pump.build(0, known))
    pump.start()
    pump.run()
    assert pump.nodes[0].rounds[0].round == 2
    assert pump.nodes[0].rounds[-1].outcome == Outcome.FULL


def test_a_session_is_set_up_while_its_members_train() -> None:
    """From the second round on: how long the steps take is known from the first."""
    pump = GroupPump(4)
    began: dict[int, float] = {}
    ready: dict[int, float] = {}

    def note(sender: int, _: int, message: Message) -> bool:
        if sender == 0 and says(message, Ready):
            ready.setdefault(message.round, pump.now)
        if sender == 0 and says(message, Roots):
            began.setdefault(message.round, pump.now)
        return False

    chain(pump, note)
    pump.start()
    pump.run()
    trained = {record.round: record for record in pump.nodes[0].rounds}
    assert all(record.outcome == Outcome.FULL for record in trained.values())
    assert ready[0] == began[0]
    assert began[1] - ready[1] > 0.5
    assert began[2] - ready[2] > 0.5


def test_whose_steps_take_longer_than_expected_is_left_out_of_that_round_only() -> None:
    pump = GroupPump(4)
    pump.start()
    pump.run(until=lambda: pump.now >= 1.0)  # the first steps are made, the first average is not
    pump.slow = {3}
    pump.run(until=lambda: all(pump.nodes[place].machine.round == 2 for place in range(3)))
    assert all(pump.nodes[place].rounds[1].outcome == Outcome.FULL for place in range(3))
    late = pump.charter.members[3].name
    assert all(list(pump.nodes[place].rounds[1].absent) == [late] for place in range(3))
