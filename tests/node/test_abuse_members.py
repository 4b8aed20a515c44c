"""What a member can do to the others over real sockets: it is bounded, and their rounds go on.

Four honest peers and a hostile one average in one group, in one process and one loop; so the hostile one's own work,
and what it costs all four, slows each of them. A peer on a machine of its own has a quarter of that.
"""

import logging
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2pfl.core.errors import StreamReset, TransportError
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.statements import KINDS, Ready, Statement, decode_statement, encode_body
from p2pfl.core.trace import Event, LinkChanged, Refused, RoundEnded
from p2pfl.core.wire import (
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    Bye,
    Chunk,
    Have,
    Hello,
    Message,
    Part,
    Ping,
    Proof,
    Told,
    Update,
    Want,
    decode_header,
    encode_header,
    payload_length,
)
from p2pfl.crypto.identity import Signer
from p2pfl.crypto.keyring import Keyring
from p2pfl.gossip import group_machine
from p2pfl.gossip.group_machine import RATE as MOST_ANSWERED
from p2pfl.gossip.group_machine import GroupMachine, GroupPlan
from p2pfl.gossip.session import ANSWER_PAUSE
from p2pfl.gossip.statement_store import MOST_SESSIONS
from p2pfl.node import budget
from p2pfl.node.driver import Driver, Hooks
from p2pfl.node.framing import read_message, skip_payload
from p2pfl.node.launcher import free_ports
from p2pfl.node.libp2p import frames, tcp
from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport
from p2pfl.node.libp2p.yamux import YamuxConnection
from p2pfl.node.transport import IncomingLane, LaneKind, OutgoingLane
from tests.node.libp2p.libp2p_tools import network
from tests.node.test_driver import AddOne, nowhere
from tests.pump import charter_for, identities
from tests.trio_tools import trio_test

pytestmark = pytest.mark.slow
logger = logging.getLogger(__name__)

MEMBERS = 5
ROUNDS = 5
"""Rounds of each honest peer that a test sees end while it is under attack."""
SESSION = bytes(32)
MAX_GROWTH = 8 << 20
"""Bytes that Python may allocate in all of this process while rounds go on and a member announces more than it may. A
measurement: 3 MB, of which the muxers' buffers and what the test itself sends are the most."""


class Counting(Keyring):
    """Notes how many signatures are checked."""

    checks = 0

    def verify(self, signer: int, body: bytes, signature: bytes) -> None:
        self.checks += 1
        super().verify(signer, body, signature)


class Hostile:
    """A member's transport, used past any protocol, and what the others say to it."""

    def __init__(self, siege: "Siege", muxer: Any) -> None:
        self.siege = siege
        channel = ChannelTerms("aes", siege.hash)
        self.transport = Libp2pTransport(siege.seeds[siege.hostile], siege.roster, channel, muxer)
        self.signer = Signer(siege.members[siege.hostile])
        self.reads = True
        self.heard: dict[type[Message], int] = {}
        self.statements: list[Statement] = []
        self.signed: dict[Round, list[Told]] = {}

    async def on_lane(self, kind: LaneKind, lane: IncomingLane) -> None:
        if not self.reads:
            await trio.sleep_forever()
        while (message := await read_message(lane)) is not None:
            self.heard[type(message)] = self.heard.get(type(message), 0) + 1
            if isinstance(message, Told):
                self.statements = [*self.statements[-100:], message.statement]
            if payload_length(message):
                await skip_payload(lane, message)

    async def lanes(self, victim: PeerId) -> dict[LaneKind, OutgoingLane]:
        """Open what a link needs, with the first message on it."""
        await self.transport.connect(victim, self.siege.addresses[victim], 10)  # type: ignore[arg-type]
        lanes = {kind: await self.transport.open(victim, kind) for kind in LaneKind}
        await lanes[LaneKind.CONTROL].write(encode_header(Hello(self.siege.hash, Round(0))))
        return lanes

    def connection(self, victim: PeerId) -> YamuxConnection:
        connections = network(self).connections[ID.from_base58(victim)]
        return connections[0].muxed_conn  # type: ignore[no-any-return]

    def told(self, round: Round, session: int) -> Told:
        """Sign that it is ready for a session that nobody knows."""
        keyring = Keyring(self.signer, self.siege.charter)
        body = encode_body(Ready(round, session.to_bytes(32, "big")))
        place = self.siege.roster.index(self.siege.hostile)
        return Told(self.siege.hash, round, decode_statement(place, body, keyring.sign(body)))

    def told_many(self, round: Round) -> list[Told]:
        """Sign 50 of these once a round: making them costs as much as checking them."""
        if round not in self.signed:
            self.signed = {round: [self.told(round, number) for number in range(50)]}
        return self.signed[round]


