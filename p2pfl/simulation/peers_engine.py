"""Runs a scenario with real peers' machines and trainers over the simulated network.

What a peer does follows from the same code as in `p2pfl peer`: its plan, its machine, its trainer. Only what lies below
is replaced, by `p2pfl.simulation.simnet`. So this is slow, and for some tens of peers; and what comes out is what real
peers would have. Bytes are counted, of headers and payloads; seconds are the simulated network's.
"""

import copy
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from p2pfl.core.charter import Charter
from p2pfl.core.errors import RoundFailed
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Checkpoint, Resume, resume
from p2pfl.core.machine import Emit, Finish, Machine, Persist, Send, SendBulk, Vector
from p2pfl.core.trace import RoundEnded
from p2pfl.core.wire import encode_header
from p2pfl.crypto.suite import suite
from p2pfl.gossip.group_machine import GroupMachine, GroupPlan
from p2pfl.gossip.grouping import noise_of, weight_for
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.gossip.secure_sum import MaskTerms
from p2pfl.learning.chartered import make_trainer
from p2pfl.learning.task import Data, Examples, Task
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import initial
from p2pfl.simulation.attacks import LoneLiar
from p2pfl.simulation.charter_terms import charter_of, verify_peers
from p2pfl.simulation.churn import Churn
from p2pfl.simulation.curves import Curve, Judge, StoppingRule
from p2pfl.simulation.dense.sampling import derived
from p2pfl.simulation.hosts import Conditions, Disk, PeerSpec, SimulatedKeyring
from p2pfl.simulation.invariants import Check, InvariantViolated, Step
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.scenario import Scenario
from p2pfl.simulation.simnet import Network

PATIENCE = 1e9
"""Virtual seconds; what does not come to an end is told by the network after so many inputs."""
SECRET = b"p2pfl simulation"


def run_peers(
    scenario: Scenario, parts: Parts, number: int, evaluated: set[int], watch: Callable[[int], None] | None = None
) -> Curve:
    """Run one seed.

    Args:
        scenario: what to run.
        parts: of it.
        number: the seed.
        evaluated: after how many rounds models are evaluated.
        watch: is told how many rounds all peers have completed.

    Raises:
        InvalidConfig: real peers cannot do that.
        RoundFailed: an honest peer failed, or the network did not come to an end.
    """
    verify_peers(scenario)
    start = initial(parts.task, number)
    start.flags.writeable = False
    charter = charter_of(scenario, len(start), parts.steps, number)
    churn = Churn(scenario, number, charter.deadlines.round)
    ledger = _Ledger(scenario, parts, number, start, charter.rounds, evaluated, churn.left, watch)
    if ledger.curve.outcome:
        return ledger.curve
    sites = _sites(scenario, parts, number, charter, start)
    terms = scenario.cost
    network = Network(
        [site.spec(scenario) for site in sites],
        churn.schedule,
        seed=number,
        charter=charter.hash(),
        conditions=Conditions(latency=max(terms.latency, 1e-6), bandwidth=terms.bandwidth, start=1e-3),
        checks=[ledger, _Kept(sites)],
        director=churn,
    )
    ledger.network = network
    try:
        network.run(PATIENCE)
    except InvariantViolated as violated:
        raise RoundFailed(f"seed {number}: {violated.reason}") from violated
    if ledger.failure:
        raise RoundFailed(f"seed {number}: {ledger.failure}")
    return ledger.closed()


def _sites(scenario: Scenario, parts: Parts, number: int, charter: Charter, start: Vector) -> list["_Site"]:
    shares = parts.shares(number)
    task = parts.task if parts.own else _rated(parts.task, parts.lr)
    roster, places = charter.roster(), parts.places(number)
    sites = []
    # In the network peers are in the order of their numbers. Their places in the roster are others where some attack.
    for peer, place in enumerate(places):
        mine = shares.order[shares.starts[peer] :][: shares.counts[peer]]
        examples = Examples(parts.pool.inputs[mine], parts.pool.targets[mine])
        data = Data(examples, parts.data.test)
        seed = derived(number, "trainer", peer)
        make = partial(make_trainer, task, data, charter.training, charter.averaging, seed)
        sites.append(
            _Site(
                charter, roster[place], peer, number, start, make, len(examples), keeps=scenario.faults.leave > 0,
                liar=_liar(scenario, parts, number, peer),
            )
        )  # fmt: skip
    return sites


def _liar(scenario: Scenario, parts: Parts, number: int, peer: int) -> LoneLiar | None:
    """Return what makes a peer's lies; None for the honest, and attackers that send what they trained."""
    if parts.attack is None or parts.attack.lie is None or peer < scenario.peers - parts.attackers:
        return None

    def draw(round: int, vector: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(derived(number, "lies", round, vector, peer)))

    averaging = scenario.averaging
    # No word of a ring is beyond its clip, whoever writes it; and the liar's own machine is not to refuse its lie.
    limit = averaging.clip * (1 - 2**-20) if averaging.masks == "on" else None
    return LoneLiar(parts.attack.lie, parts.strength, draw, limit)


