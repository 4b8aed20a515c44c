"""Rounds with noise: how much of it is in what members adopt, that nothing goes around it, where the budget ends."""

import math

import numpy as np
import pytest

from p2pfl.core.charter import PrivacyTerms
from p2pfl.core.errors import OutOfTurn
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Checkpoint, Uploading
from p2pfl.core.machine import Vector
from p2pfl.core.privacy import Noise, rho_of
from p2pfl.core.trace import Note
from p2pfl.core.wire import Chunk, Message, Part
from p2pfl.crypto.ring import WEIGHT_ONE, Metrics
from p2pfl.crypto.suite import suite
from p2pfl.gossip.grouping import noise_of, privacy_faults
from p2pfl.gossip.secure_sum import MaskTerms, Secrets, masked_chunk
from p2pfl.gossip.session import Outcome
from tests.gossip.test_audit import LIAR, LIES, Audited
from tests.group_pump import GroupPump, Node
from tests.pump import charter_for

SIZE = 4000
NOISE = 2.0


class Noisy(GroupPump):
    masked = True
    privacy = PrivacyTerms(noise=NOISE, epsilon=50.0)

    def __init__(self, members: int = 4, **charter: object) -> None:
        super().__init__(members, SIZE, **charter)

    def step(self, place: int, round: Round, vector: Vector) -> Vector:
        direction = np.zeros(SIZE, np.float32)
        direction[place] = 100.0 if place == 0 else 0.5
        return vector + direction


def uploads(node: Node) -> list[Uploading]:
    return [record for record in node.records if isinstance(record, Uploading)]


def test_an_average_is_of_bounded_updates_and_noise_of_the_stated_size() -> None:
    pump = Noisy(rounds=1)
    pump.start()
    pump.run()
    adopted = pump.nodes[0].adopted[Round(0)]
    assert all(np.array_equal(node.adopted[Round(0)], adopted) for node in pump.nodes.values())
    noise = noise_of(pump.charter)
    assert noise == Noise(clip=1.0, multiplier=NOISE, honest=2)  # of three survivors one may collude
    deviation = noise.deviation / math.sqrt(4)  # four members' noise, in their average
    assert adopted[4:].std() == pytest.approx(deviation, rel=0.05)
    assert abs(adopted[4:].mean()) < 5 * deviation / math.sqrt(SIZE)
    assert abs(adopted[0]) < 1 / 4 + 6 * deviation, "an update of norm 100 counts as one of norm 1"
    for node in pump.nodes.values():
        record = node.rounds[0]
        assert (record.outcome, record.audit) == (Outcome.FULL, "passed")
        assert (record.group_loss, record.group_steps, record.distance) == (None, None, None)
        assert record.loss == 0.5, "one's own, in one's own trace"


def test_what_a_round_may_tell_is_kept_before_the_first_chunk_leaves() -> None:
    class Ordered(Noisy):
        def transmit(self, sender: int, receiver: int, message: Message, payload: Vector | None) -> None:
            if isinstance(message, Chunk) and message.part is Part.UPLOAD and message.round < 2:
                kept = [record.round for record in uploads(self.nodes[sender])]
                assert message.round in kept, "it left before it was paid for"
            super().transmit(sender, receiver, message, payload)

    pump = Ordered(rounds=2)
    pump.start()
    pump.run()
    for node in pump.nodes.values():
        costs = [(record.round, record.rho) for record in uploads(node)]
        assert costs == [(0, rho_of(NOISE)), (1, rho_of(NOISE)), (2, 0.0)], "the last sums what was released before"


def test_noise_is_drawn_anew_each_round_and_by_each_member() -> None:
    pump = Noisy(rounds=2)
    pump.step = lambda place, round, vector: vector.copy()  # type: ignore[method-assign]
    pump.start()
    pump.run()
    first, second = (pump.nodes[0].adopted[Round(number)] for number in range(2))
    change = second - first
    assert abs(np.corrcoef(first, change)[0, 1]) < 0.1
    assert change.std() == pytest.approx(first.std(), rel=0.1)


def test_all_members_end_training_with_the_budget_and_say_so() -> None:
    class Short(Noisy):
        privacy = PrivacyTerms(noise=NOISE, epsilon=4.5)

    pump = Short(rounds=50)
    budget = pump.charter.budget
    assert budget is not None
    assert 1 < budget.rounds < 10
    pump.start()
    pump.run()
    bears = f"the privacy budget bears {budget.rounds} rounds of the 50 that training.rounds says: training ends here"
    for node in pump.nodes.values():
        assert node.error is None
        told = [event.text for event in node.events if isinstance(event, Note)]
        assert told == [bears]
        spent = sum(record.rho for record in uploads(node))
        assert spent == pytest.approx(budget.rounds * budget.rho, rel=1e-12)
        assert budget.spent(spent) <= 4.5
        trained = [record for record in node.rounds if not record.settling]
        assert len(trained) == budget.rounds
    models = [max(node.adopted.items())[1] for node in pump.nodes.values()]
    assert all(np.array_equal(model, models[0]) for model in models)


