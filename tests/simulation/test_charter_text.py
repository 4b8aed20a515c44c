"""What a charter in groups means for its size is said before anybody signs."""

import pytest

from p2pfl.simulation.charter_text import describe_charter
from tests.pump import charter_for


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (3, "one group of all; one of 3 that drops out costs the round, 1 may work together"),
        (8, "one group of all; 2 of 8 may drop out of a round, 3 may work together"),
        (20, "2 groups drawn anew each round; 2 of 10 may drop out of a round, 5 may work together"),
    ],
)
def test_groups_say_what_they_can_lose(members: int, said: str) -> None:
    lines = list(describe_charter(charter_for(members, 10, topology="groups")))
    assert f"topology  groups: {said}" in lines
    assert "masks     on: only sums are revealed; values up to 64" in lines
