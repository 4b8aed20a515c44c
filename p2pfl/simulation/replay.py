"""Traces of simulated runs: as JSON lines, byte for byte the same for equal seeds; and told in words.

A trace's first line is the case it is of. Then, for each thing that happened: `{"t", "peer", "in", "out"}` for an input
and what the machine answered, `{"t", "fault", "begins"}`, or `{"t", "lost", "from", "to"}`. Vectors stand as their
length and hash, byte strings as their first bytes. Traces that real peers leave can be told too.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from p2pfl.core.errors import InvalidConfig, P2pflError
from p2pfl.core.statements import Statement
from p2pfl.simulation.faults import MIXES, Schedule, encode_schedule
from p2pfl.simulation.invariants import InvariantViolated
from p2pfl.simulation.simnet import Network
from p2pfl.simulation.soak import PATIENCE, Case, decode_case, encode_case, standard_network

SHORT = 8
"""Bytes of a byte string that a trace shows."""
_LEFT_OUT = {"charter", "signature", "body", "work"}


def run_traced(case: Case, *, strict: bool | None = None) -> tuple[list[str], str]:
    """Run a case; return its trace's lines and what went wrong, empty for nothing."""
    network = standard_network(case, strict=strict, log=True)
    reason = ""
    try:
        network.run(PATIENCE)
    except InvariantViolated as violated:
        reason = violated.reason
    return [json.dumps(json.loads(encode_case(case))), *trace_lines(network)], reason


def run_mix(seed: int, mix: str, **network: Any) -> tuple[list[str], str]:
    """Run the standard network under a seed and a mix of faults, as `run_traced` does.

    Args:
        seed: of the case.
        mix: where the faults are drawn from.
        network: other fields of `Case`.

    Raises:
        InvalidConfig: there is no such mix.
    """
    if mix not in MIXES:
        raise InvalidConfig(f"no mix of faults is named {mix}; there are {', '.join(MIXES)}")
    return run_traced(Case(seed, mix, **network))


def trace_lines(network: Network) -> Iterator[str]:
    """Yield what happened in a network that was made with `log=True`, as lines of JSON without their ends."""
    names = {str(peer.peer): peer.name for peer in network.peers}
    plain = _Plain(names)
    places = [peer.name for peer in network.peers]
    for at, *entry in network.log or ():
        values: dict[str, Any] = {"t": round(at, 6)}
        match entry:
            case [int(place), int(receiver), message]:
                values |= {"lost": plain.of(message), "from": places[place], "to": places[receiver]}
            case [int(place), input, effects]:
                values |= {"peer": places[place], "in": plain.of(input), "out": [plain.of(each) for each in effects]}
            case [fault, bool(begins)]:
                values |= {"fault": encode_schedule(Schedule((fault,)))[0], "begins": begins}
        yield json.dumps(values, separators=(",", ":"))


