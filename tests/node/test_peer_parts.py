"""What a peer puts together for its driver: the trainer's state of the right round, and its own address record."""

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p2pfl.core.errors import InvalidConfig, StoreFailed
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.machine import Vector
from p2pfl.core.privacy import ExampleBudget
from p2pfl.core.trace import Event, Note
from p2pfl.crypto.ring import WEIGHT_ONE
from p2pfl.node.checkpoints import Checkpoints
from p2pfl.node.discovery import verify_whereabouts
from p2pfl.node.federation import Home
from p2pfl.node.launcher import create_federation
from p2pfl.node.peer import SPENT, LocalTraining, Peer, _pay
from tests.node.homes import TASK, make_folders


class Counting:
    """A trainer whose state is the number of its trainings."""

    count = 0

    def train(self, vector: Vector, round: Round, seconds: float, mixed: bool) -> Any:
        self.count += 1
        return type("Trained", (), {"vector": vector, "loss": 0.0, "steps": 1})()

    def state(self) -> bytes:
        return bytes([self.count])

    def model_after(self, vector: Vector, mixed: bool) -> Vector:
        return vector

    def evaluate(self, vector: Vector) -> dict[str, float]:
        return {}


def test_a_checkpoint_takes_the_state_from_before_its_round_though_that_has_begun() -> None:
    worker = LocalTraining(Counting(), 10**9, b"former life")  # type: ignore[arg-type]
    assert worker.state_before(0) == b"former life"
    for round in range(7, 10):
        worker.train(Round(round), np.zeros(1, np.float32), 1.0, True)
        assert worker.state_before(round + 1) == bytes([round - 6])
        assert worker.state_before(round) == (b"former life" if round == 7 else bytes([round - 7]))
    assert worker.state_before(500) == bytes([3]), "rounds without training leave the state as it was"


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_have_as_many_threads_as_the_peer_is_given_in_whatever_thread_they_are_made(threads: int) -> None:
    class Asking(Counting):
        def train(self, vector: Vector, round: Round, seconds: float, mixed: bool) -> Any:
            self.count = torch.get_num_threads()
            return super().train(vector, round, seconds, mixed)

    before, trainer = torch.get_num_threads(), Asking()
    try:
        torch.set_num_threads(3 - threads)
        worker = LocalTraining(trainer, 10**9, threads=threads)  # type: ignore[arg-type]
        thread = threading.Thread(target=worker.train, args=(Round(1), np.zeros(1, np.float32), 1.0, True))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert trainer.count == threads + 1, "and one training"


def test_only_a_peer_that_announces_other_addresses_than_the_charters_signs_a_record(tmp_path: Path) -> None:
    folders = make_folders(tmp_path / "federation")
    home = folders.homes["bee"]
    assert Peer.prepare(home)._record_of_move() is None
    elsewhere = ("/ip4/192.0.2.9/tcp/4009",)
    moved = Peer.prepare(replace_announce(home, elsewhere))
    sign = moved._record_of_move()
    assert sign is not None
    record = sign(17)
    verify_whereabouts(record)
    assert (record.member, record.sequence, record.addresses) == (moved.started.peer, 17, elsewhere)
    assert record.charter == folders.charter().hash()


def replace_announce(home: Home, addresses: tuple[str, ...]) -> Home:
    return replace(home, config=home.config.model_copy(update={"announce": addresses}))


def test_a_peer_counts_its_training_samples_and_does_not_start_with_too_many(tmp_path: Path) -> None:
    made = {}
    for most in (3, 8):
        terms = {"averaging": {"topology": "complete", "masks": "off", "weights": "samples", "samples_max": most}}
        (tmp_path / f"{most}").mkdir()
        (tmp_path / f"{most}" / "own.py").write_text(TASK.format(inputs=3).replace("Größe", "Own"))
        made[most] = create_federation(tmp_path / f"{most}", "own.py:Own", terms, [{}, {}], seed=0).homes[0]
    assert Peer.prepare(made[8]).weight == WEIGHT_ONE // 2
    with pytest.raises(InvalidConfig, match=r"^this peer trains on 4 samples, and .* is 3; agree on a charter"):
        Peer.prepare(made[3])


# What steps tell of examples


class Private(Counting):
    """Notes how many steps are in the ledger whenever it makes some."""

    def __init__(self, store: Checkpoints) -> None:
        self.store = store
        self.paid: list[int] = []

    def train(self, vector: Vector, round: Round, seconds: float, mixed: bool) -> Any:
        self.paid.append(self.store.steps)
        return super().train(vector, round, seconds, mixed)


def test_steps_are_paid_for_before_they_are_made_and_end_with_the_budget(tmp_path: Path) -> None:
    budget = ExampleBudget(noise=1.0, epsilon=3.0, delta=1e-5, rate=0.01, steps=300, values=10)
    most = budget.rounds
    assert most > 2
    paid: list[int] = []
    notes: list[Event] = []
    for life in range(2):  # the second repeats a round of the first, which counts twice
        store = Checkpoints.open(tmp_path / "state", bytes(32), PeerId("one"), np.zeros(1, np.float32)).checkpoints
        trainer = Private(store)
        worker = LocalTraining(trainer, 10**9, None, partial(_pay, budget, store))  # type: ignore[arg-type]
        for round in range(2 * life, 3 if not life else most + 4):
            vector = np.full(1, round, np.float32)
            trained, events = worker.train(Round(round), vector, 1.0, True)
            assert trained.loss is None, "so that nobody can be told"
            notes += [event for event in events if isinstance(event, Note)]
            if not trained.steps:
                np.testing.assert_array_equal(trained.vector, vector)
                assert trained.vector is not vector
        paid += trainer.paid
        assert budget.bears(store.steps)
        store.close()
    assert paid == [300 * (number + 1) for number in range(most)]
    assert [note.text for note in notes if isinstance(note, Note)] == [SPENT], "told once"


def test_steps_that_cannot_be_written_down_are_not_made(tmp_path: Path) -> None:
    budget = ExampleBudget(noise=1.0, epsilon=3.0, delta=1e-5, rate=0.01, steps=3, values=10)
    store = Checkpoints.open(tmp_path / "state", bytes(32), PeerId("one"), np.zeros(1, np.float32)).checkpoints
    trainer = Private(store)
    worker = LocalTraining(trainer, 10**9, None, partial(_pay, budget, store))  # type: ignore[arg-type]
    store.close()
    with pytest.raises(StoreFailed):
        worker.train(Round(0), np.zeros(1, np.float32), 1.0, True)
    assert trainer.paid == []
