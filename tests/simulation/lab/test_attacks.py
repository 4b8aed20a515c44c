"""Attacks do what was published, hurt the mean, and meet each defence."""

import numpy as np
import pytest
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.robust import (
    CoordinateMedian,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
    SelfCentredClipping,
    TrimmedMean,
)
from p2pfl.learning.task import Examples
from p2pfl.simulation.attacks import (
    ATTACKS,
    PATCH,
    TARGET,
    LoneLiar,
    Scene,
    classes_of,
    deviations,
    poisoned,
    success,
    triggered,
)

PEERS, ATTACKERS, VALUES = 20, 5, 400
LIES = [name for name, attack in ATTACKS.items() if attack.lie is not None and name != "backdoor"]
DEFENCES = [
    *(SelfCentredClipping(share=0.25), CoordinateMedian(), TrimmedMean(0.25), Krum(0.25), MultiKrum(0.25)),
    GeometricMedian(),
]


def generator(seed=0):
    return np.random.default_rng(seed)


def scene(seed=0, spread=0.3):
    """Honest peers that agree but for noise: they were around 5, and all go up by about 1."""
    random = generator(seed)
    before = random.normal(5.0, 0.01, (PEERS, VALUES))
    after = before + random.normal(1.0, spread, (PEERS, VALUES))
    honest, attackers = slice(ATTACKERS, None), slice(ATTACKERS)
    return Scene(after[honest], after[attackers], before[honest].mean(0), before[attackers])


def sent(name, seen, strength=None):
    attack = ATTACKS[name]
    return attack.lie(seen, attack.strength if strength is None else strength, generator(1))


def outcome(rule, seen, lies):
    """What the honest make of it: each its own vector first, equal weights."""
    everyone = np.concatenate([seen.honest, lies])
    weights = np.full(PEERS - 1, 1 / PEERS)
    return np.stack(
        [
            rule.aggregate(everyone[peer], np.delete(everyone, peer, axis=0), weights)
            for peer in range(len(seen.honest) if rule.centred else 1)
        ]
    )


def test_lies_are_what_they_are_called():
    seen = scene()
    np.testing.assert_allclose(sent("sign-flip", seen, 1.0) - seen.own_before, -(seen.own - seen.own_before))
    np.testing.assert_allclose(sent("scaling", seen, 3.0) - seen.own_before, 3 * (seen.own - seen.own_before))
    np.testing.assert_allclose(sent("free-rider", seen), seen.own_before)
    assert (sent("gaussian", seen, 2.0) - seen.own_before).std() == pytest.approx(2.0, rel=0.05)
    mean, before = seen.honest.mean(0), seen.honest_before
    ipm = sent("inner-product", seen, 0.5)
    assert ((ipm - before) @ (mean - before) < 0).all()
    np.testing.assert_allclose(ipm[0] - before, -0.5 * (mean - before))
    little = sent("a-little-is-enough", seen, 1.5)
    np.testing.assert_allclose(little, np.broadcast_to(mean - 1.5 * seen.honest.std(0), little.shape))


def test_a_liar_alone_lies_about_each_vector_and_within_its_limit():
    random = generator()
    before, own = random.normal(0.0, 1.0, (2, 10)).astype(np.float32)
    numbers = []

    def draw(round, vector):
        numbers.append((round, vector))
        return generator(vector)

    liar = LoneLiar(ATTACKS["sign-flip"].lie, 2.0, draw, None)
    sent = liar.sent(before, own, 3, 5)
    np.testing.assert_allclose(sent[:5], before[:5] - 2 * (own[:5] - before[:5]), rtol=1e-6)
    np.testing.assert_allclose(sent[5:], -2 * own[5:], rtol=1e-6)
    assert sent.dtype == np.float32
    assert numbers == [(3, 0), (3, 1)]
    cut = LoneLiar(ATTACKS["scaling"].lie, 1e38, draw, 4.0).sent(before, own, 3, 5)
    assert (np.abs(cut) == 4.0).all()


def test_attacks_say_whether_they_need_to_know_the_others():
    seen = scene()
    unknown = Scene(np.full_like(seen.honest, np.nan), seen.own, np.full(VALUES, np.nan), seen.own_before)
    for name in LIES:
        assert np.isfinite(sent(name, unknown)).all() == ATTACKS[name].alone


def test_z_of_a_little_is_enough_is_the_papers():
    assert deviations(50, 24) == pytest.approx(1.43, abs=0.005)  # the paper's example
    assert deviations(20, 5) == pytest.approx(0.253, abs=0.001)  # where a normal variable has 9 / 15 below it
    assert deviations(20, 1) == 0.0
    seen = scene()
    np.testing.assert_allclose(sent("a-little-is-enough", seen), sent("a-little-is-enough", seen, deviations(20, 5)))


