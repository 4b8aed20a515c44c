"""A member's file against the charter's table: every fault is a line, and both formats give the same inputs."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from p2pfl.core.charter import ColumnTerms, TableTerms, TargetTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.learning.columns import MISSING
from p2pfl.learning.table import InputLayout, check_table
from p2pfl.learning.table_draft import draft_table

TERMS = TableTerms(
    target=TargetTerms(column="default", classes=("no", "yes")),
    columns={
        "income": ColumnTerms(kind="number", low=0, high=100, missing="zero"),
        "age": ColumnTerms(kind="number", low=18, high=118),
        "job": ColumnTerms(kind="category", values=("office", "craft"), other=True, missing="zero"),
        "own": ColumnTerms(kind="category", values=("False", "True")),
    },
)
GOOD = """age,income,job,own,default
18,50,office,True,no
68,,craft,False,yes
118,100,sailor,True,no
43,0,,False,yes
"""
INPUTS = [
    # age, income, income is missing; job: office, craft, other, missing; own: False, True
    [-1.0, 0.0, 0, 1, 0, 0, 0, 0, 1],
    [0.0, 0.0, 1, 0, 1, 0, 0, 1, 0],
    [1.0, 1.0, 0, 0, 0, 1, 0, 0, 1],
    [-0.5, -1.0, 0, 0, 0, 0, 1, 1, 0],
]


def faults(folder: Path, text: str | bytes, terms: TableTerms = TERMS) -> list[str]:
    """Return the lines without the file's name, which each begins with."""
    path = folder / "bank.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    checked = check_table(path, terms)
    assert (checked.inputs is None) == bool(checked.faults)
    assert all(line.startswith(f"{path}: ") and len(line.splitlines()) == 1 for line in checked.faults)
    return [line.removeprefix(f"{path}: ") for line in checked.faults]


def test_a_table_becomes_inputs_as_laid_out(tmp_path: Path) -> None:
    path = tmp_path / "bank.csv"
    path.write_text(GOOD)
    checked = check_table(path, TERMS)
    assert (checked.rows, checked.faults, checked.unread) == (4, (), ())
    assert checked.inputs is not None
    assert checked.inputs.dtype == np.float32
    assert checked.inputs.tolist() == INPUTS
    assert checked.targets is not None
    assert checked.targets.tolist() == [0, 1, 0, 1]
    assert InputLayout.of(TERMS).width == len(INPUTS[0])


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + GOOD,
        GOOD.replace(",", ";"),
        GOOD.replace(",", "\t"),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace(",", " , "),
        GOOD.replace("age", '"age"').replace("office", '"office"'),
        GOOD.replace("68,,", "68,NA,"),
        GOOD.replace("43,0", "4.3e1,0.0"),
        "\n".join(f"{line},more" for line in GOOD.splitlines()) + "\n",
    ],
    ids=["bom", "semicolons", "tabs", "crlf", "spaces", "quotes", "NA", "floats", "more columns"],
)
def test_ways_to_write_the_same_table_give_the_same_inputs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bank.csv"
    path.write_text(text, newline="")
    checked = check_table(path, TERMS)
    assert checked.faults == ()
    assert checked.inputs is not None
    assert checked.inputs.tolist() == INPUTS
    assert checked.unread == (("more",) if "more" in text else ())


def test_parquet_equals_csv_also_where_types_are_narrower(tmp_path: Path) -> None:
    frame = pd.DataFrame({
        "age": np.array([18, 68, 118, 43], np.int16),
        "income": np.array([50, np.nan, 100, 0], np.float32),
        "job": pd.Categorical(["office", "craft", "sailor", None]),
        "own": [True, False, True, False],
        "default": ["no", "yes", "no", "yes"],
    })  # fmt: skip
    frame.to_parquet(tmp_path / "bank.parquet")
    checked = check_table(tmp_path / "bank.parquet", TERMS)
    assert checked.faults == ()
    assert checked.inputs is not None
    assert checked.inputs.tolist() == INPUTS


def test_cells_that_are_lists_are_a_fault_and_left_out_of_a_draft(tmp_path: Path) -> None:
    frame = pd.read_csv(io.StringIO(GOOD), keep_default_na=False).assign(own=[[1], [2], [3], [4]])
    frame.assign(income=1.0).to_parquet(tmp_path / "a.parquet")
    (line,) = check_table(tmp_path / "a.parquet", TERMS).faults
    assert "column 'own': holds list<" in line
    draft = draft_table(tmp_path / "a.parquet", "default")
    assert "own" not in draft.terms.columns
    assert any(line.startswith("own: left out: ") for line in draft.review)


