"""Links to neighbors: kept up, dialled again with growing pauses, and taken down as a whole.

A link is up while our two outgoing lanes stand and the neighbor's Hello has come on its control lane. The peer with
the smaller id dials; the other waits a little before it does too, since it may be the one that can. All reading goes
on whatever the machine does, so a slow round never stalls a neighbor's writes.

Links are kept up to the members that are sought. Another member that seeks us finds us: the link stands for as long as
it keeps it. Address records are taken in and passed on here; no machine sees them.
"""

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import trio

from p2pfl.core.errors import Malformed, RemoteError, StreamReset, TransportError
from p2pfl.core.ids import PeerId, Seconds
from p2pfl.core.wire import (
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    SPOKEN,
    Hello,
    Message,
    Versions,
    Whereabouts,
    digest,
    payload_length,
)
from p2pfl.node.budget import Allowance, ReceiveCredit, receive_seconds, send_seconds
from p2pfl.node.discovery import Directory
from p2pfl.node.framing import read_message, read_payload, skip_payload, write_bulk, write_message
from p2pfl.node.transport import IncomingLane, LaneKind, OutgoingLane, Transport

DIAL_TIMEOUT = Seconds(10.0)
PATIENCE = Seconds(2.0)
"""How long the peer with the larger id waits to be dialled. A guess: several times what dialling takes."""
FIRST_PAUSE, LONGEST_PAUSE = Seconds(0.1), Seconds(30.0)
LEAST_PAUSE = Seconds(0.05)
"""Between two attempts, however loudly the neighbor calls."""
PENALTY = Seconds(60.0)
"""How long a neighbor that broke the protocol is not sought."""
GRACE = Seconds(1.0)
"""How long the connection to such a neighbor stands after the last thing read from it. A guess: many round trips."""
MAX_CONTROL, MAX_BULK = 256, 4
"""Messages queued for a neighbor that reads slowly; the oldest give way: each is worth less than the one after it."""
FLUSH_TIMEOUT, CLOSE_TIMEOUT = Seconds(5.0), Seconds(2.0)
"""How long a leaving peer waits for what it wrote to be taken. A guess; a neighbor that hangs costs no more."""


class LinkEvents(Protocol):
    """Who is told what the links bring."""

    def link_up(self, peer: PeerId) -> None:
        """Tell that the link stands."""

    def link_down(self, peer: PeerId, reason: str) -> None:
        """Tell that a link that stood is gone."""

    def message(self, peer: PeerId, message: Message) -> None:
        """Hand over a message without a payload."""

    def offer(self, peer: PeerId, message: Message) -> bool:
        """Ask whether to receive the payload of `message`; if not, it is skipped."""

    def bulk(self, peer: PeerId, message: Message, payload: bytearray) -> None:
        """Hand over a message with its payload."""

    def fault(self, peer: PeerId, error: RemoteError) -> None:
        """Tell that a neighbor sent what is no message; its link is closed."""


class _Link:
    """One neighbor's lanes and queues, and the version of what is written to it."""

    def __init__(self, peer: PeerId, sought: bool, version: int) -> None:
        self.peer = peer
        self.version = version
        self.sought = sought
        self.called = trio.Event()
        self.incoming: dict[LaneKind, trio.CancelScope] = {}
        self.allowance = Allowance()
        self.greeted = False
        self.outgoing: trio.CancelScope | None = None
        self.up = False
        self.came_up = False
        self.banned_until = Seconds(0.0)
        self.queues: dict[LaneKind, deque[tuple[Message, memoryview | None, bytes]]] = {
            LaneKind.CONTROL: deque(maxlen=MAX_CONTROL),
            LaneKind.BULK: deque(maxlen=MAX_BULK),
        }
        self.writing = 0
        self.changed = trio.Event()

    def notify(self) -> None:
        """Wake whoever waits for this link to change."""
        self.changed.set()
        self.changed = trio.Event()


