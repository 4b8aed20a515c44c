"""Links over a network in memory, on a clock that jumps; and one that is killed and started again on loopback."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from p2pfl.core.errors import RemoteError
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.trace import Note
from p2pfl.core.wire import SPOKEN, Hello, Message, Ping, Versions, Whereabouts, encode_header
from p2pfl.gossip.mixing import consensus_distance
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.node import framing
from p2pfl.node.discovery import Directory, sign_whereabouts
from p2pfl.node.driver import Driver, Hooks
from p2pfl.node.launcher import free_ports
from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport
from p2pfl.node.links import LONGEST_PAUSE, PATIENCE, Links
from p2pfl.node.transport import Transport
from tests.memory import MemoryNetwork, MemoryTransport, run_trio
from tests.node.test_driver import AddOne, AddOneAnd, Running, nowhere
from tests.pump import identities

CHARTER = bytes(range(32))
IDENTITIES = identities(4)
PEERS = [identity.peer_id for identity in IDENTITIES]


class Watch:
    """Tells what one peer's links bring, and whether they stand."""

    def __init__(self) -> None:
        self.up: set[PeerId] = set()
        self.heard: list[tuple[PeerId, Message]] = []
        self.faults: list[tuple[PeerId, str]] = []
        self.changed = trio.Event()
        self.links: Links

    def _notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def link_up(self, peer: PeerId) -> None:
        self.up.add(peer)
        self._notify()

    def link_down(self, peer: PeerId, reason: str) -> None:
        self.up.discard(peer)
        self._notify()

    def message(self, peer: PeerId, message: Message) -> None:
        self.heard.append((peer, message))
        self._notify()

    def offer(self, peer: PeerId, message: Message) -> bool:
        return False

    def bulk(self, peer: PeerId, message: Message, payload: bytearray) -> None:
        pass

    def fault(self, peer: PeerId, error: RemoteError) -> None:
        self.faults.append((peer, error.reason))
        self.links.ban(peer, error.reason)
        self._notify()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()


@asynccontextmanager
async def living(
    transport: Transport,
    addresses: dict[PeerId, Sequence[str]],
    sought: Sequence[PeerId] | None = None,
    sign: Callable[[int], Whereabouts] | None = None,
    listen: Sequence[str] = ("memory",),
    versions: Versions = SPOKEN,
) -> AsyncIterator[Watch]:
    """A peer's links at work; leaving it kills the peer."""
    watch = Watch()
    others = {peer: known for peer, known in addresses.items() if peer != transport.identity}
    directory = Directory(transport.identity, CHARTER, others, sign)
    watch.links = Links(
        transport,
        directory,
        lambda: Hello(CHARTER, Round(0), versions),
        watch,
        others.keys() if sought is None else sought,
        versions,
    )
    async with transport.run(listen, watch.links.accept, lambda *_: None), trio.open_nursery() as nursery:
        nursery.start_soon(watch.links.maintain)
        yield watch
        nursery.cancel_scope.cancel()


def on_a_jumping_clock(function: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        with trio.fail_after(100_000):
            await function()

    trio.run(guarded, clock=MockClock(autojump_threshold=0))


AT_HOME: dict[PeerId, Sequence[str]] = dict.fromkeys(PEERS, ("memory",))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["larger-id-restarts", "smaller-id-restarts"])
def test_a_peer_that_starts_again_is_linked_within_seconds_however_long_it_was_away(order: tuple[int, int]) -> None:
    steady, restarted = (PEERS[each] for each in order)
    addresses = {peer: AT_HOME[peer] for peer in PEERS[:2]}

    async def run() -> None:
        network = MemoryNetwork()
        async with living(MemoryTransport(network, steady), addresses) as watch:
            async with living(MemoryTransport(network, restarted), addresses):
                await watch.until(lambda: watch.up == {restarted})
            await watch.until(lambda: not watch.up)
            # By now the other dials every half a minute only.
            await trio.sleep(20 * LONGEST_PAUSE + 0.1)
            async with living(MemoryTransport(network, restarted), addresses) as again:
                began = trio.current_time()
                await watch.until(lambda: watch.up == {restarted})
                await again.until(lambda: again.up == {steady})
                assert trio.current_time() - began < PATIENCE + 1.0

    on_a_jumping_clock(run)


