"""What noise hides, bears and costs is said before anybody signs, and what is spent to whoever asks."""

import math

import pytest

from p2pfl.core.charter import Charter, PrivacyTerms
from p2pfl.core.privacy import noise_for
from p2pfl.node.checkpoints import Spent
from p2pfl.node.spending import spendings_of
from p2pfl.simulation.charter_text import describe_charter
from p2pfl.simulation.privacy_text import describe_noise, describe_spent
from tests.pump import charter_for


def noisy(members: int = 8, rounds: int = 60, topology: str = "groups", **terms: object) -> Charter:
    made = charter_for(members, 400, rounds=rounds, topology=topology)
    privacy = PrivacyTerms(**{"noise": 2.0, "epsilon": 8.0} | terms)  # type: ignore[arg-type]
    training = made.training.model_copy(update={"clip_norm": 0.5})
    return made.model_copy(update={"training": training, "privacy": privacy})


def test_a_charter_with_noise_says_all_of_it() -> None:
    lines = list(describe_noise(noisy()))
    assert lines[0] == (
        "noise     2 times the clip of 0.5, by the 2 honest of at least 3 survivors: each adds 0.707 to every parameter"
    )
    assert lines[1] == "against   everybody who sees what is released, and up to 1 members that work together"
    assert lines[2] == "budget    epsilon 8 at delta 1e-05, for all data of one member: bears 9 rounds of 60"
    assert f"for all 60: noise = {noise_for(60, 8.0, 1e-5):g}, or epsilon = " in lines[3]
    each = 0.707 / math.sqrt(8)
    assert lines[4].startswith(f"price     the average of 8: noise of {each:.3g} in each parameter, {each * 20:.3g} in")
    described = list(describe_charter(noisy()))
    assert all(line in described for line in lines)


def test_more_survivors_that_are_asked_for_have_less_to_add() -> None:
    lines = list(describe_noise(noisy(survivors=7, epsilon=100.0)))
    assert "by the 6 honest of at least 7 survivors: each adds 0.408" in lines[0]
    assert not any("training ends" in line for line in lines), "the budget bears all rounds"


def test_without_noise_nothing_is_said() -> None:
    assert list(describe_noise(charter_for(4, 10))) == []


@pytest.mark.parametrize("topology", ["groups", "torus"])
def test_the_price_is_that_of_the_smallest_and_the_largest_sum(topology: str) -> None:
    lines = [line for line in describe_noise(noisy(12, topology=topology)) if line.startswith("price")]
    assert len(lines) == 1


def test_what_is_spent_and_left_adds_up_to_what_the_budget_bears() -> None:
    charter = noisy()
    budget = charter.budget
    assert budget is not None
    nothing, _, all_left = describe_spent(spendings_of(charter, Spent(0.0, 0)))
    assert nothing == "spent     epsilon 0 of 8 (rho 0), in 0 rounds"
    assert all_left == "left      9 rounds"
    spent, any_data, left = describe_spent(spendings_of(charter, Spent(4 * budget.rho, 0)))
    assert spent.startswith(f"spent     epsilon {budget.spent(0.5):.4g} of 8 (rho 0.5), in 4 rounds")
    assert any_data.startswith(f"          {budget.spent(0.5, 4.0):.4g}, to tell any data")
    assert left == "left      5 rounds"
    assert list(describe_spent(spendings_of(charter, Spent(9 * budget.rho, 0))))[2] == "left      0 rounds"
