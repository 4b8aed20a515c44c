"""What a charter means for its size is said before anybody signs."""

from typing import Any

import pytest

from p2pfl.core.charter import AveragingTerms, TrainingTerms
from p2pfl.simulation.charter_text import describe_charter
from tests.pump import charter_for


def described(members: int, **terms: Any) -> list[str]:
    charter = charter_for(members, 10)
    return list(describe_charter(charter.model_copy(update={"averaging": AveragingTerms(**terms)})))


@pytest.mark.parametrize(
    ("members", "groups", "sums"),
    [
        (3, "one group of all", "a group of 3: one absence costs the round; 1 may work together and learn nothing"),
        (8, "one group of all", "a group of 8: 2 of 8 may drop out after uploading; 3 may work together"),
        (20, "2 groups drawn anew each round", "a group of 10: 2 of 10 may drop out after uploading; 5 may work"),
    ],
)
def test_groups_say_what_they_can_lose(members: int, groups: str, sums: str) -> None:
    lines = described(members, topology="groups")
    assert f"topology  groups: {groups}" in lines
    assert "masks     on: only sums are revealed; values up to 64" in lines
    assert "audit     full: sums are checked before they are adopted" in lines
    assert any(line.startswith(f"sums      in {sums}") for line in lines)


def test_stars_say_what_they_can_lose() -> None:
    assert "sums      in a star of 3: one absence costs the round; 1 may work together and learn nothing" in described(
        8, topology="ring"
    )
    lines = described(12, topology="torus")
    assert (
        "sums      in a star of 5: 1 of 5 may drop out after uploading; 2 may work together and learn nothing" in lines
    )
    assert any("the centre's absence costs the round" in line for line in lines)


def test_cohorts_are_named() -> None:
    lines = described(24, topology="groups", regroup="never")
    assert "topology  groups: 3 groups drawn anew each round, of cohorts of 3 or more that stay together" in lines


@pytest.mark.parametrize("topology", ["groups", "ring"])
def test_without_masks_the_first_line_says_so(topology: str) -> None:
    assert described(4, topology=topology, masks="off")[0] == "UNMASKED: neighbors see each other's updates"
    assert not any("UNMASKED" in line for line in described(4, topology=topology))


def test_an_overlay_that_does_not_exist_is_told_and_not_raised() -> None:
    lines = described(4, topology="edges", edges=(("m0", "eel"),))
    assert any("averaging.edges: eel is not a member" in line for line in lines)


def test_words_of_16_bits_are_told() -> None:
    told = "          where members share a base, of changes in words of 16 bits; up to 0.5"
    assert told in described(8, topology="groups", bits=16, change_clip=0.5)
    assert told not in described(8, topology="groups")


def test_an_algorithm_is_told_with_all_its_options_and_what_it_sends() -> None:
    charter = charter_for(8, 1000, topology="ring")
    training = TrainingTerms(algorithm="diloco", options={"beta": 0.5})
    lines = list(describe_charter(charter.model_copy(update={"training": training})))
    assert "          diloco: lr 0.7, beta 0.5" in lines
    plain = next(line for line in describe_charter(charter) if line.startswith("topology"))
    assert plain in lines
    lines = list(describe_charter(charter.model_copy(update={"training": TrainingTerms(algorithm="k-gt")})))
    assert "          2 vectors of the model's size are averaged in each round" in lines
    assert "          it computes with the learning rate: the task's optimizer has to be plain SGD" in lines
    doubled = next(line for line in lines if line.startswith("topology"))
    assert (plain.rpartition(", ")[2], doubled.rpartition(", ")[2]) == (
        "8.0 kB sent a round by each peer", "16.0 kB sent a round by each peer",
    )  # fmt: skip


def test_terms_that_do_not_go_together_are_told_and_not_raised() -> None:
    charter = charter_for(4, 10)
    training = TrainingTerms(algorithm="k-gt", clip_norm=1.0)
    assert any(
        "training.clip_norm: k-gt" in line
        for line in describe_charter(charter.model_copy(update={"training": training}))
    )