def test_who_is_not_sought_is_linked_while_it_seeks_us() -> None:
    left, right = PEERS[:2]

    async def run() -> None:
        network = MemoryNetwork()
        addresses = {peer: AT_HOME[peer] for peer in (left, right)}
        async with (
            living(MemoryTransport(network, left), addresses, sought=[]) as idle,
            living(MemoryTransport(network, right), addresses, sought=[]) as seeker,
        ):
            await trio.sleep(1000)
            assert not idle.up
            seeker.links.seek(left)
            await seeker.until(lambda: seeker.up == {left})
            await idle.until(lambda: idle.up == {right})
            seeker.links.send(left, Ping(CHARTER, Round(3)))
            await idle.until(lambda: (right, Ping(CHARTER, Round(3))) in idle.heard)
            seeker.links.forsake(left)
            await seeker.until(lambda: not seeker.up)
            await idle.until(lambda: not idle.up)
            await trio.sleep(1000)
            assert not idle.up
            assert not seeker.up
            assert not idle.faults + seeker.faults

    on_a_jumping_clock(run)


def moved_to(place: str, index: int) -> Callable[[int], Whereabouts]:
    return lambda sequence: sign_whereabouts(IDENTITIES[index], CHARTER, sequence, (place,))


@pytest.mark.parametrize("mover", [0, 2], ids=["smallest-id", "largest-id"])
def test_a_member_that_moved_is_found_through_one_that_knows_it(mover: int) -> None:
    """It reaches one member only, and that one tells the third, which dials the new address."""
    moved, knows, seeks = PEERS[mover], *(peer for peer in PEERS[:3] if peer != PEERS[mover])
    addresses = {peer: AT_HOME[peer] for peer in PEERS[:3]}

    async def run() -> None:
        network = MemoryNetwork()
        async with (
            living(MemoryTransport(network, knows), addresses, sought=[seeks]) as knower,
            living(MemoryTransport(network, seeks), addresses, sought=[knows, moved]) as seeker,
        ):
            await seeker.until(lambda: seeker.up == {knows})
            await trio.sleep(1000)
            transport = MemoryTransport(network, moved, at="elsewhere")
            async with living(transport, addresses, sought=[knows], sign=moved_to("elsewhere", mover)):
                began = trio.current_time()
                await seeker.until(lambda: seeker.up == {knows, moved})
                assert trio.current_time() - began < 2 * PATIENCE + 1.0
                await knower.until(lambda: knower.up == {seeks, moved})
            assert not knower.faults + seeker.faults

    on_a_jumping_clock(run)


def test_who_comes_later_is_told_what_was_learned_before() -> None:
    moved, knows, late = PEERS[:3]
    addresses = {peer: AT_HOME[peer] for peer in PEERS[:3]}

    async def run() -> None:
        network = MemoryNetwork()
        transport = MemoryTransport(network, moved, at="elsewhere")
        async with (
            living(MemoryTransport(network, knows), addresses, sought=[]) as knower,
            living(transport, addresses, sought=[knows], sign=moved_to("elsewhere", 0)),
        ):
            await knower.until(lambda: knower.up == {moved})
            async with living(MemoryTransport(network, late), addresses, sought=[knows, moved]) as comer:
                await comer.until(lambda: comer.up == {knows, moved})

    on_a_jumping_clock(run)


