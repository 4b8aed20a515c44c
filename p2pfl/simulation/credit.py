"""Banks' tables of made-up credits, as files, for demonstrations and tests of the task `tabular`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from p2pfl.learning.credit import SEGMENTS, draw_credits
from p2pfl.learning.partition import dirichlet

ROWS_PER_BANK, TEST_ROWS = 300, 2000
"""So few that a bank alone overfits its own customers; a guess at a branch's book of one product."""


@dataclass(frozen=True)
class CreditFiles:
    """Where the tables are: each bank's, and one of rows that no bank trains on."""

    banks: tuple[Path, ...]
    test: Path


def write_credits(folder: Path, banks: int, alpha: float, seed: int) -> CreditFiles:
    """Write a CSV for each bank, and a common one for tests.

    Args:
        folder: where; it is made.
        banks: how many.
        alpha: how alike the banks' customers are: the Dirichlet concentration of their shares of each segment.
        seed: of all numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    segments = random.randint(SEGMENTS, size=ROWS_PER_BANK * banks).astype(np.int64)
    table = draw_credits(segments, random)
    test = draw_credits(random.randint(SEGMENTS, size=TEST_ROWS).astype(np.int64), random)
    files = []
    for number, rows in enumerate(dirichlet(segments, banks, alpha, seed)):
        files.append(folder / f"bank-{number}.csv")
        table.iloc[rows].to_csv(files[-1], index=False)
    test.to_csv(folder / "test.csv", index=False)
    return CreditFiles(tuple(files), folder / "test.csv")
