"""What a simulated network is made of: hosts, each with a disk and a clock, and the links between them."""

import hashlib
import hmac
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from p2pfl.core.errors import BadSignature, P2pflError
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Checkpoint, Record, Stepped, Uploading, Voted
from p2pfl.core.machine import Machine, Payload, Vector
from p2pfl.core.trace import Event
from p2pfl.core.wire import MAX_WEIGHT, Message
from p2pfl.simulation.liars import Sign

FIRST_PAUSE, LONGEST_PAUSE, PENALTY, GRACE = 0.1, 30.0, 60.0, 1.0
MAX_BULK = 4
FLUSH_TIMEOUT = 5.0
"""These are as in `p2pfl.node.links`, which has sockets and is not loaded here; a test compares them."""

Trainer = Callable[[PeerId, Round, Vector, float, bool], tuple[Vector, float, int]]
"""Local steps: (peer, round, vector, seconds, mixed) -> (fresh vector, loss, steps made in at most these seconds); see
`p2pfl.core.machine.Train`."""
Standing = Callable[[Vector, bool], Vector]
"""What is a peer's model where it stands: (vector, mixed) -> model; see `p2pfl.core.machine.Adopt`."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the network and the machines are like where nothing is wrong. All defaults are guesses.

    Attributes:
        latency: median seconds that a message takes; lognormal.
        spread: standard deviation of the latency's logarithm.
        bandwidth: bytes a second on one link, each way.
        fsync: median seconds that a durable write takes; lognormal, with the same spread.
        compute: bytes a second that a computation reads.
        start: seconds within which all peers are started.
    """

    latency: float = 0.03
    spread: float = 0.5
    bandwidth: float = 2e6
    fsync: float = 0.005
    compute: float = 1e9
    start: float = 1.0


class Disk:
    """What of one peer survives a crash.

    Attributes:
        checkpoint: the last one; None before the first.
        records: the others that the checkpoint does not make obsolete, in the order written.
    """

    def __init__(self) -> None:
        self.checkpoint: Checkpoint | None = None
        self.records: list[Uploading | Stepped | Voted] = []

    def write(self, record: Record) -> None:
        """Keep `record`; a checkpoint replaces the last, and the records of rounds before it."""
        if isinstance(record, Checkpoint):
            update = None if record.update is None else record.update.copy()
            self.checkpoint = Checkpoint(record.round, record.base.copy(), update, record.released, mixed=record.mixed)
            self.records = [kept for kept in self.records if kept.round >= record.round]
        else:
            self.records.append(record)


@dataclass(frozen=True)
class PeerSpec:
    """One peer of a simulated network.

    Attributes:
        build: makes its machine, at the start and after each crash, from what the disk holds.
        train: its local training.
        neighbors: to whom it seeks a link.
        step_seconds: modelled seconds of one local step.
        sign: signs statements as this peer does, for the case that it lies.
        model: what its model is.
    """

    peer: PeerId
    name: str
    build: Callable[[Disk], Machine]
    train: Trainer
    neighbors: tuple[PeerId, ...]
    step_seconds: float = 0.05
    sign: Sign | None = None
    model: Standing = lambda vector, _: vector


class SimulatedKeyring:
    """Signatures for simulation, far faster than real ones: HMAC-SHA-256 under a key of each peer that all could know.

    Args:
        secret: from which all peers' keys follow.
        place: this peer's.
        members: how many there are.
    """

    def __init__(self, secret: bytes, place: int, members: int) -> None:
        self._place = place
        self._keys = [hmac.digest(secret, peer.to_bytes(4, "big"), "sha256") for peer in range(members)]

    def sign(self, body: bytes) -> bytes:
        """Return this peer's signature of a statement's body."""
        return hmac.digest(self._keys[self._place], body, "sha256")

    def verify(self, place: int, body: bytes, signature: bytes) -> None:
        """Check that the member at this place of the roster signed the body.

        Raises:
            BadSignature: it did not.
        """
        if not 0 <= place < len(self._keys) or hmac.digest(self._keys[place], body, "sha256") != signature:
            raise BadSignature(f"a signature that is not that of member {place}")


