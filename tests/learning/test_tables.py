import numpy as np
import pandas as pd
import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.tables import read_table


def test_three_formats_give_the_same_array(tmp_path):
    values = np.array([[1.5, 2.0, -3.0], [4.0, 5.25, 6.0]])
    frame = pd.DataFrame(values, columns=["a", "b", "c"])
    frame.to_csv(tmp_path / "with.csv", index=False)
    frame.to_csv(tmp_path / "without.csv", index=False, header=False)
    frame.to_parquet(tmp_path / "table.parquet")
    np.save(tmp_path / "array.npy", values)
    for name in ("with.csv", "without.csv", "table.parquet", "array.npy"):
        read = read_table(tmp_path / name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values.astype(np.float32))


def test_integers_booleans_and_images_are_numbers(tmp_path):
    (tmp_path / "mixed.csv").write_text("a,b\n1,True\n2,False\n")
    np.testing.assert_array_equal(read_table(tmp_path / "mixed.csv"), [[1, 1], [2, 0]])
    np.save(tmp_path / "images.npy", np.ones((2, 1, 8, 8), dtype=np.uint8))
    assert read_table(tmp_path / "images.npy").shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"a,b\n1,2\n3,\n", "column 'b', row 2 is empty"),
        ("t.csv", b"a,b\n1,red\n", "column 'b' holds"),
        ("t.csv", b"a,b\n1,inf\n", "not finite"),
        ("t.csv", b"a,b\n1,1e300\n", "not finite"),
        ("t.csv", b"", "cannot be read as csv"),
        ("t.csv", b"a\n\xff\xfe\n", "cannot be read as csv"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", "cannot be read as csv"),
        ("t.parquet", b"PAR1 not", "cannot be read as parquet"),
        ("t.npy", b"not numpy", "cannot be read as npy"),
        ("t.pkl", b"", "not a .csv, .parquet or .npy file"),
    ],
)
def test_what_is_not_a_table_of_numbers_is_one_line(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidConfig) as caught:
        read_table(tmp_path / name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_pickle_are_refused(tmp_path):
    with pytest.raises(InvalidConfig, match="there is no file"):
        read_table(tmp_path / "none.csv")
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidConfig, match="cannot be read as npy"):
        read_table(tmp_path / "pickle.npy")
    np.save(tmp_path / "scalar.npy", np.float64(3))
    with pytest.raises(InvalidConfig, match="not an array of numbers"):
        read_table(tmp_path / "scalar.npy")
