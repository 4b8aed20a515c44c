import io

import pytest
from rich.console import Console

from p2pfl.core.trace import (
    Entry,
    Evaluated,
    LinkChanged,
    Note,
    PeerFinished,
    PeerStarted,
    Refused,
    RoundEnded,
    State,
    StateChanged,
    decode_entry,
    encode_entry,
)
from p2pfl.node.live import (
    QUIET_SECONDS,
    UNMASKED,
    LiveView,
    PeerView,
    fold,
    main_metric,
    peers_table,
    progress_line,
    remark,
    size_text,
)

NAMES = ("peer-0", "peer-1", "peer-2")


def entry(event, at=100.0, received=0, sent=0):
    """An entry as a reader of a trace gets it: through its line."""
    return decode_entry(encode_entry(Entry(at, received, sent, event)))


def round_ended(number, loss=0.5, absent=(), settling=False):
    heard = tuple(name for name in NAMES[1:] if name not in absent)
    return RoundEnded(number, 0.1, heard, dict.fromkeys(absent, "no link"), None if settling else loss, 0.0, settling)


def folded(*events, name="peer-0"):
    view = PeerView(name)
    for event in events:
        view = fold(view, entry(event))
    return view


STARTED = PeerStarted("peer-0", "id", "00", NAMES[1:], 10, 20)


def run_of(peer, rounds):
    """All entries of a peer that trains `rounds` rounds and settles in one."""
    yield entry(PeerStarted(peer, "id", "00", NAMES[1:], 10, 20))
    yield entry(StateChanged(State.TRAINING, 0))
    for number in range(rounds):
        yield entry(Evaluated(number, {"loss": 1.0, "accuracy": number / rounds}))
        yield entry(round_ended(number), sent=1000 * (number + 1))
    yield entry(StateChanged(State.SETTLING, rounds))
    yield entry(round_ended(rounds, settling=True))
    yield entry(StateChanged(State.DONE, rounds + 1))
    yield entry(PeerFinished("done", rounds + 1, agreed=True))


def printed(updates, rounds, names=NAMES):
    console = Console(file=io.StringIO(), width=80)
    with LiveView(names, rounds, console, "runs/one") as view:
        for new in updates:
            view.update(new)
    return console.file.getvalue().splitlines()


def shown(table, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_a_round_counts_and_keeps_the_last_loss_while_settling():
    view = folded(STARTED, round_ended(0, 0.7), round_ended(1, 0.6), round_ended(2, settling=True))
    assert (view.rounds, view.settling, view.loss) == (3, 1, 0.6)
    assert (view.heard, view.absent) == (2, ())


def test_absent_neighbors_are_named_until_they_are_heard_again():
    view = folded(STARTED, round_ended(0, absent=("peer-2",)))
    assert (view.heard, view.absent) == (1, (("peer-2", ""),))
    assert fold(view, entry(round_ended(1))).absent == ()


def test_a_masked_sum_tells_who_was_lost_where_how_far_off_this_peer_was_and_only_the_group_s_loss():
    lost = {"peer-2": "upload: nothing came; unreachable"}
    record = RoundEnded(0, 0.1, ("peer-1",), lost, 0.5, 0.0, False, "full", group_loss=0.75, distance=0.0625)
    view = folded(STARTED, record)
    assert view.absent == (("peer-2", "upload"),)
    text = shown(peers_table([view], 5, 0.0, 5))
    assert "1/2 without peer-2 (upload)" in text
    assert "0.7500" in text
    assert "0.06" in text
    assert "absent: peer-2 (upload)" in progress_line([view], 5)
    several = shown(peers_table([view, folded(STARTED, name="peer-1")], 5, 0.0, 5))
    assert "apart" in several
    assert "group" not in several


def test_traffic_and_time_are_the_latest():
    view = fold(folded(STARTED), entry(Note("x"), at=7.5, received=3, sent=4))
    assert (view.at, view.bytes_in, view.bytes_out) == (7.5, 3, 4)


def test_a_second_start_begins_anew():
    view = folded(STARTED, round_ended(5), PeerFinished("failed", 6, agreed=False), STARTED)
    assert (view.rounds, view.state, view.finished) == (0, State.STARTING, None)


@pytest.mark.parametrize(
    ("outcome", "state"), [("done", State.DONE), ("stopped", State.DONE), ("failed", State.FAILED)]
)
def test_the_end_sets_the_state(outcome, state):
    view = folded(STARTED, PeerFinished(outcome, 3, agreed=False, reason="why"))
    assert view.state is state


def test_a_state_that_was_read_from_a_trace_is_a_state():
    assert folded(StateChanged(State.LINKING, 0)).state is State.LINKING


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"loss": 1.0, "auc": 0.7, "accuracy": 0.5}, ("accuracy", 0.5)),
        ({"loss": 1.0, "auc": 0.7, "f1": 0.5}, ("auc", 0.7)),
        ({"loss": 1.0}, ("loss", 1.0)),
        ({}, None),
    ],
)
def test_main_metric(metrics, expected):
    assert main_metric(metrics) == expected


