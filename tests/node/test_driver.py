"""The driver and its links over a transport in memory: everything but the sockets."""

from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest
import trio

from p2pfl.core.errors import P2pflError, RoundFailed, StoreFailed, StreamReset
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Record
from p2pfl.core.machine import Trained, Vector
from p2pfl.core.trace import Event, LinkChanged, PeerFinished, Refused, RoundEnded
from p2pfl.core.wire import SPOKEN, Hello, Versions, encode_header
from p2pfl.gossip.mixing import metropolis_hastings
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.gossip.topology import overlay_of
from p2pfl.node.driver import Driver, Hooks, Refusals
from p2pfl.node.transport import LaneKind
from tests.memory import End, MemoryLane, MemoryNetwork, MemoryTransport, run_trio
from tests.pump import charter_for

SIZE = 300_000
"""Above `THREAD_BYTES`, so that averages run in worker threads, and above one write."""


def nowhere(record: Record) -> None:
    """Keep nothing: what is tested here does not start again."""


class AddOne:
    """Local training that anyone can predict."""

    def train(self, round: Round, vector: Vector, seconds: float, mixed: bool) -> tuple[Trained, Sequence[Event]]:
        return Trained(round, vector + np.float32(1), 0.25), ()


class Running:
    """A federation of drivers in one trio loop."""

    def __init__(self, n: int = 4, size: int = SIZE, **terms: object) -> None:
        self.charter = charter_for(n, size, start=1.0, **terms)  # type: ignore[arg-type]
        self.network = MemoryNetwork()
        self.events: dict[PeerId, list[Event]] = {peer: [] for peer in self.charter.roster()}
        self.adopted: dict[PeerId, list[Vector]] = {peer: [] for peer in self.charter.roster()}
        self.errors: dict[PeerId, P2pflError] = {}
        draw = np.random.default_rng(3)
        self.initial = {peer: draw.standard_normal(size).astype(np.float32) for peer in self.charter.roster()}
        self.drivers = {peer: self.driver(peer, AddOne()) for peer in self.charter.roster()}

    def driver(self, peer: PeerId, worker: object, charter: bytes | None = None, versions: Versions = SPOKEN) -> Driver:
        plan = Plan.for_peer(self.charter, peer)
        hooks = Hooks(self.events[peer].append, lambda _, vector, __: self.adopted[peer].append(vector), nowhere)
        return Driver(
            PeerMachine(plan, self.initial[peer]),
            MemoryTransport(self.network, peer),
            dict.fromkeys(plan.weights, ("memory",)),
            charter or self.charter.hash(),
            worker,  # type: ignore[arg-type]
            hooks,
            versions=versions,
        )

    async def run_one(self, peer: PeerId) -> None:
        try:
            await self.drivers[peer].run(["memory"])
        except P2pflError as error:
            self.errors[peer] = error

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for peer in self.drivers:
                nursery.start_soon(self.run_one, peer)

    def rounds(self, peer: PeerId) -> list[RoundEnded]:
        return [event for event in self.events[peer] if isinstance(event, RoundEnded)]


def test_drivers_compute_what_the_mixing_matrix_predicts() -> None:
    running = Running(rounds=3, topology="exponential", settle_rounds=2, tolerance=1e-30)
    run_trio(running.run)
    assert not running.errors
    roster = running.charter.roster()
    matrix = metropolis_hastings(overlay_of(running.charter))
    expected = np.stack([running.initial[peer] for peer in roster]).astype(np.float64)
    for round in range(5):
        expected = matrix @ (expected + (round < 3))
        np.testing.assert_allclose(np.stack([running.adopted[peer][round] for peer in roster]), expected, atol=1e-5)
    assert all(running.events[peer][-1] == PeerFinished("done", 5, agreed=False) for peer in roster)