@pytest.mark.parametrize("name", LIES)
def test_every_lie_moves_the_plain_mean_away(name):
    seen = scene()
    honest = outcome(Mean(), seen, seen.own)
    strength = {"gaussian": 200.0, "a-little-is-enough": 1.5}.get(name)
    strayed = outcome(Mean(), seen, sent(name, seen, strength))
    noise = np.linalg.norm(honest - seen.honest.mean(0))
    assert np.linalg.norm(strayed - seen.honest.mean(0)) > 2 * noise


@pytest.mark.parametrize("rule", DEFENCES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", [name for name in LIES if name not in ("a-little-is-enough", "inner-product")])
def test_every_defence_bears_crude_lies_however_strong(name, rule):
    """The published promise: within a constant of the spread of the honest, whatever the strength of the lie."""
    seen = scene()
    spread = np.sqrt(seen.honest.var(0).sum())
    for strength in (10.0, 1e4):
        made = outcome(rule, seen, sent(name, seen, strength))
        away = np.linalg.norm(made - seen.honest.mean(0), axis=1)
        # One's own vector is as far from the mean as the spread, and clipping starts from there; Krum ends at one.
        assert away.max() < 2 * spread
    if not isinstance(rule, Krum) and not rule.centred:
        assert away.max() < 0.7 * spread


@pytest.mark.parametrize("rule", [*DEFENCES, Mean()], ids=lambda rule: rule.name)
def test_what_hides_among_the_honest_is_not_found_but_bounded(rule):
    seen = scene()
    spread = np.sqrt(seen.honest.var(0).sum())
    made = outcome(rule, seen, sent("a-little-is-enough", seen, 1.0))
    away = np.linalg.norm(made - seen.honest.mean(0), axis=1)
    assert away.max() < 2 * spread
    if isinstance(rule, Krum) and not isinstance(rule, MultiKrum):
        # The paper's finding: liars close to each other and not far from others are what Krum chooses.
        np.testing.assert_allclose(made[0], sent("a-little-is-enough", seen, 1.0)[0])


def test_strong_inner_products_break_the_mean_and_not_the_median():
    seen = scene()
    update = seen.honest.mean(0) - seen.honest_before
    for rule, turned in ((Mean(), True), (CoordinateMedian(), False), (TrimmedMean(0.25), False)):
        made = outcome(rule, seen, sent("inner-product", seen, 10.0))[0]
        assert (((made - seen.honest_before) @ update) < 0) == turned


def digits(n=40):
    random = torch.Generator().manual_seed(0)
    return Examples(torch.rand(n, 1, 8, 8, generator=random), torch.arange(n) % 10)


def test_flipped_labels_are_the_opposite_ones():
    mine = np.arange(5, 15)
    found = poisoned(ATTACKS["label-flip"], digits(), mine, 0)
    assert torch.equal(found.inputs, digits().inputs[5:15])
    assert torch.equal(found.targets, 9 - digits().targets[5:15])


def test_a_backdoor_is_a_patch_and_a_class():
    mine = np.arange(1, 10)
    found = poisoned(ATTACKS["backdoor"], digits(), mine, 0)
    changed = (found.inputs != digits().inputs[1:10]).flatten(1).any(1)
    assert changed.sum() == 5
    assert (found.targets[changed] == TARGET).all()
    assert torch.equal(found.targets[~changed], digits().targets[1:10][~changed])
    difference = (found.inputs != digits().inputs[1:10])[changed]
    assert not difference[..., :-PATCH, :].any() and not difference[..., :-PATCH].any()
    flat = triggered(torch.zeros(2, 64), 1.0)
    assert flat.sum(1).tolist() == [PATCH, PATCH] and flat[0, -1] == 1.0
    again = poisoned(ATTACKS["backdoor"], digits(), mine, 0)
    assert torch.equal(found.inputs, again.inputs)


def test_success_is_counted_where_the_class_is_another():
    assert success(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 2])) == pytest.approx(2 / 3)
    assert np.isnan(success(torch.tensor([0]), torch.tensor([0])))


def test_attacks_on_classes_need_classes():
    numbers = Examples(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(InvalidConfig, match="label-flip is an attack on classes"):
        classes_of(ATTACKS["label-flip"], numbers)
    assert poisoned(ATTACKS["sign-flip"], numbers, np.arange(3), 0).targets.tolist() == [0.0, 0.0, 0.0]
