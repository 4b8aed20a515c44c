"""The doctor names each of ten faults, and says what to do; members are visited over real libp2p on loopback."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tomlkit
import torch
import trio

from p2pfl.core.charter import Charter
from p2pfl.core.config import PeerConfig
from p2pfl.core.errors import NotAMember, Unreachable
from p2pfl.core.ids import PeerId
from p2pfl.core.wire import Versions
from p2pfl.crypto.identity import sign_charter
from p2pfl.learning.table_draft import draft_table
from p2pfl.node.consult import PROTOCOL, Consultation, Desk, Facts, Reached
from p2pfl.node.doctor import Report, examine
from p2pfl.node.federation import (
    CHARTER_FILE,
    Home,
    create_home,
    draft_charter,
    join_charter,
    load_charter,
    open_home,
    save_charter,
)
from p2pfl.node.findings import CHECKS, Finding, Level, Probe
from p2pfl.node.launcher import free_ports
from p2pfl.node.libp2p.host import NO_ANSWER, ChannelTerms, Libp2pTransport
from p2pfl.node.status import STATUS_FILE, status_of
from p2pfl.node.transport import IncomingLane, LaneKind
from p2pfl.node.visits import ROUND_BYTES, Visit, _link_findings, visit_findings
from tests.node.homes import NAMES

pytestmark = pytest.mark.slow


def write_table(path: Path, **columns: list[object]) -> Path:
    rows = {"age": [30, 45, 61, 22] * 10, "job": ["craft", "office"] * 20, "default": ["no", "no", "no", "yes"] * 10}
    pd.DataFrame(rows | columns).to_csv(path, index=False)
    return path


@dataclass(frozen=True)
class Banks:
    """Three members with tables of their own; the others than the first are there while `meet` lasts."""

    path: Path
    homes: dict[str, Home]

    @property
    def ant(self) -> Path:
        return self.homes["ant"].path

    def charter(self) -> Charter:
        return load_charter(self.path / CHARTER_FILE)

    def change(self, **settings: Any) -> None:
        """Write settings into the first one's peer.toml."""
        file = self.ant / "peer.toml"
        document = tomlkit.parse(file.read_text())
        document.update(settings)
        file.write_text(tomlkit.dumps(document))

    def findings(self, probe: Probe | None = None, *, present: bool = True, bee: "Stand | None" = None) -> Report:
        """Examine the first one while the others are there, the second as `bee` says."""
        stands = {NAMES[1]: bee or Stand(), NAMES[2]: Stand()}
        with self.meet(stands if present else {}):
            return examine(self.ant, probe)

    @contextmanager
    def meet(self, stands: Mapping[str, "Stand"]) -> Iterator[None]:
        charter, up, done = self.charter(), threading.Event(), trio.Event()
        token: list[trio.lowlevel.TrioToken] = []

        async def serve() -> None:
            token.append(trio.lowlevel.current_trio_token())
            async with trio.open_nursery() as nursery:
                for name, stand in stands.items():
                    if stand.present:
                        await nursery.start(self._answer, name, stand, charter, done)
                up.set()
                await done.wait()

        thread = threading.Thread(target=trio.run, args=(serve,))
        thread.start()
        try:
            assert up.wait(30)
            yield
        finally:
            token[0].run_sync_soon(done.set)
            thread.join()

    async def _answer(
        self, name: str, stand: "Stand", charter: Charter, done: trio.Event, task_status: Any = trio.TASK_STATUS_IGNORED
    ) -> None:
        home = self.homes[name]
        digest = stand.charter or charter.hash()
        terms = ChannelTerms(charter.security.suite, digest)
        transport = Libp2pTransport(home.identity().seed(), charter.roster(), terms)
        world = Probe()
        facts = replace(Facts(world.release, world.wire, 0.0, digest, "peer"), **stand.facts)
        addresses = {PeerId(member.peer_id): member.addresses for member in charter.members}

        async def ignore(kind: LaneKind, lane: IncomingLane) -> None:
            await trio.sleep_forever()

        async with transport.run(home.config.listen, ignore, lambda who, why: None):
            if stand.answers:
                desk = Desk(lambda: replace(facts, clock=world.now() + stand.ahead), addresses, transport.probe)
                transport.answer(PROTOCOL, desk.hold)
            task_status.started()
            await done.wait()


