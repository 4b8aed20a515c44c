"""`verify_wire`, whole: two peers as processes with an observer between them, and the control that must be found."""

from pathlib import Path

import pytest

from p2pfl.core.errors import InvalidConfig, RoundFailed
from p2pfl.core.trace import RoundEnded
from p2pfl.node.launcher import Launcher, LocalFederation
from p2pfl.node.libp2p.host import Libp2pTransport
from p2pfl.simulation import verify_wire as module
from p2pfl.simulation.results import open_run
from p2pfl.simulation.verify_wire import ControlLauncher, Report, WireSettings, verify_wire
from tests.node.test_pcap import parse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("wire")
    return folder, verify_wire(folder / "run", folder / "wire.pcap", rounds=ROUNDS, seed=3)


def test_the_control_is_found_whole_and_nothing_of_the_encrypted_run(made: tuple[Path, Report]) -> None:
    _, report = made
    assert report.faults == ()
    assert report.passed
    for sent in report.real.sent:
        assert sent.updates.windows > 1000
        assert sent.updates.found == sent.models.found == 0
    for sent in report.control.sent:
        assert sent.updates.found == sent.updates.windows > 1000
    assert all(text.where is None for text in report.real.texts)
    visible = {text.what for text in report.control.texts if text.where is not None}
    assert visible == {"charter's hash", "id and key of peer-0", "id and key of peer-1"}


def test_the_verdict_can_fail_in_both_ways(made: tuple[Path, Report]) -> None:
    _, report = made
    leaking = Report.of(report.control, report.control)
    assert not leaking.passed
    assert any("models can be read" in fault for fault in leaking.faults)
    assert any("charter's hash can be read" in fault for fault in leaking.faults)
    assert "FAILED" in "\n".join(leaking.lines())
    blind = Report.of(report.real, report.real)
    assert not blind.passed
    assert all("the search is no proof" in fault for fault in blind.faults)


def test_all_traffic_went_past_the_observer(made: tuple[Path, Report]) -> None:
    _, report = made
    for sent in (*report.real.sent, *report.control.sent):
        # What a peer was still sending when the other left is counted here and not there.
        assert sent.bytes >= sent.received > 0
        assert sent.bytes == pytest.approx(sent.counted, rel=0.01)


def test_both_runs_trained_with_each_other(made: tuple[Path, Report]) -> None:
    folder, report = made
    for name, observation in (("encrypted", report.real), ("control", report.control)):
        for peer in open_run(folder / "run" / name).peers:
            rounds = [event for _, event in peer.rounds_ended()]
            assert all(isinstance(event, RoundEnded) and not event.absent for event in rounds)
            assert observation.rounds == (ROUNDS, len(rounds) - ROUNDS)
            assert len(rounds) > ROUNDS


def test_the_report_says_what_an_observer_sees(made: tuple[Path, Report]) -> None:
    _, report = made
    text = " ".join(" ".join(report.lines()).split())
    assert "/multistream/1.0.0" in text
    assert "4810 values are 19240 bytes" in text
    assert "verify-wire: passed" in text
    updates = sum(report.real.rounds)
    for sent in report.real.sent:
        size, count = sent.large
        # What the report warns of: the records' lengths give away the size of the model and the number of rounds.
        assert count == updates
        assert 4 * report.real.parameters < size < 4 * report.real.parameters + 300
        assert sent.entropy > 7.9
        assert sent.lines[0] == "/multistream/1.0.0"


def test_the_pcap_holds_the_encrypted_run(made: tuple[Path, Report]) -> None:
    folder, report = made
    flows, _ = parse((folder / "wire.pcap").read_bytes())
    assert sum(len(flow.data) for flow in flows.values()) == sum(sent.bytes for sent in report.real.sent)
    dialer, listener = report.real.connections[0]
    assert (*dialer, *listener) in flows


def test_no_setting_makes_a_peer_talk_in_the_clear(made: tuple[Path, Report]) -> None:
    """The control's folder is one that the command `p2pfl peer` runs encrypted: nothing in it names a transport."""
    from p2pfl.node.federation import open_home
    from p2pfl.node.peer import Peer

    folder, _ = made
    home = open_home(folder / "run" / "control" / "peers" / "peer-0")
    assert isinstance(Peer.prepare(home).transport, Libp2pTransport)


def test_a_capture_that_does_not_fit_ends_the_run_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="limit of 50000 bytes"):
        verify_wire(tmp_path / "run", rounds=3, max_bytes=50_000)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(InvalidConfig, match="not empty"):
        verify_wire(tmp_path)


@pytest.mark.parametrize("launcher", [Launcher, ControlLauncher])
def test_why_a_peer_ended_before_its_trace_began_is_told(
    launcher: type[Launcher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module._federation

    def readable_by_others(path: Path, settings: WireSettings) -> LocalFederation:
        federation = made(path, settings)
        for home in federation.homes:
            home.identity_path.chmod(0o644)
        return federation

    monkeypatch.setattr(module, "_federation", readable_by_others)
    with pytest.raises(RoundFailed) as raised:
        module._run(tmp_path / "run", WireSettings(rounds=1), launcher)
    key = tmp_path / "run" / "peers" / "peer-0" / "identity.pem"
    assert f"peer-0 failed: {key}: others may read this private key; run `chmod 600 {key}`" in str(raised.value)
    assert str(raised.value).endswith(f"traces are in {tmp_path / 'run' / 'peers'}")
    assert not list((tmp_path / "run").glob("peers/*/trace.jsonl"))
