"""A peer that runs an algorithm is killed, and goes on from its folder as if nothing had happened."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from p2pfl.core.charter import AveragingTerms, TrainingTerms
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Checkpoint
from p2pfl.learning.chartered import make_trainer
from p2pfl.learning.task import Data, Examples, Task
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import initial
from p2pfl.node.checkpoints import Checkpoints
from p2pfl.node.peer import LocalTraining

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
EXAMPLES = Examples(INPUTS, INPUTS[:, :3].argmax(1))


class Small(Task):
    def model(self) -> nn.Module:
        return nn.Linear(6, 3)

    def data(self, settings: object) -> Data:
        return Data(EXAMPLES, EXAMPLES)


def trainer(algorithm: str, options: dict[str, object] | None) -> Trainer:
    terms = TrainingTerms(algorithm=algorithm, options=options, local_steps=1, batch_size=8)  # type: ignore[arg-type]
    return make_trainer(Small(), Data(EXAMPLES, EXAMPLES), terms, AveragingTerms(masks="off"), 3)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("local-sgd", {"beta": 0.9}),
        ("qg-dsgdm", None),
        ("diloco", None),
        ("k-gt", None),
        ("gradient-tracking", None),
        ("partial-sharing", {"personal": ["bias"]}),
    ],
)
def test_a_killed_peer_goes_on_bit_for_bit(
    tmp_path: Path, algorithm: str, options: dict[str, object] | None, mixed: bool
) -> None:
    start = initial(Small(), 0)
    one = trainer(algorithm, options)
    vector = one.begin(start)

    def opened() -> tuple[Checkpoints, Checkpoint | None, bytes | None]:
        found = Checkpoints.open(tmp_path, bytes(32), PeerId("one"), vector)
        return found.checkpoints, None if found.resume is None else found.resume.checkpoint, found.trainer

    store, _, _ = opened()
    worker, was_mixed = LocalTraining(one, 100), False
    for number in range(4):
        trained, _ = worker.train(Round(number), vector, 10.0, was_mixed)
        vector, was_mixed = trained.vector * np.float32(0.9), mixed or number < 2
        record = Checkpoint(Round(number + 1), vector, None, mixed=was_mixed)
        store.persist(record, worker.state_before(number + 1))
    expected, _ = worker.train(Round(4), vector, 10.0, was_mixed)
    store.close()  # as a kill would have it: what was begun after the checkpoint is lost

    store, checkpoint, state = opened()
    assert checkpoint is not None
    assert state is not None
    assert checkpoint.mixed == mixed
    other = trainer(algorithm, options)
    other.begin(start)
    other.restore(state)
    found, _ = LocalTraining(other, 100, state).train(checkpoint.round, checkpoint.base, 10.0, checkpoint.mixed)
    store.close()
    np.testing.assert_array_equal(found.vector, expected.vector)
