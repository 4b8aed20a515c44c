"""A peer that nobody can dial, reached over a relay, on real loopback sockets."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p.peer.id import ID

from p2pfl.core.errors import Unreachable
from p2pfl.core.ids import PeerId
from p2pfl.core.trace import PeerFinished, RoundEnded
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.node.driver import Driver, Hooks
from p2pfl.node.libp2p import relay as relay_module
from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport
from p2pfl.node.libp2p.relay import Circuit, circuit_of
from tests.memory import run_trio
from tests.node.libp2p.libp2p_tools import Node, dead_address, receive
from tests.node.test_driver import AddOne, nowhere
from tests.node.test_loopback import Loopback
from tests.trio_tools import trio_test

pytestmark = pytest.mark.slow

CHANNEL = ChannelTerms("aes", bytes(32))


def through(relay: Node, hidden: Node) -> str:
    return f"{relay.addresses[0]}/p2p/{relay.identity}/p2p-circuit/p2p/{hidden.identity}"


async def reserved(relay: Node, hidden: Node) -> None:
    """Wait until the relay leads to the hidden one."""
    while hidden.identity not in relay.transport._relay._reserved:  # type: ignore[union-attr]
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def three(offers: bool = True) -> AsyncIterator[tuple[Node, Node, Node]]:
    """One that listens nowhere, a relay, and one that looks for the first."""
    roster: set[str] = set()
    hidden, relay, seeker = (
        Node(Libp2pTransport(bytes([i + 1]) * 32, roster, CHANNEL, relay=offers and i == 1))  # type: ignore[arg-type]
        for i in range(3)
    )
    roster |= {hidden.identity, relay.identity, seeker.identity}
    async with hidden.run(listen=()), relay.run(), seeker.run(), trio.open_nursery() as nursery:
        nursery.start_soon(hidden.transport.keep_reachable, [through(relay, hidden)])
        yield hidden, relay, seeker
        nursery.cancel_scope.cancel()


def test_addresses_over_a_relay_are_told_from_others() -> None:
    direct = "/ip4/192.0.2.1/tcp/4001"
    assert circuit_of(f"{direct}/p2p/12D3/p2p-circuit/p2p/12D4") == Circuit("12D3", direct)  # type: ignore[arg-type]
    assert circuit_of(f"{direct}/p2p/12D3/p2p-circuit") == Circuit("12D3", direct)  # type: ignore[arg-type]
    assert circuit_of(direct) is None
    assert circuit_of(f"{direct}/p2p/12D3") is None
    assert circuit_of("/p2p-circuit/p2p/12D3") is None


@trio_test
async def test_a_peer_behind_a_relay_is_reached_and_the_channel_runs_end_to_end() -> None:
    data = bytes(range(256)) * 12_000
    async with three() as (hidden, relay, seeker):
        await reserved(relay, hidden)
        with pytest.raises(Unreachable):
            await seeker.transport.connect(hidden.identity, [dead_address()], 5)
        await seeker.transport.connect(hidden.identity, [dead_address(), through(relay, hidden)], 10)
        for left, right in ((seeker, hidden), (hidden, seeker)):
            assert left.transport.is_connected(right.identity)
            outgoing, incoming = await left.lane_to(right)
            assert (outgoing.peer, incoming.peer) == (right.identity, left.identity)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outgoing.write, data)
                assert await receive(incoming, len(data)) == data
        await seeker.transport.disconnect(hidden.identity)
        assert not seeker.transport.is_connected(hidden.identity)


@trio_test
async def test_the_relay_sees_ciphertext(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = bytearray()
    copy = relay_module._copy

    class Tapped:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        async def read(self, n: int) -> bytes:
            data = await self.stream.read(n)
            passed.extend(data)
            return bytes(data)

    monkeypatch.setattr(relay_module, "_copy", lambda source, sink: copy(Tapped(source), sink))  # type: ignore[arg-type]
    marker = b"a model's value " * 4000
    async with three() as (hidden, relay, seeker):
        await reserved(relay, hidden)
        await seeker.transport.connect(hidden.identity, [through(relay, hidden)], 10)
        outgoing, incoming = await seeker.lane_to(hidden)
        await outgoing.write(marker)
        assert await receive(incoming, len(marker)) == marker
    assert len(passed) > len(marker), "it did pass through the relay"
    assert b"a model's value" not in passed


@trio_test
async def test_without_a_reservation_or_a_relay_there_is_no_way() -> None:
    async with three() as (hidden, relay, seeker):
        await reserved(relay, hidden)
        await hidden.connect(seeker)
        await seeker.transport.disconnect(hidden.identity)
        with pytest.raises(Unreachable, match="status 204"):
            # The seeker itself asked for no reservation, so nobody is led to it.
            await hidden.transport.connect(seeker.identity, [through(relay, seeker)], 5)
    async with three(offers=False) as (hidden, relay, seeker):
        with pytest.raises(Unreachable, match=r"protocol|negotiat|support"):
            await seeker.transport.connect(hidden.identity, [through(relay, hidden)], 5)


@trio_test
async def test_nobody_is_led_to_a_peer_by_one_that_it_did_not_ask() -> None:
    async with three() as (hidden, relay, seeker):
        await reserved(relay, hidden)
        relay.transport._relay._reserved[seeker.identity] = float("inf")  # type: ignore[union-attr]
        await seeker.connect(relay)
        with pytest.raises(Unreachable, match="status 203"):
            await hidden.transport.connect(seeker.identity, [through(relay, seeker)], 5)
        assert not seeker.transport.is_connected(hidden.identity)


@trio_test
async def test_circuits_to_one_peer_are_bounded_and_one_that_ends_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay_module, "MOST_CIRCUITS_TO_ONE", 1)
    async with three() as (hidden, relay, seeker):
        await reserved(relay, hidden)
        circuits = relay.transport._relay._circuits  # type: ignore[union-attr]
        for _ in range(3):
            await seeker.transport.connect(hidden.identity, [through(relay, hidden)], 10)
            assert circuits.total() == 1
            with pytest.raises(Unreachable, match="201"):
                await relay_module.dial_through(seeker.transport._running(), relay.identity, hidden.identity)
            await seeker.transport.disconnect(hidden.identity)
            while circuits.total():
                await trio.lowlevel.checkpoint()


@trio_test
async def test_a_relay_that_starts_again_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pfl.node.libp2p.host.RENEW_EVERY", 0.2)
    async with three() as (hidden, relay, seeker):
        await reserved(relay, hidden)
        relay.transport._relay._reserved.clear()  # type: ignore[union-attr]
        await relay.transport.disconnect(hidden.identity)
        await reserved(relay, hidden)
        await seeker.transport.connect(hidden.identity, [through(relay, hidden)], 10)


@pytest.mark.parametrize("junk", [b"", b"\x00", b"\x05junk!", b"\xff" * 20, b"\x02\x08\x07"], ids=repr)
@trio_test
async def test_junk_costs_its_sender_the_stream(junk: bytes) -> None:
    async with three() as (hidden, relay, seeker):
        await reserved(relay, hidden)
        await seeker.connect(relay)
        stream = await seeker.transport._running().new_stream(ID.from_base58(relay.identity), [relay_module.HOP])
        await stream.write(junk or b"\x01\x00")
        await stream.close()
        with contextlib.suppress(Exception):  # an answer, an end or a reset
            while await stream.read(100):
                pass
        await seeker.transport.connect(hidden.identity, [through(relay, hidden)], 10)


class TwoHidden(Loopback):
    """A federation of three of which two listen nowhere: they meet over the third."""

    async def run_one(self, peer: PeerId) -> None:
        relay = self.roster[1]
        ways = {
            other: self.addresses[relay] if other == relay else (f"{self.addresses[relay][0]}/p2p/{relay}/p2p-circuit",)
            for other in self.roster
        }
        plan = Plan.for_peer(self.charter, peer)
        hooks = Hooks(self.events[peer].append, lambda _, vector, __: self.adopted[peer].append(vector), nowhere)
        channel = ChannelTerms("aes", self.charter.hash())
        transport = Libp2pTransport(self.seeds[peer], self.roster, channel, relay=peer == relay)
        others: dict[PeerId, Sequence[str]] = {other: ways[other] for other in plan.weights}
        driver = Driver(PeerMachine(plan, self.initial[peer]), transport, others, plan.charter, AddOne(), hooks)
        async with trio.open_nursery() as nursery:
            await driver.run(
                ways[relay] if peer == relay else (),
                lambda _: nursery.start_soon(transport.keep_reachable, () if peer == relay else ways[peer]),
            )
            nursery.cancel_scope.cancel()


def test_rounds_pass_between_peers_that_nobody_can_dial() -> None:
    running = TwoHidden(3, 50_000, rounds=4, topology="complete", tolerance=1e-9)
    run_trio(running.run)
    for peer in running.roster:
        ended = [event for event in running.events[peer] if isinstance(event, RoundEnded)]
        assert len([record for record in ended if not record.settling]) == 4
        assert all(not record.absent for record in ended), "everybody heard everybody, over the relay too"
        finished = running.events[peer][-1]
        assert isinstance(finished, PeerFinished)
        assert finished.agreed
