"""The simulated network itself: what it does to machines, by small machines made for that."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from p2pfl.core.errors import BadSignature, Malformed, RoundFailed
from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.ledger import Checkpoint, Uploading, Voted
from p2pfl.core.machine import (
    AcceptBulk,
    Adopt,
    BulkOffered,
    BulkReceived,
    Compute,
    Computed,
    Disconnect,
    DropLink,
    Effect,
    Finish,
    Input,
    LinkDown,
    LinkUp,
    Persist,
    Persisted,
    Received,
    RefuseBulk,
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
from p2pfl.core.statements import Statement, Vote, encode_body
from p2pfl.core.wire import Chunk, Hello, Part, Ping, Told, Update
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.node import links
from p2pfl.simulation import hosts, simnet
from p2pfl.simulation.faults import (
    ClockSkew,
    Crash,
    Cut,
    Delay,
    Duplicate,
    FailWork,
    Fault,
    Freeze,
    Lie,
    Loss,
    Partition,
    Reorder,
    Schedule,
    Slow,
    Stop,
)
from p2pfl.simulation.invariants import (
    AveragesComputed,
    Bounds,
    Check,
    InvariantViolated,
    OffersAnswered,
    SpentOnce,
    weighted_average,
)
from p2pfl.simulation.simnet import Conditions, Disk, Network, PeerSpec, SimulatedKeyring
from p2pfl.simulation.soak import Case, standard_network
from tests.pump import charter_for

CHARTER = bytes(32)
END = 100.0
ONE = np.ones(2, np.float32)
Answer = Callable[["Script", Input, Seconds], list[Effect]]


class Script:
    """A machine that notes its inputs, answers as it is told, and finishes after `END` seconds."""

    def __init__(self, answer: Answer, disk: Disk) -> None:
        self.answer, self.disk = answer, disk
        self.inputs: list[tuple[Seconds, Input]] = []

    def handle(self, input: Input, now: Seconds) -> list[Effect]:
        self.inputs.append((now, input))
        if isinstance(input, TimerFired) and input.key == "end":
            return [Finish()]
        effects = self.answer(self, input, now)
        if isinstance(input, BulkOffered) and not effects:
            effects = [AcceptBulk()]
        return [SetTimer("end", Seconds(now + END)), *effects] if isinstance(input, Started) else effects

    def kinds(self, *kinds: type) -> list[Input]:
        return [input for _, input in self.inputs if isinstance(input, kinds)]


def quiet(script: Script, input: Input, now: Seconds) -> list[Effect]:
    return []


def train(peer: PeerId, round: Round, vector: Vector, seconds: float, mixed: bool) -> tuple[Vector, float, int]:
    return vector + np.float32(1), 0.5, int(min(10, max(1, seconds)))


def network(
    answers: Sequence[Answer],
    faults: Sequence[Fault] = (),
    checks: Sequence[Check] = (),
    seed: int = 1,
    **settings: object,
) -> Network:
    """Return a network of scripts, each linked with all others; peer i is `pi`, named `mi`."""
    peers = [PeerId(f"p{place}") for place in range(len(answers))]
    specs = [
        PeerSpec(
            peer,
            f"m{place}",
            lambda disk, answer=answers[place]: Script(answer, disk),
            train,
            tuple(other for other in peers if other != peer),
            step_seconds=1.0,
        )
        for place, peer in enumerate(peers)
    ]
    return Network(specs, Schedule(tuple(faults)), seed, charter=CHARTER, checks=checks, **settings)  # type: ignore[arg-type]


def script(network: Network, place: int) -> Script:
    machine = network.peers[place].machine
    assert isinstance(machine, Script)
    return machine


def pinging(every: float, numbers: bool = True) -> Answer:
    """Send numbered Pings to p0, from the beginning to the end."""

    def answer(script: Script, input: Input, now: Seconds) -> list[Effect]:
        if isinstance(input, Started | TimerFired):
            count = len(script.kinds(TimerFired))
            again = SetTimer("ping", Seconds(now + every))
            return [again, Send(PeerId("p0"), Ping(CHARTER, Round(count)))]
        return []

    return answer


def heard(network: Network, place: int = 0) -> list[int]:
    return [
        input.message.round
        for input in script(network, place).kinds(Received)
        if isinstance(input, Received) and isinstance(input.message, Ping)
    ]


def bulk(*rounds: int) -> Answer:
    """Send vectors to p0 as soon as there is a link."""

    def answer(script: Script, input: Input, now: Seconds) -> list[Effect]:
        if not isinstance(input, LinkUp):
            return []
        return [SendBulk((input.peer,), Update(CHARTER, Round(r), 8, 0.0, True), ONE * np.float32(r)) for r in rounds]

    return answer


def vectors(network: Network) -> list[float]:
    return [
        float(np.frombuffer(input.payload, np.float32)[0])
        for input in script(network, 0).kinds(BulkReceived)
        if isinstance(input, BulkReceived)
    ]


# Links


def test_a_link_comes_up_with_a_hello_first_and_falls_when_a_peer_finishes() -> None:
    def leave(script: Script, input: Input, now: Seconds) -> list[Effect]:
        return [SetTimer("end", Seconds(now + 5))] if isinstance(input, LinkUp) else []

    net = network([quiet, leave])
    net.run(200)
    events = [
        input
        for _, input in script(net, 0).inputs
        if isinstance(input, LinkUp | LinkDown) or (isinstance(input, Received) and isinstance(input.message, Hello))
    ]
    assert [type(event).__name__ for event in events] == ["Received", "LinkUp", "LinkDown"]


def test_messages_arrive_in_order_and_payloads_as_private_copies() -> None:
    net = network([quiet, lambda *a: [*pinging(0.01)(*a), *bulk(1, 2, 3)(*a)]], strict=True)
    net.run(200)
    got = heard(net)
    assert got == sorted(got)
    assert len(got) > 9000
    assert vectors(net) == [1, 2, 3]
    received = script(net, 0).kinds(BulkReceived)[0]
    assert isinstance(received, BulkReceived)
    assert isinstance(received.payload, bytearray)


def test_a_refused_payload_does_not_come_and_a_full_queue_drops_its_oldest() -> None:
    def refuse(script: Script, input: Input, now: Seconds) -> list[Effect]:
        first = isinstance(input, BulkOffered) and input.message.round == 1
        return [RefuseBulk("no")] if first else []

    net = network([refuse, bulk(1, 2)])
    net.run(200)
    assert vectors(net) == [2]
    net = network([quiet, bulk(*range(10))])
    net.run(200)
    # The first is on its way when the others are queued; of those the last four stay.
    assert vectors(net) == [0, 6, 7, 8, 9]


def test_bandwidth_takes_its_time() -> None:
    slow = Conditions(bandwidth=1.0)
    net = network([quiet, bulk(1, 2)], conditions=slow)
    net.run(200)
    times = [at for at, input in script(net, 0).inputs if isinstance(input, BulkReceived)]
    assert times[1] - times[0] == pytest.approx(8, abs=0.5)


def test_a_banned_peer_is_gone_for_a_minute_and_a_dropped_link_comes_back_at_once() -> None:
    for effect, low, high in (
        (Disconnect(PeerId("p1"), Malformed("nonsense", PeerId("p1"))), 60, 70),
        (DropLink(PeerId("p1"), "silent"), 0, 1),
    ):

        def act(script: Script, input: Input, now: Seconds, effect: Effect = effect) -> list[Effect]:
            return [effect] if isinstance(input, LinkUp) and len(script.kinds(LinkUp)) == 1 else []

        net = network([act, quiet])
        net.run(200)
        ups = [at for at, input in script(net, 0).inputs if isinstance(input, LinkUp)]
        downs = [at for at, input in script(net, 0).inputs if isinstance(input, LinkDown)]
        assert len(ups) == 2
        assert len(downs) >= 1
        assert low <= ups[1] - ups[0] <= high
        assert script(net, 1).kinds(LinkDown)


# Faults


def test_loss_loses_and_only_while_it_lasts() -> None:
    net = network([quiet, pinging(0.1)], [Loss(10.0, 30.0, 0.5)])
    net.run(200)
    lost = set(range(1, 990)) - set(heard(net))
    assert 60 < len([number for number in lost if 50 < number < 320]) < 140
    assert len(lost) - len([number for number in lost if 50 < number < 320]) < 10


@pytest.mark.parametrize(
    ("fault", "breaks"),
    [
        (Cut(10.0, 40.0, 1, 0, one_way=True), False),
        (Cut(10.0, 40.0, 1, 0, one_way=False), True),
        (Partition(10.0, 40.0, ((1,),), silent=True), False),
        (Partition(10.0, 40.0, ((1,),), silent=False), True),
    ],
)
def test_what_is_cut_off_hears_nothing_until_it_heals(fault: Fault, breaks: bool) -> None:
    net = network([quiet, pinging(0.1)], [fault])
    net.run(200)
    gap = set(heard(net))
    assert not gap & set(range(110, 380))
    assert gap & set(range(800, 900))
    assert len(script(net, 0).kinds(LinkUp)) == 1 + breaks


def test_one_way_means_one_way() -> None:
    def echo(script: Script, input: Input, now: Seconds) -> list[Effect]:
        told = isinstance(input, Received) and isinstance(input.message, Ping)
        return [Send(PeerId("p1"), input.message)] if told and isinstance(input, Received) else []

    net = network([echo, pinging(0.1)], [Cut(10.0, 90.0, 0, 1, one_way=True)])
    net.run(200)
    assert set(heard(net)) & set(range(200, 800))
    assert not set(heard(net, 1)) & set(range(200, 800))


def test_delay_duplicates_and_disorder() -> None:
    def arrivals(fault: Fault) -> list[int]:
        net = network([quiet, pinging(0.1)], [fault])
        net.run(200)
        return heard(net)

    plain = arrivals(Delay(0.0, 90.0, 1.0))
    assert plain == sorted(set(plain))
    doubled = arrivals(Duplicate(0.0, 90.0, 0.3))
    assert 200 < len(doubled) - len(set(doubled)) < 350
    shuffled = arrivals(Reorder(0.0, 90.0, 2.0))
    assert shuffled != sorted(shuffled)
    assert len(shuffled) == len(set(shuffled))


def test_a_frozen_peer_gets_everything_when_it_thaws() -> None:
    net = network([pinging(1.0), pinging(1.0)], [Freeze(20.0, 50.0, 0)])
    net.run(200)
    times = [at for at, input in script(net, 0).inputs]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert 28 < max(gaps) < 31
    assert set(range(25, 45)) <= set(heard(net))


def test_a_crash_forgets_all_but_what_the_disk_held() -> None:
    def keep(script: Script, input: Input, now: Seconds) -> list[Effect]:
        if isinstance(input, Started) and script.disk.checkpoint is None:
            return [
                Persist("a", Uploading(Round(0), bytes(32))),
                Persist("b", Checkpoint(Round(1), ONE, None)),
                Persist("c", Voted(Round(1), bytes(32), (0,))),
            ]
        return []

    for keeps in (True, False):
        net = network([quiet, keep], [Crash(20.0, 1, 5.0, keep_disk=keeps)])
        net.run(300)
        disk = net.peers[1].disk
        assert disk is script(net, 1).disk
        assert disk.checkpoint is not None
        # The record of a round before the checkpoint is obsolete; the one after it stays.
        assert disk.records == [Voted(Round(1), bytes(32), (0,))]
        first = script(net, 1).inputs[0]
        assert isinstance(first[1], Started)
        assert bool(script(net, 1).kinds(Persisted)) is not keeps
        assert len(script(net, 0).kinds(LinkDown)) == 1
        assert len(script(net, 0).kinds(LinkUp)) == 2


def test_what_was_being_written_in_a_crash_may_or_may_not_be_there() -> None:
    def write(script: Script, input: Input, now: Seconds) -> list[Effect]:
        if isinstance(input, Started) and not script.disk.records:
            return [Persist(str(number), Uploading(Round(number), bytes(32))) for number in range(20)]
        return []

    counts = set()
    for seed in range(40):
        net = network([quiet, write], [Crash(1.1, 1, None)], seed=seed, conditions=Conditions(fsync=0.05))
        net.run(300)
        records = net.peers[1].disk.records
        assert [record.round for record in records] == list(range(len(records)))
        counts.add(len(records))
    assert len(counts) > 5


def test_a_silent_crash_is_told_to_nobody_until_the_peer_is_back() -> None:
    net = network([quiet, quiet], [Crash(20.0, 1, 30.0, silent=True)])
    net.run(300)
    down = next(at for at, input in script(net, 0).inputs if isinstance(input, LinkDown))
    up = [at for at, input in script(net, 0).inputs if isinstance(input, LinkUp)]
    assert up[1] - up[0] > 25
    assert up[1] == down


def test_a_dead_peer_is_not_waited_for() -> None:
    net = network([quiet, quiet], [Crash(20.0, 1, None)])
    net.run(300)
    assert net.peers[0].finished
    assert net.peers[1].gone


def test_clocks_begin_anywhere_and_drift() -> None:
    def end_times(*faults: Fault) -> tuple[float, float]:
        net = network([quiet, quiet], faults)
        net.run(300)
        return net.now, abs(script(net, 0).inputs[0][0] - script(net, 1).inputs[0][0])

    plain, apart = end_times()
    assert apart > 100
    assert plain == pytest.approx(END, abs=2)
    assert end_times(ClockSkew(0.0, 0, 0.5), ClockSkew(0.0, 1, 0.5))[0] == pytest.approx(2 * END, abs=2)
    assert end_times(ClockSkew(50.0, 0, 1.0, 40.0), ClockSkew(50.0, 1, 1.0, 40.0))[0] == pytest.approx(60, abs=2)


def test_a_machine_s_clock_never_goes_back_and_timers_are_never_early() -> None:
    def timers(script: Script, input: Input, now: Seconds) -> list[Effect]:
        if isinstance(input, TimerFired):
            assert now >= float(input.key)
        due = Seconds(now + 0.1)
        return [SetTimer(repr(float(due)), due)] if isinstance(input, Started | TimerFired) else []

    net = network([timers, timers], [ClockSkew(at, 0, rate) for at, rate in ((10.0, 1.3), (20.0, 0.7), (30.0, 1.01))])
    net.run(300)
    times = [at for at, _ in script(net, 0).inputs]
    assert times == sorted(times)


# Work


def training(script: Script, input: Input, now: Seconds) -> list[Effect]:
    if isinstance(input, Started):
        return [Train(Round(0), ONE, 5.0)]
    return [Adopt(input.round, input.vector)] if isinstance(input, Trained) else []


def test_training_takes_time_keeps_to_its_budget_and_is_slower_on_slow_peers() -> None:
    def took(*faults: Fault) -> tuple[float, int]:
        net = network([training, quiet], faults, conditions=Conditions(start=0.1))
        net.run(300)
        (began, _), *rest = script(net, 0).inputs
        at, trained = next((at, input) for at, input in rest if isinstance(input, Trained))
        assert net.peers[0].adopted[0][1].tolist() == [2.0, 2.0]
        return at - began, trained.steps

    assert took() == (pytest.approx(5.0), 5)
    assert took(Slow(0.0, 90.0, 0, 2.0)) == (pytest.approx(4.0), 2)
    # At least one step is made, however slow the peer is.
    assert took(Slow(0.0, 90.0, 0, 20.0)) == (pytest.approx(20.0), 1)


def test_work_that_fails_and_an_operator_s_stop_reach_the_machine() -> None:
    def answer(script: Script, input: Input, now: Seconds) -> list[Effect]:
        return [Finish(input.error)] if isinstance(input, WorkFailed) else training(script, input, now)

    def stop(script: Script, input: Input, now: Seconds) -> list[Effect]:
        return [Finish()] if isinstance(input, StopRequested) else []

    net = network([answer, stop], [FailWork(0.0, 0), Stop(30.0, 1)])
    net.run(300)
    assert isinstance(net.peers[0].error, RoundFailed)
    assert net.now == pytest.approx(30.0)


def test_computations_take_time_by_their_size() -> None:
    def compute(script: Script, input: Input, now: Seconds) -> list[Effect]:
        return [Compute("sum", lambda: 7, 2_000_000_000)] if isinstance(input, Started) else []

    net = network([compute, quiet])
    net.run(300)
    (began, _), *rest = script(net, 0).inputs
    at, computed = next((at, input) for at, input in rest if isinstance(input, Computed))
    assert (computed.result, at - began) == (7, pytest.approx(2.0))


# Equal seeds


def test_equal_seeds_give_equal_bytes() -> None:
    from p2pfl.simulation.replay import run_mix

    for mix in ("standard", "hostile"):
        first, second, other = run_mix(5, mix)[0], run_mix(5, mix)[0], run_mix(6, mix)[0]
        assert first == second
        assert first != other
        assert len(first) > 1000


@pytest.mark.slow
def test_equal_seeds_give_equal_bytes_in_other_processes() -> None:
    code = (
        "import hashlib; from p2pfl.simulation.replay import run_mix; "
        "print(hashlib.sha256('\\n'.join(run_mix(5, 'hostile')[0]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            timeout=100,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_neighbors_machines_run_here_too() -> None:
    charter = charter_for(6, 33, rounds=4, topology="ring", settle_rounds=3, tolerance=1e-30)
    plans = {peer: Plan.for_peer(charter, peer) for peer in charter.roster()}
    start = np.zeros(33, np.float32)
    specs = [
        PeerSpec(peer, plan.names[peer], lambda _, plan=plan: PeerMachine(plan, start), train, tuple(plan.weights))
        for peer, plan in plans.items()
    ]
    net = Network(specs, seed=3, charter=charter.hash(), checks=[OffersAnswered(), Bounds()], strict=True)
    net.run(100)
    # Everybody adds 1 a round, so averaging changes nothing.
    for peer in net.peers:
        assert [vector[0] for _, vector in peer.adopted[:4]] == [1, 2, 3, 4]
        assert peer.error is None


# What must hold


class Owner:
    """Stands for a peer whose steps are checked."""

    place, name, lying = 1, "m1", False

    def __init__(self) -> None:
        self.timers = self.things = self.queued = 0

    def timer_count(self) -> int:
        return self.timers

    def held(self) -> int:
        return self.things

    def undelivered(self) -> int:
        return self.queued

    def changed_from(self) -> None:
        return None


SESSION, OTHER = bytes(32), bytes([1]) * 32


def chunk(session: bytes = SESSION, part: Part = Part.UPLOAD, number: int = 0, round: int = 0) -> Chunk:
    return Chunk(CHARTER, Round(round), session, part, number, 8)


def vote(survivors: tuple[int, ...], signer: int = 1) -> Effect:
    content = Vote(Round(0), SESSION, survivors)
    return Send(PeerId("p0"), Told(CHARTER, Round(0), Statement(signer, encode_body(content), b"", content)))


def step(check: Check, *effects: Effect, input: Input | None = None, owner: Owner | None = None) -> None:
    from p2pfl.simulation.invariants import Step

    check.step(Step(owner or Owner(), input or Started(), list(effects)))


def upload(session: bytes = SESSION, values: Vector = ONE, **where: int) -> Effect:
    return SendBulk((PeerId("p0"),), chunk(session, **where), values)


def test_an_upload_needs_a_durable_record_and_happens_once() -> None:
    check, owner = SpentOnce(), Owner()
    with pytest.raises(InvariantViolated, match="before its record"):
        step(check, upload())
    check.durable(owner, Uploading(Round(0), SESSION))
    step(check, upload(), upload(number=1))
    step(check, upload())
    with pytest.raises(InvariantViolated, match="two contents"):
        step(check, upload(values=2 * ONE))
    check.durable(owner, Uploading(Round(0), OTHER))
    with pytest.raises(InvariantViolated, match="two sessions"):
        step(check, upload(OTHER))
    check.disk_lost(owner)
    check.durable(owner, Uploading(Round(0), OTHER))
    step(check, upload(OTHER))


def test_a_vote_needs_a_durable_record_and_is_one() -> None:
    check, owner = SpentOnce(), Owner()
    with pytest.raises(InvariantViolated, match="before its record"):
        step(check, vote((0, 1)))
    check = SpentOnce()
    check.durable(owner, Voted(Round(0), SESSION, (0, 1)))
    step(check, vote((0, 1)), vote((0, 2), signer=2))
    with pytest.raises(InvariantViolated, match="two sets"):
        step(check, vote((0, 2)))


def test_an_offer_has_one_answer() -> None:
    check, offer = OffersAnswered(), BulkOffered(PeerId("p0"), chunk())
    step(check, AcceptBulk(), input=offer)
    step(check, Disconnect(PeerId("p0"), Malformed("")), input=offer)
    for effects in ([], [AcceptBulk(), RefuseBulk("")]):
        with pytest.raises(InvariantViolated, match="verdicts"):
            step(check, *effects, input=offer)
    with pytest.raises(InvariantViolated, match="verdicts"):
        step(check, AcceptBulk())


@pytest.mark.parametrize("what", ["timers", "things", "queued"])
def test_memory_is_bounded(what: str) -> None:
    check, owner = Bounds(10, 10, 10), Owner()
    step(check, AcceptBulk(), owner=owner)
    setattr(owner, what, 11)
    with pytest.raises(InvariantViolated):
        for _ in range(10):
            step(check, AcceptBulk(), owner=owner)


def halves(parameters: int, members: int, number: int) -> tuple[int, int]:
    return number * parameters // members, (number + 1) * parameters // members


def test_a_result_is_the_average_of_uploads_and_a_base_is_made_of_results() -> None:
    from p2pfl.core.statements import Roots

    def words(*values: float) -> Vector:
        return np.array(values, np.float32)

    def result(number: int, vector: Vector) -> Effect:
        return SendBulk((PeerId("p0"),), chunk(part=Part.RESULT, number=number), vector)

    def base(vector: Vector, round: int = 1) -> Effect:
        return Persist("", Checkpoint(Round(round), vector, None))

    first, second = Owner(), Owner()
    first.place, second.place = 0, 1
    check = AveragesComputed(words(0, 0), halves)
    roots = Roots(Round(0), SESSION, (bytes(32), bytes(32)))
    step(check, Send(PeerId("p0"), Told(CHARTER, Round(0), Statement(1, b"", b"", roots))))
    for number in (0, 1):
        step(check, upload(values=words(1, 0, 0, 0, 2 + number), number=number), owner=first)
        step(check, upload(values=words(3, 0, 0, 0, 6 + number), number=number), owner=second)
    with pytest.raises(InvariantViolated, match="no uploads give"):
        step(check, result(0, words(4, 0, 0, 0, 5)))  # nobody voted
    step(check, vote((0, 1)))
    assert weighted_average([words(1, 2), words(3, 6)]).tolist() == [4, 5]
    with pytest.raises(InvariantViolated, match="no uploads give"):
        step(check, result(0, words(4, 0, 0, 0, 5.01)))
    step(check, result(0, words(4, 0, 0, 0, 5)))
    step(check, base(words(0, 0)))
    step(check, base(words(5, 0)))  # the other chunk is lost
    with pytest.raises(InvariantViolated, match="nobody computed"):
        step(check, base(words(5, 6)), owner=first)
    step(check, result(1, words(4, 0, 0, 0, 6)))
    step(check, base(words(5, 6)), owner=second)


def test_a_check_that_fails_and_a_machine_that_raises_end_the_run() -> None:
    with pytest.raises(InvariantViolated, match="m1 answers BulkOffered with 2"):
        network(
            [bulk(1), lambda s, i, now: [AcceptBulk(), AcceptBulk()] if isinstance(i, BulkOffered) else []],
            checks=[OffersAnswered()],
        ).run(200)

    def broken(script: Script, input: Input, now: Seconds) -> list[Effect]:
        raise ZeroDivisionError("oh")

    with pytest.raises(InvariantViolated, match="m0 raised at Started: ZeroDivisionError: oh"):
        network([broken, quiet]).run(200)


def test_a_run_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simnet, "MOST_STEPS", 1000)
    with pytest.raises(InvariantViolated, match="m0, m1 have not finished 50 s after"):
        network([quiet, quiet]).run(50)

    def rush(script: Script, input: Input, now: Seconds) -> list[Effect]:
        return [SetTimer("again", now)]

    with pytest.raises(InvariantViolated, match="not finished after"):
        network([rush, quiet]).run(200)


def test_what_does_not_fit_the_wire_is_found() -> None:
    def wrong(script: Script, input: Input, now: Seconds) -> list[Effect]:
        return [Send(input.peer, Ping(b"short", Round(0)))] if isinstance(input, LinkUp) else []

    with pytest.raises(InvariantViolated, match="does not fit the wire"):
        network([wrong, quiet], strict=True).run(200)


# Liars


@pytest.mark.parametrize("how", ["replay", "nan", "poison", "future", "flip", "split", "mute"])
def test_what_a_liar_sends_is_not_what_its_machine_said(how: str) -> None:
    def talk(script: Script, input: Input, now: Seconds) -> list[Effect]:
        return [*pinging(1.0)(script, input, now), *bulk(1)(script, input, now), *training(script, input, now)]

    net = network([quiet, talk], [Lie(0.0, 1, how)])
    net.run(200)
    got, pings = vectors(net), heard(net)
    if how == "nan":
        assert np.isnan(got).all()
    elif how == "flip":
        assert got != [1.0] or script(net, 0).kinds(BulkReceived)
        payload = script(net, 0).kinds(BulkReceived)[0]
        assert isinstance(payload, BulkReceived)
        assert payload.payload != ONE.tobytes()
    elif how == "future":
        assert min(pings) >= 1000
    elif how == "replay":
        assert len(pings) + len(got) > len(set(pings)) + 1
    elif how in ("split", "mute"):
        assert not got
        assert pings
    else:
        assert np.isnan(net.peers[1].adopted[0][1]).all()


def test_a_liar_signs_two_votes() -> None:
    ring = SimulatedKeyring(b"", 1, 3)

    def voting(script: Script, input: Input, now: Seconds) -> list[Effect]:
        if not isinstance(input, LinkUp):
            return []
        content = Vote(Round(0), SESSION, (0, 1, 2))
        body = encode_body(content)
        return [Send(input.peer, Told(CHARTER, Round(0), Statement(1, body, ring.sign(body), content)))]

    net = network([quiet, voting, quiet], [Lie(0.0, 1, "equivocate", (2,))])
    object.__setattr__(net.peers[1].spec, "sign", ring.sign)
    net.run(200)

    def told(place: int) -> Vote:
        messages = [input.message for input in script(net, place).kinds(Received) if isinstance(input, Received)]
        (statement,) = [message.statement for message in messages if isinstance(message, Told)]
        ring.verify(1, statement.body, statement.signature)
        assert isinstance(statement.content, Vote)
        return statement.content

    assert told(0).survivors == (0, 1, 2)
    assert told(2).survivors == (1, 2)


def test_the_simulated_keyring_tells_signers_apart() -> None:
    first, second = (SimulatedKeyring(b"secret", place, 2) for place in (0, 1))
    second.verify(0, b"body", first.sign(b"body"))
    for place, body in ((1, b"body"), (0, b"other"), (2, b"body"), (-1, b"body")):
        with pytest.raises(BadSignature):
            second.verify(place, body, first.sign(b"body"))


def test_the_constants_are_those_of_the_real_links() -> None:
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE", "PENALTY", "GRACE", "MAX_BULK", "FLUSH_TIMEOUT"):
        assert getattr(hosts, name) == getattr(links, name)


def test_the_standard_network_is_the_same_strictly_encoded() -> None:
    for strict in (True, False):
        net = standard_network(Case(1, "none"), strict=strict)
        net.run(400)
        assert {round for peer in net.peers for round, _ in peer.adopted} >= {0, 1, 2}