@dataclass(frozen=True)
class Stand:
    """How another member is there."""

    present: bool = True
    answers: bool = True
    charter: bytes | None = None
    ahead: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def banks(tmp_path: Path) -> Banks:
    table = draft_table(write_table(tmp_path / "drafted.csv"), "default").terms
    charter = draft_charter(tmp_path, "meadow", "tabular", {"training": {"rounds": 2}}, table=table)
    homes = {}
    for name, port in zip(NAMES, free_ports(3), strict=True):
        address = f"/ip4/127.0.0.1/tcp/{port}"
        data = {"path": str(write_table(tmp_path / f"{name}.csv"))}
        config = PeerConfig(
            name=name, charter=f"../{CHARTER_FILE}", listen=(address,), announce=(address,), data=data
        )  # fmt: skip
        homes[name] = create_home(tmp_path / name, config)[0]
        charter = join_charter(charter, homes[name].member(charter))
    for name, home in homes.items():
        charter = sign_charter(charter, name, home.identity())
    save_charter(tmp_path / CHARTER_FILE, charter)
    return Banks(tmp_path, homes)


def only_fault(report: Report, check: str, level: Level = Level.FAIL, member: str = "") -> Finding:
    """Return the one finding that is not ok; there is an error or a warning of nothing else."""
    (found,) = (finding for finding in report.findings if finding.level is not Level.OK)
    assert (found.check, found.level, found.member) == (check, level, member)
    assert found.line().isprintable()
    assert found.todo
    assert report.passed == (level is Level.WARN)
    return found


def test_where_nothing_is_wrong_every_check_says_so(banks: Banks) -> None:
    report = banks.findings()
    assert [finding.line() for finding in report.findings if finding.level is not Level.OK] == []
    assert {finding.check for finding in report.findings} == set(CHECKS)
    for check in ("reach", "link", "charter", "versions", "firewall"):
        of = [finding.member for finding in report.findings if finding.check == check and finding.member]
        assert of == list(NAMES[1:]), check
    assert report.next == f"p2pfl peer --config {banks.ant}"
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_a_key_that_others_may_read(banks: Banks) -> None:
    banks.homes["ant"].identity_path.chmod(0o644)
    report = banks.findings()
    found = only_fault(report, "keys")
    assert "others may read this private key" in found.what
    assert "chmod 600" in found.todo
    assert "nobody" not in report.next


def test_a_port_that_is_taken(banks: Banks) -> None:
    _, _, _, _, port = banks.homes["ant"].config.listen[0].split("/")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", int(port)))
        sock.listen()
        found = only_fault(banks.findings(), "port")
    assert "is taken by another process" in found.what
    assert port in found.todo


def test_a_member_that_is_down(banks: Banks) -> None:
    found = only_fault(banks.findings(bee=Stand(present=False)), "reach", member="bee")
    assert "Connection refused" in found.what
    assert "doctor --wait" in found.todo


def test_a_members_clock_that_is_off(banks: Banks) -> None:
    found = only_fault(banks.findings(bee=Stand(ahead=3600)), "clock", member="bee")
    assert "3.6e+03 s ahead of the median" in found.what
    found = only_fault(banks.findings(bee=Stand(ahead=-5)), "clock", Level.WARN, member="bee")
    assert "5 s behind" in found.what


def test_this_machines_clock_that_is_off(banks: Banks) -> None:
    world = Probe()
    found = only_fault(banks.findings(replace(world, now=lambda: world.now() - 600)), "clock")
    assert "this machine's is 600 s behind the median of 2 members'" in found.what


def test_a_member_under_another_charter(banks: Banks) -> None:
    other = Stand(charter=bytes(32))
    found = only_fault(banks.findings(bee=other), "charter", member="bee")
    assert "is under charter 00000000" in found.what
    assert "p2pfl charter diff" in found.todo


def test_a_charter_that_this_member_has_not_signed(banks: Banks) -> None:
    charter = banks.charter()
    signatures = {name: text for name, text in charter.signatures.items() if name != "ant"}
    save_charter(banks.path / CHARTER_FILE, charter.model_copy(update={"signatures": signatures}))
    found = only_fault(banks.findings(), "signatures")
    assert found.what == "ant has not signed"
    assert "p2pfl charter sign" in found.todo


