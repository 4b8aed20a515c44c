"""Each algorithm does what was published of it: float64, exact gradients of quadratics."""

import numpy as np
import pytest
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.algorithms import (
    ALGORITHMS,
    D2,
    AdPsgd,
    ChocoSgd,
    DiLoCo,
    FedProx,
    GradientTracking,
    KGradientTracking,
    LocalSgd,
    PartialSharing,
    PushSum,
    QuasiGlobalMomentum,
    conclude,
)
from p2pfl.learning.space import Request
from tests.learning.naming import named
from tests.learning.quadratics import (
    SIZE,
    Local,
    Quadratics,
    circulant,
    complete,
    mixed,
    play,
    ring,
    seldom,
    space_of,
    without,
)

NEAR = {"rtol": 0.0, "atol": 1e-10}


def top1(rows, random):
    """Keep each row's largest entry: it takes an index and a number."""
    del random
    kept = np.zeros_like(rows)
    places = np.abs(rows).argmax(1)[:, None]
    np.put_along_axis(kept, places, np.take_along_axis(rows, places, 1), 1)
    return kept, np.full(len(rows), 12)


def rand2(rows, random):
    """Keep two entries of each row, drawn."""
    places = random.permuted(np.tile(np.arange(rows.shape[1]), (len(rows), 1)), axis=1)[:, :2]
    kept = np.zeros_like(rows)
    np.put_along_axis(kept, places, np.take_along_axis(rows, places, 1), 1)
    return kept, np.full(len(rows), 16)


EVERY = [
    LocalSgd(),
    LocalSgd(beta=0.9),
    LocalSgd(beta=0.9, nesterov=True, restart=True),
    FedProx(mu=0.5),
    QuasiGlobalMomentum(),
    DiLoCo(),
    GradientTracking(),
    GradientTracking(step_first=False),
    KGradientTracking(),
    D2(),
    D2(lazy=True),
    PushSum(),
    ChocoSgd(top1, gamma=0.2),
    ChocoSgd(rand2, gamma=0.2),
    PartialSharing(KGradientTracking(), ("head",)),
    AdPsgd(),
]


def rows_of(state, name):
    n = len(state["x"]) // 14
    return space_of(n).rows(state[name])


def distance(rows, point):
    return float((rows - point).norm(dim=1).max())


# Local SGD


def test_dpsgd_rests_at_its_fixed_point_with_the_exact_mean():
    n, g = 8, 0.2
    problem, w, eye = Quadratics.drawn(n), ring(n), torch.eye(n, dtype=torch.float64)
    rows, _ = play(LocalSgd(), problem, w, 400, g)
    expected = torch.linalg.solve(eye - (1 - g) * w, g * w @ problem.b)
    torch.testing.assert_close(rows, expected, **NEAR)
    torch.testing.assert_close(rows.mean(0), problem.optimum, **NEAR)
    assert distance(rows, problem.optimum) > 0.1


def test_dfedavgm_starts_each_round_without_momentum():
    n, lr, beta, count = 6, 0.1, 0.8, 4
    problem, w = Quadratics.drawn(n, least=0.5, most=2.0), ring(n)
    x = torch.zeros(n, SIZE, dtype=torch.float64)
    for _ in range(3):
        last = y = x
        for _ in range(count):
            last, y = y, y - lr * problem.gradients(y) + beta * (y - last)
        x = w @ y
    torch.testing.assert_close(play(LocalSgd(beta, restart=True), problem, w, 3, lr, count)[0], x, **NEAR)
    assert distance(play(LocalSgd(beta), problem, w, 3, lr, count)[0], x) > 0.1


def test_fedprox_drifts_the_less_the_larger_mu():
    n, lr, count = 8, 0.05, 20
    problem, space = Quadratics.drawn(n, least=0.2, most=2.0), space_of(n)
    drifts, biases = [], []
    for mu in (0.0, 0.01, 0.1, 1.0, 10.0):
        _, request = FedProx(mu).propose({"x": space.zeros()}, Local(problem, space, lr, count), space)
        drifts.append(float(space.rows(request.vectors[0]).norm()))
        # With exact averages a round maps each number x to t x + c; two rounds from 0 tell where it rests.
        first, second = (play(FedProx(mu), problem, complete(n), rounds, lr, count)[0] for rounds in (1, 2))
        biases.append(distance(first / (1 - (second - first) / first), problem.optimum))
    assert drifts == sorted(drifts, reverse=True) and drifts[-1] < 0.2 * drifts[0]
    assert biases == sorted(biases, reverse=True) and biases[-1] < 0.3 * biases[0]
    plain = play(LocalSgd(), problem, ring(n), 5, lr, count)[0]
    torch.testing.assert_close(play(FedProx(0.0), problem, ring(n), 5, lr, count)[0], plain, **NEAR)


