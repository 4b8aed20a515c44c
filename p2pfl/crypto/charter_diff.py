"""What two copies of a charter differ in: key by key, member by member, and who has signed which."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from p2pfl.core.charter import Charter
from p2pfl.crypto.identity import member_faults

NOT_THERE = "not there"


@dataclass(frozen=True)
class Difference:
    """A key that has another value in the second charter than in the first; None where it is not there."""

    key: str
    first: Any
    second: Any


@dataclass(frozen=True)
class CharterDiff:
    """What two charters differ in.

    Attributes:
        hashes: of both, in hexadecimal.
        terms: what is hashed, in the order of the first; `members.NAME` for one that only one of them has.
        signatures: members who have not signed both alike: `signed`, `not signed`, or `void`: signed, and not for this.
    """

    hashes: tuple[str, str]
    terms: tuple[Difference, ...]
    signatures: tuple[Difference, ...]

    @property
    def is_same(self) -> bool:
        """Whether both say the same, so that a signature of one holds for the other."""
        return not self.terms

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"same": self.is_same} | asdict(self)

    def lines(self) -> Iterator[str]:
        """Give it line by line, the first charter's value before the second's."""
        for each in self.terms:
            yield f"{each.key}: {_text(each.first)} -> {_text(each.second)}"
        for each in self.signatures:
            yield f"{each.key}: {each.first or NOT_THERE} -> {each.second or NOT_THERE}"


def compare(first: Charter, second: Charter) -> CharterDiff:
    """Return what differs from the first charter, or draft, to the second."""
    return CharterDiff(
        (first.hash().hex(), second.hash().hex()),
        tuple(_differences(_flat(first), _flat(second))),
        tuple(_differences(_signed(first), _signed(second))),
    )


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys((*first, *second)):
        if first.get(key) != second.get(key):
            yield Difference(key, first.get(key), second.get(key))


def _flat(charter: Charter) -> dict[str, Any]:
    """Return the terms with dotted keys; a member is one value as long as nobody compares its parts."""
    terms = charter.terms()
    members = terms.pop("members")
    return {**_dotted("", terms), **_dotted("members.", {member["name"]: _entry(member) for member in members})}


def _entry(member: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in member.items() if key != "name"}


def _dotted(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _dotted(f"{prefix}{key}.", value) if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _signed(charter: Charter) -> dict[str, str]:
    faults = member_faults(charter)
    given = {name: "void" if name in faults else "signed" for name in charter.signatures}
    return {f"signatures.{name}": given.get(name, "not signed") for name in charter.names()}


def _text(value: Any) -> str:
    # ASCII only: it may come from a file that somebody sent, and goes to a terminal.
    return NOT_THERE if value is None else json.dumps(value)
