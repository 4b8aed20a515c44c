"""The check of masked sums: who falsifies one alone is found out, and who lies of its product harms no model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Resume
from p2pfl.core.machine import Bytes, Compute, Effect, Send, SendBulk
from p2pfl.core.statements import (
    Challenge,
    Products,
    Result,
    SecondChallenge,
    SecondProducts,
    decode_statement,
    encode_body,
)
from p2pfl.core.trace import Note
from p2pfl.core.wire import Chunk, Message, Part, Told
from p2pfl.crypto.masks import Mask, MaskedVector, pair_masks
from p2pfl.crypto.products import PRODUCT_BYTES, add_up, products, words_of
from p2pfl.crypto.ring import WEIGHT_ONE, Layout, Ring
from p2pfl.crypto.suite import suite
from p2pfl.gossip.audit import Own, Verdict, Vouched, multiply, verdict_of
from p2pfl.gossip.chunks import digest
from p2pfl.gossip.group_machine import GroupMachine
from p2pfl.gossip.secure_sum import MaskTerms, masked_chunk, sum_chunk
from p2pfl.gossip.session import Outcome
from tests.gossip.test_group_machine import chain, die_at, mean, says
from tests.group_pump import FastKeyring, GroupPump, Node

LIAR, DEPUTY, OTHER = 1, 2, 3
Lie = Callable[[Bytes], Bytes]


def added(number: int, value: int) -> Lie:
    def lie(result: Bytes) -> Bytes:
        result.view("<u4")[number] += np.uint32(value)
        return result

    return lie


def swapped(result: Bytes) -> Bytes:
    words = result.view("<u4")
    words[[4, 5]] = words[[5, 4]]
    return result


def zeroed(result: Bytes) -> Bytes:
    result[16:] = 0
    return result


LIES = {"one": added(4, 1), "2^30": added(5, 2**30), "swapped": swapped, "zeros": zeroed}


class Audited(GroupPump):
    """The aggregator of chunk 1 signs what `lies` says of its place; see the flags."""

    masked = True
    suite_name = "aes"
    audit = True
    summed = "/reduce/1"
    covers = False
    covered = "/multiply/0/1"
    """Whether the liar puts right in its own product what it falsified."""
    slanders: frozenset[int] = frozenset()
    """Whose own products are wrong."""

    def __init__(self, *arguments: Any, lies: dict[int, Lie] | None = None, **options: Any) -> None:
        self.lies = lies or {}
        self.errors: dict[int, Bytes] = {}
        super().__init__(*arguments, **options)

    def build(self, place: int, known: Resume | None) -> GroupMachine:
        machine = super().build(place, known)
        machine._masks = replace(machine._masks, suite=suite(self.suite_name), audit=self.audit)  # type: ignore[type-var]
        return machine

    def carry_out(self, place: int, node: Node, effect: Effect) -> None:
        if isinstance(effect, Compute) and effect.key.endswith(self.summed) and place in self.lies:
            right, _ = effect.work()  # type: ignore[misc]
            wrong = self.lies[place](right.copy())
            self.errors[place] = (wrong.view("<u4") - right.view("<u4")).view(np.uint8)
            effect = replace(effect, work=lambda: (wrong, digest(wrong)))
        if isinstance(effect, Compute) and "/multiply/" in effect.key:
            effect = replace(effect, work=partial(self.told, place, effect))
        super().carry_out(place, node, effect)

    def told(self, place: int, effect: Compute) -> tuple[bytes, bytes, bytes]:
        own, vouched, result = effect.work()  # type: ignore[misc]
        own = own or bytes(PRODUCT_BYTES)
        if place in self.slanders:
            own = add_up(32, [own, bytes(16) + b"\1" + bytes(63)])
        if self.covers and place in self.errors and effect.key.endswith(self.covered):
            cipher, layout, chunk, key, *_ = effect.work.args  # type: ignore[attr-defined]
            own = add_up(32, [own, *products(cipher, layout, chunk, key, [words_of(self.errors[place])])])
        return own, vouched, result

    def finish_round(self) -> None:
        self.start()
        self.run(until=lambda: all(node.rounds or not node.alive for node in self.nodes.values()), limit=2000)

    def notes(self, place: int) -> list[str]:
        return [event.text for event in self.nodes[place].events if isinstance(event, Note) and "refuted" in event.text]

    def is_right(self, place: int, contributors: tuple[int, ...] = (0, 1, 2, 3)) -> bool:
        expected = mean(self, contributors, self.initial)
        return np.allclose(self.nodes[place].adopted[Round(0)], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["aes", "sm4"])
def test_honest_sums_pass(name: str) -> None:
    pump = type("Suite", (Audited,), {"suite_name": name})(4, rounds=2)
    pump.start()
    pump.run()
    for place, node in pump.nodes.items():
        assert [record.audit for record in node.rounds] == ["passed", "passed", ""], "the last rounds have no masks"
        assert [record.outcome for record in node.rounds] == [Outcome.FULL] * 3
        assert not pump.notes(place)


@pytest.mark.parametrize("covers", [False, True])
@pytest.mark.parametrize("how", LIES)
def test_a_falsified_sum_is_refuted_and_its_deputy_s_adopted(how: str, covers: bool) -> None:
    """Also where the liar's own product is made to fit: its deputy's word on the liar's upload counts."""
    pump = Audited(4, rounds=1, lies={LIAR: LIES[how]})
    pump.covers = covers
    pump.finish_round()
    for place in (0, 2, 3):
        record = pump.nodes[place].rounds[0]
        assert (record.outcome, record.audit) == (Outcome.FULL, "refuted, passed")
        assert pump.is_right(place)
        assert pump.notes(place) == [
            "round 0: the sum of chunk 1 that m1 signed was refuted: the survivors' products contradict it"
        ]


