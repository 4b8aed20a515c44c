"""The accountant: against a published run, a second implementation, the exact curve of Gaussian noise, and itself."""

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from p2pfl.core.charter import MOST_EPSILON
from p2pfl.core.privacy import Budget, Noise, delta_of, epsilon_of, noise_for, rho_of

CASES = [(rho, delta) for rho in (0.01, 0.1, 0.81, 2.0, 8.0, 40.0) for delta in (1e-10, 1e-6, 1e-5, 1e-2)]


def exact_delta(rho: float, epsilon: float) -> float:
    """Return delta of the Gaussian mechanism itself (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    mu = math.sqrt(2 * rho)
    near = stats.norm.logcdf(mu / 2 - epsilon / mu)
    far = epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu)
    return math.exp(near) - math.exp(far)


def exact_epsilon(rho: float, delta: float) -> float:
    return float(optimize.brentq(lambda epsilon: exact_delta(rho, epsilon) - delta, 0, 500))


def test_a_published_run_costs_what_it_says() -> None:
    """Next words in Spanish, in Gboard: rho = 0.81 (McMahan and Thakurta 2022, "Federated learning with formal
    differential privacy guarantees"), and epsilon = 8.90 at delta = 1e-10 (Xu et al. 2023, arXiv 2305.18465).
    """
    assert epsilon_of(0.805, 1e-10) < 8.90 < epsilon_of(0.815, 1e-10), "they round rho to two digits"


@pytest.mark.parametrize(("rho", "delta"), CASES)
def test_a_search_over_all_orders_finds_the_same(rho: float, delta: float) -> None:
    """Renyi divergence alpha rho of every order, to (epsilon, delta) by proposition 12 of arXiv 2004.00030."""

    def epsilon_at(log: float) -> float:
        alpha = 1 + math.exp(log)
        return alpha * rho + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1)

    grid = np.linspace(-12, 12, 4001)
    best = grid[int(np.argmin([epsilon_at(log) for log in grid]))]
    found = optimize.minimize_scalar(epsilon_at, bounds=(best - 0.01, best + 0.01), method="bounded")
    assert epsilon_of(rho, delta) == pytest.approx(max(0.0, found.fun), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("rho", "delta"), CASES)
def test_another_accountant_finds_the_same(rho: float, delta: float) -> None:
    accounting = pytest.importorskip(
        "dp_accounting", reason="no second accountant: pip install 'p2pfl-mesh[accounting]'"
    )
    from dp_accounting import rdp

    orders = [1 + 10 ** (exponent / 500) for exponent in range(-1500, 2500)]
    accountant = rdp.RdpAccountant(orders)
    accountant.compose(accounting.dp_event.ZCDpEvent(rho))
    assert epsilon_of(rho, delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-4)


def test_rounds_of_gaussian_noise_cost_what_the_other_accountant_says() -> None:
    accounting = pytest.importorskip(
        "dp_accounting", reason="no second accountant: pip install 'p2pfl-mesh[accounting]'"
    )
    from dp_accounting import rdp

    event = accounting.dp_event.SelfComposedDpEvent(accounting.dp_event.GaussianDpEvent(3.5), 60)
    accountant = rdp.RdpAccountant([1 + 10 ** (exponent / 500) for exponent in range(-1500, 2500)])
    accountant.compose(event)
    assert epsilon_of(60 * rho_of(3.5), 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-4)


@pytest.mark.parametrize(("rho", "delta"), CASES)
def test_no_bound_is_below_the_exact_curve_nor_far_above(rho: float, delta: float) -> None:
    exact, ours = exact_epsilon(rho, delta), epsilon_of(rho, delta)
    assert exact <= ours * (1 + 1e-9)
    assert ours < exact * 1.35 + 0.01


@pytest.mark.parametrize("deviation", [4.0, 9.5])
def test_discrete_noise_in_one_dimension_costs_no_more_than_its_rho(deviation: float) -> None:
    """The privacy loss of the discrete Gaussian itself, summed up: theorem 7 of arXiv 2004.00030; convolved 5 times."""
    sensitivity, rounds, epsilon = 3, 5, 2.0
    support = np.arange(-int(14 * deviation), int(14 * deviation) + 1)
    weight = np.exp(-(support**2) / (2 * deviation**2))
    total = np.convolve(weight / weight.sum(), [1.0])
    for _ in range(rounds - 1):
        total = np.convolve(total, weight / weight.sum())
    # The loss at x is (sensitivity^2 - 2 sensitivity x) / (2 s^2); over rounds the xs add up.
    sums = np.arange(len(total)) - (len(total) - 1) // 2
    loss = (rounds * sensitivity**2 - 2 * sensitivity * sums) / (2 * deviation**2)
    exact = float(np.sum(total * np.maximum(0, 1 - np.exp(np.minimum(700.0, epsilon - loss)))))
    rho = rounds * sensitivity**2 / (2 * deviation**2)
    assert exact <= delta_of(rho, epsilon)
    smooth, _ = integrate.quad(
        lambda z: stats.norm.pdf(z) * max(0.0, 1 - math.exp(epsilon - rho - math.sqrt(2 * rho) * z)), -12, 12, limit=500
    )
    assert exact == pytest.approx(smooth, rel=1e-2)


def test_a_budget_bears_its_rounds_and_not_one_more() -> None:
    budget = Budget(noise=5.0, epsilon=8.0, delta=1e-5, values=10_000)
    most = budget.rounds
    assert budget.bears(most)
    assert not budget.bears(most + 1)
    assert budget.spent(most * budget.rho) <= 8.0 < budget.spent((most + 1) * budget.rho)
    assert budget.spent(0.0) == 0.0
    assert budget.spent(budget.rho, factor=4.0) == pytest.approx(budget.spent(4 * budget.rho), rel=1e-12)


def test_samplers_that_are_not_exact_are_paid_for() -> None:
    beyond = Budget(noise=1000.0, epsilon=230.0, delta=1e-12, values=25_000_000)
    assert not beyond.bears(1), "e^230 times the error of 1.6e9 values is more than this delta"
    for epsilon in (8.0, MOST_EPSILON):
        unlimited = Budget(noise=1e6, epsilon=epsilon, delta=1e-12, values=1_000_000_000)
        assert unlimited.bears(10_000_000), "within what charters allow it is nothing"


@pytest.mark.parametrize(("rounds", "epsilon", "delta"), [(1, 0.1, 1e-5), (60, 8.0, 1e-5), (2000, 1.0, 1e-8)])
def test_the_least_noise_for_so_many_rounds_bears_just_these(rounds: int, epsilon: float, delta: float) -> None:
    noise = noise_for(rounds, epsilon, delta)
    assert Budget(noise, epsilon, delta, 1000).rounds >= rounds
    assert not Budget(noise * 0.999, epsilon, delta, 1000).bears(rounds)


def test_honest_survivors_make_up_the_noise_together() -> None:
    noise = Noise(clip=0.5, multiplier=3.0, honest=4)
    assert noise.deviation == 0.75
    assert math.sqrt(4 * noise.deviation**2) == noise.multiplier * noise.clip
    assert noise.rho == rho_of(3.0) == 1 / 18
