"""Whole federations over real libp2p on the loopback interface, in one process."""

from collections.abc import Sequence

import numpy as np
import pytest
import trio

from p2pfl.core.errors import P2pflError
from p2pfl.core.ids import PeerId
from p2pfl.core.machine import Vector
from p2pfl.core.trace import Event, PeerFinished, Refused, RoundEnded
from p2pfl.gossip.mixing import metropolis_hastings
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.gossip.topology import overlay_of
from p2pfl.node.driver import Driver, Hooks
from p2pfl.node.launcher import free_ports
from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport
from tests.memory import run_trio
from tests.node.test_driver import AddOne, nowhere
from tests.pump import charter_for, identities

pytestmark = pytest.mark.slow


class Loopback:
    """Drivers with real transports, each on a port of its own."""

    def __init__(self, n: int, size: int, **terms: object) -> None:
        self.charter = charter_for(n, size, start=20.0, **terms)  # type: ignore[arg-type]
        self.roster = self.charter.roster()
        self.addresses = {
            peer: (f"/ip4/127.0.0.1/tcp/{port}",) for peer, port in zip(self.roster, free_ports(n), strict=True)
        }
        self.events: dict[PeerId, list[Event]] = {peer: [] for peer in self.roster}
        self.adopted: dict[PeerId, list[Vector]] = {peer: [] for peer in self.roster}
        self.errors: dict[PeerId, P2pflError] = {}
        draw = np.random.default_rng(5)
        self.initial = {peer: draw.standard_normal(size).astype(np.float32) for peer in self.roster}
        self.seeds = {identity.peer_id: identity.seed() for identity in identities(n)}
        self.charters = dict.fromkeys(self.roster, self.charter.hash())
        self.suites = dict.fromkeys(self.roster, "aes")
        self.transports: dict[PeerId, Libp2pTransport] = {}

    async def run_one(self, peer: PeerId) -> None:
        plan = Plan.for_peer(self.charter, peer)
        plan = Plan(**{**plan.__dict__, "charter": self.charters[peer]})
        hooks = Hooks(self.events[peer].append, lambda _, vector, __: self.adopted[peer].append(vector), nowhere)
        channel = ChannelTerms(self.suites[peer], self.charters[peer])
        self.transports[peer] = Libp2pTransport(self.seeds[peer], self.roster, channel)
        addresses: dict[PeerId, Sequence[str]] = {other: self.addresses[other] for other in plan.weights}
        driver = Driver(
            PeerMachine(plan, self.initial[peer]), self.transports[peer], addresses, plan.charter, AddOne(), hooks
        )
        try:
            await driver.run(self.addresses[peer])
        except P2pflError as error:
            self.errors[peer] = error

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for peer in self.roster:
                nursery.start_soon(self.run_one, peer)


def test_the_network_computes_what_the_mixing_matrix_predicts() -> None:
    """Over authenticated, encrypted streams, with vectors of more than one write and more than one record."""
    size, rounds = 200_000, 3
    network = Loopback(5, size, rounds=rounds, topology="exponential", settle_rounds=2, tolerance=1e-30)
    run_trio(network.run)
    assert not network.errors
    matrix = metropolis_hastings(overlay_of(network.charter))
    expected = np.stack([network.initial[peer] for peer in network.roster]).astype(np.float64)
    for round in range(rounds + 2):
        expected = matrix @ (expected + (round < rounds))
        actual = np.stack([network.adopted[peer][round] for peer in network.roster])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    for peer in network.roster:
        assert network.events[peer][-1] == PeerFinished("done", rounds + 2, agreed=False)


def test_small_models_travel_with_two_percent_beside_their_values() -> None:
    """On the demo's network, start-up aside: bytes on the sockets against four for each value, round and link."""
    size, rounds = 4810, 60
    network = Loopback(4, size, rounds=rounds, topology="complete", settle_rounds=0)
    marks: dict[PeerId, int] = {}

    class MarkFirst(list[Event]):
        def __init__(self, peer: PeerId) -> None:
            self.peer = peer

        def append(self, event: Event) -> None:
            if isinstance(event, RoundEnded) and event.round in (0, rounds - 1):
                marks[self.peer] = network.transports[self.peer].bytes_in - marks.get(self.peer, 0)
            super().append(event)

    network.events = {peer: MarkFirst(peer) for peer in network.roster}
    run_trio(network.run)
    assert not network.errors
    values = 4 * size * 3 * (rounds - 1)
    for peer in network.roster:
        # A neighbor's next update may be on its way when a round ends: one round more or less.
        assert marks[peer] / values < 1.02 * (1 + 1 / rounds)


def refuse_each_other(network: Loopback, seconds: float) -> PeerId:
    """Run three peers of which the last is not like the others; they must finish without it."""
    stray = network.roster[2]
    deadlines = network.charter.deadlines.model_copy(update={"start": seconds})
    network.charter = network.charter.model_copy(update={"deadlines": deadlines})
    for peer in network.roster[:2]:
        network.charters[peer] = network.charter.hash()
    run_trio(network.run)
    assert set(network.errors) == {stray}
    for peer in network.roster[:2]:
        records = [event for event in network.events[peer] if isinstance(event, RoundEnded)]
        assert all(record.absent == {"m2": "no link"} for record in records)
    return stray


def refusals(network: Loopback, peer: PeerId) -> str:
    return "\n".join(f"{event.who}: {event.reason}" for event in network.events[peer] if isinstance(event, Refused))


def test_peers_under_different_charters_refuse_each_other_and_say_why() -> None:
    network = Loopback(3, 100, rounds=2, topology="complete")
    network.charters[network.roster[2]] = bytes(32)
    stray = refuse_each_other(network, 3.0)
    ours = network.charter.hash().hex()[:8]
    for peer in network.roster[:2]:
        assert f"is under charter 00000000…, ours is {ours}…" in refusals(network, peer)
        assert f"is under charter {ours}…, ours is 00000000…" in refusals(network, stray)


def test_peers_with_different_suites_refuse_each_other_and_say_which() -> None:
    network = Loopback(3, 100, rounds=2, topology="complete")
    network.suites[network.roster[2]] = "sm4"
    stray = refuse_each_other(network, 3.0)
    said = refusals(network, stray) + "".join(refusals(network, peer) for peer in network.roster[:2])
    assert "/p2pfl/noise-aes/1.0.0" in said
    assert "/p2pfl/noise-sm4/1.0.0" in said


@pytest.mark.parametrize("suite", ["sm4", "gm"])
def test_a_federation_runs_under_every_suite(suite: str) -> None:
    if suite == "gm":
        pytest.importorskip("gmssl_pyx", reason="the extra [gm] is not installed", exc_type=ImportError)
    network = Loopback(3, 5000, rounds=2, topology="complete")
    network.suites = dict.fromkeys(network.roster, suite)
    run_trio(network.run)
    assert not network.errors
    for peer in network.roster:
        finished = network.events[peer][-1]
        assert isinstance(finished, PeerFinished)
        assert finished.agreed
