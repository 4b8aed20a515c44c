"""What `p2pfl suites` shows."""

import io
from collections.abc import Callable
from itertools import count

import pytest
from rich.console import Console

from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.suite import available_providers, suite
from p2pfl.node import speed
from p2pfl.node.speed import measure_suites, seconds_per_call
from p2pfl.simulation.suites_text import render_suites
from tests.crypto.test_choice import Clock as Pace
from tests.crypto.test_choice import Paced


class Clock:
    """Goes on by the same step whenever it is read."""

    def __init__(self, step: float) -> None:
        self._times = count(0, step)

    def __call__(self) -> float:
        return next(self._times)


def test_a_call_takes_what_the_clock_says() -> None:
    assert seconds_per_call(lambda: None, Clock(1 / 1024)) == pytest.approx(1 / 1024, rel=0.2)


def test_a_call_longer_than_a_run_is_made_once_in_each() -> None:
    calls: list[None] = []
    assert seconds_per_call(lambda: calls.append(None), Clock(4.0)) == 8.0
    assert len(calls) == 3


def test_every_suite_has_its_rows() -> None:
    report = measure_suites(Clock(0.002))
    installed = [name for name in ("aes", "sm4", "gm") if not any(note.startswith(name) for note in report.notes)]
    rows = {"aes": 4, "sm4": 4, "gm": 5}
    assert [row.suite for row in report.rows] == [name for name in installed for _ in range(rows[name])] + ["every"]
    for row in report.rows:
        assert (row.megabytes_per_second is None) != (row.microseconds is None)
        assert (row.megabytes_per_second or row.microseconds or 0) > 0
        assert row.version[0].isdigit()
        assert row.is_sm == row.algorithm.startswith("SM")
    messages = {row.suite: row for row in report.rows if row.use == "messages"}
    assert messages["aes"].library == suite("aes").aead_provider.name
    assert messages["sm4"].algorithm == "SM4-GCM"
    assert report.rows[-1].algorithm == "Ed25519"
    assert any("Ed25519" in note and "not SM" in note for note in report.notes)
    assert not any("compliant" in note for note in report.notes)


@pytest.mark.skipif(len(available_providers()) < 2, reason="there is one cipher library on this machine")
def test_the_library_that_does_not_serve_is_shown_with_its_speed() -> None:
    report = measure_suites(Clock(0.002))
    ciphers = [row for row in report.rows if row.use in ("messages", "masks")]
    for row in ciphers:
        (other,) = row.others
        assert {row.library, other.library} == {"openssl", "libgcrypt"}
        assert other.megabytes_per_second > 0
    assert not any(row.others for row in report.rows if row not in ciphers)
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(render_suites(report))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for row in ciphers:
        place = next(
            number for number, line in enumerate(lines) if line.startswith(row.suite) and row.algorithm in line
        )
        assert f"{row.library} {row.version}" in lines[place]
        assert f"({row.others[0].library} {row.others[0].version})" in lines[place + 1]
        assert lines[place + 1].rstrip().endswith(" MB/s)")


def test_the_library_that_is_faster_here_is_shown_as_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Pace()
    providers = [Paced(clock, "libgcrypt", 0.003), Paced(clock, "openssl", 0.001)]
    monkeypatch.setattr(speed, "suite", lambda name, clock: suite(name, providers, clock))

    def ticking() -> float:
        clock.seconds += 1e-4  # what is not ciphered takes time too
        return clock.seconds

    report = measure_suites(ticking)
    for row in report.rows:
        if row.use in ("messages", "masks"):
            assert row.library == "openssl"
            assert row.megabytes_per_second is not None
            assert row.megabytes_per_second > row.others[0].megabytes_per_second


def test_a_suite_that_is_not_installed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(name: str, clock: Callable[[], float]) -> object:
        if name == "gm":
            raise InvalidConfig("pip install it")
        return suite(name, clock=clock)

    monkeypatch.setattr(speed, "suite", choose)
    report = measure_suites(Clock(0.002))
    assert {row.suite for row in report.rows} == {"aes", "sm4", "every"}
    assert report.notes[-1] == "gm cannot be used here: pip install it"