class Siege:
    """Honest drivers with group machines over real transports, and a hostile member among them."""

    def __init__(self, parameters: int = 1000) -> None:
        made = charter_for(MEMBERS, parameters, topology="groups", rounds=10**6, start=20.0)
        self.charter = made.model_copy(
            update={
                "averaging": made.averaging.model_copy(update={"group_size": MEMBERS, "colluders": 1}),
                "deadlines": made.deadlines.model_copy(update={"round": 0.3}),
            }
        )
        self.hash = self.charter.hash()
        self.roster = self.charter.roster()
        *self.honest, self.hostile = self.roster
        self.members = {identity.peer_id: identity for identity in identities(MEMBERS)}
        self.seeds = {peer: identity.seed() for peer, identity in self.members.items()}
        ports = free_ports(MEMBERS)
        self.addresses = {peer: (f"/ip4/127.0.0.1/tcp/{port}",) for peer, port in zip(self.roster, ports, strict=True)}
        self.events: dict[PeerId, list[Event]] = {peer: [] for peer in self.roster}
        self.drivers: dict[PeerId, Driver] = {}
        self.transports: dict[PeerId, Libp2pTransport] = {}
        self.machines: dict[PeerId, GroupMachine] = {}
        self.keyrings: dict[PeerId, Counting] = {}
        self.changed = trio.Event()

    async def run_one(self, peer: PeerId, transport: Any = None) -> None:
        def emit(event: Event) -> None:
            self.events[peer].append(event)
            self.changed.set()
            self.changed = trio.Event()

        plan = GroupPlan.for_peer(self.charter, peer)
        keyring = self.keyrings[peer] = Counting(Signer(self.members[peer]), self.charter)
        machine = self.machines[peer] = GroupMachine(plan, keyring, np.zeros(plan.parameters, np.float32))
        channel = ChannelTerms("aes", self.hash)
        self.transports[peer] = transport or Libp2pTransport(self.seeds[peer], self.roster, channel)
        others = {other: self.addresses[other] for other in self.roster if other != peer}
        hooks = Hooks(emit, lambda *_: None, nowhere)
        driver = self.drivers[peer] = Driver(machine, self.transports[peer], others, self.hash, AddOne(), hooks)
        await driver.run(self.addresses[peer])

    @asynccontextmanager
    async def run(self, muxer: Any = YamuxConnection, reads: bool = True) -> AsyncIterator[Hostile]:
        """Run the honest peers, until the context ends, with a hostile one that they are linked to."""
        hostile = Hostile(self, muxer)
        hostile.reads = reads
        async with trio.open_nursery() as nursery:
            for peer in self.honest:
                nursery.start_soon(self.run_one, peer)
            listen = self.addresses[self.hostile]
            async with hostile.transport.run(listen, hostile.on_lane, lambda who, why: None):
                yield hostile
                nursery.cancel_scope.cancel()

    # What the honest peers tell

    def rounds(self, peer: PeerId) -> int:
        return sum(isinstance(event, RoundEnded) for event in self.events[peer])

    def link_changes(self, peer: PeerId) -> list[LinkChanged]:
        name = f"m{MEMBERS - 1}"
        return [event for event in self.events[peer] if isinstance(event, LinkChanged) and event.neighbor == name]

    def are_linked(self) -> bool:
        return all(self.link_changes(peer) and self.link_changes(peer)[-1].up for peer in self.honest)

    def losses(self, reason: str) -> list[PeerId]:
        """The honest peers that lost their link to the hostile one for a reason."""
        return [
            peer
            for peer in self.honest
            if any(not change.up and reason in change.reason for change in self.link_changes(peer))
        ]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()

    async def pass_rounds(self, count: int = ROUNDS) -> float:
        """Wait until each honest peer has ended so many rounds more; return the seconds of one."""
        began, least = time.perf_counter(), {peer: self.rounds(peer) + count for peer in self.honest}
        await self.until(lambda: all(self.rounds(peer) >= least[peer] for peer in self.honest))
        return (time.perf_counter() - began) / count

    @property
    def checks(self) -> int:
        return sum(keyring.checks for keyring in self.keyrings.values())


