"""FedProx's synthetic(alpha, beta): peers whose models differ as alpha says, and whose inputs differ as beta says.

Li et al. 2020, arXiv 1812.06127, section 5.1. Peer k labels x by argmax(W_k x + b_k), where the entries of W_k and b_k
are normal around u_k, and u_k around 0 with variance alpha; the entries of x are normal around v_k, with variance
j^-1.2 in place j; v_k is normal around B_k, and B_k around 0 with variance beta. synthetic(0, 0) still has unequal
peers. Here all peers have equally many examples; the paper's numbers follow a power law.

For scenarios: deal with `partition = "order"` to as many peers as `peers` says.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.made import numbers
from p2pfl.learning.task import Data, Examples, Task

SIZE, CLASSES = 60, 10
"""As in the paper."""
SETTINGS = {"peers": 30.0, "alpha": 1.0, "beta": 1.0, "examples": 100.0, "seed": 0.0}
"""30 peers as in the paper; alpha and beta its most unequal case; examples of each peer, a guess; and what all is drawn
from."""
HELD = 0.2
"""Of each peer's examples, on top: what all are judged by together."""


class Synthetic(Task):
    """Which class a peer's own linear model gives: multinomial logistic regression, as in the paper."""

    classes = tuple("0123456789")

    def model(self) -> nn.Module:
        """Make the model, 610 parameters."""
        return nn.Linear(SIZE, CLASSES)

    def data(self, settings: Mapping[str, object]) -> Data:
        """Give all peers' examples, one peer's after another's, and what is held out of them.

        Raises:
            InvalidConfig: a setting is unknown or out of range.
        """
        peers, alpha, beta, examples, seed = numbers(settings, SETTINGS)
        if min(peers, examples) < 1 or min(alpha, beta, seed) < 0 or peers != int(peers) or examples != int(examples):
            raise InvalidConfig("[data] needs whole numbers of peers and examples from 1 on, and the rest from 0 on")
        random, count = np.random.RandomState(int(seed)), int(examples) + int(np.ceil(HELD * examples))
        deviations = np.arange(1, SIZE + 1) ** -0.6
        inputs, labels = [], []
        for _ in range(int(peers)):
            u, middle = np.sqrt(alpha) * random.standard_normal(), np.sqrt(beta) * random.standard_normal()
            v = middle + random.standard_normal(SIZE)
            weights, bias = u + random.standard_normal((SIZE, CLASSES)), u + random.standard_normal(CLASSES)
            x = v + deviations * random.standard_normal((count, SIZE))
            inputs.append(x)
            labels.append((x @ weights + bias).argmax(1))
        x, y = np.stack(inputs), np.stack(labels)
        split = int(examples)
        return Data(_examples(x[:, :split], y[:, :split]), _examples(x[:, split:], y[:, split:]))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make SGD at 0.01, as in the paper."""
        return torch.optim.SGD(parameters, lr=0.01)


def _examples(inputs: np.ndarray, targets: np.ndarray) -> Examples:
    flat: Tensor = torch.tensor(inputs.reshape(-1, SIZE), dtype=torch.float32)
    return Examples(flat, torch.tensor(targets.reshape(-1)))