def test_a_forged_record_costs_its_sender_its_link_and_leads_nobody_astray() -> None:
    liar, victim, honest = PEERS[:3]
    addresses = {peer: AT_HOME[peer] for peer in PEERS[:3]}
    forged = Whereabouts(CHARTER, Round(0), honest, 2**40, ("elsewhere",), bytes(64))

    async def run() -> None:
        network = MemoryNetwork()
        async with (
            living(MemoryTransport(network, liar), addresses, sought=[victim]) as sender,
            living(MemoryTransport(network, victim), addresses) as watch,
            living(MemoryTransport(network, honest), addresses, sought=[victim]) as other,
        ):
            await watch.until(lambda: watch.up == {liar, honest})
            await sender.until(lambda: sender.up == {victim})
            sender.links.send(victim, forged)
            await watch.until(lambda: bool(watch.faults))
            assert watch.faults == [(liar, "sent an address record that its member did not sign")]
            assert watch.up == {honest}
            assert not [each for _, each in other.heard if isinstance(each, Whereabouts)]

    on_a_jumping_clock(run)


def test_no_machine_sees_an_address_record() -> None:
    moved, other = PEERS[:2]
    addresses = {peer: AT_HOME[peer] for peer in PEERS[:2]}

    async def run() -> None:
        network = MemoryNetwork()
        async with (
            living(MemoryTransport(network, moved), addresses, sign=moved_to("memory", 0)) as mover,
            living(MemoryTransport(network, other), addresses) as watch,
        ):
            await watch.until(lambda: watch.up == {moved})
            await mover.until(lambda: mover.up == {other})
            mover.links.send(other, Ping(CHARTER, Round(1)))
            await watch.until(lambda: (moved, Ping(CHARTER, Round(1))) in watch.heard)
            assert {type(message) for _, message in watch.heard} == {Hello, Ping}

    on_a_jumping_clock(run)


class Ring(Running):
    """Drivers that can reach every member, and seek their neighbors."""

    def driver(self, peer: PeerId, worker: object, charter: bytes | None = None) -> Driver:
        plan = Plan.for_peer(self.charter, peer)
        hooks = Hooks(self.events[peer].append, lambda _, vector, __: self.adopted[peer].append(vector), nowhere)
        others: dict[PeerId, Sequence[str]] = {other: ("memory",) for other in self.charter.roster() if other != peer}
        transport = MemoryTransport(self.network, peer)
        machine = PeerMachine(plan, self.initial[peer])
        return Driver(machine, transport, others, plan.charter, worker, hooks, plan.weights)  # type: ignore[arg-type]


def test_drivers_go_around_dead_neighbors() -> None:
    """A ring of six without two opposite ones: each half finds the other, and all agree."""
    running = Ring(n=6, size=64, topology="ring", rounds=20, silence=0.1)
    roster = running.charter.roster()
    living = [roster[each] for each in (1, 2, 4, 5)]

    def repaired(peer: PeerId) -> bool:
        return any(isinstance(event, Note) and "in place of it" in event.text for event in running.events[peer])

    async def wait() -> None:
        while not all(map(repaired, living)):
            await trio.lowlevel.checkpoint()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            for peer in living:
                nursery.start_soon(running.run_one, peer)

    for peer in (living[0], living[2]):  # one in each half
        running.drivers[peer] = running.driver(peer, AddOneAnd(5, wait))
    run_trio(run)
    assert not running.errors
    final = np.stack([running.adopted[peer][-1] for peer in living])
    assert consensus_distance(final) <= running.charter.averaging.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["larger-id-restarts", "smaller-id-restarts"])
def test_over_real_sockets_too_a_peer_on_the_same_port_is_linked_within_seconds(order: tuple[int, int]) -> None:
    steady, restarted = order
    ports = free_ports(2)
    addresses: dict[PeerId, Sequence[str]] = {
        peer: (f"/ip4/127.0.0.1/tcp/{port}",) for peer, port in zip(PEERS[:2], ports, strict=True)
    }

    def transport(index: int) -> Libp2pTransport:
        return Libp2pTransport(IDENTITIES[index].seed(), PEERS[:2], ChannelTerms("aes", CHARTER))

    async def run() -> None:
        async with living(transport(steady), addresses, listen=addresses[PEERS[steady]]) as watch:
            for _ in range(2):
                began = trio.current_time()
                async with living(transport(restarted), addresses, listen=addresses[PEERS[restarted]]) as again:
                    await watch.until(lambda: watch.up == {PEERS[restarted]})
                    await again.until(lambda: again.up == {PEERS[steady]})
                    assert trio.current_time() - began < PATIENCE + 8.0
                await watch.until(lambda: not watch.up)

    run_trio(run)


