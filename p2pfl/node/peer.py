"""One running peer: its folder checked, its machine, trainer and transport put together, its model kept at the end."""

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
import trio

from p2pfl.core.charter import Charter
from p2pfl.core.errors import InvalidConfig, StoreFailed
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Checkpoint, Record, Resume, Stepped
from p2pfl.core.machine import Machine, Trained, Vector
from p2pfl.core.privacy import ExampleBudget
from p2pfl.core.trace import Evaluated, Event, Note, PeerFinished, PeerStarted, Refused
from p2pfl.core.wire import SPOKEN, VERSION, Whereabouts
from p2pfl.crypto.identity import Signer
from p2pfl.crypto.keyring import Keyring
from p2pfl.crypto.suite import suite
from p2pfl.gossip.group_machine import GroupMachine, GroupPlan
from p2pfl.gossip.grouping import noise_of, weight_for
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.gossip.secure_sum import MaskTerms
from p2pfl.gossip.star_machine import StarMachine
from p2pfl.learning.chartered import make_trainer
from p2pfl.learning.private_trainer import Privately
from p2pfl.learning.task import make_model, read_data
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import assign, flatten, load_model, notes, save_model
from p2pfl.node.checkpoints import Checkpoints, Mapped
from p2pfl.node.consult import PROTOCOL, RELEASE, Desk, Facts
from p2pfl.node.discovery import sign_whereabouts
from p2pfl.node.driver import Driver, Hooks
from p2pfl.node.federation import (
    FINISHED_FILE,
    HISTORY_FILE,
    MODEL_FILE,
    STATE_FOLDER,
    Federation,
    Home,
    open_federation,
    own_membership,
)
from p2pfl.node.health import Endpoint, listen
from p2pfl.node.lan import meet_on_lan
from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport
from p2pfl.node.logs import log_event, logging_to
from p2pfl.node.memory import keeping_blocks, mapped, return_large_blocks
from p2pfl.node.metrics import Metrics, Sources, pages
from p2pfl.node.status import STATUS_FILE, StatusWriter, bytes_in, free_bytes
from p2pfl.node.store import exclusive, read_text, write_atomic
from p2pfl.node.tracefile import TRACE_FILE, TraceWriter
from p2pfl.node.transport import PeerTransport

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SPENT = (
    "the privacy budget for examples is spent, as rounds that a restart repeated count twice: this member makes no "
    "further steps, and averages what the others learn"
)
RING_BITS = 32
"""Words of masked sums."""


class LocalTraining:
    """The driver's worker: local steps, and before them the common model's evaluation, where its turn has come.

    Args:
        trainer: makes the steps.
        evaluate_every: rounds between evaluations.
        state: the trainer's, after the last steps of the peer's former life.
        pay: writes down what the steps of a round may tell of single examples, before they are made; says whether the
            budget bears them. None where no noise hides examples, and there is no budget.
        threads: of torch, and of the libraries that it calls, which count for each of their callers anew.
    """

    def __init__(
        self,
        trainer: Trainer,
        evaluate_every: int,
        state: bytes | None = None,
        pay: Callable[[Round], bool] | None = None,
        threads: int = 1,
    ) -> None:
        self._threads = threads
        self._states: tuple[tuple[int, bytes | None], ...] = ((-1, state),)
        self._trainer = trainer
        self._evaluate_every = evaluate_every
        self._pay = pay
        self._is_over_told = False

    def train(self, round: Round, vector: Vector, seconds: float, mixed: bool) -> tuple[Trained, Sequence[Event]]:
        """See `p2pfl.node.driver.Worker`.

        With noise for examples nobody is told the loss: it has none. Nor is it kept, so that it cannot be told.
        """
        torch.set_num_threads(self._threads)
        with keeping_blocks():
            return self._train(round, vector, seconds, mixed)

    def _train(self, round: Round, vector: Vector, seconds: float, mixed: bool) -> tuple[Trained, Sequence[Event]]:
        events: list[Event] = []
        if not round % self._evaluate_every:
            events.append(Evaluated(round, self._trainer.evaluate(self._trainer.model_after(vector, mixed))))
        if self._pay is not None and not self._pay(round):
            events += [] if self._is_over_told else [Note(SPENT)]
            self._is_over_told = True
            return Trained(round, vector.copy(), None, 0), events
        trained = self._trainer.train(vector, round, seconds, mixed)
        # In one assignment: another thread reads it.
        self._states = (*self._states[-1:], (round, self._trainer.state()))
        loss = trained.loss if self._pay is None else None
        return Trained(round, trained.vector, loss, trained.steps), events

    def state_before(self, round: int) -> bytes | None:
        """Return the trainer's state as it was when `round` began, for a checkpoint that is written during it."""
        states = self._states
        return next((state for trained, state in reversed(states) if trained < round), states[0][1])


