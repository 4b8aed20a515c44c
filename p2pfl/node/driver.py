"""Runs a machine: carries out its effects under trio, and feeds it what happens.

The machine runs in the network loop and takes microseconds; local steps, evaluation and sums over large vectors run
in a worker thread beside it. The protocol's rules are the machine's; none stands here.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from p2pfl.core.errors import P2pflError, RemoteError
from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.ledger import Record
from p2pfl.core.machine import (
    AcceptBulk,
    Adopt,
    BulkOffered,
    BulkReceived,
    Bytes,
    CancelTimer,
    Compute,
    Computed,
    Disconnect,
    DropLink,
    Effect,
    Emit,
    Finish,
    Forsake,
    Input,
    LinkDown,
    LinkUp,
    Machine,
    Persist,
    Persisted,
    Received,
    RefuseBulk,
    Seek,
    Send,
    SendBulk,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
    Train,
    Trained,
    Vector,
    WorkFailed,
)
from p2pfl.core.trace import Event, Refused
from p2pfl.core.wire import SPOKEN, Hello, Message, Ping, Versions, Whereabouts
from p2pfl.node.discovery import Directory
from p2pfl.node.links import Links
from p2pfl.node.transport import Transport

THREAD_BYTES = 1 << 20
"""A computation over fewer bytes takes less time than handing it to a thread (about 0.2 ms)."""


class Worker(Protocol):
    """Local training; called in a worker thread, one call at a time."""

    def train(self, round: Round, vector: Vector, seconds: float, mixed: bool) -> tuple[Trained, Sequence[Event]]:
        """Make the local steps that a `Train` asks for; return what to report too.

        Raises:
            P2pflError: training failed, in one line.
        """


@dataclass(frozen=True)
class Hooks:
    """Whom the driver tells.

    Attributes:
        emit: writes an event to the trace.
        adopt: takes where the peer stands after a round, as `Adopt` says.
        persist: keeps a record so that it survives a crash; returns a checkpoint's base, results and update as kept,
            or None. Called in a worker thread.
        refused: counts what remotes did and was refused, by its reason; of such events the trace has only some.
    """

    emit: Callable[[Event], None]
    adopt: Callable[[Round, Vector, bool], None]
    persist: Callable[[Record], tuple[Vector, Bytes, Vector | None] | None]
    refused: Callable[[str], None] = lambda _: None


class Driver:
    """One machine at work.

    Args:
        machine: the protocol.
        transport: its network.
        addresses: of every other member, by the charter.
        charter: the charter's hash.
        worker: local training.
        hooks: whom to tell.
        sought: to whom links are kept up from the start; None for all.
        moved: signs where this peer is, if not where the charter says; see `p2pfl.node.discovery.Directory`.
        sequence: of the first such record.
        versions: of the messages that this peer speaks.
    """

    def __init__(
        self,
        machine: Machine,
        transport: Transport,
        addresses: Mapping[PeerId, Sequence[str]],
        charter: bytes,
        worker: Worker,
        hooks: Hooks,
        sought: Collection[PeerId] | None = None,
        moved: Callable[[int], Whereabouts] | None = None,
        sequence: int = 1,
        versions: Versions = SPOKEN,
    ) -> None:
        self._machine = machine
        self._transport = transport
        self._worker = worker
        self._hooks = hooks
        self._round = Round(0)
        directory = Directory(transport.identity, charter, addresses, moved, sequence)
        wanted = addresses.keys() if sought is None else sought
        self._links = Links(transport, directory, lambda: Hello(charter, self._round, versions), self, wanted, versions)
        self._refusals = Refusals()
        self._inputs: deque[Input] = deque()
        self._handling = False
        self._accepted = False
        self._timers: dict[str, Seconds] = {}
        self._timers_changed = trio.Event()
        self._finished = trio.Event()
        self._error: BaseException | None = None
        self._thread, self._disk = trio.CapacityLimiter(1), trio.CapacityLimiter(1)
        self._nursery: trio.Nursery

    async def run(self, listen: Sequence[str], ready: Callable[[Sequence[str]], None] = lambda _: None) -> None:
        """Run until the machine finishes.

        Args:
            listen: multiaddresses to bind.
            ready: told the bound addresses.

        Raises:
            P2pflError: what the machine finished with, or what kept the transport from starting.
        """
        async with self._transport.run(listen, self._links.accept, self._on_refused) as bound:
            ready(bound)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._links.maintain)
                nursery.start_soon(self._run_timers)
                self.feed(Started())
                await self._finished.wait()
                await self._links.leave()
                nursery.cancel_scope.cancel()
        if self._error is not None:
            raise self._error

    @property
    def is_training(self) -> bool:
        """Whether a thread still makes local steps."""
        return self._thread.borrowed_tokens > 0

    def stop(self) -> None:
        """Ask the machine to leave."""
        self.feed(StopRequested())

    def hint(self, peer: PeerId, address: str) -> None:
        """Note where the LAN says that a member is."""
        self._links.hint(peer, address)

    def feed(self, input: Input) -> None:
        """Hand `input` to the machine and carry out what it answers; inputs that this causes come after."""
        self._inputs.append(input)
        if self._handling or self._finished.is_set():
            return
        self._handling = True
        try:
            while self._inputs:
                for effect in self._machine.handle(self._inputs.popleft(), Seconds(trio.current_time())):
                    self._carry_out(effect)
        except Exception as error:  # noqa: BLE001 - raised by `run`; here it would end in some lane's handler
            self._error = error
            self._finished.set()
        finally:
            self._handling = False

    def _carry_out(self, effect: Effect) -> None:  # noqa: PLR0912 - a case for each effect
        match effect:
            case Send(peer, message):
                if isinstance(message, Ping):
                    self._round = message.round
                self._links.send(peer, message)
            case SendBulk(peers, message, payload):
                self._round = message.round
                self._links.send_bulk(peers, message, payload.data.cast("B"))
            case AcceptBulk():
                self._accepted = True
            case RefuseBulk():
                self._accepted = False
            case SetTimer(key, at):
                self._timers[key] = at
                self._timers_changed.set()
            case CancelTimer(key):
                self._timers.pop(key, None)
            case Disconnect(peer, error):
                self._links.ban(peer, error.reason)
            case DropLink(peer, reason):
                self._links.drop(peer, reason)
            case Seek(peer):
                self._links.seek(peer)
            case Forsake(peer):
                self._links.forsake(peer)
            case Train():
                self._start(self._train, effect)
            case Compute():
                self._compute(effect)
            case Persist(key, record):
                self._start(self._persist, key, record)
            case Emit(event):
                if isinstance(event, Refused):
                    self._hooks.refused(event.reason)
                self._hooks.emit(event)
            case Adopt(round, vector, mixed):
                self._hooks.adopt(round, vector, mixed)
            case Finish(error):
                self._error = error
                self._finished.set()

    # Work beside the loop

    def _start(self, function: Callable[..., object], *arguments: object) -> None:
        self._nursery.start_soon(function, *arguments)  # type: ignore[arg-type]

    async def _train(self, effect: Train) -> None:
        try:
            trained, events = await trio.to_thread.run_sync(
                self._worker.train,
                effect.round,
                effect.vector,
                effect.seconds,
                effect.mixed,
                limiter=self._thread,
                abandon_on_cancel=True,  # type: ignore[call-arg]  # the stubs are older than trio
            )
        except P2pflError as error:
            self.feed(WorkFailed(error))
        except Exception as error:  # noqa: BLE001 - a fault of ours, raised by `run`
            self._error = error
            self._finished.set()
        else:
            for event in events:
                self._hooks.emit(event)
            self.feed(trained)

    def _compute(self, effect: Compute) -> None:
        if effect.size < THREAD_BYTES:
            self._inputs.append(_computed(effect))
        else:
            self._start(self._compute_beside, effect)

    async def _persist(self, key: str, record: Record) -> None:
        try:
            # Never left behind in the middle: when the peer ends, what it began to write is whole.
            kept = await trio.to_thread.run_sync(self._hooks.persist, record, limiter=self._disk)
        except Exception as error:  # noqa: BLE001 - raised by `run`: a peer without memory takes no further step
            self._error = error
            self._finished.set()
        else:
            self.feed(Persisted(key, *(kept or ())))

    async def _compute_beside(self, effect: Compute) -> None:
        self.feed(await trio.to_thread.run_sync(_computed, effect, abandon_on_cancel=True))  # type: ignore[call-arg]

    # Time

    async def _run_timers(self) -> None:
        while True:
            self._timers_changed = trio.Event()
            earliest = min(self._timers.values(), default=float("inf"))
            with trio.move_on_at(earliest):
                await self._timers_changed.wait()
            now = trio.current_time()
            for key in [key for key, at in self._timers.items() if at <= now]:
                # An earlier one of these may have cancelled or moved it.
                if self._timers.get(key, float("inf")) <= now:
                    del self._timers[key]
                    self.feed(TimerFired(key))

    # What the links bring

    def link_up(self, peer: PeerId) -> None:
        """See `p2pfl.node.links.LinkEvents`."""
        self.feed(LinkUp(peer))

    def link_down(self, peer: PeerId, reason: str) -> None:
        """See `p2pfl.node.links.LinkEvents`."""
        self.feed(LinkDown(peer, reason))

    def message(self, peer: PeerId, message: Message) -> None:
        """See `p2pfl.node.links.LinkEvents`."""
        self.feed(Received(peer, message))

    def offer(self, peer: PeerId, message: Message) -> bool:
        """See `p2pfl.node.links.LinkEvents`."""
        self._accepted = False
        self.feed(BulkOffered(peer, message))
        return self._accepted

    def bulk(self, peer: PeerId, message: Message, payload: bytearray) -> None:
        """See `p2pfl.node.links.LinkEvents`."""
        self.feed(BulkReceived(peer, message, payload))

    def fault(self, peer: PeerId, error: RemoteError) -> None:
        """See `p2pfl.node.links.LinkEvents`."""
        self._on_refused(peer, error.reason)
        self._links.ban(peer, error.reason)

    def _on_refused(self, who: str, reason: str) -> None:
        self._hooks.refused(reason)
        if self._refusals.is_news(who, reason, trio.current_time()):
            self._hooks.emit(Refused(who, reason))


def _computed(effect: Compute) -> Computed | WorkFailed:
    """Do the work; one of our errors in it is the machine's to hear of."""
    try:
        return Computed(effect.key, effect.work())
    except P2pflError as error:
        return WorkFailed(error)


class Refusals:
    """What strangers can write into a trace is bounded: the same refusal once a minute, and so many in a minute."""

    PERIOD, MOST = 60.0, 60

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], float] = {}

    def is_news(self, who: str, reason: str, now: float) -> bool:
        """Return whether a refusal is to be told, and remember that it was."""
        self._told = {key: at for key, at in self._told.items() if now - at < self.PERIOD}
        if (who, reason) in self._told or len(self._told) >= self.MOST:
            return False
        self._told[who, reason] = now
        return True
