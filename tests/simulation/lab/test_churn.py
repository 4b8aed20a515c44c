"""A scenario's faults among real peers' machines: rounds go on without those who are away, and who is back joins."""

import numpy as np
import pandas as pd
import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.simulation.presence import Presence
from p2pfl.simulation.scenario import Scenario
from p2pfl.simulation.simulate import simulate

ROUNDS, PEERS = 16, 8


def scenario(**values):
    settings = {
        "engine": "simnet", "peers": PEERS, "seeds": [3],
        "training": {"rounds": ROUNDS, "local_steps": 2, "batch_size": 40},
        "data": {"partition": "replacement", "examples": 40}, "averaging": {"topology": "exponential"},
        "evaluation": {"times": 4, "peers": PEERS}, "cost": {"step_seconds": 0.5},
    }  # fmt: skip
    for key, value in values.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return validate(Scenario, settings, "test")


@pytest.mark.parametrize(
    "averaging",
    [
        {"topology": "exponential"},
        {"topology": "groups", "group_size": 8},
        {"topology": "groups", "group_size": 8, "masks": "on"},
    ],
)
@pytest.mark.parametrize("algorithm", ["d-psgd", "k-gt"])
def test_rounds_go_on_without_those_who_left_and_they_come_back(averaging, algorithm):
    terms = scenario(averaging=averaging, faults={"leave": 0.08, "rejoin": 0.3}, training={"algorithm": algorithm})
    run = simulate(terms)
    presence = Presence(PEERS, 3, leave=0.08, rejoin=0.3)
    first = next(round for round in range(ROUNDS) if not presence.working(round).all())
    working = run.frame["working"].iloc[1:].to_numpy()
    assert (working[:first] == PEERS).all()
    assert working[first] < PEERS
    assert working[first:].min() >= PEERS // 2
    assert (np.diff(working) > 0).any(), "somebody came back"
    assert run.frame["train_loss"].iloc[-1] < 0.5 * run.frame["train_loss"].iloc[1]


def test_who_is_away_comes_back_also_where_those_left_are_too_few_to_get_on():
    averaging, faults = {"topology": "groups", "group_size": 6, "masks": "on"}, {"leave": 0.1, "rejoin": 0.4}
    run = simulate(scenario(peers=6, averaging=averaging, faults=faults, training={"rounds": 12}))
    assert run.summary["seeds"][0]["outcome"] == "done"
    assert run.frame["round"].iloc[-1] == 12


def test_equal_seeds_give_equal_bits_whatever_goes_wrong():
    wrong = {"leave": 0.08, "rejoin": 0.3, "loss": 0.02, "parts": 2, "split": 3, "heal": 7}
    one, other = simulate(scenario(faults=wrong)), simulate(scenario(faults=wrong))
    pd.testing.assert_frame_equal(one.frame, other.frame, check_exact=True)


def test_lost_messages_cost_seconds_and_no_peer():
    sound, lossy = simulate(scenario()), simulate(scenario(faults={"loss": 0.05}))
    assert lossy.frame["modelled_seconds"].iloc[-1] > sound.frame["modelled_seconds"].iloc[-1]
    assert list(lossy.frame["working"]) == [PEERS] * (ROUNDS + 1)


@pytest.mark.parametrize("engine", ["dense", "simnet"])
def test_a_partition_keeps_halves_apart_until_it_ends(engine):
    """Their data differ; so do their models, as long as nothing passes between them."""
    values = {
        "data": {"partition": "classes", "classes": 2, "settings": {}}, "averaging": {"topology": "complete"},
        "evaluation": {"times": ROUNDS + 1, "peers": PEERS}, "engine": engine,
    }  # fmt: skip
    whole = simulate(scenario(**values))
    parted = simulate(scenario(faults={"parts": 2, "split": 4, "heal": 10}, **values))
    assert (whole.frame["consensus"] < 1e-9).all()
    apart = parted.frame["consensus"].to_numpy()
    assert (apart[:4] < 1e-9).all()  # real peers' last exchange before it may be cut short
    assert (apart[6:10] > 1e-4).all()
    assert apart[-1] < apart[9] / 10
    assert list(parted.frame["working"]) == [PEERS] * (ROUNDS + 1)


def test_stacked_tensors_lose_no_messages():
    with pytest.raises(InvalidConfig, match=r"faults.loss is of messages"):
        scenario(engine="dense", faults={"loss": 0.1})
