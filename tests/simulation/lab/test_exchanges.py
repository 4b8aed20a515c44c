"""Exchanges beside plain mixing, on vectors whose outcome is known."""

import numpy as np
import pytest
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.compress import Identity, Quantise, RandK, TopK
from p2pfl.gossip.robust import (
    CoordinateMedian,
    GeometricMedian,
    Mean,
    MedianOfGroups,
    SelfCentredClipping,
    TrimmedMean,
)
from p2pfl.gossip.schedule import dense, schedule
from p2pfl.learning.space import Block, Request, Space
from p2pfl.simulation import exchanges
from p2pfl.simulation.attacks import ATTACKS
from p2pfl.simulation.dense.engine import Mixing
from p2pfl.simulation.dense.variants import SideBySide
from p2pfl.simulation.exchanges import Attacked, Compressed, Relabelled, Robust, senders
from p2pfl.simulation.presence import Presence, Present
from tests.simulation.lab.stand_ins import Fixed, Matrix, ring

N, SIZE = 8, 12
# Stored transposed and padded, so that rows are not what lies in memory.
SPACE = Space(N, (Block("a", (2, 4), (5, 2), swapped=True), Block("b", (4,), (4,))), torch.float64)


def rows_of(n=N, seed=0):
    return np.random.default_rng(seed).standard_normal((n, SIZE))


def flat(rows):
    return SPACE.of(len(rows)).from_rows(torch.from_numpy(rows))


def through(exchange, *rows, round=0, scalars=()):
    space = SPACE.of(len(rows[0]))
    reply = exchange(round, Request(tuple(map(flat, rows)), scalars), space, [])
    return [space.rows(vector).numpy() for vector in reply.vectors]


def compressed(compress, *, feedback=True, gamma=1.0, over=None, seeds=(0,), **options):
    over = over or Fixed((ring(N),))
    return Compressed(
        Mixing(over), compress, over, seeds, np.zeros((len(seeds), SIZE)), feedback=feedback, gamma=gamma, **options
    )


@pytest.mark.parametrize("feedback", [True, False])
def test_without_compression_it_is_mixing(feedback):
    exchange, matrix = compressed(Identity(), feedback=feedback), ring(N).dense
    for round_ in range(3):
        one, other = rows_of(seed=round_), rows_of(seed=9 + round_)
        made = through(exchange, one, other, round=round_)
        np.testing.assert_allclose(made[0], matrix @ one, atol=1e-6)
        np.testing.assert_allclose(made[1], matrix @ other, atol=1e-6)


@pytest.mark.parametrize("compress", [TopK(0.2), Quantise(3), Quantise(2, 4)], ids=repr)
def test_compressed_gossip_keeps_the_mean_and_reaches_it(compress):
    """As Choco-gossip does: Koloskova et al. 2019, arXiv 1902.00340."""
    exchange, first = compressed(compress, gamma=0.3), rows_of()
    rows = first
    for round_ in range(300):
        (rows,) = through(exchange, rows, round=round_)
        np.testing.assert_allclose(rows.mean(0), first.mean(0), atol=1e-5)
    np.testing.assert_allclose(rows, np.broadcast_to(first.mean(0), rows.shape), atol=1e-4)


def test_without_feedback_what_is_not_sent_is_lost():
    exchange, first = compressed(TopK(0.2), feedback=False), rows_of()
    (made,) = through(exchange, first)
    known = TopK(0.2)(first, np.random.default_rng(0))[0]
    np.testing.assert_allclose(made, ring(N).dense @ known, atol=1e-6)


def test_drawn_places_are_mixed_and_others_stay():
    exchange, first = compressed(RandK(0.5)), rows_of()
    rows = first
    mixed_in = []
    for round_ in range(2):
        before = rows
        (rows,) = through(exchange, before, round=round_)
        changed = (rows != before).all(0)
        assert changed.sum() == SIZE // 2
        np.testing.assert_allclose(rows[:, changed], (ring(N).dense @ before)[:, changed])
        np.testing.assert_array_equal(rows[:, ~changed], before[:, ~changed])
        mixed_in.append(changed)
    assert (mixed_in[0] != mixed_in[1]).any()