@pytest.mark.parametrize("kind", [Challenge, Products])
def test_a_liar_does_not_escape_by_silence(kind: type) -> None:
    pump = Audited(4, rounds=1, lies={LIAR: added(4, 77)})
    chain(pump, lambda s, r, m: says(m, kind) and s == LIAR and m.statement.signer == LIAR)
    pump.finish_round()
    for place in (0, 2, 3):
        record = pump.nodes[place].rounds[0]
        assert record.audit.startswith("refuted")
        # Its product is missing where its deputy's result is checked, and nothing unchecked replaces what is refuted.
        assert record.outcome == (Outcome.FULL if kind is Challenge else Outcome.PARTIAL)
        wrong = pump.nodes[place].adopted[Round(0)] - mean(pump, (0, 1, 2, 3), pump.initial)
        assert np.abs(np.delete(wrong, range(2, 5))).max() < 1e-2


def test_a_liar_that_shows_one_member_the_truth_is_refuted_all_the_same() -> None:
    """Else their challenges would differ, and nobody could check anything.

    It proves its guilt itself; so its deputy's result counts, though the liar, found out, says no more.
    """
    pump = Audited(4, rounds=1)
    liar = FastKeyring(LIAR)
    carry_out = pump.carry_out

    def two_faced(place: int, node: Node, effect: Effect) -> None:
        message = effect.message if isinstance(effect, Send) else None
        if place == LIAR and isinstance(message, Told) and isinstance(message.statement.content, Result):
            content = message.statement.content
            if content.chunk == 1 and content.round == 0 and effect.peer == pump.roster[OTHER]:
                body = encode_body(replace(content, digest=bytes(32)))
                effect = replace(effect, message=replace(message, statement=decode_statement(1, body, liar.sign(body))))
        carry_out(place, node, effect)

    pump.carry_out = two_faced  # type: ignore[method-assign]
    pump.finish_round()
    for place in (0, 2, 3):
        assert pump.is_right(place)
        assert (pump.nodes[place].rounds[0].outcome, pump.nodes[place].rounds[0].audit) == (
            Outcome.FULL,
            "refuted, incomplete",
        )
        assert "it signed another, too" in pump.notes(place)[0]


@pytest.mark.parametrize("place", range(4))
def test_a_wrong_product_costs_a_repetition_and_no_chunk(place: int) -> None:
    pump = Audited(4, rounds=1)
    pump.slanders = frozenset({place})
    pump.finish_round()
    for node_place, node in pump.nodes.items():
        assert node.rounds[0].outcome == Outcome.FULL
        assert node.rounds[0].audit == "refuted, agreed"
        assert pump.is_right(node_place)
        assert len(pump.notes(node_place)) == 3, "of its own chunk its deputy's word counts"
        assert all("its deputy made the same" in note for note in pump.notes(node_place))


