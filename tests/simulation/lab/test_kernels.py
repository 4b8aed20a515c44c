"""Every tier computes what a loop over torch modules does."""

import pytest
import torch
from torch import nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.space import Block, Space
from p2pfl.learning.task import Examples
from p2pfl.learning.tasks.digits import Digits
from p2pfl.learning.vector import assign, flatten, initial
from p2pfl.simulation.dense.kernels import TIERS, Pulls, kernel_for
from p2pfl.simulation.dense.kernels.fused import FusedKernel
from p2pfl.simulation.dense.kernels.vmap import VmapKernel
from tests.simulation.lab.stand_ins import Classes, cnn, mlp

N, STEPS, BATCH, LR = 5, 3, 8, 0.2
PLAIN = Pulls()
NEAR = {"rtol": 1e-5, "atol": 1e-6}
"""Float32 over a few steps: other tiers sum in another order."""


def chosen(count, peers=N, steps=STEPS, batch=BATCH):
    return torch.randint(0, count, (peers, steps, batch), generator=torch.Generator().manual_seed(1))


def starts(task, peers=N):
    return torch.stack([torch.from_numpy(initial(task, i)) for i in range(peers)])


def stepped(kernel, rows, batches, pulls=PLAIN):
    """Run a kernel over rows; return the rows afterwards and the losses."""
    space = Space(len(rows), kernel.blocks)
    result = kernel.steps(space, space.from_rows(rows), batches, LR, pulls, None)
    return space.rows(result.x), result.loss


def loop(task, rows, batches, pull=lambda peer, model: None, **settings):
    """Do the same with a torch module and a torch optimiser for each peer."""
    pool = task.data({}).train
    found, losses = [], []
    for peer, (row, own) in enumerate(zip(rows, batches, strict=True)):
        model = task.model()
        assign(model, row.numpy())
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, **settings)
        total = 0.0
        for batch in own:
            optimizer.zero_grad()
            loss = task.loss(model(pool.inputs[batch]), pool.targets[batch])
            loss.backward()
            pull(peer, model)
            optimizer.step()
            total += loss.item()
        found.append(torch.from_numpy(flatten(model)))
        losses.append(total / len(own))
    return torch.stack(found), torch.tensor(losses)


PERCEPTRONS = {"one layer": mlp(12, 5), "two": mlp(12, 16, 5), "four": mlp(12, 9, 20, 7, 5)}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("make", PERCEPTRONS.values(), ids=PERCEPTRONS.keys())
@pytest.mark.parametrize("chunk", [64, 2])
def test_perceptrons_are_trained_as_by_a_loop(tier, make, chunk):
    task = Classes(make)
    pool, rows = task.data({}).train, starts(task)
    kernel = TIERS[tier](task, pool, chunk)
    found, losses = stepped(kernel, rows, chosen(len(pool)))
    wanted, wanted_losses = loop(task, rows, chosen(len(pool)))
    torch.testing.assert_close(found, wanted, **NEAR)
    torch.testing.assert_close(losses, wanted_losses, **NEAR)


@pytest.mark.parametrize("tier", ["stacked", "vmap"])
def test_convolutions_are_trained_as_by_a_loop(tier):
    task = Classes(cnn, images=True)
    pool, rows = task.data({}).train, starts(task)
    found, losses = stepped(TIERS[tier](task, pool), rows, chosen(len(pool)))
    wanted, wanted_losses = loop(task, rows, chosen(len(pool)))
    torch.testing.assert_close(found, wanted, **NEAR)
    torch.testing.assert_close(losses, wanted_losses, **NEAR)


def test_rows_can_become_images():
    task = Classes(lambda: nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 5)))
    pool, rows = task.data({}).train, starts(task)
    kernel = kernel_for(task, pool)
    assert kernel.tier == "stacked"
    torch.testing.assert_close(stepped(kernel, rows, chosen(len(pool)))[0], loop(task, rows, chosen(len(pool)))[0])


def test_the_reference_gives_the_bits_of_the_loop():
    task = Digits()
    pool, rows = task.data({}).train, starts(task)
    batches = chosen(len(pool), batch=32)
    found, _ = stepped(VmapKernel(task, pool), rows, batches)
    assert torch.equal(found, loop(task, rows, batches)[0])


@pytest.mark.parametrize("tier", TIERS)
def test_a_gradient_is_that_of_the_loop(tier):
    task = Classes(mlp(12, 16, 5))
    pool, rows = task.data({}).train, starts(task)
    kernel = TIERS[tier](task, pool)
    space = Space(N, kernel.blocks)
    x, batch = space.from_rows(rows), chosen(len(pool), steps=1)
    gradient, losses = kernel.gradient(space, x, batch[:, 0])
    stepped_rows, loop_losses = loop(task, rows, batch)
    torch.testing.assert_close(space.rows(gradient), (rows - stepped_rows) / LR, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, loop_losses, **NEAR)
    assert torch.equal(space.rows(x), rows)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_torch(tier, nesterov):
    task = Classes(mlp(12, 16, 5))
    pool, rows = task.data({}).train, starts(task)
    kernel = TIERS[tier](task, pool, 2)
    momentum = Space(N, kernel.blocks).zeros()
    pulls = Pulls(momentum=momentum, beta=0.9, nesterov=nesterov)
    found, _ = stepped(kernel, rows, chosen(len(pool)), pulls)
    wanted, _ = loop(task, rows, chosen(len(pool)), momentum=0.9, nesterov=nesterov)
    torch.testing.assert_close(found, wanted, **NEAR)
    assert bool(momentum.any())