def test_remarks_are_notes_refusals_and_links_lost_before_the_end():
    training, leaving = PeerView("peer-0", State.TRAINING), PeerView("peer-0", State.LEAVING)
    lost = entry(LinkChanged("peer-1", up=False, reason="reset"))
    assert remark(training, lost) == "lost the link to peer-1: reset"
    assert remark(leaving, lost) is None
    assert remark(training, entry(LinkChanged("peer-1", up=True))) == "linked to peer-1 again"
    assert remark(PeerView("peer-0", State.LINKING), entry(LinkChanged("peer-1", up=True))) is None
    assert remark(training, entry(Refused("peer-1", "NaN"))) == "refused peer-1: NaN"
    assert remark(training, entry(round_ended(0))) is None


def test_what_a_remote_says_cannot_steer_the_terminal():
    line = remark(PeerView("peer-0"), entry(Refused("peer-1", "\x1b[2J[red]\nsecond")))
    assert line is not None
    assert "\x1b" not in line
    assert "\n" not in line
    assert "[red]" in "".join(printed([{"peer-0": [entry(Refused("peer-1", "[red]x[/red]"))]}], 10))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_600, "100 kB"), (6_684_400, "6.7 MB"), (3e13, "30.0 TB")],
)
def test_size_text(count, text):
    assert size_text(count) == text


def test_plain_lines_say_first_that_nothing_is_masked_and_name_peers_that_do_the_same_together():
    lines = printed([{name: list(run_of(name, 20)) for name in NAMES}], 20)
    assert lines == [
        f"{UNMASKED} (runs/one)",
        "round 20 of 20 + 1 settling, loss 0.5000, accuracy 0.950 (0.950 to 0.950), 0 B sent",
        "all 3 peers: training",
        "all 3 peers: settling from round 20",
        "all 3 peers: done after 21 rounds, models agree",
    ]


def test_plain_progress_comes_at_most_every_tenth_of_the_rounds():
    entries = {name: list(run_of(name, 20)) for name in NAMES}
    updates = [{name: [entries[name][number]] for name in NAMES} for number in range(len(entries["peer-0"]))]
    progress = [line for line in printed(updates, 20) if line.startswith("round ")]
    assert len(progress) == 10
    assert progress[0].startswith("round 2 of 20, loss 0.5000, accuracy 0.050")
    assert progress[0].endswith("6.0 kB sent")


def test_plain_progress_goes_on_without_a_peer_that_is_silent():
    views = [PeerView(name, rounds=50, metric=("accuracy", 0.9)) for name in NAMES[:2]]
    line = progress_line([*views, PeerView("peer-2", rounds=3, metric=("accuracy", 0.1))], 100)
    assert "accuracy 0.900 (0.900 to 0.900), far behind: peer-2" in line


def test_a_failure_is_told_with_its_reason():
    lines = printed([{"peer-1": [entry(PeerFinished("failed", 4, agreed=False, reason="no neighbor answered"))]}], 10)
    assert lines[1:] == ["peer-1: failed after 4 rounds: no neighbor answered"]


def test_the_table_shows_rounds_neighbors_and_who_is_quiet():
    view = folded(STARTED, StateChanged(State.TRAINING, 0), round_ended(0, 0.25, absent=("peer-2",)))
    text = shown(peers_table([view], 10, now=100.0 + QUIET_SECONDS + 5, most=5))
    assert "1/10" in text
    assert "0.2500" in text
    assert "1/2 without peer-2" in text
    assert "quiet 0:15" in text


def test_where_rows_are_few_those_in_trouble_are_shown_and_the_others_counted():
    views = [PeerView(f"peer-{number}", State.TRAINING) for number in range(50)]
    views[40] = PeerView("peer-40", State.FAILED)
    text = shown(peers_table(views, 10, now=0.0, most=4))
    assert "peer-40" in text
    assert "46 training" in text
    assert len(text.splitlines()) == 2 + 4 + 1


def test_a_terminal_gets_one_table_that_stays():
    console = Console(file=io.StringIO(), width=100, height=30, force_terminal=True, color_system=None)
    with LiveView(NAMES, 5, console, "runs/one") as view:
        view.update({name: list(run_of(name, 5)) for name in NAMES})
        view.update({"peer-0": [entry(Refused("peer-9", "is a stranger"))]})
    last = console.file.getvalue().rpartition("UNMASKED")[2]
    assert "runs/one" in last
    assert last.count("5/5 +1") == 3
    assert "peer-0: refused peer-9: is a stranger" in last
