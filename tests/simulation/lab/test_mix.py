"""Mixing gives the product with the matrix, however it is computed."""

import numpy as np
import pytest
import torch

from p2pfl.learning.space import Block, Request, Space
from p2pfl.simulation.dense import mix
from p2pfl.simulation.dense.engine import Mixing
from p2pfl.simulation.dense.mix import Mixer
from p2pfl.simulation.dense.variants import Blocks, SideBySide
from tests.simulation.lab.stand_ins import Fixed, Matrix, ring

N = 12
SPACE = Space(
    N, (Block("a", (7, 5), (5, 7), swapped=True), Block("b", (7,), (16,)), Block("c", (3, 2, 2), (3, 2, 2))),
    torch.float64,
)  # fmt: skip


def rows(n=N, dtype=torch.float64):
    return torch.randn(n, SPACE.size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def star(n):
    dense = np.eye(n) / 2
    dense[0], dense[1:, 0] = 1 / n, 1 / 2
    return Matrix.of(dense)


def directed(n):
    """Column stochastic, of rows of different length."""
    generator = np.random.default_rng(1)
    dense = (generator.random((n, n)) < 0.15) * generator.random((n, n)) + np.eye(n)
    return Matrix.of(dense / dense.sum(0))


MATRICES = {
    "ring": ring(N),
    "star": star(N),
    "directed": directed(N),
    "complete": Matrix.of(np.full((N, N), 1 / N)),
    "weighted mean": Matrix.of(np.tile(np.arange(1, N + 1) / 78, (N, 1))),
    "nothing": Matrix.of(np.eye(N)),
    "mostly not 0": Matrix.of(np.ones((N, N)) - np.eye(N)),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("wide", [64, 1], ids=["lists", "dense where it can be"])
@pytest.mark.parametrize("length", [1, 1000, 1 << 40], ids=["one by one", "ranges", "whole"])
def test_mixing_is_the_product_with_the_matrix(matrix, length, wide, monkeypatch):
    monkeypatch.setattr(mix, "RANGE", length)
    monkeypatch.setattr(mix, "WIDE", wide)
    x, scalars = rows(), torch.arange(N, dtype=torch.float64)
    dense = torch.from_numpy(matrix.dense)
    mixer = Mixer(matrix, dtype=torch.float64)
    flat = SPACE.from_rows(x)
    torch.testing.assert_close(SPACE.rows(mixer.mix(flat, SPACE)), dense @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixer.mix_scalars(scalars), dense @ scalars, rtol=1e-12, atol=1e-12)
    assert torch.equal(SPACE.rows(flat), x)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_float32_is_mixed_in_float32(matrix):
    x = rows(dtype=torch.float32)
    space = Space(N, SPACE.blocks)
    mixed = Mixer(matrix).mix(space.from_rows(x), space)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(space.rows(mixed), torch.from_numpy(matrix.dense).float() @ x, rtol=1e-5, atol=1e-6)


def test_the_bits_do_not_depend_on_ranges():
    x = Space(N, SPACE.blocks).from_rows(rows(dtype=torch.float32))
    space, mixer = Space(N, SPACE.blocks), Mixer(directed(N))
    whole = mixer.mix(x, space)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix, "RANGE", 1)
        assert torch.equal(mixer.mix(x, space), whole)


def test_a_schedule_is_followed_round_by_round():
    class Counted(Fixed):
        asked = 0

        def at(self, round):
            type(self).asked += 1
            return super().at(round)

    schedule = Counted((ring(N), star(N)))
    mixing, space = Mixing(schedule), SPACE
    x = rows()
    for number, matrix in enumerate([ring(N), star(N)] * 2):
        reply = mixing(number, Request((space.from_rows(x),), (x[:, 0],)), space, [])
        torch.testing.assert_close(space.rows(reply.vectors[0]), torch.from_numpy(matrix.dense) @ x)
        torch.testing.assert_close(reply.scalars[0], torch.from_numpy(matrix.dense) @ x[:, 0])
    assert Counted.asked == 2


def test_variants_do_not_mix():
    both = Blocks.of([ring(6), star(6)])
    dense = Matrix(both.indices, both.weights).dense
    assert np.array_equal(dense[:6, :6], ring(6).dense)
    assert np.array_equal(dense[6:, 6:], star(6).dense)
    assert not dense[:6, 6:].any()
    assert not dense[6:, :6].any()


def test_variants_repeat_when_all_do():
    twice, thrice = Fixed((ring(6),) * 2), Fixed((star(6),) * 3)
    assert SideBySide([twice, thrice]).period == 6

    class Endless(Fixed):
        period = None

    assert SideBySide([twice, Endless((ring(6),))]).period is None
