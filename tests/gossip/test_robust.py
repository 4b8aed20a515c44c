"""Robust rules: what they bear, what they respect, and what they are without liars."""

import numpy as np
import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.robust import (
    RULES,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    Mean,
    MedianOfGroups,
    MultiKrum,
    SelfCentredClipping,
    TrimmedMean,
    rule,
    verify_masks,
)

EVERY = [
    *(Mean(), SelfCentredClipping(), SelfCentredClipping(radius=2.0), CoordinateMedian(), TrimmedMean(0.2)),
    *(Krum(0.2), MultiKrum(0.2), GeometricMedian(), MedianOfGroups()),
]
ROBUST = EVERY[1:]
POOLS = [each for each in EVERY if not each.centred]


def drawn(m=10, values=7, seed=0, spread=1.0):
    return np.random.default_rng(seed).normal(3.0, spread, (m, values))


def equal(m):
    return np.full(m - 1, 1 / m)


def of(chosen, vectors, weights=None):
    return chosen.aggregate(vectors[0], vectors[1:], equal(len(vectors)) if weights is None else weights)


def test_every_rule_is_tried():
    assert {type(each) for each in EVERY} == set(RULES.values())


@pytest.mark.parametrize("chosen", EVERY, ids=repr)
def test_where_all_agree_it_is_the_mean(chosen):
    vectors = np.repeat(drawn(1), 10, axis=0)
    np.testing.assert_allclose(of(chosen, vectors), vectors[0], rtol=1e-12)
    assert of(chosen, vectors.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize("chosen", EVERY, ids=repr)
def test_it_moves_with_the_vectors_and_does_not_mind_their_order(chosen):
    vectors = drawn()
    plain = of(chosen, vectors)
    np.testing.assert_allclose(of(chosen, vectors + 100.0), plain + 100.0, rtol=1e-6)
    order = np.array([0, 9, 4, 3, 7, 1, 8, 2, 6, 5])
    np.testing.assert_allclose(of(chosen, vectors[order]), plain, rtol=1e-6)
    if not chosen.centred:
        np.testing.assert_allclose(of(chosen, vectors[::-1]), plain, rtol=1e-6)


@pytest.mark.parametrize("chosen", EVERY, ids=repr)
def test_many_neighborhoods_at_once_are_each_alone(chosen):
    several = np.stack([drawn(seed=seed) for seed in range(6)]).reshape(2, 3, 10, 7)
    weights = np.random.default_rng(9).dirichlet(np.ones(10), (2, 3))[..., 1:]
    together = chosen.aggregate(several[..., 0, :], several[..., 1:, :], weights)
    for place in np.ndindex(2, 3):
        np.testing.assert_allclose(together[place], of(chosen, several[place], weights[place]), rtol=1e-5)


@pytest.mark.parametrize("chosen", [each for each in EVERY if not isinstance(each, Krum)], ids=repr)
def test_a_weight_of_two_is_two_of_weight_one(chosen):
    vectors = drawn(5)
    doubled = np.concatenate([vectors, vectors[3:4]])
    weights = np.array([1.0, 1.0, 2.0, 1.0]) / 6
    np.testing.assert_allclose(of(chosen, vectors, weights), of(chosen, doubled), rtol=1e-4)


def test_weights_count_in_the_mean_of_those_chosen():
    vectors = np.array([[0.0], [1.0], [2.0], [1.5], [500.0]])
    light, heavy = (of(MultiKrum(0.2), vectors, np.array([w, 0.2, 0.2, 0.2])) for w in (0.05, 0.35))
    assert light != heavy


@pytest.mark.parametrize(
    ("chosen", "bears", "breaks"),
    [
        (CoordinateMedian(), 4, 6),
        (GeometricMedian(), 4, 6),
        (TrimmedMean(0.2), 2, 3),
        (TrimmedMean(0.4), 4, 5),
        (Krum(0.3), 3, 7),
        (MultiKrum(0.3), 3, 7),
        (SelfCentredClipping(share=0.2), 2, 3),
        (Mean(), 0, 1),
    ],
    ids=repr,
)
def test_breakdown_points(chosen, bears, breaks):
    """Liars who agree on one far point: so many are borne, so many are not."""
    honest = drawn(10)

    def strayed(liars, far):
        vectors = honest.copy()
        vectors[10 - liars :] = far
        return np.abs(of(chosen, vectors) - honest[: 10 - liars].mean(0)).max()

    for far in (1e3, 1e6, -1e9):
        assert strayed(bears, far) < 4.0
    assert strayed(breaks, 1e6) > 100.0


def test_clipping_bounds_what_a_liar_does_whatever_it_sends():
    honest = drawn(10)
    for far in (10.0, 1e6, 1e30):
        vectors = honest.copy()
        vectors[9] = far
        without = of(SelfCentredClipping(radius=0.5), np.concatenate([honest[:9], honest[:1]]))
        moved = of(SelfCentredClipping(radius=0.5), vectors) - without
        assert np.linalg.norm(moved) <= 0.5 / 10 + 1e-9


def test_what_is_known_in_closed_form():
    vectors = np.array([[0.0], [1.0], [2.0], [3.0], [100.0]])
    np.testing.assert_allclose(of(CoordinateMedian(), vectors), 2.0)
    np.testing.assert_allclose(of(CoordinateMedian(), vectors[:4]), 1.5)
    np.testing.assert_allclose(of(TrimmedMean(0.2), vectors), 2.0)
    np.testing.assert_allclose(of(TrimmedMean(0.1), vectors), (0.5 * 0 + 1 + 2 + 3 + 0.5 * 100) / 4)
    np.testing.assert_allclose(of(TrimmedMean(0.0), vectors), vectors.mean())
    np.testing.assert_allclose(of(SelfCentredClipping(radius=1.0), vectors), 4 / 5)
    heavy = np.array([0.1, 0.1, 0.1, 0.6])
    np.testing.assert_allclose(of(CoordinateMedian(), vectors, heavy), 100.0)
    corners = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    np.testing.assert_allclose(of(GeometricMedian(), corners), [1.0, 1.0])
    # Fermat's point of a right triangle with legs of 1: x = y = (3 - sqrt 3) / 6.
    triangle = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(of(GeometricMedian(), triangle), (3 - np.sqrt(3)) / 6, atol=2e-3)


def test_krum_chooses_one_of_those_that_are_close_together():
    vectors = drawn(10, spread=0.1)
    vectors[6:] += np.array([[40.0], [-40.0], [80.0], [-90.0]])
    chosen = of(Krum(0.3), vectors)
    assert any(np.array_equal(chosen, each) for each in vectors[:6])
    several = of(MultiKrum(0.3), vectors)
    assert np.abs(several - 3.0).max() < 0.3


def test_krum_needs_enough_vectors():
    Krum(0.2).verify(5)
    with pytest.raises(InvalidConfig, match=r"krum with a share of 0\.34 needs 9 vectors where there are 6"):
        Krum(0.34).verify(6)
    CoordinateMedian().verify(1)


@pytest.mark.parametrize("chosen", EVERY, ids=repr)
def test_masks_go_with_rules_that_do_not_look_at_single_updates(chosen):
    verify_masks(chosen, masks=False)
    if isinstance(chosen, Mean | MedianOfGroups):
        verify_masks(chosen, masks=True)
        return
    with pytest.raises(InvalidConfig, match=f"{chosen.name} compares single updates, which masks hide") as raised:
        verify_masks(chosen, masks=True)
    assert "\n" not in str(raised.value)


def test_what_does_not_fit_is_refused():
    for name, options in (("trimmed-mean", {"share": 0.5}), ("clipping", {"radius": -1.0}), ("vote", {})):
        with pytest.raises(InvalidConfig):
            rule(name, **options)
    assert rule("trimmed-mean", share=0.3, radius=1.0) == TrimmedMean(0.3)


def test_the_largest_numbers_do_no_harm():
    vectors = drawn(10).astype(np.float32)
    vectors[8:] = np.finfo(np.float32).max
    for chosen in (CoordinateMedian(), TrimmedMean(0.2), MedianOfGroups()):
        assert np.abs(of(chosen, vectors)).max() < 10.0
