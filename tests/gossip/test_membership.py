"""Whom a round waits for."""

from p2pfl.core.ids import Round
from p2pfl.gossip.membership import Known, Members, Standing


def waits(claims_to_be_here: bool, advertises: set[int], rounds: int) -> list[int]:
    """Return the rounds in which a linked member is waited for."""
    members = Members([0, 1])
    known = members[1]
    known.linked, known.claim = True, Round(2**48 if claims_to_be_here else 0)
    waited = []
    for number in range(1, rounds):
        if 1 in members.expected((0, 1), Round(number)):
            waited.append(number)
        known.note_round(Round(number), number in advertises)
    return waited


def test_a_member_that_only_says_it_is_here_is_waited_for_ever_less_often() -> None:
    assert waits(True, set(), 200) == [1, 3, 7, 15, 31, 63, 127]


def test_a_silent_member_is_waited_for_once() -> None:
    assert waits(False, set(), 50) == [1]


def test_a_member_that_takes_part_again_is_waited_for_again() -> None:
    assert waits(True, {9, 10, 11}, 20) == [1, 3, 7, 10, 11, 12, 14, 18]


def test_who_is_gone_is_not_waited_for() -> None:
    known = Known(claim=Round(5))
    assert known.standing(Round(5)) is Standing.UNREACHABLE
    known.linked = True
    assert known.standing(Round(5)) is Standing.HERE
    known.left_after = Round(4)
    assert known.standing(Round(5)) is Standing.LEFT