class ModelKeeper:
    """Keeps the latest adopted model, and copies of every so-manieth one in a file of raw little-endian float32.

    A peer that passed rounds without adopting anything had its former model in them, and so says the file.
    """

    def __init__(self, vector: Vector, rounds: int, history: BinaryIO | None, every: int) -> None:
        self.vector = vector
        self.rounds = rounds
        self._history = history
        self._every = every
        self._copies = 0 if history is None else history.tell() // vector.nbytes
        self._keep()

    def adopt(self, round: Round, vector: Vector) -> None:
        """Take the model after `round`."""
        self.rounds = round
        self._keep()
        self.vector, self.rounds = vector, round + 1
        self._keep()

    def _keep(self) -> None:
        if self._history is None:
            return
        try:
            while self._copies * self._every <= self.rounds:
                self._history.write(self.vector.astype("<f4", copy=False).data)
                self._copies += 1
            self._history.flush()
        except OSError as error:
            raise StoreFailed(f"{self._history.name}: cannot be written: {error.strerror}; make room") from error


class Once:
    """A vector that is handed out once and not kept: the initial model is as large as any, and soon of no use."""

    def __init__(self, vector: Vector) -> None:
        self._vector: Vector | None = vector
        self.size = len(vector)

    def take(self) -> Vector:
        """Return it, the first time.

        Raises:
            RuntimeError: somebody has it already.
        """
        vector, self._vector = self._vector, None
        if vector is None:
            raise RuntimeError("the initial model was taken before")
        return vector


