"""What is special about a masked sum: secrets pass, and the dead leave theirs behind as shares."""

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.statements import Deal, Reveal
from p2pfl.core.wire import Chunk, Part
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.session import Outcome
from tests.gossip.test_group_machine import chain, die_at, mean, says
from tests.group_pump import GroupPump
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