def test_classes_that_are_numbers_are_the_same_text_in_both_formats(tmp_path: Path) -> None:
    terms = TableTerms(
        target=TargetTerms(column="y", classes=("0", "1")),
        columns={"code": ColumnTerms(kind="category", values=("7", "8"), missing="zero")},
    )
    frame = pd.DataFrame({"code": [7.0, np.nan, 8.0], "y": [0, 1, 1]})  # whole numbers with a gap are floats in pandas
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("code,y\n7,0\n,1\n8,1\n")
    tables = [check_table(tmp_path / name, terms) for name in ("a.parquet", "a.csv")]
    assert all(table.faults == () for table in tables)
    assert all(
        table.inputs is not None and table.inputs.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]] for table in tables
    )


@pytest.mark.parametrize(
    ("was", "becomes", "line"),
    [
        ("age,", "Age ,", "there is no column 'age'; is it 'Age'?"),
        ("age,", "x,", "there is no column 'age'; add it"),
        ("default", "defualt", "there is no column 'default'; is it 'defualt'?"),
        ("income,", "age,", "column 'age' is there twice; rename one"),
        ("\n18,", "\neighteen,", "column 'age': no number in row 1; write numbers with a decimal point, or nothing"),
        (",50,", ',"50,5",', "column 'income': no number in row 1; write numbers with a decimal point, or nothing"),
        ("\n18,", "\n,", "column 'age': missing in row 1; fill or drop them"),
        ("\n18,", "\n17.9,", "column 'age': outside of 18 to 118 in row 1; correct them, or widen the charter's range"),
        ("\n18,", "\ninf,", "column 'age': outside of 18 to 118 in row 1; correct them, or widen the charter's range"),
        (
            "False",
            "maybe",
            "column 'own': unknown 'maybe' in 2 rows (first row 2); the charter has 'False', 'True'",
        ),
        (",True", ",", "column 'own': missing in 2 rows, the first row 1; fill or drop them"),
        (",no", ",", "target 'default': missing in 2 rows, the first row 1; drop these rows"),
        (",no", ",nope", "target 'default': unknown 'nope' in 2 rows (first row 1); the charter has 'no', 'yes'"),
        (
            "office,",
            "office,x,",
            "more or fewer cells than the header in row 1; correct that first: a cell may lack quotes",
        ),
    ],
)
def test_each_fault_is_one_line(tmp_path: Path, was: str, becomes: str, line: str) -> None:
    assert line in faults(tmp_path, GOOD.replace(was, becomes))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"", "is empty; it needs a header and rows"),
        (b"age,income,job,own,default\n", "has no rows; it needs some below the header"),
        (b"age,income,job,own,default\n18,1,\xff\xfe,True,no\n", "is not UTF-8; save it as CSV in UTF-8"),
        ("age,income\n".encode("utf-16"), "is not UTF-8; save it as CSV in UTF-8"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path: Path, text: bytes, line: str) -> None:
    assert faults(tmp_path, text) == [line]


def test_all_faults_are_told_not_only_the_first(tmp_path: Path) -> None:
    text = GOOD.replace("\n18,", "\nx,").replace("118", "400").replace("income", "incom").replace(",no", ",")
    found = faults(tmp_path, text)
    assert [line.split(";")[0] for line in found] == [
        "there is no column 'income'",
        "column 'age': no number in row 1",
        "column 'age': outside of 18 to 118 in row 3",
        "target 'default': missing in 2 rows, the first row 1",
    ]


def test_unknown_values_are_counted_and_few_are_quoted_however_hostile(tmp_path: Path) -> None:
    rows = ["a", "b\x1b[31m", "c" * 100, "d", "a"]
    text = "age,income,job,own,default\n" + "".join(f"20,1,craft,{value},no\n" for value in rows)
    (line,) = faults(tmp_path, text)
    assert line.startswith(
        "column 'own': unknown 'a' in 2 rows (first row 1), 'b\\x1b[31m' in 1 row (first row 2), 'ccc"
    )
    assert "and 1 more; " in line
    assert len(line) < 300


def test_numbers_are_never_quoted(tmp_path: Path) -> None:
    assert not any("777" in line for line in faults(tmp_path, GOOD.replace("\n18,", "\n777,").replace("68,", "n777,")))


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    for name, line in {
        "gone.csv": "there is no file",
        "x.parquet": "cannot be read as parquet",
        "x.xlsx": "not a .csv or .parquet file",
    }.items():
        (found,) = check_table(tmp_path / name, TERMS).faults
        assert line in found