@dataclass(frozen=True)
class Peer:
    """A peer that has passed every check and may run; `initial` is where it begins, as its machine has it."""

    home: Home
    federation: Federation
    transport: PeerTransport
    signer: Signer
    trainer: Trainer
    initial: Once
    started: PeerStarted
    plan: Plan | GroupPlan
    weight: int

    @classmethod
    def prepare(cls, home: Home) -> "Peer":
        """Check a member's folder and load what it says.

        Raises:
            InvalidConfig: something in it is missing or wrong.
        """
        federation = open_federation(home.charter_path)
        charter = federation.charter
        signer = home.signer(charter.security.suite)
        identity = signer.identity
        member = own_membership(home, charter, identity)
        task = federation.task.task
        data = read_data(task, home.data)
        trainer = make_trainer(
            task, data, charter.training, charter.averaging, home.config.seed, Privately.of(charter, os.urandom)
        )
        weight = weight_for(charter.averaging, len(data.train))
        load_model(federation.model_path, trainer.model)
        initial = Once(trainer.begin(flatten(trainer.model)))
        plan = sized(plan_of(charter, identity.peer_id), initial.size, trainer.fixed)
        started = PeerStarted(
            member=member.name,
            peer=identity.peer_id,
            charter=charter.hash().hex(),
            neighbors=neighbors_of(plan),
            parameters=trainer.size,
            examples=len(data.train),
        )
        own = charter.security.channel == "suite"
        channel = ChannelTerms(charter.security.suite, charter.hash()) if own else None
        transport = Libp2pTransport(identity.seed(), charter.roster(), channel, relay=home.config.relay)
        return cls(home, federation, transport, signer, trainer, initial, started, plan, weight)

    def machine(self, initial: Vector, resume: Resume | None) -> Machine:
        """Return the peer's protocol, at its beginning or where a former life of the peer left off."""
        if isinstance(self.plan, GroupPlan):
            keyring = Keyring(self.signer, self.federation.charter)
            if self.plan.graph is None:
                return GroupMachine(self.plan, keyring, initial, resume, self._masks(), self.weight)
            settling = Plan.for_peer(self.federation.charter, PeerId(self.started.peer))
            settling = replace(settling, parameters=len(initial))
            return StarMachine(self.plan, settling, keyring, initial, resume, self._masks(), self.weight)
        return PeerMachine(self.plan, initial, resume, self.weight)

    def _masks(self) -> MaskTerms | None:
        charter = self.federation.charter
        if charter.averaging.masks == "off":
            return None
        chosen = suite(charter.security.suite, clock=time.perf_counter)
        averaging = charter.averaging
        audit = averaging.audit == "full"
        return MaskTerms(chosen, RING_BITS, averaging.clip, os.urandom, averaging.most_change, audit, noise_of(charter))

    def run(self) -> bool:
        """Run until the federation's last round, or until asked to stop (SIGINT, SIGTERM, SIGHUP).

        Returns:
            Whether local steps go on, in a thread that nobody waits for.

        Raises:
            P2pflError: the run failed.
        """
        torch.set_num_threads(self.home.config.threads)
        return_large_blocks()
        run_path = self.home.run_path
        with (
            _signals_as_before(),
            exclusive(run_path, "a peer runs in this folder already; stop it first"),
            logging_to(self.home.config.logging, self.home.path),
            ExitStack() as files,
        ):
            self._verify_unfinished(run_path / FINISHED_FILE)
            return bool(trio.run(self._run, self._begin(run_path, files)))

    def _begin(self, run_path: Path, files: ExitStack) -> "Life":
        """Return where this life begins, with its files open. Only its machine and its keeper hold vectors."""
        initial = mapped(self.initial.take(), run_path)
        budget, examples = self.federation.charter.budget, self.federation.charter.example_budget
        opened = Checkpoints.open(
            run_path / STATE_FOLDER,
            self.plan.charter,
            PeerId(self.started.peer),
            initial,
            rho=0.0 if budget is None else budget.rho,
            steps=0 if examples is None else examples.steps,
        )
        files.callback(opened.checkpoints.close)
        trace = TraceWriter(run_path / TRACE_FILE, self._traffic, self.home.config.logging.trace_bytes)
        files.callback(trace.close)
        told = list(opened.notes)
        if opened.trainer is not None:
            told += self.trainer.restore(opened.trainer)
        standing = Checkpoint(Round(0), initial, None) if opened.resume is None else opened.resume.checkpoint
        vector = standing.base if standing.update is None else standing.base + standing.update
        model = self.trainer.model_after(vector, standing.mixed)
        every = self.home.config.history_every
        history = files.enter_context(_history(run_path / HISTORY_FILE, every, model.nbytes, standing.round))
        keeper = ModelKeeper(model, standing.round, history, every)
        status = StatusWriter(run_path / STATUS_FILE)
        return Life(
            opened.checkpoints,
            self.machine(initial, opened.resume),
            keeper,
            opened.trainer,
            trace,
            status,
            self._metrics(status, opened.checkpoints),
            standing.round,
            tuple(told),
        )

    def _traffic(self) -> tuple[int, int]:
        return self.transport.bytes_in, self.transport.bytes_out

    def _metrics(self, status: StatusWriter, checkpoints: Checkpoints) -> Metrics:
        charter, run = self.federation.charter, self.home.run_path
        return Metrics(
            Sources(
                member=self.started.member,
                release=RELEASE,
                wire=VERSION,
                charter=self.started.charter,
                others=tuple(name for name in charter.names() if name != self.started.member),
                rounds=charter.rounds,
                parameters=self.started.parameters,
                progress=lambda: status.progress,
                traffic=self._traffic,
                disk=lambda: (free_bytes(run), bytes_in(run)),
                budget=charter.budget,
                rho=lambda: checkpoints.rho,
            )
        )

    def _verify_unfinished(self, path: Path) -> None:
        if path.exists() and read_text(path, "what this peer has finished").strip() == self.plan.charter.hex():
            raise InvalidConfig(
                f"{path}: this peer has trained to the end under this charter; its model is {MODEL_FILE} beside it. "
                "Agree on a new charter to train on, or remove this folder to take part anew"
            )

    async def _run(self, life: "Life") -> bool:
        life.tell(replace(self.started, resumed_at=life.round))
        for text in (*notes(self.trainer.model), *life.told):
            life.tell(Note(text))
        held: list[PeerFinished] = []
        keeper = life.keeper
        idle = await self._live(life, held)
        if idle:
            life.tell(Evaluated(keeper.rounds, self.trainer.evaluate(keeper.vector)))
        self._save(keeper)
        if held[-1].outcome == "done":
            write_atomic(self.home.run_path / FINISHED_FILE, f"{self.plan.charter.hex()}\n".encode())
        life.tell(held[-1])
        return not idle

    async def _live(self, life: "Life", held: list[PeerFinished]) -> bool:
        """Run to the end, and put the last word into `held`; return whether the trainer is free."""
        keeper = life.keeper
        names = dict(zip(self.federation.charter.roster(), self._names(), strict=True))

        def emit(event: Event) -> None:
            # The last line of a trace is written once the model is on disk: whoever sees it finds the model.
            if isinstance(event, PeerFinished):
                held.append(event)
            elif isinstance(event, Refused):
                life.tell(replace(event, who=names.get(PeerId(event.who), event.who)))
            else:
                life.tell(event)

        budget = self.federation.charter.example_budget
        pay = None if budget is None else partial(_pay, budget, life.checkpoints)
        worker = LocalTraining(
            self.trainer, self.home.config.evaluate_every, life.trainer, pay, self.home.config.threads
        )

        def persist(record: Record) -> Mapped | None:
            state = worker.state_before(record.round) if isinstance(record, Checkpoint) else None
            return life.checkpoints.persist(record, state)

        def adopt(round: Round, vector: Vector, mixed: bool) -> None:
            keeper.adopt(round, self.trainer.model_after(vector, mixed))

        try:
            hooks = Hooks(emit, adopt, persist, life.metrics.refused)
            return await self._drive(life.machine, worker, hooks, life)
        except Exception as error:
            with suppress(StoreFailed):  # told by the error itself
                failed = PeerFinished("failed", keeper.rounds, agreed=False, reason=str(error))
                life.tell(held[-1] if held else failed)
            raise

    def _names(self) -> list[str]:
        return sorted(member.name for member in self.federation.charter.members)

    async def _drive(self, machine: Machine, worker: LocalTraining, hooks: Hooks, life: "Life") -> bool:
        """Run to the end; return whether the trainer is free, and not left behind in the middle of local steps."""
        addresses = self._known_addresses()
        plan = self.plan
        sought = plan.weights if isinstance(plan, Plan) else {plan.roster[place] for place in plan.neighbors}
        moved, now = self._record_of_move(), int(time.time())
        driver = Driver(machine, self.transport, addresses, self.plan.charter, worker, hooks, sought, moved, now)
        failed: Exception | None = None
        watched = self.home.config.metrics
        listeners = await listen(watched.address, watched.port) if watched.port else []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, driver, self.home.config.stop_seconds)
            if listeners:
                endpoint = Endpoint(pages(life.metrics), watched.address, watched.names)
                nursery.start_soon(endpoint.serve, listeners)

            def ready(bound: Sequence[str]) -> None:
                life.status.listens(tuple(bound))
                nursery.start_soon(life.status.keep)
                self.transport.answer(PROTOCOL, Desk(self._facts, self._known_addresses(), self.transport.probe).hold)
                nursery.start_soon(self.transport.keep_reachable, self.home.config.announce)
                if self.home.config.mdns:
                    nursery.start_soon(self._meet_on_lan, addresses.keys(), bound, driver, hooks)

            try:
                await driver.run(self.home.config.listen, ready)
            except Exception as error:  # noqa: BLE001 - raised outside the nursery, which would wrap it in a group
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
        return not driver.is_training

    def _known_addresses(self) -> dict[PeerId, tuple[str, ...]]:
        """Return where the charter says that each other member is."""
        return {
            PeerId(member.peer_id): member.addresses
            for member in self.federation.charter.members
            if member.peer_id != self.started.peer
        }

    def _facts(self) -> Facts:
        return Facts(RELEASE, SPOKEN, time.time(), self.plan.charter, "peer")

    async def _meet_on_lan(
        self, members: Collection[PeerId], bound: Sequence[str], driver: Driver, hooks: Hooks
    ) -> None:
        try:
            await meet_on_lan(PeerId(self.started.peer), members, bound, driver.hint)
        except OSError as error:
            hooks.emit(Note(f"mdns: the local network cannot be asked: {error}; members are sought elsewhere"))

    def _record_of_move(self) -> Callable[[int], Whereabouts] | None:
        """Return what signs this peer's address record; None where the charter's addresses hold."""
        announce = self.home.config.announce
        member = self.federation.charter.member(self.started.member)
        if not announce or member is None or set(announce) == set(member.addresses):
            return None
        return lambda sequence: sign_whereabouts(self.signer.identity, self.plan.charter, sequence, announce)

    def _save(self, keeper: ModelKeeper) -> None:
        model = make_model(self.federation.task.task)
        assign(model, keeper.vector)
        metadata = {"charter": self.plan.charter.hex(), "member": self.started.member, "rounds": str(keeper.rounds)}
        save_model(self.home.run_path / MODEL_FILE, model, metadata)


