"""What is special about a masked sum: secrets pass, and the dead leave theirs behind as shares."""

from dataclasses import replace

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.machine import Effect, Send
from p2pfl.core.statements import Content, Deal, Returned, Reveal, decode_statement, encode_body
from p2pfl.core.wire import Chunk, Part, Told
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.session import Outcome
from tests.gossip.test_group_machine import chain, die_at, mean, says
from tests.group_pump import FastKeyring, GroupPump, Node
from tests.pump import charter_for


@pytest.fixture(autouse=True)
def masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupPump, "masked", True)


@pytest.mark.parametrize("colluders", [0, 1, 2])
def test_no_sum_has_fewer_than_three_contributors_whatever_the_charter_says_of_colluders(colluders: int) -> None:
    charter = charter_for(8, 10, topology="groups")
    for masks, least in (("on", max(3, colluders + 2)), ("off", colluders + 2)):
        update = {"masks": masks, "colluders": colluders, "group_size": 8}
        terms = charter.model_copy(update={"averaging": charter.averaging.model_copy(update=update)})
        assert GroupPlan.for_peer(terms, terms.roster()[0]).least == least


def test_two_survivors_of_a_masked_session_give_nothing_away() -> None:
    pump = GroupPump(4, rounds=1, colluders=0)
    # Nobody gets a chunk of two members, so the other two are all that could be in the sum.
    chain(pump, lambda s, r, m: isinstance(m, Chunk) and m.part is Part.UPLOAD and s in (2, 3))
    revealed = []
    chain(pump, lambda s, r, m: says(m, Reveal) and bool(revealed.append(s)))  # type: ignore[func-returns-value]
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()), limit=1000)
    assert not revealed
    assert all(node.rounds[0].outcome == Outcome.VOID for node in pump.nodes.values())


@pytest.mark.parametrize("kind", [Deal, Reveal])
@pytest.mark.parametrize("place", range(4))
def test_in_a_masked_group_of_four_one_that_dies_while_secrets_pass_costs_nobody_the_round(
    kind: type, place: int
) -> None:
    pump = GroupPump(4, rounds=2)
    die_at(pump, place, kind)
    pump.start()
    pump.run()
    living = [node for node in pump.nodes.values() if node.alive]
    assert len(living) == 3
    survivors = {place for place in range(4) if kind is Reveal or pump.nodes[place].alive}
    for node in living:
        assert [record.outcome for record in node.rounds] == [Outcome.FULL] * 3
        assert len(node.rounds[0].heard) + 1 == len(survivors)
        np.testing.assert_allclose(
            node.adopted[Round(0)], mean(pump, tuple(sorted(survivors)), pump.initial), rtol=1e-4
        )


@pytest.mark.parametrize("first", range(8))
def test_masked_eight_lose_two_that_are_silent_after_the_certificate_and_nothing_else(first: int) -> None:
    """The seeds of survivors that died come back from shares; and the pair keys with one that dropped before."""
    pump = GroupPump(8, rounds=1, group_size=8, colluders=3)
    dropped, silent = first, (first + 3) % 8
    # Nobody gets a chunk of the one that drops; it stays silent then, and so does another that is in the sum.
    chain(pump, lambda s, r, m: isinstance(m, Chunk) and m.part is Part.UPLOAD and s == dropped)
    chain(pump, lambda s, r, m: says(m, Reveal) and m.statement.signer in (dropped, silent))  # type: ignore[union-attr]
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()), limit=1000)
    survivors = tuple(place for place in range(8) if place != dropped)
    for place in survivors:
        assert pump.nodes[place].rounds[0].outcome == Outcome.FULL
        np.testing.assert_allclose(pump.nodes[place].adopted[Round(0)], mean(pump, survivors, pump.initial), rtol=1e-4)


class Lying(GroupPump):
    """One member tells the others something else than its machine says, and signs that."""

    liar = 1

    def lie(self, content: Content) -> Content:
        return content

    def carry_out(self, place: int, node: Node, effect: Effect) -> None:
        if isinstance(effect, Send) and isinstance(effect.message, Told) and place == self.liar:
            statement = effect.message.statement
            if statement.signer == place:
                body = encode_body(self.lie(statement.content))
                signed = decode_statement(place, body, FastKeyring(place).sign(body))
                effect = replace(effect, message=replace(effect.message, statement=signed))
        super().carry_out(place, node, effect)


class WrongSeed(Lying):
    def lie(self, content: Content) -> Content:
        return replace(content, seed=bytes(32)) if isinstance(content, Reveal) else content


class WrongPairKey(Lying):
    def lie(self, content: Content) -> Content:
        return replace(content, pairs=(bytes(32),) * len(content.pairs)) if isinstance(content, Reveal) else content


class WrongShares(Lying):
    """Says nothing of itself, so that shares are asked for, and gives back wrong ones of others."""

    def lie(self, content: Content) -> Content:
        if not isinstance(content, Returned):
            return content
        return replace(content, shares=tuple(share[:-1] + bytes([share[-1] ^ 1]) for share in content.shares))


@pytest.mark.parametrize("kind", [WrongSeed, WrongPairKey])
def test_who_reveals_something_else_than_it_committed_to_is_replaced_by_shares(kind: type[Lying]) -> None:
    pump = kind(4, rounds=1)
    # One drops, so that there are pair keys to reveal.
    chain(pump, lambda s, r, m: isinstance(m, Chunk) and m.part is Part.UPLOAD and s == 3)
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()), limit=1000)
    for place in (0, 2):
        assert pump.nodes[place].rounds[0].outcome == Outcome.FULL
        np.testing.assert_allclose(pump.nodes[place].adopted[Round(0)], mean(pump, (0, 1, 2), pump.initial), rtol=1e-4)


def test_wrong_shares_of_a_silent_member_are_left_out() -> None:
    pump = WrongShares(8, rounds=1, group_size=8, colluders=3)
    silent = 5
    chain(pump, lambda s, r, m: isinstance(m, Told) and says(m, Reveal) and m.statement.signer == silent)
    pump.start()
    pump.run(until=lambda: all(node.rounds for node in pump.nodes.values()), limit=1000)
    for place in (0, 2, 3, 4, 6, 7):
        assert pump.nodes[place].rounds[0].outcome == Outcome.FULL
        np.testing.assert_allclose(
            pump.nodes[place].adopted[Round(0)], mean(pump, tuple(range(8)), pump.initial), rtol=1e-4
        )


class WrongDeal(Lying):
    def lie(self, content: Content) -> Content:
        if not isinstance(content, Deal):
            return content
        return replace(
            content, sealed=tuple(each[:-1] + bytes([each[-1] ^ 1]) if each else each for each in content.sealed)
        )


def test_who_deals_shares_that_do_not_open_is_left_out_before_any_vector_moves() -> None:
    pump = WrongDeal(5, rounds=1, group_size=5)
    pump.start()
    pump.run(until=lambda: all(pump.nodes[place].rounds for place in (0, 2, 3, 4)), limit=1000)
    for place in (0, 2, 3, 4):
        assert pump.nodes[place].rounds[0].outcome == Outcome.FULL
        assert "m1" in pump.nodes[place].rounds[0].absent
        assert pump.nodes[place].rounds[0].attempt >= 1
