"""Eight peers over a network that loses, delays and limits what they send; one is cut off, one is killed."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2pfl.core.trace import PeerFinished, PeerStarted, RoundEnded
from p2pfl.node.launcher import create_federation
from p2pfl.node.tracefile import TRACE_FILE, read_trace
from tests.network.lab import PEERS, address

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 35
POLL_SECONDS = 0.1
DEADLINES = {"start": 120.0, "round": 5.0, "heartbeat": 1.0, "silence": 4.0}
CUT, KILLED = 2, 5


class Laboratory:
    """The lab's process; see `tests.network.lab`."""

    def __init__(self, homes: list[str]) -> None:
        command = [sys.executable, "-m", "tests.network.lab", *homes]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.cables = self._answer()

    def do(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        assert self._answer() == f"{command} done"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    command = [sys.executable, "-m", "tests.network.lab", "--missing"]
    reason = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def laboratory() -> Iterator[Callable[[list[str]], Laboratory]]:
    made: list[Laboratory] = []

    def make(homes: list[str]) -> Laboratory:
        made.append(Laboratory(homes))
        return made[-1]

    yield make
    for each in made:
        each.end()


class Traces:
    """What the peers' traces say by now."""

    def __init__(self, homes: list[Path]) -> None:
        self._files = [home / TRACE_FILE for home in homes]

    def events(self, number: int) -> list[object]:
        file = self._files[number]
        return [entry.event for entry in read_trace(file)] if file.exists() else []

    def records(self, number: int) -> list[RoundEnded]:
        """The records of a peer's latest life."""
        events = self.events(number)
        starts = [place for place, event in enumerate(events) if isinstance(event, PeerStarted)]
        return [event for event in events[starts[-1] if starts else 0 :] if isinstance(event, RoundEnded)]

    def reached(self, number: int) -> int:
        return max((record.round + 1 for record in self.records(number)), default=0)

    def full_after(self, number: int, round: int) -> bool:
        return any(record.outcome == "full" and record.round > round for record in self.records(number))


def wait_for(what: Callable[[], bool]) -> None:
    while not what():
        time.sleep(POLL_SECONDS)


def others_reach(traces: Traces, round: int, without: int) -> Callable[[], bool]:
    return lambda: all(traces.reached(number) >= round for number in range(PEERS) if number != without)


def test_peers_that_were_cut_off_or_killed_are_in_the_last_round(
    tmp_path: Path, laboratory: Callable[[list[str]], Laboratory]
) -> None:
    data = [{"partition": "dirichlet", "alpha": 0.5, "peers": PEERS, "seed": 0, "index": i} for i in range(PEERS)]
    places = [f"/ip4/{address(number)}/tcp/4001" for number in range(PEERS)]
    terms = {
        "training": {"rounds": ROUNDS},
        "averaging": {"topology": "groups", "group_size": 4},
        "deadlines": DEADLINES,
    }
    run = tmp_path / "run"
    run.mkdir()
    federation = create_federation(run, "digits", terms, data, 0, addresses=[(place, place) for place in places])
    traces = Traces([home.run_path for home in federation.homes])
    lab = laboratory([str(home.path) for home in federation.homes])
    assert lab.cables in ("cables: netem", "cables: tun")
    wait_for(others_reach(traces, 2, without=-1))

    lab.do(f"cut {CUT}")
    began = max(map(traces.reached, range(PEERS)))
    wait_for(others_reach(traces, began + 3, without=CUT))
    lab.do(f"mend {CUT}")
    left = max(map(traces.reached, range(PEERS)))
    wait_for(lambda: traces.full_after(CUT, left))

    lab.do(f"kill {KILLED}")
    began = max(map(traces.reached, range(PEERS)))
    wait_for(others_reach(traces, began + 3, without=KILLED))
    lab.do(f"start {KILLED}")
    wait_for(lambda: all(isinstance(traces.events(number)[-1], PeerFinished) for number in range(PEERS)))

    for number in range(PEERS):
        finished = traces.events(number)[-1]
        assert isinstance(finished, PeerFinished)
        assert finished.outcome == "done"
        assert traces.records(number)[-1].outcome in ("full", "late")
    started = [event for event in traces.events(KILLED) if isinstance(event, PeerStarted)]
    assert [event.resumed_at > 0 for event in started] == [False, True]
    for number in (CUT, KILLED):
        last = traces.records(number)[-1]
        assert last.round >= ROUNDS
        assert last.outcome == "full"
        for other in range(PEERS):
            if other != number:
                assert f"peer-{number}" in traces.records(other)[-1].heard
