"""A process of the control: how it hears that it should leave, and how it says what is wrong."""

import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from p2pfl.core.errors import InvalidConfig, Unreachable
from p2pfl.core.ids import PeerId, Seconds
from p2pfl.node.transport import PeerTransport, Talk
from p2pfl.simulation import plaintext
from p2pfl.simulation.plaintext import PlaintextTransport, run_plaintext_process


@pytest.fixture
def ignoring_signals() -> Iterator[None]:
    """As the process is from which all peers are forked."""
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("ignoring_signals")
def test_it_can_be_asked_to_leave_from_the_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[object] = []

    def refuse(path: Path) -> None:
        heard.extend(signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        raise InvalidConfig(f"{path}: first\nsecond")

    monkeypatch.setattr(plaintext, "open_home", refuse)
    reasons, tell = multiprocessing.Pipe(duplex=False)
    with reasons, tell, pytest.raises(SystemExit) as raised:
        run_plaintext_process("home", tell)
    assert raised.value.code == 2
    assert heard == [signal.SIG_DFL, signal.SIG_IGN, signal.SIG_IGN]


@pytest.mark.usefixtures("ignoring_signals")
def test_what_is_wrong_is_said_in_one_line_whether_or_not_anybody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise InvalidConfig(f"{path}: first\nsecond")

    monkeypatch.setattr(plaintext, "open_home", refuse)
    reasons, tell = multiprocessing.Pipe(duplex=False)
    with tell:
        with pytest.raises(SystemExit):
            run_plaintext_process("home", tell)
        with reasons:
            assert reasons.poll(10)
            assert reasons.recv_bytes() == b"home: first second"
        with pytest.raises(SystemExit) as raised:
            run_plaintext_process("home", tell)
        assert raised.value.code == 2


def test_it_can_all_that_a_running_peer_asks_of_its_network_and_dials_nobody_for_others() -> None:
    async def hold(talk: Talk) -> None:
        raise AssertionError(talk)

    control = PlaintextTransport(PeerId("ant"))
    asked = {name for name in vars(PeerTransport) if not name.startswith("_")}
    assert asked <= set(dir(control))
    control.answer("/p2pfl/doctor/1.0.0", hold)
    with pytest.raises(Unreachable):
        trio.run(control.probe, PeerId("bee"), "/ip4/127.0.0.1/tcp/1", Seconds(1.0))
