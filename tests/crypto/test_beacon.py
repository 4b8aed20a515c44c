"""The beacon follows from salts that each member committed to before it knew another's."""

import pytest

from p2pfl.core.charter import Charter
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.crypto.beacon import beacon_of, commitment_to
from p2pfl.crypto.identity import charter_faults, has_revealed, salt_of, sign_charter
from tests.core.charters import IDENTITIES, charter_values


def draft(**changes: object) -> Charter:
    return validate(Charter, charter_values() | changes, "c.toml")


def signed(charter: Charter) -> Charter:
    for name, identity in IDENTITIES.items():
        charter = sign_charter(charter, name, identity)
    return charter


def test_who_signs_reveals_its_salt_and_the_hash_stays() -> None:
    before = draft()
    after = signed(before)
    assert after.hash() == before.hash()
    assert charter_faults(after) == []
    assert set(after.salts) == set(IDENTITIES)
    assert all(has_revealed(after, member) for member in after.members)
    assert not any(has_revealed(before, member) for member in before.members)


def test_each_salt_decides_and_terms_do_not() -> None:
    charter = signed(draft())
    beacon = beacon_of(charter)
    for name in IDENTITIES:
        other = charter.model_copy(update={"salts": charter.salts | {name: "0" * 64}})
        assert beacon_of(other) != beacon
    assert beacon_of(signed(draft(training={"rounds": 7}))) == beacon
    assert beacon_of(charter.model_copy(update={"version": 2})) != beacon


def test_a_salt_follows_from_key_name_and_version_and_is_no_signature() -> None:
    ant = IDENTITIES["ant"]
    salts = {
        salt_of(ant, "meadow", 1),
        salt_of(ant, "meadow", 2),
        salt_of(ant, "x", 1),
        salt_of(IDENTITIES["bee"], "meadow", 1),
    }
    assert len(salts) == 4
    assert salt_of(ant, "meadow", 1) in salts
    assert {len(salt) for salt in salts} == {32}


def test_nobody_commits_to_another_s_salt() -> None:
    salt = salt_of(IDENTITIES["ant"], "meadow", 1)
    ids = [identity.peer_id for identity in IDENTITIES.values()]
    assert len({commitment_to(salt, "meadow", 1, peer) for peer in ids}) == 3


def test_another_version_takes_new_commitments() -> None:
    with pytest.raises(InvalidConfig, match=r"has not committed to a salt for version 2 .* `p2pfl charter join` again"):
        sign_charter(draft(version=2), "ant", IDENTITIES["ant"])


def test_a_charter_with_a_salt_that_is_missing_or_another_is_not_in_force() -> None:
    charter = signed(draft())
    without = charter.model_copy(update={"salts": {"ant": charter.salts["ant"], "cat": "0" * 64}})
    assert charter_faults(without) == [
        "bee has not revealed its salt; sign again",
        "cat's salt is not the one that it committed to for version 1; sign again",
    ]
