from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.learning import evaluation
from p2pfl.learning.evaluation import evaluate, forward, predict, ranking
from p2pfl.learning.task import Examples, load_task, read_data
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import initial

TASK = load_task("breast-cancer", Path()).task


def identity_examples(outputs, targets):
    return Examples(torch.tensor(outputs), torch.tensor(targets))


def test_binary_measures_by_hand():
    """Scores 0.1 0.4 0.35 0.8 of classes 0 0 1 1: scikit-learn's documented example, AUC 0.75, KS 0.5."""
    logits = [[0.0, float(np.log(p / (1 - p)))] for p in (0.1, 0.4, 0.35, 0.8)]
    measured = evaluate(TASK, nn.Identity(), identity_examples(logits, [0, 0, 1, 1]))
    assert measured.auc == 0.75
    assert measured.ks == 0.5
    assert measured.accuracy == 0.75
    assert measured.n == 4
    np.testing.assert_array_equal(measured.confusion, [[2, 0], [1, 1]])


def test_many_classes_agree_with_scikit_learn():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(200) % 5
    outputs = torch.randn(200, 5, generator=generator) + nn.functional.one_hot(targets, 5)
    measured = evaluate(TASK, nn.Identity(), Examples(outputs, targets))
    probabilities = torch.softmax(outputs.double(), 1).numpy()
    assert measured.auc == pytest.approx(roc_auc_score(targets, probabilities, multi_class="ovr"))
    assert 0 < measured.ks <= 1
    assert measured.confusion.sum() == 200
    assert measured.accuracy == np.trace(measured.confusion) / 200


def test_ks_agrees_with_the_two_sample_statistic():
    from scipy.stats import ks_2samp

    random = np.random.default_rng(3)
    positive = random.random(300) < 0.3
    scores = np.round(random.normal(size=300) + positive, 1)
    assert ranking(positive, scores).ks == pytest.approx(ks_2samp(scores[positive], scores[~positive]).statistic)


def test_absent_classes_do_not_count_and_one_class_has_no_auc():
    outputs = torch.eye(4)[[0, 1, 1]]
    measured = evaluate(TASK, nn.Identity(), Examples(outputs, torch.tensor([0, 1, 0])))
    assert measured.auc == pytest.approx(0.75)
    assert measured.confusion.shape == (4, 4)
    alone = evaluate(TASK, nn.Identity(), Examples(outputs[:, :2], torch.tensor([0, 0, 0])))
    assert np.isnan(alone.auc)
    assert np.isnan(alone.ks)


def test_prediction_gives_labels_and_probabilities():
    labels, probabilities = predict(TASK, nn.Identity(), torch.tensor([[0.0, 2.0], [1.0, -1.0]]))
    assert labels.tolist() == [1, 0]
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert probabilities[0, 1] == pytest.approx(1 / (1 + np.exp(-2)))


def test_chunks_change_nothing_and_the_mode_is_put_back(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    inputs = torch.randn(10, 4)
    whole = forward(model, inputs)
    monkeypatch.setattr(evaluation, "CHUNK", 3)
    torch.testing.assert_close(forward(model, inputs), whole)
    assert model.training
    assert not forward(model.eval(), inputs).requires_grad
    assert not model.training


def test_outputs_that_cannot_be_read_are_refused():
    with pytest.raises(InvalidConfig, match=r"BreastCancer\.model raised RuntimeError: mat1 and mat2 shapes"):
        predict(TASK, nn.Linear(3, 2), torch.zeros(2, 5))
    with pytest.raises(InvalidConfig, match=r"outputs of shape \[2, 1\]"):
        predict(TASK, nn.Linear(3, 1), torch.zeros(2, 3))
    with pytest.raises(RoundFailed, match="not finite"):
        predict(TASK, nn.Identity(), torch.tensor([[0.0, float("nan")]]))


def test_breast_cancer_is_learned():
    data = read_data(TASK, {})
    assert torch.allclose(data.train.inputs.mean(0), torch.zeros(30), atol=1e-5)
    assert len(data.train) + len(data.test) == 569
    trainer = Trainer(TASK, data, local_steps=150, batch_size=32, clip_norm=0.0, seed=0)
    measured = trainer.evaluate(trainer.train(initial(TASK, 0), 0).vector)
    assert measured["accuracy"] > 0.9
    assert measured["auc"] == pytest.approx(evaluate(TASK, trainer.model, data.test).auc)
    assert measured["auc"] > 0.97


def test_shares_do_not_move_the_held_out_examples():
    parts = [read_data(TASK, {"peers": 3, "index": i}) for i in range(3)]
    assert all(torch.equal(p.test.inputs, parts[0].test.inputs) for p in parts)
    assert sum(len(p.train) for p in parts) == 455