class Links:
    """All links of a peer, over one transport."""

    def __init__(
        self,
        transport: Transport,
        directory: Directory,
        hello: Callable[[], Hello],
        events: LinkEvents,
        sought: Collection[PeerId],
        versions: Versions = SPOKEN,
    ) -> None:
        self._transport = transport
        self._directory = directory
        self._hello = hello
        self._events = events
        self._leaving = False
        self._nursery: trio.Nursery | None = None
        self._credit = ReceiveCredit()
        self._versions = versions
        self._links = {peer: _Link(peer, peer in sought, versions.lowest) for peer in directory.members}
        # Only spreads redials in time; nothing of the protocol depends on it.
        self._jitter = random.Random(transport.identity)  # noqa: S311

    async def maintain(self) -> None:
        """Keep the links up that are sought, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            nursery = self._nursery
            for link in self._links.values():
                nursery.start_soon(self._keep_up, link)

    def seek(self, peer: PeerId) -> None:
        """Keep up a link to this member from now on."""
        link = self._links.get(peer)
        if link is not None:
            link.sought = True
            self._call(link)

    def forsake(self, peer: PeerId) -> None:
        """Close the link to this member, and keep none up from now on."""
        link = self._links.get(peer)
        if link is not None:
            link.sought = False
            self.drop(peer, "not needed any more")

    def hint(self, peer: PeerId, address: str) -> None:
        """Note what the LAN says of a member, and try it soon."""
        if self._directory.hint(peer, address) and (link := self._links.get(peer)) is not None and not link.up:
            self._call(link)

    @staticmethod
    def _call(link: _Link) -> None:
        """Have the next attempt made at once."""
        link.called.set()
        link.notify()

    # Sending

    def send(self, peer: PeerId, message: Message) -> None:
        """Queue a message without a payload; dropped where there is no link."""
        self._queue(peer, LaneKind.CONTROL, (message, None, b""))

    def send_bulk(self, peers: Sequence[PeerId], message: Message, payload: memoryview) -> None:
        """Queue a message with `payload`, which nobody changes from now on; dropped where there is no link."""
        trailer = digest(payload)
        for peer in peers:
            self._queue(peer, LaneKind.BULK, (message, payload, trailer))

    def _queue(self, peer: PeerId, kind: LaneKind, item: tuple[Message, memoryview | None, bytes]) -> None:
        link = self._links.get(peer)
        if link is not None and link.up:
            link.queues[kind].append(item)
            link.notify()

    async def leave(self) -> None:
        """Write what is queued, end all lanes, and wait a little until the neighbors have ended theirs.

        A connection that is closed while something of the neighbor's lies unread takes with it what the neighbor has
        not read yet, goodbyes included.
        """
        with trio.move_on_after(FLUSH_TIMEOUT):
            for link in self._links.values():
                while link.up and (link.writing or any(link.queues.values())):
                    await link.changed.wait()
        self._leaving = True
        for link in self._links.values():
            if link.outgoing is not None:
                link.outgoing.cancel()
        with trio.move_on_after(GRACE):
            for link in self._links.values():
                while link.incoming:
                    await link.changed.wait()

    def ban(self, peer: PeerId, reason: str) -> None:
        """Close the link to a neighbor that broke the protocol, and do not seek it for `PENALTY` seconds."""
        link = self._links.get(peer)
        if link is None or _is_banned(link):
            return
        link.banned_until = Seconds(trio.current_time() + PENALTY)
        self._take_down(link, reason)
        if self._nursery is not None:
            self._nursery.start_soon(self._part, peer)

    def drop(self, peer: PeerId, reason: str) -> None:
        """Close the link to a neighbor that is silent, and seek it again at once."""
        link = self._links.get(peer)
        if link is not None:
            self._take_down(link, reason)
            if self._nursery is not None:
                self._nursery.start_soon(self._transport.disconnect, peer)

    async def _part(self, peer: PeerId) -> None:
        # Nothing more is read from it; but our Hello, which may tell it what it did wrong, gets the time to arrive.
        await trio.sleep(GRACE)
        await self._transport.disconnect(peer)

    # Outgoing lanes

    async def _keep_up(self, link: _Link) -> None:
        pause = FIRST_PAUSE
        while True:
            await trio.sleep_until(link.banned_until)
            while not link.sought and LaneKind.CONTROL not in link.incoming:
                await link.changed.wait()
            link.came_up, link.called = False, trio.Event()
            if self._leaving:
                return
            try:
                await self._hold(link)
            except TransportError as error:
                self._take_down(link, str(error))
            pause = FIRST_PAUSE if link.came_up else Seconds(min(2 * pause, LONGEST_PAUSE))
            await trio.sleep(LEAST_PAUSE)
            with trio.move_on_after(max(0.0, pause * self._jitter.uniform(0.5, 1.0) - LEAST_PAUSE)):
                # A neighbor that has just started again reaches us long before we would try to reach it.
                await link.called.wait()

    async def _hold(self, link: _Link) -> None:
        """Open the outgoing lanes and write to them until the link is taken down."""
        if not self._transport.is_connected(link.peer):
            if not link.sought:
                return
            await self._await_dial(link)
            await self._transport.connect(link.peer, self._directory.addresses(link.peer), DIAL_TIMEOUT)
        lanes: dict[LaneKind, OutgoingLane] = {}
        taken_down = True
        try:
            await self._open(link, lanes)
            with trio.CancelScope() as scope:
                link.outgoing = scope
                self._raise_up(link)
                async with trio.open_nursery() as nursery:
                    for kind, lane in lanes.items():
                        nursery.start_soon(self._write, link, link.queues[kind], lane)
        except trio.Cancelled:
            taken_down = False  # we leave: what is written shall arrive
            raise
        finally:
            link.outgoing = None
            await _end(lanes.values(), reset=taken_down and not self._leaving)

    async def _open(self, link: _Link, lanes: dict[LaneKind, OutgoingLane]) -> None:
        try:
            for kind in LaneKind:
                lanes[kind] = await self._transport.open(link.peer, kind)
            await write_message(lanes[LaneKind.CONTROL], self._hello())
        except TransportError:
            # A connection that takes no lanes is dead, though nobody said so; the next attempt dials anew.
            await self._transport.disconnect(link.peer)
            raise

    async def _await_dial(self, link: _Link) -> None:
        if self._transport.identity < link.peer:
            return
        with trio.move_on_after(PATIENCE):
            while not self._transport.is_connected(link.peer):
                await link.changed.wait()

    async def _write(
        self, link: _Link, queue: deque[tuple[Message, memoryview | None, bytes]], lane: OutgoingLane
    ) -> None:
        try:
            with trio.CancelScope() as progress:
                while True:
                    while not queue:
                        await link.changed.wait()
                    await self._write_queued(link, queue, lane, progress)
                    link.notify()
            self._take_down(link, "reads nothing")
        except StreamReset as error:
            # Told, not raised: both writers of a broken connection fail, and one may be cancelled by the other's end.
            self._take_down(link, str(error))

    async def _write_queued(
        self,
        link: _Link,
        queue: deque[tuple[Message, memoryview | None, bytes]],
        lane: OutgoingLane,
        progress: trio.CancelScope,
    ) -> None:
        while queue:
            message, payload, trailer = queue.popleft()
            link.writing += 1
            # One scope for all frames: a scope for each would cost a quarter of a small one.
            progress.deadline = trio.current_time() + send_seconds(message)
            try:
                if payload is None:
                    await write_message(lane, message, link.version)
                else:
                    await write_bulk(lane, message, payload, trailer, link.version)
            finally:
                link.writing -= 1
        progress.deadline = float("inf")

    # Incoming lanes

    async def accept(self, kind: LaneKind, lane: IncomingLane) -> None:
        """Read an incoming lane until it ends; the transport's `LaneHandler`."""
        link = self._links.get(lane.peer)
        if link is None or _is_banned(link):
            await lane.reset()
            return
        reading = trio.CancelScope()
        if kind in link.incoming:
            link.incoming[kind].cancel()
        link.incoming[kind] = reading
        self._call(link)
        reason = "sent the bytes that it announced too slowly"
        with reading:
            try:
                await self._read(link, kind, lane, reading)
                reason = "closed by the neighbor"
            except RemoteError as error:
                self._events.fault(link.peer, error)
                reason = error.reason
            except TransportError as error:
                reason = str(error)
        await lane.reset()
        if link.incoming.get(kind) is not reading:
            return  # A newer lane of the neighbor took its place.
        del link.incoming[kind]
        link.notify()
        if kind is LaneKind.CONTROL:
            link.greeted = False
        # A clean end of one lane may come before the other's last message.
        if reason != "closed by the neighbor" or not link.incoming:
            self._take_down(link, reason)

    async def _read(self, link: _Link, kind: LaneKind, lane: IncomingLane, reading: trio.CancelScope) -> None:
        if kind is LaneKind.CONTROL and not await self._read_hello(link, lane):
            return
        most = MAX_HEADER_BYTES if kind is LaneKind.BULK else MAX_MESSAGE_BYTES
        while not _is_banned(link):
            message = await read_message(lane, most, link.allowance, self._versions)
            if message is None:
                break
            is_bulk = payload_length(message) > 0
            if is_bulk != (kind is LaneKind.BULK):
                raise Malformed(f"sent a message on its {kind} lane that does not belong there", link.peer)
            if isinstance(message, Whereabouts):
                self._learn(link, message)
            elif not is_bulk:
                self._events.message(link.peer, message)
            elif self._events.offer(link.peer, message):
                async with self._credit.take(payload_length(message)):
                    reading.deadline = trio.current_time() + receive_seconds(message)
                    payload = await read_payload(lane, message)
                    reading.deadline = float("inf")
                self._events.bulk(link.peer, message, payload)
            elif not _is_banned(link):
                await skip_payload(lane, message, link.allowance)

    async def _read_hello(self, link: _Link, lane: IncomingLane) -> bool:
        """Read the first message of a control lane; False where the lane ended before, as after half a dial."""
        link.greeted = False
        message = await read_message(lane, versions=self._versions)
        if message is None:
            return False
        if not isinstance(message, Hello):
            raise Malformed("did not say Hello first", link.peer)
        link.version = self._versions.common(message.versions)
        self._events.message(link.peer, message)
        if not _is_banned(link):
            link.greeted = True
            self._raise_up(link)
        return True

    def _learn(self, link: _Link, record: Whereabouts) -> None:
        """Take in where a member is, and pass it on.

        Raises:
            RemoteError: the neighbor must not have sent that.
        """
        news = self._directory.learn(record, link.peer, Seconds(trio.current_time()))
        if news is None:
            return
        for other in self._links.values():
            if other.up and (other is not link or news is not record):
                self.send(other.peer, news)
        moved = self._links.get(PeerId(news.member))
        if moved is not None and not moved.up:
            self._call(moved)

    # Up and down

    def _raise_up(self, link: _Link) -> None:
        if link.greeted and link.outgoing is not None and not link.up:
            link.up = link.came_up = True
            # An idle lane does not notice that its connection is gone, as after the neighbor's crash; a write does.
            self.send(link.peer, self._hello())
            for record in self._directory.records():
                self.send(link.peer, record)
            self._events.link_up(link.peer)

    def _take_down(self, link: _Link, reason: str) -> None:
        for queue in link.queues.values():
            queue.clear()
        if link.outgoing is not None:
            link.outgoing.cancel()
        if link.up:
            link.up = False
            self._events.link_down(link.peer, reason)
        link.notify()


def _is_banned(link: _Link) -> bool:
    return link.banned_until > trio.current_time()


async def _end(lanes: Iterable[OutgoingLane], reset: bool) -> None:
    """End lanes, all at once and within bounded time, whatever is cancelled."""
    with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_TIMEOUT):
        async with trio.open_nursery() as nursery:
            for lane in lanes:
                nursery.start_soon(lane.reset if reset else lane.close)
