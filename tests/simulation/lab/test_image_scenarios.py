"""Image files in scenarios: two classes for each peer, convolutions of stacked peers, evaluations piece by piece."""

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from p2pfl.simulation.dense import evaluation
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.scenario import load
from p2pfl.simulation.simulate import simulate
from tests.learning.image_files import write_cifar10

SMALL = """
from p2pfl.learning.tasks.images import Cifar10

class Small(Cifar10):
    filters, hidden = (4, 8), 16
"""


@pytest.fixture
def folder(tmp_path):
    """Digits in the form of CIFAR-10, 32 by 32 pixels of three equal colours."""
    pixels, digits = load_digits(return_X_y=True)
    large = np.repeat(np.repeat(pixels.reshape(-1, 1, 8, 8), 4, 2), 4, 3) / 16 * 255
    return write_cifar10(tmp_path / "cifar", 100, 60, np.repeat(large, 3, 1)[:560].astype(np.uint8), digits[:560])


def test_two_classes_for_each_peer_and_one_model_for_all(folder, tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    asked = load("cifar10", [
        f"data.settings.path={folder}", f"data.task={tmp_path}/small.py:Small", "peers=5", "training.rounds=40",
        "averaging.topology=complete", "evaluation.times=2", "evaluation.peers=0",
    ])  # fmt: skip
    parts = Parts(asked)
    shares = parts.shares(0)
    for start, count in zip(shares.starts, shares.counts, strict=True):
        assert len(parts.data.train.targets[shares.order[start : start + count]].unique()) == 2
    run = simulate(asked)
    assert run.summary["tier"] == "stacked"
    assert run.summary["final"]["accuracy"]["median"] > 0.5


def test_the_papers_network_is_stacked(folder):
    run = simulate(load("cifar10", [
        f"data.settings.path={folder}", "data.settings.train=40", "data.settings.test=10", "data.partition=iid",
        "peers=2", "training.rounds=1", "training.local_steps=1", "training.batch_size=4", "averaging.topology=ring",
    ]))  # fmt: skip
    assert (run.summary["tier"], run.summary["parameters"]) == ("stacked", 2_156_490)


def test_evaluations_piece_by_piece_are_the_same(monkeypatch):
    asked = load("churn", ["sweep={}", "seeds=[0]", "training.rounds=4", "evaluation.times=2", "evaluation.peers=4"])
    whole = simulate(asked)
    monkeypatch.setattr(evaluation, "NUMBERS", 64 * 50)
    pieces = simulate(asked)
    pd.testing.assert_frame_equal(whole.frame, pieces.frame)
    pd.testing.assert_frame_equal(whole.peers, pieces.peers)
