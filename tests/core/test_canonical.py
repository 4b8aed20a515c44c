"""One encoding for each value: what is signed cannot be read as anything else."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pfl.core.canonical import Value, canonical

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.binary(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def written(value: Any) -> str:
    """Write a value so that only the same are equal: Python holds `True`, `1` and `1.0` for equal."""
    match value:
        case dict():
            return "{" + ",".join(f"{key!r}:{written(value[key])}" for key in sorted(value)) + "}"
        case list():
            return "[" + ",".join(map(written, value)) + "]"
    return f"{type(value).__name__}({value!r})"


@given(values, values)
@example(1, True)
@example(1, 1.0)
@example(1, "1")
@example("1", b"1")
@example(0.0, -0.0)
@example([], {})
@example([], None)
@example("", b"")
@example([[1], 2], [1, [2]])
@example(["ab"], ["a", "b"])
@example([["a", "b"]], ["a", "b"])
@example({"a": 1, "b": 2}, ["a", 1, "b", 2])
@example({"a": {"b": 1}}, {"a": {}, "b": 1})
def test_values_share_an_encoding_only_if_they_are_the_same(left: Value, right: Value) -> None:
    assert (canonical(left) == canonical(right)) == (written(left) == written(right))


@given(values)
def test_an_encoding_is_no_prefix_of_another_and_comes_again(value: Value) -> None:
    encoded = canonical(value)
    assert encoded == canonical(value)
    assert int.from_bytes(encoded[1:9], "big") == len(encoded) - 9


def test_an_example_is_pinned() -> None:
    value: Value = {"b": [1, -2, True, None], "a": "ä", "c": [0.5, b"\x00"]}
    length = "00000000000000"
    a, b, c = (f"73{length}01{key}" for key in ("61", "62", "63"))
    first = f"73{length}02c3a4"
    second = f"6c{length}2869{length}013169{length}022d3274{length}01016e{length}00"
    third = f"6c{length}1b66{length}083fe000000000000062{length}0100"
    content = a + first + b + second + c + third
    assert canonical(value).hex() == f"6d{length}{len(content) // 2:02x}{content}"


def test_the_order_of_keys_does_not_matter_and_that_of_lists_does() -> None:
    assert canonical({"a": 1, "b": {"c": 2, "d": 3}}) == canonical({"b": {"d": 3, "c": 2}, "a": 1})
    assert canonical([1, 2]) != canonical([2, 1])
    assert canonical((1, 2)) == canonical([1, 2]), "settings hold tuples where TOML had lists"


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, 1j, bytearray(b"a"), memoryview(b"a"), range(2), [object()], {"a": {3}}],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_plain_value_raises(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical(value)