class AddOneAnd(AddOne):
    """Training that calls back into the network loop in one round."""

    def __init__(self, round: int, then: Callable[[], Awaitable[None]]) -> None:
        self.round, self.then = round, then

    def train(self, round: Round, vector: Vector, seconds: float, mixed: bool) -> tuple[Trained, Sequence[Event]]:
        if round == self.round:
            trio.from_thread.run(self.then)
        return super().train(round, vector, seconds, mixed)


def test_a_cut_link_comes_back_and_the_rounds_go_on() -> None:
    running = Running(n=3, size=8, rounds=40, topology="complete")
    left, right, _ = running.charter.roster()

    def changes() -> list[bool]:
        seen = running.events[left]
        return [event.up for event in seen if isinstance(event, LinkChanged) and event.neighbor == "m1"]

    async def cut() -> None:
        await running.network.cut(left, right)
        while changes() != [True, False, True]:
            await trio.lowlevel.checkpoint()

    running.drivers[left] = running.driver(left, AddOneAnd(5, cut))
    run_trio(running.run)
    assert not running.errors
    training = [record for record in running.rounds(left) if not record.settling]
    assert len(training) == 40
    assert training[-1].absent == {}, "the link carries updates again"


def test_a_peer_under_another_charter_is_refused_and_the_rest_go_on() -> None:
    running = Running(n=3, size=8, rounds=3, topology="complete")
    stray = running.charter.roster()[2]
    plan = Plan.for_peer(running.charter, stray)
    other = Plan(**{**plan.__dict__, "charter": bytes(32)})
    running.drivers[stray] = Driver(
        PeerMachine(other, running.initial[stray]),
        MemoryTransport(running.network, stray),
        dict.fromkeys(plan.weights, ("memory",)),
        bytes(32),
        AddOne(),
        Hooks(running.events[stray].append, lambda *_: None, nowhere),
    )
    run_trio(running.run)
    assert set(running.errors) == {stray}
    assert isinstance(running.errors[stray], RoundFailed)
    for peer in running.charter.roster()[:2]:
        refused = [event for event in running.events[peer] if isinstance(event, Refused)]
        assert refused[0].who == "m2"
        assert refused[0].reason.startswith("sent a message under charter 000000000000, ours is ")
        assert all(record.absent == {"m2": "no link"} for record in running.rounds(peer))


@pytest.mark.parametrize(
    ("kind", "rest", "reason"),
    [
        (LaneKind.CONTROL, b"\xff\xff", "a header of 65535 bytes; at most 40960 are allowed"),
        (LaneKind.CONTROL, b"\x00\x00", "a frame without a header"),
        (LaneKind.CONTROL, b"\x00\x03abc", "a header that is not msgpack"),
        (LaneKind.BULK, b"\x00\x01\xc0", "a header that is not a list of fields"),
    ],
)
def test_a_neighbor_that_sends_garbage_is_dropped_and_the_rest_go_on(kind: LaneKind, rest: bytes, reason: str) -> None:
    running = Running(n=3, size=8, rounds=3, topology="complete")
    vandal = running.charter.roster()[2]
    del running.drivers[vandal]

    async def vandalise() -> None:
        transport = MemoryTransport(running.network, vandal)
        async with transport.run(["memory"], lambda kind, lane: trio.sleep_forever(), lambda who, why: None):
            victim = running.charter.roster()[0]
            while victim not in running.network.peers:
                await trio.lowlevel.checkpoint()
            await transport.connect(victim, ["memory"], 1)  # type: ignore[arg-type]
            control = await transport.open(victim, LaneKind.CONTROL)
            await control.write(encode_header(Hello(running.charter.hash(), Round(0))))
            lane = control if kind is LaneKind.CONTROL else await transport.open(victim, kind)
            await lane.write(rest)
            await trio.sleep_forever()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vandalise)
            await running.run()
            nursery.cancel_scope.cancel()

    run_trio(main)
    assert not running.errors
    refused = [event for event in running.events[running.charter.roster()[0]] if isinstance(event, Refused)]
    assert refused == [Refused(vandal, reason)]


