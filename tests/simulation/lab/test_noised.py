"""Clip and noise of simulated peers: of the size that the budget says, and of no other algorithm."""

import math

import numpy as np
import pytest
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.privacy import Budget
from p2pfl.core.settings import validate
from p2pfl.learning.algorithms import LocalSgd
from p2pfl.learning.space import Block, Request, Space, Steps
from p2pfl.simulation.charter_terms import draft_terms, verify_peers
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


def test_a_draft_has_the_same_noise_and_real_peers_of_the_simulated_network_none():
    chosen = scenario(peers=8)
    tables, _ = draft_terms(chosen)
    noise = noise_of_scenario(chosen)
    assert tables["privacy"] == {"noise": noise.multiplier, "epsilon": 8.0, "delta": 1e-5}
    assert tables["training"]["clip_norm"] == 0.5
    with pytest.raises(InvalidConfig, match='privacy is for the engine "dense"'):
        verify_peers(chosen)
