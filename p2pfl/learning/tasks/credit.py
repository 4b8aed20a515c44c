"""Whether a credit is repaid: made-up banks whose customers differ, and one table of customers of all kinds to test on.

For scenarios: deal with `partition = "order"` to as many peers as `banks` says. The table is read as a member's own
would be (`tabular`); its means and deviations are in its terms, since stacked peers agree on nothing before they train.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch

from p2pfl.core.charter import ColumnTerms, TableTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.credit import SEGMENTS, TABLE, draw_credits
from p2pfl.learning.made import numbers
from p2pfl.learning.partition import dirichlet
from p2pfl.learning.table import check_table
from p2pfl.learning.task import Data, Examples
from p2pfl.learning.tasks.tabular import Tabular

SETTINGS = {"banks": 12.0, "alpha": 0.5, "rows": 300.0, "seed": 0.0}
"""How many banks; how alike their customers are, the Dirichlet concentration of their shares of each kind; rows of each
bank on average; and what all is drawn from. So few rows that a bank alone overfits its own customers: a guess at a
branch's book of one product."""

TEST_ROWS = 2000
"""A guess: AUC and KS are then known to about one in a hundred."""

SCALES = {
    "age": (43.0, 12.0), "income": (41_000.0, 30_000.0), "amount": (19_000.0, 22_000.0), "months": (44.0, 24.0),
    "late_payments": (1.0, 1.0),
}  # fmt: skip
"""Mean and deviation of each number over 200 000 drawn credits, rounded."""


def _column(name: str, terms: ColumnTerms) -> ColumnTerms:
    if name not in SCALES:
        return terms
    mean, deviation = SCALES[name]
    return terms.model_copy(update={"mean": mean, "deviation": deviation})


SCALED = TableTerms(
    target=TABLE.target,
    columns={name: _column(name, terms) for name, terms in TABLE.columns.items()},
    scaling="charter",
)


class Credit(Tabular):
    """Whether a credit is repaid, by AUC and KS."""

    def __init__(self) -> None:
        super().__init__(SCALED)

    def data(self, settings: Mapping[str, object]) -> Data:
        """Give all banks' customers, one bank's after another's, and the common table of tests.

        Raises:
            InvalidConfig: a setting is unknown or out of range.
        """
        banks, alpha, rows, seed = numbers(settings, SETTINGS)
        if min(banks, rows) < 1 or banks != int(banks) or rows != int(rows) or seed < 0 or seed != int(seed):
            raise InvalidConfig("[data] needs whole numbers of banks and rows from 1 on, and of seed from 0 on")
        random = np.random.RandomState(int(seed))
        segments = random.randint(SEGMENTS, size=int(banks * rows)).astype(np.int64)
        table = draw_credits(segments, random)
        order = np.concatenate(dirichlet(segments, int(banks), alpha, int(seed)))
        test = draw_credits(random.randint(SEGMENTS, size=TEST_ROWS).astype(np.int64), random)
        return Data(_examples(table.iloc[order]), _examples(test))


def _examples(table: pd.DataFrame) -> Examples:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "credits.csv"
        table.to_csv(path, index=False)
        checked = check_table(path, SCALED)
    return Examples(torch.from_numpy(checked.inputs), torch.from_numpy(checked.targets))
