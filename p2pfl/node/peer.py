"""One running peer: its folder checked, its machine, trainer and transport put together, its model kept at the end."""

import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import BinaryIO

import torch
import trio

from p2pfl.core.errors import StoreFailed
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.machine import Vector
from p2pfl.core.trace import Evaluated, Event, Note, PeerFinished, PeerStarted, Refused
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.learning.task import make_model, read_data
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import assign, flatten, load_model, notes, save_model
from p2pfl.node.driver import Driver, Hooks
from p2pfl.node.federation import HISTORY_FILE, MODEL_FILE, Federation, Home, open_federation, own_membership
from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport
from p2pfl.node.store import exclusive
from p2pfl.node.tracefile import TRACE_FILE, TraceWriter


class LocalTraining:
    """The driver's worker: local steps, and before them the common model's evaluation, where its turn has come."""

    def __init__(self, trainer: Trainer, evaluate_every: int) -> None:
        self._trainer = trainer
        self._evaluate_every = evaluate_every

    def train(self, round: Round, vector: Vector) -> tuple[Vector, float, Sequence[Event]]:
        """See `p2pfl.node.driver.Worker`."""
        events = [] if round % self._evaluate_every else [Evaluated(round, self._trainer.evaluate(vector))]
        trained = self._trainer.train(vector, round)
        return trained.vector, trained.loss, events


class ModelKeeper:
    """Keeps the latest adopted model, and copies of every so-manieth one in a file of raw little-endian float32."""

    def __init__(self, initial: Vector, history: BinaryIO | None, every: int) -> None:
        self.vector = initial
        self.rounds = 0
        self._history = history
        self._every = every
        self._keep(0)

    def adopt(self, round: Round, vector: Vector) -> None:
        """Take the model after `round`."""
        self.vector = vector
        self.rounds = round + 1
        self._keep(self.rounds)

    def _keep(self, rounds: int) -> None:
        if self._history is None or rounds % self._every:
            return
        try:
            self._history.write(self.vector.astype("<f4", copy=False).data)
            self._history.flush()
        except OSError as error:
            raise StoreFailed(f"{self._history.name}: cannot be written: {error.strerror}; make room") from error


@dataclass(frozen=True)
class Peer:
    """A peer that has passed every check and may run."""

    home: Home
    federation: Federation
    transport: Libp2pTransport
    machine: PeerMachine
    trainer: Trainer
    initial: Vector
    started: PeerStarted
    plan: Plan

    @classmethod
    def prepare(cls, home: Home) -> "Peer":
        """Check a member's folder and load what it says.

        Raises:
            InvalidConfig: something in it is missing or wrong.
        """
        identity = home.identity()
        federation = open_federation(home.charter_path)
        charter = federation.charter
        member = own_membership(home, charter, identity)
        task = federation.task.task
        data = read_data(task, home.config.data)
        terms = charter.training
        trainer = Trainer(
            task,
            data,
            local_steps=terms.local_steps,
            batch_size=terms.batch_size,
            clip_norm=terms.clip_norm,
            seed=home.config.seed,
        )
        load_model(federation.model_path, trainer.model)
        initial = flatten(trainer.model)
        plan = Plan.for_peer(charter, identity.peer_id)
        started = PeerStarted(
            member=member.name,
            peer=identity.peer_id,
            charter=charter.hash().hex(),
            neighbors=tuple(plan.names[peer] for peer in plan.weights),
            parameters=trainer.size,
            examples=len(data.train),
        )
        own = charter.security.channel == "suite"
        channel = ChannelTerms(charter.security.suite, charter.hash()) if own else None
        transport = Libp2pTransport(identity.seed(), charter.roster(), channel)
        return cls(home, federation, transport, PeerMachine(plan, initial), trainer, initial, started, plan)

    def run(self) -> None:
        """Run until the federation's last round, or until asked to stop (SIGINT, SIGTERM, SIGHUP).

        Raises:
            P2pflError: the run failed.
        """
        torch.set_num_threads(1)
        run_path = self.home.run_path
        with exclusive(run_path, "a peer runs in this folder already; stop it first"):
            trace = TraceWriter(run_path / TRACE_FILE, lambda: (self.transport.bytes_in, self.transport.bytes_out))
            try:
                trio.run(self._run, trace)
            finally:
                trace.close()

    async def _run(self, trace: TraceWriter) -> None:
        trace.write(self.started)
        for text in notes(self.trainer.model):
            trace.write(Note(text))
        every = self.home.config.history_every
        path = self.home.run_path / HISTORY_FILE
        path.unlink(missing_ok=True)  # not truncated: somebody may be reading the last run's
        history = path.open("wb") if every else None
        keeper = ModelKeeper(self.initial, history, every)
        held: list[PeerFinished] = []

        def emit(event: Event) -> None:
            # The last line of a trace is written once the model is on disk: whoever sees it finds the model.
            if isinstance(event, PeerFinished):
                held.append(event)
            elif isinstance(event, Refused):
                trace.write(replace(event, who=self.plan.names.get(PeerId(event.who), event.who)))
            else:
                trace.write(event)

        try:
            idle = await self._drive(Hooks(emit, keeper.adopt))
        except Exception as error:
            with suppress(StoreFailed):  # told by the error itself
                failed = PeerFinished("failed", keeper.rounds, agreed=False, reason=str(error))
                trace.write(held[-1] if held else failed)
            raise
        finally:
            if history is not None:
                history.close()
        if idle:
            trace.write(Evaluated(keeper.rounds, self.trainer.evaluate(keeper.vector)))
        self._save(keeper)
        trace.write(held[-1])

    async def _drive(self, hooks: Hooks) -> bool:
        """Run to the end; return whether the trainer is free, and not left behind in the middle of local steps."""
        addresses: dict[PeerId, tuple[str, ...]] = {
            PeerId(member.peer_id): member.addresses
            for member in self.federation.charter.members
            if PeerId(member.peer_id) in self.plan.weights
        }
        worker = LocalTraining(self.trainer, self.home.config.evaluate_every)
        driver = Driver(self.machine, self.transport, addresses, self.plan.charter, worker, hooks)
        failed: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, driver)
            try:
                await driver.run(self.home.config.listen)
            except Exception as error:  # noqa: BLE001 - raised outside the nursery, which would wrap it in a group
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
        return not driver.is_training

    def _save(self, keeper: ModelKeeper) -> None:
        model = make_model(self.federation.task.task)
        assign(model, keeper.vector)
        metadata = {"charter": self.plan.charter.hex(), "member": self.started.member, "rounds": str(keeper.rounds)}
        save_model(self.home.run_path / MODEL_FILE, model, metadata)


async def _stop_on_signal(driver: Driver) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            driver.stop()
