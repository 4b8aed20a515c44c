"""The task `tabular`: the scaling agreed on in a masked round 0, and models that are worth the round."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from p2pfl.core.charter import (
    AveragingTerms,
    Charter,
    ColumnTerms,
    Deadlines,
    Member,
    ModelTerms,
    TableTerms,
    TargetTerms,
    TaskTerms,
    TrainingTerms,
)
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.machine import Vector
from p2pfl.core.settings import validate
from p2pfl.core.statements import MAX_GROUP
from p2pfl.crypto.suite import suite
from p2pfl.gossip.group_machine import GroupMachine, GroupPlan
from p2pfl.gossip.grouping import scaling_faults
from p2pfl.gossip.secure_sum import MaskTerms
from p2pfl.learning.baselines import Training, alone, central
from p2pfl.learning.credit import TABLE
from p2pfl.learning.evaluation import evaluate
from p2pfl.learning.table import check_table
from p2pfl.learning.task import Data, Examples, Task, load_task, make_model, read_data
from p2pfl.learning.tasks.tabular import LEAST_DEVIATION
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import assign, initial, layout, load_model, save_model
from p2pfl.simulation.credit import write_credits
from p2pfl.simulation.faults import Schedule
from p2pfl.simulation.simnet import Network, PeerSpec, SimulatedKeyring

CLIP = 64.0
PEERS = 4
NUMBERS = ("age", "amount", "income", "late_payments", "months")
RESOLUTION = PEERS * CLIP / 2**31
"""The fixed point of a sum, see `AveragingTerms.clip`."""


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("tabular", Path(), table=TABLE).task


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory, task: Task) -> list[Data]:
    """Four banks' data: customers of different kinds, 300 rows each."""
    files = write_credits(tmp_path_factory.mktemp("credits"), PEERS, 0.5, seed=3)
    return [read_data(task, {"path": str(path), "test_path": str(files.test)}) for path in files.banks]


@pytest.fixture(scope="module")
def unequal(shares: list[Data]) -> list[Data]:
    """Give the same, but of 30, 90, 160 and 300 rows."""
    counts = (30, 90, 160, 300)
    return [
        Data(Examples(share.train.inputs[:rows], share.train.targets[:rows]), share.test)
        for share, rows in zip(shares, counts, strict=True)
    ]


def trainer(task: Task, data: Data, seed: int = 0, clip_norm: float = 0.0) -> Trainer:
    return Trainer(task, data, local_steps=2, batch_size=32, clip_norm=clip_norm, seed=seed)


def scaling_of(task: Task, vector: Vector) -> Any:
    """Return the model's first layer; its class is that of the task's file, which no import gives."""
    model = make_model(task)
    assign(model, vector)
    return model.get_submodule("scaling")


def moments(data: Data) -> np.ndarray:
    """Return weight, sum and sum of squares of each number by the rows, float64 [3, numbers], in another way."""
    inputs = data.train.inputs.double().numpy()
    values, present = inputs[:, : len(NUMBERS)].copy(), np.ones((len(inputs), len(NUMBERS)))
    present[:, NUMBERS.index("income")] -= inputs[:, len(NUMBERS)]  # the only one that may be missing
    return np.stack([present.mean(0), (values * present).mean(0), (values**2 * present).mean(0)])


