"""Tables of numbers in files, as arrays.

Owns the reading of CSV, Parquet and .npy files. Must not unpickle anything: a data file is never code.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import InvalidConfig


def read_table(path: Path) -> NDArray[np.float32]:
    """Read a CSV or Parquet file of numbers as float32 [rows, columns], or a .npy array as float32 of its shape.

    A CSV's first line is a header unless it is all numbers.

    Raises:
        InvalidConfig: if the file cannot be read, is of another kind, or does not hold finite numbers only.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in {".csv", ".parquet", ".npy"}:
        raise InvalidConfig(f"{path}: not a .csv, .parquet or .npy file; convert it, or override Task.read_inputs")
    try:
        if suffix == ".npy":
            return _finite(path, np.load(path, allow_pickle=False))
        return _finite(path, _columns(path, _read_frame(path, suffix)))
    except FileNotFoundError as error:
        raise InvalidConfig(f"there is no file {path}; correct the path") from error
    except (OSError, ValueError) as error:  # what numpy, pandas and pyarrow raise for bytes that are not their format
        reason = " ".join(str(error).split())
        raise InvalidConfig(f"{path}: cannot be read as {suffix[1:]}: {reason}; check the file") from error


def _read_frame(path: Path, suffix: str) -> Any:
    import pandas as pd  # noqa: PLC0415 - takes most of a second to load, and few commands read tables

    if suffix == ".parquet":
        return pd.read_parquet(path)
    with path.open(encoding="utf-8-sig") as file:
        first = file.readline()
    return pd.read_csv(path, header=None if _is_numbers(first) else 0, encoding="utf-8-sig")


def _is_numbers(line: str) -> bool:
    try:
        [float(cell) for cell in line.strip().split(",")]
    except ValueError:
        return False
    return True


def _columns(path: Path, frame: Any) -> NDArray[Any]:
    for name, kind in frame.dtypes.items():
        if getattr(kind, "kind", "O") not in "biuf":
            raise InvalidConfig(f"{path}: column {name!r} holds {kind}, not numbers; drop it or encode it as numbers")
        missing = np.flatnonzero(frame[name].isna().to_numpy())
        if len(missing):
            raise InvalidConfig(f"{path}: column {name!r}, row {missing[0] + 1} is empty; fill it or drop the row")
    values: NDArray[Any] = frame.to_numpy(dtype=np.float64)
    return values


def _finite(path: Path, values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype.kind not in "biuf" or values.ndim < 1:
        raise InvalidConfig(f"{path}: holds {values.dtype} of shape {list(values.shape)}, not an array of numbers")
    with np.errstate(over="ignore"):
        result = np.array(values, dtype=np.float32)
    if not np.isfinite(result).all():
        raise InvalidConfig(f"{path}: holds values that are not finite in float32; fill, drop or rescale them")
    return result