def test_a_member_that_was_killed_after_its_upload_pays_and_uploads_that_round_no_more() -> None:
    pump = Noisy(rounds=3)
    pump.start()
    pump.run(until=lambda: len(uploads(pump.nodes[2])) == 2)
    known = pump.nodes[2].resume()
    pump.kill(2)
    pump.restart(2, known)
    pump.run()
    rounds = [record.round for record in uploads(pump.nodes[2])]
    assert len(rounds) == len(set(rounds)), "one upload a round, over both lives"
    assert [record.rho for record in uploads(pump.nodes[2]) if record.round < 3] == [rho_of(NOISE)] * len(
        [number for number in rounds if number < 3]
    )


def test_changes_in_16_bits_leave_no_residual_by_which_noise_would_be_taken_back() -> None:
    class Changes(Noisy):
        change_clip = 2.0
        privacy = PrivacyTerms(noise=0.5, epsilon=100.0)

    pump = Changes(rounds=2)
    pump.start()
    pump.run()
    for node in pump.nodes.values():
        assert node.rounds[0].outcome == Outcome.FULL
        kept = [record for record in node.records if isinstance(record, Checkpoint)]
        assert [record.update for record in kept] == [None] * len(kept)
    change = pump.nodes[0].adopted[Round(1)] - pump.nodes[0].adopted[Round(0)]
    assert change[4:].std() == pytest.approx(0.5 / math.sqrt(2) / math.sqrt(4), rel=0.05)


def test_fewer_survivors_than_the_noise_is_measured_by_release_nothing() -> None:
    class Many(Noisy):
        privacy = PrivacyTerms(noise=NOISE, epsilon=50.0, survivors=4)

    pump = Many(rounds=1)
    assert noise_of(pump.charter) == Noise(clip=1.0, multiplier=NOISE, honest=3)
    pump.start()
    pump.run(until=lambda: bool(uploads(pump.nodes[1])))
    pump.kill(3)
    pump.run(until=lambda: pump.now > 500)
    for place in range(3):
        assert pump.nodes[place].rounds[0].outcome == Outcome.VOID


def test_noise_is_used_for_one_vector_only() -> None:
    terms = MaskTerms(suite("aes"), 32, 8.0, np.random.default_rng(1).bytes, noise=Noise(1.0, 1.0, 2))
    secrets = begun(terms)
    base = np.zeros(50, np.float32)
    first = secrets.hidden(base + 0.1, WEIGHT_ONE, Metrics(0.7, 3), 3, base=base)
    assert first.metrics == Metrics(), "a mean loss would be told without noise"
    masked_chunk(first, 0)
    with pytest.raises(OutOfTurn, match="noise for a second vector"):
        secrets.hidden(base + 0.2, WEIGHT_ONE, Metrics(), 3, base=base)
    with pytest.raises(OutOfTurn, match="without a base"):
        begun(terms).hidden(base, WEIGHT_ONE, Metrics(), 3)


def begun(terms: MaskTerms) -> Secrets:
    roster = [PeerId(name) for name in "abc"]
    members = [Secrets(terms, roster, place, Round(0), b"context") for place in range(3)]
    adverts = {place: each.advert() for place, each in enumerate(members)}
    members[0].begin(bytes(32), (0, 1, 2), adverts)
    return members[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"survivors": 9}, "privacy.survivors is 9, and there are groups or stars of 4"),
        ({"bits": 16, "change_clip": 0.5}, "words of 16 bits are too coarse for updates of norm 0.001"),
        ({"clip": 1e9}, "words of 32 bits are too coarse"),
    ],
)
def test_a_charter_whose_words_have_no_room_for_noise_is_refused(changes: dict[str, object], told: str) -> None:
    made = charter_for(8, SIZE, topology="groups")
    survivors = changes.pop("survivors", None)
    made = made.model_copy(
        update={
            "averaging": made.averaging.model_copy(update={"group_size": 4, **changes}),
            "training": made.training.model_copy(update={"clip_norm": 0.001 if changes else 1.0}),
            "privacy": PrivacyTerms(noise=1.0, epsilon=50.0, survivors=survivors),  # type: ignore[arg-type]
        }
    )
    faults = privacy_faults(made)
    assert len(faults) == bool(told)
    assert all(told in fault for fault in faults)


# Lies


class Lied(Audited):
    privacy = PrivacyTerms(noise=NOISE, epsilon=50.0)


@pytest.mark.parametrize("covers", [False, True])
@pytest.mark.parametrize("how", LIES)
def test_a_falsified_sum_with_noise_is_refuted_and_its_deputy_s_adopted(how: str, covers: bool) -> None:
    pump = Lied(4, SIZE, rounds=1, lies={LIAR: LIES[how]})
    pump.covers = covers
    pump.finish_round()
    honest = [place for place in range(4) if place != LIAR]
    first = pump.nodes[honest[0]].adopted[Round(0)]
    noise = noise_of(pump.charter)
    assert noise is not None
    for place in honest:
        assert pump.notes(place), "noise hides no lie"
        np.testing.assert_array_equal(pump.nodes[place].adopted[Round(0)], first)
        assert [record.rho for record in uploads(pump.nodes[place])] == [noise.rho], "and nothing is uploaded again"
    bound = 1.0 + 8 * noise.deviation / math.sqrt(4) * math.sqrt(SIZE)
    assert float(np.linalg.norm(first - pump.initial)) < bound