def test_a_deputy_cannot_slander_a_sum_to_put_its_own_in_its_place() -> None:
    pump = Audited(4, rounds=1, lies={DEPUTY: added(4, 12345)})
    pump.slanders, pump.covers, pump.covered = frozenset({DEPUTY}), True, "/multiply/1/1"
    pump.finish_round()
    for place in (0, 1, 3):
        record = pump.nodes[place].rounds[0]
        assert (record.outcome, record.audit) == (Outcome.PARTIAL, "refuted, lost")
        wrong = pump.nodes[place].adopted[Round(0)] - mean(pump, (0, 1, 2, 3), pump.initial)
        assert np.abs(np.delete(wrong, range(2, 5))).max() < 1e-2, "only that chunk is lost"


@pytest.mark.parametrize("place", range(4))
def test_one_that_dies_before_its_product_leaves_the_sums_unchecked_and_valid(place: int) -> None:
    pump = Audited(4, rounds=1)
    die_at(pump, place, Products)
    pump.finish_round()
    for living, node in pump.nodes.items():
        if node.alive:
            assert (node.rounds[0].outcome, node.rounds[0].audit) == (Outcome.FULL, "incomplete")
            assert pump.is_right(living)


def test_with_a_member_that_dropped_before_the_others_sums_are_checked() -> None:
    pump = Audited(4, rounds=1, lies={LIAR: added(4, 1)})
    pump.slow = {3}
    pump.start()
    pump.run(until=lambda: all(pump.nodes[place].rounds for place in (0, 2)), limit=2000)
    for place in (0, 2):
        assert pump.nodes[place].rounds[0].audit.startswith("refuted")
        assert pump.is_right(place, (0, 1, 2))


@pytest.mark.parametrize("change_clip", [None, 64.0])
@pytest.mark.parametrize("covers", [False, True])
def test_lies_about_changes_and_weighted_models_are_found(change_clip: float | None, covers: bool) -> None:
    class Weighted(Audited):
        samples = (10, 20, 30, 40)

    Weighted.change_clip = change_clip
    pumps = [Weighted(4, 40, rounds=1, lies=lies) for lies in ({}, {LIAR: added(4, 1)})]
    for pump in pumps:
        pump.covers = covers
        pump.finish_round()
    honest, lied_to = (pump.nodes[0].adopted[Round(0)] for pump in pumps)
    assert honest.tobytes() == lied_to.tobytes()
    assert [pump.nodes[0].rounds[0].audit for pump in pumps] == ["passed", "refuted, passed"]
    assert {pump.nodes[place].rounds[0].outcome for pump in pumps for place in pump.nodes} == {Outcome.FULL}


def is_result(message: Message) -> bool:
    return says(message, Result) or (isinstance(message, Chunk) and message.part is Part.RESULT)


def test_a_deputy_that_takes_over_and_falsifies_costs_no_more_than_the_chunk() -> None:
    """Its aggregator's result reaches nobody before the deputy's does."""
    pump = Audited(4, rounds=1, lies={DEPUTY: added(4, 1)})
    challenged = set()

    def drop(sender: int, receiver: int, message: Message) -> bool:
        if says(message, Challenge):
            challenged.add(sender)
        return sender == LIAR and is_result(message) and len(challenged) < 4

    pump.drop = drop
    pump.finish_round()
    for place in (0, 1, 3):
        record = pump.nodes[place].rounds[0]
        assert (record.outcome, record.audit) == (Outcome.PARTIAL, "refuted, lost")
        wrong = pump.nodes[place].adopted[Round(0)] - mean(pump, (0, 1, 2, 3), pump.initial)
        assert np.abs(np.delete(wrong, range(2, 5))).max() < 1e-2


def test_members_that_have_one_result_from_its_aggregator_or_its_deputy_check_it_together() -> None:
    """The aggregator's word comes when its deputy has summed, and to one member before the deputy's."""
    pump = Audited(4, rounds=1)
    by_deputy: dict[int, int] = {}
    summed: set[int] = set()

    def drop(sender: int, receiver: int, message: Message) -> bool:
        told = message.statement if isinstance(message, Told) else None
        if told is not None and isinstance(told.content, Challenge) and told.content.round == 0:
            by_deputy[told.signer] = told.content.by_deputy
        if told is not None and isinstance(told.content, Result) and told.content.chunk == 1:
            summed.add(told.signer)
            first = LIAR if receiver == OTHER and DEPUTY in summed else DEPUTY
            return told.signer != first and len(by_deputy) < 4
        return sender == LIAR and isinstance(message, Chunk) and message.part is Part.RESULT and DEPUTY not in summed

    pump.drop = drop
    pump.finish_round()
    assert {by_deputy[place] for place in (0, OTHER)} == {0, 2}
    for place, node in pump.nodes.items():
        assert (node.rounds[0].outcome, node.rounds[0].audit) == (Outcome.FULL, "passed")
        assert pump.is_right(place)
        assert not pump.notes(place)


