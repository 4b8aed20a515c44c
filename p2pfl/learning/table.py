"""A member's table against the charter's: what is wrong with it, a line each, or numbers for a model.

Owns what faults a file can have, and how columns become inputs. Must not know models. Lines quote values of categories
and targets only, and go to whoever has the file, to nobody else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.charter import ColumnTerms, TableTerms, TargetTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.columns import MISSING, Columns, NumberColumn, TextColumn, read_columns

QUOTED_VALUES, QUOTED_LENGTH = 3, 40
"""Unknown values of a column that its line quotes, and characters of each: a guess at what still reads as one line."""


@dataclass(frozen=True)
class InputLayout:
    """Where each column lies in the inputs, columns in the order of their names.

    First the numbers, mapped to -1 to 1; then one input for each number that may be missing, 1 where it is; then for
    each category one input per value, one for other values and one for none, as its terms say.

    Attributes:
        numbers: the numbers' columns.
        absent: places in `numbers` of those that may be missing.
        categories: the categories' columns.
        width: how many inputs there are.
    """

    numbers: tuple[str, ...]
    absent: tuple[int, ...]
    categories: tuple[str, ...]
    width: int

    @classmethod
    def of(cls, terms: TableTerms) -> "InputLayout":
        """Lay out the inputs of a table."""
        columns = terms.columns
        numbers = tuple(name for name in sorted(columns) if columns[name].kind == "number")
        absent = tuple(place for place, name in enumerate(numbers) if columns[name].missing == "zero")
        categories = tuple(name for name in sorted(columns) if columns[name].kind == "category")
        return cls(
            numbers, absent, categories, len(numbers) + len(absent) + sum(_slots(columns[c]) for c in categories)
        )


@dataclass(frozen=True)
class CheckedTable:
    """What a file came to.

    Attributes:
        rows: how many it has.
        faults: what is wrong with it, a line each.
        unread: columns that the charter does not name.
        inputs: float32 [rows, width] as `InputLayout` says; None if anything is wrong.
        targets: int64 [rows], classes' numbers; or float32 [rows], the numbers as they are; None if anything is wrong
            or the target was not asked for.
    """

    rows: int
    faults: tuple[str, ...]
    unread: tuple[str, ...] = ()
    inputs: NDArray[np.float32] | None = None
    targets: NDArray[np.int64] | NDArray[np.float32] | None = None


def check_table(path: Path, terms: TableTerms, *, with_target: bool = True) -> CheckedTable:
    """Read a file and look for all that is wrong with it; nothing is raised for what a file holds."""
    target = terms.target.column
    wanted = {*terms.columns, *([target] if with_target else [])}
    try:
        columns = read_columns(path, wanted)
    except InvalidConfig as error:
        return CheckedTable(0, (str(error),))
    faults = list(_shape_faults(columns, sorted(wanted)))
    usable = set() if columns.ragged else wanted & set(columns.names) - columns.twice
    layout = InputLayout.of(terms)
    inputs = np.zeros((len(columns), layout.width), np.float32)
    for place, name in enumerate(layout.numbers):
        if name in usable:
            number = columns.numbers(name)
            faults += _number_faults(f"column {name!r}", number, terms.columns[name])
            absent = len(layout.numbers) + layout.absent.index(place) if place in layout.absent else None
            _fill_number(inputs, place, absent, number, terms.columns[name])
    start = len(layout.numbers) + len(layout.absent)
    for name in layout.categories:
        column = terms.columns[name]
        if name in usable:
            slots, found = _coded(columns, name, column.values or (), f"column {name!r}", column)
            faults += found
            rows = np.flatnonzero(slots >= 0)
            inputs[rows, start + slots[rows]] = 1.0
        start += _slots(column)
    targets = None
    if target in usable and with_target:
        targets, found = _targets(columns, terms.target)
        faults += found
    known = {*terms.columns, target}
    unread = tuple(name for name in columns.names if name not in known)
    prefixed = tuple(f"{path}: {fault}" for fault in faults)
    if prefixed:
        return CheckedTable(len(columns), prefixed, unread)
    return CheckedTable(len(columns), (), unread, inputs, targets)


def unit(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Map numbers of low to high to -1 to 1."""
    return (values - low) / (high - low) * 2.0 - 1.0


def _slots(column: ColumnTerms) -> int:
    return len(column.values or ()) + bool(column.other) + (column.missing == "zero")


def _shape_faults(columns: Columns, wanted: list[str]) -> Iterator[str]:
    if columns.ragged:
        where = _where(np.isin(np.arange(columns.ragged[-1]) + 1, columns.ragged))
        yield f"more or fewer cells than the header in {where}; correct that first: a cell may lack quotes"
    if not len(columns):
        yield "has no rows; it needs some below the header"
    for name in wanted:
        if name in columns.twice:
            yield f"column {name!r} is there twice; rename one"
        elif name not in columns.names:
            close = get_close_matches(name.lower(), [each.lower() for each in columns.names], 1)
            near = next((each for each in columns.names if [each.lower()] == close), None)
            hint = "" if near is None else f"; is it {_quoted(near)}?"
            yield f"there is no column {name!r}{hint or '; add it'}"


