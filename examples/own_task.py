"""A task of your own: a small convolutional network on 8x8 digits. Use it as `own_task.py:SmallCnn`."""

from collections.abc import Iterable, Mapping

import torch
from sklearn.datasets import load_digits
from torch import nn

from p2pfl import Data, Examples, Task


class SmallCnn(Task):
    """GroupNorm, not BatchNorm: it keeps no statistics of one peer's data that averaging would blur."""

    classes = tuple("0123456789")

    def model(self) -> nn.Module:
        """Take 64 columns, as a CSV of images has them."""
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def data(self, settings: Mapping[str, object]) -> Data:
        """Each peer reads its own files here; this example takes every n-th image: [data] peers = n, index = i."""
        peers, index = int(str(settings.get("peers", 1))), int(str(settings.get("index", 0)))
        pixels, digits = load_digits(return_X_y=True)
        inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
        test = torch.arange(len(targets)) % 5 == 0
        train = Examples(inputs[~test][index::peers], targets[~test][index::peers])
        return Data(train, Examples(inputs[test], targets[test]))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Plain SGD: its steps need no state that averaging would contradict."""
        return torch.optim.SGD(parameters, lr=0.1)
