"""The check of masked sums: who falsifies one alone is found out, and who lies of its product harms no model."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.ledger import Resume
from p2pfl.core.machine import Bytes, Compute, Effect, Send
from p2pfl.core.statements import Challenge, Products, Result, decode_statement, encode_body
from p2pfl.core.trace import Note
from p2pfl.core.wire import Told
from p2pfl.crypto.products import PRODUCT_BYTES, add_up, products, words_of
from p2pfl.crypto.suite import suite
from p2pfl.gossip.chunks import digest
from p2pfl.gossip.group_machine import GroupMachine
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
        assert pump.nodes[place].rounds[0].audit.startswith("refuted")
        assert pump.is_right(place)


def test_a_liar_that_shows_one_member_the_truth_is_refuted_all_the_same() -> None:
    """Else their challenges would differ, and nobody could check anything."""
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
        assert "disagree" in pump.notes(place)[0]


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


def test_without_the_check_a_falsified_sum_is_adopted() -> None:
    pump = Audited(4, rounds=1, lies={LIAR: added(4, 2**24)})
    pump.audit = False
    for place, node in pump.nodes.items():
        node.machine = pump.build(place, None)
    pump.finish_round()
    assert pump.nodes[0].rounds[0].audit == ""
    assert not pump.is_right(0)


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
