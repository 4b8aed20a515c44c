"""Scenarios give the same on another device, one that refuses to mix its tensors with the CPU's."""

import pandas as pd
import pytest
import torch

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.algorithms import ALGORITHMS
from p2pfl.simulation.simulate import simulate
from p2pfl.simulation.sweep import sweep
from tests.simulation.lab.other_device import OtherDevice
from tests.simulation.lab.test_simulate import scenario

OPTIONS = {
    "partial-sharing": {"options": {"personal": ["2"]}},
    "d2": {"local_steps": 1},
    "gradient-tracking": {"local_steps": 1},
}
ELSEWHERE = {"ad-psgd"}
"""Algorithms of another engine, which has no device."""

GROUPS = {"topology": "groups", "group_size": 3}

CASES = {
    "masks": {"averaging": GROUPS | {"masks": "on"}},
    "absence": {"participation": 0.7, "faults": {"missed": 0.2, "leave": 0.1}, "averaging": GROUPS},
    "changing graph": {"averaging": {"topology": "el-local"}},
    "directed graph": {"averaging": {"topology": "random-push"}, "training": {"algorithm": "push-sum"}},
    "complete graph": {"averaging": {"topology": "complete"}},
    "seeds": {"seeds": [0, 1]},
    "attack": {"attackers": {"attack": "sign-flip", "count": 1}, "defence": {"rule": "median"}},
    "backdoor": {"attackers": {"attack": "backdoor", "count": 1}},
    "group median": {
        "peers": 9,
        "averaging": GROUPS | {"masks": "on"},
        "attackers": {"attack": "scaling", "count": 1},
        "defence": {"rule": "group-median"},
    },
    "top-k": {"compression": {"name": "top-k", "ratio": 0.1}},
    "rand-k": {"compression": {"name": "rand-k", "ratio": 0.5}},
    "quantised choco": {"training": {"algorithm": "choco-sgd"}, "compression": {"name": "quantise", "bits": 8}},
    "table": {"data": {"task": "breast-cancer"}},
    "quadratics": {"data": {"task": "quadratics", "partition": "iid"}},
    "synthetic": {"data": {"task": "synthetic"}},
}


TIERS = {
    "stacked": "nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)",
    "vmap": "nn.Linear(64, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 10)",
}
TASK = """
from torch import nn

from p2pfl.learning.tasks.digits import Digits


class Mine(Digits):
    def model(self):
        return nn.Sequential({layers})
"""


def verify(values):
    asked = scenario(**values)
    expected = simulate(asked)
    with OtherDevice() as device:
        found = simulate(asked, device="meta")
    assert device.operations > 100
    assert (expected.summary["device"], found.summary["device"]) == ("cpu", "meta")
    pd.testing.assert_frame_equal(expected.frame, found.frame, rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(expected.peers, found.peers, rtol=1e-4, atol=1e-6)
    return found.summary["tier"]


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - ELSEWHERE))
def test_algorithms(name):
    assert verify({"training": {"algorithm": name} | OPTIONS.get(name, {})}) == "fused"


@pytest.mark.parametrize("tier", TIERS)
def test_tiers(tmp_path, tier):
    (tmp_path / "mine.py").write_text(TASK.format(layers=TIERS[tier]))
    assert verify({"data": {"task": f"{tmp_path / 'mine.py'}:Mine"}}) == tier


@pytest.mark.parametrize("tier", TIERS)
def test_a_task_s_own_optimizer(tmp_path, tier):
    made = "    def optimizer(self, parameters):\n        return torch.optim.Adam(parameters, lr=0.01)\n"
    source = "import torch\n" + TASK.format(layers=TIERS[tier]) + "\n" + made
    (tmp_path / "mine.py").write_text(source)
    assert verify({"data": {"task": f"{tmp_path / 'mine.py'}:Mine"}}) == tier


@pytest.mark.parametrize("name", CASES)
def test_exchanges_and_tasks(name):
    verify(CASES[name])


@pytest.mark.parametrize("name", ["nonsense", "meta"])
def test_a_device_that_cannot_compute_is_refused_in_one_line(name):
    with pytest.raises(InvalidConfig, match=f"device {name}: torch cannot compute there") as raised:
        simulate(scenario(), device=name)
    assert "\n" not in str(raised.value)


def test_a_sweep_finds_that_out_before_its_runs(tmp_path):
    with pytest.raises(InvalidConfig, match="device nonsense: torch cannot compute there"):
        sweep(scenario(sweep={"data.alpha": [0.1, 1.0]}), tmp_path, device="nonsense")


def test_real_peers_have_no_other_device():
    with pytest.raises(InvalidConfig, match="device cuda: real peers' trainers run on the CPU"):
        simulate(scenario(engine="simnet"), device="cuda")


def test_tensors_of_two_devices_may_not_meet():
    there, here = torch.ones(3), torch.ones(3)
    with OtherDevice():
        there = there.to("meta")
        assert (there + 1).cpu().tolist() == [2.0, 2.0, 2.0]
        with pytest.raises(AssertionError, match="two devices"):
            there + here
        with pytest.raises(AssertionError, match="two devices"):
            torch.mm(there.view(1, 3), here.view(3, 1))
        with pytest.raises(RuntimeError, match="not supported"):
            there.numpy()