@pytest.mark.parametrize("also_mute", [(), (OTHER,)])
def test_a_deputy_that_contradicts_its_aggregator_has_nothing_adopted(also_mute: tuple[int, ...]) -> None:
    """Not even where the check of what it signed instead cannot be completed."""
    pump = Audited(4, rounds=1)
    liar, signed = FastKeyring(DEPUTY), []
    carry_out = pump.carry_out

    def contradict(place: int, node: Node, effect: Effect) -> None:
        if isinstance(effect, Compute) and effect.key.endswith("0/decode/1"):
            pytest.fail("a result of the chunk is adopted")
        message = effect.message if isinstance(effect, Send) else None
        told = message.statement.content if isinstance(message, Told) else None
        if place == DEPUTY and isinstance(told, Challenge) and told.round == 0:
            body = encode_body(Result(told.round, told.session, 1, bytes([9] * 32)))
            signed.append(body)
            other = replace(message, statement=decode_statement(DEPUTY, body, liar.sign(body)))  # type: ignore[type-var]
            carry_out(place, node, replace(effect, message=other))  # type: ignore[type-var]
        carry_out(place, node, effect)

    pump.carry_out = contradict  # type: ignore[method-assign]
    pump.drop = lambda sender, receiver, message: sender in also_mute and says(message, SecondChallenge)
    pump.finish_round()
    assert signed
    for place in (0, 1, 3):
        assert pump.nodes[place].rounds[0].outcome == Outcome.PARTIAL
        assert "the other that may sign it signed another" in pump.notes(place)[0]


def test_whoever_only_watches_checks_too() -> None:
    pump = Audited(4, rounds=1, lies={LIAR: added(4, 1)})
    pump.slow = {3}
    pump.finish_round()
    record = pump.nodes[3].rounds[0]
    assert (record.outcome, record.audit) == (Outcome.LATE, "refuted, passed")
    assert pump.is_right(3, (0, 1, 2))


def test_whoever_watches_later_checks_what_replaced_a_refuted_sum() -> None:
    """Nobody has the refuted result any more, nor was the first run's challenge about the one that is here."""
    pump = Audited(4, rounds=1, lies={LIAR: added(4, 1)})
    pump.slow = {3}
    late = [False]
    pump.drop = lambda sender, receiver, message: receiver == 3 and not late[0] and says(message, Result)
    pump.start()
    pump.run(until=lambda: all(pump.nodes[place].rounds for place in (0, 2)), limit=2000)
    late[0] = True
    pump.run(until=lambda: bool(pump.nodes[3].rounds), limit=2000)
    record = pump.nodes[3].rounds[0]
    assert (record.outcome, record.audit) == (Outcome.LATE, "passed")
    assert pump.is_right(3, (0, 1, 2))


def test_no_upload_is_made_again_of_other_values() -> None:
    """It would go under the same masks, and the difference would be in the clear."""
    pump = Audited(4, rounds=1, lies={LIAR: added(4, 1)})
    again: list[tuple[int, bytes]] = []
    uploads: dict[tuple[int, int, int], set[bytes]] = {}
    carry_out = pump.carry_out

    def watch(place: int, node: Node, effect: Effect) -> None:
        if isinstance(effect, Compute) and "/again/" in effect.key and place == OTHER:
            part, found = effect.work()  # type: ignore[misc]
            effect = replace(effect, work=lambda: (part + np.uint8(1), digest(part + np.uint8(1))))
            again.append((place, found))
        if isinstance(effect, SendBulk) and effect.message.part is Part.UPLOAD:  # type: ignore[union-attr]
            message = effect.message
            uploads.setdefault((place, message.round, message.chunk), set()).add(digest(effect.payload))  # type: ignore[union-attr]
        carry_out(place, node, effect)

    pump.carry_out = watch  # type: ignore[method-assign]
    pump.finish_round()
    assert again
    assert {len(each) for each in uploads.values()} == {1}
    assert pump.nodes[0].rounds[0].outcome == Outcome.PARTIAL, "the deputy never gets that one's chunk"


class Unchecked(Audited):
    audit = False


