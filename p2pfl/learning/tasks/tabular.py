"""A member's own table with a target column: the charter says what the columns hold, for all members alike.

Numbers are standardised by the whole federation's means and deviations. Nobody has those, so they are agreed on in a
masked sum before the first step: the model's buffers hold each number's moments, and round 0 does nothing but average
them.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2pfl.core.charter import TableTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.evaluation import ranking
from p2pfl.learning.table import CheckedTable, InputLayout, check_table
from p2pfl.learning.task import Data, Examples, Task

SPLIT_SEED = 20261121
"""Fixes which rows are held out, so that a peer that starts again trains on the same ones; any number would do."""

TEST_FRACTION = 0.2
"""Of each class's rows, held out where there is no file for that; customary."""

LEARNING_RATE = 0.5
"""Of plain SGD. Measured on made-up credits (`p2pfl.simulation.credit`, 60 rounds of 2 steps on all of 4 banks' data):
of 0.1, 0.3, 0.5 and 1.0, 0.1 was far behind at the end, 0.3 in the middle, and 1.0 overfitted a bank alone."""

LEAST_DEVIATION = 0.01
"""A number's deviation is taken for at least this, in halves of its range. Moments travel in float32 and in a fixed
point as coarse: below, the variance would be mostly their rounding."""

FARTHEST = 8.0
"""Standardised numbers are cut off this many deviations from the mean; a guess: one cell must not upset a step."""


class Scaling(nn.Module):
    """Standardises the numbers among the inputs, [n, width] to [n, width].

    The buffers are moments over rows: how many rows have the number, the sum of the numbers, and that of their squares,
    all by the number of rows. The mean is a quotient of two of them. So an update that enters a later sum than the
    others' still counts as it should: sums of moments are moments.

    Args:
        layout: where the numbers lie.
        constants: each number's mean and deviation in [-1, 1], float32 [2, numbers], where they are known beforehand.
    """

    measured: Tensor
    weight: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, layout: InputLayout, constants: Tensor | None = None) -> None:
        super().__init__()
        count = len(layout.numbers)
        self._count, self._absent = count, list(layout.absent)
        self._constants = constants
        if constants is None:
            self.register_buffer("measured", torch.zeros(1))
            for name in ("weight", "mean", "square"):
                self.register_buffer(name, torch.zeros(count))

    def standards(self) -> tuple[Tensor, Tensor]:
        """Return each number's mean and deviation, float32 [numbers]."""
        if self._constants is not None:
            mean, deviation = self._constants
            return mean, deviation
        weight = self.weight.double()
        known = weight > 0
        divisor = torch.where(known, weight, 1.0)
        mean = self.mean.double() / divisor
        variance = (self.square.double() / divisor - mean**2).clamp(min=LEAST_DEVIATION**2)
        deviation = torch.where(known, variance.sqrt(), 1.0)
        return mean.float(), deviation.float()

    def measure(self, inputs: Tensor) -> bool:
        """Set the buffers from inputs, [n, width], unless they hold something; return whether they were set."""
        if self._constants is not None or bool(self.measured.any()):
            return False
        present = self._present(inputs).double()
        numbers = inputs[:, : self._count].double()
        self.measured.fill_(1.0)
        self.weight.copy_(present.mean(0))
        self.mean.copy_((numbers * present).mean(0))
        self.square.copy_((numbers**2 * present).mean(0))
        return True

    def forward(self, inputs: Tensor) -> Tensor:
        """Standardise; a number that is missing becomes 0."""
        count = self._count
        mean, deviation = self.standards()
        scaled = ((inputs[:, :count] - mean) / deviation).clamp(-FARTHEST, FARTHEST) * self._present(inputs)
        return torch.cat([scaled, inputs[:, count:]], 1)

    def _present(self, inputs: Tensor) -> Tensor:
        """Return 1 where a number is there and 0 where it is missing, [n, numbers]."""
        count = self._count
        present = inputs.new_ones(len(inputs), count)
        present[:, self._absent] -= inputs[:, count : count + len(self._absent)]
        return present


