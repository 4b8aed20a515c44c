"""What a run's model is good for: taken home, measured on data that nobody trained on, asked for predictions."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.evaluation import Evaluation, evaluate, forward, predict
from p2pfl.learning.task import Task, blame, make_model, read_data
from p2pfl.learning.vector import Vector, assign, save_model
from p2pfl.simulation.results import PeerRun, Run, open_run


@dataclass(frozen=True)
class Measured:
    """A member's model, measured on its task's held-out examples.

    Attributes:
        member: whose model.
        classes: the classes' names, or their numbers; none where targets are no classes.
        evaluation: of a classifier; of others, the task's metrics.
        examples: how many it was measured on.
    """

    member: str
    classes: tuple[str, ...]
    evaluation: Evaluation | Mapping[str, float]
    examples: int


def choose_peer(run: Run, member: str | None) -> tuple[PeerRun, Vector]:
    """Return the member asked for, or the first that finished with a model, and that model.

    Raises:
        InvalidConfig: there is no such member, or it left no model.
    """
    if member is not None and all(peer.name != member for peer in run.peers):
        raise InvalidConfig(f"{run.path}: there is no {member}; there are {', '.join(peer.name for peer in run.peers)}")
    candidates = [peer for peer in run.peers if member in (None, peer.name)]
    left = [(peer, peer.model) for peer in candidates if peer.model is not None]
    if not left:
        ends = ", ".join(f"{peer.name} ({peer.outcome.kind})" for peer in candidates)
        raise InvalidConfig(f"{run.path}: no finished model here: {ends}; let the run finish, or name another run")
    # A model that the others agreed on goes before one that was left behind; of equals, `max` takes the first.
    return max(left, key=lambda each: (each[0].outcome.agreed, each[0].outcome.kind == "done"))


def _load(path: Path, member: str | None) -> tuple[Run, PeerRun, Task, nn.Module]:
    run = open_run(path)
    peer, vector = choose_peer(run, member)
    task = run.federation.task.task
    model = make_model(task)
    assign(model, vector)
    return run, peer, task, model


def evaluate_run(path: Path, member: str | None) -> Measured:
    """Measure a run's model on its task's held-out examples.

    Raises:
        InvalidConfig: there is no such run or model, or the data cannot be read.
    """
    _, peer, task, model = _load(path, member)
    examples = read_data(task, peer.home.data).test
    if examples.targets.is_floating_point():
        with blame(task, "model"):
            outputs = forward(model, examples.inputs)
        with blame(task, "metrics"):
            return Measured(peer.name, (), task.metrics(outputs, examples.targets), len(examples))
    measured = evaluate(task, model, examples)
    return Measured(peer.name, _class_names(task, len(measured.confusion)), measured, measured.n)


def _class_names(task: Task, count: int) -> tuple[str, ...]:
    return task.classes if len(task.classes) == count else tuple(map(str, range(count)))


def render_evaluation(measured: Measured) -> Group:
    """Return the figures and the confusion matrix for a terminal."""
    values = measured.evaluation
    title = f"{measured.member}'s model on {measured.examples} examples that nobody trained on:"
    if not isinstance(values, Evaluation):
        return Group(Text(title), Text("  ".join(f"{name} {value:.4g}" for name, value in values.items())))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for name in measured.classes:
        table.add_column(name, justify="right")
    for name, row in zip(measured.classes, values.confusion, strict=True):
        table.add_row(name, *(str(count) if count else "·" for count in row))
    head = (
        title,
        f"accuracy {values.accuracy:.4f}  AUC {values.auc:.4f}  KS {values.ks:.4f}",
        "",
        "confusion matrix, true class in rows, predicted in columns:",
    )
    return Group(*map(Text, head), table)


def predict_run(path: Path, data: Path, member: str | None) -> str:
    """Classify the rows of a file with a run's model.

    Returns:
        CSV: a row for each example, with the label and each class's probability; or the number that the model gives.

    Raises:
        InvalidConfig: there is no such run or model, or the file does not fit the task.
    """
    _, _, task, model = _load(path, member)
    with blame(task, "read_inputs"):
        inputs = task.read_inputs(data)
    with blame(task, "model"):
        gives_numbers = forward(model, inputs[:1]).ndim == 1
    if gives_numbers:
        frame = pd.DataFrame({"prediction": forward(model, inputs).numpy()})
    else:
        labels, probabilities = predict(task, model, inputs)
        names = np.asarray(_class_names(task, probabilities.shape[1]))
        frame = pd.DataFrame(probabilities, columns=[f"p({name})" for name in names])
        frame.insert(0, "label", names[labels])
    text = io.StringIO()
    frame.to_csv(text, index=False, float_format="%.6g", lineterminator="\n")
    return text.getvalue()


def export_run(path: Path, output: Path, member: str | None) -> tuple[str, bool]:
    """Write a run's model as safetensors.

    Returns:
        Whose model, and whether it is within the charter's tolerance of the others.

    Raises:
        InvalidConfig: there is no such run or model, or the file cannot be written.
    """
    run, peer, _, model = _load(path, member)
    metadata = {
        "charter": run.charter.hash().hex(),
        "task": run.charter.task.source,
        "member": peer.name,
        "rounds": str(peer.outcome.rounds),
    }
    save_model(output, model, metadata)
    return peer.name, peer.outcome.agreed