def stream(seed: int, name: str) -> random.Random:
    """Return the random stream of this name under the seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))  # noqa: S311 - chance, not secrets


class Host:
    """One peer in the network, over all its lives."""

    def __init__(self, place: int, spec: PeerSpec, seed: int) -> None:
        self.place, self.spec, self.peer, self.name = place, spec, spec.peer, spec.name
        self.draw = stream(seed, f"peer/{place}")
        self.links: dict[PeerId, Link] = {}
        self.ways: dict[PeerId, Way] = {}
        """To each neighbor."""
        self.disk = Disk()
        self.life = 0
        """How often it died; what belongs to an earlier life comes to nothing."""
        self.machine: Machine | None = None
        self.timers: dict[str, tuple[float, int]] = {}
        """By key: when it is due, on this host's clock, and the number of the event that lets it fire."""
        self.writing: deque[Record] = deque()
        self.round = Round(0)
        """Of the last update or chunk sent; in its Hellos."""
        self.finished, self.error = False, None
        self.gone = False
        """Dead, and never to be started again."""
        self.lying = False
        self.frozen = False
        self.backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        """What happened while it was frozen."""
        self.fails = False
        """Whether its next local training fails."""
        self.slowness = 1.0
        self.disk_free_at = self.worker_free_at = 0.0
        self.adopted: list[tuple[Round, Vector]] = []
        self.events: list[tuple[float, Event]] = []
        self._origin = (0.0, 0.0)
        self._rate = 1.0
        self._latest = -math.inf

    error: P2pflError | None

    @property
    def running(self) -> bool:
        """Whether there is a process that has not finished."""
        return self.machine is not None and not self.finished

    def timer_count(self) -> int:
        """Return how many timers it has set."""
        return len(self.timers)

    def held(self) -> int:
        """Return how many things its machine stores; see `p2pfl.simulation.invariants.Standing`."""
        held = getattr(self.machine, "held", 0)
        return int(held() if callable(held) else held)

    def contribution(self) -> Vector | None:
        """Return what it averages in its round, where its machine tells."""
        return getattr(self.machine, "contribution", None)

    def changed_from(self) -> Vector | None:
        """Return the base that its contribution is the change from; None if it is a whole model."""
        return getattr(self.machine, "changed_from", None)

    def weight(self) -> int:
        """Return its weight in an average, in units of 2^-16."""
        return int(getattr(self.machine, "weight", MAX_WEIGHT))

    def undelivered(self) -> int:
        """Return how many messages are under way or queued on its fullest link."""
        return max([way.control + len(way.queue) + way.busy for way in self.ways.values()], default=0)

    def begin_life(self, machine: Machine, now: float) -> None:
        """Run `machine` from `now` on; its monotonic clock begins anywhere."""
        self.machine = machine
        self._latest = -math.inf
        self._origin = (now, self.draw.uniform(0.0, 1e6))
        self.disk_free_at = self.worker_free_at = now

    def end_life(self) -> list[Record]:
        """Forget everything but the disk; return what was being written, the oldest first."""
        self.life += 1
        self.machine, self.frozen = None, False
        self.timers.clear()
        self.backlog.clear()
        writing = list(self.writing)
        self.writing.clear()
        return writing

    # Its clock

    def clock(self, now: float, least: float = -math.inf) -> float:
        """Return what its clock shows at virtual time `now`: never less than before, nor than `least`."""
        began, shown = self._origin
        self._latest = max(self._latest, least, shown + self._rate * (now - began))
        return self._latest

    def virtual(self, local: float) -> float:
        """Return the virtual time at which its clock shows `local`."""
        began, shown = self._origin
        return began + (local - shown) / self._rate

    def skew(self, now: float, rate: float, jump: float) -> None:
        """Let its clock jump ahead, and run at another rate from now on."""
        self._origin, self._rate = (now, self.clock(now) + jump), rate


@dataclass
class Way:
    """One direction of a link: what is under way from `sender` to `receiver`.

    Attributes:
        side: the sender's place among the link's ends.
        loss: the rate; delay and reorder: seconds; duplicate: the rate; all as the faults say just now.
        blocked: whether nothing comes through.
        control_at: when the last message on the control lane arrives; the next one does not overtake it.
        control: messages on the control lane that have not arrived.
        queue: messages with payloads that wait for the bulk lane.
        busy: whether the bulk lane carries one.
    """

    link: "Link"
    side: int
    sender: Host
    receiver: Host
    draw: random.Random
    loss: float = 0.0
    delay: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    blocked: bool = False
    control_at: float = 0.0
    control: int = 0
    queue: deque[tuple[Message, Payload]] = field(default_factory=lambda: deque(maxlen=MAX_BULK))
    busy: bool = False

    def empty(self) -> None:
        """Forget what is under way."""
        self.control, self.control_at, self.busy = 0, 0.0, False
        self.queue.clear()

    def is_quiet(self) -> bool:
        """Return whether nothing is under way."""
        return not (self.control or self.busy or self.queue)


class Link:
    """The link of two peers. Each side has its own idea of whether it is up.

    Attributes:
        epoch: counts connections; what belongs to an earlier one comes to nothing.
        standing: whether there is a connection.
        up: for each side, whether its machine was told so.
        banned_until: for each side, until when it wants nothing of the other.
        pause: before the next dial.
        dial: the number of the event that dials.
    """

    def __init__(self, first: Host, second: Host, seed: int) -> None:
        self.ends = (first, second)
        names = f"{first.place}-{second.place}"
        self.draw = stream(seed, f"link/{names}")
        self.ways = (
            Way(self, 0, first, second, stream(seed, f"way/{names}")),
            Way(self, 1, second, first, stream(seed, f"way/{names}/back")),
        )
        self.epoch = 0
        self.standing = False
        self.up = [False, False]
        self.banned_until = [-math.inf, -math.inf]
        self.pause = FIRST_PAUSE
        self.dial = 0
        for way in self.ways:
            way.sender.links[way.receiver.peer] = self
            way.sender.ways[way.receiver.peer] = way
