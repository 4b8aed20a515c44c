"""Logs: bounded, on their lines, for their owner's eyes, and without anybody's figures."""

import json
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from p2pfl.core.config import LoggingConfig
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.trace import Event, LinkChanged, Note, PeerFinished, Refused, RoundEnded, State
from p2pfl.node.logs import LOGGERS, MOST_LINES, MOST_TEXT, Bounded, describe, log_event, logging_to

ENDED = RoundEnded(
    round=4, seconds=1.5, heard=("bee",), absent={"cat": "upload: silent"}, loss=0.25391, spread=7.12575,
    settling=False, outcome="full", clipped=987654321, group_loss=0.53125, distance=0.8125, weight=0.71875,
)  # fmt: skip


def written(folder: Path, write: Callable[[], None], **config: Any) -> list[str]:
    """Return the lines that a log of this configuration has afterwards."""
    chosen = LoggingConfig(**{"level": "info", "file": "log", **config})
    with logging_to(chosen, folder):
        write()
    return (folder / "log").read_text().splitlines()


def test_an_event_is_a_line_for_people_or_an_object(tmp_path: Path) -> None:
    (text,) = written(tmp_path, lambda: log_event(ENDED))
    assert text.endswith("Z info    p2pfl.peer: round 4: full, with 1 others, without cat, 1.5 s")
    (tmp_path / "log").unlink()
    (line,) = written(tmp_path, lambda: log_event(ENDED), format="json")
    values = json.loads(line)
    assert values.pop("at").endswith("Z")
    assert values == {
        "level": "info", "logger": "p2pfl.peer", "message": text.partition("p2pfl.peer: ")[2], "event": "round",
        "round": 4, "outcome": "full", "heard": 1, "absent": ["cat"], "seconds": 1.5, "reason": "",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["text", "json"])
def test_no_figure_of_anybodys_data_is_in_it(tmp_path: Path, kind: str) -> None:
    text = "\n".join(written(tmp_path, lambda: log_event(ENDED), format=kind, level="debug"))
    for figure in ("0.25391", "7.12575", "0.53125", "0.8125", "987654321", "0.71875"):
        assert figure not in text


def test_every_kind_of_event_is_described_or_left_out_on_purpose() -> None:
    left_out = {
        kind.__name__
        for kind in get_args(Event)
        if describe(kind(**{field.name: _example(field.type) for field in fields(kind)})) is None
    }
    assert left_out == {"Evaluated"}


def _example(kind: Any) -> Any:
    known: dict[str, Any] = {"str": "x", "int": 1, "float": 1.0, "bool": False}
    name = getattr(kind, "__name__", str(kind))
    return known.get(name, State.TRAINING if name == "State" else {} if "dict" in str(kind) else ())


def test_text_from_elsewhere_stays_on_its_line_and_is_cut(tmp_path: Path) -> None:
    evil = "x\n2026-01-01 error p2pfl.peer: all is lost\x1b[2J\u2028" + "y" * 10_000
    for kind, most in (("text", MOST_TEXT + 100), ("json", 2 * MOST_TEXT + 300)):
        (line,) = written(tmp_path, lambda: log_event(Refused("bee", evil)), format=kind)
        assert line.isprintable()
        assert len(line) < most
        (tmp_path / "log").unlink()


def test_an_exception_costs_no_further_line(tmp_path: Path) -> None:
    def fail() -> None:
        try:
            int("secret\nsecond")
        except ValueError:
            logging.getLogger("p2pfl.node.x").exception("it failed")

    (line,) = written(tmp_path, fail)
    assert line.endswith("error   p2pfl.node.x: it failed")


def test_only_what_is_serious_enough_is_written_and_the_librarys_lines_too(tmp_path: Path) -> None:
    def write() -> None:
        log_event(Note("a note"))
        log_event(LinkChanged("bee", False, "reset"))
        log_event(PeerFinished("failed", 3, agreed=False, reason="no disk"))
        logging.getLogger("libp2p.transport").warning("strange")

    lines = written(tmp_path, write, level="warning")
    assert [line.partition("Z ")[2] for line in lines] == [
        "warning p2pfl.peer: lost the link to bee: reset",
        "error   p2pfl.peer: failed after 3 rounds: no disk",
        "warning libp2p.transport: strange",
    ]


def test_the_file_is_put_aside_when_it_is_large_and_few_are_kept(tmp_path: Path) -> None:
    def write() -> None:
        for number in range(MOST_LINES):
            log_event(Note(f"{number:04} {'x' * 200}"))

    written(tmp_path, write, file_bytes=10_000, files=2)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["log", "log.1", "log.2"]
    assert all(path.stat().st_size <= 10_000 for path in tmp_path.iterdir())
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())
    assert f"{MOST_LINES - 1:04}" in (tmp_path / "log").read_text()


def test_a_flood_is_bounded_and_told() -> None:
    bounded = Bounded()

    def record(at: float) -> logging.LogRecord:
        made = logging.LogRecord("p2pfl", logging.INFO, "", 0, "line %d", (7,), None)
        made.created = at
        return made

    passed = [bounded.filter(record(1000.0 + number / 1000)) for number in range(MOST_LINES + 50)]
    assert passed.count(True) == MOST_LINES
    later = record(1061.0)
    assert bounded.filter(later)
    assert later.getMessage() == "50 lines before this one were left out; line 7"
    assert bounded.filter(record(500.0)), "a clock that was set back silences nothing"


def test_a_log_that_cannot_be_written_is_told_at_the_start_and_stops_nobody_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidConfig, match="the log cannot be written"):
        written(tmp_path, lambda: None, file="file/log")

    def write() -> None:
        (tmp_path / "sub" / "log").unlink()
        (tmp_path / "sub").rmdir()
        for _ in range(100):
            log_event(Note("x" * 200))

    with logging_to(LoggingConfig(level="info", file="sub/log", file_bytes=10_000), tmp_path):
        write()
    assert capsys.readouterr().err == ""


def test_off_is_the_default_and_nothing_is_left_behind(tmp_path: Path) -> None:
    before = [(list(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in LOGGERS]
    with logging_to(LoggingConfig(), tmp_path):
        log_event(Note("unheard"))
    assert not list(tmp_path.iterdir())
    written(tmp_path, lambda: None)
    assert [(list(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in LOGGERS] == before
