"""What a peer writes for those who keep it running: lines for people, or JSON objects, to stderr or a bounded file.

Everything goes through the standard library's loggers `p2pfl` and `libp2p`. A line has names of members, rounds and
reasons; no figure of anybody's data stands in one, and no secret. Text that came from elsewhere stays on its line.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from p2pfl.core.config import LoggingConfig
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.trace import (
    Event,
    LinkChanged,
    MemberChanged,
    Note,
    PeerFinished,
    PeerStarted,
    Refused,
    RoundEnded,
    StateChanged,
)
from p2pfl.node.store import KEY_MODE

LOGGERS = ("p2pfl", "libp2p")
MOST_LINES, PERIOD = 600, 60.0
"""So many lines in so many seconds at most, whatever remotes do; a guess: ten rounds a second would need more."""
MOST_TEXT = 500
"""Letters of a message; what is beyond is cut."""

logger = logging.getLogger("p2pfl.peer")
# Without a log that somebody asked for, events are in the trace alone, and not on stderr.
logger.addHandler(logging.NullHandler())


def log_event(event: Event) -> None:
    """Write what happened to a peer."""
    told = describe(event)
    if told is not None:
        level, text, fields = told
        logger.log(level, "%s", text, extra={"fields": {"event": event.name, **fields}})


def describe(event: Event) -> tuple[int, str, dict[str, Any]] | None:
    """Return how serious an event is, its line, and its fields; None for what is no operator's business.

    Losses and other metrics are left out, also of the own data: logs are shipped elsewhere.
    """
    match event:
        case PeerStarted(member=member, charter=charter, resumed_at=round):
            text = f"started as {member} under charter {charter[:12]}, in round {round}"
            return logging.INFO, text, {"member": member, "charter": charter, "round": round}
        case StateChanged(state, round):
            return logging.DEBUG, f"{state}, round {round}", {"state": state.value, "round": round}
        case LinkChanged(neighbor, up, reason):
            why = f": {reason}" if reason else ""
            text = f"linked to {neighbor}" if up else f"lost the link to {neighbor}{why}"
            return logging.INFO if up else logging.WARNING, text, {"neighbor": neighbor, "up": up, "reason": reason}
        case MemberChanged(member, standing):
            return logging.INFO, f"{member} seems {standing}", {"member": member, "standing": standing}
        case RoundEnded() as ended:
            return _describe_round(ended)
        case Refused(who, reason):
            return logging.WARNING, f"refused {who}: {reason}", {"who": who, "reason": reason}
        case Note(text):
            return logging.INFO, text, {}
        case PeerFinished(outcome, round, agreed, reason):
            level = logging.ERROR if outcome == "failed" else logging.INFO
            text = f"{outcome} after {round} rounds{f': {reason}' if reason else ''}"
            return level, text, {"outcome": outcome, "round": round, "agreed": agreed, "reason": reason}
    return None


def _describe_round(ended: RoundEnded) -> tuple[int, str, dict[str, Any]]:
    without = f", without {', '.join(ended.absent)}" if ended.absent else ""
    outcome = f"{ended.outcome}, " if ended.outcome else ""
    reason = f": {ended.reason}" if ended.reason else ""
    text = f"round {ended.round}: {outcome}with {len(ended.heard)} others{without}, {ended.seconds:.3g} s{reason}"
    fields = {
        "round": ended.round,
        "outcome": ended.outcome,
        "heard": len(ended.heard),
        "absent": list(ended.absent),
        "seconds": round(ended.seconds, 3),
        "reason": ended.reason,
    }
    return logging.INFO, text, fields


@contextmanager
def logging_to(config: LoggingConfig, folder: Path) -> Iterator[None]:
    """Write log lines as `config` says while the context lasts.

    Args:
        config: what is wanted.
        folder: that the file's path begins at.

    Raises:
        InvalidConfig: the file cannot be written.
    """
    if config.level == "off":
        yield
        return
    handler = _handler(config, folder)
    handler.setFormatter(JsonLines() if config.format == "json" else TextLines())
    handler.addFilter(Bounded())
    level = logging.getLevelNamesMapping()[config.level.upper()]
    handler.setLevel(level)
    ours, before = logging.getLogger("p2pfl"), logging.getLogger("p2pfl").level
    ours.setLevel(level)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        ours.setLevel(before)
        handler.close()


def _handler(config: LoggingConfig, folder: Path) -> logging.Handler:
    if not config.file:
        return _Stderr()
    path = folder / config.file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _File(path, maxBytes=config.file_bytes, backupCount=config.files, encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(f"{path}: the log cannot be written: {error.strerror}") from error


class _Stderr(logging.StreamHandler[Any]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Go on: a log that cannot be written stops no peer, and there is nowhere to tell it."""


class _File(RotatingFileHandler):
    """For its owner's eyes only, from the first byte on."""

    def _open(self) -> IO[str]:  # type: ignore[override]  # the stubs name the class behind it
        return open(  # Path.open takes no opener
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            opener=lambda path, flags: os.open(path, flags, KEY_MODE),
        )

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Go on: what a peer needs to go on is kept elsewhere, and fails there."""


class Bounded(logging.Filter):
    """Lets `MOST_LINES` pass in `PERIOD` seconds, and says of the first after them how many did not."""

    def __init__(self) -> None:
        super().__init__()
        self._began, self._passed, self._dropped = 0.0, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is written."""
        if not 0 <= record.created - self._began < PERIOD:
            if self._dropped:
                record.msg, record.args = f"{self._dropped} lines before this one were left out; {_text(record)}", ()
            self._began, self._passed, self._dropped = record.created, 0, 0
        if self._passed >= MOST_LINES:
            self._dropped += 1
            return False
        self._passed += 1
        return True


class TextLines(logging.Formatter):
    """A line for people: when (UTC), how serious, who, what."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return f"{_when(record)} {record.levelname.lower():7} {record.name}: {_text(record)}"


class JsonLines(logging.Formatter):
    """A JSON object a line: `at`, `level`, `logger`, `message`, and an event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        head = {
            "at": _when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _text(record),
        }
        fields = {key: _one_line(value) for key, value in getattr(record, "fields", {}).items()}
        return json.dumps({**fields, **head}, separators=(",", ":"))


def _when(record: logging.LogRecord) -> str:
    seconds, fraction = divmod(record.created, 1)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(fraction * 1000):03}Z"


def _text(record: logging.LogRecord) -> str:
    """Return the message; no traceback follows it."""
    return str(_one_line(record.getMessage()))


def _one_line(value: Any) -> Any:
    """Return a text on one line, without anything a terminal might act on; anything else as it is."""
    if not isinstance(value, str):
        return value
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in value[:MOST_TEXT])
