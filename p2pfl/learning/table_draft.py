"""A proposal for a charter's table from one member's file.

Owns the guesses. What is proposed leaves this member with the draft, so it has neither exact extremes of numbers nor
values that few rows have; a person reads it before anybody else does.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from p2pfl.core.charter import LONGEST_TEXT, TableTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.learning.columns import MISSING, Columns, NumberColumn, TextColumn, read_columns

MOST_PROPOSED = 50
"""Values of a proposed category; a guess: columns with more hold names, places or keys."""
LEAST_ROWS = 10
"""A value that fewer rows have is not proposed: it could point to somebody. A guess, as customary in statistics."""
MOST_CLASSES = 20
"""Distinct numbers of a target that still count as classes; a guess."""


@dataclass(frozen=True)
class TableDraft:
    """A table's terms, and what whoever drew them up should look at, a line each."""

    terms: TableTerms
    review: tuple[str, ...]


def draft_table(path: Path, target: str) -> TableDraft:
    """Propose terms from a file: which columns are numbers or categories, of what range or values.

    Raises:
        InvalidConfig: the file cannot be read, has no such column, or none that can be an input.
    """
    columns = read_columns(path)
    if target not in columns.names:
        raise InvalidConfig(f"{path}: there is no column {target!r}; the columns are {', '.join(columns.names[:20])}")
    if not len(columns):
        raise InvalidConfig(f"{path}: has no rows; it needs some below the header")
    review: list[str] = []
    proposed: dict[str, dict[str, Any]] = {}
    for name in columns.names:
        if name == target or name in columns.twice:
            continue
        try:
            column, note = _column(columns, name)
        except InvalidConfig as error:  # its cells are neither text nor numbers
            column, note = None, f"left out: {error}"
        if column is not None:
            proposed[name] = column
        if note:
            review.append(f"{name if name.isprintable() else ascii(name)}: {note}")
    if not proposed:
        raise InvalidConfig(f"{path}: no column can be an input; {'; '.join(review) or 'it has none but the target'}")
    wanted, note = _target(columns, target)
    terms = validate(TableTerms, {"target": wanted, "columns": proposed}, str(path))
    return TableDraft(terms, (f"{target}: {note}", *review))


def _column(columns: Columns, name: str) -> tuple[dict[str, Any] | None, str]:
    """Return a column's terms, or None where it is left out; and what to look at."""
    if not 0 < len(name) <= LONGEST_TEXT or not name.isprintable():
        return None, "left out: its name is empty, too long or cannot be printed"
    number = columns.numbers(name)
    if number.empty.all():
        return None, "left out: it is empty"
    missing = {"missing": "zero" if number.empty.any() else "refuse"}
    if not np.isnan(number.values[~number.empty]).any() and np.isfinite(number.values[~number.empty]).all():
        if _is_key(number):
            return None, "left out: its whole numbers count the rows, as keys do"
        low, high = rounded_range(number)
        return {"kind": "number", "low": low, "high": high, **missing}, ""
    return _category(columns.text(name), missing)


def _category(text: TextColumn, missing: dict[str, str]) -> tuple[dict[str, Any] | None, str]:
    counts = np.bincount(text.codes[text.codes >= 0], minlength=len(text.values))
    held = [place for place, value in enumerate(text.values) if value not in MISSING]
    usual = [place for place in held if counts[place] >= LEAST_ROWS and len(text.values[place]) <= LONGEST_TEXT]
    usual = [place for place in usual if text.values[place].isprintable()]
    if not usual or len(usual) > MOST_PROPOSED:
        return None, f"left out: {len(held)} values, as names or keys have"
    terms = {"kind": "category", "values": sorted(text.values[place] for place in usual), **missing}
    rare = len(held) - len(usual)
    if not rare:
        return terms, ""
    what = f"{rare} more value{'s' if rare > 1 else ''} in fewer than {LEAST_ROWS} rows each count as other"
    return {**terms, "other": True}, f"{what}; add those that all members use"


def _target(columns: Columns, name: str) -> tuple[dict[str, Any], str]:
    text = columns.text(name)
    values = [value for value in text.values if value not in MISSING]
    numbers = columns.numbers(name)
    is_number = not np.isnan(numbers.values[~numbers.empty]).any()
    if is_number and len(values) > MOST_CLASSES:
        low, high = rounded_range(numbers)
        return {"column": name, "low": low, "high": high}, "the target, a number"
    if len(values) < 2:
        raise InvalidConfig(f"target {name!r} has {len(values)} value in this file; it needs two classes at least")
    classes = sorted(values, key=float) if is_number else sorted(values)
    ranked = f"; AUC and KS rank class 1, {classes[1]!r}: swap the classes if that is the wrong one"
    return {"column": name, "classes": classes}, f"the target, {len(classes)} classes{ranked * (len(classes) == 2)}"


def _is_key(column: NumberColumn) -> bool:
    """Say whether a column counts rows: whole numbers, all different, in order or with few gaps."""
    values = column.values[~column.empty]
    if len(values) <= LEAST_ROWS or (values != np.floor(values)).any() or len(np.unique(values)) < len(values):
        return False
    return bool((np.diff(values) > 0).all()) or float(np.ptp(values)) < 2 * len(values)


def rounded_range(column: NumberColumn) -> tuple[float, float]:
    """Return a range that holds all numbers, and whose ends tell neither the smallest nor the largest of them.

    Its ends are multiples of the power of ten below the span, beyond the extremes; 0 and 1 for flags, and 0 where
    nothing is negative and the next multiple would be.
    """
    values = column.values[~column.empty]
    least, most = float(values.min()), float(values.max())
    if np.isin(values, (0.0, 1.0)).all():
        return 0.0, 1.0
    step = 10.0 ** math.floor(math.log10(most - least or abs(most) or 1.0))
    low, high = (math.ceil(least / step) - 1) * step, (math.floor(most / step) + 1) * step
    low, high = (float(f"{end:.12g}") for end in (low, high))
    return (0.0 if least >= 0 > low else low), high