@pytest.mark.parametrize("compress", [RandK(0.5), TopK(0.2), Quantise(4)], ids=repr)
def test_what_is_personal_is_not_sent(compress):
    columns = np.arange(3, SIZE)
    exchange, first = compressed(compress, columns=columns), rows_of()
    (made,) = through(exchange, first)
    np.testing.assert_array_equal(made[:, :3], first[:, :3])
    assert (made[:, 3:] != first[:, 3:]).any()


@pytest.mark.parametrize("compress", [RandK(0.5), TopK(0.2), Quantise(4)], ids=repr)
def test_a_seed_is_compressed_the_same_beside_others(compress):
    one, two = rows_of(), rows_of(seed=1)
    over = SideBySide([Fixed((ring(N),)), Fixed((ring(N),))])
    both = compressed(compress, over=over, seeds=(7, 8))
    for round_ in range(2):
        (together,) = through(both, np.concatenate([one, two]), round=round_)
    alone = compressed(compress, seeds=(8,))
    for round_ in range(2):
        (made,) = through(alone, two, round=round_)
    np.testing.assert_allclose(together[N:], made, atol=1e-12)


@pytest.mark.parametrize("feedback", [True, False])
def test_whoever_is_alone_keeps_its_vector_and_its_copy(feedback):
    pair = np.eye(N)
    pair[:2, :2] = 0.5
    exchange = compressed(TopK(0.5), feedback=feedback, over=Fixed((Matrix.of(pair), ring(N))))
    first = rows_of()
    (made,) = through(exchange, first)
    np.testing.assert_array_equal(made[2:], first[2:])
    assert senders(Matrix.of(pair)).tolist() == [True, True, *[False] * 6]
    # Nobody has heard of peer 4, so in the next round the others know it as it was at the start.
    (made,) = through(exchange, made, round=1)
    assert np.isfinite(made).all()
    np.testing.assert_allclose(exchange._known[0][4], TopK(0.5)(first, np.random.default_rng())[0][4])


SCHEDULES = [
    ("ring", {}), ("static-exponential", {}), ("groups", {"size": 4}), ("erdos-renyi", {}), ("el-local", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), SCHEDULES)
@pytest.mark.parametrize("missed", [0.0, 0.4])
def test_the_rule_of_the_mean_is_mixing(name, options, missed, monkeypatch):
    monkeypatch.setattr(exchanges, "AT_ONCE", 2 * SIZE)
    present = Present(schedule(name, N, 3, **options), Presence(N, 5, missed=missed), name == "groups", column=False)
    rows, scalars = rows_of(), torch.arange(N, dtype=torch.float64)
    request = Request((flat(rows),), (scalars,))
    one, other = (each(2, request, SPACE, []) for each in (Mixing(present), Robust(present, Mean(), N)))
    torch.testing.assert_close(SPACE.rows(one.vectors[0]), SPACE.rows(other.vectors[0]))
    torch.testing.assert_close(one.scalars, other.scalars)


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(0.3), GeometricMedian(), SelfCentredClipping(0.5)])
def test_each_peer_applies_the_rule_to_its_neighborhood(rule):
    over = schedule("erdos-renyi", N, 3)
    matrix, rows = dense(over.at(0)), rows_of()
    (made,) = through(Robust(over, rule, N), rows)
    for peer in range(N):
        others = np.flatnonzero((matrix[peer] != 0) & (np.arange(N) != peer))
        expected = rule.aggregate(rows[peer], rows[others], matrix[peer, others])
        np.testing.assert_allclose(made[peer], expected, rtol=1e-9)


def test_whoever_is_alone_keeps_its_own_whatever_the_rule():
    pair = np.eye(N)
    pair[:2, :2] = 0.5
    rows = rows_of()
    for rule in (CoordinateMedian(), SelfCentredClipping(), MedianOfGroups()):
        (made,) = through(Robust(Fixed((Matrix.of(pair),)), rule, N), rows)
        np.testing.assert_array_equal(made[2:], rows[2:])


