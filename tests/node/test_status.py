"""Where a member stands: what a running peer keeps of itself, and what a folder says without one."""

import json
from pathlib import Path

import pytest
import torch
import trio
import trio.testing

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.trace import (
    Entry,
    Evaluated,
    Event,
    LinkChanged,
    MemberChanged,
    PeerFinished,
    PeerStarted,
    RoundEnded,
    State,
    StateChanged,
    encode_entry,
)
from p2pfl.learning.vector import save_model
from p2pfl.node.federation import FINISHED_FILE, MODEL_FILE, save_charter
from p2pfl.node.status import (
    MOST_BYTES,
    STATUS_FILE,
    LastRound,
    Progress,
    StatusWriter,
    fold,
    free_bytes,
    read_progress,
    status_of,
)
from p2pfl.node.store import exclusive, is_held
from p2pfl.node.tracefile import TRACE_FILE
from p2pfl.simulation.status_text import describe_status
from tests.node.homes import OWN_TASK, Folders, make_folders

ENDED = RoundEnded(
    round=4,
    seconds=1.5,
    heard=("bee",),
    absent={"cat.example": "upload: silent"},
    loss=0.25,
    spread=0.0,
    settling=False,
    outcome="full",
    group_loss=0.5,
)


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("status") / "f", OWN_TASK)


@pytest.fixture
def own(_made: Folders, tmp_path: Path) -> Folders:
    return _made.copy_to(tmp_path / "f")


def started(own: Folders) -> PeerStarted:
    return PeerStarted("ant", "id", own.charter().hash().hex(), ("bee",), 8, 4, resumed_at=2)


def folded(*events: Event) -> Progress:
    progress = Progress(written_at=0.0, started_at=0.0)
    for event in events:
        progress = fold(progress, event)
    return progress


def written(own: Folders, *events: Event, at: float = 0.0) -> None:
    path = own.homes["ant"].run_path
    path.mkdir(exist_ok=True)
    writer = StatusWriter(path / STATUS_FILE, lambda: at)
    for event in (started(own), *events):
        writer.note(event)
    writer.write()


def test_what_happens_to_a_peer_is_kept() -> None:
    progress = folded(
        StateChanged(State.TRAINING, 4),
        ENDED,
        Evaluated(5, {"accuracy": 0.75}),
        MemberChanged("bee", "late"),
        MemberChanged("cat.example", "unreachable"),
    )
    assert (progress.state, progress.rounds, progress.metrics) == ("training", 5, {"accuracy": 0.75})
    assert progress.members == {"bee": "late", "cat.example": "away"}
    assert progress.last == LastRound(
        round=4, outcome="full", heard=1, absent=("cat.example",), loss=0.25, seconds=1.5
    )  # fmt: skip
    failed = fold(progress, PeerFinished("failed", 5, agreed=False, reason="no disk"))
    assert (failed.state, failed.outcome, failed.reason) == ("failed", "failed", "no disk")


def test_a_link_says_whether_a_member_is_there_and_who_left_stays_gone() -> None:
    assert folded(LinkChanged("bee", True)).members == {"bee": "reachable"}
    assert folded(LinkChanged("bee", True), LinkChanged("bee", False, "reset")).members == {"bee": "away"}
    assert folded(MemberChanged("bee", "left"), LinkChanged("bee", False)).members == {"bee": "left"}


def test_the_file_is_written_when_there_is_news_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / STATUS_FILE

    async def run() -> list[float]:
        stamps = []
        writer = StatusWriter(path, trio.current_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.keep)
            for pause, event in ((0.5, ENDED), (1.0, None), (30.0, None)):
                await trio.sleep(pause)
                if event is not None:
                    writer.note(event)
                found = read_progress(path)
                assert found is not None
                stamps.append(found.written_at)
            nursery.cancel_scope.cancel()
        return stamps

    began, news, later = trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    assert news - began == pytest.approx(1.0), "within a second"
    assert later - news > 10, "now and then without news, so that a peer that hangs is noticed"
    assert path.stat().st_mode & 0o777 == 0o600
    found = read_progress(path)
    assert found is not None
    assert found.last is not None
    assert found.last.round == 4


def test_a_file_that_cannot_be_written_stops_no_peer(tmp_path: Path) -> None:
    StatusWriter(tmp_path / "gone" / STATUS_FILE).write()
    assert read_progress(tmp_path / "gone" / STATUS_FILE) is None


def test_metrics_that_are_no_numbers_are_read_back(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path / STATUS_FILE)
    writer.note(Evaluated(1, {"auc": float("nan")}))
    writer.write()
    found = read_progress(tmp_path / STATUS_FILE)
    assert found is not None
    assert found.metrics == {"auc": None}


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not JSON"), ("[1]", "status.json: "), ('{"state": 5}', "missing"), (" " * (MOST_BYTES + 1), "of over")],
    ids=["cut", "list", "other", "huge"],
)
def test_a_file_that_is_something_else_is_told(own: Folders, content: str, words: str) -> None:
    home = own.homes["ant"]
    home.run_path.mkdir()
    (home.run_path / STATUS_FILE).write_text(content)
    with pytest.raises(InvalidConfig, match=words):
        read_progress(home.run_path / STATUS_FILE)
    found = status_of(home)
    assert found.peer is None
    assert words in found.charter_fault
    assert any(words in line for line in describe_status(found, 0.0))