def on_loopback() -> tuple[dict[PeerId, Sequence[str]], list[Libp2pTransport]]:
    ports = free_ports(2)
    addresses: dict[PeerId, Sequence[str]] = {
        peer: (f"/ip4/127.0.0.1/tcp/{port}",) for peer, port in zip(PEERS[:2], ports, strict=True)
    }
    return addresses, [
        Libp2pTransport(identity.seed(), PEERS[:2], ChannelTerms("aes", CHARTER)) for identity in IDENTITIES[:2]
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("newer", "older", "common"),
    [(Versions(4, 5), Versions(4, 4), 4), (Versions(4, 5), Versions(3, 5), 5), (SPOKEN, SPOKEN, SPOKEN.highest)],
    ids=str,
)
def test_real_peers_of_two_releases_talk_in_the_highest_version_in_common(
    newer: Versions, older: Versions, common: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses, transports = on_loopback()
    sent: list[int] = []

    def spy(message: Message, version: int = 0) -> bytes:
        if isinstance(message, Ping):
            sent.append(version)
        return encode_header(message, version)

    monkeypatch.setattr(framing, "encode_header", spy)

    async def run() -> None:
        one, two = PEERS[:2]
        async with (
            living(transports[0], addresses, listen=addresses[one], versions=newer) as left,
            living(transports[1], addresses, listen=addresses[two], versions=older) as right,
        ):
            await left.until(lambda: left.up == {two})
            await right.until(lambda: right.up == {one})
            for watch, other in ((left, two), (right, one)):
                watch.links.send(other, Ping(CHARTER, Round(7)))
            for watch, other in ((left, two), (right, one)):
                await watch.until(lambda watch=watch, other=other: (other, Ping(CHARTER, Round(7))) in watch.heard)
            assert (left.faults, right.faults) == ([], [])

    run_trio(run)
    assert sent == [common, common]


@pytest.mark.slow
def test_real_peers_without_a_version_in_common_name_both_in_one_line_at_both_ends() -> None:
    addresses, transports = on_loopback()

    async def run() -> None:
        one, two = PEERS[:2]
        async with (
            living(transports[0], addresses, listen=addresses[one], versions=Versions(5, 6)) as left,
            living(transports[1], addresses, listen=addresses[two], versions=Versions(3, 4)) as right,
        ):
            await left.until(lambda: bool(left.faults))
            await right.until(lambda: bool(right.faults))
            assert left.faults[0] == (two, "speaks wire version 3 to 4, this peer 5 to 6: it needs a newer p2pfl")
            assert right.faults[0] == (
                one,
                "speaks wire version 5 to 6, this peer 3 to 4: this peer needs a newer p2pfl",
            )
            assert not left.up
            assert not right.up

    run_trio(run)


def test_rounds_go_on_while_one_peer_after_the_other_is_upgraded() -> None:
    """One of three speaks a further version already: all rounds are everybody's."""
    running = Running(n=3, size=8, rounds=5, topology="complete")
    upgraded = running.charter.roster()[0]
    further = Versions(SPOKEN.lowest, SPOKEN.highest + 1)
    running.drivers[upgraded] = running.driver(upgraded, AddOne(), versions=further)
    run_trio(running.run)
    assert not running.errors
    for peer in running.charter.roster():
        assert len(running.rounds(peer)) >= 5
        assert all(record.absent == {} for record in running.rounds(peer))