# Momentum of rounds


def test_quasi_global_momentum_beats_momentum_on_unequal_peers():
    n, lr, beta, curvature = 16, 0.02, 0.9, 0.1
    problem, w = Quadratics(torch.full((n, SIZE), curvature, dtype=torch.float64), Quadratics.drawn(n).b), ring(n)
    eye = torch.eye(n, dtype=torch.float64)

    def rest(rate):
        """Return where x = W (x - rate * gradient) rests."""
        g = rate * curvature
        return torch.linalg.solve(eye - (1 - g) * w, g * w @ problem.b)

    def error(algorithm):
        return distance(play(algorithm, problem, w, 800, lr)[0], problem.optimum)

    quasi, momentum, plain = error(QuasiGlobalMomentum(beta, beta)), error(LocalSgd(beta)), error(LocalSgd())
    assert quasi < 0.5 * momentum
    assert quasi < 0.5 * plain
    # At rest there is no quasi-global momentum, while local momentum multiplies the bias as it multiplies the steps.
    for algorithm, rate in ((QuasiGlobalMomentum(beta, beta), lr), (LocalSgd(beta), lr / (1 - beta))):
        space = space_of(n)
        state = {"x": space.from_rows(rest(rate)), "momentum": space.zeros()}
        if isinstance(algorithm, LocalSgd):
            state["momentum"] = space.from_rows(problem.gradients(rest(rate)) / (1 - beta))
        torch.testing.assert_close(play(algorithm, problem, w, 50, lr, state=state)[0], rest(rate), **NEAR)


def test_quasi_global_momentum_of_several_steps_is_their_mean():
    problem = Quadratics.drawn(4)
    rows, state = play(QuasiGlobalMomentum(mu=0.0), problem, complete(4), 1, 0.1, 5)
    torch.testing.assert_close(rows_of(state, "momentum"), -rows / (0.1 * 5), **NEAR)


def test_diloco_without_momentum_is_fedavg():
    problem = Quadratics.drawn(6, least=0.2, most=2.0)
    ours = play(DiLoCo(lr=1.0, beta=0.0), problem, complete(6), 30, 0.1, 5)[0]
    torch.testing.assert_close(ours, play(LocalSgd(), problem, complete(6), 30, 0.1, 5)[0], **NEAR)


def test_diloco_is_torchs_nesterov_on_the_outer_gradient():
    n, lr, count = 6, 0.1, 5
    problem = Quadratics.drawn(n, least=0.2, most=2.0)
    x = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(5):
        y = x.detach().expand(n, SIZE)
        for _ in range(count):
            y = y - lr * problem.gradients(y)
        x.grad = x.detach() - y.mean(0)
        outer.step()
    rows, _ = play(DiLoCo(), problem, complete(n), 5, lr, count)
    torch.testing.assert_close(rows, x.detach().expand(n, SIZE), **NEAR)


def test_diloco_reaches_a_target_in_fewer_rounds_than_fedavg():
    a = torch.logspace(-2, 0, SIZE, dtype=torch.float64).expand(6, SIZE)
    problem = Quadratics(a, Quadratics.drawn(6).b)

    def rounds_to(algorithm):
        errors = []
        play(
            algorithm, problem, complete(6), 400, 0.1, 10,
            watch=lambda _before, _proposed, _request, after: errors.append(
                distance(rows_of(after, "x"), problem.optimum)
            ),
        )  # fmt: skip
        return next(round for round, error in enumerate(errors) if error < 1e-2 and max(errors[round:]) < 1e-2)

    assert rounds_to(DiLoCo()) < 0.5 * rounds_to(DiLoCo(lr=1.0, beta=0.0))


# Corrections


