"""Members that weigh by their samples, and what sums tell of training: the same with masks and without."""

import struct
from dataclasses import replace

import numpy as np
import pytest

from p2pfl.core.charter import AveragingTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round
from p2pfl.core.machine import BulkOffered, Compute, Disconnect, Effect, SendBulk, Vector
from p2pfl.core.wire import Chunk, Message, Part, Update, encode_header
from p2pfl.crypto.ring import MOST_LOSS, WEIGHT_ONE, Metrics, header_of, read_header
from p2pfl.gossip.chunks import digest
from p2pfl.gossip.grouping import weight_for
from p2pfl.gossip.session import Outcome
from tests.gossip.test_group_machine import mean
from tests.group_pump import GroupPump, Node
from tests.pump import Pump, charter_for

SAMPLES = (100, 10, 75, 60)
ALPHAS = (1.0, 0.5, 0.75, 0.6)
LOSSES = (0.7123, 1.9371, 0.30717, 2.11513)


class Weighted(GroupPump):
    samples = SAMPLES

    def report(self, place: int) -> tuple[float, int]:
        return LOSSES[place], 3 + place


@pytest.fixture(params=["plain", "masked"])
def masked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(GroupPump, "masked", request.param == "masked")
    return bool(request.param == "masked")


def weighted(values: list[float] | tuple[float, ...]) -> float:
    return sum(alpha * value for alpha, value in zip(ALPHAS, values, strict=True)) / sum(ALPHAS)


@pytest.mark.usefixtures("masked")
def test_a_group_adopts_the_mean_by_samples_and_learns_how_training_went_together() -> None:
    pump = Weighted(4, rounds=1)
    pump.start()
    pump.run()
    contributions = [pump.step(place, Round(0), pump.initial) for place in range(4)]
    expected = np.average(np.stack(contributions), axis=0, weights=ALPHAS)
    for place, node in pump.nodes.items():
        record = node.rounds[0]
        assert record.outcome == Outcome.FULL
        np.testing.assert_allclose(node.adopted[Round(0)], expected, rtol=1e-4)
        assert record.weight == pytest.approx(sum(ALPHAS), abs=2e-5)
        assert record.group_loss == pytest.approx(weighted(LOSSES), rel=1e-4)
        assert record.group_steps == pytest.approx(weighted((3, 4, 5, 6)), rel=1e-3)
        assert (record.loss, record.steps) == (LOSSES[place], 3 + place)
        own = contributions[place].astype(np.float64) - node.adopted[Round(0)]
        assert record.distance == pytest.approx(np.sqrt(np.square(own).mean()), rel=1e-4)
        settled = node.rounds[1]
        assert (settled.group_loss, settled.group_steps) == (None, None), "nobody trained"
        assert settled.distance == pytest.approx(0, abs=1e-5)


def forms(value: float) -> list[bytes]:
    """How a number may be written."""
    return [struct.pack(form, value) for form in ("<d", ">d", "<f", ">f")]


def test_under_masks_no_member_s_loss_is_in_any_message(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    class Heard(Weighted):
        masked = True

        def transmit(self, sender: int, receiver: int, message: Message, payload: Vector | None) -> None:
            sent.append(encode_header(message) + (b"" if payload is None else payload.tobytes()))
            super().transmit(sender, receiver, message, payload)

    pump = Heard(4, rounds=2)
    pump.start()
    pump.run()
    everything = b"".join(sent)
    assert len(everything) > 10_000
    for place, loss in enumerate(LOSSES):
        weight = round(ALPHAS[place] * WEIGHT_ONE)
        word = header_of(weight, Metrics(loss, 3 + place), 4)[8:12]
        alone = header_of(WEIGHT_ONE, Metrics(loss, 3 + place), 4)[8:12]
        for form in (*forms(loss), *forms(loss * ALPHAS[place]), word, alone):
            assert form not in everything
        assert f"{loss}".encode() not in everything


class Forging(GroupPump):
    """The second member signs and sends another result of its chunk than the sum it made."""

    wrong = staticmethod(lambda result: result)

    def carry_out(self, place: int, node: Node, effect: Effect) -> None:
        if place == 1 and isinstance(effect, Compute) and effect.key.endswith("/reduce/1"):
            result, _ = effect.work()  # type: ignore[misc]
            forged = type(self).wrong(result.copy())
            effect = replace(effect, work=lambda: (forged, digest(forged)))
        super().carry_out(place, node, effect)


def word(number: int, value: int) -> staticmethod:  # type: ignore[type-arg]
    def forge(result: Vector) -> Vector:
        words = result.view("<u4")
        words[number] = value
        return result

    return staticmethod(forge)


MASKED_LIES = {
    "canary": word(1, 3 + (3 << 16)),
    "weight": word(0, 5 * WEIGHT_ONE),
    "no-weight": word(0, 3 * WEIGHT_ONE),
    "beyond": word(4, 2**31 - 1),
}


@pytest.mark.parametrize("how", MASKED_LIES)
def test_a_result_that_cannot_be_one_counts_as_not_received_and_the_deputy_s_does(how: str) -> None:
    pump = type("Forged", (Forging,), {"masked": True, "wrong": MASKED_LIES[how]})(4, rounds=1)
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()), limit=1000)
    for place in (0, 2, 3):
        assert pump.nodes[place].rounds[0].outcome == Outcome.FULL
        np.testing.assert_allclose(
            pump.nodes[place].adopted[Round(0)], mean(pump, (0, 1, 2, 3), pump.initial), rtol=1e-4
        )