class Within(nn.Module):
    """Maps outputs, [n, 1], from -1 to 1 onto low to high, [n]."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self._middle, self._half = (low + high) / 2, (high - low) / 2

    def forward(self, outputs: Tensor) -> Tensor:
        """Map."""
        return outputs.flatten() * self._half + self._middle


class Tabular(Task):
    """Classes or a number from a table's row: `Scaling`, then an MLP with the charter's hidden layers."""

    def __init__(self, table: TableTerms | None = None) -> None:
        self._table = table
        if table is not None:
            self.classes = table.target.classes or ()

    def with_table(self, table: TableTerms) -> Task:
        """Return the task for a table."""
        return Tabular(table)

    def model(self) -> nn.Module:
        """Make the model; without classes it gives one number in the target's own unit, [n]."""
        terms = self._terms()
        layout = InputLayout.of(terms)
        widths = [layout.width, *terms.hidden, len(self.classes) or 1]
        layers: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        layers = layers[:-1] if self.classes else [*layers[:-1], Within(*self._range())]
        scaling = Scaling(layout, _constants(terms, layout) if terms.scaling == "charter" else None)
        return nn.Sequential(OrderedDict(scaling=scaling, layers=nn.Sequential(*layers)))

    def data(self, settings: Mapping[str, object]) -> Data:
        """Read this peer's table: `path`, and `test_path` with rows that nobody trains on.

        Without `test_path`, a fixed fifth of each class's rows is held out.

        Raises:
            InvalidConfig: naming the key or the file and what is wrong with it.
        """
        unknown = sorted(set(settings) - {"path", "test_path"})
        if unknown:
            raise InvalidConfig(f"[data] has the unknown key {unknown[0]!r}; it may have path, test_path")
        path = settings.get("path")
        if not isinstance(path, str) or not path:
            raise InvalidConfig('[data] has no path; add path = "FILE", the CSV or Parquet file to train on')
        test_path = settings.get("test_path")
        if test_path is None:
            return self._split(self._examples(Path(path)))
        if not isinstance(test_path, str) or not test_path:
            raise InvalidConfig(f"[data] test_path is {test_path!r}; name a CSV or Parquet file, or remove it")
        return Data(self._examples(Path(path)), self._examples(Path(test_path)))

    def measure(self, model: nn.Module, train: Examples) -> bool:
        """Put this peer's moments into a model that has none."""
        scaling = model.get_submodule("scaling")
        return isinstance(scaling, Scaling) and scaling.measure(train.inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give the mean cross entropy; of numbers the mean square error in halves of the target's range."""
        if self.classes:
            return super().loss(outputs, targets)
        low, high = self._range()
        return nn.functional.mse_loss(outputs / ((high - low) / 2), targets / ((high - low) / 2))

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Give AUC and KS for two classes, accuracy for more, and for numbers R^2 and the RMSE."""
        if len(self.classes) == 2:
            scores = (outputs[:, 1] - outputs[:, 0]).double().numpy()
            ranked = ranking(targets.numpy() == 1, scores)
            return {"auc": ranked.auc, "ks": ranked.ks}
        if self.classes:
            return super().metrics(outputs, targets)
        error = float(((outputs - targets).double() ** 2).mean())
        variance = float(targets.double().var(correction=0))
        return {"r2": 1 - error / variance if variance else float("nan"), "rmse": error**0.5}

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make SGD at `LEARNING_RATE`."""
        return torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def read_inputs(self, path: Path) -> Tensor:
        """Read a table to classify; a target in it is not read.

        Raises:
            InvalidConfig: if the file does not fit the charter.
        """
        inputs = _flawless(Path(path), check_table(Path(path), self._terms(), with_target=False)).inputs
        return torch.from_numpy(inputs)

    def _terms(self) -> TableTerms:
        if self._table is None:
            raise InvalidConfig(
                "the charter has no task.table, which says what the columns hold; "
                "`p2pfl charter new --task tabular --data FILE --target COLUMN` drafts one from a file"
            )
        return self._table

    def _range(self) -> tuple[float, float]:
        target = self._terms().target
        return target.low or 0.0, target.high or 0.0

    def _examples(self, path: Path) -> Examples:
        table = _flawless(path, check_table(path, self._terms()))
        return Examples(torch.from_numpy(table.inputs), torch.from_numpy(table.targets))

    def _split(self, examples: Examples) -> Data:
        strata = examples.targets.numpy() if self.classes else np.zeros(len(examples), np.int64)
        held = torch.from_numpy(_held_out(strata))
        return Data(
            Examples(examples.inputs[~held], examples.targets[~held]),
            Examples(examples.inputs[held], examples.targets[held]),
        )


def _flawless(path: Path, table: CheckedTable) -> CheckedTable:
    if table.faults:
        more = len(table.faults) - 1
        others = f" (and {more} more; `p2pfl data check CHARTER {path}` lists them)" if more else ""
        raise InvalidConfig(f"{table.faults[0]}{others}")
    return table


def _held_out(strata: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Choose `TEST_FRACTION` of each stratum's rows, bool [rows], the same for the same file."""
    random = np.random.RandomState(SPLIT_SEED)  # its numbers are frozen for all versions (NEP 19)
    held = np.zeros(len(strata), np.bool_)
    for stratum in np.unique(strata):
        rows = random.permutation(np.flatnonzero(strata == stratum))
        held[rows[: round(TEST_FRACTION * len(rows))]] = True
    return held


def _constants(terms: TableTerms, layout: InputLayout) -> Tensor:
    """Return the charter's mean and deviation of each number in [-1, 1], float32 [2, numbers]."""
    means, deviations = [], []
    for name in layout.numbers:
        column = terms.columns[name]
        low, high = column.low or 0.0, column.high or 0.0
        means.append(((column.mean or 0.0) - low) / (high - low) * 2 - 1)
        deviations.append(max((column.deviation or 0.0) / (high - low) * 2, LEAST_DEVIATION))
    return torch.tensor([means, deviations], dtype=torch.float32)