@asynccontextmanager
async def everywhere(siege: Siege, attack: Callable[[PeerId], Awaitable[None]]) -> AsyncIterator[None]:
    """Attack all honest peers while the context lasts."""

    async def attack_one(victim: PeerId) -> None:
        with suppress(TransportError):
            await attack(victim)

    async with trio.open_nursery() as nursery:
        for victim in siege.honest:
            nursery.start_soon(attack_one, victim)
        yield
        nursery.cancel_scope.cancel()


@contextmanager
def traced() -> Any:
    """Yield a function that returns the most bytes allocated so far beyond those at the beginning."""
    tracemalloc.start()
    began = tracemalloc.get_traced_memory()[0]
    try:
        yield lambda: tracemalloc.get_traced_memory()[1] - began
    finally:
        tracemalloc.stop()


def resident() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


# Frames


def chunk(siege: Siege, length: int, part: Part = Part.UPLOAD) -> bytes:
    return encode_header(Chunk(siege.hash, Round(0), SESSION, part, 0, length))


FRAMES: dict[str, tuple[LaneKind, Callable[[Siege], bytes], str]] = {
    "a header over the bound": (LaneKind.CONTROL, lambda _: b"\xff\xff", f"at most {MAX_MESSAGE_BYTES} are allowed"),
    "a header over the bound before a payload": (LaneKind.BULK, lambda _: b"\x7f\xff", "at most 200 are allowed"),
    "a chunk of 64 GiB": (LaneKind.BULK, lambda siege: chunk(siege, MAX_PAYLOAD_BYTES), "no payload has more than"),
    "an average of 8 KB": (LaneKind.BULK, lambda siege: chunk(siege, 8192, Part.AVERAGE), "no payload has more than"),
    "a payload on the wrong lane": (LaneKind.CONTROL, lambda siege: chunk(siege, 2**30), "does not belong there"),
    "another kind's payload": (
        LaneKind.BULK,
        lambda siege: encode_header(Update(siege.hash, Round(0), 2**30, 0.0, False)),
        "a payload that no group sends",
    ),
}


@pytest.mark.parametrize("case", FRAMES)
@trio_test
async def test_what_is_over_its_bound_costs_the_link_and_no_memory(case: str) -> None:
    kind, frame, reason = FRAMES[case]
    siege = Siege()
    async with siege.run() as hostile:
        lanes = {victim: await hostile.lanes(victim) for victim in siege.honest}
        await siege.until(siege.are_linked)
        await siege.pass_rounds(2)
        with traced() as grown:
            for victim in siege.honest:
                with suppress(StreamReset):
                    await lanes[victim][kind].write(frame(siege) + bytes(100_000))
            await siege.until(lambda: siege.losses(reason) == siege.honest)
            await siege.pass_rounds(2)
            assert grown() < MAX_GROWTH
        for victim in siege.honest:
            assert any(isinstance(event, Refused) and reason in event.reason for event in siege.events[victim])


