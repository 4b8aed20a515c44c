"""The accountant: against a published run, a second implementation, the exact curve of Gaussian noise, and itself."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from p2pfl.core.charter import MOST_EPSILON
from p2pfl.core.privacy import (
    LEAST_DEVIATION,
    MOST_SURVIVORS,
    ORDERS,
    Budget,
    ExampleBudget,
    Noise,
    delta_of,
    epsilon_of,
    noise_for,
    rho_of,
    sampled_divergence,
)

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


def test_published_noise_costs_what_it_says() -> None:
    """Of `rdp_privacy_accountant_test.py` in google/differential-privacy, `test_compute_epsilon_delta_gaussian`; and of
    OpenDP 0.14, `zCDP_to_approxDP/test.rs`, for noise of 4.
    """
    assert epsilon_of(rho_of(4.530877117), 1e-6) == pytest.approx(1.0, rel=1e-6)
    assert delta_of(rho_of(4.530877117), 1.0) == pytest.approx(1e-6, rel=1e-6)
    assert epsilon_of(rho_of(4.0), 1e-3) == pytest.approx(0.6880024554878086, rel=1e-12)
    assert delta_of(rho_of(4.0), 0.0) == pytest.approx(0.1508457845622862, rel=1e-12)


@pytest.mark.parametrize("members", [2, 8, MOST_SURVIVORS])
def test_a_sum_of_discrete_noises_is_as_near_to_one_as_stated(members: int) -> None:
    """tau of Kairouz, Liu and Steinke 2021, arXiv 2102.06387, proposition 14; it counts at most once for each value."""
    square = 2 * (math.pi * LEAST_DEVIATION) ** 2
    tau = 10 * math.fsum(math.exp(-square * k / (k + 1)) for k in range(1, members))
    assert tau <= 10 * members * math.exp(-square / 2)
    assert 1_000_000_000 * tau < 1e-50


@pytest.mark.parametrize(("rho", "delta"), CASES)
def test_a_search_over_all_orders_finds_the_same(rho: float, delta: float) -> None:
    """Renyi divergence alpha rho of every order, to (epsilon, delta) by proposition 12 of arXiv 2004.00010."""

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
    """The privacy loss of the discrete Gaussian itself, summed up: theorem 7 of arXiv 2004.00010; convolved 5 times."""
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


# Examples, sampled


def test_published_divergences_of_sampled_steps_are_found() -> None:
    """Of the same test in google/differential-privacy, `test_compute_rdp_poisson_sampled_gaussian`: 50 steps."""
    published = {5: 2.18075656e-03, 50: 2.38460375e-02, 100: 1.67416308e02}
    found = dict(zip(ORDERS, sampled_divergence(0.01, 2.5), strict=True))
    for order, divergence in published.items():
        assert 50 * found[order] == pytest.approx(divergence, rel=1e-8)


@pytest.mark.parametrize(("rate", "noise"), [(1e-3, 0.7), (0.01, 1.0), (0.3, 3.0), (0.99, 0.9)])
@pytest.mark.parametrize("order", [2, 7, 32])
def test_the_divergence_is_that_integral_in_either_direction(rate: float, noise: float, order: int) -> None:
    """Computed from the densities; of the other direction Mironov et al. 2019, theorem 5, says that it is no larger."""

    def mixture(x: float) -> float:
        return float(
            np.logaddexp(math.log1p(-rate) - x * x / 2 / noise**2, math.log(rate) - (x - 1) ** 2 / 2 / noise**2)
        )

    def plain(x: float) -> float:
        return -x * x / 2 / noise**2

    def divergence(of: Callable[[float], float], other: Callable[[float], float]) -> float:
        x = np.linspace(-60 * noise - order, 60 * noise + order, 400_001)
        logs = np.array([order * of(each) + (1 - order) * other(each) for each in x])
        most = logs.max()
        area = integrate.trapezoid(np.exp(logs - most), x)
        return float(most + math.log(area / (noise * math.sqrt(2 * math.pi)))) / (order - 1)

    found = sampled_divergence(rate, noise)[ORDERS.index(order)]
    assert found == pytest.approx(divergence(mixture, plain), rel=1e-6, abs=1e-9)
    assert divergence(plain, mixture) <= found * (1 + 1e-9)


@pytest.mark.parametrize(("shift", "deviation"), [(1, 1.3), (3, 4.0), (5, 7.5)])
def test_discrete_noise_has_the_same_moments(shift: int, deviation: float) -> None:
    """E[(P(x - shift) / P(x))^k] over the integers is exp((k^2 - k) shift^2 / (2 s^2)), as it is over the reals."""
    x = np.arange(-400, 401, dtype=np.longdouble)
    total = np.exp(-(x**2) / (2 * deviation**2)).sum()
    for k in (2, 3, 6):
        logs = (k * (2 * x * shift - shift**2) - x**2) / (2 * deviation**2)
        moment = float(np.exp(logs - logs.max()).sum() / total) * math.exp(float(logs.max()))
        assert moment == pytest.approx(math.exp((k * k - k) * shift**2 / (2 * deviation**2)), rel=1e-12)


SAMPLED = [(0.01, 1.0, 5000), (0.178, 1.0, 120), (0.05, 0.6, 300), (1.0, 8.0, 60), (0.004, 2.0, 50_000)]


# Whole orders begin with 2, which is best for an epsilon above 15 or so: what it says is larger than it need be then.
@pytest.mark.filterwarnings("ignore:Optimal order is the smallest alpha")
@pytest.mark.parametrize(("rate", "noise", "steps"), SAMPLED)
@pytest.mark.parametrize("delta", [1e-8, 1e-5])
def test_other_accountants_find_the_same_for_sampled_steps(rate: float, noise: float, steps: int, delta: float) -> None:
    accounting = pytest.importorskip(
        "dp_accounting", reason="no second accountant: pip install 'p2pfl-mesh[accounting]'"
    )
    from dp_accounting import rdp

    ours = ExampleBudget(noise, MOST_EPSILON, delta, rate, 1, 10_000).spent(steps)
    event = accounting.dp_event.PoissonSampledDpEvent(rate, accounting.dp_event.GaussianDpEvent(noise))
    second = rdp.RdpAccountant(list(ORDERS)).compose(event, steps)
    assert ours == pytest.approx(second.get_epsilon(delta), rel=1e-4)
    opacus = pytest.importorskip("opacus", reason="no third accountant: pip install 'p2pfl-mesh[opacus]'")
    third = opacus.accountants.RDPAccountant()
    third.history = [(noise, rate, steps)]
    assert ours == pytest.approx(third.get_epsilon(delta, alphas=list(ORDERS)), rel=1e-4)


@pytest.mark.parametrize(("rate", "noise", "steps"), SAMPLED)
def test_what_sampled_steps_cost_is_never_below_what_numerical_composition_says(
    rate: float, noise: float, steps: int
) -> None:
    """Privacy loss distributions (Koskela et al. 2020, arXiv 1906.03049) are tight; Renyi divergences bound them."""
    accounting = pytest.importorskip(
        "dp_accounting", reason="no second accountant: pip install 'p2pfl-mesh[accounting]'"
    )
    from dp_accounting import pld

    event = accounting.dp_event.PoissonSampledDpEvent(rate, accounting.dp_event.GaussianDpEvent(noise))
    tight = pld.PLDAccountant(value_discretization_interval=1e-3).compose(event, steps).get_epsilon(1e-5)
    ours = ExampleBudget(noise, MOST_EPSILON, 1e-5, rate, 1, 10_000).spent(steps)
    assert tight * 0.995 <= ours < tight * 1.3 + 0.1


def test_a_budget_for_examples_bears_its_rounds_and_not_one_more() -> None:
    budget = ExampleBudget(noise=1.0, epsilon=3.0, delta=1e-5, rate=0.02, steps=5, values=10_000)
    most = budget.rounds
    assert most > 1
    assert budget.bears(5 * most)
    assert not budget.bears(5 * (most + 1))
    assert budget.spent(0) == 0.0
    spent = [budget.spent(steps) for steps in range(0, 5 * most, 5)]
    assert spent == sorted(spent)
    assert budget.spent(1) > 0


def test_rarer_examples_and_more_noise_cost_less() -> None:
    costs = [ExampleBudget(1.0, 8.0, 1e-5, rate, 1, 1000).spent(100) for rate in (0.001, 0.01, 0.1, 0.5, 1.0)]
    assert costs == sorted(costs)
    costs = [ExampleBudget(noise, 8.0, 1e-5, 0.1, 1, 1000).spent(100) for noise in (20.0, 5.0, 2.0, 0.7)]
    assert costs == sorted(costs)


def test_the_error_of_drawing_noise_for_steps_is_paid_for() -> None:
    assert ExampleBudget(1000.0, 230.0, 1e-12, 0.1, 1, 25_000_000).spent(1000) == math.inf
    assert math.isfinite(ExampleBudget(1000.0, MOST_EPSILON, 1e-12, 0.1, 1, 1_000_000_000).spent(1_000_000))