def test_missing_words_may_be_values(tmp_path: Path) -> None:
    """NA is Namibia, where the charter says so."""
    assert "NA" in MISSING
    terms = TableTerms(
        target=TargetTerms(column="y", classes=("0", "1")),
        columns={"country": ColumnTerms(kind="category", values=("DE", "NA"))},
    )
    assert faults(tmp_path, "country,y\nNA,0\nDE,1\n", terms) == []


# The charter's side


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"kind": "number", "low": 1, "high": 1}, "low below high"),
        ({"kind": "number", "low": 1}, "low below high"),
        ({"kind": "number", "low": 0, "high": 1, "values": ["a"]}, "a number has no values"),
        ({"kind": "category"}, "a category needs values"),
        ({"kind": "category", "values": ["a", "a"]}, "has 'a' twice"),
        ({"kind": "category", "values": [" a"]}, "spaces around it"),
        ({"kind": "category", "values": ["a"], "low": 1}, "a category has no low"),
        ({"kind": "number", "low": 0, "high": 1, "mean": 0.5}, "mean and deviation come together"),
        ({"kind": "number", "low": 0, "high": 1, "mean": 0.5, "deviation": 1}, "scaling is session"),
        ({"kind": "number", "low": 0, "high": 1, "lowest": 1}, "known ones here are kind, low, high"),
        ({"kind": "number", "low": 0, "high": float("inf")}, "finite"),
    ],
)
def test_terms_that_make_no_sense_are_refused_with_the_column(change: dict[str, object], line: str) -> None:
    values = {"target": {"column": "y", "classes": ["0", "1"]}, "columns": {"x": change}}
    with pytest.raises(InvalidConfig) as caught:
        validate(TableTerms, values, "charter.toml")
    assert line in str(caught.value)
    assert "x" in str(caught.value).split(line)[0]


def test_the_target_is_no_input() -> None:
    columns = {"y": {"kind": "category", "values": ["0", "1"]}}
    with pytest.raises(InvalidConfig, match="'y' is the target and a column"):
        validate(TableTerms, {"target": {"column": "y", "classes": ["0", "1"]}, "columns": columns}, "draft")


# The draft


def test_a_draft_fits_its_file_and_tells_no_extremes_and_no_rare_values(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    count = 400
    frame = pd.DataFrame({
        "client": np.arange(count) + 70_000,
        "income": random.lognormal(10, 1, count).round(2),
        "year": random.randint(1987, 2025, count),
        "balance": random.normal(0, 300, count).round(),
        "flag": random.randint(0, 2, count),
        "job": random.choice(["craft", "office"], count),
        "name": [f"person {number}" for number in range(count)],
        "default": random.choice(["no", "yes"], count),
    })  # fmt: skip
    frame.loc[5, "job"] = "astronaut"
    frame.loc[7, "income"] = np.nan
    frame.to_csv(tmp_path / "bank.csv", index=False)
    draft = draft_table(tmp_path / "bank.csv", "default")
    columns = draft.terms.columns
    assert set(columns) == {"income", "year", "balance", "flag", "job"}
    assert (columns["year"].low, columns["year"].high) == (1980, 2030)
    assert (columns["flag"].low, columns["flag"].high) == (0, 1)
    assert columns["income"].low == 0
    for name in ("income", "year", "balance"):
        assert not {columns[name].low, columns[name].high} & {frame[name].min(), frame[name].max()}
    assert columns["income"].missing == "zero"
    assert columns["job"].values == ("craft", "office")
    assert columns["job"].other
    assert draft.terms.target.classes == ("no", "yes")
    told = "\n".join(draft.review)
    assert "client: left out" in told
    assert "name: left out" in told
    assert "astronaut" not in told
    assert check_table(tmp_path / "bank.csv", draft.terms).faults == ()
    frame.to_parquet(tmp_path / "bank.parquet")
    assert draft_table(tmp_path / "bank.parquet", "default") == draft


def test_a_target_of_many_numbers_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{n % 7},{n / 10}\n" for n in range(100)))
    target = draft_table(tmp_path / "a.csv", "y").terms.target
    assert (target.classes, target.low, target.high) == (None, 0, 10)


@pytest.mark.parametrize(
    ("text", "target", "line"),
    [
        ("x,y\n1,0\n", "z", "there is no column 'z'; the columns are x, y"),
        ("x,y\n1,0\n2,0\n", "y", "target 'y' has 1 value"),
        ("y\n1\n0\n", "y", "no column can be an input"),
        ("x,y\n", "y", "has no rows"),
    ],
)
def test_what_gives_no_draft_is_one_line(tmp_path: Path, text: str, target: str, line: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        draft_table(tmp_path / "a.csv", target)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