# Streams that drip or stand still


class Dripping:
    """The transport of a member that does everything right, but uploads a byte at each event that anybody tells."""

    def __init__(self, siege: Siege) -> None:
        self.siege = siege
        self.inner = Libp2pTransport(siege.seeds[siege.hostile], siege.roster, ChannelTerms("aes", siege.hash))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def open(self, peer: PeerId, kind: LaneKind) -> Any:
        lane = await self.inner.open(peer, kind)
        return DrippingLane(self.siege, lane) if kind is LaneKind.BULK else lane


class DrippingLane:
    def __init__(self, siege: Siege, lane: OutgoingLane) -> None:
        self.siege, self.lane, self.peer = siege, lane, lane.peer
        self.close, self.reset = lane.close, lane.reset

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        header = 2 + int.from_bytes(data[:2], "big")
        message = decode_header(data[2:header])
        if not isinstance(message, Chunk) or message.part is not Part.UPLOAD:
            await self.lane.write(data)
            return
        await self.lane.write(bytes(data[:header]))
        for byte in bytes(data[header:]):
            await self.siege.changed.wait()
            await self.lane.write(bytes([byte]))


@trio_test
async def test_a_payload_that_drips_is_given_up_and_rounds_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "RECEIVE_SECONDS", 0.5)
    monkeypatch.setattr(group_machine, "LEAST_WAIT", 0.05)
    siege = Siege()
    dripping = Dripping(siege)
    async with trio.open_nursery() as nursery:
        for peer in siege.honest:
            nursery.start_soon(siege.run_one, peer)
        nursery.start_soon(siege.run_one, siege.hostile, dripping)
        await siege.until(lambda: siege.losses("sent the bytes that it announced too slowly") == siege.honest)
        await siege.pass_rounds()
        for peer in siege.honest:
            assert siege.drivers[peer]._links._credit.used <= 2 * 4 * (1000 + 1)
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_header_that_never_ends_holds_up_nobody() -> None:
    siege = Siege()
    async with siege.run() as hostile:
        lanes = {victim: await hostile.lanes(victim) for victim in siege.honest}
        await siege.until(siege.are_linked)

        async def drip(victim: PeerId) -> None:
            for each in lanes[victim].values():
                await each.write(b"\x00\xc8")
            while True:
                await siege.changed.wait()
                for each in lanes[victim].values():
                    await each.write(b"\xc0")

        with traced() as grown:
            async with everywhere(siege, drip):
                await siege.pass_rounds()
            assert grown() < MAX_GROWTH


def narrow(connection: Any, peer: ID) -> YamuxConnection:
    """A muxer that gives as little credit as the specification allows."""
    return YamuxConnection(connection, peer, frames.Limits(window=frames.INITIAL_WINDOW))


@trio_test
async def test_a_member_that_reads_nothing_is_given_up_and_rounds_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SEND_SECONDS", 0.5)
    siege = Siege(parameters=200_000)
    async with siege.run(narrow, reads=False) as hostile:
        for victim in siege.honest:
            await hostile.lanes(victim)
        await siege.until(siege.are_linked)
        await siege.until(lambda: siege.losses("reads nothing") == siege.honest)
        await siege.pass_rounds()


# Lanes, streams and connections


async def hoard(hostile: Hostile, victim: PeerId) -> None:
    """Have 300 streams open at once, as far as the victim lets it, and open another for the oldest."""
    connection = hostile.connection(victim)
    connection._limits = frames.Limits(outgoing=10_000)
    held: list[Any] = []
    while True:
        held.append(await connection.open_stream())
        await trio.lowlevel.checkpoint()
        if len(held) > 300:
            held.pop(0).abort()