class _Site:
    """One peer's place: its trainer, of which only the state outlives a peer that leaves, and what makes its machine.

    Args:
        charter: under which it runs.
        peer: its id.
        place: its place in the network.
        number: the seed.
        start: the common initial model, float32 [parameters].
        make: makes its trainer.
        samples: how many it has.
        keeps: whether states are kept, for a peer that may come back.
        liar: makes what it sends in place of what it trained; None if it sends that.
    """

    def __init__(
        self, charter: Charter, peer: PeerId, place: int, number: int, start: Vector, make: Callable[[], Trainer],
        samples: int, *, keeps: bool, liar: LoneLiar | None,
    ) -> None:  # fmt: skip
        averaging = charter.averaging
        self._start, self._make, self._keeps = start, make, keeps
        self._peer, self._place = peer, place
        self._trainer = make()
        self._begun = begun = self._trainer.begin(start)
        self._liar, self._width = liar, len(begun) - self._trainer.fixed
        self._states: dict[Round, bytes] = {}
        """Of the last two rounds."""
        self._kept: bytes | None = None
        """The trainer's when the last checkpoint was taken."""
        self._machine: Callable[[Resume | None], Machine]
        weight = weight_for(averaging, samples)
        if averaging.topology != "groups":
            plan = replace(Plan.for_peer(charter, peer), parameters=len(begun))
            self._neighbors = tuple(plan.weights)
            self._machine = lambda known: PeerMachine(plan, begun, known, weight)
            return
        group = replace(GroupPlan.for_peer(charter, peer), parameters=len(begun), fixed=self._trainer.fixed)
        keyring = SimulatedKeyring(SECRET, group.me, len(charter.members))
        entropy = random.Random(f"{number}/entropy/{place}")  # noqa: S311 - a simulation's entropy is drawn from its seed
        masks = None
        if averaging.masks == "on":
            masks = MaskTerms(
                suite("aes"), 32, averaging.clip, entropy.randbytes, None, averaging.audit == "full", noise_of(charter)
            )  # fmt: skip
        self._neighbors = tuple(group.roster[other] for other in group.neighbors)
        self._machine = lambda known: GroupMachine(group, keyring, begun, known, masks, weight)

    def spec(self, scenario: Scenario) -> PeerSpec:
        """Return the peer for the network."""
        return PeerSpec(
            self._peer, f"peer-{self._place}", self._build, self._train, self._neighbors,
            scenario.cost.step_seconds * scenario.slowness_of(self._place), model=self._model_after,
        )  # fmt: skip

    def _model_after(self, vector: Vector, mixed: bool) -> Vector:
        return self._trainer.model_after(vector, mixed)

    def keep(self, round: Round) -> None:
        """Keep the trainer's state as it was when `round` began, beside the checkpoint of it."""
        before = [trained for trained in self._states if trained < round]
        if before:
            self._kept = self._states[max(before)]

    def _build(self, disk: Disk) -> Machine:
        if disk.checkpoint is None and not disk.records:
            return self._machine(None)
        self._trainer = self._make()
        self._trainer.begin(self._start)
        if self._kept is not None:
            self._trainer.restore(self._kept)
        last = disk.checkpoint or Checkpoint(Round(0), self._begun, None)
        return self._machine(resume(last, disk.records))

    def _train(
        self, peer: PeerId, round: Round, vector: Vector, seconds: float, mixed: bool
    ) -> tuple[Vector, float, int]:
        del peer, seconds  # the window is in the number of steps: those that fit into it, of `cost.step_seconds` each
        trained = self._trainer.train(vector, round, mixed=mixed)
        if self._keeps:
            last = dict(sorted(self._states.items())[-1:])
            self._states = last | {round: self._trainer.state()}
        sent = trained.vector
        if self._liar is not None:
            sent = self._liar.sent(vector, sent, round, self._width)
        return sent, trained.loss, trained.steps


class _Kept(Check):
    """Tells sites when a checkpoint is taken; whoever leaves has it on its disk."""

    def __init__(self, sites: Sequence[_Site]) -> None:
        self._sites = sites

    def step(self, step: Step) -> None:
        """Look for checkpoints among what a machine wants kept."""
        for effect in step.effects:
            if isinstance(effect, Persist) and isinstance(effect.record, Checkpoint):
                self._sites[step.peer.place].keep(effect.record.round)


def _rated(task: Task, lr: float) -> Task:
    """Return the task with plain SGD of this learning rate, which is what is simulated."""
    rated = copy.copy(task)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)

    rated.optimizer = optimizer  # type: ignore[method-assign]
    return rated