@dataclass(frozen=True)
class Life:
    """One life of a peer, from its start to its end or its crash."""

    checkpoints: Checkpoints
    machine: Machine
    keeper: ModelKeeper
    trainer: bytes | None
    trace: TraceWriter
    status: StatusWriter
    metrics: Metrics
    round: Round
    told: tuple[str, ...]

    def tell(self, event: Event) -> None:
        """Write what happened into the trace and the log, and what it means into status and metrics.

        Raises:
            StoreFailed: the trace cannot be written any more.
        """
        self.trace.write(event)
        self.status.note(event)
        self.metrics.note(event, time.time())
        log_event(event)
        if isinstance(event, PeerFinished):
            self.status.write()


def _pay(budget: ExampleBudget, checkpoints: Checkpoints, round: Round) -> bool:
    """Write a round's steps into the ledger, if the budget bears them; called in a worker thread, before they are made.

    Raises:
        StoreFailed: see `Checkpoints.persist`.
    """
    if not budget.bears(checkpoints.steps + budget.steps):
        return False
    checkpoints.persist(Stepped(round, budget.steps))
    return True


def plan_of(charter: Charter, me: PeerId) -> Plan | GroupPlan:
    """Return what a peer needs to know of the charter, for its way of averaging.

    Raises:
        InvalidConfig: the topology does not exist for this many members.
    """
    if charter.averaging.topology == "groups" or charter.averaging.masks == "on":
        return GroupPlan.for_peer(charter, me)
    return Plan.for_peer(charter, me)


