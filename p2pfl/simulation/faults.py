"""What goes wrong in a simulated network, as values: drawn from a seed, written to a file, shrunk to what matters.

A peer is named by its place in the network. Times are virtual seconds since the beginning. What happens is here, how it
is carried out in `p2pfl.simulation.simnet`, and what a lying peer does in `p2pfl.simulation.liars`.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from p2pfl.core.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class Crash:
    """The process dies.

    Attributes:
        restart_after: seconds until it is started again; None for never.
        keep_disk: whether what was durable is there again.
        silent: the whole host goes: nobody is told that its connections are gone.
        kept: how many of the records being written are on the disk, the first of them; None to draw it.
    """

    at: float
    peer: int
    restart_after: float | None
    keep_disk: bool = True
    silent: bool = False
    kept: int | None = None


@dataclass(frozen=True, slots=True)
class Freeze:
    """The process is stopped as by SIGSTOP; when it goes on, all that came is there, and its timers are late."""

    at: float
    until: float
    peer: int


@dataclass(frozen=True, slots=True)
class Slow:
    """Local steps and computations take `factor` times as long."""

    at: float
    until: float
    peer: int
    factor: float


@dataclass(frozen=True, slots=True)
class Cut:
    """What `sender` sends to `receiver` is lost.

    Attributes:
        one_way: the link looks as if it stood; else it breaks, for both.
    """

    at: float
    until: float
    sender: int
    receiver: int
    one_way: bool


@dataclass(frozen=True, slots=True)
class Partition:
    """Peers of different groups do not reach each other; who is in none is with those that are in none.

    Attributes:
        silent: links look as if they stood, and carry nothing.
    """

    at: float
    until: float
    groups: tuple[tuple[int, ...], ...]
    silent: bool


@dataclass(frozen=True, slots=True)
class Loss:
    """Messages are lost at this rate on links that stand, as where a full queue drops them.

    Attributes:
        peer: whose, sent and received; None for everybody's.
    """

    at: float
    until: float
    rate: float
    peer: int | None = None


@dataclass(frozen=True, slots=True)
class Delay:
    """Each message of `peer`, or of everybody, takes so many seconds longer, in both directions."""

    at: float
    until: float
    seconds: float
    peer: int | None = None


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Messages arrive a second time at this rate, up to 5 s later, also over a link made since: worse than any TCP."""

    at: float
    until: float
    rate: float
    peer: int | None = None


@dataclass(frozen=True, slots=True)
class Reorder:
    """Each message takes up to so many seconds longer, and overtakes others on its lane: worse than any TCP."""

    at: float
    until: float
    seconds: float
    peer: int | None = None


@dataclass(frozen=True, slots=True)
class ClockSkew:
    """The peer's clock jumps ahead by `jump` seconds, and from then on runs `rate` seconds a second."""

    at: float
    peer: int
    rate: float
    jump: float = 0.0


