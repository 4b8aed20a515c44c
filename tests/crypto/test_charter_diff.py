"""Two copies of a charter: what differs is named key by key, and what cannot matter is not."""

import json
from typing import Any

import pytest

from p2pfl.core.charter import Charter, Member
from p2pfl.core.settings import validate
from p2pfl.crypto.beacon import commitment_to
from p2pfl.crypto.charter_diff import Difference, compare
from p2pfl.crypto.identity import Identity, charter_faults, sign_charter
from tests.pump import charter_for, identities

SALT = bytes(32)


@pytest.fixture(scope="module")
def charter() -> Charter:
    """Three members, who have all signed."""
    drafted = charter_for(3, 8)
    members = tuple(
        each.model_copy(update={"salt_commitment": commitment_to(SALT, drafted.name, 1, each.peer_id)})
        for each in drafted.members
    )
    signed = drafted.model_copy(update={"members": members})
    for member in members:
        signed = sign_charter(signed, member.name, identity_of(member), salt=SALT)
    assert not charter_faults(signed)
    return signed


def identity_of(member: Member) -> Identity:
    return next(each for each in identities(3) if each.peer_id == member.peer_id)


def changed(charter: Charter, **tables: Any) -> Charter:
    values = charter.model_dump()
    for table, change in tables.items():
        values[table] = values[table] | change if isinstance(change, dict) else change
    return validate(Charter, values, "x")


def test_copies_are_the_same_whatever_the_order_of_their_members(charter: Charter) -> None:
    found = compare(charter, charter.model_copy(update={"members": charter.members[::-1]}))
    assert found.is_same
    assert list(found.lines()) == []
    assert found.hashes[0] == found.hashes[1] == charter.hash().hex()


def test_terms_are_named_by_their_keys(charter: Charter) -> None:
    found = compare(charter, changed(charter, training={"rounds": 77}, averaging={"colluders": 0}, version=9))
    assert not found.is_same
    assert Difference("training.rounds", charter.training.rounds, 77) in found.terms
    assert {each.key for each in found.terms} == {"version", "training.rounds", "averaging.colluders"}
    assert f"training.rounds: {charter.training.rounds} -> 77" in list(found.lines())


def test_members_are_named_and_so_is_what_changed_of_them(charter: Charter) -> None:
    first, second, third = charter.members
    moved = second.model_copy(update={"addresses": ("/ip4/192.0.2.9/tcp/1",)})
    found = compare(charter.model_copy(update={"members": (first, second)}), charter.model_copy(
        update={"members": (moved, third)}))  # fmt: skip
    keys = {each.key: (each.first, each.second) for each in found.terms}
    assert keys[f"members.{second.name}.addresses"] == (second.addresses, moved.addresses)
    assert keys[f"members.{first.name}.peer_id"] == (first.peer_id, None)
    assert keys[f"members.{third.name}.peer_id"] == (None, third.peer_id)
    lines = list(found.lines())
    assert f"signatures.{first.name}: signed -> not there" in [line.replace("void", "signed") for line in lines]
    assert any(line.startswith(f"signatures.{third.name}: not there -> ") for line in lines)
    assert not any("None" in line for line in lines)


def test_who_signed_which(charter: Charter) -> None:
    name = charter.members[0].name
    bare = charter.model_copy(update={"signatures": {}, "salts": {}})
    signed = sign_charter(bare, name, identity_of(charter.members[0]), salt=SALT)
    found = compare(bare, signed)
    assert found.is_same
    assert list(found.lines()) == [f"signatures.{name}: not signed -> signed"]
    later = compare(signed, changed(signed, training={"rounds": 77}))
    assert Difference(f"signatures.{name}", "signed", "void") in later.signatures


def test_it_is_one_object_of_json_and_printable(charter: Charter) -> None:
    found = compare(charter, changed(charter, name="other"))
    assert json.loads(json.dumps(found.to_json())) == {
        "same": False,
        "hashes": list(found.hashes),
        "terms": [{"key": "name", "first": charter.name, "second": "other"}],
        "signatures": [
            {"key": f"signatures.{name}", "first": "signed", "second": "void"} for name in sorted(charter.signatures)
        ],
    }
    assert all(line.isprintable() for line in found.lines())
