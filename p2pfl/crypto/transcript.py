"""What was agreed and what happened, as hashes: digests of canonical values, and the audit ledger's chain.

Each link of the chain covers the one before it, its own number and its entry, so an entry that is changed, removed,
inserted or moved shows in every later link: whoever keeps the last one keeps the whole ledger. Cutting the end off
shows only against a link kept elsewhere. Nothing here stores anything.
"""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from p2pfl.core.canonical import Value, canonical
from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.suite import Suite

_START = "p2pfl/ledger-start/1"
_ENTRY = "p2pfl/ledger-entry/1"


@dataclass(frozen=True, slots=True)
class Link:
    """A place in a ledger.

    Attributes:
        number: how many entries stand before and at it; 0 is the start.
        digest: 32 bytes that cover all of them.
    """

    number: int
    digest: bytes


def digest(suite: Suite, domain: str, *values: Value) -> bytes:
    """Return the 32-byte hash of values under a domain: no other domain, number or grouping of values has it.

    Raises:
        TypeError: a value has no canonical encoding.
    """
    return suite.hash(canonical([domain, suite.name, *values]))


def start(suite: Suite, *context: Value) -> Link:
    """Return the start of a ledger.

    Args:
        suite: the charter's.
        context: whose ledger it is and of what: the charter's hash, the peer id.

    Raises:
        TypeError: as `digest`.
    """
    return Link(0, digest(suite, _START, *context))


def append(suite: Suite, last: Link, entry: Value) -> Link:
    """Return the link of an entry that follows `last`.

    Raises:
        TypeError: as `digest`.
    """
    number = last.number + 1
    return Link(number, digest(suite, _ENTRY, number, last.digest, entry))


def verify_chain(suite: Suite, begin: Link, entries: Iterable[tuple[Value, bytes]], end: Link | None = None) -> Link:
    """Check a ledger, or the part of it after `begin`, and return its last link.

    Args:
        suite: the charter's.
        begin: the start, or a link known to be right.
        entries: what follows, each with the digest of its link as it was stored.
        end: the last link, where it was kept elsewhere.

    Raises:
        InvalidConfig: an entry or its digest was changed, or the end is another; names the first that is wrong.
    """
    last = begin
    for entry, stored in entries:
        last = append(suite, last, entry)
        if not hmac.compare_digest(last.digest, stored):
            raise InvalidConfig(
                f"entry {last.number} of the ledger does not follow from those before it: the ledger was changed; "
                "restore it from your backup"
            )
    if end is not None and (last.number != end.number or not hmac.compare_digest(last.digest, end.digest)):
        raise InvalidConfig(
            f"the ledger ends at entry {last.number}, and not as entry {end.number} was recorded elsewhere; "
            "restore it from your backup"
        )
    return last