@pytest.mark.parametrize("step_first", [True, False])
def test_gradient_tracking_tracks_the_mean_gradient_to_the_exact_optimum(step_first):
    problem = Quadratics.drawn(8, least=0.5, most=2.0)

    def watch(before, proposed, request, after):
        gradients = problem.gradients(rows_of(before, "x"))
        for state in (proposed, after):
            torch.testing.assert_close(rows_of(state, "y").mean(0), gradients.mean(0), **NEAR)

    rows, _ = play(GradientTracking(step_first), problem, ring(8), 1500, 0.1, watch=watch)
    assert distance(rows, problem.optimum) < 1e-10
    assert distance(play(LocalSgd(), problem, ring(8), 1500, 0.1)[0], problem.optimum) > 0.1


@pytest.mark.parametrize("step_first", [True, False])
def test_gradient_tracking_is_the_published_recurrence(step_first):
    n, lr = 6, 0.1
    problem, w = Quadratics.drawn(n, least=0.5, most=2.0), ring(n)
    x = torch.zeros(n, SIZE, dtype=torch.float64)
    y = problem.gradients(x)
    for _ in range(10):
        moved = w @ (x - lr * y) if step_first else w @ x - lr * y
        x, y = moved, w @ y + problem.gradients(moved) - problem.gradients(x)
    torch.testing.assert_close(play(GradientTracking(step_first), problem, w, 10, lr)[0], x, **NEAR)


def test_gradient_tracking_is_exact_where_matrices_change():
    n = 8
    problem, eye = Quadratics.drawn(n, least=0.5, most=2.0), torch.eye(n, dtype=torch.float64)
    pairs = [(eye + eye[[i ^ 1 << k for i in range(n)]]) / 2 for k in range(3)]
    rows, _ = play(GradientTracking(), problem, lambda round: pairs[round % 3], 1500, 0.1)
    assert distance(rows, problem.optimum) < 1e-10


def test_d2_is_the_published_recurrence():
    n, lr = 8, 0.1
    problem, w = Quadratics.drawn(n, least=0.5, most=2.0), ring(n)
    last, x = torch.zeros(n, SIZE, dtype=torch.float64), -lr * w @ problem.gradients(torch.zeros(n, SIZE))
    for _ in range(20):
        last, x = x, w @ (2 * x - last - lr * problem.gradients(x) + lr * problem.gradients(last))
    torch.testing.assert_close(play(D2(), problem, w, 21, lr)[0], x, **NEAR)


def test_d2_is_exact_on_a_ring_and_diverges_below_its_bound():
    n, lr = 8, 0.1
    problem = Quadratics.drawn(n, least=0.5, most=2.0)
    below = circulant(n, 0.2, 0.4)
    assert torch.linalg.eigvalsh(ring(n))[0] == pytest.approx(-1 / 3)
    assert torch.linalg.eigvalsh(below)[0] == pytest.approx(-0.6)
    assert distance(play(D2(), problem, ring(n), 1500, lr)[0], problem.optimum) < 1e-10
    assert distance(play(D2(), problem, below, 100, lr)[0], problem.optimum) > 1e6
    assert distance(play(D2(lazy=True), problem, below, 1500, lr)[0], problem.optimum) < 1e-10
    half = (below + torch.eye(n, dtype=torch.float64)) / 2
    lazy, plain = play(D2(lazy=True), problem, below, 20, lr)[0], play(D2(), problem, half, 20, lr)[0]
    torch.testing.assert_close(lazy, plain, **NEAR)


def test_k_gradient_tracking_removes_the_drift_of_many_local_steps():
    problem = Quadratics.drawn(8, least=0.2, most=2.0)

    def watch(before, proposed, request, after):
        torch.testing.assert_close(rows_of(after, "correction").sum(0), torch.zeros(SIZE, dtype=torch.float64), **NEAR)

    for w in (complete(8), ring(8)):
        rows, _ = play(KGradientTracking(), problem, w, 1000, 0.02, 10, watch=watch)
        assert distance(rows, problem.optimum) < 1e-10
        assert distance(play(LocalSgd(), problem, w, 1000, 0.02, 10)[0], problem.optimum) > 0.03


def test_k_gradient_tracking_with_exact_averages_is_scaffold():
    n, lr, count = 6, 0.05, 8
    problem = Quadratics.drawn(n, least=0.2, most=2.0)
    x, server = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    clients = torch.zeros(n, SIZE, dtype=torch.float64)
    for _ in range(10):
        y = x.expand(n, SIZE)
        for _ in range(count):
            y = y - lr * (problem.gradients(y) - clients + server)
        new = clients - server + (x - y) / (count * lr)
        x, server, clients = y.mean(0), server + (new - clients).mean(0), new
    rows, _ = play(KGradientTracking(), problem, complete(n), 10, lr, count)
    torch.testing.assert_close(rows, x.expand(n, SIZE), **NEAR)


