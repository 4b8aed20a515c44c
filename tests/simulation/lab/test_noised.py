"""Clip and noise of simulated peers: of the size that the budget says, and of no other algorithm."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.privacy import Budget
from p2pfl.core.settings import validate
from p2pfl.gossip.grouping import noise_of
from p2pfl.gossip.mixing import consensus_distance
from p2pfl.learning.algorithms import LocalSgd
from p2pfl.learning.space import Block, Request, Space, Steps
from p2pfl.simulation import curves
from p2pfl.simulation.charter_terms import charter_of, draft_terms
from p2pfl.simulation.noised import Noised, noise_of_scenario, with_noise
from p2pfl.simulation.scenario import Scenario, load, points
from p2pfl.simulation.simulate import simulate

SPACE = Space(3, (Block("w", (50, 40), (64, 40)),))


class Moved:
    """Local steps that move each peer's first value by as much as its number, times ten."""

    lr, count = 0.1, 1

    def steps(self, x, **_):
        rows = SPACE.rows(x)
        rows[:, 0] += 10.0 * torch.arange(3.0)
        return Steps(x=SPACE.from_rows(rows), momentum=None, loss=torch.zeros(3))


def scenario(**values):
    base = {
        "peers": 8,
        "training": {"clip_norm": 0.5, "rounds": 20},
        "averaging": {"masks": "on", "group_size": 8},
        "privacy": {"epsilon": 8.0},
    }
    return validate(Scenario, base | values, "test")


def proposed(noise, state):
    return SPACE.rows(Noised(LocalSgd(), noise).propose(state, Moved(), SPACE)[1].vectors[0])


def test_each_peer_s_update_is_clipped_and_has_the_noise_of_the_budget():
    chosen = scenario()
    noise = noise_of_scenario(chosen)
    assert Budget(noise.multiplier, 8.0, 1e-5, 4000).rounds == 20
    assert (noise.clip, noise.honest) == (0.5, 2)
    torch.manual_seed(0)
    state = {"x": torch.zeros(SPACE.n * SPACE.stored)}
    rows = proposed(noise, state).numpy()
    assert rows[:, 1:].std() == pytest.approx(noise.deviation, rel=0.03)
    assert abs(np.corrcoef(rows[0], rows[1])[0, 1]) < 0.1
    clipped = Noised(LocalSgd(), type(noise)(0.5, 0.0, 1))
    _, request = clipped.propose(state, Moved(), SPACE)
    np.testing.assert_allclose(SPACE.rows(request.vectors[0])[:, 0], [0.0, 0.5, 0.5], rtol=1e-6)
    unused = SPACE.views(request.vectors[0])[0][:, 50:]
    assert not unused.any(), "what is stored beyond the model stays 0"
    assert isinstance(request, Request)


def test_more_survivors_need_less_noise_and_too_few_are_refused():
    many = scenario(privacy={"epsilon": 8.0, "survivors": 7})
    assert noise_of_scenario(many).deviation == pytest.approx(
        noise_of_scenario(scenario()).deviation * math.sqrt(2 / 6)
    )
    few = scenario(privacy={"epsilon": 8.0, "survivors": 3}, averaging={"masks": "on", "colluders": 3})
    with pytest.raises(InvalidConfig, match=r"with averaging\.colluders = 3 at least 5 are in a sum"):
        noise_of_scenario(few)


def test_only_algorithms_that_release_nothing_but_models_take_it():
    tracking = scenario(training={"clip_norm": 0.5, "algorithm": "gradient-tracking"})
    with pytest.raises(InvalidConfig, match="are clipped for d-psgd and local-sgd, not for gradient-tracking"):
        simulate(tracking)
    plain = LocalSgd()
    assert with_noise(plain, scenario(training={"rounds": 1}, privacy={})) is plain


def test_the_scenario_that_ships_shows_what_privacy_costs():
    reached = []
    for epsilon in (0.0, 2.0):
        point = next(each for each in points(load("privacy")) if each.privacy.epsilon == epsilon)
        changes = {"training": point.training.model_copy(update={"rounds": 6}), "seeds": (0,)}
        run = simulate(point.model_copy(update=changes))
        reached.append(run.evaluated["accuracy"].iloc[-1])
    assert reached[0] > reached[1] + 0.1


def test_a_draft_has_the_same_noise():
    chosen = scenario(peers=8)
    tables, _ = draft_terms(chosen)
    noise = noise_of_scenario(chosen)
    assert tables["privacy"] == {"noise": noise.multiplier, "epsilon": 8.0, "delta": 1e-5}
    assert tables["training"]["clip_norm"] == 0.5


SIMNET = {
    "engine": "simnet", "evaluation": {"times": 2, "peers": 8}, "data": {"partition": "replacement", "examples": 40},
    "training": {"clip_norm": 0.5, "rounds": 1, "local_steps": 2, "batch_size": 40},
}  # fmt: skip


def test_a_charter_in_the_simulated_network_has_the_same_noise_and_bears_all_rounds():
    for chosen in (scenario(), scenario(privacy={"epsilon": 1.0, "survivors": 7})):
        charter = charter_of(chosen, 4810, 2, 0)
        assert noise_of(charter) == noise_of_scenario(chosen)
        assert charter.rounds == chosen.training.rounds
    assert charter_of(scenario(privacy={}), 4810, 2, 0).privacy is None


@pytest.mark.parametrize("algorithm", ["d-psgd", "local-sgd"])
def test_peers_of_the_simulated_network_add_the_noise_of_the_budget(monkeypatch, algorithm):
    """The sum of 8 discrete noises of deviation s, over 8: s / sqrt(8) in each of 4810 values, give or take 1 %."""
    seen = []

    def kept(models):
        seen.append(models.copy())
        return consensus_distance(models)

    monkeypatch.setattr(curves, "consensus_distance", kept)
    training = SIMNET["training"] | {"algorithm": algorithm}
    noised = scenario(**SIMNET | {"training": training})
    run = simulate(noised)
    again, plain = simulate(noised), simulate(scenario(**SIMNET | {"training": training}, privacy={}))
    pd.testing.assert_frame_equal(run.frame, again.frame, check_exact=True)
    (_, one, _, same, _, without) = seen
    assert np.array_equal(one, same)
    assert (one == one[0]).all()
    added = (one - without)[0]
    expected = noise_of_scenario(noised).deviation / math.sqrt(8)
    assert added.std() == pytest.approx(expected, rel=0.05)
    assert abs(added.mean()) < 5 * expected / math.sqrt(len(added))
    assert run.frame["loss"].iloc[-1] != plain.frame["loss"].iloc[-1]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"averaging": {"masks": "on", "group_size": 4}, "privacy": {"epsilon": 8.0, "survivors": 5}},
            "groups or star",
        ),
        ({"averaging": {"masks": "on", "group_size": 8, "clip": 1e6}}, "too coarse for updates of norm 0.5"),
        ({"averaging": {"masks": "on", "group_size": 3, "colluders": 2}}, "groups of 4 to 4 bear 1"),
        ({"training": {"clip_norm": 0.5, "algorithm": "local-sgd", "options": {"beta": 0.9}}}, "has no bound"),
    ],
)
def test_noise_that_a_charter_refuses_is_refused_in_one_line(values, reason):
    with pytest.raises(InvalidConfig, match=reason) as raised:
        simulate(scenario(**SIMNET | values))
    assert "\n" not in str(raised.value)