async def reopen(hostile: Hostile, victim: PeerId) -> None:
    while True:
        for kind in LaneKind:
            lane = await hostile.transport.open(victim, kind)
            await lane.write(encode_header(Hello(hostile.siege.hash, Round(0))))


async def connect_again(hostile: Hostile, victim: PeerId) -> None:
    address = Multiaddr(hostile.siege.addresses[victim][0])
    while True:
        with suppress(Exception):
            await network(hostile).dial_addr(address, ID.from_base58(victim))


@pytest.mark.parametrize("attack", [hoard, reopen, connect_again])
@trio_test
async def test_streams_lanes_and_connections_of_a_member_are_bounded(
    attack: Callable[[Hostile, PeerId], Awaitable[None]],
) -> None:
    siege = Siege()
    async with siege.run() as hostile:
        for victim in siege.honest:
            await hostile.lanes(victim)
        await siege.until(siege.are_linked)
        quiet = await siege.pass_rounds()
        tasks, memory = trio.lowlevel.current_statistics().tasks_living, resident()
        async with everywhere(siege, lambda victim: attack(hostile, victim)):
            loud = await siege.pass_rounds()
            for victim in siege.honest:
                transport = siege.transports[victim]
                assert len(transport._tcp.of(siege.hostile)) <= tcp.CONNECTIONS_PER_PEER
                for connection in transport._host.get_network().connections.get(ID.from_base58(siege.hostile), []):  # type: ignore[union-attr]
                    theirs = connection.muxed_conn._count(ours=False)
                    assert theirs <= frames.Limits().incoming
            # A stream's handler, and both ends of three connections with six tasks each: a generous sum.
            assert trio.lowlevel.current_statistics().tasks_living - tasks < 4 * (frames.Limits().incoming + 60)
            assert resident() - memory < 32 << 20
        logger.info("a round: %.3f s, %.3f s under attack", quiet, loud)


# Valid but useless


Flood = Callable[[Hostile, PeerId, dict[LaneKind, OutgoingLane]], Awaitable[None]]


def control(make: Callable[[Hostile, PeerId], Sequence[Message]], times: int) -> Flood:
    """Repeat what is drawn up once a round: the attacker's own work must not count for the victims'."""

    async def flood(hostile: Hostile, victim: PeerId, lanes: dict[LaneKind, OutgoingLane]) -> None:
        machine = hostile.siege.machines[victim]
        while True:
            round, data = machine.round, b"".join(map(encode_header, make(hostile, victim))) * times
            while machine.round == round:
                await lanes[LaneKind.CONTROL].write(data)

    return flood


async def refused_payloads(hostile: Hostile, victim: PeerId, lanes: dict[LaneKind, OutgoingLane]) -> None:
    frame = chunk(hostile.siege, 4000) + bytes(4000 + 32)
    while True:
        await lanes[LaneKind.BULK].write(frame * 60)


async def empty_frames(hostile: Hostile, victim: PeerId, lanes: dict[LaneKind, OutgoingLane]) -> None:
    """Frames of the muxer that say nothing: 80,000 in a record."""
    number = lanes[LaneKind.CONTROL]._raw.stream_id  # type: ignore[attr-defined]
    record = frames.encode(frames.WINDOW, 0, number, 0) * 80_000
    while True:
        await hostile.connection(victim).secured_conn.write(record)


def own_statements(hostile: Hostile, victim: PeerId) -> list[Message]:
    return [*hostile.told_many(hostile.siege.machines[victim].round)]


def others_statements(hostile: Hostile, victim: PeerId) -> list[Message]:
    held = [each for each in hostile.statements if each.signer != hostile.siege.roster.index(victim)]
    return [Told(hostile.siege.hash, each.content.round, each) for each in held] or [Ping(hostile.siege.hash, Round(0))]