def test_before_others_have_signed_they_are_waited_for_and_need_not_be_there(banks: Banks) -> None:
    charter = banks.charter()
    signatures = {"ant": charter.signatures["ant"]}
    save_charter(banks.path / CHARTER_FILE, charter.model_copy(update={"signatures": signatures}))
    report = banks.findings(present=False)
    assert report.passed
    lines = [finding.line() for finding in report.findings if finding.level is Level.WARN]
    assert lines[0].startswith("warn signatures: waits for bee, cat.example, who have not signed; ")
    assert [line.partition(":")[0] for line in lines[1:]] == ["warn reach of bee", "warn reach of cat.example"]
    assert report.next.endswith("says whom the charter waits for")


def test_a_charter_that_was_changed_after_it_was_signed(banks: Banks) -> None:
    file = banks.path / CHARTER_FILE
    file.write_text(file.read_text().replace("local_steps = 2", "local_steps = 3"))
    report = banks.findings()
    wrong = [finding for finding in report.findings if finding.check == "signatures"]
    assert [finding.level for finding in wrong] == [Level.FAIL] * 3
    assert all("changed after signing" in finding.what for finding in wrong)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"age": [300, *[30] * 39]}, "column 'age': outside of"),
        ({"job": ["sailor"] * 40}, "unknown 'sailor'"),
        ({"default": ["perhaps"] * 40}, "target 'default'"),
    ],
)
def test_a_table_that_is_not_the_charters(banks: Banks, columns: dict[str, list[object]], words: str) -> None:
    write_table(banks.path / "ant.csv", **columns)
    assert words in only_fault(banks.findings(), "data").what


def test_a_table_that_is_named_nowhere(banks: Banks) -> None:
    banks.change(data={})
    assert "names no file" in only_fault(banks.findings(), "data").what


def test_a_disk_that_is_full(banks: Banks) -> None:
    found = only_fault(banks.findings(replace(Probe(), free=lambda path: 1000)), "disk")
    assert "1.0 kB free" in found.what
    assert "make room" in found.todo
    only_fault(banks.findings(replace(Probe(), free=lambda path: 100_000_000)), "disk", Level.WARN)


def test_steps_are_measured_on_as_many_threads_as_a_peer_has(banks: Banks) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            banks.change(threads=threads)
            findings = banks.findings(replace(Probe(), cores=lambda: 8), present=False).findings
            (found,) = (finding for finding in findings if finding.check == "training")
            assert found.what.endswith(f"on {threads} of 8 cores")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_an_algorithm_of_two_vectors_takes_twice_the_time_of_a_round(banks: Banks) -> None:
    charter = banks.charter()
    size = ROUND_BYTES * charter.model.parameters
    found = Consultation(Facts("0.1.0", Probe().wire, 0.0, charter.hash(), "peer"), 0.0, 0.0, 0.01, size / 3, ())
    assert "3 s of each round" in _link_findings(charter, "bee", found)[0].what
    training = charter.training.model_copy(update={"algorithm": "k-gt"})
    two = charter.model_copy(update={"training": training})
    assert "6 s of each round" in _link_findings(two, "bee", found)[0].what


def test_a_library_that_the_charter_needs(banks: Banks) -> None:
    file = banks.path / CHARTER_FILE
    file.write_text(file.read_text().replace('suite = "aes"', 'suite = "gm"'))
    report = examine(banks.ant, replace(Probe(), can_import=lambda name: name != "gmssl_pyx"))
    (found,) = (finding for finding in report.findings if finding.check == "extras")
    assert found.level is Level.FAIL
    assert found.what == "gmssl_pyx is not installed, which the suite gm needs"
    assert found.todo == "pip install 'p2pfl-mesh[gm]'"


def test_a_library_that_the_table_needs(banks: Banks) -> None:
    table = banks.path / "ant.parquet"
    pd.read_csv(banks.path / "ant.csv").to_parquet(table)
    banks.change(data={"path": str(table)})
    assert banks.findings().passed
    found = only_fault(banks.findings(replace(Probe(), can_import=lambda name: False)), "extras")
    assert "pyarrow is not installed, which Parquet files need" in found.what


def test_a_member_with_an_old_version(banks: Banks) -> None:
    found = only_fault(banks.findings(bee=Stand(facts={"release": "0.0.9"})), "versions", Level.WARN, "bee")
    assert "runs p2pfl 0.0.9" in found.what
    assert found.todo.startswith("bee should install")
    old = Stand(facts={"release": "0.0.1", "wire": Versions(1, 2)})
    assert "messages are version 1" in only_fault(banks.findings(bee=old), "versions", Level.FAIL, "bee").what