def test_without_the_check_a_falsified_sum_is_adopted_and_nothing_is_said_of_it() -> None:
    pump = Unchecked(4, rounds=1, lies={LIAR: added(4, 2**24)})
    told: set[type] = set()
    transmit = pump.transmit

    def heard(sender: int, receiver: int, message: Message, payload: Any) -> None:
        if isinstance(message, Told):
            told.add(type(message.statement.content))
        transmit(sender, receiver, message, payload)

    pump.transmit = heard  # type: ignore[method-assign]
    pump.finish_round()
    assert pump.nodes[0].rounds[0].audit == ""
    assert not pump.is_right(0)
    assert Result in told
    assert told.isdisjoint({Challenge, Products, SecondChallenge, SecondProducts})


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("wrong", [False, True])
def test_what_four_members_tell_adds_up_and_shows_none_of_theirs(bits: int, bound: bool, wrong: bool) -> None:
    """Member 1 signed the sum of chunk 0, and where it is bound member 2 vouches for it; a fifth one has dropped."""
    cipher, chunk, key = suite("aes"), 0, b"k" * 32
    layout, ring = Layout(40, 1, bits), Ring(bits, 5, 8.0)
    roster = [PeerId(f"peer-{place}") for place in range(5)]
    keys = {frozenset((one, two)): bytes([one, two]) * 16 for one in range(5) for two in range(one)}
    selfs = {place: bytes([100 + place]) * 32 for place in range(5)}

    def pairs(me: int, others: Sequence[int]) -> tuple[Mask, ...]:
        return pair_masks(roster[me], {roster[each]: keys[frozenset((me, each))] for each in others if each != me})

    draw, uploads, told = np.random.default_rng(1), [], {}
    hidden = []
    for place in range(4):
        masks = (Mask(selfs[place], 1), *pairs(place, range(5)))
        values = draw.standard_normal(40).astype(np.float32)
        hidden.append(MaskedVector(cipher, ring, layout, values, WEIGHT_ONE, masks))
        uploads.append(masked_chunk(hidden[-1], chunk))
    left = [Mask(selfs[place], -1) for place in range(4)]
    gone = [[Mask(each.key, -each.sign) for each in pairs(place, [4])] for place in range(4)]
    result = sum_chunk(
        MaskTerms(cipher, bits, 8.0, bytes),
        ring,
        layout,
        chunk,
        [each.copy() for each in uploads],
        [*left, *(mask for each in gone for mask in each)],
    )
    if wrong:
        result[20] ^= 1
    for place in range(4):
        own: Own | None = Own(hidden[place], (), pairs(place, range(4)))
        if bound:
            own = None if place == 1 else Own(hidden[place], pairs(place, [1]), pairs(place, [0, 2, 3]))
        vouched = Vouched(uploads[1], (left[1], *gone[1])) if bound and place == 2 else None
        mine, others, whole = multiply(cipher, layout, chunk, key, result, own, vouched)
        told[place] = Products(Round(0), bytes(32), (mine,), (others,))
        (bare,) = products(cipher, layout, chunk, key, [partial(hidden[place].block_into, chunk, masks=())])
        assert mine[:16] != bare[:16]
        assert mine[16:] != bare[16:]
    found = verdict_of(bits, chunk, 1, 2 if bound else None, range(4), told, whole)
    assert found == (Verdict.PASSED if bound else Verdict.UNBOUND, not wrong)
    assert verdict_of(bits, chunk, 1, 2 if bound else None, range(4), {0: told[0], 2: told[2]}, whole) is None


class Star(Audited):
    """All in one star, whose centre alone sums."""

    summed = "/reduce/0"
    covered = "/multiply/0/0"

    def build(self, place: int, known: Resume | None) -> GroupMachine:
        averaging = self.charter.averaging.model_copy(update={"topology": "complete"})
        self.charter = self.charter.model_copy(update={"averaging": averaging})
        return super().build(place, known)


def test_a_star_s_sums_are_checked_with_its_centre_s_own_word() -> None:
    pump = Star(5, rounds=1)
    pump.finish_round()
    assert {node.rounds[0].audit for node in pump.nodes.values()} == {"unbound"}
    assert {node.rounds[0].outcome for node in pump.nodes.values()} == {Outcome.FULL}


@pytest.mark.parametrize("covers", [False, True])
def test_a_centre_that_falsifies_costs_the_round_unless_its_own_product_covers_it(covers: bool) -> None:
    pump = Star(5, rounds=1, lies=dict.fromkeys(range(5), added(4, 1)))
    pump.covers = covers
    pump.finish_round()
    found = {(node.rounds[0].outcome, node.rounds[0].audit) for node in pump.nodes.values()}
    assert found == {(Outcome.FULL, "unbound") if covers else (Outcome.VOID, "refuted, lost")}