class _Plain:
    """Turns inputs, effects and messages into values for JSON; peer ids into names."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def of(self, value: Any) -> Any:
        match value:
            case Enum():
                return value.value if isinstance(value.value, str) else value.name
            case str():
                return self._names.get(value, value)
            case bool() | int() | float() | None:
                return repr(value) if isinstance(value, float) and value in (float("inf"), -float("inf")) else value
            case np.ndarray() | bytearray():
                return self._vector(value)
            case bytes():
                return value[:SHORT].hex()
            case P2pflError():
                return f"{type(value).__name__}: {value}"
            case Statement():
                return {"is": "Statement", "signer": value.signer, "content": self.of(value.content)}
            case tuple() | list():
                return [self.of(each) for each in value]
            case dict():
                return {str(self.of(key)): self.of(each) for key, each in value.items()}
        if not is_dataclass(value):
            return type(value).__name__
        shown = [field.name for field in fields(value) if field.name not in _LEFT_OUT]
        return {"is": type(value).__name__} | {name: self.of(getattr(value, name)) for name in shown}

    @staticmethod
    def _vector(value: Any) -> str:
        content = bytes(value) if isinstance(value, bytearray) else value.tobytes()
        return f"{len(content)} bytes {hashlib.sha256(content).hexdigest()[: 2 * SHORT]}"


# In words


def load(path: Path) -> tuple[list[str], str]:
    """Return the lines of a trace, and what went wrong; a case's file is run for that.

    Raises:
        InvalidConfig: the file is neither.
    """
    text = path.read_text(encoding="utf-8")
    try:
        first = json.loads(text.split("\n", 1)[0])
    except ValueError:
        return run_traced(decode_case(text))
    if not isinstance(first, dict) or not ("case" in first or "event" in first):
        raise InvalidConfig(f"{path}: neither a trace nor a case of the simulated network")
    return text.splitlines(), ""


def tell(
    lines: Iterable[str], peer: str | None = None, round: int | None = None, *, everything: bool = False
) -> Iterator[str]:
    """Yield a trace in words, a line for each thing that happened and each answer.

    Args:
        lines: of the trace.
        peer: only what this peer sees and does, by its name.
        round: only what names this round.
        everything: timers and signs of life, too.
    """
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            told = list(_tell_entry(entry, peer, round, everything))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidConfig(f"line {number} is no line of a trace: {line[:60]!r}") from error
        yield from told


def _tell_entry(entry: dict[str, Any], peer: str | None, round: int | None, everything: bool) -> Iterator[str]:
    if "case" in entry:
        yield f"seed {entry['seed']}, mix {entry['mix']}: {entry['peers']} peers, groups of {entry['group']}"
    elif "event" in entry:
        yield from _tell_event(entry, round)
    elif "fault" in entry:
        what = _call(entry["fault"].pop("fault"), entry["fault"])
        yield f"{entry['t']:10.3f}  {'FAULT' if entry['begins'] else 'healed'} {what}"
    elif "lost" in entry:
        shown = everything or not _is_dull(entry["lost"])
        if shown and peer in (None, entry["from"], entry["to"]) and _names(entry["lost"], round):
            yield f"{entry['t']:10.3f}  lost from {entry['from']} to {entry['to']}: {_message(entry['lost'])}"
    elif peer in (None, entry["peer"]):
        answers = [each for each in entry["out"] if everything or not _is_dull(each)]
        shown = everything or bool(answers) or not _is_dull(entry["in"])
        if shown and any(_names(each, round) for each in (entry["in"], *answers)):
            yield f"{entry['t']:10.3f}  {entry['peer']}  {_input(entry['in'])}"
            yield from (f"{'':12}    -> {_effect(each)}" for each in answers)


def _tell_event(entry: dict[str, Any], round: int | None) -> Iterator[str]:
    if round is None or entry.get("round") == round:
        rest = {key: value for key, value in entry.items() if key not in ("event", "at", "bytes_in", "bytes_out")}
        yield f"{entry['at']:.3f}  {_call(entry['event'], rest)}"


def _names(value: Any, round: int | None) -> bool:
    """Return whether `value` names the round anywhere; everything does if none is asked for."""
    if round is None:
        return True
    if isinstance(value, dict):
        return value.get("round") == round or any(_names(each, round) for each in value.values())
    return isinstance(value, list) and any(_names(each, round) for each in value)


def _is_dull(value: dict[str, Any]) -> bool:
    if value["is"] in ("Send", "Received"):
        return _is_dull(value["message"])
    return value["is"] in ("Ping", "Have", "SetTimer", "CancelTimer", "TimerFired", "AcceptBulk", "Compute", "Computed")


def _input(value: dict[str, Any]) -> str:
    match value:
        case {"is": "Received", "peer": peer, "message": message}:
            return f"hears from {peer}: {_message(message)}"
        case {"is": "BulkOffered", "peer": peer, "message": message}:
            return f"is offered by {peer}: {_message(message)}"
        case {"is": "BulkReceived", "peer": peer, "message": message}:
            return f"receives from {peer}: {_message(message)}"
        case {"is": "LinkUp", "peer": peer}:
            return f"has a link to {peer}"
        case {"is": "LinkDown", "peer": peer, "reason": reason}:
            return f"has no link to {peer}: {reason}"
        case {"is": "TimerFired", "key": key}:
            return f"wakes up: {key}"
        case {"is": "Trained", "round": round, "steps": steps}:
            return f"has trained in round {round}: {steps} steps"
        case {"is": "Persisted", "key": key}:
            return f"has it on disk: {key}"
    return _plainly(value)


def _effect(value: dict[str, Any]) -> str:
    match value:
        case {"is": "Send", "peer": peer, "message": message}:
            return f"to {peer}: {_message(message)}"
        case {"is": "SendBulk", "peers": peers, "message": message}:
            return f"to {', '.join(peers)}: {_message(message)}"
        case {"is": "Persist", "record": record}:
            return f"writes down {_plainly(record)}"
        case {"is": "Emit", "event": event}:
            return f"reports {_plainly(event)}"
        case {"is": "Train", "round": round, "seconds": seconds}:
            return f"trains in round {round}, for {seconds} s"
    return _plainly(value)


def _message(value: dict[str, Any]) -> str:
    if value["is"] == "Told":
        statement = value["statement"]
        return f"member {statement['signer']} says {_plainly(statement['content'])}"
    return _plainly(value)


def _plainly(value: dict[str, Any]) -> str:
    return _call(value["is"], {key: each for key, each in value.items() if key != "is"})


def _call(name: str, values: dict[str, Any]) -> str:
    shown = [f"{key}={_short(each)}" for key, each in values.items() if each not in ("", None, [], {})]
    return f"{name}({', '.join(shown)})"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return (
            _plainly(value) if "is" in value else "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