class _Ledger(Check):
    """Keeps what each peer has after each round, and what that cost; halts the network when the run is to end.

    A round's row is added when nothing can change it any more: all have ended the next round, too, or have finished.
    For whoever is away that may be late. So rows are the same whether a run ends early or not.

    Attributes:
        network: the one it watches.
        curve: the rows so far; that before the first round is there from the start.
        failure: which honest peer failed, and why; empty if none did.
    """

    network: Network

    def __init__(
        self, scenario: Scenario, parts: Parts, number: int, start: Vector, rounds: int, evaluated: set[int],
        left: Collection[int], watch: Callable[[int], None] | None,
    ) -> None:  # fmt: skip
        peers = scenario.peers
        self._left, self.failure = left, ""
        self._peers, self._rounds, self._evaluated, self._watch = peers, rounds, evaluated, watch
        self._judge = Judge(scenario, parts)
        self._sent = np.zeros(peers)
        self._records: dict[tuple[int, int], tuple[RoundEnded, float, float]] = {}
        """By round and place: the record, the bytes sent so far, and the time. Of rounds that have no row yet."""
        self._complete = Counter[int]()
        self._ended = np.full(peers, -1)
        """The latest round that each has ended."""
        self._is_due = False
        self._models = np.tile(start, (peers, 1))
        """After the round of the last row, as what follows until `_read`."""
        self._sent_then, self._seconds = np.zeros(peers), 0.0
        self._read = [0] * peers
        """How many of each peer's adopted models were looked at."""
        self.curve = Curve(number, StoppingRule(scenario.stopping))
        self._add(0)

    def step(self, step: Step) -> None:
        """Count what is sent, and note each round's end."""
        if self._is_due:  # Since the last step's effects are carried out by now.
            self._is_due = False
            self._add_final()
        place = step.peer.place
        for effect in step.effects:
            match effect:
                case Send(_, message):
                    self._sent[place] += len(encode_header(message))
                case SendBulk(peers, message, payload):
                    self._sent[place] += len(peers) * (len(encode_header(message)) + payload.nbytes)
                case Emit(RoundEnded() as ended):
                    self._ended[place], self._is_due = ended.round, True
                    if ended.round < self._rounds:
                        self._note(ended, place)
                case Finish(error):
                    self._is_due = True
                    # Whoever was away may find that the others have ended, and give up. What fails attackers is theirs.
                    if error is not None and place not in self._left and place < self._judge.honest:
                        self.failure = f"{step.peer.name}: {error}"
                        self.network.halt()
                case _:
                    pass

    def closed(self) -> Curve:
        """Return the curve with all its rows, once the network has come to its end."""
        while not self.curve.outcome and len(self.curve.rows) <= self._rounds:
            self._add(len(self.curve.rows))
        return self.curve

    def _note(self, ended: RoundEnded, place: int) -> None:
        self._records[ended.round, place] = (ended, float(self._sent[place]), self.network.now)
        self._complete[ended.round] += 1
        if self._watch is not None and self._complete[ended.round] == self._peers:
            self._watch(ended.round + 1)

    def _add_final(self) -> None:
        """Add the rows that nothing can change any more."""
        ended = [math.inf if peer.finished else self._ended[peer.place] for peer in self.network.peers]
        while not self.curve.outcome and len(self.curve.rows) <= min(self._rounds, *ended):
            self._add(len(self.curve.rows))
        if self.curve.outcome:
            self.network.halt()

    def _add(self, complete: int) -> None:
        """Add the row after so many rounds."""
        losses = np.full(self._peers, math.nan)
        honest = losses[: self._judge.honest]
        outcomes = ["full"] * self._peers
        for place in range(self._peers) if complete else ():
            self._models[place] = self._adopted(place, complete)
            outcomes[place] = "skip"
            if (complete - 1, place) in self._records:
                record, self._sent_then[place], at = self._records.pop((complete - 1, place))
                losses[place] = math.nan if record.loss is None else record.loss
                outcomes[place], self._seconds = record.outcome or "full", max(self._seconds, at)
        row: dict[str, float] = {
            "seed": self.curve.number,
            "round": complete,
            "train_loss": float(np.nanmean(honest)) if not np.isnan(honest).all() else math.nan,
            "working": sum(outcome != "skip" for outcome in outcomes),
            "modelled_bytes": float(self._sent_then.mean()),
            "modelled_seconds": self._seconds,
        }
        if complete in self._evaluated:
            row |= self._judge.measure(self._models, losses, self.curve, complete)
        self.curve.add(row)

    def _adopted(self, place: int, complete: int) -> Vector:
        """Return the last model that a peer adopted in so many rounds."""
        model: Vector = self._models[place]
        adopted = self.network.peers[place].adopted
        while self._read[place] < len(adopted) and adopted[self._read[place]][0] < complete:
            model = adopted[self._read[place]][1]
            self._read[place] += 1
        return model
