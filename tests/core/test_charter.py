"""The charter: who is in it, and a hash that every term changes and nothing else does."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from p2pfl.core.charter import CHANGE_CLIP, NOT_FOR_PEERS, Charter, Topology, check_name
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from tests.core.charters import IDENTITIES, charter_values


def read(values: dict[str, Any]) -> Charter:
    return validate(Charter, values, "c.toml")


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    match value:
        case dict():
            for key, inner in value.items():
                yield from leaves(inner, (*path, key))
        case list() | tuple():
            for index, inner in enumerate(value):
                yield from leaves(inner, (*path, index))
        case _:
            yield path


# What is not simply one more, or one letter more.
OTHER: dict[str, Any] = {
    "sha256": "f" * 64,
    "suite": "sm4",
    "channel": "noise",
    "topology": "complete",
    "masks": "on",
    "salt_commitment": "f" * 64,
    "alpha_min": 0.25,
    "audit": "off",
    "peer_id": "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN",
}
ONLY_ONE = {("training", "algorithm"), ("averaging", "regroup"), ("averaging", "weights"), ("averaging", "bits")}
"""Terms with one value, or only one beside these others: in the hash by `terms`, which a test below looks at."""

TERMS = [path for path in leaves(charter_values()) if path[0] not in ("signatures", "salts")]


def test_every_setting_of_a_charter_is_a_term() -> None:
    written = {tuple(path) for path in leaves(read(charter_values()).terms())}
    assert written == set(TERMS)
    assert set(Charter.model_fields) == {str(path[0]) for path in TERMS} | {"signatures", "salts", "privacy"}


@pytest.mark.parametrize("path", [path for path in TERMS if path not in ONLY_ONE], ids=str)
def test_every_single_term_changes_the_hash(path: tuple[str | int, ...]) -> None:
    values = charter_values()
    *tables, key = path
    inner: Any = values
    for part in tables:
        inner = inner[part]
    old = inner[key]
    inner[key] = OTHER.get(str(key), f"{old}x" if isinstance(old, str) else old + 1)
    assert read(values).hash() != read(charter_values()).hash()


def test_all_topologies_and_one_member_less_or_one_address_more_hash_differently() -> None:
    def averaging(topology: str) -> dict[str, Any]:
        values = charter_values()
        values["averaging"]["topology"] = topology
        return values

    fewer, longer = charter_values(), charter_values()
    del fewer["members"][1]
    longer["members"][1]["addresses"].append("/ip4/192.0.2.1/tcp/1")
    topologies = [name for name in get_args(Topology) if name != "edges"]
    variants = [*map(averaging, topologies), fewer, longer]
    for edges in ([["ant", "bee"]], [["ant", "cat"]]):
        variants.append(charter_values())
        variants[-1]["averaging"] |= {"topology": "edges", "edges": edges}
    variants.append(averaging("groups"))
    variants[-1]["averaging"]["regroup"] = "never"
    assert len({read(values).hash() for values in variants}) == len(variants) == len(topologies) + 5


def test_neither_the_order_of_members_nor_signatures_change_the_hash() -> None:
    values = charter_values()
    plain = read(values)
    values["members"].reverse()
    values["signatures"] = {"bee": "x"}
    values["salts"] = {"ant": "0" * 64}
    other = read({key: values[key] for key in reversed(values)})
    assert other.hash() == plain.hash()
    assert other.roster() == plain.roster() == tuple(identity.peer_id for identity in IDENTITIES.values())


def test_a_default_hashes_as_if_it_were_written() -> None:
    values = charter_values()
    for table in ("training", "averaging", "deadlines", "version"):
        del values[table]
    written = charter_values()
    written["averaging"] |= {"topology": "groups", "masks": "on"}
    assert read(values).hash() == read(written).hash()


def test_weights_by_samples_need_to_know_the_most_of_them() -> None:
    values = charter_values()
    hashes = {read(values).hash()}
    for most in (100, 101):
        values["averaging"] |= {"weights": "samples", "samples_max": most}
        hashes.add(read(values).hash())
    assert len(hashes) == 3
    del values["averaging"]["samples_max"]
    with pytest.raises(InvalidConfig, match="samples_max is missing; set it to the most that a member has"):
        read(values)
    values["averaging"] |= {"weights": "equal", "samples_max": 100}
    with pytest.raises(InvalidConfig, match="samples_max means something only with weights = samples"):
        read(values)


def private(**changes: Any) -> dict[str, Any]:
    """Return a charter with noise; `table__key` changes another table."""
    values = charter_values()
    values["averaging"]["masks"] = "on"
    values["training"]["clip_norm"] = 1.0
    values["privacy"] = {"noise": 2.0, "epsilon": 8.0, "delta": 1e-6, "survivors": 4}
    for path, value in changes.items():
        table, _, key = path.rpartition("__")
        values[table or "privacy"][key] = value
    return values


def test_every_term_of_noise_changes_the_hash_and_none_of_it_is_as_before() -> None:
    variants = [private(), private(noise=2.5), private(epsilon=9.0), private(delta=1e-5), private(survivors=5)]
    assert len({read(values).hash() for values in variants}) == len(variants)
    without = private()
    del without["privacy"]
    assert "privacy" not in read(without).terms()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (private(averaging__masks="off"), "privacy adds noise to masked sums, and masks are off"),
        (private(averaging__weights="samples", averaging__samples_max=9), "set weights to equal"),
        (private(training__clip_norm=0.0), "privacy needs training.clip_norm"),
        (private(noise=0.01), "bears no round with noise = 0.01; raise noise or epsilon"),
        (private(survivors=2), "privacy.survivors"),
    ],
)
def test_noise_that_would_hide_nothing_is_refused_in_a_line(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidConfig, match=told) as raised:
        read(values)
    assert "\n" not in str(raised.value)


def of_examples(**changes: Any) -> dict[str, Any]:
    """Return a charter with noise for examples alone."""
    values = charter_values()
    values["privacy"] = {"examples": {"noise": 1.0, "clip": 1.0, "epsilon": 8.0, "samples_min": 1000, **changes}}
    return values


def test_noise_for_examples_goes_without_masks_and_beside_noise_in_sums() -> None:
    alone, both = of_examples(), private()
    both["privacy"]["examples"] = alone["privacy"]["examples"]
    assert (read(alone).budget, read(private()).example_budget) == (None, None)
    assert read(both).budget == read(private()).budget
    assert read(both).example_budget == read(alone).example_budget
    assert len({read(values).hash() for values in (alone, both, private(), of_examples(samples_min=999))}) == 4


def test_training_ends_with_whichever_budget_comes_first() -> None:
    values = of_examples(epsilon=3.0)
    values["training"] |= {"rounds": 10_000, "local_steps": 3, "batch_size": 50}
    charter = read(values)
    budget = charter.example_budget
    assert budget is not None
    assert budget.rate == 0.05
    assert charter.rounds == budget.rounds < 10_000
    assert budget.bears(3 * charter.rounds)
    assert not budget.bears(3 * (charter.rounds + 1))
    both = private(training__rounds=10_000)
    both["privacy"]["examples"] = values["privacy"]["examples"]
    assert read(both).rounds == min(read(both).budget.rounds, read(both).example_budget.rounds)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (of_examples(noise=0.01), "privacy.examples: an epsilon of 8 .* bears no round with noise = 0.01"),
        (of_examples(samples_min=0), "samples_min"),
        (of_examples(clip=0.0), "clip"),
        (of_examples() | {"privacy": {}}, "neither noise and epsilon nor a table examples"),
        (of_examples() | {"privacy": {"noise": 1.0}}, "noise and epsilon come together"),
        (of_examples() | {"privacy": {**of_examples()["privacy"], "survivors": 4}}, "survivors means something only"),
        (private(training__algorithm="local-sgd"), "privacy with algorithm = local-sgd"),
        (private(training__algorithm="diloco"), "privacy with algorithm = diloco"),
        (of_examples() | {"training": {"algorithm": "fedprox"}}, "privacy with algorithm = fedprox"),
    ],
)
def test_noise_for_examples_that_would_hide_nothing_is_refused_in_a_line(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidConfig, match=told) as raised:
        read(values)
    assert "\n" not in str(raised.value)


def test_training_ends_with_the_budget_if_that_comes_first() -> None:
    charter = read(private(training__rounds=1000))
    budget = charter.budget
    assert budget is not None
    assert charter.rounds == budget.rounds < 1000
    assert read(private(training__rounds=5)).rounds == 5


def test_words_of_16_bits_are_of_masked_changes() -> None:
    values = charter_values()
    values["averaging"]["change_clip"] = 0.1
    with pytest.raises(InvalidConfig, match="change_clip means something only with bits = 16"):
        read(values)
    values["averaging"]["bits"] = 16
    with pytest.raises(InvalidConfig, match="bits = 16 is of masked sums"):
        read(values)
    hashes = set()
    values["averaging"]["masks"] = "on"
    for change_clip in (0.1, 0.2):
        values["averaging"]["change_clip"] = change_clip
        hashes.add(read(values).hash())
        assert read(values).averaging.most_change == change_clip
    del values["averaging"]["change_clip"]
    assert read(values).averaging.most_change == CHANGE_CLIP
    values["averaging"]["bits"] = 32
    assert read(values).averaging.most_change is None
    assert len(hashes | {read(values).hash()}) == 3


def test_the_hash_of_an_example_is_pinned() -> None:
    # Another hash means that peers of two versions of this package cannot meet: a new domain string is due then.
    assert read(charter_values()).hash().hex() == "b55923aff399a67bbf053094aa5562528968d132286e9d18d291c8db43772f07"


@pytest.mark.parametrize("what", ["name", "peer_id"])
def test_two_members_with_the_same_name_or_key_are_refused(what: str) -> None:
    values = charter_values()
    values["members"][2][what] = values["members"][0][what]
    with pytest.raises(InvalidConfig, match=f"^c.toml: two members have the {what} {values['members'][0][what]}"):
        read(values)


def test_who_is_not_a_member_signs_nothing() -> None:
    with pytest.raises(InvalidConfig, match=r"^c\.toml: signed by dog, who is not a member"):
        read(charter_values() | {"signatures": {"ant": "x", "dog": "y"}})


def test_members_are_found_by_name() -> None:
    charter = read(charter_values())
    bee = charter.member("bee")
    assert bee is not None
    assert bee.peer_id == IDENTITIES["bee"].peer_id
    assert charter.member("dog") is None


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    ".hidden",
    "a/b",
    "a\\b",
    "/a",
    "-rf",
    "a b",
    "a\n",
    "\n",
    "a\0",
    "bänk",
    "a" * 64,
    "~",
]
GOOD_NAMES = ["a", "7", "bank-a", "Bank_A.example", "a..b", "a" * 63]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_would_escape_a_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name"):
        check_name(name)
    for path in ("name", "members.1.name"):
        values = charter_values()
        (values if path == "name" else values["members"][1])["name"] = name
        with pytest.raises(InvalidConfig) as raised:
            read(values)
        assert str(raised.value).startswith(f"c.toml: {path}: ")
        assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_other_names_are_as_they_were_given(name: str) -> None:
    assert check_name(name) == name
    assert read(charter_values() | {"name": name}).name == name


@pytest.mark.parametrize("file", ["", ".", "..", "../m", "/etc/passwd", "a/b", "a/", "a\\b", "a\0", "a\n"], ids=ascii)
def test_the_model_lies_beside_the_charter(file: str) -> None:
    values = charter_values()
    values["model"]["file"] = file
    with pytest.raises(InvalidConfig, match=r"^c\.toml: model\.file: .* beside the charter$") as raised:
        read(values)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("file", ["m", ".m", "Größe 1.safetensors", "a..b"])
def test_a_model_may_have_any_plain_name(file: str) -> None:
    values = charter_values()
    values["model"]["file"] = file
    assert read(values).model.file == file


def with_sm2_keys(*keys: str) -> dict[str, Any]:
    values = charter_values()
    for member, key in zip(values["members"], keys, strict=False):
        member["sm2_public_key"] = key
    return values


def test_an_sm2_key_is_a_term_where_there_is_one() -> None:
    one, other = "04" + "1" * 128, "04" + "2" * 128
    hashes = {read(values).hash() for values in (with_sm2_keys(), with_sm2_keys(one), with_sm2_keys(other))}
    assert len(hashes) == 3
    assert "sm2_public_key" not in read(with_sm2_keys(one)).terms()["members"][1]
    assert read(with_sm2_keys(one)).terms()["members"][0]["sm2_public_key"] == one


@pytest.mark.parametrize(
    "key", ["", "04", "02" + "1" * 64, "1" * 130, "04" + "A" * 128, "04" + "1" * 128 + "\n"], ids=ascii
)
def test_what_is_no_sm2_key_in_hexadecimal_is_refused(key: str) -> None:
    with pytest.raises(InvalidConfig, match=r"^c\.toml: members\.0\.sm2_public_key: "):
        read(with_sm2_keys(key))


def test_two_members_cannot_have_one_sm2_key() -> None:
    with pytest.raises(InvalidConfig, match="two members have the sm2_public_key 0411"):
        read(with_sm2_keys("04" + "1" * 128, "04" + "1" * 128))


@pytest.mark.parametrize("name", sorted(NOT_FOR_PEERS))
def test_an_algorithm_that_peers_do_not_run_is_refused_with_the_reason(name: str) -> None:
    values = charter_values()
    values["training"] = {"algorithm": name}
    with pytest.raises(InvalidConfig, match=rf"training.algorithm: {name} .*; take (local-sgd|k-gt)"):
        read(values)


def test_options_count_in_the_hash_and_none_is_as_no_table_of_them() -> None:
    plain, empty, some, other = charter_values(), charter_values(), charter_values(), charter_values()
    empty["training"] = {"options": {}}
    some["training"] = {"algorithm": "partial-sharing", "options": {"personal": ["head"], "beta": 0.9}}
    other["training"] = {"algorithm": "partial-sharing", "options": {"personal": ["head"], "beta": 0.8}}
    assert read(empty).hash() == read(plain).hash()
    assert read(some).hash() != read(other).hash()
