"""What is said of runs beside each other."""

from dataclasses import replace

import pytest

from p2pfl.core.settings import validate
from p2pfl.simulation.compare import cost_words
from p2pfl.simulation.scenario import Scenario
from p2pfl.simulation.simulate import simulate


def scenario(**other):
    return validate(
        Scenario,
        {
            "name": "small", "peers": 5, "seeds": [0, 1], "training": {"rounds": 1, "batch_size": 8},
            "averaging": {"topology": "ring"}, "evaluation": {"times": 2, "peers": 3},
        } | other,
        "test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return simulate(scenario())


def test_bytes_of_real_peers_are_counted_and_others_modelled(run):
    real = replace(run, scenario=scenario(engine="simnet"))
    pairs = replace(run, scenario=scenario(engine="simnet", training={"algorithm": "ad-psgd"}))
    assert "counted" not in cost_words([run, pairs])
    assert "modelled" not in cost_words([real])
    assert "counted" in cost_words([run, real])
    assert "modelled" in cost_words([run, real])