# Directed links, compression, parts


def directed(n):
    """A ring one way, and links to the first from every third peer: columns sum to 1, rows do not."""
    eye = torch.eye(n, dtype=torch.float64)
    links = eye + eye.roll(1, 0)
    links[0, ::3] = 1.0
    return links / links.sum(0)


def test_push_sum_finds_the_mean_on_a_directed_graph():
    n = 9
    problem, w = Quadratics.drawn(n), directed(n)
    assert (w.sum(1) - 1).abs().max() > 0.2
    space = space_of(n)
    start = PushSum().init(space.from_rows(problem.b), space)

    def watch(before, proposed, request, after):
        assert float(after["weight"].sum()) == pytest.approx(n, abs=1e-12)
        numerators = rows_of(after, "x") * after["weight"][:, None]
        torch.testing.assert_close(numerators.sum(0), problem.b.sum(0), **NEAR)

    rows, _ = play(PushSum(), problem, w, 300, 0.0, state=start, watch=watch)
    torch.testing.assert_close(rows, problem.b.mean(0).expand(n, SIZE), **NEAR)
    unweighted = play(LocalSgd(), problem, w, 300, 0.0, state=LocalSgd().init(start["x"], space))[0]
    assert distance(unweighted, problem.b.mean(0)) > 0.1


def test_stochastic_gradient_push_rests_nearer_the_optimum_the_smaller_its_steps():
    problem, space = Quadratics.drawn(9), space_of(9)
    start = space.from_rows(problem.optimum)
    far, near = (
        distance(
            play(algorithm, problem, directed(9), rounds, lr, state=algorithm.init(start, space))[0], problem.optimum
        )
        for algorithm, rounds, lr in ((PushSum(), 300, 0.02), (PushSum(), 3000, 0.002))
    )
    assert near == pytest.approx(far / 10, rel=0.3)
    unweighted = play(LocalSgd(), problem, directed(9), 3000, 0.002)[0]
    assert distance(unweighted, problem.optimum) > 10 * near


@pytest.mark.parametrize("compress", [top1, rand2])
def test_choco_gossip_keeps_the_mean_and_converges_where_naive_compression_does_not(compress):
    n = 8
    problem, w, space = Quadratics.drawn(n), ring(n), space_of(n)
    mean = problem.b.mean(0)
    algorithm = ChocoSgd(compress, gamma=0.2)
    start = algorithm.init(space.from_rows(problem.b), space)

    def watch(before, proposed, request, after):
        torch.testing.assert_close(rows_of(after, "x").mean(0), mean, **NEAR)

    rows, state = play(algorithm, problem, w, 800, 0.0, state=start, watch=watch)
    assert distance(rows, mean) < 1e-4
    assert state["sent"].tolist() == [12 if compress is top1 else 16] * n
    naive = problem.b
    for round in range(800):
        sent = torch.from_numpy(compress(naive.numpy(), np.random.default_rng(round))[0])
        naive = naive + 0.2 * (w @ sent - sent)
    assert distance(naive, mean) > 0.05


def test_choco_draws_anew_in_each_round_and_the_same_for_a_seed():
    problem = Quadratics.drawn(5)
    supports = []

    def watch(before, proposed, request, after):
        supports.append((rows_of(proposed, "public") - rows_of(before, "public")) != 0)

    first = play(ChocoSgd(rand2, 0.2, seed=1), problem, ring(5), 4, 0.1, watch=watch)[0]
    assert any((supports[0] != later).any() for later in supports[1:])
    assert torch.equal(first, play(ChocoSgd(rand2, 0.2, seed=1), problem, ring(5), 4, 0.1)[0])
    assert not torch.equal(first, play(ChocoSgd(rand2, 0.2, seed=2), problem, ring(5), 4, 0.1)[0])


