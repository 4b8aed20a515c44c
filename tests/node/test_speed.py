"""What `p2pfl suites` shows."""

from itertools import count

import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.suite import suite
from p2pfl.node import speed
from p2pfl.node.speed import measure_suites, seconds_per_call


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
    assert [row.suite for row in report.rows] == [name for name in installed for _ in range(4)] + ["every"]
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


def test_a_suite_that_is_not_installed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(name: str) -> object:
        if name == "gm":
            raise InvalidConfig("pip install it")
        return suite(name)

    monkeypatch.setattr(speed, "suite", choose)
    report = measure_suites(Clock(0.002))
    assert {row.suite for row in report.rows} == {"aes", "sm4", "every"}
    assert report.notes[-1] == "gm cannot be used here: pip install it"