@pytest.mark.parametrize("tier", TIERS)
def test_corrections_and_proximal_pulls_are_added_to_the_gradient(tier):
    task = Classes(mlp(12, 16, 5))
    pool, rows = task.data({}).train, starts(task)
    kernel = TIERS[tier](task, pool, 2)
    space = Space(N, kernel.blocks)
    generator = torch.Generator().manual_seed(3)
    correction = torch.randn(rows.shape, generator=generator)
    pulls = Pulls(correction=space.from_rows(correction), prox=0.3, anchor=space.from_rows(rows))

    def pull(peer, model):
        row = torch.from_numpy(flatten(model))
        extra = (correction[peer] + 0.3 * (row - rows[peer])).split([p.numel() for p in model.parameters()])
        for parameter, part in zip(model.parameters(), extra, strict=True):
            parameter.grad += part.view_as(parameter)

    found, _ = stepped(kernel, rows, chosen(len(pool)), pulls)
    torch.testing.assert_close(found, loop(task, rows, chosen(len(pool)), pull)[0], **NEAR)


@pytest.mark.parametrize("tier", TIERS)
def test_the_result_goes_where_it_is_told(tier):
    task = Classes(mlp(12, 16, 5))
    pool, rows = task.data({}).train, starts(task)
    kernel = TIERS[tier](task, pool, 2)
    space = Space(N, kernel.blocks)
    x = space.from_rows(rows)
    fresh = kernel.steps(space, x, chosen(len(pool)), LR, Pulls(), None).x
    assert torch.equal(space.rows(x), rows)
    assert kernel.steps(space, x, chosen(len(pool)), LR, Pulls(), x).x is x
    assert torch.equal(x, fresh)


def test_an_anchor_is_not_overwritten():
    task = Classes(mlp(12, 5))
    kernel = kernel_for(task, task.data({}).train)
    space = Space(N, kernel.blocks)
    x = space.zeros()
    with pytest.raises(ValueError, match="anchor"):
        kernel.steps(space, x, chosen(100), LR, Pulls(prox=1.0, anchor=x), x)
    with pytest.raises(ValueError, match="anchor"):
        kernel.steps(space, x, chosen(100), LR, Pulls(prox=1.0), None)


def test_what_is_stored_beyond_the_classes_stays_zero():
    task = Classes(mlp(12, 16, 5))
    pool = task.data({}).train
    kernel = FusedKernel(task, pool)
    space = Space(N, kernel.blocks)
    assert space.stored > space.size
    x = kernel.steps(space, space.from_rows(starts(task)), chosen(len(pool)), LR, Pulls(), None).x
    head, bias = space.views(x)[-2:]
    assert head.shape == (N, 16, 16)
    assert bool(head[:, :5].any())
    assert not bool(head[:, 5:].any())
    assert not bool(bias[:, 5:].any())


def test_a_loss_beyond_float32_stays_finite():
    task = Classes(mlp(12, 5))
    pool = task.data({}).train
    kernel = FusedKernel(task, pool)
    space = Space(N, kernel.blocks)
    _, losses = kernel.gradient(space, space.from_rows(1000 * starts(task)), chosen(len(pool))[:, 0])
    assert bool(torch.isfinite(losses).all())
    assert float(losses.max()) <= 87.4


def test_a_task_s_own_loss_is_used():
    class Squares(Classes):
        def loss(self, outputs, targets):
            return (outputs.sum(1) - targets).square().mean()

    task = Squares(mlp(12, 16, 5))
    pool, rows = task.data({}).train, starts(task)
    kernel = kernel_for(task, pool)
    assert kernel.tier == "stacked"
    torch.testing.assert_close(
        stepped(kernel, rows, chosen(len(pool)))[0], loop(task, rows, chosen(len(pool)))[0], **NEAR
    )


