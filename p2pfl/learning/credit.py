"""Made-up credits with an outcome, so that a federation over tables can be shown without anybody's customers.

Owns how credits are drawn. Nothing in them is of a real person or bank; the numbers are guesses that make a plausible
table.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from p2pfl.core.charter import ColumnTerms, TableTerms, TargetTerms

SEGMENTS = 4
"""Kinds of customers: banks differ in their shares."""
JOBS = ("craft", "office", "retired", "self-employed", "student")
PURPOSES = ("car", "education", "home", "repair")

TABLE = TableTerms(
    target=TargetTerms(column="default", classes=("no", "yes")),
    columns={
        "age": ColumnTerms(kind="number", low=18, high=100),
        "income": ColumnTerms(kind="number", low=0, high=500_000, missing="zero"),
        "amount": ColumnTerms(kind="number", low=0, high=200_000),
        "months": ColumnTerms(kind="number", low=1, high=120),
        "late_payments": ColumnTerms(kind="number", low=0, high=50),
        "job": ColumnTerms(kind="category", values=JOBS, other=True),
        "purpose": ColumnTerms(kind="category", values=PURPOSES),
    },
)


def draw_credits(segments: NDArray[np.int64], random: np.random.RandomState) -> pd.DataFrame:
    """Draw a credit for each entry of `segments`, the kind of its customer: a row of `TABLE` each.

    A default is drawn from a logistic model with an interaction and a bend, so that a linear model misses some.
    """
    count = len(segments)
    shift = segments / (SEGMENTS - 1)  # 0 for the youngest and poorest, 1 for the oldest and richest
    age = np.clip(random.normal(30 + 25 * shift, 8, count), 18, 100).round()
    income = np.clip(random.lognormal(9.8 + 1.2 * shift, 0.5, count), 0, 500_000).round(-1)
    amount = np.clip(income * random.lognormal(-1.0, 0.7, count), 100, 200_000).round(-1)
    months = random.choice([12, 24, 36, 48, 60, 84], count)
    late = np.minimum(random.poisson(0.6 + 0.8 * (1 - shift), count), 50)
    job = random.choice(JOBS, count)
    purpose = random.choice(PURPOSES, count)
    burden = np.log(amount / income + 1e-3)
    risk = (
        -2.2 + 1.1 * burden + 0.7 * late - 0.02 * np.abs(age - 50) + 0.015 * months
        + 0.9 * (job == "student") - 0.8 * (job == "retired") * (late == 0) + 0.7 * (purpose == "education")
    )  # fmt: skip
    default = random.random_sample(count) < 1 / (1 + np.exp(-risk))
    known = random.random_sample(count) > 0.03
    return pd.DataFrame({
        "age": age.astype(int),
        "income": np.where(known, income, np.nan),
        "amount": amount,
        "months": months,
        "late_payments": late,
        "job": job,
        "purpose": purpose,
        "default": np.where(default, "yes", "no"),
    })  # fmt: skip
