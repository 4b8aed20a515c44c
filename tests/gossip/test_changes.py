"""Sums of what members changed in a base that all of them have, in words of 16 bits, and what error feedback keeps."""

from dataclasses import replace

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.ledger import Checkpoint
from p2pfl.core.machine import Effect, SendBulk, Vector
from p2pfl.core.statements import Enrolment, Result, decode_statement, encode_body
from p2pfl.core.wire import Chunk, Message, Part, Told
from p2pfl.crypto.ring import HEADER_BYTES, Ring
from p2pfl.gossip.release import verified_release
from p2pfl.gossip.session import Outcome
from p2pfl.simulation.soak import Case, run_case
from tests.group_pump import FastKeyring, GroupPump, Node

CLIP = 64.0


class Changing(GroupPump):
    """Notes what each upload has in bytes."""

    masked = True
    change_clip = CLIP

    def __init__(self, members: int, parameters: int = 10, **charter: object) -> None:
        self.sent: dict[tuple[int, Round], int] = {}
        super().__init__(members, parameters, **charter)

    def carry_out(self, place: int, node: Node, effect: Effect) -> None:
        if isinstance(effect, SendBulk) and isinstance(effect.message, Chunk) and effect.message.part is Part.UPLOAD:
            key = place, effect.message.round
            self.sent[key] = self.sent.get(key, 0) + effect.payload.nbytes
        super().carry_out(place, node, effect)


class Quadratic(Changing):
    """Each member steps towards an optimum of its own, as of a quadratic loss."""

    def __init__(self, members: int, rounds: int) -> None:
        draw = np.random.default_rng(7)
        self.optima = draw.uniform(-8, 8, (members, 200)).astype(np.float32)
        super().__init__(members, 200, rounds=rounds, group_size=members)

    def step(self, place: int, round: Round, vector: Vector) -> Vector:
        return vector + np.float32(0.6) * (self.optima[place] - vector)


def checkpoint(node: Node, round: int) -> Checkpoint:
    return next(each for each in node.records if isinstance(each, Checkpoint) and each.round == round + 1)


def outcomes(node: Node) -> list[str]:
    return [record.outcome for record in node.rounds]


def lose(pump: GroupPump, part: Part, round: int, senders: set[int], receivers: set[int]) -> None:
    pump.drop = lambda sender, receiver, message: (
        isinstance(message, Chunk)
        and (message.part, message.round) == (part, round)
        and sender in senders
        and receiver in receivers
    )


def test_members_that_share_a_base_send_half_of_it_and_keep_what_did_not_fit() -> None:
    pump = Changing(8, 1000, rounds=3, group_size=8)
    pump.start()
    pump.run()
    step = Ring(16, 8, CLIP).step
    for place, node in pump.nodes.items():
        assert outcomes(node) == [Outcome.FULL] * 4
        for round in range(3):
            # Seven chunks to their aggregators and the own one to its deputy, with a header each: half of the vector.
            # The result of one eighth goes to seven members: together 0.94 of it.
            assert pump.sent[place, Round(round)] == 8 * HEADER_BYTES + 2 * 1000
        assert pump.sent[place, Round(3)] > 4 * 1000, "models that all end with are whole"
        first = checkpoint(node, 0)
        assert first.update is not None
        own = np.clip(pump.step(place, Round(0), pump.initial), -CLIP, CLIP)
        change = pump.step(place, Round(0), pump.initial)
        np.testing.assert_allclose(change - first.update, own, atol=0.51 * step)
        assert node.rounds[0].clipped == np.count_nonzero(np.abs(change) > CLIP + step / 2)
        assert np.array_equal(first.base, checkpoint(pump.nodes[0], 0).base)


def test_a_change_beyond_the_clip_arrives_in_later_rounds() -> None:
    class Once(Changing):
        def step(self, place: int, round: Round, vector: Vector) -> Vector:
            return vector + np.float32(3 * CLIP + 1 + place if round == 0 else 0)

    pump = Once(4, rounds=5)
    pump.start()
    pump.run()
    for node in pump.nodes.values():
        assert [record.clipped for record in node.rounds[:3]] == [10, 10, 10]
        np.testing.assert_allclose(checkpoint(node, 0).base, CLIP, rtol=1e-3)
        np.testing.assert_allclose(checkpoint(node, 4).base, 3 * CLIP + 2.5, atol=Ring(16, 4, CLIP).step)


