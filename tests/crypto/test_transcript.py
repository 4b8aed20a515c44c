import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.canonical import Value, canonical
from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.suite import suite
from p2pfl.crypto.transcript import Link, append, digest, start, verify_chain

SUITE = suite("aes")
START = start(SUITE, b"charter", "peer")
# Generated here: it pins today's chain, so that a change to it is seen. No standard has it.
PINNED = "be001f0b8e6c30e7f6cce5fa2e2aac3adff5521bf5db362861f05b8dcbcc5435"
ENTRIES: list[Value] = [{"round": i, "outcome": "FULL", "absent": ["cat"] * (i % 3)} for i in range(6)]

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def ledger(entries: list[Value]) -> list[tuple[Value, bytes]]:
    stored: list[tuple[Value, bytes]] = []
    last = START
    for entry in entries:
        last = append(SUITE, last, entry)
        stored.append((entry, last.digest))
    return stored


def test_a_digest_is_the_hash_of_the_canonical_bytes() -> None:
    expected = hashlib.sha256(canonical(["domain", "aes", 1, "x"])).digest()
    assert digest(SUITE, "domain", 1, "x") == expected


def test_digests_tell_domains_suites_and_groupings_apart() -> None:
    digests = [
        digest(SUITE, "a", "bc"),
        digest(SUITE, "ab", "c"),
        digest(SUITE, "a", "b", "c"),
        digest(SUITE, "a", ["b", "c"]),
        digest(SUITE, "a", b"bc"),
        digest(SUITE, "a"),
        digest(suite("sm4"), "a", "bc"),
        start(SUITE, "bc").digest,
        append(SUITE, Link(0, b"a"), "bc").digest,
    ]
    assert len(set(digests)) == len(digests)


def test_a_ledger_is_pinned() -> None:
    assert verify_chain(SUITE, START, ledger(ENTRIES)).digest.hex() == PINNED


def test_a_ledger_verifies_from_the_start_and_from_any_link() -> None:
    stored = ledger(ENTRIES)
    last = Link(6, stored[-1][1])
    assert verify_chain(SUITE, START, stored) == last
    assert verify_chain(SUITE, START, stored, last) == last
    assert verify_chain(SUITE, Link(3, stored[2][1]), stored[3:], last) == last
    assert verify_chain(SUITE, START, [], START) == START


@settings(max_examples=100, deadline=None)
@given(st.lists(values, max_size=6))
def test_every_ledger_verifies(entries: list[Any]) -> None:
    assert verify_chain(SUITE, START, ledger(entries)).number == len(entries)


TAMPERINGS: dict[str, tuple[int, Any]] = {
    "entry-changed": (3, lambda s: [*s[:2], ("other", s[2][1]), *s[3:]]),
    "digest-changed": (3, lambda s: [*s[:2], (s[2][0], bytes(32)), *s[3:]]),
    "first-removed": (1, lambda s: s[1:]),
    "middle-removed": (3, lambda s: [*s[:2], *s[3:]]),
    "swapped": (2, lambda s: [s[0], s[2], s[1], *s[3:]]),
    "doubled": (3, lambda s: [*s[:2], s[1], *s[2:]]),
    "inserted": (5, lambda s: [*s[:4], ("new", bytes(32)), *s[4:]]),
}


@pytest.mark.parametrize(("place", "tamper"), TAMPERINGS.values(), ids=TAMPERINGS.keys())
def test_tampering_is_found_where_it_begins(place: int, tamper: Any) -> None:
    with pytest.raises(InvalidConfig, match=f"^entry {place} of the ledger does not follow"):
        verify_chain(SUITE, START, tamper(ledger(ENTRIES)))


def test_a_ledger_that_was_rewritten_or_cut_shows_against_a_link_kept_elsewhere() -> None:
    stored = ledger(ENTRIES)
    kept = Link(6, stored[-1][1])
    for other in (stored[:-1], ledger([*ENTRIES[:-1], "rewritten"]), [], ledger([*ENTRIES, "longer"])):
        verify_chain(SUITE, START, other)
        with pytest.raises(InvalidConfig, match="recorded elsewhere"):
            verify_chain(SUITE, START, other, kept)


def test_a_ledger_of_another_peer_is_another() -> None:
    for other in (start(SUITE, b"charter", "other"), start(suite("sm4"), b"charter", "peer")):
        with pytest.raises(InvalidConfig, match="entry 1 "):
            verify_chain(SUITE, other, ledger(ENTRIES))


def test_an_entry_without_an_encoding_is_refused() -> None:
    wrong: Any = {1, 2}
    with pytest.raises(TypeError):
        append(SUITE, START, wrong)