@pytest.mark.parametrize("inner", [a for a in EVERY if a.divisible], ids=named)
def test_personal_tensors_are_those_of_a_peer_on_its_own(inner):
    n = 6
    problem = Quadratics.drawn(n, least=0.5, most=2.0)

    def watch(before, proposed, request, after):
        for vector in request.vectors:
            assert not space_of(n).rows(vector)[:, 4:].any()
        assert space_of(n).rows(request.vectors[-1])[:, :4].any()

    _, state = play(PartialSharing(inner, ("head",)), problem, ring(n), 20, 0.1, watch=watch)
    alone = play(inner, problem, torch.eye(n, dtype=torch.float64), 20, 0.1)[1]
    together = play(inner, problem, ring(n), 20, 0.1)[1]
    assert set(state) == set(together)
    for name in state:
        torch.testing.assert_close(rows_of(state, name)[:, 4:], rows_of(alone, name)[:, 4:], **NEAR)
        torch.testing.assert_close(rows_of(state, name)[:, :4], rows_of(together, name)[:, :4], **NEAR)


def test_partial_sharing_refuses_what_it_cannot_share():
    space = space_of(3)
    for personal in (("tail",), ("hea",), ("body", "head")):
        with pytest.raises(InvalidConfig):
            PartialSharing(LocalSgd(), personal).init(space.zeros(), space)
    for inner in (PushSum(), ChocoSgd(top1, 0.2), PartialSharing(LocalSgd(), ("head",))):
        with pytest.raises(InvalidConfig):
            PartialSharing(inner, ("head",))


# Missed rounds


@pytest.mark.parametrize(
    ("algorithm", "count"), [(GradientTracking(), 1), (KGradientTracking(), 5), (D2(lazy=True), 1)], ids=named
)
def test_exact_algorithms_stay_exact_when_rounds_are_missed(algorithm, count):
    n, lr = 8, 0.1
    problem = Quadratics.drawn(n, least=0.5, most=2.0)

    def watch(before, proposed, request, after):
        if "y" in after:
            expected = problem.gradients(rows_of(before, "x")).sum(0)
            torch.testing.assert_close(rows_of(after, "y").sum(0), expected, **NEAR)
        else:
            expected = torch.zeros(SIZE, dtype=torch.float64)
            torch.testing.assert_close(rows_of(after, "correction").sum(0), expected, **NEAR)

    rows, _ = play(algorithm, problem, ring(n), 1000, lr / count, count, replied=seldom(n, 0.2), watch=watch)
    assert distance(rows, problem.optimum) < 1e-7


def test_a_peer_of_d2_that_began_anew_alone_would_shift_everyone():
    n = 8
    problem = Quadratics.drawn(n, least=0.5, most=2.0)
    rows, state = play(D2(), problem, ring(n), 1500, 0.1)
    assert distance(rows, problem.optimum) < 1e-10
    corrections = rows_of(state, "correction")
    corrections[0] = 0.0
    rows, _ = play(D2(), problem, ring(n), 1500, 0.1, state={**state, "correction": space_of(n).from_rows(corrections)})
    assert distance(rows, problem.optimum) > 0.01


def test_push_sum_keeps_its_mass_when_rounds_are_missed():
    n = 9
    problem, w, space = Quadratics.drawn(n), directed(n), space_of(n)
    there = seldom(n, 0.3)
    algorithm, local = PushSum(), Local(problem, space, 0.0)
    state = algorithm.init(space.from_rows(problem.b), space)
    for round in range(400):
        replied = there(round)
        links = (w > 0) & replied[:, None] & replied[None, :] | torch.eye(n, dtype=torch.bool)
        matrix = links / links.sum(0, dtype=torch.float64)
        proposed, request = algorithm.propose(state, local, space)
        reply = mixed(request, matrix, space)
        missed = algorithm.missed(state, proposed, request, local, space)
        applied = algorithm.apply(proposed, reply, local, space)
        assert torch.equal(missed["weight"], state["weight"])
        weight = torch.where(replied, applied["weight"], missed["weight"])
        assert float(weight.sum()) == pytest.approx(n, abs=1e-12)
        state = {"x": space.where(replied, applied["x"], missed["x"]), "weight": weight}
    torch.testing.assert_close(space.rows(state["x"]), problem.b.mean(0).expand(n, SIZE), **NEAR)