@pytest.mark.parametrize("feedback", [True, False])
def test_error_feedback_brings_the_average_far_nearer_to_the_mean_than_a_unit_of_the_words(
    feedback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not feedback:
        monkeypatch.setattr(Ring, "leave_residual", lambda self, values, weight: values.fill(0))
    pump = Quadratic(4, rounds=16)
    pump.start()
    pump.run()
    step = Ring(16, 4, CLIP).step
    models = np.mean([node.adopted[Round(15)] for node in pump.nodes.values()], axis=0)
    error = np.sqrt(np.square(models - pump.optima.mean(axis=0)).mean()) / step
    assert error < 0.02 if feedback else error > 0.1, error


def test_where_bases_differ_whole_models_are_averaged_and_then_changes_again() -> None:
    pump = Changing(4, 100, rounds=3)
    other = np.full(100, 0.5, np.float32)
    pump.nodes[2].machine._base = other
    pump.start()
    pump.run()
    for place, node in pump.nodes.items():
        assert outcomes(node) == [Outcome.FULL] * 4
        assert [pump.sent[place, Round(round)] for round in range(2)] == [4 * 16 + 400, 4 * 16 + 200]
    assert len({checkpoint(node, 0).base.tobytes() for node in pump.nodes.values()}) == 1


def test_one_that_is_late_adds_the_others_change_to_the_same_base_and_keeps_its_update() -> None:
    pump = Changing(4, rounds=3)
    pump.slow = {3}
    pump.start()
    pump.run(until=lambda: bool(pump.nodes[3].rounds))
    assert outcomes(pump.nodes[3]) == [Outcome.LATE]
    assert np.array_equal(checkpoint(pump.nodes[3], 0).base, checkpoint(pump.nodes[0], 0).base)


def test_one_that_is_late_with_another_base_keeps_its_own_until_whole_models_are_averaged() -> None:
    pump = Changing(4, rounds=3)
    other = pump.nodes[3].machine._base = np.full(10, 0.5, np.float32)
    pump.slow = {3}
    pump.start()
    pump.run(until=lambda: bool(pump.nodes[3].rounds))
    assert outcomes(pump.nodes[3]) == [Outcome.SKIP]
    assert np.array_equal(checkpoint(pump.nodes[3], 0).base, other)


def test_a_lost_chunk_costs_only_its_part_of_base_and_update() -> None:
    pump = Changing(4, 40, rounds=1)
    whole = Changing(4, 40, rounds=1)
    whole.start()
    whole.run()
    pump.drop = lambda sender, receiver, message: (
        (isinstance(message, Chunk) and message.part is Part.RESULT and message.chunk == 1)
        or (
            isinstance(message, Told)
            and isinstance(message.statement.content, Result)
            and message.statement.content.chunk == 1
        )
    )
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()))
    node = pump.nodes[0]
    assert node.rounds[0].outcome == Outcome.PARTIAL
    kept, right = checkpoint(node, 0), checkpoint(whole.nodes[0], 0)
    assert kept.update is not None
    assert right.update is not None
    lost = slice(10, 20)
    assert np.array_equal(kept.base[lost], pump.initial[lost])
    assert not kept.update[lost].any()
    for mine, full in ((kept.base, right.base), (kept.update, right.update)):
        assert np.array_equal(np.delete(mine, lost), np.delete(full, lost))


def test_of_an_upload_that_nobody_summed_nothing_is_kept() -> None:
    pump = Changing(4, rounds=1)
    lose(pump, Part.UPLOAD, 0, {2}, {0, 1, 3})
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()))
    assert outcomes(pump.nodes[2]) == [Outcome.LATE]
    assert checkpoint(pump.nodes[2], 0).update is None


def test_an_enrolment_that_names_another_base_than_the_adverts_begins_nothing() -> None:
    class Lying(Changing):
        def transmit(self, sender: int, receiver: int, message: Message, payload: Vector | None) -> None:
            if isinstance(message, Told) and isinstance(message.statement.content, Enrolment):
                body = encode_body(replace(message.statement.content, base=b""))
                signer = message.statement.signer
                told = decode_statement(signer, body, FastKeyring(signer).sign(body))
                message = replace(message, statement=told)
            super().transmit(sender, receiver, message, payload)

    pump = Lying(4, rounds=1)
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()))
    assert [outcomes(node)[0] for node in pump.nodes.values()] == [Outcome.SKIP] * 4


@pytest.mark.parametrize("tampered", [None, "base", "change"])
def test_an_average_to_catch_up_with_is_a_base_and_the_change_from_it_both_proved(tampered: str | None) -> None:
    pump = Changing(4, 100, rounds=2)
    pump.start()
    pump.run(until=lambda: len(pump.nodes[0].rounds) == 2)
    machine = pump.nodes[0].machine
    past = machine._past[Round(1)]
    released = verified_release(
        machine._plan.all_terms(Round(1)), FastKeyring(1), past.proof(), machine._masks_of(Round(1))
    )
    data = np.frombuffer(past.released(), np.uint8).copy()
    assert len(data) == released.format.length == 6 * 100 + 4 * HEADER_BYTES
    if tampered is not None:
        data[{"base": 17, "change": -1}[tampered]] ^= 1
    opened = released.open(data)
    if tampered is not None:
        assert opened is None
        return
    assert opened is not None
    assert np.array_equal(opened, checkpoint(pump.nodes[0], 1).base)


def test_a_peer_that_comes_back_takes_part_with_the_base_that_it_was_shown() -> None:
    pump = Changing(5, rounds=8, group_size=5)
    pump.start()
    pump.run(until=lambda: bool(pump.nodes[4].rounds))
    for other in range(4):
        pump.part(4, other)
    pump.run(until=lambda: len(pump.nodes[0].rounds) >= 5)
    for other in range(4):
        pump.join(4, other)
    pump.run()
    notes = [getattr(event, "text", "") for event in pump.nodes[4].events]
    assert any("caught up with the average" in text for text in notes), notes
    assert outcomes(pump.nodes[4])[-1] == Outcome.FULL
    assert len({node.adopted[max(node.adopted)].tobytes() for node in pump.nodes.values()}) == 1


@pytest.mark.parametrize(
    ("seed", "peers", "group", "topology"), [(0, 8, 8, "groups"), (1, 8, 4, "groups"), (2, 9, 4, "torus")]
)
def test_changes_get_through_drawn_faults(seed: int, peers: int, group: int, topology: str) -> None:
    case = Case(seed, bits=16, masked=True, weighted=True, peers=peers, group=group, topology=topology)
    assert run_case(case) == ""
