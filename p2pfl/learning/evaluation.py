"""How good a model is on examples, and what it says about inputs.

Owns the measures people read at the end of a run. Must not train, and must not change the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.learning.task import Examples, Task, blame

CHUNK = 1024
"""Examples in one forward pass: bounds the memory of the layers between; a guess, with which a layer of 32 filters on
32 by 32 pixels takes 128 MiB."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measures.

    Attributes:
        accuracy: the fraction classified correctly.
        auc: the area under the ROC curve: of class 1 against 0, or the mean of one-vs-rest over more classes.
            nan where the examples hold one class only.
        ks: the Kolmogorov-Smirnov statistic, max |TPR - FPR| over thresholds; averaged as `auc` is.
        confusion: how many of class i (rows) were taken for class j (columns), int64 [classes, classes].
        n: how many examples.
    """

    accuracy: float
    auc: float
    ks: float
    confusion: NDArray[np.int64]
    n: int


@dataclass(frozen=True)
class Ranking:
    """How well scores rank positives above negatives: `auc` and `ks` as in `Evaluation`."""

    auc: float
    ks: float


def evaluate(task: Task, model: nn.Module, examples: Examples) -> Evaluation:
    """Measure a classifier on examples.

    Raises:
        InvalidConfig: if the model fails on these inputs.
        RoundFailed: if its outputs are not finite.
    """
    from sklearn.metrics import confusion_matrix  # noqa: PLC0415 - slow to load, and training does not need it

    labels, probabilities = predict(task, model, examples.inputs)
    targets = examples.targets.numpy()
    classes = probabilities.shape[1]
    rankings = [ranking(targets == c, probabilities[:, c]) for c in ([1] if classes == 2 else range(classes))]
    defined = [r for r in rankings if not np.isnan(r.auc)]
    return Evaluation(
        accuracy=float((labels == targets).mean()),
        auc=float(np.mean([r.auc for r in defined])) if defined else float("nan"),
        ks=float(np.mean([r.ks for r in defined])) if defined else float("nan"),
        confusion=confusion_matrix(targets, labels, labels=range(classes)).astype(np.int64),
        n=len(examples),
    )


def predict(task: Task, model: nn.Module, inputs: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Classify inputs [n, ...]: the most probable class, int64 [n], and the softmax, float64 [n, classes].

    Raises:
        InvalidConfig: if the model fails on these inputs, or does not give [n, classes] outputs.
        RoundFailed: if its outputs are not finite.
    """
    with blame(task, "model"):
        outputs = forward(model, inputs)
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        shape = list(outputs.shape)
        raise InvalidConfig(f"{type(task).__name__}.model gave outputs of shape {shape}; a classifier gives [n, 2+]")
    if not bool(torch.isfinite(outputs).all()):
        raise RoundFailed("the model's outputs are not finite: training diverged; use the model of an earlier round")
    probabilities: NDArray[np.float64] = torch.softmax(outputs.double(), 1).numpy()
    return outputs.argmax(1).numpy(), probabilities


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """Run a model in evaluation mode, without gradients: [n, ...] outputs for [n, ...] inputs."""
    with _evaluating(model), torch.inference_mode():
        if len(inputs) <= CHUNK:
            return model(inputs)  # type: ignore[no-any-return]
        return torch.cat([model(chunk) for chunk in inputs.split(CHUNK)])


def ranking(positive: NDArray[np.bool_], scores: NDArray[Any]) -> Ranking:
    """Measure scores [n], higher for those `positive` [n]; nan unless there are positives and negatives.

    AUC is the trapezoidal area under scikit-learn's ROC curve; KS the curve's largest distance from the diagonal,
    max |TPR - FPR|.
    """
    from sklearn.metrics import auc, roc_curve  # noqa: PLC0415 - slow to load, and training does not need it

    if positive.all() or not positive.any():
        return Ranking(float("nan"), float("nan"))
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    return Ranking(float(auc(false, true)), float(np.abs(true - false).max()))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