def requests(hostile: Hostile, victim: PeerId) -> list[Message]:
    siege = hostile.siege
    round = siege.machines[victim].round
    masks = (0,) * len(KINDS)
    return [
        *(Have(siege.hash, Round(max(0, round - back)), 0, SESSION, masks) for back in range(3)),
        *(Want(siege.hash, Round(max(0, round - back)), SESSION, Part.AVERAGE, 0) for back in range(3)),
    ]


def averages(hostile: Hostile, victim: PeerId) -> list[Message]:
    """Ask for every average and result there is: each of these is answered with a payload, if at all."""
    siege, machine = hostile.siege, hostile.siege.machines[victim]
    sessions = [(number, past.id) for number, past in machine._past.items()]
    if machine._session is not None:
        sessions.append((machine.round, machine._session.id))
    wants: list[Message] = [Want(siege.hash, Round(0), SESSION, Part.AVERAGE, 0)]
    for number, session in sessions:
        wants.append(Want(siege.hash, number, session, Part.AVERAGE, 0))
        wants += [Want(siege.hash, number, session, Part.RESULT, part) for part in range(MEMBERS)]
    return wants


def proofs(hostile: Hostile, victim: PeerId) -> list[Message]:
    return [Proof(hostile.siege.hash, Round(0), tuple((hostile.statements * 2)[:100]))]


FLOODS: dict[str, Flood] = {
    "pings": control(lambda at, _: [Ping(at.siege.hash, Round(0))], 1000),
    "pings that claim the last round": control(lambda at, _: [Ping(at.siege.hash, Round(2**48))], 1000),
    "hellos and byes": control(lambda at, _: [Hello(at.siege.hash, Round(0)), Bye(at.siege.hash, Round(2**48))], 500),
    "requests for statements": control(requests, 20),
    "requests for payloads": control(averages, 10),
    "its own statements": control(own_statements, 1),
    "others' statements": control(others_statements, 4),
    "proofs": control(proofs, 5),
    "refused payloads": refused_payloads,
    "empty frames": empty_frames,
}


@pytest.mark.parametrize("name", FLOODS)
@trio_test
async def test_a_flood_of_what_is_valid_and_useless_does_not_stop_the_rounds(name: str) -> None:
    siege = Siege()
    async with siege.run() as hostile:
        lanes = {victim: await hostile.lanes(victim) for victim in siege.honest}
        await siege.until(siege.are_linked)
        await siege.pass_rounds()
        checks = siege.checks
        quiet = await siege.pass_rounds(2 * ROUNDS)
        checks = siege.checks - checks
        memory, hostile.heard = resident(), {}
        before, held = siege.checks, {victim: siege.machines[victim].held for victim in siege.honest}
        began = time.perf_counter()
        async with everywhere(siege, lambda victim: FLOODS[name](hostile, victim, lanes[victim])):
            loud = await siege.pass_rounds(2 * ROUNDS)
            # Before the attack is called off: a write under way ends first, and rounds go on meanwhile.
            seconds = time.perf_counter() - began
            heard = {kind.__name__: count for kind, count in hostile.heard.items()}
            extra, grown = siege.checks - before - checks, resident() - memory
            for victim in siege.honest:
                assert siege.machines[victim].held < held[victim] + 100
        logger.info("%s: a round takes %.3f s, and %.3f s with it: %.1f times", name, quiet, loud, loud / quiet)
        logger.info("in %.1f s %d checks more, %d MB, answers: %s", seconds, extra, grown >> 20, heard)
        # A statement is checked where there is a place for it; a round more or less may have begun.
        assert extra < len(siege.honest) * (2 * ROUNDS + 2) * MOST_SESSIONS + checks
        answers = len(siege.honest) * seconds * (MOST_ANSWERED + 30 / ANSWER_PAUSE)
        assert sum(heard.values()) < len(siege.honest) * 60 * (ROUNDS + 1) + answers
        # The muxer's windows are full where its reader rests.
        assert grown < MEMBERS * frames.Limits().window
