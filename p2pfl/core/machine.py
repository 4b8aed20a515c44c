"""The contract of every protocol: a machine without I/O.

A machine takes one input and the time, and returns effects, in order; it never waits, reads a clock, draws entropy or
touches the world. Whoever runs it (sockets in `p2pfl.node.driver`, a simulated network, a test) carries the effects
out and feeds back what happens. A machine checks an input before it changes anything, so an input that raises leaves
it as it was. What a remote peer does wrong never raises: it becomes effects that cost that peer.

Vectors travel by reference: from the moment one enters an input or an effect, nobody writes to it. But the vector of a
`Trained` is the machine's own from then on: what a peer averages and the average lie in the same place, one after the
other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.errors import P2pflError, RemoteError
from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.ledger import Record
from p2pfl.core.trace import Event
from p2pfl.core.wire import Message

Vector = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Payload = Vector | Bytes


@dataclass(frozen=True, slots=True)
class Started:
    """The driver is ready; the first input, once."""


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Lanes to and from `peer` stand, and both have said Hello under our charter."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link to `peer` is gone."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Received:
    """A message without a payload arrived."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class BulkOffered:
    """The header of a message with a payload arrived; nothing is allocated.

    Answered by exactly one `AcceptBulk`, `RefuseBulk` or `Disconnect`.
    """

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class BulkReceived:
    """The payload of an accepted offer arrived whole, and its hash is right."""

    peer: PeerId
    message: Message
    payload: bytearray


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time set for `key` has come."""

    key: str


@dataclass(frozen=True, slots=True)
class Trained:
    """The local steps of `round` are done; `vector` is fresh, and nobody else reads it any more.

    Attributes:
        loss: told to the others, as a mean; None where noise is to hide what single examples give away.
        steps: how many were made; fewer than asked for where the time was up.
    """

    round: Round
    vector: Vector
    loss: float | None
    steps: int = 1


@dataclass(frozen=True, slots=True)
class Computed:
    """The work of the `Compute` effect with this key is done."""

    key: str
    result: object


@dataclass(frozen=True, slots=True)
class Persisted:
    """The record of the `Persist` effect with this key is on the disk, and survives a crash.

    Attributes:
        base: of a checkpoint, the same as the store holds it, read-only: it need not be held in memory twice.
        results: likewise, one after the other, as bytes.
        update: likewise; None where there is none.
    """

    key: str
    base: Vector | None = None
    results: Bytes | None = None
    update: Vector | None = None


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The operator asks this peer to leave, at the end of the round it is in; asked again, at once."""


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """Local steps or a computation raised one of our errors."""

    error: P2pflError


Input = (
    Started
    | LinkUp
    | LinkDown
    | Received
    | BulkOffered
    | BulkReceived
    | TimerFired
    | Trained
    | Computed
    | Persisted
    | WorkFailed
    | StopRequested
)


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message`, which has no payload, to `peer`; lost if there is no link."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class SendBulk:
    """Send `message` with `payload` to each of `peers` that has a link."""

    peers: tuple[PeerId, ...]
    message: Message
    payload: Payload


@dataclass(frozen=True, slots=True)
class AcceptBulk:
    """Allocate, and receive the payload just offered."""


@dataclass(frozen=True, slots=True)
class RefuseBulk:
    """Skip the payload just offered; the link stays."""

    reason: str


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Give `TimerFired(key)` once `at` has come; an earlier time set for the same key is forgotten."""

    key: str
    at: Seconds


@dataclass(frozen=True, slots=True)
class CancelTimer:
    """Forget the time set for `key`, if any."""

    key: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the link to `peer` and do not seek it again for a while."""

    peer: PeerId
    error: RemoteError


@dataclass(frozen=True, slots=True)
class DropLink:
    """Close the link to a neighbor that is silent; it is sought again at once, and has done nothing wrong."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Seek:
    """Keep up a link to `peer`, a member that none was kept up to."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Forsake:
    """Close the link to `peer`, if any, and keep none up any more; should the peer seek one, it is there."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Train:
    """Make the local steps of `round` from `vector`, beside the network loop; answered by `Trained` or `WorkFailed`.

    Attributes:
        seconds: after which no further step begins; at least one is made.
        mixed: whether `vector` is what came of mixing the vector that training gave last. Else that came to nothing, or
            nobody knows what, and `vector` is where this peer stands.
    """

    round: Round
    vector: Vector
    seconds: float = math.inf
    mixed: bool = True


@dataclass(frozen=True, slots=True)
class Compute:
    """Evaluate the pure `work`; answered by `Computed` with `key`, or `WorkFailed`.

    Attributes:
        size: bytes that the work reads; so that the driver knows what is worth a thread beside the network loop.
    """

    key: str
    work: Callable[[], object]
    size: int


@dataclass(frozen=True, slots=True)
class Persist:
    """Write `record` durably; answered by `Persisted` with `key`.

    What must not happen before the record is safe is among the effects that answer `Persisted`, never beside this one.
    A disk that fails ends the peer: it gets no answer.
    """

    key: str
    record: Record


@dataclass(frozen=True, slots=True)
class Emit:
    """Write `event` to the trace."""

    event: Event


@dataclass(frozen=True, slots=True)
class Adopt:
    """`vector` is where this peer stands after `round`; `mixed` is as in `Train`, and not said of settling."""

    round: Round
    vector: Vector
    mixed: bool = True


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing is left to do; with an error, the run failed."""

    error: P2pflError | None = None


Effect = (
    Send
    | SendBulk
    | AcceptBulk
    | RefuseBulk
    | SetTimer
    | CancelTimer
    | Disconnect
    | DropLink
    | Seek
    | Forsake
    | Train
    | Compute
    | Persist
    | Emit
    | Adopt
    | Finish
)


class Machine(Protocol):
    """A protocol without I/O."""

    def handle(self, input: Input, now: Seconds) -> list[Effect]:
        """Take one input at time `now` of a monotonic clock, and return what is to be done, in order.

        Raises:
            OutOfTurn: the input is impossible in this state: the driver is at fault.
        """