def standards(of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weight, total, squares = of
    return total / weight, np.sqrt(np.maximum(squares / weight - (total / weight) ** 2, LEAST_DEVIATION**2))


# The simulated federation


def charter(task: Task, rounds: int, group_size: int) -> Charter:
    members = tuple(Member(name=f"m{n}", peer_id=f"peer-{n}", addresses=("/memory",)) for n in range(PEERS))
    return Charter(
        name="banks",
        task=TaskTerms(source="tabular", sha256="0" * 64, table=TABLE),
        model=ModelTerms(file="m.safetensors", sha256="0" * 64, parameters=layout(make_model(task)).size),
        training=TrainingTerms(rounds=rounds),
        averaging=AveragingTerms(group_size=group_size, colluders=0, clip=CLIP),
        deadlines=Deadlines(start=10.0, round=8.0, heartbeat=2.0, silence=6.0),
        members=members,
    )


Train = Callable[[PeerId, Round, Vector, float], tuple[Vector, float, int]]


def train_with(own: Trainer, pauses: dict[int, int]) -> Train:
    def train(peer: PeerId, round: Round, vector: Vector, seconds: float, mixed: bool) -> tuple[Vector, float, int]:
        del peer, seconds
        trained = own.train(vector, round)
        return trained.vector, trained.loss, trained.steps + pauses.get(round, 0)

    return train


def run(task: Task, shares: list[Data], rounds: int, *, slow: int | None = None) -> Network:
    """Run the federation over masks, each peer with its own trainer; `slow` takes 13 s, longer than others wait."""
    terms = charter(task, rounds, group_size=3)
    start = initial(task, 0)
    start.flags.writeable = False
    specs = []
    for place, peer in enumerate(terms.roster()):
        plan = GroupPlan.for_peer(terms, peer)
        keyring = SimulatedKeyring(b"tabular", place, PEERS)
        entropy = np.random.RandomState(place)
        masks = MaskTerms(suite("aes"), 32, CLIP, entropy.bytes)
        build = partial(_machine, plan, keyring, start, masks)
        train = train_with(trainer(task, shares[place], seed=place), {0: 1300} if place == slow else {})
        others = tuple(other for other in terms.roster() if other != peer)
        specs.append(PeerSpec(peer, f"m{place}", build, train, others, 0.01, keyring.sign))
    network = Network(specs, Schedule(), 1, charter=terms.hash())
    network.run(400.0)
    assert all(peer.error is None for peer in network.peers)
    return network


def _machine(plan: GroupPlan, keyring: SimulatedKeyring, start: Vector, masks: MaskTerms, disk: object) -> GroupMachine:
    del disk
    return GroupMachine(plan, keyring, start, None, masks)


def adopted(network: Network, place: int) -> dict[int, Vector]:
    return dict(network.peers[place].adopted)


def test_after_a_masked_round_0_all_have_the_whole_federations_moments(task: Task, unequal: list[Data]) -> None:
    """Members count alike, as in every sum: also the one with 30 rows."""
    network = run(task, unequal, rounds=4)
    first = [adopted(network, place)[0] for place in range(PEERS)]
    assert all(np.array_equal(each, first[0]) for each in first)
    pooled = np.mean([moments(share) for share in unequal], axis=0)
    scaling = scaling_of(task, first[0])
    found = np.stack([scaling.weight.numpy(), scaling.mean.numpy(), scaling.square.numpy()])
    np.testing.assert_allclose(found, pooled, rtol=0, atol=RESOLUTION + 1e-7)
    for mine, theirs in zip(scaling.standards(), standards(pooled), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-3, atol=1e-6)
    # Nothing but the buffers moved, and afterwards nothing moves them.
    buffers = 1 + 3 * len(NUMBERS)
    np.testing.assert_allclose(first[0][buffers:], initial(task, 0)[buffers:], rtol=0, atol=RESOLUTION + 1e-7)
    for place in range(PEERS):
        for vector in adopted(network, place).values():
            np.testing.assert_allclose(vector[:buffers], first[0][:buffers], rtol=0, atol=1e-5)


def test_whoever_is_too_late_for_round_0_still_has_and_spreads_sound_moments(task: Task, unequal: list[Data]) -> None:
    network = run(task, unequal, rounds=12, slow=3)
    ends = [adopted(network, place) for place in range(PEERS)]
    first = ends[0][0]
    three = np.mean([moments(share) for share in unequal[:3]], axis=0)
    np.testing.assert_allclose(scaling_of(task, first).mean.numpy(), three[1], rtol=0, atol=RESOLUTION + 1e-7)
    last = [end[max(end)] for end in ends]
    assert all(np.array_equal(each, last[0]) for each in last)
    mean, deviation = scaling_of(task, last[0]).standards()
    means, deviations = zip(*(standards(moments(share)) for share in unequal), strict=True)
    assert (np.min(means, 0) - 1e-5 <= mean.numpy()).all()
    assert (mean.numpy() <= np.max(means, 0) + 1e-5).all()
    assert (deviation.numpy() <= 2 * np.max(deviations, 0) + np.ptp(means, 0)).all()
    assert not np.allclose(mean.numpy(), standards(three)[0], atol=1e-4)  # the late one's rows count in the end


def test_all_are_in_one_group_before_and_after_training_only(task: Task) -> None:
    terms = charter(task, rounds=3, group_size=3)
    values = terms.model_dump()
    values["members"] = [
        {"name": f"m{n}", "peer_id": f"peer-{n}", "addresses": ("/memory",)} for n in range(9)
    ]  # fmt: skip
    wide = validate(Charter, values, "charter")
    plan = GroupPlan.for_peer(wide, wide.roster()[0])
    assert [len(plan.groups(Round(number))) for number in range(4)] == [1, 3, 3, 1]
    assert scaling_faults(MAX_GROUP, wide.task.whole_rounds) == []
    (line,) = scaling_faults(MAX_GROUP + 1, wide.task.whole_rounds)
    assert "set scaling to charter" in line
    assert scaling_faults(1000, 0) == []


def test_a_fixed_overlay_has_no_session_0(task: Task) -> None:
    values = charter(task, 3, 3).model_dump()
    values["averaging"] |= {"topology": "ring", "masks": "off"}
    with pytest.raises(
        InvalidConfig, match="topology is ring, where no round has all members in one sum; set topology"
    ):
        validate(Charter, values, "charter")
    for column in values["task"]["table"]["columns"].values():
        if column["kind"] == "number":
            column |= {"mean": 1.0, "deviation": 1.0}
    values["task"]["table"]["scaling"] = "charter"
    assert validate(Charter, values, "charter").task.whole_rounds == 0


def test_the_hash_covers_the_table_and_not_the_order_of_its_columns(task: Task) -> None:
    terms = charter(task, 3, 3)
    values = terms.model_dump()
    columns = values["task"]["table"]["columns"]
    values["task"]["table"]["columns"] = dict(reversed(columns.items()))
    assert validate(Charter, values, "charter").hash() == terms.hash()
    columns["age"] |= {"high": 101.0}
    assert validate(Charter, values, "charter").hash() != terms.hash()
    without = terms.model_copy(update={"task": TaskTerms(source="digits", sha256="0" * 64)})
    assert without.terms()["task"] == {"source": "digits", "sha256": "0" * 64}


# A peer's own rounds


def test_measuring_makes_no_step_and_is_not_clipped(task: Task, shares: list[Data]) -> None:
    own = trainer(task, shares[0], clip_norm=1e-3)
    first = own.train(initial(task, 0), 0)
    assert (first.steps, first.clipped) == (0, False)
    assert np.isfinite(first.loss)
    np.testing.assert_allclose(scaling_of(task, first.vector).mean.numpy(), moments(shares[0])[1], atol=1e-6)
    second = own.train(first.vector, 1)
    assert (second.steps, second.clipped) == (2, True)
    assert np.array_equal(second.vector[:16], first.vector[:16])


def test_a_peer_that_catches_up_takes_the_moments_as_they_are(task: Task, shares: list[Data]) -> None:
    common = trainer(task, shares[0]).train(initial(task, 0), 0).vector
    late = trainer(task, shares[1]).train(common, 7)
    assert late.steps == 2
    assert np.array_equal(late.vector[:16], common[:16])


def test_a_missing_number_is_the_mean_whatever_the_mean_is(task: Task, shares: list[Data]) -> None:
    scaling = scaling_of(task, trainer(task, shares[3]).train(initial(task, 0), 0).vector)
    inputs = shares[3].train.inputs
    scaled = scaling(inputs)
    missing = inputs[:, len(NUMBERS)] == 1
    place = NUMBERS.index("income")
    assert missing.any()
    assert (scaled[missing, place] == 0).all()
    present = scaled[~missing, place]
    assert abs(float(present.mean())) < 1e-3
    assert abs(float(present.std(correction=0)) - 1) < 1e-2
    assert torch.equal(scaled[:, len(NUMBERS) :], inputs[:, len(NUMBERS) :])


def test_a_number_without_spread_or_rows_is_no_division_by_zero() -> None:
    terms = TableTerms(
        target=TargetTerms(column="y", classes=("0", "1")),
        columns={
            "constant": ColumnTerms(kind="number", low=0, high=4),
            "nothing": ColumnTerms(kind="number", low=0, high=1, missing="zero"),
        },
    )
    task = load_task("tabular", Path(), table=terms).task
    model = make_model(task)
    inputs = torch.tensor([[0.5, 0.0, 1.0]] * 3)  # constant; nothing, and that it is missing
    scaling: Any = model.get_submodule("scaling")
    assert scaling.measure(inputs)
    assert scaling(inputs).tolist() == [[0.0, 0.0, 1.0]] * 3


def test_scaling_from_the_charter_needs_no_session(tmp_path: Path) -> None:
    columns = {"x": ColumnTerms(kind="number", low=0, high=10, mean=4.0, deviation=2.0)}
    terms = TableTerms(target=TargetTerms(column="y", classes=("0", "1")), columns=columns, scaling="charter")
    task = load_task("tabular", Path(), table=terms).task
    assert "scaling.mean" not in make_model(task).state_dict()
    (tmp_path / "a.csv").write_text("x,y\n" + "4,0\n8,1\n" * 10)
    data = read_data(task, {"path": str(tmp_path / "a.csv")})
    scaled = make_model(task).get_submodule("scaling")(data.train.inputs)
    np.testing.assert_allclose(np.unique(scaled.numpy()), [0.0, 2.0], atol=1e-6)
    assert trainer(task, data).train(initial(task, 0), 0).steps == 2


def test_held_out_rows_are_a_fifth_of_each_class_and_always_the_same(tmp_path: Path, task: Task) -> None:
    path = write_credits(tmp_path, PEERS, 100.0, seed=1).banks[0]
    first, again = (read_data(task, {"path": str(path)}) for _ in range(2))
    assert torch.equal(first.test.inputs, again.test.inputs)
    rates = [float(part.targets.double().mean()) for part in (first.train, first.test)]
    assert abs(rates[0] - rates[1]) < 0.02
    assert len(first.test) == pytest.approx(len(pd.read_csv(path)) / 5, abs=1)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "[data] has no path"),
        ({"path": 7}, "[data] has no path"),
        ({"path": "a.csv", "test_path": 1}, "[data] test_path is 1"),
        ({"path": "a.csv", "paht": 1}, "unknown key 'paht'"),
        ({"path": "gone.csv"}, "there is no file gone.csv"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(task: Task, settings: dict[str, object], line: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read_data(task, settings)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_with_faults_is_refused_with_the_first_and_their_number(tmp_path: Path, task: Task) -> None:
    path = write_credits(tmp_path, 2, 100.0, seed=1).banks[0]
    frame = pd.read_csv(path).drop(columns="age")
    frame.loc[4, "default"] = None
    frame.to_csv(path, index=False)
    with pytest.raises(InvalidConfig) as caught:
        read_data(task, {"path": str(path)})
    assert str(caught.value) == (
        f"{path}: there is no column 'age'; add it (and 1 more; `p2pfl data check CHARTER {path}` lists them)"
    )


def test_a_task_and_a_table_come_together() -> None:
    with pytest.raises(InvalidConfig, match="charter new --task tabular --data FILE"):
        make_model(load_task("tabular", Path()).task)
    with pytest.raises(InvalidConfig, match=r"Digits takes no table; remove task\.table"):
        load_task("digits", Path(), table=TABLE)


# What it is good for


def test_together_is_better_than_alone_and_close_to_central(task: Task, shares: list[Data]) -> None:
    """Over masks in the simulated network; chance is 0.5 for AUC and 0 for KS."""
    rounds = 30
    network = run(task, shares, rounds)
    last = adopted(network, 0)
    together = trainer(task, shares[0]).evaluate(last[max(last)])
    training = Training(2, 32)
    start = initial(task, 0)
    reference = central(task, shares, start, rounds, training)[-1]
    apart = [alone(task, share, start, rounds, training)[-1]["auc"] for share in shares]
    assert together["auc"] > 0.65
    assert together["ks"] > 0.2
    assert together["auc"] > np.mean(apart)
    assert abs(together["auc"] - reference["auc"]) < 0.03


def test_a_models_file_and_predictions_need_no_target(tmp_path: Path, task: Task, shares: list[Data]) -> None:
    own = trainer(task, shares[3])
    vector = own.train(own.train(initial(task, 0), 0).vector, 1).vector
    model = make_model(task)
    assign(model, vector)
    save_model(tmp_path / "m.safetensors", model, {})
    loaded = make_model(task)
    load_model(tmp_path / "m.safetensors", loaded)
    assert evaluate(task, loaded, shares[3].test).auc == pytest.approx(own.evaluate(vector)["auc"])
    files = write_credits(tmp_path / "data", 2, 100.0, seed=1)
    pd.read_csv(files.test).drop(columns="default").to_parquet(tmp_path / "inputs.parquet")
    assert torch.equal(
        task.read_inputs(tmp_path / "inputs.parquet"), torch.from_numpy(check_table(files.test, TABLE).inputs)
    )


def test_a_number_is_learned_in_its_own_unit(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    x = random.normal(50, 10, 400).clip(0, 100)
    pd.DataFrame({"x": x, "y": 3000 + 20 * x}).to_csv(tmp_path / "a.csv", index=False)
    columns = {"x": ColumnTerms(kind="number", low=0, high=100)}
    terms = TableTerms(target=TargetTerms(column="y", low=2000, high=6000), columns=columns, hidden=())
    task = load_task("tabular", Path(), table=terms).task
    data = read_data(task, {"path": str(tmp_path / "a.csv")})
    last = alone(task, data, initial(task, 0), 60, Training(2, 32))[-1]
    assert last["r2"] > 0.99
    assert last["rmse"] < 30