def test_a_round_concludes_without_a_look_at_replies_that_did_not_come():
    n = 5
    problem, space = Quadratics.drawn(n), space_of(n)
    algorithm, local, there = PushSum(), Local(problem, space, 0.1), torch.arange(n) < 3
    before = algorithm.init(space.from_rows(problem.b), space)
    proposed, request = algorithm.propose(before, local, space)
    rows, weight = space.rows(request.vectors[0]), torch.full((n,), 0.5, dtype=torch.float64)
    rows[~there], weight[~there] = torch.nan, torch.nan
    reply = Request((space.from_rows(rows),), (weight,))
    after = conclude(algorithm, before, proposed, request, reply, there, local, space)
    assert after["weight"].tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]
    expected = space.rows(request.vectors[0]) / after["weight"][:, None]
    torch.testing.assert_close(space.rows(after["x"]), expected, **NEAR)


def test_choco_keeps_the_mean_when_rounds_are_missed():
    n = 8
    problem, space = Quadratics.drawn(n), space_of(n)
    algorithm = ChocoSgd(top1, gamma=0.2)
    start = algorithm.init(space.from_rows(problem.b), space)
    mean = problem.b.mean(0)
    there = seldom(n, 0.2)
    rounds = []

    def watch(before, proposed, request, after):
        absent = ~there(len(rounds))
        rounds.append(absent)
        assert torch.equal(rows_of(after, "public")[absent], rows_of(before, "public")[absent])
        torch.testing.assert_close(rows_of(after, "x").mean(0), mean, **NEAR)

    rows, _ = play(algorithm, problem, ring(n), 1000, 0.0, state=start, replied=there, watch=watch)
    assert any(absent.any() for absent in rounds)
    assert distance(rows, mean) < 1e-4


@pytest.mark.parametrize("algorithm", [QuasiGlobalMomentum(), DiLoCo()], ids=named)
def test_momentum_of_rounds_learns_nothing_from_a_missed_one(algorithm):
    n = 6
    problem = Quadratics.drawn(n)
    _, state = play(algorithm, problem, ring(n), 5, 0.1, 3)
    there = torch.arange(n) % 2 == 0

    def watch(before, proposed, request, after):
        own = space_of(n).rows(request.vectors[0])
        assert torch.equal(rows_of(after, "x")[~there], own[~there])
        assert torch.equal(rows_of(after, "momentum")[~there], rows_of(before, "momentum")[~there])
        assert not torch.equal(rows_of(after, "momentum")[there], rows_of(before, "momentum")[there])

    play(algorithm, problem, ring(n), 1, 0.1, 3, state=state, replied=lambda _: there, watch=watch)


@pytest.mark.parametrize("algorithm", [LocalSgd(), LocalSgd(beta=0.9), FedProx(0.5)], ids=named)
def test_local_steps_count_though_a_round_is_missed(algorithm):
    n = 6
    problem = Quadratics.drawn(n)
    rows, _ = play(algorithm, problem, ring(n), 4, 0.1, 3, replied=lambda _: torch.zeros(n, dtype=torch.bool))
    torch.testing.assert_close(rows, play(algorithm, problem, torch.eye(n, dtype=torch.float64), 4, 0.1, 3)[0], **NEAR)


# What holds for all


@pytest.mark.parametrize("algorithm", EVERY, ids=named)
def test_states_can_be_kept_and_taken_up(algorithm):
    n = 6
    problem = Quadratics.drawn(n, least=0.5, most=2.0)
    space, names = space_of(n), set(algorithm.init(space_of(n).zeros(), space_of(n)))

    def watch(before, proposed, request, after):
        assert set(after) == names
        for tensor in (*after.values(), *request.vectors):
            if len(tensor) != n:
                assert torch.equal(space.from_rows(space.rows(tensor)), tensor), "padding is 0"

    through, _ = play(algorithm, problem, ring(n), 6, 0.05, watch=watch)
    _, halfway = play(algorithm, problem, ring(n), 3, 0.05)
    assert all(torch.isfinite(tensor).all() for tensor in halfway.values())
    copied = {name: tensor.clone() for name, tensor in halfway.items()}
    assert torch.equal(through, play(algorithm, problem, ring(n), 3, 0.05, state=copied)[0])


