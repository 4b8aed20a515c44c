"""Handwritten digits, 8 by 8 pixels: scikit-learn's bundled copy of the UCI test set (1797 examples, ten classes).

Everything is in the package's dependencies, so nothing is downloaded. A fixed fifth is held out of all peers' training.
"""

from collections.abc import Iterable, Mapping

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from p2pfl.learning.partition import share
from p2pfl.learning.task import Data, Examples, Task

SPLIT_SEED = 20190913
"""Fixes the held-out fifth; any number would do, but all peers need the same."""

LEARNING_RATE = 0.5
"""Measured: of 0.1, 0.3, 0.5 and 1.0, over 60 rounds of 2 local steps by 8 peers (batch 32, dirichlet with alpha 0.5,
undirected exponential graph), 0.1 and 0.3 were slower; 1.0 was a little better, but its longest updates were 3 times
as long."""

BRIGHTEST = 16.0
"""A pixel's largest value in this data set."""


class Digits(Task):
    """Which digit an image shows: an MLP of 64-64-10 on 64 pixels in [0, 1]."""

    classes = tuple("0123456789")

    def model(self) -> nn.Module:
        """Make the MLP, 4810 parameters."""
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def data(self, settings: Mapping[str, object]) -> Data:
        """Give this peer's share of the training part, and the common held-out part.

        Raises:
            InvalidConfig: as `share` does.
        """
        pixels, digits = load_digits(return_X_y=True)
        train, test, train_digits, test_digits = train_test_split(
            pixels / BRIGHTEST, digits, test_size=0.2, stratify=digits, random_state=SPLIT_SEED
        )
        everything = Examples(torch.tensor(train, dtype=torch.float32), torch.tensor(train_digits))
        test_examples = Examples(torch.tensor(test, dtype=torch.float32), torch.tensor(test_digits))
        return Data(share(everything, settings), test_examples)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make SGD at `LEARNING_RATE`."""
        return torch.optim.SGD(parameters, lr=LEARNING_RATE)
