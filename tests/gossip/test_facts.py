"""What is known of topologies in closed form: spectra, exact consensus, contraction, push-sum.

Facts about draws are tested twice: exactly, by the mean over all directions or all draws, and by a Monte Carlo estimate
for one vector, which must lie within five standard errors. The seeds are fixed; with other seeds, of a normal estimate
one in 1.7 million would fail.
"""

import math
from collections.abc import Iterable
from itertools import combinations, permutations, product

import networkx as nx
import numpy as np
import pytest

from benchmarks import moshpit
from p2pfl.gossip.mixing import spectral_gap
from p2pfl.gossip.schedule import Schedule, dense, of_groups, schedule

ROUNDING = 1e-12


def norm(matrix: np.ndarray) -> float:
    """Return how much of a deviation from the mean a round can leave: the spectral norm of W - 11'/n."""
    return float(np.linalg.norm(matrix - 1 / len(matrix), 2))


def left(matrices: Iterable[np.ndarray]) -> float:
    """Return the largest entry of the product's difference to exact averaging."""
    result: np.ndarray | None = None
    for matrix in matrices:
        result = matrix if result is None else matrix @ result
    assert result is not None
    return float(np.abs(result - 1 / len(result)).max())


def period(plan: Schedule) -> list[np.ndarray]:
    assert plan.period is not None
    return [dense(plan.at(number)) for number in range(plan.period)]


def kept(plan: Schedule, rounds: int, start: np.ndarray) -> np.ndarray:
    """Return of each round how much of the squared distance to the first mean is left, [rounds]."""
    start = start - start.mean()
    shares = []
    for number in range(rounds):
        round = plan.at(number)
        after = (round.weights * start[round.indices]).sum(axis=1)
        shares.append((after**2).sum() / (start**2).sum())
    return np.array(shares)


def assert_estimates(shares: np.ndarray, expected: float) -> None:
    error = shares.std(ddof=1) / math.sqrt(len(shares))
    assert error < 0.05 * expected, "too few rounds to say anything"
    assert abs(shares.mean() - expected) < 5 * error


def uneven(n: int) -> np.ndarray:
    """Return a vector whose values differ in size, so that draws that favour some peers show."""
    return np.arange(n, dtype=float) ** 2


# Spectra


@pytest.mark.parametrize("n", [4, 5, 8, 17, 50])
def test_ring(n: int) -> None:
    matrix = dense(schedule("ring", n, 0).at(0))
    np.testing.assert_allclose(matrix[matrix > 0], 1 / 3, rtol=0, atol=1e-15)
    assert 1 - spectral_gap(matrix) == pytest.approx(1 / 3 + 2 / 3 * math.cos(2 * math.pi / n), abs=ROUNDING)


@pytest.mark.parametrize("n", [4, 6, 16, 50])
def test_the_ring_of_even_length_has_least_eigenvalue_minus_a_third(n: int) -> None:
    """D2 converges since it is above -1/3 or equal to it (Tang et al. 2018)."""
    assert np.linalg.eigvalsh(dense(schedule("ring", n, 0).at(0)))[0] == pytest.approx(-1 / 3, abs=ROUNDING)


@pytest.mark.parametrize("side", [3, 4, 5, 8])
def test_torus(side: int) -> None:
    matrix = dense(schedule("torus", side * side, 0).at(0))
    np.testing.assert_allclose(matrix[matrix > 0], 1 / 5, rtol=0, atol=1e-15)
    assert 1 - spectral_gap(matrix) == pytest.approx((3 + 2 * math.cos(2 * math.pi / side)) / 5, abs=ROUNDING)


@pytest.mark.parametrize("n", [4, 6, 10, 16, 22, 64, 100])
def test_static_exponential_graph_of_even_size(n: int) -> None:
    """Ying et al. 2021, proposition 1; the matrix is circulant, so its norm is its second eigenvalue's."""
    assert 1 - norm(dense(schedule("static-exponential", n, 0).at(0))) == pytest.approx(
        2 / (1 + math.ceil(math.log2(n))), abs=ROUNDING
    )


@pytest.mark.parametrize("n", [5, 7, 9, 33, 101])
def test_static_exponential_graph_of_odd_size_mixes_faster(n: int) -> None:
    assert 1 - norm(dense(schedule("static-exponential", n, 0).at(0))) > 2 / (1 + math.ceil(math.log2(n)))


@pytest.mark.parametrize("dimensions", [2, 3, 4, 6])
def test_hypercube(dimensions: int) -> None:
    matrix = dense(schedule("hypercube", 2**dimensions, 0).at(0))
    assert spectral_gap(matrix) == pytest.approx(2 / (dimensions + 1), abs=ROUNDING)


def test_the_complete_graph_averages_at_once() -> None:
    assert norm(dense(schedule("complete", 12, 0).at(0))) < ROUNDING