def test_an_old_version_of_ones_own(banks: Banks) -> None:
    report = banks.findings(replace(Probe(), release="0.0.9"))
    found = [finding for finding in report.findings if finding.level is Level.WARN]
    assert [finding.member for finding in found] == list(NAMES[1:])
    assert all(finding.todo.startswith("this member should install") for finding in found)


def test_a_member_whose_version_knows_no_doctor(banks: Banks) -> None:
    found = only_fault(banks.findings(bee=Stand(answers=False)), "reach", Level.WARN, "bee")
    assert "does not answer a doctor" in found.what


def test_members_that_cannot_dial_back(banks: Banks) -> None:
    # Nothing listens where the charter says that this member is.
    (port,) = free_ports(1)
    banks.change(listen=[f"/ip4/127.0.0.1/tcp/{port}"])
    report = banks.findings()
    assert report.passed
    found = [finding for finding in report.findings if finding.level is Level.WARN]
    assert [(finding.check, finding.member) for finding in found] == [("firewall", name) for name in NAMES[1:]]
    assert all("cannot dial this member back" in finding.what for finding in found)


def test_an_address_that_leads_others_to_themselves_and_one_that_is_not_there(banks: Banks) -> None:
    banks.homes["ant"].identity_path.chmod(0o644)  # without a key nobody is visited
    charter = banks.charter()
    away = [member.model_copy(update={"addresses": ("/ip4/192.0.2.1/tcp/4001",)}) for member in charter.members[1:]]
    save_charter(banks.path / CHARTER_FILE, charter.model_copy(update={"members": (charter.members[0], *away)}))
    assert "leads others to themselves" in announced(examine(banks.ant)).what
    banks.change(announce=[])
    assert "announce is empty" in announced(examine(banks.ant)).what


def announced(report: Report) -> Finding:
    (found,) = (finding for finding in report.findings if finding.check == "announce")
    assert found.level is Level.FAIL
    return found


def test_a_key_that_is_another_than_the_charters(banks: Banks) -> None:
    home = banks.homes["ant"]
    home.identity_path.write_bytes(banks.homes["bee"].identity_path.read_bytes())
    report = examine(banks.ant)
    (found,) = (finding for finding in report.findings if finding.level is Level.FAIL)
    assert found.check == "charter"
    assert "but the key here is" in found.what


@pytest.mark.parametrize("broken", ["peer.toml", "charter.toml"])
def test_what_cannot_be_read_at_all(banks: Banks, broken: str) -> None:
    file = banks.ant / broken if broken == "peer.toml" else banks.path / broken
    file.write_text("nonsense")
    report = examine(banks.ant)
    assert not report.passed
    assert any("not TOML" in finding.what for finding in report.findings)


def waiting(banks: Banks, name: str, told: Callable[[str], None], reports: dict[str, Report]) -> threading.Thread:
    def run() -> None:
        reports[name] = examine(banks.homes[name].path, wait=60, tell=told)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_doctors_that_wait_meet_each_other_before_the_first_round(banks: Banks) -> None:
    reports: dict[str, Report] = {}
    begun = threading.Event()
    threads = [waiting(banks, "ant", lambda line: begun.set(), reports)]
    assert begun.wait(60), "the first says that it waits"
    threads += [waiting(banks, name, lambda line: None, reports) for name in NAMES[1:]]
    for thread in threads:
        thread.join(90)
    for name in NAMES:
        assert [finding.line() for finding in reports[name].findings if finding.level is not Level.OK] == []
        others = [finding.member for finding in reports[name].findings if finding.check == "firewall"]
        assert others == [other for other in NAMES if other != name]