def sized(plan: Plan | GroupPlan, parameters: int, fixed: int) -> Plan | GroupPlan:
    """Return the plan for vectors of so many values, of which so many at the end are no model's."""
    if isinstance(plan, GroupPlan):
        return replace(plan, parameters=parameters, fixed=fixed)
    return replace(plan, parameters=parameters)


def neighbors_of(plan: Plan | GroupPlan) -> tuple[str, ...]:
    """Return the names of the members that a peer keeps links to."""
    if isinstance(plan, GroupPlan):
        return tuple(plan.names[place] for place in plan.neighbors)
    return tuple(plan.names[peer] for peer in plan.weights)


@contextmanager
def _history(path: Path, every: int, size: int, rounds: int) -> Iterator[BinaryIO | None]:
    """Open the file of copies, with those of the rounds before these in it."""
    if not every:
        yield None
        return
    kept = -(-rounds // every) if path.exists() else 0
    if kept and path.stat().st_size >= kept * size:
        with path.open("r+b") as file:
            file.truncate(kept * size)
            file.seek(0, 2)
            yield file
        return
    path.unlink(missing_ok=True)  # not truncated: somebody may be reading the last run's
    with path.open("wb") as file:
        yield file


async def _stop_on_signal(driver: Driver, patience: float) -> None:
    """Have the peer leave at its round's end; at once at a second signal, or when `patience` seconds are over."""
    try:
        with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
            await anext(signals)
            driver.stop()
            with trio.move_on_after(patience):
                await anext(signals)
            driver.stop()
            await trio.sleep_forever()
    finally:
        # The model is saved next, which nobody shall interrupt.
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)


@contextmanager
def _signals_as_before() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
