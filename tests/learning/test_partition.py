import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.partition import by_classes, by_quantity, dirichlet, iid, share
from p2pfl.learning.task import Examples

EXAMPLES = Examples(torch.arange(200.0).reshape(100, 2), torch.arange(100) % 4)


def dealt_once(parts, count):
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))


@settings(deadline=None, max_examples=100)
@given(
    targets=st.lists(st.integers(-3, 6), min_size=1, max_size=120),
    peers=st.integers(1, 12),
    alpha=st.floats(1e-9, 1e9),
    seed=st.integers(0, 2**32 - 1),
)
def test_dirichlet_deals_everything_once_and_evenly(targets, peers, alpha, seed):
    if len(targets) < peers:
        with pytest.raises(InvalidConfig):
            dirichlet(targets, peers, alpha, seed)
        return
    parts = dirichlet(targets, peers, alpha, seed)
    assert len(parts) == peers
    assert dealt_once(parts, len(targets))
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(p.dtype == np.int64 for p in parts)
    again = dirichlet(targets, peers, alpha, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 100), peers=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_iid_deals_everything_once_and_evenly(count, peers, seed):
    if count < peers:
        with pytest.raises(InvalidConfig):
            iid(count, peers, seed)
        return
    parts = iid(count, peers, seed)
    assert dealt_once(parts, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def distance_to_prior(alpha, seed):
    """Mean total variation between the peers' class proportions and everyone's."""
    targets = np.arange(4000) % 10
    parts = dirichlet(targets, 8, alpha, seed)
    shares = [np.bincount(targets[p], minlength=10) / len(p) for p in parts]
    return np.mean([np.abs(s - 0.1).sum() / 2 for s in shares])


def test_a_lower_alpha_skews_more():
    distances = [np.mean([distance_to_prior(alpha, seed) for seed in range(5)]) for alpha in (0.1, 1, 10, 1000)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.6
    assert distances[-1] < 0.1


def test_the_first_share_has_the_dirichlets_moments():
    """Of q ~ Dir(a p), a = 4 * 0.75: mean p and variance p (1 - p) / (a + 1); the draw adds p (1 - p) / n at most."""
    targets = np.arange(8000) % 4
    first = np.array([np.mean(targets[dirichlet(targets, 20, 0.75, seed)[0]] == 0) for seed in range(300)])
    assert abs(first.mean() - 0.25) < 0.04
    assert abs(first.var() - 0.25 * 0.75 / 4) < 0.012


def test_the_deal_is_the_same_for_ever():
    """Peers with other versions of numpy must deal alike, or their shares overlap."""
    assert [p.tolist() for p in dirichlet([0, 1, 2] * 4, 3, 0.5 / 3, 42)] == PINNED_DIRICHLET
    assert [p.tolist() for p in iid(7, 3, 42)] == PINNED_IID


PINNED_DIRICHLET = [[2, 5, 7, 8], [0, 3, 6, 9], [1, 4, 10, 11]]
PINNED_IID = [[0, 1, 5], [2, 4], [3, 6]]
PINNED_CLASSES = [[0, 2, 3, 8], [5, 7, 10, 11], [1, 4, 6, 9]]
PINNED_QUANTITY = [[0, 5], [1, 2, 3, 4, 6, 8], [7]]


@settings(deadline=None, max_examples=60)
@given(
    targets=st.lists(st.integers(-3, 4), min_size=60, max_size=120),
    peers=st.integers(1, 12),
    classes=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_peer_sees_so_many_classes_and_each_class_as_many_peers(targets, peers, classes, seed):
    kinds = set(targets)
    try:
        parts = by_classes(targets, peers, classes, seed)
    except InvalidConfig:
        fewest = min(targets.count(kind) for kind in kinds)
        hands = -(-peers * classes // len(kinds))
        assert classes > len(kinds) or peers * classes < len(kinds) or fewest < hands
        return
    assert dealt_once(parts, len(targets))
    seen = [set(np.array(targets)[part].tolist()) for part in parts]
    assert all(len(each) == classes for each in seen)
    hands = [sum(kind in each for each in seen) for kind in kinds]
    assert max(hands) - min(hands) <= 1


@settings(deadline=None, max_examples=60)
@given(count=st.integers(12, 200), peers=st.integers(1, 12), alpha=st.floats(1e-9, 1e9), seed=st.integers(0, 2**32 - 1))
def test_unequal_quantities_deal_everything_once(count, peers, alpha, seed):
    parts = by_quantity(count, peers, alpha, seed)
    assert dealt_once(parts, count)
    assert min(map(len, parts)) >= 1
    assert all(part.dtype == np.int64 for part in parts)


def test_quantities_have_the_dirichlets_moments():
    """Of Dir(a) over m peers: mean 1 / m and variance (1 / m) (1 - 1 / m) / (a m + 1)."""
    shares = np.array([[len(part) / 10_000 for part in by_quantity(10_000, 5, 0.7, seed)] for seed in range(400)])
    assert shares.mean() == pytest.approx(0.2)
    assert shares.var() == pytest.approx(0.2 * 0.8 / 4.5, rel=0.1)


def test_dealers_of_classes_and_quantities_are_the_same_for_ever():
    assert [p.tolist() for p in by_classes([0, 1, 2] * 4, 3, 2, 42)] == PINNED_CLASSES
    assert [p.tolist() for p in by_quantity(9, 3, 0.5, 42)] == PINNED_QUANTITY


@pytest.mark.parametrize(("peers", "minimum"), [(0, 1), (-1, 1), (101, 1), (10, 11)])
def test_too_many_peers_are_refused(peers, minimum):
    with pytest.raises(InvalidConfig, match="use fewer peers"):
        dirichlet(np.zeros(100), peers, 1.0, 0, minimum)
    with pytest.raises(InvalidConfig, match="use fewer peers"):
        iid(100, peers, 0, minimum)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_is_a_positive_number(alpha):
    with pytest.raises(InvalidConfig, match="alpha is"):
        dirichlet(np.zeros(100), 2, alpha, 0)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"partition": "iid"},
        {"partition": "dirichlet", "alpha": 1},
        {"partition": "quantity", "alpha": 1},
        {"partition": "classes", "classes": 2},
    ],
)
def test_shares_are_a_partition(extra):
    shares = [share(EXAMPLES, {"peers": 7, "index": i, "seed": 3} | extra) for i in range(7)]
    rows = torch.cat([s.inputs[:, 0] for s in shares])
    assert torch.equal(rows.sort().values, EXAMPLES.inputs[:, 0])
    assert all(torch.equal(s.targets, (s.inputs[:, 0] / 2).long() % 4) for s in shares)


def test_without_peers_a_peer_has_everything():
    assert share(EXAMPLES, {}) is EXAMPLES
    assert share(EXAMPLES, {"path": "x"}, also=("path",)) is EXAMPLES


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"peer": 3}, "unknown key 'peer'; it may have partition, alpha, classes, peers, index, seed"),
        ({"index": 3}, "'index' but no 'peers'"),
        ({"peers": 3}, "no 'index'; add a whole number from 0 to 2"),
        ({"peers": 3, "index": 3}, "index is 3; it must be a whole number from 0 to 2"),
        ({"peers": 3, "index": -1}, "index is -1"),
        ({"peers": True, "index": 0}, "peers is True"),
        ({"peers": 101, "index": 0}, "peers is 101; it must be a whole number from 1 to 100"),
        ({"peers": 3, "index": 0, "seed": -1}, "seed is -1"),
        ({"peers": 3, "index": 0, "seed": "a"}, "seed is 'a'"),
        (
            {"peers": 3, "index": 0, "partition": "even"},
            'partition is \'even\'; use "iid", "dirichlet", "quantity" or "classes"',
        ),
        ({"peers": 3, "index": 0, "partition": ["iid"]}, "partition is ['iid']"),
        ({"peers": 3, "index": 0, "partition": "classes"}, "no 'classes'; add a whole number"),
        ({"peers": 3, "index": 0, "partition": "classes", "classes": 2, "alpha": 1.0}, "'alpha' but deals classes"),
        ({"peers": 3, "index": 0, "partition": "classes", "classes": 5}, "5 classes for each peer, and there are 4"),
        ({"peers": 1, "index": 0, "partition": "classes", "classes": 3}, "leave some to nobody"),
        ({"peers": 60, "index": 0, "partition": "classes", "classes": 2}, "has 25 examples for 30 peers"),
        ({"peers": 3, "index": 0, "partition": "quantity"}, "a quantity partition needs a number"),
        ({"peers": 3, "index": 0, "partition": "quantity", "alpha": 0}, "alpha is 0"),
        ({"peers": 3, "index": 0, "partition": "dirichlet"}, "alpha is None"),
        ({"peers": 3, "index": 0, "partition": "dirichlet", "alpha": "x"}, "alpha is 'x'"),
        ({"peers": 3, "index": 0, "partition": "dirichlet", "alpha": 0}, "alpha is 0"),
        ({"peers": 3, "index": 0, "alpha": 1.0}, "'alpha' but deals iid"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(data, expected):
    with pytest.raises(InvalidConfig) as caught:
        share(EXAMPLES, data)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