def test_a_running_peer_answers_doctors_and_says_where_it_stands(banks: Banks) -> None:
    port = banks.homes["ant"].config.listen[0].rpartition("/")[2]
    banks.change(listen=[f"/ip4/0.0.0.0/tcp/{port}"])
    ant, bee = open_home(banks.ant), banks.homes["bee"]
    running = subprocess.Popen(
        [sys.executable, "-u", "-m", "p2pfl.cli", "peer", "--config", str(ant.path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert running.stdout is not None
        while not (ant.run_path / STATUS_FILE).exists():
            assert running.stdout.readline(), "it ended before it listened"
        stands = status_of(ant)
        assert stands.running
        assert stands.peer is not None
        assert stands.peer.listen == ant.config.listen

        lines = [finding.line() for finding in examine(bee.path).findings]
        assert "ok   reach of ant: answers: its peer runs" in lines
        assert "ok   firewall of ant: can dial this member back" in lines
        assert sum(line.startswith("FAIL") for line in lines) == 1
        assert any(line.startswith("FAIL reach of cat.example: ") for line in lines)

        # Its own doctor takes neither its port nor its place.
        with banks.meet({"bee": Stand()}):
            lines = [finding.line() for finding in examine(ant.path).findings]
        assert f"ok   port: {ant.config.listen[0]}: this member's own peer listens there" in lines
        assert "ok   firewall of bee: can dial this member back" in lines
        assert running.poll() is None
    finally:
        running.terminate()
        _, error = running.communicate(timeout=30)
    assert "Traceback" not in error
    found = status_of(ant)
    assert not found.running
    assert found.peer is not None
    assert found.peer.outcome == "stopped"


# What visits mean, without any


def consulted(**changes: Any) -> Consultation:
    facts = Facts(Probe().release, Probe().wire, 0.0, bytes(32), "peer")
    return replace(Consultation(facts, 0.0, 0.01, 0.02, 1e7, (Reached("/ip4/192.0.2.1/tcp/1"),)), **changes)


def found_of(banks: Banks, **visits: Visit) -> list[str]:
    findings = visit_findings(banks.charter(), visits, Probe(), in_force=True)
    return [finding.line() for finding in findings if finding.level is not Level.OK and finding.check != "charter"]


def test_an_address_that_lets_dials_wait_speaks_of_a_firewall(banks: Banks) -> None:
    (line,) = found_of(banks, bee=Visit({"/ip4/192.0.2.1/tcp/1": Unreachable(f"{NO_ANSWER} in 10 s")}))
    assert line.startswith("FAIL reach of bee: does not answer: /ip4/192.0.2.1/tcp/1: no answer in 10 s; a firewall")


def test_an_address_of_several_that_does_not_answer_is_a_warning(banks: Banks) -> None:
    (line,) = found_of(banks, bee=Visit({"/ip4/192.0.2.1/tcp/1": Unreachable("Connection refused")}, consulted()))
    assert line.startswith("warn reach of bee: does not answer at /ip4/192.0.2.1/tcp/1: Connection refused; another")


def test_somebody_else_at_a_members_address_fails(banks: Banks) -> None:
    (line,) = found_of(banks, bee=Visit({"/ip4/192.0.2.1/tcp/1": NotAMember("is not on the roster", PeerId("x"))}))
    assert line.startswith("FAIL reach of bee: does not answer: /ip4/192.0.2.1/tcp/1: is not on the roster; compare")


def test_a_path_on_which_no_round_can_end_in_time_is_a_warning(banks: Banks) -> None:
    (line,) = found_of(banks, bee=Visit({}, consulted(bytes_per_second=10.0)))
    assert line.startswith("warn link of bee: round trip 20 ms, 10 B/s to it: ")


def test_of_two_clocks_nobody_knows_which_is_right(banks: Banks) -> None:
    (line,) = found_of(banks, bee=Visit({}, consulted(ahead=-30.0)))
    assert line == "warn clock of bee: 30 s behind ours: one is wrong; set it by NTP: timedatectl set-ntp true"


def test_a_clock_is_not_blamed_for_a_slow_question(banks: Banks) -> None:
    assert found_of(banks, bee=Visit({}, consulted(ahead=4.0, within=3.0))) == []


def test_what_a_member_says_reaches_no_terminal_as_it_is(banks: Banks) -> None:
    reached = (Reached("/ip4/192.0.2.1/tcp/1", "\x1b[2J"),)
    (line,) = found_of(banks, bee=Visit({}, consulted(dialled_back=reached)))
    assert line.isprintable()


def test_another_charter_is_told_where_the_channel_knows_none(banks: Banks) -> None:
    (finding,) = (
        each
        for each in visit_findings(banks.charter(), {"bee": Visit({}, consulted())}, Probe(), in_force=True)
        if each.check == "charter"
    )
    assert (finding.level, finding.member) == (Level.FAIL, "bee")
    assert finding.what.startswith("is under charter 0000000000000000, ours is ")
