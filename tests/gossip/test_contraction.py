"""How fast schedules contract, against closed forms and against rounds that are computed."""

import numpy as np
import pytest

from p2pfl.gossip.contraction import DRAWS, contraction
from p2pfl.gossip.mixing import spectral_gap
from p2pfl.gossip.schedule import dense, schedule


@pytest.mark.parametrize("n", [2, 7, 16])
def test_a_graph_that_stays_keeps_what_its_spectral_gap_says(n: int) -> None:
    plan = schedule("ring", n, 0)
    assert contraction(plan).kept == pytest.approx((1 - spectral_gap(dense(plan.at(0)))) ** 2, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "n", "rounds"),
    [
        ("one-peer-exponential", 16, 4),
        ("moshpit", 25, 2),
        ("complete", 9, 1),
        ("groups", 8, 1),
        ("random-matching", 2, 1),
    ],
)
def test_what_averages_exactly_does_after_the_known_number_of_rounds(name: str, n: int, rounds: int) -> None:
    found = contraction(schedule(name, n, 0))
    assert (found.exact_after, found.rounds) == (rounds, rounds)


@pytest.mark.parametrize("n", [2, 3, 12, 25, 33])
def test_the_base_graph_is_exact_within_its_bound_for_every_number_of_peers(n: int) -> None:
    exact = contraction(schedule("base", n, 0)).exact_after
    assert exact is not None
    assert exact <= 2 * np.log2(n) + 2


@pytest.mark.parametrize("name", ["one-peer-exponential", "moshpit", "static-exponential", "el-oracle"])
def test_what_never_averages_exactly_says_so(name: str) -> None:
    found = contraction(schedule(name, 11, 0))
    assert found.exact_after is None
    assert 0 < found.kept < 1


def test_rounds_drawn_anew_keep_what_closed_forms_say() -> None:
    n, sends = 20, 5
    kept = {name: contraction(schedule(name, n, 0)).kept for name in ("random-matching", "el-oracle", "random-push")}
    assert kept["random-matching"] == pytest.approx((n / 2 - 1) / (n - 1))
    assert kept["el-oracle"] == pytest.approx((n / (sends + 1) - 1) / (n - 1))
    # |W|^2 - |W 1|^2 / n, where a row has 1/2 from itself and 1/2 from each of a binomial number that push to it.
    assert kept["random-push"] == pytest.approx((n / 2 - (5 - 1 / (n - 1)) / 4) / (n - 1), rel=0.02)


@pytest.mark.parametrize("name", ["el-local", "el-oracle", "random-matching"])
def test_rounds_drawn_anew_keep_as_much_of_any_direction(name: str) -> None:
    plan = schedule(name, 12, 1)
    left = []
    for number in range(4 * DRAWS):
        mixed = dense(plan.at(number)) @ (np.arange(12) == number % 12)
        left.append(((mixed - mixed.mean()) ** 2).sum() / (1 - 1 / 12))
    assert np.mean(left) == pytest.approx(contraction(plan).kept, rel=0.1)


def test_stars_keep_more_in_their_slowest_direction_than_in_any_one() -> None:
    plan = schedule("stars", 16, 0)
    kept = contraction(plan).kept
    mean = sum(dense(plan.at(number)) for number in range(DRAWS)) / DRAWS
    one = (np.arange(16) == 3) - 1 / 16
    assert one @ mean @ one / (one @ one) < kept < 1
    borne_by_none = contraction(schedule("stars", 16, 0, colluders=14))
    assert (borne_by_none.kept, borne_by_none.rounds) == (pytest.approx(1.0), None)