@pytest.mark.parametrize("algorithm", EVERY, ids=named)
def test_only_local_steps_overwrite_a_state(algorithm):
    n = 5
    problem, space = Quadratics.drawn(n), space_of(n)
    _, state = play(algorithm, problem, ring(n), 3, 0.05)
    local = Local(problem, space, 0.05)
    kept = {name: state[name].clone() for name in state if not (name == "momentum" and isinstance(algorithm, LocalSgd))}
    proposed, request = algorithm.propose(state, local, space)
    held = {name: tensor.clone() for name, tensor in proposed.items()}
    asked = [vector.clone() for vector in request.vectors]
    algorithm.apply(proposed, mixed(request, ring(n), space), local, space)
    algorithm.missed(state, proposed, request, local, space)
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert all(torch.equal(proposed[name], tensor) for name, tensor in held.items())
    assert all(torch.equal(a, b) for a, b in zip(request.vectors, asked, strict=True))


# What rand2 draws for a peer depends on how many are compressed together.
@pytest.mark.parametrize("algorithm", [a for a in EVERY if getattr(a, "compress", None) is not rand2], ids=named)
def test_one_peer_by_itself_computes_what_it_does_among_many(algorithm):
    """As real peers do: each holds its own state, and has the replies from elsewhere."""
    n, lr = 5, 0.05
    problem, w = Quadratics.drawn(n, least=0.5, most=2.0), ring(5)
    alone = [Quadratics(problem.a[i : i + 1], problem.b[i : i + 1]) for i in range(n)]
    space = space_of(1)
    states = [algorithm.init(space.zeros(), space) for _ in range(n)]
    for _ in range(4):
        locals_ = [Local(one, space, lr) for one in alone]
        proposals = [algorithm.propose(s, local, space) for s, local in zip(states, locals_, strict=True)]
        vectors = [torch.stack(same) for same in zip(*(request.vectors for _, request in proposals), strict=True)]
        scalars = [torch.stack(same) for same in zip(*(request.scalars for _, request in proposals), strict=True)]
        states = [
            algorithm.apply(state, Request(tuple(row @ v for v in vectors), tuple(row @ s for s in scalars)), *there)
            for row, (state, _), *there in zip(w, proposals, locals_, [space] * n, strict=True)
        ]
    rows = torch.cat([space.rows(state["x"]) for state in states])
    torch.testing.assert_close(rows, play(algorithm, problem, w, 4, lr)[0], **NEAR)


def test_steps_that_an_algorithm_cannot_make_are_refused():
    problem = Quadratics.drawn(3)
    for algorithm in (GradientTracking(), D2()):
        with pytest.raises(InvalidConfig, match="one local step"):
            play(algorithm, problem, ring(3), 1, 0.1, 2)
    for algorithm in (QuasiGlobalMomentum(), KGradientTracking()):
        with pytest.raises(InvalidConfig, match="learning rate"):
            play(algorithm, problem, ring(3), 1, 0.0)


def test_options_out_of_range_are_refused():
    for make in (
        lambda: LocalSgd(beta=1.0),
        lambda: LocalSgd(beta=-0.1),
        lambda: LocalSgd(beta=float("nan")),
        lambda: FedProx(mu=-1.0),
        lambda: FedProx(mu=float("nan")),
        lambda: QuasiGlobalMomentum(mu=1.0),
        lambda: DiLoCo(lr=0.0),
        lambda: ChocoSgd(top1, gamma=0.0),
        lambda: ChocoSgd(top1, gamma=1.1),
    ):
        with pytest.raises(InvalidConfig):
            make()


def test_algorithms_are_known_by_name_and_say_what_they_need():
    assert {type(algorithm) for algorithm in EVERY} == set(ALGORITHMS.values())
    assert all(ALGORITHMS[algorithm.name] is type(algorithm) for algorithm in EVERY)
    assert all("arXiv" in algorithm.source and algorithm.accepts("doubly") for algorithm in EVERY)
    assert LocalSgd().accepts("row") and not LocalSgd().accepts("column")
    assert PushSum().accepts("column") and not PushSum().accepts("row")
    assert not D2().accepts("row")
    partial = PartialSharing(D2(), ("head",))
    assert (partial.needs, partial.static, partial.single_step) == ("doubly", True, True)


def test_leaving_peers_out_keeps_a_matrix_doubly_stochastic():
    """What the tests of missed rounds stand on."""
    matrix = without(ring(8), seldom(8, 0.3)(1))
    torch.testing.assert_close(matrix.sum(0), torch.ones(8, dtype=torch.float64), **NEAR)
    torch.testing.assert_close(matrix.sum(1), torch.ones(8, dtype=torch.float64), **NEAR)
