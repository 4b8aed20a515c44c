"""Peers as a service manager runs them: watched over HTTP, logging, asked to stop. Real processes on loopback."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import tomlkit

from p2pfl.core.trace import Event, PeerFinished, RoundEnded
from p2pfl.node.launcher import LocalFederation, create_federation, free_ports
from p2pfl.node.tracefile import TRACE_FILE, TraceReader, read_trace

pytestmark = pytest.mark.slow

TASK = """
import threading
import torch
import p2pfl

class Own(p2pfl.Task):
    def model(self):
        return torch.nn.Linear(3, 2)

    def data(self, settings):
        self.blocks = settings.get("blocks", False)
        return p2pfl.Data(*[p2pfl.Examples(torch.ones(8, 3), torch.tensor([0, 1] * 4))] * 2)

    def loss(self, outputs, targets):
        if self.blocks:
            threading.Event().wait()
        return super().loss(outputs, targets)
"""
LAST_RESORT = 60.0
"""Seconds; never waited out."""


def federation(
    path: Path, peers: int = 3, topology: str = "groups", masks: str = "on", **data: bool
) -> LocalFederation:
    path.mkdir()
    (path / "own.py").write_text(TASK)
    terms = {"training": {"rounds": 1_000_000}, "averaging": {"topology": topology, "masks": masks}}
    return create_federation(path, "own.py:Own", terms, [data] * peers, seed=0)


def configure(home: Path, **tables: object) -> None:
    file = home / "peer.toml"
    document = tomlkit.parse(file.read_text())
    document.update(tables)
    file.write_text(tomlkit.dumps(document))


@contextmanager
def running(made: LocalFederation) -> Iterator[list[subprocess.Popen[str]]]:
    """Run every member's peer as a service manager does; none is left afterwards."""
    peers = [
        subprocess.Popen(
            [sys.executable, "-m", "p2pfl.cli", "peer", "--quiet", "--config", str(home.path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for home in made.homes
    ]  # fmt: skip
    try:
        yield peers
    finally:
        for peer in peers:
            peer.kill()
            peer.communicate()


def follow(
    made: LocalFederation, number: int, process: subprocess.Popen[str]
) -> Callable[[Callable[[Event], bool]], None]:
    """Return what waits for an event in a peer's trace, while its process runs."""
    reader = TraceReader(made.homes[number].run_path / TRACE_FILE)

    def until(wanted: Callable[[Event], bool]) -> None:
        while not any(wanted(entry.event) for entry in list(reader.read_new())):
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05)

    return until


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=LAST_RESORT) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def last_events(made: LocalFederation, number: int) -> list[Event]:
    return [entry.event for entry in read_trace(made.homes[number].run_path / TRACE_FILE)]


def test_a_watched_peer_leaves_at_the_end_of_a_round_when_it_is_asked_to(tmp_path: Path) -> None:
    made = federation(tmp_path / "f")
    (port,) = free_ports(1)
    log = {"level": "debug", "format": "json", "file": "log", "file_bytes": 10_000, "files": 1}
    configure(made.homes[0].path, metrics={"port": port}, logging=log)
    with running(made) as peers:
        until = follow(made, 0, peers[0])
        until(lambda event: isinstance(event, RoundEnded) and event.round >= 2)
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/readyz")[0] == 200
        metrics = get(port, "/metrics")[1]
        assert 'p2pfl_members{standing="reachable"} 2.0' in metrics
        assert "process_resident_memory_bytes" in metrics
        assert "p2pfl_received_bytes_total 0.0" not in metrics

        peers[0].send_signal(signal.SIGTERM)
        out, error = peers[0].communicate(timeout=LAST_RESORT)
        assert (peers[0].returncode, out, error) == (0, "", "")
        with pytest.raises(URLError):
            get(port, "/healthz")
        events = last_events(made, 0)
        finished, ended = events[-1], next(event for event in reversed(events) if isinstance(event, RoundEnded))
        assert isinstance(finished, PeerFinished)
        assert (finished.outcome, finished.round) == ("stopped", ended.round + 1)
        lines = [json.loads(line) for line in (made.homes[0].path / "log").read_text().splitlines()]
        assert lines[-1]["message"] == f"stopped after {finished.round} rounds"

        assert [peer.poll() for peer in peers[1:]] == [None, None]


def test_a_round_that_does_not_end_holds_nobody_beyond_the_bound_or_the_second_signal(tmp_path: Path) -> None:
    made = federation(tmp_path / "f", 2, "complete", "off", blocks=True)
    configure(made.homes[0].path, stop_seconds=0.2)
    configure(made.homes[1].path, stop_seconds=3600.0)
    with running(made) as peers:
        for number, peer in enumerate(peers):
            follow(made, number, peer)(lambda event: getattr(event, "state", "") == "training")
        peers[0].send_signal(signal.SIGTERM)
        peers[0].communicate(timeout=LAST_RESORT)
        assert peers[0].returncode == 0
        peers[1].send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            peers[1].wait(0.5)
        peers[1].send_signal(signal.SIGTERM)
        peers[1].communicate(timeout=LAST_RESORT)
        assert peers[1].returncode == 0
    for number in range(2):
        finished = last_events(made, number)[-1]
        assert finished == PeerFinished("stopped", 0, agreed=False)


def test_a_port_that_is_taken_ends_the_peer_in_one_line(tmp_path: Path) -> None:
    made = federation(tmp_path / "f")
    with taken_port() as port:
        configure(made.homes[0].path, metrics={"port": port})
        with running(LocalFederation(made.path, made.homes[:1])) as peers:
            out, error = peers[0].communicate(timeout=LAST_RESORT)
    assert out == ""
    assert peers[0].returncode == 1
    line = f"metrics: 127.0.0.1 port {port} is taken by another process; choose another port in peer.toml"
    assert error == f"error: {line}\n"
    assert last_events(made, 0)[-1] == PeerFinished("failed", 0, agreed=False, reason=line)


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]