def test_training_that_fails_ends_the_run_with_its_reason() -> None:
    class Diverging:
        def train(self, round: Round, vector: Vector, seconds: float, mixed: bool) -> tuple[Trained, Sequence[Event]]:
            raise RoundFailed("training diverged in round 0: the loss is nan")

    running = Running(n=2, size=8, rounds=3)
    unlucky, other = running.charter.roster()
    running.drivers[unlucky] = running.driver(unlucky, Diverging())
    run_trio(running.run)
    assert str(running.errors[unlucky]) == "training diverged in round 0: the loss is nan"
    assert other not in running.errors
    finished = running.events[unlucky][-1]
    assert isinstance(finished, PeerFinished)
    assert (finished.outcome, finished.reason) == ("failed", "training diverged in round 0: the loss is nan")


def test_a_trace_that_cannot_be_written_ends_the_run_with_its_reason() -> None:
    running = Running(n=3, size=8, rounds=30, topology="complete")
    unlucky = running.charter.roster()[0]

    class FullDisk(list[Event]):
        def append(self, event: Event) -> None:
            if isinstance(event, RoundEnded) and event.round == 3:
                raise StoreFailed("trace.jsonl: cannot be written: no space left")
            super().append(event)

    running.events[unlucky] = FullDisk()
    running.drivers[unlucky] = running.driver(unlucky, AddOne())
    run_trio(running.run)
    assert set(running.errors) == {unlucky}
    assert str(running.errors[unlucky]) == "trace.jsonl: cannot be written: no space left"
    for peer in running.charter.roster()[1:]:
        assert len([record for record in running.rounds(peer) if not record.settling]) == 30


class StalledLane(End):
    """A lane whose reader has stopped: writes wait until the lane is reset, and fail then."""

    def __init__(self, lane: MemoryLane, peer: PeerId) -> None:
        super().__init__(lane, peer)
        self.lane = lane

    async def write(self, data: object) -> None:
        while not self.lane.broken:
            await self.lane.changed.wait()
        raise StreamReset("the lane is broken")


def test_a_neighbor_that_stops_reading_is_given_up_and_the_peer_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both writers to it are stuck when the link is taken down: one is cancelled, the other may fail as well."""
    running = Running(n=3, size=8, rounds=40, topology="complete")
    left, stalled, _ = running.charter.roster()

    async def stall() -> None:
        for lane in running.network.lanes[frozenset((left, stalled))]:
            monkeypatch.setattr(lane, "write", StalledLane(lane, stalled).write)
        await trio.lowlevel.checkpoint()
        await running.network.cut(left, stalled)

    running.drivers[left] = running.driver(left, AddOneAnd(5, stall))
    run_trio(running.run)
    assert not running.errors
    assert all(isinstance(running.events[peer][-1], PeerFinished) for peer in running.charter.roster())


def test_a_stopped_peer_leaves_at_a_rounds_end() -> None:
    running = Running(n=3, size=8, rounds=10_000, topology="complete")

    async def stop() -> None:
        for driver in running.drivers.values():
            driver.stop()

    first = running.charter.roster()[0]
    running.drivers[first] = running.driver(first, AddOneAnd(3, stop))
    run_trio(running.run)
    assert not running.errors
    for peer in running.charter.roster():
        finished = running.events[peer][-1]
        assert isinstance(finished, PeerFinished)
        assert finished.outcome == "stopped"


def test_strangers_cannot_fill_the_trace() -> None:
    refusals = Refusals()
    assert refusals.is_news("a", "garbage", 0.0)
    assert not refusals.is_news("a", "garbage", 59.0)
    assert refusals.is_news("a", "another reason", 59.0)
    assert refusals.is_news("a", "garbage", 60.0)
    told = sum(refusals.is_news(str(i), "garbage", 61.0) for i in range(10_000))
    assert told == Refusals.MOST - 2
    assert refusals.is_news("a", "garbage", 200.0)