# Exact consensus


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
def test_one_peer_exponential_graph_is_exact_in_any_order(n: int) -> None:
    rounds = period(schedule("one-peer-exponential", n, 0))
    assert len(rounds) == math.log2(n)
    for order in permutations(rounds):
        assert left(order) < ROUNDING
    for number in range(len(rounds)):
        fewer = rounds[:number] + rounds[number + 1 :]
        assert not fewer or left(fewer) > 1e-3


@pytest.mark.parametrize("n", [8, 64, 1024])
def test_the_shuffled_one_peer_exponential_graph_is_exact_in_each_period(n: int) -> None:
    plan, hops = schedule("one-peer-exponential", n, 3, order="shuffled"), int(math.log2(n))
    values = np.random.default_rng(0).normal(size=n)
    for start in (0, hops, 5 * hops):
        after = values
        for number in range(start, start + hops):
            round = plan.at(number)
            after = (round.weights * after[round.indices]).sum(axis=1)
        np.testing.assert_allclose(after, values.mean(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("n", [3, 5, 6, 7, 12, 24, 25, 100])
def test_one_peer_exponential_graph_is_never_exact_for_other_sizes(n: int) -> None:
    """A circulant round multiplies each frequency f by (1 + w^(f 2^k)) / 2, and only -1 to a power of two gives 0."""
    rounds = period(schedule("one-peer-exponential", n, 0))
    assert left(rounds) > 1e-3
    product = np.linalg.multi_dot(rounds) if len(rounds) > 1 else rounds[0]
    frequencies = np.abs(np.fft.fft(product[0]))
    odd = n
    while odd % 2 == 0:
        odd //= 2
    # A frequency that is n over the odd part of n completes no half turn, in however many rounds.
    assert frequencies[n // odd] > 1e-3


@pytest.mark.parametrize(("n", "rounds"), [(5, 5), (6, 4), (25, 9), (64, 6), (100, 11)])
def test_base_2_graph_has_the_lengths_of_the_paper(n: int, rounds: int) -> None:
    assert schedule("base", n, 0).period == rounds


@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_base_graph_is_exact_for_every_size(degree: int, simple: bool) -> None:
    """Takezawa et al. 2023, theorem 1."""
    for n in [*range(degree + 1, 41), 64, 81, 97, 100, 121]:
        plan = schedule("base", n, 0, degree=degree, simple=simple)
        rounds = period(plan)
        assert len(rounds) <= 2 * math.log(n, degree + 1) + 2 + 1e-9
        assert left(rounds) < ROUNDING
        for matrix in rounds:
            np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-15)
            np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=0, atol=ROUNDING)
            assert (matrix >= 0).all()
            assert max(np.count_nonzero(row) - 1 for row in matrix) <= degree


def test_a_base_graph_is_never_longer_than_the_simple_one() -> None:
    for n in range(2, 130):
        short, long = (schedule("base", n, 0, simple=simple).period for simple in (False, True))
        assert short is not None
        assert long is not None
        assert short <= long


@pytest.mark.parametrize(("side", "dimensions"), [(2, 4), (3, 3), (5, 2), (8, 2), (4, 3), (7, 1)])
def test_a_full_moshpit_grid_is_exact_after_a_round_for_each_dimension(side: int, dimensions: int) -> None:
    rounds = period(schedule("moshpit", side**dimensions, 0, dimensions=dimensions))
    assert len(rounds) == dimensions
    assert all(np.count_nonzero(row) == side for matrix in rounds for row in matrix)
    assert left(rounds) < ROUNDING
    assert left(reversed(rounds)) < ROUNDING
    assert dimensions == 1 or left(rounds[1:]) > 1e-3


# Contraction


def partitions(members: tuple[int, ...], size: int) -> Iterable[list[tuple[int, ...]]]:
    """Yield every partition into groups of one size."""
    if not members:
        yield []
        return
    for others in combinations(members[1:], size - 1):
        rest = tuple(member for member in members[1:] if member not in others)
        for more in partitions(rest, size):
            yield [(members[0], *others), *more]


@pytest.mark.parametrize(("n", "size"), [(4, 2), (6, 2), (6, 3), (8, 4), (9, 3)])
def test_random_partition_exactly(n: int, size: int) -> None:
    """A partition into r groups is a projection of rank r, so its square's mean over all partitions is a multiple of I
    on deviations, by (r - 1) / (N - 1).
    """
    total, count = np.zeros((n, n)), 0
    for parts in partitions(tuple(range(n)), size):
        labels = np.empty(n, np.int64)
        for label, members in enumerate(parts):
            labels[list(members)] = label
        matrix = dense(of_groups(labels))
        total += matrix.T @ matrix
        count += 1
    share = (n // size - 1) / (n - 1)
    expected = share * np.eye(n) + (1 - share) / n
    np.testing.assert_allclose(total / count, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("beacon", [None, b"beacon"])
@pytest.mark.parametrize(("n", "size"), [(12, 4), (40, 5)])
def test_random_groups_contract_like_random_partitions(n: int, size: int, beacon: bytes | None) -> None:
    plan = schedule("groups", n, 7, size=size, beacon=beacon)
    assert_estimates(kept(plan, 1000, uneven(n)), (n // size - 1) / (n - 1))


@pytest.mark.parametrize("n", [6, 20, 64])
def test_random_matching_contracts_like_a_random_partition_into_pairs(n: int) -> None:
    assert_estimates(kept(schedule("random-matching", n, 7), 1000, uneven(n)), (n / 2 - 1) / (n - 1))


def oracle(n: int, s: int) -> float:
    """Return the expected contraction of EL-Oracle (de Vos et al. 2023, theorem 1)."""
    return (1 - s / (n - 1)) / (s + 1)


def local(n: int, s: int) -> float:
    """Return the expected contraction of EL-Local (de Vos et al. 2023, theorem 1)."""
    return (1 - (1 - s / (n - 1)) ** n) / s - 1 / (n - 1)


@pytest.mark.parametrize(("n", "s"), [(4, 1), (10, 3), (30, 5), (96, 7)])
def test_el_oracle(n: int, s: int) -> None:
    plan = schedule("el-oracle", n, 5, sends=s)
    matrix = dense(plan.at(0))
    over_directions = ((matrix**2).sum() - 1) / (n - 1)
    assert over_directions == pytest.approx(oracle(n, s), abs=ROUNDING)
    assert_estimates(kept(plan, 1000, uneven(n)), oracle(n, s))


@pytest.mark.parametrize(("n", "s"), [(3, 1), (4, 1), (4, 2), (5, 1), (5, 2), (5, 3)])
def test_el_local_exactly(n: int, s: int) -> None:
    """The mean over all draws and all directions; the distance is to the first mean, which EL-Local does not keep."""
    choices = [list(combinations([other for other in range(n) if other != peer], s)) for peer in range(n)]
    total, count = 0.0, 0
    for draw in product(*choices):
        heard = np.bincount(np.concatenate(draw), minlength=n)
        total += (1 / (1 + heard)).sum() - 1
        count += 1
    assert total / count / (n - 1) == pytest.approx(local(n, s), abs=ROUNDING)


@pytest.mark.parametrize(("n", "s"), [(4, 1), (10, 3), (30, 5), (96, 7)])
def test_el_local(n: int, s: int) -> None:
    assert_estimates(kept(schedule("el-local", n, 5, sends=s), 1500, uneven(n)), local(n, s))


# Push-sum


def directed() -> nx.DiGraph:
    """Return a strongly connected graph whose nodes send to one to four others."""
    graph = nx.DiGraph(nx.cycle_graph(9, create_using=nx.DiGraph))
    graph.add_edges_from([(0, 3), (0, 5), (0, 7), (4, 2), (6, 1), (6, 3)])
    return graph


@pytest.mark.parametrize(
    "plan",
    [
        schedule("graph", 9, 0, graph=directed()),
        schedule("random-push", 9, 0),
        schedule("random-push", 9, 0, sends=3),
        schedule("static-exponential", 9, 0),
        schedule("one-peer-exponential", 9, 0),
    ],
    ids=lambda plan: plan.name,
)
def test_push_sum_keeps_the_sum_of_weights_and_finds_the_mean(plan: Schedule) -> None:
    """Kempe, Dobra, Gehrke 2003."""
    values = np.random.default_rng(0).normal(size=9)
    sums, shares = values, np.ones(9)
    for number in range(400):
        matrix = dense(plan.at(number))
        sums, shares = matrix @ sums, matrix @ shares
        assert shares.sum() == pytest.approx(9, abs=1e-10)
        assert sums.sum() == pytest.approx(values.sum(), abs=1e-10)
        assert (shares > 0).all()
    np.testing.assert_allclose(sums / shares, values.mean(), rtol=0, atol=1e-10)


def test_rows_that_sum_to_1_alone_do_not_find_the_mean() -> None:
    """Why push-sum is needed at all: the plain mean over those heard drifts on an uneven graph."""
    values = np.random.default_rng(0).normal(size=9)
    matrix = dense(schedule("graph", 9, 0, graph=directed(), weights="uniform").at(0))
    after = np.linalg.matrix_power(matrix, 400) @ values
    assert np.ptp(after) < 1e-9
    assert abs(after.mean() - values.mean()) > 1e-2


# The table of the Moshpit repository


@pytest.mark.parametrize("method", ["all-reduce", "sgp", "random groups", "moshpit"])
def test_moshpit_table(method: str) -> None:
    """Each published mean is of 10 runs; so it may differ from ours by four times our deviation over root 10."""
    published = moshpit.PUBLISHED[512, 0.0][method]
    runs = np.array([moshpit.rounds_needed(method, 512, 0.0, seed) for seed in range(30)])
    for rounds, expected in zip(runs.T, published, strict=True):
        # Half of the last printed digit besides.
        assert (
            abs(rounds.mean() - expected) < 4 * rounds.std(ddof=1) / math.sqrt(10) + 0.05 + 4 * rounds.std() / 30**0.5
        )
