"""Going on from a trained model: the charter's next version."""

import pytest
from typer.testing import CliRunner

from p2pfl.cli import app
from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import load_task, make_model
from p2pfl.learning.vector import flatten, load_model, save_model
from p2pfl.node.federation import (
    complete_draft,
    join_charter,
    load_charter,
    next_version,
    open_federation,
    open_home,
    save_charter,
    terms_faults,
)
from tests.node.homes import OWN_TASK, make_folders
from tests.simulation.conftest import ROUNDS, kill


def draw_up(run, *options):
    result = CliRunner().invoke(app, ["charter", "next", "next", "--config", str(run.home(1).path), *options])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_it_begins_with_the_members_model_and_all_join_again(run, tmp_path):
    said = draw_up(run)
    before, draft = load_charter(run.path / "charter.toml"), load_charter(tmp_path / "next/charter.toml")
    assert draft.version == before.version + 1 == 2
    assert draft.names() == before.names()
    assert (draft.training, draft.averaging, draft.task) == (before.training, before.averaging, before.task)
    assert draft.signatures == draft.salts == {}
    assert terms_faults(tmp_path / "next/charter.toml", draft) == []
    model, trained = (make_model(load_task("digits", run.path).task) for _ in range(2))
    load_model(tmp_path / "next" / draft.model.file, model)
    load_model(run.home(1).run_path / "model.safetensors", trained)
    assert (flatten(model) == flatten(trained)).all()
    assert "p2pfl charter join next/charter.toml" in said.replace("\n", " ")
    for number in range(3):
        draft = join_charter(draft, open_home(run.home(number).path).member(draft))
    salts = {member.name: member.salt_commitment for member in draft.members}
    assert all(salts[member.name] != member.salt_commitment for member in before.members)


def test_whoever_leaves_is_not_in_it_and_rounds_may_be_others(run, tmp_path):
    draw_up(run, "--without", "peer-2", "--rounds", "7")
    draft = load_charter(tmp_path / "next/charter.toml")
    assert draft.names() == ("peer-0", "peer-1")
    assert draft.training.rounds == 7 != ROUNDS


def test_what_cannot_be_drawn_up_is_told(run, tmp_path):
    with pytest.raises(InvalidConfig, match="peer-9 is not a member; there are peer-0, peer-1, peer-2"):
        draw_up(run, "--without", "peer-9")
    with pytest.raises(InvalidConfig, match=r"draft: training\.rounds: input should be greater"):
        draw_up(run, "--rounds", "-1")
    assert not (tmp_path / "next").exists()
    draw_up(run)
    with pytest.raises(InvalidConfig, match="exists already; name another folder"):
        draw_up(run)


def test_a_task_in_a_file_goes_along(tmp_path):
    made = make_folders(tmp_path / "before", OWN_TASK)
    known, folder = open_federation(made.charter_path), tmp_path / "next"
    draft = next_version(known.charter)
    folder.mkdir()
    save_model(folder / draft.model.file, known.task.task.model(), {})
    complete = complete_draft(folder, draft, known.task)
    save_charter(folder / "charter.toml", complete)
    assert complete.model.sha256 != draft.model.sha256
    assert terms_faults(folder / "charter.toml", complete) == []


def test_a_member_that_has_not_ended_has_no_model_to_begin_with(run, tmp_path):
    kill(run, 1)
    with pytest.raises(InvalidConfig, match="no finished model here: peer-1"):
        draw_up(run)
    assert not (tmp_path / "next/charter.toml").exists()