@dataclass(frozen=True, slots=True)
class FailWork:
    """The peer's next local training fails."""

    at: float
    peer: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The operator asks the peer to leave."""

    at: float
    peer: int


@dataclass(frozen=True, slots=True)
class Lie:
    """The peer lies, from `at` to the end; see `p2pfl.simulation.liars` for what it may do.

    Attributes:
        how: a key of `liars.LIES`.
        against: places of those that are lied to; empty for everybody.
        stage: for `mute`, the kind of statement after whose first sending the peer falls silent; empty: at `at`.
    """

    at: float
    peer: int
    how: str
    against: tuple[int, ...] = ()
    stage: str = ""


Fault = Crash | Freeze | Slow | Cut | Partition | Loss | Delay | Duplicate | Reorder | ClockSkew | FailWork | Stop | Lie
_KINDS: dict[str, type[Fault]] = {
    kind.__name__: kind
    for kind in (
        Crash,
        Freeze,
        Slow,
        Cut,
        Partition,
        Loss,
        Delay,
        Duplicate,
        Reorder,
        ClockSkew,
        FailWork,
        Stop,
        Lie,
    )
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """All that goes wrong in a run."""

    faults: tuple[Fault, ...] = ()

    @property
    def healed_at(self) -> float:
        """When the last fault ends that does end; lies and the lasting absence of a peer do not."""
        return max(map(_end, self.faults), default=0.0)

    @property
    def liars(self) -> frozenset[int]:
        """The places of those that lie."""
        return frozenset(fault.peer for fault in self.faults if isinstance(fault, Lie))


def _end(fault: Fault) -> float:
    if isinstance(fault, Crash):
        return fault.at + (fault.restart_after or 0.0)
    end: float = getattr(fault, "until", fault.at)
    return end


# Files


def encode_schedule(schedule: Schedule) -> list[dict[str, Any]]:
    """Return plain values that JSON can hold."""
    return [{"fault": type(fault).__name__, **asdict(fault)} for fault in schedule.faults]


def decode_schedule(values: object) -> Schedule:
    """Read what `encode_schedule` returned, perhaps through JSON.

    Raises:
        InvalidConfig: it is something else.
    """
    if not isinstance(values, list):
        raise InvalidConfig("faults: not a list")
    return Schedule(tuple(map(_decode, values)))


def _decode(value: object) -> Fault:
    if not isinstance(value, dict) or value.get("fault") not in _KINDS:
        raise InvalidConfig(f"faults: {json.dumps(value)[:80]} is none; there are {', '.join(_KINDS)}")
    kind: Any = _KINDS[value["fault"]]
    given = {key: _tuples(each) for key, each in value.items() if key != "fault"}
    try:
        fault: Fault = kind(**given)
    except TypeError as error:
        names = ", ".join(field.name for field in fields(kind))
        raise InvalidConfig(f"faults: {kind.__name__} has {names}; not {', '.join(given)}") from error
    return fault


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# Drawing

LONGEST = 3.0


def standard_mix(seed: int, peers: int, horizon: float) -> Schedule:
    """Draw one to six faults that begin between 0 and `horizon`; at most a quarter of the peers lie or do not return.

    Args:
        seed: equal seeds draw equal faults.
        peers: how many there are.
        horizon: virtual seconds; a fault lasts half as long in the mean, at most `LONGEST` times as long.
    """
    return _draw(seed, peers, horizon, _STANDARD)


def hostile_mix(seed: int, peers: int, horizon: float) -> Schedule:
    """Draw as `standard_mix` does, with a network that duplicates and reorders whatever it likes."""
    drawn = _draw(seed, peers, horizon, _STANDARD)
    draw = random.Random(f"{seed}/hostile")  # noqa: S311
    worse = (
        Duplicate(0.0, LONGEST * horizon, draw.uniform(0.0, 0.2)),
        Reorder(0.0, LONGEST * horizon, draw.uniform(0.0, 2.0)),
    )
    return Schedule(drawn.faults + worse)


def no_faults(seed: int, peers: int, horizon: float) -> Schedule:
    """Return no faults at all."""
    del seed, peers, horizon
    return Schedule()


MIXES: dict[str, Callable[[int, int, float], Schedule]] = {
    "none": no_faults,
    "standard": standard_mix,
    "hostile": hostile_mix,
}


def _draw(seed: int, peers: int, horizon: float, menu: dict[str, int]) -> Schedule:
    draw = random.Random(f"{seed}/faults")  # noqa: S311
    kinds = draw.choices(list(menu), list(menu.values()), k=draw.randint(1, 6))
    faults: list[Fault] = []
    for kind in kinds:
        begin = draw.uniform(0.0, horizon)
        end = begin + min(LONGEST * horizon, draw.expovariate(2.0 / horizon))
        fault = _DRAWERS[kind](draw, peers, begin, end)
        if not _too_much(fault, faults, peers):
            faults.append(fault)
    return Schedule(tuple(sorted(faults, key=lambda fault: fault.at)))


def _too_much(fault: Fault, others: Sequence[Fault], peers: int) -> bool:
    """Return whether with `fault` more than a quarter of the peers would be gone for ever, or would lie."""
    lost = {place for each in (*others, fault) if (place := _lost(each)) is not None}
    return len(lost) > max(1, peers // 4)


def _lost(fault: Fault) -> int | None:
    """Return whom the federation has lost for good."""
    gone = isinstance(fault, Lie | Stop) or (isinstance(fault, Crash) and fault.restart_after is None)
    return fault.peer if gone and isinstance(fault, Lie | Stop | Crash) else None


Drawer = Callable[[random.Random, int, float, float], Fault]


def _draw_crash(draw: random.Random, peers: int, begin: float, end: float) -> Fault:
    after = None if draw.random() < 0.3 else end - begin
    return Crash(begin, draw.randrange(peers), after, keep_disk=draw.random() < 0.8, silent=draw.random() < 0.3)


def _draw_cut(draw: random.Random, peers: int, begin: float, end: float) -> Fault:
    sender, receiver = draw.sample(range(peers), 2)
    return Cut(begin, end, sender, receiver, one_way=draw.random() < 0.6)


def _draw_partition(draw: random.Random, peers: int, begin: float, end: float) -> Fault:
    apart = tuple(sorted(draw.sample(range(peers), draw.randint(1, peers // 2))))
    return Partition(begin, end, (apart,), silent=draw.random() < 0.5)


def _draw_lie(draw: random.Random, peers: int, begin: float, end: float) -> Fault:
    del end
    peer, *others = draw.sample(range(peers), peers)
    how = draw.choice(("replay", "nan", "poison", "future", "flip", "split", "mute", "equivocate"))
    against = tuple(sorted(others[: draw.randint(1, peers - 1)])) if how in ("split", "equivocate") else ()
    stages = ("", "Advert", "Enrolment", "Ready", "Roots", "Acknowledged", "Proposal", "Vote")
    return Lie(begin, peer, how, against, draw.choice(stages) if how == "mute" else "")


def _someone(draw: random.Random, peers: int) -> int | None:
    return None if draw.random() < 0.5 else draw.randrange(peers)


_DRAWERS: dict[str, Drawer] = {
    "Crash": _draw_crash,
    "Freeze": lambda draw, peers, begin, end: Freeze(begin, end, draw.randrange(peers)),
    "Slow": lambda draw, peers, begin, end: Slow(begin, end, draw.randrange(peers), draw.choice((2.0, 20.0))),
    "Cut": _draw_cut,
    "Partition": _draw_partition,
    "Loss": lambda draw, peers, begin, end: Loss(begin, end, draw.choice((0.02, 0.2, 0.5)), _someone(draw, peers)),
    "Delay": lambda draw, peers, begin, end: Delay(begin, end, draw.expovariate(2.0), _someone(draw, peers)),
    "Duplicate": lambda draw, peers, begin, end: Duplicate(begin, end, draw.uniform(0.0, 0.3), _someone(draw, peers)),
    "Reorder": lambda draw, peers, begin, end: Reorder(begin, end, draw.expovariate(2.0), _someone(draw, peers)),
    "ClockSkew": lambda draw, peers, begin, _: ClockSkew(
        begin, draw.randrange(peers), draw.uniform(0.9, 1.1), draw.choice((0.0, 0.0, draw.expovariate(0.1)))
    ),
    "Stop": lambda draw, peers, begin, _: Stop(begin, draw.randrange(peers)),
    "Lie": _draw_lie,
}
_STANDARD = {
    "Crash": 6,
    "Freeze": 3,
    "Slow": 3,
    "Cut": 3,
    "Partition": 2,
    "Loss": 3,
    "Delay": 2,
    "Duplicate": 1,
    "Reorder": 1,
    "ClockSkew": 2,
    "Lie": 2,
}
"""How often each kind is drawn, in relation: guesses, with what breaks most protocols most often."""


# Shrinking


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], tries: int = 300) -> Schedule:
    """Return a smaller schedule that still fails.

    Delta debugging (Zeller and Hildebrandt 2002) over the faults, then simpler and shorter faults, until nothing more
    can go.

    Args:
        schedule: one for which `fails` is true.
        fails: runs a schedule.
        tries: how often it is run at most.
    """
    budget = _Budget(fails, tries)
    faults = _fewer(list(schedule.faults), budget)
    changed = True
    while changed:
        changed = False
        for index in range(len(faults)):
            for simpler in _simpler(faults[index]):
                if budget.fails([*faults[:index], simpler, *faults[index + 1 :]]):
                    faults[index], changed = simpler, True
                    break
    return Schedule(tuple(_fewer(faults, budget)))


class _Budget:
    def __init__(self, fails: Callable[[Schedule], bool], tries: int) -> None:
        self._fails, self._left = fails, tries

    def fails(self, faults: Sequence[Fault]) -> bool:
        self._left -= 1
        return self._left >= 0 and self._fails(Schedule(tuple(faults)))


def _fewer(faults: list[Fault], budget: _Budget) -> list[Fault]:
    size = max(1, len(faults) // 2)
    while faults:
        for begin in range(0, len(faults), size):
            rest = faults[:begin] + faults[begin + size :]
            if budget.fails(rest):
                faults = rest
                break
        else:
            if size == 1:
                return faults
            size = max(1, size // 2)
    return faults


def _simpler(fault: Fault) -> Iterator[Fault]:
    """Yield variants of `fault` that say less, the simplest first."""
    if isinstance(fault, Crash):
        if fault.silent:
            yield replace(fault, silent=False)
        if not fault.keep_disk:
            yield replace(fault, keep_disk=True)
        if fault.restart_after is not None and fault.restart_after > 1.0:
            yield replace(fault, restart_after=_rounder(fault.restart_after / 2))
    if isinstance(fault, Cut) and not fault.one_way:
        yield replace(fault, one_way=True)
    if isinstance(fault, Freeze | Slow | Cut | Partition | Loss | Delay | Duplicate | Reorder):
        length = fault.until - fault.at
        if length > 1.0:
            yield replace(fault, until=fault.at + _rounder(length / 2))
            yield replace(fault, at=fault.until - _rounder(length / 2))
    if fault.at != round(fault.at, 1):
        yield replace(fault, at=round(fault.at, 1))


def _rounder(seconds: float) -> float:
    return round(seconds, 1)