def _fill_number(
    inputs: NDArray[np.float32], place: int, absent: int | None, number: NumberColumn, terms: ColumnTerms
) -> None:
    low, high = terms.low or 0.0, terms.high or 0.0
    with np.errstate(all="ignore"):  # what is no number was found before, and keeps all from being used
        inputs[:, place] = np.where(number.empty, 0.0, unit(number.values, low, high))
    if absent is not None:
        inputs[:, absent] = number.empty


def _number_faults(what: str, column: NumberColumn, terms: ColumnTerms | TargetTerms) -> Iterator[str]:
    low, high = terms.low or 0.0, terms.high or 0.0
    foreign = np.isnan(column.values) & ~column.empty
    if foreign.any():
        yield f"{what}: no number in {_where(foreign)}; write numbers with a decimal point, or nothing"
    refuses = not isinstance(terms, ColumnTerms) or terms.missing == "refuse"
    if refuses and column.empty.any():
        advice = "drop these rows" if isinstance(terms, TargetTerms) else "fill or drop them"
        yield f"{what}: missing in {_where(column.empty)}; {advice}"
    with np.errstate(invalid="ignore"):
        outside = (column.values < low) | (column.values > high)
    if outside.any():
        span = f"{low:.15g} to {high:.15g}"
        yield f"{what}: outside of {span} in {_where(outside)}; correct them, or widen the charter's range"


def _coded(
    columns: Columns, name: str, values: tuple[str, ...], what: str, terms: ColumnTerms | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Return each row's slot, int64 [rows], -1 where it has none, and what is wrong; a target is without terms."""
    try:
        column = columns.text(name)
    except InvalidConfig as error:
        return np.full(len(columns), -1), [str(error)]
    places = {value: place for place, value in enumerate(values)}
    other = len(values) if terms is not None and terms.other else -1
    takes_none = terms is not None and terms.missing == "zero"
    none = len(values) + (other >= 0) if takes_none else -1
    empty = {code for code, value in enumerate(column.values) if value in MISSING and value not in places}
    # The last slot is found by -1, the code of an empty cell.
    slot_of = np.array(
        [none if code in empty else places.get(value, other) for code, value in enumerate(column.values)] + [none],
        np.int64,
    )
    is_empty = np.array([code in empty for code in range(len(column.values))] + [True])
    faults: list[str] = []
    missing = is_empty[column.codes]
    if missing.any() and not takes_none:
        advice = "drop these rows" if terms is None else "fill or drop them"
        faults.append(f"{what}: missing in {_where(missing)}; {advice}")
    slots: NDArray[np.int64] = slot_of[column.codes]
    unknown = (slots < 0) & ~missing
    if unknown.any():
        faults.append(f"{what}: {_unknown(column, unknown)}; the charter has {_listed(values)}")
    return slots, faults


def _targets(columns: Columns, terms: TargetTerms) -> tuple[NDArray[np.int64] | NDArray[np.float32] | None, list[str]]:
    what = f"target {terms.column!r}"
    if terms.classes is not None:
        return _coded(columns, terms.column, terms.classes, what, None)
    number = columns.numbers(terms.column)
    faults = list(_number_faults(what, number, terms))
    if faults:
        return None, faults
    return number.values.astype(np.float32), []


def _unknown(column: TextColumn, unknown: NDArray[np.bool_]) -> str:
    """Say which values are not known, the most frequent first, with the first row of each."""
    codes, firsts, counts = np.unique(column.codes[unknown], return_index=True, return_counts=True)
    rows = np.flatnonzero(unknown)
    order = sorted(range(len(codes)), key=lambda each: (-counts[each], firsts[each]))
    told = [
        f"{_quoted(column.values[codes[each]])} in {_rows(int(counts[each]))} (first row {rows[firsts[each]] + 1})"
        for each in order[:QUOTED_VALUES]
    ]
    more = len(codes) - len(told)
    return f"unknown {', '.join(told)}" + (f" and {more} more" if more else "")


def _listed(values: tuple[str, ...]) -> str:
    more = len(values) - 2 * QUOTED_VALUES
    return ", ".join(map(_quoted, values[: 2 * QUOTED_VALUES])) + (f" and {more} more" if more > 0 else "")


def _quoted(value: str) -> str:
    return repr(value if len(value) <= QUOTED_LENGTH else value[: QUOTED_LENGTH - 1] + "…")


def _where(rows: NDArray[np.bool_]) -> str:
    count = int(rows.sum())
    first = int(np.argmax(rows)) + 1
    return f"row {first}" if count == 1 else f"{_rows(count)}, the first row {first}"


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
