"""Files of settings: whatever is wrong in one is told in one line with the file and the key."""

from typing import Annotated, Any

import pytest
from pydantic import Field

from p2pfl.core.charter import Charter
from p2pfl.core.config import PeerConfig
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import Settings, parse_toml, validate
from tests.core.charters import charter_values


def fault(kind: type[Settings], values: object, where: str = "a.toml") -> str:
    with pytest.raises(InvalidConfig) as raised:
        validate(kind, values, where)
    text = str(raised.value)
    assert text.isprintable(), "one line, and nothing that drives a terminal"
    assert text.startswith(f"{where}: ")
    return text.removeprefix(f"{where}: ")


def place(values: Any, path: str) -> tuple[Any, Any]:
    """Return the table or list that holds the setting at `path`, and its key there."""
    *tables, key = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in tables:
        values = values[part]
    return values, key


def with_change(path: str, value: object) -> dict[str, Any]:
    """Return a charter's tables with the setting at `path` changed."""
    values = charter_values()
    table, key = place(values, path)
    table[key] = value
    return values


@pytest.mark.parametrize(
    ("path", "known"),
    [
        (
            "color",
            "name, version, task, model, training, averaging, security, privacy, deadlines, members, signatures, salts",
        ),
        ("training.color", "algorithm, options, rounds, local_steps, batch_size, window, clip_norm"),
        ("members.1.color", "name, peer_id, addresses, sm2_public_key, salt_commitment"),
    ],
)
def test_an_unknown_key_is_named_with_those_that_are_known(path: str, known: str) -> None:
    assert fault(Charter, with_change(path, 1)) == f"{path}: unknown setting; the known ones here are {known}"


@pytest.mark.parametrize("path", ["name", "task", "task.sha256", "model.parameters", "members.2.addresses"])
def test_a_missing_key_is_named(path: str) -> None:
    values = charter_values()
    table, key = place(values, path)
    del table[key]
    assert fault(Charter, values) == f"{path}: missing; add it"


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("training.rounds", "60", "valid integer, got '60'"),
        ("training.rounds", 60.0, "valid integer, got 60.0"),
        ("training.rounds", True, "valid integer, got True"),
        ("training.rounds", -1, "greater than or equal to 0, got -1"),
        ("training.clip_norm", "0", "valid number, got '0'"),
        ("training.clip_norm", float("nan"), "finite number, got nan"),
        ("averaging.tolerance", float("inf"), "finite number, got inf"),
        ("averaging.tolerance", 0.0, "greater than 0, got 0.0"),
        ("deadlines.round", float("inf"), "less than or equal to 86400, got inf"),
        ("deadlines.start", float("nan"), "got nan"),
        ("averaging.topology", "star", "'path' or 'edges', got 'star'"),
        ("averaging.masks", "maybe", "'off', got 'maybe'"),
        ("task", "digits", "got 'digits'"),
        ("task.sha256", "1" * 63 + "G", "got '11111"),
        ("task.sha256", "1" * 64 + "\n", "got '11111"),
        ("members", {"name": "ant"}, "valid list, got {'name': 'ant'}"),
        ("members.0", "ant", "got 'ant'"),
        ("members.0.addresses", "/ip4/192.0.2.1/tcp/1", "valid list"),
        ("members.0.addresses", [], "at least 1 item"),
        ("signatures", {"ant": 5}, "valid string, got 5"),
        ("version", 0, "greater than or equal to 1, got 0"),
    ],
)
def test_a_wrong_value_is_named_and_shown(path: str, value: object, what: str) -> None:
    text = fault(Charter, with_change(path, value))
    assert text.startswith(path)
    assert what in text


def test_a_whole_number_will_do_for_a_real_one_and_means_the_same() -> None:
    whole, real = (validate(Charter, with_change("deadlines.round", value), "x") for value in (60, 60.0))
    assert isinstance(whole.deadlines.round, float)
    assert whole.hash() == real.hash()


def test_the_first_fault_is_told_and_the_others_are_counted() -> None:
    values = with_change("training.rounds", "x") | {"color": 1, "size": 2}
    assert fault(Charter, values).endswith("(and 2 more)")


def test_rules_over_several_keys_name_their_table() -> None:
    text = fault(Charter, with_change("deadlines.heartbeat", 11.0))
    assert text == "deadlines: silence must be at least twice heartbeat, or a peer that is well counts as dead"


def test_what_a_file_quotes_breaks_no_line_and_drives_no_terminal() -> None:
    assert "a\\nb\\x1b[2J: unknown" in fault(Charter, charter_values() | {"a\nb\x1b[2J": 1})
    assert "\\x1b" in fault(Charter, with_change("signatures", {"\x1b[2J": "x"}))
    values = charter_values()
    for member in values["members"]:
        member["peer_id"] = "12D3\r\nöwl"
    assert "12D3\\r\\nöwl" in fault(Charter, values)
    assert len(fault(Charter, with_change("training.rounds", "x" * 10_000))) < 200


@pytest.mark.parametrize("values", [None, [], 5, "name"])
def test_what_is_no_table_is_refused(values: object) -> None:
    fault(Charter, values)


def test_a_table_without_settings_says_so() -> None:
    class Nothing(Settings):
        pass

    class Outer(Settings):
        inner: Annotated[Nothing | None, Field()] = None

    assert fault(Outer, {"inner": {"a": 1}}) == "inner.a: unknown setting; the known ones here are none"


def test_settings_cannot_be_changed() -> None:
    charter = validate(Charter, charter_values(), "x")
    with pytest.raises(ValueError, match="frozen"):
        charter.name = "other"


@pytest.mark.parametrize("text", ["a = ", "a = 1\na = 2", "[a\n", "a = 1 b = 2", 'a = "\x07"', "\x00"])
def test_what_is_not_toml_is_told_with_its_place(text: str) -> None:
    with pytest.raises(InvalidConfig, match=r"^x/y\.toml: not TOML: .*(line \d|end of document)") as raised:
        parse_toml(text, "x/y.toml")
    assert str(raised.value).isprintable()


def test_what_is_nested_without_end_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"^x: nested too deeply"):
        parse_toml("a = " + "[" * 100_000, "x")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"listen": "/ip4/0.0.0.0/tcp/1"}, "listen: "),
        ({"listen": []}, "listen: "),
        ({"evaluate_every": 0}, "evaluate_every: "),
        ({"threads": 0}, "threads: "),
        ({"seed": -1}, "seed: "),
        ({"data": 5}, "data: "),
        (
            {"rounds": 5},
            "rounds: unknown setting; the known ones here are name, charter, identity, passphrase_file, run, listen, ",
        ),
        ({"name": "../ant"}, "name: '../ant' is no name"),
    ],
)
def test_a_peers_own_settings_are_read_as_strictly(change: dict[str, object], what: str) -> None:
    assert fault(PeerConfig, {"name": "ant"} | change).startswith(what)


def test_the_data_table_is_the_tasks_own() -> None:
    data = {"path": "loans.csv", "columns": ["a", "b"], "nested": {"deep": [1, 2.5]}}
    assert validate(PeerConfig, {"name": "ant", "data": data}, "x").data == data