class Own(nn.Module):
    """Tied, fixed and counted tensors, and dropout: what only the reference takes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.again = self.first
        self.fixed = nn.Parameter(torch.ones(12), requires_grad=False)
        self.register_buffer("scale", torch.full((12,), 2.0))
        self.register_buffer("count", torch.tensor(3))
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(12, 5)

    def forward(self, inputs):
        inner = self.again(self.first(inputs).relu()) * self.fixed * self.scale
        return self.last(self.dropout(inner))


def test_the_reference_takes_any_module():
    task = Classes(Own)
    pool, rows = task.data({}).train, starts(task)
    kernel = kernel_for(task, pool)
    assert kernel.tier == "vmap"
    torch.manual_seed(0)
    found, _ = stepped(kernel, rows, chosen(len(pool)))
    torch.manual_seed(0)
    again, _ = stepped(kernel, rows, chosen(len(pool)))
    space = Space(N, kernel.blocks)
    flat = space.from_rows(found)
    views = dict(zip([block.name for block in kernel.blocks], space.views(flat), strict=True))
    assert set(views) == {"first.weight", "first.bias", "fixed", "scale", "last.weight", "last.bias"}
    assert torch.equal(found, again)
    assert not torch.equal(found, rows)
    assert bool((views["fixed"] == 1).all())
    assert bool((views["scale"] == 2).all())


def test_running_statistics_are_refused():
    task = Classes(lambda: nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5)))
    with pytest.raises(InvalidConfig, match="GroupNorm"):
        kernel_for(task, task.data({}).train)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(12, 5, bias=False)),
        lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)),
        lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5)),
    ],
    ids=["no bias", "tanh", "rectified outputs", "nothing between"],
)
def test_the_fused_tier_refuses_other_models(make):
    task = Classes(make)
    pool = task.data({}).train
    with pytest.raises(InvalidConfig, match="fused"):
        kernel_for(task, pool, "fused")
    rows = starts(task)
    torch.testing.assert_close(
        stepped(kernel_for(task, pool), rows, chosen(len(pool)))[0], loop(task, rows, chosen(len(pool)))[0], **NEAR
    )


def test_fixed_and_tied_layers_go_to_the_reference():
    def tied():
        layer = nn.Linear(12, 12)
        return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(12, 5))

    def fixed():
        model = mlp(12, 8, 5)()
        model[0].weight.requires_grad_(False)
        return model

    for make in (tied, fixed):
        task = Classes(make)
        pool, rows = task.data({}).train, starts(task)
        kernel = kernel_for(task, pool)
        assert kernel.tier == "vmap"
        torch.testing.assert_close(
            stepped(kernel, rows, chosen(len(pool)))[0], loop(task, rows, chosen(len(pool)))[0], **NEAR
        )


def test_the_tier_is_named_and_known():
    task = Classes(mlp(12, 5))
    pool = task.data({}).train
    assert [kernel_for(task, pool, tier).tier for tier in TIERS] == list(TIERS)
    with pytest.raises(InvalidConfig, match="no tier"):
        kernel_for(task, pool, "magic")
    wide = Examples(pool.inputs.double(), pool.targets)
    assert kernel_for(task, wide).tier == "stacked"


SPACE = Space(
    4, (Block("a", (2, 3), (3, 2), swapped=True), Block("b", (3, 2), (16, 2)), Block("c", (3,), (16,)))
)  # fmt: skip


def test_a_space_keeps_rows_apart_from_what_it_stores():
    rows = torch.randn(4, SPACE.size, generator=torch.Generator().manual_seed(0))
    flat = SPACE.from_rows(rows)
    assert (SPACE.size, SPACE.stored, len(flat)) == (15, 54, 4 * 54)
    assert torch.equal(SPACE.rows(flat), rows)
    assert torch.equal(SPACE.rows(flat, torch.tensor([3, 1])), rows[[3, 1]])
    assert torch.equal(SPACE.rows(flat, slice(1, 3)), rows[1:3])
    factors = torch.tensor([1.0, -2.0, 0.0, 0.5])
    assert torch.equal(SPACE.rows(SPACE.scale(flat, factors)), rows * factors[:, None])
    other = SPACE.from_rows(rows.flip(0))
    torch.testing.assert_close(SPACE.dots(flat, other), (rows * rows.flip(0)).sum(1))
    torch.testing.assert_close(SPACE.mean(flat), rows.mean(0))
    torch.testing.assert_close(SPACE.mean(flat, slice(0, 2)), rows[:2].mean(0))
    chosen_peers = torch.tensor([True, False, False, True])
    mixed = SPACE.rows(SPACE.where(chosen_peers, flat, other))
    assert torch.equal(mixed, torch.stack([rows[0], rows[2], rows[1], rows[3]]))
    distance = (rows - rows.mean(0)).square().sum(1).mean()
    assert SPACE.consensus_distance(flat) == pytest.approx(float(distance))
    SPACE.put_rows(flat, torch.tensor([2]), torch.ones(1, 15))
    assert torch.equal(SPACE.rows(flat)[2], torch.ones(15))
    assert torch.equal(SPACE.rows(SPACE.from_rows(rows[0])), rows[0].expand(4, -1))


def test_a_block_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        Block("a", (2, 3), (2, 2))
    with pytest.raises(ValueError, match="matrices"):
        Block("a", (3,), (3,), swapped=True)


def test_a_class_that_does_not_exist_is_refused():
    task = Classes(mlp(12, 5))
    pool = task.data({}).train
    strange = Examples(pool.inputs, pool.targets + 1)
    with pytest.raises(InvalidConfig, match="fused"):
        kernel_for(task, strange, "fused")
