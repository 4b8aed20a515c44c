"""What a peer reports, as typed events; one JSON object a line in its trace.

The live view, the report and the tests read nothing else. An event names members as the charter does. The writer adds
the time (`at`, seconds since 1970) and the bytes so far (`bytes_in`, `bytes_out`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, ClassVar

from p2pfl.core.errors import Malformed


class State(StrEnum):
    """What a peer is doing, as the live view shows it."""

    STARTING = "starting"
    LINKING = "linking"
    SYNCING = "syncing"
    TRAINING = "training"
    AVERAGING = "averaging"
    SETTLING = "settling"
    LEAVING = "leaving"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PeerStarted:
    """The first line of a trace: who this is and under what.

    Attributes:
        resumed_at: the round at which a peer that was started again goes on; 0 for a new run.
    """

    name: ClassVar[str] = "started"
    member: str
    peer: str
    charter: str
    neighbors: tuple[str, ...]
    parameters: int
    examples: int
    resumed_at: int = 0


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The peer passed to another state."""

    name: ClassVar[str] = "state"
    state: State
    round: int


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """A link to a neighbor came up or went down."""

    name: ClassVar[str] = "link"
    neighbor: str
    up: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A member seems otherwise than before, as far as this peer can tell.

    Attributes:
        standing: `Standing` of p2pfl.gossip.membership: here, late, unreachable or left.
    """

    name: ClassVar[str] = "member"
    member: str
    standing: str


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """The record of a round: who was in the average, who was absent and why. Nothing is a silent subset.

    Attributes:
        heard: members other than this peer whose vectors are in the average.
        absent: who is not in it of those that might have been, with the reason or the stage it was lost at.
        seconds: from the start of this round to the start of the next.
        loss: of the local steps, averaged; None in rounds that only average.
        spread: among neighbors, the largest squared distance from a neighbor's vector to this peer's, before averaging.
        settling: whether the round only averages.
        outcome: how it ended; `Outcome` of p2pfl.gossip.session in groups, empty among neighbors.
        enrolled: in groups, who began the session.
        attempt: in groups, how many sessions were given up before it began.
        leader: in groups, whose proposal of survivors was certified.
        evidence: in groups, the session in hexadecimal; the signed statements refer to it.
        steps: local steps made.
        reason: why this peer was in no sum, where no single member is the cause.
        group_loss: in groups, the loss of local steps over all in the average, by weight; None unless all had one.
        group_steps: in groups, the local steps of those, likewise.
        weight: in groups, of all in the average together: 1 for each, unless they weigh by their samples.
        clipped: how many of the own values were beyond what masks represent.
        audit: under masks, how the check of the sums ended; `Session.audit` of p2pfl.gossip.session.
        distance: in groups, the root mean square, over the parameters, of the own contribution less the average.
    """

    name: ClassVar[str] = "round"
    round: int
    seconds: float
    heard: tuple[str, ...]
    absent: dict[str, str]
    loss: float | None
    spread: float
    settling: bool
    outcome: str = ""
    enrolled: tuple[str, ...] = ()
    attempt: int = 0
    leader: str = ""
    evidence: str = ""
    steps: int = 0
    reason: str = ""
    group_loss: float | None = None
    group_steps: float | None = None
    weight: float = 0.0
    clipped: int = 0
    distance: float | None = None
    audit: str = ""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The averaged model's metrics on the held-out data, after so many rounds: 0 is the common initial model."""

    name: ClassVar[str] = "evaluated"
    rounds: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Refused:
    """Something a remote did was refused; the peer goes on."""

    name: ClassVar[str] = "refused"
    who: str
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something the operator should know."""

    name: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True, slots=True)
class PeerFinished:
    """The last line of a trace.

    Attributes:
        outcome: `done`, `stopped` (asked to) or `failed`.
        agreed: whether the models are known to be within the charter's tolerance of each other.
        reason: why it failed.
    """

    name: ClassVar[str] = "finished"
    outcome: str
    round: int
    agreed: bool
    reason: str = ""


Event = (
    PeerStarted | StateChanged | LinkChanged | MemberChanged | RoundEnded | Evaluated | Refused | Note | PeerFinished
)
_EVENTS: Mapping[str, type[Event]] = {
    kind.name: kind
    for kind in (
        PeerStarted,
        StateChanged,
        LinkChanged,
        MemberChanged,
        RoundEnded,
        Evaluated,
        Refused,
        Note,
        PeerFinished,
    )
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a trace.

    Attributes:
        at: seconds since 1970.
        bytes_in: bytes received by the peer's sockets so far.
        bytes_out: bytes sent by them so far.
    """

    at: float
    bytes_in: int
    bytes_out: int
    event: Event


def encode_entry(entry: Entry) -> str:
    """Return `entry` as one line of JSON, without the newline."""
    head = {
        "event": entry.event.name,
        "at": round(entry.at, 6),
        "bytes_in": entry.bytes_in,
        "bytes_out": entry.bytes_out,
    }
    return json.dumps(head | asdict(entry.event), separators=(",", ":"))


def decode_entry(line: str) -> Entry:
    """Read one line of a trace.

    Raises:
        Malformed: the line is not an event of this version.
    """
    try:
        values = json.loads(line)
        kind = _EVENTS[values.pop("event")]
        at, bytes_in, bytes_out = (values.pop(key) for key in ("at", "bytes_in", "bytes_out"))
        return Entry(at, bytes_in, bytes_out, _build(kind, values))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Malformed(f"not a line of a trace: {line[:80]!r}") from error


def _build(kind: Any, values: Mapping[str, object]) -> Event:
    if set(values) != {field.name for field in fields(kind)}:
        raise Malformed(f"a line of a trace with other fields than {kind.name} has")
    event: Event = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    return replace(event, state=State(event.state)) if isinstance(event, StateChanged) else event
