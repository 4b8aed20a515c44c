"""Breast cancer, Wisconsin (diagnostic): scikit-learn's bundled copy (569 examples of 30 measurements, two classes).

Everything is in the package's dependencies, so nothing is downloaded. A fixed fifth is held out of all peers' training.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from p2pfl.learning.evaluation import ranking
from p2pfl.learning.partition import share
from p2pfl.learning.task import Data, Examples, Task

SPLIT_SEED = 19951101
"""Fixes the held-out fifth; any number would do, but all peers need the same."""

LEARNING_RATE = 0.1
"""Measured: 8 peers (batch 16 or 32, dirichlet with alpha 0.5) reach what central training does within 30 rounds of 2
local steps; 0.3 is no better at the end."""


class BreastCancer(Task):
    """Whether a tumour is malignant (0) or benign (1): an MLP of 30-16-2 on standardised measurements."""

    classes = ("malignant", "benign")

    def model(self) -> nn.Module:
        """Make the MLP, 530 parameters."""
        return nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))

    def data(self, settings: Mapping[str, object]) -> Data:
        """Give this peer's share of the training part, and the common held-out part.

        Both are standardised by the mean and deviation of the whole training part, which is public and the same on
        every peer. Hospitals could not do that: they would have to agree on constants without pooling their data.

        Raises:
            InvalidConfig: as `share` does.
        """
        measured, classes = load_breast_cancer(return_X_y=True)
        train, test, train_classes, test_classes = train_test_split(
            measured, classes, test_size=0.2, stratify=classes, random_state=SPLIT_SEED
        )
        mean, deviation = train.mean(axis=0), train.std(axis=0)

        def standardised(rows: NDArray[np.float64], of: NDArray[np.int64]) -> Examples:
            return Examples(torch.tensor((rows - mean) / deviation, dtype=torch.float32), torch.tensor(of))

        return Data(share(standardised(train, train_classes), settings), standardised(test, test_classes))

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Give the fraction classified correctly, and the area under the ROC curve (nan with one class only)."""
        scores = (outputs[:, 1] - outputs[:, 0]).double().numpy()
        return {**super().metrics(outputs, targets), "auc": ranking(targets.numpy() == 1, scores).auc}

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make SGD at `LEARNING_RATE`."""
        return torch.optim.SGD(parameters, lr=LEARNING_RATE)