def test_a_folder_says_whose_turn_it_is(own: Folders) -> None:
    home, charter = own.homes["ant"], own.charter()
    own.charter_path.unlink()
    assert status_of(home).next.startswith("p2pfl charter join CHARTER")
    draft = charter.model_copy(update={"signatures": {}, "salts": {}})
    save_charter(own.charter_path, draft.model_copy(update={"members": charter.members[1:]}))
    assert status_of(home).next.startswith("p2pfl charter join ")
    save_charter(own.charter_path, draft.model_copy(update={"members": charter.members[:1]}))
    assert "the other members run p2pfl charter join" in status_of(home).next
    without = {name: text for name, text in charter.signatures.items() if name != "ant"}
    save_charter(own.charter_path, charter.model_copy(update={"signatures": without}))
    assert status_of(home).next.startswith("p2pfl charter sign ")
    save_charter(own.charter_path, charter.model_copy(update={"signatures": {"ant": charter.signatures["ant"]}}))
    found = status_of(home)
    assert found.next.startswith("wait until bee, cat.example signed")
    assert found.charter is not None
    assert (found.charter.signed, found.charter.unsigned) == (("ant",), ("bee", "cat.example"))
    save_charter(own.charter_path, charter)
    assert status_of(home).next == f"p2pfl doctor {home.path}, then p2pfl peer --config {home.path}"
    home.run_path.mkdir()
    (home.run_path / FINISHED_FILE).write_text(charter.hash().hex() + "\n")
    assert status_of(home).next == f"p2pfl evaluate {home.path}"


def test_of_a_stopped_peer_the_folder_says_how_far_it_came_and_nothing_of_the_others(own: Folders) -> None:
    home = own.homes["ant"]
    written(own, StateChanged(State.TRAINING, 4), MemberChanged("bee", "here"), ENDED, at=100.0)
    save_model(home.run_path / MODEL_FILE, torch.nn.Linear(3, 2), {"rounds": "5"})
    found = status_of(home, lambda path: 5_000_000)
    assert not found.running
    assert found.members == {"bee": "unknown", "cat.example": "unknown"}
    assert found.model is not None
    assert (found.model.rounds, found.disk.free_bytes) == (5, 5_000_000)
    assert found.disk.run_bytes > found.model.bytes
    lines = list(describe_status(found, 165.0))
    seen = "gone without a word, last seen training; said 1:05 ago"
    assert f"round     2 of 2 ended and 3 that only averaged; {seen}" in lines
    assert "record    round 4: full, with 1 others, without cat.example, 1.5 s, own loss 0.25" in lines
    assert "members   unknown: bee, cat.example (the peer does not run)" in lines
    assert any(line.startswith("model ") and line.endswith("after 5 rounds") for line in lines)
    assert not any(line.startswith("trace ") for line in lines)


def test_a_trace_that_has_forgotten_its_first_rounds_says_so(own: Folders) -> None:
    home = own.homes["ant"]
    written(own, ENDED)
    (home.run_path / TRACE_FILE).write_text(encode_entry(Entry(1.0, 0, 0, ENDED)) + "\n")
    found = status_of(home)
    assert found.first_round == found.to_json()["first_round"] == 4
    lost = "earlier rounds are no longer in it (logging.trace_bytes), nor in p2pfl report"
    assert f"trace     from round 4 on; {lost}" in list(describe_status(found, 0.0))


def test_of_a_running_peer_it_says_who_is_there(own: Folders) -> None:
    home = own.homes["ant"]
    written(own, MemberChanged("bee", "here"))
    with exclusive(home.run_path, "held"):
        found = status_of(home)
    assert found.running
    assert found.members == {"bee": "reachable", "cat.example": "unknown"}
    assert found.next == "nothing to do: the peer runs"
    assert "members   reachable: bee" in list(describe_status(found, 0.0))


def test_what_a_peer_said_under_another_charter_does_not_count(own: Folders) -> None:
    written(own, ENDED)
    charter = own.charter()
    save_charter(own.charter_path, charter.model_copy(update={"version": 2}))
    assert status_of(own.homes["ant"]).peer is None


def test_other_members_figures_are_nowhere_in_it(own: Folders) -> None:
    written(own, ENDED, MemberChanged("bee", "here"))
    told = json.dumps(status_of(own.homes["ant"]).to_json())
    assert "0.5" not in told, "the group's loss"
    assert "upload: silent" not in told


def test_who_holds_a_folder_is_seen_without_taking_it(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "gone")
    with exclusive(tmp_path, "held"):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    with exclusive(tmp_path, "held"):
        assert is_held(tmp_path)


def test_the_disk_of_a_folder_that_is_not_there_yet_is_the_one_that_will_hold_it(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0
