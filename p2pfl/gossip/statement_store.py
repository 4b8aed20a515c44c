"""The signed statements of one round, bounded whatever members sign."""

from collections.abc import Mapping
from typing import Any, TypeVar

from p2pfl.core.statements import MAX_ATTEMPTS, Advert, Content, Enrolment, Result, Statement

MOST_SESSIONS = 2 * MAX_ATTEMPTS
"""Sessions of one round of which a signer's statements are kept."""

_Content = TypeVar("_Content", bound=Content)


def _place_of(statement: Statement) -> tuple[tuple[int, bytes | int], int]:
    """Return where a statement stands: its kind with its attempt or session, and its signer, or chunk for results."""
    content = statement.content
    key = content.attempt if isinstance(content, Advert | Enrolment) else content.session
    return (content.kind, key), content.chunk if isinstance(content, Result) else statement.signer


class Statements:
    """The signed statements of a round: of each kind one by each signer in each attempt or session.

    For results the signer's place is that of the chunk, with who signed it: the aggregator or its deputy.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, bytes | int], dict[int, Statement]] = {}
        self._said: dict[tuple[int, bytes | int], dict[int, Any]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def of(self, kind: type[_Content], key: bytes | int) -> Mapping[int, _Content]:
        """Return what is held of a kind, in this attempt or session, by signer (by chunk for results)."""
        return self._said.get((kind.kind, key), {})

    def signed(self, kind: type[Content], key: bytes | int) -> Mapping[int, Statement]:
        """Return the same with signatures."""
        return self._held.get((kind.kind, key), {})

    def add(self, statement: Statement) -> bool:
        """Keep a statement; return whether it is new. The first of a signer stands."""
        if not self.takes(statement):
            return False
        key, who = _place_of(statement)
        self._held.setdefault(key, {})[who] = statement
        self._said.setdefault(key, {})[who] = statement.content
        return True

    def forget(self, kind: type[Content], key: bytes | int, who: int) -> None:
        """Make a place free again."""
        self._held.get((kind.kind, key), {}).pop(who, None)
        self._said.get((kind.kind, key), {}).pop(who, None)

    def takes(self, statement: Statement) -> bool:
        """Return whether there is a place for a statement."""
        key, who = _place_of(statement)
        return who not in self._held.get(key, {}) and not self._is_full(statement.content, who)

    def holds(self, statement: Statement) -> bool:
        """Return whether this very statement is here."""
        key, who = _place_of(statement)
        held = self._held.get(key, {}).get(who)
        return held is not None and held.body == statement.body

    def contradicts(self, statement: Statement) -> bool:
        """Return whether the same signer has signed something else in the same place."""
        key, who = _place_of(statement)
        known = None if isinstance(statement.content, Result) else self._held.get(key, {}).get(who)
        return known is not None and known.body != statement.body

    def _is_full(self, content: Content, who: int) -> bool:
        if isinstance(content, Advert | Enrolment):
            return False
        kept = sum(kind == content.kind and who in held for (kind, _), held in self._held.items())
        return kept >= MOST_SESSIONS


def said_as(kind: type[_Content], statement: Statement) -> _Content:
    """Return what a statement says, which is of this kind."""
    content = statement.content
    if not isinstance(content, kind):
        raise TypeError(f"a {type(content).__name__} where a {kind.__name__} belongs")
    return content