def test_in_the_clear_a_result_of_nonsense_is_replaced_too() -> None:
    pump = type("Forged", (Forging,), {"wrong": word(5, 0x7FC00000)})(4, rounds=1)
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()), limit=1000)
    for place in (0, 2, 3):
        assert pump.nodes[place].rounds[0].outcome == Outcome.FULL


def test_results_under_masks_are_the_integer_sums_themselves() -> None:
    results: dict[int, bytes] = {}

    class Results(Weighted):
        masked = True

        def carry_out(self, place: int, node: Node, effect: Effect) -> None:
            message = effect.message if isinstance(effect, SendBulk) else None
            if isinstance(message, Chunk) and message.part is Part.RESULT and message.round == 0:
                results[message.chunk] = effect.payload.tobytes()  # type: ignore[union-attr]
            super().carry_out(place, node, effect)

    pump = Results(4, parameters=10, rounds=1)
    pump.start()
    pump.run()
    assert sorted(results) == [0, 1, 2, 3]
    totals = {read_header(result, 4, 4) for result in results.values()}
    assert len(totals) == 1, "every chunk says the same of the whole"
    assert totals.pop().weight == sum(round(alpha * WEIGHT_ONE) for alpha in ALPHAS)
    # 2^16 is the pump's clip; a float32 holds the product, so each word is rounded once.
    largest = (2**31 - 1) // 4 >> 5 << 5
    words = np.concatenate([np.frombuffer(result, "<i4", offset=16) for result in (results[i] for i in range(4))])
    exact = np.zeros(10, np.int64)
    for place, alpha in enumerate(ALPHAS):
        weight = round(alpha * WEIGHT_ONE)
        factor = np.float32(weight * largest / (WEIGHT_ONE * 2.0**16))
        if float(factor) > weight * largest / (WEIGHT_ONE * 2.0**16):
            factor = np.nextafter(factor, np.float32(0))
        exact += np.rint(pump.step(place, Round(0), pump.initial) * factor).astype(np.int64)
    assert words.tolist() == exact.tolist()


def test_a_member_with_more_samples_than_the_charter_knows_is_told_so_in_one_line() -> None:
    terms = AveragingTerms(weights="samples", samples_max=100, alpha_min=0.25)
    assert [weight_for(terms, samples) for samples in (100, 50, 25, 0)] == [65536, 32768, 16384, 16384]
    assert weight_for(AveragingTerms(), 10**9) == WEIGHT_ONE
    with pytest.raises(InvalidConfig, match=r"trains on 101 samples, and averaging\.samples_max in the charter is 100"):
        weight_for(terms, 101)


# The header's own words


@pytest.mark.parametrize("members", [3, 8, 64])
def test_metrics_in_a_sum_are_the_weighted_mean(members: int) -> None:
    weights = [WEIGHT_ONE, WEIGHT_ONE // 2, WEIGHT_ONE // 3]
    told = [Metrics(0.25, 10), Metrics(-3.0, 20), Metrics(1e9, 2)]
    total = sum(np.frombuffer(header_of(*each, members), "<u4") for each in zip(weights, told, strict=True))
    totals = read_header(np.asarray(total, "<u4").tobytes(), 3, members)
    alphas = np.array(weights) / WEIGHT_ONE
    unit = 3 * MOST_LOSS * members / 2**31
    assert totals.loss == pytest.approx(np.average([0.25, -3.0, MOST_LOSS], weights=alphas), abs=unit)
    assert totals.steps == pytest.approx(np.average([10, 20, 2], weights=alphas), abs=0.05)
    one_is_silent = total - np.frombuffer(header_of(weights[1], told[1], members), "<u4")
    one_is_silent += np.frombuffer(header_of(weights[1], Metrics(), members), "<u4")
    silent = read_header(np.asarray(one_is_silent, "<u4").tobytes(), 3, members)
    assert (silent.loss, silent.steps, silent.weight) == (None, None, sum(weights))


# On a fixed overlay


@pytest.mark.parametrize("topology", ["ring", "complete", "random-regular"])
def test_neighbors_settle_on_the_mean_by_samples(topology: str) -> None:
    charter = charter_for(6, 3, rounds=0, topology=topology, tolerance=1e-12)
    averaging = charter.averaging.model_copy(update={"weights": "samples", "samples_max": 8, "alpha_min": 0.125})
    charter = charter.model_copy(update={"averaging": averaging})
    roster = charter.roster()
    samples = {peer: (8, 1, 4, 2, 6, 3)[place] for place, peer in enumerate(roster)}
    starts = {peer: np.array([place, place**2, 1.0], np.float32) for place, peer in enumerate(roster)}
    pump = Pump(charter, starts, lambda peer, round, vector: vector, samples=samples)
    pump.start()
    pump.run()
    expected = np.average(np.stack(list(starts.values())), axis=0, weights=list(samples.values()))
    for node in pump.nodes.values():
        np.testing.assert_allclose(node.adopted[-1], expected, rtol=1e-4)


def test_a_neighbor_that_weighs_less_than_the_charter_allows_is_dropped() -> None:
    charter = charter_for(3, 4)
    pump = Pump(charter, np.zeros(4, np.float32), lambda peer, round, vector: vector)
    pump.start()
    me, other = charter.roster()[:2]
    light = Update(charter.hash(), Round(0), 16, 0.0, False, WEIGHT_ONE - 1)
    (dropped,) = [each for each in pump.feed(me, BulkOffered(other, light)) if isinstance(each, Disconnect)]
    assert "weighs less" in dropped.error.reason
