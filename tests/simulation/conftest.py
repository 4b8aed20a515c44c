"""A run of three peers, made as a real one is, but with traces and models that are known by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from p2pfl.core.charter import Charter
from p2pfl.core.trace import (
    Entry,
    Evaluated,
    PeerFinished,
    PeerStarted,
    RoundEnded,
    State,
    StateChanged,
    encode_entry,
)
from p2pfl.learning.task import load_task, make_model
from p2pfl.learning.vector import assign, flatten, load_model, save_model
from p2pfl.node.federation import load_charter
from p2pfl.node.launcher import LocalFederation, create_federation
from p2pfl.node.tracefile import TRACE_FILE

ROUNDS, SETTLING = 4, 2
PARAMETERS = 4810
SECONDS = 0.5


@dataclass(frozen=True)
class Synthetic:
    """The folder, and what was put into it."""

    path: object
    federation: LocalFederation
    charter: Charter
    initial: np.ndarray

    def home(self, number):
        return self.federation.homes[number]

    def model(self, number):
        """The model that a peer left: the initial one, moved by a known amount."""
        return (self.initial + np.float32(0.01 * number)).astype(np.float32)

    def copies(self, number):
        """A peer's history: after round r it lies `number / (r + 1)` from peer 0's in each parameter; 0 at first."""
        steps = [0.0, *(number / (r + 1) for r in range(1, ROUNDS + SETTLING + 1))]
        return np.stack([self.initial + np.float32(step) for step in steps]).astype("<f4")


def events(run, number, end=True, rounds=ROUNDS + SETTLING):
    names = [home.config.name for home in run.federation.homes]
    neighbors = tuple(name for name in names if name != names[number])
    hash = run.charter.hash().hex()
    peer_id = run.home(number).identity().peer_id
    yield 0.0, PeerStarted(names[number], peer_id, hash, neighbors, PARAMETERS, 479)
    yield 0.0, StateChanged(State.TRAINING, 0)
    for r in range(rounds):
        settling = r >= ROUNDS
        if not settling:
            yield SECONDS * r, Evaluated(r, {"loss": 2.0 - r / 10, "accuracy": 0.1 + r / 10 + number / 100})
        loss = None if settling else 1.0
        yield SECONDS * (r + 1), RoundEnded(r, 0.4, neighbors, {}, loss, 0.1, settling)
    if end:
        yield SECONDS * rounds, Evaluated(rounds, {"loss": 1.0, "accuracy": 0.55})
        yield SECONDS * rounds, PeerFinished("done", rounds, agreed=True)


def write_trace(run, number, **how):
    """Write a peer's trace with 4.5 bytes received for each parameter of each update."""
    updates, lines = 0, []
    for at, event in events(run, number, **how):
        updates += len(event.heard) if isinstance(event, RoundEnded) else 0
        count = int(4.5 * PARAMETERS * updates)
        lines.append(encode_entry(Entry(1000.0 + at, count, count, event)) + "\n")
    (run.home(number).run_path / TRACE_FILE).write_text("".join(lines))


def write_model(run, number):
    model = make_model(load_task("digits", run.path).task)
    assign(model, run.model(number))
    save_model(run.home(number).run_path / "model.safetensors", model, {})


def write_peer(run, number):
    write_trace(run, number)
    write_model(run, number)
    run.copies(number).tofile(run.home(number).run_path / "history.f32")


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "runs" / "one"
    path.mkdir(parents=True)
    data = [{"partition": "dirichlet", "alpha": 0.5, "peers": 3, "seed": 1, "index": index} for index in range(3)]
    averaging = {"topology": "complete", "settle_rounds": 10, "masks": "off"}
    terms = {"training": {"rounds": ROUNDS}, "averaging": averaging}
    torch.manual_seed(0)
    federation = create_federation(path, "digits", terms, data, seed=0)
    (path / "settings.toml").write_text('task = "digits"\npeers = 3\n')
    charter = load_charter(path / "charter.toml")
    model = make_model(load_task("digits", path).task)
    load_model(path / charter.model.file, model)
    synthetic = Synthetic(path, federation, charter, flatten(model))
    for number in range(3):
        write_peer(synthetic, number)
    return synthetic


def kill(run, number, rounds=2):
    """Make it look as if a peer had been killed: no end, half a line, a short history, no model."""
    home = run.home(number)
    write_trace(run, number, end=False, rounds=rounds)
    with (home.run_path / TRACE_FILE).open("a") as file:
        file.write('{"event":"rou')
    (home.run_path / "model.safetensors").unlink()
    copies = run.copies(number)[: rounds + 1].tobytes()
    (home.run_path / "history.f32").write_bytes(copies + b"half")
