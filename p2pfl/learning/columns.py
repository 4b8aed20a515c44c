"""Single columns of a member's table, from a CSV or Parquet file.

Owns the two formats: whatever differs between them ends here. Must not know what a column should hold. Cells are text
with the spaces around it removed, or numbers; rows count from 1, the first below the header.
"""

import csv
from collections import Counter
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig

MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "NULL", "null", "None"})
"""What stands for an empty cell in text, unless it is one of a category's values: what pandas, R and SQL write."""
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class TextColumn:
    """A column as text: `values[codes[row]]`, or nothing where the code is -1; codes are int64 [rows]."""

    values: tuple[str, ...]
    codes: NDArray[np.int64]


@dataclass(frozen=True)
class NumberColumn:
    """A column as numbers.

    Attributes:
        values: float64 [rows], nan where there is no number.
        empty: bool [rows], where the cell is empty: nan elsewhere is something that is no number.
    """

    values: NDArray[np.float64]
    empty: NDArray[np.bool_]


@dataclass(frozen=True)
class Columns:
    """The wanted columns of a file.

    Attributes:
        names: all columns of the file, in its order.
        ragged: rows with more or fewer cells than the header. They are in no column, so places there are no rows.
    """

    names: tuple[str, ...]
    ragged: tuple[int, ...]
    _table: Any

    def __len__(self) -> int:
        """Count the rows."""
        return int(self._table.num_rows)

    @cached_property
    def twice(self) -> frozenset[str]:
        """Names that more than one column has."""
        return frozenset(name for name, count in Counter(self.names).items() if count > 1)

    def text(self, name: str) -> TextColumn:
        """Return a column as text.

        Raises:
            InvalidConfig: its cells are none, but lists or the like.
        """
        import pyarrow as pa  # noqa: PLC0415 - takes a while to load, and few commands read tables

        cells = self._table[name]
        try:
            cells = _as_text(_plain(cells)).dictionary_encode().unify_dictionaries().combine_chunks()
        except pa.ArrowException as error:
            raise InvalidConfig(f"column {name!r}: holds {cells.type}, no text; write text or numbers") from error
        codes = cells.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return TextColumn(tuple(cells.dictionary.to_pylist()), codes)

    def numbers(self, name: str) -> NumberColumn:
        """Return a column as numbers."""
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.compute as pc  # noqa: PLC0415

        cells = _plain(self._table[name])
        if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
            kind = cells.type
            if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
                values = _floats(pc.cast(cells, pa.float64(), safe=False))
                return NumberColumn(values, np.isnan(values))
            # Dates, truth values and the like are no numbers in a CSV either.
            return NumberColumn(np.full(len(cells), np.nan), _flags(pc.is_null(cells)))
        cells = pc.utf8_trim_whitespace(cells)
        missing = pc.fill_null(pc.is_in(cells, value_set=pa.array(sorted(MISSING), cells.type)), True)
        cells = pc.if_else(missing, pa.scalar(None, cells.type), cells)
        return NumberColumn(_parsed(cells), _flags(missing))


def read_columns(path: Path, wanted: Collection[str] | None = None) -> Columns:
    """Read columns of a CSV file, with a header in its first line, or of a Parquet file; all, or those `wanted`.

    Cells of a CSV are separated by commas, semicolons or tabs: by what the header has most of.

    Raises:
        InvalidConfig: the file cannot be read, or is of another kind.
    """
    suffix = path.suffix.lower()
    if suffix not in {".csv", ".parquet"}:
        raise InvalidConfig(f"{path}: not a .csv or .parquet file; convert it")
    with _readable(path, suffix):
        return _read_csv(path, wanted) if suffix == ".csv" else _read_parquet(path, wanted)


@contextmanager
def _readable(path: Path, suffix: str) -> Any:
    import pyarrow as pa  # noqa: PLC0415

    try:
        yield
    except FileNotFoundError as error:
        raise InvalidConfig(f"there is no file {path}; correct the path") from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{path}: is not UTF-8; save it as CSV in UTF-8") from error
    except (OSError, pa.ArrowException, csv.Error) as error:
        # Arrow quotes cells in what it says: only the kind of the error is passed on.
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise InvalidConfig(f"{path}: cannot be read as {suffix[1:]} ({what}); check the file") from error


def _read_csv(path: Path, wanted: Collection[str] | None) -> Columns:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.csv as arrow_csv  # noqa: PLC0415

    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        delimiter = max(DELIMITERS, key=first.count)
        file.seek(0)
        raw = next(csv.reader(file, delimiter=delimiter), [])
    if not raw:
        raise InvalidConfig(f"{path}: is empty; it needs a header and rows")
    ragged: list[int] = []

    def skip(row: Any) -> str:
        ragged.append(row.number - 1)  # counted from the header
        return "skip"

    places = [str(number) for number in range(len(raw))]  # names may come twice
    names = [name.strip() for name in raw]
    chosen = [place for place, name in zip(places, names, strict=True) if wanted is None or name in wanted]
    kept = chosen or places[:1]
    with pa.OSFile(str(path)) as source:
        table = arrow_csv.read_csv(
            source,
            read_options=arrow_csv.ReadOptions(column_names=places, skip_rows=1, use_threads=False),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip
            ),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=kept, column_types=dict.fromkeys(places, pa.string()),
                strings_can_be_null=False,
            ),
        )  # fmt: skip
    return Columns(tuple(names), tuple(ragged), table.rename_columns([names[int(place)] for place in kept]))


def _read_parquet(path: Path, wanted: Collection[str] | None) -> Columns:
    import pyarrow.parquet as pq  # noqa: PLC0415

    with pq.ParquetFile(path) as file:
        names = tuple(file.schema_arrow.names)
        chosen = [name for name in names if wanted is None or name in wanted]
        return Columns(names, (), file.read(columns=chosen or list(names[:1])))


def _plain(cells: Any) -> Any:
    """Return cells that are not dictionary-encoded, as pandas writes categories."""
    import pyarrow as pa  # noqa: PLC0415

    return cells.cast(cells.type.value_type) if pa.types.is_dictionary(cells.type) else cells


def _as_text(cells: Any) -> Any:
    """Return cells as a CSV of pandas would have them: True for true, 3 for a whole float."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.compute as pc  # noqa: PLC0415

    if pa.types.is_boolean(cells.type):
        return pc.if_else(cells, "True", "False")
    if pa.types.is_floating(cells.type):
        values = _floats(cells.cast(pa.float64()))
        present = values[~np.isnan(values)]
        cells = pc.if_else(pc.is_nan(cells), pa.scalar(None, cells.type), cells)
        if (np.abs(present) < 2**53).all() and (present == np.floor(present)).all():
            cells = cells.cast(pa.int64())
    return pc.utf8_trim_whitespace(cells.cast(pa.string()))


def _parsed(cells: Any) -> NDArray[np.float64]:
    """Return text as numbers, float64 [rows]: nan where it is none."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.compute as pc  # noqa: PLC0415

    try:
        return _floats(pc.cast(cells, pa.float64()))
    except pa.ArrowException:
        import pandas as pd  # noqa: PLC0415 - only where some cell is no number as Arrow reads them

        values: NDArray[np.float64] = np.asarray(
            pd.to_numeric(pd.Series(cells.to_pylist(), dtype=object), errors="coerce"), np.float64
        )
        return values


def _floats(cells: Any) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.asarray(cells.to_numpy(zero_copy_only=False), np.float64)
    return values


def _flags(cells: Any) -> NDArray[np.bool_]:
    values: NDArray[np.bool_] = np.asarray(cells.to_numpy(zero_copy_only=False), np.bool_)
    return values