def test_the_median_of_groups_is_that_of_their_means():
    matrix = np.zeros((N, N))
    groups = [[0, 3, 6], [1, 4], [2, 7]]
    for group in groups:
        matrix[np.ix_(group, group)] = 1 / len(group)
    matrix[5, 5] = 1.0
    rows = rows_of()
    rows[4] = 1e9
    (made,) = through(Robust(Fixed((Matrix.of(matrix),)), MedianOfGroups(), N), rows)
    expected = np.median([rows[group].mean(0) for group in groups], axis=0)
    for peer in range(N):
        np.testing.assert_allclose(made[peer], rows[5] if peer == 5 else expected)


def test_where_nobody_meets_there_is_no_median():
    rows = rows_of()
    (made,) = through(Robust(Fixed((Matrix.of(np.eye(N)),)), MedianOfGroups(), N), rows)
    np.testing.assert_array_equal(made, rows)


def test_a_defence_needs_weights_that_are_not_below_zero():
    matrix = np.eye(N) * 1.5 - 0.5 / (N - 1) * (1 - np.eye(N))
    with pytest.raises(InvalidConfig, match="not below 0"):
        through(Robust(Fixed((Matrix.of(matrix),)), CoordinateMedian(), N), rows_of())


class Seen:
    """An exchange that shows what it was given, and gives it back."""

    def __call__(self, round, request, space, spare):
        self.rows = [space.rows(vector).numpy() for vector in request.vectors]
        return request


def test_the_last_peers_lie_and_go_on_with_what_the_honest_have():
    seen, before = Seen(), np.full((2, SIZE), 5.0)
    exchange = Attacked(seen, ATTACKS["sign-flip"].lie, 2.0, (0, 1), 2, before)
    rows = np.concatenate([rows_of(), rows_of(seed=1)])
    (made,) = through(exchange, rows)
    for first in (0, N):
        honest, attackers = slice(first, first + N - 2), slice(first + N - 2, first + N)
        np.testing.assert_array_equal(seen.rows[0][honest], rows[honest])
        np.testing.assert_allclose(seen.rows[0][attackers], 5.0 - 2.0 * (rows[attackers] - 5.0))
        np.testing.assert_array_equal(made[honest], rows[honest])
        np.testing.assert_allclose(made[attackers], np.broadcast_to(rows[honest].mean(0), (2, SIZE)))
    # The next round's changes are told from where the honest were, and those of other vectors from 0.
    through(exchange, rows + 1.0, rows, round=1)
    mean = rows[: N - 2].mean(0)
    np.testing.assert_allclose(seen.rows[0][N - 2], mean - 2.0 * (rows[N - 2] + 1.0 - mean))
    np.testing.assert_allclose(seen.rows[1][N - 2], -2.0 * rows[N - 2])


def test_a_lie_is_no_word_beyond_the_rings_clip():
    seen = Seen()
    exchange = Attacked(seen, ATTACKS["scaling"].lie, 1e9, (0,), 1, np.zeros((1, SIZE)), limit=3.0)
    through(exchange, rows_of())
    assert np.abs(seen.rows[0][-1]).max() == 3.0


def test_noise_of_liars_is_each_rounds_and_each_seeds_own():
    def lies(seeds, round):
        seen = Seen()
        rows = np.zeros((N * len(seeds), SIZE))
        through(Attacked(seen, ATTACKS["gaussian"].lie, 1.0, seeds, 1, rows[: len(seeds)]), rows, round=round)
        return seen.rows[0][N - 1 :: N]

    together = lies((4, 5), 2)
    np.testing.assert_array_equal(together[1], lies((5,), 2)[0])
    assert (together[0] != together[1]).all()
    assert (together[1] != lies((5,), 3)[0]).all()


def test_peers_change_places_and_the_graph_stays():
    plain = schedule("barabasi-albert", N, 1)
    places = np.random.default_rng(0).permutation(N)
    moved = Relabelled(plain, places)
    assert moved.period == plain.period
    np.testing.assert_allclose(
        Matrix(moved.at(0).indices, moved.at(0).weights).dense, dense(plain.at(0))[np.ix_(places, places)]
    )
